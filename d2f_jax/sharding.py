"""Where arrays live: a mesh of two axes, one rule for everything that is kept, one for what passes through.

Batches are split over both axes. What is kept, trained or frozen, is split over `fsdp` and whole along `data`:
parameters, their gradient, their average and the optimizer's state. A step gathers parameters as it needs them, in the
type in which it computes, and every device updates its share of them.
"""

import collections
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import mesh_utils, multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from d2f_jax.errors import InputError

Tree = TypeVar("Tree")
# Devices that share one copy by default. With 64, which leave most axes no whole tiles of a TPU, its compiler sums much
# of the gradient on every device: of Stable Diffusion 2.1 on v5e:16x16 each receives 4.8 GB a step, and 3.8 with 16.
_MOST = 16


def make_mesh(data: int = -1, fsdp: int = -1, devices: Sequence[Any] | None = None) -> Mesh:
    """Axes `data` and `fsdp` over `devices` (all there are); -1 takes what the other leaves.

    If both are -1, `fsdp` takes the greatest divisor that a slice has in common with 16. Neighbours in `fsdp`, which
    exchange most, are neighbours in the chips' network; it reaches over slices only where it does not divide one of
    them. What JAX calls a slice is for GPUs a host. Raises InputError for sizes that the devices, or their network, do
    not have.
    """
    devices = jax.devices() if devices is None else list(devices)
    slices = collections.Counter(getattr(device, "slice_index", 0) for device in devices)
    size = len(devices) // len(slices)
    if set(slices.values()) != {size}:
        told = ", ".join(str(slices[index]) for index in sorted(slices))
        raise InputError(f"the slices, or hosts, have different numbers of devices: {told}; take as many of each")
    if data == fsdp == -1:
        fsdp = math.gcd(size, _MOST)
    data, fsdp = _filled(data, fsdp, len(devices))
    within = math.gcd(size, fsdp)
    try:
        if len(slices) > 1:
            inner, outer = (size // within, within), (data * within // size, fsdp // within)
            array = mesh_utils.create_hybrid_device_mesh(inner, outer, devices, allow_split_physical_axes=True)
        else:
            array = mesh_utils.create_device_mesh((data, fsdp), devices, allow_split_physical_axes=True)
    except (AssertionError, NotImplementedError, ValueError) as error:
        raise InputError(
            f"config.mesh.data={data}, config.mesh.fsdp={fsdp} cannot be laid over the network of {len(devices)} "
            f"devices ({error}); use other sizes"
        ) from error
    return Mesh(array, ("data", "fsdp"), axis_types=(AxisType.Auto, AxisType.Auto))


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, P())


def batch_split(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, P(("data", "fsdp")))


def kept(mesh: Mesh, tree: Any) -> Any:
    """A sharding for every array: its first axis that `fsdp` divides is split.

    What has but one axis is whole: biases and norms, 0.05% of Stable Diffusion, which would be hundreds of messages,
    and what adafactor keeps of linear layers.
    """
    return jax.tree.map(lambda x: NamedSharding(mesh, _spec(np.shape(x), mesh.shape["fsdp"])), tree)


def unsplit(mesh: Mesh, tree: Any) -> dict[str, tuple[int, ...]]:
    """Path and shape of the arrays of several axes, none of which can be split: every device keeps them whole."""
    size = mesh.shape["fsdp"]
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    whole = {_name(path): np.shape(x) for path, x in leaves if np.ndim(x) > 1 and _spec(np.shape(x), size) == P()}
    return whole if size > 1 else {}


def gathered(mesh: Mesh, params: Tree) -> Tree:
    """Under jit: parameters whole on every device. Their gradient comes back as a sum, each device's share of it."""

    @jax.custom_vjp
    def whole(params: Tree) -> Tree:
        return jax.lax.with_sharding_constraint(params, replicated(mesh))

    def backward(_: None, grads: Tree) -> tuple[Tree]:
        return (split(mesh, grads),)

    whole.defvjp(lambda params: (whole(params), None), backward)
    return whole(params)


def split(mesh: Mesh, tree: Tree) -> Tree:
    """Under jit: every array as `kept` has it."""
    return jax.lax.with_sharding_constraint(tree, kept(mesh, tree))


def each_share(mesh: Mesh, function: Callable[[Tree], Tree], tree: Tree) -> Tree:
    """Under jit: `function` of what each device holds of arrays that are as `kept` has them."""
    if mesh.size == 1:
        return function(tree)
    specs = jax.tree.map(lambda where: where.spec, kept(mesh, tree))
    return jax.shard_map(function, mesh=mesh, in_specs=(specs,), out_specs=specs, check_vma=False)(tree)


def split_rows(mesh: Mesh, tree: Tree) -> Tree:
    """Under jit: arrays [B, ...] divided over all devices."""
    return jax.tree.map(lambda x: jax.lax.with_sharding_constraint(x, batch_split(mesh)), tree)


def parts(mesh: Mesh, tree: Tree, count: int) -> Tree:
    """Under jit: arrays [B, ...] as [count, B / count, ...]; each device's rows are dealt out, so that none move."""

    def deal(x: jax.Array) -> jax.Array:
        dealt = x.reshape(x.shape[0] // count, count, *x.shape[1:]).swapaxes(0, 1)
        return jax.lax.with_sharding_constraint(dealt, NamedSharding(mesh, P(None, ("data", "fsdp"))))

    return jax.tree.map(deal, tree)


def put(tree: Any, shardings: Any) -> Any:
    """Arrays that every process holds whole become global ones; each device receives its part only."""

    def place(x: Any, sharding: NamedSharding) -> jax.Array:
        if sharding.is_fully_addressable:
            return jax.device_put(x, sharding)
        if isinstance(x, jax.Array) and jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
            data = np.asarray(jax.random.key_data(x))
            whole = jax.make_array_from_callback(data.shape, sharding, lambda index: data[index])
            return jax.random.wrap_key_data(whole, impl=jax.random.key_impl(x))
        host = np.asarray(x)
        return jax.make_array_from_callback(host.shape, sharding, lambda index: host[index])

    return jax.tree.map(place, tree, shardings)


def to_host(tree: Any) -> Any:
    """NumPy arrays, whole, in every process; one array at a time passes through the devices."""

    def fetch(x: Any) -> np.ndarray:
        if isinstance(x, jax.Array) and not x.is_fully_addressable:
            return np.asarray(multihost_utils.process_allgather(x, tiled=True))
        return np.asarray(x)

    return jax.tree.map(fetch, tree)


def local_rows(mesh: Mesh, batch_size: int) -> np.ndarray:
    """Which rows of a global batch this process feeds to its devices, in rising order."""
    indices = batch_split(mesh).addressable_devices_indices_map((batch_size,))
    rows = [np.arange(batch_size)[index[0]] for index in indices.values() if index is not None]
    return np.unique(np.concatenate(rows))


def put_rows(mesh: Mesh, batch: Mapping[str, np.ndarray], batch_size: int) -> dict[str, jax.Array]:
    """The global batch of `batch_size` rows, from the arrays [B', ...] of this process's `local_rows`."""
    sharding, rows = batch_split(mesh), local_rows(mesh, batch_size)

    def place(local: np.ndarray) -> jax.Array:
        def part(index: Any) -> np.ndarray:
            start, stop, _ = index[0].indices(batch_size)
            first = int(np.searchsorted(rows, start))
            return local[first : first + stop - start]

        return jax.make_array_from_callback((batch_size, *local.shape[1:]), sharding, part)

    return {name: place(local) for name, local in batch.items()}


def check_batch_size(batch_size: int, accumulate: int, mesh: Mesh) -> None:
    """Raises InputError unless every device gets the same number of examples, in each of the parts of a step."""
    parts = mesh.size * accumulate
    if batch_size < 1 or batch_size % parts:
        times = f" x {accumulate} parts (config.train.accumulate)" if accumulate > 1 else ""
        told = f"config.train.batch_size={batch_size} does not divide over {mesh.size} devices{times}"
        raise InputError(f"{told}; use a multiple of {parts}")


def _filled(data: int, fsdp: int, count: int) -> tuple[int, int]:
    sizes = {"config.mesh.data": data, "config.mesh.fsdp": fsdp}
    if data == -1 and fsdp > 0:
        data = count // fsdp
    elif fsdp == -1 and data > 0:
        fsdp = count // data
    if data < 1 or fsdp < 1 or data * fsdp != count:
        told = ", ".join(f"{name}={size}" for name, size in sizes.items())
        raise InputError(
            f"{told} make no mesh of {count} devices; let one be -1, the other divide {count}, or both be -1"
        )
    return data, fsdp


def _spec(shape: tuple[int, ...], size: int) -> P:
    lengths = shape if size > 1 and len(shape) > 1 else ()
    axis = next((axis for axis, length in enumerate(lengths) if length and length % size == 0), None)
    return P() if axis is None else P(*(None,) * axis, "fsdp")


def _name(path: tuple[Any, ...]) -> str:
    names = [str(getattr(key, "key", getattr(key, "name", getattr(key, "idx", key)))) for key in path]
    return ".".join(names).removesuffix(".value")  # of a variable of Flax
