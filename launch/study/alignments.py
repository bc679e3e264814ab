"""What each alignment does, and the exact convention against the one of the published code."""

from pathlib import Path

from d2f_jax import alignment, prior, report, weights
from d2f_jax.program import Config
from d2f_jax.schedule import NoiseSchedule
from launch.study import adaptation, numbers, training
from launch.study.adaptation import FRECHET
from launch.study.bench import Bench, Size
from launch.study.cells import Cell, Result
from launch.study.exam import Question
from launch.study.numbers import Claim, Known, Section, compared, told, versus

WAYS = {  # of the alignment, as config.objective.align and .convention have it
    "exact": (("timestep", "state", "velocity"), "exact"),
    "reference": (("timestep", "state", "velocity"), "reference"),
    "none": ((), "exact"),
    "velocity": (("velocity",), "exact"),
    "timestep": (("timestep",), "exact"),
    "state": (("state",), "exact"),
    "no velocity": (("timestep", "state"), "exact"),
    "no timestep": (("state", "velocity"), "exact"),
    "no state": (("timestep", "velocity"), "exact"),
}
WITHOUT = tuple(way for way in WAYS if way.startswith("no "))
PRIORS = {
    "exact": ("Euler", "Euler from t = 0", "DDIM", "DDIM on the flow grid"),
    "reference": ("Euler", "Euler from t = 0"),
}


def name(way: str, seed: int) -> str:
    return f"align-{way.replace(' ', '-')}-{seed}"


def cells(size: Size, seed: int) -> list[Cell]:
    trained = [after(size, way, seed) for way in WAYS if way != "exact"]  # exact is resolution adaptation's cell
    return [before(size, seed), native(size, seed), *trained]


def after(size: Size, way: str, seed: int) -> Cell:
    """Full finetuning."""
    return training.cell(name(way, seed), size, run(size, way, seed, size.steps // 4), [Question("Euler", (size.few,))])


def run(size: Size, way: str, seed: int, steps: int) -> Config:
    config = adaptation.run(size, "diff2flow", seed, steps)
    config.objective.align, config.objective.convention = WAYS[way]
    return config


def before(size: Size, seed: int) -> Cell:
    """The prior as a flow, without any training: by both conventions, and from both beginnings of time."""
    asked = {
        convention: [Question(sampler, (size.few, size.many)) for sampler in samplers]
        for convention, samplers in PRIORS.items()
    }

    def compute(bench: Bench, _folder: Path) -> Result:
        told = {}
        for convention, questions in asked.items():
            pipeline = prior.load(run(size, convention, seed, 0)).on_mesh(bench.mesh)
            told[convention] = bench.exam(seed, size.pixels).answers(pipeline, questions, 0)
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


def native(size: Size, seed: int) -> Cell:
    """The prior as a flow at the pixels that it was made for, without any training: by every way."""

    def compute(bench: Bench, _folder: Path) -> Result:
        exam, asked = bench.exam(seed, size.native_pixels), [Question("Euler", (size.few,))]
        return {way: exam.answers(prior.load(run(size, way, seed, 0)).on_mesh(bench.mesh), asked, 0) for way in WAYS}

    settings = {
        "model": size.model,
        "pixels": size.native_pixels,
        "images": size.images,
        "seed": seed,
        "ways": WAYS,
        "step_counts": [size.few],
    }
    return Cell(name=f"align-native-{seed}", settings=settings, compute=compute, minutes=4)


def section(known: Known, pictures: Path) -> Section:
    size = known.size
    marks = [str(mark) for mark in size.marks if mark <= size.steps // 4]
    _draw(known, pictures / "alignments.png", marks)
    few, many = str(size.few), str(size.many)
    before = [
        [
            f"{convention}, {sampler}",
            *(_before(known, convention, sampler, n, FRECHET, "{:.0f}") for n in (few, many)),
            *(_before(known, convention, sampler, n, "caption_accuracy", "{:.0%}") for n in (few, many)),
        ]
        for convention, samplers in PRIORS.items()
        for sampler in samplers
    ]
    header = ["the prior as a flow"] + [f"{what}, {n} steps" for what in ("Fréchet", "accuracy") for n in (few, many)]
    rows = [
        [label, *(told(list(_of(known, way, mark).values()), "{:.0f}") for mark in marks)] for label, way in _lines()
    ]
    places = [
        [
            label,
            known.told("align-native", way, "Euler", few, FRECHET, form="{:.0f}"),
            told(list(_of(known, way, "0").values()), "{:.0f}"),
        ]
        for label, way in _lines()
    ]
    text = f"""
Before any training the flow that alignment makes of the prior, by the exact convention and by that of the
published code. Steps begin at the last diffusion timestep's flow time, or at t = 0 as the published code has them:

{report.markdown_table(header, before)}
The same prior with some of the alignments only, before training, where it was made and where it is to go; "none" is
naive flow matching whose timestep is T (1 - t). Fréchet distance with {few} Euler steps:

{report.markdown_table(["aligned", f"at {size.native_pixels} pixels", f"at {size.pixels} pixels"], places)}
Then the whole UNet is finetuned at {size.pixels} pixels for {size.steps // 4} steps by each. By training step:

{report.markdown_table(["aligned", *(f"step {mark}" for mark in marks)], rows)}
![Fréchet distance by training step and alignment](study/alignments.png)
"""
    return Section("Alignments", text, _claims(known))


def _why_published_begins_better(known: Known) -> str:
    few, size = str(known.size.few), known.size

    def begun(sampler: str) -> str:
        exact, published = (_before(known, of, sampler, few, FRECHET, "{:.0f}") for of in ("exact", "reference"))
        return f"the exact convention has {exact}, the published one {published}"

    schedule = NoiseSchedule.from_config(weights.load_scheduler_config(size.model))
    alpha = float(schedule.alphas_cumprod[-1]) ** 0.5
    return f"""
### Why the published code does not begin worse

It begins elsewhere. From t = 0 {begun("Euler from t = 0")};
from the last timestep's flow time {begun("Euler")}. A step from t = 0 takes all of the first estimate; from the
last timestep's flow time, noise stands where a diffusion state has {alpha:.1%} of the picture already. The prior gains
by the former. The conventions themselves are a timestep apart, and that is little.
"""


def _why_exact_is_no_better(known: Known) -> str:
    size, few = known.size, str(known.size.few)
    marks = [str(mark) for mark in size.marks if mark <= size.steps // 4]
    exact, published = ({mark: _of(known, way, mark) for mark in marks} for way in ("exact", "reference"))
    less = {
        seed: [exact[mark][seed] - published[mark][seed] for mark in marks]
        for seed in sorted(exact[marks[-1]].keys() & published[marks[-1]].keys())
    }
    each = [difference for by_mark in less.values() for difference in by_mark]
    largest = max(map(abs, each), default=0.0)
    home, published_home = (known.of("align-native", way, "Euler", few, FRECHET) for way in ("exact", "reference"))
    right, published_right = (_of(known, way, marks[-1], "caption_accuracy") for way in ("exact", "reference"))
    rows = [[f"seed {seed}", *(f"{value:+.1f}" for value in by_mark)] for seed, by_mark in less.items()]
    return f"""
### Why exact alignment is no better after training

Fréchet distance, exact less published:

{report.markdown_table(["", *(f"step {mark}" for mark in marks)], rows)}
Below zero are {sum(value < 0 for value in each)} of {len(each)}, and none is larger than {largest:.1f}, where exact
alignment has {told(list(exact[marks[-1]].values()))} at the end; caption accuracy there is
{versus(right, published_right, "{:.1%}")}. Nor are they apart before training: at {size.native_pixels} pixels,
where the prior was made, Fréchet distances are {versus(home, published_home)}. Each is sampled as it was trained, and
a timestep of a thousand between them is too little to be seen here. More seeds or pictures, which might tell, were
not tried.
"""


def _why_the_timestep_is_not_missed(known: Known) -> str:
    few, size = str(known.size.few), known.size
    home = {way: known.of("align-native", way, "Euler", few, FRECHET) for way in ("exact", "no timestep")}
    worse = told([home["no timestep"][seed] / value for seed, value in home["exact"].items()], "{:.2f}")
    schedule = NoiseSchedule.from_config(weights.load_scheduler_config(size.model))
    told_half, half = 0.5 * schedule.num_train_timesteps, float(alignment.diffusion_timestep(schedule, 0.5))
    return f"""
### Why one of the alignments is not missed

That the timestep's is not at {size.pixels} pixels is a matter of pixels: T (1 - t) tells the network of more noise
than there is, {told_half:.0f} for {half:.0f} at t = 1/2, and where fewer pixels show a scene, the same noise hides more
of it. At {size.native_pixels} pixels, where the prior was made, its Fréchet distance without it is
{worse} times that of all three.
"""


def _claims(known: Known) -> list[Claim]:
    few, last = str(known.size.few), str(known.size.steps // 4)
    euler, ddim, published = (
        known.of("align-before", *path, few, FRECHET)
        for path in (("exact", "Euler"), ("exact", "DDIM on the flow grid"), ("reference", "Euler from t = 0"))
    )
    exact, reference = _of(known, "exact", last), _of(known, "reference", last)
    least = {
        seed: min(
            (_of(known, way, last)[seed] / value for way in WITHOUT if seed in _of(known, way, last)), default=None
        )
        for seed, value in exact.items()
    }
    least = {seed: value for seed, value in least.items() if value is not None}
    at_home = {way: known.of("align-native", way, "Euler", few, FRECHET) for way in ("exact", *WITHOUT)}
    begins = {seed: min(at_home[way][seed] / value for way in WITHOUT) for seed, value in at_home["exact"].items()}
    return [
        Claim(
            "Exactly aligned, the prior begins at its own quality: Euler's pictures score as DDIM's on the same grid",
            compared(euler, ddim, lambda a, b: abs(a / b - 1) < 0.01),
            f"{versus(euler, ddim)} with {few} steps, before training",
        ),
        Claim(
            "Aligned as published it begins worse, by a tenth or more",
            compared(published, euler, lambda a, b: a > 1.1 * b),
            f"{versus(published, euler)} with {few} steps, before training",
            _why_published_begins_better(known),
        ),
        Claim(
            "After training, exact alignment is better than the published one",
            compared(exact, reference, lambda a, b: a < b),
            f"{versus(exact, reference)} after {last} steps",
            _why_exact_is_no_better(known),
        ),
        Claim(
            "All three alignments are needed: where it was made, the prior begins worse without any one of them",
            [value > 1 for value in begins.values()],
            f"the least ratio to all three is {told(list(begins.values()), '{:.2f}')} at {known.size.native_pixels} "
            "pixels, before training",
        ),
        Claim(
            "All three alignments are needed: after training it is worse without any one of them",
            [value > 1 for value in least.values()],
            f"the least ratio to all three is {told(list(least.values()), '{:.2f}')} after {last} steps",
            _why_the_timestep_is_not_missed(known),
        ),
    ]


def _lines() -> list[tuple[str, str]]:
    """Label and way."""
    names = {"exact": "all three, exact", "reference": "all three, as published", "none": "none"}
    alone = {way: f"{way} alone" for way in WAYS if way not in names and way not in WITHOUT}
    return [(label, way) for way, label in (names | alone | {way: way for way in WITHOUT}).items()]


def _of(known: Known, way: str, mark: str, what: str = FRECHET) -> dict[int, float]:
    cell = adaptation.cell("full", "diff2flow") if way == "exact" else f"align-{way.replace(' ', '-')}"
    return known.of(cell, "curve", mark, "Euler", str(known.size.few), what)


def _before(known: Known, convention: str, sampler: str, steps: str, what: str, form: str) -> str:
    return known.told("align-before", convention, sampler, steps, what, form=form)


def _draw(known: Known, file: Path, marks: list[str]) -> None:
    figure, axes = numbers.plt.subplots(1, 2, figsize=(11, 4.5), sharey=True, layout="constrained")
    for axis, left_out in zip(axes, ("no ", "alone"), strict=True):
        lines = [
            (label, {mark: _of(known, way, mark) for mark in marks}) for label, way in _lines() if left_out not in label
        ]
        numbers.curves(axis, lines, marks, logarithmic=True)
        axis.set_xlabel("training step")
    axes[0].set_ylabel(f"Fréchet distance, {known.size.few} steps")
    numbers.save(figure, file)
