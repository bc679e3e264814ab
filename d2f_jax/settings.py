"""What a config may say, and whose a workdir is: all that is refused before anything is loaded or written."""

import dataclasses
import json
from pathlib import Path
from typing import Any, get_args

from jax.sharding import Mesh

from d2f_jax import distributed, flow, metrics, objectives, optim, sharding
from d2f_jax import step as steps
from d2f_jax.alignment import Alignment, Convention
from d2f_jax.errors import InputError
from d2f_jax.models.unet import Remat
from d2f_jax.program import Config
from d2f_jax.sampler import Sampler
from d2f_jax.sampling import Spacing
from d2f_jax.sde import SDE, Form, LastStep
from d2f_jax.task import Task

_CHOICES = {
    "objective.name": get_args(objectives.Name),
    "objective.convention": get_args(Convention),
    "objective.path": get_args(flow.PathName),
    "objective.times": ("uniform", "logit_normal"),
    "objective.begin": get_args(flow.Begin),
    "objective.norm": get_args(objectives.Norm),
    "compute_dtype": ("float32", "bfloat16"),
    "remat": get_args(Remat),
    "data.latents": get_args(steps.Latents),
    "data.resize": ("aspect", "fixed"),
    "data.crop": ("center", "random"),
    "data.on_damage": ("stop", "skip"),
    **{
        f"{section}.{name}": choices
        for section in ("eval", "reflow")
        for name, choices in (
            ("spacing", ("", *get_args(Spacing))),
            ("sde.form", get_args(Form)),
            ("sde.last_step", get_args(LastStep)),
        )
    },
    "eval.depth.space": get_args(metrics.DepthSpace),
    "eval.depth.protocol": ("", *metrics.DEPTH_PROTOCOLS),
    "train.optimizer": get_args(optim.Name),
    "train.schedule": get_args(optim.Schedule),
    "train.first_moment_dtype": ("float32", "bfloat16"),
}
_SAMPLER_OPTIONS = ("shift", "begin", "eta", "temperature", "noise_dropout", "rtol", "atol")
_LORA_GROUPS = ("self_attention", "cross_attention", "conv", "mlp")
_LEAST = {
    "seed": 0,
    "objective.sigma_min": 0,
    "objective.logit_std": 1e-9,
    "objective.shift": 1e-9,
    "objective.min_snr_gamma": 0,
    "data.held_out": 0,
    "data.image_width": 0,
    "data.num_train": 1,
    "data.num_validation": 2,
    "data.caption_dropout": 0,
    "data.max_damaged": 0,
    "data.num_workers": 0,
    "lora.scale": 1e-9,
    **{f"lora.{group}_{size}": 0 for group in _LORA_GROUPS for size in ("rank", "ratio")},
    "train.num_steps": 1,
    "train.batch_size": 1,
    "train.accumulate": 1,
    "train.learning_rate": 0,
    "train.final_rate": 1e-9,
    "train.warmup_steps": 0,
    "train.b1": 0,
    "train.b2": 0,
    "train.weight_decay": 0,
    "train.max_grad_norm": 1e-9,
    "train.ema_decay": 0,
    "train.ema_start": 0,
    "train.max_bad_steps": 1,
    "train.log_every": 1,
    "train.checkpoint_every": 1,
    "train.checkpoints_kept": 1,
    "train.checkpoint_period": 0,
    "reflow.count": 1,
    "reflow.num_validation": 0,
    "reflow.num_steps": 1,
    **{
        f"{section}.{name}": least
        for section in ("eval", "reflow")
        for name, least in (
            ("guidance_rescale", 0),
            ("rtol", 1e-7),
            ("atol", 1e-7),
            ("sde.norm", 0),
            ("sde.last_step_size", 0),
        )
    },
    "eval.every": 1,
    "eval.seed": 0,
    "eval.num_loss_examples": 1,
    "eval.num_images": 2,
    "eval.batch_size": 1,
    "eval.grid_images": 1,
    "eval.depth.ensemble": 1,
}
_MOST = {
    **{f"lora.{group}_ratio": 1 for group in _LORA_GROUPS},
    "data.caption_dropout": 1,
    **{f"{section}.{name}": 1 for section in ("eval", "reflow") for name in ("guidance_rescale", "sde.last_step_size")},
    "train.ema_decay": 1,
    "train.final_rate": 1,
    "train.b1": 0.99999,
    "train.b2": 0.99999,
}
# What a run may change when it goes on: where it runs and what it tells, never what it computes but for rounding.
FREE = (
    "config.mesh.",
    "config.remat",
    "config.data.num_workers",
    "config.data.max_damaged",
    "config.data.on_damage",
    "config.train.log_every",
    "config.train.profile_steps",
    "config.train.checkpoint",
    "config.train.max_bad_steps",
    "config.eval.",
    "config.reflow.",
    "config.wandb_project",
)


def check(config: Config, mesh: Mesh) -> None:
    """Raises InputError for a value that no run can have, and for what one that trains on this mesh cannot."""
    check_values(config)
    alignment, task, sampler = make_objective(config).alignment, make_task(config), eval_sampler(config)
    sampler.check(alignment, at_noise=task.start == "noise")
    task.check_ensemble(config.eval.depth.ensemble)
    sharding.check_batch_size(config.train.batch_size, config.train.accumulate, mesh)


def check_values(config: Config) -> None:
    """Raises InputError for a value that no run can have, wherever it runs."""
    values = flat(config.to_dict())
    for name, allowed in _CHOICES.items():
        if values[f"config.{name}"] not in allowed:
            raise InputError(
                f"config.{name}={values[f'config.{name}']!r} is unknown; use one of {', '.join(map(str, allowed))}"
            )
    for name, bound in _LEAST.items():
        value = values[f"config.{name}"]
        if not value >= bound:  # as it is for nan
            raise InputError(f"config.{name}={value} is too small; use {bound} or more")
        if value > _MOST.get(name, value):
            raise InputError(f"config.{name}={value} is too large; use {_MOST[name]} or less")
    objective, task = make_objective(config), make_task(config)
    if task.start != "noise" and objective.name == "diffusion":
        raise InputError(f"config.task.start={task.start}: diffusion starts at noise; use diff2flow or flow_matching")
    if task.adapters and not (config.lora.enabled and (config.lora.conv_rank or config.lora.conv_ratio)):
        raise InputError("config.task.adapters=True without adapters of convolutions; use :lora_base, or set conv_rank")
    eval_sampler(config)
    reflow_sampler(config)
    for group in _LORA_GROUPS:
        rank, ratio = (values[f"config.lora.{group}_{size}"] for size in ("rank", "ratio"))
        if rank and ratio:
            raise InputError(
                f"config.lora.{group}_rank={rank} and config.lora.{group}_ratio={ratio} both say the rank; set one to 0"
            )
    counts = config.eval.step_counts
    if not counts or not all(isinstance(n, int) and n >= 1 for n in counts):
        raise InputError(f"config.eval.step_counts={counts}: give whole numbers of steps, each 1 or more")
    if config.data.crop == "random" and config.data.resize == "fixed":
        raise InputError("config.data.crop=random, but config.data.resize=fixed leaves nothing to cut; use center")
    traced = config.train.profile_steps
    if traced and not (len(traced) == 2 and 0 < traced[0] <= traced[1]):
        raise InputError(f"config.train.profile_steps={traced}: give the first and the last step, such as (20, 25)")
    sources, weights = config.data.sources, config.data.weights
    if not sources or not all(isinstance(source, str) and source for source in sources):
        raise InputError(f"config.data.sources={sources}: give one or more, such as image_folder:FOLDER")
    if weights and (len(weights) != len(sources) or not all(weight > 0 for weight in weights)):
        raise InputError(f"config.data.weights={weights}: give a positive number for each of {len(sources)} sources")


def make_objective(config: Config) -> objectives.Objective:
    """Raises InputError for settings of one objective that are given to another."""
    o, all_three = config.objective, ("timestep", "state", "velocity")
    align = () if o.name == "flow_matching" else tuple(o.align)
    if not set(align) <= set(all_three) or len(set(align)) < len(align):
        raise InputError(
            f"config.objective.align={o.align}: give each of {', '.join(all_three)} once, or fewer of them"
        )
    if o.name != "diff2flow" and set(o.align) != set(all_three):
        raise InputError(f"config.objective.align={o.align} is diff2flow's; leave it as it is for {o.name}")
    if o.name != "diff2flow" and o.convention != "exact":
        raise InputError(f"config.objective.convention={o.convention} is diff2flow's; use exact for {o.name}")
    if o.times == "uniform" and (o.logit_mean, o.logit_std) != (0, 1):
        raise InputError(
            f"config.objective.logit_mean={o.logit_mean}, logit_std={o.logit_std}, but times are uniform; set "
            "config.objective.times=logit_normal"
        )
    if o.raw_time and "timestep" in align:
        raise InputError("config.objective.raw_time=True, but the timestep is aligned; leave timestep out of align")
    if o.min_snr_gamma and o.name != "diffusion":
        raise InputError(f"config.objective.min_snr_gamma={o.min_snr_gamma} is of diffusion; use 0 for {o.name}")
    return objectives.Objective(
        name=o.name,
        alignment=Alignment(
            **{what: what in align for what in all_three},
            raw_time=o.raw_time,
            convention=o.convention,
            path=o.path,
            sigma_min=o.sigma_min,
        ),
        times=flow.TimeDistribution(o.times, o.logit_mean, o.logit_std, o.shift, o.begin),
        min_snr_gamma=o.min_snr_gamma,
        norm=o.norm,
    )


def make_task(config: Config) -> Task:
    """Raises InputError as Task does."""
    return Task(**config.task.to_dict())


def check_task(config: Config, has: Task) -> None:
    """Raises InputError unless `config.task` is the task `has` that a model has learned, or says but its name."""
    wanted = make_task(config)
    if wanted in (has, Task(has.name)):
        return
    if wanted.adapters and not has.adapters:
        raise InputError(
            f"config.task.adapters=True, but {config.model} has no adapters that see the picture; give --lora=FILE"
        )
    names = [f.name for f in dataclasses.fields(Task) if getattr(wanted, f.name) != getattr(has, f.name)]
    told = [
        f"config.task.{name}={getattr(wanted, name)}, but {config.model} has learned {getattr(has, name)}; set "
        f"--config.task.{name}={getattr(has, name)}"
        for name in (names[:1] if names[0] == "name" else names)
    ]
    raise InputError(", and ".join(told))


def make_optimizer_options(config: Config) -> optim.OptimizerOptions:
    train = config.train
    return optim.OptimizerOptions(
        name=train.optimizer,
        learning_rate=train.learning_rate,
        schedule=train.schedule,
        warmup_steps=train.warmup_steps,
        num_steps=train.num_steps,
        final_rate=train.final_rate,
        b1=train.b1,
        b2=train.b2,
        weight_decay=train.weight_decay,
        max_grad_norm=train.max_grad_norm,
        first_moment_dtype=train.first_moment_dtype,
    )


def eval_sampler(config: Config) -> Sampler:
    """Raises InputError as Sampler does."""
    return _sampler(config.eval)


def reflow_sampler(config: Config) -> Sampler:
    """Raises InputError as Sampler does."""
    return _sampler(config.reflow)


def _sampler(section: Any) -> Sampler:
    given = {name: section[name] for name in _SAMPLER_OPTIONS}
    return Sampler(section.sampler, **given, spacing=section.spacing or None, sde=SDE(**section.sde))


def guidance(config: Config) -> dict[str, Any]:
    """Of `config.eval`, by the names of a pipeline's arguments."""
    return {name: config.eval[name] for name in ("guidance_scale", "guidance_rescale", "negative_prompt")}


def claim(workdir: Path, config: Config) -> None:
    """Makes `workdir` the run of `config`, written by the main process alone.

    Raises InputError if it cannot be written, or holds steps of another config: keys on which the result depends
    differ.
    """
    file, text = workdir / "config.json", config.to_json_best_effort(indent=2, sort_keys=True)
    if file.exists() and begun(workdir):
        try:
            before, now = flat(json.loads(file.read_text())), flat(json.loads(text))
        except (ValueError, AttributeError) as error:
            raise InputError(f"{file} is damaged ({error}); restore it or give another --workdir") from error
        differing = sorted(key for key in before.keys() | now.keys() if before.get(key) != now.get(key))
        differing = [key for key in differing if not key.startswith(FREE)]
        if differing:
            told = ", ".join(f"{key} ({before.get(key)!r} there, {now.get(key)!r} here)" for key in differing)
            raise InputError(f"workdir {workdir} belongs to another config: {told}; give another --workdir")
    if distributed.is_main():
        try:
            workdir.mkdir(parents=True, exist_ok=True)
            part = file.with_suffix(".part")
            part.write_text(text)
            part.replace(file)
        except OSError as error:
            raise InputError(
                f"workdir {workdir} cannot be written ({error.strerror}); give another --workdir"
            ) from error
    distributed.barrier("claimed")


def begun(workdir: Path) -> bool:
    """Whether a step was taken: a start that was refused before, for its data perhaps, may be mended and repeated."""
    metrics = workdir / "metrics.jsonl"
    return (metrics.exists() and metrics.stat().st_size > 0) or any((workdir / "checkpoints").glob("[0-9]*"))


def flat(tree: dict[str, Any], prefix: str = "config") -> dict[str, Any]:
    """`{"config.train.num_steps": 400, ...}`"""
    leaves = {}
    for key, value in tree.items():
        leaves |= flat(value, f"{prefix}.{key}") if isinstance(value, dict) else {f"{prefix}.{key}": value}
    return leaves
