"""Few steps: a finetuned teacher and its reflow by each objective, against second-order solvers of diffusion models."""

import dataclasses
import shutil
from pathlib import Path
from typing import Any

import numpy as np

from d2f_jax import prepare, prior, report, weights
from d2f_jax import reflow as pairing
from d2f_jax.data import prepared
from launch.study import adaptation, numbers, torch_solver, training
from launch.study import cells as records
from launch.study.adaptation import FRECHET, LABELS
from launch.study.bench import Bench, Size
from launch.study.cells import Cell, Result
from launch.study.exam import GUIDANCE, Question
from launch.study.numbers import Claim, Known, Section, compared, versus

STEPS = (1, 2, 4, 25)
TEACHER = "diff2flow"
STUDENTS = {"diff2flow": "Euler", "flow_matching": "Euler", "diffusion": "DDIM on the flow grid"}
OTHERS = ("flow_matching", "diffusion")
SOLVERS = {  # of the two finetuned models, with guidance
    "diff2flow": ("Euler", "Heun", "DDIM"),
    "diffusion": ("DDIM on the flow grid", "DDIM"),
}
DPM = "DPM-Solver++(2M)"


def cells(size: Size, seed: int) -> list[Cell]:
    return [
        *(solvers(size, objective, seed) for objective in SOLVERS),
        *(student(size, objective, seed) for objective in STUDENTS),
        longer(size, seed),
    ]


def student(size: Size, objective: str, seed: int) -> Cell:
    last = size.steps // 4
    return taught(f"reflow-{objective}-{seed}", size, objective, seed, last, often=())


def longer(size: Size, seed: int) -> Cell:
    """Whether it is the number of steps that holds the student back."""
    often = (size.steps // 4, size.steps // 2, size.steps)
    return taught(f"reflow-longer-{seed}", size, TEACHER, seed, size.steps, often)


def taught(name: str, size: Size, objective: str, seed: int, last: int, often: tuple[int, ...]) -> Cell:
    """Trained on the teacher's pairs, from the teacher's weights; sampled without guidance, which is in the pairs."""
    teacher = adaptation.name("full", TEACHER, seed)
    made = {"pairs": how(size), "teacher": training.deciding(adaptation.run(size, TEACHER, seed, size.steps))}
    pairs = f"pairs-{seed}"
    config = adaptation.run(size, objective, seed, last)
    config.model, config.data.sources, config.data.caption_dropout = f"weights:{teacher}", (pairs,), 0.0
    few, many = (tuple(n for n in STEPS if (n == max(STEPS)) == is_many) for is_many in (False, True))
    sampler = STUDENTS[objective]
    questions = [Question(sampler, few, often, 1.0), Question(sampler, many, often or (0, last), 1.0)]
    return training.cell(
        name,
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
        config = bench.rendered(bench.size.pixels)
        config.model, config.seed = str(bench.weights(teacher)), seed
        config.reflow.update(how(bench.size))
        pairing.reflow(config, folder, prepare.Options(batch_size=32))


def solvers(size: Size, objective: str, seed: int) -> Cell:
    """A finetuned model, sampled in several ways; `{sampler: {steps: scores}}`."""
    trained = adaptation.name("full", objective, seed)

    def compute(bench: Bench, _folder: Path) -> Result:
        exam, folder = bench.exam(seed, size.pixels), bench.weights(trained)
        config = bench.rendered(bench.size.pixels)
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
    return Cell(name=f"solvers-{objective}-{seed}", settings=settings, compute=compute, minutes=6.0, needs=(trained,))


def section(known: Known, pictures: Path) -> Section:
    size, steps = known.size, [str(n) for n in STEPS]
    last = str(size.steps // 4)
    marks = [str(mark) for mark in size.marks if mark <= size.steps // 4]
    _draw(known, pictures / "reflow.png", steps)

    def table(what: str, form: str) -> str:
        rows = [
            [label, *(known.told(cell, *path, n, what, form=form) for n in steps)] for label, cell, path in _lines(size)
        ]
        return report.markdown_table(["", *(f"{n} step{'s' if n != '1' else ''}" for n in steps)], rows)

    learning = [
        [LABELS[o], *(known.told(f"reflow-{o}", "curve", mark, sampler, "2", FRECHET, form="{:.0f}") for mark in marks)]
        for o, sampler in STUDENTS.items()
    ]
    text = f"""
The teacher is the UNet that Diff2Flow has finetuned above. It makes {size.pairs} pairs of noise and picture from
the training captions, by 16 Euler steps with guidance {GUIDANCE:g}; on these its weights are trained for {last}
steps more by each objective. The students are sampled without guidance, which is in their pairs: a step of theirs
evaluates the network once, one of the others twice, and one of Heun's four times. {DPM} is diffusers', on our
exports, begun at the last timestep. Fréchet distance by number of steps:

{table(FRECHET, "{:.0f}")}
Caption accuracy:

{table("caption_accuracy", "{:.0%}")}
![Fréchet distance by number of steps](study/reflow.png)

Fréchet distance of the students with 2 steps, by training step:

{report.markdown_table(["", *(f"step {mark}" for mark in marks)], learning)}"""
    return Section("Reflow, and few steps", text, _claims(known, last))


_WHY_DIFFUSION_LEARNS_IT_AS_WELL = """
### Why diffusion learns reflow as well

Teacher, pairs and grid are the same, and so is the network's task at each of them: the state of a pair tells its noise
and its picture apart as well in diffusion's proportions as in the flow's. What is left is which timesteps are drawn and
how the loss weighs them, as in resolution adaptation. Reflow is of the pairs; on this grid it needs no other objective.
"""


def _why_the_solver_keeps_ahead(known: Known) -> str:
    size, few, many = known.size, str(known.size.few), str(known.size.many)
    trained = [size.steps // 4, size.steps // 2, size.steps]

    def longer(n: str) -> str:
        scores = [
            known.told("reflow-longer", "curve", str(mark), "Euler", n, FRECHET, form="{:.0f}") for mark in trained
        ]
        return ", ".join(scores)

    teacher = known.told("solvers-diff2flow", "Euler", many, FRECHET, form="{:.0f}")
    student = known.of("reflow-diff2flow", "curve", str(trained[0]), "Euler", few, FRECHET)
    solver = known.of("solvers-diffusion", DPM, "2", FRECHET)
    return f"""
### Why the solver keeps ahead with {few} steps

Training longer hardly mends it: after {", ".join(map(str, trained))} steps the student's Fréchet distance is
{longer(few)} with {few} steps, and {longer(many)} with {many}, where the teacher has {teacher}. As many steps
as one likes do not bring the student to its teacher, so it is not the curvature of its flow that is in the way. What
is left, and was not taken apart further: it tells with one evaluation of the network what its teacher tells with two,
guided, and has {size.pairs} pairs to learn that from. By evaluations the order is another: with {few} of them for a
picture the student has {versus(student, solver, "{:.0f}")} of the solver's, which takes 2 steps.
"""


def _claims(known: Known, last: str) -> list[Claim]:
    made = []
    for n in ("1", "2"):
        student = known.of("reflow-diff2flow", "curve", last, "Euler", n, FRECHET)
        teacher = known.of("solvers-diff2flow", "Euler", n, FRECHET)
        made.append(
            Claim(
                f"Reflow by Diff2Flow improves {n} step{'s' if n != '1' else ''}",
                compared(student, teacher, lambda a, b: a < b),
                f"{versus(student, teacher)}, the teacher",
            )
        )
    for n in ("2", "4"):
        student = known.of("reflow-diff2flow", "curve", last, "Euler", n, FRECHET)
        solver = known.of("solvers-diffusion", DPM, n, FRECHET)
        made.append(
            Claim(
                f"With {n} steps it is better than the diffusion model with its second-order solver",
                compared(student, solver, lambda a, b: a < b),
                f"{versus(student, solver)}",
                _why_the_solver_keeps_ahead(known),
            )
        )
    student, naive, diffusion = (
        known.of(f"reflow-{o}", "curve", last, STUDENTS[o], "2", FRECHET) for o in ("diff2flow", *OTHERS)
    )
    made.append(
        Claim(
            "Reflow by diffusion, on the same pairs and grid, is worse with 2 steps",
            compared(student, diffusion, lambda a, b: a < b),
            f"{versus(diffusion, student)} after {last} steps",
            _WHY_DIFFUSION_LEARNS_IT_AS_WELL,
        )
    )
    made.append(
        Claim(
            "Naive flow matching on the same pairs is worse with 2 steps",
            compared(student, naive, lambda a, b: a < b),
            f"{versus(naive, student)} after {last} steps",
        )
    )
    return made


def _lines(size: Size) -> list[tuple[str, str, tuple[str, ...]]]:
    """Label, cell and where in its results the numbers of steps are."""
    solved = [
        (f"{'the teacher' if o == TEACHER else 'finetuned by diffusion'}, {sampler}", f"solvers-{o}", (sampler,))
        for o, samplers in SOLVERS.items()
        for sampler in (*samplers, DPM)
    ]
    taught = [
        (f"reflow by {LABELS[o]}", f"reflow-{o}", ("curve", str(size.steps // 4), sampler))
        for o, sampler in STUDENTS.items()
    ]
    longer = [
        (f"reflow by {LABELS[TEACHER]}, {mark} steps of training", "reflow-longer", ("curve", str(mark), "Euler"))
        for mark in (size.steps // 2, size.steps)
    ]
    return [*solved, *taught, *longer]


def _draw(known: Known, file: Path, steps: list[str]) -> None:
    figure, axis = numbers.plt.subplots(figsize=(10, 5), layout="constrained")
    lines = [(label, {n: known.of(cell, *path, n, FRECHET) for n in steps}) for label, cell, path in _lines(known.size)]
    numbers.curves(axis, lines, steps, logarithmic=True)
    if axis.get_legend() is not None:  # beside the lines, of which there are too many to leave it room
        axis.legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    axis.set_xlabel("steps of the sampler")
    axis.set_ylabel("Fréchet distance")
    numbers.save(figure, file)
