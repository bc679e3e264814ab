"""Where XLA is slower than PyTorch on a CPU: 3 x 3 convolutions and products of matrices, each alone.

    python tests/benchmarks/convolutions.py

Of tiny-sd at 48 pixels with batch 32, and of Stable Diffusion 2.1 at 32 x 32 latents with batch 1: the convolution, its
gradient by the input and by the kernel, in GFLOP/s, the best of eight runs of each library in turn; channels last in
XLA, first in PyTorch. The record goes to results/benchmarks/convolutions_cpu.json.
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
    file.write_text(json.dumps(record, indent=1) + "\n")
    print(json.dumps(record))


def one(batch: int, side: int, inputs: int, outputs: int) -> dict[str, list[float]]:
    """GFLOP/s of XLA and of PyTorch, by what is computed."""
    x, g = (torch.randn(batch, channels, side, side) for channels in (inputs, outputs))
    k = torch.randn(outputs, inputs, 3, 3)
    ours = [jnp.asarray(t.permute(axes).contiguous().numpy()) for t, axes in ((x, LAST), (k, (2, 3, 1, 0)), (g, LAST))]

    def conv(x: jax.Array, k: jax.Array) -> jax.Array:
        return jax.lax.conv_general_dilated(x, k, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))

    by_input = jax.jit(lambda x, k, g: jax.vjp(lambda x: conv(x, k), x)[1](g)[0])
    by_kernel = jax.jit(lambda x, k, g: jax.vjp(lambda k: conv(x, k), k)[1](g)[0])
    forward = jax.jit(conv)
    pairs: dict[str, tuple[Callable[[], Any], Callable[[], Any]]] = {
        "forward": (lambda: forward(*ours[:2]), lambda: torch.nn.functional.conv2d(x, k, padding=1)),
        "by input": (lambda: by_input(*ours), lambda: torch.nn.grad.conv2d_input(x.shape, k, g, padding=1)),
        "by kernel": (lambda: by_kernel(*ours), lambda: torch.nn.grad.conv2d_weight(x, k.shape, g, padding=1)),
    }
    work = 2 * batch * side**2 * inputs * outputs * 9
    return {name: [work / best(run) / 1e9 for run in pair] for name, pair in pairs.items()}


def best(run: Callable[[], Any]) -> float:
    seconds = []
    for _ in range(10):
        began = time.perf_counter()
        jax.block_until_ready(run())
        seconds.append(time.perf_counter() - began)
    return min(seconds[2:])


if __name__ == "__main__":
    main()
