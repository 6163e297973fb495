"""Exceptions that more than one package raises or handles, and the exit codes of commands."""

from __future__ import annotations

from pathlib import Path

# Exit codes of commands.
DONE, FAILED, BAD_INPUT, REFUSED, BUDGET, GATE = range(6)
INTERRUPTED, TERMINATED = 130, 143


class Refused(RuntimeError):
    """A run cannot start; nothing was started. Exit code 3."""


class OutOfTime(TimeoutError):
    """A trial exceeded its time limit."""


class MissingArtifact(LookupError):
    """The store lacks an artifact that should have been prepared."""


class DamagedArtifact(ValueError):
    """A stored file is not what was written.

    Args:
        path: the artifact's folder or the shard, which has to be made again.
        why: which file is damaged, and how.
        name: the artifact's name in a bucket; default: the path.
    """

    def __init__(self, path: Path, why: str, name: str = "") -> None:
        super().__init__(path, why, name)  # all arguments, so that it can be pickled
        self.path, self.why, self.name = path, why, name or str(path)

    def __str__(self) -> str:
        return (
            f"{self.name} is damaged: {self.why}; run the sweep again to make it anew, or remove it"
        )


class StoreFull(RuntimeError):
    """The disk of the store is full. Everything in the store is complete; running again resumes."""


class StoreRefused(RuntimeError):
    """The store cannot be used: another version made it, or a process locks it."""


class StoreLost(RuntimeError):
    """The bucket or the studies stopped answering, or another driver took over the sweep."""


class RemoteAway(OSError):
    """The bucket cannot be used: it does not answer, does not exist, or refuses access."""


class SweepBusy(RuntimeError):
    """Another driver runs this sweep."""


class StudiesAway(RuntimeError):
    """The database of a search does not answer. Exit code 3 if nothing was started."""


class TrackerAway(RuntimeError):
    """MLflow does not answer, or fails. Exit code 3 if nothing was started."""
