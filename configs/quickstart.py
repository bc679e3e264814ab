"""tiny-sd finetuned as a flow on ShapesWorld, at 48 pixels where the prior was trained at 64.

    python -m d2f_jax.train --config=configs/quickstart.py --workdir=quickstart
    python -m d2f_jax.train --config=configs/quickstart.py:lora --workdir=quickstart-lora  # or :lora_small, :lora_base

The paper's resolution adaptation in small: 6 minutes, 2.5 GB on two CPU cores. Fréchet distance and caption accuracy
at 4 steps: the prior 466 and 38% by DDIM, 344 and 51% on the flow grid, finetuned 67 and 84%.
"""

from ml_collections import ConfigDict

from d2f_jax.errors import InputError

# What LoRA adapts, where it is more or other than `config.lora` says below. The paper's two, with their parameters on
# Stable Diffusion 2.1: lora_small 61.5M, lora_base 207.5M.
_OFF = {"self_attention_rank": 0, "cross_attention_rank": 0, "attention_out": False}
_FIRST_LAST = {"first_layer": True, "last_layer": True}
LORA = {
    "lora": {},
    "lora_small": _OFF
    | _FIRST_LAST
    | {"self_attention_rank": 64, "cross_attention_rank": 64, "conv_rank": 64, "mlp_rank": 64},
    "lora_base": _OFF | _FIRST_LAST | {"self_attention_ratio": 0.2, "cross_attention_ratio": 0.2, "conv_ratio": 0.2},
}


def get_config(arg: str | None = None) -> ConfigDict:
    """`arg` is one of LORA to train low-rank adapters, or nothing to train the whole UNet."""
    if arg and arg not in LORA:
        raise InputError(
            f"configs/quickstart.py:{arg} is not known; write {', '.join(f':{a}' for a in LORA)} or nothing"
        )
    config = ConfigDict()
    config.model = "tiny-sd"  # diffusers folder, hub id, or the embedded "tiny-sd"
    config.variant = ""  # of the weights' files: "fp16", "bf16", or "" for the plain ones
    # The schedule's last timestep made pure noise, as diffusers' rescale_betas_zero_snr: for the training, what it is
    # compared with and the export. False leaves the model's own schedule; impossible with an epsilon model
    config.zero_terminal_snr = False
    config.init_from = ""  # checkpoints/ of another run of the same model, whose averaged weights this one begins with
    config.seed = 0  # of data order, noise, times and adapters; never of the evaluation's noise
    config.compute_dtype = "float32"  # of the networks; "bfloat16" on TPU and GPU. Parameters stay float32
    # Done again in the backward pass: "elementwise", norms and activations, saves memory at little cost; with "gathers"
    # devices also send each other weights again; "resnets", "attentions", "blocks" do both, and compute these again
    config.remat = "none"

    config.task = ConfigDict()
    config.task.name = "text_to_image"  # or "image_to_depth"; what follows is its own
    config.task.concatenate = True  # the picture's latent with the network's input, which is widened for it
    config.task.adapters = False  # adapters of convolutions see it, too or instead (LoRAdapter)
    config.task.start = "noise"  # of the flow; "image" is the picture's latent
    config.task.start_noise = 0.0  # how far that is noised: 0 not at all, 1 to noise alone
    config.task.pad_text = False  # the empty text at full length, as the paper's published code; else 2 tokens

    config.objective = ConfigDict()
    config.objective.name = "diff2flow"  # "flow_matching" without any alignment, or "diffusion", the model's own loss
    config.objective.align = ("timestep", "state", "velocity")  # leave some out to see what each of them does
    config.objective.raw_time = False  # a timestep not aligned is t itself, as in the paper's baseline, not T (1 - t)
    config.objective.convention = "exact"  # "reference" only for checkpoints of the paper's published code
    config.objective.path = "linear"  # of flow_matching; "gvp" keeps the variance at 1, and is no straight line
    config.objective.sigma_min = 0.0  # of flow_matching's linear path: noise that is on it at every time
    config.objective.times = "uniform"  # of flow; "logit_normal" draws more from the middle
    config.objective.logit_mean = 0.0  # above 0: more times near data
    config.objective.logit_std = 1.0
    config.objective.shift = 1.0  # above 1: more times near noise, for large pictures
    # Where times begin: "zero", as the paper's published code, or the flow time of the "last_timestep", where samplers
    # begin, and before which errors of an epsilon model weigh most
    config.objective.begin = "zero"
    config.objective.norm = "l2"  # of the error: "l2" is squared, "l1" its size
    config.objective.min_snr_gamma = 0.0  # of the diffusion objective, commonly 5; 0 is off

    config.mesh = ConfigDict()  # the result does not depend on it
    # Copies of parameters and optimizer, and how many devices share a copy; -1 takes what is left. If both are -1,
    # devices of one TPU slice, or of one host with GPUs, share: as many as divide their number and 16
    config.mesh.data = -1
    config.mesh.fsdp = -1

    config.data = ConfigDict()
    # What to train on, one or several: "shapes_world", "image_folder:FOLDER", "webdataset:{000..127}.tar",
    # "tfds:NAME?split=train&text=caption", "array_record:FOLDER" as d2f_jax.prepare and d2f_jax.reflow write it; with
    # depth "hypersim:FOLDER?split=train", "vkitti2:FOLDER", "depth_list:FILE?root=FOLDER&protocol=nyuv2"; and
    # "coco:captions_val2017.json?images=val2017", "uniform_colours:black,white?each=16"
    config.data.sources = ("shapes_world",)
    config.data.weights = ()  # share of each source in a batch; () is equal shares
    config.data.held_out = 0  # examples of each source kept for the validation loss, if it has none of its own
    config.data.image_size = 48  # pixels; the height
    config.data.image_width = 0  # pixels; 0 is image_size, a square
    config.data.resize = "aspect"  # cut to the form of image_size and image_width; "fixed" is whole, which distorts
    config.data.crop = "center"  # of what "aspect" leaves over; "random" in training, of pictures
    config.data.latents = "sample"  # of what the VAE tells of a picture; "mean" as in the paper's published code
    config.data.num_train = 4096  # scenes; ShapesWorld only
    config.data.num_validation = 512  # scenes; ShapesWorld only
    config.data.caption_dropout = 0.1  # share of captions replaced by "", which guidance needs
    # Mirrors half of the pictures, for which d2f_jax.prepare encodes each twice; left and right matter in ShapesWorld
    config.data.random_flip = False
    config.data.on_damage = "stop"  # at an example that cannot be read; "skip" trains without it and counts it
    config.data.max_damaged = 1000  # examples skipped before the run stops after all
    config.data.num_workers = 0  # processes that read and decode; 0 is threads of this one

    config.lora = ConfigDict()
    config.lora.enabled = bool(
        arg
    )  # low-rank adapters, and the first and last layer perhaps, instead of the whole UNet
    config.lora.scale = 1.0  # of the adapters' output
    # Of each group either the rank or the ratio, rank = ceil(ratio * max(inputs, outputs)); 0 is off
    config.lora.self_attention_rank = 16  # to_q, to_k, to_v
    config.lora.self_attention_ratio = 0.0
    config.lora.cross_attention_rank = 16  # the same of attention to the text
    config.lora.cross_attention_ratio = 0.0
    config.lora.attention_out = True  # to_out.0 as well, which the paper leaves as it is
    config.lora.conv_rank = 0  # every convolution, with the projections that are convolutions in Stable Diffusion 1.x
    config.lora.conv_ratio = 0.0
    config.lora.mlp_rank = 0  # feed-forward layers and the transformers' projections
    config.lora.mlp_ratio = 0.0
    config.lora.first_layer = False  # conv_in trained fully
    config.lora.last_layer = False  # conv_norm_out and conv_out trained fully
    config.lora.update(LORA.get(arg or "", {}))

    config.train = ConfigDict()
    config.train.num_steps = 400
    config.train.batch_size = 32  # over all devices
    config.train.accumulate = 1  # parts of a batch, worked through one after another
    config.train.optimizer = "adamw"  # "adam", or "adafactor" whose second moments are factored
    config.train.learning_rate = 1e-3 if arg else 3e-4
    config.train.schedule = "constant"  # after the warm-up; "cosine" or "exponential" down to final_rate
    config.train.final_rate = 0.01  # times learning_rate, at num_steps
    config.train.warmup_steps = 20  # linear, from 0
    config.train.b1 = 0.9  # of Adam's first moment; adafactor has none
    config.train.b2 = 0.999  # of Adam's second; adafactor has its own law
    config.train.first_moment_dtype = "float32"  # Adam's; "bfloat16" saves two bytes a parameter
    config.train.weight_decay = 0.0  # times the rate, in each step; adam does not decay
    config.train.max_grad_norm = 1.0  # global norm
    config.train.ema_decay = 0.99  # at most; shorter in the first steps; 0 keeps no average, and saves its memory
    config.train.ema_start = 0  # step before which the average is a copy
    config.train.max_bad_steps = 10  # in a row that are not finite, and so skipped, before the run stops
    config.train.log_every = 10  # steps
    config.train.profile_steps = ()  # (first, last) to trace for the profiler into workdir/profile
    config.train.checkpoint_every = 200  # steps
    config.train.checkpoints_kept = 2  # the newest
    config.train.checkpoint_period = 0  # every so many steps one is kept for good; 0 is none

    config.eval = ConfigDict()
    config.eval.every = 200  # steps between validation losses and grids of samples
    config.eval.num_loss_examples = 64  # held-out examples in the validation loss
    config.eval.step_counts = (1, 2, 4, 8, 25)
    config.eval.sources = ()  # pictures to draw and judge; () is what is held out of data.sources
    sampling(config.eval, "euler")
    config.eval.num_images = 128  # for the scores, at most
    config.eval.batch_size = 64
    config.eval.guidance_scale = 3.0
    config.eval.guidance_rescale = 0.0  # 0.7 keeps strong guidance from glaring
    config.eval.negative_prompt = ""  # what to steer away from
    config.eval.seed = 1234  # of the noise that every row of the table starts from
    config.eval.grid_images = 4  # in each cell of the picture

    config.eval.depth = ConfigDict()  # how depth is judged
    config.eval.depth.ensemble = 1  # estimates that are merged for each picture
    config.eval.depth.space = "log"  # what estimates are affine in: "log" of depth, as trained here, or "linear"
    # The benchmark whose pixels count for d2f_jax.evaluate, at the pictures' own size: "nyuv2", "kitti", "kitti_garg",
    # "eth3d", "scannet", "diode", or "all" that are measured; "" is the source's own, or all of one that names none
    config.eval.depth.protocol = ""

    config.reflow = ConfigDict()  # of d2f_jax.reflow: how the teacher makes its pairs
    config.reflow.count = 4096
    config.reflow.num_validation = 64  # of held-out captions
    sampling(config.reflow, "ddim")
    config.reflow.num_steps = 25
    config.reflow.guidance_scale = 3.0
    config.reflow.guidance_rescale = 0.0
    config.reflow.negative_prompt = ""

    config.wandb_project = ""  # Weights & Biases, beside metrics.jsonl and TensorBoard
    return config.lock()


def sampling(section: ConfigDict, sampler: str) -> None:
    """How `config.eval` and `config.reflow` each sample."""
    section.sampler = sampler  # one of d2f_jax.sample's
    section.shift = 1.0  # of its steps towards noise
    section.begin = "last_timestep"  # where its steps in flow time begin; "zero" as the paper's published code
    section.spacing = ""  # of ddim's timesteps: "leading", "trailing", "linspace", "quad", or "" as the model has them
    section.eta = 0.0  # of ddim: the share of noise that is drawn anew, 1 is DDPM
    section.temperature = 1.0  # times what eta draws
    section.noise_dropout = 0.0  # share of its values that are 0, the others larger in turn
    section.rtol = 1e-3  # of dopri5 and its kin, relative and absolute: how exact their steps are
    section.atol = 1e-4
    section.sde = ConfigDict()  # of sde_euler and sde_heun: which noise is added, and their last step, without any
    section.sde.form = "sigma"
    section.sde.norm = 1.0
    section.sde.last_step = "euler"
    section.sde.last_step_size = 0.04
