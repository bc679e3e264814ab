"""Low-rank adaptation of linear layers, as a pure function of parameters: `W + scale * A @ B`.

The network knows nothing of it. Adapters are a dictionary from a kernel's path to its two factors; `merge` adds them to
the base parameters inside the jitted step, so that gradients, the optimizer and the EMA hold adapters only.
"""

import dataclasses
import re

import jax
import jax.numpy as jnp
from flax import nnx

from d2f_jax.errors import InputError

ATTENTION = r".*\.(to_q|to_k|to_v|to_out\.0)\.kernel"  # self- and cross-attention

Adapters = dict[str, "Adapter"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Adapter:
    a: jax.Array  # [I, R], uniform as torch.nn.Linear's default
    b: jax.Array  # [R, O], zeros: a new adapter changes nothing


def init(params: nnx.State, key: jax.Array, *, rank: int, targets: str = ATTENTION) -> Adapters:
    """Adapters for every linear kernel [I, O] whose dotted path matches the regular expression `targets`.

    Raises InputError if nothing matches or the rank exceeds a kernel's smaller side.
    """
    adapters = {}
    for i, (path, kernel) in enumerate(sorted(_kernels(params).items())):
        if not re.fullmatch(targets, path):
            continue
        inputs, outputs = kernel.shape
        if not 1 <= rank <= min(inputs, outputs):
            raise InputError(f"lora rank {rank} is not between 1 and {min(inputs, outputs)}, the size of {path}")
        bound = inputs**-0.5
        a = jax.random.uniform(jax.random.fold_in(key, i), (inputs, rank), jnp.float32, -bound, bound)
        adapters[path] = Adapter(a, jnp.zeros((rank, outputs), jnp.float32))
    if not adapters:
        raise InputError(
            f"lora targets {targets!r} match no linear layer; give a regular expression such as {ATTENTION!r}"
        )
    return adapters


def merge(params: nnx.State, adapters: Adapters, *, scale: float) -> nnx.State:
    """The base parameters with `scale * a @ b` added to the adapted kernels."""
    flat = dict(nnx.to_flat_state(params))
    names = {_dotted(path): path for path in flat}
    for name, adapter in adapters.items():
        variable = flat[names[name]]
        delta = scale * jnp.dot(adapter.a, adapter.b, precision=jax.lax.Precision.HIGHEST)
        flat[names[name]] = variable.replace((variable[...] + delta).astype(variable[...].dtype))
    return nnx.from_flat_state(flat)


def _kernels(params: nnx.State) -> dict[str, jax.Array]:
    """Linear kernels by dotted path."""
    flat = {_dotted(path): variable[...] for path, variable in nnx.to_flat_state(params)}
    return {name: value for name, value in flat.items() if name.endswith(".kernel") and value.ndim == 2}


def _dotted(path: tuple[object, ...]) -> str:
    return ".".join(map(str, path))
