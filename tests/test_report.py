"""Tables, grids and metric lines."""

import json
from pathlib import Path

import numpy as np

from d2f_jax import report


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


def test_metrics_are_appended(tmp_path: Path) -> None:
    for step in (1, 2):
        with report.MetricsWriter(tmp_path) as writer:
            writer.write(step, {"loss": 0.5})
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert lines == [{"step": 1, "loss": 0.5}, {"step": 2, "loss": 0.5}]
    assert list((tmp_path / "tensorboard").iterdir())
