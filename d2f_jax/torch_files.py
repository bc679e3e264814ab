"""Tensors of a PyTorch file, read without PyTorch, and without running what else the file holds.

`torch.save` writes a zip archive: a pickle, and beside it the bytes of each storage. The pickle may name any class of
the program that wrote it; all but tensors, their storages and plain containers become objects that hold nothing.
"""

import collections
import dataclasses
import pickle
import zipfile
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from d2f_jax.errors import InputError

_DTYPES = {
    "BFloat16Storage": jnp.bfloat16,
    "BoolStorage": np.bool_,
    "ByteStorage": np.uint8,
    "CharStorage": np.int8,
    "DoubleStorage": np.float64,
    "FloatStorage": np.float32,
    "HalfStorage": np.float16,
    "IntStorage": np.int32,
    "LongStorage": np.int64,
    "ShortStorage": np.int16,
}


@dataclasses.dataclass(frozen=True)
class Tensor:
    """Where its numbers are; `offset` and `strides` count numbers."""

    archive: zipfile.ZipFile
    storage: str
    dtype: np.dtype
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    def read(self) -> np.ndarray:
        """Raises InputError if the file is damaged there."""
        try:
            whole = np.frombuffer(self.archive.read(self.storage), self.dtype)
        except (KeyError, zipfile.BadZipFile, ValueError, OSError) as error:
            raise InputError(f"{self.archive.filename} is damaged ({error}); copy it again") from error
        if not self._lies_within(len(whole)):
            raise InputError(f"{self.archive.filename} is damaged ({self.storage} is too short); copy it again")
        strides = [stride * self.dtype.itemsize for stride in self.strides]
        return np.lib.stride_tricks.as_strided(whole[self.offset :], self.shape, strides).copy()

    def _lies_within(self, size: int) -> bool:
        """Of a storage of so many numbers; what a file says of its tensors could point anywhere."""
        said = (self.offset, *self.shape, *self.strides)
        if len(self.shape) != len(self.strides) or not all(isinstance(n, int) and n >= 0 for n in said):
            return False
        last = self.offset + sum((side - 1) * stride for side, stride in zip(self.shape, self.strides, strict=True))
        return 0 in self.shape or last < size


def load(file: str | Path) -> Any:
    """What was saved, with a `Tensor` for each tensor. Raises InputError for a file that is missing or no such file."""
    try:
        archive = zipfile.ZipFile(file)
        (listed,) = (name for name in archive.namelist() if name.endswith("/data.pkl"))
        with archive.open(listed) as pickled:
            return _Unpickler(pickled, archive, listed.removesuffix("data.pkl")).load()
    except OSError as error:
        raise InputError(f"{file} cannot be read ({error.strerror}); give a file that torch.save wrote") from error
    except Exception as error:  # whatever a pickle that is damaged, or of another kind, makes of itself
        told = " ".join(str(error).split())
        raise InputError(
            f"{file} is no PyTorch file, or damaged ({told}); give a file that torch.save wrote"
        ) from error


class _Unpickler(pickle.Unpickler):
    def __init__(self, pickled: Any, archive: zipfile.ZipFile, folder: str) -> None:
        super().__init__(pickled)
        self.archive, self.folder = archive, folder

    def persistent_load(self, pid: Any) -> tuple[str, np.dtype]:
        _, kind, key, *_ = pid
        return f"{self.folder}data/{key}", np.dtype(_DTYPES[kind])

    def find_class(self, module: str, name: str) -> Any:
        match module, name:
            case "collections", "OrderedDict":
                return collections.OrderedDict
            case "torch._utils", "_rebuild_tensor_v2":
                return self._tensor
            case "torch._utils", "_rebuild_parameter":
                return lambda tensor, *_: tensor
            case "torch", _ if name.endswith("Storage"):
                return name
        return _Unknown

    def _tensor(self, storage: tuple[str, np.dtype], offset: int, shape: Any, strides: Any, *_: Any) -> Tensor:
        return Tensor(self.archive, *storage, offset, tuple(shape), tuple(strides))


class _Unknown:
    """Stands for any other class, function and what they make; takes all that a pickle may do to it."""

    def __new__(cls, *_: Any, **__: Any) -> "_Unknown":
        return super().__new__(cls)

    def _nothing(self, *_: Any, **__: Any) -> None:
        return None

    __init__ = __setstate__ = __setitem__ = append = extend = add = _nothing

    def __call__(self, *_: Any, **__: Any) -> "_Unknown":
        return self
