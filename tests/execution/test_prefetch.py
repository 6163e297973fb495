"""Inputs of later cells are made in an order that keeps all workers busy."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from air_core.specs import Ref
from orchestrator.execution._prefetch import missing_without_images, waves
from orchestrator.planning import Requirement, requirements_of
from orchestrator.planning.plan import build_level, independent_of
from orchestrator.stages import TrialSpec
from orchestrator.store import ArtifactStore


def test_a_lora_can_be_made_early_and_images_cannot(trial, tmp_path):
    store = ArtifactStore(tmp_path)

    def stages(spec: TrialSpec) -> list[str]:
        requirements = requirements_of([spec])
        assert "images" in {requirement.stage for requirement in requirements}
        missing = missing_without_images(requirements, store)
        return [requirement.stage for requirement in sorted(missing, key=level)]

    def level(requirement: Requirement) -> int:
        return build_level(requirement.spec)

    spec = trial("air")
    many = replace(spec, dataset=Ref(name="many", digest="many", images=10_000))
    assert stages(many) == ["encoded", "features", "labels", "lora"]
    assert stages(spec) == ["features", "labels", "lora"]
    (features,) = [
        requirement.spec
        for requirement in requirements_of([trial("fpl")])
        if requirement.stage == "features"
    ]
    store.get_or_build(features, lambda folder: {})
    assert "features" not in [
        requirement.stage
        for requirement in missing_without_images(requirements_of([trial("air")]), store)
    ]


def test_as_many_loras_are_trained_together_as_there_are_workers(trial, tmp_path):
    store = ArtifactStore(tmp_path)
    groups = [requirements_of([trial("air", split_seed=seed)]) for seed in range(5)]

    def loras(workers: int) -> list[int]:
        made: set[Any] = set()
        counts = []
        for _, wave in waves(groups, store, lambda: workers):
            new = {requirement.key for requirement in wave if requirement.stage == "lora"} - made
            counts += [len(new)] if new else []
            made |= new
            for requirement in wave:
                if requirement.stage != "images":
                    store.get_or_build(requirement.spec, lambda folder: {})
        return counts

    assert loras(2) == [2, 2, 1]


def test_groups_come_in_order_and_those_that_lack_images_alone_are_drawn_together(trial, tmp_path):
    store = ArtifactStore(tmp_path)
    fpl = requirements_of([trial("fpl")])
    air = [requirements_of([trial("air", split_seed=seed)]) for seed in (0, 1)]
    all_waves = waves([fpl, *air], store, lambda: 1)
    assert next(all_waves) == (0, fpl)
    assert next(all_waves) == (1, fpl)
    done, loras = next(all_waves)
    assert (done, [each.stage for each in loras].count("lora")) == (1, 1)
    *images, without_lora = air[0]  # no trial reads images without LoRA
    assert next(all_waves) == (2, [*images, without_lora])
    for requirements in air:
        for requirement in missing_without_images(requirements, store):
            store.get_or_build(requirement.spec, lambda folder: {})
    *later_images, same = air[1]
    assert same == without_lora
    ((done, wave),) = waves(air, store, lambda: 1)
    assert done == 2
    assert wave == [*dict.fromkeys([*images, *later_images]), without_lora]


def test_a_failed_artifact_stops_only_artifacts_that_contain_it(trial):
    of_split, others = (requirements_of([trial("air", split_seed=seed)]) for seed in (0, 1))
    (lora,) = [requirement for requirement in of_split if requirement.stage == "lora"]
    left = independent_of([lora], [*of_split, *others])
    assert [each for each in others if each not in left] == []
    assert {each.stage for each in of_split if each not in left} == {"lora", "images"}
    # Images without LoRA are drawn only to compare them with those of the LoRA.
    assert independent_of([of_split[0]], of_split) == []
    assert independent_of([of_split[-1]], of_split) == of_split[:-1]
