"""The git commit of the running code. Standard library only.

Only a repository whose top is the folder of the packages counts: an installed copy can lie inside
an unrelated one.
"""

from __future__ import annotations

import json
import os
import subprocess
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, distribution

from orchestrator.files import ROOT

UNKNOWN = "unknown"
PACKAGES = ("air_core", "orchestrator")


def commit() -> str:
    """The git commit of the code, with `-dirty` if a package has changed since, or of the
    repository from which pip has installed it (PEP 610); a Ray job has no .git and reads
    AIRSWEEP_COMMIT."""
    if found := os.environ.get("AIRSWEEP_COMMIT", ""):
        return found
    if found := _git("rev-parse", "HEAD"):
        found += "-dirty" if _git("status", "--porcelain", "--", *PACKAGES) else ""
    else:
        with suppress(PackageNotFoundError):
            origin = json.loads(distribution("airsweep").read_text("direct_url.json") or "{}")
            found = origin.get("vcs_info", {}).get("commit_id", "")
    return found or UNKNOWN


def _git(*arguments: str) -> str:
    """The output of git; empty if git fails or is missing, or outside of a checkout."""
    if not (ROOT / ".git").exists():
        return ""
    try:
        done = subprocess.run(
            ["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=False
        )
    except OSError:
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""
