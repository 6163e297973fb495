"""Commands that check datasets and models."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from orchestrator import api
from orchestrator.cli.common import (
    STORE,
    DataOption,
    JsonOption,
    StoreOption,
    fail,
    with_progress_bar,
)
from orchestrator.formatting import plural, show

app = typer.Typer()
data_app = typer.Typer(no_args_is_help=True, help="Check datasets.")
models_app = typer.Typer(
    no_args_is_help=True, help="Check the weights of backbones and generators."
)


@app.command()
def sample(
    name: Annotated[
        str, typer.Argument(metavar="NAME", help="Recorded sweep, or the file of a new one.")
    ],
    count: Annotated[int, typer.Option("-n", "--images", min=1, help="Number of images.")] = 100,
    output: Annotated[
        Path | None,
        typer.Option(
            "-o",
            "--output",
            metavar="START",
            help="Beginning of the two file names. Default: the name of the sweep.",
            show_default=False,
        ),
    ] = None,
    store: StoreOption = STORE,
    data_root: DataOption = None,
) -> None:
    """Draw unlabelled images to label, spread over predicted classes and confidence.

    Writes START-sample.png, a sheet of the images, and START-labels.csv, with an empty column
    `class`. Filled in and moved to labels.csv beside the images, it makes them test images.

    airsweep sample mine -n 100

    airsweep sample mine -n 30 -o second
    """
    drawn = api.sample(name, count, output, store=store, data_root=data_root)
    show(f"{plural(drawn.images, 'image')}, {drawn.basis}")
    show(f"wrote {drawn.sheet} and {drawn.labels}; fill in the column class, then add the lines to")
    show(f"{drawn.target}; a line without a class stays unlabelled")


@data_app.command("check")
def data_check(
    name: Annotated[
        str, typer.Argument(metavar="NAME", help="Dataset, or folder:PATH for your own images.")
    ],
    root: Annotated[
        Path | None,
        typer.Option(
            "--root",
            "--data-root",
            envvar="AIRSWEEP_DATA",
            metavar="DIR",
            help="Folder of real datasets.",
        ),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Open every image of a dataset and compare the dataset with its published counts.

    Exits with 0 if everything matches, else with 2 and the first difference.

    airsweep data check flowers102 --root /data

    airsweep data check folder:/data/leaves --json
    """
    from orchestrator.cluster.input_checks import check_dataset, dataset_lines

    report = check_dataset(name, root, lambda each, n: with_progress_bar("opening images", each, n))
    for line in [json.dumps(report, indent=1)] if as_json else dataset_lines(report):
        show(line)
    if report["difference"] is not None:
        fail(report["difference"])


@models_app.command("check")
def models_check(
    model: Annotated[
        str,
        typer.Argument(metavar="MODEL", help="Backbone or generator, written as in a sweep file."),
    ],
    name: Annotated[
        str,
        typer.Option(
            "--name",
            metavar="NAME",
            help="Expected model, such as ViT-B-32/openai. Default: any.",
            show_default=False,
        ),
    ] = "",
    as_json: JsonOption = False,
) -> None:
    """Check that a backbone or generator can be read, without network or code of the model.

    Loads CLIP weights; checks every part of a diffusers folder. Exits with 0 and prints the line
    for the sweep file, or exits with 2 and prints the problem.

    airsweep models check /shared/models/stable-diffusion-v1-5 --name stable-diffusion-v1-5

    airsweep models check ViT-B-32-quickgelu@/shared/models/open_clip_model.safetensors
    """
    from orchestrator.cluster.input_checks import check_model

    report = check_model(model, name)
    role = report["is"]
    if as_json:
        show(json.dumps({"place": model, **report, "use": {role: model}}, indent=1))
        return
    show(f"{model}: a complete {role}")
    if why := report.get("why_no_lora"):
        show(f"no LoRA, no evidence: {why}")
    show(f"in the sweep file, under fixed:  {role}: {model}")
