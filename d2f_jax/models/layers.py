"""What the UNet and the VAE are built of."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, Literal, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from d2f_jax.models import devices
from d2f_jax.models.attention import FUSED, attention

Tree = TypeVar("Tree")
Network = TypeVar("Network", bound=nnx.Module)
Recompute = Literal["nothing", "elementwise", "gathers", "everything"]
"""What of a block's inside is computed again in the backward pass.

"elementwise" keeps what costs: products with weights, and what fused attention made. "gathers" keeps these, but not the
weights themselves where devices gather them, and "everything" nothing but what fused attention made.
"""


@dataclasses.dataclass(frozen=True)
class Build:
    """How to make layers: what they compute in, what their parameters are kept in, and where these come from."""

    dtype: DTypeLike
    param_dtype: DTypeLike
    rngs: nnx.Rngs

    def linear(self, inputs: int, outputs: int, *, bias: bool = True) -> nnx.Linear:
        options = {"dtype": self.dtype, "param_dtype": self.param_dtype, "rngs": self.rngs}
        return nnx.Linear(inputs, outputs, use_bias=bias, **options)

    def conv(
        self, inputs: int, outputs: int, size: int, *, stride: int = 1, padding: int | None = None, bias: bool = True
    ) -> nnx.Conv:
        """Square kernel; padding on every side keeps the picture's size by default, as PyTorch pads."""
        options: dict[str, Any] = {"dtype": self.dtype, "param_dtype": self.param_dtype, "rngs": self.rngs}
        padding = size // 2 if padding is None else padding
        options |= {"strides": stride, "padding": padding, "conv_general_dilated": convolution}
        return nnx.Conv(inputs, outputs, (size, size), use_bias=bias, **options)

    def group_norm(self, channels: int, groups: int, eps: float) -> "GroupNorm":
        return GroupNorm(channels, groups, eps, self)

    def layer_norm(self, width: int, eps: float = 1e-5) -> "LayerNorm":
        return LayerNorm(width, eps, self)


class _OneKey(nnx.Rngs):
    """The same key for every parameter: for tracing alone, where nothing is drawn.

    nnx counts its keys in an array, and while it is traced every count takes longer than the one before.
    """

    def params(self) -> jax.Array:
        return self.default.key[...]


def shapes_of(build: Callable[[nnx.Rngs], Network]) -> Network:
    """The network that `build(rngs)` makes, with shapes in place of its parameters."""
    return nnx.eval_shape(lambda: build(_OneKey(0)))


def in_compute_dtype(params: Tree, dtype: DTypeLike) -> Tree:
    """Kernels in `dtype`, as their layers would cast them; done before they are sent between devices, it halves that.

    Norms, and the embedding of the timestep, compute in float32: theirs stay.
    """

    def cast(path: tuple[Any, ...], x: jax.Array) -> jax.Array:
        exact = x.ndim < 2 or "time_embedding" in jax.tree_util.keystr(path)
        return x if exact else x.astype(dtype)

    return jax.tree_util.tree_map_with_path(cast, params)


def convolution(
    x_BxHxWxI: jax.Array, kernel: jax.Array, strides: Sequence[int], padding: Sequence[tuple[int, int]], **options: Any
) -> jax.Array:
    """`jax.lax.conv_general_dilated` of `kernel` [h, w, I, O], dilated by nothing.

    On a CPU XLA's is up to twenty times slower than a product of matrices where the kernel is larger than the picture.
    """
    if devices.platform() != "cpu" or x_BxHxWxI.size > kernel.size:
        return jax.lax.conv_general_dilated(x_BxHxWxI, kernel, strides, padding, **options)
    padded = jnp.pad(x_BxHxWxI, ((0, 0), *padding, (0, 0)))
    height, width = (
        (whole - part) // stride + 1
        for whole, part, stride in zip(padded.shape[1:3], kernel.shape[:2], strides, strict=True)
    )
    (down, right), (rows, columns) = strides, kernel.shape[:2]
    shifted = [
        padded[:, i : i + height * down : down, j : j + width * right : right]
        for i in range(rows)
        for j in range(columns)
    ]
    return jnp.einsum("bhwi,io->bhwo", jnp.concatenate(shifted, axis=-1), kernel.reshape(-1, kernel.shape[-1]))


class GroupNorm(nnx.GroupNorm):
    """In float32; the result has the input's dtype."""

    def __init__(self, channels: int, groups: int, eps: float, build: Build) -> None:
        super().__init__(
            channels,
            num_groups=groups,
            epsilon=eps,
            dtype=jnp.float32,
            param_dtype=build.param_dtype,
            use_fast_variance=False,
            rngs=build.rngs,
        )

    def __call__(self, x: jax.Array) -> jax.Array:  # pyright: ignore[reportIncompatibleMethodOverride]
        return super().__call__(x).astype(x.dtype)


class LayerNorm(nnx.LayerNorm):
    """In float32; the result has the input's dtype."""

    def __init__(self, width: int, eps: float, build: Build) -> None:
        super().__init__(
            width,
            epsilon=eps,
            dtype=jnp.float32,
            param_dtype=build.param_dtype,
            use_fast_variance=False,
            rngs=build.rngs,
        )

    def __call__(self, x: jax.Array) -> jax.Array:  # pyright: ignore[reportIncompatibleMethodOverride]
        return super().__call__(x).astype(x.dtype)


class Block(nnx.Module):
    """Calls `forward`, and may keep less for its backward pass, which else has float32 copies of norms and activations.

    What fused attention made is always kept: it is small, and no cheaper the second time. `gathered`, if there is one,
    brings the block's parameters to every device, anew in each pass.
    """

    forward: Callable[..., jax.Array]

    def __init__(self) -> None:
        self.recompute: Recompute = "nothing"
        self.gathered: Callable[[nnx.State], nnx.State] | None = None

    def __call__(self, x: jax.Array, context: jax.Array | None = None) -> jax.Array:
        if self.recompute == "nothing":
            return self.forward(x, context)
        policy = _fused if self.recompute == "everything" else _costs
        structure, params, rest = nnx.split(self, nnx.Param, ...)

        def forward(params: nnx.State, x: jax.Array, context: jax.Array | None) -> jax.Array:
            params = params if self.gathered is None else self.gathered(params)
            return nnx.merge(structure, params, rest).forward(x, context)

        return jax.checkpoint(forward, policy=policy)(params, x, context)


def _costs(primitive: Any, *_: Any, **options: Any) -> bool:
    if primitive.name == "dot_general":  # with axes of batches it is attention's, whose scores are large and few FLOPs
        _, (lhs_batch, _) = options["dimension_numbers"]
        return not lhs_batch
    return primitive.name == "conv_general_dilated" or _fused(primitive, **options)


def _fused(primitive: Any, *_: Any, **options: Any) -> bool:
    return options.get("name") == FUSED or "dot_product_attention" in primitive.name  # splash, cuDNN


class Nothing(nnx.Module):
    """Holds the place of a layer without parameters, so that its neighbours keep their checkpoint's numbers."""


class ResnetBlock2D(Block):
    """Norm, SiLU, conv, twice, with the time embedding added between where the block has one (`time_width`)."""

    def __init__(
        self, inputs: int, outputs: int, *, time_width: int | None, groups: int, eps: float, build: Build
    ) -> None:
        super().__init__()
        self.norm1 = build.group_norm(inputs, groups, eps)
        self.conv1 = build.conv(inputs, outputs, 3)
        self.time_emb_proj = build.linear(time_width, outputs) if time_width else None
        self.norm2 = build.group_norm(outputs, groups, eps)
        self.conv2 = build.conv(outputs, outputs, 3)
        self.conv_shortcut = build.conv(inputs, outputs, 1) if inputs != outputs else None

    def forward(self, x: jax.Array, time_BxD: jax.Array | None) -> jax.Array:
        h = self.conv1(nnx.silu(self.norm1(x)))
        if self.time_emb_proj is not None and time_BxD is not None:
            h = h + self.time_emb_proj(nnx.silu(time_BxD))[:, None, None, :].astype(h.dtype)
        h = self.conv2(nnx.silu(self.norm2(h)))
        return h + (x if self.conv_shortcut is None else self.conv_shortcut(x))


class Downsample2D(nnx.Module):
    """Strided conv. The VAE's pads below and to the right only."""

    def __init__(self, channels: int, *, one_sided: bool, build: Build) -> None:
        self.one_sided = one_sided
        self.conv = build.conv(channels, channels, 3, stride=2, padding=0 if one_sided else 1)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.conv(jnp.pad(x, ((0, 0), (0, 1), (0, 1), (0, 0))) if self.one_sided else x)


class Upsample2D(nnx.Module):
    """Nearest neighbour, then conv; to twice the size or to the size of the skip that comes next."""

    def __init__(self, channels: int, *, build: Build) -> None:
        self.conv = build.conv(channels, channels, 3)

    def __call__(self, x: jax.Array, size: tuple[int, int] | None = None) -> jax.Array:
        _, height, width, _ = x.shape
        tall, wide = size or (2 * height, 2 * width)
        if (tall, wide) == (2 * height, 2 * width):
            x = x.repeat(2, axis=1).repeat(2, axis=2)
        else:  # PyTorch's nearest reads floor(i * in / out)
            x = x[:, jnp.arange(tall) * height // tall][:, :, jnp.arange(wide) * width // wide]
        return self.conv(x)


class Attention(nnx.Module):
    """Multi-head attention over tokens; `context_width` is set for cross-attention. The VAE's has biases, one head."""

    def __init__(
        self, width: int, *, heads: int, context_width: int | None = None, bias: bool = False, build: Build
    ) -> None:
        self.heads = heads
        self.to_q = build.linear(width, width, bias=bias)
        self.to_k = build.linear(context_width or width, width, bias=bias)
        self.to_v = build.linear(context_width or width, width, bias=bias)
        self.to_out = nnx.List([build.linear(width, width)])

    def __call__(self, x_BxLxD: jax.Array, context_BxMxD: jax.Array | None = None) -> jax.Array:
        context_BxMxD = x_BxLxD if context_BxMxD is None else context_BxMxD
        q, k, v = self.to_q(x_BxLxD), self.to_k(context_BxMxD), self.to_v(context_BxMxD)
        q, k, v = (y.reshape(*y.shape[:2], self.heads, -1) for y in (q, k, v))
        return self.to_out[0](attention(q, k, v).reshape(x_BxLxD.shape))


class GEGLU(nnx.Module):
    def __init__(self, inputs: int, outputs: int, *, build: Build) -> None:
        self.proj = build.linear(inputs, 2 * outputs)

    def __call__(self, x: jax.Array) -> jax.Array:
        value, gate = _halves(self.proj, x)
        return value * nnx.gelu(gate, approximate=False)


def _halves(layer: nnx.Module, x: jax.Array) -> Sequence[jax.Array]:
    """Of `layer(x)`, each a product by itself, so that their gradients need not be put together in memory.

    On TPUs this is a tenth of a transformer's cycles, by the compiler. A layer with an adapter beside it is called.
    """
    if not isinstance(layer, nnx.Linear) or layer.bias is None:
        return jnp.split(layer(x), 2, axis=-1)  # pyright: ignore[reportCallIssue]
    kernels, biases = (jnp.split(y[...].astype(layer.dtype), 2, axis=-1) for y in (layer.kernel, layer.bias))
    return [x.astype(layer.dtype) @ kernel + bias for kernel, bias in zip(kernels, biases, strict=True)]


class FeedForward(nnx.Module):
    def __init__(self, width: int, *, build: Build) -> None:
        inner = 4 * width
        self.net = nnx.List([GEGLU(width, inner, build=build), Nothing(), build.linear(inner, width)])

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.net[2](self.net[0](x))


class BasicTransformerBlock(nnx.Module):
    """Self-attention, cross-attention to the text, feed-forward; each on the normalised residual stream."""

    def __init__(self, width: int, *, heads: int, context_width: int, build: Build) -> None:
        self.norm1 = build.layer_norm(width)
        self.attn1 = Attention(width, heads=heads, build=build)
        self.norm2 = build.layer_norm(width)
        self.attn2 = Attention(width, heads=heads, context_width=context_width, build=build)
        self.norm3 = build.layer_norm(width)
        self.ff = FeedForward(width, build=build)

    def __call__(self, x_BxLxD: jax.Array, text_BxMxD: jax.Array) -> jax.Array:
        x_BxLxD = x_BxLxD + self.attn1(self.norm1(x_BxLxD))
        x_BxLxD = x_BxLxD + self.attn2(self.norm2(x_BxLxD), text_BxMxD)
        return x_BxLxD + self.ff(self.norm3(x_BxLxD))


class Transformer2DModel(Block):
    """Transformer blocks on a feature map's pixels, between two projections: 1x1 convs in SD 1.x, linear in 2.x."""

    def __init__(
        self,
        channels: int,
        *,
        heads: int,
        context_width: int,
        depth: int,
        groups: int,
        linear_projection: bool,
        build: Build,
    ) -> None:
        super().__init__()
        project = build.linear if linear_projection else lambda inputs, outputs: build.conv(inputs, outputs, 1)
        self.norm = build.group_norm(channels, groups, 1e-6)
        self.proj_in = project(channels, channels)
        self.transformer_blocks = nnx.List(
            BasicTransformerBlock(channels, heads=heads, context_width=context_width, build=build) for _ in range(depth)
        )
        self.proj_out = project(channels, channels)

    def forward(self, x: jax.Array, text_BxMxD: jax.Array) -> jax.Array:
        h = self.proj_in(self.norm(x))
        tokens_BxLxD = h.reshape(h.shape[0], -1, h.shape[-1])
        for block in self.transformer_blocks:
            tokens_BxLxD = block(tokens_BxLxD, text_BxMxD)
        return x + self.proj_out(tokens_BxLxD.reshape(h.shape))
