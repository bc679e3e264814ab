"""Any data set that TensorFlow Datasets has prepared as array_record, as a `Source`; TensorFlow isn't needed."""

from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from tensorflow_datasets.core import read_only_builder

from d2f_jax.data.sources import Example, read_image
from d2f_jax.errors import InputError


class TFDSSource:
    """One split of a prepared data set; only its files are read, never the code that prepared it.

    `name` is the folder that holds `dataset_info.json`, or a name as in `coco_captions/2014` that is looked up in
    `data_dir` (TFDS's own default if None). `split` may be a slice, `train[:90%]`. `image` and `text` say which
    features hold picture and caption, `captions/text` one inside another; of several captions the first is taken.
    """

    def __init__(
        self,
        name: str,
        *,
        split: str = "train",
        image: str = "image",
        text: str = "caption",
        data_dir: str | None = None,
    ):
        builder = _builder(name, data_dir)
        features = builder.info.features
        for option, key in [("image", image), ("text", text)]:
            _check_feature(name, features, option, key)
        # Nor are other pictures decoded: no one asks for them.
        pictures = [key for key, feature in features.items() if isinstance(feature, tfds.features.Image)]
        undecoded = {key: tfds.decode.SkipDecoding() for key in pictures} | _nested(image, tfds.decode.SkipDecoding())
        self._name, self._image, self._text = f"{name} {split}", image, text
        try:
            # A TFDS decorator hides the parameters from the type checker.
            self._records: Any = builder.as_data_source(  # pyright: ignore[reportCallIssue]
                split=split, decoders=undecoded
            )
        except NotImplementedError as error:
            raise InputError(
                f"{name} is prepared as {_format(builder)}, which has no random access; "
                "prepare it with download_and_prepare(file_format='array_record')"
            ) from error
        except ValueError as error:
            raise InputError(f"{name}, split={split}: {_line(error)}") from error
        except OSError as error:
            raise InputError(f"{name} cannot be read: {_line(error)}; prepare it anew") from error

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> Example:
        where = f"{self._name}[{index}]"
        record = read_record(self._records, index, where)
        image = _look_up(record, self._image)
        return {"image": read_image(image, f"{where}: the picture"), "text": _caption(record, self._text, where)}


def read_record(records: Any, index: int, where: str) -> dict[str, Any]:
    """The record of a TFDS data source; raises `InputError`, which begins with `where`, if it is damaged."""
    try:
        return records[index]
    except Exception as error:  # the reader and protobuf have their own, not of one family
        raise InputError(f"{where} cannot be read: {_line(error)}; prepare the data set anew") from error


def _builder(name: str, data_dir: str | None) -> Any:
    try:
        if Path(name).is_dir():
            return read_only_builder.builder_from_directory(name)
        return read_only_builder.builder_from_files(name, data_dir=data_dir)
    except tfds.core.DatasetNotFoundError as error:
        place = f"below {data_dir}" if data_dir else "where TFDS looks"
        raise InputError(
            f"no data set {name} is prepared {place}; give data_dir, or the folder that holds dataset_info.json"
        ) from error
    except (OSError, ValueError) as error:
        raise InputError(f"{name} is not a prepared TFDS data set: {_line(error)}") from error


def _check_feature(name: str, features: Any, option: str, key: str) -> None:
    """The way along `key` leads through dictionaries to one feature, a picture for `image`."""
    feature = features
    for part in key.split("/"):
        inner = getattr(feature, "feature", feature)  # of a sequence
        if not isinstance(inner, tfds.features.FeaturesDict) or part not in dict(inner):
            raise InputError(f"{name} has no feature {key!r}; set {option} to one of {', '.join(sorted(features))}")
        feature = inner[part]
    if option == "image" and not isinstance(feature, tfds.features.Image):
        raise InputError(f"{name}: the feature {key!r} is {type(feature).__name__}, no Image; set {option} to another")


def _nested(key: str, value: Any) -> dict[str, Any]:
    for part in reversed(key.split("/")):
        value = {part: value}
    return value


def _look_up(record: Any, key: str) -> Any:
    for part in key.split("/"):
        record = record[part]
    return record


def _caption(record: Any, key: str, where: str) -> str:
    text = _look_up(record, key)
    while isinstance(text, (list, tuple, np.ndarray)):
        if len(text) == 0:
            raise InputError(f"{where} has no caption in {key!r}; filter the data set or choose another feature")
        text = text[0]
    if isinstance(text, str):
        return text
    if not isinstance(text, bytes):
        raise InputError(f"{where}: {key!r} is {type(text).__name__}, no text; choose another feature")
    try:
        return text.decode()
    except UnicodeDecodeError as error:
        raise InputError(f"{where}: {key!r} is not UTF-8 text ({error})") from error


def _format(builder: Any) -> str:
    return builder.info.file_format.value


def _line(error: Exception) -> str:
    """The first line: TFDS goes on with lists of everything that there is."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
