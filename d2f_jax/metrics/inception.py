"""Features of FID and KID: InceptionV3 with weights from a file that people hold or make, never downloaded here."""

from pathlib import Path

import jax
import numpy as np
from flax import nnx

from d2f_jax import weights
from d2f_jax.errors import InputError
from d2f_jax.metrics.batches import check_pictures, in_batches
from d2f_jax.models.inception import InceptionV3

_RECIPE = (
    "get pt_inception-2015-12-05-6726825d.pth (a release file of github.com/mseitzer/pytorch-fid; torch-fidelity's "
    "weights-inception-2015-12-05-6726825d.pth is the same) and convert it by the three lines in "
    "d2f_jax.metrics.load_inception's docstring"
)


def load_inception(file: str | Path | None) -> InceptionV3:
    """The network with its weights from a safetensors file, which three lines of PyTorch make of the usual one:

        import torch, safetensors.torch
        tensors = torch.load("pt_inception-2015-12-05-6726825d.pth", map_location="cpu", weights_only=True)
        safetensors.torch.save_file({k: v.contiguous() for k, v in tensors.items()}, "inception.safetensors")

    Raises InputError where no file is given, or it is missing, damaged, no safetensors file or of another network.
    """
    if file is None:
        raise InputError(f"FID and KID need the weights of InceptionV3, and no file is given; {_RECIPE}")
    file = Path(file)
    if not file.is_file():
        raise InputError(f"the weights of InceptionV3 are not at {file}; {_RECIPE}")
    if file.suffix != ".safetensors":
        raise InputError(f"{file} is no .safetensors file; {_RECIPE}")
    return weights.fill(
        lambda rngs: InceptionV3(rngs=rngs), weights.Tensors([file]), fits="the InceptionV3 that FID is defined on"
    )


def inception_features(inception: InceptionV3, images_NxHxWx3: np.ndarray, *, batch_size: int = 32) -> np.ndarray:
    """float32 [N, 2048] of uint8 pictures of any size; raises `ValueError` for anything else."""
    check_pictures(images_NxHxWx3)
    return in_batches(lambda batch: _apply(inception, batch), images_NxHxWx3, batch_size)


@nnx.jit
def _apply(inception: InceptionV3, images_BxHxWx3: jax.Array) -> jax.Array:
    return inception(images_BxHxWx3)
