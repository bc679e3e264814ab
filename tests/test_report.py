"""Tables, grids and metric lines."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from d2f_jax import InputError, report


def test_tile_places_every_image_in_reading_order() -> None:
    images = np.stack([np.full((4, 4, 3), value, np.uint8) for value in (10, 20, 30)])
    sheet = report.tile(images, columns=2, gap=1)
    assert sheet.shape == (9, 9, 3)
    assert [sheet[0, 0, 0], sheet[0, 5, 0], sheet[5, 0, 0], sheet[5, 5, 0]] == [10, 20, 30, 255]


def test_labelled_grid_keeps_pixels_and_adds_labels() -> None:
    cell = np.random.default_rng(0).integers(0, 255, (8, 8, 3), np.uint8)
    picture = np.asarray(report.labelled_grid([[cell, cell]], ["a row"], ["one", "two"], zoom=3))
    zoomed = cell.repeat(3, 0).repeat(3, 1)
    assert np.array_equal(picture[26:50, -34:-10], zoomed)
    assert np.array_equal(picture[26:50, -68:-44], zoomed)
    assert picture[:26].min() < 100, "the columns have no labels"


def test_notes_stand_below_and_move_nothing() -> None:
    cell = np.full((40, 300, 3), 7, np.uint8)
    plain = np.asarray(report.labelled_grid([[cell]], ["a"], ["b"]))
    noted = np.asarray(report.labelled_grid([[cell]], ["a"], ["b"], notes=["one", "two"]))
    assert np.array_equal(noted[: len(plain)], plain)
    assert noted[len(plain) :].min() < 100, "there are no notes"


def test_table_is_markdown() -> None:
    assert report.markdown_table(["", "x"], [["long name", "1"]]) == (
        "|           | x |\n|-----------|---|\n| long name | 1 |\n"
    )


def lines(workdir: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def test_a_run_that_goes_on_writes_again_what_came_later(tmp_path: Path) -> None:
    with report.MetricsWriter(tmp_path, step=0) as writer:
        for step in (1, 2, 3):
            writer.write(step, {"loss": 0.5})
        writer.write(2, {"validation_loss": 0.25})
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('\0\0\0\n\n{"step": 4, "lo')  # torn by a kill, and by a machine that lost its power
    with report.MetricsWriter(tmp_path, step=2) as writer:
        assert [line["step"] for line in lines(tmp_path)] == [1, 2, 2]
        writer.write(2, {"validation_loss": 0.25})  # told before: what a step gives is told once
        writer.write(3, {"loss": 0.125})
    assert lines(tmp_path) == [
        {"step": 1, "loss": 0.5},
        {"step": 2, "loss": 0.5},
        {"step": 2, "validation_loss": 0.25},
        {"step": 3, "loss": 0.125},
    ]
    assert list((tmp_path / "tensorboard").iterdir())
    with report.MetricsWriter(tmp_path, step=0):  # no checkpoint was left: from the start
        assert lines(tmp_path) == []


def test_only_the_main_process_writes(tmp_path: Path) -> None:
    with report.MetricsWriter(tmp_path, step=0, main=False, wandb_project="d2f") as writer:
        writer.write(1, {"loss": 0.5})
        writer.image(1, "samples", Image.new("RGB", (8, 8)))
    assert not list(tmp_path.iterdir())


def test_weights_and_biases_that_is_not_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(InputError, match=r"wandb_project needs Weights & Biases: \./launch/install\.sh wandb"):
        report.MetricsWriter(tmp_path, step=0, wandb_project="d2f")


def test_weights_and_biases_without_a_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    (tmp_path / "config.json").write_text('{"seed": 7}')
    names = set()
    for step in (0, 2):
        with report.MetricsWriter(tmp_path, step=step, wandb_project="d2f") as writer:
            writer.write(step + 1, {"loss": 0.5})
            writer.image(step + 1, "samples", Image.new("RGB", (8, 8)))
            assert wandb.run.config["seed"] == 7
            names.add(wandb.run.id)
    assert len(names) == 1, "a restart began another run"
    assert len(list((tmp_path / "wandb").glob("offline-run-*/*.wandb"))) == 2
    assert [line["step"] for line in lines(tmp_path)] == [1, 3]
