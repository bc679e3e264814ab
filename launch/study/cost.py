"""What a step costs with each objective: seconds measured in turn, operations and memory as XLA counts them."""

import contextlib
import dataclasses
import itertools
import time
from pathlib import Path

import jax
import numpy as np
from tqdm import tqdm

from d2f_jax import chips, datasets, prior, report
from launch.study import adaptation, training
from launch.study.adaptation import LABELS
from launch.study.bench import Bench, Size
from launch.study.cells import Cell, Result
from launch.study.numbers import Claim, Known, Section

OBJECTIVES = ("diffusion", "flow_matching", "diff2flow")
ROUNDS = 200  # of one step with each objective


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
                seconds[objective].append(time.perf_counter() - began)
        base = np.array(seconds[OBJECTIVES[0]])
        told = {}
        for objective, run in runs.items():
            ratios = np.array(seconds[objective]) / base
            told[objective] = {
                "seconds": float(np.median(seconds[objective])),
                "ratio": float(np.median(ratios)),
                "ratio_quartiles": np.quantile(ratios, (0.25, 0.75)).tolist(),
                "gflop": run.gflop,
                "temporary_mb": run.temporary_mb,
            }
        return told

    settings = {"configs": {o: training.deciding(c) for o, c in configs.items()}, "rounds": ROUNDS}
    return Cell(name="cost", settings=settings, compute=compute, minutes=2.0)


@dataclasses.dataclass
class Compiled:
    """A train step with a batch and a state of its own."""

    run: jax.stages.Compiled
    gflop: float | None
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
    counted, memory = chips.flops(step.run, state, frozen, batch), run.memory_analysis()
    made = Compiled(run, counted and counted / 1e9, memory.temp_size_in_bytes / 1e6, state, frozen, batch)
    made.step()
    return made


def section(known: Known, _pictures: Path) -> Section:
    record = known.records.get("cost")
    result = record["result"] if record else {}
    rows = [
        [
            LABELS[o],
            f"{1000 * told['seconds']:.0f}",
            f"{told['ratio']:.3f} ({told['ratio_quartiles'][0]:.3f} to {told['ratio_quartiles'][1]:.3f})",
            f"{told['gflop']:.3f}",
            f"{told['temporary_mb']:.1f}",
        ]
        for o, told in result.items()
    ]
    header = ["", "ms a step", "ratio to diffusion (quartiles)", "GFLOP", "temporary MB"]
    text = f"""
A step of {known.size.batch_size} latents of tiny-sd, the three objectives in turn, {ROUNDS} rounds; the ratio is
the median over rounds. Operations are counted by XLA before it optimises, temporary memory is that of the compiled
step.

{report.markdown_table(header, rows)}"""
    flow, base = result.get("diff2flow"), result.get("diffusion")
    if flow is None or base is None:
        return Section("Cost", text, [Claim(_CLAIM, [], "-")])
    more = {what: flow[what] / base[what] - 1 for what in ("gflop", "temporary_mb")}
    told = (
        f"time {flow['ratio'] - 1:+.1%}, operations {more['gflop']:+.3%}, temporary memory {more['temporary_mb']:+.2%}"
    )
    free = abs(flow["ratio"] - 1) < 0.01 and max(more.values()) < 0.01
    return Section("Cost", text, [Claim(_CLAIM, [free], told)])


_CLAIM = "Diff2Flow needs no more than diffusion: less than 1% of time, of operations and of memory"
