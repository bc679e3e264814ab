"""Which devices a program is traced for: what is the fastest way there is not known from arrays."""

import contextlib
import contextvars
import re
from collections.abc import Iterator
from typing import Any

import jax
from jax.sharding import Mesh

_MESH: contextvars.ContextVar[Mesh | None] = contextvars.ContextVar("mesh", default=None)
_PLAIN: Any = jax.make_user_context(False)  # a function that was traced is traced again within


@contextlib.contextmanager
def split_over(mesh: Mesh | None) -> Iterator[None]:
    """Within it rows are split over all axes of `mesh`, or on the one default device for None.

    The partitioner knows nothing of fused kernels, and a program may be made for devices that are not here, so that
    nothing is chosen where this is not said. To be entered inside of the function that is traced.
    """
    token = _MESH.set(Mesh(jax.devices()[:1], ("data",)) if mesh is None else mesh)
    try:
        yield
    finally:
        _MESH.reset(token)


def plain() -> contextlib.AbstractContextManager[None]:
    """Within it nothing is chosen for the devices: a fused kernel's operations could not be counted."""
    return _PLAIN(True)


def mesh() -> Mesh | None:
    """What `split_over` said."""
    return _MESH.get()


def platform() -> str | None:
    """Of the mesh's devices, as JAX names it: "cpu", "gpu", "tpu"; None where nothing was said, or is to be chosen."""
    here = mesh()
    return None if here is None or _PLAIN.value else here.devices.flat[0].platform


def compute_capability() -> float:
    """Of the mesh's GPUs, as NVIDIA numbers it: 9.0 for Hopper; 0 where they are another's, or none."""
    here = mesh()
    told = "" if here is None else str(getattr(here.devices.flat[0], "compute_capability", ""))
    return float(told) if re.fullmatch(r"\d+\.\d+", told) else 0.0
