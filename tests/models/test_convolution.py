"""A convolution is the same whatever way is chosen for the devices."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from d2f_jax import flops
from d2f_jax.models import devices
from d2f_jax.models.layers import Build


@pytest.mark.parametrize(
    ("side", "size", "stride", "padding"),
    [(2, 3, 1, None), (5, 3, 2, None), (4, 3, 2, 0), (3, 1, 1, None), (1, 3, 1, None)],
)
def test_a_convolution_may_be_a_product(side: int, size: int, stride: int, padding: int | None) -> None:
    build = Build(jnp.float32, jnp.float32, nnx.Rngs(0))
    conv = build.conv(24, 40, size, stride=stride, padding=padding)
    graphdef, params = nnx.split(conv)
    x = jax.random.normal(jax.random.key(1), (2, side, side, 24))

    def loss(params: nnx.State, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        out = nnx.merge(graphdef, params)(x)
        return jnp.sum(jnp.sin(out)), out

    def gradient(params: nnx.State, x: jax.Array):
        return jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(params, x)

    @devices.split_over(None)
    def chosen(params: nnx.State, x: jax.Array):
        return gradient(params, x)

    product, convolution = jax.jit(chosen), jax.jit(gradient)
    programs = [f.lower(params, x).as_text() for f in (product, convolution)]
    assert ["stablehlo.convolution" in text for text in programs] == [False, True]
    for a, b in zip(*(jax.tree.leaves(f(params, x)) for f in (product, convolution)), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5)
    assert flops.count(product, params, x) == flops.count(convolution, params, x)
