"""The data of a run: which sources, what of them is held out, and that what is prepared is not computed again."""

import dataclasses
import itertools
import json
import logging
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import small
from ml_collections import ConfigDict
from PIL import Image

from configs import quickstart
from d2f_jax import InputError, Pipeline, datasets, sharding, train
from d2f_jax.datasets import Data
from d2f_jax.models.clip import CLIPTextModel
from d2f_jax.models.vae import AutoencoderKL
from d2f_jax.prepare import Options, prepare

COUNT = 30
MESH = sharding.make_mesh(2, 4)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small.write_pipeline(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def pipeline(model: Path) -> Pipeline:
    return Pipeline.from_pretrained(model)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Picture i is all of the grey level 8 i, and says so."""
    folder = tmp_path_factory.mktemp("pictures")
    for i in range(COUNT):
        Image.new("RGB", (16, 16), (8 * i,) * 3).save(folder / f"{i}.png")
    rows = [{"file_name": f"{i}.png", "text": f"grey {i}"} for i in range(COUNT)]
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


@pytest.fixture(scope="module")
def prepared(model: Path, pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("prepared") / "out"
    prepare(config(model, f"image_folder:{pictures}", **{"data.held_out": 6}), folder, Options(batch_size=2))
    return folder


def config(model: Path, *sources: str, **changes: object) -> ConfigDict:
    config = quickstart.get_config()
    small_run = {
        "data.image_size": 16,
        "data.num_train": 12,
        "data.num_validation": 5,
        "data.caption_dropout": 0.0,
        "train.batch_size": 8,
        "train.num_steps": 2,
        "eval.every": 2,
        "eval.num_loss_examples": 6,
    }
    config.update_from_flattened_dict({"model": str(model), "data.sources": sources, **small_run, **changes})
    return config


def opened(config: ConfigDict, pipeline: Pipeline, workdir: Path) -> Data:
    return datasets.open_data(config, workdir, pipeline, datasets.open_given(config))


def captions(source: Any) -> list[str]:
    return [source[i]["text"] for i in range(len(source))]


def grey(count: int, first: int, every: int) -> list[str]:
    return [f"grey {first + every * i}" for i in range(count)]


def test_held_out_examples_are_not_trained_on(model: Path, pipeline: Pipeline, pictures: Path, tmp_path: Path) -> None:
    source = f"image_folder:{pictures}"
    data = opened(config(model, source, **{"data.held_out": 6}), pipeline, tmp_path)
    assert captions(data.validation[0]) == grey(6, 2, 5)
    assert sorted(captions(data.train[0]) + captions(data.validation[0])) == sorted(grey(COUNT, 0, 1))
    assert [e["text"] for e in data.examples(3)] == grey(3, 2, 5)
    assert len(data.examples(100)) == 6
    whole = opened(config(model, source), pipeline, tmp_path)
    assert not whole.validation and len(whole.train[0]) == COUNT
    assert [e["text"] for e in whole.examples(2)] == grey(2, 0, 1)


def test_examples_whose_neighbours_are_alike_are_spread_over_each_source(
    model: Path, pipeline: Pipeline, pictures: Path, tmp_path: Path
) -> None:
    one = opened(config(model, f"image_folder:{pictures}", **{"task.name": "image_to_depth"}), pipeline, tmp_path)
    assert [e["text"] for e in one.reading(3)] == grey(3, 5, 10)
    assert [e["text"] for e in one.reading(COUNT + 7)] == grey(COUNT, 0, 1)
    two = dataclasses.replace(one, shown=[one.shown[0], Squares(4), Squares(90)])
    assert [e["text"] for e in two.reading(2)] == ["grey 15", "2"]
    found = [e["text"] for e in two.reading(14)]
    assert " ".join(found) == "grey 3 0 9 grey 9 1 27 grey 15 2 45 grey 21 3 63 grey 27 81"


class Squares:
    """Its examples are their numbers."""

    def __init__(self, count: int) -> None:
        self._count = count

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> Any:
        return {"text": str(index)}


def test_depth_is_judged_by_the_protocol_of_its_source(tmp_path: Path) -> None:
    (tmp_path / "list.txt").write_text("a.png b.png")
    for name in ("a.png", "b.png"):
        Image.new("L", (2, 2)).save(tmp_path / name)
    nyu, kitti = (f"depth_list:{tmp_path / 'list.txt'}?protocol={name}" for name in ("nyuv2", "kitti"))

    def protocol(*sources: str, said: str = "", shown: tuple[str, ...] = ()) -> str:
        changes = {"data.sources": sources, "eval.sources": shown, "eval.depth.protocol": said}
        wanted = quickstart.get_config()
        wanted.update_from_flattened_dict({"task.name": "image_to_depth", **changes})
        return datasets.depth_protocol(wanted, datasets.open_given(wanted))

    assert protocol("shapes_world") == "all" and protocol("shapes_world", said="scannet") == "scannet"
    assert protocol(nyu) == protocol(nyu, said="nyuv2") == protocol(kitti, shown=(nyu,)) == "nyuv2"
    for said in ("kitti", "all"):
        with pytest.raises(InputError, match=rf"depth\.protocol={said}, but depth_list:\S+=nyuv2 names its own; leave"):
            protocol(nyu, said=said)
    with pytest.raises(InputError, match=r"one protocol at a time: \S+=nyuv2 by nyuv2, \S+=kitti by kitti; give them"):
        protocol(nyu, kitti)


def test_a_prepared_folder_has_held_out_its_own(
    model: Path, pipeline: Pipeline, prepared: Path, tmp_path: Path
) -> None:
    data = opened(config(model, f"array_record:{prepared}", **{"data.held_out": 3}), pipeline, tmp_path)
    assert captions(data.validation[0]) == grey(6, 2, 5) and len(data.train[0]) == 24
    assert data.null_text is not None and data.null_text.shape == (24, 16)


def test_a_mixture_shows_and_trains_all_of_its_sources(
    model: Path, pipeline: Pipeline, pictures: Path, tmp_path: Path
) -> None:
    sources = f"shapes_world:{tmp_path / 'world'}", f"image_folder:{pictures}"
    mixed = config(model, *sources, **{"data.held_out": 2, "data.weights": (1.0, 3.0), "data.caption_dropout": 0.0})
    data = opened(mixed, pipeline, tmp_path / "run")
    assert [len(source) for source in data.train] == [12, 28] and [len(s) for s in data.validation] == [5, 2]
    assert data.position() == {"examples": [12, 28]}
    assert [e["text"].startswith("grey") for e in data.examples(6)] == [False, True, False, True, False, False]
    assert not (tmp_path / "run").exists() and (tmp_path / "world").exists()
    batches = data.train_batches(mixed, MESH, 0)
    flat = np.concatenate([np.asarray(batch["image"]).std((1, 2, 3)) == 0 for batch in itertools.islice(batches, 20)])
    batches.close()
    assert abs(flat.mean() - 3 / 4) < 0.1
    assert not datasets.scored(mixed)
    assert datasets.scored(config(model, "shapes_world"))


def test_a_checkpoint_goes_on_with_the_same_examples_only(
    model: Path, pipeline: Pipeline, pictures: Path, tmp_path: Path
) -> None:
    data = opened(config(model, f"image_folder:{pictures}"), pipeline, tmp_path)
    data.check_position(None)
    data.check_position(json.loads(json.dumps(data.position())))
    with pytest.raises(InputError, match=r"have \[30\] examples, but \[29\] when the checkpoint was made"):
        data.check_position({"examples": [29]})
    with pytest.raises(InputError, match=r"\[30, 5\] when .* config\.init_from"):
        data.check_position({"examples": [30, 5]})


def test_batches_are_the_same_from_any_step_on_any_mesh(
    model: Path, pipeline: Pipeline, pictures: Path, tmp_path: Path
) -> None:
    run = config(model, f"image_folder:{pictures}")
    data = opened(run, pipeline, tmp_path)

    def some(mesh: jax.sharding.Mesh, first: int, count: int) -> list[dict[str, np.ndarray]]:
        batches = data.train_batches(run, mesh, first)
        taken = [jax.tree.map(np.asarray, batch) for batch in itertools.islice(batches, count)]
        batches.close()
        return taken

    straight, later = some(MESH, 0, 5), some(sharding.make_mesh(1, 1, jax.devices()[:1]), 3, 2)
    for one, other in zip(straight[3:], later, strict=True):
        assert one.keys() == other.keys() == {"image", "input_ids", "weight"}
        assert all(np.array_equal(one[name], other[name]) for name in one)
    seen = np.concatenate([batch["image"][:, 0, 0, 0] for batch in straight])[:COUNT]
    assert sorted(seen) == [8 * i for i in range(COUNT)], "an epoch has every example once"


@pytest.mark.parametrize("count", [5, 6, 100])
def test_the_validation_loss_sees_every_held_out_example_once(
    model: Path, pipeline: Pipeline, pictures: Path, tmp_path: Path, count: int
) -> None:
    run = config(model, f"image_folder:{pictures}", **{"data.held_out": 10})
    data = opened(run, pipeline, tmp_path)
    batches = data.validation_batches(run, MESH, count)
    assert [index_B.tolist() for _, index_B in batches] == [list(range(8)), list(range(8, 16))][: len(batches)]
    weights = np.concatenate([batch["weight"] for batch, _ in batches])
    levels = np.concatenate([batch["image"][:, 0, 0, 0] for batch, _ in batches])[weights > 0]
    held_out = [8 * int(text.split()[1]) for text in captions(data.validation[0])]
    assert len(levels) == min(count, 10) and len(set(levels)) == len(levels) and set(levels) <= set(held_out)
    again = data.validation_batches(run, MESH, count)
    assert all(np.array_equal(a["image"], b["image"]) for (a, _), (b, _) in zip(batches, again, strict=True))


@dataclasses.dataclass(frozen=True)
class Damaged:
    """One of three examples cannot be read."""

    source: Any

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> Any:
        if index % 3 == 1:
            raise InputError(f"{index}.png does not decode")
        return self.source[index]


def test_damage_is_told_and_weighs_nothing(
    model: Path, pipeline: Pipeline, pictures: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = config(model, f"image_folder:{pictures}", **{"data.on_damage": "skip"})
    whole = opened(run, pipeline, tmp_path)
    damaged: list[Any] = [Damaged(whole.train[0])]
    data = dataclasses.replace(whole, train=damaged, shown=damaged)
    with caplog.at_level(logging.ERROR, "absl"):
        batches = data.train_batches(run, MESH, 0)
        batch = next(batches)
        batches.close()
    assert not np.asarray(batch["image"])[np.asarray(batch["weight"]) == 0].any()
    lost = 8 - int(np.asarray(batch["weight"]).sum())
    assert lost > 0 and sum("left out" in r.message and "does not decode" in r.message for r in caplog.records) >= lost
    assert len(data.examples(100)) == len(whole.train[0]) - len(whole.train[0]) // 3
    strict = dataclasses.replace(data, on_damage="stop")
    with pytest.raises(InputError, match="does not decode"):
        next(strict.train_batches(run, MESH, 0))
    with pytest.raises(InputError, match="does not decode"):
        strict.examples(2)


def test_what_was_prepared_otherwise_is_refused(model: Path, prepared: Path, tmp_path: Path) -> None:
    source, workdir = f"array_record:{prepared}", tmp_path / "run"
    with pytest.raises(InputError, match=r"prepared of 16 x 16 pixels, but config.data.image_size and .* are 32 x 32"):
        train.train(config(model, source, **{"data.image_size": 32}), workdir)
    with pytest.raises(InputError, match=r"the VAE of config\.model is another"):
        train.train(config(Path("tiny-sd"), source), workdir)
    assert not workdir.exists()


def test_what_is_prepared_is_not_computed_again(
    model: Path, pictures: Path, prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither the steps nor the held-out loss run an encoder, without which those on pictures do nothing."""
    loop = train.loop

    def without_encoders(*arguments: Any) -> Any:
        def encode(self: Any, *_: Any) -> Any:
            raise AssertionError(f"{type(self).__name__} was run")

        with monkeypatch.context() as patch:
            patch.setattr(AutoencoderKL, "encode", encode)
            patch.setattr(CLIPTextModel, "__call__", encode)
            return loop(*arguments)

    monkeypatch.setattr(train, "loop", without_encoders)
    monkeypatch.setattr(train, "finish", lambda *_: None)
    train.train(config(model, f"array_record:{prepared}", **{"data.caption_dropout": 0.5}), tmp_path / "run")
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 2] and np.isfinite(lines[2]["validation_loss"])
    with pytest.raises(AssertionError, match="was run"):
        train.train(config(model, f"image_folder:{pictures}"), tmp_path / "other")
