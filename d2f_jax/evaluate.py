"""Judges a checkpoint on held-out captions, or on pictures with depth: one table, and the same numbers as JSON.

    python -m d2f_jax.evaluate --config=configs/X.py --out=DIR [--model=MODEL] [--lora=FILE]
        [--lora_scale=1] [--inception=FILE] [--kid] [--clip=MODEL] [--aesthetic=FILE] [--bits]

Draws `config.eval.num_images` held-out captions with `config.eval`'s sampler, guidance and seed, for each of its
numbers of steps, and compares with their pictures: by PSNR and SSIM one by one, and all together by what is there.
ShapesWorld is judged by the embedded classifier; pictures of uniform_colours by their mean absolute error against the
colour, in levels of 255; FID and KID need InceptionV3's weights, the CLIP score a CLIP model,
the aesthetic score LAION's predictor beside CLIP ViT-L/14. With --bits, as many bits per dimension as the pictures'
latents take under the diffusion model, by the variational bound of a chain of as many steps. What is not given is named
and gets no number. Estimates from few pictures are biased: compare only what has the same number of them. DIR receives
`scores.json`, `scores.md` and `samples.png`.

How a model flows is what its export, or its file of adapters, records: `config.objective`, and all else of training,
has no part in it. A `config.task` other than the model's is refused.

With `config.task.name="image_to_depth"` depth is estimated of the whole pictures, their longer side made the longer of
`config.data.image_size` and `image_width`; it is brought back to their own size, and judged there as
`config.eval.depth` says, by the protocol of the source if it names one. Pictures are spread over each source.
"""

import collections
import dataclasses
import functools
import itertools
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, get_args

import jax
import numpy as np
from absl import flags
from ml_collections import config_flags
from tqdm import tqdm

from d2f_jax import datasets, distributed, metrics, prepare, prior, program, report, settings, sharding
from d2f_jax.alignment import Convention
from d2f_jax.data.depth import normalised
from d2f_jax.data.fit import fit_image, make_row
from d2f_jax.data.sources import Example
from d2f_jax.errors import InputError
from d2f_jax.measures import Gathered, Judges, scores
from d2f_jax.metrics import DepthErrors, DepthProtocol, DepthSpace
from d2f_jax.pipeline import Pipeline
from d2f_jax.program import Config
from d2f_jax.subjects import draw_captions
from d2f_jax.subjects import shown as shown_depth

Found = dict[int, dict[str, float]]
"""Scores by name, for each number of steps."""
Pair = tuple[np.ndarray, np.ndarray]
"""A picture uint8 [H, W, 3] and its depth float32 [H, W]."""


@dataclasses.dataclass(frozen=True)
class Told:
    """What `count` examples have told: `cells` are pictures uint8 [N, H, W, 3] by what they are, `notes` on these."""

    found: Found
    cells: dict[str, np.ndarray]
    notes: list[str]
    count: int


def main() -> None:
    given = flags.FLAGS
    if given.config is None or given.out is None:
        raise InputError("--config=configs/NAME.py and --out=DIR are both needed")
    if given.model is not None:
        given.config.model = given.model
    evaluate(
        given.config,
        Path(given.out),
        lora=given.lora,
        lora_scale=given.lora_scale,
        convention=given.convention,
        inception=given.inception,
        kid=given.kid,
        clip=given.clip,
        aesthetic=given.aesthetic,
        bits=given.bits,
    )


def evaluate(
    config: Config,
    folder: Path,
    *,
    lora: str | None = None,
    lora_scale: float = 1.0,
    convention: Convention | None = None,
    inception: str | None = None,
    kid: bool = False,
    clip: str | None = None,
    aesthetic: str | None = None,
    bits: bool = False,
) -> Found:
    """Scores by number of steps; writes them, and pictures, into `folder`. The options are the program's.

    Raises InputError for what cannot be judged.
    """
    settings.check_values(config)
    mesh, of_depth = sharding.make_mesh(config.mesh.data, config.mesh.fsdp), datasets.of_depth(config)
    if of_depth and (inception or clip or aesthetic or kid or bits):
        told = "--inception, --kid, --clip, --aesthetic and --bits judge pictures"
        raise InputError(f"{told}, and this config tells depth; leave them out")
    if bits and settings.eval_sampler(config).is_adaptive:
        raise InputError(f"--bits is of a number of steps, and {config.eval.sampler} finds its own; leave it out")
    judges = None if of_depth else load_judges(config, inception, clip, aesthetic, kid=kid)
    loaded = prior.load_as_it_is(config, adapters=lora, lora_scale=lora_scale, convention=convention)
    pipeline = loaded.on_mesh(mesh)
    prior.check_steps(pipeline, config)
    given = datasets.open_given(config)
    protocol = datasets.depth_protocol(config, given) if of_depth else ""
    data = datasets.open_data(config, folder, pipeline, given)
    if judges and distributed.is_main():
        for told in judges.missing():
            print(told)
    count = min(config.eval.num_images, sum(map(len, data.shown)))
    if judges is None:
        how = metrics.DEPTH_PROTOCOLS[protocol]
        examples = data.reading(count, functools.partial(check_measured, how))
        told = depth_scores(config, pipeline, examples, count, how)
    else:
        told = picture_scores(config, pipeline, data.reading(count), count, judges, bits=bits)
    if distributed.is_main():
        judged_by = {"depth": protocol} if of_depth else {"inception": inception, "clip": clip, "aesthetic": aesthetic}
        adapters = {"lora": lora} | ({"lora_scale": lora_scale} if lora else {})
        write(config, folder, told, settled(config, pipeline, told) | adapters | {"judged_by": judged_by})
    distributed.barrier("evaluated")
    return told.found


def column(config: Config, num_steps: int) -> str:
    """What results of so many steps are called."""
    sampler = settings.eval_sampler(config)
    return sampler.name if sampler.is_adaptive else report.steps(num_steps)


def load_judges(config: Config, inception: str | None, clip: str | None, aesthetic: str | None, *, kid: bool) -> Judges:
    """Of pictures. Raises InputError for those too small to judge, and as `Judges.load`."""
    if min(datasets.image_shape(config)) < 11:
        told = datasets.told_size(config)
        raise InputError(f"config.data.image_size: pictures of {told} pixels have no SSIM; use 11 or more")
    judged = {"shapes": datasets.scored(config), "colours": datasets.of_colours(config)}
    return Judges.load(inception, clip, aesthetic, kid=kid, **judged)


def picture_scores(
    config: Config, pipeline: Pipeline, examples: Iterable[Example], count: int, judges: Judges, *, bits: bool = False
) -> Told:
    """Of what is drawn for the captions of at most `count` examples, compared with their pictures.

    A batch of them is held at a time; for `bits`, which all devices tell together, by every process.
    """
    wanted, fit, judged = config.eval, datasets.plain_fit(config), 0
    sampler = settings.eval_sampler(config)
    real, drawn = Gathered(), dict.fromkeys(wanted.step_counts, Gathered())
    cells: dict[str, list[np.ndarray]] = collections.defaultdict(list)
    notes: list[str] = []
    work = count * sum(wanted.step_counts)
    with tqdm(total=work, desc="sampling", unit="step", disable=not distributed.is_main()) as bar:
        for chunk in batches(examples, wanted.batch_size):
            if any("image" not in example for example in chunk):
                raise InputError("config.data.sources hold prepared latents; give pictures as config.eval.sources")
            texts, kept = [example["text"] for example in chunk], max(0, wanted.grid_images - judged)
            notes += [f"{judged + i}. {text}" for i, text in enumerate(texts[:kept], 1)]
            mine = np.arange(jax.process_index(), len(chunk), jax.process_count())
            read = np.arange(len(chunk)) if bits else mine
            given = np.array([make_row(chunk[i], fit, prepare.AS_IT_IS)["image"] for i in read])
            pictures, known = given[mine] if bits else given, {}
            real = real.add_real(judges, judged + mine, pictures)
            for num_steps in wanted.step_counts:
                if bits:
                    options = {"num_steps": num_steps, "seed": wanted.seed, "first": judged}
                    known = {"bits_per_dim": pipeline.bits_per_dim(given, texts, **options)[mine]}
                images = draw_captions(config, pipeline, sampler, texts, judged, num_steps)
                seen = judges, judged + mine, images[mine], [texts[i] for i in mine], pictures
                drawn[num_steps] = drawn[num_steps].add_drawn(*seen, known)
                cells[column(config, num_steps)].append(images[:kept].copy())  # a view would keep all of them
                bar.update(len(chunk) * num_steps)
            judged += len(chunk)
    if judged < 2:
        raise InputError(f"{judged} pictures can be read, and two are needed; give others as config.eval.sources")
    real = distributed.merged(real)
    found = {n: scores(judges, distributed.merged(seen), real) for n, seen in drawn.items()}
    return Told(found, {name: np.concatenate(parts) for name, parts in cells.items()}, notes, judged)


def batches(examples: Iterable[Example], size: int) -> Iterator[list[Example]]:
    examples = iter(examples)
    while batch := list(itertools.islice(examples, size)):
        yield batch


def depth_scores(
    config: Config, pipeline: Pipeline, examples: Iterable[Example], count: int, protocol: DepthProtocol
) -> Told:
    """Of depth that is estimated of at most `count` pictures, against what was measured.

    Few of them are held at a time. Raises InputError where nothing was measured.
    """
    wanted, shape, judged = config.eval, datasets.image_shape(config), 0
    pairs = (measured_pair(example, protocol, i) for i, example in enumerate(examples))
    errors = dict.fromkeys(wanted.step_counts, metrics.Means())
    cells: dict[str, list[np.ndarray]] = collections.defaultdict(list)
    work = count * sum(wanted.step_counts)
    with tqdm(total=work, desc="estimating", unit="step", disable=not distributed.is_main()) as bar:
        for first, chunk in alike(pairs, wanted.batch_size):
            images, kept = np.stack([image for image, _ in chunk]), max(0, wanted.grid_images - first)
            cells["picture"] += [fit_image(image, shape) for image in images[:kept]]
            cells["measured"] += [depth_picture(normalised(depth)[0] / 2 + 0.5, shape) for _, depth in chunk[:kept]]
            for num_steps in wanted.step_counts:
                estimates = pipeline.depth(
                    images,
                    num_steps=num_steps,
                    ensemble=wanted.depth.ensemble,
                    resolution=max(shape),
                    seed=wanted.seed,
                    first=first,
                    sampler=settings.eval_sampler(config),
                )
                for i in range(jax.process_index(), len(chunk), jax.process_count()):
                    error = judge(protocol, wanted.depth.space, estimates[i], chunk[i][1], first + i)
                    errors[num_steps] = errors[num_steps].add(error._asdict())
                cells[column(config, num_steps)] += [depth_picture(estimate, shape) for estimate in estimates[:kept]]
                bar.update(len(chunk) * num_steps)
            judged = first + len(chunk)
    if not judged:
        raise InputError("none of the pictures with depth can be read; give others as config.eval.sources")
    found = {num_steps: distributed.merged(means).means() for num_steps, means in errors.items()}
    return Told(found, {name: np.stack(pictures) for name, pictures in cells.items()}, [], judged)


def measured_pair(example: Example, protocol: DepthProtocol, index: int) -> tuple[np.ndarray, np.ndarray]:
    """A picture and its depth, as the protocol cuts them."""
    if "image" not in example:
        raise InputError("config.data.sources hold prepared latents; give pictures with depth as config.eval.sources")
    if "depth" not in example or example["depth"].shape != example["image"].shape[:2]:
        raise InputError(f"example {index} has no depth of its picture's size; give pictures with depth")
    try:
        return protocol.cut(example["image"]), protocol.cut(example["depth"])
    except ValueError as error:
        raise InputError(
            f"example {index}: {error}; give another protocol, in the source or config.eval.depth.protocol"
        ) from error


def check_measured(protocol: DepthProtocol, example: Example) -> None:
    """Raises InputError for a picture with depth of which no pixel counts."""
    if "depth" not in example:
        return
    try:
        depth = protocol.cut(example["depth"])
        counts = protocol.valid(depth, own_mask(protocol, depth)).any()
    except ValueError:  # of which `measured_pair` tells more
        return
    if not counts:
        raise InputError(
            "no pixel of its depth counts by this protocol; leave it out, or set config.data.on_damage=skip"
        )


def own_mask(protocol: DepthProtocol, depth: np.ndarray) -> np.ndarray | None:
    return depth > 0 if protocol.own_mask else None


def judge(
    protocol: DepthProtocol, space: DepthSpace, estimate: np.ndarray, depth: np.ndarray, index: int
) -> DepthErrors:
    own = own_mask(protocol, depth)
    try:
        return metrics.depth_errors(protocol, estimate, depth, space=space, given_mask_HxW=own)
    except ValueError as error:
        raise InputError(f"example {index}: {error}") from error


def alike(pairs: Iterable[Pair], batch_size: int) -> Iterator[tuple[int, list[Pair]]]:
    """Neighbours of one size, at most `batch_size` of them, with the number of the first."""
    first = 0
    for _, neighbours in itertools.groupby(pairs, lambda pair: pair[1].shape):
        while chunk := list(itertools.islice(neighbours, batch_size)):
            yield first, chunk
            first += len(chunk)


def depth_picture(depth_HxW: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    return fit_image(shown_depth(depth_HxW[None])[0], shape)


def settled(config: Config, pipeline: Pipeline, told: Told) -> dict[str, Any]:
    """What was judged, and how."""
    wanted = config.eval
    how = {"depth": wanted.depth.to_dict()} if datasets.of_depth(config) else settings.guidance(config)
    return {
        "model": str(config.model),
        "compute_dtype": config.compute_dtype,
        "schedule": pipeline.scheduler_config,
        "task": dataclasses.asdict(pipeline.task),
        "alignment": dataclasses.asdict(pipeline.alignment),
        "num_images": told.count,
        "image_size": config.data.image_size,
        "image_width": config.data.image_width,
        "resize": config.data.resize,
        "sampler": dataclasses.asdict(settings.eval_sampler(config)),
        "seed": wanted.seed,
        **how,
        "scores": {str(n): values for n, values in told.found.items()},
    }


def write(config: Config, folder: Path, told: Told, settled: dict[str, Any]) -> None:
    found = told.found.values()
    rows = [[name.replace("_", " "), *(f"{values[name]:.4g}" for values in found)] for name in next(iter(found))]
    columns = [column(config, num_steps) for num_steps in told.found]
    header = [f"{told.count} pictures of {datasets.told_size(config)} pixels", *columns]
    table = report.markdown_table(header, rows)
    tiles = [report.tile(images, max(1, round(len(images) ** 0.5))) for images in told.cells.values()]
    zoom = 2 if max(datasets.image_shape(config)) <= 64 else 1
    picture = report.labelled_grid([tiles], [Path(config.model).name], list(told.cells), notes=told.notes, zoom=zoom)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "scores.json").write_text(json.dumps(settled, indent=2) + "\n")
        (folder / "scores.md").write_text(table)
        picture.save(folder / "samples.png")
    except OSError as error:
        raise InputError(f"--out={folder} cannot be written ({error.strerror}); give another folder") from error
    print(f"\n{table}\nscores: {folder / 'scores.json'}\npictures: {folder / 'samples.png'}")


if __name__ == "__main__":
    config_flags.DEFINE_config_file(
        "config", None, "The data and config.eval: a file of configs/, as for d2f_jax.train."
    )
    flags.DEFINE_string("model", None, "Diffusers folder or hub id; config.model if not given.")
    flags.DEFINE_string(
        "lora", None, "A file of adapters: a run's lora/adapters.safetensors, PEFT's, diffusers' or kohya's."
    )
    flags.DEFINE_float("lora_scale", 1.0, "Times the adapters' own scale.")
    flags.DEFINE_enum(
        "convention", None, get_args(Convention), "reference: for checkpoints of the paper's published code."
    )
    flags.DEFINE_string("out", None, "Folder for the scores.")
    flags.DEFINE_string("inception", None, "InceptionV3's weights for FID, as safetensors.")
    flags.DEFINE_bool("kid", False, "KID too, which keeps the features of every picture: 8 kB each.")
    flags.DEFINE_string("clip", None, "CLIP model for the CLIP score: a transformers folder or hub id.")
    flags.DEFINE_string("aesthetic", None, "LAION's aesthetic predictor, as .pth or safetensors; needs --clip.")
    flags.DEFINE_bool("bits", False, "Bits per dimension of the pictures' latents, by the variational bound.")
    program.run(main)
