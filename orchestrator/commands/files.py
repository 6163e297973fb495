"""Commands that help to write a sweep file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from orchestrator.output import show

app = typer.Typer()


@app.command()
def init(
    name: Annotated[str, typer.Argument(metavar="NAME", help="of the sweep; NAME.yaml is written")],
    images: Annotated[
        Path | None,
        typer.Option("--images", metavar="DIR", help="your images, one folder a class"),
    ] = None,
) -> None:
    """Write a commented sweep file to start from, for your own images.

    airsweep init mine --images my_images

    airsweep init mine
    """
    from orchestrator.starter import write_starter

    starter = write_starter(name, images, Path())
    show(starter.found)
    show(f"{starter.file}: written; next: airsweep plan {starter.file}")


@app.command()
def schema() -> None:
    """Print the JSON schema of sweep files, for an editor.

    airsweep schema > airsweep.schema.json
    """
    from orchestrator.sweep_file import sweep_schema

    show(json.dumps(sweep_schema(), indent=1))
