"""How a train step's time and memory grow with batch, resolution and devices: results/benchmarks/growth_DEVICE.png.

    PYTHONPATH=. python tests/benchmarks/growth.py

tiny-sd with diff2flow on prepared latents, one of the three changed at a time. Memory is a device's, as XLA lays it
out: arguments (parameters, optimizer, average, batch) and temporaries. On a CPU devices are parts of the same cores,
over which the state is split: what they show is memory, and what splitting costs.
"""

import dataclasses
import json
import os
import statistics
import time
from pathlib import Path
from typing import Any

os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"

import jax
import jax.numpy as jnp
import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.ticker import ScalarFormatter

from configs import quickstart
from d2f_jax import blueprint, sharding

ROOT = Path(__file__).parents[2]
REPEATS = 7
BATCHES, SIDES, DEVICES = (4, 8, 16, 32, 64), (32, 48, 64, 96, 128), (1, 2, 4, 8)


@dataclasses.dataclass(frozen=True)
class Point:
    batch: int
    pixels: int
    devices: int
    seconds: float
    arguments: int
    temporaries: int


def main() -> None:
    here, cores = jax.devices()[0], os.cpu_count()
    count = len(jax.devices())
    lines = {
        "batch": [measured(batch, 48, 1) for batch in BATCHES],
        "pixels": [measured(16, pixels, 1) for pixels in SIDES],
        "devices": [measured(32, 48, devices) for devices in DEVICES if devices <= count],
    }
    kind = "cpu" if here.platform == "cpu" else here.device_kind.lower().replace(" ", "_")
    record = {"device": f"{here.device_kind}, {cores} cores", "jax": jax.__version__}
    record |= {"date": time.strftime("%Y-%m-%d", time.gmtime())}
    record |= {name: [dataclasses.asdict(point) for point in points] for name, points in lines.items()}
    folder = ROOT / "results" / "benchmarks"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"growth_{kind}.json").write_text(json.dumps(record, indent=1) + "\n")
    draw(lines, folder / f"growth_{kind}.png")


def measured(batch: int, pixels: int, devices: int) -> Point:
    mesh = sharding.make_mesh(1, devices, jax.devices()[:devices])
    config = quickstart.get_config()
    config.data.sources, config.data.image_size, config.train.batch_size = ("array_record:PREPARED",), pixels, batch
    lowered = blueprint.lower_train(config, blueprint.load(config), mesh)
    compiled = lowered.compile()
    memory: Any = compiled.memory_analysis()
    state, frozen, rows = jax.tree.map(filled, lowered.in_avals[0], compiled.input_shardings[0])
    seconds = []
    for _ in range(REPEATS + 1):
        began = time.perf_counter()
        state, _ = jax.block_until_ready(compiled(state, frozen, rows))
        seconds.append(time.perf_counter() - began)
    point = Point(batch, pixels, devices, statistics.median(seconds[1:]), 0, memory.temp_size_in_bytes)
    point = dataclasses.replace(point, arguments=memory.argument_size_in_bytes)
    print(point, flush=True)
    return point


def filled(shape: Any, where: Any) -> jax.Array:
    if jnp.issubdtype(shape.dtype, jax.dtypes.prng_key):
        return jax.device_put(jax.random.key(0), where)
    value = 0.02 if jnp.issubdtype(shape.dtype, jnp.floating) else 0
    return jax.device_put(jnp.full(shape.shape, value, shape.dtype), where)


def draw(lines: dict[str, list[Point]], file: Path) -> None:
    figure, axes = plt.subplots(2, 3, figsize=(11, 6), sharex="col", layout="constrained")
    titles = {
        "batch": "batch, 48 pixels",
        "pixels": "side of the picture, batch 16",
        "devices": "devices that share batch 32",
    }
    for column, (name, points) in enumerate(lines.items()):
        places = [getattr(point, name) for point in points]
        above, below = axes[:, column]
        above.plot(places, [1000 * point.seconds for point in points], "o-")
        below.plot(places, [point.temporaries / 1e6 for point in points], "o-", label="temporaries")
        below.plot(places, [point.arguments / 1e6 for point in points], "s--", label="state and batch")
        for axis in (above, below):
            axis.set_xscale("log", base=2)
            axis.set_yscale("log", subs=(2, 3, 5))
            axis.yaxis.set_major_formatter(ScalarFormatter())
            axis.yaxis.set_minor_formatter(ScalarFormatter())
            axis.set_xticks(places, [str(place) for place in places])
            axis.grid(alpha=0.3)
        above.set_title(titles[name])
        below.set_xlabel(name)
    axes[0, 0].set_ylabel("ms a step")
    axes[1, 0].set_ylabel("MB of a device")
    axes[1, 0].legend(fontsize=8)
    figure.savefig(file, dpi=110, metadata={"Software": None})


if __name__ == "__main__":
    main()
