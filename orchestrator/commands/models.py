"""Commands about models on shared storage."""

from __future__ import annotations

import json
import sys
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from orchestrator.commands.common import ChecksumOption, JsonOption, VerifyOption, watched
from orchestrator.output import show

app = typer.Typer(no_args_is_help=True, help="Put models where all machines read them.")


@app.callback()
def _group() -> None: ...  # with one command alone typer would leave its name out


@app.command("stage")
def models_stage(
    name: Annotated[
        str,
        typer.Argument(
            metavar="NAME", help="of a backbone or generator, as in sweep files, or one's own"
        ),
    ],
    to: Annotated[Path, typer.Option("--to", metavar="FOLDER", help="of all models")],
    given: Annotated[
        Path | None,
        typer.Option("--from", metavar="PATH", help="a diffusers or open_clip folder, or weights"),
    ] = None,
    checksum: ChecksumOption = None,
    verify: VerifyOption = False,
    as_json: JsonOption = False,
) -> None:
    """Check weights and put them on shared storage, once; opens no network.

    airsweep models stage ViT-B-32/openai --from open_clip_model.safetensors --to /shared/models

    airsweep models stage stable-diffusion-v1-5 --from sd15 --to /shared/models

    Prints the line for the sweep file. Called again it looks whether all is there still.
    """
    from orchestrator.staging import stage_model

    found = stage_model(
        name, given, to.absolute(), checksum or (), verify, watched, partial(show, file=sys.stderr)
    )
    use = {found.manifest["checked"]["is"]: str(found.place)}
    if as_json:
        show(json.dumps({**found.json(), "use": use}, indent=1))
        return
    show(found.line())
    for key, place in use.items():
        show(f"in the sweep file, below fixed:  {key}: {place}")
