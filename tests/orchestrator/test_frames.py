"""Results as DataFrames, from small real trials."""

from __future__ import annotations

import math

import pytest

from orchestrator.frames import ALWAYS, CURVES, curves_frame, rows_frame, trials_frame
from orchestrator.ledger import Ledger
from orchestrator.plan import plan_sweep
from orchestrator.report import rows
from orchestrator.results import entries_of
from orchestrator.sweep import Seeds, SweepSpec
from orchestrator.trial import run_trial
from tests.orchestrator.test_results import (  # noqa: F401  (fixtures)
    arrays,
    features,
    ledger,
    store,
)

SWEEP = SweepSpec(
    name="x",
    grid={"method": ("zero_shot", "cpl"), "prompt.length": (2, 4)},
    fixed={"train.steps": 2, "iterations": 2},
    seeds=Seeds(values=((1,), (2,))),
)


@pytest.fixture
def plan(store, resolver, ledger):  # noqa: F811
    """Of six trials three have run, one of them in another sweep, and one has failed."""
    plan = plan_sweep(SWEEP, store, resolver, ledger)
    slots = plan.slots
    for slot in (slots[0], slots[2], slots[3]):
        run_trial(slot.spec, store)
    ledger.append("sweep_started", total=plan.total)
    for slot in (slots[0], slots[2]):
        ledger.append("trial_done", slot=slot.id, key=slot.key.digest, cell=slot.cell.id)
    why = {"failure_class": "oom", "message": "out of memory"}
    ledger.append("trial_failed", slot=slots[4].id, **why)
    ledger.append("trials_started", slots=[slots[5].id])  # by a driver that is gone
    return plan


def test_a_line_for_each_trial_with_what_varies_its_state_and_its_metrics(
    plan,
    store,  # noqa: F811
    ledger,  # noqa: F811
):
    frame = trials_frame(plan, store, ledger)
    states = ["done", "reused", "done", "reused", "failed", "waiting"]
    assert frame["state"].tolist() == states
    assert frame["trial"].tolist() == [slot.id for slot in plan.slots]
    assert frame["method"].tolist() == ["zero_shot"] * 2 + ["cpl"] * 4
    assert frame["seed"].tolist() == [1, 2] * 3
    assert frame["prompt.length"].tolist()[2:] == [2, 2, 4, 4]
    assert math.isnan(frame["prompt.length"][0])  # zero-shot learns no prompt
    assert frame["failure"].tolist() == ["", "", "", "", "oom", ""]
    assert frame["message"][4] == "out of memory"
    for slot, accuracy in zip(plan.slots[:4], frame["test/accuracy"], strict=False):
        assert accuracy == run_trial(slot.spec, store).metrics["test/accuracy"]
    assert frame["test/accuracy"].isna().tolist() == [False] * 4 + [True] * 2


def test_curves_are_long_and_go_with_the_trials(plan, store):  # noqa: F811
    frame = curves_frame(plan, store)
    assert tuple(frame.columns) == CURVES
    found = frame.groupby(["trial", "metric"])["value"].apply(list)
    for slot in plan.slots[2:4]:
        for metric, values in run_trial(slot.spec, store).curves.items():
            assert found[slot.id, metric] == values
    assert set(frame["trial"]) == {slot.id for slot in plan.slots[2:4]}  # zero-shot has none
    assert sorted(set(frame["iteration"])) == [0, 1]


def test_rows_have_settings_as_columns(plan, store):  # noqa: F811
    found = rows(entries_of(plan, store), None)
    frame = rows_frame(found)
    assert frame["method"].tolist() == ["zero_shot", "cpl"]
    assert frame["prompt.length"].tolist()[1] == 2
    assert frame["mean"].tolist() == [row.mean for row in found]
    assert "settings" not in frame.columns


def test_frames_of_a_sweep_without_a_trial_have_their_columns(
    store,  # noqa: F811
    resolver,
    tmp_path,
):
    empty = Ledger(tmp_path / "empty")
    plan = plan_sweep(SWEEP, store, resolver, empty)
    assert trials_frame(plan, store, empty)["state"].tolist() == ["waiting"] * 6
    assert tuple(curves_frame(plan, store).columns) == CURVES
    assert set(ALWAYS) <= set(rows_frame([]).columns)
