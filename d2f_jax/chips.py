"""What chips can do at most, for saying how much of it a run uses."""

from typing import Any

import jax

# Dense bfloat16 TFLOP/s of one JAX device, by the vendors' data sheets. A TPU v4, v5p or v7x chip is one device on
# v4 and v5p, and two devices on v7x.
_PEAK_TFLOPS = {
    "TPU v4": 275.0,
    "TPU v5 lite": 197.0,
    "TPU v5e": 197.0,
    "TPU v5": 459.0,
    "TPU v5p": 459.0,
    "TPU v6 lite": 918.0,
    "TPU v6e": 918.0,
    "TPU7x": 1153.5,
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


def flops(lowered: jax.stages.Lowered) -> float | None:
    """Floating-point operations of a lowered program over all devices, as XLA counts them before it optimises.

    None where the backend does not count. A loop's body counts once.
    """
    analysis = lowered.cost_analysis()
    counted = analysis.get("flops") if analysis else None
    return float(counted) if counted and counted > 0 else None
