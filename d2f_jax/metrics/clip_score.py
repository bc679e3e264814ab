"""CLIP score: how well pictures go with their texts, in the eyes of a CLIP model. Hessel et al. (2021)."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from PIL import Image

from d2f_jax import weights
from d2f_jax.errors import InputError
from d2f_jax.metrics.batches import check_pictures, in_batches
from d2f_jax.models.clip import CLIPModel

_MEAN = np.array([0.48145466, 0.4578275, 0.40821073], np.float32)  # of the pictures that CLIP was trained on, in [0, 1]
_STD = np.array([0.26862954, 0.26130258, 0.27577711], np.float32)


@dataclasses.dataclass(frozen=True)
class Clip:
    """`clip(images, texts) -> score [B]`; averaged over pictures it is the CLIP score (`Means`)."""

    model: CLIPModel
    tokenize: weights.Tokenize

    def __call__(self, images_NxHxWx3: np.ndarray, texts: Sequence[str], *, batch_size: int = 32) -> np.ndarray:
        """100 max(cosine, 0), float64 [N], of uint8 pictures of any size and the text of each; from 0 to 100.

        As torchmetrics' `CLIPScore` documents it; its code clamps the mean instead, which is the same unless a cosine
        is negative. Texts too long for the model are cut, keeping the token that ends them. Raises `ValueError` for
        pictures that are not uint8 [N, H, W, 3] or not as many as texts.
        """
        return self.score(self.see(images_NxHxWx3, batch_size=batch_size), texts, batch_size=batch_size)

    def see(self, images_NxHxWx3: np.ndarray, *, batch_size: int = 32) -> np.ndarray:
        """Embeddings of uint8 pictures of any size, float64 [N, P] of length 1. Raises `ValueError` as a call."""
        check_pictures(images_NxHxWx3)
        pixels_NxSxSx3 = clip_pixels(images_NxHxWx3, self.model.config.vision.image_size)
        return _normalised(in_batches(lambda batch: _embed_images(self.model, batch), pixels_NxSxSx3, batch_size))

    def score(self, shown_NxP: np.ndarray, texts: Sequence[str], *, batch_size: int = 32) -> np.ndarray:
        """What a call tells, of pictures that were seen. Raises `ValueError` as a call."""
        if len(shown_NxP) != len(texts):
            raise ValueError(f"{len(shown_NxP)} pictures for {len(texts)} texts")
        said_NxP = in_batches(lambda batch: _embed_text(self.model, batch), self.tokenize(texts), batch_size)
        return 100 * np.sum(shown_NxP * _normalised(said_NxP), -1).clip(0)


def load_clip_score(path_or_hub_id: str | Path | None) -> Clip:
    """From a folder or hub id that transformers' `CLIPModel.save_pretrained` and its tokenizer wrote.

    Raises InputError where none is given, and for whatever is missing, damaged, of another network, or does not fit.
    """
    if path_or_hub_id is None:
        raise InputError(
            "CLIP score needs a CLIP model, and none is given; give a folder that holds config.json, model.safetensors "
            "and the tokenizer's files, or a hub id such as openai/clip-vit-large-patch14 (a folder with "
            "pytorch_model.bin becomes one by transformers' CLIPModel.from_pretrained(A).save_pretrained(B))"
        )
    folder = weights.component_folder(path_or_hub_id, "")
    model, tokenizer = weights.load_clip(folder), weights.load_tokenizer(folder)
    text = model.config.text
    if len(tokenizer) > text.vocab_size:
        raise InputError(
            f"{folder}: the tokenizer has {len(tokenizer)} tokens, the model {text.vocab_size}; give its own"
        )
    # Not every tokenizer's files tell how much its model reads.
    tokenizer.model_max_length = min(tokenizer.model_max_length, text.max_position_embeddings)
    return Clip(model, weights.Tokenize(tokenizer))


def clip_pixels(images_NxHxWx3: np.ndarray, size: int) -> np.ndarray:
    """uint8 pictures as CLIP sees them: float32 [N, size, size, 3], standardised.

    The shorter side becomes `size` by Pillow's bicubic, which rounds to bytes; what is longer is cut on both ends.
    """
    height, width = images_NxHxWx3.shape[1:3]
    tall, wide = (max(size, int(size * side / min(height, width))) for side in (height, width))
    top, left = (tall - size) // 2, (wide - size) // 2
    resized = [Image.fromarray(x).resize((wide, tall), Image.Resampling.BICUBIC) for x in images_NxHxWx3]
    cut = np.stack([np.asarray(x)[top : top + size, left : left + size] for x in resized])
    return (cut.astype(np.float32) / 255 - _MEAN) / _STD


def _normalised(x_NxP: np.ndarray) -> np.ndarray:
    x_NxP = x_NxP.astype(np.float64)
    return x_NxP / np.linalg.norm(x_NxP, axis=-1, keepdims=True)


@nnx.jit
def _embed_images(model: CLIPModel, pixels_BxSxSx3: jax.Array) -> jax.Array:
    return model.embed_images(pixels_BxSxSx3)


@nnx.jit
def _embed_text(model: CLIPModel, ids_BxL: jax.Array) -> jax.Array:
    return model.embed_text(ids_BxL.astype(jnp.int32))
