"""From `Source`s to batches, through Grain: shuffled, endless, reproducible, and beginning at any batch.

A row is a function of the sources, their weights, the seed, and its place: the number of its batch and of the row in
it. Neither worker processes, nor machines, nor where the run was interrupted change it; the number of the next batch is
all that there is to save.
"""

import dataclasses
import itertools
import math
import signal
from collections.abc import Callable, Sequence
from typing import Literal, NotRequired, TypedDict, cast, get_args

import grain
import numpy as np
from absl import flags

from d2f_jax.data.fit import DRAWS, Crop, Fit, Resize, Row, Spec, blank, conform, make_row, spec_of
from d2f_jax.data.order import ChosenRows, shuffled
from d2f_jax.data.sources import Example, Source
from d2f_jax.errors import InputError

Tokenize = Callable[[Sequence[str]], np.ndarray]  # captions -> int32 [B, L]; pickles if there are workers
OnDamage = Literal["stop", "skip"]


class Batch(TypedDict):
    """Of pictures `image` uint8 [B, H, W, 3]; of prepared examples `latent_mean` and perhaps `latent_std` float16
    [B, h, w, C]. Of captions `input_ids` int32 [B, L], or `text_states` float16 [B, L, D]. Perhaps `noise` float32
    [B, h, w, C]. For depth also `depth` float32 [B, H, W] from -1 to 1, or of prepared examples `picture_mean` float16
    [B, h, w, C]; and `valid` bool [B, H, W] or [B, h, w]. `weight` float32 [B] is 1, and 0 for a row of zeros in the
    place of an example that could not be read, of which `damaged` (for the host) tells the reason.
    """

    image: NotRequired[np.ndarray]
    depth: NotRequired[np.ndarray]
    valid: NotRequired[np.ndarray]
    latent_mean: NotRequired[np.ndarray]
    latent_std: NotRequired[np.ndarray]
    picture_mean: NotRequired[np.ndarray]
    noise: NotRequired[np.ndarray]
    input_ids: NotRequired[np.ndarray]
    text_states: NotRequired[np.ndarray]
    weight: np.ndarray
    damaged: tuple[str, ...]


def train_batches(
    sources: Sequence[Source],
    tokenize: Tokenize,
    *,
    batch_size: int,
    image_shape: tuple[int, int],
    depth: bool = False,
    latent_shape: tuple[int, int] | None = None,
    seed: int,
    weights: Sequence[float] = (),
    rows: Sequence[int] | None = None,
    first_batch: int = 0,
    resize: Resize = "aspect",
    crop: Crop = "center",
    random_flip: bool = False,
    caption_dropout: float = 0.0,
    null_text: np.ndarray | None = None,
    on_damage: OnDamage = "stop",
    num_workers: int = 0,
    read_ahead: int = 4,
) -> grain.DatasetIterator[Batch]:
    """Endless batches that begin with batch `first_batch`; `close()` the iterator at the end.

    `batch_size` is the global one, of which this process gets the `rows`, numbers that increase; None means all.
    Of several sources every one is endless, in a new order every epoch, and has its share by `weights` (equal if
    empty). All examples have the same arrays. With `depth` they have depth, and no caption.

    Pictures become `image_shape`, height and width. `resize="aspect"` cuts them to its form, around the centre or
    anywhere for `crop="random"`; `"fixed"` squeezes them whole. Latents and noise must be of `latent_shape`, that of
    the VAE for `image_shape` (None leaves it unchecked). `random_flip` mirrors half of the pictures, with their depth,
    or takes latents of the mirrored picture, and refuses examples that have none, or noise: leave it off where captions
    say left or right.
    `caption_dropout` is the probability of an empty caption, which classifier-free guidance needs; for text states
    that is `null_text` [L, D].

    An example that cannot be read, or does not fit the others, raises `InputError` that names it with
    `on_damage="stop"`; with `"skip"` its row stays in the batch with weight 0. `read_ahead` batches are kept ready, by
    every one of `num_workers` processes if there are any. What these make comes through `/dev/shm`, which a container
    may have too little of.
    """
    rows = range(batch_size) if rows is None else rows
    _check_sources(sources, weights)
    _check_rows(batch_size, rows)
    _check_at_least(0, first_batch=first_batch, seed=seed, num_workers=num_workers)
    _check_at_least(1, height=image_shape[0], width=image_shape[1], read_ahead=read_ahead)
    for name, value, kind in [("resize", resize, Resize), ("crop", crop, Crop), ("on_damage", on_damage, OnDamage)]:
        if value not in get_args(kind):
            raise InputError(f"{name}={value!r} is none of {', '.join(get_args(kind))}")
    if not 0 <= caption_dropout <= 1:
        raise InputError(f"caption_dropout={caption_dropout:g} is no probability from 0 to 1")
    fit = Fit(
        image_shape=image_shape,
        depth=depth,
        resize=resize,
        crop=crop,
        random_flip=random_flip,
        caption_dropout=caption_dropout,
        null_text=null_text,
    )
    guarded = [_Guarded(source, f" of source {k}" if len(sources) > 1 else "") for k, source in enumerate(sources)]
    spec = _common_spec([_spec(source, fit, on_damage) for source in guarded])
    _check_fit(fit, spec, latent_shape)

    *shuffle_seeds, row_seed = (int(s) for s in np.random.SeedSequence(seed).generate_state(len(sources) + 1))
    endless = [
        shuffled(grain.MapDataset.source(source), shuffle_seed).repeat(_ENDLESS // len(source))
        for source, shuffle_seed in zip(guarded, shuffle_seeds, strict=True)
    ]
    mixed = endless[0] if len(endless) == 1 else grain.MapDataset.mix(endless, weights or None)
    # The rows are chosen last: randomness follows a row's place in all batches, not the process that holds it.
    made = mixed.random_map(_MakeRow(fit, spec, on_damage), seed=row_seed)
    chosen = ChosenRows(made, batch_size, tuple(rows))
    batches = chosen.batch(len(rows), batch_fn=_Collate(tokenize))[first_batch:]
    ahead = batches.to_iter_dataset(grain.ReadOptions(num_threads=min(2, read_ahead), prefetch_buffer_size=read_ahead))
    if num_workers:
        _parse_flags()
        ahead = ahead.mp_prefetch(grain.MultiprocessingOptions(num_workers=num_workers), _outlive_warnings)
    return iter(ahead)


_ENDLESS = 2**40  # rows; with Grain's own endless repeat, batches of one overflow
_PROBES = 8  # examples tried for a readable one whose arrays set the batch's


@dataclasses.dataclass(frozen=True)
class _Guarded:
    """A source that hands out what was raised, with the example's name: what becomes of it is decided later."""

    source: Source
    suffix: str

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> tuple[str, Example | Exception]:
        name = f"example {index}{self.suffix}"
        try:
            return name, self.source[index]
        except (InputError, OSError) as error:
            return name, error


@dataclasses.dataclass(frozen=True)
class _MakeRow(grain.transforms.RandomMap):
    fit: Fit
    spec: Spec
    on_damage: OnDamage

    def random_map(self, element: tuple[str, Example | Exception], rng: np.random.Generator) -> tuple[Row, str]:
        """The row, and if it is blank the reason."""
        name, read = element
        try:
            return conform(_row(read, self.fit, rng.random(DRAWS).tolist()), self.spec), ""
        except (InputError, OSError) as error:
            if self.on_damage == "stop":
                raise InputError(f"{name}: {error}") from error
            return blank(self.spec), f"{name}: {error}"


def _row(read: Example | Exception, fit: Fit, draws: Sequence[float]) -> Row:
    if isinstance(read, Exception):
        raise read
    return make_row(read, fit, draws)


@dataclasses.dataclass(frozen=True)
class _Collate:
    tokenize: Tokenize

    def __call__(self, elements: Sequence[tuple[Row, str]]) -> Batch:
        rows, reasons = [row for row, _ in elements], [reason for _, reason in elements]
        batch = {name: np.stack([row[name] for row in rows]) for name in spec_of(rows[0])}
        if "text" in rows[0]:
            batch["input_ids"] = np.asarray(self.tokenize([row["text"] for row in rows]), np.int32)
        batch["weight"] = np.array([not reason for reason in reasons], np.float32)
        return cast(Batch, batch | {"damaged": tuple(reason for reason in reasons if reason)})


def _spec(source: _Guarded, fit: Fit, on_damage: OnDamage) -> Spec:
    """The arrays that the first example gives; with "skip" the first that can be read."""
    probes = 1 if on_damage == "stop" else min(_PROBES, len(source))
    fit, reasons = dataclasses.replace(fit, caption_dropout=0.0), []
    for probe in range(probes):
        name, read = source[probe * len(source) // probes]
        try:
            return spec_of(_row(read, fit, [0.5] * DRAWS))
        except (InputError, OSError) as error:
            reasons.append(f"{name}: {error}")
    if on_damage == "stop":
        raise InputError(reasons[0])
    raise InputError(f"none of {probes} examples{source.suffix} can be used; the first is {reasons[0]}")


def _common_spec(specs: Sequence[Spec]) -> Spec:
    for k, spec in enumerate(specs):
        if spec != specs[0]:
            raise InputError(
                f"source {k} gives {_told(spec)}, source 0 {_told(specs[0])}; sources that are mixed must be alike"
            )
    return specs[0]


def _told(spec: Spec) -> str:
    return ", ".join(f"{name} {shape}" for name, (shape, _) in sorted(spec.items()))


def _check_sources(sources: Sequence[Source], weights: Sequence[float]) -> None:
    if not sources or not all(len(source) for source in sources):
        raise InputError("the data set is empty; give at least one picture")
    if weights and len(weights) != len(sources):
        raise InputError(f"{len(weights)} weights for {len(sources)} sources; give one for each, or none")
    if not all(0 < weight < math.inf for weight in weights):
        raise InputError(f"weights={tuple(weights)} must be positive; leave out a source that is not wanted")


def _check_rows(batch_size: int, rows: Sequence[int]) -> None:
    if batch_size < 1:
        raise InputError(f"batch_size={batch_size} must be at least 1")
    bounds = [-1, *rows, batch_size]
    if not len(rows) or not all(low < high for low, high in itertools.pairwise(bounds)):
        raise InputError(f"rows={list(rows)} must be increasing numbers from 0 to {batch_size - 1}, at least one")


def _check_at_least(least: int, **numbers: int) -> None:
    for name, value in numbers.items():
        if value < least:
            raise InputError(f"{name}={value} must be at least {least}")


def _check_fit(fit: Fit, spec: Spec, latent_shape: tuple[int, int] | None) -> None:
    shapes = {name: spec[name][0] for name in ("latent_mean", "latent_std", "picture_mean", "noise") if name in spec}
    for name, shape in shapes.items():
        if latent_shape is not None and shape[:2] != latent_shape:
            pixels, wanted = (" x ".join(map(str, sides)) for sides in (fit.image_shape, latent_shape))
            raise InputError(
                f"{name} has the shape {shape}, but pictures of {pixels} pixels make latents of {wanted}; "
                "change image_size and image_width, or prepare the data for them"
            )
    if len(set(shapes.values())) > 1:
        raise InputError(f"{_told({name: spec[name] for name in shapes})} must have one shape; write the data anew")
    if (fit.caption_dropout or fit.depth) and "text_states" in spec:
        shape, null_shape = spec["text_states"][0], None if fit.null_text is None else fit.null_text.shape
        if null_shape != shape:
            raise InputError(f"null_text has the shape {null_shape}, caption_dropout needs that of text states {shape}")
    if fit.crop == "random" and shapes:
        of_whole = next(iter(shapes))
        raise InputError(f"crop='random' does not go with {of_whole}, which is of the whole picture; use crop='center'")


def _outlive_warnings(_worker: int, _count: int) -> None:
    """Schedulers warn every process of a job, but batches are needed until the run has saved."""
    for warning in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(warning, signal.SIG_IGN)


def _parse_flags() -> None:
    """Grain's workers inherit absl's flags and fail where no program has parsed any, as in a notebook."""
    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()
