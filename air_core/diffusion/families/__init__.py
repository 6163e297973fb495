"""Families of diffusion models: what each of their networks reads, one module per family."""
