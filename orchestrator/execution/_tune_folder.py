"""The Tune folder of a sweep: its trials as an experiment that `ray.tune.ExperimentAnalysis` reads.

Tune's own files are temporary: they describe one call of `fit`, their trials are jobs of several
trials of the sweep, and they contain a pickled searcher. This folder is written from the store and
the event log at the end of a run, so it has the trials of all runs. airsweep never reads it. It has
no `tuner.pkl`, so `Tuner.can_restore` is False: the sweep resumes by running it again.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import zip_longest
from typing import Any

from ray.train._internal.storage import StorageContext
from ray.tune.execution.placement_groups import PlacementGroupFactory
from ray.tune.experiment import Trial

from orchestrator.planning import Slot, plan_of
from orchestrator.planning.plan import RESULT_STATES
from orchestrator.reporting import plan_status
from orchestrator.reporting.results import ENDED, all_settings, finished_records
from orchestrator.spec import SweepSpec
from orchestrator.store import SweepLocation, TrialRecord

FOLDER = "tune"
STATE = "experiment_state-airsweep.json"  # the part after `-` is a time in Tune's own files


def write_tune_folder(sweep: SweepSpec, location: SweepLocation) -> None:
    """Write the trials of a sweep that have ended: settings, seeds, objectives and test metrics."""
    experiment = StorageContext(str(location.folder.absolute()), FOLDER)
    plan = plan_of(sweep, replace(location, recorded=True))
    status = plan_status(plan, location, alive=True)
    records = {slot.id: record for slot, record in finished_records(plan, location.store)}
    trials = []
    for slot in plan.slots:
        state = status.last.get(slot.id)
        if state not in ENDED:
            continue
        facts = {
            "trial_id": slot.id.replace("/", "-"),  # the name of a folder
            "cell": slot.cell.id,
            "point": slot.point,
            "seed": slot.spec.seed,
            "split_seed": slot.spec.split_seed,
            "state": state,
            "trial_key": slot.key.digest,
        }
        if state == "failed":
            event = status.failures[slot.id]
            facts |= {name: event[name] for name in ("failure_class", "message")}
        reported: list[dict[str, Any]] = [{}]
        if state in RESULT_STATES and slot.id in records:
            reported = _finished(records[slot.id])
        rows = [{"training_iteration": i, **row, **facts} for i, row in enumerate(reported, 1)]
        name = f"{FOLDER}/{facts['trial_id']}/result.json"
        text = "".join(f"{json.dumps(row)}\n" for row in rows)
        if not (file := location.folder / name).exists() or file.read_text() != text:
            location.write(name, text)
        trials.append(_trial_state(slot, rows, experiment))
    location.write(f"{FOLDER}/{STATE}", json.dumps({"trial_data": trials}))


def _finished(record: TrialRecord) -> list[dict[str, Any]]:
    """A row per iteration, the last with the result."""
    values = zip_longest(*record.curves.values())
    *earlier, last = [dict(zip(record.curves, row, strict=True)) for row in values] or [{}]
    end = {"time_total_s": record.seconds, "timestamp": record.started + record.seconds}
    return [*earlier, last | record.metrics | _named(record.objectives) | end]


def _named(objectives: Mapping[str, float]) -> dict[str, float]:
    return {f"objective/{name}": value for name, value in objectives.items()}


def _trial_state(
    slot: Slot, rows: Sequence[Mapping[str, Any]], experiment: StorageContext
) -> tuple[str, str]:
    """A trial in the format of Tune's experiment state."""
    name = rows[0]["trial_id"]
    trial = Trial(
        slot.cell.method,
        stub=True,  # no code belongs to it
        trial_id=name,
        config={"method": slot.cell.method, **all_settings(slot)},
        storage=experiment,
        _setup_default_resource=False,
    )
    trial.placement_group_factory = PlacementGroupFactory([{"CPU": 1}])  # Tune requires one
    trial.storage.trial_dir_name = name
    trial.status = Trial.ERROR if rows[0]["state"] == "failed" else Trial.TERMINATED
    for row in rows:
        trial.update_last_result(dict(row))
    state: tuple[str, str] = trial.get_json_state()
    return state
