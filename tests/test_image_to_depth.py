"""Depth of pictures: the network that is widened for it, its loss, its samples, and diffusers' own pipeline of it."""

import functools
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import diffusers
import hosts
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small
import torch
import twins
from flax import nnx
from ml_collections import ConfigDict
from PIL import Image
from safetensors.numpy import load_file

from configs import depth
from d2f_jax import (
    InputError,
    Pipeline,
    datasets,
    ensemble,
    evaluate,
    metrics,
    objectives,
    prepare,
    prior,
    sharding,
    subjects,
    task,
    train,
)
from d2f_jax import step as steps
from d2f_jax.alignment import Alignment
from d2f_jax.data.open import open_source
from d2f_jax.task import Task

DEPTH = Task("image_to_depth")
RECTANGLE = {"data.image_width": 24, "data.resize": "fixed"}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small.write_pipeline(tmp_path_factory.mktemp("model"))


def shrunk(model: Path | str, arg: str = "diff2flow", **changes: object) -> ConfigDict:
    config = depth.get_config(arg)
    config.update_from_flattened_dict(
        {
            "model": str(model),
            "data.image_size": 16,
            "data.random_flip": True,
            "data.num_train": 24,
            "data.num_validation": 6,
            "train.num_steps": 3,
            "train.batch_size": 8,
            "train.log_every": 1,
            "eval.every": 2,
            "eval.num_loss_examples": 6,
            "eval.step_counts": (1, 2),
            "eval.num_images": 4,
            "eval.batch_size": 4,
            **changes,
        }
    )
    return config


@pytest.fixture(scope="module")
def finished(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    workdir = tmp_path_factory.mktemp("run") / "workdir"
    train.train(shrunk(model), workdir)
    return workdir


def told(workdir: Path, name: str) -> list[float]:
    lines = map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines())
    return [line[name] for line in lines if name in line]


def pictures(count: int, height: int = 16, width: int = 16) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (count, height, width, 3), np.uint8)


def test_a_widened_network_does_what_it_did(model: Path) -> None:
    unet = Pipeline.from_pretrained(model).unet
    wide = task.widened(unet, 3)
    x, text = twins.random(2, 8, 8, 4), twins.random(2, 5, 16)
    assert wide.config.in_channels == 12 and unet.config.in_channels == 4
    np.testing.assert_allclose(wide(jnp.tile(x, 3), 7.0, text), unet(x, 7.0, text), atol=2e-5)


def test_where_a_flow_starts() -> None:
    noise, picture = twins.random(2, 4, 4, 4), twins.random(2, 4, 4, 4)
    at_picture = Task("image_to_depth", start="image", concatenate=False)
    assert at_picture.inputs == 1 and at_picture.network_input(noise, picture) is noise
    np.testing.assert_array_equal(DEPTH.source(noise, picture), noise)
    np.testing.assert_array_equal(at_picture.source(noise, picture), picture)
    for share, wanted in ((1.0, noise), (0.5, (picture + noise) / 2**0.5)):
        noised = Task("image_to_depth", start="image", start_noise=share)
        np.testing.assert_allclose(noised.source(noise, picture), wanted, atol=1e-6)
    np.testing.assert_array_equal(DEPTH.network_input(noise, picture), np.concatenate([picture, noise], -1))


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"name": "depth"}, "task name='depth' is unknown; use one of text_to_image, image_to_depth"),
        ({"name": "image_to_depth", "start_noise": 0.5}, "task start_noise=0.5 is of start='image'"),
        ({"name": "image_to_depth", "start": "image", "start_noise": 2}, "start_noise=2 is not between 0, the picture"),
        ({"name": "image_to_depth", "concatenate": False}, "would not see the picture; concatenate it, or start at it"),
        ({"start": "image"}, "text_to_image has no picture to start at"),
        ({"pad_text": True}, "pad_text=True is of image_to_depth; captions are padded anyway"),
    ],
)
def test_what_does_not_go_together(fields: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=said):
        Task(**fields)


def test_a_patch_counts_where_all_its_pixels_are_known() -> None:
    valid = np.ones((1, 8, 12), bool)
    valid[0, 3, 5] = valid[0, 7, 0] = False
    found = np.asarray(task.whole_patches(jnp.asarray(valid), (2, 3)))[0]
    np.testing.assert_array_equal(found, [[True, False, True], [False, True, True]])
    np.testing.assert_array_equal(task.whole_patches(valid[0], (2, 3)), found)


def test_the_loss_does_not_look_where_nothing_is_known(model: Path) -> None:
    pipeline = Pipeline.from_pretrained(model).for_task(DEPTH)
    options = steps.StepOptions(
        latent_scale=1.0,
        lora_scale=1.0,
        objective=objectives.Objective(),
        task=DEPTH,
        compute_dtype="float32",
        ema_decay=0.9,
        ema_start=0,
        accumulate=1,
    )
    networks = prior.networks(pipeline, "none")
    mean_loss = steps.make_loss(networks, pipeline.schedule, options, sharding.make_mesh())
    unet, vae, text_encoder = (nnx.state(network) for network in (pipeline.unet, pipeline.vae, pipeline.text_encoder))
    frozen = steps.Frozen(None, vae, text_encoder)
    draws = steps.Draws(jnp.zeros((2, 8, 8, 4)), -twins.random(2, 8, 8, 4), jnp.full(2, 0.5), jnp.zeros((2, 8, 8, 4)))

    def loss(mean: jax.Array, valid: np.ndarray) -> jax.Array:
        batch = {"picture_mean": twins.random(2, 8, 8, 4), "valid": jnp.asarray(valid)}
        batch |= {"input_ids": np.zeros((2, 2), np.int32), "latent_mean": mean}
        blind = steps.UNetParams(jax.tree.map(jnp.zeros_like, unet), {})  # or it would see known depth beside unknown
        return jnp.sum(mean_loss(blind, steps.encoded(networks, frozen, batch), draws))

    valid = np.ones((2, 8, 8), bool)
    valid[:, :3] = False
    grad = np.asarray(jax.grad(loss)(jnp.asarray(twins.random(2, 8, 8, 4)), valid))
    assert (grad[:, :3] == 0).all() and (grad[:, 3:] != 0).all()


def test_estimates_that_differ_by_scale_and_shift_are_one() -> None:
    scene = np.random.default_rng(0).random((6, 7)).astype(np.float32)
    many = np.stack([a * scene + b for a, b in ((1, 0), (0.5, 0.2), (2, -0.5), (0.8, 0.1))])
    found = ensemble.merged(many)
    slope, offset = np.polyfit(scene.ravel(), found.ravel(), 1)
    np.testing.assert_allclose(found, slope * scene + offset, atol=1e-6)
    np.testing.assert_array_equal(ensemble.merged(many[1:2]), many[1])
    spoilt = many.copy()
    spoilt[0, 2, 3] += 100  # a median is not moved by one that is wrong at a pixel
    assert abs(ensemble.merged(spoilt)[2, 3] - found[2, 3]) < abs(spoilt.mean(0) - many.mean(0))[2, 3] / 10
    assert np.isfinite(ensemble.merged(np.ones((3, 4, 4)))).all()


@pytest.mark.parametrize("count", [5, 10])
def test_estimates_are_merged_about_as_in_diffusers(count: int) -> None:
    """Exactly without noise; it leaves them apart by 10% to 26% of itself, and ours no farther from the truth."""
    rng, (y, x) = np.random.default_rng(0), np.mgrid[:24, :32] / 32
    scene, noise = np.sin(4 * x + 2 * y) * np.cos(3 * y), rng.normal(size=(count, 24, 32))
    slopes, offsets = rng.uniform((0.4, 0), (0.8, 0.2), (count, 2)).T[..., None, None]

    def off(found: np.ndarray, target: np.ndarray) -> float:
        """What scale and shift leave, as a standard deviation."""
        return float(np.std(target.ravel() - np.polyval(np.polyfit(found.ravel(), target.ravel(), 1), found.ravel())))

    for level in (0.0, 0.05, 0.2):  # the scene's own deviation is 0.4
        many = (slopes * (scene + level * noise) + offsets).astype(np.float32)
        members, _ = diffusers.MarigoldDepthPipeline.ensemble_depth(torch.from_numpy(many)[:, None])
        ours, theirs = ensemble.merged(many), members[0, 0].numpy()
        scale = np.polyfit(theirs.ravel(), scene.ravel(), 1)[0]  # to the scene's unit
        assert scale * off(ours, theirs) <= 0.3 * level + 1e-6
        assert off(ours, scene) <= 1.02 * off(theirs, scene) + 1e-6


def test_the_export_in_diffusers_is_the_same(finished: Path) -> None:
    ours = Pipeline.from_pretrained(finished / "export")
    assert ours.task == DEPTH and ours.alignment == Alignment()
    theirs = diffusers.MarigoldDepthPipeline.from_pretrained(finished / "export", dtype=torch.float32)
    theirs.set_progress_bar_config(disable=True)
    images, noise = pictures(2), twins.random(2, 8, 8, 4)
    for num_steps in (1, 4):  # with 3, diffusers' scheduler steps from 666 to 333, and goes on from 332
        wanted = theirs(
            torch.from_numpy(images.transpose(0, 3, 1, 2) / 255.0).float(),
            num_inference_steps=num_steps,
            processing_resolution=0,
            latents=torch.from_numpy(noise.transpose(0, 3, 1, 2)),
        ).prediction
        found = ours.depth(images, num_steps=num_steps, noise=jnp.asarray(noise), sampler="ddim")
        np.testing.assert_allclose(found, np.asarray(wanted)[..., 0], atol=2e-5)


def test_depth_of_pictures_of_any_size(finished: Path) -> None:
    pipeline = Pipeline.from_pretrained(finished / "export")
    found = pipeline.depth(pictures(2, 19, 33), num_steps=2, resolution=16, ensemble=3, seed=5)
    assert found.shape == (2, 19, 33) and found.dtype == np.float32 and 0 <= found.min() < found.max() <= 1
    second = pipeline.depth(pictures(2, 19, 33)[1:], num_steps=2, resolution=16, ensemble=3, seed=5, first=1)
    np.testing.assert_allclose(found[1:], second, atol=1e-5)


def test_a_picture_is_seen_at_the_size_that_was_trained(finished: Path, tmp_path: Path) -> None:
    """As the UNet's config.json has it, or model_index.json, where Marigold's pipelines say it."""
    export = shutil.copytree(finished / "export", tmp_path / "export")
    trained = Pipeline.from_pretrained(export)
    assert trained.resolution == 16  # pixels that `shrunk` trains at
    large = pictures(1, 48, 64)
    found = trained.depth(large, num_steps=1, seed=3)
    assert found.shape == (1, 48, 64)
    np.testing.assert_array_equal(found, trained.depth(large, num_steps=1, seed=3, resolution=16))
    own = trained.depth(large, num_steps=1, seed=3, resolution=0)
    np.testing.assert_array_equal(own, trained.depth(large, num_steps=1, seed=3, resolution=64))
    assert np.abs(found - own).max() > 0.01

    index = json.loads((export / "model_index.json").read_text())
    (export / "model_index.json").write_text(json.dumps(index | {"default_processing_resolution": 24}))
    recorded = Pipeline.from_pretrained(export)
    assert recorded.resolution == 24
    np.testing.assert_array_equal(
        recorded.depth(large, num_steps=1, seed=3), trained.depth(large, num_steps=1, seed=3, resolution=24)
    )
    recorded.save_pretrained(tmp_path / "again")
    assert json.loads((tmp_path / "again" / "model_index.json").read_text())["default_processing_resolution"] == 24
    (export / "model_index.json").write_text(json.dumps(index | {"default_processing_resolution": "large"}))
    with pytest.raises(InputError, match="default_processing_resolution='large'; give a number of pixels"):
        Pipeline.from_pretrained(export)


def test_a_model_is_asked_for_what_it_makes(model: Path, finished: Path) -> None:
    plain, seeing = Pipeline.from_pretrained(model), Pipeline.from_pretrained(finished / "export")
    with pytest.raises(InputError, match=r"task is text_to_image; give it text, to pipeline\(prompt\) or --prompt"):
        plain.depth(pictures(1))
    for asked in (lambda: seeing("a cube"), lambda: seeing.invert(pictures(1), "")):
        with pytest.raises(InputError, match=r"task is image_to_depth; give it a picture, to depth\(images\)"):
            asked()
    with pytest.raises(InputError, match="the UNet takes 2 latents side by side, text_to_image gives 1"):
        seeing.for_task(Task())


def test_the_run_leaves_scores_and_pictures(finished: Path) -> None:
    table = (finished / "scores.md").read_text()
    assert "AbsRel / δ1" in table and "prior" not in table and "aligned, not finetuned" in table
    assert (finished / "samples" / "before_and_after.png").is_file()
    assert (finished / "samples" / "step_000002.png").is_file()
    assert all(np.isfinite(loss) for loss in told(finished, "loss") + told(finished, "validation_loss"))


def test_evaluated_at_the_pictures_own_size(finished: Path, tmp_path: Path) -> None:
    config = shrunk(finished / "export", **{"data.sources": (f"shapes_world:{finished / 'data'}",)})
    config.eval.depth.ensemble = 2
    found = evaluate.evaluate(config, tmp_path)
    assert found.keys() == {1, 2} and 0 <= found[1]["delta1"] <= found[1]["delta2"] <= 1 and found[1]["abs_rel"] > 0
    written = json.loads((tmp_path / "scores.json").read_text())
    assert written["depth"] == {"ensemble": 2, "protocol": "", "space": "log"} and written["num_images"] == 4
    assert written["judged_by"] == {"depth": "all"}
    assert written["task"]["name"] == "image_to_depth" and "guidance_scale" not in written
    arguments = ["--config=configs/depth.py:diff2flow", *hosts.changes(config, depth.get_config())]
    arguments += [f"--model={config.model}", f"--out={tmp_path / 'two'}"]
    assert hosts.two("d2f_jax.evaluate", *arguments, devices=1).count("scores: ") == 1
    for num_steps, values in json.loads((tmp_path / "two" / "scores.json").read_text())["scores"].items():
        assert values == pytest.approx(found[int(num_steps)], rel=1e-3)
    with pytest.raises(
        InputError, match="--clip, --aesthetic and --bits judge pictures, and this config tells depth; leave them out"
    ):
        evaluate.evaluate(config, tmp_path, clip="somewhere")
    config.eval.depth.protocol = "nyuv2"
    with pytest.raises(InputError, match="example 0: this crop is of pictures of 480 x 640 pixels, not 16 x 16"):
        evaluate.evaluate(config, tmp_path)


def test_a_picture_of_which_nothing_was_measured_is_not_judged(finished: Path, tmp_path: Path) -> None:
    depth = np.random.default_rng(0).integers(500, 9_000, (3, 16, 16), np.uint16)
    depth[1] = 0
    for i, image in enumerate(pictures(3)):
        Image.fromarray(image).save(tmp_path / f"rgb_{i}.png")
        Image.fromarray(depth[i]).save(tmp_path / f"depth_{i}.png")
    (tmp_path / "list.txt").write_text("".join(f"rgb_{i}.png depth_{i}.png\n" for i in range(3)))
    source = f"depth_list:{tmp_path / 'list.txt'}?protocol=scannet"
    config = shrunk(finished / "export", **{"data.sources": (source,), "eval.step_counts": (1,)})
    said = "example 1 of source 0: no pixel of its depth {}; leave it out, or set config.data.on_damage=skip"
    with pytest.raises(InputError, match=said.format("counts by this protocol")):
        evaluate.evaluate(config, tmp_path / "scores")
    data = datasets.open_data(config, tmp_path, prior.load_as_it_is(config), datasets.open_given(config))
    check = functools.partial(subjects.check, config)
    with pytest.raises(InputError, match=said.format("is measured")):
        data.examples(3, check)
    config.data.on_damage = "skip"
    evaluate.evaluate(config, tmp_path / "scores")
    assert json.loads((tmp_path / "scores" / "scores.json").read_text())["num_images"] == 2
    data = datasets.open_data(config, tmp_path, prior.load_as_it_is(config), datasets.open_given(config))
    shown = data.examples(3, check)
    assert len(shown) == 2 and subjects.make(config, shown, judged=True).judge is not None


def test_a_benchmark_is_judged_as_it_says(finished: Path, tmp_path: Path) -> None:
    images, rng = pictures(3, 480, 640), np.random.default_rng(1)
    millimetres = rng.integers(0, 12_000, (3, 480, 640), np.uint16)
    for i in range(3):
        Image.fromarray(images[i]).save(tmp_path / f"rgb_{i}.png")
        Image.fromarray(millimetres[i]).save(tmp_path / f"depth_{i}.png")
    (tmp_path / "list.txt").write_text("".join(f"rgb_{i}.png depth_{i}.png filled_{i}.png\n" for i in range(3)))
    source = open_source(f"depth_list:{tmp_path / 'list.txt'}?protocol=nyuv2")
    pipeline = Pipeline.from_pretrained(finished / "export")
    config = shrunk(finished / "export", **{"eval.step_counts": (1,)})
    protocol = metrics.DEPTH_PROTOCOLS["nyuv2"]
    judged = evaluate.depth_scores(config, pipeline, (source[i] for i in range(2)), 2, protocol)
    found = judged.found
    assert judged.count == 2 and list(judged.cells) == ["picture", "measured", "1 step"]
    assert all(cell.shape == (2, 16, 16, 3) for cell in judged.cells.values())
    estimates = pipeline.depth(images[:2], num_steps=1, resolution=16, seed=config.eval.seed)
    depth = millimetres[:2] / 1000
    depth[:, :45], depth[:, 471:], depth[:, :, :41], depth[:, :, 601:] = 0, 0, 0, 0
    within = metrics.DepthProtocol(1e-3, 10.0)
    errors = [metrics.depth_errors(within, p, d, space="log") for p, d in zip(estimates, depth, strict=True)]
    assert found[1]["abs_rel"] == pytest.approx(np.mean([e.abs_rel for e in errors]), rel=1e-4)


def test_pictures_that_are_alike_are_estimated_together_and_few_are_held() -> None:
    read = []

    def pairs() -> Iterator[tuple[np.ndarray, np.ndarray]]:
        for i, width in enumerate((4, 4, 4, 6, 4)):
            read.append(i)
            yield np.zeros((2, width, 3), np.uint8), np.full((2, width), i, np.float32)

    found = [
        (first, [int(depth[0, 0]) for _, depth in chunk], len(read)) for first, chunk in evaluate.alike(pairs(), 2)
    ]
    assert [chunk[:2] for chunk in found] == [(0, [0, 1]), (2, [2]), (3, [3]), (4, [4])]
    assert found[0][2] == 2


@pytest.mark.parametrize(
    ("arg", "changes"),
    [
        ("flow_matching", {"task.start": "image", "task.start_noise": 0.3, "task.concatenate": False} | RECTANGLE),
        ("diffusion:lora_small", {"lora.conv_rank": 2, "lora.mlp_rank": 2}),
    ],
)
def test_other_ways_to_learn_it(arg: str, changes: dict[str, Any], model: Path, tmp_path: Path) -> None:
    ranks = {f"lora.{group}_attention_rank": 2 for group in ("self", "cross")} if "lora" in arg else {}
    config = shrunk(model, arg, **changes, **ranks)
    train.train(config, tmp_path)
    export = Pipeline.from_pretrained(tmp_path / "export")
    assert export.task == Task(**config.task.to_dict())
    shape = config.data.image_size, config.data.image_width or 16
    assert export.depth(pictures(1, *shape), num_steps=1).shape == (1, *shape)
    assert export.noise(0, 1).shape == (1, 8, shape[1] // 2, 4)
    index = json.loads((tmp_path / "export" / "model_index.json").read_text())
    assert index["default_processing_resolution"] == max(shape)
    if export.task.start == "image":
        with pytest.raises(InputError, match="sampler='ddim' starts at noise, this model's flow at the picture"):
            export.depth(pictures(1), sampler="ddim")
    if "lora" in arg:
        again = Pipeline.from_pretrained(model).with_lora(tmp_path / "lora" / "adapters.safetensors")
        found, wanted = (p.depth(pictures(1), num_steps=2, seed=1) for p in (again, export))
        np.testing.assert_allclose(found, wanted, atol=1e-5)


def test_adapters_that_see_the_picture(model: Path, tmp_path: Path) -> None:
    """They alone tell what the picture is: nothing is concatenated, and nothing could be merged."""
    changes = {"task.adapters": True, "task.concatenate": False, "train.learning_rate": 0.01, "train.warmup_steps": 0}
    train.train(shrunk(model, "diff2flow:lora_base", **changes), tmp_path)
    assert not (tmp_path / "export").exists() and not (tmp_path / "lora" / "pytorch_lora_weights.safetensors").exists()
    trained = load_file(tmp_path / "lora" / "adapters.safetensors")
    assert all(trained[name].any() for name in trained if name.endswith((".b", ".gamma", ".beta")))
    pipeline = Pipeline.from_pretrained(model).with_lora(tmp_path / "lora" / "adapters.safetensors")
    assert pipeline.task == Task("image_to_depth", concatenate=False, adapters=True)
    noise = jnp.asarray(twins.random(1, 8, 8, 4))
    one, other, spread = (
        p.depth(images, num_steps=1, noise=noise)
        for p, images in (
            (pipeline, pictures(1)),
            (pipeline, 255 - pictures(1)),
            (pipeline.on_mesh(sharding.make_mesh()), pictures(1)),
        )
    )
    assert np.abs(one - other).max() > 1e-4
    np.testing.assert_allclose(spread, one, atol=1e-5)
    with pytest.raises(InputError, match="the model has adapters that see the picture already"):
        pipeline.with_lora(tmp_path / "lora" / "adapters.safetensors")
    with pytest.raises(InputError, match="adapters that depend on the picture are in no diffusers folder"):
        pipeline.save_pretrained(tmp_path / "saved")
    judged = shrunk(model, "diff2flow:lora_base", **changes, **{"data.sources": (f"shapes_world:{tmp_path / 'data'}",)})
    judged.eval.step_counts = (1,)
    scores = evaluate.evaluate(judged, tmp_path / "scores", lora=str(tmp_path / "lora" / "adapters.safetensors"))[1]
    world = datasets.open_data(judged, tmp_path, pipeline, {}).examples(4)
    estimates = pipeline.depth(np.stack([e["image"] for e in world]), num_steps=1, ensemble=1, seed=judged.eval.seed)
    pairs = zip(estimates, [e["depth"] for e in world], strict=True)
    errors = [metrics.depth_errors(metrics.DEPTH_PROTOCOLS["all"], p, d, space="log").abs_rel for p, d in pairs]
    assert scores["abs_rel"] == pytest.approx(np.mean(errors), rel=1e-3)
    with pytest.raises(InputError, match=r"adapters=True, but \S+ has no adapters that see .* give --lora=FILE"):
        evaluate.evaluate(judged, tmp_path / "scores")
    with pytest.raises(InputError, match=r"config.task.adapters=True without adapters of convolutions"):
        train.train(shrunk(model, "diff2flow:lora", **changes), tmp_path / "none")


def test_training_on_prepared_depth_is_training_on_pictures(model: Path, finished: Path, tmp_path: Path) -> None:
    world = f"shapes_world:{finished / 'data'}"
    manifest = prepare.prepare(
        shrunk(model, **{"data.sources": (world,)}), tmp_path / "prepared", prepare.Options(batch_size=4)
    )
    assert manifest.plan.task == "image_to_depth" and manifest.plan.text_shape == (2, 16)
    changes = {"data.sources": (f"array_record:{tmp_path / 'prepared'}",), "eval.sources": (world,)}
    train.train(shrunk(model, **changes), tmp_path / "run")
    for name in ("loss", "validation_loss"):  # but for float16 latents
        assert told(tmp_path / "run", name) == pytest.approx(told(finished, name), rel=2e-3)
    with pytest.raises(InputError, match=r"empty text of 2 tokens, but config.task.pad_text=True makes 24; change"):
        train.train(shrunk(model, **changes, **{"task.pad_text": True}), tmp_path / "padded")
    with pytest.raises(InputError, match=r"hold prepared latents; give pictures with depth as config.eval.sources"):
        train.train(shrunk(model, **{"data.sources": changes["data.sources"]}), tmp_path / "blind")


def test_the_start_at_a_picture_is_no_diffusion(model: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"config.task.start=image: diffusion starts at noise"):
        train.train(shrunk(model, "diffusion", **{"task.start": "image"}), tmp_path)
    assert not list(tmp_path.iterdir())


def test_what_is_exported_is_of_two_latents(finished: Path) -> None:
    kernel = load_file(finished / "export/unet/diffusion_pytorch_model.safetensors")["conv_in.weight"]
    assert kernel.shape[1] == 8 and not np.allclose(kernel[:, :4], kernel[:, 4:])
