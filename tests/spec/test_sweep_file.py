import os
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from air_core.datasets import DATASETS
from air_core.methods import EMBEDDED, METHODS
from air_core.specs import Ref
from air_core.specs.flat import from_flat, to_flat, trial_keys
from orchestrator.keys import artifact_key
from orchestrator.spec import (
    Dimension,
    SpecError,
    cells_of,
    find_sweep,
    load_sweep,
    notes_of,
)
from orchestrator.spec._trial_values import value_type
from orchestrator.spec.sweep import Budget, Seeds, smoke_variant

REFS = {key: Ref(name=name, digest=key) for key, name in EMBEDDED.items()}

FULL = """\
# Does the share matter?
#
# Expect: a hump.

version: 1
name: full
grid:
  backbone: [tiny, ViT-B-32/openai]
  method: [cpl, air]
exclude: [{backbone: ViT-B-32/openai, method: cpl}]
fixed: {lora.learning_rate: 1e-4}
search:
  sampler: random
  points: 12
  storage: postgresql://ada@db.example:5432/studies?sslmode=require
  space:
    fusion_weight: {min: 0, max: 1, when: "images_per_class > 0"}
    images_per_class: {values: [0, 25, 50]}
seeds: {values: [1, [2, 100]], vary: [seed, split_seed]}
budget: {gpu_hours: 40, wall: 12h}
resources: {trial: {gpu: 0.25}, generator: {gpu: 1, actors: 4}}
project: default
tracking: {uri: "sqlite:///mlflow.db"}
data_root: /data
"""
HEAD = "version: 1\nname: x\n"  # two lines, so that what a test adds starts on line 3
AIR = HEAD + "fixed: {method: air}\n"
GRID = HEAD + "grid:\n  method: [cpl, air]\n"
PRUNING = HEAD + (
    "fixed: {method: air, iterations: 10}\nsearch:\n  points: 3\n"
    "  space: {fusion_weight: {min: 0, max: 1}}\n  pruning: "
)
SEARCH = AIR + "search:\n  points: 3\n  space:\n"


def load(folder, text, **options):
    path = folder / "x.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return load_sweep(path, **options)


def error_of(folder, text, **options):
    with pytest.raises(SpecError) as caught:
        load(folder, text, **options)
    message = str(caught.value)
    assert "\n" not in message
    return message.removeprefix(f"{folder}/x.yaml:").strip()


# ---------------------------------------------------------------- content of a file


def test_every_part_of_a_file_is_read(tmp_path):
    spec = load(tmp_path, FULL)
    assert spec.question == "Does the share matter?\n\nExpect: a hump."
    assert spec.text == FULL
    assert spec.source == str(tmp_path / "x.yaml")
    assert spec.grid == {"backbone": ("tiny", "ViT-B-32/openai"), "method": ("cpl", "air")}
    assert spec.fixed == {"lora.learning_rate": 1e-4}
    assert spec.search.sampler == "random"
    assert spec.search.storage.startswith("postgresql://ada@db.example")
    assert (spec.search.points, spec.search.width, spec.search.seed) == (12, 4, 0)
    assert spec.budget == Budget(gpu_hours=40, wall=12 * 3600)
    assert (spec.resources.trial.cpu, spec.resources.trial.gpu) == (1, 0.25)
    assert (spec.resources.generator.gpu, spec.resources.generator.actors) == (1, 4)
    assert (spec.project, spec.data_root) == ("default", "/data")
    assert spec.tracking_uri == "sqlite:///mlflow.db"


def test_the_smallest_file_is_one_cell_with_one_point_and_three_seeds(tmp_path):
    spec = load(tmp_path, AIR)
    (cell,) = cells_of(spec)
    assert (cell.id, cell.space, cell.chosen) == ("digits-ul-text-air", (), {})
    assert spec.seeds.assignments() == ({"seed": 1}, {"seed": 2}, {"seed": 3})
    assert notes_of(spec) == ()


def test_a_number_sets_every_varied_seed_and_a_list_sets_each_one(tmp_path):
    assert load(tmp_path, FULL).seeds.assignments() == (
        {"seed": 1, "split_seed": 1},
        {"seed": 2, "split_seed": 100},
    )
    assert load(tmp_path, AIR + "seeds: [7, 5]").seeds == Seeds(values=((7,), (5,)))


@pytest.mark.parametrize(("text", "seconds"), [("90s", 90), ("1.5m", 90), ("12h", 43200), (9, 9)])
def test_wall_time_is_read_in_units(tmp_path, text, seconds):
    assert load(tmp_path, f"{AIR}budget: {{wall: {text}}}").budget.wall == seconds


def test_a_dimension_follows_those_that_its_condition_depends_on(tmp_path):
    space = load(tmp_path, FULL).space
    assert space == (
        Dimension(key="images_per_class", values=(0, 25, 50)),
        Dimension(key="fusion_weight", min=0, max=1, when="images_per_class > 0"),
    )


def test_whole_numbers_stay_whole_and_numbers_become_floats(tmp_path):
    space = "    images_per_class: {min: 2, max: 9, log: true}\n    fusion_weight: {values: [0, 1]}"
    count, weight = load(tmp_path, SEARCH + space).space
    assert (type(count.min), type(count.max)) == (int, int)
    assert [type(value) for value in weight.values] == [float, float]


def test_an_exponent_is_a_number_and_a_time_is_text(tmp_path):
    fixed = "{method: air, lora.learning_rate: 1e-4, lora.rank: 010, lora.caption: '12:30 {}'}"
    assert load(tmp_path, f"{HEAD}fixed: {fixed}").fixed == {
        "method": "air",
        "lora.learning_rate": 0.0001,
        "lora.rank": 10,
        "lora.caption": "12:30 {}",
    }


def test_a_list_of_texts_is_one_value(tmp_path):
    fixed = "fixed: {method: air, generation.template: ['a {}', 'a small {}']}\n"
    grid = "grid: {lora.caption: [['a {}', 'a small {}'], ['a {}']]}\n"
    spec = load(tmp_path, HEAD + fixed + grid)
    assert spec.fixed["generation.template"] == ("a {}", "a small {}")
    assert spec.grid["lora.caption"] == (("a {}", "a small {}"), "a {}")
    assert len(cells_of(spec)) == 2


def test_a_small_alias_is_expanded(tmp_path):
    axes = "grid:\n  lora.rank: &sizes [4, 8]\n  lora.batch: *sizes\n"
    assert load(tmp_path, AIR + axes).grid["lora.batch"] == (4, 8)


def test_a_byte_order_mark_and_windows_line_ends_do_not_matter(tmp_path):
    spec = load(tmp_path, b"\xef\xbb\xbf" + FULL.replace("\n", "\r\n").encode())
    assert replace(spec, text="") == replace(load(tmp_path, FULL), text="")


# ---------------------------------------------------------------- cells


def test_the_first_key_of_the_grid_varies_slowest_and_excluded_cells_are_missing(tmp_path):
    assert [cell.id for cell in cells_of(load(tmp_path, FULL))] == [
        "digits-ul-text-cpl-backbone=tiny",
        "digits-ul-text-air-backbone=tiny",
        "digits-ul-text-air-backbone=ViT-B-32-openai",
    ]


def test_the_order_of_precedence_is_default_world_preset_fixed_override_grid(tmp_path):
    grid = "grid:\n  method: [air, cpl]\n  iterations: [2, 3]\n"
    fixed = "fixed: {auxiliary.kind: lda, images_per_class: 9, lora.batch: 2}\n"
    override = "overrides: [{when: iterations == 2, set: {lora.batch: 4}}]\n"
    first, *_, last = cells_of(load(tmp_path, HEAD + grid + fixed + override))
    assert (first.flat["lora.batch"], last.flat["lora.batch"]) == (4, 2)  # override, fixed
    assert first.flat["fidelity.keep"] == 16  # default
    assert first.flat["lora.rank"] == 8  # world
    assert first.flat["fidelity.kind"] == "class_mean"  # method, against the world
    assert first.flat["pseudo_labels.kind"] == "candidates"  # preset
    assert first.flat["auxiliary.kind"] == "lda"  # fixed, against the method
    assert first.flat["iterations"] == 2  # grid
    assert last.flat["images_per_class"] == 0  # pinned by cpl, against fixed


OVERRIDES = HEAD + (
    "grid:\n  method: [cpl, air]\n  modality: [text, visual]\n"
    "fixed: {lora.rank: 2, fusion_weight: 0.1}\n"
    "overrides:\n"
    "  - when: method == 'air'\n"
    "    set: {fusion_weight: 0.2, lora.rank: 3}\n"
    "  - when: lora.rank == 2 and modality == 'visual'\n"
    "    set: {fusion_weight: 0.3}\n"
)


def test_an_override_replaces_fixed_where_its_condition_holds_and_the_last_one_counts(tmp_path):
    spec = load(tmp_path, OVERRIDES)
    cells = {cell.id.removeprefix("digits-ul-"): cell.flat for cell in cells_of(spec)}
    assert {name: (flat["fusion_weight"], flat["lora.rank"]) for name, flat in cells.items()} == {
        "text-cpl": (0.0, 2),  # pinned
        "text-air": (0.2, 3),
        "visual-cpl": (0.0, 2),
        "visual-air": (0.3, 3),  # the second condition reads fixed, not the first override
    }
    assert notes_of(spec) == ()


def test_an_override_may_choose_a_world(tmp_path):
    text = AIR.replace("air", "air, generator: some/model") + (
        "overrides: [{when: generator == 'some/model', set: {generator: tiny}}]\n"
    )
    assert cells_of(load(tmp_path, text))[0].flat["lora.steps"] == 300


def test_the_key_of_a_trial_is_equal_however_its_settings_are_given(tmp_path):
    def key(text, chosen=0):
        flat = cells_of(load(tmp_path, text))[chosen].flat
        return artifact_key(from_flat(flat | {"seed": 1}, REFS, ("a", "b")))

    air = "method: air, dataset: fashion_mnist, generator: tiny"
    fixed = HEAD + f"fixed: {{{air}, fusion_weight: 0.3}}\n"
    overridden = HEAD + f"fixed: {{{air}}}\noverrides:\n"
    overridden += "  - {when: dataset == 'fashion_mnist', set: {fusion_weight: 0.3}}\n"
    grid = HEAD + f"fixed: {{{air}}}\ngrid: {{fusion_weight: [0.2, 0.3]}}\n"
    assert key(fixed) == key(overridden) == key(grid, 1)


def test_a_smoke_run_keeps_the_overrides_of_keys_that_it_does_not_set(tmp_path):
    more = "  - {when: method == 'cpl', set: {train.steps: 7}}\n"
    spec = smoke_variant(load(tmp_path, OVERRIDES + more))
    for cell in cells_of(spec):
        assert cell.flat["train.steps"] == 10
    assert cell.flat["lora.rank"] == 3


def test_pinned_keys_are_ignored_and_equal_cells_are_merged(tmp_path):
    axes = "  iterations: [1, 2]\n  images_per_class: [10, 20]\n"
    grid = "grid:\n  method: [zero_shot, cpl, air]\n"
    spec = load(tmp_path, HEAD + grid + axes)
    cells = cells_of(spec)
    assert [cell.method for cell in cells] == [
        "zero_shot",
        "cpl",
        "cpl",
        "air",
        "air",
        "air",
        "air",
    ]
    assert cells[0].chosen == {"method": "zero_shot"}
    assert cells[1].chosen == {"method": "cpl", "iterations": 1}
    for cell in cells:
        assert METHODS[cell.method].pins.items() <= cell.flat.items()
    assert notes_of(spec) == ("12 combinations of the grid are 7 different cells",)


def test_a_cell_searches_the_dimensions_that_its_method_and_settings_do_not_fix(tmp_path):
    spec = load(tmp_path, FULL)
    cpl, air, _ = cells_of(spec)
    assert cpl.space == ()  # images_per_class is pinned to 0, so the condition never holds
    assert air.space == spec.space
    assert f"only one point, because no dimension applies: {cpl.id}" in notes_of(spec)


def test_settings_of_lora_do_not_apply_to_cells_without_lora(tmp_path):
    spec = load(tmp_path, AIR + "grid:\n  lora: [on, off]\n  lora.rank: [4, 8]\n")
    four, eight, off = cells_of(spec)
    assert [cell.id.removeprefix("digits-ul-text-air-") for cell in (four, eight, off)] == [
        "lora=on-rank=4",
        "lora=on-rank=8",
        "lora=off",
    ]
    assert "lora" not in eight.flat
    assert eight.flat["lora.steps"] == 300
    assert off.flat["lora"] is None
    assert not [key for key in off.flat if key.startswith("lora.")]
    assert from_flat(off.flat, REFS, ()).lora is None
    assert from_flat(eight.flat, REFS, ()).lora.rank == 8


@pytest.mark.parametrize("off", ["null", "false", "off"])
def test_a_file_may_set_keys_of_a_lora_that_is_off(tmp_path, off):
    text = f"{HEAD}fixed: {{method: air, lora: {off}, lora.rank: 4}}"
    (cell,) = cells_of(load(tmp_path, text))
    assert from_flat(cell.flat, REFS, ()).lora is None


def test_one_image_per_class_is_allowed_where_lda_is_not_used(tmp_path):
    fixed = "images_per_class: 1, auxiliary.kind: prototype"
    assert cells_of(load(tmp_path, f"{HEAD}fixed: {{method: air, {fixed}}}"))
    assert cells_of(load(tmp_path, f"{HEAD}fixed: {{method: fpl}}"))
    few = "paradigm: ssl, auxiliary.k: 1"  # the labelled images are used as well
    assert cells_of(load(tmp_path, f"{HEAD}fixed: {{method: cpl_real, {few}}}"))


def test_a_cell_holds_every_setting_but_the_varied_seeds(tmp_path):
    (cell,) = cells_of(load(tmp_path, AIR))
    assert cell.flat.keys() == trial_keys().keys() - {"seed", "lora"}
    text = f"{AIR}seeds: {{values: [1], vary: [split_seed]}}"
    (cell,) = cells_of(load(tmp_path, text))
    assert cell.flat.keys() == trial_keys().keys() - {"split_seed", "lora"}


def test_ids_of_cells_are_distinct_and_valid_file_names(tmp_path):
    names = ["a/b", "a-b", "A-B", "ä", "ö", "x" * 300, "x" * 300 + "y", "../..", "a b"]
    cells = cells_of(load(tmp_path, f"{AIR}grid: {{backbone: {names}}}"))
    assert len({cell.id.lower() for cell in cells}) == len(names)
    for cell in cells:
        (tmp_path / cell.id).touch()
        assert cell.id.isascii()


def values_of(key):
    """Values of a key, most of them allowed."""
    if key.name == "lora":
        return st.sampled_from([None, True, False])
    low = key.limits.get("ge", 0)
    high = min(key.limits.get("le", 70), key.limits.get("lt", 70))
    by_type = {
        int: st.integers(low, int(high)),
        float: st.floats(low, high) | st.just(0),
        bool: st.booleans(),
        str: st.sampled_from(["tiny", "folder:/x", "a photo of a {}", "a/b"]),
        type(None): st.none(),
        tuple[str, ...]: st.just(("{}", "a {}")),
    }
    kinds = getattr(key.type, "__args__", None) or (key.type,)
    usual = [by_type.get(kind, st.just(kind)) for kind in kinds]
    return st.one_of(*usual, *usual, *usual, st.just("other"))


@st.composite
def sweeps(draw):
    names = [name for name in trial_keys() if name != "dataset"]
    methods = st.lists(st.sampled_from([*METHODS]), min_size=1, max_size=3, unique=True)
    methods = draw(methods)
    file = {"version": 1, "name": "x", "grid": {}, "fixed": {}}
    if len(methods) == 1:
        file["fixed"]["method"] = methods[0]
    else:
        file["grid"]["method"] = methods
    for name in draw(st.lists(st.sampled_from(names), max_size=4, unique=True)):
        values = values_of(trial_keys()[name])
        if draw(st.booleans()):
            file["fixed"][name] = draw(values)
        else:
            file["grid"][name] = draw(st.lists(values, min_size=2, max_size=3, unique=True))
    if draw(st.booleans()):
        name = draw(st.sampled_from(names))
        entry = {"when": "iterations > 2", "set": {name: draw(values_of(trial_keys()[name]))}}
        file["overrides"] = [entry]
    if draw(st.booleans()):
        file["seeds"] = {"values": [1, 2], "vary": ["split_seed"]}
    return file


@settings(max_examples=150)
@given(file=sweeps())
def test_a_file_is_refused_or_all_its_cells_are_trials(tmp_path_factory, file):
    path = tmp_path_factory.getbasetemp() / "any.yaml"
    path.write_text(yaml.safe_dump(file))
    try:
        spec = load_sweep(path)
    except SpecError as error:
        message = str(error)
    else:
        message = ""
    if message:
        assert message.startswith(f"{path}:")
        assert "allowed" in message
        return
    cells = cells_of(spec)
    assert len({cell.id for cell in cells}) == len(cells)
    for cell in cells:
        for seeds in spec.seeds.assignments():
            refs = {key: Ref(name=cell.flat[key], digest="d") for key in REFS}
            trial = from_flat(cell.flat | seeds, refs, ("a", "b"))
            assert cell.flat.items() - {("lora", None)} <= to_flat(trial).items()


# ---------------------------------------------------------------- errors and their positions

BAD = {
    # not plain YAML
    "empty": ("", "1:1", ["empty", "version: 1"]),
    "a list": ("- version: 1\n", "1:1", ["`key: value` lines"]),
    "syntax": (HEAD + "grid: [a\n", "4:1", ["not valid YAML"]),
    "tab": (HEAD + "fixed:\n\tmethod: air\n", "4:1", ["tab", "spaces"]),
    "two documents": (AIR + "---\nname: y\n", "4:1", ["second document"]),
    "key twice": (AIR + "name: y\n", "4:1", ["'name'", "first at 2:1"]),
    "number as key": (AIR + "1: 2\n", "4:1", ["key must be text"]),
    "merge key": (AIR + "budget:\n  <<: {wall: 1}\n", "5:3", ["merge keys"]),
    "python tag": (AIR + "project: !!python/name:os.system x\n", "4:10", ["plain YAML"]),
    "wrong tag": (AIR + "budget: {gpu_hours: !!int many}\n", "4:21", ["'many' is not of type int"]),
    "unknown alias": (AIR + "project: *x\n", "4:10", ["not valid YAML"]),
    "ring of aliases": (AIR + "project: &x [*x]\n", "4:10", ["12 levels"]),
    "deep": (AIR + "project: " + "[" * 500, "4:21", ["12 levels"]),
    "long": (AIR + "project:\n" + "- 1\n" * 10_000, "9994:3", ["10,000 values"]),
    "control character": (AIR + "project: a\x07b\n", "4:11", ["character"]),
    "escape beyond Unicode": (AIR + 'project: "a\\U00110000"\n', "4:14", ["escape", "10FFFF"]),
    "half a surrogate": (AIR + 'project: "\\ud800"\n', "4:17", ["escape", "uD800"]),
    "not UTF-8": (AIR.encode() + b"project: \xff\n", "4:10", ["UTF-8"]),
    # the top
    "no version": ("name: x\n", "1:1", ["`version`"]),
    "version 2": ("version: 2\nname: x\n", "1:10", ["2 is not allowed; allowed: 1"]),
    "no name": ("version: 1\n", "1:1", ["`name`"]),
    "name with a slash": ("version: 1\nname: a/b\n", "2:7", ["'a/b'", "64 letters, digits"]),
    "unknown part": (AIR + "serch: {}\n", "4:1", ["allowed: version", "did you mean search?"]),
    "no method": (HEAD, "1:1", ["`method`", "zero_shot, ", "air"]),
    "part without content": (AIR + "search:\n", "4:8", ["null is not allowed", "key: value"]),
    # trial keys
    "unknown key": (
        HEAD + "fixed:\n  method: air\n  lora.rnk: 4\n",
        "5:3",
        ["fixed.lora.rnk: unknown key", "lora.steps", "did you mean lora.rank?"],
    ),
    "unknown key without a section": (
        HEAD + "fixed: {method: air, iteration: 4}",
        "3:22",
        ["pseudo_labels.*", "did you mean iterations?"],
    ),
    "unknown dataset": (
        HEAD + "fixed: {method: air, dataset: digit}",
        "3:31",
        [*DATASETS, "did you mean digits?"],
    ),
    "a text of a list without a slot": (
        HEAD + "fixed:\n  generation.template: ['a {}', 'a']",
        "4:33",
        ["fixed.generation.template[1]: 'a'", "one line of text with {} once"],
    ),
    "unknown word": (
        HEAD + "fixed: {method: air, auxiliary.kind: prototpye}",
        "3:38",
        ["fixed.auxiliary.kind: 'prototpye'", "linear_probe; did you mean prototype?"],
    ),
    "bool for whole number": (HEAD + "fixed: {lora.rank: true}", "3:20", ["a whole number >= 1"]),
    "over the limit": (HEAD + "fixed: {fusion_weight: 1.01}", "3:24", ["number >= 0 and <= 1"]),
    "NaN": (HEAD + "fixed: {synthetic_weight: .nan}", "3:27", ["a number >= 0"]),
    "huge": (HEAD + f"fixed: {{lora.rank: {'9' * 5000}}}", "3:20", ["a whole number"]),
    "backbone with an escape sequence": (
        HEAD + 'fixed: {backbone: "\\e[31m"}',
        "3:19",
        ["visible"],
    ),
    # grid
    "grid without a list": (
        HEAD + "grid:\n  method: air\n",
        "4:11",
        ["a non-empty list of: zero_shot"],
    ),
    "off twice": (GRID + "  lora: [null, off]\n", "5:16", ["twice"]),
    "too many cells": (
        GRID
        + "".join(f"  {k}: {[*range(1, 23)]}\n" for k in ("lora.rank", "lora.steps", "lora.batch")),
        "3:1",
        ["21,296 cells", "10,000"],
    ),
    "pinned everywhere": (
        HEAD + "fixed: {method: cpl, images_per_class: 9}",
        "3:22",
        ["cpl pins this key (0)", "zero_shot_aux, air, air_fpl, air_grip"],
    ),
    "axis without LoRA": (
        HEAD + "grid: {lora.rank: [4, 8]}\nfixed: {method: air, lora: null}\n",
        "3:8",
        ["no effect", "lora is off in every cell"],
    ),
    # exclude
    "exclude of another key": (GRID + "exclude: [{iterations: 3}]\n", "5:12", ["allowed: method"]),
    "exclude of another value": (
        GRID + "  lora.rank: [4, 8]\nexclude: [{lora.rank: 2}]\n",
        "6:23",
        ["allowed: 4, 8"],
    ),
    "all excluded": (
        GRID + "exclude: [{method: cpl}, {method: air}]\n",
        "5:1",
        ["every combination of the grid is excluded"],
    ),
    # overrides
    "override of an unknown key": (
        OVERRIDES + "  - {when: method == 'air', set: {lora.rnk: 2}}\n",
        "12:35",
        ["overrides[2].set.lora.rnk: unknown key", "did you mean lora.rank?"],
    ),
    "override of the method": (
        OVERRIDES + "  - {when: modality == 'text', set: {method: fpl}}\n",
        "12:38",
        ["overrides[2].set.method: unknown key", "allowed: dataset"],
    ),
    "override of an axis": (
        OVERRIDES + "  - {when: method == 'air', set: {modality: text}}\n",
        "12:35",
        ["also set under grid"],
    ),
    "override of a searched key": (
        SEARCH + "    fusion_weight: {min: 0, max: 1}\n"
        "overrides: [{when: lora, set: {fusion_weight: 0.1}}]\n",
        "8:32",
        ["also set under search.space"],
    ),
    "override of a seed": (
        AIR + "overrides: [{when: lora, set: {seed: 1}}]\n",
        "4:32",
        ["`seeds` already varies this key"],
    ),
    "override of a pinned key": (
        HEAD + "fixed: {method: cpl}\noverrides: [{when: lora, set: {images_per_class: 9}}]\n",
        "4:32",
        ["cpl pins this key (0)", "zero_shot_aux, air"],
    ),
    "override without a condition": (
        AIR + "overrides: [{set: {lora.rank: 2}}]\n",
        "4:13",
        ["`when` is missing; keys here: when, set"],
    ),
    "override that never applies": (
        OVERRIDES + "  - {when: dataset == 'dtd', set: {lora.rank: 2}}\n",
        "12:12",
        ["overrides[2].when: the condition holds in no cell"],
    ),
    "override with an unknown dataset": (
        OVERRIDES + "  - {when: dataset == 'digit', set: {lora.rank: 2}}\n",
        "12:12",
        ["dataset: 'digit'", "did you mean digits?"],
    ),
    "override that depends on a searched key": (
        SEARCH + "    fusion_weight: {min: 0, max: 1}\n"
        "overrides: [{when: fusion_weight > 0, set: {lora.rank: 2}}]\n",
        "8:20",
        ["fusion_weight, which `search.space` lists", "one value in a cell"],
    ),
    "override that depends on a seed": (
        AIR + "overrides: [{when: seed > 1, set: {lora.rank: 2}}]\n",
        "4:20",
        ["seed, which differs between the runs of a point"],
    ),
    "one image per class in an override": (
        HEAD + "fixed: {method: air, auxiliary.kind: lda, images_per_class: 4}\n"
        "overrides: [{when: lora, set: {images_per_class: 1}}]\n",
        "4:32",
        ["images_per_class is 1", "auxiliary.kind lda", ">= 2"],
    ),
    # a key that is set twice
    "fixed and grid": (GRID + "fixed: {method: fpl}\n", "5:9", ["also set under grid"]),
    "fixed and seeds": (
        HEAD + "fixed: {method: air, seed: 3}",
        "3:22",
        ["`seeds` already varies this key"],
    ),
    # search
    "empty space": (AIR + "search: {points: 3, space: {}}\n", "4:21", ["one trial key or more"]),
    "unknown sampler": (
        AIR + "search: {points: 3, sampler: tpo, space: {iterations: {min: 1, max: 3}}}\n",
        "4:30",
        ["tpe, random, grid; did you mean tpe?"],
    ),
    "half a range": (SEARCH + "    fusion_weight: {min: 0}\n", "7:5", ["both `min` and `max`"]),
    "values and range": (
        SEARCH + "    fusion_weight: {values: [0, 1], min: 0}\n",
        "7:5",
        ["both values and a range", "`values`, or `min`"],
    ),
    "reversed range": (
        SEARCH + "    fusion_weight: {min: 1, max: 0}\n",
        "7:34",
        ["greater than min"],
    ),
    "range of words": (
        SEARCH + "    auxiliary.kind: {min: 0, max: 1}\n",
        "7:22",
        ["allowed: values, when"],
    ),
    "logarithm of zero": (
        SEARCH + "    fusion_weight: {min: 0, max: 1, log: true}\n",
        "7:26",
        ["with `log: true`: > 0"],
    ),
    "grid of a range": (
        SEARCH + "    fusion_weight: {min: 0, max: 1}\n  sampler: grid\n",
        "7:5",
        ["`values`, or sampler tpe or random"],
    ),
    "method in space": (SEARCH + "    method: {values: [cpl, air]}\n", "7:5", ["under `grid`"]),
    "images in space": (
        SEARCH + "    generation.guidance_scale: {min: 1, max: 9}\n",
        "7:5",
        ["`generation.guidance_scale` changes the images", "values under `grid`"],
    ),
    "validation images in the pool": (
        HEAD + "fixed: {method: air, pool: train+val}\nsearch:\n  points: 3\n"
        "  objective: validation_accuracy\n  space: {iterations: {values: [1, 2]}}\n",
        "6:14",
        ["mutual_information", "`pool: train`"],
    ),
    # when
    "when with an unknown key": (
        SEARCH + "    fusion_weight: {min: 0, max: 1, when: image_per_class > 0}\n",
        "7:43",
        ["allowed: method", "did you mean images_per_class?"],
    ),
    "when with deep recursion": (
        SEARCH + f"    fusion_weight: {{min: 0, max: 1, when: {'-' * 450}1}}\n",
        "7:43",
        ["nested too deeply", "up to 20 levels"],
    ),
    "when that is code": (
        SEARCH + "    fusion_weight: {min: 0, max: 1, when: \"open('x')\"}\n",
        "7:43",
        ["allowed: trial keys"],
    ),
    "when with a wrong word": (
        SEARCH + "    auxiliary.kind: {values: [lda, prototype]}\n"
        "    auxiliary.center: {values: [on, off], when: auxiliary.kind == 'ldo'}\n",
        "8:49",
        ["auxiliary.kind: 'ldo'", "did you mean lda?"],
    ),
    "when of text and number": (
        SEARCH + "    fusion_weight: {min: 0, max: 1, when: auxiliary.kind > 3}\n",
        "7:43",
        ["no order"],
    ),
    "conditions that depend on each other": (
        SEARCH + "    fusion_weight: {min: 0, max: 1, when: iterations > 1}\n"
        "    iterations: {min: 1, max: 3, when: fusion_weight > 0}\n",
        "7:43",
        ["depend on each other", "without a cycle"],
    ),
    "pruning without rungs": (PRUNING + "{rule: median}\n", "7:12", ["`rungs` is missing"]),
    "rungs that do not increase": (
        PRUNING + "{rule: median, rungs: [2, 2]}\n",
        "7:38",
        ["2 is not greater than 2"],
    ),
    "rung at the end": (
        PRUNING + "{rule: median, rungs: [2, 10]}\n",
        "7:38",
        ["pruning after 10 iterations has no effect", "more than 10 iterations"],
    ),
    "all kept": (PRUNING + "{rule: halving, rungs: [2], keep: 1}\n", "7:46", ["> 0 and < 1"]),
    "share of a median": (
        PRUNING + "{rule: median, rungs: [2], keep: 0.5}\n",
        "7:39",
        ["does not use `keep`"],
    ),
    "halving with one point per round": (
        PRUNING + "{rule: halving, rungs: [2]}\n  width: 1\n",
        "7:3",
        ["`width: 2`"],
    ),
    "iterations that are pruned and searched": (
        AIR + "search:\n  pruning: {rule: median, rungs: [1]}\n  points: 3\n"
        "  space: {iterations: {values: [2, 3]}}\n",
        "7:11",
        ["same number of iterations", "under grid"],
    ),
    "when that cannot change": (
        SEARCH + "    fusion_weight: {min: 0, max: 1, when: images_per_class > 0}\n",
        "7:43",
        ["no effect: images_per_class is 120", "search.space"],
    ),
    "when of a varied seed": (
        SEARCH + "    fusion_weight: {min: 0, max: 1, when: seed > 1}\n",
        "7:43",
        ["differs between the runs"],
    ),
    "when that never holds": (
        HEAD + "grid: {method: [air, air_fpl]}\nsearch:\n  points: 2\n  space:\n"
        "    fusion_weight: {min: 0, max: 1, when: iterations > 99}\n",
        "7:5",
        ["never searched"],
    ),
    **{
        f"when that holds at no point: {when[:40]}": (
            SEARCH + "    auxiliary.kind: {values: [lda, knn]}\n    iterations: {min: 1, max: 9}\n"
            "    fusion_weight: {min: 0.1, max: 0.5}\n"
            f"    prompt.length: {{min: 1, max: 8, when: {when}}}\n",
            "10:43",
            ["holds at no point", "search.space, grid or fixed"],
        )
        for when in (
            "fusion_weight > 0.5",
            "iterations > 4 and iterations < 5",
            "auxiliary.kind == 'cache'",
            "iterations == fusion_weight",
            f"fusion_weight > {10**400}",  # more than a float can hold
        )
    },
    "a grid of 729 million points": (
        SEARCH.replace("points: 3", "sampler: grid\n  points: 3")
        + "".join(
            f"    {key}: {{values: {[*range(1, 31)]}}}\n"
            for key in (
                *("iterations", "train.steps", "train.batch"),
                *("train.synthetic_batch", "fidelity.keep", "auxiliary.k"),
            )
        ),
        "7:3",
        ["729,000,000 combinations", "up to 10,000", "tpe or random"],
    ),
    "a million trials": (
        AIR + f"grid: {{iterations: {[*range(1, 1001)]}}}\nseeds: {[*range(1000)]}\n",
        "5:1",
        ["1,000,000 trials", "up to 100,000"],
    ),
    "images that no store holds": (
        AIR.replace("air", "air, images_per_class: 100000000000000000"),
        "3:40",
        ["<= 1000000"],
    ),
    # lda with one image per class
    "one image per class in the grid": (
        HEAD + "grid:\n  images_per_class: [1, 4]\nfixed: {method: air, auxiliary.kind: lda}\n",
        "4:3",
        ["auxiliary.kind lda", ">= 2", "prototype"],
    ),
    "one image per class in the space": (
        SEARCH.replace("air", "air, auxiliary.kind: lda")
        + "    images_per_class: {min: 1, max: 9}\n",
        "7:5",
        ["auxiliary.kind lda", ">= 2"],
    ),
    "labelled images with paradigm ul": (
        HEAD + "grid: {paradigm: [ssl, ul]}\nfixed: {method: air, supervision: labelled}\n",
        "4:22",
        ["no labelled images", "ssl or trzsl"],
    ),
    "a test dataset without unseen classes": (
        HEAD + "fixed: {method: fpl, paradigm: trzsl, test_dataset: fashion_mnist}\n",
        "3:39",
        ["fashion_mnist", "seen and unseen classes", "ul or ssl"],
    ),
    # the rest
    "seeds that are not a list": (
        AIR + "seeds: 3\n",
        "4:8",
        ["a list such as [1, 2, 3]", "`values` and `vary`"],
    ),
    "seeds without values": (AIR + "seeds: {vary: [seed]}\n", "4:8", ["`values`"]),
    "unknown seed": (
        AIR + "seeds: {values: [1], vary: [split]}\n",
        "4:29",
        ["seed, split_seed", "did you mean split_seed?"],
    ),
    "runs that only the noise of the images distinguishes": (
        AIR + "seeds: {values: [[1, 5], [1, 6]], vary: [seed, generation.seed]}\n",
        "4:26",
        ["listed twice", "generation.seed alone does not make another run"],
    ),
    "a search over the denoising errors": (
        SEARCH + "    evidence.top: {values: [2, 5]}\n",
        "7:5",
        ["`evidence.top` changes the denoising errors", "cannot be searched", "grid"],
    ),
    "too many seeds in one": (AIR + "seeds: [[1, 2]]\n", "4:9", ["allowed: [a number]"]),
    "wall without unit": (
        AIR + "budget: {wall: 12 hours}\n",
        "4:16",
        ["a duration such as 90s, 30m or 12h"],
    ),
    "a split seed that numpy refuses": (
        AIR + "seeds: {values: [[1, 4294967296]], vary: [seed, split_seed]}\n",
        "4:18",
        ["split_seed: 4294967296", "<= 4294967295"],
    ),
    "a sampler's seed that numpy refuses": (
        SEARCH.replace("search:", "search:\n  seed: 4294967296")
        + "    fusion_weight: {min: 0, max: 1}\n",
        "5:9",
        ["<= 4294967295"],
    ),
    "one and a half GPUs": (
        AIR + "resources: {trial: {gpu: 1.5}}\n",
        "4:26",
        ["allowed: 0 or a number >= 0.0001 and <= 1 or a whole number >= 2"],
    ),
    "less than Ray's unit of CPU": (
        AIR + "resources: {encoder: {cpu: 0.00001}}\n",
        "4:28",
        ["allowed: 0 or a number >= 0.0001"],
    ),
    "less than Ray's unit": (
        AIR + "resources: {trial: {custom: {fpga: 0.00001}}}\n",
        "4:36",
        [">= 0.0001"],
    ),
    "a resource without a name": (
        AIR + "resources: {trial: {custom: {'': 1}}}\n",
        "4:34",
        ["custom.''", "visible text"],
    ),
    "a mapping in place of dotted keys": (
        HEAD + "fixed:\n  method: air\n  lora: {rank: 4}\n",
        "5:3",
        ["keys with a dot", "write `lora.rank: 4`"],
    ),
    "mappings in place of a dotted key of the grid": (
        GRID + "  lora: [null, {rank: 4, steps: 9}, {rank: 8}]\n",
        "5:16",
        ["keys with a dot", "write `lora.rank: [4, 8]`"],
    ),
    "one word in place of dotted keys": (
        HEAD + "fixed: {method: air, fusion: agreement}\n",
        "3:22",
        ["unknown key; allowed: fusion.weights"],
    ),
    "a setting outside fixed and grid": (
        AIR + "train: {steps: 4}\n",
        "4:1",
        ["unknown key here; allowed under grid, under fixed"],
    ),
    "a part of the file under fixed": (
        HEAD + "fixed: {method: air, budget: {wall: 1h}}\n",
        "3:22",
        ["unknown key here; allowed at the top of the file"],
    ),
    "several values under fixed": (
        HEAD + "fixed: {method: air, iterations: [1, 2]}\n",
        "3:34",
        ["a list of values is allowed under grid"],
    ),
    "a misspelled mapping": (
        HEAD + "fixed: {method: air, train: {step: 4}}\n",
        "3:22",
        ["unknown key train.step", "did you mean train.steps?"],
    ),
    "capitals": (HEAD + "fixed: {method: AIR}\n", "3:17", ["did you mean air?"]),
    "unknown resource": (AIR + "resources: {trial: {gpus: 1}}\n", "4:21", ["mean gpu?"]),
    "a password of the tracker": (
        AIR + "tracking: {uri: 'http://ada:word@mlflow:5000'}\n",
        "4:18",
        ["MLFLOW_TRACKING_PASSWORD"],
    ),
    "a password of the studies": (
        SEARCH + "    fusion_weight: {min: 0, max: 1}\n"
        "  storage: postgresql://ada:word@db/studies\n",
        "8:12",
        ["a password", "PGPASSWORD"],
    ),
    "a password behind the studies": (
        SEARCH + "    fusion_weight: {min: 0, max: 1}\n"
        "  storage: postgresql://db/studies?password=word\n",
        "8:12",
        ["contains a password"],
    ),
    "another storage of studies": (
        SEARCH + "    fusion_weight: {min: 0, max: 1}\n  storage: sqlite:///s.db\n",
        "8:12",
        ["allowed: journal, postgresql://user@host/database"],
    ),
}


@pytest.mark.parametrize(("text", "position", "fragments"), BAD.values(), ids=BAD)
def test_an_error_names_its_position_and_the_allowed_values(tmp_path, text, position, fragments):
    message = error_of(tmp_path, text)
    assert message.startswith(f"{position}: ") if position else not message[0].isdigit()
    assert "ada:word" not in message
    for fragment in fragments:
        assert fragment in message


@pytest.mark.parametrize(
    ("key", "text"),
    [
        ("lora.caption", "{} {}"),  # may be without a slot, for a LoRA of the whole domain
        *(
            ("generation.template", text)
            for text in ("{0.__class__}", "{!r}", "{} {}", "no slot", "{:>10}", "{} {{}}", "{name}")
        ),
    ],
)
def test_a_template_without_exactly_one_plain_slot_is_refused(tmp_path, command, key, text):
    file = tmp_path / "x.yaml"
    file.write_text(HEAD + f"fixed:\n  method: air\n  {key}: '{text}'\n")
    code, out, err = command("validate", file)
    assert (code, out) == (2, "")
    assert err.startswith(
        f"{file}:5:{len(key) + 5}: fixed.{key}: {text!r} is not allowed; allowed: "
    )
    count = "at most once" if key == "lora.caption" else "once"
    assert f"one line of text with {{}} {count}, for the class name, and no other brace" in err


def test_every_text_with_a_slot_for_the_class_name_is_checked_as_a_template():
    defaults = {name: key.default for name, key in trial_keys().items()}
    slots = [name for name, text in defaults.items() if isinstance(text, str) and "{}" in text]
    assert slots
    for name in slots:
        with pytest.raises(ValueError, match="match pattern"):
            value_type(name).validate_python("{0}")


def test_an_error_message_has_position_key_value_and_allowed_values(tmp_path):
    text = SEARCH + "    fusion_weight: {min: 0, max: 2}\n"
    assert error_of(tmp_path, text) == (
        "7:34: search.space.fusion_weight.max: 2 is not allowed; allowed: a number >= 0 and <= 1"
    )


def test_aliases_that_expand_to_too_many_values_are_refused(tmp_path):
    lines = ["a: &a0 [1,1,1,1,1,1,1,1,1]"]
    lines += [f"b{i}: &a{i + 1} [{', '.join([f'*a{i}'] * 9)}]" for i in range(9)]
    assert "aliases" in error_of(tmp_path, "\n".join(lines))


def test_a_large_file_is_refused_before_it_is_read(tmp_path):
    assert "1 MB" in error_of(tmp_path, AIR + "#" * 1_000_000)
    if os.path.exists("/dev/zero"):
        with pytest.raises(SpecError, match="1 MB"):
            load_sweep(Path("/dev/zero"))


def test_a_missing_file_and_a_folder_are_refused_by_name(tmp_path):
    with pytest.raises(SpecError, match=r"none\.yaml: no such file"):
        load_sweep(tmp_path / "none.yaml")
    with pytest.raises(SpecError, match="directory"):
        load_sweep(tmp_path)


@pytest.mark.parametrize("name", [name for name in trial_keys() if name != "lora"])
def test_a_key_is_not_searchable_exactly_if_it_changes_the_preparation(tmp_path, name):
    # The paradigms in which settings of labelled images have an effect.
    fixed = {"shots": "ssl", "class_seed": "trzsl", "lora.source": "ssl", "labelled_size": "trzsl"}
    paradigm = fixed.get(name, "ul")
    (cell,) = cells_of(load(tmp_path, AIR.replace("{", f"{{paradigm: {paradigm}, ", 1)))
    values = some_values(trial_keys()[name])

    def prepared(value):
        flat = cell.flat | {name: value}
        refs = {ref: Ref(name=flat[ref], digest=flat[ref]) for ref in REFS}
        trial = from_flat(flat, refs, ("a",))
        return trial.features, trial.split, trial.synthetic_features or prepared(cell.flat[name])[2]

    if len(values) == 1:
        return  # a single value cannot change anything
    changes = len({prepared(value) for value in values}) > 1
    message = error_of(tmp_path, f"{SEARCH}    {name}: {{values: []}}\n")
    assert ("changes the images" in message or "under `seeds`" in message) == (
        changes or name == "seed"
    )


def some_values(key):
    kinds = [kind for kind in getattr(key.type, "__args__", (key.type,)) if kind is not type(None)]
    if key.name == "pool_ratio":
        return [1.0, 2.0]
    examples = {bool: [True, False], int: [1, 2], float: [0.25, 0.5], str: ["a", "b"]}
    return examples.get(kinds[0], kinds)


# ---------------------------------------------------------------- options of the command line


def test_an_option_sets_a_trial_key_or_a_part_of_the_file(tmp_path):
    sets = ["lora.steps=20", "search.points=2", "seeds=[5]", "budget.wall=30m", "project=mine"]
    spec = load(tmp_path, FULL, sets=sets)
    assert spec.fixed == {"lora.learning_rate": 1e-4, "lora.steps": 20}
    assert spec.search.points == 2
    assert spec.seeds.assignments() == ({"seed": 5},)
    assert (spec.budget.wall, spec.budget.gpu_hours) == (1800, 40)
    assert spec.project == "mine"


def test_an_option_replaces_a_dimension_and_creates_missing_parts(tmp_path):
    sets = ["search.space.fusion_weight={values: [0, 1]}", "search.points=2"]
    assert load(tmp_path, AIR, sets=sets).space == (
        Dimension(key="fusion_weight", values=(0.0, 1.0)),
    )
    assert load(tmp_path, HEAD, sets=["method=cpl"]).methods == ("cpl",)


def test_an_option_does_not_set_a_key_that_an_override_sets(tmp_path):
    message = "^--set lora.rank=8: fixed.lora.rank: the key is also set under overrides"
    with pytest.raises(SpecError, match=message):
        load(tmp_path, OVERRIDES, sets=["lora.rank=8"])
    spec = load(tmp_path, OVERRIDES, sets=["lora.rank=8", "overrides=[]"])
    assert {cell.flat["lora.rank"] for cell in cells_of(spec)} == {8}


@pytest.mark.parametrize(
    ("option", "fragment"),
    [
        ("lora.rank", "KEY=VALUE"),
        ("lora.rank=", "KEY=VALUE"),
        ("lora.rnk=3", "did you mean lora.rank?"),
        ("serch.points=3", "did you mean search?"),
        ("search.points=x", "search.points: 'x' is not allowed; allowed: a whole number >= 1"),
        ("search.point=3", "did you mean points?"),
        ("search.points.x=3", "does not contain `key: value` lines"),
        ("method=air", "also set under grid"),
        ("images_per_class=3", "also set under search.space"),
        ("seed=3", "`seeds` already varies this key"),
        ("name=a/b", "letters"),
        ("fusion_weight=[", "not valid YAML"),
        ("fusion_weight=!!python/name:os.system x", "tag"),
    ],
)
def test_an_error_in_an_option_names_the_option(tmp_path, option, fragment):
    message = error_of(tmp_path, FULL, sets=[option])
    assert message.startswith(f"--set {option}")
    assert fragment in message


def test_errors_in_options_are_reported_together_and_with_those_of_the_file(tmp_path):
    wrong = ["lora.rnk=3", "fusion_weight=[", "train.steps=x", "pool_size=[1, 2]"]
    with pytest.raises(SpecError) as caught:
        load(tmp_path, FULL.replace("points: 12", "points: x"), sets=["seeds=[1]", *wrong])
    lines = str(caught.value).splitlines()
    for start in (*(f"--set {option}:" for option in wrong), f"{tmp_path}/x.yaml:14:11: "):
        assert sum(line.startswith(start) for line in lines) == 1, start
    assert len(lines) == len(wrong) + 1


def test_only_selects_cells_by_values_of_the_grid(tmp_path):
    def ids(*only):
        spec = load(tmp_path, FULL, only=only)
        return [cell.id.removeprefix("digits-ul-text-") for cell in cells_of(spec)]

    assert ids("method=air") == ["air-backbone=tiny", "air-backbone=ViT-B-32-openai"]
    assert ids("method=air", "backbone=tiny") == ["air-backbone=tiny"]
    assert ids("method=air,cpl", "backbone=tiny") == ["cpl-backbone=tiny", "air-backbone=tiny"]
    assert ids("method=air", "method=cpl", "backbone=tiny") == ids("backbone=tiny")


@pytest.mark.parametrize(
    ("only", "fragment"),
    [
        (["method"], "method=VALUE"),
        (["method="], "method=VALUE"),
        (["methods=air"], "allowed: backbone, method; did you mean method?"),
        (["lora.rank=4"], "not a key of the grid"),
        (["method=ari"], "did you mean air?"),
        (["method=fpl"], "'fpl' is not in grid.method; allowed: cpl, air"),
        (["method=cpl", "backbone=ViT-B-32/openai"], "no cell is left"),
    ],
)
def test_an_error_in_an_only_option_names_the_option(tmp_path, only, fragment):
    message = error_of(tmp_path, FULL, only=only)
    assert message.startswith(f"--only {only[0]}")
    assert fragment in message


def test_an_option_for_another_purpose_is_explained(tmp_path):
    text = GRID + "fixed: {lora.rank: 4}\n"
    for options, fragment in (
        ({"sets": ["method=[cpl]"]}, "to vary it, give --set grid.method=[cpl]; --only method="),
        ({"sets": ["method=cpl"]}, "to run one value of the grid, give --only method=cpl"),
        ({"only": ["cpl"]}, "did you mean --only method=cpl?"),
        ({"only": ["lora.rank=4"]}, "--set lora.rank=4 changes a setting"),
        ({"only": ["seeds=1"]}, "--set seeds=1 changes a setting"),
    ):
        assert fragment in error_of(tmp_path, text, **options)
    spec = load(tmp_path, text, sets=["grid.method=[cpl]"])
    assert [cell.id for cell in cells_of(spec)] == ["digits-ul-text-cpl"]


# ---------------------------------------------------------------- without some of its methods


EVERY_PART = HEAD + (
    "grid:\n  method: [zero_shot, fpl, cpl, air]\n  images_per_class: [8, 16]\n"
    "exclude: [{method: fpl, images_per_class: 8}]\n"
    "fixed: {evidence.draws: 0}\n"
    "overrides: [{when: method == 'air', set: {lora.rank: 3}},\n"
    "  {when: iterations > 1, set: {fidelity.keep: 4}}]\n"
    "search:\n  points: 2\n  pruning: {rule: median, rungs: [2]}\n  space:\n"
    "    fusion_weight: {min: 0, max: 1, when: images_per_class > 8}\n"
    "    train.labelled_weight: {values: [1, 2], when: iterations > 5}\n"
)


@pytest.mark.parametrize("method", ["zero_shot", "fpl", "cpl", "air"])
def test_a_file_stays_valid_when_methods_are_removed_from_its_grid(tmp_path, method):
    methods = "zero_shot, fpl, cpl, air"
    without = ", ".join(name for name in methods.split(", ") if name != method)
    for left in (method, without):
        spec = load(tmp_path, EVERY_PART.replace(f"[{methods}]", f"[{left}]"))
        assert {cell.method for cell in cells_of(spec)} == set(left.split(", "))
    notes = notes_of(load(tmp_path, EVERY_PART.replace(f"[{methods}]", "[cpl]")))
    assert "grid.images_per_class does not apply to cpl: the method pins it" in notes
    assert "overrides[0] applies to no cell: its condition never holds" in notes


def test_every_key_with_a_mistake_is_reported_once_in_the_order_of_the_file(tmp_path):
    text = HEAD + (
        "seeds: [1.5, x]\ngrid: {method: [cpl, airr], dataste: [digits]}\n"
        "fixed: {iterations: -1, generation.template: [a, b]}\n"
        "search: {points: 0, space: {fusion_weight: {min: 0, max: 2}}}\n"
    )
    places = ["3:9", "3:14", "4:22", "4:29", "5:21", "5:47", "6:18", "6:58"]
    assert positions_of(tmp_path, text) == places
    assert positions_of(tmp_path, "grid: {method: [airr]}\n") == ["1:1", "1:1", "1:17"]
    unsearchable = "    seed: {values: [1]}\n    method: {values: [cpl]}\n"
    assert positions_of(tmp_path, SEARCH + unsearchable) == ["7:5", "8:5"]
    many = "".join(f"  k{i}: 1\n" for i in range(12))
    with pytest.raises(SpecError, match="and 2 more mistakes"):
        load(tmp_path, f"{HEAD}fixed:\n  method: cpl\n{many}")


def test_settings_that_contradict_each_other_are_reported_together(tmp_path):
    text = HEAD + (
        "grid: {method: [cpl, air], paradigm: [ul, ssl], lora.rank: [4, 8]}\n"
        "exclude: [{lora.rank: 2}, {iterations: 3}]\n"
        "fixed: {lora: null, lora.rank: 4, supervision: labelled, seed: 3}\n"
        "overrides: [{when: dataset == 'dtd', set: {lora.steps: 4}}]\n"
        "search:\n  points: 3\n"
        "  pruning: {rule: median, rungs: [30], keep: 0.4}\n"
        "  space: {fusion_weight: {min: 0, max: 1, when: images_per_class > 3}}\n"
    )
    places = ["3:49", "4:23", "4:28", "5:21", "5:35", "5:58", "6:20", "9:35", "9:40"]
    assert positions_of(tmp_path, text) == places
    # Conflicts that depend on no other value are reported with wrong values.
    wrong = text.replace("points: 3", "points: 0").replace("name: x\n", "name: /\n")
    assert positions_of(tmp_path, wrong) == ["2:7", "5:21", "5:58", "8:11"]


def positions_of(folder, text):
    with pytest.raises(SpecError) as caught:
        load(folder, text)
    lines = str(caught.value).splitlines()
    return [line.removeprefix(f"{folder}/x.yaml:").partition(": ")[0] for line in lines]


# ---------------------------------------------------------------- relative folders


def test_a_relative_path_is_relative_to_the_file_and_in_an_option_to_the_working_directory(
    tmp_path, monkeypatch
):
    text = HEAD + (
        "grid: {dataset: ['folder:photos', 'folder:/data']}\nfixed: {method: cpl}\n"
        "overrides: [{when: dataset == 'folder:photos', set: {shots: 1}}]\n"
    )
    (tmp_path / "sub").mkdir()
    monkeypatch.chdir(tmp_path)
    spec = load(Path("sub"), text)
    assert spec.folders == {"folder:photos": "folder:sub/photos"}
    assert cells_of(spec)[0].id == "folder-photos-ul-text-cpl"  # does not depend on the location
    assert load(Path(), text).folders == {}
    assert load(Path("sub"), text, sets=["grid.dataset=['folder:photos']"]).folders == {}
    models = HEAD + (
        "grid: {backbone: [tiny, ./clip, ViT-B-32@clip.pt, ViT-B-32/openai, models/clip]}\n"
        "fixed: {method: air, generator: ~/sd}\n"
    )
    (tmp_path / "sub" / "models" / "clip").mkdir(parents=True)
    (tmp_path / "sub" / "tiny").mkdir()
    paths = {"./clip": "sub/clip", "ViT-B-32@clip.pt": "ViT-B-32@sub/clip.pt"}
    paths |= {"models/clip": "sub/models/clip"}
    assert load(Path("sub"), models).folders == paths
    option = load(Path("sub"), models, sets=["grid.backbone=[models/clip]"])
    assert "models/clip" not in option.folders


# ---------------------------------------------------------------- finding a file


def test_a_bare_name_is_looked_up_in_the_sweeps_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "sweeps").mkdir()
    (tmp_path / "sweeps" / "mine.yaml").write_text(AIR)
    (tmp_path / "mine").mkdir()  # a folder of that name does not hide it
    assert find_sweep("mine") == Path("sweeps/mine.yaml")
    assert find_sweep("mine.yaml") == Path("sweeps/mine.yaml")
    (tmp_path / "mine.yaml").write_text(AIR)
    (tmp_path / "yours.yaml").write_text(AIR)
    assert find_sweep("mine.yaml") == Path("mine.yaml")
    assert find_sweep("mine") == Path("sweeps/mine.yaml")
    assert find_sweep("yours") == Path("yours.yaml")
    assert find_sweep("other/file.yaml") == Path("other/file.yaml")
    for name in ("mien", "m" * 5000):
        with pytest.raises(SpecError, match=r"no such file or sweep; allowed: .*mine"):
            find_sweep(name)
