"""A frozen CLIP: images and texts become features, prompts pass through what has to see them.

`clip` is the front, `text` and `vision` are the two towers, `blocks` is what both are made of,
`loading` builds one from a name.
"""

from air_core.backbone.clip import Backbone
from air_core.backbone.loading import load_backbone
from air_core.weights import tiny_folder, weights_files

__all__ = ["Backbone", "load_backbone", "tiny_folder", "weights_files"]
