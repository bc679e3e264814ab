"""Preparing: what training would compute, the same files however they came about, and damage told or left out."""

import dataclasses
import io
import json
import pickle
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path
from typing import Any

import hosts
import numpy as np
import pytest
import small
from flax import nnx
from ml_collections import ConfigDict
from PIL import Image

from configs import images, quickstart
from d2f_jax import InputError, Pipeline
from d2f_jax.data import prepared
from d2f_jax.data.fit import fit_image
from d2f_jax.data.loader import train_batches
from d2f_jax.data.prepared import PreparedSource, Split
from d2f_jax.data.sources import ImageFolder, read_image
from d2f_jax.models.clip import CLIPTextModel
from d2f_jax.models.vae import AutoencoderKL
from d2f_jax.prepare import Options, prepare

COUNT = 60
OPTIONS = Options(shard_size=3, batch_size=2)  # one batch of eight devices, two of one


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small.write_pipeline(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of several sizes; one in ten is held out."""
    folder = tmp_path_factory.mktemp("pictures")
    rng = np.random.default_rng(0)
    lines = []
    for i in range(COUNT):
        height, width = rng.integers(16, 40, 2)
        Image.fromarray(rng.integers(0, 256, (height, width, 3), np.uint8)).save(folder / f"{i}.png")
        lines.append(json.dumps({"file_name": f"{i}.png", "text": f"a cube and {i} balls"}))
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    return folder


def config(model: Path, pictures: Path, **changes: object) -> ConfigDict:
    config = images.get_config(f"image_folder:{pictures}")
    config.update_from_flattened_dict({"model": str(model), "data.image_size": 16, "data.held_out": 6, **changes})
    return config


def command(model: Path, pictures: Path, out: Path) -> list[str]:
    """As `config` and OPTIONS have it."""
    options = [f"--config=configs/images.py:image_folder:{pictures}", f"--config.model={model}", f"--out={out}"]
    options += ["--config.data.image_size=16", "--config.data.held_out=6", "--shard_size=3", "--batch_size=2"]
    return [sys.executable, "-m", "d2f_jax.prepare", *options]


def contents(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


@pytest.fixture(scope="module")
def finished(model: Path, pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("prepared") / "out"
    prepare(config(model, pictures), folder, OPTIONS)
    return folder


def test_what_a_folder_holds(finished: Path) -> None:
    shards = [f"train-{i:05d}-of-00018" for i in range(18)] + [f"validation-{i:05d}-of-00002" for i in range(2)]
    whole = {f"{shard}.{kind}" for shard in shards for kind in ("array_record", "json")}
    assert set(contents(finished)) == whole | {"plan.json", "manifest.json", "null_text.safetensors"}
    manifest = prepared.verify(finished)
    assert sum(shard.count for shard in manifest.shards["train"]) == 54
    assert manifest.plan.latent_shape == (8, 8, 4) and manifest.plan.text_shape == (24, 16)
    assert prepared.read_plan(finished) == manifest.plan


@nnx.jit
def encoded(vae: AutoencoderKL, text_encoder: CLIPTextModel, image: Any, input_ids: Any) -> Any:
    return vae.encode(image), text_encoder(input_ids)


def test_latents_and_text_states_are_the_networks_own(model: Path, pictures: Path, finished: Path) -> None:
    pipeline, folder = Pipeline.from_pretrained(model), ImageFolder(pictures)
    held_out = range(5, COUNT, 10)
    splits: dict[Split, list[int]] = {
        "train": [i for i in range(COUNT) if i not in held_out],
        "validation": list(held_out),
    }
    for split, indices in splits.items():
        source = pickle.loads(pickle.dumps(PreparedSource(finished, split)))
        examples: list[dict[str, Any]] = [{**source[i]} for i in range(len(source))]
        assert [example["text"] for example in examples] == [folder[i]["text"] for i in indices]
        image = (
            np.stack([fit_image(read_image(pictures / f"{i}.png"), (16, 16)) for i in indices]).astype(np.float32)
            / 127.5
            - 1
        )
        latent, text_states = encoded(
            pipeline.vae, pipeline.text_encoder, image, pipeline.tokenize(["", *(folder[i]["text"] for i in indices)])
        )
        expected = {"latent_mean": latent.mean, "latent_std": latent.std, "text_states": text_states[1:]}
        for name, theirs in expected.items():
            ours = np.stack([example[name] for example in examples])
            assert ours.dtype == np.float16 and ours.std() > 1e-3
            np.testing.assert_allclose(ours, theirs, rtol=1.1e-3, atol=1e-4)
        assert source.null_text.dtype == np.float16
        np.testing.assert_allclose(source.null_text, text_states[0], rtol=1.1e-3, atol=1e-4)


def test_it_trains(finished: Path) -> None:
    source = PreparedSource(finished)
    options = {
        "batch_size": 40,
        "image_shape": (16, 16),
        "seed": 0,
        "caption_dropout": 0.5,
        "null_text": source.null_text,
    }
    batches = train_batches([source], lambda texts: np.zeros((len(texts), 1)), **options)
    batch: dict[str, Any] = {**next(batches)}
    shapes = {name: batch[name].shape for name in ("latent_mean", "latent_std", "text_states")}
    assert shapes == {"latent_mean": (40, 8, 8, 4), "latent_std": (40, 8, 8, 4), "text_states": (40, 24, 16)}
    dropped = (batch["text_states"] == source.null_text).all((1, 2))
    assert 8 < dropped.sum() < 32
    batches.close()


def test_shapes_world_and_means_alone(model: Path, tmp_path: Path) -> None:
    world = quickstart.get_config()
    world.update_from_flattened_dict(
        {"model": str(model), "data.image_size": 16, "data.num_train": 5, "data.num_validation": 3}
    )
    world.data.latents = "mean"
    prepare(world, tmp_path, Options(batch_size=1))
    counts: dict[Split, int] = {"train": 5, "validation": 3}
    for split, count in counts.items():
        source = PreparedSource(tmp_path, split)
        assert len(source) == count and set(source[0]) == {"text", "text_states", "latent_mean"}


def test_what_is_mirrored_are_pictures_and_never_latents(
    model: Path, pictures: Path, finished: Path, tmp_path: Path
) -> None:
    """Rows of prepared data are those of pictures, mirrored alike, and then encoded."""
    manifest, pipeline = PreparedSource(finished).manifest, Pipeline.from_pretrained(model)
    assert manifest.plan.mirrored and "mirrored_latent_std" in PreparedSource(finished)[0]
    kept = _Kept(ImageFolder(pictures), [i for i in range(COUNT) if i % 10 != 5])
    options = {"batch_size": 32, "image_shape": (16, 16), "seed": 3, "random_flip": True}
    encoded_first, read = (
        next(train_batches([source], lambda texts: np.zeros((len(texts), 1)), **options))
        for source in (PreparedSource(finished), kept)
    )
    plain = next(train_batches([kept], lambda texts: np.zeros((len(texts), 1)), **options | {"random_flip": False}))
    turned = (read["image"] != plain["image"]).any((1, 2, 3))
    np.testing.assert_array_equal(read["image"][turned], plain["image"][turned, :, ::-1])
    assert 6 < turned.sum() < 26
    latents = [
        encoded(
            pipeline.vae, pipeline.text_encoder, batch["image"].astype(np.float32) / 127.5 - 1, np.zeros((1, 24), int)
        )[0]
        for batch in (read, plain)
    ]
    for name, theirs, unturned in (
        ("latent_mean", *(x.mean for x in latents)),
        ("latent_std", *(x.std for x in latents)),
    ):
        np.testing.assert_allclose(encoded_first[name], theirs, rtol=1.1e-3, atol=1e-4)
        assert np.abs(encoded_first[name][turned] - unturned[turned][:, :, ::-1]).max() > 0.01

    unmirrored = config(model, pictures, **{"data.random_flip": False})
    with pytest.raises(InputError, match=r"begun with another config: mirrored \(True there, False here\)"):
        prepare(unmirrored, finished, OPTIONS)


class _Kept:
    """Some examples of a source."""

    def __init__(self, source: ImageFolder, indices: list[int]) -> None:
        self.source, self.indices = source, indices

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> Any:
        return self.source[self.indices[index]]


def test_what_laion_thinks_little_of_is_not_prepared(model: Path, pictures: Path, tmp_path: Path) -> None:
    """Shards as img2dataset writes them, with the numbers that bound what is taken."""
    with tarfile.open(tmp_path / "00000.tar", "w") as tar:
        for i, score in enumerate((5.9, 6.0, None, 7.5)):
            tar.add(pictures / f"{i}.png", f"{i:09d}.png")
            notes = {"AESTHETIC_SCORE": score, "original_width": 512, "status": "success"}
            for kind, text in (("txt", f"picture {i}"), ("json", json.dumps(notes))):
                info = tarfile.TarInfo(f"{i:09d}.{kind}")
                info.size = len(text)
                tar.addfile(info, io.BytesIO(text.encode()))
    laion = config(model, pictures, **{"data.held_out": 0})
    laion.data.sources = (f"webdataset:{tmp_path}?least=AESTHETIC_SCORE:6,original_width:512",)
    prepare(laion, tmp_path / "out", OPTIONS)
    source = PreparedSource(tmp_path / "out")
    assert [source[i]["text"] for i in range(len(source))] == ["picture 1", "picture 3"]


def test_killed_and_started_again(model: Path, pictures: Path, finished: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with subprocess.Popen(command(model, pictures, out), stderr=subprocess.DEVNULL) as running:
        while running.poll() is None and len(list(out.glob("train-*.json"))) < 2:
            time.sleep(0.002)
        running.send_signal(signal.SIGKILL)
    assert running.returncode == -signal.SIGKILL and not (out / "manifest.json").exists()
    with pytest.raises(InputError, match="the preparation is not finished; run the same command again"):
        PreparedSource(out)
    early = out / "train-00000-of-00018.array_record"
    written = early.stat().st_mtime_ns
    (out / "train-00001-of-00018.json").write_text("{")  # as if it had been killed between the file and its note
    (out / "train-00002-of-00018.array_record").write_bytes(b"")
    prepare(config(model, pictures), out, OPTIONS)
    assert contents(out) == contents(finished)
    assert early.stat().st_mtime_ns == written


def test_two_processes_write_what_one_writes(model: Path, pictures: Path, finished: Path, tmp_path: Path) -> None:
    _, _, module, *arguments = command(model, pictures, tmp_path / "out")
    told = hosts.two(module, *arguments, devices=8)
    assert contents(tmp_path / "out") == contents(finished)
    assert told.count("54 examples") == 1


def test_a_damaged_picture_stops_or_is_left_out(model: Path, pictures: Path, tmp_path: Path) -> None:
    folder, out = tmp_path / "pictures", tmp_path / "out"
    shutil.copytree(pictures, folder)
    for name in ("12.png", "13.png"):
        (folder / name).write_bytes((folder / name).read_bytes()[:300])
    with pytest.raises(
        InputError, match=r"example 11: .*12\.png does not decode .* config\.data\.on_damage=skip"
    ) as error:
        prepare(config(model, folder), out, OPTIONS)
    assert "\n" not in str(error.value)
    assert not list(out.glob("*.part")) and len(list(out.glob("*.array_record"))) == 3
    limit = {"data.on_damage": "skip", "data.max_damaged": 1}
    with pytest.raises(InputError, match=r"more examples than config\.data\.max_damaged=1 cannot be read; .*13\.png"):
        prepare(config(model, folder, **limit), out, OPTIONS)
    manifest = prepare(config(model, folder, **{"data.on_damage": "skip"}), out, OPTIONS)
    told = [reason for shard in manifest.shards["train"] for reason in shard.damaged]
    assert len(told) == 2 and "12.png" in told[0] and "13.png" in told[1]
    source = PreparedSource(out)
    assert len(source) == 52
    balls = [int(source[i]["text"].split()[3]) for i in range(52)]
    assert balls == [i for i in range(COUNT) if i % 10 != 5 and i not in (12, 13)]


def test_another_config_is_refused(model: Path, pictures: Path, finished: Path) -> None:
    with pytest.raises(InputError, match=r"begun with another config: image_size \(16 there, 8 here\), latent_shape"):
        prepare(config(model, pictures, **{"data.image_size": 8}), finished, OPTIONS)
    with pytest.raises(InputError, match=r"shard_size \(3 there, 9 here\); give another --out"):
        prepare(config(model, pictures), finished, Options(shard_size=9))
    with pytest.raises(InputError, match="crop=random"):
        prepare(config(model, pictures, **{"data.crop": "random"}), finished, OPTIONS)
    with pytest.raises(InputError, match="15 is not a multiple of 2 pixels"):
        prepare(config(model, pictures, **{"data.image_size": 15}), finished, OPTIONS)


def test_folders_of_before_rectangles_are_of_squares(
    model: Path, pictures: Path, finished: Path, tmp_path: Path
) -> None:
    tree = json.loads((finished / "manifest.json").read_text())
    assert tree["plan"].pop("image_width") == 0
    (tmp_path / "manifest.json").write_text(json.dumps(tree))
    assert prepared.read_manifest(tmp_path) == prepared.read_manifest(finished)
    with pytest.raises(InputError, match=r"latent_shape \(\(8, 8, 4\) .*, image_width \(0 there, 24 here\)"):
        prepare(config(model, pictures, **{"data.image_width": 24}), finished, OPTIONS)
    prepare(config(model, pictures, **{"data.image_width": 16}), finished, OPTIONS)


def test_what_is_prepared_is_not_prepared_again(model: Path, pictures: Path, finished: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"example \d+ of config\.data\.sources is prepared already"):
        prepare(config(model, pictures, **{"data.sources": (f"array_record:{finished}",)}), tmp_path, OPTIONS)


def test_another_model_is_refused(model: Path, finished: Path) -> None:
    pipeline = Pipeline.from_pretrained(model)
    parts = (pipeline.vae, pipeline.text_encoder, pipeline.tokenizer)
    manifest = PreparedSource(finished).manifest
    prepared.check_model(manifest, *parts, image_shape=(16, 16))
    with pytest.raises(InputError, match="prepared of 16 x 16 pixels"):
        prepared.check_model(manifest, *parts, image_shape=(32, 32))
    wide = dataclasses.replace(manifest, plan=dataclasses.replace(manifest.plan, image_width=24))
    prepared.check_model(wide, *parts, image_shape=(16, 24))
    with pytest.raises(InputError, match=r"prepared of 16 x 24 pixels, but .* are 16 x 16"):
        prepared.check_model(wide, *parts, image_shape=(16, 16))
    tiny = Pipeline.from_pretrained("tiny-sd")
    with pytest.raises(InputError, match=r"the VAE of config\.model is another"):
        prepared.check_model(manifest, tiny.vae, *parts[1:], image_shape=(16, 16))
    with pytest.raises(InputError, match=r"the text encoder of config\.model is another"):
        prepared.check_model(manifest, parts[0], tiny.text_encoder, tiny.tokenizer, image_shape=(16, 16))
    # The decoder makes no latents.
    before = prepared.vae_fingerprint(pipeline.vae)
    pipeline.vae.decoder.conv_in.kernel[...] += 1
    assert prepared.vae_fingerprint(pipeline.vae) == before
    pipeline.vae.encoder.conv_in.kernel[...] += 1
    assert prepared.vae_fingerprint(pipeline.vae) != before


def test_a_folder_that_is_not_whole_is_refused(finished: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"nowhere holds no manifest\.json; make it with python -m d2f_jax.prepare"):
        PreparedSource(tmp_path / "nowhere")
    with pytest.raises(InputError, match="no split 'test', only train, validation"):
        PreparedSource(finished, "test")  # pyright: ignore[reportArgumentType]
    folder = shutil.copytree(finished, tmp_path / "copy")
    shard = folder / "train-00001-of-00018.array_record"
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    PreparedSource(folder)
    with pytest.raises(InputError, match=f"{shard.name} has changed since it was written"):
        prepared.verify(folder)
    shard.write_bytes(content[:-1])
    (folder / "validation-00000-of-00002.array_record").unlink()
    with pytest.raises(InputError, match=rf"{shard.name} has \d+ bytes instead of \d+, validation-\S+ is missing"):
        PreparedSource(folder)
    for damage in ("{", "[]", "{}", '{"plan": {"format": 1}, "shards": {}, "null_text": {}}'):
        (folder / "manifest.json").write_text(damage)
        with pytest.raises(InputError, match=r"manifest\.json is damaged"):
            PreparedSource(folder)
    (folder / "manifest.json").write_text(
        (finished / "manifest.json").read_text().replace('"format": 1', '"format": 2')
    )
    with pytest.raises(InputError, match="have format 2, this version reads 1"):
        PreparedSource(folder)
