"""What pictures are judged by: gathered batch by batch, by every process its share, and told for all of them."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from d2f_jax import metrics
from d2f_jax.metrics import FeatureRows, Means
from d2f_jax.models.inception import InceptionV3


@dataclasses.dataclass(frozen=True)
class Judges:
    """The networks that look at pictures; None for those whose weights are not given.

    `shapes` finds the solids that captions of ShapesWorld name.
    """

    inception: InceptionV3 | None
    clip: metrics.Clip | None
    shapes: metrics.ShapesClassifier | None

    @classmethod
    def load(cls, inception: str | Path | None, clip: str | Path | None, *, shapes: bool) -> "Judges":
        """Raises InputError for files that are not what they should be."""
        return cls(
            metrics.load_inception(inception) if inception else None,
            metrics.load_clip_score(clip) if clip else None,
            metrics.load_classifier() if shapes else None,
        )

    @property
    def some(self) -> bool:
        return not (self.inception is None and self.clip is None and self.shapes is None)

    def missing(self) -> list[str]:
        """What cannot be told, and which file would tell it."""
        told = []
        if self.inception is None:
            told.append("FID, KID: give --inception=FILE (d2f_jax.metrics.load_inception tells which)")
        if self.clip is None:
            told.append("CLIP score: give --clip=FOLDER_OR_HUB_ID, such as openai/clip-vit-large-patch14")
        return told


@dataclasses.dataclass(frozen=True)
class Gathered:
    """Of one set of pictures, as far as a process has seen it."""

    inception: FeatureRows = dataclasses.field(default_factory=FeatureRows)
    shapes: FeatureRows = dataclasses.field(default_factory=FeatureRows)
    clip: Means = dataclasses.field(default_factory=Means)
    captions: Means = dataclasses.field(default_factory=Means)

    def add(self, judges: Judges, index_N: np.ndarray, images_NxHxWx3: np.ndarray, texts: Sequence[str]) -> "Gathered":
        """Pictures uint8 with their numbers among all, and what they should show."""
        found = self
        if not len(index_N):
            return found
        if judges.inception is not None:
            features = metrics.inception_features(judges.inception, images_NxHxWx3)
            found = dataclasses.replace(found, inception=found.inception.add(index_N, features))
        if judges.clip is not None:
            score_N = judges.clip(images_NxHxWx3, texts)
            found = dataclasses.replace(found, clip=found.clip.add({"clip_score": score_N}))
        if judges.shapes is not None:
            features, hits = metrics.shapes_judgement(judges.shapes, images_NxHxWx3, texts)
            found = dataclasses.replace(
                found,
                shapes=found.shapes.add(index_N, features),
                captions=found.captions.add({"caption_accuracy": hits}) if len(hits) else found.captions,
            )
        return found

    def merge(self, other: "Gathered") -> "Gathered":
        return Gathered(
            self.inception.merge(other.inception),
            self.shapes.merge(other.shapes),
            self.clip.merge(other.clip),
            self.captions.merge(other.captions),
        )


def scores(judges: Judges, drawn: Gathered, real: Gathered) -> dict[str, float]:
    """Of what all processes have drawn against real pictures; both are merged already.

    `fid`, `kid` and `kid_std`, `clip_score`; on ShapesWorld `shapes_frechet_distance` and `caption_accuracy`.
    """
    told: dict[str, float] = {}
    if judges.inception is not None:
        a, b = drawn.inception.sorted(), real.inception.sorted()
        told["fid"] = _frechet(a, b)
        kid = metrics.kernel_distance(a, b, subset_size=min(1000, len(a), len(b)))
        told |= {"kid": kid.mean, "kid_std": kid.std}
    if judges.clip is not None:
        told |= drawn.clip.means()
    if judges.shapes is not None:
        told["shapes_frechet_distance"] = _frechet(drawn.shapes.sorted(), real.shapes.sorted())
        told |= drawn.captions.means()
    return told


def _frechet(a_NxF: np.ndarray, b_MxF: np.ndarray) -> float:
    return metrics.frechet_distance(*(metrics.FeatureStatistics.of(x) for x in (a_NxF, b_MxF)))
