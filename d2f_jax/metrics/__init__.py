"""Measures of generated pictures and of depth.

Each is gathered batch by batch in every process, and `distributed.merged` gives all of them the whole:

    statistics, means = FeatureStatistics.empty(2048), Means()
    for images, texts in batches_of_this_process:
        statistics = statistics.add(inception_features(inception, images))
        means = means.add({"clip_score": clip(images, texts)})
    fid = frechet_distance(distributed.merged(statistics), reference)
    clip_score = distributed.merged(means).means()["clip_score"]
"""

from d2f_jax.metrics.aesthetic import Aesthetic as Aesthetic
from d2f_jax.metrics.aesthetic import load_aesthetic as load_aesthetic
from d2f_jax.metrics.captions import caption_accuracy as caption_accuracy
from d2f_jax.metrics.captions import caption_pairs as caption_pairs
from d2f_jax.metrics.classifier import ShapesClassifier as ShapesClassifier
from d2f_jax.metrics.classifier import load_classifier as load_classifier
from d2f_jax.metrics.clip_score import Clip as Clip
from d2f_jax.metrics.clip_score import clip_pixels as clip_pixels
from d2f_jax.metrics.clip_score import load_clip_score as load_clip_score
from d2f_jax.metrics.depth import DepthErrors as DepthErrors
from d2f_jax.metrics.depth import DepthSpace as DepthSpace
from d2f_jax.metrics.depth import depth_errors as depth_errors
from d2f_jax.metrics.depth_protocols import DEPTH_PROTOCOLS as DEPTH_PROTOCOLS
from d2f_jax.metrics.depth_protocols import DepthProtocol as DepthProtocol
from d2f_jax.metrics.frechet import FeatureStatistics as FeatureStatistics
from d2f_jax.metrics.frechet import frechet_distance as frechet_distance
from d2f_jax.metrics.images import absolute_error as absolute_error
from d2f_jax.metrics.images import psnr as psnr
from d2f_jax.metrics.images import ssim as ssim
from d2f_jax.metrics.inception import inception_features as inception_features
from d2f_jax.metrics.inception import load_inception as load_inception
from d2f_jax.metrics.kernel import FeatureRows as FeatureRows
from d2f_jax.metrics.kernel import KernelDistance as KernelDistance
from d2f_jax.metrics.kernel import kernel_distance as kernel_distance
from d2f_jax.metrics.means import Means as Means
from d2f_jax.metrics.shapes_scores import Scores as Scores
from d2f_jax.metrics.shapes_scores import feature_statistics as feature_statistics
from d2f_jax.metrics.shapes_scores import shapes_judgement as shapes_judgement
from d2f_jax.metrics.shapes_scores import shapes_scores as shapes_scores
