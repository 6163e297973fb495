"""Bundles outside of torch: `model.onnx`, the program of docs/deploy.md, models in MLflow."""

from __future__ import annotations

import base64
import json
import sys
from io import BytesIO
from pathlib import Path

import pytest
from PIL import Image

from air_core.bundle.manifest import MANIFEST
from air_core.datasets import get_dataset
from orchestrator.api import recorded_sweep
from orchestrator.store import ArtifactStore, SweepLocation
from orchestrator.tracking import Publisher
from orchestrator.tracking.models import register_bundle
from tests.helpers.documents import ROOT, blocks
from tests.helpers.features import encode
from tests.helpers.outcomes import record_sweep, trained
from tests.helpers.servers import free_port
from tests.helpers.sweeps import run_command

SWEEP = """
grid: {method: [zero_shot, zero_shot_real]}
seeds: [1]
"""
ROUNDING = 1e-4


@pytest.fixture(scope="module")
def location(tmp_path_factory, tiny_clip, resolver) -> SweepLocation:
    """A finished sweep in a store; zero_shot_real has a fused classifier."""
    store = ArtifactStore(tmp_path_factory.mktemp("done") / "runs")
    encode(resolver.trial({"precision": "fp32", "images_per_class": 0}).features, store)
    return record_sweep(store.root, "small", SWEEP, trained)


@pytest.fixture
def export(command, location, tmp_path):
    def run(*more: str | Path, code: int = 0) -> str:
        words = ("export", "best", "--sweep", "small", "-o", tmp_path / "bundle", *more)
        found, _, stderr = command(*words, "--store", location.store.root)
        assert found == code, stderr
        return stderr

    return run


@pytest.fixture
def photos(tmp_path) -> Path:
    """Digits of different sizes and formats, one with an orientation in its EXIF data."""
    folder = tmp_path / "photos"
    folder.mkdir()
    sizes = [(32, 32), (64, 40), (40, 97), (33, 31), (200, 333), (500, 64)]
    images = get_dataset("digits").load(None).images
    for number, size in enumerate(sizes):
        image = images[number].resize(size, Image.Resampling.BICUBIC)
        if number % 2:
            image.save(folder / f"{number}.jpg", quality=95)
        else:
            image.save(folder / f"{number}.png")
    exif = Image.Exif()
    exif[0x0112] = 6
    images[9].save(folder / "turned.jpg", exif=exif)
    return folder


def classified(command, bundle: Path, photos: Path, *more: str) -> dict[str, dict[str, float]]:
    """Probabilities by class, by file name."""
    words = ("classify", bundle, photos, "--json", "--topk", "10", *more)
    code, stdout, stderr = command(*words)
    assert code == 0, stderr
    ranks = ["", *(f"_{rank}" for rank in range(2, 11))]
    return {
        Path(row["path"]).name: {row[f"class{rank}"]: row[f"probability{rank}"] for rank in ranks}
        for row in json.loads(stdout)
    }


def assert_close(found: dict[str, dict[str, float]], expected: dict[str, dict[str, float]]) -> None:
    assert found.keys() == expected.keys()
    for name, probabilities in expected.items():
        assert found[name] == pytest.approx(probabilities, abs=ROUNDING)
        assert max(found[name], key=found[name].get) == max(probabilities, key=probabilities.get)


# ---------------------------------------------------------------- the file


def test_onnxruntime_gives_the_classes_of_torch(export, command, tmp_path, photos):
    stderr = export("--onnx", "--classifier", "fused")
    assert "onnx:     fused classifier; probabilities differ from torch by at most" in stderr
    assert "predictions on test images are those of the trial" in stderr
    bundle = tmp_path / "bundle"
    by_torch = classified(command, bundle, photos)
    assert_close(classified(command, bundle, photos, "--runtime", "onnx"), by_torch)

    by_program = python_without_torch(program(), *sorted(photos.iterdir()), cwd=tmp_path)
    found = [line.split("\t") for line in by_program.splitlines()]
    assert {Path(file).name for file, _, _ in found} == by_torch.keys()
    for file, name, probability in found:
        expected = by_torch[Path(file).name]
        assert name == max(expected, key=expected.get)
        assert float(probability) == pytest.approx(expected[name], abs=ROUNDING)

    words = ("classify", bundle, photos, "--runtime", "onnx")
    code, _, stderr = command(*words, "--classifier", "text")
    assert (code, "model.onnx contains the fused classifier; use --runtime" in stderr) == (2, True)


def program() -> str:
    """The program of docs/deploy.md."""
    page = blocks(ROOT / "docs" / "deploy.md")
    [text] = [block.text for block in page if block.language == "python"]
    return text


WITHOUT_TORCH = """
import sys
class Blocked:
    def find_spec(self, name, path=None, target=None):
        blocked = ("torch", "torchvision", "open_clip", "air_core", "orchestrator", "airsweep")
        if name.partition(".")[0] in blocked:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Blocked())
"""


def python_without_torch(text: str, *arguments: Path, cwd: Path) -> str:
    """Stdout of a program in a process that has neither torch nor airsweep."""
    words = [sys.executable, "-c", WITHOUT_TORCH + text, *map(str, arguments)]
    return run_command(words, True, cwd=cwd).stdout


def test_a_file_that_the_bundle_lacks_is_explained(export, command, tmp_path, photos, monkeypatch):
    export("--classifier", "text")
    code, _, stderr = command("classify", tmp_path / "bundle", photos, "--runtime", "onnx")
    assert (code, "has no model.onnx; export it again with --onnx" in stderr) == (2, True)
    before = (tmp_path / "bundle" / MANIFEST).read_bytes()
    monkeypatch.setitem(sys.modules, "onnxscript", None)  # as if it were not installed
    stderr = export("--onnx", "--force", code=2)
    assert "needs the package onnxscript" in stderr
    assert "pip install onnx onnxruntime onnxscript" in stderr
    assert (tmp_path / "bundle" / MANIFEST).read_bytes() == before


# ---------------------------------------------------------------- models in MLflow


SERVED = """
import json
import mlflow
import pandas
model = mlflow.pyfunc.load_model("models:/digits/1")
def answer(images, **params):
    return model.predict(pandas.DataFrame({"image": images}), params)
good, bad = json.load(open(sys.argv[1]))
refused = []
for image in bad:
    try:
        answer([good[0], image])
    except mlflow.MlflowException as problem:
        refused.append([problem.get_http_status_code(), problem.message])
print(json.dumps([answer(good, topk=10), answer(good[:1], topk=1), refused]))
"""


def test_a_registered_model_classifies_images_without_torch(
    export, command, location, photos, tmp_path, monkeypatch
):
    uri = f"sqlite:///{location.store.root}/mlflow.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    ledger, location = recorded_sweep("small", location.store.root, None)
    Publisher(ledger.about, location, uri).export()
    stderr = export("--register", "digits")
    assert "`mlflow models serve -m models:/digits/1 --env-manager local`" in stderr

    files, tiff, huge = sorted(photos.iterdir()), BytesIO(), BytesIO()
    Image.new("L", (8, 8)).save(tiff, "TIFF")
    Image.new("1", (10_000, 6_000)).save(huge, "PNG")
    good = [encoded(file.read_bytes()) for file in files]
    bad = ["no base64!", encoded(tiff.getvalue()), encoded(huge.getvalue())]
    images = tmp_path / "images.json"
    images.write_text(json.dumps([good, bad]))
    answers, [one], refused = json.loads(python_without_torch(SERVED, images, cwd=tmp_path))
    found = {
        file.name: {top["class"]: top["probability"] for top in each["top"]}
        for file, each in zip(files, answers, strict=True)
    }
    assert_close(found, classified(command, tmp_path / "bundle", photos))
    best = found[files[0].name]
    assert answers[0]["class"] == answers[0]["top"][0]["class"] == max(best, key=best.get)
    assert one["top"] == answers[0]["top"][:1]
    assert refused == [
        [400, "image 1 is not base64: encode the bytes of a JPEG or PNG file"],
        [400, "image 1 cannot be read: not an image of an allowed format (JPEG, PNG), or its "
         "header is damaged"],
        [400, "image 1 cannot be read: it is too large, over 50,000,000 pixels; make it smaller"],
    ]  # fmt: skip


def encoded(content: bytes) -> str:
    return base64.b64encode(content).decode()


def test_an_outage_or_an_unrecorded_trial_leaves_the_bundle_and_says_how_to_register_it(
    export, command, photos, tmp_path, monkeypatch
):
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    uri = f"http://127.0.0.1:{free_port()}"
    for name in ("a/b", "..", " "):
        assert "the name of a model" in export("--register", name, "--tracking-uri", uri, code=2)
    assert not (tmp_path / "bundle").exists()
    stderr = export("--register", "digits", "--tracking-uri", uri, code=3)
    assert f"MLflow at {uri} does not answer" in stderr
    later = f"The bundle in {tmp_path / 'bundle'} is complete: to register it later"
    assert later in stderr
    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    with pytest.raises(ValueError, match=f"has no run of the trial .*`airsweep run`.*{later}"):
        register_bundle(tmp_path / "bundle", "digits", uri, tmp_path)
    assert len(classified(command, tmp_path / "bundle", photos, "--runtime", "onnx")) == 7
