"""Work of each stage on a device: kernel calls, casts of weights, copies to the host, memory.

The models are of the real classes with few channels and random weights, since counts do not depend
on channels: a pipeline of the shape of Stable Diffusion 1.5 with a LoRA, and the tiny CLIP.

- *draw*, *evidence*: one forward pass of the U-Net; *LoRA*: one step of training;
- *encode*: one batch of CLIP's image tower; *prompt*: one step of learning a text prompt.

A kernel call is an operation that is no view. `host` counts values and tensors that are copied from
the device; on a CPU only values that Python reads. `peak_mb` is the most memory of results that are
alive at a time, `weights_mb` the size of all loaded weights.

    python benchmarks/device.py [--device cpu] [--precision bf16]

It takes a minute. Baseline: a forward pass of the plain diffusers pipeline that has loaded the same
LoRA, with weights in float32 under autocast. The last line is JSON: `ratio` is its number of kernel
calls divided by that of *draw*.
"""

from __future__ import annotations

import sys
import tempfile
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.harness import options, progress, report

CAPTIONS = ("a photo of a rose", "a photo of a daisy")
CLASSES = ("rose", "daisy")
Figures = dict[str, float]


class Counts(TorchDispatchMode):
    """Counts kernel calls, casts of weights and copies to the host while it is active."""

    def __init__(self) -> None:
        super().__init__()
        self.kernels = self.casts = self.host = self.peak = 0
        self.live: dict[int, int] = {}  # bytes of storages, by address

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        with self:  # count the parts of a composite operation instead
            if (parts := func.decompose(*args, **kwargs)) is not NotImplemented:
                return parts
        result = func(*args, **kwargs)
        name = func.overloadpacket.__name__
        if name == "_local_scalar_dense":
            self.host += 1
        elif name == "_to_copy":
            source = args[0]
            self.casts += isinstance(source, nn.Parameter) and result.dtype != source.dtype
            self.host += result.device.type == "cpu" != source.device.type
        if not (name == "_unsafe_view" or _is_view(func)):
            self.kernels += 1
            self._allocate(result)
        return result

    def _allocate(self, result: Any) -> None:
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and tensor.untyped_storage()._cdata not in self.live:
                storage = tensor.untyped_storage()
                self.live[storage._cdata] = storage.nbytes()
                weakref.finalize(storage, self.live.pop, storage._cdata, None)
        self.peak = max(self.peak, sum(self.live.values()))

    def figures(self) -> Figures:
        counts = {"kernels": self.kernels, "casts": self.casts, "host": self.host}
        return {**counts, "peak_mb": self.peak / 1e6}


def _is_view(func: Any) -> bool:
    return any(r.alias_info is not None and not r.alias_info.is_write for r in func._schema.returns)


def counted(module: nn.Module, work: Callable[[], object]) -> Figures:
    """Counts of the last forward pass of a module during some work."""
    passes: list[Counts] = []

    def begin(*_: object) -> None:
        passes.append(Counts())
        passes[-1].__enter__()

    def end(*_: object) -> None:
        passes[-1].__exit__(None, None, None)

    hooks = [module.register_forward_pre_hook(begin), module.register_forward_hook(end)]
    work()
    for hook in hooks:
        hook.remove()
    return passes[-1].figures()


class Step:
    """Counts from one report of a training to the next."""

    def __init__(self) -> None:
        self.counts: list[Counts] = []

    def __call__(self, done: int, steps: int, *_: object) -> None:
        if self.counts:
            self.counts[-1].__exit__(None, None, None)
        if done < steps:
            self.counts.append(Counts())
            self.counts[-1].__enter__()


def megabytes(pipeline: Any) -> float:
    """Size of all weights of a pipeline."""
    parts = [part for part in pipeline.components.values() if isinstance(part, nn.Module)]
    return sum(w.numel() * w.element_size() for part in parts for w in part.parameters()) / 1e6


def random_pipeline(folder: Path) -> int:
    """Write the pipeline of the shape of Stable Diffusion 1.5; returns the image size in pixels."""
    from diffusers import (
        AutoencoderKL,
        DDIMScheduler,
        StableDiffusionPipeline,
        UNet2DConditionModel,
    )
    from transformers import CLIPTextConfig, CLIPTextModel

    from air_core.diffusion.pipeline import load_pipeline
    from air_core.models.weights import generator_folder

    width = size = 64
    text = CLIPTextConfig(
        vocab_size=49408,
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=1,
        num_attention_heads=1,
        max_position_embeddings=77,
    )
    unet = UNet2DConditionModel(
        sample_size=size // 8,
        cross_attention_dim=width,
        block_out_channels=(32, 64, 128, 128),
        attention_head_dim=8,
        norm_num_groups=4,
    )
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(32, 64, 128, 128),
        layers_per_block=2,
        latent_channels=4,
        sample_size=size,
    )
    noise = DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False
    )
    StableDiffusionPipeline(
        vae=vae,
        text_encoder=CLIPTextModel(text),
        tokenizer=load_pipeline(generator_folder("tiny")).tokenizer,
        unet=unet,
        scheduler=noise,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(folder)
    return size


# ---------------------------------------------------------------- stages


def lora(model: Path, out: Path, size: int, arguments: Any) -> Figures:
    """A step of training; writes the LoRA."""
    from air_core.diffusion.lora import train_lora
    from air_core.settings import LoraTraining

    training = LoraTraining(rank=4, steps=3, batch=2, precision=arguments.precision)
    images = torch.randint(256, (2, size, size, 3), dtype=torch.uint8)
    step = Step()
    train_lora(images, CAPTIONS, model, training, size, out, device=arguments.device, report=step)
    return step.counts[-1].figures()


def draw(model: Path, adapter: Path, size: int, arguments: Any) -> Figures:
    from air_core.diffusion.pipeline import PipelineGenerator
    from air_core.settings import GenerationSettings

    settings = GenerationSettings(
        size=size, block=2, num_inference_steps=2, precision=arguments.precision
    )
    generator = PipelineGenerator(model, settings, adapter=adapter, device=arguments.device)
    work = lambda: generator.generate(CLASSES[0], [0, 1], [0, 0])  # noqa: E731
    found = counted(generator.pipeline.unet, work)
    return {**found, "weights_mb": megabytes(generator.pipeline)}


def plain(model: Path, adapter: Path, size: int, arguments: Any) -> Figures:
    """The baseline."""
    import diffusers

    pipeline = diffusers.StableDiffusionPipeline.from_pretrained(
        str(model), local_files_only=True, safety_checker=None
    )
    pipeline.set_progress_bar_config(disable=True)
    pipeline.load_lora_weights(str(adapter), weight_name="pytorch_lora_weights.safetensors")
    pipeline.to(arguments.device)

    def work() -> None:
        with torch.inference_mode(), torch.autocast(arguments.device, torch.bfloat16):
            pipeline([*CAPTIONS], height=size, width=size, num_inference_steps=2)

    return {**counted(pipeline.unet, work), "weights_mb": megabytes(pipeline)}


def evidence(model: Path, adapter: Path, size: int, arguments: Any) -> Figures:
    from air_core.diffusion.denoising import DenoisingScorer
    from air_core.settings import EvidenceScoring

    scoring = EvidenceScoring(precision=arguments.precision)
    scorer = DenoisingScorer(
        model, scoring, CLASSES, size, adapter=adapter, device=arguments.device
    )
    latents = scorer.latents(torch.randint(256, (2, size, size, 3), dtype=torch.uint8))
    every = torch.ones(2, len(CLASSES), dtype=torch.bool)
    network = scorer.denoiser.network
    return counted(network, lambda: scorer.errors(latents, [0, 1], 0, every))


def encode(arguments: Any) -> Figures:
    from PIL import Image

    from air_core.backbone.loading import load_backbone

    clip = load_backbone("tiny", arguments.device, "fp32")
    images = [Image.new("RGB", (32, 32))] * 8
    return counted(clip.model.visual, lambda: clip.encode_images(images))


def prompt(arguments: Any) -> Figures:
    """A step of learning a text prompt on one-hot pseudo-labels."""
    from air_core.backbone.loading import load_backbone
    from air_core.prompts import build_learner
    from air_core.settings import PromptSettings, TrainSettings
    from air_core.training import Training, fit
    from air_core.types import Encoded, Labelled

    clip = load_backbone("tiny", arguments.device, "fp32")
    features = torch.nn.functional.normalize(torch.randn(64, 128), dim=1).to(arguments.device)
    labels = torch.arange(64, device=arguments.device) % len(CLASSES)
    step = Step()
    learner = build_learner("text", PromptSettings(), clip, CLASSES, "a photo of a {}", 0)
    training = Training(
        learner=learner, real=None, labelled=Labelled(Encoded(features), labels), synthetic=None,
        synthetic_weight=0.0, loss="cc", settings=TrainSettings(steps=3, batch=16), seed=0,
        report=step,
    )  # fmt: skip
    fit([training])
    return step.counts[-1].figures()


def main() -> None:
    arguments = options(__doc__, device="cpu", precision="bf16")
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        model, adapter = Path(folder) / "model", Path(folder) / "lora"
        size = random_pipeline(model)
        stages = {"LoRA": lora(model, adapter, size, arguments)}
        for name, stage in (("plain", plain), ("draw", draw), ("evidence", evidence)):
            stages[name] = stage(model, adapter, size, arguments)
    stages |= {"encode": encode(arguments), "prompt": prompt(arguments)}
    for name, figures in stages.items():
        progress(name.ljust(10), *(f"{key} {value:g}" for key, value in figures.items()))
    report(
        "device",
        stages["plain"]["kernels"] / stages["draw"]["kernels"],
        "a forward pass of the plain pipeline with a loaded LoRA under autocast",
        device=arguments.device,
        stages=stages,
    )


if __name__ == "__main__":
    main()
