"""What a run tells people: metrics as lines and curves, samples as labelled pictures, scores as a table."""

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from d2f_jax.errors import InputError


class MetricsWriter:
    """Appends to `metrics.jsonl` and to TensorBoard event files in `workdir`, and to Weights & Biases if asked.

    A run that goes on from `step` writes again what it had written after it: those lines are dropped first. A line of
    `step` itself that is there already is not written twice. Only the main process of a run writes; in the others
    nothing happens.
    """

    def __init__(self, workdir: Path, *, step: int, main: bool = True, wandb_project: str = "") -> None:
        self._sinks: list[Any] = []
        if not main:
            return
        from tensorboardX import SummaryWriter  # imports PyTorch, if that is there: seconds for every program

        self._lines, self._told = _reopened(workdir / "metrics.jsonl", step)
        self._events = SummaryWriter(str(workdir / "tensorboard"), purge_step=step + 1 if step else None)
        self._sinks = [self._lines, self._events]
        self._wandb = _wandb_run(workdir, wandb_project) if wandb_project else None

    def write(self, step: int, values: Mapping[str, float]) -> None:
        if not self._sinks:
            return
        line = json.dumps({"step": step, **values})
        if line in self._told:
            return
        self._lines.write(line + "\n")
        self._lines.flush()
        for name, value in values.items():
            self._events.add_scalar(name, value, step)
        if self._wandb is not None:
            self._wandb.log(dict(values), step=step)

    def sync(self) -> None:
        """Until what was written would survive the machine: a bucket that is mounted has it only then."""
        if self._sinks:
            os.fsync(self._lines.fileno())

    def image(self, step: int, name: str, picture: Image.Image) -> None:
        if not self._sinks:
            return
        self._events.add_image(name, np.asarray(picture), step, dataformats="HWC")
        if self._wandb is not None:
            import wandb  # pyright: ignore[reportMissingImports]

            self._wandb.log({name: wandb.Image(picture)}, step=step)

    def __enter__(self) -> "MetricsWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for sink in self._sinks:
            sink.close()
        if self._sinks and self._wandb is not None:
            self._wandb.finish(exit_code=0 if kind is None else 1)


def _reopened(file: Path, step: int) -> tuple[TextIO, list[str]]:
    """The file of lines, ready to go on after `step`, and those of `step`: later ones go, and what a kill has torn."""
    kept = []
    if file.exists():
        steps = {line: _step(line) for line in file.read_text(errors="replace").split("\n")[:-1]}
        kept = [line for line, of in steps.items() if of is not None and of <= step]
        part = file.with_suffix(".part")
        part.write_text("".join(line + "\n" for line in kept))
        part.replace(file)
    return file.open("a"), [line for line in kept if _step(line) == step]


def _step(line: str) -> int | None:
    """Of a line of metrics; None for one that is not whole."""
    try:
        return int(json.loads(line)["step"])
    except (ValueError, TypeError, KeyError):
        return None


def _wandb_run(workdir: Path, project: str) -> Any:
    """The workdir's run, gone on with after a restart. Raises InputError if the package is not installed."""
    try:
        import wandb  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise InputError("config.wandb_project needs Weights & Biases: ./launch/install.sh wandb") from error
    config = json.loads((workdir / "config.json").read_text())
    name = str(workdir.absolute())
    run_id = hashlib.sha256(name.encode()).hexdigest()[:16]
    return wandb.init(project=project, dir=workdir, name=workdir.name, id=run_id, resume="allow", config=config)


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


def steps(count: int) -> str:
    """What a column of so many steps is called."""
    return f"{count} step{'s' if count > 1 else ''}"


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table whose columns line up in plain text too."""
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]

    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(cell.ljust(width) for cell, width in zip(cells, widths, strict=True)) + " |"

    return (
        "\n".join([line(header), "|" + "|".join("-" * (width + 2) for width in widths) + "|", *map(line, rows)]) + "\n"
    )
