"""Which example a row holds: shuffled by epochs, and of every global batch the rows of one process."""

import functools

import grain
import numpy as np


def shuffled(source: grain.MapDataset, seed: int) -> grain.MapDataset:
    """Every epoch of `source` in another order, which follows from the seed."""
    return _FewShuffled(source, seed) if len(source) < _FEW else source.shuffle(seed)


class ChosenRows(grain.MapDataset):
    """Of every `batch_size` rows these."""

    def __init__(self, parent: grain.MapDataset, batch_size: int, rows: tuple[int, ...]):
        super().__init__(parent)
        self._batch_size, self._rows = batch_size, rows

    def __len__(self) -> int:
        return len(self._parent) // self._batch_size * len(self._rows)

    def __getitem__(self, index):
        if isinstance(index, slice):
            return self.slice(index)
        batch, place = divmod(index, len(self._rows))
        return self._parent[batch * self._batch_size + self._rows[place]]


_FEW = 5000  # examples, below which Grain's shuffle takes long: 6 ms for a row of two, 6 µs for one of 5000


class _FewShuffled(grain.MapDataset):
    """A new order in every epoch, kept in memory."""

    def __init__(self, parent: grain.MapDataset, seed: int):
        super().__init__(parent)
        self._seed = seed

    def __len__(self) -> int:
        return len(self._parent)

    def __getitem__(self, index):
        if isinstance(index, slice):
            return self.slice(index)
        epoch, place = divmod(index, len(self))
        return self._parent[int(_order(self._seed, epoch, len(self))[place])]


@functools.lru_cache(maxsize=16)
def _order(seed: int, epoch: int, count: int) -> np.ndarray:
    return np.random.default_rng((seed, epoch)).permutation(count)
