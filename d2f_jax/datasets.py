"""The data of a run: the sources its config names, opened, and what of them is held out."""

import collections
import dataclasses
import itertools
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from absl import logging
from jax.sharding import Mesh

from d2f_jax import distributed, sharding
from d2f_jax.checkpoint import Position
from d2f_jax.data import prepared
from d2f_jax.data.depth_lists import DepthList
from d2f_jax.data.fit import Fit
from d2f_jax.data.loader import OnDamage, train_batches
from d2f_jax.data.open import open_source
from d2f_jax.data.prepared import PreparedSource
from d2f_jax.data.shapes_world import shapes_world
from d2f_jax.data.sources import Example, Source, held_out, joined, thinned
from d2f_jax.errors import InputError
from d2f_jax.pipeline import Pipeline
from d2f_jax.program import Config
from d2f_jax.step import Batch
from d2f_jax.weights import Tokenize

_SHAPES_WORLD = "shapes_world"  # with :FOLDER where it is built, else in the workdir


@dataclasses.dataclass(frozen=True)
class Data:
    """`train` sources, and `validation` ones of the same kind (none if nothing is held out).

    `shown` are those of which samples are drawn and judged.
    """

    train: list[Source]
    validation: list[Source]
    shown: list[Source]
    tokenize: Tokenize
    downsampling: int  # pixels of an image to one of its latent
    null_text: np.ndarray | None  # text states of the empty caption, where captions come encoded
    on_damage: OnDamage
    neighbours_alike: bool  # as frames of one scene are: what is shown is then spread over each source

    def position(self) -> Position:
        """What decides, beside the config and the step, which examples come next."""
        return {"examples": [len(source) for source in self.train]}

    def check_position(self, position: Position | None) -> None:
        """Raises InputError if a checkpoint was made with other numbers of examples: their order would be another."""
        if position is not None and position != self.position():
            raise InputError(
                f"config.data.sources have {self.position()['examples']} examples, but {position['examples']} when the "
                "checkpoint was made: the run cannot go on exactly; restore them, or begin a new --workdir with "
                "config.init_from"
            )

    def examples(self, count: int, check: Callable[[Example], None] = lambda _: None) -> list[Example]:
        """At most `count` examples to draw. Raises InputError as `reading`."""
        return list(self.reading(count, check))

    def reading(self, count: int, check: Callable[[Example], None] = lambda _: None) -> Iterator[Example]:
        """At most `count` examples to draw, in turn from each source, each of them read when its turn has come.

        They are the first of each source, or evenly spread over it. Raises InputError for one that cannot be read, or
        for which `check` raises it, unless such are skipped: of the first, others follow.
        """
        shown = self.shown
        if self.neighbours_alike:
            shares = collections.Counter(k for k, _ in itertools.islice(_turns(shown), count))
            shown = [thinned(source, shares[k]) for k, source in enumerate(shown)]
        return itertools.islice(self._readable(shown, check), count)

    def _readable(self, sources: list[Source], check: Callable[[Example], None]) -> Iterator[Example]:
        for k, i in _turns(sources):
            try:
                example = sources[k][i]
                check(example)
            except (InputError, OSError) as error:
                if self.on_damage == "stop":
                    raise InputError(f"example {i} of source {k}: {error}") from error
                logging.error("left out: example %s of source %s: %s", i, k, error)
            else:
                yield example

    def train_batches(self, config: Config, mesh: Mesh, first: int) -> Generator[Batch]:
        """Endless global batches on their devices from number `first` on, the next on its way while one is in use."""
        options = config.data
        local = self._batches(
            self.train,
            config,
            mesh,
            config.train.batch_size,
            weights=options.weights,
            first_batch=first,
            seed=config.seed,
            crop=options.crop,
            random_flip=options.random_flip,
            caption_dropout=options.caption_dropout,
            num_workers=options.num_workers,
        )
        try:
            ahead = _put(mesh, next(local), config.train.batch_size)
            for batch in local:
                batch, ahead = ahead, _put(mesh, batch, config.train.batch_size)
                yield batch
        finally:
            local.close()

    def validation_batches(self, config: Config, mesh: Mesh, count: int) -> list[tuple[Batch, np.ndarray]]:
        """`count` held-out examples, or all there are: batches and their rows' numbers, filled up with weight 0."""
        count = min(count, sum(map(len, self.validation)))
        size = config.train.batch_size // config.train.accumulate
        local = self._batches([joined(self.validation)], config, mesh, size, seed=config.eval.seed)
        rows, batches = sharding.local_rows(mesh, size), []
        for start in range(0, count, size):
            batch = dict(next(local))
            batch["weight"] = batch["weight"] * (start + rows < count)
            batches.append((_put(mesh, batch, size), np.arange(start, start + size)))
        local.close()
        return batches

    def _batches(self, sources: list[Source], config: Config, mesh: Mesh, size: int, **options: Any) -> Any:
        height, width = image_shape(config)
        return train_batches(
            sources,
            self.tokenize,
            batch_size=size,
            rows=sharding.local_rows(mesh, size).tolist(),
            image_shape=(height, width),
            depth=of_depth(config),
            latent_shape=(height // self.downsampling, width // self.downsampling),
            resize=config.data.resize,
            on_damage=self.on_damage,
            null_text=self.null_text,
            **options,
        )


def open_given(config: Config) -> dict[str, Source]:
    """The config's sources, of training and of evaluation, that are there already: all but ShapesWorld."""
    specs = (*config.data.sources, *config.eval.sources)
    return {spec: open_source(spec) for spec in dict.fromkeys(specs) if not _is_shapes_world(spec)}


def check_prepared(config: Config, pipeline: Pipeline, given: dict[str, Source]) -> None:
    """Raises InputError for latents or text states that other networks, another size or length of text have made."""
    tokens = pipeline.tokenize([""]).shape[1]
    for source in given.values():
        if isinstance(source, PreparedSource):
            parts = (pipeline.vae, pipeline.text_encoder, pipeline.tokenizer)
            prepared.check_model(source.manifest, *parts, image_shape=image_shape(config))
            plan = source.manifest.plan
            if plan.task == config.task.name and plan.text_shape[0] != tokens:
                raise InputError(
                    f"{source.folder} was prepared with an empty text of {plan.text_shape[0]} tokens, but "
                    f"config.task.pad_text={config.task.pad_text} makes {tokens}; change it, or prepare the data again"
                )


def open_data(config: Config, workdir: Path, pipeline: Pipeline, given: dict[str, Source]) -> Data:
    """All of the config's sources; ShapesWorld is rendered on the first start, by the main process.

    Shown is what is held out, or else what is trained on, unless `config.eval.sources` are given.
    """
    data = config.data
    train: list[Source] = []
    validation: list[Source] = []
    for spec in data.sources:
        if _is_shapes_world(spec):
            train.append(_shapes_world(config, spec, workdir, "train"))
            validation.append(_shapes_world(config, spec, workdir, "validation"))
        elif (own := _own_validation(given[spec])) is not None:
            train.append(given[spec])
            validation.append(own)
        elif data.held_out:
            kept, withheld = held_out(given[spec], data.held_out)
            train.append(kept)
            validation.append(withheld)
        else:
            train.append(given[spec])
    null_text = next((source.null_text for source in train if isinstance(source, PreparedSource)), None)
    shown = [
        _shapes_world(config, spec, workdir, "validation") if _is_shapes_world(spec) else given[spec]
        for spec in config.eval.sources
    ]
    return Data(
        train=train,
        validation=validation,
        shown=shown or validation or train,
        tokenize=pipeline.tokenize,
        downsampling=pipeline.vae.config.downsampling,
        null_text=null_text,
        on_damage=data.on_damage,
        neighbours_alike=of_depth(config),
    )


def depth_protocol(config: Config, given: dict[str, Source]) -> str:
    """Which of `metrics.DEPTH_PROTOCOLS` depth is judged by: the sources' own, or else the config's, or else "all".

    Raises InputError where sources differ in it, and where the config says another.
    """
    specs, said = config.eval.sources or config.data.sources, config.eval.depth.protocol
    opened = {spec: given.get(spec) for spec in specs}
    own = {spec: s.protocol if isinstance(s, DepthList) else said or "all" for spec, s in opened.items()}
    if len(set(own.values())) > 1:
        told = ", ".join(f"{spec} by {protocol}" for spec, protocol in own.items())
        raise InputError(f"depth is judged by one protocol at a time: {told}; give them one after another")
    protocol = own[specs[0]]
    if said and said != protocol:
        raise InputError(f"config.eval.depth.protocol={said}, but {specs[0]} names its own; leave the config's empty")
    return protocol


def image_shape(config: Config) -> tuple[int, int]:
    """Height and width of the pictures, in pixels."""
    return config.data.image_size, config.data.image_width or config.data.image_size


def told_size(config: Config) -> str:
    """The same in words: "512", or "384 x 512"."""
    return " x ".join(map(str, dict.fromkeys(image_shape(config))))


def of_depth(config: Config) -> bool:
    """Whether examples are read with depth, and without captions."""
    return config.task.name == "image_to_depth"


def plain_fit(config: Config) -> Fit:
    """The config's size and resizing, cut in the middle, and nothing by chance."""
    return Fit(
        image_shape=image_shape(config),
        depth=of_depth(config),
        resize=config.data.resize,
        crop="center",
        random_flip=False,
        caption_dropout=0.0,
        null_text=None,
    )


def scored(config: Config) -> bool:
    """Whether results can be judged: depth, and captions of ShapesWorld alone."""
    return of_depth(config) or all(map(_is_shapes_world, config.eval.sources or config.data.sources))


def of_colours(config: Config) -> bool:
    """Whether results are judged against pictures of one colour each, and nothing else."""
    return all(spec.partition(":")[0] == "uniform_colours" for spec in config.eval.sources or config.data.sources)


def _turns(sources: list[Source]) -> Iterator[tuple[int, int]]:
    """Number of the source, and of the example in it."""
    turns = itertools.zip_longest(*(range(len(source)) for source in sources))
    return ((k, i) for turn in turns for k, i in enumerate(turn) if i is not None)


def _is_shapes_world(spec: str) -> bool:
    return spec.partition(":")[0] == _SHAPES_WORLD


def _own_validation(source: Source) -> Source | None:
    """What was held out when a folder was prepared."""
    if isinstance(source, PreparedSource) and source.split == "train" and "validation" in source.manifest.shards:
        own = PreparedSource(source.folder, "validation")
        return own if len(own) else None
    return None


def _shapes_world(config: Config, spec: str, workdir: Path, split: str) -> Source:
    """Squares, of the pictures' longer side; of those that are no squares a part is cut out."""
    folder = Path(spec.partition(":")[2] or workdir / "data")

    def build() -> Source:
        counts = {"num_train": config.data.num_train, "num_validation": config.data.num_validation}
        return shapes_world(folder, size=max(image_shape(config)), split=split, **counts)

    return distributed.main_first(f"ShapesWorld {split}", build)


def _put(mesh: Mesh, batch: Any, size: int) -> Batch:
    for reason in batch["damaged"]:
        logging.error("left out: %s", reason)
    return sharding.put_rows(mesh, {name: x for name, x in batch.items() if name != "damaged"}, size)
