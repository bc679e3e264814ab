"""Pictures of one colour: what a model says of brightness that no other pixel gives away."""

import numpy as np

from d2f_jax.data.shapes import COLOURS as OF_SOLIDS
from d2f_jax.data.sources import Example
from d2f_jax.errors import InputError

COLOURS: dict[str, tuple[int, ...]] = {
    **{name: tuple(round(255 * level) for level in colour) for name, colour in OF_SOLIDS.items()},
    "black": (0, 0, 0),
    "grey": (128, 128, 128),
    "white": (255, 255, 255),
}
"""Levels of red, green and blue; those of ShapesWorld's solids, but white is white."""
_SIZE = 64  # pixels; any other looks alike


class UniformColours:
    """`each` pictures for each of `names`, as in "black,white,grey", with the caption "a black image"."""

    def __init__(self, names: str, each: int = 1) -> None:
        if each < 1:
            raise InputError(f"uniform_colours: each={each}: give 1 picture of each colour, or more")
        self._names = names.split(",") * each
        unknown = [name for name in self._names if name not in COLOURS]
        if unknown:
            raise InputError(f"uniform_colours: no colour {unknown[0]!r}; colours are {', '.join(sorted(COLOURS))}")

    def __len__(self) -> int:
        return len(self._names)

    def __getitem__(self, index: int) -> Example:
        name = self._names[index]
        return {"image": np.full((_SIZE, _SIZE, 3), COLOURS[name], np.uint8), "text": caption(name)}


def caption(name: str) -> str:
    return f"{'an' if name[0] in 'aeiou' else 'a'} {name} image"
