"""The faults of `faults.py` in short: what was interrupted ends as if nothing had happened."""

import dataclasses
from pathlib import Path
from typing import Any

import faults
import pytest


@dataclasses.dataclass(frozen=True)
class Run:
    """An uninterrupted run, and what must come out of the others."""

    job: faults.Job
    workdir: Path
    expected: dict[str, Any]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    folder = tmp_path_factory.mktemp("faults")
    job = faults.Job(folder / "shared").prepare()
    job.finish(folder / "run")
    return Run(job, folder / "run", faults.outcome(folder / "run"))


def test_kills_change_nothing(run: Run, tmp_path: Path) -> None:
    hits = faults.survive_kills(run.job, tmp_path, run.expected, count=3, span=15, seed=0)
    assert hits.total() == 3


def test_a_full_disk_is_told_and_nothing_is_lost(run: Run, tmp_path: Path) -> None:
    size = faults.size_on_disk(run.workdir / "checkpoints" / str(run.job.steps))
    faults.survive_a_full_disk(run.job, tmp_path, run.expected, size)


def test_every_damage_is_noticed(run: Run, tmp_path: Path) -> None:
    count, silent = faults.unnoticed(run.workdir, tmp_path, seed=0)
    assert count > 30 and not silent


def test_damaged_checkpoints_are_passed_over(run: Run, tmp_path: Path) -> None:
    faults.survive_damage(run.job, tmp_path, run.expected, run.workdir, faults.DAMAGES, seed=0)


def test_one_of_two_processes_is_lost(run: Run, tmp_path: Path) -> None:
    """First the one, then the one that coordinates, and then one is warned."""
    pair = dataclasses.replace(run.job, processes=2)
    pair.export(tmp_path / "straight")
    workdir = tmp_path / "lost"
    for victim, step in ((1, 7), (0, 8)):
        faults.lose(pair, workdir, victim, faults.between_saves(workdir, step))
    faults.warn(pair, workdir, 1, faults.between_saves(workdir, 12))
    pair.finish(workdir)
    faults.assert_as_if_nothing_happened(workdir, faults.outcome(tmp_path / "straight"))
