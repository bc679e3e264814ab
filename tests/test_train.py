"""The whole program on small networks: resumed equals uninterrupted, and what it leaves behind is usable."""

import io
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import skimage
import small
import twins
from absl import flags
from ml_collections import ConfigDict
from PIL import Image

from configs import images, quickstart
from d2f_jax import InputError, Pipeline, sampling, train
from d2f_jax.checkpoint import Checkpoints
from d2f_jax.data.sources import ImageFolder

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
            "data.num_validation": 6,
            "train.num_steps": 6,
            "train.batch_size": 4,
            "train.log_every": 1,
            "train.checkpoint_every": 2,
            "train.warmup_steps": 2,
            "eval.step_counts": (1, 2),
            "eval.num_images": 6,
            "eval.batch_size": 3,
            **changes,
        }
    )
    return config


def exported(workdir: Path) -> dict[str, bytes]:
    return {str(p.relative_to(workdir)): p.read_bytes() for p in (workdir / "export").rglob("*") if p.is_file()}


def lines(workdir: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def finished(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    workdir = tmp_path_factory.mktemp("run") / "workdir"
    train.train(shrunk(quickstart.get_config(), model), workdir)
    return workdir


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
    assert {p.name for p in (finished / "checkpoints").iterdir()} == {"4", "6"}
    records = lines(finished)
    assert [r["step"] for r in records] == [1, 2, 3, 4, 5, 6]
    assert all(np.isfinite(r["loss"]) and r["grad_norm"] > 0 for r in records)
    picture = Image.open(finished / "samples" / "before_and_after.png")
    assert picture.width > 2 * 2 * 32 and np.asarray(picture).std() > 10


def test_the_table_shows_the_bridge(finished: Path) -> None:
    table = (finished / "scores.md").read_text().splitlines()
    cells = {line.split("|")[1].strip(): [c.strip() for c in line.split("|")[2:-1]] for line in table}
    assert list(cells)[2:] == ["prior, DDIM", "prior, DDIM on the flow grid", "aligned, not finetuned", "finetuned"]
    # Aligned and not finetuned is DDIM on the same grid; rounding to bytes may move the last digit.
    for a, b in zip(cells["aligned, not finetuned"], cells["prior, DDIM on the flow grid"], strict=True):
        assert float(a.split(" / ")[0]) == pytest.approx(float(b.split(" / ")[0]), abs=0.02, rel=1e-3)
    assert cells["finetuned"] != cells["aligned, not finetuned"]


def test_the_export_samples_the_same_in_diffusers(finished: Path) -> None:
    ours, theirs = Pipeline.from_pretrained(finished / "export"), small.torch_pipeline(finished / "export")
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


@pytest.mark.parametrize("arg", ["", "lora"])
def test_resumed_is_uninterrupted(
    model: Path, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arg: str
) -> None:
    def config() -> ConfigDict:
        return shrunk(quickstart.get_config(arg), model, **{"data.path": str(finished / "data")})

    train.train(config(), tmp_path / "straight")
    due = Checkpoints.due

    def interrupted(self: Checkpoints, step: int) -> bool:
        if step == 3:
            raise KeyboardInterrupt
        return due(self, step)

    with monkeypatch.context() as patch:
        patch.setattr(Checkpoints, "due", interrupted)
        with pytest.raises(KeyboardInterrupt):
            train.train(config(), tmp_path / "resumed")
    assert not (tmp_path / "resumed" / "export").exists()
    assert {p.name for p in (tmp_path / "resumed" / "checkpoints").iterdir()} == {"2"}
    train.train(config(), tmp_path / "resumed")
    assert exported(tmp_path / "resumed") == exported(tmp_path / "straight")
    losses = {r["step"]: r["loss"] for r in lines(tmp_path / "straight")}
    assert {r["step"]: r["loss"] for r in lines(tmp_path / "resumed") if r["step"] > 2} == {
        step: loss for step, loss in losses.items() if step > 2
    }
    # Once more, finished: nothing is trained, the result is the same.
    train.train(config(), tmp_path / "resumed")
    assert exported(tmp_path / "resumed") == exported(tmp_path / "straight")


def test_a_folder_of_photographs(model: Path, tmp_path: Path) -> None:
    folder = tmp_path / "photographs"
    folder.mkdir()
    rows = []
    for file in sorted((Path(skimage.__file__).parent / "data").iterdir()):
        if file.stem in PHOTOGRAPHS:
            shutil.copy(file, folder)
            rows.append({"file_name": file.name, "text": f"a photograph of {file.stem.replace('_', ' ')}"})
    assert len(rows) >= 8
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    workdir = tmp_path / "run"
    train.train(shrunk(images.get_config(str(folder)), model, **{"eval.grid_images": 2}), workdir)
    assert (workdir / "export" / "unet" / "diffusion_pytorch_model.safetensors").exists()
    assert (workdir / "samples" / "before_and_after.png").exists()
    assert not (workdir / "scores.md").exists()


def test_what_has_diverged_is_neither_saved_nor_exported(model: Path, finished: Path, tmp_path: Path) -> None:
    changes = {"train.learning_rate": 1e30, "train.warmup_steps": 0, "data.path": str(finished / "data")}
    with pytest.raises(FloatingPointError, match="at step"):
        train.train(shrunk(quickstart.get_config(), model, **changes), tmp_path / "run")
    assert not (tmp_path / "run" / "export").exists()
    assert not list((tmp_path / "run" / "checkpoints").iterdir())


def test_a_refused_run_claims_no_workdir(model: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="lora rank 999"):
        train.train(shrunk(quickstart.get_config("lora"), model, **{"lora.rank": 999}), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_damaged_config_is_told(model: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"seed":')
    with pytest.raises(InputError, match=r"config\.json is damaged"):
        train.train(shrunk(quickstart.get_config(), model), tmp_path)


def test_a_picture_that_breaks_off_stops_the_run(model: Path, tmp_path: Path) -> None:
    folder = tmp_path / "pictures"
    folder.mkdir()
    encoded = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8)).save(encoded, "png")
    (folder / "a.png").write_bytes(encoded.getvalue()[:900])
    (folder / "metadata.jsonl").write_text('{"file_name": "a.png", "text": "noise"}')
    assert len(ImageFolder(folder)) == 1
    with pytest.raises(InputError, match=r"a\.png does not decode"):
        train.train(shrunk(images.get_config(str(folder)), model), tmp_path / "run")
    assert not (tmp_path / "run" / "export").exists()
