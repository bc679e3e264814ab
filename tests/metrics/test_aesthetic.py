"""The aesthetic score, against the same layers in PyTorch, of the embeddings that the CLIP score is of."""

from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
import transformers
import twins

from d2f_jax import InputError, weights
from d2f_jax.metrics import Clip, Means, load_aesthetic

VISION = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2, "num_hidden_layers": 1}
WIDTH = 768  # of ViT-L/14's embeddings, as the predictor's file has it


@pytest.fixture(scope="module")
def theirs() -> transformers.CLIPModel:
    torch.manual_seed(3)
    vision = VISION | {"image_size": 32, "patch_size": 16}
    config = transformers.CLIPConfig(text_config=twins.SMALL_CLIP, vision_config=vision, projection_dim=WIDTH)
    return twins.shaken(transformers.CLIPModel(config))


@pytest.fixture(scope="module")
def clip(theirs: transformers.CLIPModel, tmp_path_factory: pytest.TempPathFactory) -> Clip:
    model = weights.load_clip(twins.written(theirs, tmp_path_factory.mktemp("clip")))
    return Clip(model, weights.Tokenize(weights.load_tokenizer("tiny-sd")))


def pictures(count: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (count, 40, 48, 3), np.uint8)


@pytest.mark.parametrize("kind", ["pth", "safetensors"])
def test_score_is_that_of_pytorch(theirs: transformers.CLIPModel, clip: Clip, kind: str, tmp_path: Path) -> None:
    predictor, file = twins.Aesthetic(WIDTH), tmp_path / f"predictor.{kind}"
    if kind == "pth":
        torch.save(predictor.state_dict(), file)
    else:
        safetensors.torch.save_file(predictor.state_dict(), file)
    images, ours = pictures(5), load_aesthetic(file, clip)
    size = {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}}
    pixels = transformers.CLIPImageProcessorPil(**size)(list(images), return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        shown = torch.nn.functional.normalize(theirs.get_image_features(pixels).pooler_output, dim=-1)
        expected = predictor(shown)[:, 0].numpy()
    assert expected.std() > 0.01
    found = ours(clip.see(images))
    np.testing.assert_allclose(found, expected, rtol=1e-4)
    parts = [Means().add({"aesthetic_score": ours(clip.see(images[i : i + 2]))}) for i in range(0, 5, 2)]
    whole = parts[0].merge(parts[1]).merge(parts[2]).means()["aesthetic_score"]
    assert whole == pytest.approx(found.mean(), rel=1e-6)


def test_another_file_is_refused(clip: Clip, tmp_path: Path) -> None:
    def saved(content: object) -> Path:
        torch.save(content, tmp_path / "x.pth")
        return tmp_path / "x.pth"

    state = twins.Aesthetic(WIDTH).state_dict()
    with pytest.raises(InputError, match=r"is not at \S+nowhere\.pth; give sac\+logos\+ava1-l14-linearMSE\.pth"):
        load_aesthetic(tmp_path / "nowhere.pth", clip)
    short = {name: tensor for name, tensor in state.items() if name != "layers.7.bias"}
    for content in ([], {}, short, state | {"layers.9.bias": torch.zeros(1)}, {"x": state["layers.0.weight"]}):
        with pytest.raises(InputError, match=r"x\.pth is not the aesthetic predictor; give sac"):
            load_aesthetic(saved(content), clip)
    with pytest.raises(InputError, match=r"judges embeddings of 512 numbers, --clip makes 768; give the CLIP model"):
        load_aesthetic(saved(twins.Aesthetic(512).state_dict()), clip)
