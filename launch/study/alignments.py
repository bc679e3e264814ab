"""What each alignment does, and the exact convention against the one of the published code."""

from d2f_jax import prior
from launch.study import adaptation, training
from launch.study.bench import Bench, Size
from launch.study.cells import Cell, Result
from launch.study.exam import Question

WAYS = {  # of the alignment, as config.objective.align and .convention have it
    "reference": (("timestep", "state", "velocity"), "reference"),
    "none": ((), "exact"),
    "velocity": (("velocity",), "exact"),
    "timestep": (("timestep",), "exact"),
    "state": (("state",), "exact"),
    "no velocity": (("timestep", "state"), "exact"),
    "no timestep": (("state", "velocity"), "exact"),
    "no state": (("timestep", "velocity"), "exact"),
}
PRIORS = {
    "exact": ("Euler", "Euler from t = 0", "DDIM", "DDIM on the flow grid"),
    "reference": ("Euler", "Euler from t = 0"),
}


def name(way: str, seed: int) -> str:
    return f"align-{way.replace(' ', '-')}-{seed}"


def cells(size: Size, seed: int) -> list[Cell]:
    return [before(size, seed), *(after(size, way, seed) for way in WAYS)]


def after(size: Size, way: str, seed: int) -> Cell:
    """Full finetuning; with all of the alignment, exact, it is the cell of resolution adaptation."""
    config = adaptation.run(size, "diff2flow", seed, size.steps // 2)
    config.objective.align, config.objective.convention = WAYS[way]
    questions = [Question("Euler", (size.few,)), Question("Euler", (size.many,), (0, size.steps // 2))]
    return training.cell(name(way, seed), size, config, questions)


def before(size: Size, seed: int) -> Cell:
    """The prior as a flow, without any training: by both conventions, and from both beginnings of time."""
    asked = {
        convention: [Question(sampler, (size.few, size.many)) for sampler in samplers]
        for convention, samplers in PRIORS.items()
    }

    def compute(bench: Bench, _folder) -> Result:
        told = {}
        for convention, questions in asked.items():
            config = adaptation.run(size, "diff2flow", seed, 0)
            config.objective.convention = convention
            told[convention] = bench.exam(seed).answers(prior.load(config).on_mesh(bench.mesh), questions, 0)
        return told

    settings = {
        "model": size.model,
        "pixels": size.pixels,
        "images": size.images,
        "seed": seed,
        "asked": {convention: list(samplers) for convention, samplers in PRIORS.items()},
        "step_counts": [size.few, size.many],
    }
    return Cell(name=f"align-before-{seed}", settings=settings, compute=compute, minutes=3)
