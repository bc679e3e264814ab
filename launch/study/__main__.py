"""Computes the study's missing cells, and writes its report."""

from pathlib import Path

from absl import flags

from d2f_jax import program
from d2f_jax.errors import InputError
from launch.study import cells, plan, report
from launch.study.bench import Bench, Size

_WORKDIR = flags.DEFINE_string("workdir", "study", "For the rendered world, checkpoints and trained weights.")
_RESULTS = flags.DEFINE_string("results", "results", "For study.md, and study/ with records and pictures.")
_ONLY = flags.DEFINE_string("only", "", "Beginning of the names of the cells to compute, as adapt- or align-.")
_SKIP = flags.DEFINE_string("skip", "", "Beginning of the names of the cells not to compute, as cost.")
_REPORT = flags.DEFINE_bool("report", False, "Compute nothing, only write the report.")


def main() -> None:
    size = Size()
    planned = plan.cells(size)
    folder = Path(_RESULTS.value) / "study" / "cells"
    if not _REPORT.value:
        wanted = [c for c in planned if c.name.startswith(_ONLY.value)]
        if _SKIP.value:
            wanted = [c for c in wanted if not c.name.startswith(_SKIP.value)]
        if not wanted:
            raise InputError(f"--only={_ONLY.value} --skip={_SKIP.value}: no cell is left")
        cells.settle(wanted, planned, Bench(Path(_WORKDIR.value), size), folder)
    print(f"report: {report.write(size, planned, Path(_RESULTS.value))}")


if __name__ == "__main__":
    program.run(main)
