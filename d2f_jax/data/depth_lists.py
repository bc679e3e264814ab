"""Pictures with measured depth, from lists of files: the benchmarks of depth as Marigold prepares and reads them.

    DepthList("data_split/nyu_depth/labeled/filename_list_test.txt", root="nyuv2", protocol="nyuv2")

The lists, and how files are decoded, are those of https://github.com/prs-eth/Marigold at b1dffaa: `data_split/` and
`src/dataset/*_dataset.py`. Its archives of the data sets are unpacked into the root, as the access is random.
"""

import functools
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from d2f_jax.data.depth import measured
from d2f_jax.data.depth_files import read_png
from d2f_jax.data.npy import read_mask, read_npy
from d2f_jax.data.sources import Example, listing, outside, read_image
from d2f_jax.errors import InputError


class DepthList:
    """The pictures of a text file whose lines are `picture depth [mask]`, below `root`, or else the list's own folder.

    `protocol` names the data set: how depth is judged on it (`metrics.DEPTH_PROTOCOLS`), and how it is stored: "nyuv2"
    and "scannet" as PNG of 16 bits in millimetres, "kitti" (or "kitti_garg") in 1/256 of a metre; "eth3d" as plain
    float32, "diode" as npy, with a mask in the third file. Depth becomes metres, and 0 where it is not positive, not
    finite, or masked. Pictures stay as they are stored, not turned upright, since depth is stored likewise; other words
    of a line are left alone, and so are lines whose depth is `None`.

    Raises `InputError` for a list, or names in it, that are wrong or missing; a file that turns out to be damaged
    raises it when it is read.
    """

    def __init__(self, file: str | Path, root: str | Path | None = None, protocol: str | None = None):
        if protocol not in FORMATS:
            raise InputError(f"{file}: protocol={protocol} must tell how depth is stored: one of {', '.join(FORMATS)}")
        self.protocol = protocol
        self._root = Path(file).parent if root is None else Path(root)
        self._rows = _read_list(Path(file), FORMATS[protocol][0])
        names = [name for row in self._rows for name in row]
        if out := outside(names):
            raise InputError(f"{file} names files outside its root: {listing(out)}; move them inside")
        if missing := [name for name in names if not (self._root / name).is_file()]:
            raise InputError(
                f"{file} names files that are not below {self._root}: {listing(missing)}; set root to where they are"
            )

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Example:
        picture, *files = (self._root / name for name in self._rows[index])
        image_HxWx3 = read_image(picture, upright=False)
        depth_HxW = FORMATS[self.protocol][1](files, image_HxWx3.shape[:2])
        return {"text": "", "image": image_HxWx3, "depth": measured(depth_HxW)}


def _read_list(file: Path, count: int) -> list[list[str]]:
    """The first `count` names of every line that has a depth."""
    try:
        lines = [line.split() for line in file.read_text(encoding="utf-8-sig").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{file} cannot be read as a list of files: {error}") from error
    for number, words in enumerate(lines, 1):
        if words and len(words) < count:
            wanted = "picture, depth and mask" if count == 3 else "picture and depth"
            raise InputError(f"{file}:{number} names {len(words)} files; wanted are {wanted}")
    rows = [words[:count] for words in lines if words and words[1] != "None"]
    if not rows:
        raise InputError(f"{file} names no pictures; write one line for each: picture depth")
    return rows


def _png(files: Sequence[Path], size: tuple[int, ...], per_metre: float) -> np.ndarray:
    return read_png(files[0], size) / per_metre


def _floats(files: Sequence[Path], size: tuple[int, ...]) -> np.ndarray:
    (file,), (height, width) = files, size
    if file.stat().st_size != 4 * height * width:
        told = f"{file} has {file.stat().st_size} bytes, not those of {height} x {width} float32 as its picture"
        raise InputError(f"{told}; replace or remove it")
    return np.fromfile(file, "<f4").reshape(height, width)


def _npy(files: Sequence[Path], size: tuple[int, ...]) -> np.ndarray:
    read = zip(files, (read_npy, read_mask), strict=True)
    depth_HxW, mask_HxW = (_shaped(how(file.read_bytes(), str(file)), size, file) for file, how in read)
    return np.where(mask_HxW, depth_HxW, np.float32(0))


def _shaped(values: np.ndarray, size: tuple[int, ...], file: Path) -> np.ndarray:
    """[H, W] of [H, W], [H, W, 1] or [1, H, W]."""
    if values.squeeze().shape != size:
        raise InputError(f"{file} has the shape {values.shape}, its picture {size}; replace or remove it")
    return values.reshape(size)


_MILLIMETRES, _KITTI = (functools.partial(_png, per_metre=units) for units in (1000, 256))
FORMATS: dict[str, tuple[int, Callable[[Sequence[Path], tuple[int, ...]], np.ndarray]]] = {
    "nyuv2": (2, _MILLIMETRES),
    "kitti": (2, _KITTI),
    "kitti_garg": (2, _KITTI),
    "eth3d": (2, _floats),
    "scannet": (2, _MILLIMETRES),
    "diode": (3, _npy),
}
"""By protocol: how many files a line names, and how all but the picture, whose height and width is given, are read."""
