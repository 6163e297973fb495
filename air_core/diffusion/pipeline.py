"""Draws images with a text-to-image pipeline in a diffusers folder, with or without a LoRA.

Supports any pipeline from text to image: Stable Diffusion, PixArt, Flux and others. The sampler is
DPM-Solver++ (arXiv:2211.01095) if it supports the model's noise levels, otherwise the model's
default. Reads only the folder and never the network.

Weights are loaded in the precision of the computation, and a LoRA is added to them, so that a
forward pass casts no weight and computes no adapter.
"""

# mypy: allow-untyped-calls

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from air_core.diffusion import image_seed
from air_core.diffusion.denoiser import denoiser_class, network, network_name
from air_core.models.configs import PIPELINE_CONFIG, UNREAD, check_configs, read_index
from air_core.models.weights import is_distilled, stay_offline
from air_core.settings import GenerationSettings, Precision
from air_core.tools.arithmetic import sums_in_one_order
from air_core.tools.captions import text_of

# B images, H height, W width.

ADAPTER = "air"  # name of the LoRA in peft
LORA_FILE = "pytorch_lora_weights.safetensors"
DTYPES: dict[Precision, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16}


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
            settings: of the images. A guidance of 1 or less means none, as in diffusers.
            adapter: folder of the LoRA.
            scale: weight of the LoRA; 0 disables it.
            device: on which to draw.
            thrift: trades speed for memory, see `shared_pipeline`.

        Raises:
            ValueError: the folder contains no pipeline, or one that is not supported.
        """
        self.settings, self.lora = settings, (adapter, scale)
        self.shared = shared_pipeline(model, settings.precision, device, thrift)
        self.report: Callable[[int, int], None] = lambda done, total: None  # of steps

    @property
    def pipeline(self) -> Any:
        """The pipeline with the LoRA of this generator."""
        return self.shared.use(*self.lora)

    def generate(self, classname: str, indices: Sequence[int], attempts: Sequence[int]) -> Tensor:
        """See ImageGenerator. Pixels depend slightly on the batch, so it is always one block."""
        settings = self.settings
        # With one generator per image on the CPU, noise depends on neither device nor batch.
        generators = [
            torch.Generator("cpu").manual_seed(image_seed(settings.seed, classname, i, attempt))
            for i, attempt in zip(indices, attempts, strict=True)
        ]
        pipeline = self.pipeline
        # One by one, so that pixels do not depend on the memory of the device.
        if getattr(pipeline, "vae", None) is not None:
            pipeline.vae.enable_slicing()
        with torch.inference_mode():
            drawn = pipeline(
                [text_of(settings.template, classname, i) for i in indices],
                **denoiser_class(pipeline).arguments(settings, len(indices)),
                **self._callback(pipeline),
                generator=generators,
                output_type="pt",
            ).images  # (B, 3, H, W) in [0, 1]
        return _pixels(drawn)

    def _callback(self, pipeline: Any) -> dict[str, Any]:
        """The argument with which a pipeline reports its steps, if it does."""

        def report(pipeline: Any, step: int, time: Any, tensors: dict[str, Any]) -> dict[str, Any]:
            self.report(step + 1, self.settings.num_inference_steps)
            return tensors

        name = "callback_on_step_end"
        return {name: report} if name in inspect.signature(pipeline.__call__).parameters else {}


def _pixels(drawn: Tensor) -> Tensor:
    """(B, 3, H, W) in [0, 1] -> (B, H, W, 3) uint8; images with NaN become black (rejected)."""
    drawn = drawn.float().cpu()
    finite = drawn.isfinite().flatten(1).all(dim=1)
    drawn = torch.where(finite.view(-1, 1, 1, 1), drawn, torch.zeros(()))
    return (drawn * 255).round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).contiguous()


# ---------------------------------------------------------------- also used by evidence and LoRA


@dataclass
class SharedPipeline:
    """A pipeline on a device. Its weights contain at most one LoRA, which `use` replaces."""

    pipeline: Any
    lora: tuple[Path, float] | None = None  # folder and scale
    originals: dict[str, Tensor] = field(default_factory=dict)  # weights without the LoRA

    def use(self, adapter: Path | None, scale: float) -> Any:
        """The pipeline with a LoRA in its weights, in place of the one before; None: no LoRA.

        The weights do not depend on the LoRAs before, since each is added to the original weights.
        """
        lora = None if adapter is None else (adapter, scale)
        if lora == self.lora:
            return self.pipeline
        denoiser = network(self.pipeline)
        for name, weight in self.originals.items():
            denoiser.get_parameter(name).data.copy_(weight)
        self.originals, self.lora = {}, None
        if adapter is None:
            return self.pipeline
        for name, (down, up) in read_adapter(adapter, network_name(self.pipeline)).items():
            weight = denoiser.get_parameter(name).data
            self.originals[name] = weight.to("cpu", copy=True)
            # Rounded as the weights, but multiplied in float32.
            factors = [factor.to(weight.device, weight.dtype).float() for factor in (up, down)]
            weight += (scale * (factors[0] @ factors[1])).to(weight.dtype)
        self.lora = lora
        return self.pipeline


_shared: dict[Any, SharedPipeline] = {}


def shared_pipeline(
    model: Path, precision: Precision, device: str, thrift: int = 0
) -> SharedPipeline:
    """The pipeline that this process keeps loaded; another one, or changed files, replace it.

    Args:
        thrift: above 0, only the active part of the pipeline is on the device.

    Raises:
        ValueError: see `load_pipeline`.
    """
    stats = [(str(file), file.stat()) for file in sorted(model.rglob("*")) if file.is_file()]
    files = tuple((name, stat.st_size, stat.st_mtime_ns) for name, stat in stats)
    key = (files, precision, device, thrift)
    if key not in _shared:
        _shared.clear()  # before the next is loaded, since both may not fit
        pipeline = load_pipeline(model, DTYPES[precision])
        pipeline.scheduler = _sampler(pipeline.scheduler)
        if thrift and torch.device(device).type != "cpu":
            pipeline.enable_model_cpu_offload(device=device)
        else:
            pipeline.to(device)
        _shared[key] = SharedPipeline(pipeline)
    return _shared[key]


def load_pipeline(model: Path, dtype: torch.dtype = torch.float32) -> Any:
    """Load a diffusers pipeline on the CPU, without safety checker and progress bars.

    Runs no code from the folder. Turns off downloads from the Hugging Face hub in this process, see
    `stay_offline`.

    Raises:
        ValueError: the folder contains no pipeline, or one that names code or another model.
    """
    sums_in_one_order()
    stay_offline()
    index = read_index(model)
    for part in index.parts:
        check_configs(model / part)
    check_classes(model)
    import diffusers
    import transformers

    for library in (diffusers, transformers):
        library.utils.logging.set_verbosity_error()
        library.utils.logging.disable_progress_bar()
    # Such as the large text encoder of Stable Diffusion 3.
    parts: dict[str, Any] = dict.fromkeys(index.absent)
    if UNREAD in index.absent:
        parts["requires_safety_checker"] = False
    try:
        pipeline = diffusers.DiffusionPipeline.from_pretrained(
            str(model),
            dtype=dtype,
            local_files_only=True,
            use_safetensors=True,  # the alternative is pickle
            trust_remote_code=False,
            **parts,
        )
    except (MemoryError, RuntimeError):  # not caused by the folder
        raise
    except Exception as error:  # both libraries raise many types for invalid values
        raise ValueError(f"{model} cannot be read: {type(error).__name__}: {error}") from error
    pipeline.set_progress_bar_config(disable=True)
    if getattr(pipeline, "watermark", None) is not None:
        pipeline.watermark = None  # depends on an optional package and changes the pixels
    return pipeline


def check_classes(model: Path) -> None:
    """Check that the parts of a pipeline contain only settings and tensors.

    diffusers can also load pipelines inside pipelines, whose settings would not be checked.

    Raises:
        ValueError: the folder names another class.
    """
    stay_offline()
    import diffusers

    index = model / PIPELINE_CONFIG
    name, parts, _ = read_index(model)
    kind = getattr(diffusers, name, None)
    if not (isinstance(kind, type) and issubclass(kind, diffusers.DiffusionPipeline)):
        raise ValueError(
            f"{index}: _class_name is {name}, which is not a pipeline of diffusers "
            f"{diffusers.__version__}; use a pipeline such as StableDiffusionPipeline"
        )
    if getattr(kind, "_load_connected_pipes", False):
        raise ValueError(
            f"{index}: a {name} loads a second model that its README names; give a folder that "
            "holds all parts of its pipeline"
        )
    for part, (library, name) in parts.items():
        kind = getattr(diffusers, name, None)
        plain = (diffusers.ModelMixin, diffusers.SchedulerMixin)
        if library == "diffusers" and not (isinstance(kind, type) and issubclass(kind, plain)):
            raise ValueError(
                f"{index}: its {part} is a {name}, which is not a model or scheduler of diffusers "
                f"{diffusers.__version__}"
            )


def read_adapter(adapter: Path, part: str) -> dict[str, tuple[Tensor, Tensor]]:
    """The factors (r, in) and (out, r) of a LoRA, by the name of the weight that they add to.

    Args:
        adapter: folder of the LoRA.
        part: of the pipeline.
    """
    tensors, down = load_file(adapter / LORA_FILE), ".lora_A.weight"
    return {
        f"{name.removeprefix(f'{part}.').removesuffix(down)}.weight": (
            tensors[name],
            tensors[name.replace(down, ".lora_B.weight")],
        )
        for name in tensors
        if name.endswith(down)
    }


def _sampler(scheduler: Any) -> Any:
    """DPM-Solver++ with the noise levels of the model.

    Flow matching and distilled models keep their sampler.
    """
    from diffusers import DPMSolverMultistepScheduler
    from diffusers.schedulers.scheduling_utils import KarrasDiffusionSchedulers

    known = KarrasDiffusionSchedulers.__members__
    has_betas = type(scheduler).__name__ in known and "beta_start" in scheduler.config
    if not has_betas or is_distilled(scheduler.config):
        return scheduler
    return DPMSolverMultistepScheduler.from_config(
        scheduler.config, algorithm_type="dpmsolver++", solver_order=2
    )
