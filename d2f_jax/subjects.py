"""What models are compared on: captions to draw, or pictures to tell the depth of; how both are shown and judged."""

import dataclasses
import functools
from collections.abc import Callable, Sequence

import numpy as np

from d2f_jax import datasets, metrics, settings
from d2f_jax.data.depth import measured, normalised
from d2f_jax.data.fit import picture_and_depth
from d2f_jax.data.sources import Example
from d2f_jax.errors import InputError
from d2f_jax.pipeline import Pipeline
from d2f_jax.program import Config
from d2f_jax.sampler import Sampler


@dataclasses.dataclass(frozen=True)
class Subject:
    """`notes` are a line on each of N examples, `given` [N, H, W, 3] what is shown beside the results, by its name.

    `draw(pipeline, sampler, rows, num_steps)` is the result for these examples, of N. `show` makes uint8 pictures of
    results, `judge` of all N of them the numbers of a cell of the table, whose corner says `header`; it is None where
    nothing can be judged.
    """

    notes: tuple[str, ...]
    draw: Callable[[Pipeline, Sampler, range, int], np.ndarray]
    show: Callable[[np.ndarray], np.ndarray] = lambda results: results
    given: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)
    header: str = ""
    judge: Callable[[np.ndarray], str] | None = None


def make(config: Config, examples: Sequence[Example], *, judged: bool) -> Subject:
    """Of the config's task. Raises InputError for examples of which nothing can be shown."""
    return (_depth if datasets.of_depth(config) else _captions)(config, examples, judged)


def check(config: Config, example: Example) -> None:
    """Raises InputError for a picture with depth of which nothing was measured, and so nothing can be judged."""
    if datasets.of_depth(config) and "depth" in example:
        _, depth = picture_and_depth(example, datasets.plain_fit(config))
        if depth is not None and not measured(depth).any():
            raise InputError("no pixel of its depth is measured; leave it out, or set config.data.on_damage=skip")


def draw_captions(
    config: Config, pipeline: Pipeline, sampler: Sampler, texts: list[str], first: int, num_steps: int
) -> np.ndarray:
    """Pictures uint8 [B, H, W, 3] as `config.eval` wants them, in every process; `first` is the first one's number."""
    height, width = datasets.image_shape(config)
    return pipeline(
        texts,
        num_steps=num_steps,
        **settings.guidance(config),
        seed=config.eval.seed,
        first=first,
        height=height,
        width=width,
        sampler=sampler,
    )


def _captions(config: Config, examples: Sequence[Example], judged: bool) -> Subject:
    prompts = [example["text"] for example in examples]

    def draw(pipeline: Pipeline, sampler: Sampler, rows: range, num_steps: int) -> np.ndarray:
        return draw_captions(config, pipeline, sampler, [prompts[i] for i in rows], rows[0], num_steps)

    notes = tuple(f"{i}. {prompt}" for i, prompt in enumerate(prompts, 1))
    if not (judged and datasets.scored(config)):
        return Subject(notes, draw)
    classifier, fit = metrics.load_classifier(), datasets.plain_fit(config)
    pictures = [picture_and_depth(example, fit)[0] for example in examples]
    real = metrics.feature_statistics(classifier, np.stack(pictures))

    def judge(images: np.ndarray) -> str:
        scores = metrics.shapes_scores(classifier, images, prompts=prompts, reference=real)
        return f"{scores.frechet_distance:.2f} / {scores.caption_accuracy:.0%}"

    return Subject(notes, draw, header="Fréchet distance / caption accuracy", judge=judge)


def _depth(config: Config, examples: Sequence[Example], judged: bool) -> Subject:
    wanted, fit = config.eval, datasets.plain_fit(config)
    if any("image" not in example for example in examples):
        raise InputError("config.data.sources hold prepared latents; give pictures with depth as config.eval.sources")
    pairs = [picture_and_depth(example, fit) for example in examples]
    images, depths = (np.stack(list(column)) for column in zip(*pairs, strict=True))

    def draw(pipeline: Pipeline, sampler: Sampler, rows: range, num_steps: int) -> np.ndarray:
        return pipeline.depth(
            images[rows.start : rows.stop],
            num_steps=num_steps,
            ensemble=wanted.depth.ensemble,
            resolution=max(images.shape[1:3]),
            seed=wanted.seed,
            first=rows.start,
            sampler=sampler,
        )

    def judge(results: np.ndarray) -> str:
        protocol, space = metrics.DEPTH_PROTOCOLS["all"], wanted.depth.space
        errors = [metrics.depth_errors(protocol, p, d, space=space) for p, d in zip(results, depths, strict=True)]
        means = functools.reduce(lambda found, e: found.add(e._asdict()), errors, metrics.Means()).means()
        return f"{means['abs_rel']:.4f} / {means['delta1']:.1%}"

    targets = np.stack([normalised(depth)[0] / 2 + 0.5 for depth in depths])
    return Subject(
        notes=(),
        draw=draw,
        show=shown,
        given={"picture": images, "measured": shown(targets)},
        header="AbsRel / δ1",
        judge=judge if judged else None,
    )


def shown(depth_NxHxW: np.ndarray) -> np.ndarray:
    """Depth from 0, white, to 1, black, as uint8 pictures [N, H, W, 3]."""
    grey = np.rint(255 * (1 - np.clip(depth_NxHxW, 0, 1))).astype(np.uint8)
    return np.repeat(grey[..., None], 3, axis=-1)
