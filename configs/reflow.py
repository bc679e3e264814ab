"""The paper's reflow experiments: Stable Diffusion 1.5 trained on its own pairs of noise and picture, for few steps.

    python -m d2f_jax.reflow --config=configs/reflow.py:diff2flow:image_folder:CAPTIONED --out=PAIRS
    python -m d2f_jax.train --config=configs/reflow.py:diff2flow:lora_small:array_record:PAIRS --workdir=DIR
    python -m d2f_jax.train --config=configs/reflow.py:diff2flow:array_record:PAIRS --workdir=DIR  # the whole UNet
    python -m d2f_jax.reflow --config=configs/reflow.py:diff2flow --out=PAIRS         # in small: tiny-sd, ShapesWorld
    python -m d2f_jax.train --config=configs/reflow.py:diff2flow:small:array_record:PAIRS --workdir=DIR

The teacher is a diffusion model, drawn from by DDIM; of a finetuned flow add --config.reflow.sampler=euler to the first
command, and to both the model. Of the paper's published code are rate, batch size, Adam without decay, the average,
and the number of its pairs. Of the paper's appendix, known to us by notes that cite it, are lora_small, 40 steps of
the teacher and 60,000 updates; guidance is ours. Sample with 1, 2 or 4 steps and guidance_scale=1: guidance is in the
pairs. Neither was run at that size: by XLA's count of operations training would be 63 hours of a TPU v5e chip or 13
of an H100 at 40% of their peak, with lora_small (2.33 TFLOP a picture, and 0.3 a step) as with the whole UNet (2.36),
and 1.6 million pairs of 40 guided steps 365 or 73.
"""

from ml_collections import ConfigDict

from configs import quickstart
from configs.text_to_image import PUBLISHED, SD15, objective, split


def get_config(arg: str = "diff2flow") -> ConfigDict:
    """OBJECTIVE, OBJECTIVE:SOURCE, or OBJECTIVE:small:SOURCE for pairs of tiny-sd."""
    name, _, preset, source = split(arg)
    small = source.startswith("small:") or not source
    config = quickstart.get_config(preset)
    large = {
        "model": SD15,
        "train.learning_rate": 5e-5,
        "train.num_steps": 60_000,
        "reflow.count": 1_644_334,
        "reflow.num_steps": 40,
        "reflow.guidance_scale": 7.5,
    }
    config.update_from_flattened_dict(
        ({} if small else PUBLISHED | large)
        | objective(name)
        | {
            "data.sources": (source.removeprefix("small:") or "shapes_world",),
            "data.caption_dropout": 0.0,  # pairs are of their captions
            "eval.guidance_scale": 1.0,
            "eval.step_counts": (1, 2, 4),
        }
    )
    return config
