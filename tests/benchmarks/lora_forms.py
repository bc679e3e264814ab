"""LoRA merged into the kernels inside the step, against low-rank activations beside the layers.

    PYTHONPATH=. python tests/benchmarks/lora_forms.py       # the next two
    PYTHONPATH=. python tests/benchmarks/lora_forms.py size  # Stable Diffusion 2.1, by shapes alone
    PYTHONPATH=. python tests/benchmarks/lora_forms.py time  # compiled and run, on a CPU a quarter of its width
    PYTHONPATH=. python tests/benchmarks/lora_forms.py tpu   # blocks of it as TPU v6e's compiler has them; it goes on

Loss and gradient of the UNet with the paper's two sets of adapters, and of the whole UNet; float32, no recomputation.
First Stable Diffusion 2.1 at 512 pixels (64 x 64 latents): TFLOP a step, before XLA optimises. Then
memory and time of the same UNet, on a CPU at a quarter of its width and half its latents' side, with ranks of 16 for
64: weights and activations are both about a sixteenth, so that their proportion is that of the full size. Memory is the
temporaries of XLA's memory analysis; seconds are the least of five runs, on a CPU those of its time (others may use the
machine too, which makes wall time useless). The record goes to results/benchmarks/lora_forms_DEVICE.json, its tables
are in results/benchmarks.md.

Merging costs 0.3 and 1.2 TFLOP a step whatever the batch, and computes gradients of whole kernels. Beside the layers
that is saved (26% and 36% of the operations at batch 1, 17% and 3% at batch 16), but less of it comes back as time, in
two runs on a CPU 9 to 16% at batch 1 and 3 to 8% at batch 4, where it holds 4 to 5% more memory. A TPU's compiler, in
half precision and with elementwise recomputation, finds 3 to 25% fewer operations beside the layers, but in three of
four cases more traffic of HBM, which is what bounds such a step: 66% and 4% more at 320 channels, 25% more and 2% less
at 1280. Training merges: the network that is trained, judged, drawn with and exported is one function of its
parameters. On a CPU, and where a device has a single picture, the other form is faster by these figures. Neither was
run on a TPU or a GPU yet.
"""

import dataclasses
import functools
import json
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

from configs import quickstart
from d2f_jax import flops, hlo, lora, oracle, prior, sharding, traffic
from d2f_jax.models.devices import split_over
from d2f_jax.models.layers import Build, ResnetBlock2D, Transformer2DModel, in_compute_dtype, shapes_of
from d2f_jax.models.unet import UNet2DConditionModel, UNetConfig

FULL = UNetConfig(cross_attention_dim=1024, attention_head_dim=(5, 10, 20, 20), use_linear_projection=True)
QUARTER = UNetConfig(
    block_out_channels=(80, 160, 320, 320),
    norm_num_groups=16,
    cross_attention_dim=256,
    attention_head_dim=(2, 4, 8, 8),
    use_linear_projection=True,
)
PRESETS = ("lora_small", "lora_base")
FORMS = ("merged", "beside")
REPEATS = 5
ROOT = Path(__file__).parents[2]
DEVICE = jax.devices()[0]
ON_CPU = DEVICE.platform == "cpu"


def targets(preset: str, config: UNetConfig) -> lora.Targets:
    """The preset's, with its ranks in proportion to the width."""
    share = config.block_out_channels[0] / FULL.block_out_channels[0]
    knobs = vars(prior.lora_targets(quickstart.get_config(preset), 4))
    return lora.Targets(**{k: int(v * share) if k.endswith("_rank") else v for k, v in knobs.items()})


def gradient(graphdef: nnx.GraphDef, form: str) -> Any:
    """`gradient(trained, base, x, tau, text) -> (loss, gradient)`; "full" trains the whole network."""

    def loss(trained: Any, base: nnx.State, x: jax.Array, tau: jax.Array, text: jax.Array) -> jax.Array:
        if form == "full":
            network = nnx.merge(graphdef, trained)
        elif form == "merged":
            network = nnx.merge(graphdef, lora.merge(base, trained, scale=1.0))
        else:
            adapters = {path: entry for path, entry in trained.items() if isinstance(entry, lora.Adapter)}
            whole = {path: entry for path, entry in trained.items() if path not in adapters}
            network = nnx.merge(graphdef, lora.merge(base, whole, scale=1.0))
            lora.attach(network, adapters, scale=1.0)
        return jnp.mean(network(x, tau, text) ** 2)

    return jax.jit(jax.value_and_grad(loss))


def arguments(params: nnx.State, config: UNetConfig, batch: int, side: int) -> tuple[Any, ...]:
    shape = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.float32)
    return params, shape((batch, side, side, 4)), shape((batch,)), shape((batch, 77, config.cross_attention_dim))


def network_of(config: UNetConfig, remat: str = "none") -> tuple[nnx.GraphDef, nnx.State]:
    unet = shapes_of(lambda rngs: UNet2DConditionModel(config, rngs=rngs))
    unet.set_remat(remat)
    return nnx.split(unet)


def cases(config: UNetConfig, params: nnx.State) -> Iterator[tuple[str, str, Any]]:
    """Form, preset, and shapes of what is trained."""
    yield "full", "", params
    for preset in PRESETS:
        like = functools.partial(lora.init, key=jax.random.key(0), targets=targets(preset, config))
        trained = jax.eval_shape(like, params)
        yield from ((form, preset, trained) for form in FORMS)


def size(_known: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    graphdef, params = network_of(FULL)
    for batch in (1, 4, 16):
        for form, preset, trained in cases(FULL, params):
            counted = flops.count(gradient(graphdef, form), trained, *arguments(params, FULL, batch, 64))
            yield {"form": form, "preset": preset, "batch": batch, "flops": counted}


def seconds(_known: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    config, side = (QUARTER, 32) if ON_CPU else (FULL, 64)
    clock = time.process_time if ON_CPU else time.perf_counter
    graphdef, params = network_of(config)
    for batch in (1, 4):
        for form, preset, trained in cases(config, params):
            given = (trained, *arguments(params, config, batch, side))
            compiled = gradient(graphdef, form).lower(*given).compile()
            memory = compiled.memory_analysis().temp_size_in_bytes
            arrays = jax.tree.map(lambda x: jnp.full(x.shape, 0.01, x.dtype), given)
            took = []
            for _ in range(REPEATS + 1):
                began = clock()
                jax.block_until_ready(compiled(*arrays))
                took.append(clock() - began)
            yield {"form": form, "preset": preset, "batch": batch, "temporaries": memory, "seconds": min(took[1:])}


def on_tpu(known: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Of a residual block and a transformer, at the levels of most pixels and of most parameters that have both."""
    oracle.prepare()
    mesh = sharding.make_mesh(devices=list(oracle.topology("v6e:2x2").devices)[:1])
    have = {(row["width"], row["preset"], row["form"]) for row in known}

    def placed(x: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding.replicated(mesh))

    for width, side in ((320, 64), (1280, 16)):
        graphdef, params = nnx.split(shapes_of(lambda rngs, width=width: blocks(width, rngs)))
        given = [jax.ShapeDtypeStruct((4, side, side, width), jnp.bfloat16)]
        given += [jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in ((4, 77, 1024), (4, 1280))]
        for preset in PRESETS:
            adapted = dataclasses.replace(targets(preset, FULL), first_layer=False, last_layer=False)
            trained = jax.eval_shape(functools.partial(lora.init, key=jax.random.key(0), targets=adapted), params)
            for form in (form for form in FORMS if (width, preset, form) not in have):
                shapes = jax.tree.map(placed, (trained, params, *given))
                compiled = oracle.compiled(gradient_of_blocks(graphdef, form, mesh).lower(*shapes), quick=True)
                work = traffic.work(hlo.parse(compiled.as_text() or ""))
                row = {"form": form, "preset": preset, "width": width, "flops": work.flops}
                row |= {"temporaries": compiled.memory_analysis().temp_size_in_bytes, "hbm": sum(work.hbm.values())}
                yield row


def blocks(width: int, rngs: nnx.Rngs) -> nnx.List:
    build = Build(jnp.bfloat16, jnp.float32, rngs)
    resnet = ResnetBlock2D(width, width, time_width=1280, groups=32, eps=1e-5, build=build)
    heads = {"heads": width // 64, "context_width": 1024, "depth": 1, "groups": 32, "linear_projection": True}
    transformer = Transformer2DModel(width, **heads, build=build)
    resnet.recompute = transformer.recompute = "elementwise"
    return nnx.List([resnet, transformer])


def gradient_of_blocks(graphdef: nnx.GraphDef, form: str, mesh: Mesh) -> Any:
    """By what is trained, float32, and by the input, as in the middle of a network; computed in bfloat16."""

    @split_over(mesh)
    def loss(trained: Any, base: nnx.State, x: jax.Array, text: jax.Array, time: jax.Array) -> jax.Array:
        if form == "merged":
            both = nnx.merge(graphdef, in_compute_dtype(lora.merge(base, trained, scale=1.0), jnp.bfloat16))
        else:
            both = nnx.merge(graphdef, in_compute_dtype(base, jnp.bfloat16))
            lora.attach(both, trained, scale=1.0)
        resnet, transformer = both
        return jnp.mean(transformer(resnet(x, time), text).astype(jnp.float32) ** 2)

    return jax.jit(jax.grad(loss, argnums=(0, 2)))


def main() -> None:
    kind = "cpu" if ON_CPU else DEVICE.device_kind.lower().replace(" ", "_")
    file = ROOT / "results" / "benchmarks" / f"lora_forms_{kind}.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    record = json.loads(file.read_text()) if file.exists() else {}
    record["device"] = f"{DEVICE.device_kind}, {os.cpu_count()} CPU cores"
    parts = {"size": size, "time": seconds, "tpu": on_tpu}
    for name in sys.argv[1:] or ("size", "time"):
        stamp = {"jax": jax.__version__, "date": time.strftime("%Y-%m-%d", time.gmtime())}
        known = record[name]["rows"] if name == "tpu" and name in record else []
        for row in parts[name](known):
            print(row, flush=True)
            known.append(row)
            if name == "tpu":  # minutes a row; the others begin anew, and keep what was known until they are done
                record[name] = stamp | {"rows": known}
                file.write_text(json.dumps(record, indent=1) + "\n")
        record[name] = stamp | {"rows": known}
        file.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
