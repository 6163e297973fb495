"""Speed of a bundle that classifies a folder of images: in Python, as a command, over Ray Data.

Baseline: a bare loop in a process of its own, `peer_scripts/classify_loop.py`, over the same
images, tower, preprocessing and batch size: threads, as many as torch uses, open and preprocess the
next batch while open_clip encodes one. All predict the same classes on the same number of threads.

    python benchmarks/classify.py [--images 2000] [--threads 2] [--repeats 3] [--photo]

The model is the tiny CLIP. The images are scikit-learn's digits as PNG of 32 px, or with --photo as
JPEG of 640 x 480 px, which spend most of the time in decoding. Ratios are medians over the repeats
of the baseline's time divided by airsweep's in the same repeat; times are minima, *_cpu are
processor times. The last line is JSON:

    ratio      `bundle.stream`, against the loop
    command    the process of `airsweep classify -o out.parquet`, against the process of the loop,
               both with their start (imports, loading CLIP)
    actor      an actor of Ray Data on as many cores, from its first block on, against the loop

On a shared machine use the ratios of processor times with --threads 1.
"""

from __future__ import annotations

import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
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
from air_core.bundle.manifest import weights_description, write_bundle
from air_core.classifiers import class_texts
from air_core.datasets import get_dataset
from air_core.models.weights import tiny_folder
from benchmarks.harness import (
    Times,
    environment,
    measure_time,
    minimum_times,
    options,
    progress,
    report,
)
from orchestrator.execution.classify import BLOCK, ClassifyJob, classify_on_ray
from orchestrator.reporting.classified import columns

Ways = tuple[dict[str, Times], list[str]]  # times by the way of classifying, and the classes


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


def by_loop(bundle: Path, files: list[Path]) -> Ways:
    """The bare loop: without and with the start of its process."""
    script = Path(__file__).parent / "peer_scripts" / "classify_loop.py"
    words = (script, tiny_folder(), bundle, files[0].parent, torch.get_num_threads())
    printed, whole = _process([sys.executable, *map(str, words)])
    found = json.loads(printed)
    return {"loop": tuple(found["times"]), "loop_process": whole}, found["classes"]


def _process(command: list[str]) -> tuple[str, Times]:
    """Run a process: its stdout and times."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    threads = environment(OMP_NUM_THREADS=str(torch.get_num_threads()))
    started = time.perf_counter()
    done = subprocess.run(command, check=True, env=threads, stdout=subprocess.PIPE, text=True)
    wall, after = time.perf_counter() - started, resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime
    return done.stdout, (wall, cpu)


def by_bundle(bundle: Path, files: list[Path]) -> Ways:
    loaded, found = load_bundle(bundle), list[str]()
    spent = measure_time(lambda: found.extend(one.classname for one in loaded.stream(files)))
    return {"bundle": spent}, found


def by_command(bundle: Path, files: list[Path]) -> Ways:
    output = bundle.with_name("out.parquet")
    words = ("classify", bundle, files[0].parent, "-o", output)
    _, spent = _process([sys.executable, "-m", "orchestrator", *map(str, words)])
    return {"command": spent}, pq.read_table(output)["class"].to_pylist()


def by_actor(bundle: Path, files: list[Path]) -> Ways:
    """One actor of Ray Data from its first block on, scaled to all images, and all of them from the
    start of Ray on."""
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
    return {"actor": (wall, cpu), "ray": (marks[-1][0] - begun, marks[-1][1])}, classes


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
    times: dict[str, list[Times]] = {}
    with tempfile.TemporaryDirectory() as folder:
        bundle = Path(folder) / "bundle"
        write_bundle(bundle, *zero_shot(), replace=False)
        files = images_in(Path(folder) / "new", args.images, args.photo)
        for _ in range(args.repeats):
            predictions = []
            for way in (by_loop, by_bundle, by_command, by_actor):
                spent, classes = way(bundle, files)
                predictions.append(classes)
                for name, one in spent.items():
                    times.setdefault(name, []).append(one)
                    progress(name, *one)
            assert all(classes == predictions[0] for classes in predictions), "predictions differ"
    (ratio, ratio_cpu), command, actor = (
        [
            statistics.median(base[clock] / own[clock] for base, own in zip(*pair, strict=True))
            for clock in (0, 1)
        ]
        for pair in (
            (times["loop"], times["bundle"]),
            (times["loop_process"], times["command"]),
            (times["loop"], times["actor"]),
        )
    )
    found = {name: minimum_times(of) for name, of in times.items()}
    kind = "JPEG of 640 x 480 px" if args.photo else "PNG of 32 px"
    report(
        "classify",
        ratio,
        f"a bare loop of threads and open_clip, tiny CLIP, {kind}, {args.threads} threads",
        ratio_cpu=ratio_cpu,
        command=command[0],
        command_cpu=command[1],
        actor=actor[0],
        actor_cpu=actor[1],
        images=args.images,
        images_per_s={name: args.images / wall for name, (wall, _) in found.items()},
        images_per_cpu_s={name: args.images / cpu for name, (_, cpu) in found.items()},
        **{f"{name}_s": wall for name, (wall, _) in found.items()},
        **{f"{name}_cpu_s": cpu for name, (_, cpu) in found.items()},
    )


if __name__ == "__main__":
    main()
