"""ShapesWorld as a TensorFlow Datasets builder, written and read without TensorFlow, and as a `Source`.

    ShapesWorld(config=ShapesWorldConfig(size=48), data_dir="data").download_and_prepare()

The files are a function of the configuration, bit for bit. Example `i` of a split is the scene `i` of its world,
at any size: a validation set at 48 pixels shows the same scenes as one at 64.
"""

import contextlib
import dataclasses
import functools
import io
import multiprocessing
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import tensorflow_datasets as tfds
from absl import logging
from PIL import Image
from tensorflow_datasets.core.read_only_builder import builder_from_directory
from tqdm import tqdm

from d2f_jax.data import shapes
from d2f_jax.data.sources import Example, read_image
from d2f_jax.data.tfds_source import read_record
from d2f_jax.errors import InputError

WORLD_SEEDS = {"train": 0, "validation": 1}
DEPTH_SCALE = 1000  # stored units per world unit: 16 bits reach 65.5, and nothing lies farther than 60


@dataclasses.dataclass(eq=False, kw_only=True)
class ShapesWorldConfig(tfds.core.BuilderConfig):
    """Pictures of `size` x `size` pixels; the name, and so the folder, follows from the numbers."""

    name: str = dataclasses.field(init=False)
    size: int = 64
    num_train: int = 20_000
    num_validation: int = 2_000

    def __post_init__(self):
        self.name = f"{self.size}px_{self.num_train}_{self.num_validation}"


class ShapesWorld(tfds.core.GeneratorBasedBuilder):
    """Scenes of one to three solids under a sky, each with image, depth and caption."""

    builder_config: ShapesWorldConfig

    VERSION = tfds.core.Version("1.0.0")
    BUILDER_CONFIGS = [ShapesWorldConfig()]  # noqa: RUF012 (the base class declares it)

    def __init__(self, **kwargs):
        super().__init__(file_format="array_record", **kwargs)

    def _info(self) -> tfds.core.DatasetInfo:
        size = self.builder_config.size
        depth = tfds.features.Image(
            shape=(size, size, 1),
            dtype=np.uint16,
            encoding_format="png",
            doc=f"along the camera's axis in 1/{DEPTH_SCALE} of a world unit; 0 in the sky",
        )
        features = {
            "image": tfds.features.Image(shape=(size, size, 3), encoding_format="png"),
            "depth": depth,
            "caption": tfds.features.Text(),
            "index": np.int64,
        }
        return tfds.core.DatasetInfo(
            builder=self,
            description=shapes.__doc__,
            features=tfds.features.FeaturesDict(features),
            disable_shuffling=True,  # keeps the order of the world; the loader shuffles
        )

    def _split_generators(self, dl_manager):
        config = self.builder_config
        return {
            "train": self._generate_examples("train", config.num_train),
            "validation": self._generate_examples("validation", config.num_validation),
        }

    def _generate_examples(self, split: str, count: int) -> Iterator[tuple[int, dict]]:
        size = self.builder_config.size
        encode = functools.partial(_encode, WORLD_SEEDS[split], size)
        bar = functools.partial(tqdm, total=count, desc=f"ShapesWorld {size}px {split}", unit="scene")
        workers = os.cpu_count() or 1
        if workers == 1 or count < _WORTH_WORKERS:
            yield from bar(map(encode, range(count)))
            return
        # Not `fork`: JAX may already run threads in this process.
        with multiprocessing.get_context("spawn").Pool(workers) as pool:
            yield from bar(pool.imap(encode, range(count), chunksize=32))


class ShapesWorldSource:
    """One split of the built `ShapesWorld` in `folder`; its examples have depth."""

    def __init__(self, folder: str | Path, split: str):
        builder = builder_from_directory(folder)  # unlike the one that renders, it pickles
        undecoded = {"image": tfds.decode.SkipDecoding(), "depth": tfds.decode.SkipDecoding()}
        # A TFDS decorator hides the parameters from the type checker.
        self._records = builder.as_data_source(split=split, decoders=undecoded)  # pyright: ignore[reportCallIssue]
        self._name = f"{folder} {split}"

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> Example:
        where = f"{self._name}[{index}]"
        record = read_record(self._records, index, where)
        depth = np.asarray(Image.open(io.BytesIO(record["depth"])), np.float32) / DEPTH_SCALE
        return {"image": read_image(record["image"], where), "text": record["caption"].decode(), "depth": depth}


def shapes_world(
    data_dir: str | Path, *, size: int, num_train: int, num_validation: int, split: str
) -> ShapesWorldSource:
    """The split `train` or `validation`, rendered into `data_dir` first where it is not there yet.

    The building is atomic: an interrupted one leaves no data set behind. Several processes that share `data_dir`
    must not build at the same time. A script that builds needs the usual `if __name__ == "__main__"`, as the
    rendering is spread over processes.
    """
    for name, value in [("size", size), ("num_train", num_train), ("num_validation", num_validation)]:
        if value < 1:
            raise InputError(f"ShapesWorld: {name}={value} must be at least 1")
    if split not in WORLD_SEEDS:
        raise InputError(f"ShapesWorld has no split {split!r}, only {sorted(WORLD_SEEDS)}")
    config = ShapesWorldConfig(size=size, num_train=num_train, num_validation=num_validation)
    standard = ShapesWorld.builder_configs.get(config.name)  # TFDS refuses a second object of the same name
    try:
        with _quiet_tfds():
            builder = ShapesWorld(config=standard or config, data_dir=str(data_dir))
            builder.download_and_prepare()
    except OSError as error:
        raise InputError(f"{data_dir}: ShapesWorld cannot be built there: {error}") from error
    return ShapesWorldSource(builder.data_dir, split)


_WORTH_WORKERS = 1000  # scenes; the start of the processes takes as long as a few hundred


@contextlib.contextmanager
def _quiet_tfds() -> Iterator[None]:
    """No download sizes, warnings and bars without an end: that of `_generate_examples` says it all."""
    verbosity = logging.get_verbosity()
    logging.set_verbosity(logging.ERROR)
    tfds.disable_progress_bar()
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        tfds.enable_progress_bar()
        logging.set_verbosity(verbosity)


def _encode(seed: int, size: int, index: int) -> tuple[int, dict]:
    scene = shapes.sample_scene(seed, index)
    picture = shapes.render(scene, size)
    depth = np.rint(picture.depth * DEPTH_SCALE).astype(np.uint16)
    return index, {
        "image": _png(picture.image),
        "depth": _png(depth),
        "caption": scene.caption,
        "index": index,
    }


def _png(pixels: np.ndarray) -> io.BytesIO:
    """Encoded here because TFDS would need TensorFlow to do it."""
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "png")
    file.seek(0)
    return file
