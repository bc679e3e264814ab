"""Few steps: a finetuned teacher and its reflow by each objective, against second-order solvers of diffusion models."""

import dataclasses
import shutil
from pathlib import Path
from typing import Any

import numpy as np

from d2f_jax import prepare, prior, weights
from d2f_jax import reflow as pairing
from d2f_jax.data import prepared
from launch.study import adaptation, torch_solver, training
from launch.study import cells as records
from launch.study.bench import Bench, Size
from launch.study.cells import Cell, Result
from launch.study.exam import GUIDANCE, Question

STEPS = (1, 2, 4, 25)
TEACHER = "diff2flow"
STUDENTS = {"diff2flow": "Euler", "flow_matching": "Euler", "diffusion": "DDIM on the flow grid"}
SOLVERS = {  # of the two finetuned models, with guidance
    "diff2flow": ("Euler", "Heun", "DDIM"),
    "diffusion": ("DDIM on the flow grid", "DDIM"),
}
DPM = "DPM-Solver++(2M)"


def cells(size: Size, seed: int) -> list[Cell]:
    return [
        *(solvers(size, objective, seed) for objective in SOLVERS),
        *(student(size, objective, seed) for objective in STUDENTS),
    ]


def student(size: Size, objective: str, seed: int) -> Cell:
    """Trained on the teacher's pairs, from the teacher's weights; sampled without guidance, which is in the pairs."""
    teacher, last = adaptation.name("full", TEACHER, seed), size.steps // 2
    made = {"pairs": how(size), "teacher": training.deciding(adaptation.run(size, TEACHER, seed, size.steps))}
    pairs = f"pairs-{seed}"
    config = adaptation.run(size, objective, seed, last)
    config.model, config.data.sources, config.data.caption_dropout = f"weights:{teacher}", (pairs,), 0.0
    few, many = (tuple(n for n in STEPS if (n == max(STEPS)) == is_many) for is_many in (False, True))
    sampler = STUDENTS[objective]
    questions = [Question(sampler, few, guidance=1.0), Question(sampler, many, (0, last), guidance=1.0)]
    return training.cell(
        f"reflow-{objective}-{seed}",
        size,
        config,
        questions,
        needs=(teacher,),
        extra=made,
        prepare=lambda bench: make_pairs(bench, bench.workdir / pairs, teacher, seed, records.as_json(made)),
    )


def how(size: Size) -> dict[str, Any]:
    """How the teacher makes its pairs, as `config.reflow` has it."""
    return {
        "count": size.pairs,
        "num_validation": 0,
        "sampler": "euler",
        "num_steps": 16,
        "shift": 1.0,
        "guidance_scale": GUIDANCE,
    }


def make_pairs(bench: Bench, folder: Path, teacher: str, seed: int, made: dict[str, Any]) -> None:
    """Goes on making them, or begins anew if they are of other settings."""
    note = folder / "made.json"
    if not records.same(records.read(note), made):
        shutil.rmtree(folder, ignore_errors=True)
        records.write(note, made)
    if not (folder / prepared.MANIFEST).exists():
        config = bench.captioned()
        config.model, config.seed = str(bench.weights(teacher)), seed
        config.reflow.update(how(bench.size))
        pairing.reflow(config, folder, prepare.Options(latents="mean", batch_size=32))


def solvers(size: Size, objective: str, seed: int) -> Cell:
    """A finetuned model, sampled in several ways; `{sampler: {steps: scores}}`."""
    trained = adaptation.name("full", objective, seed)

    def compute(bench: Bench, _folder: Path) -> Result:
        exam, folder = bench.exam(seed), bench.weights(trained)
        config = bench.captioned()
        # The prior's own scheduler: DDIM's timesteps are those of the model as it came.
        pipeline = dataclasses.replace(prior.load(config), unet=weights.load_unet(folder)).on_mesh(bench.mesh)
        told = exam.answers(pipeline, [Question(sampler, STEPS) for sampler in SOLVERS[objective]], 0)
        noise = np.asarray(pipeline.noise(seed, len(exam.prompts), size.pixels, size.pixels))
        told[DPM] = {
            str(n): exam.judge(torch_solver.draw(folder, exam.prompts, noise, num_steps=n, guidance_scale=GUIDANCE))
            for n in STEPS
        }
        return told

    settings = {
        "trained": training.deciding(adaptation.run(size, objective, seed, size.steps)),
        "images": size.images,
        "samplers": [*SOLVERS[objective], DPM],
        "step_counts": list(STEPS),
        "guidance": GUIDANCE,
    }
    return Cell(name=f"solvers-{objective}-{seed}", settings=settings, compute=compute, minutes=3.0, needs=(trained,))
