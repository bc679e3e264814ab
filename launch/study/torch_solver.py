"""DPM-Solver++(2M), the usual second-order solver of diffusion models, in PyTorch diffusers: it knows our exports."""

# diffusers declares less than it takes and returns.
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportCallIssue=false, reportPrivateImportUsage=false

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from tqdm import tqdm

from d2f_jax.errors import InputError


def draw(
    folder: Path, prompts: Sequence[str], noise_BxHxWxC: np.ndarray, *, num_steps: int, guidance_scale: float
) -> np.ndarray:
    """Pictures uint8 [B, H, W, 3] of a diffusers folder, from this noise; begins at the last timestep."""
    try:
        import torch
        from diffusers import DPMSolverMultistepScheduler, StableDiffusionPipeline
    except ImportError as error:
        raise InputError("DPM-Solver++ is diffusers'; install it: ./launch/install.sh torch") from error
    pipe = StableDiffusionPipeline.from_pretrained(folder, dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    pipe.scheduler = DPMSolverMultistepScheduler.from_config(
        pipe.scheduler.config, algorithm_type="dpmsolver++", solver_order=2, timestep_spacing="trailing"
    )
    factor = 2 ** (len(pipe.vae.config.block_out_channels) - 1)
    height, width = (factor * side for side in noise_BxHxWxC.shape[1:3])
    noise = torch.from_numpy(np.array(noise_BxHxWxC)).permute(0, 3, 1, 2)
    images = []
    for i in tqdm(range(0, len(prompts), 64), desc=f"DPM-Solver++, {num_steps} steps", unit="batch"):
        drawn = pipe(
            list(prompts[i : i + 64]),
            latents=noise[i : i + 64],
            num_inference_steps=num_steps,
            guidance_scale=guidance_scale,
            height=height,
            width=width,
            output_type="np",
        )
        images.append(np.rint(drawn.images * 255).astype(np.uint8))
    return np.concatenate(images)
