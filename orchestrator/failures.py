"""Failures told apart: what each class means, how often it is tried again, and how.

Knows no Ray: what a cluster says of a death arrives as text.
"""

from __future__ import annotations

from dataclasses import dataclass

from orchestrator.errors import DamagedArtifact, MissingArtifact, OutOfTime, StoreFull
from orchestrator.redact import redacted


@dataclass(frozen=True)
class Failure:
    """Why a trial or an artifact has no record. Its message goes to ledger, tracker and screen, so
    secrets that the process knows in which it is made are taken out."""

    failure_class: str
    message: str

    def __post_init__(self) -> None:
        object.__setattr__(self, "message", redacted(self.message))


@dataclass(frozen=True)
class FailureClass:
    """What is done about failures of one kind, within a run. The next run tries all again."""

    retries: int
    remedy: str  # what the retry does differently, or what a person can do
    stops_after: int = 0  # so many equal ones, and the sweep stops; 0: it goes on


EQUAL_ERRORS = 3  # of the user: the fourth would say the same

CLASSES: dict[str, FailureClass] = {
    "oom": FailureClass(2, "tried again with half as many images at a time"),
    "nan": FailureClass(1, "tried again in fp32, where it was in less"),
    "preempted": FailureClass(1000, "run again on another machine; costs nothing"),
    "timeout": FailureClass(1, "tried again; raise resources.trial.timeout if it needs longer"),
    "infra": FailureClass(2, "tried again; see Ray's logs"),
    "data": FailureClass(0, "an input is missing or cannot be read: `airsweep prepare SPEC`"),
    # The next thing would find no room either, and could cost GPU-hours before it says so.
    "disk": FailureClass(0, "make room where the store lies and run again", stops_after=1),
    "user": FailureClass(0, "mend what the message says and run again", EQUAL_ERRORS),
}


# The first that fits names the class; anything else is the user's.
KINDS: tuple[tuple[type[BaseException], str], ...] = (
    (MissingArtifact, "data"),
    (DamagedArtifact, "data"),
    (StoreFull, "disk"),
    (OutOfTime, "timeout"),  # which is an OSError too
    (FloatingPointError, "nan"),
    (MemoryError, "oom"),
    (OSError, "infra"),
)
# Said by the kernel and by sqlite, whoever passes it on: safetensors has no OSError.
NO_ROOM = (
    ("no space left on device", "disk"),
    ("disk quota exceeded", "disk"),
    ("database or disk is full", "disk"),
)
# In exceptions of no special kind: torch of a GPU and of a CPU, and our own.
WORDS = (
    *NO_ROOM,
    ("out of memory", "oom"),
    ("can't allocate memory", "oom"),
    ("killed its process", "infra"),
)
# What a dead process leaves is text. Words of Ray, of torch and of the kernel.
SAID = (
    *NO_ROOM,
    ("out of memory", "oom"),
    ("outofmemory", "oom"),
    ("memory monitor", "oom"),
    ("preempted: true", "preempted"),
    ("preemption", "preempted"),
    ("drained", "preempted"),
)


def first_line(problem: BaseException) -> str:
    """What an exception says, for a sentence; of one that Ray passes on, what it began with.

    >>> first_line(OSError("no room\\n  at /x"))
    'no room'
    """
    return f"{getattr(problem, 'cause', None) or problem}".strip().partition("\n")[0]


def classify(problem: BaseException) -> str:
    """The class of an exception.

    >>> classify(FloatingPointError("the loss became nan")), classify(KeyError("x"))
    ('nan', 'user')
    """
    text = str(problem).lower()
    said = (name for words, name in WORDS if words in text)
    kinds = (name for kind, name in KINDS if isinstance(problem, kind))
    return next(said, None) or next(kinds, "user")


def no_room(problem: BaseException) -> bool:
    """Did it begin with a full disk?

    >>> no_room(OSError(28, "No space left on device")), no_room(OSError(2, "not there"))
    (True, False)
    """
    cause: BaseException | None = problem
    while cause is not None and classify(cause) != "disk":
        cause = cause.__cause__ or cause.__context__
    return cause is not None


def of_death(text: str) -> str:
    """The class of a process that ended without a word of its own, from what Ray says of it.

    >>> of_death("ray.exceptions.OutOfMemoryError: Task was killed"), of_death("exit code 1")
    ('oom', 'infra')
    """
    said = text.lower()
    return next((name for words, name in SAID if words in said), "infra")
