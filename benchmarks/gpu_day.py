"""A day on one GPU: checks, the sweep `sweeps/gpu_day.yaml`, and the work of stages on the device.

The steps are a check of the machine, a smoke run, a plan with measured hours, the run, its table,
and `device.py`. The output of each goes to a file in --out, and all of it to
`report.md`, one file to attach to an issue. A step that has succeeded is not repeated, so after an
interruption the same command continues.

    make gpu-day GPU_DAY="--data-root /data --store /data/runs"
    python benchmarks/gpu_day.py --dataset flowers102 --generator /models/sd15 --data-root /data

--set takes further settings of the sweep, such as `seeds=[1]`. The last line is JSON: `ratio` is
that of `device.py`, `steps` has the seconds of each step.

--rehearse needs no GPU and no download: two methods with Stable Diffusion 1.5 and CLIP ViT-B/32 at
their full size and with random weights, written to build/rehearsal once, on 30 photographs, and an
export with ONNX. It needs 6 GB of disk and two processes' memory of such models. `ratio` is then
the share of the time that generators were busy, and `waits` how often one waited for another.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.harness import ROOT, environment, options, progress, report

SWEEP = ROOT / "sweeps" / "gpu_day.yaml"
DONE = "exit code 0 after "  # begins the last line of a step that has succeeded
REHEARSAL: dict[str, Any] = {
    "grid.method": ["air", "cpl_real_evidence"],
    "seeds": [1],
    **dict.fromkeys(("resources.trial.gpu", "resources.generator.gpu"), 0),
    **dict.fromkeys(("resources.trial.cpu", "resources.generator.cpu"), 1),
    "generation.size": 256, "generation.num_inference_steps": 2, "generation.block": 2,
    "images_per_class": 4, "lora.steps": 2, "lora.batch": 1, "initial_labels.k": 2,
    "evidence.images": 6, "evidence.draws": 2, "evidence.top": 2, "evidence.block": 2,
    "iterations": 2, "train.steps": 20,
}  # fmt: skip
CARD = """
import torch
if torch.cuda.is_available():
    card = torch.cuda.get_device_properties(0)
    print(f"{card.name}, {card.total_memory / 2**30:.0f} GiB, CUDA {torch.version.cuda}")
else:
    print("no GPU")
"""


def write_rehearsal(folder: Path) -> None:
    """Write models with random weights, and noise as photographs."""
    import diffusers
    import numpy as np
    import open_clip
    import torch
    import transformers
    from PIL import Image
    from safetensors.torch import save_file

    from air_core.models.weights import generator_folder

    torch.manual_seed(0)
    tokenizer = transformers.CLIPTokenizer.from_pretrained(generator_folder("tiny") / "tokenizer")
    text = transformers.CLIPTextConfig(
        hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    diffusers.StableDiffusionPipeline(
        vae=diffusers.AutoencoderKL(
            block_out_channels=(128, 256, 512, 512), layers_per_block=2, sample_size=512,
            down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
        ),
        text_encoder=transformers.CLIPTextModel(text),
        tokenizer=tokenizer,
        unet=diffusers.UNet2DConditionModel(
            sample_size=64, cross_attention_dim=768, attention_head_dim=8,
        ),
        scheduler=diffusers.PNDMScheduler(
            beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1,
            skip_prk_steps=True,
        ),
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    ).save_pretrained(folder / "sd")  # fmt: skip
    clip = open_clip.create_model("ViT-B-32-quickgelu")
    save_file(
        {name: part.clone() for name, part in clip.state_dict().items()},
        folder / "clip.safetensors",
    )
    rng = np.random.default_rng(0)
    for number in range(30):
        pixels = rng.integers(0, 128, (6, 8, 3), dtype=np.uint8)
        pixels[..., number % 3] += 100
        file = folder / "photographs" / ("cat", "dog", "fox")[number % 3] / f"{number}.jpg"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).resize((640, 480), Image.Resampling.BICUBIC).save(file)
    (folder / "complete").touch()


def rehearse(arguments: Any) -> None:
    """Set the options of a rehearsal."""
    folder = ROOT / "build" / "rehearsal"
    if not (folder / "complete").exists():
        progress(f"writing 5 GB of random weights to {folder}")
        # In a process of its own, which returns the memory.
        write = multiprocessing.get_context("spawn").Process(target=write_rehearsal, args=(folder,))
        write.start()
        write.join()
    arguments.dataset, arguments.generator = f"folder:{folder / 'photographs'}", folder / "sd"
    arguments.backbone = f"ViT-B-32-quickgelu@{folder / 'clip.safetensors'}"
    settings = [f"{key}={json.dumps(value)}" for key, value in REHEARSAL.items()]
    arguments.set = [*settings, *arguments.set]
    arguments.store, arguments.out = str(folder / "runs"), str(folder / "day")


def report_rehearsal(folder: Path, store: str, steps: Sequence[str]) -> None:
    outcome = json.loads(Path(store, "sweeps", "default", "gpu_day", "outcome.json").read_text())
    pools = [pool for pool in outcome["run"]["pools"] if pool["process"] == "generator"]
    busy = sum(pool["busy"] for pool in pools) / sum(pool["held"] for pool in pools)
    waits = (folder / "run.txt").read_text().count(" to make it (")
    took = {step: seconds(folder / f"{step}.txt") for step in steps}
    report("gpu_day --rehearse", busy, "the whole time of the generators", waits=waits, steps=took)


def steps_of(arguments: Any) -> dict[str, list[str]]:
    """Commands by name, in their order."""
    named = {"dataset": arguments.dataset, "generator": arguments.generator}
    named["backbone"] = arguments.backbone
    settings = [f"{key}={value}" for key, value in named.items() if value] + arguments.set
    sweep = [str(SWEEP), *(word for setting in settings for word in ("--set", setting))]
    sweep += ["--store", arguments.store]
    data = ["--data-root", arguments.data_root] if arguments.data_root else []
    airsweep = [sys.executable, "-m", "orchestrator"]
    device = "cuda" if card() != "no GPU" else "cpu"
    if arguments.rehearse:
        export = [*airsweep, "export", "best", "--sweep", "gpu_day", "--store", arguments.store]
        return {
            "check": [*airsweep, "plan", *sweep, "--check"],
            "run": [*airsweep, "run", *sweep],
            "table": [*airsweep, "table", "gpu_day", "--store", arguments.store],
            "export": [*export, "--force", "--onnx", "-o", f"{arguments.out}/bundle"],
        }
    return {
        "check": [*airsweep, "plan", *sweep, *data, "--check"],
        "smoke": [*airsweep, "run", *sweep, *data, "--smoke"],
        "plan": [*airsweep, "plan", *sweep, *data],
        "run": [*airsweep, "run", *sweep, *data],
        "table": [*airsweep, "table", "gpu_day", "--store", arguments.store],
        "device": [sys.executable, str(ROOT / "benchmarks" / "device.py"), "--device", device],
    }


@cache
def card() -> str:
    """Name and memory of the GPU."""
    return subprocess.check_output(
        [sys.executable, "-c", CARD], text=True, env=environment()
    ).strip()


def is_done(file: Path) -> bool:
    return file.is_file() and file.read_text().rstrip().rpartition("\n")[2].startswith(DONE)


def run_step(command: Sequence[str], file: Path) -> int:
    """Run a command, with its output on the terminal and in a file; returns its exit code."""
    started = time.monotonic()
    with (
        file.open("w") as out,
        subprocess.Popen(
            command,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        ) as process,
    ):
        assert process.stdout is not None
        for line in process.stdout:
            out.write(line)
            progress(line.rstrip())
        code = process.wait()
        out.write(f"exit code {code} after {time.monotonic() - started:.0f} s\n")
    return code


def write_report(folder: Path, steps: Sequence[str], arguments: Any) -> None:
    """Put the outputs of all steps so far into one file."""
    lines = ["# GPU day", "", f"- {card()}", f"- {' '.join(sys.argv[1:]) or 'defaults'}", ""]
    for step in steps:
        file = folder / f"{step}.txt"
        text = file.read_text().rstrip() if file.is_file() else "not run"
        lines += [f"## {step}", "", "```", text, "```", ""]
    (folder / "report.md").write_text("\n".join(lines))


def seconds(file: Path) -> float:
    return float(file.read_text().rstrip().removesuffix(" s").rpartition(" ")[2])


def main() -> None:
    arguments = options(
        __doc__, dataset="", generator="", backbone="", data_root="", store="runs",
        out="gpu_day", set=[], rehearse=False,
    )  # fmt: skip
    if arguments.rehearse:
        rehearse(arguments)
    folder = Path(arguments.out).absolute()
    folder.mkdir(parents=True, exist_ok=True)
    steps = steps_of(arguments)
    for step, command in steps.items():
        file = folder / f"{step}.txt"
        if is_done(file):
            progress(f"{step}: done before")
            continue
        progress(f"{step}: {' '.join(command)}")
        code = run_step(command, file)
        write_report(folder, [*steps], arguments)
        if code:
            raise SystemExit(
                f"{step} ended with exit code {code}; see {file}. After a correction the same "
                "command continues here"
            )
    if arguments.rehearse:
        report_rehearsal(folder, arguments.store, [*steps])
        return
    device = json.loads((folder / "device.txt").read_text().splitlines()[-2])
    progress(f"attach {folder / 'report.md'}")
    report(
        "gpu_day",
        device["ratio"],
        device["baseline"],
        card=card(),
        steps={step: seconds(folder / f"{step}.txt") for step in steps},
    )


if __name__ == "__main__":
    main()
