"""CLIP's two towers, what it sees of a picture, and the score, against transformers with the same random weights."""

import json
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
import transformers
import twins
from PIL import Image

from d2f_jax import InputError, weights
from d2f_jax.metrics import Clip, Means, clip_pixels, load_clip_score

VISION = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "image_size": 48,
    "patch_size": 16,
}
BASE_16 = {"patch_size": 16}  # OpenAI's ViT-B/16: transformers' defaults but for the patches
TEXTS = ["a red cube", "a white cone left of a small blue sphere on snow", "", "sphere " * 90]


def clip(text: dict, vision: dict, projection_dim: int) -> transformers.CLIPModel:
    torch.manual_seed(3)
    config = transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=projection_dim)
    return twins.shaken(transformers.CLIPModel(config))


@pytest.fixture(scope="module")
def tokenizer() -> transformers.CLIPTokenizer:
    return weights.load_tokenizer("tiny-sd")


@pytest.fixture(scope="module")
def theirs(tokenizer: transformers.CLIPTokenizer) -> transformers.CLIPModel:
    ids = {f"{k}_token_id": getattr(tokenizer, f"{k}_token_id") for k in ("bos", "eos", "pad")}
    length = {"max_position_embeddings": tokenizer.model_max_length}
    return clip(twins.SMALL_CLIP | ids | length | {"vocab_size": len(tokenizer)}, VISION, 20)


@pytest.fixture(scope="module")
def folder(theirs, tokenizer: transformers.CLIPTokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = twins.written(theirs, tmp_path_factory.mktemp("clip"))
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def ours(folder: Path) -> Clip:
    return load_clip_score(folder)


def pictures(height: int, width: int, count: int = 4) -> np.ndarray:
    """Coarse blocks, grown: edges and slopes."""
    coarse = np.random.default_rng(height).integers(0, 256, (count, 7, 7, 3), np.uint8)
    return np.stack([np.asarray(Image.fromarray(x).resize((width, height))) for x in coarse])


def pooled(output) -> np.ndarray:
    return output.pooler_output.detach().numpy()


def test_towers_and_projections(theirs, ours: Clip, tokenizer: transformers.CLIPTokenizer) -> None:
    pixels = twins.random(2, 48, 48, 3)
    twins.assert_close(ours.model.embed_images(pixels), pooled(theirs.get_image_features(twins.nchw(pixels))), 1e-5)
    ids = ours.tokenize(TEXTS)
    twins.assert_close(ours.model.embed_text(ids), pooled(theirs.get_text_features(torch.from_numpy(ids).long())), 1e-5)


def test_old_configs_end_a_text_at_the_largest_token(theirs, folder: Path, tmp_path: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["text_config"]["eos_token_id"] = 2
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "model.safetensors").symlink_to(folder / "model.safetensors")
    old = transformers.CLIPModel.from_pretrained(tmp_path)
    ids = np.random.default_rng(0).integers(3, 90, (3, 12)).astype(np.int32)
    expected = pooled(old.get_text_features(torch.from_numpy(ids).long()))
    twins.assert_close(weights.load_clip(tmp_path).embed_text(ids), expected, 1e-5)


@pytest.mark.full_size
def test_full_size(tmp_path: Path) -> None:
    theirs = clip({}, BASE_16, 512)
    ours = weights.load_clip(twins.written(theirs, tmp_path))
    pixels = twins.random(2, 224, 224, 3)
    with torch.no_grad():
        twins.assert_close(ours.embed_images(pixels), pooled(theirs.get_image_features(twins.nchw(pixels))))


@pytest.mark.parametrize(("height", "width"), [(48, 48), (64, 64), (300, 301), (97, 411), (500, 224), (641, 333)])
def test_clip_sees_what_transformers_shows_it(height: int, width: int) -> None:
    images = pictures(height, width, 2)
    expected = transformers.CLIPImageProcessorPil()(list(images), return_tensors="np")["pixel_values"]
    np.testing.assert_allclose(clip_pixels(images, 224), np.stack(expected).transpose(0, 2, 3, 1), atol=2e-6)


def test_score_is_the_cosine_in_percent(
    theirs, ours: Clip, folder: Path, tokenizer: transformers.CLIPTokenizer
) -> None:
    images = pictures(60, 80)
    size = {"size": {"shortest_edge": 48}, "crop_size": {"height": 48, "width": 48}}
    pixels = transformers.CLIPImageProcessorPil(**size)(list(images), return_tensors="pt")["pixel_values"]
    inputs = tokenizer(TEXTS, padding=True, truncation=True, return_tensors="pt")  # to the longest, with a mask
    shown, said = (
        torch.nn.functional.normalize(x.pooler_output, dim=-1)
        for x in (theirs.get_image_features(pixels), theirs.get_text_features(**inputs))
    )
    expected = 100 * (shown * said).sum(-1).detach().numpy()
    assert expected.min() > 1
    np.testing.assert_allclose(ours(images, TEXTS), expected, rtol=1e-5)
    mirrored = load_clip_score(folder)  # where every cosine is the negative one
    kernel = mirrored.model.visual_projection.kernel
    kernel[...] = -kernel[...]
    np.testing.assert_array_equal(mirrored(images, TEXTS), 0)


def test_score_does_not_depend_on_the_batches(ours: Clip) -> None:
    images = pictures(60, 80)
    whole = ours(images, TEXTS)
    np.testing.assert_allclose(ours(images, TEXTS, batch_size=3), whole, atol=1e-4)
    parts = [Means().add({"clip_score": ours(images[i : i + 2], TEXTS[i : i + 2])}) for i in (0, 2)]
    assert parts[0].merge(parts[1]).means()["clip_score"] == pytest.approx(whole.mean(), abs=1e-4)


def test_of_a_hub_id_the_files_at_its_root_are_fetched(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fetched(hub_id: str, *, revision: str | None, allow_patterns: list[str]) -> str:
        assert hub_id == "someone/clip" and revision is None
        assert {"model.safetensors", "*.json"} <= set(allow_patterns)
        return str(folder)

    monkeypatch.setattr(weights, "snapshot_download", fetched)
    assert weights.load_clip("someone/clip").config.vision.image_size == 48


def test_the_tokenizer_fits_the_model(theirs, folder: Path, tokenizer, tmp_path: Path) -> None:
    for name in ("config.json", "model.safetensors", "tokenizer.json"):
        (tmp_path / name).symlink_to(folder / name)  # without the file that tells the length
    assert load_clip_score(tmp_path).tokenize(TEXTS).shape == (4, theirs.config.text_config.max_position_embeddings)
    (tmp_path / "other").mkdir()
    twins.written(clip(twins.SMALL_CLIP, VISION, 20), tmp_path / "other")
    tokenizer.save_pretrained(tmp_path / "other")
    with pytest.raises(InputError, match="the tokenizer has 272 tokens, the model 99"):
        load_clip_score(tmp_path / "other")


def test_without_a_model_there_is_no_number(folder: Path, tmp_path: Path, ours: Clip) -> None:
    with pytest.raises(InputError, match=r"needs a CLIP model, and none is given; .*save_pretrained"):
        load_clip_score(None)
    with pytest.raises(InputError, match=r"config\.json cannot be read"):
        load_clip_score(tmp_path)
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    with pytest.raises(InputError, match=r"model\.safetensors is missing"):
        load_clip_score(tmp_path)
    tensors = safetensors.torch.load_file(folder / "model.safetensors")
    tensors.pop("visual_projection.weight")
    safetensors.torch.save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(InputError, match=r"does not fit its config\.json: missing visual_projection\.weight"):
        load_clip_score(tmp_path)
    safetensors.torch.save_file(
        tensors | {"visual_projection.weight": torch.zeros(20, 32)}, tmp_path / "model.safetensors"
    )
    with pytest.raises(InputError, match=r"holds no tokenizer\.json and no vocab\.json"):
        load_clip_score(tmp_path)
    for config, told in (
        ({"model_type": "siglip"}, "model_type='siglip' is not 'clip'"),
        ({"model_type": "clip", "vision_config": {"hidden_size": "wide"}}, r"config\.json: .*hidden_size"),
        ({"model_type": "clip", "vision_config": {"hidden_act": "relu"}}, "hidden_act='relu'"),
        ({"model_type": "clip", "vision_config": {"num_channels": 4}}, "num_channels=4"),
    ):
        (tmp_path / "config.json").write_text(json.dumps(config))
        with pytest.raises(InputError, match=told):
            load_clip_score(tmp_path)
    with pytest.raises(ValueError, match="4 pictures for 1 texts"):
        ours(pictures(60, 80), TEXTS[:1])
