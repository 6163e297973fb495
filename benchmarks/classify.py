"""Speed of a bundle that classifies a folder of images.

Baseline: a plain open_clip loop over single images: open, preprocess, encode, multiply with the
same class vectors. Both run in one process on the same files with the same number of threads, and
both must predict the same classes. `command_s` is the time of the command `airsweep classify` on
these files, including its start and the loading of CLIP.

    python benchmarks/classify.py [--images 1000] [--threads 2] [--repeats 3] [--photo]

The model is the tiny CLIP. The images are scikit-learn's digits as PNG of 32 px, or with --photo as
JPEG of 640 x 480 px, which spend most of the time in decoding. Times are the minimum over the
repeats. The last line is JSON: `ratio` is the wall time of the baseline divided by that of the
bundle, `ratio_cpu` the same for processor time. On a shared machine use `ratio_cpu` with
--threads 1.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[1]))

from air_core.backbone.loading import load_backbone
from air_core.bundle import load_bundle
from air_core.bundle.checks import TEST, TEXT
from air_core.bundle.manifest import weights_description, write_bundle
from air_core.classifiers import class_texts
from air_core.datasets import get_dataset
from air_core.weights import tiny_folder
from benchmarks.harness import Times, airsweep, measure_time, minimum_times, options, report


def zero_shot() -> tuple[dict[str, Any], dict[str, Any]]:
    """Arguments of `write_bundle` for the zero-shot classifier of the tiny CLIP on the digits."""
    digits, backbone = get_dataset("digits"), load_backbone("tiny")
    about = {
        "classnames": list(digits.classnames),
        "template": digits.template,
        "modality": "text",
        "prompt": None,
        "classifier": "text",
        "space": "probability",
        "temperatures": {},
        "backbone": {**weights_description("tiny"), "precision": "fp32"},
        "metrics": {"test/accuracy": 0.5},
        "test": {"dataset": digits.name, "digest": "d", "images": 2, "unseen": None},
        "lineage": {},
    }
    texts = class_texts(backbone, digits.classnames, digits.template).numpy()
    scale = np.array(backbone.logit_scale, dtype=np.float32)
    arrays = {
        TEXT: {"text_features": texts, "logit_scale": scale},
        TEST: {name: np.zeros(2, dtype=np.int32) for name in ("index", "text", "labels")},
    }
    return about, arrays


def images_in(folder: Path, count: int, photo: bool) -> list[Path]:
    every = get_dataset("digits").load(None).images
    folder.mkdir()
    files = []
    for number in range(count):
        image, file = every[number % len(every)], folder / f"{number:05}"
        if photo:
            file = file.with_suffix(".jpg")
            image.resize((640, 480), Image.Resampling.BICUBIC).save(file, quality=90)
        else:
            file = file.with_suffix(".png")
            image.save(file)
        files.append(file)
    return files


def one_at_a_time(bundle: Path, files: list[Path]) -> tuple[Times, list[str]]:
    """Classify in a plain open_clip loop, as in docs/results_guide.md: times and classes."""
    import open_clip
    from safetensors.torch import load_file

    model, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{tiny_folder()}")
    model.eval()
    texts = load_file(bundle / TEXT)
    names = json.loads((bundle / "bundle.json").read_text())["classnames"]
    found = []

    @torch.no_grad()
    def loop() -> None:
        for file in files:
            pixels = preprocess(Image.open(file).convert("RGB"))[None]
            features = model.encode_image(pixels, normalize=True)
            shares = (texts["logit_scale"] * features @ texts["text_features"].T).softmax(dim=-1)
            found.append(names[int(shares.argmax())])

    return measure_time(loop), found


def by_bundle(bundle: Path, files: list[Path]) -> tuple[Times, list[str]]:
    loaded, found = load_bundle(bundle), []
    spent = measure_time(lambda: found.extend(one.classname for one in loaded.stream(files)))
    return spent, found


def by_command(bundle: Path, files: list[Path]) -> tuple[Times, list[str]]:
    threads, printed = str(torch.get_num_threads()), []

    def run() -> None:
        words = ("classify", bundle, files[0].parent, "--json")
        printed.append(airsweep(*words, OMP_NUM_THREADS=threads))

    return measure_time(run), [one["class"] for one in json.loads(printed[0])]


IMPLEMENTATIONS = {"baseline_s": one_at_a_time, "bundle_s": by_bundle, "command_s": by_command}


def main() -> None:
    args = options(__doc__, images=1000, threads=2, repeats=3, photo=False)
    torch.set_num_threads(args.threads)
    times: dict[str, list[Times]] = {name: [] for name in IMPLEMENTATIONS}
    with tempfile.TemporaryDirectory() as folder:
        bundle = Path(folder) / "bundle"
        write_bundle(bundle, *zero_shot(), replace=False)
        files = images_in(Path(folder) / "new", args.images, args.photo)
        for _ in range(args.repeats):
            predictions = []
            for name, way in IMPLEMENTATIONS.items():
                seconds, classes = way(bundle, files)
                times[name].append(seconds)
                predictions.append(classes)
            assert predictions[0] == predictions[1] == predictions[2], "predictions differ"
    found = {name: minimum_times(of) for name, of in times.items()}
    (baseline, baseline_cpu), (bundle_s, bundle_cpu) = found["baseline_s"], found["bundle_s"]
    kind = "JPEG of 640 x 480 px" if args.photo else "PNG of 32 px"
    report(
        "classify",
        baseline / bundle_s,
        f"an open_clip loop, one image at a time, tiny CLIP, {kind}, {args.threads} threads",
        ratio_cpu=baseline_cpu / bundle_cpu,
        images=args.images,
        images_per_s=args.images / bundle_s,
        images_per_s_of_command=args.images / found["command_s"][0],
        images_per_cpu_s=args.images / bundle_cpu,
        **{name: wall for name, (wall, _) in found.items()},
    )


if __name__ == "__main__":
    main()
