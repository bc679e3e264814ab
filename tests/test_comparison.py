"""Samplers side by side."""

import numpy as np

from d2f_jax import Pipeline, comparison
from d2f_jax.comparison import Contender
from d2f_jax.sampler import Sampler
from d2f_jax.subjects import Subject


def test_all_are_judged_and_the_first_are_kept() -> None:
    """Those of one cell at a time are held, however many there are."""

    def draw(pipeline: Pipeline, sampler: Sampler, rows: range, num_steps: int) -> np.ndarray:
        value = 100 * (sampler.name == "heun") + 10 * num_steps
        return np.stack([np.full((4, 4, 3), value + i, np.uint8) for i in rows])

    def judge(results: np.ndarray) -> str:
        return f"{results.mean():.1f} of {len(results)}"

    subject = Subject(("a", "b", "c", "d", "e"), draw, header="mean", judge=judge)
    pipeline = Pipeline.from_pretrained("tiny-sd")
    rows = [Contender("one\nof them", pipeline, Sampler()), Contender("other", pipeline, Sampler("heun"))]
    made = comparison.compare(rows, subject, 5, step_counts=(1, 2), batch_size=2, shown=3)
    assert [[cell[:, 0, 0, 0].tolist() for cell in row] for row in made.shown] == [
        [[10, 11, 12], [20, 21, 22]],
        [[110, 111, 112], [120, 121, 122]],
    ]
    assert all(cell.base is None for row in made.shown for cell in row)
    table = [[cell.strip() for cell in line.split("|")[1:-1]] for line in comparison.table(made).splitlines()]
    assert table[0] == ["mean", "1 step", "2 steps"]
    assert table[2:] == [["one of them", "12.0 of 5", "22.0 of 5"], ["other", "112.0 of 5", "122.0 of 5"]]
    assert comparison.picture(made).size[0] > 0
