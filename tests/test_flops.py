"""Operations are counted as XLA counts them on a CPU, on every device."""

import jax
import jax.numpy as jnp
import pytest

from configs import text_to_image
from d2f_jax import blueprint, flops, sharding
from d2f_jax.models import devices


def by_xla(jitted, *arguments) -> float:
    with devices.plain():
        return jitted.lower(*arguments).cost_analysis()["flops"]


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("padding", [0, 1, 2])
@pytest.mark.parametrize("size", [(8, 8), (2, 3)])
def test_convolutions_and_their_gradients_leave_out_zeros(size: tuple[int, int], padding: int, stride: int) -> None:
    if padding == 0 and min(size) < 3:
        pytest.skip("the kernel is larger than the picture")
    x, kernel = jnp.ones((2, *size, 5)), jnp.ones((3, 3, 5, 7))

    def convolution(x: jax.Array, kernel: jax.Array) -> jax.Array:
        names = ("NHWC", "HWIO", "NHWC")
        return jax.lax.conv_general_dilated(x, kernel, (stride,) * 2, [(padding,) * 2] * 2, dimension_numbers=names)

    def gradient(x: jax.Array, kernel: jax.Array, out: jax.Array) -> tuple[jax.Array, ...]:
        return jax.vjp(convolution, x, kernel)[1](out)

    out = convolution(x, kernel)
    assert flops.count(jax.jit(convolution), x, kernel) == by_xla(jax.jit(convolution), x, kernel)
    assert flops.count(jax.jit(gradient), x, kernel, out) == by_xla(jax.jit(gradient), x, kernel, out)


def test_products_loops_and_branches() -> None:
    a, b, n = jnp.ones((3, 4, 5)), jnp.ones((3, 5, 6)), 2 * 3 * 4 * 5 * 6

    def repeated(a: jax.Array, b: jax.Array) -> jax.Array:
        return jax.lax.scan(lambda total, x: (total + a @ b * x, None), jnp.zeros((3, 4, 6)), jnp.ones(7))[0]

    def either(a: jax.Array, b: jax.Array) -> jax.Array:
        return jax.lax.cond(a[0, 0, 0] > 0, lambda: a @ b, lambda: jnp.zeros((3, 4, 6)))

    assert flops.count(jax.jit(jnp.matmul), a, b) == n
    assert flops.count(jax.jit(repeated), a, b) == 7 * (n + 2 * 3 * 4 * 6)
    assert flops.count(jax.jit(either), a, b) == n
    assert flops.count(jax.jit(lambda a: a.sum() + jnp.exp(a).max()), a) == 3 * 60 + 1


def test_what_is_not_read_does_not_count() -> None:
    @jax.jit
    def both(a: jax.Array) -> tuple[jax.Array, jax.Array]:
        return a @ a, jnp.exp(a)

    a = jnp.ones((8, 8))
    assert flops.count(jax.jit(lambda a: both(a)[1]), a) == 64
    assert flops.count(jax.jit(lambda a: jax.checkpoint(both)(a)[0]), a) == 2 * 8**3


def test_what_runs_on_every_device_counts_on_each() -> None:
    mesh = sharding.make_mesh(4, 2)
    rows = jax.sharding.PartitionSpec(mesh.axis_names)
    product = jax.shard_map(lambda x: x @ x.T, mesh=mesh, in_specs=rows, out_specs=rows)
    assert flops.count(jax.jit(product), jnp.ones((16, 5))) == 8 * (2 * 2 * 5 * 2)


def test_a_train_step_has_those_that_xla_counts() -> None:
    config = text_to_image.get_config("diff2flow:array_record:PREPARED")
    config.model, config.data.image_size, config.train.batch_size = "tiny-sd", 64, 2
    drawn = blueprint.load(config)
    step, given = blueprint.train_step(config, drawn, sharding.make_mesh(devices=jax.devices()[:1]), "none", 1)
    assert blueprint.useful_flops(config, drawn) == pytest.approx(by_xla(step, *given), rel=2e-2)
