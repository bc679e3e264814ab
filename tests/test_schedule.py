"""The schedule against diffusers' own, and what it refuses."""

from pathlib import Path

import diffusers
import jax
import numpy as np
import pytest
from schedules import SD, ZERO_SNR

from d2f_jax import InputError, NoiseSchedule, export, weights
from d2f_jax.alignment import ALIGNED
from d2f_jax.task import TEXT_TO_IMAGE

CONFIGS = {
    "defaults": {},
    "Stable Diffusion": SD,
    "linear": {"beta_schedule": "linear", "beta_start": 1e-4, "beta_end": 0.03, "num_train_timesteps": 50},
    "cosine": {"beta_schedule": "squaredcos_cap_v2", "num_train_timesteps": 200},
    "trained": {"trained_betas": [0.01, 0.02, 0.05, 0.2]},
    "zero terminal SNR": ZERO_SNR,
}


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
def test_alphas_are_those_of_diffusers(config: dict) -> None:
    schedule = NoiseSchedule.from_config(config | {"prediction_type": "v_prediction"})
    theirs = diffusers.DDIMScheduler(**config).alphas_cumprod.numpy()
    assert schedule.num_train_timesteps == len(theirs)
    # diffusers multiplies a thousand factors in float32.
    np.testing.assert_allclose(schedule.alphas_cumprod, theirs, rtol=2e-5, atol=1e-7)


@pytest.mark.parametrize(
    "scheduler",
    [
        diffusers.DDIMScheduler,
        diffusers.DDPMScheduler,
        diffusers.DPMSolverMultistepScheduler,
        diffusers.DPMSolverSinglestepScheduler,
        diffusers.EulerAncestralDiscreteScheduler,
        diffusers.EulerDiscreteScheduler,
        diffusers.HeunDiscreteScheduler,
        diffusers.LMSDiscreteScheduler,
        diffusers.PNDMScheduler,
        diffusers.UniPCMultistepScheduler,
    ],
)
def test_every_config_that_comes_with_stable_diffusion_is_read(scheduler: type) -> None:
    theirs = scheduler(**SD)
    ours = NoiseSchedule.from_config(dict(theirs.config))
    np.testing.assert_allclose(ours.alphas_cumprod, theirs.alphas_cumprod.numpy(), rtol=2e-5)


def test_prediction_type_is_static_and_the_table_is_a_leaf() -> None:
    schedule = NoiseSchedule.from_config(SD)
    assert len(jax.tree.leaves(schedule)) == 1
    assert jax.jit(lambda s: s)(schedule).prediction_type == "epsilon"


def test_zero_terminal_snr_ends_at_zero() -> None:
    schedule = NoiseSchedule.from_config(ZERO_SNR | {"prediction_type": "v_prediction"})
    assert schedule.alphas_cumprod[-1] == 0
    np.testing.assert_allclose(schedule.alphas_cumprod[0], NoiseSchedule.from_config(SD).alphas_cumprod[0], rtol=1e-6)


def test_the_square_root_schedule_is_the_published_one_and_diffusers_reads_its_export(tmp_path: Path) -> None:
    config = SD | {"beta_schedule": "sqrt", "beta_end": 0.0012, "prediction_type": "v_prediction"}
    ours = NoiseSchedule.from_config(config).alphas_cumprod
    published = np.cumprod(1 - np.linspace(0.00085, 0.0012, 1000) ** 0.5)
    np.testing.assert_allclose(ours, published, rtol=1e-5)
    export.write_configs(tmp_path, config, ALIGNED, TEXT_TO_IMAGE, None, "AutoencoderKL")
    theirs = diffusers.EulerDiscreteScheduler.from_pretrained(tmp_path / "scheduler")
    np.testing.assert_allclose(theirs.alphas_cumprod, published, rtol=1e-4)
    again = NoiseSchedule.from_config(weights.load_scheduler_config(tmp_path))
    np.testing.assert_array_equal(again.alphas_cumprod, ours)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"beta_schedule": "sigmoid"}, "beta_schedule='sigmoid'"),
        ({"prediction_type": "flow_prediction"}, "prediction_type='flow_prediction'"),
        ({"use_flow_sigmas": True}, "use_flow_sigmas=True"),
        ({"use_karras_sigmas": True}, "use_karras_sigmas=True"),
        ({"thresholding": True}, "thresholding=True"),
        ({"snr_shift_scale": 3.0}, "unknown key snr_shift_scale=3.0"),
        ({"beta_start": "small"}, "betas cannot be computed"),
        ({"num_train_timesteps": 0}, "there are 0 betas"),
        ({"trained_betas": []}, "there are 0 betas"),
        ({"beta_end": 1.5}, "betas are not all between 0 and 1"),
        ({"rescale_betas_zero_snr": True}, "'epsilon' with zero terminal SNR"),
    ],
)
def test_refusals_name_the_key(change: dict, said: str) -> None:
    with pytest.raises(InputError, match=said):
        NoiseSchedule.from_config(SD | change)
