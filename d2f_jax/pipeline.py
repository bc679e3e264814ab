"""Text to images, or images to depth, with a checkpoint, finetuned as a flow or not."""

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from d2f_jax import ensemble as ensembles
from d2f_jax import export, lora, lora_files, sharding, task, weights
from d2f_jax.alignment import ALIGNED, Alignment, Convention
from d2f_jax.errors import InputError
from d2f_jax.models.clip import CLIPTextModel
from d2f_jax.models.unet import UNet2DConditionModel
from d2f_jax.programs import Direction, Model, make_program
from d2f_jax.resizing import resized, working_size
from d2f_jax.sampler import Sampler, SamplerName
from d2f_jax.schedule import NoiseSchedule
from d2f_jax.task import TEXT_TO_IMAGE, Task

if TYPE_CHECKING:
    from transformers import CLIPTokenizer

STEPS = 2**31


@dataclasses.dataclass(frozen=True)
class Pipeline:
    """A checkpoint in memory; calling it samples, or `depth` does, as its task is.

    `adapters` are those of the UNet's convolutions that depend on the picture. With a `mesh` (see `on_mesh`) every
    device takes its share.
    """

    unet: UNet2DConditionModel
    vae: weights.Autoencoder
    text_encoder: CLIPTextModel
    tokenizer: "CLIPTokenizer"
    schedule: NoiseSchedule
    scheduler_config: dict[str, Any]
    alignment: Alignment = ALIGNED
    task: Task = TEXT_TO_IMAGE
    adapters: dict[str, lora.Adapter] = dataclasses.field(default_factory=dict)
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
        code. A UNet of two latents side by side makes depth, as Marigold's do, at the resolution that they record.
        Raises InputError for whatever is missing, damaged or does not belong together.
        """
        options = {"variant": variant, "revision": revision, "dtype": dtype}
        scheduler_config = weights.load_scheduler_config(path_or_hub_id, revision=revision)
        unet = weights.load_unet(path_or_hub_id, **options)
        vae = weights.load_vae(path_or_hub_id, **options)
        text_encoder = weights.load_text_encoder(path_or_hub_id, **options)
        tokenizer = weights.load_tokenizer(path_or_hub_id, revision=revision)
        recorded = task_of(path_or_hub_id, scheduler_config, unet, vae, text_encoder)
        if recorded.of_pictures and (pixels := export.recorded_resolution(path_or_hub_id, revision)):
            side = max(1, round(pixels / vae.config.downsampling))
            if side != max(unet.config.sample_shape or (0,)):
                unet.config = dataclasses.replace(unet.config, sample_size=side)
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
            alignment=export.recorded_alignment(scheduler_config) if alignment is None else alignment,
            task=recorded,
        )

    def for_task(self, wanted: Task) -> "Pipeline":
        """The same checkpoint, made ready to learn another task: a network for one latent is widened to two.

        Raises InputError where it cannot be.
        """
        has, takes = self.task.inputs, wanted.inputs
        if has > takes:
            raise InputError(
                f"the UNet takes {has} latents side by side, {wanted.name} gives {takes}; give another model"
            )
        unet = self.unet if has == takes else task.widened(self.unet, takes)
        return dataclasses.replace(self, unet=unet, task=wanted, _programs={})

    def by_convention(self, convention: Convention) -> "Pipeline":
        """The same pipeline, aligned as far as it was, by `convention`, whatever the checkpoint or adapters record."""
        how = dataclasses.replace(self.alignment, convention=convention)
        return dataclasses.replace(self, alignment=how, _programs={})

    def ending_in_noise(self, asked_by: str) -> "Pipeline":
        """The same pipeline with its noise schedule rescaled to zero terminal SNR; an export then says so, too.

        Raises InputError, naming who asked for it, for an epsilon model.
        """
        if self.schedule.prediction_type == "epsilon":
            raise InputError(
                f"{asked_by}: the model predicts epsilon, which tells nothing where all is noise; use a v_prediction "
                "model, or a schedule that does not end there"
            )
        scheduler_config = self.scheduler_config | {"rescale_betas_zero_snr": True}
        schedule = NoiseSchedule.from_config(scheduler_config)
        return dataclasses.replace(self, scheduler_config=scheduler_config, schedule=schedule, _programs={})

    @property
    def ends_in_noise(self) -> bool:
        """Whether the noise schedule was rescaled to zero terminal SNR."""
        return bool(self.scheduler_config.get("rescale_betas_zero_snr", False))

    def on_mesh(self, mesh: Mesh) -> "Pipeline":
        """The same pipeline with its parameters kept as `sharding.kept` has it, and images split over all devices.

        With several processes each of them calls it, and the pipeline, alike; all of them get all images.
        """
        networks = {}
        for name in ("unet", "vae", "text_encoder"):
            graphdef, params = nnx.split(getattr(self, name))
            networks[name] = nnx.merge(graphdef, sharding.put(params, sharding.kept(mesh, params)))
        adapters = sharding.put(self.adapters, sharding.kept(mesh, self.adapters))
        return dataclasses.replace(self, **networks, adapters=adapters, mesh=mesh, _programs={})

    def with_lora(self, file: str | Path, *, scale: float = 1.0) -> "Pipeline":
        """The same pipeline with adapters in it, at `scale` times their own; of a run, PEFT, diffusers or kohya.

        In all but a run's the text encoder may have adapters as well as the UNet. What was trained fully replaces the
        base at any scale. A run's files tell the task, the alignment and the noise schedule, too, with which its
        adapters were trained. Raises InputError for a file that does not fit, or has learned what this model cannot do.
        """
        ready = self
        if (learned := lora_files.learned(file)) is not None:
            ready = dataclasses.replace(self.for_task(learned.task), alignment=learned.alignment)
            if learned.zero_terminal_snr:
                ready = ready.ending_in_noise(f"{file} was trained with zero terminal SNR")
        graphdef, params = nnx.split(ready.unet)
        text_graphdef, text_params = nnx.split(ready.text_encoder)
        loaded = lora_files.load(file, params, text_params)
        scale *= loaded.scale
        plain, conditional = lora.split(loaded.trained, scale=scale)
        if conditional and ready.adapters:
            raise InputError(f"{file}: the model has adapters that see the picture already; give one file of them")
        unet = nnx.merge(graphdef, lora.merge(params, plain, scale=scale))
        text_encoder = nnx.merge(text_graphdef, lora.merge(text_params, loaded.text_encoder, scale=scale))
        return dataclasses.replace(
            ready, unet=unet, text_encoder=text_encoder, adapters=ready.adapters or conditional, _programs={}
        )

    def save_pretrained(self, folder: str | Path) -> None:
        """Writes a diffusers folder that diffusers' StableDiffusionPipeline loads, or MarigoldDepthPipeline for depth.

        Of pictures the scheduler becomes an EulerDiscreteScheduler with the same noise schedule: on
        `sampling.diffusers_sigmas(grid)` its steps are this pipeline's Euler steps (if exactly aligned). Of depth it
        becomes a DDIMScheduler. Replaces an earlier pipeline there; raises InputError for a folder that holds anything
        else, and for adapters that depend on the picture, which no such folder holds.
        """
        if self.adapters:
            raise InputError(
                "adapters that depend on the picture are in no diffusers folder; keep the base and their file"
            )

        def write(part: Path) -> None:
            weights.save_pretrained(self.unet, part / "unet")
            weights.save_pretrained(self.vae, part / "vae")
            weights.save_pretrained(self.text_encoder, part / "text_encoder")
            self.tokenizer.save_pretrained(part / "tokenizer")
            vae = type(self.vae).__name__
            export.write_configs(part, self.scheduler_config, self.alignment, self.task, self.resolution, vae)

        export.write_whole(Path(folder).absolute(), write)

    @property
    def resolution(self) -> int | None:
        """Pixels of the longer side that the UNet was trained at, if its config.json, or a pipeline of depth, says."""
        sides = self.unet.config.sample_shape
        return None if sides is None else max(sides) * self.vae.config.downsampling

    @property
    def tokenize(self) -> weights.Tokenize:
        """`tokenize(texts)` is int32 [B, L], cut to the model's length.

        Captions are padded to it, and depth's, which are empty, where the task says so: else they are two tokens.
        """
        return weights.Tokenize(self.tokenizer, padded=self.task.pads)

    def noise(
        self, seed: int, count: int, height: int | None = None, width: int | None = None, *, first: int = 0
    ) -> jax.Array:
        """float32 [B, H, W, C] latent noise of images `first`, `first + 1`, ...; each is the same in every batch.

        Raises InputError for a height or width (pixels) that the VAE's downsampling does not divide.
        """
        factor, sides = self.vae.config.downsampling, self.unet.config.sample_shape
        if (height is None or width is None) and sides is None:
            raise InputError("the UNet's config.json gives no sample_size; give height and width")
        tall, wide = (side * factor for side in sides or (1, 1))
        for name, pixels in (("height", height), ("width", width)):
            if pixels is not None and (pixels < factor or pixels % factor):
                raise InputError(f"{name}={pixels} is not a multiple of {factor} pixels, the VAE's downsampling")
        shape = ((height or tall) // factor, (width or wide) // factor, self.vae.config.latent_channels)
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
        trajectory: bool = False,
    ) -> np.ndarray:
        """Images uint8 [B, H, W, 3] for one or many prompts; with `trajectory` [B, N+1, H, W, 3], and all on the way.

        They are the images `first`, `first + 1`, ... of a seed; `noise` [B, H, W, C] replaces what it would start from.
        `guidance_scale=1` samples without guidance at half the cost; `negative_prompt` is one for all or one for each.
        One program is compiled for each batch shape and serves every number of steps up to 64, but for a trajectory.
        """
        how = _sampler(sampler)
        self.require(of_pictures=False)
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        if not prompts:
            raise InputError("there is no prompt; give one or more")
        if noise is None:
            noise = self.noise(seed, len(prompts), height, width, first=first)
        keys = jax.random.key_data(random_keys(seed, first + STEPS, len(prompts)))
        guidance = (guidance_scale, guidance_rescale)
        direction = "trajectory" if trajectory else "sample"
        return self._run(how, direction, prompts, negative_prompt, noise, keys, None, num_steps, guidance)

    def depth(
        self,
        images: np.ndarray,
        *,
        num_steps: int = 4,
        ensemble: int = 1,
        resolution: int | None = None,
        seed: int = 0,
        first: int = 0,
        noise: jax.Array | None = None,
        sampler: SamplerName | Sampler = "euler",
    ) -> np.ndarray:
        """Depth float32 [B, H, W] of uint8 `images` [B, H, W, 3]: 0 is near, 1 far, affine in what was learned.

        Our own models learn the logarithm of depth, others may depth itself: `metrics.depth_errors(space=...)`. The
        network sees pictures whose longer side has `resolution` pixels, what it was trained at by default and the
        picture's own for 0, rounded to what the VAE divides; depth is brought back to their size. `ensemble` estimates
        of each picture are merged, see `ensemble.merged`. `noise` [B * ensemble, H, W, C] replaces what they would
        start from.
        """
        how = _sampler(sampler)
        self.require(of_pictures=True)
        if ensemble < 1:
            raise InputError(f"ensemble={ensemble}: give a whole number, 1 or more")
        self.task.check_ensemble(ensemble)
        height, width = images.shape[1:3]
        longer = self.resolution if resolution is None else resolution
        tall, wide = working_size(height, width, longer or max(height, width), self.vae.config.downsampling)
        seen = np.repeat(resized(images, tall, wide), ensemble, axis=0)
        if noise is None:
            noise = self.noise(seed, len(seen), tall, wide, first=first * ensemble)
        keys = jax.random.key_data(random_keys(seed, first * ensemble + STEPS, len(seen)))
        rows = self._run(how, "sample", [""] * len(seen), "", noise, keys, seen, num_steps, (1.0, 0.0))
        merged = [ensembles.merged(members) for members in rows.reshape(len(images), ensemble, tall, wide)]
        return resized(np.stack(merged), height, width)

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
        """The noise [B, H, W, C] from which `sampler` makes uint8 `images` [B, H, W, 3]: the way back in as many steps.

        Only as exact as the sampler, and as the VAE is in decoding what it encodes. Raises InputError for a random one.
        """
        how = _sampler(sampler)
        self.require(of_pictures=False)
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        keys = np.zeros((len(prompts), 2), np.uint32)
        return self._run(how, "invert", prompts, negative_prompt, images, keys, None, num_steps, (guidance_scale, 0.0))

    def bits_per_dim(
        self, images: np.ndarray, prompt: str | Sequence[str], *, num_steps: int = 50, seed: int = 0, first: int = 0
    ) -> np.ndarray:
        """Bits per dimension, float32 [B], that the latents of uint8 `images` [B, H, W, 3] take, given their prompts.

        The variational bound of `likelihood.variational_bound`, at `num_steps` timesteps between the first and the
        last, of the latents' means as the UNet sees them; noise is that of the images `first`, `first + 1`, ... of a
        seed. Raises InputError for a flow that is no diffusion model.
        """
        if not self.alignment.complete:
            raise InputError("bits per dimension are of diffusion models and of flows aligned with them; leave it out")
        self.require(of_pictures=False)
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        keys = jax.random.key_data(random_keys(seed, first + STEPS, len(prompts)))
        how = Sampler("ddim", eta=1.0, spacing="linspace")
        return self._run(how, "bits", prompts, "", images, keys, None, num_steps, (1.0, 0.0))

    def grid(self, sampler: Sampler, num_steps: int) -> np.ndarray:
        """The times of `sampler`'s steps with this model; raises InputError as `Sampler.grid`."""
        at_noise = self.task.start == "noise"
        return sampler.grid(self.schedule, self.alignment, self.scheduler_config, num_steps, at_noise=at_noise)

    @property
    def model(self) -> Model:
        """All but the parameters."""
        return Model(
            *map(nnx.graphdef, (self.unet, self.vae, self.text_encoder)),
            schedule=self.schedule,
            alignment=self.alignment,
            task=self.task,
            latent_scale=self.vae.config.scaling_factor,
            set_alpha_to_one=self.scheduler_config.get("set_alpha_to_one", True),
        )

    def _run(
        self,
        how: Sampler,
        direction: Direction,
        prompts: list[str],
        negative_prompt: str | Sequence[str],
        start: Any,
        keys: Any,
        pictures: np.ndarray | None,
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
            self._programs[kind] = make_program(self.model, self.mesh, *kind)
        rows = [self.tokenize(prompts), self.tokenize(negatives), np.asarray(start), np.asarray(keys), pictures]
        if self.mesh is not None:  # filled up to the same number for every device
            extra, split = -count % self.mesh.size, sharding.batch_split(self.mesh)
            rows = jax.tree.map(lambda x: np.concatenate([x, np.repeat(x[-1:], extra, axis=0)]), rows)
            rows = sharding.put(rows, jax.tree.map(lambda _: split, rows))
        grid = self.grid(how, num_steps)
        if direction == "trajectory":  # of padding there would be nothing to show
            grid = grid[: num_steps + 1]
        networks = (nnx.state(network) for network in (self.unet, self.vae, self.text_encoder))
        given = (*networks, self.adapters, *rows, grid, np.array(guidance, np.float32))
        return np.asarray(self._programs[kind](*given))[:count]

    def require(self, *, of_pictures: bool) -> None:
        """Raises InputError unless the model's task is one of pictures, or of text."""
        if self.task.of_pictures != of_pictures:
            ways = "text, to pipeline(prompt) or --prompt", "a picture, to depth(images) or --image"
            told = f"this model's task is {self.task.name}; give it {ways[self.task.of_pictures]}"
            raise InputError(f"{told}, or take another model")


def task_of(
    where: str | Path,
    scheduler_config: dict[str, Any],
    unet: UNet2DConditionModel,
    vae: weights.Autoencoder,
    text_encoder: CLIPTextModel,
) -> Task:
    """What the parts of a checkpoint make together. Raises InputError if they do not belong together."""
    channels = vae.config.latent_channels
    recorded = export.recorded_task(scheduler_config, unet.config.in_channels / channels)
    for what, takes, given, gives in (
        ("channels", unet.config.in_channels, "VAE", recorded.inputs * channels),
        ("text features", unet.config.cross_attention_dim, "text encoder", text_encoder.config.hidden_size),
    ):
        if takes != gives:
            raise InputError(
                f"{where}: the UNet takes {takes} {what}, the {given} makes {gives}; "
                "give a model whose parts belong together"
            )
    return recorded


def random_keys(seed: int, first: int, count: int) -> jax.Array:
    """A random key for each of `count` images: for its noise, or with `first + STEPS` for a sampler's random steps."""
    return jax.vmap(lambda i: jax.random.fold_in(jax.random.key(seed), i))(
        np.uint32(first) + jnp.arange(count, dtype=np.uint32)
    )


def _sampler(given: SamplerName | Sampler) -> Sampler:
    return given if isinstance(given, Sampler) else Sampler(given)
