"""A pipeline as a folder that diffusers loads, and what such a folder says that diffusers does not ask for."""

import dataclasses
import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from d2f_jax import weights
from d2f_jax.alignment import ALIGNED, Alignment
from d2f_jax.errors import InputError
from d2f_jax.schedule import betas_of
from d2f_jax.task import TEXT_TO_IMAGE, Task

# diffusers skips keys that begin so
_ALIGNMENT = "_d2f_jax_alignment"
_TASK = "_d2f_jax_task"


def write_whole(folder: Path, write: Callable[[Path], None]) -> None:
    """Has `write` fill a new folder, which then takes the place of an earlier pipeline in `folder`, if there is one.

    Raises InputError for a folder that holds anything else.
    """
    foreign = folder.is_file() or (folder.is_dir() and any(folder.iterdir()))
    if foreign and not (folder / "model_index.json").is_file():
        raise InputError(f"{folder} is there and holds no pipeline that could be replaced; give another folder")
    part = folder.with_name(folder.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    write(part)
    # Whole or not at all: an earlier export stays until this one is complete.
    shutil.rmtree(folder, ignore_errors=True)
    part.rename(folder)


def write_configs(
    folder: Path,
    scheduler_config: Mapping[str, Any],
    alignment: Alignment,
    task: Task,
    resolution: int | None,
    vae: str,
) -> None:
    """`model_index.json` and the scheduler's config.

    `resolution` (pixels) is what depth is estimated at, `vae` the name of the autoencoder's class in diffusers.
    """
    index = _marigold_index(resolution) if task.of_pictures else _STABLE_DIFFUSION
    for name, content in (
        ("scheduler/scheduler_config.json", _scheduler(scheduler_config, alignment, task)),
        ("model_index.json", index | {"vae": ["diffusers", vae]}),
    ):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(json.dumps(content, indent=2) + "\n")


def recorded_alignment(scheduler_config: Mapping[str, Any]) -> Alignment:
    """What an export says of its alignment; other checkpoints say nothing, and are aligned."""
    return _recorded(scheduler_config, _ALIGNMENT, Alignment, ALIGNED)


def recorded_task(scheduler_config: Mapping[str, Any], inputs: float) -> Task:
    """What an export says of its task; of other checkpoints those of two `inputs` make depth, as Marigold's do."""
    return _recorded(scheduler_config, _TASK, Task, Task("image_to_depth") if inputs == 2 else TEXT_TO_IMAGE)


def recorded_resolution(path_or_hub_id: str | Path, revision: str | None) -> int | None:
    """Pixels of the longer side at which a pipeline of depth says to estimate it; None if it does not, or says 0."""
    pixels = weights.load_model_index(path_or_hub_id, revision=revision).get("default_processing_resolution")
    if pixels is not None and not (isinstance(pixels, int) and pixels >= 0):
        raise InputError(
            f"{path_or_hub_id}: model_index.json has default_processing_resolution={pixels!r}; give a number of pixels"
        )
    return pixels or None


def _recorded(scheduler_config: Mapping[str, Any], key: str, kind: Callable[..., Any], default: Any) -> Any:
    if key not in scheduler_config:
        return default
    try:
        return kind(**scheduler_config[key])
    except TypeError as error:
        raise InputError(f"scheduler_config.json: {key} cannot be read ({error}); export it again") from error


def _scheduler(scheduler_config: Mapping[str, Any], alignment: Alignment, task: Task) -> dict[str, Any]:
    """The same noise schedule for a scheduler of diffusers; an alignment or task that it cannot know beside it.

    Pictures are drawn by EulerDiscreteScheduler, which takes any grid; what DDIM is to do stays as it came. Marigold's
    pipeline takes no grid, but DDIM's trailing timesteps begin at the last one, as the flow does.
    """
    kept = "num_train_timesteps beta_start beta_end beta_schedule trained_betas prediction_type rescale_betas_zero_snr"
    of_ddim = "timestep_spacing steps_offset set_alpha_to_one"
    config = {key: scheduler_config[key] for key in f"{kept} {of_ddim}".split() if key in scheduler_config}
    if config.get("beta_schedule") == "sqrt":  # which diffusers does not know
        config["trained_betas"] = betas_of(config).tolist()
        del config["beta_schedule"]
    if task.of_pictures:
        config |= {"_class_name": "DDIMScheduler", "timestep_spacing": "trailing"}
        config |= {"clip_sample": False, "set_alpha_to_one": True, "steps_offset": 0}
    else:
        config = {"timestep_spacing": "leading", "steps_offset": 0} | config
        config["_class_name"] = "EulerDiscreteScheduler"
    for key, value, default in ((_ALIGNMENT, alignment, ALIGNED), (_TASK, task, TEXT_TO_IMAGE)):
        if value != default:
            config[key] = dataclasses.asdict(value)
    return config


_NETWORKS = {
    "text_encoder": ["transformers", "CLIPTextModel"],
    "tokenizer": ["transformers", "CLIPTokenizer"],
    "unet": ["diffusers", "UNet2DConditionModel"],
}
_STABLE_DIFFUSION = {
    "_class_name": "StableDiffusionPipeline",
    "feature_extractor": [None, None],
    "image_encoder": [None, None],
    "requires_safety_checker": False,
    "safety_checker": [None, None],
    "scheduler": ["diffusers", "EulerDiscreteScheduler"],
    **_NETWORKS,
}


def _marigold_index(resolution: int | None) -> dict[str, Any]:
    return {
        "_class_name": "MarigoldDepthPipeline",
        "default_denoising_steps": 4,
        "default_processing_resolution": resolution,
        "prediction_type": "depth",
        "scale_invariant": True,
        "shift_invariant": True,
        "scheduler": ["diffusers", "DDIMScheduler"],
        **_NETWORKS,
    }
