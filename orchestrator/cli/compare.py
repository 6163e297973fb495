"""The command that holds results beside others."""

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
    NameArgument,
    Outcome,
    StoreOption,
    fail,
    no_trial,
    results_of,
)
from orchestrator.formatting import show

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from orchestrator.reporting.published import Judgement

app = typer.Typer()


@app.command()
def compare(
    name: NameArgument,
    paper: Annotated[
        str | None,
        typer.Option(
            metavar="NAME|FILE", help="published numbers: air-cvpr2025, grip, cpl, or a file"
        ),
    ] = None,
    against: Annotated[
        str | None,
        typer.Option(metavar="OTHER", help="another recorded sweep of the store"),
    ] = None,
    fail_on: Annotated[
        str | None,
        typer.Option(
            metavar="regress", help="exit code 5 where a comparable, verified number is missed"
        ),
    ] = None,
    store: StoreOption = STORE,
    data_root: DataOption = None,
    as_json: JsonOption = False,
) -> None:
    """Results beside published numbers or another sweep.

    Reproduced, within interval, lower, higher, or not comparable and why.

    airsweep compare quickstart --paper grip

    airsweep compare quickstart --against old/quickstart --fail-on regress
    """
    from orchestrator.errors import DONE, GATE
    from orchestrator.reporting.published import beside_paper, beside_sweep, find_paper

    if (paper is None) == (against is None):
        fail("give one of --paper NAME and --against OTHER")
    if fail_on not in (None, "regress"):
        fail(f"--fail-on {fail_on!r} is not known; allowed: regress")
    if against is not None and against.endswith(".json"):
        fail(
            f"--against {against}: a printed table can no longer be compared; give a sweep of this "
            "store, or its numbers as --paper FILE (docs/results_guide.md)"
        )
    published = None if paper is None else find_paper(paper)
    ours = _finished(name, store, data_root)
    if published is not None:
        found = beside_paper(ours.results, published)
    else:
        assert against is not None
        theirs = _finished(against, store, data_root)
        found = beside_sweep(ours.results, theirs.results, against)
    done = {"done": len(ours.results.entries), "total": ours.plan.total}
    if as_json:
        show(json.dumps({"sweep": name, "trials": done, **found.as_json()}, indent=1))
    else:
        show("\n".join(_screen(name, ours, found)))
    sys.exit(GATE if fail_on and found.regressed else DONE)


def _finished(name: str, store: str, data_root: Path | None) -> Outcome:
    """A sweep with a result at least; half-finished ones are said to be so."""
    found = results_of(name, store, data_root)
    if not found.results.rows:
        raise ValueError(no_trial(name, found))
    done, total = len(found.results.entries), found.plan.total
    if done < total:
        words = f"note: {done} of {total} trials of {name} are done; compared is what is there"
        show(words, file=sys.stderr)
    return found


WIDTH = 80


def _screen(name: str, ours: Outcome, found: Judgement) -> Iterator[str]:
    from orchestrator.reporting.published import lines

    yield f"{name} beside {found.what}: test accuracy in %, 95 % intervals"
    where = [f"{d}, {p}/{m}; " for d, p, m in ours.results.worlds]
    done = f"{len(ours.results.entries)} of {ours.plan.total} trials"
    yield (where[0] if len(where) == 1 else "") + done
    yield ""
    counts = ", ".join(f"{count} {verdict}" for verdict, count in found.counts().items())
    below = ["", f"{counts}." if counts else "nothing to compare."]
    if found.missing:
        shown = "; ".join(found.missing[:3]) + ("; ..." if len(found.missing) > 3 else "")
        below.append(f"Not here, but there: {len(found.missing)} ({shown}).")
    for line in (*lines(found, WIDTH), *below, f"Source: {found.source}."):
        yield textwrap.fill(line, WIDTH, subsequent_indent="    ", break_on_hyphens=False)
