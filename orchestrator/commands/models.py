"""Commands about models."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from orchestrator.commands.common import JsonOption
from orchestrator.output import show

app = typer.Typer(no_args_is_help=True, help="Check the weights of backbones and generators.")


@app.command("check")
def models_check(
    place: Annotated[
        str,
        typer.Argument(metavar="MODEL", help="a backbone or generator, as in the sweep file"),
    ],
    name: Annotated[
        str,
        typer.Option("--name", metavar="NAME", help="the model that it should be"),
    ] = "",
    as_json: JsonOption = False,
) -> None:
    """Check that a job could read a backbone or generator; runs no code of it, opens no network.

    CLIP weights are loaded; of a diffusers folder every part is looked at. Ends with 0 and the line
    for the sweep file, or with 2 and what is wrong.

    airsweep models check /shared/models/stable-diffusion-v1-5 --name stable-diffusion-v1-5

    airsweep models check ViT-B-32-quickgelu@/shared/models/open_clip_model.safetensors
    """
    from orchestrator.modelcheck import check_model

    found = check_model(place, name)
    if as_json:
        show(json.dumps({"place": place, **found, "use": {found["is"]: place}}, indent=1))
        return
    show(f"{place}: a {found['is']}, whole")
    show(f"in the sweep file, below fixed:  {found['is']}: {place}")
