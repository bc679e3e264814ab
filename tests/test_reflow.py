"""Pairs for reflow: the noise and what the teacher makes of it, the same however they came about, and trained on."""

import dataclasses
import json
from pathlib import Path

import hosts
import jax
import numpy as np
import pytest
import small
from flax import nnx
from ml_collections import ConfigDict

from configs import quickstart
from configs import reflow as reflow_config
from d2f_jax import InputError, Pipeline, lora, lora_files, train
from d2f_jax.alignment import Alignment
from d2f_jax.data.prepared import PreparedSource
from d2f_jax.lora import Targets
from d2f_jax.pipeline import STEPS
from d2f_jax.prepare import Options
from d2f_jax.reflow import reflow
from d2f_jax.sampler import Sampler

OPTIONS = Options(shard_size=4, batch_size=1)
COUNT, CAPTIONS = 10, 6


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small.write_pipeline(tmp_path_factory.mktemp("model"))


def config(model: Path, sampler: str, **changes: object) -> ConfigDict:
    config = quickstart.get_config()
    config.update_from_flattened_dict(
        {
            "model": str(model),
            "seed": 3,
            "data.image_size": 16,
            "data.image_width": 24,
            "data.num_train": CAPTIONS,
            "data.num_validation": 2,
            "reflow.count": COUNT,
            "reflow.num_validation": 2,
            "reflow.num_steps": 3,
            "reflow.sampler": sampler,
            "reflow.guidance_rescale": 0.5,
            "reflow.negative_prompt": "a cone",
            **changes,
        }
    )
    return config


@pytest.fixture(scope="module", params=["heun", "sde_euler"])
def made(request: pytest.FixtureRequest, model: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    folder = tmp_path_factory.mktemp("pairs") / "out"
    reflow(config(model, request.param), folder, OPTIONS)
    return request.param, folder


def files(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir() if file.is_file()}


def assert_sampled(folder: Path, teacher: Pipeline, sampler: str, *numbers: int) -> None:
    pairs = PreparedSource(folder)
    for i in numbers:
        pair = pairs[i]
        np.testing.assert_allclose(pair["noise"], teacher.noise(3, 1, 16, 24, first=i)[0], rtol=1e-6, atol=1e-6)
        options = {"num_steps": 3, "seed": 3, "first": i, "height": 16, "width": 24}
        options |= {"guidance_scale": 3.0, "guidance_rescale": 0.5, "negative_prompt": "a cone"}
        image = teacher(pair["text"], sampler=Sampler(sampler), **options)[0].astype(int)
        latent = np.asarray(pair["latent_mean"], np.float32)[None]
        decoded = np.clip(np.asarray(teacher.vae.decode(latent))[0] / 2 + 0.5, 0, 1) * 255
        assert np.abs(decoded - image).max() <= 2  # latents are float16


def test_a_pair_is_what_the_pipeline_samples(made: tuple[str, Path], model: Path) -> None:
    sampler, folder = made
    pairs = PreparedSource(folder)
    assert len(pairs) == COUNT and len(PreparedSource(folder, "validation")) == 2
    assert pairs[0]["text"] == pairs[CAPTIONS]["text"] != pairs[1]["text"]
    assert_sampled(folder, Pipeline.from_pretrained(model), sampler, 0, CAPTIONS, COUNT - 1)
    # No two pairs begin alike, neither over captions that come again nor over splits.
    every = [p["noise"] for s in ("train", "validation") for p in PreparedSource(folder, s)]
    assert len({array.tobytes() for array in every}) == COUNT + 2
    assert STEPS > 2**30 + COUNT


def test_what_was_lost_is_made_again_alike(made: tuple[str, Path], model: Path) -> None:
    sampler, folder = made
    before = files(folder)
    lost = folder / "train-00001-of-00003.array_record"
    lost.unlink()
    (folder / "manifest.json").unlink()
    reflow(config(model, sampler), folder, OPTIONS)
    assert files(folder) == before


def test_the_teacher_flows_as_it_records_whatever_the_student_learns(
    made: tuple[str, Path], model: Path, tmp_path: Path
) -> None:
    sampler, folder = made
    if sampler != "heun":
        pytest.skip("one sampler is enough")
    naive = Alignment(timestep=False, state=False, velocity=False, raw_time=True)
    student = {"objective.name": "flow_matching", "objective.raw_time": True}
    reflow(config(model, sampler, **student), tmp_path / "pairs", OPTIONS)
    assert files(tmp_path / "pairs") == files(folder)
    dataclasses.replace(Pipeline.from_pretrained(model), alignment=naive).save_pretrained(tmp_path / "naive")
    few = {"reflow.count": 2, "reflow.num_validation": 0, "data.sources": (f"shapes_world:{folder / 'data'}",)}
    reflow(config(tmp_path / "naive", sampler, **few), tmp_path / "of_naive", OPTIONS)
    assert_sampled(tmp_path / "of_naive", Pipeline.from_pretrained(tmp_path / "naive"), sampler, 1)
    with pytest.raises(InputError, match="sampler='ddim' is of diffusion models and of flows aligned with them"):
        reflow(config(tmp_path / "naive", "ddim"), tmp_path / "none", OPTIONS)
    assert not (tmp_path / "none").exists()


def test_a_teacher_may_have_adapters(model: Path, tmp_path: Path) -> None:
    teacher, targets = Pipeline.from_pretrained(model), Targets(self_attention_rank=2)
    trained = lora.init(nnx.state(teacher.unet), jax.random.key(0), targets)
    stirred = jax.tree.map(lambda x: x + 0.3 * jax.random.normal(jax.random.key(1), x.shape), trained)
    lora_files.save(tmp_path / "adapters", stirred, targets, scale=1.0)
    few = {"reflow.count": 2, "reflow.num_validation": 0}
    reflow(config(model, "heun", **few), tmp_path / "pairs", OPTIONS, lora=str(tmp_path / "adapters"), lora_scale=0.5)
    assert_sampled(tmp_path / "pairs", teacher.with_lora(tmp_path / "adapters", scale=0.5), "heun", 0, 1)
    with pytest.raises(AssertionError):
        assert_sampled(tmp_path / "pairs", teacher, "heun", 0, 1)


def test_two_processes_of_the_program_make_the_same(made: tuple[str, Path], model: Path, tmp_path: Path) -> None:
    sampler, folder = made
    if sampler != "heun":
        pytest.skip("one sampler is enough")
    changed = hosts.changes(config(model, sampler), quickstart.get_config())
    arguments = [f"--model={model}", f"--out={tmp_path}", "--shard_size=4", "--batch_size=1"]
    told = hosts.two("d2f_jax.reflow", "--config=configs/quickstart.py", *changed, *arguments, devices=8)
    assert told.count("train: 10 pairs") == told.count("validation: 2 pairs") == 1
    assert files(tmp_path) == files(folder)


def test_another_teacher_gets_another_folder(made: tuple[str, Path], model: Path) -> None:
    sampler, folder = made
    other = config(model, sampler)
    other.reflow.guidance_scale = 1.0
    with pytest.raises(InputError, match="begun with another config: teacher"):
        reflow(other, folder, OPTIONS)


def test_training_on_pairs(made: tuple[str, Path], model: Path, tmp_path: Path) -> None:
    sampler, folder = made
    if sampler != "heun":
        pytest.skip("training does not care how its pairs were made")
    run = reflow_config.get_config(f"diff2flow:small:array_record:{folder}")
    run.update_from_flattened_dict(
        {
            "model": str(model),
            "data.image_size": 16,
            "data.image_width": 24,
            "train.num_steps": 2,
            "train.batch_size": 8,
            "train.log_every": 1,
            "eval.every": 2,
            "eval.step_counts": (1, 2),
            "eval.grid_images": 1,
            "eval.batch_size": 1,
        }
    )
    train.train(run, tmp_path)
    records = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [r["step"] for r in records if "loss" in r] == [1, 2]
    assert all(np.isfinite(r["loss"]) for r in records if "loss" in r)
    assert any("validation_loss" in r for r in records)
    assert (tmp_path / "export" / "model_index.json").is_file()
