"""Settings as a tracker's children: what the runs of one point have in common.

A point is one setting of a cell over its seeds and splits, a row of the table. Its numbers are
those of the table: mean, deviation and interval of the headline, and means of everything else.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from statistics import fmean

from air_core.normal import normalised
from orchestrator.dispatch import Outcome
from orchestrator.keys import canonical_json
from orchestrator.lineage import UNKNOWN
from orchestrator.plan import Slot
from orchestrator.report import percent, rows, shown
from orchestrator.results import entry_of, flat_of, settings_of
from orchestrator.sweep import SweepSpec
from orchestrator.tracking import Numbers, PointRun, link
from orchestrator.trial import TrialRecord

# Raised when the same runs give other numbers, so that trackers are told anew.
RECIPE = 1

Done = tuple[Slot, TrialRecord]


def called(dataset: str) -> str:
    """A dataset in the name of a run: of a folder its last part.

    >>> called("digits"), called("folder:/data/my_images")
    ('digits', 'my_images')
    """
    return Path(dataset.removeprefix("folder:")).name


def name_of_world(slot: Slot) -> str:
    """How the names of its runs begin."""
    spec = normalised(slot.spec)
    return "-".join(
        [called(slot.spec.dataset.name), spec.paradigm, spec.modality, slot.cell.method]
    )


def point_id(slot: Slot) -> str:
    """A setting within its sweep, as trials name it."""
    return f"{slot.cell.id}/{slot.point}"


def by_point(done: Iterable[Done]) -> dict[str, list[Done]]:
    found: dict[str, list[Done]] = {}
    for slot, record in done:
        found.setdefault(point_id(slot), []).append((slot, record))
    return found


class Points:
    """The points of a sweep that runs, each whole when the last of its trials has ended."""

    def __init__(self, sweep: SweepSpec) -> None:
        self._sweep = sweep
        self._ended: dict[str, dict[str, Outcome]] = {}

    def ended(self, outcome: Outcome) -> PointRun | None:
        """The point of a trial that has ended; None: others have not, or it has no result.

        What is left of points whose trials never ended is told with the end of the sweep.
        """
        of_point = self._ended.setdefault(point_id(outcome.slot), {})
        of_point[outcome.slot.id] = outcome
        whole = len(of_point) == len(self._sweep.seeds.values)
        if not whole or any(one.state == "pruned" for one in of_point.values()):
            return None
        done = [(one.slot, one.record) for one in of_point.values() if one.record is not None]
        return point_run(self._sweep, done) if done else None


def point_runs(sweep: SweepSpec, done: Iterable[Done]) -> list[PointRun]:
    """All settings of which a trial is finished."""
    return [point_run(sweep, group) for group in by_point(done).values()]


def point_run(sweep: SweepSpec, done: Sequence[Done]) -> PointRun:
    """One setting as a child.

    Args:
        done: its finished trials, at least one.
    """
    slot = done[0][0]
    done = sorted(done, key=lambda one: tuple(one[0].seeds.values()))
    times = [times_of(record) for _, record in done]
    spec = normalised(slot.spec)
    varied = varied_keys(sweep) - {*sweep.seeds.vary}
    values = {**settings_of(slot), **flat_of(slot), "method": slot.cell.method}
    params = {key: str(value) for key, value in values.items() if key in varied}
    settings = {key: value for key, value in settings_of(slot).items() if key in varied}
    named = [f"{key}={shown(value)}" for key, value in settings.items()]
    return PointRun(
        point=point_id(slot),
        name=" ".join([name_of_world(slot), *named]),
        content=_content(done, params),
        tags={
            "air.dataset": slot.spec.dataset.name,
            "air.paradigm": spec.paradigm,
            "air.modality": spec.modality,
            "air.method": slot.cell.method,
            "air.cell": slot.cell.id,
            "air.seed": _listed(one.seeds.get("seed", one.spec.seed) for one, _ in done),
            "air.split_seed": _listed(one.spec.split_seed for one, _ in done),
            "air.runs": f"{len(done)} of {len(sweep.seeds.values)}",
            "air.user": ", ".join(sorted(_users(done))),
        },
        params=params,
        note=_note(done, len(sweep.seeds.values)),
        numbers=_numbers(done),
        started=min(started for started, _ in times),
        ended=max(ended for _, ended in times),
    )


def _users(done: Sequence[Done]) -> set[str]:
    """Who computed its trials, where that is known."""
    return {str(record.made.get("user", UNKNOWN)) for _, record in done} - {UNKNOWN}


def _listed(values: Iterable[int]) -> str:
    return ", ".join(map(str, dict.fromkeys(values)))


def times_of(record: TrialRecord) -> tuple[int, int]:
    """When a trial began and ended, in ms since the epoch."""
    started = int(record.started * 1000)
    return started, started + int(record.seconds * 1000)


def varied_keys(sweep: SweepSpec) -> frozenset[str]:
    """The settings that a sweep varies: the columns that tell its runs apart."""
    return frozenset({*sweep.grid, *(one.key for one in sweep.space), *sweep.seeds.vary})


def _content(done: Sequence[Done], params: dict[str, str]) -> str:
    """Digest of what the numbers of a setting come from."""
    runs = sorted(
        (slot.id, slot.key.digest, record.started, record.seconds) for slot, record in done
    )
    words = canonical_json({"recipe": RECIPE, "params": params, "runs": [list(r) for r in runs]})
    return hashlib.blake2b(words.encode(), digest_size=10).hexdigest()


def _numbers(done: Sequence[Done]) -> Callable[[], Numbers]:
    def numbers() -> Numbers:
        [row] = rows([entry_of(slot, record) for slot, record in done], None)
        distinct = list({slot.key.digest: record for slot, record in done}.values())
        metrics = _means([record.metrics for record in distinct])
        curves = _mean_curves([record.curves for record in distinct])
        headline = f"test/{row.metric}"
        metrics |= {headline: row.mean, f"{headline}_low": row.low, f"{headline}_high": row.high}
        if row.std is not None:
            metrics[f"{headline}_std"] = row.std
        metrics["n"] = float(row.n)
        for name, curve in curves.items():  # a curve ends at its number, to the last bit
            if name in metrics:
                curve[-1] = metrics[name]
        return Numbers(metrics=metrics, curves=curves, interval=row.interval)

    return numbers


def _means(runs: Sequence[dict[str, float]]) -> dict[str, float]:
    """Means over the runs of what all of them have."""
    common = [name for name in runs[0] if all(name in run for run in runs)]
    return {name: fmean(run[name] for run in runs) for name in common}


def _mean_curves(runs: Sequence[dict[str, list[float]]]) -> dict[str, list[float]]:
    common = [name for name, curve in runs[0].items() if curve]
    common = [n for n in common if len({len(run.get(n, ())) for run in runs}) == 1]
    return {n: [fmean(at) for at in zip(*(run[n] for run in runs), strict=True)] for n in common}


def _note(done: Sequence[Done], planned: int) -> str:
    """The runs behind the numbers, each with a link to its trial."""
    seeds = list(done[0][0].seeds)
    header = [*(name.replace("_", " ") for name in seeds), "test", "pseudo-labels right", "seconds"]
    lines = [header, ["---:"] * len(header)]
    for slot, record in done:
        first, *more = (str(slot.seeds[name]) for name in seeds)
        right = record.metrics.get("pseudo/accuracy")
        lines.append(
            [
                link(first, "trial", slot.id),
                *more,
                percent(record.headline),
                percent(right),
                f"{record.seconds:.1f}",
            ]
        )
    table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    computed = len({slot.key.digest for slot, _ in done})
    about = f"Mean over {len(done)} of {planned} runs, in %"
    if computed < len(done):
        about += f"; {computed} computed, since nothing in the others depends on their seed"
    return f"{about}.\n\n{table}"
