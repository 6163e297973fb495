"""Audit cards of folders of drawn digits: faults, files, filters, messages."""

from __future__ import annotations

import io
import json
import shutil
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
from PIL import Image

from air_core.datasets import get_dataset
from air_core.diffusion import load_generator
from air_core.diffusion.pipeline import PipelineGenerator
from air_core.models.weights import tiny_folder
from air_core.paradigms import make_split
from air_core.specs import GenerationSettings, SplitSettings
from orchestrator.planning import possible_trials, resolver_of
from orchestrator.planning.audit_card import AuditCard, AuditRow
from orchestrator.planning.cards import card_from_json, card_json, rows_of_sweep, stored_card
from orchestrator.planning.recorded import read_sweep
from orchestrator.planning.resolve import images_folder
from orchestrator.spec import cells_of, presets
from orchestrator.stages.auditor import make_card
from orchestrator.stages.audits import audit_cards
from orchestrator.stages.context import WorkerContext
from orchestrator.stages.features import build as build_features
from orchestrator.stages.images import build as build_image_block
from orchestrator.stages.pictures import SHEET_BYTES
from orchestrator.stages.trial import run_trial
from orchestrator.store import ArtifactStore, SweepLocation
from tests.helpers.sweeps import python

EACH = 16  # images a class
DIGITS = get_dataset("digits")
ZERO, ONE, TWO, THREE, FOUR, FIVE, SIX, SEVEN, EIGHT, NINE = DIGITS.classnames
BLACK = ((ZERO, 3), (FIVE, 12), (NINE, 15))
TWICE = ((TWO, 13, 8), (SIX, 9, 5))  # class, image, the image it repeats; the second as JPEG
SWAPPED = ((ZERO, 10, SEVEN, 4), (THREE, 11, EIGHT, 1))
WRONG = tuple(w for a, i, b, j in SWAPPED for w in ((a, i, b), (b, j, a)))  # last: true class
LEAK = (FOUR, 14)
PLANTED = {
    *((name, index, "blank") for name, index in BLACK),
    *((name, index, "duplicate") for name, index, _ in TWICE),
    *((name, index, "wrong class") for name, index, _ in WRONG),
    (*LEAK, "test copy"),
}
BODY = """
grid: {{method: [cpl, air]}}
fixed:
  generator: "folder:{folder}"
  images_per_class: {count}
  generation.block: 16
  generation.size: 32
  iterations: 1
  train.steps: 2
"""
NO_IMAGES = """
grid: {{method: [zero_shot, cpl]}}
"""


def save_image(image: Image.Image, folder: Path, classname: str, index: int) -> None:
    (folder / classname).mkdir(parents=True, exist_ok=True)
    image.save(folder / classname / f"{index:03}.png")


@pytest.fixture(scope="module")
def drawn(tmp_path_factory) -> Path:
    """Digits drawn by the embedded diffusion model, 16 in each class."""
    folder = tmp_path_factory.mktemp("drawn")
    flat = presets.defaults("air", {})
    settings = {k.partition(".")[2]: v for k, v in flat.items() if k.startswith("generation.")}
    generator = PipelineGenerator(
        tiny_folder().parent / "diffusion", GenerationSettings(**settings)
    )
    for name in DIGITS.classnames:
        pixels = generator.generate(name, range(EACH), [0] * EACH)
        for index, image in enumerate(pixels.numpy()):
            save_image(Image.fromarray(image), folder, name, index)
    return folder


@pytest.fixture(scope="module")
def planted(drawn, tmp_path_factory) -> Path:
    """Drawn digits with ten faults."""
    folder = tmp_path_factory.mktemp("planted") / "images"
    shutil.copytree(drawn, folder)
    examples = DIGITS.load(None)
    split = make_split(examples.labels, examples.parts, SplitSettings(pool="train"))
    for name, index in BLACK:
        save_image(Image.new("RGB", (32, 32)), folder, name, index)
    for (name, index, of), form in zip(TWICE, ("PNG", "JPEG"), strict=True):
        buffer = io.BytesIO()
        Image.open(folder / name / f"{of:03}.png").save(buffer, form, quality=90)
        save_image(Image.open(buffer), folder, name, index)
    for a, i, b, j in SWAPPED:
        first, second = folder / a / f"{i:03}.png", folder / b / f"{j:03}.png"
        content = first.read_bytes()
        first.write_bytes(second.read_bytes())
        second.write_bytes(content)
    c = DIGITS.classnames.index(LEAK[0])
    i = split.test[examples.labels[split.test] == c][7]
    save_image(examples.images[int(i)], folder, *LEAK)
    return folder


@dataclass
class World:
    """A store with features of the digits and encoded rows of ready images."""

    store: ArtifactStore

    def record(self, name: str, folder: Path, body: str = BODY) -> SweepLocation:
        """Record a sweep as the driver does at its start."""
        location = SweepLocation(self.store, "default", name, None)
        location.event_log().lock()
        text = body.format(folder=folder, count=EACH)
        (location.folder / "spec.yaml").write_text(f"version: 1\nname: {name}\n{text}")
        (location.folder / "resolved.json").write_text("{}")
        location.event_log().append("sweep_started", total=1)
        return location

    def rows(self, location: SweepLocation) -> list[AuditRow]:
        rows = rows_of_sweep(*read_sweep(location, None))
        return [row for row in rows if isinstance(row, AuditRow)]

    def draw(self, location: SweepLocation) -> AuditRow:
        [row] = self.rows(location)
        worker = WorkerContext(self.store)
        build_features(row.features, worker)
        images = row.row.images
        generator = load_generator(images, images_folder(images.model.name), None)
        for c, block in row.requirements[0].missing(self.store):
            build_image_block(row.row, c, block, worker, lambda: generator)
        return row


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> World:
    return World(ArtifactStore(tmp_path_factory.mktemp("store")))


@pytest.fixture(scope="module")
def faulty(world, planted) -> SweepLocation:
    location = world.record("faulty", planted)
    world.draw(location)
    return location


def images_card(location: SweepLocation) -> AuditCard:
    [card] = [
        card for card in audit_cards(*read_sweep(location, None)) if isinstance(card, AuditCard)
    ]
    return card


# ---------------------------------------------------------------- faults


def test_all_planted_faults_are_flagged_and_few_other_images(world, faulty, command):
    command_line = ("audit", "faulty", "--store", world.store.root)
    code, out, _ = command(*command_line, "--json")
    assert code == 0
    [card] = [card for card in json.loads(out) if card["kind"] == "images"]
    flagged = {(f["class"], f["index"], f["reason"]) for f in card["flagged"]}
    assert flagged >= PLANTED
    assert card["images"] == EACH * 10
    assert len(flagged - PLANTED) <= 0.02 * card["images"], sorted(flagged - PLANTED)
    faults = {(f["class"], f["index"]): f for f in card["flagged"]}
    for name, index, reason in PLANTED:
        fault = faults[name, index]
        assert fault["file"] == f"{name}/{index:03}.png"
        assert fault["sentence"].startswith(f"{name!r}: image {index} ({name}/{index:03}.png) ")
        assert (fault["value"] is not None) == (reason != "not a number")
    for name, index, of in TWICE:
        assert f"repeats image {of} ({name}/{of:03}.png)" in faults[name, index]["sentence"]
    for name, index, looks_like in WRONG:
        assert f"looks like {looks_like!r}" in faults[name, index]["sentence"]


def test_the_screen_has_80_columns_and_the_same_counts(world, faulty, command):
    code, out, _ = command("audit", "faulty", "--store", world.store.root)
    assert code == 0
    lines = out.splitlines()
    assert all(len(line) <= 80 for line in lines if "/" not in line)  # paths are not wrapped
    flat = " ".join(out.split())
    assert "3 blank, 2 duplicate, 4 wrong class" in flat
    assert "copies: 1" in flat
    assert str(faulty.folder) in out


def test_an_audit_says_what_synthetic_images_know_and_mentions_no_evidence(world, faulty, command):
    code, out, _ = command("audit", "faulty", "--store", world.store.root, "--json")
    assert code == 0
    [card] = [card for card in json.loads(out) if card["kind"] == "agreement"]
    assert [entry["name"] for entry in card["classifiers"]] == ["text", "synthetic images"]
    assert [entry["methods"] for entry in card["classifiers"]] == [["air"], ["air"]]
    assert [entry["method"] for entry in card["fused"]] == ["air"]
    assert 0 < card["fused"][0]["changed"] <= card["fused"][0]["disputed"]
    assert card["fused"][0]["disputed"] == pytest.approx(1 - card["agreement"][0][1])
    _, out, _ = command("audit", "faulty", "--store", world.store.root)
    assert "synthetic images" in out
    assert "vidence scores" not in out


def test_a_card_has_a_line_for_each_class_with_its_best_and_worst_image(world, faulty):
    card = images_card(faulty)
    assert [line["classname"] for line in card.classes] == list(DIGITS.classnames)
    assert sum(line["flagged"] for line in card.classes) == card.flagged_images
    swapped = {(name, index) for name, index, _ in WRONG}
    worst = {(line["classname"], line["worst"]) for line in card.classes}
    assert swapped & worst
    assert not swapped & {(line["classname"], line["best"]) for line in card.classes}


def test_the_report_has_the_audits_of_images_and_classifiers(world, faulty, command, tmp_path):
    audit_cards(*read_sweep(faulty, None))
    sweep, location = read_sweep(faulty, None)
    for trial in possible_trials(cells_of(sweep), [{"seed": 1}], resolver_of(location)):
        run_trial(trial, world.store)
    file = tmp_path / "report.html"
    assert command("report", "faulty", "-o", file, "--store", world.store.root)[0] == 0
    text = file.read_text()
    assert "Before training: 1,797 real digits, split 0" in text
    assert '<td class="">synthetic images</td>' in text
    assert "Audit" in text


# ---------------------------------------------------------------- files of a card


def test_the_same_images_give_the_same_card_and_json_can_be_read_back(world, faulty):
    [row] = world.rows(faulty)
    (one, png), (other, again) = (make_card(row, WorkerContext(world.store)) for _ in range(2))
    assert card_json(one) == card_json(other)
    assert png == again
    assert len(png) < SHEET_BYTES
    assert Image.open(io.BytesIO(png)).width < 1000
    assert card_json(card_from_json(card_json(one), AuditCard)) == card_json(one)


SCRIPT = """
import sys
from orchestrator.__main__ import main
sys.argv = ["airsweep", "audit", "faulty", "--store", sys.argv[1]]
try:
    main()
finally:
    print(*sorted({"torch", "ray", "mlflow"} & set(sys.modules)), file=sys.stderr)
"""


def test_a_card_is_stored_in_the_sweep_folder_and_read_without_torch(world, faulty):
    audit_cards(*read_sweep(faulty, None))
    [row] = world.rows(faulty)
    files = {file.name: file for file in faulty.folder.glob("audit-*")}
    assert {f"{row.name}.json", f"{row.name}.png"} <= files.keys()
    before = files[f"{row.name}.json"].stat().st_mtime_ns
    done = python("-c", SCRIPT, world.store.root)
    assert "3 blank, 2 duplicate" in " ".join(done.stdout.split())
    assert done.stderr.split() == []
    assert files[f"{row.name}.json"].stat().st_mtime_ns == before


def test_a_card_of_fewer_images_or_of_a_damaged_file_is_made_again(world, faulty):
    audit_cards(*read_sweep(faulty, None))
    [row] = world.rows(faulty)
    assert stored_card(row, faulty) is not None
    assert stored_card(replace(row, images_per_class=EACH + 1), faulty) is None
    assert stored_card(replace(row, splits=(SplitSettings(split_seed=1),)), faulty) is None
    file = faulty.folder / f"{row.name}.json"
    text = file.read_text()
    file.write_text(text[: len(text) // 2])
    assert stored_card(row, faulty) is None
    card = images_card(faulty)
    assert file.read_text() == text == card_json(card)


# ---------------------------------------------------------------- the filter


def test_a_filter_keeps_as_many_images_in_a_trial_as_the_card_states(
    world, faulty, planted, resolver
):
    card = images_card(faulty)
    sweep, location = read_sweep(faulty, None)
    _, trial = possible_trials(cells_of(sweep), [{"seed": 1}], resolver_of(location))
    filters = {
        "fidelity.min_margin: 0": {"min_margin": 0.0},
        "fidelity.duplicates: drop": {"duplicates": "drop"},
    }
    held = card.images - card.counts["blank"]
    assert run_trial(trial, world.store).metrics["synthetic/images"] == held
    assert filters.keys() == card.kept.keys()
    for name, setting in filters.items():
        filtered = replace(trial, fidelity=replace(trial.fidelity, **setting))
        used = run_trial(filtered, world.store).metrics["synthetic/images"]
        assert used == card.kept[name] < held


# ---------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("unknown", "no sweep default/unknown in"),
        ("none", "no denoising evidence (cpl, zero_shot), so there is nothing to audit"),
        ("undrawn", "are not made yet: 0 of 10 blocks"),
    ],
)
def test_a_sweep_that_cannot_be_audited_gets_one_sentence_and_exit_code_2(
    world, drawn, command, name, message, tmp_path
):
    if name == "none":
        world.record(name, drawn, NO_IMAGES)
    if name == "undrawn":
        other = tmp_path / "other"
        shutil.copytree(drawn, other)
        save_image(Image.new("RGB", (32, 32), "red"), other, ZERO, 0)
        world.record(name, other)
    code, out, err = command("audit", name, "--store", world.store.root)
    assert (code, out) == (2, "")
    assert err.startswith("airsweep: ")
    assert len(err.splitlines()) == 1
    assert message in err
