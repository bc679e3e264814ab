"""Resolution adaptation: how fast each objective brings the prior, made at 64 pixels, to 48."""

from configs import text_to_image
from d2f_jax.program import Config
from launch.study import training
from launch.study.bench import LATENTS, Size
from launch.study.cells import Cell
from launch.study.exam import Question

TRAINED = {"full": "", "LoRA": ":lora_base"}
SAMPLERS = {
    "diff2flow": ("Euler",),
    "flow_matching": ("Euler",),
    "diffusion": ("DDIM on the flow grid", "DDIM"),
}


def name(trained: str, objective: str, seed: int) -> str:
    return f"adapt-{trained.lower()}-{objective}-{seed}"


def cells(size: Size, seed: int) -> list[Cell]:
    """The whole UNet first; its weights are what reflow and the solvers begin with."""
    made = []
    for trained, preset in TRAINED.items():
        for objective, samplers in SAMPLERS.items():
            often = (0, size.steps // 8, *((size.steps // 2,) if trained == "full" else ()), size.steps)
            questions = [Question(sampler, (size.few,)) for sampler in samplers]
            questions += [Question(sampler, (size.many,), often) for sampler in samplers]
            leaves = trained == "full" and objective != "flow_matching"
            config = run(size, objective + preset, seed, size.steps)
            made.append(training.cell(name(trained, objective, seed), size, config, questions, leaves=leaves))
    return made


def run(size: Size, argument: str, seed: int, steps: int) -> Config:
    """A config of configs/text_to_image.py on the latents of ShapesWorld."""
    config: Config = text_to_image.get_config(argument)
    config.model, config.seed, config.data.image_size = size.model, seed, size.pixels
    config.data.sources, config.data.num_train = (LATENTS,), size.scenes
    config.train.num_steps, config.train.batch_size = steps, size.batch_size
    return config
