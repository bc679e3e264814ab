"""Arrays from untrusted bytes in NumPy's `.npy` format: nothing is unpickled, and a false header allocates nothing."""

import io
import math

import numpy as np

from d2f_jax.errors import InputError


def read_npy(data: bytes, name: str, kinds: str = "f") -> np.ndarray:
    """The array, of any shape, as float32.

    Raises `InputError`, beginning with `name`, unless it is floating point, or of another of NumPy's `kinds`.
    """
    file = io.BytesIO(data)
    try:
        version = np.lib.format.read_magic(file)
        read_header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, fortran_order, dtype = read_header(file)
    except Exception as error:  # the header is a Python literal, and may be broken in as many ways as one
        reason = " ".join(str(error).split())
        raise InputError(f"{name} is no npy file ({reason}); write it anew") from error
    if dtype.kind not in kinds:
        wanted = "floating point; write it anew as float16 or float32" if kinds == "f" else "numbers or booleans"
        raise InputError(f"{name} holds {dtype}, wanted is {wanted}")
    if min(shape, default=1) < 1 or math.prod(shape) * dtype.itemsize != len(data) - file.tell():
        raise InputError(f"{name} has {len(data) - file.tell()} bytes, not those of {shape} {dtype}; write it anew")
    values = np.frombuffer(data, dtype, offset=file.tell()).reshape(shape, order="F" if fortran_order else "C")
    with np.errstate(over="ignore"):
        return np.ascontiguousarray(values, np.float32)


def read_mask(data: bytes, name: str) -> np.ndarray:
    """bool: where an array of numbers or booleans is 1 or more. Raises as `read_npy`."""
    return read_npy(data, name, "fbiu") >= 1
