"""A damaged artifact made again: its manifest is taken away, and the step run that it was made by.

Everything that is needed is looked for first, so that nothing is taken away in vain. What later steps made of it stays:
they are named by the digest of what this artifact was made of, which is the same.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from orbit_core.errors import InputError
from orbit_core.executors.base import Event, Executor
from orbit_core.steps.contract import StepSpec
from orbit_core.store.artifacts import Artifact, ArtifactStore
from orbit_core.store.base import Store
from orbit_core.store.digests import digest_path
from orbit_core.store.manifests import read_manifest, redo_command
from orbit_core.store.verifying import Place, artifact_damages, spec_of


def redo(
    place: Place, own: Mapping[str, str], executor: Executor, on_event: Callable[[Event], None] = lambda event: None
) -> Artifact | None:
    """The artifact at `place`, made again; None if it is whole. `own`: paths of the inputs that are the person's.

    InputError if the place is no artifact, or an input is missing or another one. An artifact whose manifest itself is
    damaged is only taken away, since nothing else says how it was made: InputError with what to run.
    """
    path, store = place.manifest, place.store
    if path is None:
        raise InputError(
            f"{store.url}", "an artifact: .../artifacts/STEP/DIGEST", "something else", "orbit verify PATH"
        )
    damages = list(artifact_damages(store, path, lambda what: None))
    if not damages:
        return None
    try:
        manifest = read_manifest(store, path)
    except FileNotFoundError:
        raise damages[0] from None
    except InputError as damage:
        store.delete(path)
        again = "run the recipe again (orbit run RECIPE): the damaged manifest is gone, and this step will be made anew"
        raise InputError(damage.what, damage.expected, damage.found, again) from None
    spec = spec_of(manifest, store.url, dict(own))
    _check_inputs(spec, store, redo_command(store.url_of(manifest.prefix), manifest.inputs))
    store.delete(path)
    return executor.run(spec, on_event)


def _check_inputs(spec: StepSpec, store: Store, command: str) -> None:
    for name, ref in spec.inputs.items():
        what, expected = f"step {spec.step}: input {name}", f"content digest {ref.digest[:16]}"
        if ref.step is not None:
            if ArtifactStore(store).find(ref.step, ref.digest) is None:
                found = f"no artifact {ref.step}/{ref.digest[:16]} in store {store.url}"
                raise InputError(what, expected, found, "run the recipe again: orbit run RECIPE")
        elif ref.path is None:
            raise InputError(what, f"the path of what it was made of, with {expected}", "none", command)
        elif (found := digest_path(ref.path)) != ref.digest:
            raise InputError(f"{what} at {ref.path}", expected, found[:16], command)
