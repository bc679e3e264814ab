"""Stable Diffusion on JAX, finetuned as a flow (Diff2Flow)."""

import os

os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")  # it would ask for PyTorch, which nothing here needs

from d2f_jax import alignment
from d2f_jax.errors import InputError
from d2f_jax.pipeline import Pipeline
from d2f_jax.schedule import NoiseSchedule
from d2f_jax.weights import load_text_encoder, load_unet, load_vae

__all__ = [
    "InputError",
    "NoiseSchedule",
    "Pipeline",
    "alignment",
    "load_text_encoder",
    "load_unet",
    "load_vae",
]
