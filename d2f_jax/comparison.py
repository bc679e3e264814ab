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
    """`shown[row][column]` are `subject`'s first results, `told` its verdict on all; a column for each step count."""

    subject: Subject
    names: tuple[str, ...]
    step_counts: tuple[int, ...]
    shown: list[list[np.ndarray]]
    told: list[list[str]]


def contenders(prior: Pipeline, finetuned: Pipeline, objective: ObjectiveName, sampler: Sampler) -> list[Contender]:
    """What finetuning changed, and what alignment alone did.

    With complete, exact alignment and Euler steps that begin at the last timestep's flow time the second and the third
    row are the same pictures. Neither depth, which it cannot tell, nor a flow that it records and that is no diffusion,
    is drawn of the prior by DDIM.
    """
    came = dataclasses.replace(prior, alignment=recorded_alignment(prior.scheduler_config), _programs={})
    ddim = sampler if sampler.name == "ddim" else Sampler("ddim")
    ddim_on_flow_grid = Sampler("ddim_on_flow_grid", shift=sampler.shift)
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
    shown: int,
    after_batch: Callable[[], None] = lambda: None,
) -> Comparison:
    """The results of `count` examples for every row and number of steps, from the same noise.

    The first `shown` of them are kept, and of the rest what is judged.
    """
    kept: list[list[np.ndarray]] = []
    told: list[list[str]] = []
    work = len(rows) * count * sum(step_counts)
    with tqdm(total=work, desc="sampling", unit="step", disable=not distributed.is_main()) as bar:
        for row in rows:
            kept.append([])
            told.append([])
            for num_steps in step_counts:
                batches = []
                for i in range(0, count, batch_size):
                    chunk = range(i, min(i + batch_size, count))
                    batches.append(subject.draw(row.pipeline, row.sampler, chunk, num_steps))
                    bar.update(len(chunk) * num_steps)
                    after_batch()
                results = np.concatenate(batches)
                kept[-1].append(results[:shown].copy())  # a view would keep all of them
                if subject.judge is not None:  # in every process: none has to wait, in a collective, for another's
                    told[-1].append(subject.judge(results))
    return Comparison(subject, tuple(row.name for row in rows), tuple(step_counts), kept, told)


def picture(comparison: Comparison) -> Image.Image:
    """What is shown of every cell, in a labelled grid above what is noted on it."""
    subject, count = comparison.subject, len(comparison.shown[0][0])
    columns = max(1, round(count**0.5))
    given = [report.tile(images[:count], columns) for images in subject.given.values()]
    cells = [given + [report.tile(subject.show(cell), columns) for cell in row] for row in comparison.shown]
    labels = [*subject.given, *map(report.steps, comparison.step_counts)]
    zoom = 2 if max(comparison.shown[0][0].shape[1:3]) <= 64 else 1
    return report.labelled_grid(cells, comparison.names, labels, notes=subject.notes[:count], zoom=zoom)


def table(comparison: Comparison) -> str:
    """What the subject judges of each row and number of steps, in Markdown; empty if it judges nothing."""
    rows = [[" ".join(name.split()), *told] for name, told in zip(comparison.names, comparison.told, strict=True)]
    return report.markdown_table([comparison.subject.header, *map(report.steps, comparison.step_counts)], rows)
