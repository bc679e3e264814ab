"""The diffusion model's noise schedule, as its scheduler_config.json describes it."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np

from d2f_jax.errors import InputError

PredictionType = Literal["epsilon", "v_prediction", "sample"]

# Keys that concern a sampler, not the process that the network was trained on.
# fmt: off
_SAMPLER_KEYS = frozenset((
    "clip_sample", "clip_sample_range", "dynamic_thresholding_ratio", "eta", "interpolation_type",
    "set_alpha_to_one", "skip_prk_steps", "steps_offset", "timestep_spacing", "timestep_type", "variance_type",
    "sample_max_value", "solver_order", "solver_type", "algorithm_type", "lower_order_final", "euler_at_final",
    "final_sigmas_type", "lambda_min_clipped", "sigma_min", "sigma_max", "s_churn", "s_noise", "predict_x0", "solver_p",
    "disable_corrector",
))
# fmt: on
# Keys that would change the mathematics, with the only values under which they do not.
_NEUTRAL = {
    "thresholding": (False,),
    "use_karras_sigmas": (False, None),
    "use_exponential_sigmas": (False, None),
    "use_beta_sigmas": (False, None),
    "use_lu_lambdas": (False, None),
    "use_flow_sigmas": (False, None),
    "flow_shift": (1.0, None),
    "use_dynamic_shifting": (False, None),
    "time_shift_type": ("exponential", None),
    "shift_terminal": (None,),
}
_KEYS = frozenset(
    {"beta_schedule", "beta_start", "beta_end", "num_train_timesteps", "trained_betas", "rescale_betas_zero_snr"}
    | {"prediction_type"}
)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class NoiseSchedule:
    """A variance-preserving diffusion process `x_tau = sqrt(a) x_1 + sqrt(1 - a) eps` with `a = alphas_cumprod[tau]`.

    `alphas_cumprod` is float32 [T], strictly decreasing; `prediction_type` says what the network predicts.
    """

    alphas_cumprod: jax.Array
    prediction_type: PredictionType = dataclasses.field(metadata={"static": True})

    @classmethod
    def from_config(cls, scheduler_config: Mapping[str, Any]) -> "NoiseSchedule":
        """Reads diffusers' keys, absent ones with diffusers' defaults.

        Of CompVis's `beta_schedule`s "linear", "sqrt_linear" and "cosine" are diffusers' "scaled_linear", "linear" and
        "squaredcos_cap_v2"; "sqrt", which diffusers lacks, has its own name here.

        Raises InputError naming a key that is unknown or whose value changes the mathematics in a way not supported,
        and for `epsilon` with zero terminal SNR, where the last timestep's prediction tells nothing of the data.
        """
        config = {key: value for key, value in scheduler_config.items() if not key.startswith("_")}
        for key, value in config.items():
            if key in _NEUTRAL and value not in _NEUTRAL[key]:
                raise InputError(f"scheduler_config: {key}={value!r} is not supported; use {_NEUTRAL[key][0]!r}")
            if key not in _KEYS | _SAMPLER_KEYS | _NEUTRAL.keys():
                raise InputError(
                    f"scheduler_config: unknown key {key}={value!r}; remove it if it changes no mathematics"
                )
        prediction_type = config.get("prediction_type", "epsilon")
        if prediction_type not in get_args(PredictionType):
            allowed = ", ".join(get_args(PredictionType))
            raise InputError(f"scheduler_config: prediction_type={prediction_type!r} is not one of {allowed}")
        try:
            betas = betas_of(config)
        except (TypeError, ValueError, ZeroDivisionError, OverflowError) as error:
            if isinstance(error, InputError):
                raise
            raise InputError(
                f"scheduler_config: the betas cannot be computed ({error}); correct its numbers"
            ) from error
        if betas.ndim != 1 or len(betas) < 2:
            raise InputError(f"scheduler_config: there are {betas.size} betas; give two timesteps or more")
        if config.get("rescale_betas_zero_snr", False):
            betas = _rescale_zero_terminal_snr(betas)
        alphas_cumprod = np.cumprod(1.0 - betas)
        if not (np.all(np.diff(alphas_cumprod) < 0) and alphas_cumprod[-1] >= 0 and alphas_cumprod[0] < 1):
            raise InputError(
                "scheduler_config: the betas are not all between 0 and 1, so noise does not grow with time"
            )
        if prediction_type == "epsilon" and alphas_cumprod[-1] < 1e-8:
            raise InputError(
                "scheduler_config: prediction_type='epsilon' with zero terminal SNR has no velocity at the noise end; "
                "use a v_prediction model or rescale_betas_zero_snr=false"
            )
        return cls(jnp.asarray(alphas_cumprod, jnp.float32), prediction_type)

    @property
    def num_train_timesteps(self) -> int:
        return self.alphas_cumprod.shape[0]


def betas_of(config: Mapping[str, Any]) -> np.ndarray:
    """float64 [T], before any rescaling."""
    if config.get("trained_betas") is not None:
        return np.asarray(config["trained_betas"], np.float64)
    steps = config.get("num_train_timesteps", 1000)
    start, end = config.get("beta_start", 0.0001), config.get("beta_end", 0.02)
    match config.get("beta_schedule", "linear"):
        case "linear":
            return np.linspace(start, end, steps)
        case "scaled_linear":
            return np.linspace(start**0.5, end**0.5, steps) ** 2
        case "squaredcos_cap_v2":
            bar = [math.cos((i / steps + 0.008) / 1.008 * math.pi / 2) ** 2 for i in range(steps + 1)]
            return np.minimum(1 - np.array(bar[1:]) / np.array(bar[:-1]), 0.999)
        case "sqrt":
            return np.sqrt(np.linspace(start, end, steps))
        case unknown:
            raise InputError(
                f"scheduler_config: beta_schedule={unknown!r} is not one of linear, scaled_linear, squaredcos_cap_v2, "
                "sqrt"
            )


def _rescale_zero_terminal_snr(betas: np.ndarray) -> np.ndarray:
    """Shifts and stretches sqrt(alphas_cumprod) so that it ends at 0 (arXiv 2305.08891, algorithm 1)."""
    root = np.sqrt(np.cumprod(1.0 - betas))
    root = (root - root[-1]) * root[0] / (root[0] - root[-1])
    alphas_cumprod = root**2
    return 1 - np.concatenate([alphas_cumprod[:1], alphas_cumprod[1:] / alphas_cumprod[:-1]])
