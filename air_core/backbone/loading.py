"""A frozen CLIP from its name. What a name may be is told in `air_core.weights`."""

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
from air_core.model_configs import check_tokenizer_config
from air_core.weights import HUB_WEIGHTS, ClipFile, ClipFolder, find_backbone, stay_offline

MERGES = "merges.txt.gz"


def load_backbone(
    name: str | Path | ClipFolder | ClipFile, device: str = "cpu", precision: str = "fp32"
) -> Backbone:
    """A frozen CLIP or SigLIP. Nothing is fetched, and no code of a folder is run.

    Downloads from the Hugging Face hub are off in this process afterwards, see `stay_offline`. A
    folder may hold `merges.txt.gz`, its own byte-pair merges; else it is CLIP's vocabulary.

    Args:
        name: of a backbone, its folder, or what `find_backbone` found.
        device: where it runs.
        precision: fp32, fp16 or bf16, of its weights; norms are computed in fp32 all the same.

    Raises:
        ValueError: it is not there, its configuration has settings that a folder may not have, its
            weights do not fit, or its text tower takes no prompt.
    """
    sums_in_one_order()
    stay_offline()
    match find_backbone(str(name) if isinstance(name, Path) else name):
        case ClipFolder(path, model):
            return _from_folder(path, model, device, precision)
        case ClipFile() as found:
            return _from_file(found, device, precision)


def _from_folder(folder: Path, config: dict[str, Any], device: str, precision: str) -> Backbone:
    weights = _weights_inside(folder)
    # Without require_pretrained, missing weights are a warning and a chance-level CLIP.
    with _explained(weights, str(folder), config):
        model, _, preprocess = _open_clip(config).create_model_and_transforms(
            f"local-dir:{folder}",
            device=device,
            precision=precision,
            require_pretrained=True,
            weights_only=True,
        )
    return Backbone(model, preprocess, _tokenizer(config, folder))


def _from_file(found: ClipFile, device: str, precision: str) -> Backbone:
    with _explained(found.weights, found.architecture, found.model):
        model, _, preprocess = _open_clip(found.model).create_model_and_transforms(
            found.architecture,
            pretrained=str(found.weights),
            device=device,
            precision=precision,
            weights_only=True,
            # Of a file open_clip does not know the activation that its tag asks for.
            force_quick_gelu=bool(found.model.get("quick_gelu")),
            **{f"image_{name}": value for name, value in found.preprocess.items()},
        )
    folder = found.tokenizer[0].parent if found.tokenizer else None
    return Backbone(model, preprocess, _tokenizer(found.model, folder))


OPTIONAL = ("timm", "transformers")  # of open_clip; it does without where they are not installed


def import_open_clip_alone() -> None:
    """Import open_clip as if its optional libraries were not there, in two thirds of the time.

    For processes of our own, whose start is waited for. `load_backbone` makes up for it, but who
    calls open_clip himself may need them.
    """
    sums_in_one_order()
    if "open_clip" in sys.modules:
        return
    hidden = [name for name in OPTIONAL if name not in sys.modules]
    sys.modules.update(dict.fromkeys(hidden))  # type: ignore[arg-type]  # None: not to be imported
    try:
        import open_clip  # noqa: F401
    finally:
        for name in hidden:
            del sys.modules[name]


def _open_clip(model: dict[str, Any]) -> ModuleType:
    """open_clip, with timm where an image tower is one of its. A text tower of transformers takes
    no prompt."""
    open_clip = importlib.import_module("open_clip")  # seconds
    towers = importlib.import_module("open_clip.timm_model")
    if model["vision_cfg"].get("timm_model_name") and towers.timm is None:
        importlib.reload(towers)  # into the namespace that its classes look into
    return open_clip


def _weights_inside(folder: Path) -> Path:
    """The weights that open_clip will read."""
    found = [
        path for suffix in ("safetensors", "bin", "pth") for path in folder.glob(f"*.{suffix}")
    ]
    if not found:
        raise ValueError(
            f"{folder} holds no weights: no .safetensors, .bin or .pth beside its JSON"
        )
    return next((path for path in found if path.name in HUB_WEIGHTS), found[0])


def _tokenizer(config: dict[str, Any], folder: Path | None) -> Any:
    """open_clip's own choice, from files that are here."""
    from open_clip.tokenizer import HFTokenizer, SimpleTokenizer

    text = config["text_cfg"]
    options = {"context_length": text.get("context_length", 77)}
    options |= text.get("tokenizer_kwargs") or {}  # checked by `find_backbone`
    if text.get("hf_tokenizer_name"):
        assert folder is not None
        check_tokenizer_config(folder)
        try:
            return HFTokenizer(
                str(folder),
                tokenizer_mode=text.get("tokenizer_mode"),
                trust_remote_code=False,
                local_files_only=True,
                **options,
            )
        except Exception as error:  # files of a stranger: transformers fails in many ways
            raise ValueError(f"{folder} holds no tokenizer that can be read: {error}") from error
    if folder is not None and (folder / MERGES).is_file():
        options = {"bpe_path": str(folder / MERGES), **options}
    return SimpleTokenizer(**options)


# ---------------------------------------------------------------- weights that do not fit


@contextmanager
def _explained(weights: Path, architecture: str, config: dict[str, Any]) -> Iterator[None]:
    """Turn the many ways in which open_clip fails on weights into one sentence."""
    try:
        yield
    except Exception as error:
        why = _misfit(weights, config)
        if why is None:
            raise
        raise ValueError(f"{weights} does not fit {architecture}: {why}") from error


def _misfit(weights: Path, config: dict[str, Any]) -> str | None:
    """What is wrong with weights, by the first tensor that does not match; None: nothing."""
    import torch
    from open_clip.convert import convert_state_dict
    from open_clip.factory import load_state_dict
    from open_clip.model import CLIP, CustomTextCLIP, convert_to_custom_text_state_dict

    try:
        found = load_state_dict(str(weights))
    except Exception as error:  # pickles, archives, safetensors: each has errors of its own
        first = str(error).strip().partition("\n")[0]
        return (
            f"it cannot be read ({first}); save the state_dict, tensors and nothing else, as "
            ".safetensors"
        )
    kind = CustomTextCLIP if config.get("custom_text") else CLIP
    built = {name: value for name, value in config.items() if name != "custom_text"}
    # As open_clip does where a file has all weights.
    built["vision_cfg"] = {**config["vision_cfg"], "timm_model_pretrained": False}
    try:
        with torch.device("meta"):
            model = kind(**built)
    except Exception as error:  # sizes that do not go together, an unknown architecture of timm
        first = str(error).strip().partition("\n")[0]
        return f"open_clip cannot build its configuration ({type(error).__name__}: {first})"
    found = convert_state_dict(model, found)
    if kind is CustomTextCLIP and "positional_embedding" in found:
        found = convert_to_custom_text_state_dict(found)
    wanted = model.state_dict()
    for name, tensor in wanted.items():
        if name not in found:
            if name == "logit_bias":  # open_clip puts 0
                continue
            return f"it has no tensor {name}"
        here, there = tuple(tensor.shape), tuple(found[name].shape)
        # Positions of another grid are interpolated.
        if here != there and not name.endswith("positional_embedding"):
            return f"{name} is {there} there and {here} in the architecture"
    return next((f"its tensor {n} is unknown there" for n in found if n not in wanted), None)
