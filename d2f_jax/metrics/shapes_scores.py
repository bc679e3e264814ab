"""The two numbers by which ShapesWorld's generated pictures are compared."""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from d2f_jax.metrics.batches import check_pictures, in_batches
from d2f_jax.metrics.captions import caption_accuracy, caption_hits
from d2f_jax.metrics.classifier import NUM_FEATURES, ShapesClassifier
from d2f_jax.metrics.frechet import FeatureStatistics, frechet_distance


class Scores(NamedTuple):
    """`frechet_distance` to real pictures, lower is better; `caption_accuracy` in [0, 1], higher is better."""

    frechet_distance: float
    caption_accuracy: float


def feature_statistics(classifier: ShapesClassifier, images_NxHxWx3: np.ndarray) -> FeatureStatistics:
    """Of real uint8 pictures: the reference of `shapes_scores`. Take as many as there will be generated ones."""
    features_NxF, _ = _judge(classifier, images_NxHxWx3)
    return FeatureStatistics.of(features_NxF)


def shapes_scores(
    classifier: ShapesClassifier,
    images_NxHxWx3: np.ndarray,
    *,
    prompts: Sequence[str],
    reference: FeatureStatistics,
) -> Scores:
    """Of generated uint8 pictures and the captions they came from; `reference` of real ones of their size."""
    features_NxF, logits_NxP = _judge(classifier, images_NxHxWx3)
    distance = frechet_distance(FeatureStatistics.of(features_NxF), reference)
    return Scores(distance, caption_accuracy(logits_NxP, prompts))


def shapes_judgement(
    classifier: ShapesClassifier, images_NxHxWx3: np.ndarray, prompts: Sequence[str]
) -> tuple[np.ndarray, np.ndarray]:
    """Features float32 [N, F] of uint8 pictures, and of every solid that the captions name whether it is seen, bool."""
    features_NxF, logits_NxP = _judge(classifier, images_NxHxWx3)
    return features_NxF, caption_hits(logits_NxP, prompts)


_BATCH = 64


@nnx.jit
def _apply(classifier: ShapesClassifier, images_BxHxWx3: jax.Array) -> jax.Array:
    return jnp.concatenate(classifier(images_BxHxWx3.astype(jnp.float32) / 127.5 - 1), -1)


def _judge(classifier: ShapesClassifier, images_NxHxWx3: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Features and logits."""
    check_pictures(images_NxHxWx3)
    both_NxFP = in_batches(lambda batch: _apply(classifier, batch), images_NxHxWx3, _BATCH)
    return both_NxFP[:, :NUM_FEATURES], both_NxFP[:, NUM_FEATURES:]
