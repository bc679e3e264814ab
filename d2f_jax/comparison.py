"""Samplers side by side on the same examples and noise: scores and pictures for each number of steps."""

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np
from PIL import Image
from tqdm import tqdm

from d2f_jax import distributed, report
from d2f_jax.export import recorded_alignment
from d2f_jax.objectives import Name as ObjectiveName
from d2f_jax.pipeline import Pipeline
from d2f_jax.sampler import Sampler
from d2f_jax.subjects import Subject


@dataclasses.dataclass(frozen=True)
class Contender:
    """One row of the comparison."""

    name: str
    pipeline: Pipeline
    sampler: Sampler


@dataclasses.dataclass(frozen=True)
class Comparison:
    """`results[row][column]` are `subject`'s for all of its examples, a column for each of `step_counts`."""

    subject: Subject
    names: tuple[str, ...]
    step_counts: tuple[int, ...]
    results: list[list[np.ndarray]]


def contenders(prior: Pipeline, finetuned: Pipeline, objective: ObjectiveName, sampler: Sampler) -> list[Contender]:
    """What finetuning changed, and what alignment alone did.

    With complete alignment and Euler steps the second and the third row are the same pictures. Neither depth, which it
    cannot tell, nor a flow that it records and that is no diffusion, is drawn of the prior by DDIM.
    """
    came = dataclasses.replace(prior, alignment=recorded_alignment(prior.scheduler_config), _programs={})
    ddim, ddim_on_flow_grid = Sampler("ddim"), Sampler("ddim_on_flow_grid", shift=sampler.shift)
    rows = [
        Contender("prior, DDIM", came, ddim),
        Contender("prior, DDIM\non the flow grid", came, ddim_on_flow_grid),
        Contender(f"{'aligned' if prior.alignment.complete else 'as a flow'},\nnot finetuned", prior, sampler),
        Contender("finetuned", finetuned, sampler),
    ]
    last = [Contender("finetuned, DDIM", finetuned, ddim)] * (objective == "diffusion")
    return (rows[2:] if prior.task.of_pictures or not came.alignment.complete else rows) + last


def compare(
    rows: Sequence[Contender],
    subject: Subject,
    count: int,
    *,
    step_counts: Sequence[int],
    batch_size: int,
    after_batch: Callable[[], None] = lambda: None,
) -> Comparison:
    """The results of `count` examples for every row and number of steps, from the same noise."""
    results: list[list[np.ndarray]] = []
    work = len(rows) * count * sum(step_counts)
    with tqdm(total=work, desc="sampling", unit="step", disable=not distributed.is_main()) as bar:
        for row in rows:
            results.append([])
            for num_steps in step_counts:
                batches = []
                for i in range(0, count, batch_size):
                    chunk = range(i, min(i + batch_size, count))
                    batches.append(subject.draw(row.pipeline, row.sampler, chunk, num_steps))
                    bar.update(len(chunk) * num_steps)
                    after_batch()
                results[-1].append(np.concatenate(batches))
    return Comparison(subject, tuple(row.name for row in rows), tuple(step_counts), results)


def picture(comparison: Comparison, count: int) -> Image.Image:
    """The first `count` results of every cell, in a labelled grid above what is noted on them."""
    subject, columns = comparison.subject, max(1, round(count**0.5))
    given = [report.tile(images[:count], columns) for images in subject.given.values()]
    cells = [given + [report.tile(subject.show(cell[:count]), columns) for cell in row] for row in comparison.results]
    labels = [*subject.given, *_labels(comparison)]
    zoom = 2 if max(comparison.results[0][0].shape[1:3]) <= 64 else 1
    return report.labelled_grid(cells, comparison.names, labels, notes=subject.notes[:count], zoom=zoom)


def table(comparison: Comparison) -> str:
    """What the subject judges of each row and number of steps, in Markdown."""
    judge = comparison.subject.judge
    assert judge is not None, "what cannot be judged has no table"
    rows = [
        [" ".join(name.split()), *map(judge, cells)]
        for name, cells in zip(comparison.names, comparison.results, strict=True)
    ]
    return report.markdown_table([comparison.subject.header, *_labels(comparison)], rows)


def _labels(comparison: Comparison) -> list[str]:
    return [f"{n} step{'s' if n > 1 else ''}" for n in comparison.step_counts]
