"""Every backend that this machine has computes the same attention, and is chosen where it can run."""

import types
from typing import Any, get_args

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from d2f_jax import flops, sharding
from d2f_jax.models import attention as module
from d2f_jax.models import devices
from d2f_jax.models.attention import attention
from d2f_jax.models.devices import split_over
from d2f_jax.models.layers import Build, Recompute, Transformer2DModel

BOTH: tuple[module.Backend, ...] = ("splash", "xla")


def qkv(batch: int, length: int, heads: int, width: int, dtype: str = "float32") -> list[jax.Array]:
    keys = jax.random.split(jax.random.key(width), 3)
    return [jax.random.normal(key, (batch, length, heads, width), dtype) for key in keys]


@pytest.mark.parametrize(("length", "width"), [(256, 40), (384, 64), (128, 160)])
def test_the_fused_kernel_of_tpus_agrees_in_value_and_gradient(length: int, width: int) -> None:
    of = qkv(2, length, 2, width)

    def loss(backend: module.Backend, *of: jax.Array) -> jax.Array:
        return jnp.sum(jnp.sin(attention(*of, backend=backend)))

    splash, xla = (jax.jit(jax.value_and_grad(loss, argnums=(1, 2, 3)), static_argnums=0)(b, *of) for b in BOTH)
    np.testing.assert_allclose(splash[0], xla[0], rtol=1e-4)
    for theirs, ours in zip(xla[1], splash[1], strict=True):
        np.testing.assert_allclose(ours, theirs, atol=2e-5)


def test_rows_stay_on_their_devices() -> None:
    mesh = sharding.make_mesh(4, 2)
    of = jax.device_put(qkv(8, 128, 1, 64), sharding.batch_split(mesh))

    @jax.jit
    @split_over(mesh)
    def fused(*of: jax.Array) -> jax.Array:
        return attention(*of, backend="splash")

    out = fused(*of)
    assert out.sharding.is_equivalent_to(sharding.batch_split(mesh), out.ndim)
    assert "all-gather" not in fused.lower(*of).compile().as_text()
    np.testing.assert_allclose(out, attention(*of, backend="xla"), atol=2e-5)


@pytest.mark.parametrize(
    ("platform", "capability", "shape", "keys", "dtype", "chosen"),
    [
        ("tpu", None, (4, 4096, 5, 64), 4096, "bfloat16", "splash"),
        ("tpu", None, (4, 4096, 8, 40), 4096, "bfloat16", "splash"),
        ("tpu", None, (4, 4096, 5, 64), 77, "bfloat16", "xla"),  # the text
        ("tpu", None, (4, 1080, 5, 64), 1080, "bfloat16", "xla"),  # no multiple of 128
        ("tpu", None, (4, 256, 20, 64), 256, "bfloat16", "xla"),
        ("tpu", None, (4, 4096, 5, 64), 4096, "float32", "xla"),
        ("gpu", "9.0", (4, 4096, 5, 64), 4096, "bfloat16", "cudnn"),
        ("gpu", "8.0", (4, 4096, 5, 64), 77, "bfloat16", "cudnn"),
        ("gpu", "9.0", (4, 256, 20, 64), 77, "float16", "cudnn"),
        ("gpu", "9.0", (4, 64, 20, 64), 64, "bfloat16", "xla"),
        ("gpu", "9.0", (4, 4096, 5, 64), 4096, "float32", "xla"),
        ("gpu", "9.0", (4, 256, 8, 160), 256, "bfloat16", "cudnn"),
        ("gpu", "8.6", (4, 256, 8, 160), 256, "bfloat16", "xla"),
        ("gpu", "9.0", (4, 4096, 1, 512), 4096, "bfloat16", "xla"),  # the VAE's
        ("gpu", "7.5", (4, 4096, 5, 64), 4096, "float16", "xla"),
        ("gpu", "gfx942", (4, 4096, 5, 64), 4096, "bfloat16", "xla"),
        ("cpu", None, (4, 4096, 5, 64), 4096, "bfloat16", "xla"),
    ],
)
def test_a_backend_is_chosen_by_device_and_shape(monkeypatch, platform, capability, shape, keys, dtype, chosen) -> None:
    device = types.SimpleNamespace(platform=platform, compute_capability=capability)
    mesh = types.SimpleNamespace(devices=np.array([device]))
    q, k = (jax.ShapeDtypeStruct((*shape[:1], length, *shape[2:]), dtype) for length in (shape[1], keys))
    assert module._chosen(q, k, is_causal=False) == "xla"  # where it is not said how rows are split
    monkeypatch.setattr(devices, "_MESH", types.SimpleNamespace(get=lambda: mesh))
    assert module._chosen(q, k, is_causal=False) == chosen


on_gpu = pytest.mark.skipif(jax.default_backend() != "gpu", reason="cuDNN is that of NVIDIA's GPUs")


@on_gpu
@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize(("queries", "keys"), [(256, 256), (256, 77), (289, 289), (289, 78)])
@pytest.mark.parametrize("width", [40, 64, 160])
def test_the_fused_kernel_of_gpus_agrees_in_value_and_gradient(
    width: int, queries: int, keys: int, is_causal: bool
) -> None:
    """As close to float32 as XLA's own in half precision."""
    q, k, v = qkv(2, 289, 3, width, "bfloat16")
    of = [q[:, :queries], k[:, :keys], v[:, :keys]]

    def loss(backend: module.Backend, *of: jax.Array) -> jax.Array:
        return jnp.sum(jnp.sin(attention(*of, is_causal=is_causal, backend=backend).astype(jnp.float32)))

    gradient = jax.jit(jax.value_and_grad(loss, argnums=(1, 2, 3)), static_argnums=0)
    exact = jax.tree.leaves(gradient("xla", *(x.astype(jnp.float32) for x in of)))
    for theirs, ours, right in zip(*(jax.tree.leaves(gradient(b, *of)) for b in ("xla", "cudnn")), exact, strict=True):
        off = [float(jnp.linalg.norm((x - right).astype(jnp.float32))) for x in (theirs, ours)]
        assert off[1] < 2 * off[0] + 1e-3 * float(jnp.linalg.norm(right))


@pytest.mark.parametrize("is_causal", [False, True])
def test_cudnn_is_given_even_lengths(monkeypatch, is_causal: bool) -> None:
    """JAX refuses others for a gradient; what is added counts for nothing."""
    seen = []
    plain = jax.nn.dot_product_attention

    def recorded(*of: jax.Array, implementation: str, **options: Any) -> jax.Array:
        seen.append((implementation, of[0].shape[1], of[1].shape[1]))
        return plain(*of, implementation="xla", **options)

    monkeypatch.setattr(jax.nn, "dot_product_attention", recorded)
    q, k, v = qkv(2, 32, 3, 8)
    for queries, keys in [(32, 32), (32, 7), (31, 31), (31, 32)]:
        of = q[:, :queries], k[:, :keys], v[:, :keys]

        def loss(backend: module.Backend, *of: jax.Array) -> jax.Array:
            return jnp.sum(jnp.sin(attention(*of, is_causal=is_causal, backend=backend)))

        found = [jax.value_and_grad(loss, argnums=(1, 2, 3))(backend, *of) for backend in ("cudnn", "xla")]
        chex.assert_trees_all_close(*found, atol=1e-6)
    assert {length for backend, *lengths in seen if backend == "cudnn" for length in lengths} == {8, 32}


def test_operations_are_counted_the_same_where_a_fused_kernel_is_chosen(monkeypatch) -> None:
    mesh = types.SimpleNamespace(devices=np.array([types.SimpleNamespace(platform="tpu")]))
    of = [jax.ShapeDtypeStruct((2, 1024, 2, 64), "bfloat16")] * 3
    xla = flops.count(jax.jit(lambda *of: attention(*of, backend="xla")), *of)
    monkeypatch.setattr(devices, "_MESH", types.SimpleNamespace(get=lambda: mesh))
    monkeypatch.setattr(module, "_splash_over_mesh", lambda q, *_: q)  # whose operations are not seen
    jitted = jax.jit(lambda *of: attention(*of))
    assert "dot_general" not in jitted.lower(*of).as_text()
    assert flops.count(jitted, *of) == xla and xla > 4 * 4 * 1024**2 * 64
    assert "dot_general" not in jitted.lower(*of).as_text()


@pytest.mark.parametrize("what", get_args(Recompute))
def test_a_fused_kernel_runs_once_forward_and_once_backward(monkeypatch, what: Recompute) -> None:
    """What it made is kept, however much else is computed again."""
    build = Build(jnp.float32, jnp.float32, nnx.Rngs(0))
    options: dict[str, Any] = {"heads": 2, "context_width": 8, "depth": 1, "groups": 4, "linear_projection": True}
    network = Transformer2DModel(16, **options, build=build)
    network.recompute = what
    graphdef, params = nnx.split(network)
    monkeypatch.setattr(module, "_chosen", lambda q, k, _: "splash" if k.shape[1] == 128 else "xla")

    def loss(params: nnx.State, x: jax.Array, text: jax.Array) -> jax.Array:
        return jnp.sum(nnx.merge(graphdef, params)(x, text) ** 2)

    gradient = jax.make_jaxpr(jax.grad(loss))(params, jnp.ones((1, 8, 16, 16)), jnp.ones((1, 3, 8)))
    assert kernels(gradient.jaxpr) == 2


def kernels(jaxpr: Any) -> int:
    """How many there are of whose results something is read; XLA drops the others."""
    read = {id(x) for equation in jaxpr.eqns for x in equation.invars} | {id(x) for x in jaxpr.outvars}

    def inside(value: Any) -> int:
        if isinstance(value, list | tuple):
            return sum(map(inside, value))
        value = getattr(value, "jaxpr", value)
        return kernels(value) if hasattr(value, "eqns") else 0

    return sum(
        any(id(x) in read for x in equation.outvars)
        if equation.primitive.name == "pallas_call"
        else inside(list(equation.params.values()))
        for equation in jaxpr.eqns
    )
