"""Train the tiny models again: `python -m tools.tiny_world --work DIR --out DIR`.

Takes a little more than an hour on one CPU core. The weights are reproducible on the same processor
with the same library versions; otherwise rounding differs and scores vary by about one point.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch

from tools.tiny_world import CHECKSUMS, checksums
from tools.tiny_world.pretrain_clip import ClipTraining, pretrain
from tools.tiny_world.pretrain_diffusion import (
    UnetTraining,
    VaeTraining,
    pretrain_unet,
    pretrain_vae,
)
from tools.tiny_world.scores import all_scores


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, required=True, help="images, latents, checkpoints")
    parser.add_argument("--out", type=Path, required=True, help="receives clip/ and diffusion/")
    parser.add_argument("--images", type=int, default=120_000, help="source images")
    arguments = parser.parse_args()
    torch.set_num_threads(1)  # sums, and so the weights, depend on the number of threads
    pretrain(arguments.work, arguments.out, arguments.images, ClipTraining())
    pretrain_vae(arguments.work, arguments.images, VaeTraining())
    pretrain_unet(arguments.work, arguments.out, arguments.images, UnetTraining())
    listed = json.dumps(checksums(arguments.out), indent=2)
    (arguments.out / CHECKSUMS).write_text(listed + "\n")
    print(json.dumps(all_scores(arguments.out), indent=2))


if __name__ == "__main__":
    main()
