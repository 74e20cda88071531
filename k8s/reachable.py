"""Whether a pod will find what its spec names; asked before a Job is made, as its pod would say so an hour later.

A store is s3://, or a folder under a writable mount of the site; a file or directory of the person's own lies under a
mount. Mounts have one path everywhere, so that what the orchestrator digests is what the pods read.
"""

from __future__ import annotations

import posixpath

from k8s.site import Mount, Site
from orbit_core.errors import InputError
from orbit_core.steps.contract import StepSpec
from orbit_core.store import split_url


def check_reachable(spec: StepSpec, site: Site) -> None:
    """InputError if the step's pod could not open its store or one of its inputs."""
    check_store(spec.store, site)
    for name, ref in spec.inputs.items():
        if ref.path is not None and _mount_of(ref.path, site) is None:
            raise InputError(
                f"step {spec.step}: input {name} at {ref.path}",
                f"an absolute path under a mount of the site: {_paths(site.mounts)}",
                "a path that pods do not see",
                "put it on a volume that the site file mounts, here and in the pods at one path",
            )


def check_store(url: str, site: Site) -> None:
    parts = split_url(url)
    if parts is not None and parts.scheme != "file":
        return
    mount = _mount_of(url if parts is None else parts.path, site)
    if mount is None or mount.read_only:
        writable = tuple(mount for mount in site.mounts if not mount.read_only)
        raise InputError(
            f"store {url}",
            f"s3://bucket/prefix, or an absolute folder under a writable mount of the site: {_paths(writable)}",
            "a folder that pods do not see" if mount is None else f"a folder under {mount.path}, which is read-only",
            "name another store, or add the volume to `mounts` of the site file",
        )


def _mount_of(path: str, site: Site) -> Mount | None:
    """The innermost mount that holds `path`. Symbolic links are not followed: a pod has its own."""
    if not path.startswith("/"):
        return None
    normal = posixpath.normpath(path)
    holding = [mount for mount in site.mounts if posixpath.commonpath([normal, mount.path]) == mount.path]
    return max(holding, key=lambda mount: len(mount.path), default=None)


def _paths(mounts: tuple[Mount, ...]) -> str:
    return ", ".join(mount.path for mount in mounts) or "it has none"
