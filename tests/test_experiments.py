"""Every experiment of configs/ in small takes its steps, and what the large ones say of the schedule is so."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import jax
import numpy as np
import pytest
import small
from absl import flags
from ml_collections import ConfigDict
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from configs import depth, quickstart, reflow, text_to_image
from d2f_jax import InputError, NoiseSchedule, Pipeline, blueprint, evaluate, prior, settings, sharding, train, weights
from d2f_jax.alignment import ALIGNED, Alignment
from d2f_jax.prepare import Options
from d2f_jax.reflow import reflow as make_pairs

if not flags.FLAGS.is_parsed():
    flags.FLAGS.mark_as_parsed()

STEPS = 2
NAIVE = Alignment(timestep=False, state=False, velocity=False, raw_time=True)
ADAPTERS = ("diff2flow:lora_small", "diff2flow:lora_base")
OTHER_ADAPTERS = ("flow_matching:lora_base", "diffusion:lora_base")
# Those that other tests run as they stand, with their pictures, are left out: of text_to_image flow_matching and
# diffusion (test_train), of depth diff2flow (test_image_to_depth).
EXPERIMENTS = {
    text_to_image: ("diff2flow", *ADAPTERS, *OTHER_ADAPTERS),
    depth: ("flow_matching", "diffusion", ADAPTERS[1], *OTHER_ADAPTERS),
    reflow: (*text_to_image.OBJECTIVES, ADAPTERS[0]),
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small.write_pipeline(tmp_path_factory.mktemp("model"))


def shrunk(config: ConfigDict, model: Path) -> ConfigDict:
    """The same experiment, for seconds: model, sizes and how often something is told are all that changes."""
    config.update_from_flattened_dict(
        {
            "model": str(model),
            "data.image_size": 16,
            "data.num_train": 16,
            "data.num_validation": 2,
            "train.num_steps": STEPS,
            "train.batch_size": 8,
            "train.log_every": 1,
            "eval.num_loss_examples": 2,
            "reflow.count": 8,
            "reflow.num_validation": 2,
            **{f"lora.{group}": min(2, config.lora[group]) for group in config.lora if group.endswith("_rank")},
        }
    )
    return config


@pytest.fixture(scope="module")
def pairs(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As the page of reflow says that they are made in small."""
    folder = tmp_path_factory.mktemp("pairs") / "out"
    make_pairs(shrunk(reflow.get_config("diff2flow"), model), folder, Options(batch_size=1))
    return folder


@pytest.fixture
def training_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    quickly(monkeypatch)


def quickly(monkeypatch: pytest.MonkeyPatch) -> None:
    """On one device and without pictures, which are tested elsewhere, and would take most of the time."""
    monkeypatch.setattr(train, "finish", lambda *_: None)
    monkeypatch.setattr(train.Watch, "evaluate", lambda *_: None)
    one = sharding.make_mesh(devices=jax.devices()[:1])
    monkeypatch.setattr(sharding, "make_mesh", lambda *_, **__: one)


@pytest.mark.usefixtures("training_alone")
@pytest.mark.parametrize(("page", "experiment"), [(page, each) for page, all in EXPERIMENTS.items() for each in all])
def test_an_experiment_in_small(
    page: ModuleType, experiment: str, model: Path, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    source = f":small:array_record:{request.getfixturevalue('pairs')}" if page is reflow else ""
    train.train(shrunk(page.get_config(experiment + source), model), tmp_path)
    told = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in told] == [1, STEPS] and all(np.isfinite(line["loss"]) for line in told)
    before, after = (
        load_file(folder / "unet" / "diffusion_pytorch_model.safetensors") for folder in (model, tmp_path / "export")
    )
    assert after["conv_in.weight"].shape[1] == 4 * (2 if page is depth else 1)
    moved = {name for name, array in after.items() if not np.array_equal(array, before[name])}
    normed = {name for name in after if ".norm1." in name}
    assert "conv_out.weight" in moved and normed and normed.isdisjoint(moved) == ("lora" in experiment)
    assert (tmp_path / "lora").exists() == ("lora" in experiment)
    learned = Pipeline.from_pretrained(tmp_path / "export")
    assert learned.alignment == (NAIVE if "flow_matching" in experiment else ALIGNED)
    assert learned.task.of_pictures == (page is depth)


@pytest.mark.parametrize("file", [text_to_image, depth, reflow])
def test_the_schedule_ends_in_noise_where_the_published_code_has_it_so(file: ModuleType) -> None:
    for objective in text_to_image.OBJECTIVES:
        for model, wanted in (("", file is not reflow and objective == "diff2flow"), (":sd15", False)):
            assert file.get_config(f"{objective}{model}:array_record:X").zero_terminal_snr == wanted
        assert not file.get_config(objective).zero_terminal_snr


def test_stable_diffusion_15_needs_a_source() -> None:
    for file, arg in (
        (text_to_image, "diff2flow:sd15"),
        (depth, "diffusion:sd15:lora_base"),
        (reflow, "diff2flow:sd15:small:X"),
    ):
        with pytest.raises(ValueError, match="sd15 is for a run with a source, OBJECTIVE:sd15"):
            file.get_config(arg)
    assert depth.get_config("diffusion:sd15:lora_base:array_record:X").model == text_to_image.SD15


COMMON = {"train.optimizer": "adam", "train.ema_decay": 0.999, "train.ema_start": 1000}
PUBLISHED = {
    text_to_image: COMMON | {"train.learning_rate": 1e-5, "data.caption_dropout": 0.02, "data.image_size": 512},
    depth: COMMON
    | {"train.learning_rate": 3e-5, "train.batch_size": 32, "train.num_steps": 25_000, "train.warmup_steps": 100}
    | {"data.image_size": 384, "data.image_width": 512, "train.schedule": "exponential", "train.final_rate": 0.01},
    reflow: COMMON | {"train.learning_rate": 5e-5, "data.caption_dropout": 0.0, "reflow.count": 1_644_334},
}


@pytest.mark.parametrize("file", [text_to_image, depth, reflow])
def test_the_large_runs_have_the_published_values(file: ModuleType) -> None:
    """Of the paper's published code; of depth the schedule and the batch are Marigold's (arXiv 2312.02145)."""
    for objective in text_to_image.OBJECTIVES:
        config = settings.flat(file.get_config(f"{objective}:array_record:X").to_dict())
        assert {name: config[f"config.{name}"] for name in PUBLISHED[file]} == PUBLISHED[file]


def test_a_schedule_that_ends_in_noise_is_exported(model: Path, tmp_path: Path) -> None:
    config = shrunk(quickstart.get_config(), model)
    own = NoiseSchedule.from_config(weights.load_scheduler_config(model))
    assert own.alphas_cumprod[-1] > 0
    np.testing.assert_array_equal(prior.load(config).schedule.alphas_cumprod, own.alphas_cumprod)
    config.zero_terminal_snr = True
    planned, loaded = blueprint.load(config).pipeline, prior.load(config)
    np.testing.assert_array_equal(planned.schedule.alphas_cumprod, loaded.schedule.alphas_cumprod)
    assert planned.scheduler_config == loaded.scheduler_config
    loaded.save_pretrained(tmp_path / "export")
    schedule = Pipeline.from_pretrained(tmp_path / "export").schedule
    assert schedule.alphas_cumprod[-1] == 0 and schedule.alphas_cumprod[0] == own.alphas_cumprod[0]
    theirs = small.torch_pipeline(tmp_path / "export").scheduler
    assert theirs.config.rescale_betas_zero_snr


@pytest.fixture(scope="module")
def ending_in_noise(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of adapters whose schedule ends in pure noise, as the base's own does not."""
    workdir = tmp_path_factory.mktemp("run")
    config = shrunk(quickstart.get_config("lora_small"), model)
    changes = {"zero_terminal_snr": True, "train.learning_rate": 0.01, "train.warmup_steps": 0}
    config.update_from_flattened_dict(changes)
    with pytest.MonkeyPatch.context() as patch:
        quickly(patch)
        train.train(config, workdir)
    return workdir


def test_adapters_draw_with_the_schedule_that_they_were_trained_with(
    model: Path, ending_in_noise: Path, tmp_path: Path
) -> None:
    adapters, export = ending_in_noise / "lora" / "adapters.safetensors", ending_in_noise / "export"
    on_base = Pipeline.from_pretrained(model).with_lora(adapters)
    merged = Pipeline.from_pretrained(export)
    np.testing.assert_array_equal(on_base.schedule.alphas_cumprod, merged.schedule.alphas_cumprod)
    assert on_base.ends_in_noise and merged.ends_in_noise

    def draw(pipeline: Pipeline) -> np.ndarray:
        return pipeline("a cube", num_steps=3, seed=1).astype(int)

    assert np.abs(draw(on_base) - draw(merged)).max() <= 1
    altered(adapters, tmp_path / "older", lambda metadata: metadata.pop("zero_terminal_snr"))
    older = Pipeline.from_pretrained(model).with_lora(tmp_path / "older")
    assert not older.ends_in_noise and np.abs(draw(older) - draw(merged)).max() > 1

    config = shrunk(quickstart.get_config(), model)
    config.update_from_flattened_dict({"eval.num_images": 4, "eval.step_counts": (2,)})
    with_lora = evaluate.evaluate(config, tmp_path / "adapters", lora=str(adapters))
    config.model = str(export)
    whole = evaluate.evaluate(config, tmp_path / "whole")
    assert with_lora[2] == pytest.approx(whole[2], rel=1e-2)  # to a level here and there


def altered(file: Path, to: Path, alter: Callable[[dict[str, str]], object]) -> None:
    with safe_open(file, framework="numpy") as handle:
        metadata = handle.metadata()
    alter(metadata)
    save_file(load_file(file), to, metadata=metadata)


def test_a_base_of_epsilon_takes_no_adapters_whose_schedule_ended_in_noise(
    model: Path, ending_in_noise: Path, tmp_path: Path
) -> None:
    other = of_epsilon(model, tmp_path)
    with pytest.raises(
        InputError, match=r"adapters\.safetensors was trained with zero terminal SNR: the model predicts"
    ):
        Pipeline.from_pretrained(other).with_lora(ending_in_noise / "lora" / "adapters.safetensors")


def of_epsilon(model: Path, folder: Path) -> Path:
    other = shutil.copytree(model, folder / "model")
    file = other / "scheduler" / "scheduler_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"prediction_type": "epsilon"}))
    return other


def test_a_schedule_of_epsilon_cannot_end_in_noise(model: Path, tmp_path: Path) -> None:
    config = shrunk(quickstart.get_config(), of_epsilon(model, tmp_path))
    config.zero_terminal_snr = True
    for load in (prior.load, blueprint.load):
        with pytest.raises(
            InputError, match=r"config\.zero_terminal_snr=True: .*model predicts epsilon.*use a v_prediction"
        ):
            load(config)
