"""Classify a folder of images in a bare loop: threads open and preprocess the next batch while
open_clip encodes one. `python classify_loop.py TOWER BUNDLE IMAGES THREADS` prints the seconds of
the loop, wall and processor, and the classes, as JSON."""

import json
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import open_clip
import torch
from PIL import Image
from safetensors.torch import load_file

BATCH = 64

if __name__ == "__main__":
    tower, bundle, images, threads = sys.argv[1:]
    torch.set_num_threads(int(threads))
    model, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{tower}")
    model.eval()
    texts = load_file(f"{bundle}/text_features.safetensors")
    names = json.loads((Path(bundle) / "bundle.json").read_text())["classnames"]
    files = sorted(Path(images).iterdir())
    batches = [files[first : first + BATCH] for first in range(0, len(files), BATCH)]
    found = []

    def pixels(file: Path) -> torch.Tensor:
        return preprocess(Image.open(file).convert("RGB"))

    started, busy = time.perf_counter(), time.process_time()
    with ThreadPoolExecutor(int(threads)) as pool, torch.no_grad():
        following = [pool.submit(pixels, file) for file in batches[0]]
        for ahead in [*batches[1:], []]:
            batch, following = following, [pool.submit(pixels, file) for file in ahead]
            features = model.encode_image(torch.stack([f.result() for f in batch]), normalize=True)
            logits = texts["logit_scale"] * features @ texts["text_features"].T
            found += [names[best] for best in logits.softmax(dim=-1).argmax(dim=-1).tolist()]
    times = time.perf_counter() - started, time.process_time() - busy
    print(json.dumps({"times": times, "classes": found}))
