"""The command that compares results with published numbers or with another sweep."""

from __future__ import annotations

import json
import sys
import textwrap
from typing import TYPE_CHECKING, Annotated

import typer

from orchestrator.cli.common import (
    STORE,
    DataOption,
    JsonOption,
    StoreOption,
    SweepResults,
    fail,
    no_results_message,
    read_results,
)
from orchestrator.errors import DONE, GATE
from orchestrator.formatting import aligned, show

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from orchestrator.reporting.published import ReferenceComparison

app = typer.Typer()


@app.command()
def compare(
    name: Annotated[
        str | None,
        typer.Argument(
            metavar="NAME",
            help="Recorded sweep: NAME, PROJECT/NAME or its sweep file. Without it, papers and "
            "recorded sweeps are listed.",
            show_default=False,
        ),
    ] = None,
    paper: Annotated[
        str | None,
        typer.Option(
            metavar="NAME|FILE", help="Published numbers: air-cvpr2025, grip, cpl, or a file."
        ),
    ] = None,
    against: Annotated[
        str | None,
        typer.Option(metavar="OTHER", help="Another recorded sweep of the same store."),
    ] = None,
    metric: Annotated[
        str | None,
        typer.Option(
            metavar="CLASSIFIER",
            help="Accuracy of text, auxiliary or fused classifier. Default: the tested one.",
        ),
    ] = None,
    fail_on: Annotated[
        str | None,
        typer.Option(
            metavar="regress",
            help="Exit with 5 if a result is lower than a comparable, verified number.",
        ),
    ] = None,
    store: StoreOption = STORE,
    data_root: DataOption = None,
    as_json: JsonOption = False,
) -> None:
    """Compare the results with published numbers or with another sweep.

    The verdict on each result is: reproduced, within the interval, lower, higher, or not
    comparable, with the reason.

    airsweep compare quickstart --paper grip

    airsweep compare quickstart --against old/quickstart --fail-on regress
    """
    from air_core.bundle.checks import CLASSIFIERS
    from orchestrator.reporting.published import compare_with_paper, compare_with_sweep, find_paper

    if name is None:
        show("\n".join(_choices(store)))
        return
    if (paper is None) == (against is None):
        fail("give either --paper NAME or --against OTHER; `airsweep compare` lists both")
    if fail_on not in (None, "regress"):
        fail(f"unknown --fail-on {fail_on!r}; allowed: regress")
    if metric not in (None, *CLASSIFIERS):
        fail(f"unknown --metric {metric!r}; allowed: {', '.join(CLASSIFIERS)}")
    published = None if paper is None else find_paper(paper)
    ours = _read_finished(name, store, data_root, metric)
    if published is not None:
        comparison = compare_with_paper(ours.results, published)
    else:
        assert against is not None
        theirs = _read_finished(against, store, data_root, metric)
        comparison = compare_with_sweep(ours.results, theirs.results, against)
    trials = {"done": len(ours.results.trials), "total": ours.plan.total}
    if as_json:
        show(json.dumps({"sweep": name, "trials": trials, **comparison.as_json()}, indent=1))
    else:
        show("\n".join(_screen(name, ours, comparison)))
    sys.exit(GATE if fail_on and comparison.has_regression else DONE)


def _choices(store: str) -> Iterator[str]:
    """The papers with published numbers, and the sweeps of a store."""
    from orchestrator.reporting.published import find_paper, paper_names
    from orchestrator.store import open_store

    yield "papers (--paper):"
    papers = [(name, find_paper(name).title or "") for name in paper_names()]
    yield from (f"  {line}" for line in aligned(papers))
    yield f"sweeps of {store} (NAME, --against):"
    yield from (f"  {'/'.join(pair)}" for pair in open_store(store).backend.sweeps())


def _read_finished(
    name: str, store: str, data_root: Path | None, metric: str | None
) -> SweepResults:
    """Read a sweep that has at least one result; note on stderr if trials are missing."""
    recorded = read_results(name, store, data_root, metric)
    if not recorded.results.rows:
        raise ValueError(no_results_message(name, recorded))
    done, total = len(recorded.results.trials), recorded.plan.total
    if done < total:
        note = f"note: only {done} of {total} trials of {name} have a result; comparing those"
        show(note, file=sys.stderr)
    return recorded


WIDTH = 80


def _screen(name: str, ours: SweepResults, comparison: ReferenceComparison) -> Iterator[str]:
    from orchestrator.reporting.published import screen

    yield f"{name} compared with {comparison.reference}: test accuracy in %, 95 % intervals"
    settings = [f"{dataset}, {p}/{m}; " for dataset, p, m in ours.results.tasks]
    trials = f"{len(ours.results.trials)} of {ours.plan.total} trials"
    yield (settings[0] if len(settings) == 1 else "") + trials
    yield ""
    counts = ", ".join(f"{count} {verdict}" for verdict, count in comparison.counts().items())
    below = ["", f"{counts}." if counts else "nothing to compare."]
    if missing := comparison.missing:
        shown = "; ".join(missing[:3]) + ("; ..." if len(missing) > 3 else "")
        below.append(f"Missing from {name}: {len(missing)} ({shown}).")
    below += [f"Lower, higher: {comparison.rule}.", f"Source: {comparison.source}."]
    for line in (*screen(comparison, WIDTH), *below):
        yield textwrap.fill(line, WIDTH, subsequent_indent="    ", break_on_hyphens=False)
