"""Registries of components: contracts, keys and the command that lists them."""

from __future__ import annotations

from dataclasses import replace

import pytest

from air_core.settings import Ref
from air_core.settings.components import DATASETS, LOSSES, REGISTRIES, STRATEGIES
from air_core.settings.flat import trial_keys
from air_core.settings.normal import normalised, used_components
from orchestrator.keys import artifact_key
from orchestrator.planning.contracts import check_contract
from orchestrator.stages import TrialSpec, trial_of

COMPONENTS = [(registry, name) for registry in REGISTRIES.values() for name in registry]


@pytest.mark.parametrize(
    ("registry", "name"), COMPONENTS, ids=[one.part(name) for one, name in COMPONENTS]
)
def test_a_component_keeps_its_contract_and_reads_settings_that_exist(registry, name):
    if registry is DATASETS:  # most need their files
        assert registry[name].target == f"air_core.datasets.{name}:{name}"  # see `reader_of`
    elif registry.is_open:
        check_contract(registry.key, name)
    assert registry[name].summary
    assert {f"{registry.group}.{key}" for key in registry[name].reads} <= trial_keys().keys()
    assert (registry.key in trial_keys()) == registry.of_trials


def test_components_are_added_in_plugins_alone():
    with pytest.raises(TypeError, match=r"cannot be added here: .* name the file under `plugins:`"):
        STRATEGIES.add("mine", summary="mine")(len)


def trial(**flat: object) -> TrialSpec:
    refs = {name: Ref(name=name, digest=name) for name in ("dataset", "backbone", "generator")}
    settings = {name.replace("__", "."): value for name, value in flat.items()}
    return trial_of(settings, refs, ("one", "two"))


USES_NO_STRATEGY = [
    trial(iterations=0),
    trial(paradigm="ssl", supervision="labelled"),
    trial(pseudo_labels__kind="top_k"),
    trial(modality="visual", iterations=0, pseudo_labels__kind="threshold"),
]


@pytest.mark.parametrize("part", ["pseudo_labels.kind:threshold", "modality:visual"])
def test_an_edit_of_a_component_changes_the_keys_of_its_trials_alone(part):
    edited = ((part, "123456789abc"),)
    uses = [
        trial(modality="visual", pseudo_labels__kind="threshold"),
        trial(modality="visual", pseudo_labels__kind="threshold", iterations=1),
    ]
    for spec in [*uses, *USES_NO_STRATEGY]:
        changed = artifact_key(replace(spec, versions=edited)) != artifact_key(spec)
        assert changed == (spec in uses)


def test_a_strategy_that_names_no_loss_is_trained_with_the_default():
    """An edit of a loss that a trial does not use changes no key."""
    spec = trial(pseudo_labels__kind="top_k", pseudo_labels__loss="ce")
    losses = {loss for registry, loss in used_components(normalised(spec)) if registry is LOSSES}
    assert losses == {"cc"}


def test_the_command_lists_components_with_what_they_read(command):
    code, out, _ = command("components")
    assert code == 0
    assert [line for line in out.splitlines() if not line.startswith(" ")] == [
        key for key, registry in REGISTRIES.items() if registry
    ]
    code, out, _ = command("components", "threshold")
    assert "in air_core.pseudo_labels:threshold" in out
    assert "pseudo_labels.threshold: 0.7  (a number >= 0 and <= 1)" in out
    code, _, err = command("components", "tresh")
    assert code == 2
    assert "did you mean threshold? allowed: " in err
