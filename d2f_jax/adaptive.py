"""Steps by tolerance along a flow, of each example its own; apart, since diffrax takes a second to be imported."""

from collections.abc import Callable

import diffrax
import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from d2f_jax.sampling import Adaptive, Velocity

SOLVERS: dict[Adaptive, diffrax.AbstractERK] = {
    "dopri5": diffrax.Dopri5(),
    "dopri8": diffrax.Dopri8(),
    "bosh3": diffrax.Bosh3(),
    "adaptive_heun": diffrax.Heun(),
}


def solve(
    velocity: Velocity,
    x: jax.Array,
    first: ArrayLike,
    last: ArrayLike,
    solver: Adaptive = "dopri5",
    *,
    rtol: float,
    atol: float,
) -> jax.Array:
    """From time `first` to `last`; each example of `x` [B, ...] by steps of its own, whatever its batch.

    `velocity` is called for all of them together, with a time of each [B], until the last one has arrived. Fails at run
    time if 4096 steps are not enough for one.
    """
    x = jnp.asarray(x, jnp.float32)
    slope = _of_one(velocity, x)

    def solve_one(x: jax.Array) -> jax.Array:
        solution = diffrax.diffeqsolve(
            diffrax.ODETerm(lambda t, x, _: slope(x, jnp.asarray(t))),
            SOLVERS[solver],
            t0=jnp.asarray(first, jnp.float32),
            t1=jnp.asarray(last, jnp.float32),
            dt0=None,
            y0=x,
            stepsize_controller=_CoarseSteps(rtol=rtol, atol=atol),
            saveat=diffrax.SaveAt(t1=True),
        )
        assert solution.ys is not None
        return solution.ys[-1]

    return jax.vmap(solve_one)(x)


class _CoarseSteps(diffrax.PIDController):
    """Steps of a length 2^(n/8), which rounding, other in another batch, all but never changes."""

    def init(self, terms, t0, *given):
        t1, state = super().init(terms, t0, *given)
        return t0 + _coarse(t1 - t0), state

    def adapt_step_size(self, *given):
        keep, t0, t1, *rest = super().adapt_step_size(*given)
        return keep, t0, t0 + _coarse(t1 - t0), *rest


def _coarse(length: ArrayLike) -> jax.Array:
    return jnp.exp2(jnp.floor(8 * jnp.log2(length)) / 8)


def _of_one(velocity: Velocity, x: jax.Array) -> Callable[[jax.Array, jax.Array], jax.Array]:
    """The velocity of one example, under `jax.vmap` over a batch like `x` alone: `velocity` then is called for all.

    So what it knows of each example, such as text, need not be taken apart.
    """
    converted, known = jax.closure_convert(velocity, x, jnp.zeros(len(x)))

    @jax.custom_batching.custom_vmap
    def of_one(x: jax.Array, t: jax.Array, *known: jax.Array) -> jax.Array:
        return jnp.full_like(x, jnp.nan)  # traced for its shape, never run

    @of_one.def_vmap
    def of_all(size, batched, x, t, *known):
        return converted(x, jnp.broadcast_to(t, size), *known), True

    return lambda x, t: of_one(x, t, *known)
