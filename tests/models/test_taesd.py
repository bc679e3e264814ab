"""The tiny autoencoder against diffusers' with the same weights, by itself and in its pipeline."""

from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
import torch
import twins
from flax import nnx

from d2f_jax import InputError, load_vae
from d2f_jax.data.prepared import vae_fingerprint
from d2f_jax.models.taesd import AutoencoderTiny, TinyConfig
from d2f_jax.weights import make_vae

VARIANTS = {
    "small": twins.SMALL_TAESD,
    "as published": {},
    "more channels": twins.SMALL_TAESD | {"latent_channels": 16},
}


@pytest.mark.parametrize("config", VARIANTS.values(), ids=VARIANTS.keys())
@pytest.mark.parametrize("size", [(32, 32), (24, 40)])
def test_parity(tmp_path: Path, config: dict, size: tuple[int, int]) -> None:
    theirs = twins.taesd(**config)
    ours = load_vae(twins.written(theirs, tmp_path))
    assert isinstance(ours, AutoencoderTiny)
    height, width = (side // ours.config.downsampling for side in size)
    image = twins.random(2, *size, 3)
    latent = 3 * twins.random(2, height, width, ours.config.latent_channels)  # where the decoder's tanh is seen
    with torch.no_grad():
        encoded = twins.nhwc(theirs.encode(twins.nchw(image)).latents)
        decoded = twins.nhwc(theirs.decode(twins.nchw(latent)).sample)
    found = nnx.jit(lambda vae, x: vae.encode(x))(ours, image)
    twins.assert_close(found.mean, encoded)
    np.testing.assert_array_equal(found.std, np.zeros_like(encoded))
    twins.assert_close(nnx.jit(lambda vae, z: vae.decode(z))(ours, latent), decoded)


def test_prepared_latents_know_it_by_its_encoder(tmp_path: Path) -> None:
    vae = load_vae(twins.written(twins.taesd(**twins.SMALL_TAESD), tmp_path))
    before = vae_fingerprint(vae)
    vae.decoder.layers[0].kernel[...] += 1
    assert vae_fingerprint(vae) == before
    vae.encoder.layers[0].kernel[...] += 1
    assert vae_fingerprint(vae) != before


def test_results_are_float32_whatever_it_computes_in(tmp_path: Path) -> None:
    folder = twins.written(twins.taesd(**twins.SMALL_TAESD), tmp_path)
    exact, rough = load_vae(folder), load_vae(folder, dtype=jnp.bfloat16)
    image = jnp.asarray(twins.random(1, 16, 16, 3))
    for one, other in (
        (exact.encode(image).mean, rough.encode(image).mean),
        (exact.decode(exact.encode(image).mean), rough.decode(exact.encode(image).mean)),
    ):
        assert other.dtype == jnp.float32
        twins.assert_close(other, np.asarray(one), 0.03)
        assert np.abs(one - other).max() > 0


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"act_fn": "gelu"}, "act_fn='gelu'"),
        ({"upsampling_scaling_factor": 4}, "upsampling_scaling_factor=4"),
        ({"encoder_block_out_channels": (8, 16)}, r"encoder_block_out_channels=\[8, 16\]"),
        ({"num_decoder_blocks": (2, 1, 1)}, r"num_decoder_blocks=\[2, 1, 1\]"),
        ({"layers_per_block": 1}, "unknown key layers_per_block=1"),
    ],
)
def test_other_networks_are_refused_by_name(change: dict, said: str) -> None:
    with pytest.raises(InputError, match=said):
        TinyConfig.from_dict(twins.SMALL_TAESD | change)


def test_other_autoencoders_are_refused_by_name() -> None:
    with pytest.raises(InputError, match="AsymmetricAutoencoderKL is not supported"):
        make_vae({"_class_name": "AsymmetricAutoencoderKL"}, nnx.Rngs(0))
