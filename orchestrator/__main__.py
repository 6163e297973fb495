"""The `airsweep` command: registers all subcommands and turns exceptions into exit codes."""

from __future__ import annotations

import errno
import inspect
import logging
import os
import re
import sys
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import typer

from orchestrator.cli import bundle, cache, look, run, start
from orchestrator.cli.common import LOOK_AFTER, START, exit_code_of, fail
from orchestrator.errors import BAD_INPUT, StoreFull
from orchestrator.files import permission_message
from orchestrator.formatting import Printable, show
from orchestrator.redact import redact

app = typer.Typer(
    name="airsweep",
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    help="Adapt CLIP to a new image domain, without labels, in experiments that run on Ray.\n\n"
    "  airsweep run quickstart\n\n  airsweep table quickstart",
)

for commands in (start, run, look, bundle):
    app.add_typer(commands.app)
app.add_typer(start.plugin_app, name="plugin", rich_help_panel=START)
app.add_typer(cache.app, name="cache", rich_help_panel=LOOK_AFTER)
for group in app.registered_groups:  # typer keeps the line breaks of docstrings, of 100 columns
    for command in group.typer_instance.registered_commands if group.typer_instance else ():
        paragraphs = (inspect.getdoc(command.callback) or "").split("\n\n")
        command.help = "\n\n".join(" ".join(each.split()) for each in paragraphs)


UNUSABLE = {  # paths
    errno.ENAMETOOLONG: "the path is too long; choose a shorter one",
    errno.EROFS: "its file system is read-only; choose another folder",
}


def _show_versions(requested: bool) -> None:
    if requested:
        for library in ("airsweep", "ray", "torch", "diffusers", "open_clip_torch"):
            try:
                show(f"{library} {version(library)}")
            except PackageNotFoundError:
                show(f"{library} is not installed")
        show(f"CUDA {_cuda()}")
        raise typer.Exit


def _cuda() -> str:
    """The CUDA that torch was built for, from its file of versions: its import takes seconds."""
    torch = find_spec("torch")
    if torch is None or torch.origin is None:
        return "none"
    text = Path(torch.origin).with_name("version.py").read_text()
    found = re.search(r"^cuda.* = '(.+)'", text, re.MULTILINE)
    return found[1] if found else "none"


@app.callback()
def _options(
    version: Annotated[
        bool,
        typer.Option("--version", is_eager=True, callback=_show_versions, help="Show versions."),
    ] = False,
) -> None: ...


def main() -> None:
    """Run a command. An exception becomes one message on stderr and an exit code.

    `--debug` anywhere on the command line shows the traceback instead.
    """
    debug = "--debug" in sys.argv
    if debug:
        sys.argv.remove("--debug")
    try:
        os.getcwd()
    except FileNotFoundError:
        fail("the working directory was deleted; change to one that exists")
    assert logging.lastResort is not None
    # The last resort prints records that no other handler takes; commands configure no handler.
    logging.lastResort.addFilter(Printable())
    try:
        app(prog_name="airsweep")
    except Exception as problem:
        if debug:
            raise
        if type(problem).__name__ == "SpecError":  # the message begins with file:line:column
            show(redact(str(problem)), file=sys.stderr)
            sys.exit(exit_code_of(problem))
        code = exit_code_of(problem)
        if isinstance(problem, PermissionError) and problem.filename:
            fail(permission_message(Path(problem.filename)), BAD_INPUT)
        if isinstance(problem, FileExistsError | NotADirectoryError) and problem.filename:
            fail(
                f"{problem.filename}: there is a file where a folder is needed; move it", BAD_INPUT
            )
        if isinstance(problem, OSError) and problem.errno in UNUSABLE:
            fail(f"{problem.filename}: {UNUSABLE[problem.errno]}", BAD_INPUT)
        if code == 1 and not isinstance(problem, StoreFull):
            fail(f"{type(problem).__name__}: {problem} (--debug shows the traceback)", code)
        fail(str(problem), code)


if __name__ == "__main__":
    main()
