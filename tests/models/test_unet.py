"""The UNet against diffusers' with the same weights."""

from pathlib import Path

import numpy as np
import pytest
import torch
import twins
from flax import nnx

from d2f_jax import InputError, load_unet
from d2f_jax.models.unet import UNetConfig

VARIANTS = {
    "SD 1.x": {},
    "SD 2.x": {"attention_head_dim": (2, 4, 4), "use_linear_projection": True, "upcast_attention": True},
    "nine input channels": {"in_channels": 9},
    "two transformer layers": {"transformer_layers_per_block": 2},
    "layers per level": {"layers_per_block": (1, 2, 1), "transformer_layers_per_block": (1, 2, 1)},
    "attention at every level": {
        "down_block_types": ("CrossAttnDownBlock2D",) * 3,
        "up_block_types": ("CrossAttnUpBlock2D",) * 3,
    },
    "other time embedding": {"flip_sin_to_cos": False, "freq_shift": 1},
    "two levels": {
        "block_out_channels": (16, 32),
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    },
}


def check_parity(theirs, folder: Path, sizes: list[tuple[int, int]]) -> None:
    """Both networks on the same latents, one row with an integer timestep, one with a fractional."""
    config = theirs.config
    text = twins.random(2, 77, config.cross_attention_dim, seed=9)
    timestep = np.array([981, 417.3], np.float32)
    samples = [twins.random(2, height, width, config.in_channels) for height, width in sizes]
    with torch.no_grad():
        expected = [
            twins.nhwc(theirs(twins.nchw(x), torch.from_numpy(timestep), torch.from_numpy(text)).sample)
            for x in samples
        ]
    twins.written(theirs, folder)
    del theirs
    ours = load_unet(folder)
    apply = nnx.jit(lambda unet, x, timestep, text: unet(x, timestep, text))
    for x, wanted in zip(samples, expected, strict=True):
        twins.assert_close(apply(ours, x, timestep, text), wanted)


@pytest.mark.parametrize("change", VARIANTS.values(), ids=VARIANTS.keys())
def test_family(tmp_path: Path, change: dict) -> None:
    # 7 x 10 halves to 4 x 5 and 2 x 3: the way up has to find back to odd sizes.
    check_parity(twins.unet(**twins.SMALL_UNET | change), tmp_path, [(8, 8), (7, 10)])


@pytest.mark.full_size
@pytest.mark.parametrize("config", [twins.SD15_UNET, twins.SD21_UNET], ids=["SD 1.5", "SD 2.1"])
def test_full_size(tmp_path: Path, config: dict) -> None:
    theirs = twins.unet(**config)
    assert 859e6 < sum(p.numel() for p in theirs.parameters()) < 867e6
    check_parity(theirs, tmp_path, [(32, 32), (24, 40)])


def test_one_timestep_for_all_rows(tmp_path: Path) -> None:
    unet = load_unet(twins.written(twins.unet(**twins.SMALL_UNET), tmp_path))
    x, text = twins.random(2, 8, 8, 4), twins.random(2, 5, 24)
    np.testing.assert_array_equal(unet(x, 7, text), unet(x, np.array([7, 7]), text))


def test_half_precision_is_near_and_keeps_float32_parameters(tmp_path: Path) -> None:
    folder = twins.written(twins.unet(**twins.SMALL_UNET), tmp_path)
    x, text = twins.random(2, 8, 8, 4), twins.random(2, 5, 24)
    full, half = load_unet(folder), load_unet(folder, dtype="bfloat16")
    assert {str(p.dtype) for p in nnx.to_flat_state(nnx.state(half)).leaves} == {"float32"}
    expected, result = np.asarray(full(x, 500, text)), half(x, 500, text)
    assert result.dtype == np.float32
    twins.assert_close(result, expected, tolerance=0.05)
    assert not np.array_equal(result, expected)
    small = load_unet(folder, param_dtype="bfloat16")
    assert {str(p.dtype) for p in nnx.to_flat_state(nnx.state(small)).leaves} == {"bfloat16"}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"class_embed_type": "timestep"}, "class_embed_type='timestep'"),
        ({"addition_embed_type": "text_time"}, "addition_embed_type='text_time'"),
        ({"resnet_time_scale_shift": "scale_shift"}, "resnet_time_scale_shift"),
        ({"down_block_types": ["AttnDownBlock2D"] * 3}, "AttnDownBlock2D"),
        ({"block_out_channels": [16, 32]}, "2 of CrossAttnDownBlock2D and DownBlock2D"),
        ({"rope_theta": 3}, "rope_theta=3"),
        ({"attention_head_dim": [8, 8]}, r"attention_head_dim=\[8, 8\]"),
        ({"sample_size": [8, 8, 8]}, r"sample_size=\[8, 8, 8\] is not one side, nor height and width"),
        ({"num_attention_heads": 8}, "num_attention_heads=8"),
        ({"downsample_padding": 0}, "downsample_padding=0"),
    ],
)
def test_other_networks_are_refused_by_name(change: dict, said: str) -> None:
    with pytest.raises(InputError, match=said):
        UNetConfig.from_dict(twins.SMALL_UNET | change)
