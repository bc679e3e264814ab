"""Pictures of one colour, which a diffusion model whose last timestep still shows the data is said not to reach."""

from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from d2f_jax import alignment, metrics, prior, report, weights
from d2f_jax.data import uniform
from d2f_jax.pipeline import Pipeline
from d2f_jax.schedule import NoiseSchedule
from launch.study import adaptation, numbers, training
from launch.study import cells as cells_of
from launch.study.adaptation import LABELS
from launch.study.bench import COLOUR_NAMES, COLOURS, LATENTS, Bench, Size
from launch.study.cells import Cell, Result
from launch.study.exam import GUIDANCE, SAMPLERS, keep
from launch.study.numbers import Claim, Known, Section, compared, told, versus

SHARE = 0.2  # of pictures of one colour in a batch; the others are ShapesWorld's
NOISES = 16  # pictures of each colour
GUIDANCES = (1.0, GUIDANCE)
# After an objective: with a schedule that ends in pure noise, and with times that are three times as dense near noise.
TO_NOISE, SHIFTED = "-to-noise", "-shifted"
ASKED = {
    "diff2flow": ("Euler", "Euler from t = 0"),
    "flow_matching": ("Euler",),
    "diffusion": ("DDIM", "DDIM on the flow grid"),
    "diff2flow" + TO_NOISE: ("Euler",),
    "diffusion" + TO_NOISE: ("DDIM on the flow grid",),
    "diff2flow" + TO_NOISE + SHIFTED: ("Euler",),
}


def cells(size: Size, seed: int) -> list[Cell]:
    return [finetuned(size, learner, seed) for learner in ASKED]


def name(learner: str, seed: int) -> str:
    return f"colours-{learner}-{seed}"


def label(learner: str) -> str:
    how = " to pure noise" * (TO_NOISE in learner) + ", shifted" * (SHIFTED in learner)
    return LABELS[_objective(learner)] + how


def _objective(learner: str) -> str:
    return learner.partition("-")[0]


def finetuned(size: Size, learner: str, seed: int) -> Cell:
    """The prior, which was never told of such pictures, and what training on them makes of it."""
    last = size.steps // 4
    config = adaptation.run(size, _objective(learner), seed, last)
    config.zero_terminal_snr, config.objective.shift = TO_NOISE in learner, 3.0 if SHIFTED in learner else 1.0
    config.data.sources, config.data.weights = (LATENTS, COLOURS), (1 - SHARE, SHARE)
    marks = 0, last // 4, last

    def compute(bench: Bench, folder: Path) -> Result:
        def judge(pipeline: Pipeline, mark: int) -> dict[str, Any]:
            if mark not in marks:
                return {}
            strip = folder / cells_of.STRIPS / f"{mark:06}.png" if seed == size.seeds[0] else None
            return ask(pipeline, size, learner, seed, strip)

        curve = training.curve(bench, config, folder, judge)
        return {"curve": curve, "vae": vae_alone(prior.load(bench.placed(config)), size)}

    settings = {
        "config": training.deciding(config),
        "marks": marks,
        "colours": {colour: uniform.COLOURS[colour] for colour in COLOUR_NAMES},
        "noises": NOISES,
        "samplers": ASKED[learner],
        "step_counts": (size.few, size.many),
        "guidances": GUIDANCES,
    }
    return Cell(name=name(learner, seed), settings=settings, compute=compute, minutes=4.0)


def ask(pipeline: Pipeline, size: Size, learner: str, seed: int, strip: Path | None) -> dict[str, Any]:
    """`{sampler: {steps: {guidance: {colour: numbers}}}}`; `strip` receives a picture of each colour, by many steps."""
    prompts = [uniform.caption(colour) for colour in COLOUR_NAMES for _ in range(NOISES)]
    seen = decoded(pipeline, size)
    told: dict[str, Any] = {}
    for sampler in ASKED[learner]:
        for num_steps in (size.few, size.many):
            for guidance in GUIDANCES:
                images = pipeline(
                    prompts,
                    num_steps=num_steps,
                    guidance_scale=guidance,
                    seed=seed,
                    height=size.pixels,
                    width=size.pixels,
                    sampler=SAMPLERS[sampler],
                )
                by_colour = images.reshape(len(COLOUR_NAMES), NOISES, *images.shape[1:])
                numbers = {
                    colour: measured(drawn, colour, seen[colour])
                    for colour, drawn in zip(COLOUR_NAMES, by_colour, strict=True)
                }
                told.setdefault(sampler, {}).setdefault(str(num_steps), {})[f"{guidance:g}"] = numbers
                if strip is not None and (sampler, num_steps, guidance) == (ASKED[learner][0], size.many, GUIDANCE):
                    keep(strip, by_colour[:, 0])
    return told


def measured(images_NxHxWx3: np.ndarray, colour: str, seen_HxWx3: np.ndarray) -> dict[str, float]:
    """In levels of 255: mean absolute errors against the colour, and against what the VAE makes of it.

    `mean` is the brightness, and `spread` how much that of single pictures differs, which is what noise decides.
    """
    x = images_NxHxWx3.astype(np.float64)
    brightness_N = x.mean((1, 2, 3))
    numbers = {
        "error": metrics.absolute_error(x, np.broadcast_to(uniform.COLOURS[colour], x.shape)).mean(),
        "error_to_vae": np.abs(x - seen_HxWx3).mean(),
        "mean": brightness_N.mean(),
        "spread": brightness_N.std(),
    }
    return {name: round(float(value), 2) for name, value in numbers.items()}


def vae_alone(pipeline: Pipeline, size: Size) -> dict[str, Any]:
    """The least error that any latent diffusion model with this VAE can be taught."""
    return {colour: measured(image[None], colour, image) for colour, image in decoded(pipeline, size).items()}


def decoded(pipeline: Pipeline, size: Size) -> dict[str, np.ndarray]:
    """What the VAE makes of each colour, float levels [H, W, 3]."""
    levels = np.array([uniform.COLOURS[colour] for colour in COLOUR_NAMES], np.float32)
    plain = np.broadcast_to(levels[:, None, None], (len(levels), size.pixels, size.pixels, 3))
    images = pipeline.vae.decode(pipeline.vae.encode(jnp.asarray(plain / 127.5 - 1)).mean)
    seen = np.clip(np.asarray(images, np.float64) / 2 + 0.5, 0, 1) * 255
    return dict(zip(COLOUR_NAMES, seen, strict=True))


def section(known: Known, pictures: Path) -> Section:
    size, last, many = known.size, str(known.size.steps // 4), str(known.size.many)
    guidance = f"{GUIDANCE:g}"
    strips = {o: known.strips(f"colours-{o}", size.pixels) for o in ASKED}
    rows = {"prior": strips["diffusion"][:1]} | {label(o): strip[-1:] for o, strip in strips.items()}
    shown = numbers.picture_grid(rows, [", ".join(COLOUR_NAMES)], pictures / "colours.png")

    def table(what: str) -> str:
        columns = (*COLOUR_NAMES, "all")
        body = [
            [label, *(told(list(_of(known, *path, many, guidance, colour, what).values())) for colour in columns)]
            for label, path in _rows(last)
        ]
        body.append(["VAE alone", *(told(list(_vae(known, what, colour).values())) for colour in columns)])
        return report.markdown_table(["", *columns], body)

    text = f"""
The captions are "a black image" and the like, which tiny-sd has never seen; {SHARE:.0%} of each batch are such
pictures, the others ShapesWorld, for {last} steps. tiny-sd predicts v on Stable Diffusion's schedule, whose last
timestep still holds 6.8% of the data: {NOISES} pictures of each colour begin with pure noise, whose mean says
grey. "To pure noise" is the same training on that schedule rescaled to zero terminal SNR
(`config.zero_terminal_snr`), and "shifted" with `config.objective.shift=3`. Levels are of 255, with {many} steps and
guidance {guidance}. The VAE is frozen and never saw such pictures either: encoded and decoded again, black is dark
grey, so that the first table holds its error too.

Mean absolute error against the colour:

{table("error")}
Against what the VAE makes of the colour, which is the denoiser's own error:

{table("error_to_vae")}
How much the brightness of pictures of one colour differs by their noise (standard deviation):

{table("spread")}"""
    if shown:
        text += """
One picture of each colour:

![Pictures of one colour](study/colours.png)
"""
    return Section("Pictures of one colour", text, _claims(known, last, many))


_JUDGED = {"diff2flow": "Euler", "diffusion": "DDIM on the flow grid"}


def _claims(known: Known, last: str, many: str) -> list[Claim]:
    asked = [("diff2flow", "diffusion", "Diff2Flow comes closer to black and white than diffusion does")]
    for learner in _JUDGED:
        text = f"Of {label(learner)}, a schedule that ends in pure noise comes closer than its own, begun at its end"
        asked.append((learner + TO_NOISE, learner, text))
    text = "On a schedule that ends in pure noise Diff2Flow comes as close to them as diffusion does, or closer"
    asked.append(("diff2flow" + TO_NOISE, "diffusion" + TO_NOISE, text))
    shifted = "diff2flow" + TO_NOISE + SHIFTED
    text = "Diff2Flow to pure noise comes closer to them with times shifted towards noise than without"
    asked.append((shifted, "diff2flow" + TO_NOISE, text))
    of_schedule = _why(known, last, many)
    made = []
    for guidance in (f"{g:g}" for g in GUIDANCES):
        of_prior = told(list(_extremes(known, "diffusion", "0", many, guidance).values()))
        for better, than, text in asked:
            a, b = (_extremes(known, learner, last, many, guidance) for learner in (better, than))
            by_how_much = f"{versus(a, b)} levels from what the VAE makes of them, the prior {of_prior}"
            why = of_schedule if TO_NOISE in better else _why_not_in_every_seed(known, last, guidance)
            made.append(Claim(f"{text}, guidance {guidance}", compared(a, b, lambda a, b: a <= b), by_how_much, why))
    return made


def _why_not_in_every_seed(known: Known, last: str, guidance: str) -> str:
    """Why Diff2Flow does not come closer than diffusion whatever the seed."""
    few, many = str(known.size.few), str(known.size.many)

    def less(steps: str, sampler: str = "Euler") -> str:
        flow = _extremes(known, "diff2flow", last, steps, guidance, sampler)
        diffusion = _extremes(known, "diffusion", last, steps, guidance)
        return ", ".join(f"{flow[seed] - diffusion[seed]:+.1f}" for seed in sorted(flow.keys() & diffusion.keys()))

    gained = {
        learner: told(
            [before - _extremes(known, learner, last, many, guidance)[seed] for seed, before in at_first.items()]
        )
        for learner in _JUDGED
        for at_first in [_extremes(known, learner, "0", many, guidance, _JUDGED[learner])]
    }
    spread = told(
        [
            value
            for colour in ("black", "white")
            for value in _of(known, "diff2flow", last, "Euler", many, guidance, colour, "spread").values()
        ]
    )
    return f"""
### Why Diff2Flow is not closer in every seed, guidance {guidance}

By seed its levels less those of diffusion are {less(many)} with {many} steps, {less(few)} with {few}, and
{less(many, "Euler from t = 0")} with {many} that begin at t = 0. All in all training brings Diff2Flow
{gained["diff2flow"]} levels closer than the prior was and diffusion {gained["diffusion"]}, in {NOISES} pictures of a
colour whose brightness differs by {spread}. Both begin with pure noise where their schedule has some of the picture,
and that holds both back.
"""


def _why(known: Known, last: str, many: str) -> str:
    """Why a schedule that ends in pure noise does less for Diff2Flow than for diffusion."""
    guidance = f"{GUIDANCE:g}"
    plain, shifted = "diff2flow" + TO_NOISE, "diff2flow" + TO_NOISE + SHIFTED
    errors = [
        told(list(_extremes(known, learner, last, many, guidance).values()))
        for learner in ("diff2flow", plain, shifted, "diffusion" + TO_NOISE)
    ]
    from_zero = told(list(_extremes(known, "diff2flow", last, many, guidance, "Euler from t = 0").values()))
    to_noise = weights.load_scheduler_config(known.size.model) | {"rescale_betas_zero_snr": True}
    schedule = NoiseSchedule.from_config(to_noise)
    first = 0.9 * schedule.num_train_timesteps
    share = float(alignment.flow_time(schedule, first))
    dense = 3 * share / (1 + 2 * share)  # of uniform times, those that a shift of 3 brings below it
    return f"""
### Why it is not the schedule alone

What a picture of one colour becomes is decided where hardly anything but noise is seen. Of the schedule that ends in
pure noise uniform flow times draw one of the last tenth of timesteps {share:.1%} of the time, diffusion 10%. With
times shifted towards noise it is {dense:.1%}, and Diff2Flow comes to {errors[2]} levels for {errors[1]}, where
diffusion to pure noise has {errors[3]}, and Diff2Flow on the schedule as it was {errors[0]} (black and white, guidance
{guidance}). What a shift does on that schedule was not tried. Begun at t = 0 the flow on it has {from_zero} without
any of this.
"""


def _extremes(
    known: Known, learner: str, mark: str, steps: str, guidance: str, sampler: str | None = None
) -> dict[int, float]:
    """The mean error of black and of white by seed."""
    sampler = sampler or _JUDGED[_objective(learner)]
    black, white = (
        _of(known, learner, mark, sampler, steps, guidance, colour, "error_to_vae") for colour in ("black", "white")
    )
    return {seed: (black[seed] + white[seed]) / 2 for seed in black}


def _rows(last: str) -> list[tuple[str, tuple[str, str, str]]]:
    """Label, and learner, mark and sampler."""
    return [
        ("prior", ("diffusion", "0", "DDIM")),
        *((f"{label(o)}, {sampler}", (o, last, sampler)) for o, samplers in ASKED.items() for sampler in samplers),
    ]


def _of(
    known: Known, objective: str, mark: str, sampler: str, steps: str, guidance: str, colour: str, what: str
) -> dict[int, float]:
    place = ("curve", mark, sampler, steps, guidance)
    if colour != "all":
        return known.of(f"colours-{objective}", *place, colour, what)
    found = [known.of(f"colours-{objective}", *place, each, what) for each in COLOUR_NAMES]
    return {seed: sum(values[seed] for values in found) / len(found) for seed in found[0]}


def _vae(known: Known, what: str, colour: str) -> dict[int, float]:
    """It is the same for every seed: one of them."""
    each = COLOUR_NAMES if colour == "all" else (colour,)
    found = [known.of("colours-diff2flow", "vae", name, what) for name in each]
    seed = min(found[0], default=None)
    return {} if seed is None else {seed: sum(values[seed] for values in found) / len(found)}
