"""A day on one GPU: checks, the sweep `sweeps/gpu_day.yaml`, and the work of stages on the device.

The steps are a check of the machine, a smoke run, a plan with measured hours, the run, its table,
and `device.py`. The output of each goes to a file in --out, and all of it to
`report.md`, one file to attach to an issue. A step that has succeeded is not repeated, so after an
interruption the same command continues.

    make gpu-day GPU_DAY="--data-root /data --store /data/runs"
    python benchmarks/gpu_day.py --dataset flowers102 --generator /models/sd15 --data-root /data

--set takes further settings of the sweep, such as `seeds=[1]`. The last line is JSON: `ratio` is
that of `device.py`, `steps` has the seconds of each step.
"""

from __future__ import annotations

import json
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
CARD = """
import torch
if torch.cuda.is_available():
    card = torch.cuda.get_device_properties(0)
    print(f"{card.name}, {card.total_memory / 2**30:.0f} GiB, CUDA {torch.version.cuda}")
else:
    print("no GPU")
"""


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
        out="gpu_day", set=[],
    )  # fmt: skip
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
