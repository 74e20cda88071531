"""What a cluster's platform team decides once, in one YAML file: images, namespace, queue, storage, secrets by name.

What a run decides (GPUs, memory, hours of a step) is in its recipe; secrets' values are nowhere here, only the names of
the Secrets that hold them. The file is the one named by ORBIT_SITE, else /etc/orbit/site.yaml where it exists, which is
where the overlays mount it.
"""

from __future__ import annotations

import os
import posixpath
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from orbit_core.errors import InputError

MOUNTED = Path("/etc/orbit/site.yaml")

# Where a step's pod has what is Orbit's own; see k8s/pod.py.
SCRATCH, TMP, SHM, SPEC_FILE = "/scratch", "/tmp", "/dev/shm", "/orbit/spec/spec.json"

Name = Annotated[str, Field(pattern=r"^[a-z0-9]([-a-z0-9.]*[a-z0-9])?$", max_length=63)]


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Images(Section):
    """Both images hold the same Orbit: a pod refuses a spec of another version of its step."""

    cpu: str = Field(description="for steps without a GPU")
    gpu: str = Field(description="for steps with GPUs: Megatron, SGLang and Ray inside")
    pull_policy: Literal["Always", "IfNotPresent", "Never"] = "IfNotPresent"
    pull_secret: str | None = Field(None, description="name of a Secret of type kubernetes.io/dockerconfigjson")
    patience_seconds: int = Field(600, ge=1, description="how long an image may fail to be pulled before we give up")


class Scratch(Section):
    """Node-local room for fetched inputs and work in progress."""

    kind: Literal["ephemeral", "empty_dir", "host_path"] = "empty_dir"
    storage_class: str | None = Field(None, description="ephemeral: class of node-local volumes, e.g. local NVMe")
    path: str | None = Field(
        None,
        pattern=r"^/",
        description="host_path: a directory of the node that `user` may write; survives pods, so inputs stay. "
        "Namespaces under the pod security standards baseline and restricted do not allow it",
    )

    @model_validator(mode="after")
    def _fits_kind(self) -> Scratch:
        if (self.kind == "host_path") != (self.path is not None):
            raise ValueError("path is required for kind host_path, and only there")
        if self.storage_class is not None and self.kind != "ephemeral":
            raise ValueError(f"storage_class is for kind ephemeral, found kind {self.kind}")
        return self


class Mount(Section):
    """A PersistentVolumeClaim that every step sees: a store or models on a shared filesystem."""

    claim: Name
    path: str = Field(pattern=r"^/[^:]*$", description="the same in every pod and for the orchestrator")
    read_only: bool = False

    @field_validator("path")
    @classmethod
    def _free(cls, path: str) -> str:
        """The path in its plain form, if it would hide none of the folders that a step needs."""
        plain = posixpath.normpath("/" + path.strip("/"))
        needed = (SCRATCH, TMP, SHM, posixpath.dirname(SPEC_FILE), "/usr", "/etc", "/proc")
        if any(posixpath.commonpath([plain, folder]) == plain for folder in needed):
            raise ValueError(f"must hide none of {', '.join(needed)}")
        return plain


class Toleration(Section):
    key: str | None = None
    operator: Literal["Exists", "Equal"] = "Exists"
    value: str | None = None
    effect: Literal["NoSchedule", "PreferNoSchedule", "NoExecute"] | None = None


class Site(Section):
    """One cluster as Orbit uses it."""

    namespace: Annotated[str, Field(pattern=r"^[a-z0-9]([-a-z0-9]*[a-z0-9])?$", max_length=63)] = "orbit"
    images: Images
    service_account: Name = Field("orbit-step", description="of the step pods; its token is never mounted")
    user: int = Field(10001, ge=1, description="uid and gid of the step pods, and the group of their volumes")
    store: str | None = Field(None, description="where artifacts go unless a run says otherwise")
    queue: Name | None = Field(None, description="Kueue LocalQueue of this namespace")
    queue_priority: Name | None = Field(None, description="Kueue WorkloadPriorityClass: who waits, who is preempted")
    priority_class: Name | None = Field(None, description="PriorityClass of the pods")
    topology: str | None = Field(None, description="Kueue topology level that a pod prefers, e.g. cloud/rack")
    node_selector: dict[str, str] = Field(default_factory=dict, description="for steps with GPUs")
    tolerations: tuple[Toleration, ...] = Field((Toleration(key="nvidia.com/gpu"),), description="for steps with GPUs")
    scratch: Scratch = Scratch()
    mounts: tuple[Mount, ...] = ()
    environment_secret: Name | None = Field(None, description="Secret whose keys become environment: AWS_* for S3")
    environment_config: Name | None = Field(None, description="ConfigMap whose keys become environment")
    ttl_seconds: int = Field(7 * 24 * 3600, ge=60, description="how long a finished Job stays to be looked at")
    lease_seconds: float = Field(60.0, gt=0, description="silence after which a pod's claim on its step is broken")
    package: str = Field("orbit_core.steps", description="Python package that holds the steps")

    @field_validator("mounts")
    @classmethod
    def _apart(cls, mounts: tuple[Mount, ...]) -> tuple[Mount, ...]:
        paths = [mount.path for mount in mounts]
        if len(set(paths)) < len(paths):
            raise ValueError(f"two mounts have one path: {paths}")
        return mounts

    @classmethod
    def load(cls, path: str | Path | None = None) -> Site:
        """The site file at `path`, else where the module says. InputError if there is none or it is wrong."""
        file = Path(path or os.environ.get("ORBIT_SITE") or MOUNTED)
        try:
            content = yaml.safe_load(file.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise InputError(
                f"site file {file}",
                "a YAML file that describes the cluster",
                "no such file",
                "write one (k8s/README.md shows it) and name it in ORBIT_SITE",
            ) from None
        except (UnicodeDecodeError, yaml.YAMLError) as error:
            raise InputError(f"site file {file}", "YAML", str(error)) from None
        return cls.parse(content, f"site file {file}")

    @classmethod
    def parse(cls, content: Any, source: str = "site") -> Site:
        try:
            return cls.model_validate(content)
        except ValidationError as error:
            lines = [f"{'.'.join(map(str, e['loc']))}: {e['msg']}, found {e['input']!r}" for e in error.errors()]
            raise InputError(f"{source}: {len(lines)} field(s) are wrong\n  " + "\n  ".join(lines)) from None
