"""A frozen CLIP: images and texts become features, prompts pass through what has to see them.

`clip` is the front, `text` and `vision` are the two towers, `blocks` is what both are made of,
`loading` builds one from a name.
"""

from air_core.backbone.clip import Backbone

__all__ = ["Backbone"]
