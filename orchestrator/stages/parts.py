"""Modules of air_core that several stages use; their code is part of keys."""

CLIP = (
    "air_core.ahead",
    "air_core.arithmetic",
    "air_core.backbone",
    "air_core.backbone.blocks",
    "air_core.backbone.clip",
    "air_core.backbone.text",
    "air_core.backbone.vision",
    "air_core.models.tokens",
    "air_core.types",
)
LOADED_CLIP = (*CLIP, "air_core.backbone.loading")
IMAGES = ("air_core.datasets.images", "air_core.datasets.class_folders")
READING = (
    *LOADED_CLIP,
    *IMAGES,
    "air_core.datasets.dataset",
    "air_core.datasets.places",
    "air_core.datasets.split_files",
    "air_core.datasets.stratified",
    "air_core.datasets.unlabelled",
)
DRAWING = (
    *IMAGES,
    "air_core.arithmetic",
    "air_core.captions",
    "air_core.diffusion",
    "air_core.diffusion.denoiser",
    "air_core.diffusion.folder",
    "air_core.diffusion.noise",
    "air_core.diffusion.pipeline",
)
SCORING = (
    "air_core.chunks",
    "air_core.classifiers",
    "air_core.datasets.stratified",
    "air_core.paradigms",
)
