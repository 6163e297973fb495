"""Python API: airsweep's commands as functions, with results as pandas DataFrames.

    import airsweep

    outcome = airsweep.run("quickstart", sets={"seeds": [1]})
    airsweep.table(outcome)

Errors are exceptions with the same message as the command's: ValueError for a wrong file, option or
name; RuntimeError if a run is refused to start. No function ends the process. Importing this module
is cheap; torch, Ray and pandas are imported when a function needs them.
"""

from __future__ import annotations

import os
import re
import signal
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from orchestrator.environment import redirect_descriptor
from orchestrator.errors import INTERRUPTED, TERMINATED
from orchestrator.files import write_atomic

if TYPE_CHECKING:
    import pyarrow
    from optuna import Study
    from pandas import DataFrame

    from air_core.bundle.classifier import Bundle
    from orchestrator.planning import Plan, SweepRequest
    from orchestrator.planning.ledger import Ledger
    from orchestrator.reporting.sample import Sample
    from orchestrator.spec import SweepSpec
    from orchestrator.store import SweepLocation

__all__ = [
    "Classifier",
    "Outcome",
    "Planned",
    "classify",
    "curves",
    "export",
    "init",
    "load",
    "load_bundle",
    "logs",
    "plan",
    "predictions",
    "report",
    "results",
    "run",
    "sample",
    "schema",
    "status",
    "study",
    "sweeps",
    "table",
]

STORE = "runs"  # default store

Options = Mapping[str, Any] | Iterable[str]  # {"iterations": 3}, or ["iterations=3"]


# ---------------------------------------------------------------- loading and planning


def load(
    spec: str | Path | Mapping[str, Any] | SweepRequest,
    *,
    sets: Options = (),
    only: Options = (),
    smoke: bool = False,
    plugins: Sequence[str] = (),
) -> SweepRequest:
    """Read and check a sweep. The functions below accept the file or the returned request.

    Args:
        spec: sweep file, the bare name of one below ./sweeps, in . or shipped with airsweep, or
            the content of a sweep file as a dict: {"name": "mine", "fixed": {"method": "cpl"}}.
        sets: replacements for values of the file, like `--set`: {"train.steps": 100}.
        only: values of grid axes to keep, like `--only`: {"method": ["air", "cpl"]}.
        smoke: reduce every cell to one seed and iteration with 8 images, and a search to two
            points, in a separate store, `<store>-smoke`.
        plugins: with a dict: files with components of your own, from the working directory.

    Raises:
        ValueError: the file or an option is wrong; the message names file, line and column.
    """
    from orchestrator.planning import SweepRequest, read_request
    from orchestrator.planning.requests import only_options, set_options

    if isinstance(spec, Mapping):
        spec = {"version": 1, **spec, **({"plugins": [*plugins]} if plugins else {})}
    elif plugins:
        raise ValueError("`plugins` belongs to a dict; a sweep file names its own under `plugins:`")
    if not isinstance(spec, SweepRequest):
        return read_request(spec, set_options(sets), only_options(only), smoke)
    if sets or only or smoke:
        raise ValueError(
            f"{spec.spec.name} is already loaded; pass sets, only and smoke to `load` instead"
        )
    return spec


@dataclass(frozen=True, repr=False)
class Planned:
    """Plan of a sweep and location of its results. Its repr is the screen of `airsweep plan`."""

    plan: Plan
    location: SweepLocation
    origin: Mapping[str, Any] = field(default_factory=dict)  # file and options of the request

    def json(self) -> dict[str, Any]:
        """The JSON of `airsweep plan --json`."""
        from orchestrator.reporting import plan_report

        return plan_report(self.plan, self.location)

    def screen(self, explain: bool = False) -> str:
        """Text of `airsweep plan`.

        Args:
            explain: show the settings that differ from the preset of their method, and why.
        """
        from orchestrator.reporting import plan_screen

        return plan_screen(self.plan, self.location, self.origin, explain)

    def check(self, tracking_uri: str | None = None) -> None:
        """Check that `run` would start now on this machine, or on the cluster at RAY_ADDRESS.

        Args:
            tracking_uri: as for `run`.

        Raises:
            RuntimeError: it would not, as for `run`; the message has the reason.
        """
        from orchestrator.execution.checks import check_start
        from orchestrator.execution.screen import make_screen
        from orchestrator.tracking import Publisher

        publisher = Publisher(self.plan.about, self.location, tracking_uri)
        with _restored_process():
            check_start(self.plan, self.location, publisher, make_screen(quiet=False))

    def __repr__(self) -> str:
        return self.screen()


def plan(
    spec: str | Path | SweepRequest,
    *,
    store: str | Path | None = None,
    data_root: str | Path | None = None,
    sets: Options = (),
    only: Options = (),
    smoke: bool = False,
) -> Planned:
    """Plan a sweep without running anything: missing work, existing results, expected duration.

    Args:
        spec: as for `load`.
        store: store of all results. Default: AIRSWEEP_STORE, else `runs`.
        data_root: folder of real datasets. Default: AIRSWEEP_DATA.
        sets, only, smoke: as for `load`.
    """
    from orchestrator.planning import plan_of
    from orchestrator.planning.requests import complete_origin, location_for

    request = load(spec, sets=sets, only=only, smoke=smoke)
    location = location_for(request, _store(store), data_root)
    origin = complete_origin(request.origin, location)
    return Planned(plan_of(request.spec, location), location, origin)


# ---------------------------------------------------------------- running


@dataclass(frozen=True, repr=False)
class Outcome:
    """Result of a run. Its repr is the final screen of `airsweep run`.

    Attributes:
        exit_code: 0 if all trials are done, 1 if some failed (docs/troubleshooting.md).
        location: location of its results.
    """

    exit_code: int
    location: SweepLocation

    def __repr__(self) -> str:
        from orchestrator.reporting import summary_screen

        return summary_screen(self.location)


def run(
    spec: str | Path | SweepRequest,
    *,
    store: str | Path | None = None,
    data_root: str | Path | None = None,
    tracking_uri: str | None = None,
    sets: Options = (),
    only: Options = (),
    smoke: bool = False,
    prepare: bool = False,
    quiet: bool = False,
) -> Outcome:
    """Run a sweep, or resume it: finished trials are skipped.

    A failed trial raises no exception; see `Outcome.exit_code` and `results`. Ctrl-C raises
    KeyboardInterrupt after the event log and the tracker are closed.

    Args:
        spec: as for `load`.
        store, data_root: as for `plan`.
        tracking_uri: MLflow server, or "none". Default: MLFLOW_TRACKING_URI, else a file in the
            store.
        sets, only, smoke: as for `load`.
        prepare: make the features, LoRA weights and images of the sweep, but run no trial.
        quiet: print errors only; by default stderr shows the progress.

    Raises:
        ValueError: the file, an option, or a dataset or model that they name is wrong.
        RuntimeError: the run was refused to start, or the disk of the store is full.
    """
    from orchestrator.planning.requests import location_for

    request = load(spec, sets=sets, only=only, smoke=smoke)
    location = location_for(request, _store(store), data_root)
    with _restored_process():
        outcome = execute(
            request.spec, location, request.origin, quiet, tracking_uri, prepare=prepare
        )
        # `run_sweep` returns after a signal, because it closes the event log and the tracker first.
        if outcome.exit_code == INTERRUPTED:
            raise KeyboardInterrupt
        if outcome.exit_code == TERMINATED:
            raise SystemExit(TERMINATED)
        return outcome


def execute(
    sweep: SweepSpec,
    location: SweepLocation,
    origin: dict[str, Any],
    quiet: bool,
    tracking_uri: str | None = None,
    prepare: bool = False,
) -> Outcome:
    """Call `run_sweep` with a screen and an MLflow publisher; the commands use this as well."""
    from orchestrator.execution.driver import run_sweep
    from orchestrator.execution.screen import make_screen
    from orchestrator.planning.plan import about
    from orchestrator.tracking import Publisher

    publisher = Publisher(about(sweep), location, tracking_uri)
    screen = make_screen(quiet)
    code = run_sweep(sweep, location, screen, publisher, origin=origin, prepare_only=prepare)
    return Outcome(code, location)


@contextmanager
def _restored_process() -> Iterator[None]:
    """Restore the environment, the SIGTERM handler and stdout after a run."""
    environment, handler = dict(os.environ), signal.getsignal(signal.SIGTERM)
    is_main_thread = threading.current_thread() is threading.main_thread()
    try:
        with redirect_descriptor(1, 2):  # stdout is for the caller
            yield
    finally:
        if is_main_thread and handler is not None:
            signal.signal(signal.SIGTERM, handler)
        for name in os.environ.keys() - environment.keys():
            del os.environ[name]
        os.environ.update(environment)


# ---------------------------------------------------------------- results


def status(name: str | Outcome, *, store: str | Path | None = None) -> dict[str, Any]:
    """Return the progress of a sweep, read from its event log: the JSON of `airsweep status`.

    Arguments and exceptions are those of `results`.
    """
    from orchestrator.reporting import screens

    return screens.status_report(location_named(name, store))


def logs(name: str | Outcome, *, store: str | Path | None = None) -> list[dict[str, Any]]:
    """Return the events of a sweep: what ran when, and why it failed.

    Arguments and exceptions are those of `results`.
    """
    return list(location_named(name, store).event_log().events())


def results(name: str | Outcome, *, store: str | Path | None = None) -> DataFrame:
    """Return one row per trial: varied settings, seeds, state and metrics.

    Args:
        name: name of a recorded sweep, PROJECT/NAME, its sweep file, or the Outcome that `run`
            returned.
        store: as for `plan`; ignored if `name` is an Outcome.

    Raises:
        ValueError: the store has no such sweep.
    """
    from orchestrator.reporting.results import trials_frame

    ledger, location = recorded_sweep(name, store)
    return trials_frame(ledger, location.store)


def curves(name: str | Outcome, *, store: str | Path | None = None) -> DataFrame:
    """Return the learning curves, one row per value: trial, metric, iteration, value.

    Arguments and exceptions are those of `results`.
    """
    from orchestrator.reporting.results import curves_frame

    ledger, location = recorded_sweep(name, store)
    return curves_frame(ledger, location.store)


def table(name: str | Outcome, *, store: str | Path | None = None) -> DataFrame:
    """Return the rows of `airsweep table`: mean, std and interval of each setting over its seeds,
    and its gains over host and control with interval, p value and marks.

    Arguments and exceptions are those of `results`.
    """
    from orchestrator.reporting import results_of
    from orchestrator.reporting.tables import gains_frame

    ledger, location = recorded_sweep(name, store)
    return gains_frame(results_of(ledger, location.store))


def study(
    name: str | Outcome, cell: str | None = None, *, store: str | Path | None = None
) -> Study:
    """Return the search of one cell as an Optuna study in memory: trial i is point i.

    A point is COMPLETE with the objective that the search maximizes, FAIL if a trial of it failed,
    RUNNING if it has started, else WAITING. The search itself does not read this copy.

    Args:
        name, store: as for `results`.
        cell: the value of `cell` in `results`. Default: the only cell that is searched.

    Raises:
        ValueError: the store has no such sweep, or `cell` names no searched cell of it.
    """
    from orchestrator.planning.search import study_of

    ledger, location = recorded_sweep(name, store)
    return study_of(ledger, location.store, cell)


def predictions(
    trial: str, *, store: str | Path | None = None, data_root: str | Path | None = None
) -> DataFrame:
    """Return one row per test image of a trial: `image`, its index in the dataset; `label` and
    `prediction`, class names; `text`, `auxiliary` and `fused`, predictions of the classifiers that
    the trial has, and `probability_text`, ... of these predictions; `path`, the file of the image,
    if the dataset has files and is on this machine.

    Args:
        trial: value of `key` in `results`, or its first digits.
        store, data_root: as for `plan`.

    Raises:
        ValueError: no trial or several trials match.
    """
    from pandas import DataFrame

    from air_core.bundle.checks import CLASSIFIERS
    from orchestrator.reporting.selection import named_trial
    from orchestrator.stages.dataset_text import image_files, tested_classes
    from orchestrator.store import open_store

    opened = open_store(_store(store))
    found = named_trial(trial, opened)
    arrays, classes = found.record.test_arrays(), tested_classes(found.spec, opened)
    named = {"label": arrays["labels"], "prediction": arrays["predictions"]}
    named |= {name: arrays[name] for name in CLASSIFIERS if name in arrays}
    columns = {name: [classes[index] for index in indices] for name, indices in named.items()}
    probabilities = {name: arrays[name] for name in arrays if name.startswith("probability_")}
    files = image_files((found.spec.test_dataset or found.spec.dataset).name, _folder(data_root))
    paths = {"path": [str(files[i]) for i in arrays["index"]]} if files else {}
    return DataFrame({"image": arrays["index"], **columns, **probabilities, **paths})


def report(name: str | Outcome, output: str | Path, *, store: str | Path | None = None) -> Path:
    """Write the report of a sweep, as one self-contained HTML file; return its path.

    Args:
        name, store: as for `results`.
        output: the file to write.

    Raises:
        ValueError: the store has no such sweep, or the folder of `output` does not exist.
    """
    from orchestrator.reporting import results_of
    from orchestrator.reporting.html_report import page

    ledger, location = recorded_sweep(name, store)
    file = Path(output)
    if file.is_dir() or not file.absolute().parent.is_dir():
        raise ValueError(f"{file}: give a file name in an existing folder, such as report.html")
    write_atomic(file, page(ledger, location, results_of(ledger, location.store)))
    return file


def sample(
    name: str | Outcome,
    count: int = 100,
    output: str | Path | None = None,
    *,
    store: str | Path | None = None,
    data_root: str | Path | None = None,
    report: Callable[[int, int], None] = lambda encoded, images: None,
) -> Sample:
    """Draw unlabelled images of a sweep to label: a contact sheet and a CSV file to fill in.

    They are spread over classes and confidence as zero-shot CLIP predicts them, whose features of
    the images are made if they are missing.

    Args:
        name: recorded sweep, or the file or bare name of one that has not run.
        count: number of images.
        output: beginning of the two file names. None: the name of the sweep.
        store, data_root: as for `plan`.
        report: called with the number of encoded images and of all images.

    Returns:
        Paths of the files, the number of images, and how they were drawn.

    Raises:
        ValueError: no such sweep, it has no unlabelled images, or a file exists already.
    """
    from orchestrator.planning import plan_of
    from orchestrator.planning.requests import location_for, request_again
    from orchestrator.reporting.sample import write_sample
    from orchestrator.spec import find_sweep

    try:
        request = request_again(location_named(name, store))
    except ValueError as unknown:
        try:
            request = load(find_sweep(str(name)))
        except ValueError:
            raise unknown from None
    location = location_for(request, _store(store), data_root)
    plan = plan_of(request.spec, location)  # labels may be new
    output = Path(location.name if output is None else output)
    return write_sample(plan, location, count, output, report)


def sweeps(*, store: str | Path | None = None) -> list[dict[str, Any]]:
    """Return state and best classifiers of each sweep of a store: the JSON of `airsweep list`."""
    from orchestrator.reporting.results import overviews
    from orchestrator.store import open_store

    return overviews(open_store(_store(store)))


# ---------------------------------------------------------------- bundles


def export(
    trial: str,
    output: str | Path,
    *,
    sweep: str | Outcome | None = None,
    only: Options = (),
    by: str | None = None,
    classifier: str | None = None,
    store: str | Path | None = None,
    data_root: str | Path | None = None,
    tracking_uri: str | None = None,
    force: bool = False,
    onnx: bool = False,
    register: str | None = None,
) -> Path:
    """Export the classifiers of a trial as a bundle, a folder that works without the store.

    Args:
        trial: trial key, slot, or `best`: row, run and classifier of a sweep with
            the highest score, by default without test labels.
        output: folder to create.
        sweep: sweep of the trial; `best` needs it.
        only: values of the grid to which `best` is limited, as for `load`.
        by: the score of `best`: validation_accuracy, experiments or test_accuracy. Default:
            validation_accuracy where there are validation images, else experiments: the order
            of methods in docs/experiments.md.
        classifier: text, auxiliary or fused, which the bundle uses if no other is named. Default:
            the one with the highest score.
        store, data_root: as for `plan`.
        tracking_uri: as for `run`.
        force: replace an existing bundle.
        onnx: also write `model.onnx`, which needs no torch.
        register: name of a model in MLflow, of which the ONNX file becomes a version.

    Returns:
        Path of the folder.

    Raises:
        ValueError: no trial or several trials match, the trial does not have the classifier, or the
            folder exists.
        PredictionsDifferError: a classifier does not reproduce the trial's predictions.
    """
    from orchestrator.planning import Resolver
    from orchestrator.planning.ledger import read_ledger
    from orchestrator.planning.requests import only_options
    from orchestrator.reporting import bundles, selection
    from orchestrator.store import open_store

    if register is not None and re.search(r"^\s*$|^\.|[/:']", register):
        raise ValueError(
            f"{register!r} cannot be the name of a model in MLflow; allowed: names without `/`, "
            "`:` and `'` that do not start with `.`"
        )
    limits = only_options(only)
    place = location_named(sweep, store) if sweep else None
    source = place.store if place else open_store(_store(store))
    data = _folder(data_root) or (place.data_root if place else None)
    if trial == selection.BEST:
        if place is None:
            raise ValueError("`best` needs the name of a sweep; give --sweep NAME")
        selected = selection.best_trial(read_ledger(place), place, limits, by, classifier)
    else:
        if limits or by:
            raise ValueError(
                "--only and --by are allowed with `best` only: they select rows, and you named a "
                "trial"
            )
        selected = replace(selection.named_trial(trial, source, place), classifier=classifier)
    resolver = Resolver(source.root / "digests.json", data)
    bundles.export(selected, source, resolver, Path(output), force, onnx or register is not None)
    if register is not None:
        from orchestrator.tracking.models import register_bundle

        register_bundle(Path(output), register, tracking_uri, source.root)
    return Path(output)


def load_bundle(folder: str | Path, **options: Any) -> Bundle:
    """Load a bundle, to classify images: `load_bundle("bundle").classify(["new/*.png"])`.

    Arguments and errors are those of `air_core.bundle.load_bundle`.
    """
    from air_core.bundle import load_bundle

    return load_bundle(folder, **options)


def classify(
    folder: str | Path, images: Sequence[str | Path], *, topk: int = 3, **options: Any
) -> DataFrame:
    """Classify images with a bundle: one row per image, with the columns of `airsweep classify -o`.

    Args:
        folder: the bundle.
        images: files, folders (recursively) and patterns.
        topk: number of classes per image, at most all.
        options: of `load_bundle`.

    Raises:
        ValueError: a path does not exist or contains no image.
    """
    from pandas import DataFrame

    from air_core.bundle.files import image_files
    from orchestrator.reporting.classified import classified_rows

    bundle = load_bundle(folder, **options)
    return DataFrame(classified_rows(bundle, image_files(images), topk))


class Classifier:
    """Classifies batches of image files with a bundle, on the workers of Ray Data:

        ray.data.from_items([{"path": path} for path in paths]).map_batches(
            airsweep.Classifier, fn_constructor_args=(bundle,), concurrency=4
        )

    Args:
        folder: the bundle.
        topk: number of classes per image, at most all.
        options: of `load_bundle`.
    """

    def __init__(self, folder: str | Path, topk: int = 1, **options: Any) -> None:
        self._bundle, self._topk = load_bundle(folder, **options), topk

    def __call__(self, batch: Mapping[str, Iterable[str]]) -> pyarrow.Table:
        """Classify the files of the column `path`.

        Returns:
            Table with the columns `path`, `class` and `probability`, then `class_2` and so on, and
            `error`, the reason why a file cannot be read.
        """
        from orchestrator.reporting.classified import arrow_table

        return arrow_table([*self._bundle.rows([*map(Path, batch["path"])], self._topk)])


def recorded_sweep(
    name: str | Outcome, store: str | Path | None, data_root: str | Path | None = None
) -> tuple[Ledger, SweepLocation]:
    """Return the ledger of a recorded sweep, as it was last run, and its location."""
    from orchestrator.planning.ledger import read_ledger

    location = location_named(name, store)
    data = _folder(data_root) or location.data_root
    return read_ledger(location), replace(location, data_root=data)


def location_named(name: str | Outcome, store: str | Path | None) -> SweepLocation:
    """Return the location of a recorded sweep."""
    from orchestrator.planning import requests

    if isinstance(name, Outcome):
        return name.location
    return requests.location_named(name, _store(store))


# ---------------------------------------------------------------- sweep files


def schema() -> dict[str, Any]:
    """Return the JSON schema of sweep files."""
    from orchestrator.spec import sweep_schema

    return sweep_schema()


def init(
    name: str,
    images: str | Path | None = None,
    folder: str | Path = ".",
    *,
    classes: str | None = None,
) -> Path:
    """Write a commented sweep file, NAME.yaml, for your own images or the digits dataset.

    Args:
        name: name of the new sweep.
        images: folder of your images; without `classes`, with one folder per class. None: the
            digits dataset.
        folder: folder of the new file.
        classes: of unlabelled images: names with commas between them, or a file with one per line.

    Returns:
        Path of the file.

    Raises:
        ValueError: the file exists, or `images` is not a dataset.
    """
    from orchestrator.planning.resources import this_machine
    from orchestrator.spec.starter import write_starter

    gpus = this_machine()["GPU"] > 0
    return write_starter(name, images, Path(folder), classes, gpus).file


def _store(store: str | Path | None) -> str | Path:
    return os.environ.get("AIRSWEEP_STORE") or STORE if store is None else store


def _folder(data_root: str | Path | None) -> Path | None:
    named = data_root or os.environ.get("AIRSWEEP_DATA")
    return Path(named) if named else None
