"""Finetunes a Stable Diffusion checkpoint as a flow (Diff2Flow), on one device or on many hosts.

    python -m d2f_jax.train --config=configs/quickstart.py --workdir=DIR [--config.train.num_steps=1000 ...]

DIR holds `config.json`, `metrics.jsonl`, TensorBoard events, `checkpoints/`, `samples/`, `scores.md` and `export/`, the
result as a diffusers folder, and `lora/`, adapters by themselves. Starting the same command again goes on from the
newest checkpoint as if nothing had happened. Exit codes: 0 done, 1 failed, 2 the input is wrong, 75 saved and told to
make room (start it again).
"""

import contextlib
import dataclasses
import functools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from absl import flags
from jax.sharding import Mesh
from ml_collections import config_flags

from d2f_jax import (
    checkpoint,
    comparison,
    datasets,
    distributed,
    flops,
    lora_files,
    objectives,
    optim,
    prior,
    program,
    report,
    sharding,
    subjects,
    validation,
)
from d2f_jax import step as steps
from d2f_jax.checkpoint import Checkpoints
from d2f_jax.datasets import Data
from d2f_jax.errors import InputError, Preempted
from d2f_jax.pipeline import Pipeline
from d2f_jax.program import Config
from d2f_jax.settings import begun, check, claim, eval_sampler, make_optimizer_options
from d2f_jax.watch import Insight, Watch

_CONFIG = config_flags.DEFINE_config_file("config", None, "The run: a file of configs/, with :arg where it takes one.")
_WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the run; an earlier run of the same config goes on.")


def main() -> None:
    if _CONFIG.value is None or _WORKDIR.value is None:
        raise InputError("--config=configs/NAME.py and --workdir=DIR are both needed")
    train(_CONFIG.value, Path(_WORKDIR.value))


def train(config: Config, workdir: Path) -> None:
    """Runs `config` from start, or from the newest checkpoint in `workdir`, to the exported and evaluated end."""
    with distributed.Preemption() as preemption:
        run(config, workdir, preemption)


def run(config: Config, workdir: Path, preemption: distributed.Preemption) -> None:
    """Raises Preempted when it was told to make room; the same command goes on."""
    mesh = sharding.make_mesh(config.mesh.data, config.mesh.fsdp)
    check(config, mesh)
    pipeline = prior.load(config)
    pipeline.noise(0, 1, *datasets.image_shape(config))  # refuses a size the VAE does not divide
    prior.check_steps(pipeline, config)
    plain_networks = prior.networks(pipeline, "none")
    networks, frozen, trained = prior.split(pipeline, config)
    optimizer_options, options = make_optimizer_options(config), prior.step_options(config, pipeline)
    optimizer = optim.make_optimizer(optimizer_options)
    step = steps.make_train_step(networks, pipeline.schedule, optimizer, options, mesh)
    plain_options = dataclasses.replace(options, accumulate=1)
    plain_step = steps.make_train_step(plain_networks, pipeline.schedule, optimizer, plain_options, mesh)
    given = datasets.open_given(config)
    datasets.check_prepared(config, pipeline, given)
    if config.init_from and not begun(workdir):
        checkpoint.check_any(Path(config.init_from))
    claim(workdir, config)
    data = datasets.open_data(config, workdir, pipeline, given)
    key, average = jax.random.key(config.seed), config.train.ema_decay > 0
    state, frozen = prior.place(mesh, trained, frozen, optimizer, key, average=average)
    tell_unsplit(mesh, state.trained)
    del trained  # a part of the state now
    pipeline = prior.hollow(pipeline)
    insight = make_insight(config, mesh, pipeline, networks, options, frozen, data, optimizer_options)

    saved = Checkpoints(
        workdir / "checkpoints",
        every=config.train.checkpoint_every,
        keep=config.train.checkpoints_kept,
        keep_period=config.train.checkpoint_period or None,
    )
    with saved as checkpoints:
        state, position = checkpoints.restore(state)
        data.check_position(position)
        if position is None and config.init_from:
            state = begun_from(config.init_from, state)
        first = int(state.step)
        writing = report.MetricsWriter(
            workdir, step=first, main=distributed.is_main(), wandb_project=config.wandb_project
        )
        with writing as writer:
            with contextlib.closing(Watch(config, workdir, mesh, writer, insight, first)) as watch:
                state = loop(config, step, plain_step, state, frozen, data, mesh, checkpoints, watch, preemption)
            checkpoints.wait()
            params = insight.unet_params(state)
            unet, rest, average = sharding.to_host((params, frozen, state.averaged if config.lora.enabled else None))
            del state  # makes room for the prior, which is read again to compare with
            export(config, pipeline, unet, rest, average, workdir)
            before, after = prior.load(config).on_mesh(mesh), insight.pipeline(params)
            finish(config, workdir, before, after, data, writer, preemption)
    distributed.barrier("finished")


def tell_unsplit(mesh: Mesh, trained: Any) -> None:
    """Names once the parameters that every device keeps whole."""
    whole = sharding.unsplit(mesh, trained)
    if whole and distributed.is_main():
        rows = [[name, " x ".join(map(str, shape))] for name, shape in whole.items()]
        print(
            f"{len(whole)} parameters do not divide over config.mesh.fsdp={mesh.shape['fsdp']} and are kept whole:\n\n"
            + report.markdown_table(["parameter", "shape"], rows)
        )


def make_insight(
    config: Config,
    mesh: Mesh,
    pipeline: Pipeline,
    networks: steps.Networks,
    options: steps.StepOptions,
    frozen: steps.Frozen,
    data: Data,
    optimizer_options: optim.OptimizerOptions,
) -> Insight:
    """How the averaged parameters of a state are sampled with, and judged on what is held out."""
    usable = functools.partial(subjects.check, config)
    sampler, shown = dataclasses.replace(pipeline, mesh=mesh), data.examples(config.eval.grid_images, usable)
    judge = None
    if data.validation:

        def encode(frozen: steps.Frozen, batch: steps.Batch) -> steps.Encoded:
            return steps.encoded(networks, steps.ready(mesh, options, frozen), batch)

        loss = steps.make_loss(networks, pipeline.schedule, options, mesh)
        first = objectives.first_time(options.objective, pipeline.schedule)
        program = validation.make_validation_loss(loss, encode, mesh, config.eval.seed, first)
        held_out = data.validation_batches(config, mesh, config.eval.num_loss_examples)
        judge = functools.partial(validation.evaluate, program, frozen=frozen, batches=held_out)
    return Insight(
        learning_rate=optim.learning_rate(optimizer_options),
        unet_params=lambda state: steps.unet_params(state.averaged, frozen.unet, options.lora_scale),
        pipeline=lambda params: prior.filled(sampler, params, frozen, datasets.image_shape(config)),
        validation_loss=judge,
        subject=subjects.make(config, shown, judged=False),
        count=len(shown),
    )


def begun_from(folder: str, state: steps.TrainState) -> steps.TrainState:
    """A new run's state with the averaged weights of another run's checkpoints."""
    step, average = checkpoint.restore_average(Path(folder), state.averaged)
    if distributed.is_main():
        print(f"begins with the averaged weights of step {step} in {folder}")
    ema = None if state.ema is None else jax.tree.map(jnp.copy, average)
    return dataclasses.replace(state, trained=average, ema=ema)


def loop(
    config: Config,
    step: Any,
    plain_step: Any,
    state: steps.TrainState,
    frozen: steps.Frozen,
    data: Data,
    mesh: Mesh,
    checkpoints: Checkpoints,
    watch: Watch,
    preemption: distributed.Preemption,
) -> steps.TrainState:
    """Steps from `state.step` to the end. Raises Preempted when it was told to make room, and has saved.

    `plain_step` does the same without recomputation or loops: its operations are the ones that count as useful.
    """
    first, last = int(state.step), config.train.num_steps
    if first and (first == last or first % config.eval.every == 0):
        watch.evaluate(first, state)  # again, or what a run that had to make room has not come to
    if first < last and preemption.reached():
        raise Preempted(f"told to make room at step {first} of {last}; start the same command again")
    with contextlib.closing(data.train_batches(config, mesh, first)) as incoming:
        for n in range(first, last):
            batch = next(incoming)
            if n == first:
                watch.count_flops(flops.count(plain_step, state, frozen, batch))
                step = step.lower(state, frozen, batch).compile()
                watch.start_clock()
            state, metrics = step(state, frozen, batch)
            done, stop = n + 1, preemption.reached()
            watch.see(done, metrics)
            # While steps are skipped, no more than is needed replaces what was saved before they were.
            if stop or done == last or (checkpoints.due(done) and watch.settle() == 0):
                watch.sync()
                checkpoints.save(done, state, data.position())
            if stop and done < last:
                checkpoints.wait()
                raise Preempted(f"told to make room at step {done} of {last}, and saved; start the same command again")
            if done == last or done % config.eval.every == 0:
                watch.evaluate(done, state)
    return state


def export(
    config: Config, pipeline: Pipeline, unet: steps.UNetParams, frozen: steps.Frozen, adapters: Any, workdir: Path
) -> None:
    """Writes the result as a diffusers folder, and adapters by themselves too, in the main process.

    Adapters that depend on the picture exist by themselves alone.
    """
    if distributed.is_main():
        if not unet.adapters:
            whole = prior.filled(pipeline, unet, frozen, datasets.image_shape(config))
            whole.save_pretrained(workdir / "export")
            print(f"export:   {workdir / 'export'} (a diffusers folder)")
        if frozen.unet is not None:
            scale, folder = config.lora.scale, workdir / "lora"
            targets = prior.lora_targets(config, pipeline.vae.config.latent_channels)
            file = folder / "adapters.safetensors"
            how = lora_files.Learned(pipeline.task, pipeline.alignment, pipeline.ends_in_noise)
            lora_files.save(file, adapters, targets, scale=scale, how=how)
            print(f"adapters: {file}")
            if not unet.adapters:
                file = folder / "pytorch_lora_weights.safetensors"
                beside = lora_files.export(file, adapters, frozen.unet, scale=scale, how=how)
                if beside is not None:
                    print(f"biases and norms that were trained are no LoRA, and stand in {beside}")
    distributed.barrier("exported")


def finish(
    config: Config,
    workdir: Path,
    before: Pipeline,
    after: Pipeline,
    data: Data,
    writer: report.MetricsWriter,
    preemption: distributed.Preemption,
) -> None:
    """Samples before and after, side by side, with scores of depth and on ShapesWorld.

    Raises Preempted when told to make room.
    """

    def make_room() -> None:
        if preemption.reached():
            raise Preempted("told to make room after the training, which is saved; start the same command again")

    count = config.eval.num_images if datasets.scored(config) else config.eval.grid_images
    examples = data.examples(count, functools.partial(subjects.check, config))
    subject = subjects.make(config, examples, judged=True)
    compared = comparison.compare(
        comparison.contenders(before, after, config.objective.name, eval_sampler(config)),
        subject,
        len(examples),
        step_counts=config.eval.step_counts,
        batch_size=config.eval.batch_size,
        shown=config.eval.grid_images,
        after_batch=make_room,
    )
    if not distributed.is_main():
        return
    samples = workdir / "samples"
    samples.mkdir(exist_ok=True)
    picture = comparison.picture(compared)
    picture.save(samples / "before_and_after.png")
    writer.image(config.train.num_steps, "before_and_after", picture)
    if subject.judge is not None:
        table = comparison.table(compared)
        (workdir / "scores.md").write_text(table)
        print(f"\n{datasets.told_size(config)} pixels, {len(examples)} samples:\n\n{table}")
    print(f"pictures: {samples / 'before_and_after.png'}")


if __name__ == "__main__":
    program.run(main)
