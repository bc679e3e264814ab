"""What pictures are judged by: gathered batch by batch, by every process its share, and told for all of them."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from d2f_jax import metrics
from d2f_jax.errors import InputError
from d2f_jax.metrics import FeatureRows, FeatureStatistics, Means
from d2f_jax.models.inception import InceptionV3

_NO_FEATURES, _NO_ROWS, _NO_VALUES = FeatureStatistics.empty(0), FeatureRows(), Means()


@dataclasses.dataclass(frozen=True)
class Judges:
    """The networks that look at pictures; None for those whose weights are not given.

    `kid` says whether the rows of InceptionV3's features are kept for KID: 8 kB for each picture, drawn or real, in
    every process. `shapes` finds the solids that captions of ShapesWorld name. `colours` says whether the real pictures
    are of one colour each, and the drawn ones are held against it.
    """

    inception: InceptionV3 | None
    kid: bool
    clip: metrics.Clip | None
    aesthetic: metrics.Aesthetic | None
    shapes: metrics.ShapesClassifier | None
    colours: bool = False

    @classmethod
    def load(
        cls,
        inception: str | Path | None = None,
        clip: str | Path | None = None,
        aesthetic: str | Path | None = None,
        *,
        kid: bool = False,
        shapes: bool,
        colours: bool = False,
    ) -> "Judges":
        """Raises InputError for files that are not what they should be, and for what lacks another that it needs."""
        if kid and not inception:
            raise InputError("--kid needs the weights of InceptionV3; give --inception=FILE")
        if aesthetic and not clip:
            raise InputError("--aesthetic judges what CLIP sees; give --clip=openai/clip-vit-large-patch14, too")
        seeing = metrics.load_clip_score(clip) if clip else None
        return cls(
            metrics.load_inception(inception) if inception else None,
            kid,
            seeing,
            metrics.load_aesthetic(aesthetic, seeing) if aesthetic and seeing else None,
            metrics.load_classifier() if shapes else None,
            colours,
        )

    def missing(self) -> list[str]:
        """What cannot be told, and which file would tell it."""
        told = []
        if self.inception is None:
            told.append("FID: give --inception=FILE (d2f_jax.metrics.load_inception tells which)")
        if not self.kid:
            told.append("KID: give --inception=FILE and --kid")
        if self.clip is None:
            told.append("CLIP score: give --clip=FOLDER_OR_HUB_ID, such as openai/clip-vit-large-patch14")
        if self.aesthetic is None:
            told.append(
                "aesthetic score: give --aesthetic=sac+logos+ava1-l14-linearMSE.pth (of "
                "github.com/christophschuhmann/improved-aesthetic-predictor) and --clip=openai/clip-vit-large-patch14"
            )
        return told


@dataclasses.dataclass(frozen=True)
class Gathered:
    """Of one set of pictures, as far as a process has seen it.

    No picture is kept, and of features their statistics alone, unless KID needs the rows.
    """

    inception: FeatureStatistics = _NO_FEATURES
    rows: FeatureRows = _NO_ROWS
    shapes: FeatureStatistics = _NO_FEATURES
    means: Means = _NO_VALUES
    captions: Means = _NO_VALUES

    def add_real(self, judges: Judges, index_N: np.ndarray, images_NxHxWx3: np.ndarray) -> "Gathered":
        """uint8 pictures with their numbers among all."""
        return self._add(judges, index_N, images_NxHxWx3, [""] * len(index_N), {})

    def add_drawn(
        self,
        judges: Judges,
        index_N: np.ndarray,
        images_NxHxWx3: np.ndarray,
        texts: Sequence[str],
        real_NxHxWx3: np.ndarray,
        known: dict[str, np.ndarray],
    ) -> "Gathered":
        """Likewise those drawn of `texts`, beside the real pictures that these belong to, and what is `known` of them.

        That is values [N] by name, of which the means are told.
        """
        if not len(index_N):
            return self
        pair = images_NxHxWx3, real_NxHxWx3
        values = {"psnr": metrics.psnr(*pair, data_range=255), "ssim": metrics.ssim(*pair, data_range=255)}
        if judges.colours:
            values["colour_error"] = metrics.absolute_error(*pair)
        if judges.clip is not None:
            shown_NxP = judges.clip.see(images_NxHxWx3)
            values["clip_score"] = judges.clip.score(shown_NxP, texts)
            if judges.aesthetic is not None:
                values["aesthetic_score"] = judges.aesthetic(shown_NxP)
        return self._add(judges, index_N, images_NxHxWx3, texts, values | known)

    def _add(
        self, judges: Judges, index_N: np.ndarray, images: np.ndarray, texts: Sequence[str], values: dict[str, Any]
    ) -> "Gathered":
        if not len(index_N):
            return self
        found = Gathered(means=Means().add(values) if values else Means())
        if judges.inception is not None:
            features = metrics.inception_features(judges.inception, images)
            rows = found.rows.add(index_N, features) if judges.kid else found.rows
            found = dataclasses.replace(found, inception=FeatureStatistics.of(features), rows=rows)
        if judges.shapes is not None:
            features, hits = metrics.shapes_judgement(judges.shapes, images, texts)
            captions = Means().add({"caption_accuracy": hits}) if len(hits) else Means()
            found = dataclasses.replace(found, shapes=FeatureStatistics.of(features), captions=captions)
        return self.merge(found)

    def merge(self, other: "Gathered") -> "Gathered":
        return Gathered(
            self.inception.merge(other.inception),
            self.rows.merge(other.rows),
            self.shapes.merge(other.shapes),
            self.means.merge(other.means),
            self.captions.merge(other.captions),
        )


def scores(judges: Judges, drawn: Gathered, real: Gathered) -> dict[str, float]:
    """Of what all processes have drawn against real pictures; both are merged already.

    `fid`, `kid` and, of more than 1000 pictures, `kid_std`; on ShapesWorld `shapes_frechet_distance` and
    `caption_accuracy`; `clip_score`; `aesthetic_score`; and, picture by picture against the real one of the same
    caption, `psnr` in dB, `ssim` and, where that is of one colour, `colour_error` in levels of 255.
    """
    told: dict[str, float] = {}
    if judges.inception is not None:
        told["fid"] = metrics.frechet_distance(drawn.inception, real.inception)
    if judges.kid:
        a, b = drawn.rows.sorted(), real.rows.sorted()
        smaller = min(len(a), len(b))
        kid = metrics.kernel_distance(a, b, subset_size=min(1000, smaller))
        told["kid"] = kid.mean
        if smaller > 1000:  # else each subset is all there is
            told["kid_std"] = kid.std
    if judges.shapes is not None:
        told["shapes_frechet_distance"] = metrics.frechet_distance(drawn.shapes, real.shapes)
        told |= drawn.captions.means()
    return told | drawn.means.means()
