"""Where arrays live: one mesh over all local devices, parameters replicated, batches split."""

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from d2f_jax.errors import InputError


def make_mesh() -> Mesh:
    devices = np.array(jax.local_devices())
    return Mesh(devices, ("data",), axis_types=(AxisType.Auto,))


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec())


def batch_split(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec("data"))


def check_batch_size(batch_size: int, mesh: Mesh) -> None:
    """Raises InputError unless every device gets the same number of examples."""
    if batch_size < 1 or batch_size % mesh.size:
        raise InputError(
            f"batch_size={batch_size} does not divide over {mesh.size} devices; use a multiple of {mesh.size}"
        )
