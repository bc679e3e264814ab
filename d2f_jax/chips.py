"""What chips can do at most, for saying how much of it a run uses, or will need."""

import dataclasses
from collections.abc import Mapping
from typing import Any


@dataclasses.dataclass(frozen=True)
class TPU:
    """A generation of chips: per chip dense bfloat16 TFLOP/s, GiB and GB/s of HBM, and links to its neighbours.

    `ici` is GB/s in one direction over all `links` together, which lead around a side of a multiple of `wraps`; of
    three sides, if all are. `devices` are JAX's on one chip, to each of which the compiler leaves `usable_gib` of HBM.
    `cycles` is a scale, in billions a second, for those that the compiler estimates: such that a product of bfloat16
    matrices of 8192 x 8192 takes as long as its FLOPs at the peak. It is no clock, and what it makes of the cycles of
    other operations was not held against a chip. `options` make a topology of such devices.
    """

    kinds: tuple[str, ...]
    tflops: float
    hbm_gib: float
    hbm: float
    ici: float
    links: int
    wraps: int
    usable_gib: float
    cycles: float
    devices: int = 1
    options: Mapping[str, str] = dataclasses.field(default_factory=dict)


# https://docs.cloud.google.com/tpu/docs/ with v4, v5e, v5p, v6e and tpu7x behind it, as of November 2026; ICI is half
# of what it calls bidirectional. It tells none for v4, whose paper (arXiv 2304.01433) has six links of 50 GB/s. That
# links lead around cubes of 4 x 4 x 4 chips, and in two dimensions around sides of 16, is in
# https://jax-ml.github.io/scaling-book/tpus; tpu7x is taken to be as v5p. What is usable the compiler says when a
# program is too large, and cycles of that product are in its text (libtpu 0.0.42; tests/test_plan.py asks it).
TPUS = {
    "v4": TPU(("TPU v4",), 275, 32, 1200, 300, 6, 4, 30.75, 1.131, options={"chip_config_name": "megacore"}),
    "v5e": TPU(("TPU v5 lite", "TPU v5e"), 197, 16, 819, 200, 4, 16, 15.75, 1.712),
    "v5p": TPU(("TPU v5", "TPU v5p"), 459, 95, 2765, 600, 6, 4, 95.74, 1.942),
    "v6e": TPU(("TPU v6 lite", "TPU v6e"), 918, 32, 1638, 400, 4, 16, 31.25, 2.486),
    "tpu7x": TPU(("TPU7x",), 2307, 192, 7380, 600, 6, 4, 94.75, 2.732, devices=2),
}

# Dense bfloat16 TFLOP/s of one JAX device, by the vendors' data sheets.
_PEAK_TFLOPS = {kind: tpu.tflops / tpu.devices for tpu in TPUS.values() for kind in tpu.kinds} | {
    "NVIDIA A100-SXM4-40GB": 312.0,
    "NVIDIA A100-SXM4-80GB": 312.0,
    "NVIDIA A100 80GB PCIe": 312.0,
    "NVIDIA H100 80GB HBM3": 989.4,
    "NVIDIA H100 PCIe": 756.0,
    "NVIDIA H200": 989.4,
    "NVIDIA L4": 121.0,
}


def peak_tflops(device: Any) -> float | None:
    """Dense bfloat16 TFLOP/s, or None for a kind that is not in the table."""
    return _PEAK_TFLOPS.get(device.device_kind)
