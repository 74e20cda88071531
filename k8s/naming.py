"""Names that are functions of a step's digest, so that whoever comes second finds what the first has made."""

from __future__ import annotations

import hashlib
import re

from orbit_core.errors import InputError
from orbit_core.steps.contract import StepSpec

STEP_LABEL = "orbit/step"
DIGEST_LABEL = "orbit/digest"  # first 16 hex digits: a label value has at most 63 characters
DIGEST_ANNOTATION = "orbit/digest"  # all 64
STORE_ANNOTATION = "orbit/store"
SPEC_ANNOTATION = "orbit/spec"  # the StepSpec as JSON; the pod reads it as a file through the downward API
QUEUE_LABEL = "kueue.x-k8s.io/queue-name"
CONTAINER = "step"
STAGE_CONTAINER = "stage"


def job_name(spec: StepSpec) -> str:
    """`orbit-<step>-<digest16>-<store4>`: a legal DNS label, the same for every caller.

    The store is in it because the same step for two stores is two pieces of work with one digest. Raises InputError
    for a step whose name fits in none: pods carry the Job's name in a label, which ends at 63 characters.
    """
    if not re.fullmatch(r"[a-z]([a-z0-9_]{0,33}[a-z0-9])?", spec.step):
        raise InputError(
            "name of a step", "at most 35 of a-z, 0-9 and _, from a letter to a letter or digit", repr(spec.step)
        )
    store = hashlib.sha256(spec.store.encode()).hexdigest()[:4]
    return f"orbit-{spec.step.replace('_', '-')}-{spec.digest[:16]}-{store}"


def labels_of(spec: StepSpec) -> dict[str, str]:
    return {"app.kubernetes.io/name": "orbit", STEP_LABEL: spec.step, DIGEST_LABEL: spec.digest[:16]}


def annotations_of(spec: StepSpec) -> dict[str, str]:
    """What adoption is decided by, and the spec itself."""
    return {
        DIGEST_ANNOTATION: spec.digest,
        STORE_ANNOTATION: spec.store,
        SPEC_ANNOTATION: spec.model_dump_json(),
    }
