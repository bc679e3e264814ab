"""Memory and traffic of a residual block and a transformer on a TPU, as its compiler has them.

    ./launch/install.sh tpu
    PYTHONPATH=. .venv/bin/python tests/benchmarks/block_on_tpu.py v6e:2x2

The gradient at Stable Diffusion 2.1's finest level at 512 pixels: 64 x 64 latents, 320 channels, batch 4, bfloat16, on
one chip. XLA's attention and the fused one, and what `config.remat` keeps: nothing, elementwise, or everything (of both
kinds of blocks) is computed again. A minute or two each, but for the last, which took more than ten and was not waited
for. After each the record goes to results/benchmarks/block_on_tpu.json.
"""

import importlib.metadata
import json
import sys
import time
from pathlib import Path
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
from flax import nnx

from d2f_jax import hlo, oracle, sharding, traffic
from d2f_jax.models.devices import split_over
from d2f_jax.models.layers import Build, Recompute, ResnetBlock2D, Transformer2DModel, in_compute_dtype

FILE = Path(__file__).parents[2] / "results" / "benchmarks" / "block_on_tpu.json"
BATCH, SIDE, WIDTH, TEXT, TOKENS, TIME = 4, 64, 320, 1024, 77, 1280
Attention = Literal["xla", "splash"]


def main() -> None:
    oracle.prepare()
    where = oracle.topology(sys.argv[1])
    versions = {package: importlib.metadata.version(package) for package in ("jax", "libtpu")}
    mesh, rows = sharding.make_mesh(devices=list(where.devices)[:1]), []
    kinds: list[Recompute] = [what for what in get_args(Recompute) if what != "gathers"]  # nothing is gathered here
    for attention, recompute in [("xla", "nothing"), *(("splash", what) for what in kinds)]:
        compiled = oracle.compiled(lowered(mesh, attention, recompute), quick=True)
        memory: Any = compiled.memory_analysis()
        work = traffic.work(hlo.parse(compiled.as_text() or ""))
        row = {"attention": attention, "recomputed": recompute, "temporaries": memory.temp_size_in_bytes}
        rows.append(row | {"hbm": sum(work.hbm.values()), "flops": work.flops})
        print(rows[-1], flush=True)
        record = {"topology": where.name, "rows": rows, "versions": versions}
        record |= {"date": time.strftime("%Y-%m-%d", time.gmtime())}
        FILE.parent.mkdir(parents=True, exist_ok=True)
        FILE.write_text(json.dumps(record, indent=1) + "\n")


def lowered(mesh: jax.sharding.Mesh, attention: Attention, recompute: Recompute) -> jax.stages.Lowered:
    def blocks() -> nnx.List:
        build = Build(jnp.bfloat16, jnp.float32, nnx.Rngs(0))
        resnet = ResnetBlock2D(WIDTH, WIDTH, time_width=TIME, groups=32, eps=1e-5, build=build)
        options = {"heads": 5, "context_width": TEXT, "depth": 1, "groups": 32, "linear_projection": True}
        transformer = Transformer2DModel(WIDTH, **options, build=build)
        resnet.recompute = transformer.recompute = recompute
        return nnx.List([resnet, transformer])

    graphdef, params = nnx.split(nnx.eval_shape(blocks))

    def loss(params: nnx.State, x: jax.Array, text: jax.Array, time: jax.Array) -> jax.Array:
        resnet, transformer = nnx.merge(graphdef, in_compute_dtype(params, jnp.bfloat16))
        return jnp.mean(transformer(resnet(x, time), text).astype(jnp.float32) ** 2)

    if attention == "splash":
        loss = split_over(mesh)(loss)
    given = [
        params,
        jax.ShapeDtypeStruct((BATCH, SIDE, SIDE, WIDTH), jnp.bfloat16),
        jax.ShapeDtypeStruct((BATCH, TOKENS, TEXT), jnp.bfloat16),
        jax.ShapeDtypeStruct((BATCH, TIME), jnp.float32),
    ]
    where = sharding.replicated(mesh)
    given = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where), given)
    return jax.jit(jax.grad(loss, argnums=(0, 1))).lower(*given)


if __name__ == "__main__":
    main()
