"""What a container's process is given: its variables, its command, and real folders in place of its mount paths."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from cluster.api import Object

_REFERENCE = re.compile(r"\$\$|\$\(([A-Za-z_][A-Za-z0-9_.-]*)\)")
_KEYED = re.compile(r"metadata\.(annotations|labels)\['([^']+)'\]")

Lookup = Callable[[str, str, bool], dict[str, bytes]]  # (kind, name, optional) -> content of a Secret or ConfigMap


class Waiting(Exception):
    """Not yet possible: the container waits, for a reason that its status shows, and we try again."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason, self.message = reason, message


class Unsupported(Exception):
    """The pod asks for what this node does not do; it says so rather than do something else."""


def field(pod: Object, path: str) -> str:
    """A field of the pod as the downward API writes it; "" where it is not set."""
    metadata, spec = pod["metadata"], pod["spec"]
    if keyed := _KEYED.fullmatch(path):
        return str(metadata.get(keyed[1], {}).get(keyed[2], ""))
    if path in ("metadata.labels", "metadata.annotations"):
        values = metadata.get(path.split(".")[1], {})
        return "\n".join(f'{key}="{value}"' for key, value in sorted(values.items()))
    section, _, name = path.partition(".")
    known = {
        "metadata": {"name": metadata["name"], "namespace": metadata["namespace"], "uid": metadata["uid"]},
        "spec": {"nodeName": spec.get("nodeName", ""), "serviceAccountName": spec.get("serviceAccountName", "")},
        "status": {"podIP": pod["status"].get("podIP", ""), "hostIP": pod["status"].get("hostIP", "")},
    }
    if name not in known.get(section, {}):
        raise Unsupported(f"field {path} of the downward API")
    return str(known[section][name])


def variables(container: Object, pod: Object, lookup: Lookup) -> dict[str, str]:
    """The container's own variables, in the order of its spec, references expanded. Waiting if a Secret is missing."""
    values: dict[str, str] = {}
    for source in container.get("envFrom", []):
        kind, reference = _reference(source, {"secretRef": "secret", "configMapRef": "configmap"})
        found = lookup(kind, reference["name"], reference.get("optional", False))
        values |= {source.get("prefix", "") + key: value.decode() for key, value in found.items()}
    for variable in container.get("env", []):
        value = _value_of(variable, pod, values, lookup)
        if value is not None:
            values[variable["name"]] = value
    return values


def _value_of(variable: Object, pod: Object, before: dict[str, str], lookup: Lookup) -> str | None:
    source = variable.get("valueFrom")
    if source is None:
        return expanded(variable.get("value", ""), before)
    if "fieldRef" in source:
        return field(pod, source["fieldRef"]["fieldPath"])
    kind, reference = _reference(source, {"secretKeyRef": "secret", "configMapKeyRef": "configmap"})
    optional = reference.get("optional", False)
    found = lookup(kind, reference["name"], optional)
    if reference["key"] in found:
        return found[reference["key"]].decode()
    if optional:
        return None
    message = f"couldn't find key {reference['key']} in {kind} {pod['metadata']['namespace']}/{reference['name']}"
    raise Waiting("CreateContainerConfigError", message)


def _reference(source: Object, kinds: dict[str, str]) -> tuple[str, Object]:
    for name, kind in kinds.items():
        if name in source:
            return kind, source[name]
    raise Unsupported(f"environment from {', '.join(source)}")


def expanded(text: str, values: dict[str, str]) -> str:
    """`$(NAME)` replaced where NAME is known, `$$` a dollar: the rule of Kubernetes."""

    def replacement(match: re.Match[str]) -> str:
        return "$" if match[0] == "$$" else values.get(match[1], match[0])

    return _REFERENCE.sub(replacement, text)


class Paths:
    """Mount paths of a container -> folders of this machine, wherever one begins a path in a text."""

    def __init__(self, folders: dict[str, Path]) -> None:
        self._folders = {path.rstrip("/"): folder for path, folder in folders.items()}
        longest_first = sorted(map(re.escape, self._folders), key=len, reverse=True)
        self._pattern = re.compile(rf"(?:(?<![\w.\-/])|(?<=://))(?:{'|'.join(longest_first)})(?![\w.\-])")

    def __call__(self, text: str) -> str:
        return self._pattern.sub(lambda found: str(self._folders[found[0]]), text) if self._folders else text


def base_environment(home: Path, hostname: str) -> dict[str, str]:
    """What an image would bring: nothing of the tests' own environment, no credentials, no kubeconfig."""
    return {
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), "/usr/local/bin", "/usr/bin", "/bin"]),
        "PYTHONDONTWRITEBYTECODE": "1",
        "HOME": str(home),
        "TMPDIR": str(home / "tmp"),
        "HOSTNAME": hostname,
        "LANG": "C.UTF-8",
        "OMP_NUM_THREADS": "1",
        "OMP_WAIT_POLICY": "PASSIVE",
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }


def command_line(container: Object, values: dict[str, str], paths: Paths) -> list[str]:
    """The process to start. There is no image, so there is no entry point but the one that the pod names."""
    if not container.get("command"):
        raise Unsupported(f"container {container['name']} without a command: this node has no image to take one from")
    parts: list[Any] = [*container["command"], *container.get("args", [])]
    return [paths(expanded(part, values)) for part in parts]
