"""Text-to-image, judged on held-out captions of ShapesWorld: what is asked of a pipeline, and what it answers."""

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tqdm import tqdm

from d2f_jax import metrics, report
from d2f_jax.pipeline import Pipeline
from d2f_jax.sampler import Sampler

GUIDANCE = 3.0
SHOWN = 4  # pictures of a strip
BATCH = 64  # pictures drawn at once


SAMPLERS = {
    "Euler": Sampler("euler"),
    "Euler from t = 0": Sampler("euler", begin="zero"),  # as the published code has them
    "Heun": Sampler("heun"),
    "DDIM": Sampler("ddim"),
    "DDIM on the flow grid": Sampler("ddim_on_flow_grid"),
}


@dataclasses.dataclass(frozen=True)
class Question:
    """Pictures by one of SAMPLERS in so many steps; at `marks` of a run, or at each of them for ()."""

    sampler: str
    step_counts: tuple[int, ...]
    marks: tuple[int, ...] = ()
    guidance: float = GUIDANCE


@dataclasses.dataclass(frozen=True)
class Exam:
    """Held-out captions and the statistics of their pictures; `seed` is of the noise."""

    prompts: list[str]
    reference: metrics.FeatureStatistics
    classifier: metrics.ShapesClassifier
    seed: int
    pixels: int

    def answers(
        self, pipeline: Pipeline, questions: Sequence[Question], mark: int, strip: Path | None = None
    ) -> dict[str, Any]:
        """Scores by sampler and number of steps. Pictures of the first question are written to the file `strip`."""
        told: dict[str, Any] = {}
        for i, question in enumerate(questions):
            if not question.marks or mark in question.marks:
                scores, images = self._scores(pipeline, question)
                told[question.sampler] = told.get(question.sampler, {}) | scores
                if strip is not None and i == 0:
                    keep(strip, images[:SHOWN])
        return told

    def judge(self, images_NxHxWx3: np.ndarray) -> dict[str, float]:
        scores = metrics.shapes_scores(self.classifier, images_NxHxWx3, prompts=self.prompts, reference=self.reference)
        return scores._asdict()

    def _scores(self, pipeline: Pipeline, question: Question) -> tuple[dict[str, dict[str, float]], np.ndarray]:
        """By number of steps, and the pictures uint8 [N, H, W, 3] of the first of these."""
        drawn = {
            n: sampled(
                lambda rows, n=n: pipeline(
                    [self.prompts[i] for i in rows],
                    num_steps=n,
                    guidance_scale=question.guidance,
                    seed=self.seed,
                    first=rows[0],
                    height=self.pixels,
                    width=self.pixels,
                    sampler=SAMPLERS[question.sampler],
                ),
                len(self.prompts),
                f"{question.sampler}, {n} steps",
            )
            for n in question.step_counts
        }
        return {str(n): self.judge(images) for n, images in drawn.items()}, next(iter(drawn.values()))


def keep(strip: Path, images_NxHxWx3: np.ndarray) -> None:
    """Writes pictures side by side."""
    strip.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(report.tile(images_NxHxWx3, len(images_NxHxWx3))).save(strip)


def sampled(draw: Callable[[range], np.ndarray], count: int, told: str) -> np.ndarray:
    """`draw` of all rows, a batch at a time, with a bar that is `told`."""
    with tqdm(total=count, desc=told, unit="image", leave=False) as bar:
        batches = []
        for first in range(0, count, BATCH):
            rows = range(first, min(first + BATCH, count))
            batches.append(draw(rows))
            bar.update(len(rows))
    return np.concatenate(batches)
