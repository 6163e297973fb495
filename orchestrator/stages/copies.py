"""Ready images that copy a test image: training on them leaks the test set.

The thresholds were measured with the tiny CLIP on 960 drawn images and 960 real digits: they find
all copies of the same pixels or of JPEG quality 90, 95 % of quality 75 or another size, and none
that is moved, turned, mirrored or blurred.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import numpy as np
import torch

from air_core.datasets.class_folders import class_files
from air_core.datasets.duplicates import difference_hash
from air_core.settings import SplitSettings
from orchestrator.stages.context import WorkerContext, one_thread
from orchestrator.stages.features import FeaturesSpec, read_target
from orchestrator.stages.images import read_pictures
from orchestrator.stages.inputs import images_folder
from orchestrator.stages.synthetic import SyntheticFeaturesSpec, drawn_blocks

COSINE = 0.997  # of CLIP features, at least
BITS = 20  # of the difference hash, that may differ
NEAREST = 3  # test images that are compared with an image


@one_thread()
def copies_of_test_images(
    spec: SyntheticFeaturesSpec,
    features: FeaturesSpec,
    splits: Sequence[SplitSettings],
    worker: WorkerContext,
) -> list[tuple[str, int]]:
    """Find ready images that copy a test image of any split, by CLIP features and by pixels.

    Returns:
        File, as `<class folder>/<file>`, and position of the test image in the dataset.
    """
    targets = [read_target(features, split, worker.store) for split in splits]
    tests = torch.from_numpy(np.unique(torch.cat([target.split.test for target in targets])))
    known = targets[0].batch(tests).features
    near: list[tuple[tuple[int, int], list[int]]] = []  # class and index; test images
    for c, indices, block in drawn_blocks(spec, worker.store):
        best = (block @ known.T).topk(min(NEAREST, len(tests)), dim=1)
        for index, cosines, at in zip(indices, best.values, best.indices, strict=True):
            if positions := tests[at[cosines >= COSINE]].tolist():
                near.append(((c, index), positions))
    pictures = read_pictures(spec.images, [image for image, _ in near], worker.store)
    images = worker.examples(features.dataset).images
    test_hash = cache(lambda position: difference_hash(images[position]))
    names = spec.images.classnames
    files = class_files(images_folder(spec.images.model.name), names)
    found = []
    for (c, index), positions in near:
        own = difference_hash(pictures[c, index])
        alike = [i for i in positions if np.count_nonzero(own != test_hash(i)) <= BITS]
        if alike:
            file = files[names[c]][index]
            found.append((f"{file.parent.name}/{file.name}", alike[0]))
    return found
