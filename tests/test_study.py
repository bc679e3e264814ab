"""The study: a cell is computed once, goes on after a kill, and is computed again when it has become another."""

import dataclasses
import functools
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import small

from d2f_jax import prior, sharding
from d2f_jax.alignment import Alignment
from d2f_jax.program import Config
from d2f_jax.schedule import NoiseSchedule
from d2f_jax.step import TrainState
from launch.study import adaptation, alignments, cells, colours, cost, depth, exam, numbers, plan, reflow, report
from launch.study.bench import COLOURS, DEPTHS, LATENTS, Bench, Size, Step
from launch.study.cells import Cell
from launch.study.numbers import Known


class Workdir:
    """All of a bench that the bookkeeping of cells needs."""

    def __init__(self, workdir: Path) -> None:
        self.workdir = workdir

    def weights(self, name: str) -> Path:
        return self.workdir / "weights" / name


def test_a_cell_is_computed_once_for_its_settings(tmp_path) -> None:
    computed = []

    def compute(name: str):
        def run(bench, _folder):
            computed.append(name)
            bench.weights(name).mkdir(parents=True, exist_ok=True)
            return {"number": 1 / 3}

        return run

    def cell(name: str, rate: float, **options) -> Cell:
        settings = {"config": {"config.rate": rate}, "marks": (0, 1)}
        return Cell(name=name, settings=settings, compute=compute(name), minutes=1.0, **options)

    teacher = cell("teacher", 0.1)
    student = cell("student", 0.1, needs=("teacher",))
    both, bench, results = [teacher, student], Workdir(tmp_path / "workdir"), tmp_path / "results"
    cells.settle(both, both, bench, results)
    cells.settle(both, both, bench, results)
    assert computed == ["teacher", "student"]
    record = json.loads((results / "student.json").read_text())
    assert record["result"] == {"number": 0.333333} and record["settings"]["marks"] == [0, 1]
    assert {"jax", "device", "date", "seconds"} <= record.keys()

    # A key that another version of the config has changes nothing, another value does.
    wider = dataclasses.replace(teacher, settings={"config": {"config.rate": 0.1, "config.new": 1}, "marks": (0, 1)})
    cells.settle([wider], [wider], bench, results)
    assert computed == ["teacher", "student"]
    assert not cells.same({"rounds": 2}, {"rounds": 2, "seconds": "of every step"})
    (tmp_path / "workdir" / "weights" / "teacher").rmdir()
    changed = cell("student", 0.2, needs=("teacher",))
    cells.settle([changed], [teacher, changed], bench, results)
    assert computed == ["teacher", "student", "teacher", "student"]


class SmallBench(Bench):
    """Pictures as they are, and steps by `run`: encoding and learning are not what this is about."""

    def __init__(self, workdir: Path, size: Size, run: Callable[..., Any]) -> None:
        super().__init__(workdir, size)
        self.mesh, self._run = sharding.make_mesh(devices=jax.devices()[:1]), run

    def placed(self, config: Config) -> Config:
        config = config.copy_and_resolve_references()
        encoded = not {LATENTS, DEPTHS, COLOURS}.isdisjoint(config.data.sources)
        config.data.sources = () if encoded else config.data.sources
        config = super().placed(config)
        if encoded:
            config.data.sources, config.data.weights = self.rendered(self.size.pixels).data.sources, ()
            config.data.num_validation = self.size.images
        return config

    def step(self, *given: Any) -> Step:
        return dataclasses.replace(super().step(*given), run=self._run)


@pytest.fixture(scope="module")
def size(tmp_path_factory) -> Size:
    model = str(small.write_pipeline(tmp_path_factory.mktemp("model")))
    few = {"scenes": 4, "pairs": 2, "steps": 4, "batch_size": 2, "images": 2, "few": 1, "many": 1}
    return Size(seeds=(0,), model=model, pixels=16, native_pixels=16, **few)


def counted(state: TrainState, *_: Any) -> tuple[TrainState, dict]:
    loss = (jax.numpy.sort(jax.tree.leaves(state.ema)[0]) ** 2).sum()  # of some operations and memory
    return dataclasses.replace(state, step=state.step + 1), {"loss": loss}


def test_a_killed_run_goes_on_from_its_last_mark_and_is_reported(tmp_path, monkeypatch, size) -> None:
    size = dataclasses.replace(size, steps=2)
    steps, write = [], cells.write

    def counting(state: TrainState, *_: Any) -> tuple[TrainState, dict]:
        steps.append(int(state.step))
        return counted(state)

    bench = SmallBench(tmp_path / "workdir", size, counting)
    cell = next(cell for cell in adaptation.cells(size, 0) if cell.name == "adapt-full-diff2flow-0")
    results = tmp_path / "results"

    def killed(file: Path, value: dict) -> None:
        write(file, value)
        if file.name == "curve.json" and "2" in value:
            raise KeyboardInterrupt

    loaded = prior.load(bench.rendered(size.pixels))
    monkeypatch.setattr(prior, "load", lambda _config: loaded)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(cells, "write", killed)
        cells.settle([cell], [cell], bench, results / "study" / "cells")
    assert steps == [0, 1] and not (results / "study").exists()
    cells.settle([cell], [cell], bench, results / "study" / "cells")
    assert steps == [0, 1, 1]
    record = json.loads((results / "study" / "cells" / f"{cell.name}.json").read_text())
    assert list(record["result"]["curve"]) == ["0", "1", "2"]
    assert bench.weights(cell.name).exists() and not (bench.workdir / "cells" / cell.name).exists()

    text = report.write(size, plan.cells(size), results).read_text()
    told = f"{record['result']['curve']['2']['Euler']['1']['frechet_distance']:.0f}"
    assert told in next(line for line in text.splitlines() if line.startswith("| Whole UNet, Diff2Flow"))
    assert "not measured yet" in text and "1 of " in text and "adapt-lora-diffusion-0" in text
    pictures = {file.name for file in (results / "study").glob("*.png")}
    assert pictures == {"adaptation.png", "adaptation_pictures.png", "alignments.png", "depth.png", "reflow.png"}


def no_pictures(monkeypatch) -> None:
    monkeypatch.setattr(numbers, "save", lambda figure, _file: numbers.plt.close(figure))


@pytest.fixture(scope="module")
def bench(tmp_path_factory, size) -> Bench:
    bench = SmallBench(tmp_path_factory.mktemp("workdir"), size, jax.jit(counted))
    for name in ("adapt-full-diff2flow-0", "adapt-full-diffusion-0"):
        prior.load(bench.rendered(size.pixels)).save_pretrained(bench.weights(name))
    return bench


SCORES = {"frechet_distance", "caption_accuracy"}


@pytest.mark.parametrize(
    ("experiment", "cell", "place", "holds", "row"),
    [
        (
            depth,
            "depth-full-diff2flow-0",
            ("curve", "2", "Euler", "1", "4"),
            {"abs_rel", "delta1"},
            "Whole UNet, Diff2Flow",
        ),
        (alignments, "align-before-0", ("reference", "Euler", "1"), SCORES, "reference, Euler"),
        (reflow, "reflow-diff2flow-0", ("curve", "1", "Euler", "1"), SCORES, "reflow by Diff2Flow"),
        (reflow, "solvers-diff2flow-0", (reflow.DPM, "1"), SCORES, "the teacher, DPM-Solver++(2M)"),
        (
            colours,
            "colours-diffusion-0",
            ("curve", "1", "DDIM", "1", "3", "black"),
            {"error", "error_to_vae", "mean", "spread"},
            "diffusion, DDIM",
        ),
        (cost, "cost", ("diff2flow",), {"seconds", "gflop", "temporary_mb"}, "Diff2Flow"),
    ],
)
def test_each_experiment_is_computed_and_told(
    experiment, cell: str, place: tuple[str, ...], holds: set[str], row: str, bench: Bench, tmp_path, monkeypatch
) -> None:
    no_pictures(monkeypatch)
    shape = bench.size.pixels, bench.size.pixels, 3
    drawn = np.random.default_rng(0).integers(0, 256, (bench.size.images, *shape), np.uint8)
    monkeypatch.setattr(exam, "sampled", lambda _draw, _count, _told: drawn)  # the run above has drawn them
    monkeypatch.setattr(reflow, "STEPS", (1, 2))
    monkeypatch.setattr(reflow, "how", lambda size, how=reflow.how: how(size) | {"num_steps": 1})
    monkeypatch.setattr(colours, "NOISES", 1)
    monkeypatch.setattr(colours, "GUIDANCES", (exam.GUIDANCE,))
    monkeypatch.setattr(colours, "ASKED", colours.ASKED | {"diffusion": ("DDIM",)})
    monkeypatch.setattr(cost, "ROUNDS", 6)
    planned = plan.cells(bench.size)
    cells.settle([c for c in planned if c.name == cell], planned, bench, tmp_path)
    record = json.loads((tmp_path / f"{cell}.json").read_text())
    found = functools.reduce(lambda value, key: value[key], place, record["result"])
    assert found.keys() == holds
    section = experiment.section(Known(bench.size, {cell: record}, tmp_path), tmp_path)
    told = [line for line in section.text.splitlines() if line.startswith(f"| {row} ")]
    assert told and all(any(c.isdigit() for c in line.split("|", 2)[2]) for line in told), told


def test_the_page_is_what_its_cells_say_and_explains_what_does_not_hold(tmp_path, monkeypatch) -> None:
    no_pictures(monkeypatch)
    monkeypatch.setattr(numbers, "picture_grid", lambda rows, columns, file: file.exists())
    results, size, sections = Path(__file__).parents[1] / "results", Size(), []
    shutil.copytree(results / "study", tmp_path / "study")
    kept = [lambda *given, of=of: sections.append(of(*given)) or sections[-1] for of in report.SECTIONS]
    monkeypatch.setattr(report, "SECTIONS", kept)
    assert report.write(size, plan.cells(size), tmp_path).read_text() == (results / "study.md").read_text()
    assert [c.text for section in sections for c in section.claims if not all(c.holds) and not c.why] == []


def test_a_median_lies_in_its_interval_and_a_claim_may_be_undecided() -> None:
    draws = np.random.default_rng(0).standard_normal((400, 41))
    bounds = np.array([numbers.median_interval(draw.tolist()) for draw in draws])
    assert 0.94 < np.mean((bounds[:, 0] <= 0) & (bounds[:, 1] >= 0)) < 0.99
    assert numbers.median_interval(range(6)) == (0, 5)
    assert numbers.median_interval(range(5)) == (-np.inf, np.inf)

    def verdict(seconds: list[float]) -> str:
        counts = {"gflop": 1.0, "temporary_mb": 1.0}
        told = {"diffusion": {"seconds": [1.0] * len(seconds)} | counts, "diff2flow": {"seconds": seconds} | counts}
        claims = cost.section(Known(Size(), {"cost": {"result": told}}, Path()), Path()).claims
        return next(claim.verdict for claim in claims if claim.text.startswith("Diff2Flow"))

    assert verdict([1.005] * 9) == "holds"
    assert verdict([0.9, 1.1] * 9) == "undecided"
    assert verdict([1.02] * 9) == "**does not hold**"


def test_only_the_published_grid_begins_before_the_last_timestep() -> None:
    config = {"num_train_timesteps": 1000, "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    schedule = NoiseSchedule.from_config(config)
    grids = {name: how.grid(schedule, Alignment(), config, 4, at_noise=True) for name, how in exam.SAMPLERS.items()}
    assert grids["Euler from t = 0"][0] == 0
    np.testing.assert_allclose(grids["Euler from t = 0"][:5], [0, 0.25, 0.5, 0.75, 1])
    np.testing.assert_allclose(grids["Euler"][:5], np.linspace(grids["Heun"][0], 1, 5), rtol=1e-6)
    assert 0.06 < grids["Heun"][0] < 0.07
