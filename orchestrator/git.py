"""The git commit of the running code and its uncommitted changes. Standard library only.

A repository counts only if it tracks this file: an installed copy can lie inside an unrelated
repository.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import tempfile
from contextlib import suppress
from pathlib import Path

from orchestrator.files import ROOT

UNKNOWN = "unknown"
PACKAGES = ("air_core", "orchestrator")
SENT_DIFF = "uncommitted.diff"  # next to the packages in a Ray job's working directory
SECRETS = ":(exclude,glob)**/.env*"  # these files usually contain secrets
MAX_DIFF = 500_000  # bytes; a longer diff is truncated


def commit() -> str:
    """The git commit of the code; a Ray job has no .git and reads AIRSWEEP_COMMIT."""
    if sent := os.environ.get("AIRSWEEP_COMMIT"):
        return sent
    if _is_tracked():
        return _git("rev-parse", "HEAD").decode().strip()
    return _installed_commit()


def _installed_commit() -> str:
    """The commit that pip has recorded (PEP 610) if it installed this file from a repository."""
    from importlib.metadata import PackageNotFoundError, distribution

    with suppress(PackageNotFoundError):
        package = distribution("airsweep")
        if Path(str(package.locate_file("orchestrator"))).resolve() == ROOT / "orchestrator":
            origin = json.loads(package.read_text("direct_url.json") or "{}")
            return str(origin.get("vcs_info", {}).get("commit_id", UNKNOWN))
    return UNKNOWN


def uncommitted_diff() -> bytes:
    """The diff of both packages against their commit, with new files but without `.env*`.

    The result is empty if everything is committed or git is missing. A long diff is truncated, with
    a note at its end. A Ray job reads the diff from a file.
    """
    if os.environ.get("AIRSWEEP_COMMIT") and (ROOT / SENT_DIFF).is_file():
        return (ROOT / SENT_DIFF).read_bytes()
    if not _is_tracked():
        return b""
    with tempfile.TemporaryDirectory() as folder:
        # Add new files to a copy of the index, so that the user's index does not change. The copy
        # keeps the modification time, which git compares with those of the files.
        index = Path(folder, "index")
        shutil.copy2(ROOT / _git("rev-parse", "--git-path", "index").decode().strip(), index)
        paths = (*PACKAGES, SECRETS)
        _git("add", "--intent-to-add", "--", *paths, index=index)
        diff = _git("diff", "--no-color", "--no-ext-diff", "HEAD", "--", *paths, index=index)
    if len(diff) <= MAX_DIFF:
        return diff
    return diff[:MAX_DIFF] + f"\n... truncated; full size: {len(diff):,} bytes\n".encode()


def diff_digest(diff: bytes) -> str:
    """12 hex digits for a diff; empty for an empty diff."""
    return hashlib.blake2b(diff, digest_size=6).hexdigest() if diff else ""


def uncommitted_digest(diff: bytes) -> str:
    """The `diff_digest` of uncommitted changes; a Ray job reads AIRSWEEP_DIRTY."""
    if os.environ.get("AIRSWEEP_COMMIT"):
        return os.environ.get("AIRSWEEP_DIRTY", "")
    return diff_digest(diff)


def _is_tracked() -> bool:
    return bool(_git("ls-files", "--", str(Path(__file__).resolve())))


def _git(*arguments: str, index: Path | None = None) -> bytes:
    """The output of git; empty if git fails or is missing."""
    environment = {"GIT_INDEX_FILE": str(index)} if index else {}
    try:
        done = subprocess.run(
            ["git", *arguments],
            cwd=ROOT,
            env={**os.environ, **environment},
            capture_output=True,
            check=False,
        )
    except OSError:
        return b""
    return done.stdout if done.returncode == 0 else b""
