"""CLIP's text tower against transformers' with the same weights."""

from pathlib import Path

import numpy as np
import pytest
import torch
import twins
from flax import nnx

from d2f_jax import InputError, load_text_encoder
from d2f_jax.models.clip import CLIPTextConfig


def check_parity(theirs, folder: Path) -> None:
    config = theirs.config
    shape = (2, config.max_position_embeddings)
    ids = np.random.default_rng(0).integers(0, config.vocab_size, shape).astype(np.int32)
    with torch.no_grad():
        expected = theirs(torch.from_numpy(ids).long()).last_hidden_state.numpy()
    twins.written(theirs, folder)
    result = nnx.jit(lambda model, ids: model(ids))(load_text_encoder(folder), ids)
    twins.assert_close(result, expected)


@pytest.mark.parametrize("act", ["quick_gelu", "gelu"])
def test_family(tmp_path: Path, act: str) -> None:
    check_parity(twins.text_encoder(**twins.SMALL_CLIP | {"hidden_act": act}), tmp_path)


@pytest.mark.full_size
@pytest.mark.parametrize("config", [twins.CLIP_L, twins.OPEN_CLIP_H], ids=["CLIP-L", "OpenCLIP-H"])
def test_full_size(tmp_path: Path, config: dict) -> None:
    check_parity(twins.text_encoder(**config), tmp_path)


def test_a_token_does_not_see_the_ones_behind_it(tmp_path: Path) -> None:
    model = load_text_encoder(twins.written(twins.text_encoder(**twins.SMALL_CLIP), tmp_path))
    ids = np.arange(12)[None]
    changed = ids.copy()
    changed[0, 7] = 50
    difference = np.abs(model(ids) - model(changed)).max(axis=(0, 2))
    assert not difference[:7].any() and difference[7:].all()


def test_other_networks_are_refused_by_name() -> None:
    with pytest.raises(InputError, match="hidden_act='relu'"):
        CLIPTextConfig.from_dict(twins.SMALL_CLIP | {"hidden_act": "relu"})
    with pytest.raises(InputError, match="rope_scaling"):
        CLIPTextConfig.from_dict(twins.SMALL_CLIP | {"rope_scaling": 2})
