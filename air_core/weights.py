"""Names of models become files. Imports no torch, opens no network, reads no weights.

A backbone is `tiny`, an open_clip folder, `<architecture>/<tag>` (weights that open_clip knows and
that were fetched before) or `<architecture>@<file>` (weights of one's own). A generator is `tiny`,
a diffusers folder, or `owner/name` of the Hugging Face hub, fetched before.
"""

from __future__ import annotations

import json
import os
import sys
from dataclasses import dataclass, field
from difflib import get_close_matches
from functools import cache
from importlib import import_module
from importlib.resources import files
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any
from zipfile import ZipFile, is_zipfile

from air_core.model_configs import (
    check_clip_config,
    json_object,
    pipeline_index,
    pipeline_parts,
)

CLIP_CONFIG = "open_clip_config.json"
PIPELINE_CONFIG = "model_index.json"
SUFFIXES = (".safetensors", ".pt", ".pth", ".bin")
HUB_WEIGHTS = ("open_clip_model.safetensors", "open_clip_pytorch_model.bin")  # by preference
HUB_TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")
BACKBONES = (
    f"tiny, a folder with {CLIP_CONFIG}, <architecture>/<tag> such as ViT-B-32/openai, or "
    "<architecture>@<weights file>"
)
GENERATORS = f"tiny, a folder with {PIPELINE_CONFIG}, or owner/name of the Hugging Face hub"
LFS = b"version https://git-lfs"  # how a pointer of Git LFS begins
LORA_PIPELINES = ("StableDiffusionPipeline", "StableDiffusionXLPipeline")


@dataclass(frozen=True)
class ClipFolder:
    """An open_clip folder, which says itself how its model is built."""

    path: Path
    model: dict[str, Any]  # its configuration, checked


@dataclass(frozen=True)
class ClipFile:
    """Weights of an architecture that open_clip knows."""

    architecture: str
    weights: Path
    model: dict[str, Any]  # open_clip's configuration of the architecture
    preprocess: dict[str, Any]  # mean, std, interpolation, resize_mode; empty: OpenAI's
    tokenizer: tuple[Path, ...] = field(default=())  # of Hugging Face, where it has one


def stay_offline() -> None:
    """Forbid downloads of models in this process, and in those that it starts, from now on.

    huggingface_hub reads its environment once, when it is imported; so what it has read is changed
    too. `huggingface_hub.constants.HF_HUB_OFFLINE = False` allows downloads again.
    """
    os.environ.update(HF_HUB_OFFLINE="1", TRANSFORMERS_OFFLINE="1")
    constants: Any = sys.modules.get("huggingface_hub.constants")
    if constants is not None:
        constants.HF_HUB_OFFLINE = True


# ---------------------------------------------------------------- backbones


def weights_files(name: str | ClipFolder | ClipFile) -> list[Path]:
    """All files that a backbone is read from, in a stable order: what a digest is made of.

    Raises:
        ValueError: unknown, or not on this machine; says what to do.
    """
    found = find_backbone(name)
    if isinstance(found, ClipFolder):
        return sorted(path for path in found.path.rglob("*") if path.is_file())
    return [found.weights, *found.tokenizer]


def weights_settings(name: str | ClipFolder | ClipFile) -> dict[str, Any]:
    """What settles a backbone's results beside its files; empty for a folder, which holds it all.

    The same file is another model under another architecture: activation, preprocessing.
    """
    found = find_backbone(name)
    if isinstance(found, ClipFolder):
        return {}
    return {"model_cfg": found.model, "preprocess_cfg": found.preprocess}


def find_backbone(name: str | ClipFolder | ClipFile) -> ClipFolder | ClipFile:
    """Where the weights of a backbone lie; what was found already is given back.

    Raises:
        ValueError: unknown, or not on this machine, says what to do; or a folder whose
            configuration is damaged or has settings that a folder may not have.
    """
    if not isinstance(name, str):
        return name
    if name == "tiny":
        return _clip_folder(tiny_folder())
    folder = Path(name).expanduser().absolute()
    if folder.is_dir():
        if not (folder / CLIP_CONFIG).is_file():
            raise ValueError(f"{folder} has no {CLIP_CONFIG}: not an open_clip folder")
        return _clip_folder(folder)
    architecture, at, file = name.partition("@")
    if at and "/" not in architecture:
        return _own_weights(architecture, Path(file).expanduser().absolute())
    architecture, slash, tag = name.partition("/")
    if slash and "/" not in tag and architecture.strip(".~"):
        return _known_weights(architecture, tag)
    raise ValueError(f"backbone {name!r}: {folder} is not there; allowed: {BACKBONES}")


def named_model(name: str) -> dict[str, Any] | None:
    """open_clip's configuration of `<architecture>` or `<architecture>/<tag>`; None: no such
    architecture.

    Raises:
        ValueError: it knows the architecture, and no such tag of it.
    """
    architecture, _, tag = name.partition("/")
    if not (_open_clip() / "model_configs" / f"{architecture}.json").is_file():
        return None
    return _tagged(architecture, tag)[0] if tag else _architecture(architecture, name)


def tiny_folder() -> Path:
    """The embedded CLIP, an open_clip folder."""
    return Path(str(files("air_core") / "tiny" / "weights" / "clip"))


def check_text_tower(model: dict[str, Any], name: str) -> None:
    """A configuration of open_clip has a text tower that takes learned vectors.

    Raises:
        ValueError: it has another one.
    """
    if model["text_cfg"].get("hf_model_name") or "multimodal_cfg" in model:
        raise ValueError(
            f"{name}: its text tower is neither CLIP's nor SigLIP's, so it takes no learned "
            "vectors; take a ViT, RN50 or SigLIP"
        )


def _clip_folder(folder: Path) -> ClipFolder:
    file = folder / CLIP_CONFIG
    config = json_object(file)
    model = config.get("model_cfg")
    if not isinstance(model, dict) or not all(
        isinstance(model.get(key), kind)
        for key, kind in (("embed_dim", int), ("vision_cfg", dict), ("text_cfg", dict))
    ):
        raise ValueError(f"{file}: no model_cfg with embed_dim, vision_cfg and text_cfg")
    check_text_tower(model, str(folder))
    check_clip_config(file, config)
    return ClipFolder(folder, model)


def _own_weights(architecture: str, file: Path) -> ClipFile:
    """`<architecture>@<file>`."""
    model = _architecture(architecture, f"{architecture}@{file}")
    if not file.is_file():
        raise ValueError(f"backbone {architecture}@{file}: that file is not there")
    _check_readable(file, architecture)
    # Where all weights of an architecture want the same pixels, these will too.
    known = [_tag(architecture, tag) for tag in _tags(architecture)]
    pixels = _pixels(known[0]) if known else {}
    if any(_pixels(other) != pixels for other in known):
        pixels = {}
    tokenizer = _tokenizer_files(architecture, model, beside=file.parent)
    return ClipFile(architecture, file, model, pixels, tokenizer)


def _known_weights(architecture: str, tag: str) -> ClipFile:
    """`<architecture>/<tag>`."""
    model, known = _tagged(architecture, tag)
    weights = _fetched(architecture, tag, known)
    tokenizer = _tokenizer_files(architecture, model, beside=None)
    return ClipFile(architecture, weights, model, _pixels(known), tokenizer)


def _tagged(architecture: str, tag: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """What open_clip builds for `<architecture>/<tag>`, and what it knows of those weights."""
    name = f"{architecture}/{tag}"
    model = _architecture(architecture, name)
    known = _tag(architecture, tag)
    if not known:
        tags = ", ".join(_tags(architecture)) or "none"
        raise ValueError(
            f"backbone {name!r}: open_clip knows no weights {tag!r} of {architecture}; known: "
            f"{tags}; for a file of your own write {architecture}@<file>"
        )
    # open_clip merely warns where a tag was trained with another activation than it builds.
    if known.get("quick_gelu"):
        model = model | {"quick_gelu": True}
    return model, known


def _architecture(name: str, backbone: str) -> dict[str, Any]:
    """open_clip's configuration of an architecture."""
    folder = _open_clip() / "model_configs"
    file = folder / f"{name}.json"
    if not file.is_file():
        known = sorted(path.stem for path in folder.glob("*.json"))
        wanted = dict.fromkeys((name, backbone.replace("/", "-")))
        close = {c: None for word in wanted for c in get_close_matches(word, known, n=2)}
        hint = f"did you mean {' or '.join(close)}?" if close else "see open_clip.list_models()."
        raise ValueError(
            f"backbone {backbone!r}: open_clip has no architecture {name!r}; {hint} Allowed: "
            f"{BACKBONES}"
        )
    model: dict[str, Any] = json.loads(file.read_text())
    check_text_tower(model, f"backbone {backbone!r}")
    return model


def _fetched(architecture: str, tag: str, known: dict[str, Any]) -> Path:
    """Weights of a tag, where open_clip or huggingface_hub have put them."""
    how = f"open_clip.create_model({architecture!r}, pretrained={tag!r})"
    if known["hf_hub"]:
        repository, _, file = known["hf_hub"].rpartition("/")
        wanted = (*_safe_twin(file), file) if file else HUB_WEIGHTS
        for one in wanted:
            found = _in_hub_cache(repository, one)
            if found is not None:
                return found
        how = f"hf download {repository} {file or wanted[0]}"
    if known["url"]:
        found = Path("~/.cache/clip").expanduser() / Path(known["url"]).name
        if found.is_file():
            _check_readable(found, architecture)
            return found
    raise ValueError(
        f"backbone {architecture}/{tag}: its weights are not on this machine, and nothing is "
        f"fetched while airsweep runs; fetch them first by `{how}`, or write "
        f"{architecture}{_activation(architecture, known)}@<file> for a file that you copied here"
    )


def _activation(architecture: str, known: dict[str, Any]) -> str:
    """What must be added to an architecture's name to get the activation of a tag."""
    quick = known.get("quick_gelu") and not architecture.endswith("-quickgelu")
    return "-quickgelu" if quick else ""


def _check_readable(file: Path, architecture: str) -> None:
    """A weights file holds tensors, and no code that reading it would have to run.

    Raises:
        ValueError: another kind of file.
    """
    if file.suffix not in SUFFIXES:
        raise ValueError(f"{file}: weights end in {', '.join(SUFFIXES)}")
    if file.suffix == ".safetensors" or not is_zipfile(file):
        return
    with ZipFile(file) as archive:
        scripted = any(name.endswith("/constants.pkl") for name in archive.namelist())
    if scripted:
        plain = architecture.removesuffix("-quickgelu")
        raise ValueError(
            f"{file} is a TorchScript archive, as OpenAI published CLIP: it cannot be read without "
            f"running its code. The same weights as plain tensors: {plain}/openai"
        )


def _tokenizer_files(
    architecture: str, model: dict[str, Any], beside: Path | None
) -> tuple[Path, ...]:
    """Files of a Hugging Face tokenizer, where an architecture has one: beside the weights, or
    fetched before."""
    repository = model["text_cfg"].get("hf_tokenizer_name")
    if not repository:
        return ()
    main = HUB_TOKENIZER[0]
    if beside is not None and (beside / main).is_file():
        return tuple(beside / name for name in HUB_TOKENIZER if (beside / name).is_file())
    found = [path for name in HUB_TOKENIZER if (path := _in_hub_cache(repository, name))]
    if not found or found[0].name != main:
        where = "" if beside is None else f", or put its {main} beside the weights"
        raise ValueError(
            f"{architecture} reads text with the tokenizer of {repository}, which is not on this "
            f"machine; `hf download {repository} --include 'tokenizer*' 'special_tokens*'`{where}"
        )
    return tuple(found)


def _pixels(tag: dict[str, Any]) -> dict[str, Any]:
    names = ("mean", "std", "interpolation", "resize_mode")
    return {name: tag[name] for name in names if name in tag}


def public_backbone(name: str) -> ClipFolder | ClipFile | None:
    """Where the weights of `tiny` or `<architecture>/<tag>` lie; None: the name is another one.

    Unlike `find_backbone` it takes no folder or file of that name: for names from strangers.

    Raises:
        ValueError: open_clip knows the name, but its weights are not on this machine.
    """
    if name == "tiny":
        return _clip_folder(tiny_folder())
    architecture, _, tag = name.partition("/")
    return _known_weights(architecture, tag) if _tag(architecture, tag) else None


# ---------------------------------------------------------------- generators


def generator_folder(name: str) -> Path:
    """The diffusers folder of a generator.

    Raises:
        ValueError: unknown, or not whole on this machine; says what to do.
    """
    if name == "tiny":
        return Path(str(files("air_core") / "tiny" / "weights" / "diffusion"))
    folder = Path(name).expanduser().absolute()
    if folder.is_dir():
        if not (folder / PIPELINE_CONFIG).is_file():
            raise ValueError(f"{folder} is no diffusers folder: it has no {PIPELINE_CONFIG}")
        return folder
    owner, _, rest = name.partition("/")
    if not rest or "/" in rest or not owner.strip(".~"):
        raise ValueError(f"generator {name!r}: {folder} is not there; allowed: {GENERATORS}")
    index = _in_hub_cache(name, PIPELINE_CONFIG)
    missing = [PIPELINE_CONFIG] if index is None else _missing_parts(index.parent)
    if index is None or missing:
        raise ValueError(
            f"generator {name!r}: no such folder, and the cache of the Hugging Face hub lacks its "
            f"{', '.join(missing)}; nothing is fetched while airsweep runs, so fetch it first by "
            f"`hf download {name}`"
        )
    return index.parent


def generator_files(folder: Path) -> list[Path]:
    """Files of a diffusers folder that a pipeline is read from: what a digest is made of."""
    found = [folder / PIPELINE_CONFIG]
    for part in generator_parts(folder):
        found += [path for path in (folder / part).rglob("*") if path.is_file()]
    return sorted(found)


def check_lora_fits(folder: Path) -> None:
    """A LoRA can be trained for the pipeline in a diffusers folder.

    Raises:
        ValueError: it is of another kind, says which are known; or its index cannot be read.
    """
    kind = pipeline_index(folder / PIPELINE_CONFIG)["_class_name"]
    if kind not in LORA_PIPELINES:
        raise ValueError(
            f"LoRA knows {' and '.join(LORA_PIPELINES)} (Stable Diffusion 1, 2 and XL), but "
            f"{folder} is a {kind}; set lora: null to draw without"
        )


def generator_parts(folder: Path) -> dict[str, tuple[str, str]]:
    """Subfolders of a pipeline, and of which library and class each is. The safety checker is never
    loaded.

    Raises:
        ValueError: the index cannot be read, or names code of the folder or of another package.
    """
    return pipeline_parts(pipeline_index(folder / PIPELINE_CONFIG))


def _missing_parts(folder: Path) -> list[str]:
    return [part for part in generator_parts(folder) if not (folder / part).is_dir()]


# ---------------------------------------------------------------- files


def check_whole(file: Path) -> None:
    """A safetensors file has all the bytes that its head promises; other files are not looked at.

    Raises:
        ValueError: it has not, such as one that was copied in part.
    """
    if file.suffix != ".safetensors":
        return
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="np") as tensors:
            if not tensors.keys():
                raise ValueError(f"{file} holds no tensors")
    except SafetensorError as problem:
        with open(file, "rb") as handle:
            pointer = handle.read(len(LFS)) == LFS
        why = "it is a pointer of Git LFS; `git lfs pull` fetches what it stands for"
        raise ValueError(
            f"{file} cannot be read: "
            + (why if pointer else f"{problem}; was it fetched to its end?")
        ) from problem


# ---------------------------------------------------------------- what others know


def _in_hub_cache(repository: str, file: str) -> Path | None:
    """A file in huggingface_hub's cache."""
    from huggingface_hub import try_to_load_from_cache  # a tenth of a second

    found = try_to_load_from_cache(repository, file)
    return Path(found) if isinstance(found, str) else None


def _safe_twin(file: str) -> list[str]:
    """The name of the same weights as safetensors, if `file` is something else."""
    stem, _, suffix = file.rpartition(".")
    return [f"{stem}.safetensors"] if suffix in ("bin", "pt", "pth") else []


def _tags(architecture: str) -> list[str]:
    """Weights of an architecture that open_clip knows."""
    return list(_pretrained().list_pretrained_tags_by_model(architecture))


def _tag(architecture: str, tag: str) -> dict[str, Any]:
    """Where a tag's weights are and how they were trained; empty if there is no such tag."""
    return dict(_pretrained().get_pretrained_cfg(architecture, tag))


@cache
def _pretrained() -> ModuleType:
    """open_clip.pretrained, its table of weights, without the rest of open_clip.

    open_clip's own __init__ and safetensors.torch import torch: seconds that planning should not
    pay. So the module is loaded under a package of another name, with the latter hidden.
    """
    package = ModuleType("_open_clip_tables")
    package.__path__ = [str(_open_clip())]
    hidden = "safetensors.torch" not in sys.modules
    sys.modules[package.__name__] = package
    if hidden:
        sys.modules["safetensors.torch"] = None  # type: ignore[assignment]
    try:
        return import_module(f"{package.__name__}.pretrained")
    finally:
        if hidden:
            del sys.modules["safetensors.torch"]


def _open_clip() -> Path:
    """open_clip's folder, without importing it."""
    spec = find_spec("open_clip")
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).parent
