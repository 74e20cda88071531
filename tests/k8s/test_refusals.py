"""What is refused before a Job is made: by the site file, and because a pod could not do its work."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from k8s.manifests import job
from k8s.naming import job_name
from k8s.site import Site
from orbit_core.errors import InputError
from orbit_core.recipe import Resources
from orbit_core.steps.contract import InputRef, StepSpec

SHARED = [{"claim": "shared", "path": "/shared"}, {"claim": "models", "path": "/models", "read_only": True}]


def spec_of(step: str = "train", **fields: Any) -> StepSpec:
    return StepSpec(**{"step": step, "version": 1, "params": {}, "inputs": {}, "store": "s3://b/p", **fields})


def site_of(**fields: Any) -> Site:
    return Site.parse({"images": {"cpu": "orbit-cpu:1", "gpu": "orbit-node:1"}, **fields})


# What a pod could not do is refused before it is asked to


@pytest.mark.parametrize(
    ("store", "found"),
    [
        (".orbit", "do not see"),
        ("/data/store", "do not see"),
        ("/shared-too/store", "do not see"),
        ("/shared/../data", "do not see"),
        ("file:///data/store", "do not see"),
        ("/models/store", "read-only"),
        ("gs://bucket/prefix", "scheme 'gs'"),
        ("s3:///prefix", "no bucket"),
    ],
)
def test_a_store_that_pods_cannot_write_is_refused(store: str, found: str) -> None:
    with pytest.raises(InputError) as caught:
        job(spec_of(store=store), Resources(), site_of(mounts=SHARED))
    assert found in caught.value.found


@pytest.mark.parametrize("path", ["rows.jsonl", "~/rows.jsonl", "/data/rows.jsonl", "/models/../rows.jsonl"])
def test_a_file_that_pods_do_not_see_is_refused(path: str) -> None:
    spec = spec_of("data", inputs={"rows": InputRef(digest="0" * 64, path=path)})
    with pytest.raises(InputError, match=re.escape(f"input rows at {path}")) as caught:
        job(spec, Resources(), site_of(mounts=SHARED))
    assert "/shared, /models" in caught.value.expected


def test_a_file_under_a_mount_is_accepted_also_a_read_only_one() -> None:
    spec = spec_of("data", inputs={"rows": InputRef(digest="0" * 64, path="/models/qwen/rows.jsonl")})
    assert job(spec, Resources(), site_of(mounts=SHARED))


@pytest.mark.parametrize(("device", "gpus", "needed"), [("cuda", 0, 1), ("cuda:3", 3, 4)])
def test_a_device_that_the_pod_would_not_have_is_refused(device: str, gpus: int, needed: int) -> None:
    spec = spec_of(params={"engines": {"device": device}})
    with pytest.raises(InputError, match=rf"at least {needed} GPU") as caught:
        job(spec, Resources(gpus=gpus), site_of())
    assert "resources.train.gpus" in caught.value.fix
    assert job(spec, Resources(gpus=needed), site_of())


def test_a_spec_too_large_for_an_annotation_is_refused_with_the_field_that_fills_it() -> None:
    spec = spec_of(params={"seed": 0, "data": {"config": ["é" * 1000] * 125}})  # 250 kB of UTF-8, fewer characters
    with pytest.raises(InputError, match="most of them in data"):
        job(spec, Resources(), site_of())


@pytest.mark.parametrize("step", ["", "Train", "train-more", "_train", "train_", "1train", "t" * 36, "tränen", "a.b"])
def test_a_step_whose_name_fits_in_no_job_is_refused(step: str) -> None:
    with pytest.raises(InputError, match="name of a step"):
        job_name(spec_of(step))


# The site file


@pytest.mark.parametrize("path", ["/", "/tmp", "/scratch/", "/dev", "/orbit", "//usr", "/usr/../etc"])
def test_a_mount_that_would_hide_what_a_step_needs_is_refused(path: str) -> None:
    with pytest.raises(InputError, match="hide"):
        site_of(mounts=[{"claim": "shared", "path": path}])


def test_a_mount_is_known_by_its_plain_path_and_once() -> None:
    assert site_of(mounts=[{"claim": "a", "path": "/shared//runs/"}]).mounts[0].path == "/shared/runs"
    with pytest.raises(InputError, match="two mounts"):
        site_of(mounts=[{"claim": "a", "path": "/shared"}, {"claim": "b", "path": "/shared/"}])


@pytest.mark.parametrize(
    "fields",
    [
        {"scratch": {"kind": "host_path"}},
        {"scratch": {"kind": "empty_dir", "path": "/mnt"}},
        {"scratch": {"kind": "empty_dir", "storage_class": "nvme"}},
        {"namespace": "Orbit"},
        {"queue": "a queue"},
        {"user": 0},
        {"tokens": "x"},
    ],
)
def test_a_wrong_site_file_is_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(InputError, match="field"):
        site_of(**fields)


def test_a_missing_site_file_says_where_it_should_be(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="ORBIT_SITE"):
        Site.load(tmp_path / "site.yaml")
