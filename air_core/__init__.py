"""AiR: unsupervised prompt learning for CLIP, helped by a diffusion model (arXiv:2504.11930).

Read in this order: `method` (the paper, top to bottom) and `methods` (the table of methods), then
`settings` and `types` (inputs and results), `backbone`, `classifiers`, `auxiliary`,
`pseudo_labels`, `prompts`, `losses`, `training`, `evaluation`, and `diffusion` for LoRA and images.
The package does not depend on a store, cluster or tracker. Loading a model turns off downloads from
the Hugging Face hub in the process, see `weights.stay_offline`.
"""
