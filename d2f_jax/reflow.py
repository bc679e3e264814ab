"""Pairs of noise and what a teacher makes of it: trained on them, a flow becomes straight (arXiv 2209.03003).

    python -m d2f_jax.reflow --config=configs/X.py --out=DIR [--model=TEACHER] [--lora=FILE] [--shard_size=1024]
                              [--batch_size=8]
    python -m d2f_jax.train --config=configs/reflow.py:diff2flow:small:array_record:DIR --workdir=WORKDIR ...

Captions are those of `config.data`, from the first again when there are fewer than `config.reflow.count`; sampler,
steps and guidance are `config.reflow`'s. The teacher flows as its export records, whatever `config.objective` trains
the student by; if it is a finetuned flow, it needs `--config.reflow.sampler=euler`. DIR is written as by
`d2f_jax.prepare`, and goes on likewise when it was killed; a pair depends on the config's seed and its number alone.
The teacher's VAE and text encoder must be the student's.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import get_args

import jax
import numpy as np
from absl import flags
from flax import nnx
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from ml_collections import config_flags

from d2f_jax import datasets, distributed, pipeline, prepare, prior, program, programs, settings
from d2f_jax.alignment import Convention
from d2f_jax.data.fit import Row
from d2f_jax.data.prepared import Manifest, Split
from d2f_jax.data.sources import Source
from d2f_jax.errors import InputError
from d2f_jax.models.devices import split_over
from d2f_jax.pipeline import Pipeline
from d2f_jax.program import Config
from d2f_jax.sampler import Sampler

_VALIDATION = 2**30  # pairs of that split are numbered from here on


def main() -> None:
    given = flags.FLAGS
    if given.config is None or given.out is None:
        raise InputError("--config=configs/NAME.py and --out=DIR are both needed")
    if given.model is not None:
        given.config.model = given.model
    options = prepare.Options(shard_size=given.shard_size, batch_size=given.batch_size)
    manifest = reflow(
        given.config,
        Path(given.out),
        options,
        lora=given.lora,
        lora_scale=given.lora_scale,
        convention=given.convention,
    )
    if distributed.is_main():
        for split, shards in manifest.shards.items():
            print(f"{split}: {sum(shard.count for shard in shards)} pairs")
        print(f"pairs: {given.out}")


def reflow(
    config: Config,
    folder: Path,
    options: prepare.Options,
    *,
    lora: str | None = None,
    lora_scale: float = 1.0,
    convention: Convention | None = None,
) -> Manifest:
    """Fills `folder`, or goes on filling it, and tells what is in it.

    Raises InputError as `prepare.prepare`, and for a teacher that `config.reflow` cannot sample.
    """
    prepare.check(config, options)
    if config.task.name != "text_to_image":
        raise InputError(f"config.task.name={config.task.name}: pairs are made of captions; use text_to_image")
    teacher = prior.load_as_it_is(config, adapters=lora, lora_scale=lora_scale, convention=convention)
    wanted = config.reflow
    encode = make_teacher(teacher, settings.reflow_sampler(config), config, options.batch_size)
    sources = prepare.open_splits(config, folder, teacher)
    counts: dict[Split, int] = {"train": wanted.count}
    if wanted.num_validation and "validation" in sources:
        counts["validation"] = wanted.num_validation
    made_by = {**wanted.to_dict(), "seed": config.seed, "convention": convention}
    made_by |= {"lora": lora, "lora_scale": lora_scale}
    plan = prepare.make_plan(config, options, teacher, counts, teacher=made_by)
    readers: dict[Split, prepare.Read] = {
        split: _Captions(sources[split], _VALIDATION * (split == "validation")) for split in counts
    }
    names = ("latent_mean", "noise", "text_states")
    return prepare.fill(folder, plan, config, readers, encode, names, {"text": "", "index": 0}, options.batch_size)


class _Captions:
    """Reads the caption of a pair, and its number among all."""

    def __init__(self, source: Source, first: int) -> None:
        self._source, self._first = source, first

    def __call__(self, index: int) -> Row | str:
        try:
            text = self._source[index % len(self._source)]["text"]
        except (InputError, OSError) as error:
            return f"example {index % len(self._source)}: {' '.join(str(error).split())}"
        return {"text": text, "index": self._first + index}


def make_teacher(teacher: Pipeline, sampler: Sampler, config: Config, batch_size: int) -> prepare.Encode:
    """Noise and its latents, unscaled as the VAE's own, for this process's devices, `batch_size` on each."""
    mesh = Mesh(np.array(jax.local_devices()), ("images",), axis_types=(AxisType.Auto,))
    wanted, scale = config.reflow, teacher.vae.config.scaling_factor
    networks = (teacher.unet, teacher.vae, teacher.text_encoder)
    params = jax.device_put(tuple(map(nnx.state, networks)), NamedSharding(mesh, P()))
    shape = teacher.noise(0, 1, *datasets.image_shape(config)).shape[1:]
    grid = teacher.grid(sampler, wanted.num_steps)
    compute = programs.make_latents(teacher.model, sampler, "sample", wanted.guidance_scale != 1)
    text_def = nnx.graphdef(teacher.text_encoder)

    @jax.jit
    @split_over(mesh)
    def program(params, ids_BxL, negative_BxL, index_B):
        def drawn(index: jax.Array) -> tuple[jax.Array, jax.Array]:
            noise_key, step_key = (jax.random.fold_in(root, index + np.uint32(k)) for k in (0, pipeline.STEPS))
            return jax.random.normal(noise_key, shape), jax.random.key_data(step_key)

        root = jax.random.key(config.seed)
        noise, keys = jax.vmap(drawn)(index_B)
        guidance = np.array((wanted.guidance_scale, wanted.guidance_rescale), np.float32)
        latents = compute(*params, {}, ids_BxL, negative_BxL, noise, keys, None, grid, guidance)
        return {"noise": noise, "latent_mean": latents / scale, "text_states": nnx.merge(text_def, params[2])(ids_BxL)}

    def encode(rows: Sequence[Row]) -> dict[str, jax.Array]:
        missing = batch_size * mesh.size - len(rows)
        texts = [row["text"] for row in rows] + [""] * missing
        index_B = np.array([row["index"] for row in rows] + [0] * missing, np.uint32)
        batch = teacher.tokenize(texts), teacher.tokenize([wanted.negative_prompt] * len(texts)), index_B
        return program(params, *jax.device_put(batch, NamedSharding(mesh, P("images"))))

    return encode


if __name__ == "__main__":
    config_flags.DEFINE_config_file("config", None, "Captions, teacher and config.reflow: a file of configs/.")
    flags.DEFINE_string("model", None, "The teacher: diffusers folder or hub id; config.model if not given.")
    flags.DEFINE_string("lora", None, "A file of adapters that the teacher has; see d2f_jax.evaluate.")
    flags.DEFINE_float("lora_scale", 1.0, "Times the adapters' own scale.")
    flags.DEFINE_enum(
        "convention", None, get_args(Convention), "reference: the teacher is of the paper's published code."
    )
    flags.DEFINE_string("out", None, "Folder to fill; an earlier start of the same command goes on.")
    flags.DEFINE_integer("shard_size", 1024, "Pairs in a file.")
    flags.DEFINE_integer("batch_size", 8, "Pairs that each device works on at once.")
    program.run(main)
