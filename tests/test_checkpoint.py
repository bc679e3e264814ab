"""Checkpoints: the same on any mesh, sealed against damage, kept by a rule, and a failed save is told."""

import dataclasses
import errno
import gc
import os
import re
import resource
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import twins
from hypothesis import given, settings
from hypothesis import strategies as st

from d2f_jax import InputError, checkpoint, sharding
from d2f_jax import step as steps
from d2f_jax.checkpoint import Checkpoints
from d2f_jax.errors import SaveError

ADAM = optax.adamw(1e-3)
POSITION = {"examples": [3, 5]}


def mesh_of(data: int, fsdp: int) -> jax.sharding.Mesh:
    return sharding.make_mesh(data, fsdp, jax.devices()[: data * fsdp])


ONE, SPLIT = mesh_of(1, 1), mesh_of(1, 8)


def state_of(step: int, mesh: jax.sharding.Mesh = ONE, optimizer: Any = ADAM) -> steps.TrainState:
    """As if `step` steps had made it: every array is of its own."""
    trained = {"kernel": jnp.zeros((24, 16)), "bias": jnp.zeros(3), "half": jnp.zeros((8, 5), jnp.bfloat16)}
    state = steps.init_state(trained, optimizer, jax.random.key(step))
    leaves, tree = jax.tree.flatten((state.trained, state.ema, state.opt_state))
    drawn = [np.asarray(100 * twins.random(*x.shape, seed=100 * step + n), x.dtype) for n, x in enumerate(leaves)]
    trained, ema, opt_state = jax.tree.unflatten(tree, drawn)
    state = dataclasses.replace(state, step=np.int32(step), trained=trained, ema=ema, opt_state=opt_state)
    return sharding.put(state, sharding.kept(mesh, state))


def checkpoints(folder: Path, *, every: int = 1, keep: int = 9, keep_period: int | None = None) -> Checkpoints:
    return Checkpoints(folder, every=every, keep=keep, keep_period=keep_period)


def save(folder: Path, *steps: int, mesh: jax.sharding.Mesh = ONE, **options: Any) -> Path:
    with checkpoints(folder, **options) as saved:
        for step in steps:
            saved.save(step, state_of(step, mesh), POSITION)
    return folder


def restore(folder: Path, mesh: jax.sharding.Mesh = ONE) -> steps.TrainState:
    with checkpoints(folder) as saved:
        return saved.restore(state_of(0, mesh))[0]


def assert_same(a: steps.TrainState, b: steps.TrainState) -> None:
    a, b = (dataclasses.replace(state, root_key=jax.random.key_data(state.root_key)) for state in (a, b))
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert x.dtype == y.dtype
        np.testing.assert_array_equal(x, y)


def placed_like(a: Any, b: Any) -> bool:
    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return all(x.sharding.is_equivalent_to(y.sharding, x.ndim) for x, y in pairs)


def found(folder: Path) -> set[int]:
    return {int(p.name) for p in folder.iterdir()}


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def a_file(checkpoint: Path) -> Path:
    """The largest: where the arrays are."""
    return max((p for p in checkpoint.rglob("*") if p.is_file()), key=lambda p: (p.stat().st_size, str(p)))


def flip(file: Path, place: int, bit: int = 0) -> None:
    content = bytearray(file.read_bytes())
    content[place] ^= 1 << bit
    file.write_bytes(content)


# On any mesh


def test_restored_on_another_mesh_and_back_bit_for_bit(tmp_path: Path) -> None:
    save(tmp_path, 1, mesh=SPLIT)
    here = restore(tmp_path, ONE)
    assert_same(here, state_of(1))
    assert placed_like(here, state_of(0))
    with checkpoints(tmp_path) as saved:
        saved.save(2, here, POSITION)
    for mesh in (SPLIT, mesh_of(2, 4)):
        back = restore(tmp_path, mesh)
        assert_same(back, state_of(1))
        assert placed_like(back, state_of(0, mesh))
        assert {shard.data.shape for shard in back.trained["kernel"].addressable_shards} != {(24, 16)}


def test_the_position_comes_back_and_without_a_checkpoint_the_state_itself(tmp_path: Path) -> None:
    state = state_of(0)
    with checkpoints(tmp_path) as saved:
        same, position = saved.restore(state)
        assert same is state and position is None
        for step, position in ((1, POSITION), (2, {"examples": [9], "more": {"text": "é", "none": None, "half": 0.5}})):
            saved.save(step, state, position)
            saved.wait()
            assert saved.restore(state)[1] == position


# Which are kept


@pytest.mark.parametrize(("keep", "period"), [(1, None), (2, 3), (3, 2)])
def test_the_newest_are_kept_and_those_of_the_period(tmp_path: Path, keep: int, period: int | None) -> None:
    save(tmp_path, *range(1, 8), keep=keep, keep_period=period)
    assert found(tmp_path) == {n for n in range(1, 8) if n > 7 - keep or (period and n % period == 0)}


def test_what_a_killed_save_has_left_is_gone_before_anything_else(tmp_path: Path) -> None:
    save(tmp_path, 1)
    killed = tmp_path / "2.orbax-checkpoint-tmp"
    (killed / "state").mkdir(parents=True)
    with checkpoints(tmp_path):
        assert not killed.exists()
    assert found(tmp_path) == {1}


def test_due_every_so_many_steps(tmp_path: Path) -> None:
    with checkpoints(tmp_path, every=3) as saved:
        assert [n for n in range(1, 10) if saved.due(n)] == [3, 6, 9]


def test_a_step_that_is_there_is_left_alone(tmp_path: Path) -> None:
    before = contents(save(tmp_path, 1))
    with checkpoints(tmp_path) as saved:
        saved.save(1, state_of(7), {"examples": []})
    assert contents(tmp_path) == before


# Damage


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tmp_path_factory.mktemp("whole"), 1) / "1"


def test_what_is_whole_has_no_damage(whole: Path) -> None:
    assert checkpoint.damage(whole) is None


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_a_flipped_bit_is_told_wherever_it_is(whole: Path, data: st.DataObject) -> None:
    """In every file of the state and of the position but Orbax's mark that they are complete, and in the seal."""
    files = sorted(p for p in whole.glob("*/**/*") if p.is_file() and p.name != "commit_success.txt")
    assert {file.relative_to(whole).parts[0] for file in files} == {"state", "position"}
    file = data.draw(st.sampled_from([*files, whole / "seal.json"]))
    place, bit = data.draw(st.integers(0, file.stat().st_size - 1)), data.draw(st.integers(0, 7))
    flip(file, place, bit)
    try:
        said = checkpoint.damage(whole)
        assert said and "\n" not in said
        assert file.name == "seal.json" or said == f"{file.relative_to(whole)} has changed since it was written"
    finally:
        flip(file, place, bit)
    assert checkpoint.damage(whole) is None


@contextmanager
def without(file: Path, content: bytes | None = None) -> Iterator[None]:
    before = file.read_bytes()
    file.unlink()
    if content is not None:
        file.write_bytes(content)
    yield
    file.write_bytes(before)


def test_a_cut_or_missing_file_is_named(whole: Path) -> None:
    file = a_file(whole)
    name, size = file.relative_to(whole), file.stat().st_size
    with without(file, file.read_bytes()[:-1]):
        assert checkpoint.damage(whole) == f"{name} has {size - 1} bytes instead of {size}"
    with without(file):
        assert checkpoint.damage(whole) == f"{name} is missing"
    with without(whole / "seal.json"):
        assert checkpoint.damage(whole) == "seal.json is missing"
    for content in (b"", b'{"state', b"[]", b'{"state/manifest.ocdbt": 3}', b"\xff"):
        with without(whole / "seal.json", content):
            assert str(checkpoint.damage(whole)).startswith("seal.json cannot be read (")
    assert str(checkpoint.damage(whole / "nowhere")) == "seal.json is missing"


def test_damaged_ones_are_reported_and_deleted_once_an_older_one_is_in_use(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(tmp_path, 1, 2, 3, 4)
    flip(a_file(tmp_path / "4"), 9)
    (tmp_path / "3" / "seal.json").unlink()
    reports: list[str] = []
    monkeypatch.setattr(checkpoint.logging, "error", lambda text, *values: reports.append(text % values))
    restored = Checkpoints._restore

    def failing(*_: Any) -> None:
        raise OSError("the disk is away")

    monkeypatch.setattr(Checkpoints, "_restore", failing)
    with pytest.raises(OSError, match="the disk is away"):
        restore(tmp_path)
    assert found(tmp_path) == {1, 2, 3, 4}
    monkeypatch.setattr(Checkpoints, "_restore", restored)
    reports.clear()
    assert_same(restore(tmp_path), state_of(2))
    assert found(tmp_path) == {1, 2}
    for step, report in zip((4, 3), reports, strict=True):
        assert f"checkpoint {step} of {tmp_path} is damaged and passed over" in report
    assert reports[0].endswith("has changed since it was written") and reports[1].endswith("seal.json is missing")
    save(tmp_path, 3)  # the run comes to it again
    assert_same(restore(tmp_path), state_of(3))


def test_an_older_damaged_one_does_not_matter(tmp_path: Path) -> None:
    save(tmp_path, 1, 2)
    flip(a_file(tmp_path / "1"), 9)
    assert_same(restore(tmp_path), state_of(2))
    assert found(tmp_path) == {1, 2}


def test_if_all_are_damaged_the_run_ends_and_nothing_is_deleted(tmp_path: Path) -> None:
    save(tmp_path, 1, 2)
    for step in (1, 2):
        flip(a_file(tmp_path / str(step)), 9)
    before = contents(tmp_path)
    with pytest.raises(InputError) as error:
        restore(tmp_path)
    assert contents(tmp_path) == before
    said = str(error.value)
    assert said.startswith(f"{tmp_path}: no checkpoint is whole (2: ") and "; 1: " in said and "\n" not in said


def test_what_cannot_be_read_now_is_not_damaged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path, 1, 2)
    before, unwell, opened = contents(tmp_path), a_file(tmp_path / "2"), Path.open

    def stale(path: Path, *args: Any, **kwargs: Any) -> Any:
        if path == unwell:
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE), str(path))
        return opened(path, *args, **kwargs)

    monkeypatch.setattr(Path, "open", stale)
    with pytest.raises(SaveError, match=f"{unwell} cannot be read .Stale file handle.; start the same command again"):
        restore(tmp_path)
    monkeypatch.undo()
    assert contents(tmp_path) == before
    assert_same(restore(tmp_path), state_of(2))


# The average alone


def test_the_average_alone_comes_whatever_the_optimizer_was(tmp_path: Path) -> None:
    adafactor = optax.adafactor(1e-3)
    with checkpoints(tmp_path) as saved:
        for step in (1, 2):
            saved.save(step, state_of(step, SPLIT, adafactor), POSITION)
    before, expected = contents(tmp_path), state_of(2, ONE, adafactor).ema
    for mesh in (ONE, SPLIT):
        like = state_of(0, mesh).ema
        step, average = checkpoint.restore_average(tmp_path, like)
        assert step == 2 and placed_like(average, like)
        for x, y in zip(jax.tree.leaves(average), jax.tree.leaves(expected), strict=True):
            np.testing.assert_array_equal(x, y)
    assert contents(tmp_path) == before


def test_without_an_average_it_is_what_was_trained(tmp_path: Path) -> None:
    state = dataclasses.replace(state_of(3), ema=None)
    with checkpoints(tmp_path) as saved:
        saved.save(3, state, POSITION)
    with checkpoints(tmp_path) as saved:
        assert_same(saved.restore(dataclasses.replace(state_of(0), ema=None))[0], state)
    step, average = checkpoint.restore_average(tmp_path, state_of(0).averaged)
    assert step == 3 and state.averaged is state.trained
    for x, y in zip(jax.tree.leaves(average), jax.tree.leaves(state.trained), strict=True):
        np.testing.assert_array_equal(x, y)


def emptied(folder: Path) -> None:
    for step in ("1", "2"):
        (folder / step).rename(folder.parent / step)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (emptied, "holds no checkpoint; give the checkpoints/ of"),
        (lambda folder: flip(a_file(folder / "2"), 9), r"/2 is damaged: .* has changed since it was written; put back"),
        (lambda folder: (folder / "2" / "seal.json").unlink(), r"/2 is damaged: seal\.json is missing; put back"),
    ],
    ids=["none", "flipped", "without a seal"],
)
def test_an_average_that_is_not_there(tmp_path: Path, change: Callable[[Path], object], said: str) -> None:
    folder = save(tmp_path / "checkpoints", 1, 2)
    change(folder)
    assert re.search(said, refused(folder, state_of(0).ema))


def refused(folder: Path, like: Any) -> str:
    """The one line; nothing is changed."""
    before = contents(folder)
    with pytest.raises(InputError) as error:
        checkpoint.restore_average(folder, sharding.put(like, sharding.kept(ONE, like)))
    assert contents(folder) == before
    assert str(folder) in str(error.value) and "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"kernel": np.zeros((24, 32), np.float32)}, "kernel: (24, 16) there, (24, 32) here"),
        ({"kernel": np.zeros((12, 16), np.float32)}, "kernel: (24, 16) there, (12, 16) here"),
        ({"more": np.zeros(3, np.float32)}, "more: none there, (3,) here"),
        ({"kernel": {"a": np.zeros(3, np.float32)}}, "kernel: (24, 16) there, none here"),
        ({"bias": None}, "bias: (3,) there, none here"),
    ],
)
def test_an_average_of_other_parameters(whole: Path, change: dict[str, Any], said: str) -> None:
    like = {name: x for name, x in (state_of(0).ema | change).items() if x is not None}
    assert refused(whole.parent, like).endswith(f"the parameters are not this run's ({said}); use its config")


def test_there_is_no_average_where_there_is_no_folder(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="nowhere"):
        checkpoint.restore_average(tmp_path / "nowhere", state_of(0).ema)
    assert not (tmp_path / "nowhere").exists()


# Saves that fail


@contextmanager
def full_disk() -> Iterator[None]:
    """No file can grow beyond some bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 10, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def settle(folder: Path) -> None:
    """Waits for the threads of a failed save: the same command, started again, would not meet them."""
    before, now = None, list(os.walk(folder))
    while now != before:
        time.sleep(0.2)
        before, now = now, list(os.walk(folder))
    gc.collect()  # tasks tell of their end here, not after all tests


def failure(folder: Path, seen_by: str) -> str:
    """What is told of a save of step 3 that finds no room."""
    try:
        with full_disk(), checkpoints(folder) as saved:
            saved.save(3, state_of(3), POSITION)
            if seen_by == "wait":
                saved.wait()
            elif seen_by == "save":
                saved.save(4, state_of(4), POSITION)
    except SaveError as error:
        return str(error)
    return "nothing"


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # Orbax's threads end in disorder
@pytest.mark.filterwarnings("ignore:coroutine .* was never awaited:RuntimeWarning")
@pytest.mark.parametrize("seen_by", ["wait", "save", "exit"])
@pytest.mark.parametrize("before", [(), (1, 2)], ids=["the first", "a later one"])
def test_a_save_that_fails_is_told_and_the_one_before_is_whole(
    tmp_path: Path, before: tuple[int, ...], seen_by: str
) -> None:
    save(tmp_path, *before)
    said = failure(tmp_path, seen_by)
    assert f"the checkpoint of step 3 was not written to {tmp_path} (" in said and "\n" not in said
    assert ("that of step 2 is whole" if before else "there is none before it") in said
    settle(tmp_path)
    with checkpoints(tmp_path) as again:
        assert_same(again.restore(state_of(0))[0], state_of(max(before, default=0)))
        again.save(3, state_of(3), POSITION)
    assert found(tmp_path) == {*before, 3}
    assert_same(restore(tmp_path), state_of(3))
