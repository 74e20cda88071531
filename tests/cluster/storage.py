"""The cluster's dynamic volumes: folders on a node's disk, given to whoever claims one.

Kubernetes itself does the rest: the scheduler picks the node, its controllers bind the volume to the claim. The class
is the default one, and waits for the first pod, as classes of node-local disks do.
"""

from __future__ import annotations

import threading

from cluster.api import Api, ApiError, Object

CLASS, PROVISIONER = "node-local", "tests/node"
CLAIMS, VOLUMES = "/api/v1/persistentvolumeclaims", "/api/v1/persistentvolumes"


class Provisioner:
    """`api` is that of an administrator. Works in threads of its own until `stop`."""

    def __init__(self, api: Api) -> None:
        self._api, self._stopped = api, threading.Event()

    def start(self) -> None:
        default = {"storageclass.kubernetes.io/is-default-class": "true"}
        kind = {"metadata": {"name": CLASS, "annotations": default}, "provisioner": PROVISIONER}
        kind |= {"volumeBindingMode": "WaitForFirstConsumer"}
        self._api.post("/apis/storage.k8s.io/v1/storageclasses", kind)
        for path, action in ((CLAIMS, self._provide), (VOLUMES, self._reclaim)):
            arguments = (path, self._stopped, action)
            threading.Thread(target=self._api.follow, args=arguments, daemon=True).start()

    def stop(self) -> None:
        self._stopped.set()

    def _provide(self, claim: Object) -> None:
        """A volume for a claim whose pod has been given a node."""
        metadata, spec = claim["metadata"], claim["spec"]
        annotations = metadata.get("annotations", {})
        node = annotations.get("volume.kubernetes.io/selected-node")
        ours = annotations.get("volume.kubernetes.io/storage-provisioner") == PROVISIONER
        if not (ours and node) or claim["status"].get("phase") != "Pending" or "deletionTimestamp" in metadata:
            return
        name = f"volume-{metadata['uid']}"
        keys = ("name", "namespace", "uid", "resourceVersion")
        volume = {
            "metadata": {"name": name, "annotations": {"pv.kubernetes.io/provisioned-by": PROVISIONER}},
            "spec": {
                "capacity": {"storage": spec["resources"]["requests"]["storage"]},
                "accessModes": spec["accessModes"],
                "storageClassName": CLASS,
                "persistentVolumeReclaimPolicy": "Delete",
                "hostPath": {"path": f"/volumes/{name}"},
                "claimRef": {"apiVersion": "v1", "kind": "PersistentVolumeClaim", **{k: metadata[k] for k in keys}},
                "nodeAffinity": {"required": {"nodeSelectorTerms": [{"matchExpressions": [_is_on(node)]}]}},
            },
        }
        try:
            self._api.post(VOLUMES, volume)
        except ApiError as error:
            if error.status != 409:  # made before, and not bound yet
                raise

    def _reclaim(self, volume: Object) -> None:
        if volume["status"].get("phase") == "Released" and volume["spec"].get("storageClassName") == CLASS:
            self._api.delete(f"{VOLUMES}/{volume['metadata']['name']}")


def _is_on(node: str) -> Object:
    return {"key": "kubernetes.io/hostname", "operator": "In", "values": [node]}
