"""Aesthetic score: how much people would like a picture, from 1 to 10, told from its CLIP embedding.

LAION's improved aesthetic predictor (github.com/christophschuhmann/improved-aesthetic-predictor), by which
LAION-Aesthetics was chosen: linear layers one after another, with dropout between them in training and nothing else.
"""

import dataclasses
from pathlib import Path

import numpy as np

from d2f_jax import torch_files, weights
from d2f_jax.errors import InputError
from d2f_jax.metrics.clip_score import Clip
from d2f_jax.torch_files import Tensor

_RECIPE = "give sac+logos+ava1-l14-linearMSE.pth of github.com/christophschuhmann/improved-aesthetic-predictor"
_LAYERS, _WIDTHS = (0, 2, 4, 6, 7), (1024, 128, 64, 16, 1)  # numbers that are left out are of dropout


@dataclasses.dataclass(frozen=True)
class Aesthetic:
    """`aesthetic(shown_NxP)` is the score of each picture; averaged over pictures it is the aesthetic score (`Means`).

    `layers` are weight [O, I] and bias [O], float64.
    """

    layers: tuple[tuple[np.ndarray, np.ndarray], ...]

    def __call__(self, shown_NxP: np.ndarray) -> np.ndarray:
        """float64 [N] of what `Clip.see` tells of pictures, embeddings of length 1."""
        x = shown_NxP
        for weight, bias in self.layers:
            x = x @ weight.T + bias
        return x[:, 0]


def load_aesthetic(file: str | Path, clip: Clip) -> Aesthetic:
    """From the predictor's .pth, or a .safetensors file of the same tensors; it is of OpenAI's CLIP ViT-L/14.

    Raises InputError for a file that is missing, damaged, of another network, or of other embeddings than `clip`'s.
    """
    file, width = Path(file), clip.model.config.projection_dim
    tensors = _tensors(file)
    sizes = zip(_LAYERS, _WIDTHS, (width, *_WIDTHS[:-1]), strict=True)
    wanted = {f"layers.{i}.{part}": size for i, o, n in sizes for part, size in (("weight", (o, n)), ("bias", (o,)))}
    if (found := tensors.get("layers.0.weight")) is not None and found.shape != (_WIDTHS[0], width):
        raise InputError(
            f"{file} judges embeddings of {found.shape[-1]} numbers, --clip makes {width}; give the CLIP model that it "
            "was made for, openai/clip-vit-large-patch14"
        )
    if {name: tensor.shape for name, tensor in tensors.items()} != wanted:
        raise InputError(f"{file} is not the aesthetic predictor; {_RECIPE}")
    read = {name: tensor.astype(np.float64) for name, tensor in tensors.items()}
    return Aesthetic(tuple((read[f"layers.{i}.weight"], read[f"layers.{i}.bias"]) for i in _LAYERS))


def _tensors(file: Path) -> dict[str, np.ndarray]:
    if not file.is_file():
        raise InputError(f"the aesthetic predictor is not at {file}; {_RECIPE}")
    if file.suffix == ".safetensors":
        kept = weights.Tensors([file])
        return {name: kept.read(name) for name in kept.names()}
    content = torch_files.load(file)
    if not isinstance(content, dict):
        raise InputError(f"{file} is not the aesthetic predictor; {_RECIPE}")
    return {str(name): tensor.read() for name, tensor in content.items() if isinstance(tensor, Tensor)}
