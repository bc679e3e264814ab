"""Where arrays live: meshes that fit or are refused, one rule for what is kept, rows that never move, equal shares."""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import twins
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import Mesh, NamedSharding
from test_step import OPTIMIZER

from d2f_jax import InputError, load_unet, lora, prior, sharding
from d2f_jax import step as steps
from d2f_jax.models.layers import shapes_of
from d2f_jax.models.unet import UNet2DConditionModel, UNetConfig

MESHES = [(1, 1), (8, 1), (1, 8), (2, 4), (4, 2)]
shapes = st.lists(st.sampled_from([1, 2, 3, 4, 5, 7, 8, 12, 16, 24, 56]), max_size=4).map(tuple)


@dataclasses.dataclass(frozen=True)
class Chip:
    """As much of a device as a mesh asks for."""

    id: int
    slice_index: int
    platform: str = "cpu"
    device_kind: str = "cpu"
    process_index: int = 0


def mesh_of(data: int, fsdp: int) -> Mesh:
    return sharding.make_mesh(data, fsdp, jax.devices()[: data * fsdp])


def shape(shape: tuple[int, ...]) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def bytes_of(x: Any, shape: tuple[int, ...]) -> int:
    return x.dtype.itemsize * math.prod(shape)


def random_tree() -> dict[str, Any]:
    return {
        "kernel": twins.random(3, 3, 16, 24, seed=1),
        "bias": twins.random(5, seed=2),
        "count": np.int32(7),
        "nested": [np.arange(16, dtype=np.int32), jnp.asarray(twins.random(8, 2, seed=3), jnp.bfloat16)],
    }


# The mesh


@pytest.mark.parametrize(
    ("sizes", "made"),
    [((), (1, 8)), ((-1, 4), (2, 4)), ((2, -1), (2, 4)), ((4, 2), (4, 2)), ((-1, 8), (1, 8)), ((8, -1), (8, 1))],
)
def test_a_size_of_minus_one_takes_what_is_left(sizes: tuple[int, ...], made: tuple[int, int]) -> None:
    mesh = sharding.make_mesh(*sizes)
    assert mesh.axis_names == ("data", "fsdp") and mesh.devices.shape == made
    assert set(mesh.devices.flat) == set(jax.devices())


@pytest.mark.parametrize(
    ("data", "fsdp"),
    [(3, 2), (8, 8), (1, 1), (-1, 3), (3, -1), (-1, 16), (-1, 0), (0, -1), (-2, -4), (-8, -1)],
)
def test_sizes_that_the_devices_do_not_have(data: int, fsdp: int) -> None:
    with pytest.raises(InputError) as error:
        sharding.make_mesh(data, fsdp)
    said = str(error.value)
    assert f"config.mesh.data={data}, config.mesh.fsdp={fsdp} " in said and "8 devices" in said and "\n" not in said


def test_devices_that_cannot_be_laid_out_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise NotImplementedError("Failed to find assignment for logical_axis_index 1 of size 8")

    monkeypatch.setattr(sharding.mesh_utils, "create_device_mesh", refuse)
    with pytest.raises(InputError, match=r"fsdp=8 cannot be laid over the network of 8 devices \(Failed to find"):
        sharding.make_mesh(1, 8)


def test_a_mesh_of_some_devices() -> None:
    devices = jax.devices()[2:6]
    assert set(sharding.make_mesh(2, 2, devices).devices.flat) == set(devices)


@pytest.mark.parametrize(
    ("slices", "size", "made"),
    [
        (1, 4, (1, 4)),
        (1, 6, (3, 2)),
        (1, 64, (4, 16)),
        (1, 96, (6, 16)),
        (1, 256, (16, 16)),
        (2, 4, (2, 4)),
        (4, 128, (32, 16)),
        (8, 1, (8, 1)),
    ],
)
def test_by_default_devices_of_a_slice_share_a_copy(slices: int, size: int, made: tuple[int, int]) -> None:
    chips = [Chip(i, slice_index=i // size) for i in range(slices * size)]
    mesh = sharding.make_mesh(devices=chips)
    assert mesh.devices.shape == made and set(mesh.devices.flat) == set(chips)
    assert all(len({chip.slice_index for chip in row}) == 1 for row in mesh.devices)


@pytest.mark.parametrize(("slices", "size"), [(2, 4), (8, 1), (4, 6)])
def test_a_copy_reaches_over_slices_only_where_it_must(slices: int, size: int) -> None:
    chips = [Chip(i, slice_index=i % slices) for i in range(slices * size)]
    for fsdp in (n for n in range(1, len(chips) + 1) if len(chips) % n == 0):
        mesh = sharding.make_mesh(-1, fsdp, chips)
        assert mesh.devices.shape == (len(chips) // fsdp, fsdp) and set(mesh.devices.flat) == set(chips)
        for row in mesh.devices:
            assert len({chip.slice_index for chip in row}) == fsdp // math.gcd(size, fsdp)


def test_slices_of_different_sizes_are_told() -> None:
    chips = [Chip(i, slice_index=int(i > 4)) for i in range(8)]
    with pytest.raises(InputError, match=r"different numbers of devices: 5, 3; take as many of each$"):
        sharding.make_mesh(devices=chips)


# What is kept


@given(shapes, st.sampled_from([1, 2, 3, 4, 8]))
def test_the_first_axis_that_divides_is_split_and_no_other(dims: tuple[int, ...], size: int) -> None:
    mesh = sharding.make_mesh(2, size, [Chip(i, 0) for i in range(2 * size)])
    spec = sharding.kept(mesh, shape(dims)).spec
    split = [axis for axis, name in enumerate(spec) if name is not None]
    divide = [axis for axis, length in enumerate(dims) if length and length % size == 0]
    if size == 1 or len(dims) == 1 or not divide:
        assert not split
        return
    assert split == divide[:1] and spec[split[0]] == "fsdp"


@given(st.dictionaries(st.sampled_from("abcdef"), shapes), st.sampled_from([1, 2, 8]))
def test_unsplit_names_just_what_is_kept_whole(tree: dict[str, tuple[int, ...]], size: int) -> None:
    mesh = sharding.make_mesh(1, size, [Chip(i, 0) for i in range(size)])
    abstract = {name: shape(dims) for name, dims in tree.items()}
    whole = {
        name: dims
        for name, dims in tree.items()
        if sharding.kept(mesh, abstract)[name].shard_shape(dims) == dims and len(dims) > 1 and size > 1
    }
    assert sharding.unsplit(mesh, abstract) == whole


def test_unsplit_names_paths_of_modules_and_dataclasses() -> None:
    unet = abstract_unet(UNetConfig(**twins.SD15_UNET))
    assert sharding.unsplit(mesh_of(1, 8), unet) == {}
    adapters = {"to_q.kernel": lora.Adapter(shape((9, 3)), shape((3, 16)))}
    assert sharding.unsplit(mesh_of(1, 8), adapters) == {"to_q.kernel.a": (9, 3)}


def test_what_is_kept_is_not_split_along_data() -> None:
    tree = sharding.put(random_tree(), sharding.kept(mesh_of(8, 1), random_tree()))
    assert all(x.sharding.is_fully_replicated for x in jax.tree.leaves(tree))


ADAPTED = lora.Targets(self_attention_rank=16, cross_attention_rank=16, attention_out=True)


@functools.cache
def abstract_unet(config: UNetConfig) -> nnx.State:
    return nnx.split(shapes_of(lambda rngs: UNet2DConditionModel(config, rngs=rngs)))[1]


def parts_of_state(state: steps.TrainState) -> tuple[Any, ...]:
    return state.trained, state.ema, state.opt_state


@pytest.mark.parametrize("with_lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("config", [twins.SD15_UNET, twins.SD21_UNET], ids=["SD 1.5", "SD 2.1"])
def test_a_device_keeps_its_share_of_stable_diffusion(config: dict[str, Any], with_lora: bool) -> None:
    trained = abstract_unet(UNetConfig(**config))
    assert 859e6 < sum(x.size for x in jax.tree.leaves(trained)) < 867e6
    if with_lora:
        trained = jax.eval_shape(functools.partial(lora.init, key=jax.random.key(0), targets=ADAPTED), trained)
    init = functools.partial(steps.init_state, optimizer=OPTIMIZER, root_key=jax.random.key(0))
    state = jax.eval_shape(init, trained)
    for chips in (8, 16, 64):
        parts, mesh = parts_of_state(state), sharding.make_mesh(1, chips, [Chip(i, 0) for i in range(chips)])
        placed = list(zip(*map(jax.tree.leaves, (parts, sharding.kept(mesh, parts))), strict=True))
        share = sum(bytes_of(x, where.shard_shape(x.shape)) for x, where in placed)
        assert 1 <= chips * share / sum(bytes_of(x, x.shape) for x, _ in placed) < 1.15


@pytest.mark.parametrize("with_lora", [False, True], ids=["full", "lora"])
def test_every_device_keeps_its_share_of_tiny_sd(with_lora: bool) -> None:
    unet = nnx.state(load_unet("tiny-sd"))
    trained = lora.init(unet, jax.random.key(0), ADAPTED) if with_lora else unet
    frozen = steps.Frozen(unet if with_lora else None, nnx.State({}), nnx.State({}))
    state, frozen = prior.place(mesh_of(1, 8), trained, frozen, OPTIMIZER, jax.random.key(0))
    for kept in (parts_of_state(state), frozen) if with_lora else (parts_of_state(state),):
        shards = [shard for x in jax.tree.leaves(kept) for shard in x.addressable_shards]
        whole = sum(x.nbytes for x in jax.tree.leaves(kept))
        for device in jax.devices():
            share = sum(shard.data.nbytes for shard in shards if shard.device == device)
            assert 1 <= 8 * share / whole < 1.15


# Placing


@pytest.mark.parametrize(("data", "fsdp"), MESHES)
def test_what_is_put_comes_back(data: int, fsdp: int) -> None:
    mesh, tree = mesh_of(data, fsdp), random_tree()
    shardings = sharding.kept(mesh, tree)
    placed = sharding.put(tree, shardings)
    assert jax.tree.map(lambda x: x.sharding, placed) == shardings
    for x, y in zip(jax.tree.leaves(tree), jax.tree.leaves(sharding.to_host(placed)), strict=True):
        assert isinstance(y, np.ndarray) and y.dtype == np.asarray(x).dtype
        np.testing.assert_array_equal(x, y)


@pytest.mark.parametrize("several", [False, True], ids=["one process", "devices of others too"])
def test_keys_draw_the_same_wherever_they_are(several: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    tree = random_tree() | {"key": jax.random.key(3), "keys": jax.random.split(jax.random.key(4, impl="rbg"), (8, 2))}
    shardings = sharding.kept(mesh_of(1, 8), tree)
    with monkeypatch.context() as patch:
        if several:
            patch.setattr(NamedSharding, "is_fully_addressable", False)
        placed = sharding.put(tree, shardings)
    assert all(
        jax.tree.leaves(jax.tree.map(lambda x, where: x.sharding.is_equivalent_to(where, x.ndim), placed, shardings))
    )
    assert not placed["keys"].is_fully_replicated
    for name in ("key", "keys"):
        assert placed[name].dtype == tree[name].dtype
        np.testing.assert_array_equal(jax.random.key_data(placed[name]), jax.random.key_data(tree[name]))
    np.testing.assert_array_equal(jax.random.normal(placed["key"], (4,)), jax.random.normal(tree["key"], (4,)))
    np.testing.assert_array_equal(placed["kernel"], tree["kernel"])


# Rows


def rows_on_devices(x: jax.Array) -> dict[Any, np.ndarray]:
    return {shard.device: np.asarray(shard.data) for shard in x.addressable_shards}


@pytest.mark.parametrize(("data", "fsdp"), MESHES)
def test_each_row_is_placed_once(data: int, fsdp: int) -> None:
    mesh = mesh_of(data, fsdp)
    assert sharding.local_rows(mesh, 16).tolist() == list(range(16))  # all devices are of this process
    image, index = np.random.default_rng(0).integers(0, 256, (16, 3, 2), np.uint8), np.arange(16)
    placed = sharding.put_rows(mesh, {"image": image, "index": index}, 16)
    assert all(x.sharding == sharding.batch_split(mesh) for x in placed.values())
    np.testing.assert_array_equal(placed["image"], image)
    pieces = rows_on_devices(placed["index"])
    assert {len(rows) for rows in pieces.values()} == {16 // mesh.size}
    assert sorted(np.concatenate(list(pieces.values()))) == list(range(16))
    for device, rows in rows_on_devices(placed["image"]).items():
        np.testing.assert_array_equal(rows, image[pieces[device]])


@pytest.mark.parametrize(("data", "fsdp"), [(1, 8), (2, 4), (4, 2)])
def test_processes_feed_disjoint_rows_that_make_the_batch(
    data: int, fsdp: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a mesh over four processes with two devices each, seen by one after the other."""
    mesh, batch = mesh_of(data, fsdp), {"x": twins.random(16, 3)}
    where = sharding.batch_split(mesh).devices_indices_map((16,))
    fed, placed = [], {}

    def make(_: Any, __: Any, part: Any) -> None:
        placed.update({device: part((where[device][0], slice(None))) for device in own})

    monkeypatch.setattr(jax, "make_array_from_callback", make)
    for process in range(4):
        own = jax.devices()[process::4]  # whose rows do not follow one another
        mine = {device: where[device] for device in own}
        monkeypatch.setattr(NamedSharding, "addressable_devices_indices_map", lambda _, __, mine=mine: mine)
        rows = sharding.local_rows(mesh, 16)
        assert (np.diff(rows) > 0).all()
        fed += rows.tolist()
        sharding.put_rows(mesh, {"x": batch["x"][rows]}, 16)
    assert sorted(fed) == list(range(16))
    for device, (index,) in where.items():
        np.testing.assert_array_equal(placed[device], batch["x"][index])


@pytest.mark.parametrize(("data", "fsdp"), MESHES)
@pytest.mark.parametrize("count", [1, 2, 3])
def test_parts_hold_all_rows_once_and_move_none(data: int, fsdp: int, count: int) -> None:
    mesh, size = mesh_of(data, fsdp), 8 * 3 * 2
    index = sharding.put_rows(mesh, {"x": np.arange(size)}, size)["x"]
    deal = jax.jit(lambda x: sharding.parts(mesh, x, count))
    (dealt,) = deal((index,))
    assert dealt.shape == (count, size // count)
    assert sorted(np.ravel(dealt)) == list(range(size))
    before, after = rows_on_devices(index), rows_on_devices(dealt)
    for device, rows in after.items():
        assert sorted(rows.flat) == sorted(before[device])
        assert rows.shape == (count, size // count // mesh.size)
    assert not collectives(deal.lower((index,)).compile().as_text())


def collectives(program: str) -> set[str]:
    kinds = ("all-gather", "all-reduce", "all-to-all", "collective-permute", "reduce-scatter")
    return {kind for kind in kinds if f" {kind}(" in program}


def test_split_rows_divides_over_all_devices() -> None:
    mesh = mesh_of(2, 4)
    x = jax.jit(lambda: sharding.split_rows(mesh, {"x": jnp.zeros((16, 3))}))()["x"]
    assert x.sharding.is_equivalent_to(sharding.batch_split(mesh), 2)
    assert {shard.data.shape for shard in x.addressable_shards} == {(2, 3)}


# Parameters on their way through a step


@pytest.mark.parametrize(("data", "fsdp"), [(1, 8), (2, 4), (8, 1)])
def test_parameters_are_gathered_and_their_gradient_comes_back_split(data: int, fsdp: int) -> None:
    mesh = mesh_of(data, fsdp)
    params = {"kernel": twins.random(24, 16, seed=1), "bias": twins.random(3, seed=2)}
    x = twins.random(8, 24, seed=3)

    def loss(params: dict[str, jax.Array], x: jax.Array) -> jax.Array:
        return jnp.sum(jnp.tanh(x @ params["kernel"]) ** 2) + jnp.sum(params["bias"] ** 2)

    placed, rows = sharding.put(params, sharding.kept(mesh, params)), sharding.put_rows(mesh, {"x": x}, 8)["x"]
    whole = jax.jit(functools.partial(sharding.gathered, mesh))(placed)
    for name, value in whole.items():
        assert value.sharding.is_equivalent_to(sharding.replicated(mesh), value.ndim)
        assert value.sharding.is_fully_replicated
        np.testing.assert_array_equal(value, params[name])
    grads = jax.jit(jax.grad(lambda params, x: loss(sharding.gathered(mesh, params), x)))(placed, rows)
    assert grads["kernel"].sharding.is_fully_replicated == (fsdp == 1)
    for name, expected in jax.grad(loss)(params, x).items():
        assert grads[name].sharding.is_equivalent_to(sharding.kept(mesh, params)[name], grads[name].ndim)
        np.testing.assert_allclose(grads[name], expected, rtol=1e-5, atol=1e-5)


# The size of a batch


@settings(max_examples=50)
@given(st.integers(-2, 70), st.sampled_from([1, 2, 3]), st.sampled_from([1, 2, 8]))
def test_a_batch_divides_over_devices_and_parts(batch_size: int, accumulate: int, devices: int) -> None:
    mesh, count = mesh_of(devices, 1), devices * accumulate
    if batch_size > 0 and batch_size % count == 0:
        sharding.check_batch_size(batch_size, accumulate, mesh)
        return
    with pytest.raises(InputError, match=f"^config.train.batch_size={batch_size} .* a multiple of {count}$") as error:
        sharding.check_batch_size(batch_size, accumulate, mesh)
    assert f"{devices} devices" in str(error.value)
    assert ("config.train.accumulate" in str(error.value)) == (accumulate > 1)
