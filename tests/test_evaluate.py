"""Judging a checkpoint: the numbers are those of the pictures that it draws, and what is not given gets none."""

import dataclasses
import functools
import json
import weakref
from pathlib import Path
from typing import Any, cast

import fidelity
import hosts
import numpy as np
import pytest
import safetensors.torch
import small
import torch
import transformers
import twins
from ml_collections import ConfigDict
from PIL import Image

from configs import images, quickstart
from d2f_jax import InputError, Pipeline, distributed, metrics, subjects, weights
from d2f_jax.alignment import Alignment
from d2f_jax.data.shapes_world import shapes_world
from d2f_jax.evaluate import evaluate, picture_scores
from d2f_jax.measures import Gathered, Judges, scores

COUNT = 6
HOW = {"guidance_scale": 3.0, "guidance_rescale": 0.5, "negative_prompt": "a cone", "seed": 1234, "sampler": "heun"}
NAIVE = Alignment(timestep=False, state=False, velocity=False, raw_time=True)
HOW |= {"height": 16, "width": 24}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small.write_pipeline(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of random weights, with tiny-sd's tokenizer."""
    tokenizer, folder = weights.load_tokenizer("tiny-sd"), tmp_path_factory.mktemp("clip")
    ids = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    text = (
        twins.SMALL_CLIP | ids | {"vocab_size": len(tokenizer), "max_position_embeddings": tokenizer.model_max_length}
    )
    vision = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "num_hidden_layers": 1}
    vision |= {"image_size": 16, "patch_size": 8}
    torch.manual_seed(6)  # of those whose cosines are above zero, where the score begins
    config = transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=20)
    tokenizer.save_pretrained(twins.written(twins.shaken(transformers.CLIPModel(config)), folder))
    return folder


def config(model: Path, **changes: object) -> ConfigDict:
    config = quickstart.get_config()
    config.update_from_flattened_dict(
        {
            "model": str(model),
            "data.image_size": 16,
            "data.image_width": 24,
            "data.num_train": 1,
            "data.num_validation": 8,
            "eval.num_images": COUNT,
            "eval.batch_size": 4,
            "eval.step_counts": (1, 3),
            "eval.sampler": "heun",
            "eval.guidance_rescale": 0.5,
            "eval.negative_prompt": "a cone",
            "eval.grid_images": 2,
            **changes,
        }
    )
    return config


def test_the_numbers_are_those_of_the_pictures(model: Path, tmp_path: Path) -> None:
    tensors = fidelity.random_inception().state_dict()
    safetensors.torch.save_file({k: v.contiguous() for k, v in tensors.items()}, tmp_path / "inception.safetensors")
    told = evaluate(config(model), tmp_path / "out", inception=str(tmp_path / "inception.safetensors"), kid=True)

    source = shapes_world(tmp_path / "out" / "data", size=24, split="validation", num_train=1, num_validation=8)
    examples = [source[i] for i in range(COUNT)]
    texts, real = [example["text"] for example in examples], np.stack([x["image"][4:20] for x in examples])
    pipeline, inception = Pipeline.from_pretrained(model), metrics.load_inception(tmp_path / "inception.safetensors")
    drawn = pipeline(texts, num_steps=3, **HOW)
    features = [metrics.inception_features(inception, x) for x in (drawn, real)]
    fid = metrics.frechet_distance(*map(metrics.FeatureStatistics.of, features))
    classifier = metrics.load_classifier()
    reference = metrics.feature_statistics(classifier, real)
    shapes = metrics.shapes_scores(classifier, drawn, prompts=texts, reference=reference)
    assert told[3]["fid"] == pytest.approx(
        fid, rel=1e-2
    )  # pictures drawn on eight devices differ by a level here and there
    assert told[3]["kid"] == pytest.approx(metrics.kernel_distance(*features, subset_size=COUNT).mean, rel=1e-2)
    assert told[3]["shapes_frechet_distance"] == pytest.approx(shapes.frechet_distance, rel=1e-2)
    assert told[3]["caption_accuracy"] == shapes.caption_accuracy
    for name, measure in (("psnr", metrics.psnr), ("ssim", metrics.ssim)):
        assert told[3][name] == pytest.approx(measure(drawn, real, data_range=255).mean(), rel=1e-3)
    subject = subjects.make(config(model), examples, judged=True)  # as training tells it
    assert subject.judge is not None
    assert subject.judge(drawn) == f"{shapes.frechet_distance:.2f} / {shapes.caption_accuracy:.0%}"
    assert told[1]["fid"] != told[3]["fid"] and not {"clip_score", "kid_std"} & told[3].keys()

    written = json.loads((tmp_path / "out" / "scores.json").read_text())
    assert written["scores"] == {str(n): values for n, values in told.items()}
    assert (written["model"], written["num_images"], written["sampler"]["name"]) == (str(model), COUNT, "heun")
    assert written["alignment"] == dataclasses.asdict(Alignment()) and written["negative_prompt"] == "a cone"
    table = (tmp_path / "out" / "scores.md").read_text()
    assert "6 pictures of 16 x 24 pixels" in table and "| fid" in table
    assert Image.open(tmp_path / "out" / "samples.png").size > (4 * 24, 16)


def test_steps_by_tolerance_are_one_column(model: Path, tmp_path: Path) -> None:
    adaptive = config(model, **{"eval.sampler": "dopri5", "eval.rtol": 0.1, "eval.atol": 0.1})
    with pytest.raises(InputError, match=r"dopri5 takes as many steps as its tolerances ask for, each time; give one"):
        evaluate(adaptive, tmp_path)
    adaptive.eval.step_counts = (1,)
    with pytest.raises(InputError, match="--bits is of a number of steps, and dopri5 finds its own; leave it out"):
        evaluate(adaptive, tmp_path, bits=True)
    evaluate(adaptive, tmp_path)
    header = (tmp_path / "scores.md").read_text().splitlines()[0]
    assert [cell.strip() for cell in header.split("|")[2:-1]] == ["dopri5"]


def test_pictures_of_one_colour_are_held_against_it(model: Path, tmp_path: Path) -> None:
    sources = {"data.sources": ("uniform_colours:black,orange?each=2",), "eval.step_counts": (3,)}
    told = evaluate(config(model, **sources), tmp_path)[3]
    drawn = Pipeline.from_pretrained(model)(["a black image", "an orange image"] * 2, num_steps=3, **HOW)
    levels = np.array([(0, 0, 0), (250, 128, 13)] * 2)[:, None, None]
    assert told["colour_error"] == pytest.approx(np.abs(drawn - levels).mean(), rel=1e-3)
    assert "| colour error" in (tmp_path / "scores.md").read_text() and "caption_accuracy" not in told


def test_shares_of_processes_are_the_whole() -> None:
    """To rounding; and the distance is that of the statistics which numpy finds in all rows of features."""
    rng, judges = np.random.default_rng(0), Judges.load(shapes=True)
    drawn, real = rng.integers(0, 256, (2, 10, 16, 16, 3), np.uint8)
    texts = ["a red cube", "a blue sphere"] * 5

    def gathered(parts: list[np.ndarray]) -> tuple[Gathered, Gathered]:
        seen = [Gathered().add_drawn(judges, n, drawn[n], [texts[i] for i in n], real[n], {}) for n in parts]
        shown = [Gathered().add_real(judges, n, real[n]) for n in parts]
        return functools.reduce(Gathered.merge, seen, Gathered()), functools.reduce(Gathered.merge, shown, Gathered())

    whole = gathered([np.arange(10)])
    one = scores(judges, *whole)
    other = scores(judges, *gathered([*(np.arange(k, 10, 4) for k in range(4)), np.arange(0)]))
    assert other == pytest.approx(one, rel=1e-6) and one["caption_accuracy"] == other["caption_accuracy"]
    assert judges.shapes is not None
    for seen, pictures in zip(whole, (drawn, real), strict=True):
        rows = metrics.shapes_judgement(judges.shapes, pictures, texts)[0].astype(np.float64)
        np.testing.assert_allclose(seen.shapes.mean_F, rows.mean(0), rtol=1e-12)
        np.testing.assert_allclose(seen.shapes.covariance_FxF, np.cov(rows, rowvar=False), rtol=1e-9, atol=1e-12)
    assert not whole[0].rows.parts  # kept for KID alone
    assert distributed.merged(whole[0]) is whole[0]


def test_few_pictures_are_held_at_a_time(model: Path) -> None:
    held: list[weakref.ref] = []
    most = 0

    def watched(picture: np.ndarray) -> np.ndarray:
        nonlocal most
        held.append(weakref.ref(picture))
        most = max(most, sum(ref() is not None for ref in held))
        return picture

    def pipeline(texts: list[str], **_: object) -> np.ndarray:
        return watched(np.full((len(texts), 16, 24, 3), 7, np.uint8))

    shapes = ({"text": "", "image": watched(np.zeros((16, 24, 3), np.uint8))} for _ in range(90))
    told = picture_scores(config(model), cast(Any, pipeline), shapes, 90, Judges.load(shapes=False))
    assert told.count == 90 and told.found[1]["psnr"] == pytest.approx(20 * np.log10(255 / 7))
    assert [cell.shape for cell in told.cells.values()] == [(2, 16, 24, 3)] * 2
    assert len(held) == 90 + 2 * 23 and most <= 2 * 4 + 4  # two batches of four read, and the drawn ones


def test_a_model_is_judged_as_it_flows(model: Path, tmp_path: Path) -> None:
    naive = dataclasses.replace(Pipeline.from_pretrained(model), alignment=NAIVE, _programs={})
    naive.save_pretrained(tmp_path / "naive")
    told = evaluate(config(tmp_path / "naive", **{"eval.step_counts": (3,)}), tmp_path / "out")
    source = shapes_world(tmp_path / "out" / "data", size=24, split="validation", num_train=1, num_validation=8)
    examples = [source[i] for i in range(COUNT)]
    drawn = naive([example["text"] for example in examples], num_steps=3, **HOW)
    real = np.stack([example["image"][4:20] for example in examples])
    assert told[3]["psnr"] == pytest.approx(metrics.psnr(drawn, real, data_range=255).mean(), rel=1e-3)
    assert json.loads((tmp_path / "out" / "scores.json").read_text())["alignment"] == dataclasses.asdict(NAIVE)
    with pytest.raises(InputError, match="sampler='ddim' is of diffusion models and of flows aligned with them"):
        evaluate(config(tmp_path / "naive", **{"eval.sampler": "ddim"}), tmp_path / "out")
    with pytest.raises(InputError, match="bits per dimension are of diffusion models and of flows aligned with them"):
        evaluate(config(tmp_path / "naive"), tmp_path / "out", bits=True)


def test_two_processes_and_the_program_tell_what_one_does(model: Path, clip: Path, tmp_path: Path) -> None:
    wanted = config(model, **{"data.sources": (f"shapes_world:{tmp_path / 'data'}",), "train.batch_size": 3})
    torch.save(twins.Aesthetic(20).state_dict(), tmp_path / "aesthetic.pth")
    aesthetic = str(tmp_path / "aesthetic.pth")
    found = evaluate(wanted, tmp_path / "one", clip=str(clip), aesthetic=aesthetic, bits=True)
    arguments = ["--config=configs/quickstart.py", *hosts.changes(wanted, quickstart.get_config()), "--bits"]
    arguments += [f"--model={model}", f"--clip={clip}", f"--aesthetic={aesthetic}", f"--out={tmp_path / 'two'}"]
    ran = hosts.two("d2f_jax.evaluate", *arguments, devices=1)
    assert ran.count("FID: give --inception=FILE") == ran.count("scores: ") == 1
    other = json.loads((tmp_path / "two" / "scores.json").read_text())["scores"]
    for num_steps, values in found.items():  # pictures differ by a level here and there
        assert other[str(num_steps)] == pytest.approx(values, rel=1e-2)
    source = shapes_world(tmp_path / "data", size=24, split="validation", num_train=1, num_validation=8)
    texts = [source[i]["text"] for i in range(COUNT)]
    pipeline = Pipeline.from_pretrained(model)
    real = np.stack([source[i]["image"][4:20] for i in range(COUNT)])
    bits = pipeline.bits_per_dim(real, texts, num_steps=3, seed=1234)
    assert found[3]["bits_per_dim"] == pytest.approx(bits.mean(), rel=1e-3) and bits.std() > 0
    seeing, drawn = metrics.load_clip_score(clip), pipeline(texts, num_steps=3, **HOW)
    liked = metrics.load_aesthetic(aesthetic, seeing)(seeing.see(drawn))
    assert found[3]["aesthetic_score"] == pytest.approx(liked.mean(), rel=1e-2) and liked.std() > 0
    score = seeing(drawn, texts)
    assert found[3]["clip_score"] == pytest.approx(score.mean(), rel=1e-2) and score.std() > 0


def test_what_is_not_given_is_named(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for i in range(3):
        Image.new("RGB", (20, 16), (i, 0, 0)).save(tmp_path / f"{i}.png")
    listed = [{"id": i, "file_name": f"{i}.png"} for i in range(3)]
    captions = [{"id": i, "image_id": i, "caption": "a cone"} for i in range(3)]
    (tmp_path / "captions.json").write_text(json.dumps({"images": listed, "annotations": captions}))
    photographs = images.get_config(f"coco:{tmp_path / 'captions.json'}?images={tmp_path}")
    small_ones = {"model": str(model), "data.image_size": 16, "eval.step_counts": (1,)}
    photographs.update_from_flattened_dict(small_ones)
    assert evaluate(photographs, tmp_path / "out")[1].keys() == {"psnr", "ssim"}
    told = capsys.readouterr().out
    assert (
        "FID: give --inception=FILE (" in told
        and "KID: give --inception=FILE and --kid" in told
        and "CLIP score: give --clip=" in told
        and "aesthetic score: give --aesthetic=" in told
    )
    with pytest.raises(InputError, match="--aesthetic judges what CLIP sees; give --clip=openai"):
        evaluate(photographs, tmp_path / "none", aesthetic="somewhere.pth")
    with pytest.raises(InputError, match="--kid needs the weights of InceptionV3; give --inception=FILE"):
        evaluate(photographs, tmp_path / "none", kid=True)
    photographs.data.image_size = 8
    with pytest.raises(InputError, match=r"config\.data\.image_size: pictures of 8 pixels have no SSIM; use 11"):
        evaluate(photographs, tmp_path / "none")
    assert not (tmp_path / "none").exists()


def test_weights_that_are_not_there(model: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"nowhere\.safetensors"):
        evaluate(config(model), tmp_path / "out", inception=str(tmp_path / "nowhere.safetensors"))
    assert not (tmp_path / "out").exists()
