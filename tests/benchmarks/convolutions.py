"""How fast convolutions and products of matrices are on a CPU, each alone: ours, XLA's and PyTorch's.

    python tests/benchmarks/convolutions.py

Of 3 x 3, of tiny-sd at 48 pixels with batch 32 and of Stable Diffusion 2.1 at 32 x 32 latents with batch 1: the
convolution, its gradient by the input and by the kernel, in GFLOP/s, the best of eight runs of each in turn. Channels
are first in PyTorch, last elsewhere. Ours is XLA's but where the kernel is larger than the picture. The record goes to
results/benchmarks/convolutions_cpu.json.
"""

import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import torch

from d2f_jax.models.devices import split_over
from d2f_jax.models.layers import convolution

ROOT = Path(__file__).parents[2]
SHAPES = [  # batch, side, channels in and out
    (32, 12, 64, 64),
    (32, 6, 224, 96),
    (1, 32, 320, 320),
    (1, 16, 640, 640),
    (1, 8, 2560, 1280),
    (1, 4, 1280, 1280),
]
PRODUCT = 2048
LAST = (0, 2, 3, 1)  # channels, of axes as PyTorch has them
STRIDES, PADDING = (1, 1), ((1, 1), (1, 1))
LAYOUT = ("NHWC", "HWIO", "NHWC")


def main() -> None:
    torch.manual_seed(0)
    rows = [{"shape": shape, "gflops": one(*shape)} for shape in SHAPES]
    a, b = jnp.ones((PRODUCT, PRODUCT)), torch.ones(PRODUCT, PRODUCT)
    product = [best(jax.jit(lambda: a @ a)), best(lambda: b @ b)]
    record = {
        "rows": rows,
        "product": [2 * PRODUCT**3 / seconds / 1e9 for seconds in product],
        "device": f"{os.cpu_count()} CPU cores",
        "versions": {"jax": jax.__version__, "torch": torch.__version__},
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
    }
    file = ROOT / "results" / "benchmarks" / "convolutions_cpu.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    part = file.with_suffix(".part")
    part.write_text(json.dumps(record, indent=1) + "\n")
    part.replace(file)
    print(json.dumps(record))


def one(batch: int, side: int, inputs: int, outputs: int) -> dict[str, list[float]]:
    """GFLOP/s of ours, XLA's and PyTorch's, by what is computed."""
    x, g = (torch.randn(batch, channels, side, side) for channels in (inputs, outputs))
    k = torch.randn(outputs, inputs, 3, 3)
    last = [jnp.asarray(t.permute(axes).contiguous().numpy()) for t, axes in ((x, LAST), (k, (2, 3, 1, 0)), (g, LAST))]
    here: dict[str, Callable[[], Any]] = {
        "forward": lambda: torch.nn.functional.conv2d(x, k, padding=1),
        "by input": lambda: torch.nn.grad.conv2d_input(x.shape, k, g, padding=1),
        "by kernel": lambda: torch.nn.grad.conv2d_weight(x, k.shape, g, padding=1),
    }
    ways = [compiled(ours, *last), compiled(xla, *last), here]
    work = 2 * batch * side**2 * inputs * outputs * 9
    return {name: [work / best(way[name]) / 1e9 for way in ways] for name in here}


def ours(x: jax.Array, k: jax.Array) -> jax.Array:
    with split_over(None):
        return convolution(x, k, STRIDES, PADDING, dimension_numbers=LAYOUT)


def xla(x: jax.Array, k: jax.Array) -> jax.Array:
    return jax.lax.conv_general_dilated(x, k, STRIDES, PADDING, dimension_numbers=LAYOUT)


def compiled(
    conv: Callable[..., jax.Array], x: jax.Array, k: jax.Array, g: jax.Array
) -> dict[str, Callable[[], jax.Array]]:
    forward = jax.jit(conv)
    by_input = jax.jit(lambda x, k, g: jax.vjp(lambda x: conv(x, k), x)[1](g)[0])
    by_kernel = jax.jit(lambda x, k, g: jax.vjp(lambda k: conv(x, k), k)[1](g)[0])
    return {
        "forward": lambda: forward(x, k),
        "by input": lambda: by_input(x, k, g),
        "by kernel": lambda: by_kernel(x, k, g),
    }


def best(run: Callable[[], Any]) -> float:
    seconds = []
    for _ in range(10):
        began = time.perf_counter()
        jax.block_until_ready(run())
        seconds.append(time.perf_counter() - began)
    return min(seconds[2:])


if __name__ == "__main__":
    main()
