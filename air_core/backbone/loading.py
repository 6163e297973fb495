"""Loads a frozen CLIP by its name; see `air_core.models.weights` for the allowed names."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

from air_core.arithmetic import sums_in_one_order
from air_core.backbone.clip import Backbone
from air_core.components import BACKBONES
from air_core.models.configs import check_tokenizer_config
from air_core.models.weights import MERGES, ClipFile, ClipFolder, find_backbone, stay_offline


def load_backbone(
    name: str | Path | ClipFolder | ClipFile, device: str = "cpu", precision: str = "fp32"
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


def _loaded(name: str | Path | ClipFolder | ClipFile, device: str, precision: str) -> Backbone:
    if isinstance(name, str) and name in BACKBONES:
        plugin: Backbone = BACKBONES.load(name)(device, precision)
        return plugin
    match find_backbone(str(name) if isinstance(name, Path) else name):
        case ClipFolder() as found:
            return _from_folder(found, device, precision)
        case ClipFile() as found:
            return _from_file(found, device, precision)


def _from_folder(found: ClipFolder, device: str, precision: str) -> Backbone:
    # Without require_pretrained, open_clip only warns of missing weights and returns random ones.
    with _explained(found.weights, str(found.path), found.model):
        model, _, preprocess = _open_clip(found.model).create_model_and_transforms(
            f"local-dir:{found.path}",
            device=device,
            precision=precision,
            require_pretrained=True,
            weights_only=True,
        )
    return Backbone(model, preprocess, _tokenizer(found.model, found.path))


def _from_file(found: ClipFile, device: str, precision: str) -> Backbone:
    with _explained(found.weights, found.architecture, found.model):
        model, _, preprocess = _open_clip(found.model).create_model_and_transforms(
            found.architecture,
            pretrained=str(found.weights),
            device=device,
            precision=precision,
            weights_only=True,
            # For a file open_clip does not know the activation function of the pretrained tag.
            force_quick_gelu=bool(found.model.get("quick_gelu")),
            **{f"image_{name}": value for name, value in found.preprocess.items()},
        )
    folder = found.tokenizer[0].parent if found.tokenizer else None
    return Backbone(model, preprocess, _tokenizer(found.model, folder))


OPTIONAL = ("timm", "transformers")  # optional dependencies of open_clip


def import_open_clip_alone() -> None:
    """Import open_clip without its optional dependencies, which takes a third less time.

    For worker processes, which should start fast. `load_backbone` imports the dependencies when
    they are needed; other callers of open_clip in this process do not get them.
    """
    sums_in_one_order()
    if "open_clip" in sys.modules:
        return
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


def _tokenizer(config: dict[str, Any], folder: Path | None) -> Any:
    """The tokenizer that open_clip would choose, from local files only."""
    from open_clip.tokenizer import HFTokenizer, SimpleTokenizer

    text = config["text_cfg"]
    options = {"context_length": text.get("context_length", 77)}
    options |= text.get("tokenizer_kwargs") or {}  # checked by `find_backbone`
    if text.get("hf_tokenizer_name"):
        assert folder is not None
        check_tokenizer_config(folder)
        try:
            tokenizer = HFTokenizer(
                str(folder),
                tokenizer_mode=text.get("tokenizer_mode"),
                trust_remote_code=False,
                local_files_only=True,
                **options,
            )
        except Exception as error:  # transformers raises many types for invalid files
            raise ValueError(f"{folder} contains no readable tokenizer: {error}") from error
        if tokenizer.tokenizer.padding_side != "right":
            raise ValueError(
                f"the tokenizer in {folder} pads texts on the left, but CLIP and SigLIP read "
                'texts that are padded on the right; add "padding_side": "right" to its '
                "tokenizer_config.json"
            )
        return tokenizer
    if folder is not None and (folder / MERGES).is_file():
        options = {"bpe_path": str(folder / MERGES), **options}
    return SimpleTokenizer(**options)


# ---------------------------------------------------------------- weights that do not fit


@contextmanager
def _explained(weights: Path, architecture: str, config: dict[str, Any]) -> Iterator[None]:
    """Turn errors of open_clip about weights into one message."""
    try:
        yield
    except Exception as error:
        why = _misfit(weights, config)
        if why is None:
            raise
        raise ValueError(f"{weights} does not fit {architecture}: {why}") from error


def _misfit(weights: Path, config: dict[str, Any]) -> str | None:
    """Why weights do not fit, by the first tensor that does not match; None if they fit."""
    import torch
    from open_clip.convert import convert_state_dict
    from open_clip.factory import load_state_dict
    from open_clip.model import CLIP, CustomTextCLIP, convert_to_custom_text_state_dict

    try:
        found = load_state_dict(str(weights))
    except Exception as error:  # each file format raises other types
        first = str(error).strip().partition("\n")[0]
        return (
            f"it cannot be read ({first}); save the state_dict, which "
            "contains only tensors, as .safetensors"
        )
    kind = CustomTextCLIP if config.get("custom_text") else CLIP
    built = {name: value for name, value in config.items() if name != "custom_text"}
    # open_clip does the same if a file has all weights.
    built["vision_cfg"] = {**config["vision_cfg"], "timm_model_pretrained": False}
    try:
        with torch.device("meta"):
            model = kind(**built)
    except Exception as error:  # inconsistent sizes, or an unknown architecture of timm
        first = str(error).strip().partition("\n")[0]
        return f"open_clip cannot build its configuration ({type(error).__name__}: {first})"
    found = convert_state_dict(model, found)
    if kind is CustomTextCLIP and "positional_embedding" in found:
        found = convert_to_custom_text_state_dict(found)
    wanted = model.state_dict()
    for name, tensor in wanted.items():
        if name not in found:
            if name == "logit_bias":  # open_clip uses 0
                continue
            return f"it has no tensor {name}"
        here, there = tuple(tensor.shape), tuple(found[name].shape)
        # open_clip interpolates positions of another grid.
        if here != there and not name.endswith("positional_embedding"):
            return f"{name} has shape {there}, but {here} in the architecture"
    return next((f"the architecture has no tensor {n}" for n in found if n not in wanted), None)
