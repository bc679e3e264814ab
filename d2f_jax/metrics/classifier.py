"""The judge of ShapesWorld's pictures: a small CNN that names the coloured solids in them.

Its penultimate layer gives the features of the Fréchet distance, its logits the caption accuracy. The weights ship
with the package; `launch/train_classifier.py` made them. Letters: B batch, H height, W width, C channels, F features,
P pairs (colour, shape).
"""

import importlib.resources
import itertools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import safetensors.numpy
from flax import nnx

from d2f_jax.data.shapes import COLOURS, SHAPES
from d2f_jax.models.layers import shapes_of

PAIRS: tuple[tuple[str, str], ...] = tuple(itertools.product(COLOURS, SHAPES))
NUM_FEATURES = 96
_SIZE = 64  # pixels; what the network looks at
_WIDTHS = (24, 48, 64, 96)
_ASSET = "shapes_classifier.safetensors"


class Judgement(NamedTuple):
    """`features` [B, F]; `logits` [B, P]: the presence of each pair of `PAIRS`, independently of the others."""

    features: jax.Array
    logits: jax.Array


class ShapesClassifier(nnx.Module):
    """Four strided convolutions with a residual block each, pooled by mean and maximum."""

    def __init__(self, rngs: nnx.Rngs):
        widths = list(itertools.pairwise((3, *_WIDTHS)))
        self.down = nnx.List([nnx.Conv(i, o, (3, 3), strides=2, rngs=rngs) for i, o in widths])
        self.norm = nnx.List([nnx.GroupNorm(o, num_groups=8, rngs=rngs) for _, o in widths])
        self.conv = nnx.List([nnx.Conv(o, o, (3, 3), rngs=rngs) for _, o in widths[1:]])
        self.features = nnx.Linear(2 * _WIDTHS[-1], NUM_FEATURES, rngs=rngs)
        self.logits = nnx.Linear(NUM_FEATURES, len(PAIRS), rngs=rngs)

    def __call__(self, image_BxHxWx3: jax.Array) -> Judgement:
        """Of pictures of any size in [-1, 1]."""
        x_BxHxWxC = resize(image_BxHxWx3)
        for k, (down, norm) in enumerate(zip(self.down, self.norm, strict=True)):
            x_BxHxWxC = nnx.gelu(norm(down(x_BxHxWxC)))
            if k > 0:  # at full width the plain stem is enough
                x_BxHxWxC = x_BxHxWxC + nnx.gelu(self.conv[k - 1](x_BxHxWxC))
        pooled_BxC = jnp.concatenate([x_BxHxWxC.mean((1, 2)), x_BxHxWxC.max((1, 2))], -1)
        features_BxF = nnx.gelu(self.features(pooled_BxC))
        return Judgement(features_BxF, self.logits(features_BxF))


def resize(image_BxHxWx3: jax.Array) -> jax.Array:
    """To the 64 x 64 pixels that the network looks at; bilinear, antialiased."""
    shape = (len(image_BxHxWx3), _SIZE, _SIZE, 3)
    return jax.image.resize(image_BxHxWx3.astype(jnp.float32), shape, "bilinear", antialias=True)


def load_classifier() -> ShapesClassifier:
    """With the weights that ship with the package."""
    data = importlib.resources.files("d2f_jax").joinpath("assets", _ASSET).read_bytes()
    tensors = safetensors.numpy.load(data)
    graphdef, abstract = nnx.split(shapes_of(ShapesClassifier))
    flat = dict(nnx.to_flat_state(abstract))
    names = {path: ".".join(map(str, path)) for path in flat}
    if set(names.values()) != set(tensors):
        raise ValueError(f"{_ASSET} does not fit ShapesClassifier: {sorted(set(names.values()) ^ set(tensors))}")
    for path, name in names.items():
        flat[path] = flat[path].replace(jnp.asarray(tensors[name].astype(np.float32)))
    return nnx.merge(graphdef, nnx.from_flat_state(flat))
