"""The study: a cell is computed once, goes on after a kill, and is computed again when it has become another."""

import dataclasses
import json
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
from launch.study import adaptation, cells, exam, plan, report
from launch.study.bench import Bench, Size
from launch.study.cells import Cell


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
    (tmp_path / "workdir" / "weights" / "teacher").rmdir()
    changed = cell("student", 0.2, needs=("teacher",))
    cells.settle([changed], [teacher, changed], bench, results)
    assert computed == ["teacher", "student", "teacher", "student"]


def test_a_killed_run_goes_on_from_its_last_mark_and_is_reported(tmp_path, monkeypatch) -> None:
    model = str(small.write_pipeline(tmp_path / "model"))
    size = Size(seeds=(0,), model=model, pixels=16, scenes=4, steps=2, batch_size=2, images=2, few=1, many=1)
    bench = Bench(tmp_path / "workdir", size)
    bench.mesh = sharding.make_mesh(devices=jax.devices()[:1])
    cell = next(cell for cell in adaptation.cells(size, 0) if cell.name == "adapt-full-diff2flow-0")
    results, steps, write = tmp_path / "results", [], cells.write

    def rendered(config: Config) -> Config:
        """Pictures as they are: encoding them is not what this is about, nor is what a step learns."""
        config = config.copy_and_resolve_references()
        config.data.sources = bench.rendered(size.pixels).data.sources
        config.data.num_validation = size.images
        return config

    def counting(state: TrainState, *_: Any) -> tuple[TrainState, dict]:
        steps.append(int(state.step))
        return dataclasses.replace(state, step=state.step + 1), {"loss": 0.0}

    def killed(file: Path, value: dict) -> None:
        write(file, value)
        if file.name == "curve.json" and "2" in value:
            raise KeyboardInterrupt

    monkeypatch.setattr(bench, "placed", rendered)
    monkeypatch.setattr(bench, "step", lambda *given: dataclasses.replace(Bench.step(bench, *given), run=counting))
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


def test_only_the_published_grid_begins_before_the_last_timestep() -> None:
    config = {"num_train_timesteps": 1000, "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    schedule = NoiseSchedule.from_config(config)
    grids = {name: how.grid(schedule, Alignment(), config, 4, at_noise=True) for name, how in exam.SAMPLERS.items()}
    assert grids["Euler from t = 0"][0] == 0
    np.testing.assert_allclose(grids["Euler from t = 0"][:5], [0, 0.25, 0.5, 0.75, 1])
    np.testing.assert_allclose(grids["Euler"][:5], np.linspace(grids["Heun"][0], 1, 5), rtol=1e-6)
    assert 0.06 < grids["Heun"][0] < 0.07
