"""Samples from a checkpoint into one PNG grid, or tells the depth of a picture.

python -m d2f_jax.sample --model=PATH_OR_HUB_ID --prompt="a red cube" --num_steps=4 --out=samples.png
python -m d2f_jax.sample --model=DEPTH_MODEL --image=PICTURE --num_steps=4 --ensemble=4 --out=depth.png
"""

from pathlib import Path
from typing import cast, get_args

import numpy as np
from absl import flags
from PIL import Image
from tqdm import tqdm

from d2f_jax import program, report
from d2f_jax.alignment import Convention
from d2f_jax.data.sources import read_image
from d2f_jax.errors import InputError
from d2f_jax.flow import Begin
from d2f_jax.pipeline import Pipeline
from d2f_jax.sampler import Sampler, SamplerName
from d2f_jax.sampling import Spacing
from d2f_jax.sde import SDE, Form, LastStep
from d2f_jax.subjects import shown

_MODEL = flags.DEFINE_string("model", None, "Diffusers folder, hub id, or the embedded tiny-sd.")
_LORA = flags.DEFINE_string(
    "lora", None, "A file of adapters: a run's lora/adapters.safetensors, PEFT's, diffusers' or kohya's."
)
_LORA_SCALE = flags.DEFINE_float("lora_scale", 1.0, "Times the adapters' own scale.")
_PROMPT = flags.DEFINE_multi_string("prompt", [], "What to draw; repeat for more.")
_PROMPT_FILE = flags.DEFINE_string("prompt_file", None, "A text file with one prompt a line.")
_IMAGE = flags.DEFINE_string("image", None, "Tell this picture's depth, with a model of depth; no prompt then.")
_ENSEMBLE = flags.DEFINE_integer("ensemble", 1, "Estimates of depth that are merged.", lower_bound=1)
_RESOLUTION = flags.DEFINE_integer(
    "resolution",
    None,
    "Pixels of the picture's longer side, as depth's model sees it; what it was trained at by default, 0 for its own.",
    lower_bound=0,
)
_NEGATIVE = flags.DEFINE_string("negative_prompt", "", "What to steer away from.")
_OUT = flags.DEFINE_string("out", "samples.png", "The picture to write; of depth, white is near, or .npy in float32.")
_SAMPLER = flags.DEFINE_enum(
    "sampler",
    "euler",
    get_args(SamplerName),
    "euler, heun, midpoint, rk4: steps in flow time; dopri5, dopri8, bosh3, adaptive_heun: as many as --rtol asks; "
    "sde_: random ones; ddim: for a "
    "diffusion model as it came; ddim_on_flow_grid: the pictures of euler, by DDIM.",
)
_NUM_STEPS = flags.DEFINE_integer("num_steps", 4, "Steps of the sampler.", lower_bound=1)
_SHIFT = flags.DEFINE_float("shift", 1.0, "Above 1: flow steps denser near noise.", lower_bound=1e-3)
_BEGIN = flags.DEFINE_enum(
    "begin",
    "last_timestep",
    get_args(Begin),
    "The first flow time: the last diffusion timestep's, or zero, as the paper's published code samples.",
)
_SPACING = flags.DEFINE_enum("spacing", None, get_args(Spacing), "Of ddim's timesteps; the model's own by default.")
_ETA = flags.DEFINE_float("eta", 0.0, "DDIM's share of new noise: 0 deterministic, 1 DDPM.", 0.0, 1.0)
_TEMPERATURE = flags.DEFINE_float("temperature", 1.0, "Times the noise that --eta draws.", lower_bound=0.0)
_NOISE_DROPOUT = flags.DEFINE_float("noise_dropout", 0.0, "Share of its values that are left out.", 0.0, 1.0)
_SDE_FORM = flags.DEFINE_enum("sde_form", "sigma", get_args(Form), "How the noise of sde_ samplers depends on time.")
_SDE_NORM = flags.DEFINE_float("sde_norm", 1.0, "How much of it.", lower_bound=0.0)
_SDE_LAST = flags.DEFINE_enum("sde_last_step", "euler", get_args(LastStep), "Their last step, which adds no noise.")
_SDE_LAST_SIZE = flags.DEFINE_float("sde_last_step_size", 0.04, "Of flow time.", 0.0, 1.0)
_RTOL = flags.DEFINE_float("rtol", 1e-3, "Relative tolerance of steps by tolerance.", lower_bound=1e-7)
_ATOL = flags.DEFINE_float("atol", 1e-4, "Absolute tolerance of steps by tolerance.", lower_bound=1e-7)
_GUIDANCE = flags.DEFINE_float("guidance_scale", 7.5, "Classifier-free guidance; 1 is none.")
_RESCALE = flags.DEFINE_float("guidance_rescale", 0.0, "0 to 1; 0.7 keeps strong guidance from glaring.", 0.0, 1.0)
_SEED = flags.DEFINE_integer("seed", 0, "Of the noise; image i of a seed is always the same.")
_IMAGES = flags.DEFINE_integer("images_per_prompt", 1, "How many of each.", lower_bound=1)
_BATCH = flags.DEFINE_integer("batch_size", 16, "Images computed at once.", lower_bound=1)
_HEIGHT = flags.DEFINE_integer("height", None, "Pixels; the model's own size by default.")
_WIDTH = flags.DEFINE_integer("width", None, "Pixels; the model's own size by default.")
_VARIANT = flags.DEFINE_string("variant", None, "Of the weights' files, such as fp16.")
_CONVENTION = flags.DEFINE_enum(
    "convention", None, get_args(Convention), "reference: for checkpoints of the paper's published code."
)
_DTYPE = flags.DEFINE_enum("dtype", "float32", ["float32", "bfloat16"], "What the networks compute in.")


def main() -> None:
    if _MODEL.value is None:
        raise InputError("--model is missing: a diffusers folder, a hub id, or tiny-sd")
    if _IMAGE.value and (_PROMPT.value or _PROMPT_FILE.value):
        raise InputError("--image tells depth, and no prompt has a part in it; leave --prompt and --prompt_file out")
    prompts = [] if _IMAGE.value else [prompt for prompt in read_prompts() for _ in range(_IMAGES.value)]
    picture = read_image(_IMAGE.value)[None] if _IMAGE.value else None
    out = Path(_OUT.value)
    if not out.parent.is_dir():
        raise InputError(f"--out={out}: the folder {out.parent} does not exist; create it first")
    as_numbers = picture is not None and out.suffix == ".npy"
    if not as_numbers and Image.registered_extensions().get(out.suffix.lower()) not in Image.SAVE:
        raise InputError(f"--out={out}: no picture format is called {out.suffix!r}; write .png")
    sampler = Sampler(
        name=cast(SamplerName, _SAMPLER.value),
        shift=_SHIFT.value,
        begin=cast(Begin, _BEGIN.value),
        spacing=cast(Spacing | None, _SPACING.value),
        eta=_ETA.value,
        temperature=_TEMPERATURE.value,
        noise_dropout=_NOISE_DROPOUT.value,
        sde=SDE(
            form=cast(Form, _SDE_FORM.value),
            norm=_SDE_NORM.value,
            last_step=cast(LastStep, _SDE_LAST.value),
            last_step_size=_SDE_LAST_SIZE.value,
        ),
        rtol=_RTOL.value,
        atol=_ATOL.value,
    )
    pipeline = Pipeline.from_pretrained(_MODEL.value, variant=_VARIANT.value, dtype=_DTYPE.value)
    if _LORA.value is not None:
        pipeline = pipeline.with_lora(_LORA.value, scale=_LORA_SCALE.value)
    if _CONVENTION.value is not None:
        pipeline = pipeline.by_convention(cast(Convention, _CONVENTION.value))
    pipeline.require(of_pictures=picture is not None)
    if picture is not None:
        depth = pipeline.depth(
            picture,
            num_steps=_NUM_STEPS.value,
            ensemble=_ENSEMBLE.value,
            resolution=_RESOLUTION.value,
            seed=_SEED.value,
            sampler=sampler,
        )
        write(out, depth[0] if as_numbers else shown(depth)[0])
        return
    # Refused before a bar is shown: what the program itself would refuse.
    pipeline.noise(_SEED.value, 1, _HEIGHT.value, _WIDTH.value)
    pipeline.grid(sampler, _NUM_STEPS.value)
    images = []
    with tqdm(total=len(prompts), desc="sampling", unit="image") as bar:
        for i in range(0, len(prompts), _BATCH.value):
            chunk = prompts[i : i + _BATCH.value]
            images.append(
                pipeline(
                    chunk,
                    num_steps=_NUM_STEPS.value,
                    guidance_scale=_GUIDANCE.value,
                    guidance_rescale=_RESCALE.value,
                    negative_prompt=_NEGATIVE.value,
                    seed=_SEED.value,
                    first=i,
                    height=_HEIGHT.value,
                    width=_WIDTH.value,
                    sampler=sampler,
                )
            )
            bar.update(len(chunk))
    columns = _IMAGES.value if _IMAGES.value > 1 else max(1, round(len(prompts) ** 0.5))
    write(out, report.tile(np.concatenate(images), columns))


def write(out: Path, pixels: np.ndarray) -> None:
    """uint8 [H, W, 3] as a picture, numbers as they are."""
    try:
        if pixels.dtype == np.uint8:
            Image.fromarray(pixels).save(out)
        else:
            np.save(out, pixels)
    except OSError as error:
        raise InputError(f"--out={out} cannot be written ({error.strerror or error}); give another file") from error
    print(out)


def read_prompts() -> list[str]:
    """From --prompt and --prompt_file. Raises InputError if there is none."""
    prompts = list(_PROMPT.value)
    if _PROMPT_FILE.value is not None:
        try:
            lines = Path(_PROMPT_FILE.value).read_text().splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"--prompt_file={_PROMPT_FILE.value} cannot be read: {error}") from error
        prompts += [line.strip() for line in lines if line.strip()]
    if not prompts:
        raise InputError("there is no prompt: give --prompt=TEXT or a --prompt_file with one a line")
    return prompts


if __name__ == "__main__":
    program.run(main)
