"""Commands to start with: write a sweep file, check its inputs, draw images to label."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from orchestrator import api
from orchestrator.cli.common import (
    START,
    STORE,
    DataOption,
    StoreOption,
    fail,
    progress_bar,
    with_progress_bar,
)
from orchestrator.formatting import aligned, plural, relative_path, show

app = typer.Typer()
plugin_app = typer.Typer(no_args_is_help=True, help="Check plugins.")


@app.command(rich_help_panel=START)
def init(
    name: Annotated[
        str, typer.Argument(metavar="NAME", help="Name of the new sweep; the file is NAME.yaml.")
    ],
    images: Annotated[
        Path | None,
        typer.Option(
            "--images",
            metavar="DIR",
            help="Your images: in any folders with --classes, else one folder per class. Default: "
            "the digits dataset.",
        ),
    ] = None,
    classes: Annotated[
        str | None,
        typer.Option(
            "--classes",
            metavar="NAMES",
            help="Classes of unlabelled images: names with commas between them, or a file with "
            "lines `name` or `name = how to say it`. Written to DIR/classes.txt.",
        ),
    ] = None,
) -> None:
    """Write a commented sweep file to start from.

    airsweep init mine --images photos --classes cat,dog,ship

    airsweep init mine --images my_images

    airsweep init mine
    """
    from orchestrator.planning.resources import this_machine
    from orchestrator.spec.starter import write_starter

    starter = write_starter(name, images, Path(), classes, this_machine()["GPU"] > 0)
    show(starter.summary)
    if starter.skipped:
        show(f"skipped: {starter.skipped}")
    show(f"wrote {starter.file}; next:")
    steps = [(f"airsweep plan {starter.file}", "what would run, and how long it takes")]
    if starter.unlabelled:
        steps = [(f"airsweep sample {starter.file}", "draws images to label: do it first"), *steps]
    show("\n".join(f"  {line}" for line in aligned(steps)))


@app.command(rich_help_panel=START)
def components(
    name: Annotated[
        str | None, typer.Argument(metavar="NAME", help="A component, or a key of a sweep file.")
    ] = None,
) -> None:
    """List the components: what the keys of a sweep file can name, such as pseudo_labels.kind.

    With the NAME of a component also the settings that it reads and the module that defines it.

    airsweep components

    airsweep components threshold
    """
    from orchestrator.spec.components import component_lines

    show("\n".join(component_lines(name)))


@plugin_app.command("check")
def check_plugin(
    name: Annotated[str, typer.Argument(metavar="PLUGIN", help="A .py file.")],
) -> None:
    """Run the code of a plugin, and check that its components keep the contracts of their keys.

    airsweep plugin check mine.py
    """
    from orchestrator.planning.contracts import check_contract
    from orchestrator.plugins import components_of, place_of, read_plugin, use_plugins
    from orchestrator.spec.components import component_lines

    plugin = read_plugin(name, Path())
    use_plugins([plugin])
    for registry, component in components_of(plugin):
        try:
            check_contract(registry.key, component.name)
        except Exception as problem:
            fail(f"{place_of(plugin, problem)}: {registry.key} {component.name!r}: {problem}")
        show("\n".join(component_lines(component.name)))
    show(f"{name}: its components keep their contracts; digest {plugin.digest}")


@app.command(rich_help_panel=START)
def sample(
    name: Annotated[
        str, typer.Argument(metavar="NAME", help="Sweep: recorded, or a file that has not run.")
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

    The predictions are those of zero-shot CLIP. Images in labels.csv or in START-labels.csv of an
    earlier sample are not drawn again.

    Writes START-sample.png, a sheet of the images, and START-labels.csv with an empty column
    `class` to fill in and to move to labels.csv beside the images. Every third one has `val` in
    the column `part`: it is for validation, to choose the best classifier; the others are for test.

    airsweep sample mine -n 100

    airsweep sample mine -n 30 -o second
    """
    with progress_bar("encoding images") as report:
        drawn = api.sample(name, count, output, store=store, data_root=data_root, report=report)
    show(f"{plural(drawn.images, 'image')}, {drawn.basis}")
    show(f"wrote {drawn.sheet} and {drawn.labels}")
    show(f"next: fill in the column class, and add the lines to {relative_path(drawn.target)};")
    show("      a line without a class stays unlabelled; labelled images leave the pool;")
    show("      those with `val` choose the best classifier, the others test it")


@app.command(rich_help_panel=START)
def check(
    name: Annotated[
        str,
        typer.Argument(
            metavar="DATASET|MODEL",
            help="Dataset, folder:PATH for your own images, or a backbone or generator, written as "
            "in a sweep file.",
        ),
    ],
    data_root: DataOption = None,
) -> None:
    """Check that the files of a dataset or a model are complete.

    Opens every image of a dataset, searches duplicates, and compares the published counts. Loads
    the weights of a CLIP; reads every part of a diffusers folder. Uses neither the network nor code
    of the model. Exits with 0, or with 2 and the first problem.

    airsweep check flowers102 --data-root /data

    airsweep check folder:photos

    airsweep check /shared/models/clip
    """
    from orchestrator.cluster.input_checks import check_dataset, check_model, is_dataset

    if not is_dataset(name):
        show("\n".join(check_model(name)))
        return
    lines, difference = check_dataset(
        name, data_root, lambda each, n: with_progress_bar("opening images", each, n)
    )
    show("\n".join(lines))
    if difference:
        fail(difference)
