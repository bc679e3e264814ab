"""The whole program on small networks: resumed equals uninterrupted, and what it leaves behind is usable."""

import json
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import skimage
import small
import twins
from absl import flags
from flax import nnx
from ml_collections import ConfigDict
from PIL import Image
from safetensors.numpy import load_file, save_file
from safetensors.torch import load_file as torch_file

from configs import images, quickstart, text_to_image
from d2f_jax import InputError, Pipeline, distributed, sampling, train, weights
from d2f_jax.alignment import Alignment
from d2f_jax.checkpoint import Checkpoints
from d2f_jax.data.sources import ImageFolder
from d2f_jax.datasets import Data
from d2f_jax.errors import Preempted

if not flags.FLAGS.is_parsed():
    flags.FLAGS.mark_as_parsed()

PHOTOGRAPHS = (
    "astronaut",
    "chelsea",
    "coffee",
    "motorcycle_left",
    "motorcycle_right",
    "rocket",
    "retina",
    "ihc",
    "camera",
)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small.write_pipeline(tmp_path_factory.mktemp("model"))


def shrunk(config: ConfigDict, model: Path, **changes: object) -> ConfigDict:
    """The same run, for seconds."""
    config.update_from_flattened_dict(
        {
            "model": str(model),
            "data.image_size": 16,
            "data.num_train": 24,
            "data.num_validation": 10,
            "train.num_steps": 6,
            "train.batch_size": 8,
            "train.log_every": 1,
            "train.checkpoint_every": 2,
            "train.warmup_steps": 2,
            "train.learning_rate": 3e-4,
            "train.ema_decay": 0.99,
            "eval.every": 3,
            "eval.num_loss_examples": 10,
            "eval.step_counts": (1, 2),
            "eval.num_images": 6,
            "eval.batch_size": 8,
            **changes,
        }
    )
    return config


def exported(workdir: Path) -> dict[str, bytes]:
    return {str(p.relative_to(workdir)): p.read_bytes() for p in (workdir / "export").rglob("*") if p.is_file()}


def lines(workdir: Path) -> list[dict[str, float]]:
    """All but how fast it was."""
    told = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [{k: x for k, x in line.items() if k not in ("images_per_second", "tflops_per_device")} for line in told]


def checkpoints(workdir: Path) -> set[int]:
    return {int(p.name) for p in (workdir / "checkpoints").iterdir()}


def write_pictures(folder: Path, captions: list[str]) -> Path:
    """Noise, with these captions."""
    folder.mkdir()
    pictures = np.random.default_rng(0).integers(0, 256, (len(captions), 32, 32, 3), np.uint8)
    for i, picture in enumerate(pictures):
        Image.fromarray(picture).save(folder / f"{i}.png")
    rows = [{"file_name": f"{i}.png", "text": caption} for i, caption in enumerate(captions)]
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


@pytest.fixture(scope="module")
def finished(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    workdir = tmp_path_factory.mktemp("run") / "workdir"
    train.train(shrunk(quickstart.get_config(), model), workdir)
    return workdir


@pytest.mark.parametrize(("name", "sigma_min"), [("flow_matching", 0.5), ("diffusion", 0.0)])
def test_other_objectives(name: str, sigma_min: float, model: Path, finished: Path, tmp_path: Path) -> None:
    changes = {"objective.sigma_min": sigma_min}
    train.train(shrunk(text_to_image.get_config(name), model, **changes), tmp_path)
    first, other = (line["loss"] for line in (lines(finished)[0], lines(tmp_path)[0]))
    assert np.isfinite(other) and other != pytest.approx(first, rel=1e-3)
    export, table = Pipeline.from_pretrained(tmp_path / "export"), (tmp_path / "scores.md").read_text()
    naive = Alignment(timestep=False, state=False, velocity=False, raw_time=True, sigma_min=sigma_min)
    assert export.alignment == (naive if name == "flow_matching" else Alignment())
    assert ("as a flow, not finetuned" in table) == (name == "flow_matching")
    assert ("finetuned, DDIM" in table) == (name == "diffusion")


@pytest.fixture
def training_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the pictures before and after."""
    monkeypatch.setattr(train, "finish", lambda *_: None)


def test_a_workdir_holds_what_is_promised(finished: Path) -> None:
    assert json.loads((finished / "export" / "unet" / "config.json").read_text())["sample_size"] == 8
    names = {p.name for p in finished.iterdir()}
    assert names == {
        "config.json",
        "metrics.jsonl",
        "tensorboard",
        "checkpoints",
        "samples",
        "scores.md",
        "export",
        "data",
    }
    assert json.loads((finished / "config.json").read_text())["train"]["num_steps"] == 6
    assert checkpoints(finished) == {4, 6}
    assert {p.name for p in (finished / "samples").iterdir()} == {"step_000003.png", "before_and_after.png"}
    for name, columns in (("step_000003", 2), ("before_and_after", 2)):
        picture = Image.open(finished / "samples" / f"{name}.png")
        assert picture.width > columns * 2 * 32 and np.asarray(picture).std() > 10


def test_every_step_and_every_evaluation_is_told(finished: Path) -> None:
    records = lines(finished)
    assert [r["step"] for r in records] == [1, 2, 3, 3, 4, 5, 6, 6]
    steps = [r for r in records if "loss" in r]
    assert all(np.isfinite(r["loss"]) and r["grad_norm"] > 0 for r in steps)
    assert all(r["bad_examples"] == r["skipped_steps"] == 0 for r in steps)
    np.testing.assert_allclose([r["learning_rate"] for r in steps], [0, 1.5e-4, 3e-4, 3e-4, 3e-4, 3e-4], rtol=1e-6)
    for evaluation in (r for r in records if "loss" not in r):
        bins = [evaluation[f"validation_loss/t{i / 8:.3f}"] for i in range(8)]
        assert evaluation.keys() == {"step", "validation_loss", *(f"validation_loss/t{i / 8:.3f}" for i in range(8))}
        assert evaluation["validation_loss"] == pytest.approx(np.mean(bins)) and min(bins) > 0


def test_the_table_shows_the_bridge(finished: Path) -> None:
    table = (finished / "scores.md").read_text().splitlines()
    cells = {line.split("|")[1].strip(): [c.strip() for c in line.split("|")[2:-1]] for line in table}
    assert list(cells)[2:] == ["prior, DDIM", "prior, DDIM on the flow grid", "aligned, not finetuned", "finetuned"]
    # Aligned and not finetuned is DDIM on the same grid; rounding to bytes may move the last digit.
    for a, b in zip(cells["aligned, not finetuned"], cells["prior, DDIM on the flow grid"], strict=True):
        assert float(a.split(" / ")[0]) == pytest.approx(float(b.split(" / ")[0]), abs=0.02, rel=1e-3)
    assert cells["finetuned"] != cells["aligned, not finetuned"]


def test_the_export_samples_the_same_in_diffusers(finished: Path) -> None:
    check_export(finished / "export")


def test_a_model_of_epsilon_is_trained_and_samples_the_same_in_diffusers(tmp_path: Path, training_alone: None) -> None:
    """As Stable Diffusion 1.5 is one."""
    model, run = small.write_pipeline(tmp_path / "model", prediction="epsilon"), tmp_path / "run"
    changes = {"train.num_steps": 3, "train.warmup_steps": 0, "train.learning_rate": 0.01, "eval.every": 99}
    train.train(shrunk(quickstart.get_config(), model, **changes), run)
    before, after = (nnx.state(Pipeline.from_pretrained(folder).unet) for folder in (model, run / "export"))
    for kept, moved in zip(*map(jax.tree.leaves, (before, after)), strict=True):
        assert not np.array_equal(kept, moved)
    assert all(np.isfinite(line["loss"]) for line in lines(run) if "loss" in line)
    assert check_export(run / "export").scheduler.config.prediction_type == "epsilon"


def test_taesd_in_the_place_of_the_vae(tmp_path: Path) -> None:
    tiny = twins.taesd(**twins.SMALL_TAESD)
    model = small.write_pipeline(tmp_path / "model", tiny)
    train.train(shrunk(quickstart.get_config(), model, **{"train.num_steps": 2, "eval.every": 100}), tmp_path / "run")
    assert all(np.isfinite(line["loss"]) for line in lines(tmp_path / "run") if "loss" in line)
    theirs = check_export(tmp_path / "run" / "export")
    assert type(theirs.vae) is type(tiny)
    for name, tensor in theirs.vae.state_dict().items():
        assert (tensor == tiny.state_dict()[name]).all(), name


def check_export(export: Path) -> Any:
    """What diffusers makes of it, which draws as it does here."""
    ours, theirs = Pipeline.from_pretrained(export), small.torch_pipeline(export)
    noise = ours.noise(0, 2, 16, 24)
    grid = sampling.flow_grid(ours.schedule, 4)
    expected = theirs(
        ["a red cube", "a blue cone"],
        height=16,
        width=24,
        latents=twins.nchw(np.asarray(noise)),
        guidance_scale=2.0,
        num_inference_steps=4,
        sigmas=sampling.diffusers_sigmas(grid),
        output_type="np",
    ).images
    pictures = ours(["a red cube", "a blue cone"], noise=noise, guidance_scale=2.0, num_steps=4)
    assert pictures.std() > 1
    assert np.abs(pictures - 255 * expected).max() <= 2.5
    return theirs


def tell(step: int) -> None:
    """Told to make room in the third step, which is saved, but not evaluated any more."""
    if step == 2:
        signal.raise_signal(signal.SIGTERM)


def kill(step: int) -> None:
    """Three steps of six, of which two are saved."""
    if step == 3:
        raise KeyboardInterrupt


HALF = {"compute_dtype": "bfloat16", "remat": "blocks", "train.batch_size": 16, "train.accumulate": 2}
SAVING = {**HALF, "train.schedule": "cosine", "eval.every": 99}


@pytest.mark.parametrize(
    ("arg", "changes", "interrupt", "error", "saved"),
    [("", {}, tell, Preempted, {2, 3}), ("lora_base", SAVING, kill, KeyboardInterrupt, {2})],
    ids=["full, told to stop", "adapters in half precision and in parts, killed"],
)
def test_resumed_is_uninterrupted(
    model: Path,
    finished: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    training_alone: None,
    arg: str,
    changes: dict[str, Any],
    interrupt: Callable[[int], None],
    error: type[BaseException],
    saved: set[int],
) -> None:
    def config(**more: object) -> ConfigDict:
        data = {"data.sources": (f"shapes_world:{finished / 'data'}",)}
        return shrunk(quickstart.get_config(arg), model, **data, **changes, **more)

    straight, resumed = finished, tmp_path / "resumed"
    if arg:
        straight = tmp_path / "straight"
        train.train(config(), straight)
        rates = [r["learning_rate"] for r in lines(straight) if "loss" in r]
        assert rates[0] == 0 < rates[1] < rates[2] > rates[3] > rates[4] > rates[5]
    due = Checkpoints.due

    def interrupted(self: Checkpoints, step: int) -> bool:
        interrupt(step)
        return due(self, step)

    with monkeypatch.context() as patch:
        patch.setattr(Checkpoints, "due", interrupted)
        with pytest.raises(error):
            train.train(config(), resumed)
    assert not (resumed / "export").exists()
    assert checkpoints(resumed) == saved
    train.train(config(**{"train.profile_steps": (4, 5)}), resumed)
    assert exported(resumed) == exported(straight)
    assert lines(resumed) == lines(straight)
    positions = [(run / "checkpoints" / "6" / "position" / "metadata").read_text() for run in (resumed, straight)]
    assert positions[0] == positions[1] and json.loads(positions[0]) == {"examples": [24]}
    assert any(file.is_file() for file in (resumed / "profile").rglob("*"))


@pytest.mark.parametrize("prediction", ["v_prediction", "epsilon"])
def test_adapters_are_left_by_themselves_too(prediction: str, tmp_path: Path, training_alone: None) -> None:
    model = small.write_pipeline(tmp_path / "model", prediction=prediction)
    run, adapters = tmp_path / "run", "lora/adapters.safetensors"
    changes = {"train.num_steps": 3, "train.warmup_steps": 0, "train.learning_rate": 0.01, "eval.every": 99}
    train.train(shrunk(quickstart.get_config("lora_base"), model, **changes, **{"lora.scale": 0.5}), run)
    beside = "pytorch_lora_weights.biases_and_norms.safetensors"
    names = {p.name for p in (run / "lora").iterdir()}
    assert names == {"adapters.safetensors", "pytorch_lora_weights.safetensors", beside}
    export, base = Pipeline.from_pretrained(run / "export"), Pipeline.from_pretrained(model)
    files = [run / adapters, run / "lora" / "pytorch_lora_weights.safetensors"]
    states = (nnx.state(pipeline.unet) for pipeline in (*map(base.with_lora, files), export, base))
    moved = 0
    for with_file, with_theirs, merged, before in zip(*map(jax.tree.leaves, states), strict=True):
        np.testing.assert_allclose(with_file, merged, atol=1e-7)
        np.testing.assert_allclose(with_theirs, merged, atol=1e-6)
        moved += not np.array_equal(merged, before)
    assert moved > 20
    theirs, whole = small.torch_pipeline(model), small.torch_pipeline(run / "export")
    theirs.unet.load_state_dict(torch_file(run / "lora" / beside), strict=False)
    theirs.load_lora_weights(run / "lora" / "pytorch_lora_weights.safetensors")

    def draw(pipeline: Any) -> np.ndarray:
        pipeline.scheduler = whole.scheduler
        noise = {"latents": twins.nchw(twins.random(1, 8, 8, 4)), "output_type": "np"}
        return pipeline("a cube", num_inference_steps=3, guidance_scale=3.0, **noise).images

    assert np.abs(draw(whole) - draw(small.torch_pipeline(model))).max() > 0.01
    np.testing.assert_allclose(draw(theirs), draw(whole), atol=1e-4)


def test_a_finished_run_is_not_trained_again(
    finished: Path, model: Path, monkeypatch: pytest.MonkeyPatch, training_alone: None
) -> None:
    def no_batches(*_: Any) -> Iterator[Any]:
        raise AssertionError("it is trained again")
        yield

    before, told = exported(finished), lines(finished)
    monkeypatch.setattr(Data, "train_batches", no_batches)
    train.train(shrunk(quickstart.get_config(), model), finished)
    assert exported(finished) == before and lines(finished) == told


WARNINGS = [signal.SIGTERM, signal.SIGUSR1]


@pytest.mark.parametrize("warning", WARNINGS)
def test_a_warning_while_the_last_pictures_are_drawn_is_heeded(
    finished: Path, model: Path, monkeypatch: pytest.MonkeyPatch, warning: signal.Signals
) -> None:
    monkeypatch.setattr(train, "export", lambda *_: signal.raise_signal(warning))
    with pytest.raises(Preempted, match="after the training, which is saved"):
        train.train(shrunk(quickstart.get_config(), model), finished)


def test_a_warning_while_a_run_is_loaded_is_heeded_before_it_trains(
    finished: Path, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = shrunk(quickstart.get_config(), model)
    with monkeypatch.context() as patch:
        patch.setattr(train, "tell_unsplit", lambda *_: signal.raise_signal(signal.SIGTERM))
        with pytest.raises(Preempted, match=f"told to make room at step 0 of {config.train.num_steps}"):
            train.train(config, tmp_path)
    assert not lines(tmp_path) and not checkpoints(tmp_path)
    train.train(config, tmp_path)
    assert exported(tmp_path) == exported(finished)


def test_a_warning_to_several_processes_is_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    # JAX's coordination tells of it at one place only, which may be one where a run does not stop.
    monkeypatch.setattr(jax.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(distributed.multihost_utils, "reached_preemption_sync_point", lambda place: place == 2)
    with distributed.Preemption() as preemption:
        assert [preemption.reached() for _ in range(4)] == [False, True, True, True]


def test_either_warning_is_heeded_until_the_run_has_ended() -> None:
    before = [signal.getsignal(warning) for warning in WARNINGS]
    for warning in WARNINGS:
        with distributed.Preemption() as preemption:
            assert not preemption.reached()
            signal.raise_signal(warning)
            assert preemption.reached() and preemption.reached()
    assert [signal.getsignal(warning) for warning in WARNINGS] == before


def test_among_several_processes_jax_is_told_of_either_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its handler, which agrees with the others on a place, is one of SIGTERM, and is left where it is."""
    told: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda number, _: told.append(number))
    try:
        monkeypatch.setattr(jax.distributed, "is_initialized", lambda: True)
        for warning in WARNINGS:
            with distributed.Preemption():
                signal.raise_signal(warning)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert told == [signal.SIGTERM, signal.SIGTERM]


def test_more_steps_than_timesteps_are_refused_before_training(model: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"step_counts=\(1, 1001\): the model has 1000 timesteps"):
        train.train(shrunk(quickstart.get_config(), model, **{"eval.step_counts": (1, 1001)}), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_run_begins_with_the_average_of_another(
    model: Path, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    states = []

    def loop(_config: Any, _step: Any, _plain_step: Any, state: Any, *_: Any) -> None:
        states.append(state)
        raise KeyboardInterrupt

    monkeypatch.setattr(train, "loop", loop)
    with pytest.raises(KeyboardInterrupt):
        train.train(
            shrunk(quickstart.get_config(), model, init_from=str(finished / "checkpoints"), seed=7), tmp_path / "run"
        )
    average = jax.tree.leaves(nnx.state(Pipeline.from_pretrained(finished / "export").unet))
    for kept in (states[0].trained, states[0].ema):
        for ours, theirs in zip(jax.tree.leaves(kept), average, strict=True):
            np.testing.assert_array_equal(ours, theirs)
    assert int(states[0].step) == 0


@pytest.mark.parametrize(
    ("arg", "folder", "said"),
    [
        ("", "nowhere", "nowhere"),
        ("", "samples", r"samples holds no checkpoint; give the checkpoints/"),
        ("lora", "checkpoints", "the parameters are not this run's"),
    ],
)
def test_a_beginning_that_does_not_fit(
    model: Path, finished: Path, tmp_path: Path, arg: str, folder: str, said: str
) -> None:
    with pytest.raises(InputError, match=said) as error:
        train.train(shrunk(quickstart.get_config(arg), model, init_from=str(finished / folder)), tmp_path / "run")
    assert "\n" not in str(error.value)
    assert not list((finished / "samples").glob("[0-9]*")) and not (finished / "nowhere").exists()


@pytest.fixture(scope="module")
def photographs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One of them breaks off, which its header does not show."""
    folder = tmp_path_factory.mktemp("photographs")
    rows = []
    for file in sorted((Path(skimage.__file__).parent / "data").iterdir()):
        if file.stem in PHOTOGRAPHS:
            shutil.copy(file, folder)
            rows.append({"file_name": file.name, "text": f"a photograph of {file.stem.replace('_', ' ')}"})
    assert len(rows) >= 8
    broken = folder / rows[0]["file_name"]
    broken.write_bytes(broken.read_bytes()[:20000])
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert len(ImageFolder(folder)) == len(rows)
    return folder


def test_a_folder_of_photographs_without_the_broken_one(model: Path, photographs: Path, tmp_path: Path) -> None:
    changes = {"data.on_damage": "skip", "eval.grid_images": 2, "eval.every": 99, "train.num_steps": 4}
    train.train(shrunk(images.get_config(f"image_folder:{photographs}"), model, **changes), tmp_path / "run")
    assert (tmp_path / "run" / "export" / "unet" / "diffusion_pytorch_model.safetensors").exists()
    assert (tmp_path / "run" / "samples" / "before_and_after.png").exists()
    assert not (tmp_path / "run" / "scores.md").exists()
    counts = [r["bad_examples"] for r in lines(tmp_path / "run") if "loss" in r]
    assert counts == sorted(counts) and 0 < counts[-1] < 8 * 4 / 2
    assert all(r["skipped_steps"] == 0 and r["loss"] > 0 for r in lines(tmp_path / "run") if "loss" in r)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({}, "does not decode"),
        ({"data.on_damage": "skip", "data.max_damaged": 0}, r"damaged examples were left out .*max_damaged=0"),
    ],
)
def test_damage_stops_the_run(
    model: Path, photographs: Path, tmp_path: Path, changes: dict[str, Any], said: str
) -> None:
    with pytest.raises(InputError, match=said):
        train.train(shrunk(images.get_config(f"image_folder:{photographs}"), model, **changes), tmp_path / "run")
    assert not (tmp_path / "run" / "export").exists()


@pytest.fixture(scope="module")
def model_without_cones(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Whose embedding of one word is not finite."""
    folder = shutil.copytree(model, tmp_path_factory.mktemp("model") / "copy")
    file = folder / "text_encoder" / "model.safetensors"
    tensors = load_file(file)
    (token,) = weights.load_tokenizer(folder).encode("cone", add_special_tokens=False)
    next(x for name, x in tensors.items() if name.endswith("token_embedding.weight"))[token] = np.nan
    save_file(tensors, file, metadata={"format": "pt"})
    return folder


def of_cones(folder: Path, model: Path, count: int, **changes: object) -> ConfigDict:
    """Of 24 examples, three steps, this many are cones; all examples come in each epoch."""
    write_pictures(folder, ["a cone"] * count + ["a cube"] * (24 - count))
    every_step = {"train.checkpoint_every": 1, "train.checkpoints_kept": 9, "data.held_out": 0}
    config = images.get_config(f"image_folder:{folder}")
    return shrunk(config, model, **every_step, **{"data.caption_dropout": 0.0, "eval.every": 99}, **changes)


def test_steps_that_are_not_finite_are_skipped_and_never_saved(
    model_without_cones: Path, tmp_path: Path, training_alone: None
) -> None:
    config = of_cones(tmp_path / "pictures", model_without_cones, 1, **{"train.num_steps": 5})
    train.train(config, tmp_path / "run")
    good = [np.isfinite(r["loss"]) for r in lines(tmp_path / "run")]
    assert sum(good[:3]) == 2
    skipped = np.cumsum(np.logical_not(good))
    assert [r["skipped_steps"] for r in lines(tmp_path / "run")] == skipped.tolist()
    # What is skipped does not move the rate either.
    rates = [r["learning_rate"] for r in lines(tmp_path / "run") if np.isfinite(r["loss"])]
    assert rates == pytest.approx([min(n, 2) * 1.5e-4 for n in range(len(rates))])
    assert checkpoints(tmp_path / "run") == {n for n, finite in enumerate(good, 1) if finite}
    assert all(
        np.isfinite(x).all() for x in load_file(next((tmp_path / "run/export/unet").glob("*.safetensors"))).values()
    )


def test_what_has_diverged_is_neither_saved_nor_exported(model_without_cones: Path, tmp_path: Path) -> None:
    config = of_cones(tmp_path / "pictures", model_without_cones, 24, **{"train.max_bad_steps": 3})
    with pytest.raises(FloatingPointError, match=r"3 steps in a row up to step 3 .* loss nan, gradient norm nan; "):
        train.train(config, tmp_path / "run")
    assert not (tmp_path / "run" / "export").exists()
    assert not checkpoints(tmp_path / "run")


def test_a_refused_run_claims_no_workdir(model: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="conv_rank=999 is more than"):
        train.train(shrunk(quickstart.get_config("lora"), model, **{"lora.conv_rank": 999}), tmp_path / "run")
    assert not (tmp_path / "run").exists()
