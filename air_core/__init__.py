"""AiR: unsupervised prompt learning for CLIP, helped by a diffusion model (arXiv:2504.11930).

Read in this order: `method` (the paper, top to bottom), then `specs` and `types` (what goes in and
out), `backbone`, `classifiers`, `pseudo_labels`, `prompts`, `training`, `evaluation`, and
`diffusion` for LoRA and images. Torch in, torch out: no store, no cluster, no tracker. Loading a
model turns downloads from the Hugging Face hub off in the process, see `weights.stay_offline`.
"""
