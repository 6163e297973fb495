"""Images from a diffusers text-to-image folder, with one LoRA or none.

Any pipeline that turns a text into an image: Stable Diffusion, PixArt, Flux and so on. Sampling is
DPM-Solver++ (arXiv:2211.01095) where the model was trained on noise levels that it knows, else the
model's own. Nothing here reads a network: the folder is what there is.
"""

# mypy: allow-untyped-calls

from __future__ import annotations

import inspect
from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from air_core.arithmetic import sums_in_one_order
from air_core.diffusion import image_seed
from air_core.model_configs import check_part_configs, pipeline_index, pipeline_parts
from air_core.specs import GenerationSettings, Precision
from air_core.weights import PIPELINE_CONFIG, check_lora_fits, generator_parts, stay_offline

# B images, H height, W width.

ADAPTER = "air"  # the LoRA's name inside peft
LORA_FILE = "pytorch_lora_weights.safetensors"
TEXT_TO_IMAGE = {
    "prompt", "height", "width", "num_inference_steps", "guidance_scale", "generator", "output_type"
}  # fmt: skip


class PipelineGenerator:
    """An ImageGenerator over a diffusers folder."""

    def __init__(
        self,
        model: Path,
        settings: GenerationSettings,
        *,
        adapter: Path | None = None,
        scale: float = 1.0,
        device: str = "cpu",
        thrift: int = 0,
    ) -> None:
        """
        Args:
            model: folder of the pipeline.
            settings: how images are drawn. A guidance of 1 or less means none, as in diffusers.
            adapter: folder that holds the LoRA.
            scale: weight of the LoRA; 0 is the model alone.
            device: where to draw.
            thrift: how much memory is saved for time, see `load_generator`.

        Raises:
            ValueError: a folder without a pipeline or without a LoRA, or of the wrong kind.
        """
        if adapter is not None:
            check_lora_fits(model)
        self.settings = settings
        self.device = device
        self.pipeline = load_pipeline(model)
        _check_draws_from_text(self.pipeline, model)
        self.pipeline.scheduler = _sampler(self.pipeline.scheduler)
        if adapter is not None:
            load_adapter(self.pipeline, adapter, scale)
        if thrift > 0:
            self.pipeline.vae.enable_slicing()
        if thrift > 1 and torch.device(device).type != "cpu":
            self.pipeline.enable_model_cpu_offload(device=device)
        else:
            self.pipeline.to(device)

    def generate(self, classname: str, indices: Sequence[int], attempts: Sequence[int]) -> Tensor:
        """See ImageGenerator. Pixels depend a little on the batch, so a batch is always a block.

        Raises:
            ValueError: the model cannot draw images of this size.
        """
        settings = self.settings
        # On the CPU and one for each image: neither the device nor the neighbours move the noise.
        generators = [
            torch.Generator("cpu").manual_seed(image_seed(settings.seed, classname, i, attempt))
            for i, attempt in zip(indices, attempts, strict=True)
        ]
        with torch.inference_mode(), autocast(self.device, settings.precision):
            drawn = self.pipeline(
                [settings.template.format(classname.replace("_", " "))] * len(generators),
                height=settings.size,
                width=settings.size,
                num_inference_steps=settings.num_inference_steps,
                guidance_scale=settings.guidance_scale,
                generator=generators,
                output_type="pt",
            ).images  # (B, 3, H, W) in [0, 1]
        if tuple(drawn.shape[-2:]) != (settings.size, settings.size):
            raise ValueError(
                f"generation.size is {settings.size}, but this model draws "
                f"{drawn.shape[-1]} x {drawn.shape[-2]}; take a multiple of 16"
            )
        return _pixels(drawn)


def _pixels(drawn: Tensor) -> Tensor:
    """(B, 3, H, W) in [0, 1] -> (B, H, W, 3) uint8; an image with a NaN is black, so rejected."""
    drawn = drawn.float().cpu()
    finite = drawn.isfinite().flatten(1).all(dim=1)
    drawn = torch.where(finite.view(-1, 1, 1, 1), drawn, torch.zeros(()))
    return (drawn * 255).round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).contiguous()


# ---------------------------------------------------------------- shared with the training of LoRA


def load_pipeline(model: Path) -> Any:
    """A diffusers pipeline in float32 on the CPU, without safety checker, silent.

    No code of the folder is run. Downloads from the Hugging Face hub are off in this process
    afterwards, see `stay_offline`.

    Raises:
        ValueError: no pipeline there, or one that names code or another model.
    """
    sums_in_one_order()
    stay_offline()
    index = model / PIPELINE_CONFIG
    if not index.is_file():  # diffusers would turn to the network and fail with its message
        raise ValueError(f"{model} is no diffusers folder: it has no {PIPELINE_CONFIG}")
    named = pipeline_index(index)
    for part in pipeline_parts(named):
        check_part_configs(model / part)
    check_classes(model)
    import diffusers
    import transformers

    for library in (diffusers, transformers):
        library.utils.logging.set_verbosity_error()
        library.utils.logging.disable_progress_bar()
    # Parts that were left out on purpose, such as the large text encoder of Stable Diffusion 3.
    parts: dict[str, Any] = {part: None for part, kind in named.items() if kind == [None, None]}
    if "safety_checker" in named:
        parts |= {"safety_checker": None, "requires_safety_checker": False}
    try:
        pipeline = diffusers.DiffusionPipeline.from_pretrained(
            str(model),
            dtype=torch.float32,
            local_files_only=True,
            use_safetensors=True,  # what else there is, is pickle
            trust_remote_code=False,
            **parts,
        )
    except OSError as error:  # a half of it was fetched, or another precision of it
        raise ValueError(f"{model} is not whole: {error}") from error
    except (MemoryError, RuntimeError):  # of this machine
        raise
    except Exception as error:  # odd values in its files: both libraries fail in many ways
        raise ValueError(f"{model} cannot be read: {type(error).__name__}: {error}") from error
    pipeline.set_progress_bar_config(disable=True)
    if getattr(pipeline, "watermark", None) is not None:
        pipeline.watermark = None  # there only where some package is installed: pixels would differ
    return pipeline


def check_classes(model: Path) -> None:
    """A pipeline and its own parts are of those kinds that hold settings and tensors alone.

    diffusers also loads pipelines inside pipelines, whose settings are not checked here.

    Raises:
        ValueError: the folder names another class.
    """
    stay_offline()
    import diffusers

    index = model / PIPELINE_CONFIG
    name = pipeline_index(index)["_class_name"]
    kind = getattr(diffusers, name, None)
    if not (isinstance(kind, type) and issubclass(kind, diffusers.DiffusionPipeline)):
        raise ValueError(
            f"{index}: _class_name is {name}, which is no pipeline of diffusers "
            f"{diffusers.__version__}; a generator is one such as StableDiffusionPipeline"
        )
    if getattr(kind, "_load_connected_pipes", False):
        raise ValueError(
            f"{index}: a {name} loads a second model that its README names; give a folder that "
            "holds all parts of its pipeline"
        )
    for part, (library, name) in generator_parts(model).items():
        kind = getattr(diffusers, name, None)
        plain = (diffusers.ModelMixin, diffusers.SchedulerMixin)
        if library == "diffusers" and not (isinstance(kind, type) and issubclass(kind, plain)):
            raise ValueError(
                f"{index}: its {part} is a {name}, which is no model or scheduler of diffusers "
                f"{diffusers.__version__}"
            )


def load_adapter(pipeline: Any, adapter: Path, scale: float) -> None:
    """Put a LoRA on a pipeline.

    Raises:
        ValueError: no LoRA there, or one that is no safetensors file.
    """
    if not (adapter / LORA_FILE).is_file():
        raise ValueError(f"{adapter} holds no LoRA: it has no {LORA_FILE}")
    try:
        pipeline.load_lora_weights(
            str(adapter),
            weight_name=LORA_FILE,
            adapter_name=ADAPTER,
            local_files_only=True,
            use_safetensors=True,  # else a file that cannot be read is tried as a pickle
        )
    except SafetensorError as error:
        raise ValueError(f"{adapter / LORA_FILE} cannot be read: {error}") from error
    pipeline.set_adapters([ADAPTER], adapter_weights=[scale])


def autocast(device: str, precision: Precision) -> AbstractContextManager[Any]:
    """bf16 where it is safe to, or nothing for fp32. Weights stay float32."""
    kind = torch.device(device).type
    return torch.autocast(kind, dtype=torch.bfloat16, enabled=precision == "bf16")


def _check_draws_from_text(pipeline: Any, model: Path) -> None:
    takes = inspect.signature(type(pipeline).__call__).parameters
    lacking = sorted(TEXT_TO_IMAGE - takes.keys())
    if lacking or "image" in takes:
        why = f"does not take {', '.join(lacking)}" if lacking else "starts from an image"
        raise ValueError(
            f"{model} is a {type(pipeline).__name__}, which {why}; a generator is a pipeline from "
            "text to image, such as StableDiffusionPipeline"
        )


def _sampler(scheduler: Any) -> Any:
    """DPM-Solver++ for the noise levels that a model was trained with.

    Flow matching and distilled models have samplers of their own, which stay.
    """
    from diffusers import DPMSolverMultistepScheduler
    from diffusers.schedulers.scheduling_utils import KarrasDiffusionSchedulers

    if type(scheduler).__name__ not in KarrasDiffusionSchedulers.__members__:
        return scheduler
    return DPMSolverMultistepScheduler.from_config(
        scheduler.config, algorithm_type="dpmsolver++", solver_order=2
    )
