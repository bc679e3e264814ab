"""Stable Diffusion on JAX, finetuned as a flow (Diff2Flow)."""

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
