"""The paper's image-to-depth experiments: Stable Diffusion 2.1 (1.5 with `:sd15`) that tells the depth of a picture.

    python -m d2f_jax.train --config="configs/depth.py:diff2flow:hypersim:HYPERSIM?split=train" --workdir=DIR
    python -m d2f_jax.train --config="configs/depth.py:diff2flow:lora_base:hypersim:HYPERSIM?split=train" --workdir=DIR
    python -m d2f_jax.train --config=configs/depth.py:diff2flow --workdir=DIR  # in small: tiny-sd, ShapesWorld
    python -m d2f_jax.evaluate --config="configs/depth.py:diff2flow:hypersim:HYPERSIM?split=test" --model=DIR/export \
        --out=SCORES --config.data.held_out=0 --config.eval.num_images=10000

The picture's latent stands before the noisy one of depth, the text is empty. The evaluation is of scenes that were not
trained on; what a training itself holds out are frames of the camera paths that it learns. The paper's mixture of nine
parts Hypersim and one Virtual KITTI 2, and the cheap way, in which the pictures are encoded once, and once mirrored:

    python -m d2f_jax.prepare --config="configs/depth.py:diff2flow:hypersim:HYPERSIM?split=train" --out=H
    python -m d2f_jax.prepare --config=configs/depth.py:diff2flow:vkitti2:VKITTI --out=V
    python -m d2f_jax.train --config=configs/depth.py:diff2flow:array_record:H --workdir=DIR \
        --config.data.sources="('array_record:H','array_record:V')" --config.data.weights="(0.9,0.1)" \
        --config.eval.sources="('hypersim:HYPERSIM?split=val',)"

Of the paper's published code are rate, Adam without decay, the average, depth's normalisation, pictures squeezed to
384 x 512 pixels whole, and diff2flow's schedule that ends in pure noise for Stable Diffusion 2.1; it sets no end. Of
Marigold (arXiv 2312.02145), whose data these are, are the batch of 32, the 100 steps of warm-up and the rate's fall to
a hundredth in 25,000 steps. Of ours is bfloat16. The small run takes ten minutes on two CPU cores. The large one was
not run: by XLA's count 1.68 TFLOP a picture on latents (1.52, and 1.2 a step, with lora_base) would be 5 hours of a TPU
v5e chip, with adapters 4, or one of an H100 at 40% of their peak; encoding picture and depth on the way, 1.65 TFLOP,
takes as much again.
"""

from ml_collections import ConfigDict

from configs import quickstart
from configs.text_to_image import PUBLISHED, objective, split, zero_terminal_snr


def get_config(arg: str = "diff2flow") -> ConfigDict:
    """OBJECTIVE[:sd15][:LORA][:SOURCE]."""
    name, model, preset, source = split(arg)
    config = quickstart.get_config(preset)
    small = {"data.image_size": 64, "eval.step_counts": (1, 2, 4, 10)}
    large = PUBLISHED | {
        "model": model,
        "zero_terminal_snr": zero_terminal_snr(name, model),
        "data.sources": (source,),
        "data.image_size": 384,
        "data.image_width": 512,
        "data.resize": "fixed",
        "data.random_flip": True,
        "train.num_steps": 25_000,
        "train.batch_size": 32,
        "train.learning_rate": 3e-5,
        "train.schedule": "exponential",
        "train.warmup_steps": 100,
        "eval.step_counts": (1, 2, 4, 10),
        "eval.depth.ensemble": 4,
    }
    config.update_from_flattened_dict((large if source else small) | objective(name) | {"task.name": "image_to_depth"})
    return config
