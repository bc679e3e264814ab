"""Low-rank adaptation as a pure function of parameters."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from d2f_jax import lora
from d2f_jax.errors import InputError


class Attention(nnx.Module):
    """Layers named as in the UNet."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.to_q = nnx.Linear(12, 8, use_bias=False, rngs=rngs)
        self.to_k = nnx.Linear(6, 8, use_bias=False, rngs=rngs)
        self.proj_out = nnx.Linear(8, 12, rngs=rngs)


class Block(nnx.Module):
    def __init__(self, rngs: nnx.Rngs) -> None:
        self.attn1 = Attention(rngs)
        self.conv = nnx.Conv(4, 4, (3, 3), rngs=rngs)


@pytest.fixture
def params() -> nnx.State:
    return nnx.state(Block(nnx.Rngs(0)))


def test_targets_are_the_attention_projections(params: nnx.State) -> None:
    adapters = lora.init(params, jax.random.key(0), rank=3)
    assert {name: (a.a.shape, a.b.shape) for name, a in adapters.items()} == {
        "attn1.to_q.kernel": ((12, 3), (3, 8)),
        "attn1.to_k.kernel": ((6, 3), (3, 8)),
    }


def test_new_adapters_are_the_identity_bit_for_bit(params: nnx.State) -> None:
    merged = lora.merge(params, lora.init(params, jax.random.key(0), rank=2), scale=4.0)
    assert jax.tree.structure(merged) == jax.tree.structure(params)
    for before, after in zip(jax.tree.leaves(params), jax.tree.leaves(merged), strict=True):
        np.testing.assert_array_equal(before, after)


def test_merged_weights_are_the_low_rank_activations(params: nnx.State) -> None:
    adapters = lora.init(params, jax.random.key(0), rank=2)
    b = jax.random.normal(jax.random.key(1), (2, 8))
    adapters["attn1.to_q.kernel"] = lora.Adapter(adapters["attn1.to_q.kernel"].a, b)
    x = jax.random.normal(jax.random.key(2), (5, 12))
    kernel = params["attn1"]["to_q"]["kernel"][...]
    merged = lora.merge(params, adapters, scale=0.5)["attn1"]["to_q"]["kernel"][...]
    expected = x @ kernel + 0.5 * (x @ adapters["attn1.to_q.kernel"].a) @ b
    np.testing.assert_allclose(x @ merged, expected, rtol=1e-5, atol=1e-6)


def test_gradients_reach_the_zero_factor_first(params: nnx.State) -> None:
    adapters = lora.init(params, jax.random.key(0), rank=2)

    def loss(adapters):
        return jnp.sum(lora.merge(params, adapters, scale=1.0)["attn1"]["to_q"]["kernel"][...] ** 2)

    gradient = jax.grad(loss)(adapters)["attn1.to_q.kernel"]
    assert not np.any(gradient.a) and np.any(gradient.b)


def test_refusals(params: nnx.State) -> None:
    with pytest.raises(InputError, match="match no linear layer"):
        lora.init(params, jax.random.key(0), rank=2, targets="nothing")
    with pytest.raises(InputError, match="rank 7"):
        lora.init(params, jax.random.key(0), rank=7)
