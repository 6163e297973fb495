"""Speed of the denoising evidence of a block of images.

Baseline: bare calls of the same U-Net on tensors of the same shapes, as many as there are pairs of
image and class in all draws. The measured work is that of a generator actor: it reads the images
from the dataset, encodes them with the autoencoder, draws noise, computes the errors, and writes a
sealed shard for each draw. Both run in one process with the same number of threads.

    python benchmarks/evidence.py [--images 128] [--draws 4] [--threads 1] [--repeats 3] [--size 32]
        [--block 64] [--model tiny] [--device cpu] [--precision fp32]

The images are scikit-learn's digits in 10 classes; --model is `tiny` or a diffusers folder. Times
are the minimum over the repeats. The last line is JSON: `ratio` is the wall time of the baseline
divided by that of the evidence, so at most about 1, and `ratio_cpu` the same for processor time.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from air_core.diffusion.evidence import PAIRS
from air_core.specs import EvidenceSpec
from benchmarks.harness import Times, measure_time, minimum_times, options, report
from orchestrator.planning import Resolver
from orchestrator.stages.context import WorkerContext
from orchestrator.stages.evidence import BlockScorer
from orchestrator.stages.evidence import build as build_evidence_block
from orchestrator.stages.features import build as build_features
from orchestrator.store import ArtifactStore


def spec_of(arguments: Any, folder: Path) -> EvidenceSpec:
    settings = {
        "evidence.draws": arguments.draws,
        "evidence.block": arguments.block,
        "evidence.precision": arguments.precision,
        "generation.size": arguments.size,
        "generator": arguments.model,
        "images_per_class": 0,
        "lora": None,
        "pool": "train",
    }
    spec = Resolver(folder / "digests.json", None).trial(settings).evidence_errors
    assert spec is not None
    return spec


def evidence(scorer: BlockScorer, blocks: int, draws: int, store: ArtifactStore) -> Times:
    """Time of all shards of some blocks in an empty store."""
    worker = WorkerContext(store, device=scorer.worker.device)
    scorer.latents = None

    def build() -> None:
        for block in range(blocks):
            for draw in range(draws):
                build_evidence_block(scorer.spec, draw, block, worker, lambda: scorer)

    return measure_time(build)


def bare(scorer: BlockScorer, calls: int) -> Times:
    """Time of U-Net calls on one batch of PAIRS."""
    denoiser = scorer.scorer.denoiser
    assert scorer.latents is not None
    latents = scorer.latents[1].repeat(PAIRS, 1, 1, 1)[:PAIRS].to(denoiser.network.dtype)
    steps = torch.full((PAIRS,), 500, device=latents.device)
    conditions = scorer.scorer.texts.of(torch.arange(PAIRS, device=latents.device) % 10)

    @torch.inference_mode()
    def call() -> None:
        for _ in range(calls):
            denoiser.predict(latents, steps, conditions)

    return measure_time(call)


def main() -> None:
    arguments = options(
        __doc__,
        images=128,
        draws=4,
        threads=1,
        repeats=3,
        size=32,
        block=64,
        model="tiny",
        device="cpu",
        precision="fp32",
    )
    torch.set_num_threads(arguments.threads)
    blocks = -(-arguments.images // arguments.block)
    pairs = blocks * arguments.block * 10 * arguments.draws
    times: dict[str, list[Times]] = {"evidence": [], "bare": []}
    with tempfile.TemporaryDirectory() as folder:
        spec = spec_of(arguments, Path(folder))
        features = WorkerContext(ArtifactStore(Path(folder) / "features"))
        build_features(spec.features, features)
        scorer = BlockScorer.open(spec, WorkerContext(features.store, device=arguments.device))
        for repeat in range(arguments.repeats):
            store = ArtifactStore(Path(folder) / str(repeat))
            times["evidence"].append(evidence(scorer, blocks, arguments.draws, store))
            times["bare"].append(bare(scorer, pairs // PAIRS))
    (seconds, cpu), (bare_s, bare_cpu) = (
        minimum_times(times["evidence"]),
        minimum_times(times["bare"]),
    )
    report(
        "evidence",
        bare_s / seconds,
        f"bare calls of the U-Net of {arguments.model}, batches of {PAIRS}",
        ratio_cpu=bare_cpu / cpu,
        images=blocks * arguments.block,
        classes=10,
        draws=arguments.draws,
        pairs_per_s=pairs / seconds,
        bare_pairs_per_s=pairs / bare_s,
        pairs_per_cpu_s=pairs / cpu,
    )


if __name__ == "__main__":
    main()
