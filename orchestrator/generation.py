"""Missing image blocks, drawn by a pool of generator actors on Ray Data.

A shard is a class and a block, never a Ray block: which actor draws it changes no pixel. Images
and their CLIP features are made in one stream, and each shard is renamed into place when whole,
so that a killed generation goes on where it stopped.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Protocol

import numpy as np
import ray
from ray.data import ActorPoolStrategy, DataContext

from air_core.specs import SyntheticFeaturesSpec
from orchestrator.board import Note, Teller, watched
from orchestrator.failures import CLASSES, Failure, classify
from orchestrator.fit import room
from orchestrator.image_rows import build_image_block, open_generator
from orchestrator.keys import artifact_key
from orchestrator.plan import Need, name_of
from orchestrator.redact import redacted
from orchestrator.session import machines
from orchestrator.sweep import GeneratorResources, Resources
from orchestrator.workshop import Workshop

THRIFT = 2  # the most that a generator can save


class Drawn(Teller, Protocol):
    """Is told what is drawn."""

    def prepared(self, need: Need, seconds: float, facts: dict[str, Any]) -> None: ...


class Generate:
    """One actor: one generator at a time, switched when the row changes."""

    def __init__(self, rows: Sequence[SyntheticFeaturesSpec], shop: Workshop, board: Any) -> None:
        import torch

        torch.set_num_threads(1)  # one actor a core; more threads would fight
        self.rows, self.shop = rows, shop
        self.notes = [Note(board, name_of(artifact_key(spec.images))) for spec in rows]
        self.open: tuple[int, Any] | None = None
        self.thrift = 0  # how much memory is saved for time, see diffusion.pipeline

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, Any]:
        row, c, block = (int(batch[name][0]) for name in ("row", "class", "block"))
        started = time.monotonic()
        error = name = ""
        drawn = {"drawn": 0, "redrawn": 0, "holes": 0}
        spec = self.rows[row]
        self.shop.store.locks.waits = self.notes[row].waits
        try:
            drawn = self._drawn(spec, row, c, block)
        except Exception as problem:  # told to the driver as data: an exception ends the stream
            error = redacted(f"{type(problem).__name__}: {problem}")  # here, where its secrets are
            name = classify(problem)
        return {
            "row": [row],
            "class": [c],
            "block": [block],
            "error": [error],
            "failure_class": [name],
            "seconds": [time.monotonic() - started],
            **{name: [count] for name, count in drawn.items()},
        }

    def _drawn(self, spec: SyntheticFeaturesSpec, row: int, c: int, block: int) -> dict[str, int]:
        """A block; with less memory where there is too little. Its size is part of its key."""
        while True:
            try:
                shop = self.shop.with_less(self.thrift)
                return build_image_block(spec, c, block, shop, lambda: self._generator(row))
            except Exception as problem:
                if classify(problem) != "oom" or self.thrift == THRIFT:
                    raise
                self.thrift, self.open = self.thrift + 1, None  # of this actor from now on

    def _generator(self, row: int) -> Any:
        if self.open is None or self.open[0] != row:
            self.open = None  # one LoRA at a time: free the last before the next is loaded
            self.open = (row, open_generator(self.rows[row].images, self.shop, self.thrift))
        return self.open[1]


def draw(
    needs: Sequence[Need],
    shop: Workshop,
    resources: Resources,
    watcher: Drawn,
) -> list[tuple[Need, Failure]]:
    """Draw the missing blocks of some rows; what could not be drawn, after all others were tried.

    Args:
        watcher: told of each shard as it is done (seconds; drawn, redrawn, holes), and of who else
            draws one that is waited for.
    """
    shards = [
        {"row": row, "class": c, "block": block}
        for row, need in enumerate(needs)
        for c, block in need.missing(shop.store)
    ]
    if not shards:
        return []
    errors: dict[Need, list[tuple[str, str]]] = {}
    with watched(watcher) as board:
        stream = _stream(shards, [need.spec for need in needs], shop, resources.generator, board)
        for result in stream.iter_rows():
            need = needs[result["row"]]
            if not result["error"]:
                watcher.prepared(need, result["seconds"], result)
                continue
            assert isinstance(need.spec, SyntheticFeaturesSpec)
            name = need.spec.images.classnames[result["class"]]
            said = f"{name}, block {result['block']}: {result['error']}"
            errors.setdefault(need, []).append((result["failure_class"], said))
            if CLASSES[result["failure_class"]].stops_after == 1:
                break  # what is drawn from now on would be drawn for nothing
    shop.store.look_again()
    return [
        (need, _failure(errors.get(need, []), left))
        for need in needs
        if (left := len(need.missing(shop.store)))
    ]


def _stream(
    shards: list[dict[str, int]],
    rows: Sequence[Any],
    shop: Workshop,
    want: GeneratorResources,
    board: Any,
) -> ray.data.Dataset:
    fits = room(want, machines())
    actors = min(want.actors or fits, fits, len(shards))
    context = DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    logging.getLogger("ray.data").setLevel(logging.CRITICAL)
    device = "cuda" if want.gpu else "cpu"
    return ray.data.from_items(shards, override_num_blocks=len(shards)).map_batches(
        Generate,
        fn_constructor_args=(rows, replace(shop, device=device), board),
        batch_size=1,
        compute=ActorPoolStrategy(size=actors),
        num_cpus=want.cpu,
        num_gpus=want.gpu,
    )


def _failure(errors: Sequence[tuple[str, str]], left: int) -> Failure:
    said = [text for _, text in errors[:3]] or ["they were lost by the cluster; run again"]
    names = [name for name, _ in errors] or ["infra"]
    blocks = "1 block is" if left == 1 else f"{left} blocks are"
    return Failure(max(set(names), key=names.count), f"{blocks} missing; {'; '.join(said)}")
