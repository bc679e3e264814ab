"""The autoencoder against diffusers' with the same weights."""

from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
import torch
import twins
from flax import nnx

from d2f_jax import InputError, load_vae
from d2f_jax.models.vae import DiagonalGaussian, VAEConfig

VARIANTS = {
    "plain": {},
    "no attention in the middle": {"mid_block_add_attention": False},
    "no quantising convolutions": {"use_quant_conv": False, "use_post_quant_conv": False},
    "more channels and layers": {"latent_channels": 16, "layers_per_block": 2},
}


def check_parity(theirs, folder: Path, sizes: list[tuple[int, int]]) -> None:
    """Encoder and decoder on pictures of these sizes in pixels."""
    cases = []
    factor = 2 ** (len(theirs.config.block_out_channels) - 1)
    for height, width in sizes:
        image = twins.random(1, height, width, 3)
        latent = twins.random(1, height // factor, width // factor, theirs.config.latent_channels)
        with torch.no_grad():
            gaussian = theirs.encode(twins.nchw(image)).latent_dist
            decoded = theirs.decode(twins.nchw(latent)).sample
        cases.append((image, latent, *map(twins.nhwc, (gaussian.mean, gaussian.logvar, decoded))))
    twins.written(theirs, folder)
    ours = load_vae(folder)
    encode, decode = nnx.jit(lambda vae, x: vae.encode(x)), nnx.jit(lambda vae, z: vae.decode(z))
    for image, latent, mean, logvar, decoded in cases:
        result = encode(ours, image)
        twins.assert_close(result.mean, mean)
        twins.assert_close(result.logvar, logvar)
        twins.assert_close(decode(ours, latent), decoded)


@pytest.mark.parametrize("change", VARIANTS.values(), ids=VARIANTS.keys())
def test_family(tmp_path: Path, change: dict) -> None:
    check_parity(twins.vae(**twins.SMALL_VAE | change), tmp_path, [(16, 16), (12, 20)])


@pytest.mark.full_size
def test_full_size(tmp_path: Path) -> None:
    check_parity(twins.vae(**twins.SD_VAE), tmp_path, [(256, 256), (128, 192)])


def test_the_deviation_is_that_of_the_log_variance() -> None:
    gaussian = DiagonalGaussian(jnp.zeros(2), jnp.log(jnp.array([0.25, 4.0])))
    np.testing.assert_allclose(gaussian.std, [0.5, 2.0], rtol=1e-6)


def test_other_networks_are_refused_by_name() -> None:
    with pytest.raises(InputError, match="latents_mean"):
        VAEConfig.from_dict(twins.SMALL_VAE | {"latents_mean": [0.0]})
    with pytest.raises(InputError, match="AttnDownEncoderBlock2D"):
        VAEConfig.from_dict(twins.SMALL_VAE | {"down_block_types": ["AttnDownEncoderBlock2D"] * 2})
