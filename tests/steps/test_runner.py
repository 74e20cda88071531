"""`python -m orbit_core step`: what it prints, how it ends, what it leaves behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from running import finish, run, start, wait_for
from samples import PACKAGE, spec_of

from orbit_core.errors import InputError
from orbit_core.steps.contract import InputRef, StepSpec
from orbit_core.steps.runner import cpus_here, load_step, run_step, threads_of
from orbit_core.store import open_store
from orbit_core.store.artifacts import ArtifactStore
from orbit_core.store.digests import digest_path


def test_a_step_runs_once_and_is_found_afterwards(tmp_path: Path) -> None:
    spec = spec_of(tmp_path / "store", "count", to=3)
    code, events, err = run(spec, tmp_path)
    assert (code, [event["orbit"] for event in events]) == (0, ["progress"] * 3 + ["done"])
    assert "noise of a library" in err, "stdout is for events alone"
    code, events, _ = run(spec, tmp_path)
    assert (code, [event["orbit"] for event in events]) == (0, ["reused"])
    artifact = ArtifactStore(open_store(spec.store)).find("count", spec.digest)
    assert artifact is not None and sorted(artifact.manifest.files) == [f"parts/{n}.txt" for n in range(3)]
    assert sorted(path.name for path in (tmp_path / "store" / ".work").iterdir()) == [], "the workspace is gone"


def test_steps_hand_each_other_artifacts(tmp_path: Path) -> None:
    first = spec_of(tmp_path / "store", "count", to=5)
    second = spec_of(tmp_path / "store", "add", {"numbers": first.ref()}, at_most=10)
    assert run(first, tmp_path)[0] == 0
    code, events, _ = run(second, tmp_path)
    assert code == 0 and events[0] == {"orbit": "report", "name": "sum", "content": {"total": 10}}


def test_steps_hand_each_other_artifacts_over_s3(s3_url: str, tmp_path: Path) -> None:
    first = spec_of(s3_url, "count", to=3)
    second = spec_of(s3_url, "add", {"numbers": first.ref()}, at_most=10)
    assert run(first, tmp_path)[0] == 0
    assert run(second, tmp_path, "--scratch", str(tmp_path / "scratch"))[0] == 0
    artifact = ArtifactStore(open_store(s3_url)).find("add", second.digest)
    assert artifact is not None and artifact.facts == {"total": 3}


def test_a_gate_that_says_no_ends_with_42_and_its_message(tmp_path: Path) -> None:
    first = spec_of(tmp_path / "store", "count", to=5)
    second = spec_of(tmp_path / "store", "add", {"numbers": first.ref()}, at_most=9)
    run(first, tmp_path)
    code, events, err = run(second, tmp_path)
    assert code == 42
    refused = tmp_path / "store" / "refused" / "add" / second.digest[:16]
    assert events[-1]["kind"] == "GateError"
    assert events[-1]["fix"] == f"count less far; what was measured: {refused}"
    assert (refused / "sum.txt").read_text() == "10"
    assert "at most 9" in err and "Traceback" not in err
    assert ArtifactStore(open_store(second.store)).find("add", second.digest) is None


def test_a_missing_input_names_the_step_to_run(tmp_path: Path) -> None:
    first = spec_of(tmp_path / "store", "count", to=5)
    code, events, _ = run(spec_of(tmp_path / "store", "add", {"numbers": first.ref()}, at_most=9), tmp_path)
    assert code == 42 and "run step count of the same recipe first" in events[-1]["message"]


def test_a_file_that_changed_after_planning_is_refused(tmp_path: Path) -> None:
    (tmp_path / "numbers" / "parts").mkdir(parents=True)
    (tmp_path / "numbers" / "parts" / "0.txt").write_text("4\n")
    ref = InputRef(path=str(tmp_path / "numbers"), digest=digest_path(tmp_path / "numbers"))
    spec = spec_of(tmp_path / "store", "add", {"numbers": ref}, at_most=9)
    (tmp_path / "numbers" / "parts" / "0.txt").write_text("5\n")
    code, events, _ = run(spec, tmp_path)
    assert code == 42 and "changed after the run was planned" in events[-1]["message"]


def test_a_crash_ends_with_1_a_traceback_and_no_artifact(tmp_path: Path) -> None:
    spec = spec_of(tmp_path / "store", "fail")
    code, events, err = run(spec, tmp_path)
    assert code == 1 and events[-1]["message"] == "RuntimeError: lost the GPU" and "Traceback" in err
    assert open_store(spec.store).list() == []
    assert not list((tmp_path / "store").rglob("half")), "its output is gone"


def test_sigterm_lets_the_step_finish_what_is_in_flight_and_the_next_try_resumes(tmp_path: Path) -> None:
    spec = spec_of(tmp_path / "store", "count", to=50, pause=0.03)
    process = start(spec, tmp_path)
    wait_for(process, "progress")
    process.send_signal(signal.SIGTERM)
    code, events, _ = finish(process)
    assert code == 75 and events[-1]["kind"] == "Interrupted"
    process = start(spec, tmp_path)
    assert finish(process)[0] == 0
    artifact = ArtifactStore(open_store(spec.store)).find("count", spec.digest)
    assert artifact is not None and artifact.facts["resumed_from"] > 0


@pytest.mark.parametrize("step", ["linger", "parse"])
def test_sigterm_ends_a_step_that_never_asks_at_once(step: str, tmp_path: Path) -> None:
    process = start(spec_of(tmp_path / "store", step, seconds=50), tmp_path)
    wait_for(process, "progress")
    began = time.monotonic()
    process.send_signal(signal.SIGTERM)
    code, events, _ = finish(process)
    assert code == 75 and events[-1]["kind"] == "Interrupted" and time.monotonic() - began < 40


def test_sigterm_is_heard_before_the_imports(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A container's first process loses a SIGTERM that it has no handler for, and would wait out its grace period."""
    # many instructions, as imports are: a signal that comes just before one long sleep would wait it out
    imports = "import time, pathlib\npathlib.Path('here').touch()\nfor _ in range(6000): time.sleep(0.01)"
    (tmp_path / "pydantic.py").write_text(imports)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)
    command = [sys.executable, "-m", "orbit_core", "step", "count", "--spec", "spec.json"]
    process = subprocess.Popen(command, cwd=tmp_path)
    while process.poll() is None and not (tmp_path / "here").exists():
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=20) == 75


def test_what_a_killed_try_left_is_cleaned_and_it_resumes(tmp_path: Path) -> None:
    spec = spec_of(tmp_path / "store", "count", to=60, pause=0.02)
    process = start(spec, tmp_path)
    wait_for(process, "progress")
    process.kill()
    finish(process)
    leftover = tmp_path / "store" / ".work" / f"count-{spec.digest[:16]}" / "output" / "junk"
    leftover.write_text("half a result")
    assert run(spec, tmp_path)[0] == 0
    artifact = ArtifactStore(open_store(spec.store)).find("count", spec.digest)
    assert artifact is not None and "junk" not in artifact.manifest.files and artifact.facts["resumed_from"] > 0
    assert list((tmp_path / "store" / ".work").iterdir()) == []


def test_a_second_try_at_the_same_time_waits_and_adopts(tmp_path: Path) -> None:
    spec = spec_of(tmp_path / "store", "count", to=60, pause=0.02)
    first = start(spec, tmp_path)
    wait_for(first, "progress")
    first.send_signal(signal.SIGSTOP)  # until the second has come
    second = start(spec, tmp_path)
    assert f"process {first.pid}" in wait_for(second, "progress")["message"]
    first.send_signal(signal.SIGCONT)
    code, events, _ = finish(second)
    assert code == 0 and [event["orbit"] for event in events] == ["reused"]
    assert finish(first)[0] == 0


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel's parent-death signal")
def test_a_step_dies_with_its_executor(tmp_path: Path) -> None:
    spec = spec_of(tmp_path / "store", "linger", seconds=50)
    script = (
        "import sys; from orbit_core.executors.local import LocalExecutor; "
        "from orbit_core.steps.contract import StepSpec; "
        f"LocalExecutor(package={PACKAGE!r}).run(StepSpec.model_validate_json(sys.argv[1]), "
        "lambda event: print(event, flush=True))"
    )
    executor = subprocess.Popen([sys.executable, "-c", script, spec.model_dump_json()], stdout=subprocess.PIPE)
    assert executor.stdout is not None and b"lingering" in executor.stdout.readline()
    lock = tmp_path / "store" / ".work" / f"linger-{spec.digest[:16]}" / "lock"
    step = int(lock.read_text().split()[1])
    os.kill(step, 0)
    executor.kill()
    executor.wait()
    executor.stdout.close()
    deadline = time.monotonic() + 5
    while time.monotonic() < deadline and Path(f"/proc/{step}").exists():
        if Path(f"/proc/{step}/stat").read_text().split()[2] == "Z":
            break  # dead; whoever inherited it has not yet reaped it
        time.sleep(0.05)
    else:
        assert not Path(f"/proc/{step}").exists()


def test_the_runner_starts_fast_and_without_torch(tmp_path: Path) -> None:
    code = (
        "import sys, time, orbit_core.command, orbit_core.pipeline; "
        "print(time.process_time(), *(set(sys.modules) & {'torch', 'transformers'}))"
    )
    times = []
    for _ in range(3):
        ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        seconds, *heavy = ran.stdout.split()
        assert not heavy
        times.append(float(seconds))
    assert min(times) < 1.0, f"expected about 0.3 s of processor time, found {times}"


def test_a_spec_of_another_version_of_orbit_is_refused(tmp_path: Path) -> None:
    spec = StepSpec(step="train", version=999, params={}, inputs={}, store=str(tmp_path))
    with pytest.raises(InputError, match="version 999"):
        load_step(spec)
    with pytest.raises(InputError, match="one of data, pretrain"):
        load_step(spec.model_copy(update={"step": "contract"}))


def test_threads_are_those_of_the_recipe_where_the_result_depends_on_them(tmp_path: Path) -> None:
    assert threads_of(spec_of(tmp_path, "count", engines={"threads": 7})) == 7
    assert threads_of(spec_of(tmp_path, "count")) >= 1


def test_a_container_is_given_no_more_threads_than_its_quota(tmp_path: Path) -> None:
    everything = cpus_here(tmp_path / "none")
    for content, expected in {"max 100000\n": everything, "100000 100000\n": 1, "50000 100000\n": 1}.items():
        (tmp_path / "cpu.max").write_text(content)
        assert cpus_here(tmp_path / "cpu.max") == expected
    (tmp_path / "cpu.max").write_text("99900000 100000\n")
    assert cpus_here(tmp_path / "cpu.max") == everything


@pytest.mark.parametrize("facts", [{"loss": float("nan")}, {"path": Path("x")}, ["not a dict"]])
def test_facts_that_are_not_finite_json_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, facts: Any
) -> None:
    import samples.fail

    monkeypatch.setattr(samples.fail, "run", lambda context: facts)
    spec = spec_of(tmp_path / "store", "fail")
    with pytest.raises(Exception, match=r"step fail.*facts"):
        run_step(spec, lambda *a, **k: None, package=PACKAGE)
    assert open_store(spec.store).list() == []


@pytest.mark.parametrize(
    ("content", "expected"), [("{", "StepSpec"), (None, "no such file"), ("mismatch", "spec of step count")]
)
def test_a_wrong_spec_file_is_refused(tmp_path: Path, content: str | None, expected: str) -> None:
    file = tmp_path / "spec.json"
    if content == "mismatch":
        content = spec_of(tmp_path, "add").model_dump_json()
    if content is not None:
        file.write_text(content)
    ran = subprocess.run(
        [sys.executable, "-m", "orbit_core", "step", "count", "--spec", str(file)], capture_output=True, text=True
    )
    assert ran.returncode == 42 and expected in ran.stderr
