"""The git commit of the running code and its uncommitted changes. Standard library only.

Only a repository whose top is the folder of the packages counts: an installed copy can lie inside
an unrelated one.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, distribution

from orchestrator.files import ROOT

UNKNOWN = "unknown"
PACKAGES = ("air_core", "orchestrator")
SENT_DIFF = "uncommitted.diff"  # next to the packages in a Ray job's working directory


def commit() -> str:
    """The git commit of the code, or of the repository from which pip has installed it (PEP 610); a
    Ray job has no .git and reads AIRSWEEP_COMMIT."""
    found = os.environ.get("AIRSWEEP_COMMIT") or _git("rev-parse", "HEAD").decode().strip()
    if not found:
        with suppress(PackageNotFoundError):
            origin = json.loads(distribution("airsweep").read_text("direct_url.json") or "{}")
            found = origin.get("vcs_info", {}).get("commit_id", "")
    return found or UNKNOWN


def uncommitted_diff() -> bytes:
    """The diff of both packages against their commit, with the names of new files; empty if
    everything is committed or git is missing. A Ray job reads the diff from a file."""
    with suppress(FileNotFoundError):
        return (ROOT / SENT_DIFF).read_bytes()
    new = _git("ls-files", "--others", "--exclude-standard", "--", *PACKAGES)
    names = b"".join(b"new file: %s\n" % name for name in new.splitlines())
    return _git("diff", "--no-color", "--no-ext-diff", "HEAD", "--", *PACKAGES) + names


def diff_digest(diff: bytes) -> str:
    """12 hex digits for a diff; empty for an empty diff."""
    return hashlib.blake2b(diff, digest_size=6).hexdigest() if diff else ""


def _git(*arguments: str) -> bytes:
    """The output of git; empty if git fails or is missing, or outside of a checkout."""
    if not (ROOT / ".git").exists():
        return b""
    try:
        done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, check=False)
    except OSError:
        return b""
    return done.stdout if done.returncode == 0 else b""
