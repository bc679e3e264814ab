"""Low-rank adaptation of linear layers and convolutions: `W + scale * A @ B`.

The network knows nothing of it. What is trained is a dictionary by parameter path: two factors for an adapted kernel,
and the parameter itself where a layer is trained fully. `merge` is a pure function from it and the base to the
parameters that the network runs with, for use inside the jitted step: gradients, the optimizer and the EMA hold what is
trained. Convolutions may depend on a spatial condition (LoRAdapter); theirs is no change of a kernel, and `attach` adds
it to the activations.
"""

import dataclasses
import math
import re
from collections.abc import Mapping

import jax
import jax.numpy as jnp
from flax import nnx

from d2f_jax.errors import InputError

Trained = dict[str, "Adapter | jax.Array"]

FIRST = r"conv_in\..*"
LAST = r"(conv_norm_out|conv_out)\..*"


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Adapter:
    """A convolution's `a` has the kernel of its base, `b` is 1x1: one product of matrices serves both."""

    a: jax.Array  # [I, R] or [H, W, I, R], drawn as the paper's published code does
    b: jax.Array  # [R, O], zeros: a new adapter changes nothing


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Conditional(Adapter):
    """A convolution's whose low-rank activations `z` become `z * (1 + c @ gamma) + c @ beta`."""

    gamma: jax.Array  # [C, R]
    beta: jax.Array  # [C, R]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Targets:
    """What is trained. A group has a rank, or a ratio with `rank = ceil(ratio * max(inputs, outputs))`; 0 is off.

    Attention means `to_q`, `to_k` and `to_v`, with `attention_out` also `to_out.0`; conv every convolution; mlp the
    feed-forward layers and the transformers' projections. These are convolutions in SD 1.x, and belong to conv there if
    conv is on. The first layer (`conv_in`) and the last (`conv_norm_out`, `conv_out`) are trained fully or, as
    convolutions, adapted. With `condition_channels` the adapters of convolutions are conditional.
    """

    self_attention_rank: int = 0
    self_attention_ratio: float = 0.0
    cross_attention_rank: int = 0
    cross_attention_ratio: float = 0.0
    attention_out: bool = False
    conv_rank: int = 0
    conv_ratio: float = 0.0
    mlp_rank: int = 0
    mlp_ratio: float = 0.0
    first_layer: bool = False
    last_layer: bool = False
    condition_channels: int = 0

    def rank(self, group: str, inputs: int, outputs: int) -> int:
        return getattr(self, f"{group}_rank") or math.ceil(getattr(self, f"{group}_ratio") * max(inputs, outputs))

    def on(self, group: str) -> bool:
        return getattr(self, f"{group}_rank") > 0 or getattr(self, f"{group}_ratio") > 0

    def patterns(self) -> dict[str, str]:
        """Kernel paths by group, of those that are on; the first that matches decides."""
        layers = r"to_q|to_k|to_v|to_out\.0" if self.attention_out else "to_q|to_k|to_v"
        patterns = {
            "self_attention": rf"(.*\.)?attn1\.({layers})\.kernel",
            "cross_attention": rf"(.*\.)?attn2\.({layers})\.kernel",
            "conv": r".*\.kernel",
            "mlp": r"(.*\.)?(proj_in|proj_out|ff\.net\.0\.proj|ff\.net\.2)\.kernel",
        }
        return {group: pattern for group, pattern in patterns.items() if self.on(group)}

    def full(self) -> list[str]:
        """Patterns of the parameters that are trained fully."""
        return [FIRST] * self.first_layer + [LAST] * self.last_layer


def init(params: nnx.State, key: jax.Array, targets: Targets) -> Trained:
    """New adapters, and copies of the parameters that are trained fully: merged, they are `params` bit for bit.

    No adapter has a higher rank than its kernel. Raises InputError for a target that is not in the network, and for a
    rank that is higher than that of every kernel it is meant for.
    """
    flat, patterns = flatten(params), targets.patterns()
    trained: Trained = {}
    highest = dict.fromkeys(patterns, 0)
    full = {path for path in flat if any(re.fullmatch(pattern, path) for pattern in targets.full())}
    kernels = [path for path, value in sorted(flat.items()) if path.endswith(".kernel") and value.ndim in (2, 4)]
    for i, path in enumerate(kernels):
        shape = flat[path].shape
        group = next((g for g, p in patterns.items() if re.fullmatch(p, path) and (g != "conv" or len(shape) == 4)), "")
        if path in full or not group:
            continue
        whole = min(math.prod(shape[:-1]), shape[-1])
        highest[group] = max(highest[group], whole)
        rank = min(targets.rank(group, *shape[-2:]), whole)
        channels = targets.condition_channels if group == "conv" else 0
        trained[path] = _new(jax.random.fold_in(key, i), shape, rank, channels)
    for group, whole in highest.items():
        rank = getattr(targets, f"{group}_rank")
        if not whole:
            raise InputError(f"lora {group} matches no layer of this network; set {group}_rank and {group}_ratio to 0")
        if rank > whole:
            raise InputError(f"lora {group}_rank={rank} is more than {whole}, the rank of the largest kernel; use less")
    for knob, pattern in (("first_layer", FIRST), ("last_layer", LAST)):
        if getattr(targets, knob) and not any(re.fullmatch(pattern, path) for path in full):
            raise InputError(f"lora {knob} matches no layer of this network; set it to False")
    if targets.attention_out and not (targets.on("self_attention") or targets.on("cross_attention")):
        raise InputError("lora attention_out adapts nothing without self_attention or cross_attention; give one a rank")
    if targets.condition_channels and not targets.on("conv"):
        raise InputError("lora condition_channels conditions nothing without conv; set conv_rank or conv_ratio")
    # A copy: what is trained is donated to the step, the base is not.
    trained |= {path: jnp.copy(flat[path]) for path in sorted(full)}
    if not trained:
        raise InputError("lora trains nothing; give a rank or a ratio to attention, conv or mlp")
    return trained


def merge(params: nnx.State, trained: Trained, *, scale: float) -> nnx.State:
    """The base parameters with `scale * a @ b` added to adapted kernels, and with what is trained fully in place."""
    flat = dict(nnx.to_flat_state(params))
    paths = {_dotted(path): path for path in flat}
    for name, entry in trained.items():
        variable = flat[paths[name]]
        old = variable[...]
        if isinstance(entry, Conditional):
            raise InputError(f"the adapter of {name} depends on a condition and cannot be merged; attach it")
        new = old + scale * product(entry) if isinstance(entry, Adapter) else entry
        flat[paths[name]] = variable.replace(new.astype(old.dtype))
    return nnx.from_flat_state(flat)


def split(trained: Trained, *, scale: float) -> tuple[Trained, dict[str, Adapter]]:
    """What `merge` takes, and the conditional adapters for `attach`, with `scale` in them."""
    conditional = {path: entry for path, entry in trained.items() if isinstance(entry, Conditional)}
    rest = {path: entry for path, entry in trained.items() if path not in conditional}
    return rest, {path: dataclasses.replace(entry, b=scale * entry.b) for path, entry in conditional.items()}


def product(adapter: Adapter) -> jax.Array:
    """`a @ b` [..., I, O], as exact as float32 is: it is added to weights, once for all activations."""
    return jnp.tensordot(adapter.a, adapter.b, 1, precision=jax.lax.Precision.HIGHEST)


def attach(
    network: nnx.Module, adapters: Mapping[str, Adapter], *, scale: float, condition: jax.Array | None = None
) -> None:
    """Has the layers of `network` add their adapters' low-rank activations, which for plain ones is what `merge` does.

    Changes `network` in place: give it one that was put together inside the function that is traced. `condition`
    [B, H, W, C] is brought to each convolution's output size by linear interpolation, over the area where it shrinks.
    """
    for path, adapter in adapters.items():
        if isinstance(adapter, Conditional) and condition is None:
            raise InputError(f"the adapter of {path} depends on a condition, and there is none; give condition")
        *parents, name, _ = path.split(".")
        parent = network
        for part in parents:
            parent = _child(parent, part)
        adapted = _Adapted(_child(parent, name), adapter, scale, condition)
        if isinstance(parent, nnx.List):
            parent[int(name)] = adapted
        else:
            setattr(parent, name, adapted)


def flatten(params: nnx.State) -> dict[str, jax.Array]:
    """Parameters by dotted path."""
    return {_dotted(path): variable[...] for path, variable in nnx.to_flat_state(params)}


class _Adapted(nnx.Module):
    """A layer, and its adapter beside it."""

    def __init__(self, base: nnx.Module, adapter: Adapter, scale: float, condition: jax.Array | None) -> None:
        self.base, self.scale = base, scale
        self.adapter, self.condition = nnx.data(adapter), nnx.data(condition)

    def __call__(self, x: jax.Array) -> jax.Array:
        y = self.base(x)  # pyright: ignore[reportCallIssue]
        a, b = self.adapter.a.astype(y.dtype), self.adapter.b.astype(y.dtype)
        if a.ndim == 2:
            return y + self.scale * (x.astype(y.dtype) @ a @ b)
        z = jax.lax.conv_general_dilated(
            x.astype(y.dtype),
            a,
            window_strides=_pair(self.base.strides),  # pyright: ignore[reportAttributeAccessIssue]
            padding=[(n, n) for n in _pair(self.base.padding)],  # pyright: ignore[reportAttributeAccessIssue]
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )
        if isinstance(self.adapter, Conditional) and self.condition is not None:
            if len(self.condition) != len(z):
                raise ValueError(
                    f"{len(self.condition)} pictures condition adapters of {len(z)} rows; give one for each"
                )
            shape = (*z.shape[:3], self.condition.shape[-1])
            c = jax.image.resize(self.condition, shape, "linear").astype(y.dtype)
            z = z * (1 + c @ self.adapter.gamma.astype(y.dtype)) + c @ self.adapter.beta.astype(y.dtype)
        return y + self.scale * (z @ b)


def _new(key: jax.Array, shape: tuple[int, ...], rank: int, condition_channels: int) -> Adapter:
    fan_in, outputs = math.prod(shape[:-1]), shape[-1]
    bound = fan_in**-0.5
    a_shape, b = (*shape[:-1], rank), jnp.zeros((rank, outputs), jnp.float32)
    if len(shape) == 2:
        return Adapter(jax.random.uniform(key, a_shape, jnp.float32, -bound, bound), b)
    a = bound * jax.random.normal(key, a_shape, jnp.float32)
    if not condition_channels:
        return Adapter(a, b)
    keys, bound = jax.random.split(jax.random.fold_in(key, 0)), condition_channels**-0.5
    maps = [jax.random.uniform(k, (condition_channels, rank), jnp.float32, -bound, bound) for k in keys]
    return Conditional(a, b, *maps)


def _child(parent: nnx.Module, name: str) -> nnx.Module:
    return parent[int(name)] if isinstance(parent, nnx.List) else getattr(parent, name)


def _pair(value: int | tuple[int, ...]) -> tuple[int, ...]:
    return (value, value) if isinstance(value, int) else tuple(value)


def _dotted(path: tuple[object, ...]) -> str:
    return ".".join(map(str, path))
