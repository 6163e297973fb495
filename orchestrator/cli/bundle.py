"""Commands about bundles: folders with classifiers that work without the sweep's store."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from air_core.tools.printable import printable
from orchestrator import api
from orchestrator.cli.common import (
    STORE,
    USE,
    DataOption,
    JsonOption,
    OnlyOption,
    StoreOption,
    TrackingOption,
    fail,
    note_options,
    recorded_sweep,
    with_progress_bar,
)
from orchestrator.errors import GATE
from orchestrator.formatting import show

app = typer.Typer()


@app.command(rich_help_panel=USE)
def export(
    trial: Annotated[str, typer.Argument(metavar="TRIAL|best", help="Trial key, slot, or best.")],
    output: Annotated[
        Path, typer.Option("-o", "--output", metavar="DIR", help="Folder to create.")
    ],
    sweep: Annotated[
        str | None, typer.Option(metavar="NAME", help="Sweep of the trial: NAME or PROJECT/NAME.")
    ] = None,
    only: OnlyOption = None,
    by: Annotated[
        str | None,
        typer.Option(
            metavar="SCORE",
            help="Score of `best`: validation_accuracy, experiments or test_accuracy. Default: "
            "validation_accuracy if there are validation images, else experiments: the order of "
            "methods in docs/experiments.md.",
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
    onnx: Annotated[
        bool, typer.Option("--onnx", help="Also write model.onnx, which needs no torch.")
    ] = False,
    register: Annotated[
        str | None,
        typer.Option(
            metavar="MODEL", help="Register model.onnx as a version of this model in MLflow."
        ),
    ] = None,
) -> None:
    """Export the classifiers of a trial as a bundle.

    A bundle is a folder that works without the store. `best` selects row, run and classifier of a
    sweep without test labels. Exits with 4 if a classifier does not reproduce the trial's
    predictions. Prints DIR.

    airsweep export best --sweep quickstart -o bundle

    airsweep export 3f2a9c1d -o bundle --onnx

    airsweep export best --sweep quickstart -o bundle --register digits
    """
    from orchestrator.reporting.bundles import PredictionsDifferError

    options: dict[str, Any] = {"store": store, "data_root": data_root, "force": force}
    options |= {"by": by, "classifier": classifier, "tracking_uri": tracking_uri}
    options |= {"onnx": onnx, "register": register}
    try:
        show(api.export(trial, output, sweep=sweep, only=only or (), **options))
        if sweep is not None:
            note_options(*recorded_sweep(sweep, store, data_root))
        show(f"next: airsweep classify {shlex.quote(str(output))} IMAGES", file=sys.stderr)
    except PredictionsDifferError as problem:
        fail(str(problem), GATE)


@app.command(rich_help_panel=USE)
def classify(
    folder: Annotated[
        Path,
        typer.Argument(metavar="DIR", help="Bundle: a folder written by `airsweep export`."),
    ],
    images: Annotated[
        list[str],
        typer.Argument(
            metavar="IMAGES...",
            help="Image files, folders (searched recursively), or quoted glob patterns.",
        ),
    ],
    topk: Annotated[
        int, typer.Option(metavar="K", min=1, help="Classes to list for each image.")
    ] = 3,
    as_json: JsonOption = False,
    as_csv: Annotated[bool, typer.Option("--csv", help="Print CSV.")] = False,
    classifier: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="text, auxiliary or fused. Default: the one selected at the export.",
        ),
    ] = None,
    min_probability: Annotated[
        float,
        typer.Option(
            metavar="P", min=0, max=1, help="Answer `unsure` where the best class has less than P."
        ),
    ] = 0.0,
    output: Annotated[
        Path | None,
        typer.Option(
            "-o",
            "--output",
            metavar="FILE",
            help="Table to write, by its suffix: .parquet or .csv.",
        ),
    ] = None,
    weights: Annotated[
        str | None,
        typer.Option(
            metavar="BACKBONE",
            help="Name or path of the backbone, if its weights are not published.",
        ),
    ] = None,
    device: Annotated[
        str, typer.Option(metavar="DEVICE", help="Torch device: cpu, cuda, ...")
    ] = "cpu",
    runtime: Annotated[
        str,
        typer.Option(
            metavar="torch|onnx",
            help="What computes: torch with the backbone, or onnxruntime with model.onnx.",
        ),
    ] = "torch",
) -> None:
    """Classify images with a bundle, without a store.

    If the images are in folders that are named like classes, the accuracy and frequent confusions
    follow: on stdout, with --json, --csv or -o on stderr. Exits with 1 if some files cannot be
    read, with 2 if no file can be read. With --json, --csv and -o there is one row per image;
    `error` is the reason why an image is unreadable. With -o prints FILE.

    airsweep classify bundle new/*.png

    airsweep classify bundle photos/ 'more/**/*.jpg' --topk 1 --csv > classes.csv

    airsweep classify bundle photos -o classes.parquet
    """
    from air_core.backbone.loading import import_open_clip_alone
    from air_core.bundle import image_files, load_bundle
    from air_core.datasets.class_folders import other_files, skipped_text
    from orchestrator.reporting import classified

    if as_json + as_csv + (output is not None) > 1:
        fail("--json, --csv and -o exclude each other; give only one")
    if output is not None:
        classified.check_file(output)
    files = image_files(images)
    import_open_clip_alone()
    bundle = load_bundle(folder, weights, device, classifier, min_probability, runtime)
    if caution := bundle.manifest.content.cautions.get(bundle.classifier):
        show(f"note: {caution}", file=sys.stderr)
    rows = classified.classified_rows(bundle, files, topk)
    # Where the results are printed on a terminal, they show the progress.
    quiet = output is None and sys.stdout.isatty()
    tally = classified.Tally()
    counted = tally.counted(with_progress_bar("classifying", rows, len(files), quiet))
    form = "json" if as_json else "csv" if as_csv else ""
    if output is not None:
        classified.write_file(output, counted)
        show(output)
    elif form:
        classified.WRITERS[form](sys.stdout, counted)
    else:
        for line in classified.text_lines(counted, files, bundle.classnames):
            show(line)
    for line in tally.confusion_lines(bundle.classnames):
        show(line, file=sys.stderr if form or output is not None else sys.stdout)
    if min_probability:
        unsure = f"unsure: {tally.unsure:,} of {len(files):,} images, below {min_probability:g}"
        unsure += "; they count in no accuracy" if tally.pairs and tally.unsure else ""
        show(unsure, file=sys.stderr)
    for place in images:
        home = Path(place).expanduser()
        if home.is_dir() and (skipped := skipped_text(other_files(home))):
            show(f"skipped: {skipped}", file=sys.stderr)
    if tally.unreadable:
        show(f"{len(tally.unreadable):,} of {len(files):,} files could not be read:", sys.stderr)
        for reason in tally.unreadable:
            show(f"  {printable(reason)}", file=sys.stderr)
        if len(tally.unreadable) == len(files):
            fail("no file could be read, so nothing was classified")
        sys.exit(1)
