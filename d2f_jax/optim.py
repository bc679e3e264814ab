"""The optimizer and the weight average."""

import jax
import jax.numpy as jnp
import optax


def adamw(
    *, learning_rate: float, warmup_steps: int, weight_decay: float, max_grad_norm: float
) -> optax.GradientTransformation:
    """AdamW behind global-norm clipping; the rate rises linearly over `warmup_steps` and stays."""
    rate = optax.warmup_constant_schedule(0.0, learning_rate, warmup_steps) if warmup_steps else learning_rate
    return optax.chain(
        optax.clip_by_global_norm(max_grad_norm),
        optax.adamw(rate, b1=0.9, b2=0.999, weight_decay=weight_decay),
    )


def ema_decay(step: jax.Array, maximum: float) -> jax.Array:
    """`min(maximum, 1 - (1 + n)^-0.75)`: a short average while all is new, a long one later."""
    return jnp.minimum(maximum, 1 - (1 + step.astype(jnp.float32)) ** -0.75)


def ema_update(average, new, decay: jax.Array):
    """`decay * average + (1 - decay) * new`, leaf by leaf."""
    return jax.tree.map(lambda a, n: a + (1 - decay) * (n.astype(a.dtype) - a), average, new)
