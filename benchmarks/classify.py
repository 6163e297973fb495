"""Speed of a bundle that classifies a folder of images: in Python, as a command, and over Ray Data.

Baseline: a bare loop over the same images, tower, preprocessing and batch size: threads, as many as
torch uses, open and preprocess the next batch while open_clip encodes one. All predict the same
classes on the same number of threads.

    python benchmarks/classify.py [--images 2000] [--threads 2] [--repeats 3] [--photo]

The model is the tiny CLIP. The images are scikit-learn's digits as PNG of 32 px, or with --photo as
JPEG of 640 x 480 px, which spend most of the time in decoding. Times are the minimum over the
repeats, *_cpu are processor times. The last line is JSON:

    ratio      time of the baseline divided by that of `bundle.stream`
    command    the same for `airsweep classify -o out.parquet`, without start_s
    whole      the same with its start (imports, loading CLIP), which `start_s` is: one image
    actor      the same for an actor of Ray Data on as many cores, from its first block on

On a shared machine use the ratios of processor times with --threads 1.
"""

from __future__ import annotations

import json
import os
import resource
import shutil
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow.parquet as pq
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[1]))

from air_core.backbone.loading import load_backbone
from air_core.bundle import load_bundle
from air_core.bundle.checks import TEST, TEXT
from air_core.bundle.classifier import STEP
from air_core.bundle.manifest import weights_description, write_bundle
from air_core.classifiers import class_texts
from air_core.datasets import get_dataset
from air_core.weights import tiny_folder
from benchmarks.harness import (
    Times,
    airsweep,
    measure_time,
    minimum_times,
    options,
    progress,
    report,
)
from orchestrator.execution.classify import BLOCK, ClassifyJob, classify_on_ray
from orchestrator.reporting.classified import columns


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


def bare_loop(bundle: Path, files: list[Path]) -> tuple[Times, list[str]]:
    """Classify in a plain loop of threads and open_clip: times and classes."""
    import open_clip
    from safetensors.torch import load_file

    model, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{tiny_folder()}")
    model.eval()
    texts = load_file(bundle / TEXT)
    names = json.loads((bundle / "bundle.json").read_text())["classnames"]
    found = []

    def pixels(file: Path) -> torch.Tensor:
        return preprocess(Image.open(file).convert("RGB"))

    @torch.no_grad()
    def loop() -> None:
        with ThreadPoolExecutor(torch.get_num_threads()) as pool:
            batches = [files[i : i + STEP] for i in range(0, len(files), STEP)]
            following = [pool.submit(pixels, file) for file in batches[0]]
            for ahead in [*batches[1:], []]:
                batch, following = following, [pool.submit(pixels, file) for file in ahead]
                images = torch.stack([future.result() for future in batch])
                features = model.encode_image(images, normalize=True)
                logits = texts["logit_scale"] * features @ texts["text_features"].T
                found.extend(names[i] for i in logits.softmax(dim=-1).argmax(dim=-1).tolist())

    return measure_time(loop), found


def by_bundle(bundle: Path, files: list[Path]) -> tuple[Times, list[str]]:
    loaded, found = load_bundle(bundle), []
    spent = measure_time(lambda: found.extend(one.classname for one in loaded.stream(files)))
    return spent, found


def by_command(bundle: Path, files: list[Path]) -> tuple[Times, list[str]]:
    """`airsweep classify -o`: times with the start of the process, and classes."""
    threads = str(torch.get_num_threads())
    output = bundle.with_name("out.parquet")
    words = ("classify", bundle, *(files if len(files) == 1 else [files[0].parent]), "-o", output)
    before = _cpu_of_children()
    wall, _ = measure_time(lambda: airsweep(*words, OMP_NUM_THREADS=threads))
    return (wall, _cpu_of_children() - before), pq.read_table(output)["class"].to_pylist()


def _cpu_of_children() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def by_actor(bundle: Path, files: list[Path]) -> tuple[Times, list[str], float]:
    """One actor of Ray Data from its first block on: times, scaled to all images; the classes; and
    the seconds from the start of Ray to the end of the first block."""
    output = bundle.with_name("ray.parquet")
    shutil.rmtree(output, ignore_errors=True)
    names = columns(1, labelled=False)
    job = ClassifyJob(bundle, None, "cpu", None, 0.0, "torch", names, files, {}, output)
    os.environ |= {"RAY_worker_niceness": "0", "RAY_ADDRESS": ""}
    cores = os.sched_getaffinity(0)
    # Ray uses as many cores as this process may use.
    os.sched_setaffinity(0, sorted(cores)[: torch.get_num_threads()])
    ended = threading.Event()
    marks: list[Times] = []  # at the end of each block: wall and processor time

    def watch() -> None:
        while not ended.wait(0.01) or len(marks) < job.blocks:
            if job.blocks - len(job.missing()) > len(marks):
                marks.append((time.perf_counter(), _cpu_of_actors()))

    watcher = threading.Thread(target=watch)
    begun = time.perf_counter()
    watcher.start()
    for _ in classify_on_ray(job):
        pass
    ended.set()
    watcher.join()
    os.sched_setaffinity(0, cores)
    share = (len(files) - BLOCK) / len(files)
    wall, cpu = ((last - first) / share for first, last in zip(marks[0], marks[-1], strict=True))
    tables = [pq.read_table(job.part(index), columns=["class"]) for index in range(job.blocks)]
    classes = [row["class"] for table in tables for row in table.to_pylist()]
    return (wall, cpu), classes, marks[0][0] - begun


def _cpu_of_actors() -> float:
    spent = 0.0
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.Error):
            if "MapWorker" in " ".join(process.cmdline()):
                spent += sum(process.cpu_times()[:2])
    return spent


def main() -> None:
    args = options(__doc__, images=2000, threads=2, repeats=3, photo=False)
    torch.set_num_threads(args.threads)
    ways = {"baseline": bare_loop, "bundle": by_bundle, "command": by_command, "actor": by_actor}
    times: dict[str, list[Times]] = {name: [] for name in (*ways, "start")}
    first_blocks = []
    with tempfile.TemporaryDirectory() as folder:
        bundle = Path(folder) / "bundle"
        write_bundle(bundle, *zero_shot(), replace=False)
        files = images_in(Path(folder) / "new", args.images, args.photo)
        for _ in range(args.repeats):
            predictions = []
            for name, way in ways.items():
                seconds, classes, *first_block = way(bundle, files)
                times[name].append(seconds)
                predictions.append(classes)
                first_blocks += first_block
                progress(name, *seconds)
            assert all(classes == predictions[0] for classes in predictions), "predictions differ"
            times["start"].append(by_command(bundle, files[:1])[0])
    found = {name: minimum_times(of) for name, of in times.items()}
    whole, start = found["command"], found["start"]
    found |= {"whole": whole, "command": (whole[0] - start[0], whole[1] - start[1])}
    ratios = {
        name: [base / own for base, own in zip(found["baseline"], found[name], strict=True)]
        for name in ("bundle", "command", "whole", "actor")
    }
    kind = "JPEG of 640 x 480 px" if args.photo else "PNG of 32 px"
    report(
        "classify",
        ratios["bundle"][0],
        f"a bare loop of threads and open_clip, tiny CLIP, {kind}, {args.threads} threads",
        ratio_cpu=ratios["bundle"][1],
        **{name: ratios[name][0] for name in ("command", "whole", "actor")},
        **{f"{name}_cpu": ratios[name][1] for name in ("command", "whole", "actor")},
        images=args.images,
        images_per_s=args.images / found["bundle"][0],
        images_per_cpu_s=args.images / found["bundle"][1],
        parquet_s=whole[0],
        ray_first_block_s=min(first_blocks),
        **{f"{name}_s": found[name][0] for name in ("baseline", "bundle", "actor", "start")},
        **{f"{name}_cpu_s": cpu for name, (_, cpu) in found.items()},
    )


if __name__ == "__main__":
    main()
