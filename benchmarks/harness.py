"""Shared parts of the benchmarks: options, clocks, a CLIP with random weights, and the report."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from air_core.backbone import Backbone

ROOT = Path(__file__).parents[1]
Times = tuple[float, float]  # wall seconds, and processor seconds of this process


def options(doc: str | None, **defaults: Any) -> argparse.Namespace:
    """Parse options given by their defaults; False is a flag, a list takes several words."""
    parser = argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for name, default in defaults.items():
        option = f"--{name.replace('_', '-')}"
        if default is False:
            parser.add_argument(option, action="store_true")
        elif isinstance(default, list):
            parser.add_argument(option, nargs="*", default=default, help=f"default: {default}")
        else:
            parser.add_argument(
                option, type=type(default), default=default, help="default: %(default)s"
            )
    return parser.parse_args()


def measure_time(work: Callable[[], object]) -> Times:
    """Time one call, including its work on the GPU."""
    started, busy = time.perf_counter(), time.process_time()
    work()
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - started, time.process_time() - busy


def minimum_times(times: Sequence[Times]) -> Times:
    """Minimum over repeats, for each clock separately."""
    return min(wall for wall, _ in times), min(cpu for _, cpu in times)


def environment(**more: str) -> dict[str, str]:
    """Environment of a process that uses one thread and imports this checkout."""
    return {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **more}


def airsweep(*arguments: object) -> None:
    """Run an airsweep command in a new process."""
    command = [sys.executable, "-m", "orchestrator", *map(str, arguments)]
    subprocess.run(command, check=True, env=environment(), capture_output=True)


def random_clip(
    architecture: str = "ViT-B-32-quickgelu", device: str = "cpu", **config: Any
) -> Backbone:
    """A CLIP with random weights, on which its speed does not depend.

    Args:
        config: parts of open_clip's configuration of the architecture to replace.
    """
    import logging

    import open_clip

    from air_core.backbone import Backbone

    logging.disable(logging.WARNING)  # hide the warning about random weights
    model, _, preprocess = open_clip.create_model_and_transforms(
        architecture, pretrained=None, device=device, **config
    )
    logging.disable(logging.NOTSET)
    return Backbone(model, preprocess, open_clip.get_tokenizer(architecture))


def progress(*words: object) -> None:
    """Print a line to stderr, since stdout is for the JSON."""
    print(*words, file=sys.stderr, flush=True)


def report(name: str, ratio: float, baseline: str, **figures: Any) -> None:
    """Print the result as the last line of a benchmark."""
    print(json.dumps(rounded({"name": name, "ratio": ratio, "baseline": baseline, **figures})))


def rounded(value: Any) -> Any:
    """Round numbers to four significant digits."""
    if isinstance(value, dict):
        return {key: rounded(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [rounded(one) for one in value]
    return float(f"{value:.4g}") if isinstance(value, float) else value
