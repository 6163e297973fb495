"""Finds the files of models by name. Imports no torch, needs no network, reads no weights.

A backbone is `tiny`, an open_clip folder, `<architecture>/<tag>` (downloaded weights that open_clip
knows) or `<architecture>@<file>` (any other weights), with `<architecture>/<tag>@<file>` those that
are preprocessed as the weights of a tag. A generator is `tiny`, a diffusers folder, or
the `owner/name` of a downloaded repository of the Hugging Face hub.
"""

from __future__ import annotations

import errno
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
    plain_file,
    read_index,
)
from air_core.settings import components

CLIP_CONFIG = "open_clip_config.json"
SUFFIXES = (".safetensors", ".pt", ".pth", ".bin")
WEIGHTS = (*SUFFIXES, ".ckpt")
HUB_WEIGHTS = (
    "open_clip_model.safetensors",
    "open_clip_pytorch_model.bin",
)  # in order of preference
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
VIT = ("vit_", "eva", "test_vit")  # beginnings of names of vision transformers in timm
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
    """The absolute path of a file or folder, with `~` and `~user` expanded.

    Raises:
        ValueError: this machine has no such user, or the path is too long.
    """
    try:
        path = Path(name).expanduser().absolute()
        path.exists()
    except RuntimeError:
        user = Path(name).parts[0]
        raise ValueError(f"{user}: this machine has no such user; allowed: ~ or a path") from None
    except OSError as problem:
        if problem.errno != errno.ENAMETOOLONG:
            raise
        raise ValueError(f"{str(name)[:40]}... is too long for a path") from None
    return path


# ---------------------------------------------------------------- backbones


def find_backbone(name: str | ClipWeights) -> ClipWeights:
    """Find the weights of a backbone by name. A result of this function is returned unchanged.

    Raises:
        ValueError: the name is unknown, the files are not on this machine, weights or tokenizer
            are damaged, or the configuration of the folder has settings that are not allowed.
    """
    if not isinstance(name, str):
        return name
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
    architecture, slash, tag = known.partition("/")
    if (at or slash) and "/" not in tag and architecture.strip(".~"):
        return _clip_file(architecture, tag, local_path(file) if at else None)
    allowed = ", ".join([*components.BACKBONES, BACKBONES])
    raise ValueError(f"backbone {name!r}: {_no_folder(folder)}; allowed: {allowed}")


def _no_folder(path: Path) -> str:
    if path.exists():
        return f"{path} is a file; unpack an archive first"
    return f"{path} does not exist"


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
    timm = vision.get("timm_model_name")
    is_vit = isinstance(vision.get("layers", 0), int)  # a ResNet has a list
    if timm:
        is_vit = timm.startswith(VIT) and not timm.startswith("vit_relpos")
    if is_vit:
        return
    raise ValueError(
        f"modality: visual learns tokens of a vision transformer, but the image tower of {name} is "
        f"{timm or 'a ResNet'}; set modality: text, or use a backbone such as ViT-B-32, SigLIP or "
        "EVA"
    )


def _clip_folder(folder: Path) -> ClipWeights:
    file = folder / CLIP_CONFIG
    config = json_object(file)
    model = config.get("model_cfg")
    if not isinstance(model, dict) or not all(
        isinstance(model.get(key), kind)
        for key, kind in (("embed_dim", int), ("vision_cfg", dict), ("text_cfg", dict))
    ):
        raise ValueError(f"{file}: no model_cfg with embed_dim, vision_cfg and text_cfg")
    _check_text_tower(model, str(folder))
    check_clip_config(file, config)
    if model["text_cfg"].get("hf_tokenizer_name"):
        _check_vocabulary(folder)
    merges = folder / MERGES
    if os.path.lexists(merges) and not plain_file(merges).stat().st_size:
        raise ValueError(f"{merges} is empty; {AGAIN}")  # open_clip would read single letters
    found = (sorted(folder.glob(f"*.{suffix}")) for suffix in ("safetensors", "bin", "pth"))
    weights = next(filter(None, found), [])
    if not weights:
        raise ValueError(f"{folder} contains no weights: no .safetensors, .bin or .pth")
    for each in weights:
        check_whole(each)
    files = tuple(sorted(path for path in folder.rglob("*") if path.is_file()))
    return ClipWeights(f"local-dir:{folder}", folder, model, files, folder)


def _clip_file(architecture: str, tag: str, file: Path | None) -> ClipWeights:
    """`<architecture>/<tag>`, or the file of `<architecture>[/<tag>]@<file>`."""
    name = f"{architecture}/{tag}" if tag else architecture
    model, rows = _architecture(architecture, name), _tags(architecture)
    if tag:
        if (row := rows.get(_as_tag(tag))) is None:
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
    if weights.suffix not in SUFFIXES:
        raise ValueError(
            f"{weights} is not a weights file; allowed suffixes: {', '.join(SUFFIXES)}"
        )
    check_whole(weights, architecture)
    tokenizer = _tokenizer_files(architecture, model, file and file.parent)
    files, folder = (weights, *tokenizer), tokenizer[0].parent if tokenizer else None
    return ClipWeights(architecture, weights, model, files, folder, preprocess)


def _architecture(name: str, backbone: str) -> dict[str, Any]:
    """open_clip's configuration of an architecture."""
    folder = open_clip_folder() / "model_configs"
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
    if beside is not None and (beside / main).is_file():
        return tuple(beside / name for name in HUB_TOKENIZER if (beside / name).is_file())
    found = [path for name in HUB_TOKENIZER if (path := _in_hub_cache(repository, name))]
    if not found or found[0].name != main:
        where = "" if beside is None else f", or put its {main} beside the weights"
        raise ValueError(
            f"{architecture} needs the tokenizer of {repository}, which is not on this machine; "
            f"run `hf download {repository} --include 'tokenizer*' --include 'special_tokens*'`"
            f"{where}"
        )
    return tuple(found)


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
    return _clip_file(architecture, tag, None) if _as_tag(tag) in _tags(architecture) else None


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
    if not rest or "/" in rest or not owner.strip(".~"):
        allowed = ", ".join([*components.GENERATORS, GENERATORS])
        raise ValueError(f"generator {name!r}: {_no_folder(folder)}; allowed: {allowed}")
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
        listed = json_object(index).get("weight_map")
        if isinstance(listed, dict) and listed:
            weights = [part / name for name in sorted({*map(str, listed.values())})]
        files += part.glob("*.safetensors.index.json")
    for file in weights:
        if not file.is_file():
            others = sorted(path.name for path in part.iterdir() if path.suffix in WEIGHTS)
            raise ValueError(
                f"{part} has no {file.name}; other weights ({', '.join(others) or 'none'}) are not "
                "read, since pickles can run code and variants hold other numbers; download the "
                "file, or write the folder again with save_pretrained of diffusers"
            )
        check_whole(file)
    return files + weights


# ---------------------------------------------------------------- files


def check_whole(file: Path, architecture: str = "<architecture>") -> None:
    """Check, without reading its tensors, that a weights file is complete and runs no code.

    Raises:
        ValueError: bytes are missing, as after an interrupted copy, or it is a Git LFS pointer.
    """
    from safetensors import SafetensorError, safe_open

    try:
        if plain_file(file).suffix == ".safetensors":
            with safe_open(file, framework="np"):
                return
        with ZipFile(file) as archive:
            members = archive.namelist()
    except (SafetensorError, BadZipFile) as problem:
        raise ValueError(f"{file} cannot be read: {problem}; {AGAIN}") from problem
    if any(name.endswith("/constants.pkl") for name in members):
        raise ValueError(
            f"{file} cannot be read: it is a TorchScript archive, as published by OpenAI, and "
            f"reading it runs its code; use {architecture.removesuffix('-quickgelu')}/openai, the "
            "same weights as plain tensors"
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


def _tags(architecture: str) -> dict[str, dict[str, Any]]:
    """The weights of an architecture that open_clip knows, by their tag."""
    return _table().get(architecture, {})


def _as_tag(tag: str) -> str:
    return tag.lower().replace("-", "_")  # as open_clip does


@cache
def _table() -> dict[str, dict[str, dict[str, Any]]]:
    """Weights by architecture and tag. A test compares the table with the installed open_clip."""
    table: dict[str, dict[str, dict[str, Any]]] = json_object(
        Path(__file__).with_name("open_clip_weights.json")
    )
    return table


def open_clip_folder() -> Path:
    """open_clip's folder, without importing it, which would import torch."""
    spec = find_spec("open_clip")
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).parent
