"""Commands about bundles: folders with classifiers that work without the sweep's store."""

from __future__ import annotations

import csv
import json
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Annotated, Any

import typer

from air_core.printable import printable
from orchestrator import api
from orchestrator.cli.common import (
    STORE,
    DataOption,
    JsonOption,
    OnlyOption,
    StoreOption,
    TrackingOption,
    fail,
    with_progress_bar,
)
from orchestrator.errors import DONE, GATE
from orchestrator.formatting import csv_cell, show

if TYPE_CHECKING:
    from air_core.bundle.classifier import ClassifiedImage

    Results = Iterable[tuple[ClassifiedImage, dict[str, str | None]]]

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
ClassifierOption = Annotated[
    str | None,
    typer.Option(
        "--classifier",
        metavar="NAME",
        help="text, auxiliary or fused. Default: the one selected at the export.",
    ),
]
PATH_WIDTH = 44  # largest width of the table's first column
MATRIX = 12  # classes of a confusion matrix that fits a screen


@app.command()
def export(
    trial: Annotated[
        str, typer.Argument(metavar="TRIAL|best", help="Trial key, slot, MLflow run id, or best.")
    ],
    output: Annotated[
        Path, typer.Option("-o", "--output", "--out", metavar="DIR", help="Folder to create.")
    ],
    sweep: Annotated[
        str | None,
        typer.Option("--sweep", metavar="NAME", help="Sweep of the trial: NAME or PROJECT/NAME."),
    ] = None,
    only: OnlyOption = None,
    by: Annotated[
        str | None,
        typer.Option(
            "--by",
            metavar="SCORE",
            help="Score of `best`: validation_accuracy, consensus or test_accuracy. Default: "
            "validation_accuracy if there are validation images, else consensus.",
        ),
    ] = None,
    classifier: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="text, auxiliary or fused: the default of the bundle. Default: the best by SCORE.",
        ),
    ] = None,
    store: StoreOption = STORE,
    data_root: DataOption = None,
    tracking_uri: TrackingOption = None,
    force: Annotated[bool, typer.Option("--force", help="Replace an existing bundle.")] = False,
) -> None:
    """Export the classifiers of a trial as a bundle.

    A bundle is a folder that works without the store. `best` selects row, run and classifier of a
    sweep without test labels. Exits with 5 if a classifier does not reproduce the trial's
    predictions. Prints DIR.

    airsweep export best --sweep quickstart -o bundle

    airsweep export 3f2a9c1d -o bundle
    """
    from orchestrator.reporting.bundles import PredictionsDifferError

    options: dict[str, Any] = {"store": store, "data_root": data_root, "force": force}
    options |= {"by": by, "classifier": classifier, "tracking_uri": tracking_uri}
    try:
        show(api.export(trial, output, sweep=sweep, only=only or (), **options))
    except PredictionsDifferError as problem:
        fail(str(problem), GATE)


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
    classifier: ClassifierOption = None,
    weights: WeightsOption = None,
    device: DeviceOption = "cpu",
) -> None:
    """Classify images with a bundle, without a store or Ray.

    If the images are in folders that are named like classes, the accuracy and a confusion matrix
    follow: on stdout, with --json or --csv on stderr. Exits with 1 if some files cannot be read,
    with 2 if no file can be read.

    airsweep classify bundle new/*.png

    airsweep classify bundle photos/ 'more/**/*.jpg' --topk 1 --csv > classes.csv
    """
    if as_json and as_csv:
        fail("--json and --csv exclude each other; give only one")
    from air_core.backbone.loading import import_open_clip_alone
    from air_core.bundle import image_files, load_bundle
    from air_core.bundle.files import skipped_files, true_classes
    from orchestrator.planning.dataset_text import skipped_text

    import_open_clip_alone()
    files = image_files(images)
    bundle = load_bundle(folder, weights, device, classifier)
    unreadable: list[str] = []
    results = bundle.stream(files, topk, lambda file, why: unreadable.append(why))
    true = true_classes(files, bundle.classnames)
    counts: Counter[tuple[str, str]] = Counter()  # of images, by true and predicted class
    write = _json if as_json else _csv if as_csv else _table(files, bundle.classnames)
    # Where the results are printed on a terminal, they show the progress.
    shown = with_progress_bar("classifying", results, len(files), quiet=sys.stdout.isatty())
    write(_labelled(shown, true, counts))
    if counts:
        others = len(files) - len(unreadable) - counts.total()
        for line in _confusion_lines(counts, bundle.classnames, others):
            show(line, file=sys.stderr if as_json or as_csv else sys.stdout)
    if skipped := skipped_files(images):
        show(f"skipped: {skipped_text(dict(sorted(skipped.items())))}", file=sys.stderr)
    if unreadable:
        show(f"{len(unreadable):,} of {len(files):,} files could not be read:", file=sys.stderr)
        for reason in unreadable:
            show(f"  {printable(reason)}", file=sys.stderr)
        if len(unreadable) == len(files):
            fail("no file could be read, so nothing was classified")
        sys.exit(1)


def _labelled(
    results: Iterable[ClassifiedImage],
    true: Mapping[Path, str],
    counts: Counter[tuple[str, str]],
) -> Iterator[tuple[ClassifiedImage, dict[str, str | None]]]:
    """Each result with its true class under "true", empty if no image has one; counts pairs."""
    for result in results:
        name = true.get(Path(result.image))
        if name is not None:
            counts[name, result.classname] += 1
        yield result, {"true": name} if true else {}


def _confusion_lines(
    counts: Counter[tuple[str, str]], classnames: Sequence[str], others: int
) -> Iterator[str]:
    """Accuracy, and the confusion matrix or, of many classes, the most frequent confusions."""
    right = sum(count for (true, predicted), count in counts.items() if true == predicted)
    total = counts.total()
    note = f"; {others:,} in other folders do not count" if others else ""
    yield ""
    yield f"accuracy {right / total:.1%}: {right:,} of {total:,} images in class folders{note}"
    shown = [name for name in classnames if any(name in pair for pair in counts)]
    if len(shown) > MATRIX:
        yield "most frequent confusions (folder -> predicted class)"
        wrong = [(pair, count) for pair, count in counts.most_common() if pair[0] != pair[1]]
        for (true, predicted), count in wrong[:MATRIX]:
            yield f"  {count:>5,}  {printable(true)} -> {printable(predicted)}"
        return
    width = max(len(printable(name)) for name in shown)
    yield "confusion matrix (rows: folder, columns: predicted class)"
    yield f"      {'':<{width}} " + "".join(f"{c:>6}" for c in range(1, len(shown) + 1))
    for c, true in enumerate(shown, start=1):
        row = "".join(f"{counts[true, predicted]:>6,}" for predicted in shown)
        yield f"  {c:>2}  {printable(true):<{width}} {row}"


def _json(results: Results) -> None:
    """Stream a JSON list with one image per line."""
    separator = "[\n "
    for result, label in results:
        show(separator + json.dumps(result.json() | label), end="")
        separator = ",\n "
    if separator != "[\n ":
        show("\n]")


PAIR = ("class", "probability")


def _csv(results: Results) -> None:
    """Columns image, class, probability; then class_2, probability_2, ...; then true, if known."""
    writer = csv.writer(sys.stdout, lineterminator="\n")
    for index, (result, label) in enumerate(results):
        if index == 0:
            others = range(2, len(result.top) + 1)
            columns = [f"{column}_{rank}" for rank in others for column in PAIR]
            writer.writerow(["image", *PAIR, *columns, *label])
        pairs = ((csv_cell(name), probability) for name, probability in result.top)
        values = (value for pair in pairs for value in pair)
        labels = (csv_cell(name or "") for name in label.values())
        writer.writerow([csv_cell(result.image), *values, *labels])


def _table(files: Iterable[Path], classnames: Iterable[str]) -> Callable[[Results], None]:
    width = min(PATH_WIDTH, max(len(printable(str(file))) for file in files))
    name_width = max(len(name) for name in classnames)

    def write(results: Results) -> None:
        for result, _ in results:
            best, *others = (
                f"{name:<{name_width}} {probability:>6.1%}" for name, probability in result.top
            )
            rest = "   ".join(" ".join(other.split()) for other in others)
            show(f"{printable(result.image):<{width}}  {best}   {rest}".rstrip())

    return write


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
    classifier: ClassifierOption = None,
    device: DeviceOption = "cpu",
    as_json: JsonOption = False,
) -> None:
    """Check that a bundle reproduces the recorded predictions.

    Scores the bundle on the trial's test images. Exits with 0 if the accuracy and every prediction
    are equal, else with 5.

    airsweep verify bundle

    airsweep verify bundle --data-root /data --json
    """
    from orchestrator.planning import Resolver
    from orchestrator.reporting.bundles import verify as verify_bundle

    with TemporaryDirectory(prefix="airsweep-") as cache:
        resolver = Resolver(Path(cache) / "digests.json", data_root)
        watch = partial(with_progress_bar, "scoring")
        result = verify_bundle(folder, resolver, weights, device, watch, dataset, classifier)
    show(json.dumps(result.json(), indent=1) if as_json else "\n".join(result.lines()))
    sys.exit(DONE if result.same else GATE)
