"""The checkpoint that a run begins with: loaded, taken apart, spread over the mesh, put together again."""

import dataclasses
import functools
from typing import Any

import jax
import optax
from flax import nnx
from jax.sharding import Mesh

from d2f_jax import lora, sharding
from d2f_jax import step as steps
from d2f_jax.alignment import Alignment, Convention
from d2f_jax.errors import InputError
from d2f_jax.models.unet import Remat
from d2f_jax.pipeline import Pipeline
from d2f_jax.program import Config
from d2f_jax.settings import check_task, eval_sampler, make_objective, make_task


def load(config: Config) -> Pipeline:
    """Made to learn the config's task, and to flow by its objective, whatever the checkpoint itself records.

    Raises InputError for a model that cannot be loaded, or cannot learn that.
    """
    return scheduled(_read(config, make_objective(config).alignment), config).for_task(make_task(config))


def load_as_it_is(
    config: Config,
    *,
    adapters: str | None = None,
    lora_scale: float = 1.0,
    convention: Convention | None = None,
) -> Pipeline:
    """To be looked at, not trained: task and flow are what the checkpoint, or a file of `adapters`, records of itself.

    `config.objective` and `config.zero_terminal_snr` have no part in it. What records no alignment, as no diffusion
    model does, is aligned exactly; `convention` comes before what is recorded. Raises InputError for a model or file
    that cannot be loaded, and where `config.task` asks for another task.
    """
    pipeline = _read(config)
    if adapters is not None:
        pipeline = pipeline.with_lora(adapters, scale=lora_scale)
    if convention is not None:
        pipeline = pipeline.by_convention(convention)
    check_task(config, pipeline.task)
    return pipeline


def scheduled(pipeline: Pipeline, config: Config) -> Pipeline:
    """The pipeline with a schedule that ends in pure noise, if the config wants it.

    Raises InputError for an epsilon model.
    """
    return pipeline.ending_in_noise("config.zero_terminal_snr=True") if config.zero_terminal_snr else pipeline


def check_steps(pipeline: Pipeline, config: Config) -> None:
    """Raises InputError for a number of `config.eval.step_counts` that its sampler cannot take with this model."""
    sampler, counts = eval_sampler(config), config.eval.step_counts
    if sampler.is_adaptive and len(counts) > 1:
        raise InputError(
            f"config.eval.step_counts={counts}: {sampler.name} takes as many steps as its tolerances ask for, each "
            "time; give one number, as (1,)"
        )
    if max(counts) > (most := pipeline.schedule.num_train_timesteps):
        raise InputError(f"config.eval.step_counts={counts}: the model has {most} timesteps; give fewer")
    for count in counts:
        try:
            pipeline.grid(sampler, count)
        except InputError as error:
            raise InputError(f"config.eval.step_counts={counts}: {error}") from error


def split(prior: Pipeline, config: Config) -> tuple[steps.Networks, steps.Frozen, Any]:
    """The networks' structure, the parameters that stay, and those that are trained."""
    states = (nnx.state(network) for network in (prior.unet, prior.vae, prior.text_encoder))
    return networks(prior, config.remat), *parameters(config, prior.vae.config.latent_channels, *states)


def parameters(
    config: Config, latent_channels: int, unet: nnx.State, vae: nnx.State, text_encoder: nnx.State
) -> tuple[steps.Frozen, Any]:
    """Those that stay, and those that are trained."""
    if not config.lora.enabled:
        return steps.Frozen(None, vae, text_encoder), unet
    trained = lora.init(unet, jax.random.key(config.seed), lora_targets(config, latent_channels))
    return steps.Frozen(unet, vae, text_encoder), trained


def step_options(config: Config, pipeline: Pipeline) -> steps.StepOptions:
    return steps.StepOptions(
        latent_scale=pipeline.vae.config.scaling_factor,
        lora_scale=config.lora.scale,
        objective=make_objective(config),
        task=pipeline.task,
        compute_dtype=config.compute_dtype,
        ema_decay=config.train.ema_decay,
        ema_start=config.train.ema_start,
        accumulate=config.train.accumulate,
        latents=config.data.latents,
    )


def lora_targets(config: Config, condition_channels: int) -> lora.Targets:
    """Adapters that see the picture are given its latent, of so many channels."""
    given = {name: config.lora[name] for name in config.lora if name not in ("enabled", "scale")}
    return lora.Targets(**given, condition_channels=condition_channels if config.task.adapters else 0)


def networks(prior: Pipeline, remat: Remat) -> steps.Networks:
    prior.unet.set_remat(remat)
    return steps.Networks(*(nnx.graphdef(network) for network in (prior.unet, prior.vae, prior.text_encoder)))


def place(
    mesh: Mesh,
    trained: Any,
    frozen: steps.Frozen,
    optimizer: optax.GradientTransformation,
    root_key: jax.Array,
    *,
    average: bool = True,
) -> tuple[steps.TrainState, steps.Frozen]:
    """The first state, and what stays, each device with its part of them."""
    trained, frozen = sharding.put((trained, frozen), sharding.kept(mesh, (trained, frozen)))
    init = functools.partial(steps.init_state, optimizer=optimizer, average=average)
    shardings = sharding.kept(mesh, jax.eval_shape(init, trained, root_key=root_key))
    return jax.jit(init, out_shardings=shardings)(trained, root_key=root_key), frozen


def hollow(pipeline: Pipeline) -> Pipeline:
    """The pipeline with shapes in place of parameters, so that it holds no memory."""

    def emptied(network: nnx.Module) -> Any:
        graphdef, params = nnx.split(network)
        return nnx.merge(graphdef, jax.eval_shape(lambda: params))

    networks = {name: emptied(getattr(pipeline, name)) for name in ("unet", "vae", "text_encoder")}
    return dataclasses.replace(pipeline, **networks)


def filled(pipeline: Pipeline, unet: steps.UNetParams, frozen: steps.Frozen, image_shape: tuple[int, int]) -> Pipeline:
    """A hollow pipeline with parameters in it again, the UNet's trained at `image_shape`; compiled programs stay."""
    params = {"unet": unet.merged, "vae": frozen.vae, "text_encoder": frozen.text_encoder}
    networks = {name: nnx.merge(nnx.graphdef(getattr(pipeline, name)), state) for name, state in params.items()}
    height, width = (side // pipeline.vae.config.downsampling for side in image_shape)
    sample_size = height if height == width else (height, width)
    networks["unet"].config = dataclasses.replace(networks["unet"].config, sample_size=sample_size)
    return dataclasses.replace(pipeline, **networks, adapters=unet.adapters)


def _read(config: Config, alignment: Alignment | None = None) -> Pipeline:
    variant = config.variant or None
    return Pipeline.from_pretrained(config.model, variant=variant, dtype=config.compute_dtype, alignment=alignment)
