"""Work inside one worker process: artifacts, blocks of images, trials, audits.

The modules import torch, so nothing is imported here. Public modules: `context`, `build`,
`image_rows`, `trial`, `side_by_side`, `audits` and `pictures`."""
