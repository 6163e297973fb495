"""Names of backbones: files, loading, error messages, and untrusted folders."""

from __future__ import annotations

import io
import json
import logging
import shutil
import sys
from copy import deepcopy
from pathlib import Path
from typing import Any
from zipfile import ZipFile

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from air_core.backbone.loading import load_backbone
from air_core.models import weights
from air_core.models.configs import check_clip_config
from air_core.models.tokens import check_room
from air_core.models.weights import (
    check_image_tower,
    find_backbone,
    open_clip_folder,
    tiny_folder,
)
from tests.helpers.golden import check_golden
from tests.helpers.sweeps import python

NAMES = ["tree frog", "heart", "boot"]


# ---------------------------------------------------------------- names


def test_tiny_and_a_folder_name_all_their_files(tmp_path):
    assert [path.name for path in find_backbone("tiny").files] == [
        "merges.txt.gz",
        "open_clip_config.json",
        "open_clip_model.safetensors",
    ]
    for file in find_backbone("tiny").files:
        (tmp_path / file.name).symlink_to(file)
    assert [path.parent for path in find_backbone(str(tmp_path)).files] == [tmp_path] * 3
    assert find_backbone(str(tmp_path)).settings == {}
    assert load_backbone(tmp_path).logit_scale == load_backbone("tiny").logit_scale


def test_the_golden_table_of_weights_is_that_of_the_installed_open_clip():
    import open_clip

    pixels = ("mean", "std", "interpolation", "resize_mode")
    table: dict[str, dict[str, Any]] = {}
    for architecture, tag in open_clip.list_pretrained():
        known = open_clip.get_pretrained_cfg(architecture, tag)
        row = {"hf_hub": known["hf_hub"], "quick_gelu": known.get("quick_gelu", False)}
        row["preprocess"] = {name: known[name] for name in pixels}
        table.setdefault(architecture, {})[tag] = row
    architectures = [
        f"{json.dumps(name)}: {{\n"
        + ",\n".join(f"  {json.dumps(tag)}: {json.dumps(row)}" for tag, row in rows.items())
        for name, rows in table.items()
    ]
    text = "{\n" + "},\n".join(architectures) + "}\n}\n"
    check_golden(str(Path(weights.__file__).with_name("open_clip_weights.json")), text)


def test_openais_torchscript_archive_is_rejected_with_an_alternative(tmp_path):
    archive = tmp_path / "ViT-B-32.pt"
    with ZipFile(archive, "w") as scripted:
        for entry in ("constants.pkl", "data.pkl", "code/__torch__.py"):
            scripted.writestr(f"ViT-B-32/{entry}", "")
    with pytest.raises(ValueError, match=r"TorchScript archive.*ViT-B-32/openai"):
        find_backbone(f"ViT-B-32-quickgelu@{archive}")


# ---------------------------------------------------------------- the real architectures


def test_a_tag_is_loaded_from_the_cache_with_its_activation_function(monkeypatch, tmp_path):
    import open_clip

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    repository = tmp_path / "models--timm--vit_base_patch32_clip_224.openai"
    for folder in ("refs", "snapshots/abc"):
        (repository / folder).mkdir(parents=True)
    (repository / "refs/main").write_text("abc")
    whole = repository / "snapshots/abc/open_clip_model.safetensors"
    file = tmp_path / "tensors.pt"
    for architecture in ("ViT-B-32", "ViT-B-32-quickgelu"):  # one layer instead of 12
        config = deepcopy(open_clip.factory._MODEL_CONFIGS[architecture])
        config["vision_cfg"]["layers"] = config["text_cfg"]["layers"] = 1
        monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, architecture, config)

    logging.disable(logging.WARNING)  # random weights are intended
    state = open_clip.create_model("ViT-B-32", pretrained=None).half().state_dict()
    logging.disable(logging.NOTSET)
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, whole)
    torch.save({"epoch": 3, "state_dict": state}, file)
    assert find_backbone("ViT-B-32/openai").files == (whole,)
    context, image = torch.zeros(2, 512), Image.new("RGB", (300, 200))

    def loaded(name: str) -> tuple[Any, ...]:  # one after the other, since each takes 150 MB
        backbone = load_backbone(name)
        assert backbone.encode_images([image]).shape == (1, 512)
        assert backbone.image_tokens([image]).shape == (1, 50, 768)
        blocks = backbone.model.visual.transformer.resblocks
        return type(blocks[0].mlp.gelu).__name__, backbone.encode_context(context, NAMES)

    names = ("ViT-B-32/openai", f"ViT-B-32-quickgelu@{file}", f"ViT-B-32@{file}")
    activations, features = zip(*map(loaded, names), strict=True)
    assert activations == ("QuickGELU", "QuickGELU", "GELU")
    assert torch.equal(features[0], features[1])
    # The file does not contain the activation function, so the settings must.
    settings = find_backbone("ViT-B-32/openai").settings
    assert settings == find_backbone(f"ViT-B-32-quickgelu@{file}").settings
    assert settings != find_backbone(f"ViT-B-32@{file}").settings


def test_preprocessing_of_a_file_is_that_of_its_tag_or_architecture(tmp_path):
    file, tokenizer = tmp_path / "some.safetensors", tmp_path / "tokenizer.json"
    save_file({"one": torch.ones(1)}, file)  # never read
    tokenizer.touch()
    found = find_backbone(f"ViT-B-16-SigLIP@{file}")
    assert (found.preprocess["mean"], found.preprocess["resize_mode"]) == ([0.5] * 3, "squash")
    assert found.files == (file, tokenizer)
    tags = ("openai", "laion2b_s32b_b82k")
    means = [find_backbone(f"ViT-L-14/{tag}@{file}").preprocess["mean"] for tag in tags]
    assert means[0] != means[1] == [0.5] * 3
    assert find_backbone(f"ViT-B-32/openai@{file}").settings["model_cfg"]["quick_gelu"]
    for vit in ("ViT-B-32", "EVA02-B-16"):
        check_image_tower(f"{vit}@{file}")  # refusals are in messages/inputs.txt


# ---------------------------------------------------------------- SigLIP


@pytest.fixture(scope="module")
def siglip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a small model like SigLIP: no causal mask, last token, timm's ViT."""
    import open_clip
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("siglip")
    words = ["<pad>", "</s>", "<unk>", *" ".join(NAMES).split(), "a", "photo", "of"]
    plain = Tokenizer(
        models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>")
    )
    plain.pre_tokenizer = pre_tokenizers.Whitespace()
    plain.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", 1)]
    )
    # In SigLIP padding and the end of text are the same token.
    PreTrainedTokenizerFast(
        tokenizer_object=plain, eos_token="</s>", pad_token="</s>", unk_token="<unk>"
    ).save_pretrained(folder)
    text = {"context_length": 12, "vocab_size": len(words), "width": 32, "heads": 2, "layers": 2}
    config = {
        "embed_dim": 64,
        "init_logit_bias": -10,
        "custom_text": True,
        "vision_cfg": {
            "image_size": 160, "timm_model_name": "test_vit", "timm_pool": "map",
            "timm_proj": "none",
        },
        "text_cfg": text | {
            "hf_tokenizer_name": "someone/siglip", "tokenizer_kwargs": {"clean": "canonicalize"},
            "no_causal_mask": True, "proj_bias": True, "pool_type": "last",
        },
    }  # fmt: skip
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": config}))
    torch.manual_seed(0)
    built = {name: value for name, value in config.items() if name != "custom_text"}
    model = open_clip.CustomTextCLIP(**built)
    save_file(model.state_dict(), folder / "open_clip_model.safetensors")
    return folder


def test_siglip_encodes_word_embeddings_as_context_like_the_text(siglip):
    backbone = load_backbone(siglip)
    words = backbone.tokenizer(["a photo of a"])[0, :4]
    context = backbone.model.text.token_embedding(words)
    context = context[None].repeat(2, 1, 1).requires_grad_()
    features = backbone.encode_context(context, NAMES)
    expected = backbone.encode_texts([f"a photo of a {name}" for name in NAMES])
    assert features.shape == (2, 3, 64)
    torch.testing.assert_close(features[0].detach(), expected)
    torch.testing.assert_close(features[1].detach(), expected)
    features.sum().backward()
    assert context.grad.abs().sum() > 0
    image = Image.new("RGB", (90, 50))
    assert backbone.encode_images([image]).shape == (1, 64)
    check_image_tower(str(siglip))
    # The bias of its sigmoid is the same for all classes, so a softmax over classes has none.
    assert backbone.logit_scale == pytest.approx(backbone.model.logit_scale.exp().item())


def test_texts_of_siglip_in_packs_give_the_same_features_and_gradients(siglip, monkeypatch):
    backbone = load_backbone(siglip)
    contexts = torch.randn(2, 3, 32, generator=torch.Generator().manual_seed(0))
    weight = torch.randn(2, 3, 64, generator=torch.Generator().manual_seed(1))
    found = []
    for pack in (128, 2):
        monkeypatch.setattr("air_core.backbone.text.PACK", pack)
        context = contexts.clone().requires_grad_()
        features = backbone.encode_context(context, NAMES)
        (features * weight).sum().backward()
        found.append((features.detach(), context.grad))
    for whole, packed in zip(*found, strict=True):
        torch.testing.assert_close(packed, whole)


def test_texts_are_padded_on_the_right_whatever_the_tokenizer_says(siglip, tmp_path):
    folder = shutil.copytree(siglip, tmp_path / "left")
    config = folder / "tokenizer_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"padding_side": "left"}))
    left, right = (load_backbone(each).encode_texts(NAMES) for each in (folder, siglip))
    assert torch.equal(left, right)


def test_names_that_do_not_fit_siglip_are_rejected_with_and_without_the_model(siglip):
    backbone, names = load_backbone(siglip), ("heart", "tree frog")
    backbone.encode_context(torch.zeros(9, 32), names)  # 9 + 2 + end = 12
    check_room(str(siglip), names, "a photo of a {}", 9)
    with pytest.raises(ValueError, match="'tree frog' does not fit into the 2 tokens"):
        backbone.encode_context(torch.zeros(10, 32), names)
    with pytest.raises(ValueError, match="'tree frog' takes 3 tokens with start and end, but"):
        check_room(str(siglip), names, "a photo of a {}", 10)
    check_room(str(siglip), ("tree. frog!",), "a photo of a {}", 9)  # it reads no punctuation


# ---------------------------------------------------------------- untrusted folders

CONFIG = "open_clip_config.json"
EVIL = """
open({marker!r}, "w").close()
from transformers import PreTrainedTokenizerFast
class Evil(PreTrainedTokenizerFast): pass
"""


@pytest.fixture
def answers_yes(monkeypatch, tmp_path):
    """Answer yes to every prompt, and keep downloaded modules in the test's folder."""
    monkeypatch.setattr("sys.stdin", io.StringIO("y\n" * 9))
    modules = str(tmp_path / "modules")
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", modules)
    monkeypatch.setattr("sys.path", [*sys.path])


def test_tokenizer_code_in_a_folder_is_not_run(siglip, tmp_path, answers_yes):
    folder = Path(shutil.copytree(siglip, tmp_path / "folder"))
    code = {"tokenizer_class": "Evil", "auto_map": {"AutoTokenizer": [None, "evil.Evil"]}}
    file = folder / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | code))
    (folder / "evil.py").write_text(EVIL.format(marker=str(folder / "ran")))
    with pytest.raises(ValueError, match=str(folder)):
        load_backbone(folder)
    assert not (folder / "ran").exists()


@pytest.mark.parametrize("kind", ["AutoTokenizer", "AutoModel", "RagTokenizer", 5])
def test_a_tokenizer_that_loads_other_models_is_rejected(kind, siglip, tmp_path):
    folder = Path(shutil.copytree(siglip, tmp_path / "folder"))
    file = folder / "tokenizer_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "tokenizer_class": kind}))
    with pytest.raises(
        ValueError, match=r"tokenizer_config\.json: tokenizer_class is .* such as T5Tokenizer"
    ):
        load_backbone(folder)


@pytest.mark.parametrize(
    ("where", "value", "message"),
    [
        ("model_cfg", 1, "no model_cfg with vision_cfg and text_cfg"),
        ("model_cfg.text_cfg.tokenizer_kwargs", {"bpe_path": "motd"}, "'motd'}; allowed: clean"),
        ("model_cfg.text_cfg.tokenizer_kwargs", {"trust_remote_code": True}, "True}; allowed: c"),
        ("model_cfg.vision_cfg.timm_model_name", "hf-hub:timm/vit", "words without : and /"),
        ("model_cfg.vision_cfg.timm_model_name", "timm/vit_tiny", "words without : and /"),
        ("model_cfg.vision_cfg.act_kwargs", [{"a": "/x.pt"}], "a is '/x.pt'; allowed in a"),
    ],
)
def test_a_setting_that_is_not_allowed_in_a_folder_is_rejected_by_name(
    where, value, message, tmp_path
):
    folder = Path(shutil.copytree(tiny_folder(), tmp_path / "folder"))
    config = section = json.loads((folder / CONFIG).read_text())
    *sections, key = where.split(".")
    for name in sections:
        section = section[name]
    section[key] = value
    (folder / CONFIG).write_text(json.dumps(config))
    for read in (find_backbone, load_backbone):  # when planning, and when loading
        with pytest.raises(ValueError, match=rf"{folder}/{CONFIG}: .*{message}"):
            read(str(folder))


def test_all_configurations_of_open_clip_with_a_supported_text_tower_pass():
    files = sorted((open_clip_folder() / "model_configs").glob("*.json"))
    models = {file: json.loads(file.read_text()) for file in files}
    assert len(models) > 100
    for file, model in models.items():
        if not model["text_cfg"].get("hf_model_name"):
            check_clip_config(file, {"model_cfg": model})


@pytest.mark.parametrize("name", ["tiny", "siglip"])
def test_a_folder_written_by_open_clip_is_read(name, siglip, tmp_path):
    from open_clip.push_to_hf_hub import save_config_for_hf

    source = tiny_folder() if name == "tiny" else siglip
    folder = Path(shutil.copytree(source, tmp_path / "folder"))
    model = json.loads((folder / CONFIG).read_text())["model_cfg"]
    save_config_for_hf(load_backbone(source).model, folder / CONFIG, model)
    assert load_backbone(folder).logit_scale == load_backbone(source).logit_scale


class Pickled:
    """Creates a file when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return open, (str(self.marker), "w")


def test_reading_pickled_weights_runs_no_code(tmp_path):
    folder = Path(shutil.copytree(tiny_folder(), tmp_path / "folder"))
    (folder / "open_clip_model.safetensors").unlink()
    content = {"state_dict": Pickled(tmp_path / "ran")}
    torch.save(content, folder / "open_clip_pytorch_model.bin")
    with pytest.raises(ValueError, match=r"cannot be loaded as .*weights_only"):
        load_backbone(folder)
    assert not (tmp_path / "ran").exists()


# ---------------------------------------------------------------- no network

CONNECTIONS = """
import os, sys
def watch(event, arguments):
    if event in ("socket.connect", "socket.getaddrinfo", "socket.gethostbyname"):
        print(event, *arguments, flush=True)
        os._exit(0)
sys.addaudithook(watch)
import huggingface_hub.constants  # reads the environment
"""
DOWNLOADS = """
def must_fail(download, *arguments):
    try:
        download(*arguments)
    except Exception:
        return
    raise AssertionError("there is no such model here")

from huggingface_hub import hf_hub_download
must_fail(hf_hub_download, "timm/vit_tiny", "config.json")
import timm
must_fail(timm.create_model, "hf-hub:timm/vit_tiny")
from transformers import AutoTokenizer
must_fail(AutoTokenizer.from_pretrained, "timm/vit_tiny")
print("none")
"""
LOADS_BACKBONES = """
import json, torch
from air_core.backbone.loading import import_open_clip_alone, load_backbone
import_open_clip_alone()
load_backbone("tiny")
torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=1).step()
print(json.dumps("sympy" in sys.modules))
print(torch.compile(lambda x: x + 1, backend="eager")(torch.ones(1)).item())
print(json.dumps(sorted({"timm", "transformers"} & sys.modules.keys())))
load_backbone(sys.argv[1])
print(json.dumps(sorted({"timm"} & sys.modules.keys())))
"""
LOADS_A_GENERATOR = """
from air_core.diffusion.pipeline import load_pipeline
from air_core.models.weights import generator_folder
load_pipeline(generator_folder("tiny"))
"""


def connections(program: str, *arguments: str, home: Path) -> list[str]:
    """Lines of a process without offline settings; the last is its first connection or `none`."""
    online = {"HF_HUB_OFFLINE": "0", "TRANSFORMERS_OFFLINE": "0"}
    hub = {"HF_HOME": str(home), "HF_ENDPOINT": "http://127.0.0.1:9"}
    return python("-c", CONNECTIONS + program, *arguments, **online, **hub).stdout.splitlines()


@pytest.fixture(scope="module")
def loading(siglip: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Lines of a process that loads backbones and then tries downloads."""
    home = tmp_path_factory.mktemp("home")
    return connections(LOADS_BACKBONES + DOWNLOADS, str(siglip), home=home)


def test_a_model_is_loaded_without_libraries_that_it_does_not_need(loading):
    """Workers would start more slowly. A plugin can compile: then torch's compiler is imported."""
    assert [json.loads(line) for line in loading[:-1]] == [False, 2.0, [], ["timm"]]


def test_a_process_opens_no_connection_after_loading_a_backbone(loading):
    assert loading[-1] == "none"


def test_a_process_opens_no_connection_after_loading_a_generator(tmp_path):
    assert connections(LOADS_A_GENERATOR + DOWNLOADS, home=tmp_path) == ["none"]


def test_the_same_process_opens_connections_without_loading_a_model(tmp_path):
    [connection] = connections(DOWNLOADS, home=tmp_path)
    assert connection.startswith("socket.")
