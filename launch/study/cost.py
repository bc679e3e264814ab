"""What a step costs with each objective: seconds measured in turn, operations as traced, and memory by XLA."""

import contextlib
import dataclasses
import itertools
import time
from pathlib import Path

import jax
import numpy as np
from tqdm import tqdm

from d2f_jax import datasets, flops, prior, report
from launch.study import adaptation, numbers, training
from launch.study.adaptation import LABELS
from launch.study.bench import Bench, Size
from launch.study.cells import Cell, Result
from launch.study.numbers import Claim, Known, Section

OBJECTIVES = ("diffusion", "flow_matching", "diff2flow")
LITTLE = 0.01
ROUNDS = 3000  # of one step with each objective


def cell(size: Size) -> Cell:
    """The machine should do nothing else meanwhile; ratios are of steps of one round, so that its moods fall out."""
    configs = {objective: adaptation.run(size, objective, size.seeds[0], size.steps) for objective in OBJECTIVES}

    def compute(bench: Bench, _folder: Path) -> Result:
        runs = {objective: compiled(bench, config) for objective, config in configs.items()}
        seconds = {objective: [] for objective in OBJECTIVES}
        for i in tqdm(range(ROUNDS), desc="steps in turn", unit="round"):
            for objective in OBJECTIVES[i % 3 :] + OBJECTIVES[: i % 3]:  # none is always the first
                began = time.perf_counter()
                runs[objective].step()
                seconds[objective].append(round(time.perf_counter() - began, 6))
        return {
            objective: {"seconds": seconds[objective], "gflop": run.gflop, "temporary_mb": run.temporary_mb}
            for objective, run in runs.items()
        }

    settings = {
        "configs": {o: training.deciding(c) for o, c in configs.items()},
        "rounds": ROUNDS,
        "seconds": "of every step",  # what its median is known to cannot be told of a summary
    }
    return Cell(name="cost", settings=settings, compute=compute, minutes=30.0)


@dataclasses.dataclass
class Compiled:
    """A train step with a batch and a state of its own."""

    run: jax.stages.Compiled
    gflop: float
    temporary_mb: float
    state: object
    frozen: object
    batch: object

    def step(self) -> None:
        self.state, metrics = self.run(self.state, self.frozen, self.batch)
        jax.block_until_ready((self.state, metrics))


def compiled(bench: Bench, given) -> Compiled:
    config = bench.placed(given)
    pipeline = prior.load(config)
    networks, frozen, trained = prior.split(pipeline, config)
    step = bench.step(config, networks, pipeline)
    data = datasets.open_data(config, bench.workdir, pipeline, datasets.open_given(config))
    state, frozen = prior.place(bench.mesh, trained, frozen, step.optimizer, jax.random.key(config.seed))
    with contextlib.closing(data.train_batches(config, bench.mesh, 0)) as batches:
        batch = next(itertools.islice(batches, 1))
    run = step.run.lower(state, frozen, batch).compile()
    counted, memory = flops.count(step.run, state, frozen, batch), run.memory_analysis()
    made = Compiled(run, counted / 1e9, memory.temp_size_in_bytes / 1e6, state, frozen, batch)
    made.step()
    return made


def section(known: Known, _pictures: Path) -> Section:
    record = known.records.get("cost")
    result = record["result"] if record else {}
    rows = []
    for objective, told in result.items():
        ratios = _ratios(result, objective)
        low, high = np.quantile(ratios, (0.25, 0.75))
        rows.append(
            [
                LABELS[objective],
                f"{1000 * np.median(told['seconds']):.0f}",
                f"{np.median(ratios):.3f} ({low:.3f} to {high:.3f})",
                "{:.3f} to {:.3f}".format(*numbers.median_interval(ratios)),
                f"{told['gflop']:.3f}",
                f"{told['temporary_mb']:.1f}",
            ]
        )
    header = ["", "ms a step", "ratio to diffusion (quartiles)", "its median, at 95%", "GFLOP", "temporary MB"]
    text = f"""
A step of {known.size.batch_size} latents of tiny-sd, the three objectives in turn, {ROUNDS} rounds; the ratio is
that of a round, and what its median is known to is told by its order statistics. A claim of time is judged by all of
that interval. Operations are counted before XLA optimises, temporary memory is that of the compiled step.

{report.markdown_table(header, rows)}"""
    return Section("Cost", text, [_claim(result, objective) for objective in ("diff2flow", "flow_matching")])


def _ratios(result: Result, objective: str) -> list[float]:
    """Seconds over those of diffusion, round by round."""
    return (np.array(result[objective]["seconds"]) / result["diffusion"]["seconds"]).tolist()


def _claim(result: Result, objective: str) -> Claim:
    label = LABELS[objective]
    text = f"{label[0].upper()}{label[1:]} needs no more than diffusion: less than 1% of time, operations and memory"
    if objective not in result:
        return Claim(text, [], "-", by_seed=False)
    ratios = _ratios(result, objective)
    low, high = (bound - 1 for bound in numbers.median_interval(ratios))
    more = {what: result[objective][what] / result["diffusion"][what] - 1 for what in ("gflop", "temporary_mb")}
    told = (
        f"time {np.median(ratios) - 1:+.1%} ({low:+.1%} to {high:+.1%}), operations {more['gflop']:+.3%}, "
        f"temporary memory {more['temporary_mb']:+.2%}"
    )
    counted = max(more.values()) < LITTLE
    decided = high < LITTLE or low >= LITTLE or not counted
    holds = counted and high < LITTLE if decided else None
    return Claim(text, [holds], told, _why(label, ratios), by_seed=False)


def _why(label: str, ratios: list[float]) -> str:
    spread = np.subtract(*np.quantile(ratios, (0.75, 0.25)))
    return f"""
### What {label} costs in time

Half of the ratios lie within {spread:.1%}, which is the machine's doing and not that of the operations counted above.
{len(ratios)} rounds tell their median to the interval above and no better, and only if nothing else ran meanwhile.
"""
