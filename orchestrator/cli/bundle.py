"""Commands about bundles: what was learned, in a folder of its own, and used without the sweep."""

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
    watched,
)
from orchestrator.formatting import csv_cell, show

if TYPE_CHECKING:
    from air_core.bundle.classifier import Classified

    Writer = Callable[[Iterable[Classified]], None]

app = typer.Typer()

FolderArgument = Annotated[Path, typer.Argument(metavar="DIR", help="of `airsweep export`")]
WeightsOption = Annotated[
    str | None,
    typer.Option(
        "--weights",
        metavar="BACKBONE",
        help="name or path of the same weights, where they are not published ones",
    ),
]
DeviceOption = Annotated[str, typer.Option("--device", help="cpu, cuda, ...")]
PATH_WIDTH = 44  # of a table's first column, at most


@app.command()
def export(
    trial: Annotated[
        str, typer.Argument(metavar="TRIAL|best", help="a trial key, a slot, a run id, or best")
    ],
    out: Annotated[Path, typer.Option("--out", "-o", metavar="DIR", help="the new folder")],
    sweep: Annotated[
        str | None,
        typer.Option("--sweep", metavar="NAME", help="the sweep, or PROJECT/NAME, that it is of"),
    ] = None,
    only: OnlyOption = None,
    store: StoreOption = STORE,
    data_root: DataOption = None,
    tracking_uri: TrackingOption = None,
    force: Annotated[bool, typer.Option("--force", help="replace a bundle in DIR")] = False,
) -> None:
    """Put what a trial learned into a folder of its own: a bundle.

    The prompt must predict what the trial predicted; else this ends with 5. Prints DIR.

    airsweep export best --sweep quickstart -o bundle

    airsweep export 3f2a9c1d -o bundle
    """
    from orchestrator.errors import GATE
    from orchestrator.planning import Resolver
    from orchestrator.reporting.bundles import BEST, PredictionsDifferError, best_trial
    from orchestrator.reporting.bundles import export as written
    from orchestrator.store import open_store
    from orchestrator.tracking import named_trial

    if trial == BEST:
        if sweep is None:
            fail("best of which sweep? give --sweep NAME")
        asked, place = recorded_sweep(sweep, store, data_root)
        data_root = place.data_root  # as the sweep has it
        chosen = best_trial(asked, place, only or [])
    else:
        if only:
            fail("--only chooses among rows for `best`; a trial has a name of its own")
        place_or_none = location_named(sweep, store) if sweep else None
        chosen = named_trial(trial, open_store(store).read_only(), place_or_none, tracking_uri)
    there = open_store(store).read_only()
    resolver = Resolver(there.root / "digests.json", data_root)
    try:
        written(chosen, there, resolver, out, force)
    except PredictionsDifferError as problem:
        fail(str(problem), GATE)
    show(out)


@app.command()
def classify(
    folder: FolderArgument,
    images: Annotated[
        list[str],
        typer.Argument(metavar="IMAGES...", help="files, folders with all below, 'patterns'"),
    ],
    topk: Annotated[int, typer.Option("--topk", min=1, help="classes told of each image")] = 3,
    as_json: JsonOption = False,
    as_csv: Annotated[bool, typer.Option("--csv", help="for spreadsheets")] = False,
    weights: WeightsOption = None,
    device: DeviceOption = "cpu",
) -> None:
    """Classify images with a bundle; needs no store and no Ray.

    Ends with 1 if some files could not be read, with 2 if none could.

    airsweep classify bundle new/*.png

    airsweep classify bundle photos/ 'more/**/*.jpg' --topk 1 --csv > classes.csv
    """
    if as_json and as_csv:
        fail("--json and --csv: give one of them")
    from air_core.backbone.loading import import_open_clip_alone
    from air_core.bundle import image_files, load_bundle

    import_open_clip_alone()
    files = image_files(images)
    bundle = load_bundle(folder, weights, device)
    unreadable: list[str] = []
    found = bundle.stream(files, topk, lambda file, why: unreadable.append(why))
    write = _json if as_json else _csv if as_csv else _table(files, bundle.classnames)
    write(_watched(found, len(files)))
    if unreadable:
        several = f"{len(unreadable):,} of {len(files):,} files could not be read"
        for line in (f"{several}:", *(f"  {printable(why)}" for why in unreadable)):
            show(line, file=sys.stderr)
        if len(unreadable) == len(files):
            fail("no file could be read, so nothing was classified")
        sys.exit(1)


def _json(found: Iterable[Classified]) -> None:
    """One list, an image a line, written as it comes."""
    before = "[\n "
    for one in found:
        show(before + json.dumps(one.json()), end="")
        before = ",\n "
    if before != "[\n ":
        show("\n]")


PAIR = ("class", "probability")


def _csv(found: Iterable[Classified]) -> None:
    """Columns image, class, probability; then class_2, probability_2, ..."""
    writer = csv.writer(sys.stdout, lineterminator="\n")
    for number, one in enumerate(found):
        if number == 0:
            more = [f"{what}_{n}" for n in range(2, len(one.top) + 1) for what in PAIR]
            writer.writerow(["image", *PAIR, *more])
        pairs = ((csv_cell(name), share) for name, share in one.top)
        writer.writerow([csv_cell(one.image), *(value for pair in pairs for value in pair)])


def _table(files: Iterable[Path], classnames: Iterable[str]) -> Writer:
    width = min(PATH_WIDTH, max(len(printable(str(file))) for file in files))
    name_width = max(len(name) for name in classnames)

    def write(found: Iterable[Classified]) -> None:
        for one in found:
            best, *others = (f"{name:<{name_width}} {share:>6.1%}" for name, share in one.top)
            rest = "   ".join(" ".join(other.split()) for other in others)
            show(f"{printable(one.image):<{width}}  {best}   {rest}".rstrip())

    return write


def _watched(found: Iterator[Classified], total: int) -> Iterator[Classified]:
    """The same, with a bar on stderr where that is a terminal and the results go elsewhere."""
    from rich.console import Console
    from rich.progress import Progress

    shown = sys.stderr.isatty() and not sys.stdout.isatty()
    with Progress(
        console=Console(stderr=True),
        transient=True,
        redirect_stdout=False,  # what is printed must stay there
        redirect_stderr=False,
        disable=not shown,
    ) as progress:
        yield from progress.track(found, total, description="classifying")


@app.command()
def verify(
    folder: FolderArgument,
    data_root: DataOption = None,
    weights: WeightsOption = None,
    dataset: Annotated[
        str | None,
        typer.Option(metavar="folder:PATH", help="the images that it was tested on, if your own"),
    ] = None,
    device: DeviceOption = "cpu",
    as_json: JsonOption = False,
) -> None:
    """Score a bundle again on its trial's test images.

    Ends with 0 if accuracy and every prediction are the recorded ones, with 5 if not.

    airsweep verify bundle

    airsweep verify bundle --data-root /data --json
    """
    import tempfile

    from orchestrator.errors import DONE, GATE
    from orchestrator.planning import Resolver
    from orchestrator.reporting.bundles import verify as verified

    with tempfile.TemporaryDirectory(prefix="airsweep-") as cache:
        resolver = Resolver(Path(cache) / "digests.json", data_root)
        found = verified(folder, resolver, weights, device, _scored, dataset)
    show(json.dumps(found.json(), indent=1) if as_json else "\n".join(found.lines()))
    sys.exit(DONE if found.same else GATE)


def _scored(starts: Iterable[int], batches: int) -> Iterable[int]:
    return watched("scoring", starts, batches)
