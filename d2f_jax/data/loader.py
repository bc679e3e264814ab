"""From a `Source` to batches, through Grain: shuffled, endless, reproducible, and resumable at any step.

The batches are a function of `(source, seed)` and the step: neither the number of worker processes nor the
number of machines changes what the global batch holds.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import TypedDict

import grain
import numpy as np
from absl import flags
from PIL import Image

from d2f_jax.data.sources import Example, Source
from d2f_jax.errors import InputError

Tokenize = Callable[[Sequence[str]], np.ndarray]  # captions -> int32 [B, L]; pickles if there are workers


class Batch(TypedDict):
    """`image` float32 [B, H, W, 3] in [-1, 1]; `input_ids` int32 [B, L]."""

    image: np.ndarray
    input_ids: np.ndarray


def train_batches(
    source: Source,
    tokenize: Tokenize,
    *,
    batch_size: int,
    image_size: int,
    seed: int,
    random_flip: bool = False,
    caption_dropout: float = 0.0,
    num_workers: int = 0,
    process_index: int = 0,
    process_count: int = 1,
) -> grain.DatasetIterator[Batch]:
    """Endless batches, in a new order every epoch.

    `batch_size` is the global one; of it the process `process_index` gets its share, `batch_size / process_count`
    rows. `random_flip` mirrors half of the pictures: leave it off where captions say left or right.
    `caption_dropout` is the probability of an empty caption, which classifier-free guidance needs. The iterator's
    state saves and restores through Orbax with `grain.checkpoint` as long as `num_workers` stays the same;
    `close()` the iterator if it has workers.
    """
    if len(source) == 0:
        raise InputError("the data set is empty; give at least one picture")
    if batch_size < 1 or batch_size % process_count:
        raise InputError(
            f"batch_size={batch_size} does not divide over {process_count} processes; use a multiple of {process_count}"
        )
    augment = _Augment(image_size, random_flip, caption_dropout)
    rows = grain.MapDataset.source(source).seed(seed).shuffle().repeat(_ENDLESS // len(source)).random_map(augment)
    # Sliced last: a row depends on its place in the global batch, not on the process that holds it.
    share = rows[process_index::process_count].batch(batch_size // process_count, batch_fn=_Collate(tokenize))
    batches = share.to_iter_dataset(_READ_AHEAD)
    if num_workers:
        _parse_flags()
        batches = batches.mp_prefetch(grain.MultiprocessingOptions(num_workers=num_workers))
    return iter(batches)


def fit_image(image_HxWx3: np.ndarray, size: int) -> np.ndarray:
    """uint8 [size, size, 3]: the shorter side resized to `size` (Lanczos, antialiased), the centre cut out."""
    height, width = image_HxWx3.shape[:2]
    if height == width == size:
        return image_HxWx3
    side = min(height, width)
    left, top = (width - side) / 2, (height - side) / 2
    picture = Image.fromarray(image_HxWx3)
    box = (left, top, left + side, top + side)
    return np.asarray(picture.resize((size, size), Image.Resampling.LANCZOS, box))


_ENDLESS = 2**40  # rows; with Grain's own endless repeat, batches of one overflow
_READ_AHEAD = grain.ReadOptions(num_threads=2, prefetch_buffer_size=4)  # batches; Grain's own 500 fill the memory


@dataclasses.dataclass(frozen=True)
class _Augment(grain.transforms.RandomMap):
    image_size: int
    random_flip: bool
    caption_dropout: float

    def random_map(self, element: Example, rng: np.random.Generator) -> Example:
        flip, drop = rng.random(2)  # always both, so that one knob does not change the other's choices
        image = fit_image(element["image"], self.image_size)
        if self.random_flip and flip < 0.5:
            image = image[:, ::-1]
        return {"image": image, "text": "" if drop < self.caption_dropout else element["text"]}


@dataclasses.dataclass(frozen=True)
class _Collate:
    tokenize: Tokenize

    def __call__(self, examples: Sequence[Example]) -> Batch:
        images = np.stack([example["image"] for example in examples])
        ids = np.asarray(self.tokenize([example["text"] for example in examples]), np.int32)
        return {"image": images.astype(np.float32) / 127.5 - 1, "input_ids": ids}


def _parse_flags() -> None:
    """Grain's workers inherit absl's flags and fail where no program has parsed any, as in a notebook."""
    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()
