"""What surrounds a step in its pod: folders, environment, and what it may not do.

/scratch      inputs and work in progress, HOME and TMPDIR; node-local, of the kind that the site names
/tmp          for programs that do not ask (Ray's sockets); dies with the pod
/dev/shm      memory that processes share, counted against the pod's
/orbit/spec   the step's spec, from an annotation of the pod
and the site's mounts. The rest is the image, read-only.
"""

from __future__ import annotations

import posixpath

from kubernetes.client import (
    V1Capabilities,
    V1ConfigMapEnvSource,
    V1DownwardAPIVolumeFile,
    V1DownwardAPIVolumeSource,
    V1EmptyDirVolumeSource,
    V1EnvFromSource,
    V1EnvVar,
    V1EnvVarSource,
    V1EphemeralVolumeSource,
    V1HostPathVolumeSource,
    V1ObjectFieldSelector,
    V1PersistentVolumeClaimSpec,
    V1PersistentVolumeClaimTemplate,
    V1PersistentVolumeClaimVolumeSource,
    V1PodSecurityContext,
    V1SeccompProfile,
    V1SecretEnvSource,
    V1SecurityContext,
    V1Volume,
    V1VolumeMount,
    V1VolumeResourceRequirements,
)

from k8s.naming import SPEC_ANNOTATION
from k8s.site import SCRATCH, SHM, SPEC_FILE, TMP, Site
from orbit_core.recipe import Resources

TMP_GIB = 8


def environment(site: Site, gpus: int) -> list[V1EnvVar]:
    """No credentials: those come from `sources`. A host path outlives the pod, so there temporary files go to /tmp."""
    home = TMP if site.scratch.kind == "host_path" else SCRATCH
    pod_name = V1EnvVarSource(field_ref=V1ObjectFieldSelector(field_path="metadata.name"))
    variables = [
        V1EnvVar(name="POD_NAME", value_from=pod_name),
        V1EnvVar(name="HOME", value=home),
        V1EnvVar(name="TMPDIR", value=home),
        V1EnvVar(name="PYTHONUNBUFFERED", value="1"),
    ]
    # CUDA images ask for every GPU of the node unless told otherwise; the device plugin tells those that have some.
    return variables if gpus else [*variables, V1EnvVar(name="NVIDIA_VISIBLE_DEVICES", value="void")]


def sources(site: Site) -> list[V1EnvFromSource]:
    """The Secret and the ConfigMap whose keys become environment, by name."""
    secret, config = site.environment_secret, site.environment_config
    return [
        *([V1EnvFromSource(config_map_ref=V1ConfigMapEnvSource(name=config))] if config else []),
        *([V1EnvFromSource(secret_ref=V1SecretEnvSource(name=secret))] if secret else []),
    ]


def volumes(resources: Resources, site: Site) -> list[V1Volume]:
    annotation = V1ObjectFieldSelector(field_path=f"metadata.annotations['{SPEC_ANNOTATION}']")
    spec = V1DownwardAPIVolumeSource(
        items=[V1DownwardAPIVolumeFile(path=posixpath.basename(SPEC_FILE), field_ref=annotation)]
    )
    memory = V1EmptyDirVolumeSource(medium="Memory", size_limit=f"{resources.shm_gib}Gi")
    return [
        V1Volume(name="spec", downward_api=spec),
        _scratch(resources, site),
        V1Volume(name="tmp", empty_dir=V1EmptyDirVolumeSource(size_limit=f"{TMP_GIB}Gi")),
        *([V1Volume(name="shm", empty_dir=memory)] if resources.shm_gib else []),
        *(
            V1Volume(
                name=f"mount-{index}",
                persistent_volume_claim=V1PersistentVolumeClaimVolumeSource(
                    claim_name=mount.claim, read_only=mount.read_only or None
                ),
            )
            for index, mount in enumerate(site.mounts)
        ),
    ]


def volume_mounts(resources: Resources, site: Site) -> list[V1VolumeMount]:
    return [
        V1VolumeMount(name="spec", mount_path=posixpath.dirname(SPEC_FILE), read_only=True),
        V1VolumeMount(name="scratch", mount_path=SCRATCH),
        V1VolumeMount(name="tmp", mount_path=TMP),
        *([V1VolumeMount(name="shm", mount_path=SHM)] if resources.shm_gib else []),
        *(
            V1VolumeMount(name=f"mount-{index}", mount_path=mount.path, read_only=mount.read_only or None)
            for index, mount in enumerate(site.mounts)
        ),
    ]


def _scratch(resources: Resources, site: Site) -> V1Volume:
    size = f"{resources.scratch_gib}Gi"
    match site.scratch.kind:
        case "empty_dir":
            return V1Volume(name="scratch", empty_dir=V1EmptyDirVolumeSource(size_limit=size))
        case "host_path":  # must be there: one that the kubelet makes belongs to root
            return V1Volume(name="scratch", host_path=V1HostPathVolumeSource(path=site.scratch.path, type="Directory"))
        case "ephemeral":
            claim = V1PersistentVolumeClaimSpec(
                access_modes=["ReadWriteOnce"],
                storage_class_name=site.scratch.storage_class,
                resources=V1VolumeResourceRequirements(requests={"storage": size}),
            )
            template = V1PersistentVolumeClaimTemplate(spec=claim)
            return V1Volume(name="scratch", ephemeral=V1EphemeralVolumeSource(volume_claim_template=template))


def pod_security(site: Site) -> V1PodSecurityContext:
    return V1PodSecurityContext(
        run_as_non_root=True,
        run_as_user=site.user,
        run_as_group=site.user,
        fs_group=site.user,
        fs_group_change_policy="OnRootMismatch",  # else the kubelet walks terabytes before the pod starts
        seccomp_profile=V1SeccompProfile(type="RuntimeDefault"),
    )


def container_security() -> V1SecurityContext:
    return V1SecurityContext(
        allow_privilege_escalation=False,
        read_only_root_filesystem=True,
        capabilities=V1Capabilities(drop=["ALL"]),
    )
