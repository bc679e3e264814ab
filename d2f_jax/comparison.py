"""Samplers side by side on the same prompts and noise: scores and pictures for each number of steps."""

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np
from PIL import Image
from tqdm import tqdm

from d2f_jax import distributed, report
from d2f_jax.metrics import Scores
from d2f_jax.objectives import Name as ObjectiveName
from d2f_jax.pipeline import Pipeline
from d2f_jax.sampler import Sampler


@dataclasses.dataclass(frozen=True)
class Contender:
    """One row of the comparison."""

    name: str
    pipeline: Pipeline
    sampler: Sampler


@dataclasses.dataclass(frozen=True)
class Comparison:
    """`images[row][column]` is uint8 [N, H, W, 3] of the N `prompts`, a column for each of `step_counts`.

    `scores[row][column]` likewise.
    """

    prompts: tuple[str, ...]
    names: tuple[str, ...]
    step_counts: tuple[int, ...]
    images: list[list[np.ndarray]]
    scores: list[list[Scores]] | None


def contenders(prior: Pipeline, finetuned: Pipeline, objective: ObjectiveName, sampler: Sampler) -> list[Contender]:
    """What finetuning changed, and what alignment alone did.

    With complete alignment and Euler steps the second and the third row are the same pictures.
    """
    ddim, ddim_on_flow_grid = Sampler("ddim"), Sampler("ddim_on_flow_grid", shift=sampler.shift)
    rows = [
        Contender("prior, DDIM", prior, ddim),
        Contender("prior, DDIM\non the flow grid", prior, ddim_on_flow_grid),
        Contender(f"{'aligned' if prior.alignment.complete else 'as a flow'},\nnot finetuned", prior, sampler),
        Contender("finetuned", finetuned, sampler),
    ]
    return rows + [Contender("finetuned, DDIM", finetuned, ddim)] * (objective == "diffusion")


def compare(
    rows: Sequence[Contender],
    prompts: Sequence[str],
    *,
    step_counts: Sequence[int],
    batch_size: int,
    guidance_scale: float,
    seed: int,
    image_size: int,
    score: Callable[[np.ndarray], Scores] | None,
    after_batch: Callable[[], None] = lambda: None,
) -> Comparison:
    """Samples `prompts` with every row and number of steps, from the same noise; `score` judges each set of images."""
    work = len(rows) * len(prompts) * sum(step_counts)
    images: list[list[np.ndarray]] = []
    with tqdm(total=work, desc="sampling", unit="step", disable=not distributed.is_main()) as bar:
        for row in rows:
            images.append([])
            for num_steps in step_counts:
                batches = []
                for i in range(0, len(prompts), batch_size):
                    chunk = list(prompts[i : i + batch_size])
                    batches.append(
                        row.pipeline(
                            chunk,
                            num_steps=num_steps,
                            guidance_scale=guidance_scale,
                            seed=seed,
                            first=i,
                            height=image_size,
                            width=image_size,
                            sampler=row.sampler,
                        )
                    )
                    bar.update(len(chunk) * num_steps)
                    after_batch()
                images[-1].append(np.concatenate(batches))
    scores = None if score is None else [[score(cell) for cell in row] for row in images]
    return Comparison(tuple(prompts), tuple(row.name for row in rows), tuple(step_counts), images, scores)


def picture(comparison: Comparison, count: int, zoom: int) -> Image.Image:
    """The first `count` samples of every cell, in a labelled grid above their prompts."""
    columns = max(1, round(count**0.5))
    cells = [[report.tile(cell[:count], columns) for cell in row] for row in comparison.images]
    prompts = [f"{i}. {prompt}" for i, prompt in enumerate(comparison.prompts[:count], 1)]
    return report.labelled_grid(cells, comparison.names, _labels(comparison), notes=prompts, zoom=zoom)


def zoom(comparison: Comparison) -> int:
    """How much to enlarge pictures that are small to look at."""
    return 2 if comparison.images[0][0].shape[1] <= 64 else 1


def table(comparison: Comparison) -> str:
    """Fréchet distance / caption accuracy for each row and number of steps, in Markdown."""
    assert comparison.scores is not None, "a comparison without scores has no table"
    header = ["Fréchet distance / caption accuracy", *_labels(comparison)]
    rows = [
        [" ".join(name.split()), *(f"{s.frechet_distance:.2f} / {s.caption_accuracy:.0%}" for s in scores)]
        for name, scores in zip(comparison.names, comparison.scores, strict=True)
    ]
    return report.markdown_table(header, rows)


def _labels(comparison: Comparison) -> list[str]:
    return [f"{n} step{'s' if n > 1 else ''}" for n in comparison.step_counts]
