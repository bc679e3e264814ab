"""tiny-sd finetuned as a flow on ShapesWorld, at 48 pixels where the prior was trained at 64.

    python -m d2f_jax.train --config=configs/quickstart.py --workdir=quickstart
    python -m d2f_jax.train --config=configs/quickstart.py:lora --workdir=quickstart-lora

The paper's resolution adaptation in small: 4 min 12 s, 2.5 GB on two CPU cores. Fréchet distance and caption accuracy
at 4 steps: the prior 466 and 38% by DDIM, 344 and 51% on the flow grid, finetuned 72 and 84%.
"""

from ml_collections import ConfigDict


def get_config(arg: str | None = None) -> ConfigDict:
    """`arg` is "lora" to train low-rank adapters of the attention layers, or nothing to train the whole UNet."""
    if arg not in (None, "", "lora"):
        raise ValueError(f"configs/quickstart.py:{arg} is not known; write :lora or nothing")
    config = ConfigDict()
    config.model = "tiny-sd"  # diffusers folder, hub id, or the embedded "tiny-sd"
    config.variant = ""  # of the weights' files: "fp16", "bf16", or "" for the plain ones
    config.seed = 0  # of data order, noise, times and adapters; never of the evaluation's noise
    config.convention = "exact"  # alignment; "reference" only for checkpoints of the paper's published code
    config.compute_dtype = "float32"  # of the networks; "bfloat16" on TPU and GPU. Parameters stay float32

    config.data = ConfigDict()
    config.data.source = "shapes_world"  # or "image_folder"
    config.data.path = ""  # of the image folder; for ShapesWorld where it is built, "" for the workdir
    config.data.image_size = 48  # pixels; the shorter side is resized to it, the rest cropped
    config.data.num_train = 4096  # scenes; ShapesWorld only
    config.data.num_validation = 512  # scenes; ShapesWorld only
    config.data.caption_dropout = 0.1  # share of captions replaced by "", which guidance needs
    config.data.random_flip = False  # left and right matter in ShapesWorld's captions

    config.lora = ConfigDict()
    config.lora.enabled = arg == "lora"
    config.lora.rank = 16
    config.lora.scale = 1.0  # of the adapters' output

    config.train = ConfigDict()
    config.train.num_steps = 400
    config.train.batch_size = 32  # over all devices
    config.train.learning_rate = 1e-3 if arg == "lora" else 3e-4
    config.train.warmup_steps = 20  # linear, from 0
    config.train.weight_decay = 0.0
    config.train.max_grad_norm = 1.0  # global norm
    config.train.ema_decay = 0.99  # at most; shorter in the first steps
    config.train.log_every = 10  # steps
    config.train.checkpoint_every = 200  # steps
    config.train.checkpoints_kept = 2

    config.eval = ConfigDict()
    config.eval.step_counts = (1, 2, 4, 8, 25)
    config.eval.num_images = 128  # for the scores; ShapesWorld only
    config.eval.batch_size = 64
    config.eval.guidance_scale = 3.0
    config.eval.seed = 1234  # of the noise that every row of the table starts from
    config.eval.grid_images = 4  # in each cell of the picture
    return config.lock()
