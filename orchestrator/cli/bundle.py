"""Commands about bundles: folders with a trained prompt that work without the sweep's store."""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from air_core.printable import printable
from orchestrator.cli.common import (
    STORE,
    DataOption,
    JsonOption,
    OnlyOption,
    StoreOption,
    TrackingOption,
    fail,
    location_named,
    recorded_sweep,
    with_progress_bar,
)
from orchestrator.formatting import csv_cell, show

if TYPE_CHECKING:
    from air_core.bundle.classifier import ClassifiedImage

    Writer = Callable[[Iterable[ClassifiedImage]], None]

app = typer.Typer()

FolderArgument = Annotated[
    Path, typer.Argument(metavar="DIR", help="Bundle: a folder written by `airsweep export`.")
]
WeightsOption = Annotated[
    str | None,
    typer.Option(
        "--weights",
        metavar="BACKBONE",
        help="Name or path of the backbone, if its weights are not published.",
    ),
]
DeviceOption = Annotated[
    str, typer.Option("--device", metavar="DEVICE", help="Torch device: cpu, cuda, ...")
]
PATH_WIDTH = 44  # largest width of the table's first column


@app.command()
def export(
    trial: Annotated[
        str, typer.Argument(metavar="TRIAL|best", help="Trial key, slot, MLflow run id, or best.")
    ],
    out: Annotated[Path, typer.Option("--out", "-o", metavar="DIR", help="Folder to create.")],
    sweep: Annotated[
        str | None,
        typer.Option("--sweep", metavar="NAME", help="Sweep of the trial: NAME or PROJECT/NAME."),
    ] = None,
    only: OnlyOption = None,
    store: StoreOption = STORE,
    data_root: DataOption = None,
    tracking_uri: TrackingOption = None,
    force: Annotated[bool, typer.Option("--force", help="Replace an existing bundle.")] = False,
) -> None:
    """Export the trained prompt of a trial as a bundle.

    A bundle is a folder that works without the store. Exits with 5 if the exported prompt does not
    reproduce the trial's predictions. Prints DIR.

    airsweep export best --sweep quickstart -o bundle

    airsweep export 3f2a9c1d -o bundle
    """
    from orchestrator.errors import GATE
    from orchestrator.planning import Resolver
    from orchestrator.reporting.bundles import BEST, PredictionsDifferError, best_trial
    from orchestrator.reporting.bundles import export as write_bundle
    from orchestrator.store import open_store
    from orchestrator.tracking import named_trial

    if trial == BEST:
        if sweep is None:
            fail("`best` needs the name of a sweep; give --sweep NAME")
        sweep_spec, sweep_location = recorded_sweep(sweep, store, data_root)
        data_root = sweep_location.data_root
        record = best_trial(sweep_spec, sweep_location, only or [])
    else:
        if only:
            fail("--only is allowed with `best` only: it selects rows, and you named a trial")
        location = location_named(sweep, store) if sweep else None
        record = named_trial(trial, open_store(store).read_only(), location, tracking_uri)
    source = open_store(store).read_only()
    resolver = Resolver(source.root / "digests.json", data_root)
    try:
        write_bundle(record, source, resolver, out, force)
    except PredictionsDifferError as problem:
        fail(str(problem), GATE)
    show(out)


@app.command()
def classify(
    folder: FolderArgument,
    images: Annotated[
        list[str],
        typer.Argument(
            metavar="IMAGES...",
            help="Image files, folders (searched recursively), or quoted glob patterns.",
        ),
    ],
    topk: Annotated[
        int, typer.Option("--topk", metavar="K", min=1, help="Classes to list for each image.")
    ] = 3,
    as_json: JsonOption = False,
    as_csv: Annotated[bool, typer.Option("--csv", help="Print CSV.")] = False,
    weights: WeightsOption = None,
    device: DeviceOption = "cpu",
) -> None:
    """Classify images with a bundle, without a store or Ray.

    Exits with 1 if some files cannot be read, with 2 if no file can be read.

    airsweep classify bundle new/*.png

    airsweep classify bundle photos/ 'more/**/*.jpg' --topk 1 --csv > classes.csv
    """
    if as_json and as_csv:
        fail("--json and --csv exclude each other; give only one")
    from air_core.backbone.loading import import_open_clip_alone
    from air_core.bundle import image_files, load_bundle

    import_open_clip_alone()
    files = image_files(images)
    bundle = load_bundle(folder, weights, device)
    unreadable: list[str] = []
    results = bundle.stream(files, topk, lambda file, why: unreadable.append(why))
    write = _json if as_json else _csv if as_csv else _table(files, bundle.classnames)
    write(_with_progress_bar(results, len(files)))
    if unreadable:
        show(f"{len(unreadable):,} of {len(files):,} files could not be read:", file=sys.stderr)
        for reason in unreadable:
            show(f"  {printable(reason)}", file=sys.stderr)
        if len(unreadable) == len(files):
            fail("no file could be read, so nothing was classified")
        sys.exit(1)


def _json(results: Iterable[ClassifiedImage]) -> None:
    """Stream a JSON list with one image per line."""
    separator = "[\n "
    for result in results:
        show(separator + json.dumps(result.json()), end="")
        separator = ",\n "
    if separator != "[\n ":
        show("\n]")


PAIR = ("class", "probability")


def _csv(results: Iterable[ClassifiedImage]) -> None:
    """Columns image, class, probability; then class_2, probability_2, ..."""
    writer = csv.writer(sys.stdout, lineterminator="\n")
    for index, result in enumerate(results):
        if index == 0:
            others = range(2, len(result.top) + 1)
            columns = [f"{column}_{rank}" for rank in others for column in PAIR]
            writer.writerow(["image", *PAIR, *columns])
        pairs = ((csv_cell(name), probability) for name, probability in result.top)
        writer.writerow([csv_cell(result.image), *(value for pair in pairs for value in pair)])


def _table(files: Iterable[Path], classnames: Iterable[str]) -> Writer:
    width = min(PATH_WIDTH, max(len(printable(str(file))) for file in files))
    name_width = max(len(name) for name in classnames)

    def write(results: Iterable[ClassifiedImage]) -> None:
        for result in results:
            best, *others = (
                f"{name:<{name_width}} {probability:>6.1%}" for name, probability in result.top
            )
            rest = "   ".join(" ".join(other.split()) for other in others)
            show(f"{printable(result.image):<{width}}  {best}   {rest}".rstrip())

    return write


def _with_progress_bar(results: Iterator[ClassifiedImage], total: int) -> Iterator[ClassifiedImage]:
    """Yield the results; show a progress bar if stderr is a terminal and stdout is not."""
    from rich.console import Console
    from rich.progress import Progress

    shown = sys.stderr.isatty() and not sys.stdout.isatty()
    with Progress(
        console=Console(stderr=True),
        transient=True,
        redirect_stdout=False,  # the results go to stdout unchanged
        redirect_stderr=False,
        disable=not shown,
    ) as progress:
        yield from progress.track(results, total, description="classifying")


@app.command()
def verify(
    folder: FolderArgument,
    data_root: DataOption = None,
    weights: WeightsOption = None,
    dataset: Annotated[
        str | None,
        typer.Option(
            metavar="folder:PATH",
            help="Folder of the test images, if the trial used images of your own.",
        ),
    ] = None,
    device: DeviceOption = "cpu",
    as_json: JsonOption = False,
) -> None:
    """Check that a bundle reproduces the recorded predictions.

    Scores the bundle on the trial's test images. Exits with 0 if the accuracy and every prediction
    are equal, else with 5.

    airsweep verify bundle

    airsweep verify bundle --data-root /data --json
    """
    import tempfile

    from orchestrator.errors import DONE, GATE
    from orchestrator.planning import Resolver
    from orchestrator.reporting.bundles import verify as verify_bundle

    def scoring_progress(starts: Iterable[int], batches: int) -> Iterable[int]:
        return with_progress_bar("scoring", starts, batches)

    with tempfile.TemporaryDirectory(prefix="airsweep-") as cache:
        resolver = Resolver(Path(cache) / "digests.json", data_root)
        result = verify_bundle(folder, resolver, weights, device, scoring_progress, dataset)
    show(json.dumps(result.json(), indent=1) if as_json else "\n".join(result.lines()))
    sys.exit(DONE if result.same else GATE)
