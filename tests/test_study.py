"""The study's cells: computed once, gone on with after a kill, computed again when they are others."""

import json

import jax
import pytest
import small

from d2f_jax import sharding
from launch.study import adaptation, cells
from launch.study.bench import Bench, Size


@pytest.fixture(scope="module")
def bench(tmp_path_factory) -> Bench:
    folder = tmp_path_factory.mktemp("study")
    model = str(small.write_pipeline(folder / "model"))
    size = Size(seeds=(0,), model=model, pixels=16, scenes=8, pairs=8, steps=4, batch_size=8, images=4, few=1, many=2)
    bench = Bench(folder / "workdir", size)
    bench.mesh = sharding.make_mesh(devices=jax.devices()[:1])
    return bench


def test_a_killed_cell_goes_on_and_gives_the_same(bench, tmp_path, monkeypatch) -> None:
    (cell, *_) = adaptation.cells(bench.size, 0)
    whole = cell.compute(bench, tmp_path / "whole")
    saved = cells.write

    def killed(file, value) -> None:
        saved(file, value)
        if file.name == "curve.json" and len(value) == 3:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(cells, "write", killed)
        with pytest.raises(KeyboardInterrupt):
            cells.settle([cell], [cell], bench, tmp_path / "results")
    assert not (tmp_path / "results").exists()
    cells.settle([cell], [cell], bench, tmp_path / "results")
    record = json.loads((tmp_path / "results" / f"{cell.name}.json").read_text())
    assert record["result"] == whole
