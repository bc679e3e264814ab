"""The embedded model is a trained Stable Diffusion: what it draws follows its captions, in PyTorch diffusers."""

import jax.numpy as jnp
import numpy as np
import pytest
import small
import torch
from flax import nnx

from d2f_jax import load_vae, metrics, weights
from d2f_jax.data import shapes
from d2f_jax.metrics.classifier import PAIRS


@pytest.fixture(scope="module")
def scenes() -> tuple[np.ndarray, list[str]]:
    scenes = [shapes.sample_scene(1, i) for i in range(128)]
    return np.stack([shapes.render(s, 64).image for s in scenes]), [s.caption for s in scenes]


def test_it_is_small_and_in_half_precision() -> None:
    files = list(weights.TINY_SD.rglob("*.safetensors"))
    assert len(files) == 3
    assert sum(file.stat().st_size for file in files) < 15e6


def test_the_autoencoder_keeps_the_picture_and_scales_its_latents(scenes: tuple) -> None:
    vae = load_vae("tiny-sd")
    x = jnp.asarray(scenes[0], jnp.float32) / 127.5 - 1
    mean = nnx.jit(lambda vae, x: vae.encode(x).mean)(vae, x)
    assert float(mean.std()) * vae.config.scaling_factor == pytest.approx(1, abs=0.05)
    error = nnx.jit(lambda vae, z: vae.decode(z))(vae, mean) - x
    assert 10 * np.log10(4 / np.mean(error**2)) > 30  # dB


def test_captions_are_followed_at_fifty_ddim_steps_in_diffusers(scenes: tuple) -> None:
    pipeline = small.torch_pipeline(weights.TINY_SD)
    assert type(pipeline.scheduler).__name__ == "DDIMScheduler"
    prompts = [f"{'an' if colour[0] in 'aeiou' else 'a'} {colour} {shape}" for colour, shape in PAIRS]
    pictures = pipeline(
        prompts,
        num_inference_steps=50,
        guidance_scale=3.0,
        generator=torch.Generator().manual_seed(0),
        output_type="np",
    ).images
    classifier = metrics.load_classifier()
    reference = metrics.feature_statistics(classifier, scenes[0])
    scores = metrics.shapes_scores(
        classifier, (pictures * 255).round().astype(np.uint8), prompts=prompts, reference=reference
    )
    assert scores.caption_accuracy >= 0.8
