"""What the cells of the study share: its size, the rendered world, compiled programs, and where weights lie."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import optax

from configs import quickstart
from d2f_jax import metrics, optim, prepare, prior, settings, sharding
from d2f_jax import step as steps
from d2f_jax.data import prepared
from d2f_jax.data.shapes_world import shapes_world
from d2f_jax.data.sources import Example
from d2f_jax.pipeline import Pipeline
from d2f_jax.program import Config
from launch.study.exam import Exam

LATENTS, DEPTHS, COLOURS = "latents", "depths", "colours"
"""Folders of the workdir: ShapesWorld encoded, its depth beside its pictures, and pictures of one colour."""
COLOUR_NAMES = ("black", "white", "grey", "red", "orange", "yellow", "green", "cyan", "blue", "purple")


@dataclasses.dataclass(frozen=True)
class Size:
    """How much is measured, and of which model."""

    seeds: tuple[int, ...] = (0, 1, 2)
    model: str = "tiny-sd"
    pixels: int = 48
    native_pixels: int = 64  # where tiny-sd was made, and where depth is told
    scenes: int = 4096  # to train on
    pairs: int = 2048  # for reflow
    steps: int = 800  # of a run of resolution adaptation; depth takes half as many, the others a quarter
    batch_size: int = 16
    images: int = 128  # in each score
    few: int = 4  # steps of a sampler
    many: int = 25

    @property
    def marks(self) -> tuple[int, ...]:
        """The steps after which a run is judged, as far as it comes."""
        return tuple(sorted({0, *(self.steps // part for part in (32, 16, 8, 4, 2, 1))}))


@dataclasses.dataclass(frozen=True)
class Step:
    """A train step and the optimizer that is in it."""

    run: Callable[..., Any]
    optimizer: optax.GradientTransformation


class Bench:
    """Programs are compiled once for all cells that differ by seed alone."""

    def __init__(self, workdir: Path, size: Size) -> None:
        self.workdir, self.size = workdir, size
        self.mesh = sharding.make_mesh()
        self._exams: dict[tuple[int, int], Exam] = {}
        self._steps: dict[Any, Step] = {}
        self._pipelines: dict[Any, Pipeline] = {}

    def weights(self, name: str) -> Path:
        """Where the cell `name` leaves its diffusers folder."""
        return self.workdir / "weights" / name

    def placed(self, config: Config) -> Config:
        """A cell's config with the workdir's places in it; what it trains on is made first if it is not there.

        A cell's model may be `weights:NAME`, what that cell has trained, and its sources are folders of the workdir.
        """
        config = config.copy_and_resolve_references()
        kind, _, name = config.model.partition(":")
        config.model = str(self.weights(name)) if kind == "weights" else config.model
        config.data.sources = tuple(f"array_record:{self._encoded(folder)}" for folder in config.data.sources)
        return config

    def rendered(self, pixels: int) -> Config:
        """A config whose data is ShapesWorld as it is rendered."""
        config: Config = quickstart.get_config()
        config.model, config.data.image_size = self.size.model, pixels
        config.data.sources = (f"shapes_world:{self.workdir / 'world'}",)
        config.data.num_train = self.size.scenes
        config.data.num_validation = self.size.images * len(self.size.seeds)
        return config

    def held_out(self, seed: int, pixels: int) -> list[Example]:
        """Scenes that no run is trained on, others for each seed: error bars hold that chance too."""
        data, first = self.rendered(pixels).data, self.size.seeds.index(seed) * self.size.images
        counts = {"num_train": data.num_train, "num_validation": data.num_validation}
        world = shapes_world(self.workdir / "world", size=pixels, split="validation", **counts)
        return [world[first + i] for i in range(self.size.images)]

    def exam(self, seed: int, pixels: int) -> Exam:
        """Each seed is asked its own captions, and begins with its own noise."""
        if (seed, pixels) not in self._exams:
            examples = self.held_out(seed, pixels)
            images = np.stack([example["image"] for example in examples if "image" in example])
            classifier = metrics.load_classifier()
            self._exams[seed, pixels] = Exam(
                prompts=[example["text"] for example in examples],
                reference=metrics.feature_statistics(classifier, images),
                classifier=classifier,
                seed=seed,
                pixels=pixels,
            )
        return self._exams[seed, pixels]

    def step(self, config: Config, networks: steps.Networks, pipeline: Pipeline) -> Step:
        options, optimizer_options = prior.step_options(config, pipeline), settings.make_optimizer_options(config)
        key = networks, options, optimizer_options
        if key not in self._steps:
            optimizer = optim.make_optimizer(optimizer_options)
            run = steps.make_train_step(networks, pipeline.schedule, optimizer, options, self.mesh)
            self._steps[key] = Step(run, optimizer)
        return self._steps[key]

    def sampling(self, pipeline: Pipeline) -> Pipeline:
        """The pipeline without its parameters, and with the programs that were compiled for one like it."""
        scheduler = json.dumps(pipeline.scheduler_config, sort_keys=True)
        key = pipeline.alignment, pipeline.task, scheduler
        if key not in self._pipelines:
            self._pipelines[key] = dataclasses.replace(prior.hollow(pipeline), mesh=self.mesh)
        return self._pipelines[key]

    def _encoded(self, name: str) -> Path:
        """The folder of LATENTS, DEPTHS or COLOURS, or one that a cell has filled."""
        folder = self.workdir / name
        if name in (LATENTS, DEPTHS, COLOURS) and not (folder / prepared.MANIFEST).exists():
            config = self.rendered(self.size.native_pixels if name == DEPTHS else self.size.pixels)
            config.task.name = "image_to_depth" if name == DEPTHS else "text_to_image"
            if name == COLOURS:
                config.data.sources = (f"uniform_colours:{','.join(COLOUR_NAMES)}",)
            prepare.prepare(config, folder, prepare.Options(batch_size=32))
        return folder
