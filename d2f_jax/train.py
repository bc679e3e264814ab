"""Finetunes a Stable Diffusion checkpoint as a flow (Diff2Flow).

    python -m d2f_jax.train --config=configs/quickstart.py --workdir=DIR [--config.train.num_steps=1000 ...]

DIR holds `config.json`, `metrics.jsonl`, TensorBoard events, `checkpoints/`, `samples/`, `scores.md` and `export/`, the
result as a diffusers folder. Starting the same command again goes on from the newest checkpoint.
"""

import dataclasses
import functools
import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import jax
import numpy as np
from absl import flags
from flax import nnx
from ml_collections import config_flags
from tqdm import tqdm

from d2f_jax import evaluate, lora, metrics, optim, program, report, sharding
from d2f_jax import step as steps
from d2f_jax.alignment import Convention
from d2f_jax.checkpoint import Checkpoints
from d2f_jax.data.loader import train_batches
from d2f_jax.data.shapes_world import shapes_world
from d2f_jax.data.sources import ImageFolder, Source
from d2f_jax.errors import InputError
from d2f_jax.pipeline import Pipeline
from d2f_jax.program import Config

_CONFIG = config_flags.DEFINE_config_file("config", None, "The run: a file of configs/, with :arg where it takes one.")
_WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the run; an earlier run of the same config goes on.")


def main() -> None:
    if _CONFIG.value is None or _WORKDIR.value is None:
        raise InputError("--config=configs/NAME.py and --workdir=DIR are both needed")
    train(_CONFIG.value, Path(_WORKDIR.value))


def train(config: Config, workdir: Path) -> None:
    """Runs `config` from start, or from the newest checkpoint in `workdir`, to the exported and evaluated end."""
    mesh = sharding.make_mesh()
    check(config, mesh)
    prior = load_prior(config)
    prior.noise(0, 1, config.data.image_size, config.data.image_size)  # refuses a size that the VAE does not divide
    pictures = ImageFolder(config.data.path) if config.data.source == "image_folder" else None
    networks, frozen, trained = split(prior, config)
    optimizer = optim.adamw(
        learning_rate=config.train.learning_rate,
        warmup_steps=config.train.warmup_steps,
        weight_decay=config.train.weight_decay,
        max_grad_norm=config.train.max_grad_norm,
    )
    options = steps.StepOptions(
        latent_scale=prior.vae.config.scaling_factor,
        ema_decay=config.train.ema_decay,
        lora_scale=config.lora.scale,
        convention=config.convention,
    )
    step = steps.make_train_step(networks, prior.schedule, optimizer, options)
    claim(workdir, config)
    # Of one's own pictures only the captions are used in the evaluation, so nothing is held out.
    source, held_out = (pictures, pictures) if pictures is not None else build_world(config.data, workdir)
    batches = iter(
        train_batches(
            source,
            prior.tokenize,
            batch_size=config.train.batch_size,
            image_size=config.data.image_size,
            seed=config.seed,
            random_flip=config.data.random_flip,
            caption_dropout=config.data.caption_dropout,
        )
    )
    state, frozen = jax.device_put((steps.init_state(trained, optimizer), frozen), sharding.replicated(mesh))

    saved = Checkpoints(
        workdir / "checkpoints", every=config.train.checkpoint_every, keep=config.train.checkpoints_kept
    )
    with saved as checkpoints, report.MetricsWriter(workdir) as writer:
        state = checkpoints.restore(state, batches)
        state = loop(config, step, state, frozen, batches, checkpoints, writer, mesh)
        params = steps.unet_params(state.ema, frozen.unet, config.lora.scale)
        latent_size = config.data.image_size // prior.vae.config.downsampling
        with_unet(prior, params, latent_size).save_pretrained(workdir / "export")
        # The optimizer's state replaced the prior's parameters in memory: they are read again to compare with.
        prior = load_prior(config)
        finish(config, workdir, prior, with_unet(prior, params, latent_size), held_out, writer)


def load_prior(config: Config) -> Pipeline:
    return Pipeline.from_pretrained(
        config.model, variant=config.variant or None, dtype=config.compute_dtype, convention=config.convention
    )


def loop(
    config: Config,
    step: Callable[..., tuple[steps.TrainState, steps.Metrics]],
    state: steps.TrainState,
    frozen: steps.Frozen,
    batches: Any,
    checkpoints: Checkpoints,
    writer: report.MetricsWriter,
    mesh: jax.sharding.Mesh,
) -> steps.TrainState:
    """Steps from `state.step` to the end. Metrics are fetched one step late, so logging never stalls the device."""
    first, last, size = int(state.step), config.train.num_steps, config.train.batch_size
    root_key = jax.device_put(jax.random.key(config.seed), sharding.replicated(mesh))
    pending: tuple[int, steps.Metrics] | None = None
    began, counted = time.monotonic(), first
    with tqdm(total=last * size, initial=first * size, desc="training", unit="image") as bar:
        for n in range(first, last):
            batch = jax.device_put(next(batches), sharding.batch_split(mesh))
            state, now = step(state, frozen, batch, root_key)
            if pending and (pending[0] % config.train.log_every == 0 or n == first + 1):
                values = fetched(*pending)
                seconds, done = time.monotonic() - began, pending[0] - counted
                began, counted = time.monotonic(), pending[0]
                writer.write(pending[0], {**values, "images_per_second": done * size / seconds})
                bar.set_postfix(loss=f"{values['loss']:.4f}")
            pending = (n + 1, now)
            if checkpoints.due(n + 1) or n + 1 == last:
                fetched(*pending)  # what has diverged is neither saved nor exported
                checkpoints.save(n + 1, state, batches)
            bar.update(size)
        if pending:
            writer.write(pending[0], fetched(*pending))
    return state


def fetched(step: int, metrics: steps.Metrics) -> dict[str, float]:
    """The metrics as numbers. Raises FloatingPointError if one is not finite."""
    values = {name: float(value) for name, value in metrics.items()}
    for name, value in values.items():
        if not math.isfinite(value):
            raise FloatingPointError(
                f"{name} is {value} at step {step}; start again with a lower config.train.learning_rate or more warm-up"
            )
    return values


def split(prior: Pipeline, config: Config) -> tuple[steps.Networks, steps.Frozen, Any]:
    """The networks' structure, the parameters that stay, and those that are trained."""
    unet_def, unet = nnx.split(prior.unet)
    vae_def, vae = nnx.split(prior.vae)
    text_def, text_encoder = nnx.split(prior.text_encoder)
    networks = steps.Networks(unet_def, vae_def, text_def)
    if not config.lora.enabled:
        return networks, steps.Frozen(None, vae, text_encoder), unet
    adapters = lora.init(unet, jax.random.key(config.seed), rank=config.lora.rank)
    return networks, steps.Frozen(unet, vae, text_encoder), adapters


def with_unet(pipeline: Pipeline, params: nnx.State, sample_size: int) -> Pipeline:
    """The same pipeline, compiled programs included, with other UNet parameters that were trained at `sample_size`."""
    unet = nnx.merge(nnx.graphdef(pipeline.unet), params)
    unet.config = dataclasses.replace(unet.config, sample_size=sample_size)
    return dataclasses.replace(pipeline, unet=unet)


def finish(
    config: Config,
    workdir: Path,
    prior: Pipeline,
    finetuned: Pipeline,
    held_out: Source,
    writer: report.MetricsWriter,
) -> None:
    """Samples before and after, side by side; on ShapesWorld with scores."""
    scored = config.data.source == "shapes_world"
    count = min(len(held_out), config.eval.num_images if scored else config.eval.grid_images)
    examples = [held_out[i] for i in range(count)]
    prompts = [example["text"] for example in examples]
    score = None
    if scored:
        classifier = metrics.load_classifier()
        real = metrics.feature_statistics(classifier, np.stack([example["image"] for example in examples]))
        score = functools.partial(metrics.shapes_scores, classifier, prompts=prompts, reference=real)
    comparison = evaluate.compare(
        evaluate.contenders(prior, finetuned),
        prompts,
        step_counts=config.eval.step_counts,
        batch_size=config.eval.batch_size,
        guidance_scale=config.eval.guidance_scale,
        seed=config.eval.seed,
        image_size=config.data.image_size,
        score=score,
    )
    samples = workdir / "samples"
    samples.mkdir(exist_ok=True)
    picture = evaluate.picture(comparison, config.eval.grid_images, zoom=2 if config.data.image_size <= 64 else 1)
    picture.save(samples / "before_and_after.png")
    writer.image(config.train.num_steps, "before_and_after", picture)
    if scored:
        table = evaluate.table(comparison)
        (workdir / "scores.md").write_text(table)
        print(f"\n{config.data.image_size} pixels, {count} samples:\n\n{table}")
    print(f"pictures: {samples / 'before_and_after.png'}\nexport:   {workdir / 'export'} (a diffusers folder)")


def check(config: Config, mesh: jax.sharding.Mesh) -> None:
    """Raises InputError for a value that no run can have, before anything is loaded or written."""
    sharding.check_batch_size(config.train.batch_size, mesh)
    least = {"train.num_steps": 1, "train.log_every": 1, "train.checkpoint_every": 1, "train.checkpoints_kept": 1}
    least |= {"data.num_train": 1, "data.num_validation": 2, "eval.num_images": 2, "eval.batch_size": 1}
    least |= {"eval.grid_images": 1, "train.warmup_steps": 0, "data.caption_dropout": 0, "train.ema_decay": 0}
    least |= {"train.learning_rate": 0, "train.weight_decay": 0, "train.max_grad_norm": 1e-9}
    most = {"data.caption_dropout": 1, "train.ema_decay": 1}
    for name, bound in least.items():
        section, key = name.split(".")
        value = config[section][key]
        if value < bound:
            raise InputError(f"config.{name}={value} is too small; use {bound} or more")
        if value > most.get(name, value):
            raise InputError(f"config.{name}={value} is too large; use {most[name]} or less")
    counts = config.eval.step_counts
    if not counts or not all(isinstance(n, int) and n >= 1 for n in counts):
        raise InputError(f"config.eval.step_counts={counts}: give whole numbers of steps, each 1 or more")
    choices = {"convention": get_args(Convention), "compute_dtype": ("float32", "bfloat16")}
    for key, allowed in choices.items():
        if config[key] not in allowed:
            raise InputError(f"config.{key}={config[key]!r} is unknown; use one of {', '.join(allowed)}")
    if config.data.source not in ("shapes_world", "image_folder"):
        raise InputError(f"config.data.source={config.data.source!r} is unknown; use shapes_world or image_folder")


def build_world(data: Config, workdir: Path) -> tuple[Source, Source]:
    """ShapesWorld's train and validation split, rendered on the first start."""
    folder = Path(data.path) if data.path else workdir / "data"
    counts = {"num_train": data.num_train, "num_validation": data.num_validation}
    train_split = shapes_world(folder, size=data.image_size, split="train", **counts)
    return train_split, shapes_world(folder, size=data.image_size, split="validation", **counts)


def claim(workdir: Path, config: Config) -> None:
    """Makes `workdir` the run of `config`. Raises InputError if it cannot be written or belongs to another config."""
    file, text = workdir / "config.json", config.to_json_best_effort(indent=2, sort_keys=True)
    if file.exists():
        try:
            before, now = _flat(json.loads(file.read_text())), _flat(json.loads(text))
        except (ValueError, AttributeError) as error:
            raise InputError(f"{file} is damaged ({error}); restore it or give another --workdir") from error
        differing = sorted(key for key in before.keys() | now.keys() if before.get(key) != now.get(key))
        if differing:
            key = differing[0]
            raise InputError(
                f"workdir {workdir} belongs to another config: {', '.join(differing)} differ "
                f"({key}={before.get(key)!r} there, {now.get(key)!r} here); give another --workdir"
            )
        return
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        part = file.with_suffix(".part")
        part.write_text(text)
        part.replace(file)
    except OSError as error:
        raise InputError(f"workdir {workdir} cannot be written ({error.strerror}); give another --workdir") from error


def _flat(tree: dict[str, Any], prefix: str = "config") -> dict[str, Any]:
    leaves = {}
    for key, value in tree.items():
        leaves |= _flat(value, f"{prefix}.{key}") if isinstance(value, dict) else {f"{prefix}.{key}": value}
    return leaves


if __name__ == "__main__":
    program.run(main)
