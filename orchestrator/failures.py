"""Failure classes: how an exception is classified, and how often each class is retried.

This module does not import Ray: the reason of a process death arrives as text.
"""

from __future__ import annotations

from dataclasses import dataclass

from orchestrator.errors import DamagedArtifact, MissingArtifact, StoreFull
from orchestrator.redact import redact


@dataclass(frozen=True)
class Failure:
    """The failure of a trial or an artifact.

    The message is shown in the event log, the tracker and the terminal, so secrets in the
    environment of the process that creates the failure are removed from it.
    """

    failure_class: str
    message: str

    def __post_init__(self) -> None:
        object.__setattr__(self, "message", redact(self.message))


@dataclass(frozen=True)
class FailureClass:
    """How failures of a class are handled within a run. The next run retries all of them."""

    retries: int
    remedy: str  # what the retry changes, or what the user can do
    stops_after: int = 0  # number of equal failures that stop the sweep; 0: it continues


EQUAL_ERRORS = 3  # equal failures of class `user` after which further trials would fail as well

CLASSES: dict[str, FailureClass] = {
    "oom": FailureClass(2, "retried with half the batch size"),
    "nan": FailureClass(0, "set a lower learning rate or a higher precision"),
    "preempted": FailureClass(1000, "retried on another node, without using up a retry"),
    "infra": FailureClass(2, "retried; see Ray's logs"),
    "data": FailureClass(0, "an input is missing or unreadable; run `airsweep run SPEC --prepare`"),
    # Other trials would fail as well, possibly after GPU-hours of work.
    "disk": FailureClass(0, "free disk space for the store and run again", stops_after=1),
    "user": FailureClass(0, "fix the error in the message and run again", EQUAL_ERRORS),
}


# Failure classes by exception type: the first match counts; all other exceptions are of class user.
KINDS: tuple[tuple[type[BaseException], str], ...] = (
    (MissingArtifact, "data"),
    (DamagedArtifact, "data"),
    (StoreFull, "disk"),
    (FloatingPointError, "nan"),
    (MemoryError, "oom"),
    (OSError, "infra"),
)
# Messages of exceptions without a type of their own, from the kernel, sqlite, torch and airsweep.
MESSAGES = (
    ("no space left on device", "disk"),
    ("disk quota exceeded", "disk"),
    ("database or disk is full", "disk"),
    ("out of memory", "oom"),
    ("can't allocate memory", "oom"),
    ("killed its process", "infra"),
)
# Messages about a dead process, also from Ray.
DEATH_MESSAGES = (
    *MESSAGES,
    ("outofmemory", "oom"),
    ("memory monitor", "oom"),
    ("preempted: true", "preempted"),
    ("preemption", "preempted"),
    ("drained", "preempted"),
)


def first_line(problem: BaseException) -> str:
    """The first line of an exception's message; of its cause if Ray has wrapped it.

    >>> first_line(OSError("disk full\\n  at /x"))
    'disk full'
    """
    return f"{getattr(problem, 'cause', None) or problem}".strip().partition("\n")[0]


def classify(problem: BaseException) -> str:
    """The class of an exception.

    >>> classify(FloatingPointError("the loss became nan")), classify(KeyError("x"))
    ('nan', 'user')
    """
    text = str(problem).lower()
    by_message = (name for message, name in MESSAGES if message in text)
    by_type = (name for kind, name in KINDS if isinstance(problem, kind))
    return next(by_message, None) or next(by_type, "user")


def is_disk_full(problem: BaseException) -> bool:
    """Whether the exception or one of its causes is a full disk.

    >>> is_disk_full(OSError(28, "No space left on device")), is_disk_full(OSError(2, "not there"))
    (True, False)
    """
    cause: BaseException | None = problem
    while cause is not None and classify(cause) != "disk":
        cause = cause.__cause__ or cause.__context__
    return cause is not None


def classify_death(text: str) -> str:
    """The class of a process death, from Ray's message about it.

    >>> classify_death("ray.exceptions.OutOfMemoryError: Task was killed")
    'oom'
    >>> classify_death("exit code 1")
    'infra'
    """
    text = text.lower()
    return next((name for message, name in DEATH_MESSAGES if message in text), "infra")


def failure_of(problem: Exception) -> Failure:
    """The failure of a process: its own exception, or Ray's reason for its death."""
    cause = getattr(problem, "cause", None)
    if isinstance(cause, Exception):
        return Failure(classify(cause), f"{type(cause).__name__}: {cause}")
    message = f"{type(problem).__name__}: {problem}"
    return Failure(classify_death(message), message.partition("\n")[0])
