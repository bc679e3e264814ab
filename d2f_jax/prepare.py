"""Computes the latents and text states of a data set once: training then needs neither the VAE nor the text encoder.

    python -m d2f_jax.prepare --config=configs/X.py --out=DIR [--shard_size=1024] [--batch_size=8]

Takes the config's model, data, image size, resizing and compute dtype, and with `config.data.latents=mean` the latents'
means alone, at half the size; pictures are cropped in the middle and stay in the order of the sources. With
`config.data.random_flip` the mirrored picture is encoded as well, which takes twice the time and the size of latents:
training then takes one of the two. DIR receives shards `train-00000-of-00012.array_record` (`validation-...` of what is
held out), each with a `.json` when it is finished, and at last `manifest.json`. What is finished is not computed again:
it may be killed at any time and goes on when the same command is started. Several processes (as for `d2f_jax.train`)
deal the shards out among themselves; the files do not depend on their number. Each process allows itself
`config.data.max_damaged` examples that cannot be read, anew at each start.
"""

import collections
import dataclasses
import functools
import itertools
import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import flags
from flax import nnx
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from ml_collections import config_flags
from tqdm import tqdm

from d2f_jax import datasets, distributed, prior, program, settings
from d2f_jax import step as steps
from d2f_jax.data import prepared, records
from d2f_jax.data.fit import Fit, Row, make_row, spec_of
from d2f_jax.data.prepared import Manifest, Plan, Shard, Split
from d2f_jax.data.sources import Source, joined
from d2f_jax.errors import InputError
from d2f_jax.models.devices import split_over
from d2f_jax.models.layers import in_compute_dtype
from d2f_jax.pipeline import Pipeline
from d2f_jax.program import Config

Read = Callable[[int], Row | str]
"""The number of an example to what is encoded of it, or to why it cannot be read."""
Encode = Callable[[Sequence[Row]], dict[str, jax.Array]]
"""At most a batch of rows, such as pictures and captions, to arrays [B, ...] float32, the batch filled up."""

AS_IT_IS = (1.0, 1.0, 0.5, 0.5)  # the draws of a row that is neither mirrored nor loses its caption
_DTYPES = {"noise": "float32", "valid": "bool"}  # of the rest float16
_POLL_SECONDS = 0.5


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """`shard_size` in examples; `batch_size` in pictures that each device works on at once."""

    shard_size: int = 1024
    batch_size: int = 8


@dataclasses.dataclass(frozen=True)
class Task:
    """A shard to be, and the examples of the split that belong into it."""

    file: Path
    split: Split
    indices: range


def main() -> None:
    given = flags.FLAGS
    if given.config is None or given.out is None:
        raise InputError("--config=configs/NAME.py and --out=DIR are both needed")
    options = Options(shard_size=given.shard_size, batch_size=given.batch_size)
    manifest = prepare(given.config, Path(given.out), options)
    if distributed.is_main():
        for split, shards in manifest.shards.items():
            left_out = sum(len(shard.damaged) for shard in shards)
            print(f"{split}: {sum(shard.count for shard in shards)} examples, {left_out} damaged ones left out")
        print(f"prepared: {given.out}")


def prepare(config: Config, folder: Path, options: Options) -> Manifest:
    """Fills `folder`, or goes on filling it, and tells what is in it.

    Raises InputError for what cannot be prepared, and for a folder that belongs to another config.
    """
    check(config, options)
    pipeline = prior.load(config)
    sources = open_splits(config, folder, pipeline)
    plan = make_plan(config, options, pipeline, {split: len(source) for split, source in sources.items()})
    fit = datasets.plain_fit(config)
    readers: dict[Split, Read] = {split: functools.partial(read_row, source, fit) for split, source in sources.items()}
    shape, depth = datasets.image_shape(config), datasets.of_depth(config)
    empty = {"image": np.zeros((*shape, 3), np.uint8), "text": ""}
    if depth:
        empty |= {"depth": np.zeros(shape, np.float32), "valid": np.zeros(shape, np.bool_)}
    encode = make_encoder(pipeline, options.batch_size, config.compute_dtype, mirrored=plan.mirrored)
    encoded = ["latent_mean"] + ["latent_std"] * (plan.latents == "mean_std") + ["picture_mean"] * depth
    mirrored = [f"mirrored_{name}" for name in encoded] if plan.mirrored else []
    names = (*encoded, *mirrored, "valid" if depth else "text_states")
    return fill(folder, plan, config, readers, encode, names, empty, options.batch_size)


def fill(
    folder: Path,
    plan: Plan,
    config: Config,
    readers: dict[Split, Read],
    encode: Encode,
    names: Sequence[str],
    empty: Row,
    batch_size: int,
) -> Manifest:
    """Makes `folder` hold what `plan` says, the arrays `names` that `encode` computes, or goes on doing so.

    `empty` is a row with the empty caption. Raises InputError as `claim` and `readable` do.
    """
    claim(folder, plan)
    tasks = list(shard_tasks(folder, plan))
    if distributed.is_main() and not (folder / prepared.NULL_TEXT).exists():
        (record,) = to_records([empty], encode([empty]), ("text_states",))
        prepared.write_bytes(folder / prepared.NULL_TEXT, record)
    distributed.barrier("prepare: begun")

    compute(tasks[jax.process_index() :: jax.process_count()], readers, encode, names, batch_size, config)
    manifest = Manifest(plan=plan, null_text=Shard.of(folder / prepared.NULL_TEXT, 1), shards=all_shards(tasks))
    distributed.barrier("prepare: shards")
    if distributed.is_main():
        prepared.write_json(folder / prepared.MANIFEST, manifest)
    distributed.barrier("prepare: done")
    return manifest


def check(config: Config, options: Options) -> None:
    """Raises InputError for a config that cannot be prepared."""
    settings.check_values(config)
    for name in ("shard_size", "batch_size"):
        if getattr(options, name) < 1:
            raise InputError(f"--{name}={getattr(options, name)} is too small; use 1 or more")
    if config.data.crop != "center":
        raise InputError(
            f"config.data.crop={config.data.crop}: what is prepared is cropped once and for all; use center"
        )
    if config.data.weights:
        raise InputError(
            f"config.data.weights={config.data.weights}: what is prepared is mixed already; "
            "prepare each source into a folder of its own, then train on these with weights"
        )


def open_splits(config: Config, folder: Path, pipeline: Pipeline) -> dict[Split, Source]:
    """The config's sources, one after another; `validation` is there if it has examples."""
    data = datasets.open_data(config, folder, pipeline, datasets.open_given(config))
    splits: dict[Split, Source] = {"train": joined(data.train)}
    if data.validation:
        splits["validation"] = joined(data.validation)
    return splits


def make_plan(
    config: Config,
    options: Options,
    pipeline: Pipeline,
    examples: dict[Split, int],
    teacher: dict[str, Any] | None = None,
) -> Plan:
    """Raises InputError for an image size that the VAE's downsampling does not divide."""
    height, width = datasets.image_shape(config)
    of_means = teacher is not None or datasets.of_depth(config) or config.data.latents == "mean"
    return Plan(
        format=prepared.FORMAT,
        model=str(config.model),
        variant=config.variant,
        vae_fingerprint=prepared.vae_fingerprint(pipeline.vae),
        text_fingerprint=prepared.text_fingerprint(pipeline.text_encoder, pipeline.tokenizer),
        scaling_factor=pipeline.vae.config.scaling_factor,
        compute_dtype=config.compute_dtype,
        dtype="float16",
        image_size=height,
        image_width=0 if width == height else width,
        resize=config.data.resize,
        latents="mean" if of_means else "mean_std",
        latent_shape=pipeline.noise(0, 1, height, width).shape[1:],
        text_shape=(pipeline.tokenize([""]).shape[1], pipeline.text_encoder.config.hidden_size),
        task=pipeline.task.name,
        mirrored=config.data.random_flip and teacher is None,
        shard_size=options.shard_size,
        sources=tuple(config.data.sources),
        held_out=config.data.held_out,
        examples=examples,
        teacher=teacher,
    )


def claim(folder: Path, plan: Plan) -> None:
    """Makes `folder` that of `plan`; raises InputError if it belongs to another, naming what differs."""
    there = prepared.read_plan(folder)
    if there is not None:
        before, now = dataclasses.asdict(there), dataclasses.asdict(plan)
        told = [f"{key} ({before[key]!r} there, {now[key]!r} here)" for key in now if before[key] != now[key]]
        if told:
            raise InputError(f"{folder} was begun with another config: {', '.join(told)}; give another --out")
    elif distributed.is_main():
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(f"--out={folder} cannot be made ({error.strerror}); give another folder") from error
        prepared.write_json(folder / prepared.PLAN, plan)


def shard_tasks(folder: Path, plan: Plan) -> Iterator[Task]:
    for split, examples in plan.examples.items():
        starts = range(0, examples, plan.shard_size)
        for i, start in enumerate(starts):
            file = folder / f"{split}-{i:05d}-of-{len(starts):05d}.array_record"
            yield Task(file, split, range(start, min(start + plan.shard_size, examples)))


def make_encoder(pipeline: Pipeline, batch_size: int, compute_dtype: str, *, mirrored: bool) -> Encode:
    """What a train step computes, for this process's devices, `batch_size` pictures on each; perhaps mirrored as well.

    Shape and place of a picture on its device are the same whatever the number of devices, and so, but for rounding, is
    its latent.
    The pipeline's UNet is given up.
    """
    mesh = Mesh(np.array(jax.local_devices()), ("images",), axis_types=(AxisType.Auto,))
    networks = steps.Networks(*map(nnx.graphdef, (pipeline.unet, pipeline.vae, pipeline.text_encoder)))
    for leaf in jax.tree.leaves(nnx.state(pipeline.unet)):
        leaf.delete()
    frozen = steps.Frozen(None, nnx.state(pipeline.vae), nnx.state(pipeline.text_encoder))
    frozen = jax.device_put(frozen, NamedSharding(mesh, P()))

    @jax.jit
    @split_over(mesh)
    def network(frozen: steps.Frozen, batch: steps.Batch) -> dict[str, jax.Array]:
        found = steps.encoded(networks, in_compute_dtype(frozen, compute_dtype), batch)
        arrays = {"latent_mean": found.mean, "latent_std": found.std, "text_states": found.text_states}
        if found.picture is None or found.valid is None:
            return arrays
        return arrays | {"picture_mean": found.picture, "valid": found.valid[..., 0]}

    def encode(rows: Sequence[Row]) -> dict[str, jax.Array]:
        missing = batch_size * mesh.size - len(rows)
        rows = [*rows, *[rows[-1]] * missing]
        batch = {name: np.stack([row[name] for row in rows]) for name in spec_of(rows[0])}
        batch["input_ids"] = pipeline.tokenize([row["text"] for row in rows])
        arrays = network(frozen, jax.device_put(batch, NamedSharding(mesh, P("images"))))
        if not mirrored:
            return arrays
        batch = {name: x if name == "input_ids" else x[:, :, ::-1] for name, x in batch.items()}
        # The same program again, so that latents do not depend on whether those of the mirror image are wanted, too.
        turned = network(frozen, jax.device_put(batch, NamedSharding(mesh, P("images"))))
        return arrays | {f"mirrored_{name}": x for name, x in turned.items()}

    return encode


def compute(
    tasks: Sequence[Task],
    readers: dict[Split, Read],
    encode: Encode,
    names: Sequence[str],
    batch_size: int,
    config: Config,
) -> None:
    """Writes the shards that are not finished yet. Raises InputError as `readable` does."""
    batch_size *= jax.local_device_count()
    todo = [task for task in tasks if prepared.finished(task.file) is None]
    total, left = (sum(len(task.indices) for task in listed) for listed in (tasks, todo))
    damaged: list[str] = []
    bar = tqdm(total=total, initial=total - left, desc="preparing", unit="image", disable=not distributed.is_main())
    with bar, ThreadPoolExecutor(os.cpu_count()) as threads:
        for task in todo:
            before = len(damaged)
            results = ahead(threads, readers[task.split], task.indices, 2 * batch_size)
            rows = readable(results, damaged, config, bar)
            count = records.write_shard(task.file, encoded(rows, encode, names, batch_size))
            prepared.finish(task.file, Shard.of(task.file, count, damaged[before:]))


def read_row(source: Source, fit: Fit, index: int) -> Row | str:
    """The picture and its caption, or why it cannot be read."""
    try:
        row = make_row(source[index], fit, AS_IT_IS)
    except (InputError, OSError) as error:
        return f"example {index}: {' '.join(str(error).split())}"
    if not {"image", "text"} <= row.keys():
        raise InputError(f"example {index} of config.data.sources is prepared already; give pictures and captions")
    return row


def ahead(executor: Executor, call: Callable[[int], Any], arguments: Iterable[int], depth: int) -> Iterator[Any]:
    """The results in order, with at most `depth` of them under way or waiting."""
    running: collections.deque[Future[Any]] = collections.deque()
    for argument in arguments:
        running.append(executor.submit(call, argument))
        if len(running) == depth:
            yield running.popleft().result()
    while running:
        yield running.popleft().result()


def readable(results: Iterable[Row | str], damaged: list[str], config: Config, bar: tqdm) -> Iterator[Row]:
    """The rows; what could not be read is added to `damaged`, or refused."""
    for result in results:
        bar.update()
        if not isinstance(result, str):
            yield result
        elif config.data.on_damage == "stop":
            raise InputError(f"{result}, or set config.data.on_damage=skip")
        else:
            damaged.append(result)
            if len(damaged) > config.data.max_damaged:
                most = f"config.data.max_damaged={config.data.max_damaged}"
                raise InputError(f"more examples than {most} cannot be read; raise it, or mend {result}")


def encoded(rows: Iterator[Row], encode: Encode, names: Sequence[str], batch_size: int) -> Iterator[bytes]:
    """Records of the rows. Each batch is fetched when the next is under way, so that the devices do not wait."""
    waiting: tuple[list[Row], dict[str, jax.Array]] | None = None
    while batch := list(itertools.islice(rows, batch_size)):
        arrays = encode(batch)
        if waiting:
            yield from to_records(*waiting, names)
        waiting = batch, arrays
    if waiting:
        yield from to_records(*waiting, names)


def to_records(rows: Sequence[Row], arrays: dict[str, jax.Array], names: Sequence[str]) -> Iterator[bytes]:
    """Raises FloatingPointError for what float16 does not hold."""
    with np.errstate(over="ignore"):
        halves = {name: np.asarray(arrays[name])[: len(rows)].astype(_DTYPES.get(name, "float16")) for name in names}
    for i, row in enumerate(rows):
        for name in names:
            if not np.isfinite(halves[name][i]).all():
                raise FloatingPointError(f"{name} of {row['text']!r} is not finite; use config.compute_dtype=float32")
        yield records.encode({"text": row["text"], **{name: halves[name][i] for name in names}})


def all_shards(tasks: Sequence[Task]) -> dict[Split, tuple[Shard, ...]]:
    """Waits until the other processes have finished theirs: by looking, as collectives give up after half a minute."""
    shards: dict[Split, tuple[Shard, ...]] = {}
    for task in tasks:
        while (shard := prepared.finished(task.file)) is None:
            time.sleep(_POLL_SECONDS)
        shards[task.split] = (*shards.get(task.split, ()), shard)
    return shards


if __name__ == "__main__":
    # Not on import: programs that are imported together have flags of the same names.
    config_flags.DEFINE_config_file("config", None, "The data and the model: a file of configs/, as for d2f_jax.train.")
    flags.DEFINE_string("out", None, "Folder to fill; an earlier start of the same command goes on.")
    flags.DEFINE_integer("shard_size", 1024, "Examples in a file.")
    flags.DEFINE_integer("batch_size", 8, "Pictures that each device works on at once.")
    program.run(main)
