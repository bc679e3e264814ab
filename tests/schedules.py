"""Noise schedules that several tests share, as scheduler configs."""

from typing import Any

SD = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "num_train_timesteps": 1000}
ZERO_SNR = SD | {"rescale_betas_zero_snr": True}


def config(base: dict[str, Any], prediction_type: str) -> dict[str, Any]:
    return base | {"prediction_type": prediction_type}
