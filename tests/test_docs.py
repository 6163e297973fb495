"""The documents are true: every command in README.md and docs/*.md is run, every link leads on.

Each page is walked from top to bottom in one folder with one store, as a reader would: files that
it shows are written, Python is executed, commands are run. What needs a server, a GPU, other
people's images or more than some seconds is parsed alone, by the parser that would run it, and the
run of a long sweep is planned. The tables say which and why; a page may say it of a block itself,
`<!-- not run: why -->`.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import shlex
import subprocess
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import typer

from orchestrator.__main__ import app
from orchestrator.reporting.published import read_paper
from orchestrator.spec.marked_yaml import parse
from orchestrator.spec.sweep_file import checked
from tests.helpers.documents import PAGES, ROOT, blocks, inline_commands, links
from tests.helpers.sweeps import airsweep, events, in_this_process

pytestmark = pytest.mark.ray

# Sweeps that are run, some of them cut; the others are planned, with the same options.
RUN = {
    "context": (),
    "quickstart": (
        *("--only", "method=zero_shot,fpl"),
        *("--set", "seeds=[1]"),
        *("--set", "train.steps=5"),
    ),
}
# What is parsed alone, by words of the command, and why.
PARSED = {
    "airsweep ui": "serves until Ctrl-C",
    "airsweep repro": "ten seconds of torch (test_tracked)",
    "airsweep retry": "nothing has failed here",
    "airsweep audit": "no synthetic images here (test_audits)",
    "airsweep classify": "needs images of the reader's (test_bundles)",
    "airsweep compare": "needs another sweep or the paper's datasets (test_published)",
    "airsweep export": "ten seconds of torch (test_bundles)",
    "airsweep verify": "ten seconds of torch (test_bundles)",
    "s3://": "needs a bucket",
    "http://": "needs a server",
    "postgresql://": "needs a server (test_team)",
    ".gpu=": "needs a GPU",
    "paper_": "needs the paper's images and weights",
    "fashion_": "needs Fashion-MNIST",
    "data check flowers102": "needs its images",
    "data check resisc45": "needs its images",
    "data check dtd": "needs its images",
    "data check cub": "needs its images",
    "data check eurosat": "needs its images",
}
SHIPPED = {file.stem for file in (ROOT / "sweeps").glob("*.yaml")} - RUN.keys()
# Words that stand for something of the reader's.
STANDS_FOR = {"COMMAND": "run", "SPEC": "quickstart", "NAME": "quickstart", "STAGE": "images"}


EACH = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))


class Wrong(AssertionError):
    """A document says what is not so."""


class Missing(Wrong):
    """An argument is left out."""


# ---------------------------------------------------------------- a reader's folder


@pytest.fixture(scope="module")
def desk(tmp_path_factory) -> Iterator[Path]:
    """A checkout as far as the pages name its files, with the sweeps of the first two pages run."""
    folder = tmp_path_factory.mktemp("desk")
    for name in ("sweeps", "tests", "Makefile"):
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


@EACH
def test_every_command_of_a_page_runs(page, desk):
    write_files(page)
    names: dict[str, Any] = {}
    problems = []
    for block in blocks(page):
        where = f"{page.name}:{block.line}"
        for command in block.commands():
            try:
                follow(command, only_parse=bool(block.not_run))
            except Wrong as problem:
                problems.append(f"{where}: {command}\n    {problem}")
        if block.language == "python" and not block.not_run:
            with contextlib.redirect_stdout(io.StringIO()):
                exec(compile(block.text, where, "exec"), names)
    assert not problems, "\n".join(problems)


@EACH
def test_commands_within_sentences_exist_with_their_options(page):
    for command in inline_commands(page):
        with contextlib.suppress(Missing):  # a sentence may leave the sweep out
            parsed(words_of(command)[1:])


@EACH
def test_links_lead_to_files_that_are_there(page):
    missing = [link for link in links(page) if not (page.parent / link).exists()]
    assert not missing


@EACH
def test_whole_files_on_a_page_are_allowed(page, tmp_path):
    for block in blocks(page):
        if block.language == "yaml" and "version: 1\n" in block.text:
            if "\nprotocol:\n" in block.text:  # what a paper has published
                file = tmp_path / "paper.yaml"
                file.write_text(block.text)
                assert read_paper(file).cells
            else:
                checked(parse(block.text, f"{page.name}:{block.line}"))


@pytest.mark.parametrize(
    "command",
    [
        "airsweep frobnicate quickstart",
        "airsweep run quickstart --smokee",
        "airsweep table quickstart --format word",
        "airsweep status nothing",
        "airsweep plan sweeps/gone.yaml",
        "make nonsense",
        "pip install 'airsweep[nothing]'",
        "pytest tests/test_gone.py",
        "ray job submit --addres $ADDR -- python -m orchestrator run sweeps/quickstart.yaml",
        "ray job submit --address $ADDR -- python -m orchestrator run",
    ],
)
def test_a_command_that_does_not_work_is_found(command, desk):
    with pytest.raises(Wrong):
        follow(command)


def test_examples_in_the_help_of_commands_exist_with_their_options():
    examples = [line for text in helps(typer.main.get_command(app)) for line in text.split("\n\n")]
    found = [" ".join(line.split()) for line in examples if line.strip().startswith("airsweep ")]
    assert len(found) > 20
    for command in found:
        words, _ = redirected(words_of(command))
        parsed(words[1:])


def helps(command: Any) -> Iterator[str]:
    yield command.help or ""
    for inner in getattr(command, "commands", {}).values():
        yield from helps(inner)


# ---------------------------------------------------------------- one command


def follow(command: str, only_parse: bool = False) -> None:
    """Do what a page says, as far as it can be done here.

    Raises:
        Wrong: it cannot, and why.
    """
    words, into = redirected(words_of(command))
    if words[0] != "airsweep":
        PROGRAMS[words[0]](words)
        return
    parsed(words[1:])
    if not only_parse and not any(part in command for part in PARSED):
        said = execute(words[1:])
        if into is not None:
            Path(into).write_text(said)


def redirected(words: list[str]) -> tuple[list[str], str | None]:
    """A command, and the file that its output goes to."""
    at = words.index(">") if ">" in words else len(words)
    return words[:at], words[at + 1] if at < len(words) else None


def words_of(command: str) -> list[str]:
    command = re.sub(r"\$\([^)]*\)", "DIR", command)  # what another command prints
    return [STANDS_FOR.get(word, word) for word in shlex.split(command)]


def parsed(words: list[str]) -> None:
    """Read by the parser, and not run.

    Raises:
        Wrong: what the parser says.
    """
    command: Any = typer.main.get_command(app)
    words = list(words)
    while words and words[0] in getattr(command, "commands", {}):
        command = command.commands[words.pop(0)]
    if hasattr(command, "commands") and words != ["--help"]:
        raise Wrong(f"no command {' '.join(words[:1])!r}; there are {', '.join(command.commands)}")
    make_context(command, words)


def make_context(command: Any, words: list[str]) -> None:
    """Typer has a click of its own beside the one that Ray uses, so errors are told by name."""
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            command.make_context("a command", list(words))
    except Exception as problem:
        names = [kind.__name__ for kind in type(problem).__mro__]
        if "Exit" in names:  # --help
            return
        if "ClickException" not in names:
            raise
        raise (Missing if "MissingParameter" in names else Wrong)(str(problem)) from None


def execute(words: list[str]) -> str:
    """A command that ends with 0; its output."""
    words = [_known(word) for word in words]
    name = Path(words[1]).stem if len(words) > 1 else ""
    if words[0] in ("run", "prepare"):
        if name in RUN and "--smoke" not in words:
            return run_sweep(words)
        words[0] = "plan"  # a long sweep
        words = [word for word in words if word != "--quiet"]
    elif (
        words[0] in ("status", "table") and name not in RUN and Path(f"sweeps/{name}.yaml").exists()
    ):
        words[1] = "quickstart"  # one that was run
    done = in_this_process(words)
    if done.returncode:
        raise Wrong(f"exit code {done.returncode}: {done.stderr}")
    return done.stdout


def run_sweep(words: list[str]) -> str:
    """In a process of its own: it moves file descriptors about, and starts Ray."""
    done = airsweep(*words, *RUN[Path(words[1]).stem], check=False)
    if done.returncode:
        raise Wrong(done.stderr)
    return done.stdout


def _known(word: str) -> str:
    """Ids of trials in the documents become those of two that are here."""
    if word not in ("3f2a9c1d", "8b01e7aa"):
        return word
    done = [e["key"][:12] for e in events(Path("runs"), "context") if e["event"] == "trial_done"]
    return str(done[word == "8b01e7aa"])


# ---------------------------------------------------------------- other programs


def _ray(words: list[str]) -> None:
    """Ray's own parser reads its part, ours what the job runs."""
    from ray.scripts.scripts import cli

    command: Any = cli
    at = 1
    while hasattr(command, "commands"):
        if words[at] not in command.commands:
            raise Wrong(f"ray has no {words[at]}")
        command = command.commands[words[at]]
        at += 1
    make_context(command, words[at:])
    if "--" in words:
        _python(words[words.index("--") + 1 :])


def _python(words: list[str]) -> None:
    if words[1].startswith("benchmarks/"):  # takes minutes
        if not (ROOT / words[1]).is_file():
            raise Wrong(f"{words[1]} is not there")
        return
    if words[1:3] != ["-m", "orchestrator"]:
        raise Wrong("only -m orchestrator is known here")
    parsed(words[3:])


def _make(words: list[str]) -> None:
    done = subprocess.run(["make", "-n", *words[1:]], cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise Wrong(done.stderr)


def _pip(words: list[str]) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    asked = words[-1].removeprefix(project["name"]).strip("[]")
    if asked not in project["optional-dependencies"]:
        raise Wrong(f"no extra {asked!r}")


def _pytest(words: list[str]) -> None:
    if not (ROOT / words[1]).is_file():
        raise Wrong(f"{words[1]} is not there")


def _not_ours(words: list[str]) -> None:
    """Variables, an environment, downloads: nothing of airsweep is in them."""


PROGRAMS: dict[str, Callable[[list[str]], None]] = {
    "export": _not_ours,
    "hf": _not_ours,
    "make": _make,
    "pip": _pip,
    "pytest": _pytest,
    "python": _python,
    "ray": _ray,
    "source": _not_ours,
}


def test_every_program_of_the_pages_is_known_and_every_reason_still_needed():
    commands = [command for page in PAGES for block in blocks(page) for command in block.commands()]
    assert {command.split()[0] for command in commands} <= {"airsweep", *PROGRAMS}
    assert [part for part in PARSED if not any(part in command for command in commands)] == []
    assert os.environ.get("AIRSWEEP_STORE") is None
