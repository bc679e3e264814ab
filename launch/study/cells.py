"""Cells: one training run or one evaluation each, whose result is a small JSON that is never computed twice."""

import dataclasses
import datetime
import json
import os
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from PIL import Image

from launch.study.bench import Bench

Result = dict[str, Any]
STRIPS = "strips"  # of a cell's folder: pictures that are kept, one under another, beside its record


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cell:
    """`compute(bench, folder)` goes on with what an earlier start has left in `folder`, and returns what is JSON.

    `settings`, JSON too, are all that the result depends on; `config` among them is a flat config. `needs` are cells
    whose trained weights it begins with. `minutes` are expected on two CPU cores.
    """

    name: str
    settings: Mapping[str, Any]
    compute: Callable[[Bench, Path], Result]
    minutes: float
    needs: tuple[str, ...] = ()


def read(file: Path) -> dict[str, Any] | None:
    """A cell's record, or None if there is none that is whole."""
    try:
        return json.loads(file.read_text())
    except (FileNotFoundError, json.JSONDecodeError):
        return None


def known(cell: Cell, results: Path) -> dict[str, Any] | None:
    """The cell's record if its settings are still the same."""
    record = read(results / f"{cell.name}.json")
    return record if record is not None and same(record["settings"], as_json(cell.settings)) else None


def same(before: Any, now: Any) -> bool:
    """Of settings. Keys of a config that only one of both has are another version's, and say what was always done."""
    if not (isinstance(before, Mapping) and isinstance(now, Mapping)):
        return before == now
    foreign = before.keys() ^ now.keys()
    return all(key.startswith("config.") for key in foreign) and all(
        same(before[key], now[key]) for key in before.keys() & now.keys()
    )


def settle(cells: Sequence[Cell], plan: Sequence[Cell], bench: Bench, results: Path) -> None:
    """Computes those of `cells` that are not known yet, in order, and tells how far it is.

    What they need may be any of `plan`.
    """
    by_name = {cell.name: cell for cell in plan}
    missing = [cell for cell in cells if known(cell, results) is None]
    done = len(cells) - len(missing)
    print(f"{done} of {len(cells)} cells are known; {_told(_minutes(missing))} on two CPU cores left")
    expected = spent = 0.0
    for i, cell in enumerate(missing):
        speed = spent / expected if expected else 1.0
        left = f"{_told(speed * _minutes(missing[i:]))} left"
        print(f"\n[{done + i + 1}/{len(cells)}] {cell.name}: {left}", flush=True)
        for name in cell.needs:
            if not bench.weights(name).exists():  # the record alone came from another machine
                print(f"{cell.name} begins with the weights of {name}, which are trained again", flush=True)
                _compute(by_name[name], bench)
        began = time.monotonic()
        record = _compute(cell, bench)
        keep_strips(bench.workdir / "cells" / cell.name / STRIPS, results / f"{cell.name}.png")
        write(results / f"{cell.name}.json", record)
        spent, expected = spent + (time.monotonic() - began) / 60, expected + cell.minutes
        shutil.rmtree(bench.workdir / "cells" / cell.name, ignore_errors=True)


def _compute(cell: Cell, bench: Bench) -> dict[str, Any]:
    """In a folder of its own, which is emptied first if it belongs to other settings."""
    folder, settings = bench.workdir / "cells" / cell.name, as_json(cell.settings)
    begun = read(folder / "begun.json") or {"settings": None, "seconds": 0.0}
    if not same(begun["settings"], settings):
        shutil.rmtree(folder, ignore_errors=True)
        begun = {"settings": settings, "seconds": 0.0}
        write(folder / "begun.json", begun)
    began = time.monotonic()
    try:
        result = cell.compute(bench, folder)
    finally:  # what an interrupted start has taken counts too
        begun["seconds"] += time.monotonic() - began
        write(folder / "begun.json", begun)
    return {
        "name": cell.name,
        "settings": settings,
        "result": result,
        "jax": jax.__version__,
        "device": f"{jax.device_count()} x {jax.devices()[0].device_kind}, {os.cpu_count()} CPU cores",
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "seconds": round(begun["seconds"]),
    }


def keep_strips(folder: Path, file: Path) -> None:
    """Stacks the pictures of `folder`, if there are any, in the order of their names."""
    strips = [np.asarray(Image.open(strip)) for strip in sorted(folder.glob("*.png"))]
    if strips:
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.concatenate(strips)).save(file)


def as_json(value: Any) -> Any:
    """What is read again after `value` was written."""
    return json.loads(json.dumps(_rounded(value)))


def write(file: Path, value: Any) -> None:
    """Whole or not at all."""
    file.parent.mkdir(parents=True, exist_ok=True)
    part = file.with_suffix(".part")
    part.write_text(json.dumps(as_json(value), indent=1) + "\n")
    part.replace(file)


def _rounded(value: Any) -> Any:
    """Numbers to six digits, which is more than anyone can measure here."""
    if isinstance(value, Mapping):
        return {key: _rounded(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_rounded(inner) for inner in value]
    return float(f"{value:.6g}") if isinstance(value, float) else value


def _minutes(cells: Sequence[Cell]) -> float:
    return sum(cell.minutes for cell in cells)


def _told(minutes: float) -> str:
    return f"about {minutes / 60:.1f} h" if minutes > 90 else f"about {minutes:.0f} min"
