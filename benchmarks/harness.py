"""What benchmarks share: options, two clocks, a CLIP with random weights, the line of JSON."""

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
Times = tuple[float, float]  # seconds on the clock, and of this process's processors


def options(doc: str | None, **defaults: Any) -> argparse.Namespace:
    """Options by their defaults: False is a flag, a list takes several words."""
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


def timed(work: Callable[[], object]) -> Times:
    """Times of one call, until the device has done it."""
    started, busy = time.perf_counter(), time.process_time()
    work()
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - started, time.process_time() - busy


def least(times: Sequence[Times]) -> Times:
    """The least disturbed of some repeats, each clock by itself."""
    return min(wall for wall, _ in times), min(cpu for _, cpu in times)


def environment(**more: str) -> dict[str, str]:
    """Of a process with one thread that imports this checkout."""
    return {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **more}


def airsweep(*arguments: object, **more: str) -> str:
    """A command of airsweep in a process of its own, and what it prints."""
    command = [sys.executable, "-m", "orchestrator", *map(str, arguments)]
    done = subprocess.run(
        command, check=True, env=environment(**more), capture_output=True, text=True
    )
    return done.stdout


def random_clip(architecture: str = "ViT-B-32-quickgelu", device: str = "cpu") -> Backbone:
    """A CLIP with random weights: its time does not depend on them."""
    import logging

    import open_clip

    from air_core.backbone import Backbone

    logging.disable(logging.WARNING)  # that weights are random is what we want
    model, _, preprocess = open_clip.create_model_and_transforms(
        architecture, pretrained=None, device=device
    )
    logging.disable(logging.NOTSET)
    return Backbone(model, preprocess, open_clip.get_tokenizer(architecture))


def progress(*words: object) -> None:
    """A line on stderr: stdout ends with JSON."""
    print(*words, file=sys.stderr, flush=True)


def report(name: str, ratio: float | None, baseline: str, **figures: Any) -> None:
    """The last line of every benchmark."""
    print(json.dumps(rounded({"name": name, "ratio": ratio, "baseline": baseline, **figures})))


def rounded(value: Any) -> Any:
    """Numbers with four digits that count."""
    if isinstance(value, dict):
        return {key: rounded(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [rounded(one) for one in value]
    return float(f"{value:.4g}") if isinstance(value, float) else value
