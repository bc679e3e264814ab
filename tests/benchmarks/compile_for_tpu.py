"""The train step of Stable Diffusion 2.1 at 512 pixels, compiled for a TPU pod on a machine that has none.

    ./launch/install.sh tpu
    .venv/bin/python tests/benchmarks/compile_for_tpu.py --topology=v5e:16x16 --fsdp=16 --batch_size=1024

`--slices=2` compiles for two slices of that topology. Networks, optimizer state and batch are shapes only; the program
is the one that training runs: VAE, text encoder and UNet in bfloat16, Adam and average in float32. The TPU's own
compiler tells what it needs of every chip's memory, and the program which collectives it holds.

Compiled on two cores that did other work too, 2026-11-25, jax 0.10.2, libtpu 0.0.42:

    v5e:16x16, mesh 16 x 16, batch 1024: each chip holds 0.91 GiB of state and frozen networks and needs 12.91 GiB of
    temporaries, of 15.75; 1110 all-gathers, 81 all-reduces, 126 collective permutes; 24 minutes to compile
"""

import collections
import functools
import math
import os
import re
import time
from typing import Any

os.environ |= {"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}

import jax
import jax.numpy as jnp
from absl import app, flags
from flax import nnx
from jax.experimental import topologies

from d2f_jax import NoiseSchedule, optim, sharding
from d2f_jax import step as steps
from d2f_jax.models.clip import CLIPTextConfig, CLIPTextModel
from d2f_jax.models.unet import UNet2DConditionModel, UNetConfig
from d2f_jax.models.vae import AutoencoderKL, VAEConfig
from d2f_jax.objectives import Objective
from d2f_jax.task import TEXT_TO_IMAGE

UNET = UNetConfig(
    cross_attention_dim=1024, attention_head_dim=(5, 10, 20, 20), use_linear_projection=True, upcast_attention=True
)
VAE = VAEConfig(
    block_out_channels=(128, 256, 512, 512),
    down_block_types=("DownEncoderBlock2D",) * 4,
    up_block_types=("UpDecoderBlock2D",) * 4,
    layers_per_block=2,
)
CLIP = CLIPTextConfig(
    hidden_size=1024, intermediate_size=4096, num_attention_heads=16, num_hidden_layers=23, hidden_act="gelu"
)
SCHEDULE = {
    "num_train_timesteps": 1000,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "prediction_type": "v_prediction",
}
COLLECTIVE = re.compile(r" = (.+?) (all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute)(?:-start)?\(")

TOPOLOGY = flags.DEFINE_string("topology", "v5e:16x16", "Generation and shape, as Cloud TPU names them.")
SLICES = flags.DEFINE_integer("slices", 1, "Slices of that topology.")
FSDP = flags.DEFINE_integer("fsdp", 16, "Chips that share one copy of the state.")
BATCH_SIZE = flags.DEFINE_integer("batch_size", 1024, "Pictures, over all chips.")
REMAT = flags.DEFINE_string("remat", "none", "As config.remat.")


def main(_: Any) -> None:
    topology = topologies.get_topology_desc(
        platform="tpu", topology_name=TOPOLOGY.value, **({"num_slices": SLICES.value} if SLICES.value > 1 else {})
    )
    mesh = sharding.make_mesh(-1, FSDP.value, topology.devices)
    networks, frozen, trained = abstract_networks()
    optimizer = optim.make_optimizer(OPTIMIZER)
    state = jax.eval_shape(functools.partial(steps.init_state, optimizer=optimizer), trained, root_key=abstract_key())
    state, frozen = placed((state, frozen), sharding.kept(mesh, (state, frozen)))
    batch = {
        "image": jax.ShapeDtypeStruct((BATCH_SIZE.value, 512, 512, 3), jnp.uint8),
        "input_ids": jax.ShapeDtypeStruct((BATCH_SIZE.value, 77), jnp.int32),
        "weight": jax.ShapeDtypeStruct((BATCH_SIZE.value,), jnp.float32),
    }
    batch = placed(batch, jax.tree.map(lambda _: sharding.batch_split(mesh), batch))
    step = steps.make_train_step(networks, NoiseSchedule.from_config(SCHEDULE), optimizer, OPTIONS, mesh)
    began = time.monotonic()
    compiled = step.lower(state, frozen, batch).compile()
    seconds = time.monotonic() - began
    memory = compiled.memory_analysis()
    kept = sum(map(per_device, jax.tree.leaves((state, frozen))))
    print(
        f"{TOPOLOGY.value} x {SLICES.value}, mesh {dict(mesh.shape)}, batch {BATCH_SIZE.value}, remat {REMAT.value}: "
        f"compiled in {seconds:.0f} s\n"
        f"each chip: state and frozen networks {kept / 2**30:.2f} GiB, arguments "
        f"{memory.argument_size_in_bytes / 2**30:.2f} GiB, temporaries {memory.temp_size_in_bytes / 2**30:.2f} GiB"
    )
    found = collections.Counter(kind for _, kind in COLLECTIVE.findall(compiled.as_text()))
    print("collectives: " + ", ".join(f"{count} {kind}" for kind, count in sorted(found.items())))


OPTIMIZER = optim.OptimizerOptions(
    name="adamw",
    learning_rate=1e-5,
    schedule="constant",
    warmup_steps=1000,
    num_steps=100_000,
    final_rate=0.1,
    b1=0.9,
    b2=0.999,
    weight_decay=0.0,
    max_grad_norm=1.0,
    first_moment_dtype="float32",
)
OPTIONS = steps.StepOptions(
    latent_scale=0.18215,
    lora_scale=1.0,
    objective=Objective(),
    task=TEXT_TO_IMAGE,
    compute_dtype="bfloat16",
    ema_decay=0.999,
    ema_start=0,
    accumulate=1,
)


def abstract_networks() -> tuple[steps.Networks, steps.Frozen, Any]:
    def unet() -> UNet2DConditionModel:
        network = UNet2DConditionModel(UNET, dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
        network.set_remat(REMAT.value)
        return network

    builds = (
        unet,
        lambda: AutoencoderKL(VAE, dtype=jnp.bfloat16, rngs=nnx.Rngs(0)),
        lambda: CLIPTextModel(CLIP, dtype=jnp.bfloat16, rngs=nnx.Rngs(0)),
    )
    defs, params = zip(*(nnx.split(nnx.eval_shape(build)) for build in builds), strict=True)
    return steps.Networks(*defs), steps.Frozen(None, params[1], params[2]), params[0]


def abstract_key() -> Any:
    return jax.eval_shape(lambda: jax.random.key(0))


def placed(tree: Any, shardings: Any) -> Any:
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), tree, shardings)


def per_device(x: Any) -> int:
    size = 8 if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x.dtype.itemsize
    return size * math.prod(x.sharding.shard_shape(x.shape))


if __name__ == "__main__":
    app.run(main)
