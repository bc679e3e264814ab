"""Attention alone on a GPU: cuDNN's kernel and XLA's own, at the shapes of Stable Diffusion at 512 pixels, batch 32.

    PYTHONPATH=. python tests/benchmarks/attention.py

Value, and gradient by queries, keys and values, in bfloat16; a time is the mean of twenty queued one
after another. Also by how much the two results differ. `auto` in d2f_jax/models/attention.py chooses by this. The
record goes to results/benchmarks/attention_DEVICE.json.
"""

import functools
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import jax
import jax.numpy as jnp

from d2f_jax.models.attention import Backend, attention

RESULTS = Path(__file__).parents[2] / "results" / "benchmarks"
BATCH, TEXT = 32, 77
BACKENDS: tuple[Backend, ...] = ("xla", "cudnn")
# Queries, heads and features: of Stable Diffusion 2.1, and of 1.x at its finest and at its widest.
SELF = [(4096, 5, 64), (1024, 10, 64), (256, 20, 64), (64, 20, 64), (4096, 8, 40), (256, 8, 160)]
SHAPES = [(*shape, shape[0]) for shape in SELF] + [(*shape, TEXT) for shape in SELF[:4]]


def main() -> None:
    assert set(BACKENDS) < set(get_args(Backend))
    device = jax.devices()[0]
    if device.platform != "gpu":
        sys.exit("there is no GPU here; JAX finds one with ./launch/install.sh cuda")
    rows = []
    for shape in SHAPES:
        rows.append(measured(*shape))
        print(rows[-1], flush=True)
    record = {"device": device.device_kind, "batch": BATCH, "rows": rows, "jax": jax.__version__}
    record |= {"date": time.strftime("%Y-%m-%d", time.gmtime())}
    file = RESULTS / f"attention_{device.device_kind.lower().replace(' ', '_')}.json"
    file.write_text(json.dumps(record, indent=1) + "\n")


def measured(queries: int, heads: int, features: int, keys: int) -> dict[str, Any]:
    lengths = (queries, keys, keys)
    drawn = zip(jax.random.split(jax.random.key(1), 3), lengths, strict=True)
    of = [jax.random.normal(key, (BATCH, length, heads, features), jnp.bfloat16) for key, length in drawn]
    row: dict[str, Any] = {"queries": queries, "keys": keys, "heads": heads, "features": features}
    found = {}
    for backend in BACKENDS:
        value = jax.jit(functools.partial(attention, backend=backend))
        gradient = jax.jit(jax.grad(functools.partial(loss, backend), argnums=(0, 1, 2)))
        row[backend] = [seconds(value, of), seconds(gradient, of)]
        found[backend] = [value(*of), *gradient(*of)]
    row["differ"] = [apart(a, b) for a, b in zip(found["cudnn"], found["xla"], strict=True)]
    return row


def loss(backend: Backend, *of: jax.Array) -> jax.Array:
    return jnp.sum(attention(*of, backend=backend).astype(jnp.float32) ** 2)


def seconds(function: Callable[..., Any], of: list[jax.Array], count: int = 20) -> float:
    jax.block_until_ready([function(*of) for _ in range(2)])
    began = time.perf_counter()
    jax.block_until_ready([function(*of) for _ in range(count)])
    return (time.perf_counter() - began) / count


def apart(a: jax.Array, b: jax.Array) -> float:
    a, b = (x.astype(jnp.float32) for x in (a, b))
    return float(jnp.linalg.norm(a - b) / jnp.linalg.norm(b))


if __name__ == "__main__":
    main()
