"""Commands that check datasets and models."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from orchestrator.cli.common import JsonOption, fail, watched
from orchestrator.formatting import show

data_app = typer.Typer(no_args_is_help=True, help="Check datasets.")
models_app = typer.Typer(
    no_args_is_help=True, help="Check the weights of backbones and generators."
)


@data_app.command("check")
def data_check(
    name: Annotated[str, typer.Argument(metavar="NAME", help="a dataset, or folder:PATH")],
    root: Annotated[
        Path | None,
        typer.Option(
            "--root", "--data-root", envvar="AIRSWEEP_DATA", help="folder of real datasets"
        ),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Compare a dataset with the published one and open every image.

    Ends with 0 when all fits, else with 2 and the first difference.

    airsweep data check flowers102 --root /data

    airsweep data check folder:/data/leaves --json
    """
    from orchestrator.cluster.input_checks import check_dataset, dataset_lines

    found = check_dataset(name, root, lambda each, total: watched("opening images", each, total))
    for line in [json.dumps(found, indent=1)] if as_json else dataset_lines(found):
        show(line)
    if found["difference"] is not None:
        fail(found["difference"])


@models_app.command("check")
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
    from orchestrator.cluster.input_checks import check_model

    found = check_model(place, name)
    if as_json:
        show(json.dumps({"place": place, **found, "use": {found["is"]: place}}, indent=1))
        return
    show(f"{place}: a {found['is']}, whole")
    show(f"in the sweep file, below fixed:  {found['is']}: {place}")
