"""From an `Example` to a row of a batch: resized, cropped, mirrored, its caption dropped, as the draws have it."""

import dataclasses
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
from PIL import Image

from d2f_jax.data.depth import normalised
from d2f_jax.data.sources import LATENTS, Example
from d2f_jax.errors import InputError

Row = dict[str, Any]
"""Arrays by the names that they have in the batch, and `text` unless there are text states."""
Spec = dict[str, tuple[tuple[int, ...], np.dtype]]
"""Shape and dtype of every array of a row."""
Resize = Literal["aspect", "fixed"]
Crop = Literal["center", "random"]
Box = tuple[float, float, float, float]  # left, top, right and bottom in pixels

DRAWS = 4  # numbers in [0, 1) that a row takes, whatever it does with them: no option changes another's choices
_DTYPES = {
    "latent_mean": np.float16,
    "latent_std": np.float16,
    "picture_mean": np.float16,
    "valid": np.bool_,
    "noise": np.float32,
    "text_states": np.float16,
}
_OF_LATENTS = (*LATENTS, "valid", "noise")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Fit:
    """How examples become rows; see `d2f_jax.data.loader.train_batches`."""

    image_shape: tuple[int, int]  # height and width in pixels
    depth: bool
    resize: Resize
    crop: Crop
    random_flip: bool
    caption_dropout: float
    null_text: np.ndarray | None


def make_row(example: Example, fit: Fit, draws: Sequence[float]) -> Row:
    """A latent, if there is one, is taken instead of the picture, and text states instead of the caption.

    With `fit.depth` there is depth too, as `normalised`, and no caption. Raises InputError for what cannot be used so.
    """
    flip, drop, across, down = draws
    prepared = [name for name in _OF_LATENTS if name in example]
    if fit.random_flip:
        _check_mirrored(prepared, example)
    row: Row = {name: np.asarray(example[name], _DTYPES[name]) for name in prepared}
    if "latent_mean" not in row:
        row["image"], depth = picture_and_depth(example, fit, across, down)
        if depth is not None:
            row["depth"], row["valid"] = normalised(depth)
    elif fit.depth != ("picture_mean" in row):
        lacking = "have no picture's beside them" if fit.depth else "are of depth"
        raise InputError(f"the latents {lacking}; prepare the data with the config's task")
    if fit.random_flip and flip < 0.5:
        row = {name: _mirrored(name, array, example) for name, array in row.items()}
    dropped = fit.depth or drop < fit.caption_dropout
    if "text_states" not in example and not (fit.depth and fit.null_text is not None):
        return row | {"text": "" if dropped else example["text"]}
    states = fit.null_text if dropped else example.get("text_states")
    return row | {"text_states": np.asarray(states, _DTYPES["text_states"])}


def _check_mirrored(prepared: Sequence[str], example: Example) -> None:
    """Latents are never mirrored themselves, nor pairs: what a sampler makes of mirrored noise is another picture."""
    if "noise" in prepared:
        raise InputError(
            "random_flip would mirror a pair, of which noise and picture no longer belong together; set "
            "config.data.random_flip=False"
        )
    if any(f"mirrored_{name}" not in example for name in LATENTS if name in prepared):
        raise InputError(
            "random_flip needs latents of the mirrored picture, which are not there; prepare the data again with "
            "config.data.random_flip=True, or set it to False"
        )


def _mirrored(name: str, array: np.ndarray, example: Example) -> np.ndarray:
    encoded = example.get(f"mirrored_{name}")
    return array[:, ::-1] if encoded is None else np.asarray(encoded, array.dtype)


def spec_of(row: Row) -> Spec:
    return {name: (value.shape, value.dtype) for name, value in row.items() if name != "text"}


def conform(row: Row, spec: Spec) -> Row:
    """The row, if it has the arrays of `spec`; raises `InputError` for others."""
    own = spec_of(row)
    for name in [*spec, *own]:
        if name not in own:
            raise InputError(f"there is no {name}, which other examples have; add it or leave the example out")
        if name not in spec:
            raise InputError(f"there is {name}, which other examples lack; remove it or leave the example out")
        if own[name] != spec[name]:
            raise InputError(f"{name} has the shape {own[name][0]}, in other examples {spec[name][0]}; make them equal")
    return row


def blank(spec: Spec) -> Row:
    """Zeros, and no caption, in the place of an example that cannot be read."""
    row: Row = {name: np.zeros(shape, dtype) for name, (shape, dtype) in spec.items()}
    return row if "text_states" in spec else row | {"text": ""}


def fit_image(image_HxWx3: np.ndarray, shape: tuple[int, int], box: Box | None = None) -> np.ndarray:
    """uint8 [*shape, 3]: what lies in `box`, the largest of this form in the middle if None (Lanczos, antialiased)."""
    (height, width), (tall, wide) = image_HxWx3.shape[:2], shape
    box = box or _largest(height, width, shape, 0.5, 0.5)
    if (height, width) == shape and box == (0, 0, width, height):
        return image_HxWx3
    return np.asarray(Image.fromarray(image_HxWx3).resize((wide, tall), Image.Resampling.LANCZOS, box))


def fit_depth(depth_HxW: np.ndarray, shape: tuple[int, int], box: Box) -> np.ndarray:
    """float32 [*shape]: of every pixel the nearest, as a mean over an edge would belong to neither side."""
    left, top, right, bottom = box
    down, across = ((np.arange(side) + 0.5) / side for side in shape)
    rows, columns = (top + down * (bottom - top)).astype(int), (left + across * (right - left)).astype(int)
    return np.asarray(depth_HxW[rows[:, None], columns], np.float32)


def picture_and_depth(
    example: Example, fit: Fit, across: float = 0.5, down: float = 0.5
) -> tuple[np.ndarray, np.ndarray | None]:
    """The picture, uint8 [H, W, 3], and with `fit.depth` its depth, float32 [H, W], cut alike to `fit.image_shape`.

    Raises InputError where they are not there.
    """
    if "image" not in example:
        raise InputError("there is neither a picture nor a latent; add one or leave the example out")
    image = example["image"]
    height, width = image.shape[:2]
    if fit.resize == "fixed":
        box = (0.0, 0.0, float(width), float(height))
    else:
        places = (across, down) if fit.crop == "random" else (0.5, 0.5)
        box = _largest(height, width, fit.image_shape, *places)
    fitted = fit_image(image, fit.image_shape, box)
    if not fit.depth:
        return fitted, None
    if "depth" not in example:
        raise InputError("there is no depth; add it, or leave the example out")
    depth = example["depth"]
    if depth.shape != (height, width):
        raise InputError(f"the depth has the shape {depth.shape}, its picture {(height, width)}; make them equal")
    return fitted, fit_depth(depth, fit.image_shape, box)


def _largest(height: int, width: int, shape: tuple[int, int], across: float, down: float) -> Box:
    """The largest rectangle of the form of `shape`, at these fractions of the room that it has."""
    tall, wide = shape
    if height * wide <= width * tall:
        box_height, box_width = height, height * wide / tall
    else:
        box_height, box_width = width * tall / wide, width
    left, top = (width - box_width) * across, (height - box_height) * down
    return left, top, left + box_width, top + box_height
