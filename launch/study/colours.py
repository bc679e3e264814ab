"""Pictures of one colour, which a diffusion model whose last timestep still shows the data is said not to reach."""

from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from d2f_jax import prior
from d2f_jax.data import uniform
from d2f_jax.pipeline import Pipeline
from launch.study import adaptation, training
from launch.study.bench import COLOUR_NAMES, COLOURS, LATENTS, Bench, Size
from launch.study.cells import Cell, Result
from launch.study.exam import SAMPLERS

SHARE = 0.2  # of pictures of one colour in a batch; the others are ShapesWorld's
NOISES = 16  # pictures of each colour
GUIDANCES = (1.0, 3.0)
ASKED = {
    "diff2flow": ("Euler", "Euler from t = 0"),
    "flow_matching": ("Euler",),
    "diffusion": ("DDIM", "DDIM on the flow grid"),
}


def cells(size: Size, seed: int) -> list[Cell]:
    return [finetuned(size, objective, seed) for objective in ASKED]


def name(objective: str, seed: int) -> str:
    return f"colours-{objective}-{seed}"


def finetuned(size: Size, objective: str, seed: int) -> Cell:
    """The prior, which was never told of such pictures, and what training on them makes of it."""
    last = size.steps // 2
    config = adaptation.run(size, objective, seed, last)
    config.data.sources, config.data.weights = (LATENTS, COLOURS), (1 - SHARE, SHARE)
    marks = 0, last // 4, last

    def compute(bench: Bench, folder: Path) -> Result:
        def judge(pipeline: Pipeline, mark: int) -> dict[str, Any]:
            return ask(pipeline, size, objective, seed) if mark in marks else {}

        curve = training.curve(bench, config, folder, judge)
        return {"curve": curve, "vae": vae_alone(prior.load(bench.placed(config)), size)}

    settings = {
        "config": training.deciding(config),
        "marks": marks,
        "colours": {colour: uniform.COLOURS[colour] for colour in COLOUR_NAMES},
        "noises": NOISES,
        "samplers": ASKED[objective],
        "step_counts": (size.few, size.many),
        "guidances": GUIDANCES,
    }
    return Cell(name=name(objective, seed), settings=settings, compute=compute, minutes=4.0)


def ask(pipeline: Pipeline, size: Size, objective: str, seed: int) -> dict[str, Any]:
    """`{sampler: {steps: {guidance: {colour: numbers}}}}`."""
    prompts = [uniform.caption(colour) for colour in COLOUR_NAMES for _ in range(NOISES)]
    seen = decoded(pipeline, size)
    told: dict[str, Any] = {}
    for sampler in ASKED[objective]:
        for num_steps in (size.few, size.many):
            for guidance in GUIDANCES:
                images = pipeline(
                    prompts,
                    num_steps=num_steps,
                    guidance_scale=guidance,
                    seed=seed,
                    height=size.pixels,
                    width=size.pixels,
                    sampler=SAMPLERS[sampler],
                )
                by_colour = images.reshape(len(COLOUR_NAMES), NOISES, *images.shape[1:])
                numbers = {
                    colour: measured(drawn, colour, seen[colour])
                    for colour, drawn in zip(COLOUR_NAMES, by_colour, strict=True)
                }
                told.setdefault(sampler, {}).setdefault(str(num_steps), {})[f"{guidance:g}"] = numbers
    return told


def measured(images_NxHxWx3: np.ndarray, colour: str, seen_HxWx3: np.ndarray) -> dict[str, float]:
    """In levels of 255: mean absolute errors against the colour, and against what the VAE makes of it.

    `mean` is the brightness, and `spread` how much that of single pictures differs, which is what noise decides.
    """
    x = images_NxHxWx3.astype(np.float64)
    brightness_N = x.mean((1, 2, 3))
    numbers = {
        "error": np.abs(x - np.array(uniform.COLOURS[colour])).mean(),
        "error_to_vae": np.abs(x - seen_HxWx3).mean(),
        "mean": brightness_N.mean(),
        "spread": brightness_N.std(),
    }
    return {name: round(float(value), 2) for name, value in numbers.items()}


def vae_alone(pipeline: Pipeline, size: Size) -> dict[str, Any]:
    """The least error that any latent diffusion model with this VAE can be taught."""
    return {colour: measured(image[None], colour, image) for colour, image in decoded(pipeline, size).items()}


def decoded(pipeline: Pipeline, size: Size) -> dict[str, np.ndarray]:
    """What the VAE makes of each colour, float levels [H, W, 3]."""
    levels = np.array([uniform.COLOURS[colour] for colour in COLOUR_NAMES], np.float32)
    plain = np.broadcast_to(levels[:, None, None], (len(levels), size.pixels, size.pixels, 3))
    images = pipeline.vae.decode(pipeline.vae.encode(jnp.asarray(plain / 127.5 - 1)).mean)
    seen = np.clip(np.asarray(images, np.float64) / 2 + 0.5, 0, 1) * 255
    return dict(zip(COLOUR_NAMES, seen, strict=True))
