"""Addresses of clusters, and waiting for the end of a job; `tests/test_submit.py` submits jobs."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from orchestrator.cluster import jobs
from orchestrator.errors import Refused

JOB = jobs.Job("default-far-1", "default/far", "http://head:8265")
SILENT = ConnectionError("no route")
UNKNOWN = RuntimeError("Request failed with status code 404: no such job")


def info(state: str, code: int | None = None) -> Any:
    status = SimpleNamespace(value=state, is_terminal=lambda: state not in ("PENDING", "RUNNING"))
    return SimpleNamespace(status=status, driver_exit_code=code)


def waited(answers: list[Any], followed: int, monkeypatch: pytest.MonkeyPatch) -> tuple[int, str]:
    """The exit code and the messages of a job about which the cluster gives these answers.

    Args:
        followed: number of answers until `ray job submit` ends.
    """
    monkeypatch.setattr(jobs, "POLL_INTERVAL", 0.0)
    polls, replies, messages = iter([None] * followed), iter(answers), list[str]()

    def get_job_info(job: str) -> Any:
        answer = next(replies, answers[-1])
        if isinstance(answer, Exception):
            raise answer
        return answer

    submission: Any = SimpleNamespace(poll=lambda: next(polls, 0), wait=lambda timeout: 0)
    client = SimpleNamespace(get_job_info=get_job_info)
    return jobs.wait_for_end(client, JOB, submission, messages.append), "\n".join(messages)


@pytest.mark.parametrize(
    ("state", "driver", "code"),
    [
        ("SUCCEEDED", 0, 0),
        ("FAILED", 4, 4),
        ("FAILED", -9, 137),
        ("FAILED", None, 1),  # the driver did not start
        ("STOPPED", None, 143),
    ],
)
def test_the_exit_code_is_that_of_the_driver_even_if_the_log_ends_earlier(
    state, driver, code, monkeypatch
):
    answers = [UNKNOWN, info("PENDING"), SILENT, info("RUNNING"), info(state, driver)]
    found, messages = waited(answers, 2, monkeypatch)
    assert found == code
    assert messages.count("the log is no longer followed") == 1
    assert messages.endswith(f"{state}, exit code {code}")


def test_a_cluster_that_stops_answering_ends_the_wait_with_1(monkeypatch):
    monkeypatch.setattr(jobs, "LOST_AFTER", 0.0)
    code, messages = waited([info("RUNNING"), SILENT], 9, monkeypatch)
    assert code == 1
    assert f"{JOB.address} has not answered for 0 s; the job keeps running if" in messages
    assert "ray job stop --address http://head:8265 default-far-1" in messages


def test_a_job_that_ray_did_not_accept_is_refused(monkeypatch):
    with pytest.raises(Refused, match=r"has no job default-far-1; Ray's message above says why"):
        waited([UNKNOWN], 1, monkeypatch)
