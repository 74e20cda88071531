"""What a Job is doing, in one sentence: every situation that a person meets, and the interim ones that mislead."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import pytest

from k8s.objects import Condition, Container, Job, Pod
from k8s.state import FINAL, STUCK, Phase, assess, last_words, why_ended

START = datetime(2026, 1, 1, tzinfo=UTC)


def job(*true: str, reason: str = "", message: str = "", **fields: object) -> Job:
    conditions = {kind: Condition(True, reason, message) for kind in true}
    return Job(name="orbit-train-1", namespace="orbit", uid="j", conditions=conditions, retries=3, **fields)  # type: ignore[arg-type]


def pod(name: str = "p", *containers: Container, age: int = 0, **fields: object) -> Pod:
    created = START - timedelta(seconds=age)
    return Pod(name=name, uid=name, created=created, containers=containers, memory="64Gi", **fields)  # type: ignore[arg-type]


def ended(code: int, reason: str = "Error", message: str = "") -> Container:
    return Container("step", "image", "terminated", reason, message, code)


def disrupted(reason: str) -> dict[str, Condition]:
    return {"DisruptionTarget": Condition(True, reason)}


def test_a_job_that_has_no_pod_yet_waits() -> None:
    assert assess(job()).phase is Phase.WAITING


@pytest.mark.parametrize("condition", ["SuccessCriteriaMet", "FailureTarget"])
def test_interim_conditions_are_neither_success_nor_failure(condition: str) -> None:
    found = assess(job(condition, reason="PodFailurePolicy"), [pod(phase="Running")])
    assert found.phase is Phase.FINISHING and found.phase not in FINAL


def test_final_conditions_win_over_interim_ones() -> None:
    assert assess(job("SuccessCriteriaMet", "Complete")).phase is Phase.COMPLETE
    assert assess(job("FailureTarget", "Failed")).phase is Phase.FAILED


def test_a_condition_that_is_false_means_nothing() -> None:
    lapsed = Job("j", "orbit", "j", conditions={"Failed": Condition(False), "Suspended": Condition(False)})
    assert assess(lapsed, [pod(phase="Running")]).phase is Phase.PENDING


def test_suspended_by_kueue_is_waiting_in_its_queue_before_and_after_it_ran() -> None:
    queued = job("Suspended", suspended=True, labels={"kueue.x-k8s.io/queue-name": "gpus"})
    assert assess(queued).message == "waiting in queue gpus"
    again = job("Suspended", suspended=True, tried=True, labels={"kueue.x-k8s.io/queue-name": "gpus"})
    assert assess(again).message == "stopped for others and waiting in queue gpus"
    assert not assess(queued).fix


def test_suspended_by_hand_says_how_to_go_on() -> None:
    assert "spec.suspend" in assess(job(suspended=True)).fix


def test_no_room_is_said_in_the_schedulers_words_with_what_to_do() -> None:
    reason = "0/3 nodes are available: 3 Insufficient nvidia.com/gpu."
    found = assess(job(), [pod(conditions={"PodScheduled": Condition(False, "Unschedulable", reason)})])
    assert found.phase is Phase.PENDING and reason in found.message and "resources" in found.fix
    assert not found.needs_help  # a full cluster empties by itself


@pytest.mark.parametrize("reason", sorted(STUCK))
def test_a_container_that_cannot_start_needs_help(reason: str) -> None:
    found = assess(job(), [pod("p", Container("step", "registry/image:1", "waiting", reason))])
    assert found.phase is Phase.PENDING and found.needs_help and found.fix
    assert reason in found.message and "registry/image:1" in found.message


def test_staging_then_running() -> None:
    stage = Container("stage", state="running")
    assert assess(job(), [pod("p", stage, node="n", phase="Pending")]).reason == "Staging"
    done = Container("stage", state="terminated", exit_code=0)
    running = assess(job(), [pod("p", done, Container("step", state="running"), node="n", phase="Running")])
    assert (running.phase, running.message) == (Phase.RUNNING, "pod p on node n runs")


def test_the_living_pod_is_told_of_not_the_dead_one_before_it() -> None:
    pods = [pod("new", phase="Pending", node="n"), pod("old", ended(1), age=60, phase="Failed")]
    assert "new" in assess(job(), pods).message


def test_between_two_pods_the_end_of_the_last_is_explained() -> None:
    found = assess(job(), [pod("p", ended(137, "OOMKilled"), phase="Failed")])
    assert found.phase is Phase.WAITING and "64Gi" in found.message and "memory_gib" in found.fix


def test_refused_pods_are_explained_by_the_jobs_events() -> None:
    found = assess(job(), [], ["quota exceeded", "no PriorityClass with name training was found"])
    assert "PriorityClass" in found.message and "priority class" in found.fix


@pytest.mark.parametrize(
    ("reason", "words"),
    [
        ("PreemptionByScheduler", "higher priority"),
        ("DeletionByTaintManager", "node became unusable"),
        ("EvictionByEvictionAPI", "evicted"),
        ("TerminationByKubelet", "its node evicted it"),
        ("DeletionByPodGC", "node is gone"),
        ("SomethingNew", "SomethingNew"),
    ],
)
def test_a_disruption_is_said_in_words(reason: str, words: str) -> None:
    found = why_ended(pod("p", ended(137), phase="Failed", conditions=disrupted(reason)))
    assert found is not None and words in found.message


def test_a_living_pod_has_not_ended() -> None:
    assert why_ended(pod(phase="Running")) is None


@pytest.mark.parametrize(
    ("code", "words"), [(1, "exit code 1"), (137, "SIGKILL"), (75, "can be resumed"), (42, "exit code 42")]
)
def test_exit_codes_are_said_in_words(code: int, words: str) -> None:
    found = why_ended(pod("p", ended(code), phase="Failed"))
    assert found is not None and words in found.message and found.exit_code == code


def test_exit_code_42_is_known_even_if_the_pod_is_gone() -> None:
    assert assess(job("Failed", reason="PodFailurePolicy")).exit_code == 42


def test_the_stage_container_can_refuse_too() -> None:
    refused = Container("stage", state="terminated", exit_code=42)
    found = assess(job("Failed", reason="PodFailurePolicy"), [pod("p", refused, phase="Failed")])
    assert found.exit_code == 42 and "stage" in found.message


def test_used_up_retries_name_their_number_and_the_last_reason() -> None:
    found = assess(job("Failed", reason="BackoffLimitExceeded"), [pod("p", ended(137, "OOMKilled"), phase="Failed")])
    assert found.message.startswith("failed 4 times") and found.reason == "OOMKilled" and "memory_gib" in found.fix


def test_a_deadline_is_named_in_hours() -> None:
    found = assess(job("Failed", reason="DeadlineExceeded", deadline_seconds=5400))
    assert "1.5 hours" in found.message and "hours" in found.fix


def test_a_deleted_job_is_being_deleted_whatever_its_pods_do() -> None:
    assert assess(job(deleting=True), [pod(phase="Running")]).phase is Phase.DELETING


def test_a_finished_job_stays_finished_while_it_is_being_deleted() -> None:
    assert assess(job("Complete", deleting=True)).phase is Phase.COMPLETE


def test_the_last_words_are_those_of_the_newest_failure() -> None:
    pods = [pod("new", ended(1, message="second"), phase="Failed"), pod("old", ended(1, message="first"), age=9)]
    assert last_words(pods) == "second"
    assert last_words([pod("fine", ended(0, message="done"))]) == ""
