"""A CLIP that Hugging Face `transformers` has saved, for text prompts."""

from pathlib import Path

import torch
from open_clip.tokenizer import HFTokenizer
from torch import nn
from transformers import CLIPImageProcessor, CLIPModel

from air_core.backbone import Backbone
from air_core.settings.components import BACKBONES

FOLDER = Path("/shared/models/clip-vit-base-patch32")
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


class Model(nn.Module):
    """A CLIP of transformers with the names of open_clip."""

    def __init__(self, clip):
        super().__init__()
        text = clip.text_model
        self.clip, self.visual, self.logit_scale = clip, clip.vision_model, clip.logit_scale
        self.token_embedding = text.embeddings.token_embedding
        self.positional_embedding = text.embeddings.position_embedding.weight  # (L, W)
        self.ln_final, self.text_projection = text.final_layer_norm, clip.text_projection
        length = len(self.positional_embedding)
        later = torch.full((length, length), float("-inf")).triu(1)
        self.register_buffer("attn_mask", later.to(clip.dtype))
        self.pool_type = "argmax"  # at [EOT], which has the largest id

    def encode_image(self, pixels):  # (B, 3, H, W) -> (B, D)
        return self.clip.get_image_features(pixels).pooler_output

    def encode_text(self, ids):  # (C, L) -> (C, D)
        return self.clip.get_text_features(ids).pooler_output

    def transformer(self, states, attn_mask):  # (B, L, W) -> (B, L, W)
        encoder = self.clip.text_model.encoder
        return encoder(states, attention_mask=attn_mask[None, None]).last_hidden_state


@BACKBONES.add("saved_clip", summary="a CLIP of transformers")
class SavedClip:
    def __new__(cls, device, precision):
        clip = CLIPModel.from_pretrained(
            FOLDER, dtype=DTYPES[precision], local_files_only=True, use_safetensors=True
        )
        model = Model(clip).to(device)
        processor = CLIPImageProcessor.from_pretrained(FOLDER, local_files_only=True)
        tokenizer = HFTokenizer(str(FOLDER), context_length=len(model.positional_embedding))
        return Backbone(
            model,
            lambda image: processor(image, return_tensors="pt").pixel_values[0],
            tokenizer,
        )

    @staticmethod
    def files():
        kinds = (".json", ".txt", ".safetensors")
        return sorted(file for file in FOLDER.iterdir() if file.suffix in kinds)
