"""The InceptionV3 that FID and KID are defined on, as torch-fidelity and pytorch-fid hold it.

TensorFlow's graph `inception-2015-12-05`, which differs from the paper's and torchvision's network in three places that
move the score: pictures are resized as TensorFlow 1 did, without half-pixel centres or antialiasing; average pooling
does not count the padding; and the last block pools by maximum. Szegedy et al. (2016); Heusel et al. (2017).
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

NUM_FEATURES = 2048
SIZE = 299  # pixels; what the network looks at
_CLASSES = 1008


class InceptionV3(nnx.Module):
    """`inception(image_BxHxWx3) -> features_BxF`, F = 2048: the last average pooling, float32.

    Pictures of any size with values 0 to 255, uint8 or float. The classifier behind the features is in the checkpoint
    and so in the module; neither distance uses it.
    """

    def __init__(self, *, rngs: nnx.Rngs) -> None:
        self.Conv2d_1a_3x3 = BasicConv2d(3, 32, (3, 3), stride=2, padding=(0, 0), rngs=rngs)
        self.Conv2d_2a_3x3 = BasicConv2d(32, 32, (3, 3), padding=(0, 0), rngs=rngs)
        self.Conv2d_2b_3x3 = BasicConv2d(32, 64, (3, 3), padding=(1, 1), rngs=rngs)
        self.Conv2d_3b_1x1 = BasicConv2d(64, 80, (1, 1), padding=(0, 0), rngs=rngs)
        self.Conv2d_4a_3x3 = BasicConv2d(80, 192, (3, 3), padding=(0, 0), rngs=rngs)
        channels = 192
        for name, (branches, pool) in _BLOCKS.items():
            block = Block(channels, branches, pool, rngs=rngs)
            setattr(self, name, block)
            channels = block.channels
        self.fc = nnx.Linear(NUM_FEATURES, _CLASSES, rngs=rngs)

    def __call__(self, image_BxHxWx3: jax.Array) -> jax.Array:
        x = (resize(image_BxHxWx3.astype(jnp.float32), SIZE) - 128) / 128
        x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x)))
        x = self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(_halved(x)))
        x = _halved(x)
        for name in _BLOCKS:
            x = getattr(self, name)(x)
        return x.mean((1, 2))


class BasicConv2d(nnx.Module):
    """Convolution without bias, batch norm by its running statistics, ReLU; padding as PyTorch counts it."""

    def __init__(
        self,
        inputs: int,
        outputs: int,
        size: tuple[int, int],
        *,
        stride: int = 1,
        padding: tuple[int, int],
        rngs: nnx.Rngs,
    ) -> None:
        sides = [(p, p) for p in padding]
        self.conv = nnx.Conv(inputs, outputs, size, strides=stride, padding=sides, use_bias=False, rngs=rngs)
        self.bn = nnx.BatchNorm(outputs, use_running_average=True, epsilon=1e-3, rngs=rngs)

    def __call__(self, x_BxHxWxC: jax.Array) -> jax.Array:
        return nnx.relu(self.bn(self.conv(x_BxHxWxC)))


class Block(nnx.Module):
    """Branches side by side, their channels in a row; the last is a pooling, projected where `branch_pool` is named.

    Convolutions of stride 1 keep the size, those of stride 2 and the pooling beside them use no padding.
    """

    def __init__(self, inputs: int, branches: "_Branches", pool: str, *, rngs: nnx.Rngs) -> None:
        self.branches, self.pool, self.channels = branches, pool, 0
        for branch in branches:
            channels = inputs
            for stage in branch:
                for name, outputs, size, stride in stage:
                    padding = (size[0] // 2, size[1] // 2) if stride == 1 else (0, 0)
                    setattr(self, name, BasicConv2d(channels, outputs, size, stride=stride, padding=padding, rngs=rngs))
                channels = sum(conv.outputs for conv in stage)
            self.channels += channels
        if pool == "halve":
            self.channels += inputs

    def __call__(self, x_BxHxWxC: jax.Array) -> jax.Array:
        pooled = _POOLS[self.pool](x_BxHxWxC)
        parts = []
        for branch in self.branches:
            h = pooled if branch[0][0].name == "branch_pool" else x_BxHxWxC
            for stage in branch:
                h = jnp.concatenate([getattr(self, conv.name)(h) for conv in stage], -1)
            parts.append(h)
        return jnp.concatenate(parts + ([pooled] if self.pool == "halve" else []), -1)


def resize(image_BxHxWxC: jax.Array, size: int) -> jax.Array:
    """To `size` x `size`, bilinear as TensorFlow 1 (`align_corners=False`): pixel i is read at i * in / out."""
    for axis in (1, 2):
        length = image_BxHxWxC.shape[axis]
        place = np.arange(size, dtype=np.float32) * np.float32(length / size)
        low = place.astype(np.int32)
        high = np.minimum(low + 1, length - 1)
        weight = (place - low).reshape((-1, 1, 1) if axis == 1 else (-1, 1))
        below, above = (jnp.take(image_BxHxWxC, index, axis=axis) for index in (low, high))
        image_BxHxWxC = below + (above - below) * weight
    return image_BxHxWxC


def _halved(x: jax.Array) -> jax.Array:
    return nnx.max_pool(x, (3, 3), strides=(2, 2))


_POOLS = {
    "halve": _halved,
    "mean": lambda x: nnx.avg_pool(x, (3, 3), strides=(1, 1), padding="SAME", count_include_pad=False),
    "max": lambda x: nnx.max_pool(x, (3, 3), strides=(1, 1), padding="SAME"),
}


class _Conv(NamedTuple):
    name: str
    outputs: int
    size: tuple[int, int] = (1, 1)
    stride: int = 1


# A block's branches, each a chain of stages; the convolutions of a stage read the same input.
_Branches = tuple[tuple[tuple[_Conv, ...], ...], ...]


def _chain(prefix: str, *convs: tuple) -> tuple[tuple[_Conv, ...], ...]:
    """Named `prefix`, or `prefix_1`, `prefix_2`, ... where there are several."""
    return tuple(
        (_Conv(f"{prefix}_{i}" if len(convs) > 1 else prefix, *conv),) for i, conv in enumerate(convs, start=1)
    )


def _a(pool: int) -> tuple[_Branches, str]:
    return (
        _chain("branch1x1", (64,)),
        _chain("branch5x5", (48,), (64, (5, 5))),
        _chain("branch3x3dbl", (64,), (96, (3, 3)), (96, (3, 3))),
        _chain("branch_pool", (pool,)),
    ), "mean"


def _b() -> tuple[_Branches, str]:
    return (
        _chain("branch3x3", (384, (3, 3), 2)),
        _chain("branch3x3dbl", (64,), (96, (3, 3)), (96, (3, 3), 2)),
    ), "halve"


def _c(width: int) -> tuple[_Branches, str]:
    wide, tall = (1, 7), (7, 1)
    return (
        _chain("branch1x1", (192,)),
        _chain("branch7x7", (width,), (width, wide), (192, tall)),
        _chain("branch7x7dbl", (width,), (width, tall), (width, wide), (width, tall), (192, wide)),
        _chain("branch_pool", (192,)),
    ), "mean"


def _d() -> tuple[_Branches, str]:
    return (
        _chain("branch3x3", (192,), (320, (3, 3), 2)),
        _chain("branch7x7x3", (192,), (192, (1, 7)), (192, (7, 1)), (192, (3, 3), 2)),
    ), "halve"


def _e(pool: str) -> tuple[_Branches, str]:
    def fork(name: str) -> tuple[_Conv, ...]:
        return _Conv(f"{name}a", 384, (1, 3)), _Conv(f"{name}b", 384, (3, 1))

    return (
        _chain("branch1x1", (320,)),
        ((_Conv("branch3x3_1", 384),), fork("branch3x3_2")),
        (*_chain("branch3x3dbl", (448,), (384, (3, 3))), fork("branch3x3dbl_3")),
        _chain("branch_pool", (192,)),
    ), pool


_BLOCKS: dict[str, tuple[_Branches, str]] = {
    "Mixed_5b": _a(32),
    "Mixed_5c": _a(64),
    "Mixed_5d": _a(64),
    "Mixed_6a": _b(),
    "Mixed_6b": _c(128),
    "Mixed_6c": _c(160),
    "Mixed_6d": _c(160),
    "Mixed_6e": _c(192),
    "Mixed_7a": _d(),
    "Mixed_7b": _e("mean"),
    "Mixed_7c": _e("max"),
}
