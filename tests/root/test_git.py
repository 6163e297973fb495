"""The commit of the code, in small repositories with a copy of the module."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from orchestrator.files import ROOT


def git(repository: Path, *arguments: str) -> str:
    author = ("-c", "user.name=ada", "-c", "user.email=ada@example.org")
    done = subprocess.run(
        ["git", *author, *arguments], cwd=repository, check=True, capture_output=True, text=True
    )
    return done.stdout.strip()


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A repository that contains a copy of the module."""
    package = tmp_path / "code" / "orchestrator"
    (tmp_path / "code" / "air_core").mkdir(parents=True)
    package.mkdir()
    for name in ("__init__.py", "files.py", "git.py"):
        shutil.copy(ROOT / "orchestrator" / name, package / name)
    (tmp_path / "code" / "air_core" / "specs.py").write_text("RANK = 4\n")
    git(tmp_path / "code", "init", "--quiet")
    return tmp_path / "code"


def commit_of(checkout: Path) -> str:
    environment = {k: v for k, v in os.environ.items() if not k.startswith("AIRSWEEP_")}
    done = subprocess.run(
        [sys.executable, "-c", "from orchestrator.git import commit; print(commit())"],
        cwd=checkout,
        env={**environment, "PYTHONPATH": str(checkout)},
        check=True,
        capture_output=True,
        text=True,
    )
    return done.stdout.strip()


def test_a_commit_says_whether_a_package_has_changed_since(checkout):
    (checkout / ".gitignore").write_text("__pycache__/\n")
    git(checkout, "add", ".")
    git(checkout, "commit", "--quiet", "--message", "all")
    head = git(checkout, "rev-parse", "HEAD")
    (checkout / "notes.txt").write_text("not code")
    assert commit_of(checkout) == head
    (checkout / "air_core" / "new.py").write_text("RANK = 8\n")
    assert commit_of(checkout) == f"{head}-dirty"


def test_a_copy_inside_an_unrelated_repository_has_no_commit(checkout):
    (checkout / ".git").rename(checkout.parent / ".git")
    git(checkout.parent, "commit", "--quiet", "--allow-empty", "--message", "unrelated")
    assert commit_of(checkout) == "unknown"


def test_a_copy_that_pip_installed_from_a_repository_has_its_commit(checkout):
    shutil.rmtree(checkout / ".git")
    metadata = checkout / "airsweep-0.1.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.4\nName: airsweep\nVersion: 0.1.0\n")
    (metadata / "direct_url.json").write_text('{"vcs_info": {"vcs": "git", "commit_id": "0a1b"}}')
    assert commit_of(checkout) == "0a1b"
