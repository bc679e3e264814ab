"""LoRA merged into the kernels inside the step, against low-rank activations beside the layers.

    PYTHONPATH=. python tests/benchmarks/lora_forms.py size  # Stable Diffusion 2.1, by shapes alone
    PYTHONPATH=. python tests/benchmarks/lora_forms.py time  # a quarter of its width, compiled and run

Loss and gradient of the UNet with the paper's two sets of adapters, and of the whole UNet; float32, no recomputation.
First Stable Diffusion 2.1 at 512 pixels (64 x 64 latents): TFLOP a step, as XLA counts them before it optimises. Then
the same UNet at a quarter of its width and half its latents' side, with ranks of 16 for 64: weights and activations are
both about a sixteenth, so that their proportion is that of the full size. Memory is the temporaries of XLA's memory
analysis; seconds are CPU time, the least of five runs (others used the machine too, which makes wall time useless).

On two cores of an AMD EPYC, 2026-11-25, jax 0.10.2:

                         TFLOP, full size                  a quarter of its width
    trained  form        batch 1   batch 4   batch 16      MB, CPU s at batch 1     MB, CPU s at batch 4
    all      -           2.36      9.43      37.70         240   0.75               1342   2.49
    61.5M    merged      2.64      9.63      37.60         472   0.91               1544   2.61
    61.5M    beside      1.96      7.84      31.36         448   0.83               1625   2.52
    207.5M   merged      3.36      9.82      35.63         387   0.88               1389   2.49
    207.5M   beside      2.16      8.65      34.61         401   0.77               1440   2.42

Merging costs 0.3 and 1.2 TFLOP a step whatever the batch, and computes gradients of whole kernels. Beside the layers
that is saved (26% and 36% of the operations at batch 1, 17% and 3% at batch 16), but little of it comes back as time:
9% and 12% at batch 1, 3% at batch 4, where it holds 4 to 5% more memory. Training merges: from a few pictures on a
device the time is nearly the same and the memory less, and the network that is trained, judged, drawn with and exported
is one function of its parameters. Where a device has a single picture, the other form is cheaper by these figures.
TPUs and GPUs, half precision and recomputation were not measured.
"""

import functools
import sys
import time
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from configs import quickstart
from d2f_jax import chips, lora, prior
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
    unet = nnx.eval_shape(lambda: UNet2DConditionModel(config, rngs=nnx.Rngs(0)))
    unet.set_remat(remat)
    return nnx.split(unet)


def trained_of(params: nnx.State, preset: str, config: UNetConfig) -> Any:
    return jax.eval_shape(lambda p: lora.init(p, jax.random.key(0), targets(preset, config)), params)


def size() -> None:
    graphdef, params = network_of(FULL)
    print("| form | preset | batch | TFLOP a step |\n|---|---|---|---|")
    for batch in (1, 4, 16):
        rows = [("full", "", params)]
        rows += [(form, preset, trained_of(params, preset, FULL)) for preset in PRESETS for form in FORMS]
        for form, preset, trained in rows:
            lowered = gradient(graphdef, form).lower(trained, *arguments(params, FULL, batch, 64))
            print(f"| {form} | {preset} | {batch} | {(chips.flops(lowered) or 0) / 1e12:.2f} |", flush=True)


def run_time() -> None:
    config = QUARTER
    graphdef, params = network_of(config)
    print("| form | preset | batch | temporaries, MB | CPU s |\n|---|---|---|---|---|")
    for batch in (1, 4):
        rows = [("full", "", params)]
        rows += [(form, preset, trained_of(params, preset, config)) for preset in PRESETS for form in FORMS]
        for form, preset, trained in rows:
            given = (trained, *arguments(params, config, batch, 32))
            compiled = gradient(graphdef, form).lower(*given).compile()
            memory = compiled.memory_analysis().temp_size_in_bytes / 1e6
            arrays = jax.tree.map(lambda x: jnp.full(x.shape, 0.01, x.dtype), given)
            seconds = []
            for _ in range(REPEATS + 1):
                began = time.process_time()
                jax.block_until_ready(compiled(*arrays))
                seconds.append(time.process_time() - began)
            print(f"| {form} | {preset} | {batch} | {memory:.0f} | {min(seconds[1:]):.2f} |", flush=True)


if __name__ == "__main__":
    {"size": size, "time": run_time}[sys.argv[1]]()
