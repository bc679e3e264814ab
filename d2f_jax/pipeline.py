"""Text to images with a checkpoint, finetuned as a flow or not."""

import dataclasses
import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from transformers import CLIPTokenizer

from d2f_jax import lora, lora_files, sampling, sharding, weights
from d2f_jax.alignment import ALIGNED, Alignment
from d2f_jax.errors import InputError
from d2f_jax.models.clip import CLIPTextModel
from d2f_jax.models.unet import UNet2DConditionModel
from d2f_jax.models.vae import AutoencoderKL
from d2f_jax.sampler import Sampler, SamplerName
from d2f_jax.schedule import NoiseSchedule

Direction = Literal["sample", "invert"]
STEPS = 2**31


@dataclasses.dataclass(frozen=True)
class Pipeline:
    """A checkpoint in memory; calling it samples. With a `mesh` (see `on_mesh`) every device takes its share."""

    unet: UNet2DConditionModel
    vae: AutoencoderKL
    text_encoder: CLIPTextModel
    tokenizer: CLIPTokenizer
    schedule: NoiseSchedule
    scheduler_config: dict[str, Any]
    alignment: Alignment = ALIGNED
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
        alignment: Alignment | None = None,
    ) -> "Pipeline":
        """Loads a diffusers folder or hub id; `dtype` is what the networks compute in, parameters stay float32.

        `alignment` says what the flow takes over from the diffusion model: all of it, exactly, unless our own export
        says otherwise; `Alignment(convention="reference")` is for checkpoints finetuned with the paper's published
        code. Raises InputError for whatever is missing, damaged or does not belong together.
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
            alignment=recorded_alignment(scheduler_config) if alignment is None else alignment,
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
        `sampling.diffusers_sigmas(grid)` its steps are this pipeline's Euler steps (if exactly aligned). Replaces an
        earlier pipeline there; raises InputError for a folder that holds anything else.
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
            ("scheduler/scheduler_config.json", euler_config(self.scheduler_config, self.alignment)),
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

    def noise(
        self, seed: int, count: int, height: int | None = None, width: int | None = None, *, first: int = 0
    ) -> jax.Array:
        """float32 [B, H, W, C] latent noise of images `first`, `first + 1`, ...; each is the same in every batch.

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
        return jax.vmap(lambda key: jax.random.normal(key, shape))(random_keys(seed, first, count))

    def __call__(
        self,
        prompt: str | Sequence[str],
        *,
        num_steps: int = 4,
        guidance_scale: float = 7.5,
        guidance_rescale: float = 0.0,
        negative_prompt: str | Sequence[str] = "",
        seed: int = 0,
        first: int = 0,
        height: int | None = None,
        width: int | None = None,
        noise: jax.Array | None = None,
        sampler: SamplerName | Sampler = "euler",
    ) -> np.ndarray:
        """Images uint8 [B, H, W, 3] for one or many prompts.

        They are the images `first`, `first + 1`, ... of a seed; `noise` [B, H, W, C] replaces what it would start from.
        `guidance_scale=1` samples without guidance at half the cost; `negative_prompt` is one for all or one for each.
        One program is compiled for each batch shape and serves every number of steps up to 64.
        """
        how = _sampler(sampler)
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        if not prompts:
            raise InputError("there is no prompt; give one or more")
        if noise is None:
            noise = self.noise(seed, len(prompts), height, width, first=first)
        keys = jax.random.key_data(random_keys(seed, first + STEPS, len(prompts)))
        guidance = (guidance_scale, guidance_rescale)
        return self._run(how, "sample", prompts, negative_prompt, noise, keys, num_steps, guidance)

    def invert(
        self,
        images: np.ndarray,
        prompt: str | Sequence[str],
        *,
        num_steps: int = 50,
        guidance_scale: float = 1.0,
        negative_prompt: str | Sequence[str] = "",
        sampler: SamplerName | Sampler = "euler",
    ) -> np.ndarray:
        """The noise [B, H, W, C] from which the flow makes uint8 `images` [B, H, W, 3]: the way back in as many steps.

        Only as exact as the solver, and as the VAE is in decoding what it encodes. Raises InputError for a sampler that
        is not the flow's.
        """
        how = _sampler(sampler)
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        keys = np.zeros((len(prompts), 2), np.uint32)
        return self._run(how, "invert", prompts, negative_prompt, images, keys, num_steps, (guidance_scale, 0.0))

    def _run(
        self,
        how: Sampler,
        direction: Direction,
        prompts: list[str],
        negative_prompt: str | Sequence[str],
        start: Any,
        keys: Any,
        num_steps: int,
        guidance: tuple[float, float],
    ) -> np.ndarray:
        count = len(prompts)
        negatives = [negative_prompt] * count if isinstance(negative_prompt, str) else list(negative_prompt)
        if not isinstance(num_steps, int) or num_steps < 1:
            raise InputError(f"num_steps={num_steps}: give a whole number, 1 or more")
        for what, there in (("noise or images", len(start)), ("negative prompts", len(negatives))):
            if there != count:
                raise InputError(f"there are {count} prompts, but {there} {what}; give one for each")
        guided = guidance[0] != 1
        kind = (how.compiled_for, direction, guided)
        if kind not in self._programs:
            self._programs[kind] = make_program(self, *kind)
        rows = [self.tokenize(prompts), self.tokenize(negatives), np.asarray(start), np.asarray(keys)]
        if self.mesh is not None:  # filled up to the same number for every device
            extra = -count % self.mesh.size
            rows = [np.concatenate([x, np.repeat(x[-1:], extra, axis=0)]) for x in rows]
            rows = sharding.put(rows, [sharding.batch_split(self.mesh)] * len(rows))
        grid = how.grid(self.schedule, self.alignment, self.scheduler_config, num_steps)
        networks = (nnx.state(network) for network in (self.unet, self.vae, self.text_encoder))
        return np.asarray(self._programs[kind](*networks, *rows, grid, np.array(guidance, np.float32)))[:count]


def random_keys(seed: int, first: int, count: int) -> jax.Array:
    """A random key for each of `count` images: for its noise, or with `first + STEPS` for a sampler's random steps."""
    return jax.vmap(lambda i: jax.random.fold_in(jax.random.key(seed), i))(
        np.uint32(first) + jnp.arange(count, dtype=np.uint32)
    )


def _sampler(given: SamplerName | Sampler) -> Sampler:
    return given if isinstance(given, Sampler) else Sampler(given)


def euler_config(scheduler_config: dict[str, Any], alignment: Alignment) -> dict[str, Any]:
    """The same noise schedule for diffusers' EulerDiscreteScheduler.

    An alignment that is not Diff2Flow's own is written beside it, where `from_pretrained` finds it again.
    """
    kept = "num_train_timesteps beta_start beta_end beta_schedule trained_betas prediction_type rescale_betas_zero_snr"
    config = {key: scheduler_config[key] for key in kept.split() if key in scheduler_config}
    config |= {"_class_name": "EulerDiscreteScheduler", "timestep_spacing": "leading", "steps_offset": 1}
    return config if alignment == ALIGNED else config | {_ALIGNMENT: dataclasses.asdict(alignment)}


def recorded_alignment(scheduler_config: dict[str, Any]) -> Alignment:
    """What an export says of its alignment; other checkpoints say nothing, and are aligned."""
    try:
        return Alignment(**scheduler_config.get(_ALIGNMENT, {}))
    except TypeError as error:
        raise InputError(f"scheduler_config.json: {_ALIGNMENT} cannot be read ({error}); export it again") from error


def make_program(pipeline: Pipeline, how: Sampler, direction: Direction, guided: bool) -> Callable[..., jax.Array]:
    """`make_latents` jitted, with latents decoded to uint8 images."""
    compute, latent_scale = make_latents(pipeline, how, direction, guided), pipeline.vae.config.scaling_factor
    vae_def = nnx.graphdef(pipeline.vae)

    def program(unet_state, vae_state, *rest):
        latents = compute(unet_state, vae_state, *rest)
        if direction == "invert":
            return latents
        images = nnx.merge(vae_def, vae_state).decode(latents / latent_scale).astype(jnp.float32)
        return jnp.round(jnp.clip(images / 2 + 0.5, 0, 1) * 255).astype(jnp.uint8)

    # Gathered on every device, so that every process has all images.
    return jax.jit(program, out_shardings=None if pipeline.mesh is None else sharding.replicated(pipeline.mesh))


def make_latents(pipeline: Pipeline, how: Sampler, direction: Direction, guided: bool) -> Callable[..., jax.Array]:
    """Parameters, token ids, noise, keys, grid and guidance to latents as the UNet sees them; "invert" images to noise.

    `(unet, vae, text_encoder, ids_BxL, negative_BxL, start, keys_Bx2, grid, (scale, rescale))`; parameters are states.
    """
    schedule, alignment, latent_scale = pipeline.schedule, pipeline.alignment, pipeline.vae.config.scaling_factor
    set_alpha_to_one = pipeline.scheduler_config.get("set_alpha_to_one", True)
    unet_def, vae_def, text_def = map(nnx.graphdef, (pipeline.unet, pipeline.vae, pipeline.text_encoder))

    def latents(unet_state, vae_state, text_state, ids_BxL, negative_BxL, start, keys, grid, guidance):
        unet, encode = nnx.merge(unet_def, unet_state), nnx.merge(text_def, text_state)
        text_BxLxD = encode(jnp.concatenate([negative_BxL, ids_BxL]) if guided else ids_BxL)

        def predict(dm_x: jax.Array, tau: jax.Array) -> jax.Array:
            tau_B = jnp.broadcast_to(tau, dm_x.shape[:1])
            if not guided:
                return unet(dm_x, tau_B, text_BxLxD)
            both = unet(jnp.concatenate([dm_x, dm_x]), jnp.concatenate([tau_B, tau_B]), text_BxLxD)
            return sampling.guided(*jnp.split(both, 2), scale=guidance[0], rescale=guidance[1])

        if direction == "invert":
            data = nnx.merge(vae_def, vae_state).encode(start.astype(jnp.float32) / 127.5 - 1).mean * latent_scale
            return how.invert(schedule, alignment, predict, data, grid)
        keys_B = jax.random.wrap_key_data(keys)
        return how.sample(schedule, alignment, predict, start, grid, set_alpha_to_one=set_alpha_to_one, keys_B=keys_B)

    return latents


_ALIGNMENT = "_d2f_jax_alignment"  # diffusers skips keys that begin so
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
