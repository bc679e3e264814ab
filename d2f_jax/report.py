"""What a run tells people: metrics as lines and curves, samples as labelled pictures, scores as a table."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from tensorboardX import SummaryWriter


class MetricsWriter:
    """Appends to `metrics.jsonl` and to TensorBoard event files in `workdir`."""

    def __init__(self, workdir: Path) -> None:
        self._lines = (workdir / "metrics.jsonl").open("a")
        self._events = SummaryWriter(str(workdir / "tensorboard"))

    def write(self, step: int, values: Mapping[str, float]) -> None:
        self._lines.write(json.dumps({"step": step, **values}) + "\n")
        self._lines.flush()
        for name, value in values.items():
            self._events.add_scalar(name, value, step)

    def image(self, step: int, name: str, picture: Image.Image) -> None:
        self._events.add_image(name, np.asarray(picture), step, dataformats="HWC")

    def __enter__(self) -> "MetricsWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._lines.close()
        self._events.close()


def tile(images: np.ndarray, columns: int, gap: int = 2) -> np.ndarray:
    """Images uint8 [N, H, W, 3] side by side in rows of `columns`, on white."""
    count, height, width, _ = images.shape
    rows = -(-count // columns)
    sheet = np.full((rows * (height + gap) - gap, columns * (width + gap) - gap, 3), 255, np.uint8)
    for i, image in enumerate(images):
        top, left = (i // columns) * (height + gap), (i % columns) * (width + gap)
        sheet[top : top + height, left : left + width] = image
    return sheet


def labelled_grid(
    cells: Sequence[Sequence[np.ndarray]],
    row_labels: Sequence[str],
    column_labels: Sequence[str],
    *,
    notes: Sequence[str] = (),
    zoom: int = 1,
) -> Image.Image:
    """Pictures uint8 [H, W, 3] of one size in rows and columns, their names above and to the left, `notes` below."""
    font = ImageFont.load_default(size=15)
    cell_height, cell_width = (zoom * side for side in cells[0][0].shape[:2])
    gap, head, line_height = 10, 26, 20
    margin = int(max(font.getlength(line) for label in row_labels for line in label.split("\n"))) + 2 * gap
    size = (margin + len(column_labels) * (cell_width + gap), head + len(row_labels) * (cell_height + gap))
    size = (size[0], size[1] + len(notes) * line_height)
    sheet = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(sheet)
    for column, label in enumerate(column_labels):
        x = margin + column * (cell_width + gap) + (cell_width - font.getlength(label)) / 2
        draw.text((x, 5), label, "black", font)
    for i, note in enumerate(notes):
        draw.text((margin, size[1] - (len(notes) - i) * line_height), note, "black", font)
    for row, label in enumerate(row_labels):
        top = head + row * (cell_height + gap)
        draw.multiline_text((gap, top + cell_height / 2), label, "black", font, anchor="lm")
        for column, cell in enumerate(cells[row]):
            picture = Image.fromarray(cell).resize((cell_width, cell_height), Image.Resampling.NEAREST)
            sheet.paste(picture, (margin + column * (cell_width + gap), top))
    return sheet


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table whose columns line up in plain text too."""
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]

    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(cell.ljust(width) for cell, width in zip(cells, widths, strict=True)) + " |"

    return (
        "\n".join([line(header), "|" + "|".join("-" * (width + 2) for width in widths) + "|", *map(line, rows)]) + "\n"
    )
