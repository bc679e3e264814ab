"""Depth of pictures: how fast each objective makes it of the text-to-image prior."""

import functools
from pathlib import Path
from typing import Any

import numpy as np

from configs import depth as depth_configs
from d2f_jax import metrics, report, sampling, weights
from d2f_jax.data.sources import Example
from d2f_jax.metrics import Means
from d2f_jax.pipeline import Pipeline
from d2f_jax.program import Config
from d2f_jax.subjects import shown
from launch.study import cells as records
from launch.study import numbers, training
from launch.study.adaptation import LABELS, NAMES, SAMPLERS, TRAINED, contenders
from launch.study.bench import DEPTHS, Bench, Size
from launch.study.cells import Cell, Result
from launch.study.exam import SAMPLERS as BY_NAME
from launch.study.exam import SHOWN, keep, sampled
from launch.study.numbers import Claim, Known, Section, compared, told, versus

ENSEMBLE = 4
MEASURES = {"abs_rel": ("AbsRel", "{:.3f}"), "delta1": ("δ1", "{:.1%}")}


def cells(size: Size, seed: int) -> list[Cell]:
    return [run(size, trained, objective, seed) for trained in TRAINED for objective in SAMPLERS]


def cell_name(trained: str, objective: str) -> str:
    return f"depth-{trained.lower()}-{objective}"


def run(size: Size, trained: str, objective: str, seed: int) -> Cell:
    """`{"curve": {step: {sampler: {steps: {members of the ensemble: measures}}}}, "flat": measures}`."""
    config: Config = depth_configs.get_config(objective + TRAINED[trained])
    config.model, config.seed, config.data.image_size = size.model, seed, size.native_pixels
    config.data.sources, config.data.num_train = (DEPTHS,), size.scenes
    config.train.num_steps, config.train.batch_size = size.steps // 2, size.batch_size
    asked, last = SAMPLERS[objective], size.steps // 2

    def compute(bench: Bench, folder: Path) -> Result:
        examples = bench.held_out(seed, size.native_pixels)[: size.images]

        def judge(pipeline: Pipeline, mark: int) -> dict[str, Any]:
            answers: dict[str, Any] = {}
            for sampler in asked:
                for n in (1, size.few):
                    once = estimates(pipeline, examples, sampler, n, 1, seed)
                    answers.setdefault(sampler, {})[str(n)] = {"1": measured(once, examples)}
                    if sampler == asked[0] and n == size.few and seed == size.seeds[0]:
                        keep(folder / records.STRIPS / f"{mark:06}.png", shown(once[:SHOWN]))
                if mark == last:
                    merged = estimates(pipeline, examples, sampler, size.few, ENSEMBLE, seed)
                    answers[sampler][str(size.few)][str(ENSEMBLE)] = measured(merged, examples)
            return answers

        flat = np.zeros((len(examples), size.native_pixels, size.native_pixels))
        return {"curve": training.curve(bench, config, folder, judge), "flat": measured(flat, examples)}

    settings = {
        "config": training.deciding(config),
        "marks": training.reached(size, config),
        "images": size.images,
        "samplers": asked,
        "step_counts": (1, size.few),
        "ensemble": ENSEMBLE,
    }
    return Cell(name=f"{cell_name(trained, objective)}-{seed}", settings=settings, compute=compute, minutes=2.5)


def estimates(
    pipeline: Pipeline, examples: list[Example], sampler: str, num_steps: int, ensemble: int, seed: int
) -> np.ndarray:
    """Depth [N, H, W] of the examples' pictures."""
    images = np.stack([example["image"] for example in examples if "image" in example])
    return sampled(
        lambda rows: pipeline.depth(
            images[rows.start : rows.stop],
            num_steps=num_steps,
            ensemble=ensemble,
            seed=seed,
            first=rows.start,
            sampler=BY_NAME[sampler],
        ),
        len(images),
        f"{sampler}, {num_steps} steps, {ensemble} merged",
    )


def measured(depth_NxHxW: np.ndarray, examples: list[Example]) -> dict[str, float]:
    """Means over pictures of what is told of depth up to scale and shift of its logarithm; the sky has none."""
    truths = [example["depth"] for example in examples if "depth" in example]
    errors = [
        metrics.depth_errors(metrics.DEPTH_PROTOCOLS["all"], estimate, truth, space="log")
        for estimate, truth in zip(depth_NxHxW, truths, strict=True)
    ]
    means = functools.reduce(lambda found, e: found.add(e._asdict()), errors, Means()).means()
    return {name: means[name] for name in MEASURES}


def section(known: Known, pictures: Path) -> Section:
    size, few = known.size, str(known.size.few)
    marks = [str(mark) for mark in size.marks if mark <= size.steps // 2]
    last = marks[-1]
    _draw(known, pictures / "depth.png", marks)
    strips = {
        f"{NAMES[trained]},\n{LABELS[o]}": known.strips(cell_name(trained, o), size.native_pixels)
        for trained in TRAINED
        for o in SAMPLERS
    }
    drawn = numbers.picture_grid(strips, [f"step {mark}" for mark in marks], pictures / "depth_pictures.png")
    ways = {"1 step": ("1", "1"), f"{few} steps": (few, "1"), f"{few} steps, {ENSEMBLE} merged": (few, str(ENSEMBLE))}
    final = [
        [
            label,
            *(
                told(list(_of(known, trained, o, sampler, last, *way, measure).values()), form)
                for measure, (_, form) in MEASURES.items()
                for way in ways.values()
            ),
        ]
        for label, trained, o, sampler in contenders()
    ]
    header = ["", *(f"{name}, {way}" for name, _ in MEASURES.values() for way in ways)]
    plane = (
        known.told(cell_name("full", "diff2flow"), "flat", what, form=form) for what, (_, form) in MEASURES.items()
    )
    text = f"""
tiny-sd learns to tell depth at {size.native_pixels} pixels, for {last} steps of {size.batch_size} pictures: the
picture's latent stands before depth's in its widened first layer. {size.images} held-out pictures, after
alignment in scale and shift of the logarithm; the sky has no depth. That a picture is equally deep everywhere has
AbsRel and δ1 of {" and ".join(plane)}.

![AbsRel and δ1 by training step](study/depth.png)

AbsRel with {few} steps, by training step:

{_table(known, marks, few, "abs_rel")}
δ1, likewise:

{_table(known, marks, few, "delta1")}
After {last} steps:

{report.markdown_table(header, final)}"""
    if drawn:
        text += f"""
Depth of the same pictures by training step, {few} steps, near is white:

![Depth by training step](study/depth_pictures.png)
"""
    return Section("Depth of pictures", text, [c for trained in TRAINED for c in _claims(known, trained, marks)])


def _why_one_step_of_diffusion_is_as_good(known: Known, last: str) -> str:
    schedule = weights.load_scheduler_config(known.size.model)
    spacing, offset = schedule["timestep_spacing"], schedule["steps_offset"]
    count = schedule["num_train_timesteps"]
    (own,) = sampling.ddim_timesteps(count, 1, spacing, offset)
    flow, own_error, grid_error = (
        told(list(_of(known, "full", objective, sampler, last, "1").values()), "{:.3f}")
        for objective, sampler in (
            ("diff2flow", "Euler"),
            ("diffusion", "DDIM"),
            ("diffusion", "DDIM on the flow grid"),
        )
    )
    return f"""
### Why one step of diffusion is as good

By the checkpoint's own timesteps, which are "{spacing}", its one step is told to be at timestep {own:.0f} of {count}:
all noise is passed off as hardly any, and depth comes out no better than flat. Begun where the noise is, as on the
flow's grid, the same weights have AbsRel {grid_error} for {own_error}, and Diff2Flow {flow}. That was found
of published models of depth, too ([arXiv 2409.11355](https://arxiv.org/abs/2409.11355)): much of what flow matching
gains here with one step is gained by beginning right.
"""


def _why_diffusion_is_ahead(known: Known, marks: list[str]) -> str:
    few = str(known.size.few)

    def ratio(trained: str, mark: str) -> str:
        flow = _of(known, trained, "diff2flow", "Euler", mark, few)
        grid = _of(known, trained, "diffusion", "DDIM on the flow grid", mark, few)
        return told([flow[seed] / grid[seed] for seed in sorted(flow.keys() & grid.keys())], "{:.2f}")

    rows = [[NAMES[trained], *(ratio(trained, mark) for mark in marks)] for trained in TRAINED]
    return f"""
### Why diffusion is ahead with {few} steps

It is not the sampler's doing. Diff2Flow's AbsRel over that of diffusion on the same grid:

{report.markdown_table(["", *(f"step {mark}" for mark in marks)], rows)}
So it is learnt. The whole UNet makes up for it, adapters do not. Trained the two are on other timesteps, whose errors
weigh otherwise, as told of resolution adaptation: Diff2Flow gives more weight to the least noise. Whether that is the
reason, and whether adapters of another rank or rate would do better, was not tried.
"""


def _claims(known: Known, trained: str, marks: list[str]) -> list[Claim]:
    few, (early, *_, last) = str(known.size.few), marks[-3:]
    what = f"Depth, {NAMES[trained].lower()}"

    def of(objective: str, mark: str, steps: str, merged: str = "1") -> dict[int, float]:
        """By the better sampler of the two that diffusion has."""
        found = [_of(known, trained, objective, sampler, mark, steps, merged) for sampler in SAMPLERS[objective]]
        return {seed: min(values[seed] for values in found) for seed in found[0]}

    def claim(text: str, a: dict[int, float], b: dict[int, float], why: str = "") -> Claim:
        return Claim(f"{what}: {text}", compared(a, b, lambda x, y: x <= y), f"AbsRel {versus(a, b, '{:.3f}')}", why)

    flow, own = of("diff2flow", last, few), _of(known, trained, "diffusion", "DDIM", last, "1")
    return [
        claim(
            f"Diff2Flow is ahead of naive flow matching after {early} steps",
            of("diff2flow", early, few),
            of("flow_matching", early, few),
        ),
        claim(f"and still after {last}", flow, of("flow_matching", last, few)),
        claim(
            "with one step it is better than diffusion by the checkpoint's own timesteps",
            of("diff2flow", last, "1"),
            own,
        ),
        claim(
            "with one step it is better than diffusion by the better of its samplers",
            of("diff2flow", last, "1"),
            of("diffusion", last, "1"),
            _why_one_step_of_diffusion_is_as_good(known, last),
        ),
        claim(
            f"with {few} steps it is as good as diffusion by the better of its samplers, or better",
            flow,
            of("diffusion", last, few),
            _why_diffusion_is_ahead(known, marks),
        ),
        claim(f"{ENSEMBLE} estimates merged are better than one", of("diff2flow", last, few, str(ENSEMBLE)), flow),
    ]


def _of(
    known: Known,
    trained: str,
    objective: str,
    sampler: str,
    mark: str,
    steps: str,
    merged: str = "1",
    what: str = "abs_rel",
) -> dict[int, float]:
    return known.of(cell_name(trained, objective), "curve", mark, sampler, steps, merged, what)


def _table(known: Known, marks: list[str], steps: str, what: str) -> str:
    _, form = MEASURES[what]
    rows = [
        [label, *(told(list(_of(known, trained, o, sampler, m, steps, what=what).values()), form) for m in marks)]
        for label, trained, o, sampler in contenders()
    ]
    return report.markdown_table(["", *(f"step {mark}" for mark in marks)], rows)


def _draw(known: Known, file: Path, marks: list[str]) -> None:
    figure, axes = numbers.plt.subplots(2, 2, figsize=(11, 7.5), sharex=True, sharey="row", layout="constrained")
    for column, trained in enumerate(TRAINED):
        for axis, (what, (name, _)) in zip(axes[:, column], MEASURES.items(), strict=True):
            lines = [
                (
                    label.removeprefix(f"{NAMES[trained]}, "),
                    {mark: _of(known, of, o, sampler, mark, str(known.size.few), what=what) for mark in marks},
                )
                for label, of, o, sampler in contenders()
                if of == trained
            ]
            numbers.curves(axis, lines, marks, logarithmic=what == "abs_rel")
            axis.set_ylabel(name)
        axes[0, column].set_title(f"{NAMES[trained]}, {known.size.few} steps")
        axes[1, column].set_xlabel("training step")
    numbers.save(figure, file)
