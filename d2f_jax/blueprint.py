"""A run without weights and data: shapes alone, for a program that is compiled and never run."""

import dataclasses
import functools
import json
from pathlib import Path
from typing import Any, cast

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

from d2f_jax import datasets, flops, optim, prior, settings, sharding, weights
from d2f_jax import step as steps
from d2f_jax.data.open import open_source
from d2f_jax.errors import InputError
from d2f_jax.models.clip import CLIPTextConfig, CLIPTextModel
from d2f_jax.models.layers import shapes_of
from d2f_jax.models.unet import Remat, UNet2DConditionModel, UNetConfig
from d2f_jax.pipeline import Pipeline, task_of
from d2f_jax.program import Config
from d2f_jax.programs import make_program
from d2f_jax.schedule import NoiseSchedule

KNOWN_MODELS = Path(__file__).parent / "assets" / "known_models.json"
"""What the config files of well-known hub ids say, so that they need not be fetched."""

# Kinds of sources that usually hold pictures
_PICTURES = ("shapes_world", "image_folder", "tfds", "webdataset", "hypersim", "vkitti2", "depth_list", "coco")


@dataclasses.dataclass(frozen=True)
class Blueprint:
    """Shapes of a checkpoint, and the names of a batch's arrays; `model` and `data` say where both are known from."""

    pipeline: Pipeline
    arrays: tuple[str, ...]
    model: str
    data: str

    @property
    def tokens(self) -> int:
        """In a row: those of texts that are padded; of an empty one that is not there are two."""
        text = self.pipeline.text_encoder.config
        return text.max_position_embeddings if self.pipeline.task.pads else 2


def load(config: Config) -> Blueprint:
    """Raises InputError for a model or a source that is not known, and for parts that do not belong together."""
    configs, model = model_configs(config.model)
    data, arrays = batch_arrays(config)
    return Blueprint(make_pipeline(config, configs), arrays, model, data)


def model_configs(model: str) -> tuple[dict[str, dict[str, Any]], str]:
    """The config files of a model's parts, by the part's name, and where they are from; weights are not fetched."""
    known = json.loads(KNOWN_MODELS.read_text())
    if model in known and not Path(model).is_dir():
        return known[model], f"{model}, its config files as this package knows them"
    found = {part: weights.load_config(model, part) for part in ("unet", "vae", "text_encoder")}
    return found | {"scheduler": weights.load_scheduler_config(model)}, f"{model}, its config files"


def make_pipeline(config: Config, configs: dict[str, dict[str, Any]]) -> Pipeline:
    """With shapes in place of parameters, and without a tokenizer: nothing can be drawn with it."""

    dtype = jnp.dtype(config.compute_dtype)
    unet_config, text_config = UNetConfig.from_dict(configs["unet"]), CLIPTextConfig.from_dict(configs["text_encoder"])
    unet = shapes_of(lambda rngs: UNet2DConditionModel(unet_config, dtype=dtype, rngs=rngs))
    vae = shapes_of(lambda rngs: weights.make_vae(configs["vae"], rngs, dtype=dtype))
    text_encoder = shapes_of(lambda rngs: CLIPTextModel(text_config, dtype=dtype, rngs=rngs))
    pipeline = Pipeline(
        unet=unet,
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=cast(Any, None),
        schedule=NoiseSchedule.from_config(configs["scheduler"]),
        scheduler_config=configs["scheduler"],
        alignment=settings.make_objective(config).alignment,
        task=task_of(config.model, configs["scheduler"], unet, vae, text_encoder),
    )
    wanted = settings.make_task(config)

    def for_task(rngs: nnx.Rngs) -> UNet2DConditionModel:
        unet = UNet2DConditionModel(unet_config, dtype=dtype, rngs=rngs)
        return dataclasses.replace(pipeline, unet=unet).for_task(wanted).unet

    made = dataclasses.replace(pipeline, unet=shapes_of(for_task), task=wanted)
    return prior.scheduled(made, config)


def batch_arrays(config: Config) -> tuple[str, tuple[str, ...]]:
    """What a batch holds, told and named: as the first example of the first source has it, or as is usual for such."""
    source, depth = config.data.sources[0], datasets.of_depth(config)
    kind, note = source.partition(":")[0], ""
    usual = ("latent_mean", "text_states", "picture_mean" if depth else "latent_std")
    names = ("image",) if kind in _PICTURES else usual
    if kind != "shapes_world":
        try:
            names = tuple(open_source(source)[0])
        except (InputError, OSError) as error:
            if kind not in (*_PICTURES, "array_record"):
                raise
            note = f", as is usual: it was not looked into ({error})"
    if "latent_mean" in names:
        arrays = [name for name in ("latent_mean", "latent_std", "picture_mean", "noise") if name in names]
    else:
        arrays = ["image", "depth"] if depth else ["image"]
    arrays += (["valid"] if depth else []) + ["text_states" if "text_states" in names else "input_ids"]
    what = "latents" if "latent_mean" in names else "pictures"
    text = "depth" if depth else "text states" if "text_states" in names else "captions"
    return f"{source}: {what} and {text}{note}", tuple(arrays)


def lower_train(config: Config, drawn: Blueprint, mesh: Mesh) -> jax.stages.Lowered:
    """The train step over `mesh`."""
    step, arguments = train_step(config, drawn, mesh, config.remat, config.train.accumulate)
    return step.lower(*arguments)


def useful_flops(config: Config, drawn: Blueprint) -> int:
    """Of a train step, without recomputation or loops: its operations are the ones that count."""
    step, arguments = train_step(config, drawn, sharding.make_mesh(devices=jax.devices()[:1]), "none", 1)
    return flops.count(step, *arguments)


def train_step(
    config: Config, drawn: Blueprint, mesh: Mesh, remat: Remat, accumulate: int
) -> tuple[Any, tuple[Any, ...]]:
    """Jitted, and the shapes of its arguments."""
    pipeline = drawn.pipeline
    frozen, trained = parameters(config, drawn)
    optimizer = optim.make_optimizer(settings.make_optimizer_options(config))
    started = functools.partial(steps.init_state, optimizer=optimizer, average=config.train.ema_decay > 0)
    state = jax.eval_shape(started, trained, root_key=_key())
    options = dataclasses.replace(prior.step_options(config, pipeline), accumulate=accumulate)
    step = steps.make_train_step(prior.networks(pipeline, remat), pipeline.schedule, optimizer, options, mesh)
    return step, (_kept(mesh, state), _kept(mesh, frozen), _split(mesh, train_batch(config, drawn)))


def parameters(config: Config, drawn: Blueprint) -> tuple[steps.Frozen, Any]:
    """Those that stay and those that are trained."""
    pipeline = drawn.pipeline
    states = (nnx.state(network) for network in (pipeline.unet, pipeline.vae, pipeline.text_encoder))
    made = functools.partial(prior.parameters, config, pipeline.vae.config.latent_channels)
    return jax.eval_shape(made, *states)


def train_batch(config: Config, drawn: Blueprint) -> dict[str, jax.ShapeDtypeStruct]:
    count, size = config.train.batch_size, datasets.image_shape(config)
    latent = jax.eval_shape(lambda: drawn.pipeline.noise(0, count, *size)).shape
    width = drawn.pipeline.text_encoder.config.hidden_size
    shapes = {
        "image": ((count, *size, 3), jnp.uint8),
        "depth": ((count, *size), jnp.float32),
        "valid": (latent[:3] if "latent_mean" in drawn.arrays else (count, *size), jnp.bool_),
        "latent_mean": (latent, jnp.float16),
        "latent_std": (latent, jnp.float16),
        "picture_mean": (latent, jnp.float16),
        "noise": (latent, jnp.float32),
        "input_ids": ((count, drawn.tokens), jnp.int32),
        "text_states": ((count, drawn.tokens, width), jnp.float16),
        "weight": ((count,), jnp.float32),
    }
    return {name: jax.ShapeDtypeStruct(*shapes[name]) for name in (*drawn.arrays, "weight")}


def lower_sampler(config: Config, drawn: Blueprint, mesh: Mesh, num_steps: int) -> jax.stages.Lowered:
    """What draws `rows_drawn` pictures, or estimates depth of as many, as `Pipeline` runs it on a mesh."""
    pipeline, sampler, size = drawn.pipeline, settings.eval_sampler(config), datasets.image_shape(config)
    count, depth = rows_drawn(config, mesh), pipeline.task.of_pictures
    ids = jax.ShapeDtypeStruct((count, drawn.tokens), jnp.int32)
    noise = jax.eval_shape(lambda: pipeline.noise(0, count, *size))
    keys = jax.ShapeDtypeStruct((count, 2), jnp.uint32)
    pictures = jax.ShapeDtypeStruct((count, *size, 3), jnp.uint8) if depth else None
    grid = pipeline.grid(sampler, num_steps)
    guided = config.eval.guidance_scale != 1 and not depth
    program = make_program(pipeline.model, mesh, sampler.compiled_for, "sample", guided)
    frozen, trained = parameters(config, drawn)
    learned = functools.partial(steps.unet_params, lora_scale=config.lora.scale)
    adapters = jax.eval_shape(learned, trained, frozen.unet).adapters
    networks = (nnx.state(network) for network in (pipeline.unet, pipeline.vae, pipeline.text_encoder))
    params = (_kept(mesh, given) for given in (*networks, adapters))
    return program.lower(*params, *_split(mesh, (ids, ids, noise, keys, pictures)), grid, jnp.zeros(2))  # pyright: ignore


def rows_drawn(config: Config, mesh: Mesh) -> int:
    """For `config.eval.batch_size` pictures, filled up to the same number for every device."""
    count = config.eval.batch_size * estimates(config)
    return count + -count % mesh.size


def estimates(config: Config) -> int:
    """How often each picture is drawn: once, but depth for each of the ensemble."""
    return config.eval.depth.ensemble if datasets.of_depth(config) else 1


def _key() -> Any:
    return jax.eval_shape(lambda: jax.random.key(0))


def _kept(mesh: Mesh, tree: Any) -> Any:
    return _placed(tree, sharding.kept(mesh, tree))


def _split(mesh: Mesh, tree: Any) -> Any:
    return _placed(tree, jax.tree.map(lambda _: sharding.batch_split(mesh), tree))


def _placed(tree: Any, shardings: Any) -> Any:
    return jax.tree.map(lambda x, where: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where), tree, shardings)
