"""A frozen CLIP that encodes images, texts and learned prompts.

`clip` has the public class, `text` and `vision` the two towers, `blocks` their attention blocks,
and `loading` builds a backbone from its name.
"""

from air_core.backbone.clip import Backbone
