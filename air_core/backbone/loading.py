"""Loads a frozen CLIP by its name; see `air_core.models.weights` for the allowed names."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from textwrap import shorten
from types import ModuleType
from typing import Any

from air_core.backbone.clip import Backbone
from air_core.models.configs import check_configs
from air_core.models.weights import ClipWeights, find_backbone, stay_offline
from air_core.settings.components import BACKBONES
from air_core.tools.arithmetic import sums_in_one_order


def load_backbone(
    name: str | Path | ClipWeights, device: str = "cpu", precision: str = "fp32"
) -> Backbone:
    """Load a frozen CLIP or SigLIP. Downloads nothing and runs no code from a folder.

    Turns off downloads from the Hugging Face hub in this process, see `stay_offline`. A folder can
    contain byte-pair merges as `merges.txt.gz`; the default is CLIP's vocabulary.

    Args:
        name: of a backbone, also of a plugin, its folder, or a result of `find_backbone`.
        device: on which the backbone runs.
        precision: of the weights: fp32, fp16 or bf16, or tf32: weights in fp32, products in TF32
            on a GPU. Norms are always computed in fp32.

    Raises:
        ValueError: the backbone does not exist, its configuration has settings that are not
            allowed in a folder, its weights do not fit, or its text tower accepts no prompt.
    """
    sums_in_one_order()
    stay_offline()
    backbone = _loaded(name, device, "fp32" if precision == "tf32" else precision)
    backbone.precision = precision
    return backbone


def _loaded(name: str | Path | ClipWeights, device: str, precision: str) -> Backbone:
    if isinstance(name, str) and name in BACKBONES:
        plugin: Backbone = BACKBONES.load(name)(device, precision)
        return plugin
    found = name if isinstance(name, ClipWeights) else find_backbone(str(name))
    options: dict[str, Any] = {}
    if found.preprocess is not None:
        options = {f"image_{name}": value for name, value in found.preprocess.items()}
        # For a file open_clip does not know the activation function of the pretrained tag.
        options["force_quick_gelu"] = bool(found.model.get("quick_gelu"))
        options["pretrained"] = str(found.path)
    try:
        # Without require_pretrained, open_clip only warns of missing weights and returns random
        # ones.
        model, _, preprocess = _open_clip(found.model).create_model_and_transforms(
            found.name, precision=precision, require_pretrained=True, weights_only=True, **options
        )
        tokenizer = _tokenizer(found)
    except MemoryError:
        raise
    except Exception as error:  # of many types, of open_clip and transformers
        why = f"{type(error).__name__}: {shorten(str(error), 500)}"
        raise ValueError(f"{found.path} cannot be loaded as {found.name}: {why}") from error
    return Backbone(model.to(device), preprocess, tokenizer)


OPTIONAL = ("timm", "transformers")  # optional dependencies of open_clip
COMPILER = ("torch._dynamo", "torch._dynamo.utils")


class _UnusedCompiler(ModuleType):
    """Takes the place of torch's compiler until more of it than these functions is used.

    torch's optimisers and torchvision import it, which takes more than a second, to exclude
    functions from compilation.
    """

    disable = staticmethod(lambda function, *_, **__: function)
    graph_break = staticmethod(lambda: None)
    is_compile_supported = staticmethod(lambda device: False)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") and not (name == "__path__" and self.__name__ == COMPILER[0]):
            raise AttributeError(name)
        for module in COMPILER:
            if isinstance(sys.modules.get(module), _UnusedCompiler):
                del sys.modules[module]
        return getattr(importlib.import_module(self.__name__), name)


def import_open_clip_alone() -> None:
    """Import open_clip without its optional dependencies and torch's compiler, which takes a
    quarter of the time.

    For worker processes, which should start fast. `load_backbone` imports the dependencies when
    they are needed; other callers of open_clip in this process do not get them.
    """
    sums_in_one_order()
    if "open_clip" in sys.modules:
        return
    if COMPILER[0] not in sys.modules:
        sys.modules.update({name: _UnusedCompiler(name) for name in COMPILER})
    hidden = [name for name in OPTIONAL if name not in sys.modules]
    sys.modules.update(dict.fromkeys(hidden))  # type: ignore[arg-type]  # None blocks the import
    try:
        import open_clip  # noqa: F401
    finally:
        for name in hidden:
            del sys.modules[name]


def _open_clip(model: dict[str, Any]) -> ModuleType:
    """open_clip, with timm if the image tower needs it.

    transformers is never needed, since its text towers accept no prompt.
    """
    open_clip = importlib.import_module("open_clip")  # seconds
    towers = importlib.import_module("open_clip.timm_model")
    if model["vision_cfg"].get("timm_model_name") and towers.timm is None:
        importlib.reload(towers)  # updates the globals that its classes use
    return open_clip


def _tokenizer(found: ClipWeights) -> Any:
    """The tokenizer that open_clip would choose, from local files only."""
    from open_clip.tokenizer import HFTokenizer, SimpleTokenizer

    text, folder = found.model["text_cfg"], found.tokenizer
    options = {"context_length": text.get("context_length", 77)}
    options |= text.get("tokenizer_kwargs") or {}  # checked by `find_backbone`
    if text.get("hf_tokenizer_name"):
        assert folder is not None
        check_configs(folder)
        tokenizer = HFTokenizer(
            str(folder),
            tokenizer_mode=text.get("tokenizer_mode"),
            trust_remote_code=False,
            local_files_only=True,
            **options,
        )
        tokenizer.tokenizer.padding_side = "right"  # as CLIP and SigLIP were trained
        return tokenizer
    if found.merges:
        options["bpe_path"] = str(found.merges)
    return SimpleTokenizer(**options)
