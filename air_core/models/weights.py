"""Finds the files of models by name. Imports no torch, needs no network, reads no weights.

A backbone is `tiny`, an open_clip folder, `<architecture>/<tag>` (downloaded weights that open_clip
knows) or `<architecture>@<file>` (any other weights), with `<architecture>/<tag>@<file>` those that
are preprocessed as the weights of a tag. A generator is `tiny`, a diffusers folder, or
the `owner/name` of a downloaded repository of the Hugging Face hub.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cache
from importlib.resources import files
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from zipfile import BadZipFile, ZipFile

from air_core.models.configs import (
    PIPELINE_CONFIG,
    check_clip_config,
    check_configs,
    json_object,
    read_index,
)
from air_core.settings import components

CLIP_CONFIG = "open_clip_config.json"
HUB_WEIGHTS = ("open_clip_model.safetensors", "open_clip_pytorch_model.bin")  # the first found
MERGES = "merges.txt.gz"  # optional byte-pair merges of an open_clip folder
VOCABULARIES = ("tokenizer.json", "vocab.*", "*.model", "*.tiktoken")  # of a tokenizer
HUB_TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")
BACKBONES = (
    f"tiny, a folder with {CLIP_CONFIG}, <architecture>/<tag> such as ViT-B-32/openai, or "
    "<architecture>[/<tag>]@<weights file>"
)
GENERATORS = f"tiny, a folder with {PIPELINE_CONFIG}, or owner/name of the Hugging Face hub"
AGAIN = "download or copy it again"
TOKENIZERS = ("Tokenizer", "TokenizerFast")
WEIGHTLESS = (*TOKENIZERS, "Scheduler", "Processor", "Extractor")
VIT = ("vit_", "eva", "test_vit")  # the names of vision transformers in timm begin so
TEXTS = (".json", ".txt", ".model", ".tiktoken", ".jinja")  # files of a tokenizer
# What a pipeline reads of a repository: others hold the same weights in several formats.
DOWNLOAD = (
    "--include '*.json' --include '*.txt' --include '*.model' --include '*.jinja' "
    "--include '*/*.safetensors' --exclude '*.fp16.*' --exclude '*non_ema*' "
    "--exclude 'safety_checker/*'"
)


def is_distilled(scheduler: Mapping[str, Any]) -> bool:
    """Whether a scheduler's configuration is that of a model for few steps, such as SD-Turbo.

    These models start at the noisiest step: the spacing `trailing` of arXiv:2305.08891, table 2.
    Other models have `leading` or `linspace`.
    """
    return scheduler.get("timestep_spacing") == "trailing"


def scheduler_config(generator: Path) -> dict[str, Any]:
    """Configuration of the sampler of a diffusers folder; empty if it has none."""
    file = generator / "scheduler" / "scheduler_config.json"
    return json_object(file) if file.is_file() else {}


@dataclass(frozen=True)
class ClipWeights:
    """The files of a CLIP, and the settings with which open_clip reads them."""

    name: str  # for open_clip: an architecture, or local-dir:<folder>
    path: Path  # of the weights file, or of the folder
    model: dict[str, Any]  # open_clip's configuration; that of a folder is checked
    files: tuple[Path, ...]  # which the digest covers, in a stable order
    tokenizer: Path | None  # the folder of its files; None: CLIP's tokenizer
    preprocess: dict[str, Any] | None = None  # mean, std and others; None: as the folder says

    @property
    def merges(self) -> Path | None:
        """The file of its byte-pair merges; None: those of CLIP."""
        file = self.tokenizer and self.tokenizer / MERGES
        return file if file and file.is_file() else None

    @property
    def settings(self) -> dict[str, Any]:
        """Settings that determine the results besides the files; empty for a folder.

        One weights file gives other results under another architecture, because of the activation
        function and the preprocessing.
        """
        if self.preprocess is None:
            return {}
        return {"model_cfg": self.model, "preprocess_cfg": self.preprocess}


def stay_offline() -> None:
    """Turn off downloads of models in this process and its child processes.

    huggingface_hub reads its environment at import, so its constant is set as well.
    `huggingface_hub.constants.HF_HUB_OFFLINE = False` allows downloads again.
    """
    os.environ.update(HF_HUB_OFFLINE="1", TRANSFORMERS_OFFLINE="1")
    constants: Any = sys.modules.get("huggingface_hub.constants")
    if constants is not None:
        constants.HF_HUB_OFFLINE = True


def local_path(name: str | Path) -> Path:
    """The absolute path of a file or folder, with `~` and `~user` expanded if the user exists."""
    return Path(os.path.expanduser(name)).absolute()


# ---------------------------------------------------------------- backbones


def find_backbone(name: str) -> ClipWeights:
    """Find the weights of a backbone by name.

    Raises:
        ValueError: the name is unknown, the files are not on this machine, weights or tokenizer
            are damaged, or the configuration of the folder has settings that are not allowed.
    """
    if name in components.BACKBONES:
        raise ValueError(
            f"backbone {name!r} is of a plugin; a bundle needs weights that open_clip reads"
        )
    if name == "tiny":
        return _clip_folder(tiny_folder())
    folder = local_path(name)
    if folder.is_dir():
        return _clip_folder(folder)
    known, at, file = name.partition("@")
    architecture, _, tag = known.partition("/")
    if (at or tag) and "/" not in tag and architecture[:1] not in "~.":
        return _clip_file(architecture, tag, local_path(file) if at else None)
    allowed = ", ".join([*components.BACKBONES, BACKBONES])
    raise ValueError(f"backbone {name!r}: there is no folder {folder}; allowed: {allowed}")


def is_known(name: str) -> bool:
    """Whether open_clip knows the architecture of `<architecture>` or `<architecture>/<tag>`."""
    return (open_clip_folder() / "model_configs" / f"{name.partition('/')[0]}.json").is_file()


def tiny_folder() -> Path:
    """The open_clip folder of the CLIP that is part of the package."""
    return Path(str(files("air_core") / "tiny" / "weights" / "clip"))


def _check_text_tower(model: dict[str, Any], name: str) -> None:
    if model["text_cfg"].get("hf_model_name") or "multimodal_cfg" in model:
        raise ValueError(
            f"{name}: its text tower is neither CLIP's nor SigLIP's, so it accepts no learned "
            "vectors; use a ViT, RN50 or SigLIP"
        )


@cache
def check_image_tower(name: str) -> None:
    """Check that the image tower of a backbone is a vision transformer, which has tokens.

    Raises:
        ValueError: it is not, or the backbone does not exist.
    """
    if name in components.BACKBONES:  # `airsweep plugin check` tests it
        return
    vision = find_backbone(name).model["vision_cfg"]
    default = "a ResNet" if isinstance(vision.get("layers"), list) else VIT[0]
    if not (tower := vision.get("timm_model_name") or default).startswith(VIT):
        raise ValueError(
            "modality: visual learns tokens of a vision transformer, but the image tower of "
            f"{name} is {tower}; set modality: text, or use a backbone such as ViT-B-32 or SigLIP"
        )


def _clip_folder(folder: Path) -> ClipWeights:
    file = folder / CLIP_CONFIG
    config = json_object(file)
    model = config.get("model_cfg")
    if not isinstance(model, dict) or not {"vision_cfg", "text_cfg"} <= {*model}:
        raise ValueError(f"{file}: no model_cfg with vision_cfg and text_cfg")
    _check_text_tower(model, str(folder))
    check_clip_config(file, config)
    if model["text_cfg"].get("hf_tokenizer_name"):
        _check_vocabulary(folder)
    weights = sorted(folder.glob("*.safetensors")) or sorted(folder.glob("*.bin"))
    if not weights:
        raise ValueError(f"{folder} contains no weights: no .safetensors and no .bin")
    for each in weights:
        check_whole(each)
    files = tuple(sorted(path for path in folder.rglob("*") if path.is_file()))
    return ClipWeights(f"local-dir:{folder}", folder, model, files, folder)


def _clip_file(architecture: str, tag: str, file: Path | None) -> ClipWeights:
    """`<architecture>/<tag>`, or the file of `<architecture>[/<tag>]@<file>`."""
    name = f"{architecture}/{tag}" if tag else architecture
    model, rows = _architecture(architecture, name), _tags(architecture)
    if tag:
        if (row := rows.get(tag)) is None:
            raise ValueError(
                f"backbone {name!r}: open_clip knows no weights {tag!r} of {architecture}; known: "
                f"{', '.join(rows) or 'none'}; for another weights file write {architecture}@<file>"
            )
        rows = {tag: row}
        # If a tag was trained with another activation function, open_clip only warns.
        model |= {"quick_gelu": True} if row["quick_gelu"] else {}
    preprocess: dict[str, Any] = next(iter(rows.values()))["preprocess"] if rows else {}
    if any(row["preprocess"] != preprocess for row in rows.values()):
        raise ValueError(
            f"weights of {architecture} were trained with different preprocessing; write "
            f"{architecture}/<tag>@{file} with the tag that the file is of, or is fine-tuned from: "
            f"{', '.join(rows)}"
        )
    weights = _downloaded(architecture, tag, rows[tag]["hf_hub"]) if file is None else file
    check_whole(weights)
    tokenizer = _tokenizer_files(architecture, model, file and file.parent)
    files, folder = (weights, *tokenizer), tokenizer[0].parent if tokenizer else None
    return ClipWeights(architecture, weights, model, files, folder, preprocess)


def _architecture(name: str, backbone: str) -> dict[str, Any]:
    """open_clip's configuration of an architecture."""
    folder = open_clip_folder() / "model_configs"
    file = folder / f"{name}.json"
    if not file.is_file():
        known = sorted(path.stem for path in folder.glob("*.json"))
        close = " or ".join(get_close_matches(name, known))
        hint = f"did you mean {close}?" if close else "see open_clip.list_models()."
        raise ValueError(
            f"backbone {backbone!r}: open_clip has no architecture {name!r}; {hint} Allowed: "
            f"{BACKBONES}"
        )
    model: dict[str, Any] = json.loads(file.read_text())
    _check_text_tower(model, f"backbone {backbone!r}")
    return model


def _downloaded(architecture: str, tag: str, address: str) -> Path:
    """The weights file of a tag in the cache of huggingface_hub."""
    repository, _, file = address.rpartition("/")
    wanted = (f"{file.rpartition('.')[0]}.safetensors", file) if file else HUB_WEIGHTS
    for name in wanted:
        if (found := _in_hub_cache(repository, name)) is not None:
            return found
    raise ValueError(
        f"backbone {architecture}/{tag}: its weights are not on this machine, and airsweep "
        f"downloads nothing; get them with `hf download {repository} {file or wanted[0]}`, or "
        f"write {architecture}/{tag}@<file> for a copied file"
    )


def _tokenizer_files(
    architecture: str, model: dict[str, Any], beside: Path | None
) -> tuple[Path, ...]:
    """Files of the architecture's Hugging Face tokenizer, beside the weights or downloaded."""
    repository = model["text_cfg"].get("hf_tokenizer_name")
    if not repository:
        return ()
    main = HUB_TOKENIZER[0]
    if beside is None or not (beside / main).is_file():
        if (cached := _in_hub_cache(repository, main)) is None:
            raise ValueError(
                f"{architecture} needs the tokenizer of {repository}, which is not on this "
                f"machine; run `hf download {repository} --include 'tokenizer*' --include "
                f"'special_tokens*'`, or put its {main} beside the weights file"
            )
        beside = cached.parent
    return tuple(file for name in HUB_TOKENIZER if (file := beside / name).is_file())


def public_backbone(name: str) -> ClipWeights | None:
    """Find the weights of `tiny` or `<architecture>/<tag>`; None for any other name.

    Unlike `find_backbone` this reads no folder or file by that name, so it is safe for names from
    untrusted sources.

    Raises:
        ValueError: open_clip knows the name, but its weights are not on this machine.
    """
    if name == "tiny":
        return _clip_folder(tiny_folder())
    architecture, _, tag = name.partition("/")
    return _clip_file(architecture, tag, None) if tag in _tags(architecture) else None


# ---------------------------------------------------------------- generators


def generator_folder(name: str) -> Path:
    """The diffusers folder of a generator.

    Raises:
        ValueError: the name is unknown, or files are missing on this machine.
    """
    if name in components.GENERATORS:
        raise ValueError(
            f"generator {name!r} is of a plugin, so it has neither LoRA nor evidence; set "
            "lora: null and evidence.draws: 0"
        )
    if name == "tiny":
        return Path(str(files("air_core") / "tiny" / "weights" / "diffusion"))
    folder = local_path(name)
    if folder.is_dir():
        return folder
    owner, _, rest = name.partition("/")
    if not rest or "/" in rest or owner[:1] in "~.":
        allowed = ", ".join([*components.GENERATORS, GENERATORS])
        raise ValueError(f"generator {name!r}: there is no folder {folder}; allowed: {allowed}")
    index = _in_hub_cache(name, PIPELINE_CONFIG)
    if index is None:
        raise ValueError(
            f"generator {name!r}: no such folder, and the cache of the Hugging Face hub lacks its "
            f"{PIPELINE_CONFIG}; airsweep downloads nothing, so get it with "
            f"`hf download {name} {DOWNLOAD}`"
        )
    return index.parent


def generator_files(folder: Path) -> list[Path]:
    """The files of a diffusers folder that a pipeline reads, which its digest covers.

    Raises:
        ValueError: a part is missing, damaged, or refers to code in its folder.
    """
    found = [folder / PIPELINE_CONFIG]
    for part, (library, kind) in read_index(folder).parts.items():
        if not (folder / part).is_dir():
            raise ValueError(f"{folder} is incomplete: it has no folder {part}; {AGAIN}")
        check_configs(folder / part)
        found += _part_files(folder / part, library, kind)
    return sorted(found)


def _part_files(part: Path, library: str, kind: str) -> list[Path]:
    """The files of a part that are read: a tokenizer, or configurations and weights."""
    if kind.endswith(TOKENIZERS):
        _check_vocabulary(part)
    if kind.endswith(WEIGHTLESS):
        return [path for path in part.rglob("*") if path.is_file() and path.suffix in TEXTS]
    stem = "model" if library == "transformers" else "diffusion_pytorch_model"
    single, index = part / f"{stem}.safetensors", part / f"{stem}.safetensors.index.json"
    files, weights = [*part.glob("*config.json")], [single]
    if not single.is_file() and index.is_file():
        weights = [part / name for name in sorted({*json_object(index)["weight_map"].values()})]
        files += part.glob("*.safetensors.index.json")
    for file in weights:
        if not file.is_file():
            raise ValueError(
                f"{part} has no {file.name}; other weights are not read, since pickles can run "
                "code and variants hold other numbers; download the file, or write the folder "
                "again with save_pretrained of diffusers"
            )
        check_whole(file)
    return files + weights


# ---------------------------------------------------------------- files


def check_whole(file: Path) -> None:
    """Check, without reading its tensors, that a weights file is complete and runs no code.

    Raises:
        ValueError: bytes are missing, as after an interrupted copy, or it is a Git LFS pointer.
    """
    from safetensors import SafetensorError, safe_open

    try:
        if file.suffix == ".safetensors":
            with safe_open(file, framework="np"):
                return
        with ZipFile(file) as archive:
            members = archive.namelist()
    except (OSError, SafetensorError, BadZipFile) as problem:
        raise ValueError(f"{file} cannot be read: {problem}; {AGAIN}") from problem
    if any(name.endswith("/constants.pkl") for name in members):
        raise ValueError(
            f"{file} cannot be read: it is a TorchScript archive, as published by OpenAI, and "
            "reading it runs its code; use a tag such as ViT-B-32/openai, the same weights as "
            "plain tensors"
        )


def _check_vocabulary(folder: Path) -> None:
    if not any(file.is_file() for pattern in VOCABULARIES for file in folder.glob(pattern)):
        raise ValueError(
            f"{folder} is incomplete: it has no vocabulary of a tokenizer, none of "
            f"{', '.join(VOCABULARIES)}; {AGAIN}"
        )


# ---------------------------------------------------------------- open_clip, huggingface_hub


def _in_hub_cache(repository: str, file: str) -> Path | None:
    """A file in huggingface_hub's cache."""
    from huggingface_hub import try_to_load_from_cache  # imports in 100 ms

    found = try_to_load_from_cache(repository, file)
    return Path(found) if isinstance(found, str) else None


@cache
def _tags(architecture: str) -> dict[str, dict[str, Any]]:
    """The weights of an architecture that open_clip knows, by their tag.

    A test compares the table with the installed open_clip.
    """
    table = json_object(Path(__file__).with_name("open_clip_weights.json"))
    return dict(table.get(architecture, {}))


def open_clip_folder() -> Path:
    """open_clip's folder, without importing it, which would import torch."""
    spec = find_spec("open_clip")
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).parent
