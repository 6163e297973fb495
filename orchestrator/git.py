"""Which code computes here: its commit, and what was changed since. Standard library only.

Only a checkout that tracks this very file counts: an installed copy may lie inside somebody else's
repository, whose commit says nothing about it.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

from orchestrator.files import ROOT

UNKNOWN = "unknown"
PACKAGES = ("air_core", "orchestrator")
SENT_DIFF = "uncommitted.diff"  # beside the packages, in a Ray job's working directory
SECRETS = ":(exclude,glob)**/.env*"  # files that hold them by custom
MAX_DIFF = 500_000  # bytes that are kept


def commit() -> str:
    """The code's git commit; a Ray job has no .git and is told by AIRSWEEP_COMMIT."""
    known = os.environ.get("AIRSWEEP_COMMIT")
    if known:
        return known
    return _git("rev-parse", "HEAD").decode().strip() if _tracked() else UNKNOWN


def uncommitted() -> bytes:
    """What the code of both packages has beyond its commit, new files included but `.env*`, as a
    diff.

    Empty where all is committed or there is no git; cut, with a word, where it is long. A Ray job
    has it in a file.
    """
    if os.environ.get("AIRSWEEP_COMMIT") and (ROOT / SENT_DIFF).is_file():
        return (ROOT / SENT_DIFF).read_bytes()
    if not _tracked():
        return b""
    with tempfile.TemporaryDirectory() as folder:
        # A copy of the index: new files are seen in it, and the user's own is left alone. With its
        # time, by which git knows that a file of the same second has to be read again.
        index = Path(folder, "index")
        shutil.copy2(ROOT / _git("rev-parse", "--git-path", "index").decode().strip(), index)
        kept = (*PACKAGES, SECRETS)
        _git("add", "--intent-to-add", "--", *kept, index=index)
        diff = _git("diff", "--no-color", "--no-ext-diff", "HEAD", "--", *kept, index=index)
    if len(diff) <= MAX_DIFF:
        return diff
    return diff[:MAX_DIFF] + f"\n... cut: {len(diff):,} bytes in all\n".encode()


def diff_digest(diff: bytes) -> str:
    """12 hex digits of a diff; empty for an empty one."""
    return hashlib.blake2b(diff, digest_size=6).hexdigest() if diff else ""


def dirty(diff: bytes) -> str:
    """`diff_digest` of what is not committed; a Ray job is told by AIRSWEEP_DIRTY."""
    if os.environ.get("AIRSWEEP_COMMIT"):
        return os.environ.get("AIRSWEEP_DIRTY", "")
    return diff_digest(diff)


def _tracked() -> bool:
    return bool(_git("ls-files", "--", str(Path(__file__).resolve())))


def _git(*arguments: str, index: Path | None = None) -> bytes:
    """What git prints; nothing where it fails or is not there."""
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
