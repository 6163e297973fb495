"""Finds the files of models by name. Imports no torch, needs no network, reads no weights.

A backbone is `tiny`, an open_clip folder, `<architecture>/<tag>` (downloaded weights that open_clip
knows) or `<architecture>@<file>` (any other weights), with `<architecture>/<tag>@<file>` those that
are preprocessed as the weights of a tag. A generator is `tiny`, a diffusers folder, or
the `owner/name` of a downloaded repository of the Hugging Face hub.
"""

from __future__ import annotations

import errno
import gzip
import json
import os
import sys
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from functools import cache
from importlib.resources import files
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from zipfile import ZIP_DEFLATED, ZIP_STORED, BadZipFile, ZipFile

from air_core import components
from air_core.models.configs import (
    check_clip_config,
    check_part_configs,
    json_object,
    pipeline_index,
    pipeline_parts,
)

CLIP_CONFIG = "open_clip_config.json"
PIPELINE_CONFIG = "model_index.json"
SUFFIXES = (".safetensors", ".pt", ".pth", ".bin")
HUB_WEIGHTS = (
    "open_clip_model.safetensors",
    "open_clip_pytorch_model.bin",
)  # in order of preference
MERGES = "merges.txt.gz"  # optional byte-pair merges of an open_clip folder
MOST_MERGES = 1 << 24  # bytes of unpacked merges to read; CLIP's are 3 MB
VOCABULARIES = ("tokenizer.json", "vocab.*", "*.model", "*.tiktoken")  # of a tokenizer
HUB_TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")
BACKBONES = (
    f"tiny, a folder with {CLIP_CONFIG}, <architecture>/<tag> such as ViT-B-32/openai, or "
    "<architecture>[/<tag>]@<weights file>"
)
GENERATORS = f"tiny, a folder with {PIPELINE_CONFIG}, or owner/name of the Hugging Face hub"
AGAIN = "download or copy it again"
LFS = b"version https://git-lfs"  # start of a Git LFS pointer
CONFIGS = tuple(
    f"{prefix}config.json"
    for prefix in ("", "scheduler_", "tokenizer_", "preprocessor_", "processor_")
)
TOKENIZERS = ("Tokenizer", "TokenizerFast")
WEIGHTLESS = (*TOKENIZERS, "Scheduler", "Processor", "Extractor")
VIT = ("vit_", "eva", "test_vit")  # beginnings of names of vision transformers in timm
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
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
class ClipFolder:
    """An open_clip folder, with the configuration of its model."""

    path: Path
    model: dict[str, Any]  # checked configuration
    weights: Path  # the file that open_clip reads


@dataclass(frozen=True)
class ClipFile:
    """Weights of an architecture that open_clip knows."""

    architecture: str
    weights: Path
    model: dict[str, Any]  # open_clip's configuration of the architecture
    preprocess: dict[str, Any]  # mean, std, interpolation, resize_mode; empty for OpenAI's values
    tokenizer: tuple[Path, ...] = field(default=())  # files of a Hugging Face tokenizer


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
        raise ValueError(
            f"{str(name)[:40]}... is too long for a path; allowed: 255 bytes per name, 4095 in all"
        ) from None
    return path


# ---------------------------------------------------------------- backbones


def weights_files(name: str | ClipFolder | ClipFile) -> list[Path]:
    """All files of a backbone, which its digest covers, in a stable order.

    Raises:
        ValueError: the name is unknown, or the files are not on this machine.
    """
    found = find_backbone(name)
    if isinstance(found, ClipFolder):
        return sorted(path for path in found.path.rglob("*") if path.is_file())
    return [found.weights, *found.tokenizer]


def weights_settings(name: str | ClipFolder | ClipFile) -> dict[str, Any]:
    """Settings that determine a backbone's results besides its files; empty for a folder.

    One weights file gives other results under another architecture, because of the activation
    function and the preprocessing.
    """
    found = find_backbone(name)
    if isinstance(found, ClipFolder):
        return {}
    return {"model_cfg": found.model, "preprocess_cfg": found.preprocess}


def find_backbone(name: str | ClipFolder | ClipFile) -> ClipFolder | ClipFile:
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
        if not (folder / CLIP_CONFIG).is_file():
            raise ValueError(f"{folder} has no {CLIP_CONFIG}: not an open_clip folder")
        return _clip_folder(folder)
    known, at, file = name.partition("@")
    architecture, slash, tag = known.partition("/")
    if at and "/" not in tag and architecture.strip(".~"):
        return _own_weights(architecture, tag, local_path(file))
    architecture, slash, tag = name.partition("/")
    if slash and "/" not in tag and architecture.strip(".~"):
        return _known_weights(architecture, tag)
    allowed = ", ".join([*components.BACKBONES, BACKBONES])
    raise ValueError(f"backbone {name!r}: {_no_folder(folder)}; allowed: {allowed}")


def _no_folder(path: Path) -> str:
    if path.exists():
        return f"{path} is a file; unpack an archive first"
    return f"{path} does not exist"


def named_model(name: str) -> dict[str, Any] | None:
    """open_clip's configuration of `<architecture>` or `<architecture>/<tag>`.

    Returns:
        None if open_clip does not know the architecture.

    Raises:
        ValueError: open_clip knows the architecture but not the tag.
    """
    architecture, _, tag = name.partition("/")
    if not (_open_clip() / "model_configs" / f"{architecture}.json").is_file():
        return None
    return _tagged(architecture, tag)[0] if tag else _architecture(architecture, name)


def tiny_folder() -> Path:
    """The open_clip folder of the CLIP that is part of the package."""
    return Path(str(files("air_core") / "tiny" / "weights" / "clip"))


def check_text_tower(model: dict[str, Any], name: str) -> None:
    """Check that an open_clip model has a text tower that accepts learned vectors.

    Raises:
        ValueError: it has not.
    """
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
    if model["text_cfg"].get("hf_tokenizer_name"):
        _check_tokenizer(folder)
    if os.path.lexists(folder / MERGES):
        _check_merges(folder / MERGES)
    return ClipFolder(folder, model, _weights_inside(folder))


def _weights_inside(folder: Path) -> Path:
    """The weights file that open_clip reads."""
    found = [
        path for suffix in ("safetensors", "bin", "pth") for path in folder.glob(f"*.{suffix}")
    ]
    if not found:
        raise ValueError(
            f"{folder} contains no weights: no .safetensors, .bin or .pth beside its JSON file"
        )
    weights = next((path for path in found if path.name in HUB_WEIGHTS), found[0])
    check_whole(weights)
    return weights


def _check_merges(file: Path) -> None:
    _check_is_file(file)
    try:
        with gzip.open(file) as packed:
            problem: object = "" if packed.read(MOST_MERGES).strip() else "it is empty"
    except (OSError, EOFError, zlib.error) as error:
        problem = error
    if problem:
        raise ValueError(f"{file} holds no byte-pair merges: {problem}; {AGAIN}")


def _own_weights(architecture: str, tag: str, file: Path) -> ClipFile:
    """`<architecture>@<file>`, or `<architecture>/<tag>@<file>` with the preprocessing of a tag."""
    if tag:
        model, known = _tagged(architecture, tag)
        pixels = known["preprocess"]
    else:
        model = _architecture(architecture, f"{architecture}@{file}")
        pixels = _common_pixels(architecture, file)
    if not file.is_file():
        raise ValueError(f"backbone {architecture}@{file}: {file} does not exist")
    if file.suffix not in SUFFIXES:
        raise ValueError(f"{file} is not a weights file; allowed suffixes: {', '.join(SUFFIXES)}")
    check_whole(file, architecture)
    tokenizer = _tokenizer_files(architecture, model, beside=file.parent)
    return ClipFile(architecture, file, model, pixels, tokenizer)


def _common_pixels(architecture: str, file: Path) -> dict[str, Any]:
    """The preprocessing of all known weights of an architecture; empty if there are none.

    Raises:
        ValueError: they were trained with different ones.
    """
    known = _tags(architecture)
    found: list[dict[str, Any]] = [row["preprocess"] for row in known.values()] or [{}]
    if all(each == found[0] for each in found):
        return found[0]
    raise ValueError(
        f"weights of {architecture} were trained with different preprocessing; write "
        f"{architecture}/<tag>@{file} with the tag that the file is of, or is fine-tuned from: "
        f"{', '.join(known)}"
    )


def _known_weights(architecture: str, tag: str) -> ClipFile:
    """`<architecture>/<tag>`."""
    model, known = _tagged(architecture, tag)
    weights = _fetched(architecture, tag, known)
    tokenizer = _tokenizer_files(architecture, model, beside=None)
    return ClipFile(architecture, weights, model, known["preprocess"], tokenizer)


def _tagged(architecture: str, tag: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """open_clip's model configuration and weights configuration of `<architecture>/<tag>`."""
    name = f"{architecture}/{tag}"
    model = _architecture(architecture, name)
    known = _tag(architecture, tag)
    if not known:
        tags = ", ".join(_tags(architecture)) or "none"
        raise ValueError(
            f"backbone {name!r}: open_clip knows no weights {tag!r} of {architecture}; known: "
            f"{tags}; for another weights file write {architecture}@<file>"
        )
    # If a tag was trained with another activation function, open_clip only warns.
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
    """The weights file of a tag in the cache of huggingface_hub."""
    repository, _, file = known["hf_hub"].rpartition("/")
    wanted = (f"{file.rpartition('.')[0]}.safetensors", file) if file else HUB_WEIGHTS
    for one in wanted:
        found = _in_hub_cache(repository, one)
        if found is not None:
            check_whole(found, architecture)
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


def public_backbone(name: str) -> ClipFolder | ClipFile | None:
    """Find the weights of `tiny` or `<architecture>/<tag>`; None for any other name.

    Unlike `find_backbone` this reads no folder or file by that name, so it is safe for names from
    untrusted sources.

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
        if not (folder / PIPELINE_CONFIG).is_file():
            raise ValueError(f"{folder} is not a diffusers folder: it has no {PIPELINE_CONFIG}")
        return folder
    owner, _, rest = name.partition("/")
    if not rest or "/" in rest or not owner.strip(".~"):
        allowed = ", ".join([*components.GENERATORS, GENERATORS])
        raise ValueError(f"generator {name!r}: {_no_folder(folder)}; allowed: {allowed}")
    index = _in_hub_cache(name, PIPELINE_CONFIG)
    missing = [PIPELINE_CONFIG] if index is None else _missing_parts(index.parent)
    if index is None or missing:
        raise ValueError(
            f"generator {name!r}: no such folder, and the cache of the Hugging Face hub lacks its "
            f"{', '.join(missing)}; airsweep downloads nothing, so get it with "
            f"`hf download {name} {DOWNLOAD}`"
        )
    return index.parent


def generator_files(folder: Path) -> list[Path]:
    """The files of a diffusers folder that a pipeline reads, which its digest covers.

    Raises:
        ValueError: a part is missing, damaged, or refers to code in its folder.
    """
    found = [folder / PIPELINE_CONFIG]
    for part, (library, kind) in generator_parts(folder).items():
        _check_part(folder, part, library, kind)
        found += _read_files(folder / part, library, kind)
    return sorted(found)


def generator_parts(folder: Path) -> dict[str, tuple[str, str]]:
    """Subfolders of a pipeline, each with its library and class, without the safety checker.

    Raises:
        ValueError: the index cannot be read, or names code of the folder or of another package.
    """
    return pipeline_parts(pipeline_index(folder / PIPELINE_CONFIG))


def _missing_parts(folder: Path) -> list[str]:
    return [part for part in generator_parts(folder) if not (folder / part).is_dir()]


def _check_part(folder: Path, part: str, library: str, kind: str) -> None:
    part_folder = folder / part
    if not part_folder.is_dir():
        raise ValueError(
            f"{folder} is incomplete: {PIPELINE_CONFIG} lists the part {part}, but the folder "
            f"{part} is missing; {AGAIN}"
        )
    if not any((part_folder / config).is_file() for config in CONFIGS):
        raise ValueError(
            f"{part_folder} is incomplete: it has none of {', '.join(CONFIGS)}; {AGAIN}"
        )
    check_part_configs(part_folder)
    if kind.endswith(TOKENIZERS):
        _check_tokenizer(part_folder)
    for file in _part_weights(part_folder, library, kind):
        check_whole(file)


def _read_files(part: Path, library: str, kind: str) -> list[Path]:
    """The files of a part that are read: configurations and weights, or a tokenizer."""
    weights = _part_weights(part, library, kind)
    if weights:
        index = part.glob("*.safetensors.index.json") if "-of-" in weights[0].name else ()
        return [*part.glob("*config.json"), *index, *weights]
    return [path for path in part.rglob("*") if path.is_file() and path.suffix in TEXTS]


def _part_weights(part: Path, library: str, kind: str) -> list[Path]:
    """The files with the weights of a part; none of a tokenizer or a scheduler.

    Raises:
        ValueError: the part has no weights in safetensors format.
    """
    if kind.endswith(WEIGHTLESS):
        return []
    stem = "model" if library == "transformers" else "diffusion_pytorch_model"
    if (single := part / f"{stem}.safetensors").is_file():
        return [single]
    if (index := part / f"{stem}.safetensors.index.json").is_file():
        listed = json_object(index).get("weight_map")
        names = sorted({*map(str, listed.values())}) if isinstance(listed, dict) else []
        missing = [name for name in names if not (part / name).is_file()]
        if missing or not names:
            problem = f"{', '.join(missing)}: missing" if missing else "no file"
            raise ValueError(f"{part} is incomplete: {index.name} lists {problem}")
        return [part / name for name in names]
    variants = sorted(file.name for file in part.glob(f"{stem}.*.safetensors"))
    if variants:
        raise ValueError(
            f"{part} has {variants[0]} but no {stem}.safetensors, and only the latter is read; "
            f"download it too, or rename {variants[0]} to use those weights"
        )
    pickled = sorted(file.name for pattern in PICKLES for file in part.glob(pattern))
    if pickled:
        raise ValueError(
            f"{part} has only {pickled[0]}, a pickle, which can run code when it is loaded; "
            f"download {stem}.safetensors of the same model, or, if you trust the folder, load it "
            "with diffusers and convert it by save_pretrained(FOLDER, safe_serialization=True)"
        )
    raise ValueError(f"{part} has no weights: {stem}.safetensors is missing; {AGAIN}")


# ---------------------------------------------------------------- files


def check_whole(file: Path, architecture: str = "<architecture>") -> None:
    """Check, without reading its tensors, that a weights file is complete and runs no code.

    The file of `torch.save` before PyTorch 1.6 is no archive, so nothing shows that it is complete.

    Raises:
        ValueError: bytes are missing, as after an interrupted copy, or it has no tensors.
    """
    _check_is_file(file)
    with open(file, "rb") as handle:
        start = handle.read(len(LFS))
    if start == LFS:
        problem = "it is a Git LFS pointer; run `git lfs pull` to get the file"
    elif file.suffix == ".safetensors":
        problem = _tensors_problem(file)
    elif start.startswith(b"PK"):
        problem = _archive_problem(file, architecture)
    else:
        problem = "" if start.startswith(b"\x80") else f"it is not written by torch.save; {AGAIN}"
    if problem:
        raise ValueError(f"{file} cannot be read: {problem}")


def _tensors_problem(file: Path) -> str:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="np") as tensors:
            return "" if tensors.keys() else "it contains no tensors"
    except SafetensorError as problem:
        return f"{problem}; {AGAIN}"


def _archive_problem(file: Path, architecture: str) -> str:
    try:
        with ZipFile(file) as archive:
            members = archive.infolist()
    except (BadZipFile, NotImplementedError) as problem:
        return f"it is damaged ({problem}); {AGAIN}"
    for member in members:
        if member.filename.endswith("/constants.pkl"):
            plain = architecture.removesuffix("-quickgelu")
            return (
                "it is a TorchScript archive, as published by OpenAI, and reading it runs its "
                f"code; use {plain}/openai, the same weights as plain tensors"
            )
        if member.flag_bits & 1 or member.compress_type not in (ZIP_STORED, ZIP_DEFLATED):
            return (
                f"its member {member.filename} is encrypted, or compressed in a way that PyTorch "
                "does not read; write the file again with torch.save"
            )
    return ""


def _check_tokenizer(folder: Path) -> None:
    files = [file for pattern in VOCABULARIES for file in folder.glob(pattern) if file.is_file()]
    if not files:
        raise ValueError(
            f"{folder} is incomplete: it has no vocabulary of a tokenizer, none of "
            f"{', '.join(VOCABULARIES)}; {AGAIN}"
        )
    for file in files:
        # Parsing a tokenizer can take half a second, as its file has up to 34 MB.
        if file.suffix == ".json" and not file.read_bytes().rstrip().endswith(b"}"):
            raise ValueError(f"{file} is empty or cut off; {AGAIN}")


def _check_is_file(file: Path) -> None:
    if not file.is_file():
        raise ValueError(f"{file} is a broken link, a folder or a device, not a file; {AGAIN}")


# ---------------------------------------------------------------- open_clip, huggingface_hub


def _in_hub_cache(repository: str, file: str) -> Path | None:
    """A file in huggingface_hub's cache."""
    from huggingface_hub import try_to_load_from_cache  # imports in 100 ms

    found = try_to_load_from_cache(repository, file)
    return Path(found) if isinstance(found, str) else None


def _tags(architecture: str) -> dict[str, dict[str, Any]]:
    """The weights of an architecture that open_clip knows, by their tag."""
    table = files("air_core") / "models" / "open_clip_weights.json"
    return _table(str(table)).get(architecture, {})


def _tag(architecture: str, tag: str) -> dict[str, Any]:
    """A row of the table of weights; empty if open_clip does not know the tag."""
    return _tags(architecture).get(tag.lower().replace("-", "_"), {})


@cache
def _table(file: str) -> dict[str, dict[str, dict[str, Any]]]:
    """Weights by architecture and tag. A test compares the table with the installed open_clip."""
    table: dict[str, dict[str, dict[str, Any]]] = json_object(Path(file))
    return table


def _open_clip() -> Path:
    """open_clip's folder, without importing it."""
    spec = find_spec("open_clip")
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).parent
