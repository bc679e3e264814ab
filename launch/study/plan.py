"""All cells of the study, in the order in which they are computed."""

from launch.study import adaptation, alignments, colours, cost, depth, reflow
from launch.study.bench import Size
from launch.study.cells import Cell


def cells(size: Size) -> list[Cell]:
    """The first seed of everything before the second: each claim is seen early, if only once."""
    by_seed = [
        cell
        for seed in size.seeds
        for part in (adaptation, alignments, reflow, depth, colours)
        for cell in part.cells(size, seed)
    ]
    return [*by_seed, cost.cell(size)]
