from dataclasses import replace
from operator import attrgetter
from pathlib import Path

import pytest

from air_core.methods import METHODS
from air_core.settings.flat import trial_keys
from orchestrator.files import ROOT
from orchestrator.planning import read_request
from orchestrator.spec import Dimension, SpecError, cells_of, find_sweep, load_sweep, notes_of
from orchestrator.spec._trial_values import value_schema
from orchestrator.spec.schema import error_message
from orchestrator.spec.sweep import Search, Seeds, smoke_variant
from tests.helpers.golden import SWEEP, check_golden_cases, check_sweeps
from tests.helpers.sweeps import write_sweep

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
  space:
    fusion_weight: {min: 0, max: 1}
    images_per_class: {values: [0, 25, 50]}
seeds: {values: [1, [2, 100]], vary: [seed, split_seed]}
resources: {trial: {gpu: 0.25}, generator: {gpu: 1, actors: 4}}
project: default
"""
EDITORS = "# yaml-language-server: $schema=airsweep.schema.json\n"
HEAD = SWEEP
AIR = HEAD + "fixed: {method: air}\n"
SEARCH = AIR + "search:\n  points: 3\n  space:\n"


def load(folder, text, **options):
    path = folder / "x.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return load_sweep(path, **options)


def error_of(folder, text, **options):
    """The message about a mistake, with the path of the file below the folder."""
    with pytest.raises(SpecError) as caught:
        load(folder, text, **options)
    return str(caught.value).replace(f"{folder}/", "")


# ---------------------------------------------------------------- content of a file


WEIGHTS = Dimension(key="fusion_weight", min=0.0, max=1.0)
COUNTS = Dimension(key="images_per_class", values=(0, 25, 50))
MIXED = HEAD + "grid: {method: [air]}\nfixed: {lora.learning_rate: 1e-4, lora.caption: 12:30}"
RESOURCES = AIR + "resources: {"


@pytest.mark.parametrize(
    ("text", "part", "value"),
    [
        (EDITORS + FULL, "question", "Does the share matter?\n\nExpect: a hump."),
        (FULL, "grid", {"backbone": ("tiny", "ViT-B-32/openai"), "method": ("cpl", "air")}),
        (FULL, "exclude", ({"backbone": "ViT-B-32/openai", "method": "cpl"},)),
        (FULL, "fixed", {"lora.learning_rate": 1e-4}),
        (FULL, "search", Search(sampler="random", points=12, space=(WEIGHTS, COUNTS))),
        (FULL, "seeds", Seeds(values=((1, 1), (2, 100)), vary=("seed", "split_seed"))),
        (FULL, "resources.trial.gpu", 0.25),
        (FULL, "resources.generator.gpu", 1.0),
        (FULL, "resources.generator.actors", 4),
        (FULL, "project", "default"),
        (AIR, "seeds", Seeds(values=((1,), (2,), (3,)))),
        (AIR + "seeds: [7, 5]", "seeds", Seeds(values=((7,), (5,)))),
        (RESOURCES + "trial: {memory: 0.5}}", "resources.trial.memory", 512 << 20),
        (RESOURCES + "wait: 90}", "resources.wait", 90.0),
        (
            SEARCH + "    images_per_class: {min: 2, max: 9, log: true}",
            "space",
            (Dimension(key="images_per_class", min=2, max=9, log=True),),
        ),
        (MIXED, "fixed", {"lora.learning_rate": 1e-4, "lora.caption": "12:30"}),
        (
            AIR + "grid: {lora.caption: [['a {}', 'a small {}'], ['a {}']]}",
            "grid",
            {"lora.caption": (("a {}", "a small {}"), "a {}")},
        ),
    ],
)
def test_a_part_of_a_file_is_read(tmp_path, text, part, value):
    assert repr(attrgetter(part)(load(tmp_path, text))) == repr(value)  # 1 is not 1.0


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
    override = "overrides: [{when: {iterations: 2}, set: {lora.batch: 4}}]\n"
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
    "  - when: {method: air}\n"
    "    set: {fusion_weight: 0.2, lora.rank: 3}\n"
    "  - when: {lora.rank: [1, 2], modality: visual}\n"
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


def test_a_smoke_run_keeps_what_it_does_not_set_itself(tmp_path):
    more = "  - {when: {method: cpl}, set: {train.steps: 7, lora.batch: 2}}\n"
    space = "{images_per_class: {values: [4, 9]}, auxiliary.k: {values: [1, 2]}}"
    search = f"search: {{points: 9, space: {space}}}\n"
    spec = smoke_variant(load(tmp_path, OVERRIDES + more + search))
    for cell in cells_of(spec):
        assert cell.flat["train.steps"] == 10
    assert cell.flat["lora.rank"] == 3
    assert (spec.search.points, [each.key for each in spec.space]) == (2, ["auxiliary.k"])
    assert len(spec.seeds.values) == 1


def test_pinned_keys_are_ignored_and_equal_cells_are_merged(tmp_path):
    axes = "  iterations: [1, 2]\n  images_per_class: [10, 20]\n"
    grid = "grid:\n  method: [zero_shot, cpl, air]\n"
    spec = load(tmp_path, HEAD + grid + axes)
    cells = cells_of(spec)
    assert [cell.method for cell in cells] == ["zero_shot", *["cpl"] * 2, *["air"] * 4]
    assert cells[0].chosen == {"method": "zero_shot"}
    assert cells[1].chosen == {"method": "cpl", "iterations": 1}
    for cell in cells:
        assert METHODS[cell.method].pins.items() <= cell.flat.items()
    assert notes_of(spec) == ("12 combinations of the grid are 7 different cells",)


def test_settings_of_lora_do_not_apply_to_cells_without_lora(tmp_path):
    spec = load(tmp_path, AIR + "grid:\n  lora: [on, off]\n  lora.rank: [4, 8]\n")
    _, eight, off = cells_of(spec)
    assert eight.id == "digits-ul-text-air-lora=on-rank=8"
    assert off.id == "digits-ul-text-air-lora=off"
    assert "lora" not in eight.flat
    assert eight.flat["lora.steps"] == 300
    assert off.flat["lora"] is None
    assert not [key for key in off.flat if key.startswith("lora.")]


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


# ---------------------------------------------------------------- errors and their positions

# Mistakes in files that are too long for the golden file, or not HEAD and some lines of text.
ODD = {
    "empty": "",
    "a list": "- version: 1\n",
    "no version": "name: x\n",
    "version 2": "version: 2\nname: x\n",
    "no name": "version: 1\n",
    "name with a slash": "version: 1\nname: a/b\n",
    "no method": HEAD,
    "neither version nor name, and an unknown method": "grid: {method: [airr]}\n",
    "control character": AIR + "project: a\x07b\n",
    "not UTF-8": AIR.encode() + b"project: \xff\n",
    "200 kB": AIR + "#" * 200_000,
    "13 levels": AIR + "project: " + "[" * 500,
    "aliases that expand to too many values": "a: &a0 [1,1,1,1,1,1,1,1,1]\n"
    + "".join(f"b{i}: &a{i + 1} [{', '.join([f'*a{i}'] * 9)}]\n" for i in range(9)),
}


def test_messages_about_mistakes_equal_the_golden_ones(tmp_path):
    def message(text):
        found = error_of(tmp_path, text)
        assert "ada:word" not in found
        return found

    check_sweeps("messages/sweep_file.txt", message, ODD)


def test_every_text_with_a_slot_for_the_class_name_is_checked_as_a_template():
    defaults = {name: key.default for name, key in trial_keys().items()}
    slots = [name for name, text in defaults.items() if isinstance(text, str) and "{}" in text]
    assert slots
    for name in slots:
        assert "{} " in error_message(value_schema(name), "{0}")


def test_a_missing_file_and_a_folder_are_refused_by_name(tmp_path):
    with pytest.raises(SpecError, match=r"none\.yaml: no such file"):
        load_sweep(tmp_path / "none.yaml")
    with pytest.raises(SpecError, match="directory"):
        load_sweep(tmp_path)


# ---------------------------------------------------------------- options of the command line


def test_an_option_sets_a_trial_key_or_a_part_of_the_file(tmp_path):
    sets = ["lora.steps=20", "search.points=2", "seeds=[5]", "resources.wait=1800", "project=mine"]
    spec = load(tmp_path, FULL, sets=sets)
    assert spec.fixed == {"lora.learning_rate": 1e-4, "lora.steps": 20}
    assert spec.search.points == 2
    assert spec.seeds.assignments() == ({"seed": 5},)
    assert (spec.resources.wait, spec.resources.trial.gpu) == (1800, 0.25)
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


def test_messages_about_options_equal_the_golden_ones(tmp_path):
    wrong = {
        f"--set {option}": error_of(tmp_path, FULL, sets=[option])
        for option in (
            *("lora.rank", "lora.rank=", "lora.rnk=3", "serch.points=3", "search.points=x"),
            *("search.point=3", "search.points.x=3", "images_per_class=3", "seed=3", "name=a/b"),
            *("method=air", "method=[cpl]", "fusion_weight=["),
            *("name=..", "name=/etc", "project=../x", "project=.hidden"),
            "fusion_weight=!!python/name:os.system x",
            "project=http://me:geheim@mlflow:5000",
        )
    }
    wrong |= {
        f"--only {' '.join(only)}": error_of(tmp_path, FULL, only=only)
        for only in (
            *(["method"], ["method="], ["methods=air"], ["method=ari"], ["method=fpl"], ["cpl"]),
            *(["lora.rank=4"], ["seeds=1"], ["method=cpl", "backbone=ViT-B-32/openai"]),
        )
    }
    several = ["seeds=[1]", "lora.rnk=3", "fusion_weight=[", "train.steps=x", "pool_size=[1, 2]"]
    wrong["several options, and a mistake in the file"] = error_of(
        tmp_path, FULL.replace("points: 12", "points: x"), sets=several
    )
    check_golden_cases("messages/sweep_options.txt", wrong)


def test_only_selects_cells_by_values_of_the_grid(tmp_path):
    def ids(*only):
        spec = load(tmp_path, FULL, only=only)
        return [cell.id.removeprefix("digits-ul-text-") for cell in cells_of(spec)]

    assert ids("method=air") == ["air-backbone=tiny", "air-backbone=ViT-B-32-openai"]
    assert ids("method=air", "backbone=tiny") == ["air-backbone=tiny"]
    assert ids("method=air,cpl", "backbone=tiny") == ["cpl-backbone=tiny", "air-backbone=tiny"]
    assert ids("method=air", "method=cpl", "backbone=tiny") == ids("backbone=tiny")
    (off,) = cells_of(load(tmp_path, AIR + "grid: {lora: [on, off]}", only=["lora=off"]))
    assert off.flat["lora"] is None


# ---------------------------------------------------------------- without some of its methods


EVERY_PART = HEAD + (
    "grid:\n  method: [zero_shot, fpl, cpl, air]\n  images_per_class: [8, 16]\n"
    "exclude: [{method: fpl, images_per_class: 8}]\n"
    "fixed: {evidence.draws: 0}\n"
    "overrides: [{when: {method: air}, set: {lora.rank: 3}},\n"
    "  {when: {iterations: 10}, set: {fidelity.keep: 4}}]\n"
    "search:\n  points: 2\n  space:\n"
    "    fusion_weight: {min: 0, max: 1}\n"
    "    train.labelled_weight: {values: [1, 2]}\n"
)


def test_a_file_stays_valid_when_methods_are_removed_from_its_grid(tmp_path):
    load(tmp_path, EVERY_PART)
    notes = notes_of(load(tmp_path, EVERY_PART.replace("[zero_shot, fpl, cpl, air]", "[cpl]")))
    assert "grid.images_per_class does not apply to cpl: the method pins it" in notes
    assert "overrides[0] applies to no cell: its condition never holds" in notes


# ---------------------------------------------------------------- relative folders


def test_a_relative_path_is_relative_to_the_file_and_in_an_option_to_the_working_directory(
    tmp_path, monkeypatch
):
    text = HEAD + (
        "grid: {dataset: ['folder:photos', 'folder:/data']}\nfixed: {method: cpl}\n"
        "overrides: [{when: {dataset: 'folder:photos'}, set: {shots: 1}}]\n"
    )
    (tmp_path / "sub").mkdir()
    monkeypatch.chdir(tmp_path)
    spec = load(Path("sub"), text)
    assert spec.folders == {"folder:photos": "folder:sub/photos"}
    assert cells_of(spec)[0].id == "photos-ul-text-cpl"  # does not depend on the location
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


def test_a_bare_name_is_looked_up_in_the_folders_of_sweeps(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("sweeps/mine", "sweeps/one/same", "sweeps/two/same", "sweeps/one/one", "yours"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / f"{name}.yaml").write_text(AIR)
    (tmp_path / "mine").mkdir()  # a folder of that name does not hide it
    for name, found in {
        "mine": "sweeps/mine.yaml",
        "mine.yaml": "sweeps/mine.yaml",
        "one": "sweeps/one/one.yaml",
        "yours": "yours.yaml",
        "other/file.yaml": "other/file.yaml",
        "paper_main": ROOT / "sweeps" / "paper" / "paper_main.yaml",
    }.items():
        assert find_sweep(name) == Path(found)
    (tmp_path / "mine.yaml").write_text(AIR)
    assert find_sweep("mine.yaml") == Path("mine.yaml")
    assert find_sweep("mine") == Path("sweeps/mine.yaml")
    with pytest.raises(SpecError, match=r"2 sweep files .*: sweeps/one/same.yaml, sweeps/two/same"):
        find_sweep("same")
    with pytest.raises(SpecError, match="no such file or sweep; did you mean quickstart"):
        find_sweep("quikstart")


def test_a_key_that_no_cell_uses_is_noted(tmp_path):
    fixed = write_sweep(tmp_path, "fixed", "fixed: {method: cpl, lora.steps: 10}\n")
    (note,) = notes_of(load_sweep(fixed))
    assert note.startswith("fixed.lora.steps: no cell uses it; allowed: remove it, or use methods ")
    axis = "grid: {lora.steps: [10, 20], method: [METHODS]}\n"
    noted = write_sweep(tmp_path, "noted", axis.replace("METHODS", "cpl, grip"))
    assert any(
        "grid.lora.steps: no cell uses it; " in n for n in notes_of(read_request(noted).spec)
    )
    used = write_sweep(tmp_path, "used", axis.replace("METHODS", "cpl, air"))
    selected = read_request(used, only=["method=cpl"]).spec
    assert len(cells_of(selected)) == 1
    assert notes_of(selected) == (
        "the sweep file with --only method=cpl; its other cells are left out",
        "2 combinations of the grid are 1 different cells",
    )
