"""A pod's volumes as folders of this machine."""

from __future__ import annotations

import base64
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from cluster.api import Api, ApiError, Object
from cluster.environment import Lookup, Unsupported, Waiting, field


@dataclass(frozen=True)
class Host:
    """What a node has: its own disk under `root`, and the API, for what a volume is filled with."""

    api: Api
    root: Path

    def lookup(self, namespace: str) -> Lookup:
        """Content of a Secret or ConfigMap; Waiting while there is none and it is not optional."""

        def found(kind: str, name: str, optional: bool) -> dict[str, bytes]:
            try:
                value = self.api.get(f"/api/v1/namespaces/{namespace}/{kind}s/{name}")
            except ApiError as error:
                if optional and error.status == 404:
                    return {}
                # The node's authorizer answers 403 for a Secret that no pod of this node names, or that is not there.
                raise Waiting("CreateContainerConfigError", f'{kind} "{name}" not found') from error
            binary = value.get("data" if kind == "secret" else "binaryData") or {}
            plain = {} if kind == "secret" else value.get("data") or {}
            return {key: base64.b64decode(text) for key, text in binary.items()} | {
                key: text.encode() for key, text in plain.items()
            }

        return found

    def path(self, path: str) -> Path:
        """A path of the node: itself where it exists on this machine, else below the node's own root, so that no test
        makes folders at the top of somebody's disk.
        """
        return Path(path) if Path(path).exists() else self.root / path.lstrip("/")


def mounted(pod: Object, host: Host, folder: Path) -> dict[str, Path]:
    """Volume name -> its folder (or file), made and filled. Waiting while something is missing."""
    volumes = pod["spec"].get("volumes", [])
    return {volume["name"]: _mount(volume, pod, host, folder / volume["name"]) for volume in volumes}


def folders_of(container: Object, volumes: dict[str, Path]) -> dict[str, Path]:
    """Mount path -> folder, for one container. /dev/shm stays what it is on this machine."""
    found = {}
    for mount in container.get("volumeMounts", []):
        if "subPathExpr" in mount:
            raise Unsupported("subPathExpr")
        if mount["mountPath"] == "/dev/shm":
            continue
        target = volumes[mount["name"]]
        if mount.get("subPath"):
            target = target / mount["subPath"]
            if not target.exists():
                target.mkdir(parents=True)
        found[mount["mountPath"]] = target
    return found


def _mount(volume: Object, pod: Object, host: Host, folder: Path) -> Path:
    kind = next(key for key in volume if key != "name")
    source, lookup = volume[kind], host.lookup(pod["metadata"]["namespace"])
    if kind == "hostPath":
        return _host_path(source, host)
    if kind in ("persistentVolumeClaim", "ephemeral"):
        return _claim(source.get("claimName") or f"{pod['metadata']['name']}-{volume['name']}", pod, host)
    folder.mkdir(parents=True, exist_ok=True)
    if kind == "emptyDir":
        return folder
    sources = source.get("sources", []) if kind == "projected" else [{kind: source}]
    for part in sources:
        for name, content in _files(part, pod, host, lookup).items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(content)
    return folder


def _files(source: Object, pod: Object, host: Host, lookup: Lookup) -> dict[str, bytes]:
    """The files of a volume that the API fills."""
    kind, value = next(iter(source.items()))
    if kind == "downwardAPI":
        if any("fieldRef" not in item for item in value.get("items", [])):
            raise Unsupported("resourceFieldRef")
        return {item["path"]: field(pod, item["fieldRef"]["fieldPath"]).encode() for item in value.get("items", [])}
    if kind in ("secret", "configMap"):
        name = value.get("secretName") or value["name"]
        content = lookup(kind.lower(), name, value.get("optional", False))
        items = value.get("items")
        return {item["path"]: content[item["key"]] for item in items} if items else content
    if kind == "serviceAccountToken":
        return {value["path"]: _token(value, pod, host)}
    raise Unsupported(f"volume of kind {kind}")


def _token(source: Object, pod: Object, host: Host) -> bytes:
    metadata = pod["metadata"]
    bound = {"apiVersion": "v1", "kind": "Pod", "name": metadata["name"], "uid": metadata["uid"]}
    spec = {"boundObjectRef": bound, "expirationSeconds": source.get("expirationSeconds", 3600)}
    if source.get("audience"):
        spec["audiences"] = [source["audience"]]
    account = f"/api/v1/namespaces/{metadata['namespace']}/serviceaccounts/{pod['spec']['serviceAccountName']}"
    request = {"apiVersion": "authentication.k8s.io/v1", "kind": "TokenRequest", "spec": spec}
    token: str = host.api.post(f"{account}/token", request)["status"]["token"]
    return token.encode()


def _host_path(source: Object, host: Host) -> Path:
    path, wanted = host.path(source["path"]), source.get("type", "")
    make: dict[str, Callable[[], object]] = {
        "": lambda: path.mkdir(parents=True, exist_ok=True) if not path.exists() else None,
        "DirectoryOrCreate": lambda: path.mkdir(parents=True, exist_ok=True),
        "Directory": lambda: None,
    }
    if wanted not in make:
        raise Unsupported(f"hostPath of type {wanted}")
    make[wanted]()
    if not path.is_dir():
        raise Waiting("ContainerCreating", f"hostPath type check failed: {source['path']} is not a directory")
    return path


def _claim(name: str, pod: Object, host: Host) -> Path:
    """The folder of the volume that a claim is bound to."""
    try:
        claim = host.api.get(f"/api/v1/namespaces/{pod['metadata']['namespace']}/persistentvolumeclaims/{name}")
        volume = host.api.get(f"/api/v1/persistentvolumes/{claim['spec']['volumeName']}")
    except (ApiError, KeyError) as error:
        raise Waiting("ContainerCreating", f'persistentvolumeclaim "{name}" is not bound: {error}') from error
    path = volume["spec"].get("hostPath", volume["spec"].get("local", {})).get("path")
    if path is None:
        raise Unsupported(f"persistent volume {volume['metadata']['name']} that is neither hostPath nor local")
    folder = host.path(re.sub("/+$", "", path))
    folder.mkdir(parents=True, exist_ok=True)
    return folder
