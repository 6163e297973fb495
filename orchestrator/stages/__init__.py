"""Work inside one worker process: artifacts, blocks of images, trials, audits.

The modules import torch, so nothing is imported here: `context`, `build`, `image_rows`, `trial`,
`side_by_side`, `audits` and `pictures` are public."""
