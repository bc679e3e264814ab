"""What is known so far: numbers over seeds, with their spread, claims about them, and curves of them."""

import dataclasses
import itertools
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.ticker import LogFormatter
from PIL import Image

from d2f_jax import report
from launch.study.bench import Size


@dataclasses.dataclass(frozen=True)
class Claim:
    """Something that is true or not of each seed, or undecided: None; `numbers` says by how much.

    `why` is what was found out where it does not hold, a part of the section with a title of its own.
    """

    text: str
    holds: Sequence[bool | None]
    numbers: str
    why: str = ""
    by_seed: bool = True

    @property
    def verdict(self) -> str:
        if not self.holds:
            return "not measured yet"
        if None in self.holds:
            return "undecided"
        if len(set(self.holds)) > 1:
            return f"mixed: {self.holds.count(True)} of {len(self.holds)} seeds"
        seeds = f" ({len(self.holds)} seed{'s' if len(self.holds) > 1 else ''})" if self.by_seed else ""
        return ("holds" if self.holds[0] else "**does not hold**") + seeds


@dataclasses.dataclass(frozen=True)
class Section:
    title: str
    text: str
    claims: Sequence[Claim] = ()

    @property
    def explained(self) -> str:
        """The text, and why claims do not hold that do not hold of every seed."""
        whys = dict.fromkeys(claim.why for claim in self.claims if not all(claim.holds))  # several claims may share one
        return self.text + "".join(whys)


@dataclasses.dataclass(frozen=True)
class Known:
    """Records by name of cell; `pictures` is the folder of both."""

    size: Size
    records: Mapping[str, Any]
    folder: Path

    def of(self, cell: str, *path: str) -> dict[int, float]:
        """By seed, the number at this place of the results of `cell`-SEED."""
        found = {}
        for seed in self.size.seeds:
            value = self.records.get(f"{cell}-{seed}", {}).get("result")
            for key in path:
                value = value.get(key) if value is not None else None
            if value is not None:
                found[seed] = value
        return found

    def told(self, cell: str, *path: str, form: str = "{:.1f}") -> str:
        return told(list(self.of(cell, *path).values()), form)

    def strips(self, cell: str, pixels: int) -> list[np.ndarray]:
        """Rows of pictures that the first seed's run has left, one for each mark."""
        file = self.folder / f"{cell}-{self.size.seeds[0]}.png"
        if not file.exists():
            return []
        sheet = np.asarray(Image.open(file))
        return np.split(sheet, range(pixels, len(sheet), pixels))


def told(values: Sequence[float], form: str = "{:.1f}") -> str:
    """Mean and standard deviation over seeds."""
    if not values:
        return "-"
    mean = form.format(statistics.mean(values))
    return f"{mean} ± {form.format(statistics.stdev(values))}" if len(values) > 1 else mean


def compared(a: Mapping[int, float], b: Mapping[int, float], holds: Callable[[float, float], bool]) -> list[bool]:
    """Of the seeds that both have."""
    return [holds(a[seed], b[seed]) for seed in sorted(a.keys() & b.keys())]


def versus(a: Mapping[int, float], b: Mapping[int, float], form: str = "{:.1f}") -> str:
    """Of the seeds that both have."""
    both = sorted(a.keys() & b.keys())
    return f"{told([a[seed] for seed in both], form)} against {told([b[seed] for seed in both], form)}"


def median_interval(values: Sequence[float]) -> tuple[float, float]:
    """The two of `values` between which their median lies at 95% or more, whatever they are drawn from, independently.

    Of a draw's n values Binomial(n, 1/2) many are below the median. Up to five leave it anywhere.
    """
    ordered, count = sorted(values), len(values)
    chances = itertools.accumulate(math.comb(count, below) / 2**count for below in range(count))
    beyond = sum(chance <= 0.025 for chance in chances)
    return (ordered[beyond - 1], ordered[-beyond]) if beyond else (-math.inf, math.inf)


Line = tuple[str, Mapping[str, Mapping[int, float]]]
"""A label, and by place on the axis the values by seed."""


def curves(axis: Any, lines: Sequence[Line], places: Sequence[str], *, logarithmic: bool) -> None:
    """Means joined by a line, a standard deviation to both sides, every seed as a dot; places are evenly spaced."""
    apart, colours = min(0.06, 0.4 / len(lines)), len(plt.rcParams["axes.prop_cycle"])
    for i, (label, by_place) in enumerate(lines):
        xs = [x for x, place in enumerate(places) if by_place.get(place)]
        if not xs:
            continue
        values = [list(by_place[places[x]].values()) for x in xs]
        means = [statistics.mean(v) for v in values]
        spread = [statistics.stdev(v) if len(v) > 1 else 0.0 for v in values]
        shifted = np.array(xs) + apart * (i - (len(lines) - 1) / 2)  # bars beside each other
        (line,) = axis.plot(shifted, means, "--" if i >= colours else "-", label=label, linewidth=1.6)
        colour = line.get_color()
        low = [max(mean - s, 1e-9) if logarithmic else mean - s for mean, s in zip(means, spread, strict=True)]
        axis.vlines(shifted, low, [m + s for m, s in zip(means, spread, strict=True)], color=colour, linewidth=1)
        for x, v in zip(shifted, values, strict=True):
            axis.plot([x] * len(v), v, ".", color=colour, markersize=4)
    axis.set_xticks(range(len(places)), places)
    axis.grid(alpha=0.3)
    if axis.lines:
        axis.legend(fontsize=8)
    if logarithmic:
        axis.set_yscale("log")
        axis.yaxis.set_major_formatter("{x:g}")
        chosen = LogFormatter(minor_thresholds=(2, 0.6))  # which numbers are told; it would tell powers of ten
        chosen.set_axis(axis.yaxis)
        axis.yaxis.set_minor_formatter(lambda y, place: f"{y:g}" if chosen(y, place) else "")


def save(figure: Any, file: Path) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=110, metadata={"Software": None})
    plt.close(figure)


def picture_grid(rows: Mapping[str, Sequence[np.ndarray]], columns: Sequence[str], file: Path) -> bool:
    """Strips of pictures by row; whether there were any."""
    full = {name: strips for name, strips in rows.items() if len(strips) == len(columns)}
    if full:
        sheet = report.labelled_grid(list(full.values()), list(full), columns)
        file.parent.mkdir(parents=True, exist_ok=True)
        sheet.save(file)
    return bool(full)
