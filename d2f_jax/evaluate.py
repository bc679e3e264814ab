"""Judges a checkpoint on held-out captions, or on pictures with depth: one table, and the same numbers as JSON.

    python -m d2f_jax.evaluate --config=configs/X.py --out=DIR [--model=MODEL] [--inception=FILE] [--clip=MODEL]

Draws `config.eval.num_images` held-out captions with `config.eval`'s sampler, guidance and seed, for each of its
numbers of steps, and compares with their pictures. DIR receives `scores.json`, `scores.md` and `samples.png`.
ShapesWorld is judged by the embedded classifier; FID and KID need InceptionV3's weights, the CLIP score a CLIP model.
What is not given is named and gets no number. Estimates from few pictures are biased: compare only what has the same
number of them.

With `config.task.name="image_to_depth"` depth is estimated of the whole pictures, their longer side made the longer of
`config.data.image_size` and `image_width`; it is brought back to their own size, and judged there as
`config.eval.depth` says.
"""

import collections
import itertools
import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import jax
import numpy as np
from absl import flags
from ml_collections import config_flags
from tqdm import tqdm

from d2f_jax import datasets, distributed, metrics, prepare, prior, program, report, settings, sharding
from d2f_jax.data.depth import normalised
from d2f_jax.data.fit import fit_image, make_row
from d2f_jax.data.sources import Example
from d2f_jax.errors import InputError
from d2f_jax.measures import Gathered, Judges, scores
from d2f_jax.metrics import DepthErrors, DepthProtocol, DepthSpace
from d2f_jax.pipeline import Pipeline
from d2f_jax.program import Config
from d2f_jax.subjects import shown as shown_depth

Found = dict[int, dict[str, float]]
"""Scores by name, for each number of steps."""
Cells = dict[str, np.ndarray]
"""Pictures uint8 [N, H, W, 3] to look at, by what they are."""
Pair = tuple[np.ndarray, np.ndarray]
"""A picture uint8 [H, W, 3] and its depth float32 [H, W]."""


def main() -> None:
    given = flags.FLAGS
    if given.config is None or given.out is None:
        raise InputError("--config=configs/NAME.py and --out=DIR are both needed")
    if given.model is not None:
        given.config.model = given.model
    evaluate(given.config, Path(given.out), inception=given.inception, clip=given.clip)


def evaluate(
    config: Config, folder: Path, *, inception: str | None = None, clip: str | None = None
) -> dict[int, dict[str, float]]:
    """Scores by number of steps; writes them, and pictures, into `folder`.

    Raises InputError for what cannot be judged.
    """
    mesh = sharding.make_mesh(config.mesh.data, config.mesh.fsdp)
    settings.check(config, mesh)
    judges = None if datasets.of_depth(config) else load_judges(config, inception, clip)
    pipeline = prior.load(config)
    data = datasets.open_data(config, folder, pipeline, datasets.open_given(config))
    if judges is None:
        most, notes = min(config.eval.num_images, sum(map(len, data.shown))), []
        found, cells, count = depth_scores(config, pipeline.on_mesh(mesh), data.reading(), most)
    else:
        examples = data.examples(config.eval.num_images)
        if any("image" not in example for example in examples):
            raise InputError("config.data.sources hold prepared latents; give pictures as config.eval.sources")
        found, cells = picture_scores(config, pipeline.on_mesh(mesh), examples, judges)
        notes = [f"{i}. {example['text']}" for i, example in enumerate(examples[: config.eval.grid_images], 1)]
        count = len(examples)
    if distributed.is_main():
        write(config, folder, found, cells, notes, count)
    distributed.barrier("evaluated")
    return found


def load_judges(config: Config, inception: str | None, clip: str | None) -> Judges:
    """Of pictures, and tells what they lack. Raises InputError where there are none."""
    judges = Judges.load(inception, clip, shapes=datasets.scored(config))
    if distributed.is_main():
        for told in judges.missing():
            print(told)
    if not judges.some:
        raise InputError("there is nothing to judge by: " + "; ".join(judges.missing()))
    return judges


def picture_scores(
    config: Config, pipeline: Pipeline, examples: Sequence[Example], judges: Judges
) -> tuple[Found, Cells]:
    """Of what is drawn for the captions, compared with the pictures."""
    real, texts = Gathered(), [example["text"] for example in examples]
    mine = np.arange(jax.process_index(), len(examples), jax.process_count())
    size, fit = config.eval.batch_size, datasets.plain_fit(config)
    for part in np.split(mine, range(size, len(mine), size)):
        pictures = [make_row(examples[i], fit, prepare.AS_IT_IS)["image"] for i in part]
        real = real.add(judges, part, np.array(pictures), [texts[i] for i in part])
    real = distributed.merged(real)
    cells, found = {}, {}
    work = len(texts) * sum(config.eval.step_counts)
    with tqdm(total=work, desc="sampling", unit="step", disable=not distributed.is_main()) as bar:
        for num_steps in config.eval.step_counts:
            drawn, first = draw(config, pipeline, judges, texts, num_steps, bar)
            found[num_steps] = scores(judges, distributed.merged(drawn), real)
            cells[_steps(num_steps)] = first
    return found, cells


def depth_scores(
    config: Config, pipeline: Pipeline, examples: Iterable[Example], count: int
) -> tuple[Found, Cells, int]:
    """Of depth that is estimated of at most `count` pictures, against what was measured; and how many they are.

    Few of them are held at a time. Raises InputError where nothing was measured.
    """
    wanted, shape, judged = config.eval, datasets.image_shape(config), 0
    protocol = metrics.DEPTH_PROTOCOLS[wanted.depth.protocol]
    pairs = (measured_pair(example, protocol, i) for i, example in enumerate(itertools.islice(examples, count)))
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
                cells[_steps(num_steps)] += [depth_picture(estimate, shape) for estimate in estimates[:kept]]
                bar.update(len(chunk) * num_steps)
            judged = first + len(chunk)
    if not judged:
        raise InputError("none of the pictures with depth can be read; give others as config.eval.sources")
    found = {num_steps: distributed.merged(means).means() for num_steps, means in errors.items()}
    return found, {name: np.stack(pictures) for name, pictures in cells.items()}, judged


def measured_pair(example: Example, protocol: DepthProtocol, index: int) -> tuple[np.ndarray, np.ndarray]:
    """A picture and its depth, as the protocol cuts them."""
    if "image" not in example:
        raise InputError("config.data.sources hold prepared latents; give pictures with depth as config.eval.sources")
    if "depth" not in example or example["depth"].shape != example["image"].shape[:2]:
        raise InputError(f"example {index} has no depth of its picture's size; give pictures with depth")
    try:
        return protocol.cut(example["image"]), protocol.cut(example["depth"])
    except ValueError as error:
        raise InputError(f"example {index}: {error}; give another config.eval.depth.protocol") from error


def judge(
    protocol: DepthProtocol, space: DepthSpace, estimate: np.ndarray, depth: np.ndarray, index: int
) -> DepthErrors:
    own = depth > 0 if protocol.own_mask else None
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


def draw(
    config: Config, pipeline: Pipeline, judges: Judges, texts: list[str], num_steps: int, bar: tqdm
) -> tuple[Gathered, np.ndarray]:
    """What this process has seen of its share of all pictures, and the first of them all for a grid."""
    drawn, size, kept = Gathered(), config.eval.batch_size, []
    height, width = datasets.image_shape(config)
    for start in range(0, len(texts), size):
        chunk = texts[start : start + size]
        images = pipeline(
            chunk,
            num_steps=num_steps,
            guidance_scale=config.eval.guidance_scale,
            seed=config.eval.seed,
            first=start,
            height=height,
            width=width,
            sampler=settings.eval_sampler(config),
        )
        mine = np.arange(jax.process_index(), len(chunk), jax.process_count())
        drawn = drawn.add(judges, start + mine, images[mine], [chunk[i] for i in mine])
        kept.append(images[: max(0, config.eval.grid_images - start)])
        bar.update(len(chunk) * num_steps)
    return drawn, np.concatenate(kept)


def write(config: Config, folder: Path, told: Found, cells: Cells, notes: list[str], count: int) -> None:
    names = list(next(iter(told.values())))
    rows = [[name.replace("_", " "), *(f"{values[name]:.4g}" for values in told.values())] for name in names]
    header = [f"{count} pictures of {datasets.told_size(config)} pixels", *map(_steps, told)]
    table = report.markdown_table(header, rows)
    settled = {
        "model": str(config.model),
        "num_images": count,
        "image_size": config.data.image_size,
        "image_width": config.data.image_width,
        **{name: config.eval[name] for name in ("sampler", "shift", "guidance_scale", "seed")},
        **({"depth": config.eval.depth.to_dict()} if datasets.of_depth(config) else {}),
        "scores": {str(n): values for n, values in told.items()},
    }
    tiles = [report.tile(images, max(1, round(len(images) ** 0.5))) for images in cells.values()]
    zoom = 2 if max(datasets.image_shape(config)) <= 64 else 1
    picture = report.labelled_grid([tiles], [Path(config.model).name], list(cells), notes=notes, zoom=zoom)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "scores.json").write_text(json.dumps(settled, indent=2) + "\n")
        (folder / "scores.md").write_text(table)
        picture.save(folder / "samples.png")
    except OSError as error:
        raise InputError(f"--out={folder} cannot be written ({error.strerror}); give another folder") from error
    print(f"\n{table}\nscores: {folder / 'scores.json'}\npictures: {folder / 'samples.png'}")


def _steps(count: int) -> str:
    return f"{count} step{'s' if count > 1 else ''}"


if __name__ == "__main__":
    config_flags.DEFINE_config_file(
        "config", None, "The data and config.eval: a file of configs/, as for d2f_jax.train."
    )
    flags.DEFINE_string("model", None, "Diffusers folder or hub id; config.model if not given.")
    flags.DEFINE_string("out", None, "Folder for the scores.")
    flags.DEFINE_string("inception", None, "InceptionV3's weights for FID and KID, as safetensors.")
    flags.DEFINE_string("clip", None, "CLIP model for the CLIP score: a transformers folder or hub id.")
    program.run(main)
