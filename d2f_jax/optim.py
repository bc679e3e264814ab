"""The optimizer, its rate, and the weight average."""

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp
import optax

Name = Literal["adamw", "adam", "adafactor"]
Schedule = Literal["constant", "cosine", "exponential"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimizerOptions:
    """`adamw` decays weights, `adam` does not, `adafactor` factors the second moments and keeps no first.

    The rate rises linearly over `warmup_steps`; then it stays, or falls along a cosine or exponentially to
    `final_rate` times itself at `num_steps`. Gradients are cut to the global norm `max_grad_norm` first.
    """

    name: Name
    learning_rate: float
    schedule: Schedule
    warmup_steps: int
    num_steps: int
    final_rate: float
    b1: float
    b2: float
    weight_decay: float
    max_grad_norm: float
    first_moment_dtype: str


def make_optimizer(options: OptimizerOptions) -> optax.GradientTransformation:
    rate = learning_rate(options)
    moments = {"b1": options.b1, "b2": options.b2, "mu_dtype": options.first_moment_dtype}
    match options.name:
        case "adamw":
            update = optax.adamw(rate, weight_decay=options.weight_decay, **moments)
        case "adam":
            update = optax.adam(rate, **moments)
        case "adafactor":
            # As with the others, rates are not relative to the size of each parameter, and decay is in their measure.
            decay = (lambda n: options.weight_decay * rate(n)) if options.weight_decay else None
            update = optax.adafactor(rate, multiply_by_parameter_scale=False, weight_decay_rate=decay)
    return optax.chain(optax.clip_by_global_norm(options.max_grad_norm), update)


def learning_rate(options: OptimizerOptions) -> optax.Schedule:
    """The rate of step n, counted from 0."""
    peak, warmup, steps = options.learning_rate, options.warmup_steps, max(options.num_steps - options.warmup_steps, 1)
    match options.schedule:
        case "constant":
            after = optax.constant_schedule(peak)
        case "cosine":
            after = optax.cosine_decay_schedule(peak, steps, alpha=options.final_rate)
        case "exponential":
            after = optax.exponential_decay(peak, steps, options.final_rate, end_value=peak * options.final_rate)
    return optax.join_schedules([optax.linear_schedule(0.0, peak, warmup), after], [warmup]) if warmup else after


def ema_decay(step: jax.Array, maximum: float, start: int = 0) -> jax.Array:
    """`min(maximum, 1 - (1 + n)^-0.75)`, n steps after `start`: a short average while all is new, a long one later.

    Before `start` it is 0, and the average a copy (the published code's law).
    """
    n = jnp.maximum(step.astype(jnp.float32) - start, 0)
    return jnp.minimum(maximum, 1 - (1 + n) ** -0.75)


def ema_update(average, new, decay: jax.Array):
    """`decay * average + (1 - decay) * new`, leaf by leaf."""
    return jax.tree.map(lambda a, n: a + (1 - decay) * (n.astype(a.dtype) - a), average, new)
