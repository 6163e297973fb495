"""Tests of README.md and docs/*.md: commands run, links lead to existing files.

Each page is executed from top to bottom in one folder with one store: files on the page are
written, Python blocks are executed, commands are run. Commands that need a server, a GPU, images of
the user or more than some seconds are only parsed, and long sweeps are planned instead of run.
`PARSED` lists these commands with the reason; a page can exclude a block by
`<!-- not run: why -->`.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import shlex
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import typer

from orchestrator.__main__ import app
from orchestrator.spec.marked_yaml import parse
from orchestrator.spec.sweep_file import sweep_from_document
from tests.helpers.documents import PAGES, ROOT, blocks, inline_commands, links
from tests.helpers.sweeps import airsweep, in_this_process

# Sweeps that are run, with options that shorten them. Other sweeps are planned.
RUN = {
    "both": (),
    "context": (),
    "quickstart": (
        *("--only", "method=zero_shot,cpl"),
        *("--set", "iterations=2"),
        *("--set", "seeds=[1]"),
        *("--set", "train.steps=5"),
    ),
}
ARCHIVES = ("flowers102", "resisc45", "dtd", "cub", "eurosat")
# Commands that are only parsed, by a part of the command, with the reason.
PARSED = {
    "airsweep ui": "serves until Ctrl-C",
    "airsweep classify": "needs images of the user (test_bundles)",
    "airsweep export": "ten seconds of torch (test_bundles)",
    "s3://": "needs a bucket",
    "http://": "needs a server",
    ".gpu=": "needs a GPU",
    "paper_": "needs the paper's images and weights",
    "fashion_": "needs Fashion-MNIST",
    **{f"check {name}": "needs its images" for name in ARCHIVES},
}
SHIPPED = {file.stem for file in (ROOT / "sweeps").rglob("*.yaml")} - RUN.keys()
# Placeholders in commands, with an example of each.
PLACEHOLDERS = {"COMMAND": "run", "SPEC": "quickstart", "NAME": "quickstart", "STAGE": "images"}


EACH = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))


class InvalidCommand(AssertionError):
    """A command of a page does not work."""


class MissingArgument(InvalidCommand):
    """A command lacks an argument."""


# ---------------------------------------------------------------- pages


@pytest.fixture(scope="module")
def checkout(tmp_path_factory, ray_session) -> Iterator[Path]:
    """A folder with the files that pages name, in which the sweeps of two pages have run."""
    folder = tmp_path_factory.mktemp("checkout")
    for name in ("docs", "sweeps", "tests", "Makefile"):
        (folder / name).symlink_to(ROOT / name)
    with contextlib.chdir(folder):
        for page in PAGES[:2]:
            write_files(page)
        for spec in ("sweeps/quickstart.yaml", "context.yaml"):
            run_sweep(["run", spec])
        yield folder


def write_files(page: Path) -> None:
    for block in blocks(page):
        if block.file:
            Path(block.file).write_text(block.text)


@pytest.mark.ray
@EACH
def test_every_command_of_a_page_runs(page, checkout):
    write_files(page)
    names: dict[str, Any] = {}
    problems = []
    for block in blocks(page):
        where = f"{page.name}:{block.line}"
        for command in block.commands():
            try:
                check_command(command, only_parse=bool(block.not_run))
            except InvalidCommand as problem:
                problems.append(f"{where}: {command}\n    {problem}")
        if block.language == "python" and not block.not_run and not block.file:
            # `mlflow.set_tracking_uri` changes the environment.
            with contextlib.redirect_stdout(io.StringIO()), mock.patch.dict(os.environ):
                exec(compile(block.text, where, "exec"), names)
    assert not problems, "\n".join(problems)


@EACH
def test_commands_within_sentences_exist_with_their_options(page):
    for command in inline_commands(page):
        with contextlib.suppress(MissingArgument):  # sentences can omit the sweep
            parse_command(words_of(command)[1:])


@EACH
def test_links_lead_to_existing_files(page):
    missing = [link for link in links(page) if not (page.parent / link).exists()]
    assert not missing


@EACH
def test_complete_yaml_files_on_a_page_are_valid(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_files(page)  # those that a sweep names
    for block in blocks(page):
        if block.language == "yaml" and "version: 1\n" in block.text:
            sweep_from_document(parse(block.text, f"{page.name}:{block.line}"))


def test_examples_in_the_help_of_commands_exist_with_their_options():
    examples = [
        line for text in help_texts(typer.main.get_command(app)) for line in text.split("\n\n")
    ]
    found = [" ".join(line.split()) for line in examples if line.strip().startswith("airsweep ")]
    assert len(found) > 20
    for command in found:
        words, _ = split_redirection(words_of(command))
        parse_command(words[1:])


def help_texts(command: Any) -> Iterator[str]:
    yield command.help or ""
    for inner in getattr(command, "commands", {}).values():
        yield from help_texts(inner)


# ---------------------------------------------------------------- one command


def check_command(command: str, only_parse: bool = False) -> None:
    """Run a command of a page, or only parse it.

    Raises:
        InvalidCommand: the command does not work.
    """
    words, target = split_redirection(words_of(command))
    if words[0] != "airsweep":
        CHECKED.get(words[0], lambda words: None)(words)
        return
    parse_command(words[1:])
    if not only_parse and not any(part in command for part in PARSED):
        output = execute(words[1:])
        if target is not None:
            Path(target).write_text(output)


def split_redirection(words: list[str]) -> tuple[list[str], str | None]:
    """Split a command from the file of its output."""
    at = words.index(">") if ">" in words else len(words)
    return words[:at], words[at + 1] if at < len(words) else None


def words_of(command: str) -> list[str]:
    command = re.sub(r"\$\([^)]*\)", "DIR", command)  # the output of another command
    return [PLACEHOLDERS.get(word, word) for word in shlex.split(command)]


def parse_command(words: list[str]) -> None:
    """Parse the arguments of airsweep without running the command.

    Raises:
        InvalidCommand: the parser reports an error.
    """
    command: Any = typer.main.get_command(app)
    words = list(words)
    while words and words[0] in getattr(command, "commands", {}):
        command = command.commands[words.pop(0)]
    if hasattr(command, "commands") and words != ["--help"]:
        raise InvalidCommand(
            f"no command {' '.join(words[:1])!r}; allowed: {', '.join(command.commands)}"
        )
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            command.make_context("a command", words)
    except Exception as problem:  # of a copy of click that Typer has: compare by name
        names = [kind.__name__ for kind in type(problem).__mro__]
        if "Exit" in names:  # --help
            return
        if "ClickException" not in names:
            raise
        kind = MissingArgument if "MissingParameter" in names else InvalidCommand
        raise kind(str(problem)) from None


def execute(words: list[str]) -> str:
    """Run a command that must succeed; returns its output."""
    name = Path(words[1]).stem if len(words) > 1 else ""
    if words[0] == "run":
        if name in RUN and "--smoke" not in words:
            return run_sweep(words)
        words[0] = "plan"  # a long sweep
        words = [word for word in words if word not in ("--quiet", "--prepare")]
    elif words[0] in ("status", "table") and name in SHIPPED:
        words[1] = "quickstart"  # a sweep that was run
    done = in_this_process(words)
    if done.returncode:
        raise InvalidCommand(f"exit code {done.returncode}: {done.stderr}")
    return done.stdout


def run_sweep(words: list[str]) -> str:
    done = airsweep(*words, *RUN[Path(words[1]).stem], check=False)
    if done.returncode:
        raise InvalidCommand(done.stderr)
    return done.stdout


# ---------------------------------------------------------------- other programs


def _ray(words: list[str]) -> None:
    """Check the command that a job runs."""
    if "--" in words:
        _python(words[words.index("--") + 1 :])


def _python(words: list[str]) -> None:
    if words[1:3] == ["-m", "orchestrator"]:
        parse_command(words[3:])
    elif not (ROOT / words[1]).is_file():  # a benchmark takes minutes
        raise InvalidCommand(f"{words[1]} does not exist")


def _make(words: list[str]) -> None:
    done = subprocess.run(["make", "-n", *words[1:]], cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise InvalidCommand(done.stderr)


# Commands of other programs are not checked.
CHECKED: dict[str, Callable[[list[str]], None]] = {"make": _make, "python": _python, "ray": _ray}


def test_all_entries_of_the_table_occur_on_pages():
    commands = [command for page in PAGES for block in blocks(page) for command in block.commands()]
    assert [part for part in PARSED if not any(part in command for command in commands)] == []
