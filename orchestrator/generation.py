"""Missing image blocks, drawn by a pool of generator actors on Ray Data.

A shard is a class and a block, never a Ray block: which actor draws it changes no pixel. Images
and their CLIP features are made in one stream, and each shard is renamed into place when whole,
so that a killed generation goes on where it stopped.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import ray
from ray.data import ActorPoolStrategy, DataContext

from air_core.specs import SyntheticFeaturesSpec
from orchestrator.image_rows import build_image_block, open_generator
from orchestrator.plan import Need
from orchestrator.sweep import Resources
from orchestrator.workshop import Workshop


class GenerationFailed(RuntimeError):
    """Some image blocks could not be drawn."""


class Generate:
    """One actor: one generator at a time, switched when the row changes."""

    def __init__(self, rows: Sequence[SyntheticFeaturesSpec], shop: Workshop) -> None:
        import torch

        torch.set_num_threads(1)  # one actor a core; more threads would fight
        self.rows, self.shop = rows, shop
        self.open: tuple[int, Any] | None = None

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, Any]:
        row, c, block = (int(batch[name][0]) for name in ("row", "class", "block"))
        started = time.monotonic()
        error = ""
        drawn = {"drawn": 0, "redrawn": 0, "holes": 0}
        spec = self.rows[row]
        try:
            drawn = build_image_block(spec, c, block, self.shop, lambda: self._generator(row))
        except Exception as problem:  # told to the driver as data: an exception ends the stream
            error = f"{type(problem).__name__}: {problem}"
        return {
            "row": [row],
            "class": [c],
            "block": [block],
            "error": [error],
            "seconds": [time.monotonic() - started],
            **{name: [count] for name, count in drawn.items()},
        }

    def _generator(self, row: int) -> Any:
        if self.open is None or self.open[0] != row:
            self.open = None  # one LoRA at a time: free the last before the next is loaded
            self.open = (row, open_generator(self.rows[row].images, self.shop))
        return self.open[1]


def room_for(resources: Resources) -> tuple[int, float]:
    """How many generators fit into the cluster, and the GPUs of each: none where there are none.

    Raises:
        ValueError: not even one; Ray would wait for ever without a word.
    """
    cluster, want = ray.cluster_resources(), resources.generator
    gpu = want.gpu if cluster.get("GPU", 0) else 0.0
    limits = [
        cluster.get(name, 0) // each for name, each in (("CPU", want.cpu), ("GPU", gpu)) if each
    ]
    fits = int(min(limits, default=cluster.get("CPU", 1)))
    if fits < 1:
        raise ValueError(
            f"a generator asks for {want.cpu:g} CPU and {gpu:g} GPU; the cluster has "
            f"{cluster.get('CPU', 0):g} and {cluster.get('GPU', 0):g}: lower resources.generator"
        )
    return fits, gpu


def draw(
    needs: Sequence[Need],
    shop: Workshop,
    resources: Resources,
    on_shard: Callable[[Need, float, dict[str, Any]], None],
) -> None:
    """Draw the missing blocks of some rows.

    Args:
        on_shard: told of each shard as it is done: seconds; drawn, redrawn, holes.

    Raises:
        GenerationFailed: after all others were tried; says which failed and why.
        ValueError: the cluster has no room for a generator.
    """
    shards = [
        {"row": row, "class": c, "block": block}
        for row, need in enumerate(needs)
        for c, block in need.missing(shop.store)
    ]
    if not shards:
        return
    want = resources.generator
    fits, gpu = room_for(resources)
    actors = min(want.actors or fits, fits, len(shards))
    context = DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    logging.getLogger("ray.data").setLevel(logging.CRITICAL)
    specs = [need.spec for need in needs]
    device = "cuda" if gpu else "cpu"
    stream = ray.data.from_items(shards, override_num_blocks=len(shards)).map_batches(
        Generate,
        fn_constructor_args=(specs, Workshop(shop.store, shop.data_root, device)),
        batch_size=1,
        compute=ActorPoolStrategy(size=actors),
        num_cpus=want.cpu,
        num_gpus=gpu,
    )
    errors = []
    for result in stream.iter_rows():
        need = needs[result["row"]]
        if result["error"]:
            assert isinstance(need.spec, SyntheticFeaturesSpec)
            name = need.spec.images.classnames[result["class"]]
            errors.append(f"{name}, block {result['block']}: {result['error']}")
        on_shard(need, result["seconds"], result)
    left = sum(len(need.missing(shop.store)) for need in needs)
    if left:
        raise GenerationFailed(
            f"{left} of {len(shards)} image blocks could not be drawn; "
            + "; ".join(errors[:3] or ["they were lost by the cluster; run again"])
        )
