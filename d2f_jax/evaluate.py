"""Judges a checkpoint on held-out captions: one table, and the same numbers as JSON.

    python -m d2f_jax.evaluate --config=configs/X.py --out=DIR [--model=MODEL] [--inception=FILE] [--clip=MODEL]

Draws `config.eval.num_images` held-out captions with `config.eval`'s sampler, guidance and seed, for each of its
numbers of steps, and compares with their pictures. DIR receives `scores.json`, `scores.md` and `samples.png`.
ShapesWorld is judged by the embedded classifier; FID and KID need InceptionV3's weights, the CLIP score a CLIP model.
What is not given is named and gets no number. Estimates from few pictures are biased: compare only what has the same
number of them.
"""

import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import flags
from ml_collections import config_flags
from tqdm import tqdm

from d2f_jax import datasets, distributed, prepare, prior, program, report, settings, sharding
from d2f_jax.data.fit import make_row
from d2f_jax.errors import InputError
from d2f_jax.measures import Gathered, Judges, scores
from d2f_jax.pipeline import Pipeline
from d2f_jax.program import Config


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
    judges = Judges.load(inception, clip, shapes=datasets.scored(config.data))
    pipeline = prior.load(config)
    data = datasets.open_data(config.data, folder, pipeline, datasets.open_given(config.data))
    examples = data.examples(config.eval.num_images)
    if distributed.is_main():
        for told in judges.missing():
            print(told)
    if not judges.some:
        raise InputError("there is nothing to judge by: " + "; ".join(judges.missing()))
    if any("image" not in example for example in examples):
        raise InputError(
            "config.data.sources hold prepared latents; give the pictures, which samples are compared with"
        )
    real, texts = Gathered(), [example["text"] for example in examples]
    mine = np.arange(jax.process_index(), len(examples), jax.process_count())
    size, fit = config.eval.batch_size, prepare.plain_fit(config)
    for part in np.split(mine, range(size, len(mine), size)):
        pictures = [make_row(examples[i], fit, prepare.AS_IT_IS)["image"] for i in part]
        real = real.add(judges, part, np.array(pictures), [texts[i] for i in part])
    real = distributed.merged(real)
    pipeline, cells, found = pipeline.on_mesh(mesh), [], {}
    work = len(texts) * sum(config.eval.step_counts)
    with tqdm(total=work, desc="sampling", unit="step", disable=not distributed.is_main()) as bar:
        for num_steps in config.eval.step_counts:
            drawn, first = draw(config, pipeline, judges, texts, num_steps, bar)
            found[num_steps] = scores(judges, distributed.merged(drawn), real)
            cells.append(report.tile(first, max(1, round(len(first) ** 0.5))))
    if distributed.is_main():
        write(config, folder, found, cells, texts)
    distributed.barrier("evaluated")
    return found


def draw(
    config: Config, pipeline: Pipeline, judges: Judges, texts: list[str], num_steps: int, bar: tqdm
) -> tuple[Gathered, np.ndarray]:
    """What this process has seen of its share of all pictures, and the first of them all for a grid."""
    drawn, size, kept = Gathered(), config.eval.batch_size, []
    for start in range(0, len(texts), size):
        chunk = texts[start : start + size]
        images = pipeline(
            chunk,
            num_steps=num_steps,
            guidance_scale=config.eval.guidance_scale,
            seed=config.eval.seed,
            first=start,
            height=config.data.image_size,
            width=config.data.image_size,
            sampler=settings.eval_sampler(config),
        )
        mine = np.arange(jax.process_index(), len(chunk), jax.process_count())
        drawn = drawn.add(judges, start + mine, images[mine], [chunk[i] for i in mine])
        kept.append(images[: max(0, config.eval.grid_images - start)])
        bar.update(len(chunk) * num_steps)
    return drawn, np.concatenate(kept)


def write(config: Config, folder: Path, told: dict[int, dict[str, float]], cells: list[Any], texts: list[str]) -> None:
    names = list(next(iter(told.values())))
    steps = [f"{n} step{'s' if n > 1 else ''}" for n in told]
    rows = [[name.replace("_", " "), *(f"{values[name]:.4g}" for values in told.values())] for name in names]
    table = report.markdown_table([f"{len(texts)} pictures of {config.data.image_size} pixels", *steps], rows)
    settled = {
        "model": str(config.model),
        "num_images": len(texts),
        "image_size": config.data.image_size,
        **{name: config.eval[name] for name in ("sampler", "shift", "guidance_scale", "seed")},
        "scores": {str(n): values for n, values in told.items()},
    }
    notes = [f"{i}. {text}" for i, text in enumerate(texts[: config.eval.grid_images], 1)]
    zoom = 2 if config.data.image_size <= 64 else 1
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "scores.json").write_text(json.dumps(settled, indent=2) + "\n")
        (folder / "scores.md").write_text(table)
        report.labelled_grid([cells], [Path(config.model).name], steps, notes=notes, zoom=zoom).save(
            folder / "samples.png"
        )
    except OSError as error:
        raise InputError(f"--out={folder} cannot be written ({error.strerror}); give another folder") from error
    print(f"\n{table}\nscores: {folder / 'scores.json'}\npictures: {folder / 'samples.png'}")


if __name__ == "__main__":
    config_flags.DEFINE_config_file(
        "config", None, "The data and config.eval: a file of configs/, as for d2f_jax.train."
    )
    flags.DEFINE_string("model", None, "Diffusers folder or hub id; config.model if not given.")
    flags.DEFINE_string("out", None, "Folder for the scores.")
    flags.DEFINE_string("inception", None, "InceptionV3's weights for FID and KID, as safetensors.")
    flags.DEFINE_string("clip", None, "CLIP model for the CLIP score: a transformers folder or hub id.")
    program.run(main)
