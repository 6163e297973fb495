"""Exceptions that several packages raise or handle, and the exit codes of commands."""

from __future__ import annotations

from pathlib import Path

# Exit codes of commands.
DONE, FAILED, BAD_INPUT, REFUSED, GATE = range(5)
INTERRUPTED, TERMINATED = 130, 143


class Refused(RuntimeError):
    """A run cannot start, and nothing was started. Exit code 3."""


class MissingArtifact(LookupError):
    """An artifact that a trial needs is missing in the store."""


class DamagedArtifact(ValueError):
    """The content of a stored file has changed since it was written.

    Args:
        path: the folder of the artifact or the shard file, which must be computed again.
        reason: the damaged file and the kind of damage.
        name: name of the artifact in a bucket; default: the path.
    """

    def __init__(self, path: Path, reason: str, name: str = "") -> None:
        super().__init__(path, reason, name)  # pickle needs all arguments
        self.path, self.reason, self.name = path, reason, name or str(path)

    def __str__(self) -> str:
        remedy = "run the sweep again to recompute it, or remove it"
        return f"{self.name} is damaged: {self.reason}; {remedy}"


class StoreFull(RuntimeError):
    """The disk of the store is full. All stored files are complete; the next run resumes."""


class StoreRefused(RuntimeError):
    """The store cannot be used: another version wrote it, or another process has locked it."""


class StoreLost(RuntimeError):
    """The bucket became unreachable, or another driver took over."""


class BucketUnreachable(OSError):
    """The bucket cannot be used: it is unreachable, does not exist or denies access."""


class SweepBusy(RuntimeError):
    """Another driver is running this sweep."""


class TrackerUnreachable(RuntimeError):
    """MLflow is unreachable or fails. Exit code 3 if nothing was started."""
