"""A run without weights and data: shapes alone, for a program that is compiled and never run."""

import dataclasses
import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

from d2f_jax import optim, prior, settings, sharding, weights
from d2f_jax import step as steps
from d2f_jax.data.open import open_source
from d2f_jax.errors import InputError
from d2f_jax.models.clip import CLIPTextConfig, CLIPTextModel
from d2f_jax.models.unet import UNet2DConditionModel, UNetConfig
from d2f_jax.models.vae import AutoencoderKL, VAEConfig
from d2f_jax.pipeline import Pipeline, make_program
from d2f_jax.program import Config
from d2f_jax.schedule import NoiseSchedule

KNOWN_MODELS = Path(__file__).parent / "assets" / "known_models.json"
"""What the config files of well-known hub ids say, so that they need not be fetched."""

_PICTURES = ("image", "input_ids")
_PREPARED = ("latent_mean", "latent_std", "text_states")
_USUAL = {"shapes_world": _PICTURES, "image_folder": _PICTURES, "tfds": _PICTURES, "webdataset": _PICTURES}
_USUAL |= {"array_record": _PREPARED}


@dataclasses.dataclass(frozen=True)
class Blueprint:
    """Shapes of a checkpoint, and what a batch holds; `told` says where both are known from."""

    pipeline: Pipeline
    batch: tuple[str, ...]
    told: dict[str, str]


def load(config: Config) -> Blueprint:
    """Raises InputError for a model or a source that is not known, and for parts that do not belong together."""
    configs, where = model_configs(config.model)
    batch, source = batch_arrays(config.data.sources[0])
    return Blueprint(make_pipeline(config, configs), batch, {"model": where, "data": source})


def model_configs(model: str) -> tuple[dict[str, dict[str, Any]], str]:
    """The config files of a model's parts, by the part's name, and where they are from; weights are not fetched."""
    known = json.loads(KNOWN_MODELS.read_text())
    if model in known and not Path(model).is_dir():
        return known[model], f"{model}, its config files as this package knows them"
    found = {part: weights.load_config(model, part) for part in ("unet", "vae", "text_encoder")}
    return found | {"scheduler": weights.load_scheduler_config(model)}, f"{model}, its config files"


def make_pipeline(config: Config, configs: dict[str, dict[str, Any]]) -> Pipeline:
    """With shapes in place of parameters, and without a tokenizer: nothing can be drawn with it."""

    def build(network: Callable[..., Any], part_config: Any) -> Any:
        return nnx.eval_shape(lambda: network(part_config, dtype=jnp.dtype(config.compute_dtype), rngs=nnx.Rngs(0)))

    return Pipeline(
        unet=build(UNet2DConditionModel, UNetConfig.from_dict(configs["unet"])),
        vae=build(AutoencoderKL, VAEConfig.from_dict(configs["vae"])),
        text_encoder=build(CLIPTextModel, CLIPTextConfig.from_dict(configs["text_encoder"])),
        tokenizer=cast(Any, None),
        schedule=NoiseSchedule.from_config(configs["scheduler"]),
        scheduler_config=configs["scheduler"],
        alignment=settings.make_objective(config).alignment,
    )


def batch_arrays(source: str) -> tuple[tuple[str, ...], str]:
    """What a batch of `source` holds: as its first example has it, or as such sources usually do where it is not."""
    kind = source.partition(":")[0]
    if kind == "shapes_world":
        return _USUAL[kind], f"{source}: pictures and captions"
    try:
        example = open_source(source)[0]
    except (InputError, OSError) as error:
        if kind not in _USUAL:
            raise
        arrays, note = _USUAL[kind], f", as is usual: it was not looked into ({error})"
    else:
        arrays, note = tuple(name for name in example if name not in ("text", "depth")), ""
        arrays += () if "text_states" in example else ("input_ids",)
    what = "pictures" if "image" in arrays else "latents"
    text = "captions" if "input_ids" in arrays else "text states"
    return arrays, f"{source}: {what} and {text}{note}"


def lower_train(config: Config, drawn: Blueprint, mesh: Mesh, *, plain: bool = False) -> jax.stages.Lowered:
    """The train step over `mesh`; `plain` without recomputation or loops: its operations are the ones that count."""
    pipeline = drawn.pipeline
    frozen, trained = parameters(config, drawn)
    optimizer = optim.make_optimizer(settings.make_optimizer_options(config))
    state = jax.eval_shape(functools.partial(steps.init_state, optimizer=optimizer), trained, root_key=_key())
    networks = prior.networks(pipeline, "none" if plain else config.remat)
    options = prior.step_options(config, pipeline)
    options = dataclasses.replace(options, accumulate=1) if plain else options
    step = steps.make_train_step(networks, pipeline.schedule, optimizer, options, mesh)
    batch = train_batch(config, drawn)
    return step.lower(_kept(mesh, state), _kept(mesh, frozen), _split(mesh, batch))  # pyright: ignore


def parameters(config: Config, drawn: Blueprint) -> tuple[steps.Frozen, Any]:
    """Those that stay and those that are trained."""
    pipeline = drawn.pipeline
    states = (nnx.state(network) for network in (pipeline.unet, pipeline.vae, pipeline.text_encoder))
    return jax.eval_shape(functools.partial(prior.parameters, config), *states)


def train_batch(config: Config, drawn: Blueprint) -> dict[str, jax.ShapeDtypeStruct]:
    count, pixels = config.train.batch_size, config.data.image_size
    latent = jax.eval_shape(lambda: drawn.pipeline.noise(0, count, pixels, pixels)).shape
    text = drawn.pipeline.text_encoder.config
    shapes = {
        "image": ((count, pixels, pixels, 3), jnp.uint8),
        "latent_mean": (latent, jnp.float16),
        "latent_std": (latent, jnp.float16),
        "noise": (latent, jnp.float32),
        "input_ids": ((count, text.max_position_embeddings), jnp.int32),
        "text_states": ((count, text.max_position_embeddings, text.hidden_size), jnp.float16),
        "weight": ((count,), jnp.float32),
    }
    return {name: jax.ShapeDtypeStruct(*shapes[name]) for name in (*drawn.batch, "weight")}


def lower_sampler(config: Config, drawn: Blueprint, mesh: Mesh, num_steps: int) -> jax.stages.Lowered:
    """What draws `config.eval.batch_size` pictures, as `Pipeline` runs it on a mesh."""
    pipeline = dataclasses.replace(drawn.pipeline, mesh=mesh)
    sampler, pixels = settings.eval_sampler(config), config.data.image_size
    count = rows_drawn(config, mesh)
    ids = jax.ShapeDtypeStruct((count, pipeline.text_encoder.config.max_position_embeddings), jnp.int32)
    noise = jax.eval_shape(lambda: pipeline.noise(0, count, pixels, pixels))
    keys = jax.ShapeDtypeStruct((count, 2), jnp.uint32)
    grid = sampler.grid(pipeline.schedule, pipeline.alignment, pipeline.scheduler_config, num_steps)
    guided = config.eval.guidance_scale != 1
    networks = (nnx.state(network) for network in (pipeline.unet, pipeline.vae, pipeline.text_encoder))
    rows = _split(mesh, (ids, ids, noise, keys))
    program = make_program(pipeline, sampler.compiled_for, "sample", guided)
    return program.lower(*(_kept(mesh, params) for params in networks), *rows, grid, jnp.zeros(2))  # pyright: ignore


def rows_drawn(config: Config, mesh: Mesh) -> int:
    """`config.eval.batch_size`, filled up to the same number for every device."""
    return config.eval.batch_size + -config.eval.batch_size % mesh.size


def _key() -> Any:
    return jax.eval_shape(lambda: jax.random.key(0))


def _kept(mesh: Mesh, tree: Any) -> Any:
    return _placed(tree, sharding.kept(mesh, tree))


def _split(mesh: Mesh, tree: Any) -> Any:
    return _placed(tree, jax.tree.map(lambda _: sharding.batch_split(mesh), tree))


def _placed(tree: Any, shardings: Any) -> Any:
    return jax.tree.map(lambda x, where: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where), tree, shardings)
