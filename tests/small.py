"""A Stable-Diffusion-shaped pipeline of random weights, small enough to compile and train in seconds."""

from pathlib import Path
from typing import Any

import diffusers
import torch
import twins
from schedules import SD, config

from d2f_jax import weights

UNET: dict[str, Any] = {
    "sample_size": 8,
    "block_out_channels": (16,),
    "down_block_types": ("DownBlock2D",),  # attention in the middle alone compiles sooner
    "up_block_types": ("UpBlock2D",),
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "cross_attention_dim": 16,
    "attention_head_dim": 2,
}
ATTENTION: dict[str, Any] = {"down_block_types": ("CrossAttnDownBlock2D",), "up_block_types": ("CrossAttnUpBlock2D",)}
CLIP: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_attention_heads": 2,
    "num_hidden_layers": 1,
    "max_position_embeddings": 24,
}


def write_pipeline(folder: Path, vae: Any = None, prediction: str = "v_prediction", **unet: Any) -> Path:
    """Written by diffusers, with tiny-sd's tokenizer; 2x downsampling, 16 pixels; `unet` changes UNET."""
    tokenizer = weights.load_tokenizer("tiny-sd")
    text = twins.text_encoder(
        **CLIP,
        vocab_size=len(tokenizer),
        **{f"{k}_token_id": getattr(tokenizer, f"{k}_token_id") for k in ("bos", "eos", "pad")},
    )
    diffusers.StableDiffusionPipeline(
        vae=twins.vae(**twins.SMALL_VAE) if vae is None else vae,
        text_encoder=text,
        tokenizer=tokenizer,
        unet=twins.unet(**UNET | unet),
        scheduler=diffusers.DDIMScheduler(
            **config(SD, prediction), clip_sample=False, set_alpha_to_one=False, steps_offset=1
        ),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(folder)
    return folder


def torch_pipeline(folder: Path | str) -> Any:
    """What diffusers makes of the folder."""
    pipeline = diffusers.StableDiffusionPipeline.from_pretrained(folder, dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline
