"""Judging a checkpoint: the numbers are those of the pictures that it draws, and what is not given gets none."""

import json
from pathlib import Path

import fidelity
import numpy as np
import pytest
import safetensors.torch
import small
from ml_collections import ConfigDict
from PIL import Image

from configs import images, quickstart
from d2f_jax import InputError, Pipeline, distributed, metrics, subjects
from d2f_jax.data.shapes_world import shapes_world
from d2f_jax.evaluate import evaluate
from d2f_jax.measures import Gathered, Judges, scores

COUNT = 6


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small.write_pipeline(tmp_path_factory.mktemp("model"))


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
            "eval.grid_images": 2,
            **changes,
        }
    )
    return config


def test_the_numbers_are_those_of_the_pictures(model: Path, tmp_path: Path) -> None:
    weights = fidelity.random_inception().state_dict()
    safetensors.torch.save_file({k: v.contiguous() for k, v in weights.items()}, tmp_path / "inception.safetensors")
    told = evaluate(config(model), tmp_path / "out", inception=str(tmp_path / "inception.safetensors"))

    source = shapes_world(tmp_path / "out" / "data", size=24, split="validation", num_train=1, num_validation=8)
    examples = [source[i] for i in range(COUNT)]
    texts, real = [example["text"] for example in examples], np.stack([x["image"][4:20] for x in examples])
    pipeline, inception = Pipeline.from_pretrained(model), metrics.load_inception(tmp_path / "inception.safetensors")
    drawn = pipeline(texts, num_steps=3, guidance_scale=3.0, seed=1234, height=16, width=24, sampler="heun")
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
    subject = subjects.make(config(model), examples, judged=True)  # as training tells it
    assert subject.judge is not None
    assert subject.judge(drawn) == f"{shapes.frechet_distance:.2f} / {shapes.caption_accuracy:.0%}"
    assert told[1]["fid"] != told[3]["fid"] and "clip_score" not in told[3]

    written = json.loads((tmp_path / "out" / "scores.json").read_text())
    assert written["scores"] == {str(n): values for n, values in told.items()}
    assert (written["model"], written["num_images"], written["sampler"]) == (str(model), COUNT, "heun")
    table = (tmp_path / "out" / "scores.md").read_text()
    assert "6 pictures of 16 x 24 pixels" in table and "| fid" in table
    assert Image.open(tmp_path / "out" / "samples.png").size > (4 * 24, 16)


def test_shares_of_processes_are_the_whole() -> None:
    rng, judges = np.random.default_rng(0), Judges.load(None, None, shapes=True)
    pictures, texts = rng.integers(0, 256, (2, 10, 16, 16, 3), np.uint8), ["a red cube", "a blue sphere"] * 5
    whole = [Gathered().add(judges, np.arange(10), x, texts) for x in pictures]
    shares = []
    for x in pictures:
        parts = [
            Gathered().add(judges, mine, x[mine], [texts[i] for i in mine])
            for mine in (np.arange(k, 10, 4) for k in range(4))
        ]
        shares.append(parts[0].merge(parts[1]).merge(parts[2].merge(parts[3])).merge(Gathered()))
    one, other = scores(judges, *whole), scores(judges, *shares)
    assert other == pytest.approx(one, rel=1e-6) and one["caption_accuracy"] == other["caption_accuracy"]
    assert distributed.merged(whole[0]) is whole[0]


def test_what_is_not_given_is_named(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for i in range(3):
        Image.new("RGB", (20, 16), (i, 0, 0)).save(tmp_path / f"{i}.png")
    lines = [json.dumps({"file_name": f"{i}.png", "text": "a cone"}) for i in range(3)]
    (tmp_path / "metadata.jsonl").write_text("\n".join(lines))
    photographs = images.get_config(f"image_folder:{tmp_path}")
    photographs.update_from_flattened_dict({"model": str(model), "data.image_size": 16})
    with pytest.raises(InputError, match="there is nothing to judge by: FID, KID: give --inception=FILE"):
        evaluate(photographs, tmp_path / "out")
    assert "CLIP score: give --clip=" in capsys.readouterr().out
    assert not (tmp_path / "out").exists()


def test_weights_that_are_not_there(model: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"nowhere\.safetensors"):
        evaluate(config(model), tmp_path / "out", inception=str(tmp_path / "nowhere.safetensors"))
    assert not (tmp_path / "out").exists()
