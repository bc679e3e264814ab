"""A training run whose averaged weights are judged on the way."""

import contextlib
import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
from tqdm import tqdm

from d2f_jax import datasets, prior, settings
from d2f_jax import step as steps
from d2f_jax.checkpoint import Checkpoints
from d2f_jax.pipeline import Pipeline
from d2f_jax.program import Config
from launch.study import cells
from launch.study.bench import Bench, Size
from launch.study.cells import Cell
from launch.study.exam import Question

Judge = Callable[[Pipeline, int], dict[str, Any]]
"""The pipeline with averaged weights, and the step, to what is told of it."""


def cell(
    name: str,
    size: Size,
    config: Config,
    questions: Sequence[Question],
    *,
    needs: tuple[str, ...] = (),
    leaves: bool = False,
    extra: dict[str, Any] | None = None,
    prepare: Callable[[Bench], None] = lambda bench: None,
) -> Cell:
    """A run of text-to-image: `{"curve": {step: answers}}`. Of the first seed pictures are kept as well.

    `prepare` makes what it trains on, and `extra` settings say how.
    """
    marks = reached(size, config)

    def compute(bench: Bench, folder: Path) -> cells.Result:
        prepare(bench)
        exam, shown = bench.exam(config.seed, size.pixels), config.seed == size.seeds[0]

        def judge(pipeline: Pipeline, mark: int) -> dict[str, Any]:
            strip = folder / cells.STRIPS / f"{mark:06}.png" if shown else None
            return exam.answers(pipeline, questions, mark, strip)

        return {"curve": curve(bench, config, folder, judge, name if leaves else "")}

    asked = [dataclasses.asdict(question) for question in questions]
    settings = {"config": deciding(config), "marks": marks, "images": size.images, "questions": asked}
    drawn = sum(len(q.marks or marks) * (sum(q.step_counts) + 1.5 * len(q.step_counts)) for q in questions)
    minutes = (0.006 * marks[-1] * size.batch_size + 0.004 * size.images * drawn) / 60
    return Cell(name=name, settings=settings | (extra or {}), compute=compute, minutes=minutes, needs=needs)


def reached(size: Size, config: Config) -> tuple[int, ...]:
    """The marks that a run comes to."""
    return tuple(mark for mark in size.marks if mark <= config.train.num_steps)


def deciding(config: Config) -> dict[str, Any]:
    """All of a config, flat, that a training run's result depends on."""
    flat = settings.flat(config.to_dict())
    return {key: value for key, value in flat.items() if not key.startswith(settings.FREE)}


def curve(bench: Bench, given: Config, folder: Path, judge: Judge, leave: str = "") -> dict[str, Any]:
    """What `judge` says at each mark, by step.

    The step is that of `d2f_jax.train`. A run that was interrupted goes on from the last mark that it has reached. The
    trained weights are left as those of the cell `leave`.
    """
    config = bench.placed(given)
    settings.check(config, bench.mesh)
    pipeline = prior.load(config)
    networks, frozen, trained = prior.split(pipeline, config)
    step = bench.step(config, networks, pipeline)
    data = datasets.open_data(config, folder, pipeline, datasets.open_given(config))
    state, frozen = prior.place(bench.mesh, trained, frozen, step.optimizer, jax.random.key(config.seed))
    del trained  # a part of the state now
    hollow = bench.sampling(pipeline)

    def averaged(state: steps.TrainState) -> Pipeline:
        params = steps.unet_params(state.ema, frozen.unet, config.lora.scale)
        return prior.filled(hollow, params, frozen, datasets.image_shape(config))

    marks = reached(bench.size, config)
    told: dict[str, Any] = cells.read(folder / "curve.json") or {}
    with Checkpoints(folder / "checkpoints", every=1, keep=1) as checkpoints:
        state, _ = checkpoints.restore(state)
        first, last = int(state.step), marks[-1]
        bar = tqdm(total=last, initial=first, desc="training", unit="step")
        with bar, contextlib.closing(data.train_batches(config, bench.mesh, first)) as batches:
            for n in range(first, last + 1):
                if n in marks:
                    if str(n) not in told:
                        told[str(n)] = judge(averaged(state), n)
                        cells.write(folder / "curve.json", told)
                    if n > first:
                        checkpoints.save(n, state, data.position())
                if n < last:
                    state, metrics = step.run(state, frozen, next(batches))
                    bar.update()
                    if n % 10 == 0:
                        bar.set_postfix(loss=f"{float(metrics['loss']):.4f}")
    if leave:
        averaged(state).save_pretrained(bench.weights(leave))
    return told
