"""The loss on held-out examples with noise that never changes, in eight bins of flow time."""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from d2f_jax import sharding
from d2f_jax import step as steps
from d2f_jax.models.devices import split_over

BINS = 8
ValidationLoss = Callable[[steps.UNetParams, steps.Frozen, steps.Batch, np.ndarray], jax.Array]


def make_validation_loss(
    loss: Callable[[steps.UNetParams, steps.Encoded, steps.Draws], jax.Array],
    encode: Callable[[steps.Frozen, steps.Batch], steps.Encoded],
    mesh: Mesh,
    seed: int,
    first: float = 0.0,
) -> ValidationLoss:
    """`validation_loss(unet_params, frozen, batch, index_B) -> [2, 8]`: sums of loss x weight, and of weights, by bin.

    Every example is looked at once in each bin, [0, 1/8) to [7/8, 1) of flow time, or of what is trained of it, from
    `first` on. Its noise and its place in the bin depend on the seed and its `index` alone: two evaluations differ by
    the network, never by chance. `encode(frozen, batch)` is `step.encoded`, and gathers its parameters itself.
    """

    @split_over(mesh)
    def validation_loss(
        params: steps.UNetParams, frozen: steps.Frozen, batch: steps.Batch, index_B: np.ndarray
    ) -> jax.Array:
        found = encode(frozen, batch)
        shape = found.mean.shape[1:]

        def of_bin(i: jax.Array) -> jax.Array:
            def drawn(index: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
                noise_key, time_key = jax.random.split(jax.random.fold_in(jax.random.fold_in(root, index), i))
                t = first + (1 - first) * (i + jax.random.uniform(time_key)) / BINS
                path_noise = jax.random.normal(jax.random.fold_in(noise_key, 1), shape)
                return jax.random.normal(noise_key, shape), t, path_noise

            root = jax.random.key(seed)
            x_0, t_B, path_noise = sharding.split_rows(mesh, jax.vmap(drawn)(jnp.asarray(index_B)))
            # The posterior's mean, without its noise; pairs of data and noise keep their own noise.
            draws = steps.Draws(jnp.zeros_like(x_0), batch.get("noise", x_0), t_B, path_noise)
            loss_B = loss(params, found, draws)
            return jnp.stack([jnp.sum(jnp.where(batch["weight"] > 0, loss_B, 0)), jnp.sum(batch["weight"])])

        return jax.lax.map(of_bin, jnp.arange(BINS)).T

    return jax.jit(validation_loss, out_shardings=sharding.replicated(mesh))


def evaluate(
    validation_loss: ValidationLoss,
    params: steps.UNetParams,
    *,
    frozen: steps.Frozen,
    batches: Sequence[tuple[steps.Batch, np.ndarray]],
) -> dict[str, float]:
    """`validation_loss`, and `validation_loss/t0.000` to `.../t0.875` of it: means over the readable examples."""
    total = np.zeros((2, BINS))
    for batch, index_B in batches:
        total += np.asarray(validation_loss(params, frozen, batch, index_B), np.float64)
    if not total[1].all():
        return {}  # not one of the held-out examples could be read
    means = total[0] / total[1]
    by_bin = {f"validation_loss/t{i / BINS:.3f}": float(mean) for i, mean in enumerate(means)}
    return {"validation_loss": float(means.mean())} | by_bin
