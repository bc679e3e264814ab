"""Examples as records of bytes, in ArrayRecord files that are read at random: of latents, pairs or pictures alike.

A record is a safetensors blob, which names its arrays and tells their shapes and dtypes. The caption lies among them,
as UTF-8 in uint8: safetensors hands out its metadata of files alone, so that of bytes would have to be parsed again.
Files are not compressed: float16 latents shrink by 8% and take four times as long to read. Every record carries a
checksum, so damage is noticed and never handed out.
"""

import functools
import itertools
import zlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import safetensors
import safetensors.numpy
from array_record.python.array_record_module import ArrayRecordReader, ArrayRecordWriter

from d2f_jax.data.sources import LATENTS, Example, read_image
from d2f_jax.errors import InputError, SaveError

_STRINGS = ("text", "image")
_NAMES = {*_STRINGS, *LATENTS, *(f"mirrored_{name}" for name in LATENTS), "depth", "noise", "text_states", "valid"}
_WRITER_OPTIONS = "group_size:1,uncompressed"  # a group is read as a whole, for one of its records too
_READER_OPTIONS = "readahead_buffer_size:0,max_parallelism:0"
_READER_BUFFER = 1 << 15  # bytes
_OPEN_FILES = 64  # at once, below what a process may open; opening one again takes 0.15 ms
_CHUNK = 1 << 24  # bytes read at once
_AGAIN = "copy or make it again"


def encode(record: Mapping[str, str | bytes | np.ndarray]) -> bytes:
    """`text` as a string, `image` as the bytes of an encoded picture, and arrays by the names that `Example` has."""
    if unknown := sorted(set(record) - _NAMES):
        raise ValueError(f"a record holds no {', '.join(unknown)}, only {', '.join(sorted(_NAMES))}")
    return safetensors.numpy.save({name: _as_array(value) for name, value in record.items()})


def decode(record: bytes, name: str = "record") -> Example:
    """What was encoded, bit for bit; its picture decoded. Raises InputError, which begins with `name`, if it cannot."""
    try:
        arrays: dict[str, Any] = safetensors.numpy.load(record)
        if unknown := sorted(set(arrays) - _NAMES):
            raise ValueError(f"it holds {', '.join(unknown)}, which this version does not know")
        arrays["text"] = arrays["text"].tobytes().decode()
    except (safetensors.SafetensorError, KeyError, ValueError) as error:
        raise InputError(f"{name} is no example ({error}); {_AGAIN}") from error
    if "image" in arrays:
        arrays["image"] = read_image(arrays["image"].tobytes(), name)
    return cast(Example, arrays)


def write_shard(file: Path, records: Iterable[bytes]) -> int:
    """Writes `records` into `file` and returns their number; it appears under its name when it is whole.

    Raises SaveError if it cannot be written. Whatever is raised, nothing is left behind.
    """
    part = file.with_name(file.name + ".part")
    count = 0
    try:
        writer = ArrayRecordWriter(str(part), _WRITER_OPTIONS)
        try:
            for record in records:
                _write(writer.write, file, record)
                count += 1
        finally:
            _write(writer.close, file)
        part.replace(file)
    except BaseException:
        part.unlink(missing_ok=True)
        raise
    return count


def checksum(file: Path) -> int:
    """CRC-32 of a file."""
    value = 0
    with file.open("rb") as stream:
        while chunk := stream.read(_CHUNK):
            value = zlib.crc32(chunk, value)
    return value


class Shards:
    """The examples of several files, one after another, read at random; a `Source`.

    `counts` are the numbers of records in `files`, which are opened when they are read. It pickles: every process opens
    its own. Raises IndexError for what is out of range, also below 0, and InputError naming file and record for damage.
    """

    def __init__(self, files: Sequence[Path], counts: Sequence[int]) -> None:
        self._files, self._counts = tuple(files), tuple(counts)
        self._ends = np.array([0, *itertools.accumulate(counts)])
        self._reader = functools.lru_cache(_OPEN_FILES)(self._opened)

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, index: int) -> Example:
        if not 0 <= index < len(self):
            raise IndexError(f"example {index} of {len(self)}")
        shard = int(np.searchsorted(self._ends, index, "right")) - 1
        place = int(index - self._ends[shard])
        name = f"{self._files[shard]}: record {place}"
        try:
            record = self._reader(shard).read([place])[0]
        except RuntimeError as error:
            raise InputError(f"{name} is damaged ({_reason(error)}); {_AGAIN}") from error
        return decode(record, name)

    def __reduce__(self) -> tuple[Any, ...]:
        return Shards, (self._files, self._counts)

    def _opened(self, shard: int) -> ArrayRecordReader:
        file = self._files[shard]
        reader = ArrayRecordReader(str(file), _READER_OPTIONS, file_reader_buffer_size=_READER_BUFFER)
        # A file that is missing or damaged opens too, and may even hand out other bytes.
        if not reader.ok() or reader.num_records() != self._counts[shard]:
            found = f"{reader.num_records()} of {self._counts[shard]} records" if file.is_file() else "missing"
            raise InputError(f"{file} is damaged ({found}); {_AGAIN}")
        return reader


def _as_array(value: str | bytes | np.ndarray) -> np.ndarray:
    if isinstance(value, np.ndarray):
        return value
    return np.frombuffer(value.encode() if isinstance(value, str) else value, np.uint8)


def _write(call: Any, file: Path, *args: bytes) -> None:
    try:
        call(*args)
    except RuntimeError as error:
        raise SaveError(f"{file} cannot be written ({_reason(error)}); make room or give another folder") from error


def _reason(error: Exception) -> str:
    return " ".join(str(error).split())[:160]
