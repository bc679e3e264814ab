"""Text to images with a checkpoint, finetuned as a flow or not."""

import dataclasses
import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from transformers import CLIPTokenizer

from d2f_jax import alignment, lora, lora_files, sampling, sharding, weights
from d2f_jax.alignment import Convention
from d2f_jax.errors import InputError
from d2f_jax.models.clip import CLIPTextModel
from d2f_jax.models.unet import UNet2DConditionModel
from d2f_jax.models.vae import AutoencoderKL
from d2f_jax.schedule import NoiseSchedule

Sampler = Literal["flow", "ddim", "ddim_on_flow_grid"]


@dataclasses.dataclass(frozen=True)
class Pipeline:
    """A checkpoint in memory; calling it samples. With a `mesh` (see `on_mesh`) every device takes its share."""

    unet: UNet2DConditionModel
    vae: AutoencoderKL
    text_encoder: CLIPTextModel
    tokenizer: CLIPTokenizer
    schedule: NoiseSchedule
    scheduler_config: dict[str, Any]
    convention: Convention = "exact"
    mesh: Mesh | None = None
    _programs: dict[Any, Callable[..., jax.Array]] = dataclasses.field(default_factory=dict, repr=False)

    @classmethod
    def from_pretrained(
        cls,
        path_or_hub_id: str | Path,
        *,
        variant: str | None = None,
        revision: str | None = None,
        dtype: jax.typing.DTypeLike = jnp.float32,
        convention: Convention = "exact",
    ) -> "Pipeline":
        """Loads a diffusers folder or hub id; `dtype` is what the networks compute in, parameters stay float32.

        `convention="reference"` is for checkpoints finetuned with the paper's published code. Raises InputError for
        whatever is missing, damaged or does not belong together.
        """
        options = {"variant": variant, "revision": revision, "dtype": dtype}
        scheduler_config = weights.load_scheduler_config(path_or_hub_id, revision=revision)
        unet = weights.load_unet(path_or_hub_id, **options)
        vae = weights.load_vae(path_or_hub_id, **options)
        text_encoder = weights.load_text_encoder(path_or_hub_id, **options)
        tokenizer = weights.load_tokenizer(path_or_hub_id, revision=revision)
        for what, takes, given, gives in (
            ("channels", unet.config.in_channels, "VAE", vae.config.latent_channels),
            ("text features", unet.config.cross_attention_dim, "text encoder", text_encoder.config.hidden_size),
        ):
            if takes != gives:
                raise InputError(
                    f"{path_or_hub_id}: the UNet takes {takes} {what}, the {given} makes {gives}; "
                    "give a text-to-image model whose parts belong together"
                )
        if tokenizer.model_max_length > (length := text_encoder.config.max_position_embeddings):
            raise InputError(
                f"{path_or_hub_id}: the tokenizer makes {tokenizer.model_max_length} tokens, the text encoder takes "
                f"{length}; set model_max_length={length} in tokenizer/tokenizer_config.json"
            )
        return cls(
            unet=unet,
            vae=vae,
            text_encoder=text_encoder,
            tokenizer=tokenizer,
            schedule=NoiseSchedule.from_config(scheduler_config),
            scheduler_config=scheduler_config,
            convention=convention,
        )

    def on_mesh(self, mesh: Mesh) -> "Pipeline":
        """The same pipeline with its parameters kept as `sharding.kept` has it, and images split over all devices.

        With several processes each of them calls it, and the pipeline, alike; all of them get all images.
        """
        networks = {}
        for name in ("unet", "vae", "text_encoder"):
            graphdef, params = nnx.split(getattr(self, name))
            networks[name] = nnx.merge(graphdef, sharding.put(params, sharding.kept(mesh, params)))
        return dataclasses.replace(self, **networks, mesh=mesh, _programs={})

    def with_lora(self, file: str | Path, *, scale: float = 1.0) -> "Pipeline":
        """The same pipeline with adapters in its UNet, at `scale` times their own; a run's, PEFT's or kohya's file.

        What was trained fully replaces the base at any scale. Raises InputError for a file that does not fit the UNet.
        """
        graphdef, params = nnx.split(self.unet)
        loaded = lora_files.load(file, params)
        unet = nnx.merge(graphdef, lora.merge(params, loaded.trained, scale=scale * loaded.scale))
        return dataclasses.replace(self, unet=unet)

    def save_pretrained(self, folder: str | Path) -> None:
        """Writes a diffusers folder that diffusers' StableDiffusionPipeline loads.

        The scheduler becomes an EulerDiscreteScheduler with the same noise schedule: on
        `sampling.diffusers_sigmas(grid)` its steps are this pipeline's flow steps (of the exact convention). Replaces
        an earlier pipeline there; raises InputError for a folder that holds anything else.
        """
        folder = Path(folder).absolute()
        foreign = folder.is_file() or (folder.is_dir() and any(folder.iterdir()))
        if foreign and not (folder / "model_index.json").is_file():
            raise InputError(f"{folder} is there and holds no pipeline that could be replaced; give another folder")
        part = folder.with_name(folder.name + ".part")
        shutil.rmtree(part, ignore_errors=True)
        weights.save_pretrained(self.unet, part / "unet")
        weights.save_pretrained(self.vae, part / "vae")
        weights.save_pretrained(self.text_encoder, part / "text_encoder")
        self.tokenizer.save_pretrained(part / "tokenizer")
        for name, content in (
            ("scheduler/scheduler_config.json", euler_config(self.scheduler_config)),
            ("model_index.json", _MODEL_INDEX),
        ):
            (part / name).parent.mkdir(exist_ok=True)
            (part / name).write_text(json.dumps(content, indent=2) + "\n")
        # Whole or not at all: an earlier export stays until this one is complete.
        shutil.rmtree(folder, ignore_errors=True)
        part.rename(folder)

    @property
    def tokenize(self) -> weights.Tokenize:
        """`tokenize(texts)` is int32 [B, L], padded and cut to the model's length."""
        return weights.Tokenize(self.tokenizer)

    def noise(self, seed: int, count: int, height: int | None = None, width: int | None = None) -> jax.Array:
        """float32 [B, H, W, C] latent noise; image i of a seed is the same in every batch.

        Raises InputError for a height or width (pixels) that the VAE's downsampling does not divide.
        """
        factor = self.vae.config.downsampling
        if (height is None or width is None) and self.unet.config.sample_size is None:
            raise InputError("the UNet's config.json gives no sample_size; give height and width")
        side = (self.unet.config.sample_size or 1) * factor
        for name, pixels in (("height", height), ("width", width)):
            if pixels is not None and (pixels < factor or pixels % factor):
                raise InputError(f"{name}={pixels} is not a multiple of {factor} pixels, the VAE's downsampling")
        shape = ((height or side) // factor, (width or side) // factor, self.unet.config.in_channels)
        keys = jax.vmap(lambda i: jax.random.fold_in(jax.random.key(seed), i))(jnp.arange(count))
        return jax.vmap(lambda key: jax.random.normal(key, shape))(keys)

    def __call__(
        self,
        prompt: str | Sequence[str],
        *,
        num_steps: int = 4,
        guidance_scale: float = 7.5,
        negative_prompt: str = "",
        seed: int = 0,
        height: int | None = None,
        width: int | None = None,
        noise: jax.Array | None = None,
        sampler: Sampler = "flow",
    ) -> np.ndarray:
        """Images uint8 [B, H, W, 3] for one or many prompts.

        `sampler="flow"` takes Euler steps on a uniform flow-time grid. `sampler="ddim"` is deterministic DDIM on the
        checkpoint's own timesteps, for a diffusion model as it came; `"ddim_on_flow_grid"` is the same at the timesteps
        of the flow grid, which gives the pictures of `"flow"`. `noise` [B, H, W, C] replaces the seed's.
        `guidance_scale=1` samples without guidance at half the cost. One program is compiled for each batch shape and
        serves every number of steps up to 64.
        """
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        if not prompts:
            raise InputError("there is no prompt; give one or more")
        if not isinstance(num_steps, int) or num_steps < 1:
            raise InputError(f"num_steps={num_steps}: give a whole number, 1 or more")
        if sampler not in get_args(Sampler):
            raise InputError(f"sampler={sampler!r} is not one of {', '.join(get_args(Sampler))}")
        if noise is None:
            noise = self.noise(seed, len(prompts), height, width)
        if len(noise) != len(prompts):
            raise InputError(f"there are {len(prompts)} prompts, but noise for {len(noise)}; give one for each")
        guided = guidance_scale != 1
        if (sampler, guided) not in self._programs:
            self._programs[sampler, guided] = make_program(self, sampler, guided)
        rows = self.tokenize(prompts), np.asarray(noise)
        if self.mesh is not None:  # filled up to the same number for every device
            extra = -len(prompts) % self.mesh.size
            rows = tuple(np.concatenate([x, np.repeat(x[-1:], extra, axis=0)]) for x in rows)
            rows = sharding.put(rows, (sharding.batch_split(self.mesh),) * 2)
        images = self._programs[sampler, guided](
            nnx.state(self.unet),
            nnx.state(self.vae),
            nnx.state(self.text_encoder),
            rows[0],
            self.tokenize([negative_prompt]),
            rows[1],
            step_grid(self, sampler, num_steps),
            np.float32(guidance_scale),
        )
        return np.asarray(images)[: len(prompts)]


def euler_config(scheduler_config: dict[str, Any]) -> dict[str, Any]:
    """The same noise schedule for diffusers' EulerDiscreteScheduler."""
    kept = "num_train_timesteps beta_start beta_end beta_schedule trained_betas prediction_type rescale_betas_zero_snr"
    config = {key: scheduler_config[key] for key in kept.split() if key in scheduler_config}
    return {"_class_name": "EulerDiscreteScheduler", **config, "timestep_spacing": "leading", "steps_offset": 1}


def step_grid(pipeline: Pipeline, sampler: Sampler, num_steps: int) -> np.ndarray:
    """What a program walks along: flow times, or DDIM's timesteps; padded so that one program serves many lengths."""
    length = max(64, 1 << (num_steps - 1).bit_length())
    grid = sampling.flow_grid(pipeline.schedule, num_steps)
    if sampler == "flow":
        return sampling.pad_grid(grid, length + 1)
    if sampler == "ddim_on_flow_grid":
        return sampling.pad_timesteps(np.asarray(alignment.diffusion_timestep(pipeline.schedule, grid[:-1])), length)
    config = pipeline.scheduler_config
    timesteps = sampling.ddim_timesteps(
        pipeline.schedule.num_train_timesteps,
        num_steps,
        config.get("timestep_spacing", "leading"),
        config.get("steps_offset", 0),
    )
    return sampling.pad_timesteps(timesteps, length)


def make_program(pipeline: Pipeline, sampler: Sampler, guided: bool) -> Callable[..., jax.Array]:
    """The jitted sampler: parameters, token ids, noise and grid in, uint8 images out."""
    schedule, convention, latent_scale = pipeline.schedule, pipeline.convention, pipeline.vae.config.scaling_factor
    unet_def, vae_def, text_def = map(nnx.graphdef, (pipeline.unet, pipeline.vae, pipeline.text_encoder))
    # DDIM's last step goes to no noise at all or, as Stable Diffusion's configs ask, to the first timestep's.
    to_data = sampler != "ddim" or pipeline.scheduler_config.get("set_alpha_to_one", True)
    final = 1.0 if to_data else schedule.alphas_cumprod[0]

    def program(unet_state, vae_state, text_state, ids_BxL, negative_1xL, noise, grid, guidance_scale):
        unet, vae = nnx.merge(unet_def, unet_state), nnx.merge(vae_def, vae_state)
        encode = nnx.merge(text_def, text_state)
        text_BxLxD = encode(ids_BxL)
        if guided:
            negative = jnp.broadcast_to(encode(negative_1xL), text_BxLxD.shape)
            text_BxLxD = jnp.concatenate([negative, text_BxLxD])

        def predict(dm_x: jax.Array, tau: jax.Array) -> jax.Array:
            tau_B = jnp.broadcast_to(tau, dm_x.shape[:1])
            if not guided:
                return unet(dm_x, tau_B, text_BxLxD)
            both = unet(jnp.concatenate([dm_x, dm_x]), jnp.concatenate([tau_B, tau_B]), text_BxLxD)
            without, with_text = jnp.split(both.astype(jnp.float32), 2)
            return without + guidance_scale * (with_text - without)

        def velocity(fm_x: jax.Array, t: jax.Array) -> jax.Array:
            dm_x = alignment.to_diffusion(schedule, fm_x, t, convention=convention)
            prediction = predict(dm_x, alignment.diffusion_timestep(schedule, t, convention=convention))
            return alignment.velocity(schedule, prediction, fm_x, t, convention=convention)

        if sampler == "flow":
            latents = sampling.euler(velocity, sampling.initial_state(noise, grid), grid)
        else:
            latents = sampling.ddim(schedule, predict, noise, grid, final)
        images = vae.decode(latents / latent_scale).astype(jnp.float32)
        return jnp.round(jnp.clip(images / 2 + 0.5, 0, 1) * 255).astype(jnp.uint8)

    # Gathered on every device, so that every process has all images.
    return jax.jit(program, out_shardings=None if pipeline.mesh is None else sharding.replicated(pipeline.mesh))


_MODEL_INDEX = {
    "_class_name": "StableDiffusionPipeline",
    "feature_extractor": [None, None],
    "image_encoder": [None, None],
    "requires_safety_checker": False,
    "safety_checker": [None, None],
    "scheduler": ["diffusers", "EulerDiscreteScheduler"],
    "text_encoder": ["transformers", "CLIPTextModel"],
    "tokenizer": ["transformers", "CLIPTokenizer"],
    "unet": ["diffusers", "UNet2DConditionModel"],
    "vae": ["diffusers", "AutoencoderKL"],
}
