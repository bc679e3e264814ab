"""Writes results/study.md and its figures from the cells that are known."""

from collections.abc import Sequence
from pathlib import Path

from d2f_jax import report
from launch.study import adaptation, alignments, cells, colours, cost, depth, reflow
from launch.study.bench import Size
from launch.study.cells import Cell
from launch.study.numbers import Known

SECTIONS = (adaptation.section, alignments.section, reflow.section, depth.section, colours.section, cost.section)


def write(size: Size, plan: Sequence[Cell], results: Path) -> Path:
    """A cell that is missing, or of other settings, is named and counts as not measured."""
    pictures, folder = results / "study", results / "study" / "cells"
    records = {cell.name: record for cell in plan if (record := cells.known(cell, folder)) is not None}
    known = Known(size, records, folder)
    sections = [section(known, pictures) for section in SECTIONS]
    claims = [
        [claim.text, claim.verdict, claim.numbers if claim.holds else ""]
        for section in sections
        for claim in section.claims
    ]
    text = _HEAD.format(seeds=len(size.seeds), images=size.images) + _first_cell(pictures / "first_cell.json")
    text += report.markdown_table(["claim", "here", "numbers"], claims)
    text += "".join(f"\n## {section.title}\n{section.explained}" for section in sections)
    text += "\n## Cells\n\n" + _cells(plan, records)
    file = results / "study.md"
    part = file.with_suffix(".part")
    part.write_text(text)
    part.replace(file)
    return file


_HEAD = """# The paper's claims on the embedded world

What [Diff2Flow](https://arxiv.org/abs/2506.02221) claims of Stable Diffusion, measured on tiny-sd and ShapesWorld,
5.6M parameters and pictures of 48 pixels: whether the mechanism does what it should, not how good large models
become. `./launch/study.sh` computes the cells that are missing and writes this page; all its numbers and verdicts
come from the records in [study/cells](study/cells).

Numbers are mean ± standard deviation over up to {seeds} seeds, and so are bars; dots are single seeds. A seed has its
own order of data, noise and times in training, and its own {images} held-out captions and noise in judging, which
all objectives share: differences within a seed are surer than bars tell. A claim is judged seed by seed. The
Fréchet distance is taken on the embedded classifier's features and biased by the number of pictures: compare it
only within this page. Weights are the averaged ones. Where those that another cell begins with were lost, they were
trained again, which ends a little elsewhere (sums of float32 in another order): the same solver of the same network
may then have two numbers here.

"""


def _first_cell(file: Path) -> str:
    """What was seen before the size was settled, where that is kept: of these results alone."""
    if (record := cells.read(file)) is None:
        return ""
    settings, curve = record["settings"], record["result"]["curve"]
    batch, images = settings["config"]["config.train.batch_size"], settings["images"]
    first, early, eighth, last = (f"{curve[mark]['Euler']['4']['frechet_distance']:.0f}" for mark in _SEEN)
    return f"""How much is measured was made less after [a first cell](study/{file.name}) had been seen, for want of
time: the whole UNet by Diff2Flow, with {batch} pictures a step and {images} in a score, went from {first} to {eighth}
in {_SEEN[2]} steps and to {last} in {_SEEN[3]}. That {_SEEN[3]} steps were kept owes something to that cell: it was at
{early} after {_SEEN[1]} steps, so that an eighth of half as many would have been too few for the first claim.

"""


_SEEN = ("0", "50", "100", "800")


def _cells(plan: Sequence[Cell], records: dict) -> str:
    missing = [cell.name for cell in plan if cell.name not in records]
    told = f"{len(records)} of {len(plan)} are known."
    if missing:
        told += f" Missing: {', '.join(missing)}."
    machines: dict[tuple[str, str], list[float]] = {}
    for record in records.values():
        machines.setdefault((record["device"], record["jax"]), []).append(record["seconds"])
    rows = [[device, jax, str(len(s)), f"{sum(s) / 3600:.1f}"] for (device, jax), s in sorted(machines.items())]
    return f"{told}\n\n" + report.markdown_table(["device", "jax", "cells", "hours"], rows)
