"""The commit of the code, in small repositories that stand for the checkout."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from orchestrator.git import commit


def git(repository: Path, *arguments: str) -> str:
    author = ("-c", "user.name=ada", "-c", "user.email=ada@example.org")
    done = subprocess.run(
        ["git", *author, *arguments], cwd=repository, check=True, capture_output=True, text=True
    )
    return done.stdout.strip()


@pytest.fixture
def checkout(tmp_path, monkeypatch) -> Path:
    """A folder with a package, as if the code lay there."""
    (tmp_path / "code" / "air_core").mkdir(parents=True)
    (tmp_path / "code" / "air_core" / "specs.py").write_text("RANK = 4\n")
    monkeypatch.setattr("orchestrator.git.ROOT", tmp_path / "code")
    monkeypatch.delenv("AIRSWEEP_COMMIT", raising=False)
    return tmp_path / "code"


def test_a_commit_says_whether_a_package_has_changed_since(checkout):
    git(checkout, "init", "--quiet")
    git(checkout, "add", ".")
    git(checkout, "commit", "--quiet", "--message", "all")
    head = git(checkout, "rev-parse", "HEAD")
    (checkout / "notes.txt").write_text("not code")
    assert commit() == head
    (checkout / "air_core" / "new.py").write_text("RANK = 8\n")
    assert commit() == f"{head}-dirty"


def test_a_copy_inside_an_unrelated_repository_has_the_commit_of_its_installation(
    checkout, monkeypatch
):
    git(checkout.parent, "init", "--quiet")
    git(checkout.parent, "commit", "--quiet", "--allow-empty", "--message", "unrelated")
    monkeypatch.syspath_prepend(checkout)
    metadata = checkout / "airsweep-0.1.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.4\nName: airsweep\nVersion: 0.1.0\n")
    assert commit() == "unknown"
    (metadata / "direct_url.json").write_text('{"vcs_info": {"vcs": "git", "commit_id": "0a1b"}}')
    assert commit() == "0a1b"
