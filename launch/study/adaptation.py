"""Resolution adaptation: how fast each objective brings the prior, made at 64 pixels, to 48."""

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from configs import text_to_image
from d2f_jax import alignment, report, weights
from d2f_jax.program import Config
from d2f_jax.schedule import NoiseSchedule
from launch.study import numbers, training
from launch.study.bench import LATENTS, Size
from launch.study.cells import Cell
from launch.study.exam import GUIDANCE, Question
from launch.study.numbers import Claim, Known, Section, compared, told, versus

TRAINED = {"full": "", "LoRA": ":lora_base"}
NAMES = {"full": "Whole UNet", "LoRA": "Adapters"}
SAMPLERS = {
    "diff2flow": ("Euler",),
    "flow_matching": ("Euler",),
    "diffusion": ("DDIM on the flow grid", "DDIM"),
}


LABELS = {"diff2flow": "Diff2Flow", "flow_matching": "naive flow matching", "diffusion": "diffusion"}
FRECHET = "frechet_distance"


def cell(trained: str, objective: str) -> str:
    return f"adapt-{trained.lower()}-{objective}"


def name(trained: str, objective: str, seed: int) -> str:
    return f"{cell(trained, objective)}-{seed}"


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


def section(known: Known, pictures: Path) -> Section:
    size, few, many = known.size, str(known.size.few), str(known.size.many)
    marks = [str(mark) for mark in size.marks]
    eighth, last = str(size.steps // 8), str(size.steps)
    _draw(known, pictures / "adaptation.png", marks)
    rows = {LABELS[objective]: known.strips(f"adapt-full-{objective}", size.pixels) for objective in SAMPLERS}
    shown = numbers.picture_grid(rows, [f"step {mark}" for mark in marks], pictures / "adaptation_pictures.png")
    text = f"""
tiny-sd was made at 64 pixels and is finetuned at {size.pixels}, for {size.steps} steps of {size.batch_size}
pictures: the whole UNet (rate 3e-4) or the paper's larger set of adapters (rate 1e-3), the same for every
objective. Naive flow matching gets t itself as its timestep, as the paper's baseline. {size.images} pictures of
held-out captions, guidance {GUIDANCE:g}.

![Fréchet distance and caption accuracy by training step](study/adaptation.png)

Fréchet distance with {few} steps of the sampler, by training step:

{_table(known, marks, few, "frechet_distance", "{:.0f}")}
Caption accuracy in percent, likewise:

{_table(known, marks, few, "caption_accuracy", "{:.0%}")}
Fréchet distance with {many} steps:

{_table(known, ["0", eighth, last], many, "frechet_distance", "{:.0f}")}"""
    if shown:
        text += f"""
The same captions and noise by training step, the whole UNet, {few} steps:

![Pictures by training step](study/adaptation_pictures.png)
"""
    return Section("Resolution adaptation", text, [c for trained in TRAINED for c in _claims(known, trained)])


def _why_adapters_take_longer(known: Known) -> str:
    size = known.size
    marks = [mark for mark in size.marks if 0 < mark < size.steps]
    eighth = size.steps // 8
    rows = [
        [
            f"{NAMES[trained]}, {LABELS[objective]}",
            *(told(_shares(known, trained, objective, mark), "{:.0%}") for mark in marks),
        ]
        for trained in TRAINED
        for objective in ("diff2flow", "diffusion")
    ]
    flow = {mark: _of(known, "LoRA", "diff2flow", mark, size.few) for mark in size.marks}
    to_best = _shares(known, "LoRA", "diff2flow", eighth, ends=size.marks)
    reached = sum(value >= 0.95 for value in to_best)
    twentieth = told([(first - flow[size.steps][seed]) / 20 for seed, first in flow[0].items()], "{:.0f}")
    moved = told([abs(flow[size.steps // 4][seed] - flow[size.steps // 2][seed]) for seed in flow[0]], "{:.0f}")
    finer = " and ".join(told(_shares(known, of, "diff2flow", eighth, size.many), "{:.0%}") for of in TRAINED)
    return f"""
### Why adapters take longer

Part of the improvement of all {size.steps} steps, diffusion on the flow's grid:

{report.markdown_table(["", *(f"step {mark}" for mark in marks)], rows)}
With adapters diffusion takes as long, so it is they that begin more slowly, and not Diff2Flow. How much of the last
twentieth is there is hardly decided here: it is {twentieth} of Fréchet distance, and from step {size.steps // 4} to
{size.steps // 2} a seed's changes by {moved}, for better or worse. Up to the best mark of a seed, which is not always
the last, it is {told(to_best, "{:.0%}")} after {eighth} steps, and {reached} of {len(to_best)} seeds have 95%. With
{size.many} steps of the sampler the whole UNet has {finer} with adapters. Other rates and ranks were not tried.
"""


def _shares(
    known: Known, trained: str, objective: str, mark: int, steps: int | None = None, ends: Sequence[int] = ()
) -> list[float]:
    """By seed, the part that is made after `mark` steps of the improvement up to the last, or to the best of `ends`.

    0 where there is no improvement.
    """
    first, now, *later = (
        _of(known, trained, objective, m, steps or known.size.few) for m in (0, mark, *(ends or [known.size.steps]))
    )
    gained = {seed: before - min(after[seed] for after in later) for seed, before in first.items()}
    return [(first[seed] - now[seed]) / whole if whole > 0 else 0.0 for seed, whole in gained.items()]


def _why_diffusion_keeps_up(known: Known) -> str:
    drawn = _drawn_timesteps(known.size.model)
    spans = [f"{low} to {high - 1}" for low, high in itertools.pairwise(drawn.edges)]
    rows = [
        [label, *(f"{value:.2f}" for value in times)]
        for label, times in (("times", drawn.times), ("of these, without a state", drawn.stateless))
    ]
    counts = ("1", "2", str(known.size.few))
    grids = ", ".join(
        f"{known.told('solvers-diffusion', own, n, FRECHET, form='{:.0f}')} against "
        f"{known.told('solvers-diffusion', flow, n, FRECHET, form='{:.0f}')}"
        for flow, own in [SAMPLERS["diffusion"]]
        for n in counts
    )
    return f"""
### Why diffusion keeps up

Both train the same network from the same weights. Of a network that predicts v, Diff2Flow's loss is diffusion's times
(alpha + sigma)², between 1 and 2, at timesteps that uniform flow times draw. All in all they weigh, against uniform
timesteps,

{report.markdown_table(["timesteps", *spans], rows)}
They differ in the times themselves, too. Of uniform flow times {drawn.before:.1%} come before the last timestep's,
{drawn.first:.4f}, and {drawn.after:.1%} after the first one's, {drawn.last:.4f}. No diffusion state is there: the
network is told the last or the first timestep, and sees more noise than that has, or less. In between it is told
fractions of timesteps, by diffusion whole ones. What each of these is worth was not measured apart.

In sampling they differ by more: Fréchet distance of the UNet that diffusion has finetuned, by the checkpoint's own
timesteps against those of the flow's grid, with {", ".join(counts)} steps: {grids}.
On the flow's grid DDIM takes the steps of Euler. So what is gained over a finetuned diffusion model here is gained by
the grid, and could be had without finetuning it otherwise; over naive flow matching it is gained in training.
"""


class _Drawn(NamedTuple):
    """What uniform flow times draw of the timesteps, in spans between `edges`.

    `times` is how much Diff2Flow's loss weighs errors of v there, over diffusion's, and `stateless` the part of it at
    flow times without a diffusion state. Such are the shares `before` the flow time `first` and `after` `last`.
    """

    edges: list[int]
    times: np.ndarray
    stateless: np.ndarray
    before: float
    after: float
    first: float
    last: float


def _drawn_timesteps(model: str) -> _Drawn:
    schedule = NoiseSchedule.from_config(weights.load_scheduler_config(model))
    count = schedule.num_train_timesteps
    first, last = (float(alignment.flow_time(schedule, timestep)) for timestep in (count - 1, 0))
    edges = np.linspace(0, count, 6).astype(int)
    t = (np.arange(100_000) + 0.5) / 100_000
    timesteps = np.asarray(alignment.diffusion_timestep(schedule, t))
    held = np.maximum(t, first)  # as the velocity's coefficients are
    weight = 1 / (held**2 + (1 - held) ** 2)

    def times(where: np.ndarray) -> np.ndarray:
        return np.histogram(timesteps, edges, weights=weight * where)[0] / len(t) * (len(edges) - 1)

    outside = (t < first) | (t > last)
    before, after = float((t < first).mean()), float((t > last).mean())
    return _Drawn(edges.tolist(), times(np.ones_like(t)), times(outside), before, after, first, last)


def _claims(known: Known, trained: str) -> list[Claim]:
    size, few = known.size, known.size.few
    flow, naive = ({m: _of(known, trained, o, m, few) for m in size.marks} for o in ("diff2flow", "flow_matching"))
    own = {mark: _of(known, trained, "diffusion", mark, few, "DDIM") for mark in size.marks}
    diffusion = {
        mark: {seed: min(value, own[mark][seed]) for seed, value in _of(known, trained, "diffusion", mark, few).items()}
        for mark in size.marks
    }
    eighth, last = size.steps // 8, size.steps
    share = _shares(known, trained, "diff2flow", eighth)
    later = [mark for mark in size.marks if mark >= eighth]
    worse = {
        seed: min(diffusion[mark][seed] / flow[mark][seed] for mark in later)
        for seed in flow[last].keys() & diffusion[last].keys()
    }
    reaches = {
        seed: next((m for m in size.marks if naive[m][seed] <= flow[eighth][seed]), None)
        for seed in flow[last].keys() & naive[last].keys()
    }
    when = ", ".join(str(reached or f"not in {last}") for reached in reaches.values())
    return [
        Claim(
            f"{NAMES[trained]}: Diff2Flow makes 95% of its improvement in an eighth of the steps",
            [value >= 0.95 for value in share],
            f"{told(share, '{:.0%}')} after {eighth} steps",
            _why_adapters_take_longer(known),
        ),
        Claim(
            f"{NAMES[trained]}: naive flow matching is still behind at the end",
            compared(naive[last], flow[last], lambda a, b: a > b),
            f"{versus(naive[last], flow[last])} after {last} steps; "
            f"it comes to what Diff2Flow has after {eighth} at step: {when or '-'}",
        ),
        Claim(
            f"{NAMES[trained]}: diffusion, by the checkpoint's own timesteps, is worse at the end",
            compared(own[last], flow[last], lambda a, b: a > b),
            f"{versus(own[last], flow[last])} after {last} steps",
            _why_diffusion_keeps_up(known),
        ),
        Claim(
            f"{NAMES[trained]}: diffusion, by the better of its samplers, is worse from an eighth of the steps on",
            [value > 1 for value in worse.values()],
            f"{versus(diffusion[last], flow[last])} after {last} steps; "
            f"the least ratio on the way is {told(list(worse.values()), '{:.2f}')}",
            _why_diffusion_keeps_up(known),
        ),
    ]


def _of(
    known: Known,
    trained: str,
    objective: str,
    mark: int | str,
    steps: int | str,
    sampler: str = "",
    what: str = FRECHET,
) -> dict[int, float]:
    sampler = sampler or SAMPLERS[objective][0]
    return known.of(cell(trained, objective), "curve", str(mark), sampler, str(steps), what)


def contenders() -> list[tuple[str, str, str, str]]:
    """Label, what is trained, objective and sampler."""
    return [
        (
            f"{NAMES[trained]}, {LABELS[objective]}" + (f", {sampler}" if len(samplers) > 1 else ""),
            trained,
            objective,
            sampler,
        )
        for trained in TRAINED
        for objective, samplers in SAMPLERS.items()
        for sampler in samplers
    ]


def _table(known: Known, marks: list[str], steps: str, what: str, form: str) -> str:
    rows = [
        [label, *(told(list(_of(known, trained, o, mark, steps, sampler, what).values()), form) for mark in marks)]
        for label, trained, o, sampler in contenders()
    ]
    return report.markdown_table(["", *(f"step {mark}" for mark in marks)], rows)


def _draw(known: Known, file: Path, marks: list[str]) -> None:
    figure, axes = numbers.plt.subplots(2, 2, figsize=(11, 7.5), sharex=True, layout="constrained")
    for column, trained in enumerate(TRAINED):
        for axis, what in zip(axes[:, column], (FRECHET, "caption_accuracy"), strict=True):
            lines = [
                (
                    label.removeprefix(f"{NAMES[trained]}, "),
                    {mark: _of(known, of, o, mark, known.size.few, sampler, what) for mark in marks},
                )
                for label, of, o, sampler in contenders()
                if of == trained
            ]
            numbers.curves(axis, lines, marks, logarithmic=what == FRECHET)
            axis.set_ylabel("Fréchet distance" if what == FRECHET else "caption accuracy")
        axes[0, column].set_title(f"{NAMES[trained]}, {known.size.few} steps")
        axes[1, column].set_xlabel("training step")
    numbers.save(figure, file)
