"""Pictures with depth, as two synthetic data sets are published: Hypersim indoors, Virtual KITTI 2 on the road.

Depth is along the camera's axis, in metres, and 0 where there is none. Of the files only the names are looked at when a
source is made; a file that turns out to be damaged raises `InputError` when it is read. Which depths count is as in the
published code of Diff2Flow, https://github.com/CompVis/diff2flow: `diff2flow/dataset/depth_preprocessing.py`.
"""

import csv
import importlib.util
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from d2f_jax.data.depth import KITTI_SIZE, cut, distance_to_depth
from d2f_jax.data.sources import Example, read_image
from d2f_jax.errors import InputError


class Hypersim:
    """Frames of Hypersim, https://github.com/apple/ml-hypersim, in the order of their scenes, cameras and numbers.

    A frame is `ai_VVV_NNN/images/scene_cam_XX_final_preview/frame.IIII.tonemap.jpg`, and in
    `scene_cam_XX_geometry_hdf5` its `frame.IIII.depth_meters.hdf5`: distances from the camera's centre, not a number
    where nothing is hit. Needs h5py.

    `folder/metadata_images_split_scene_v1.csv` is the data set's own list, of ml-hypersim's folder
    evermotion_dataset/analysis. Frames that it excludes from the public release are left out; with `split`, "train",
    "val" or "test", all but those of this part are. Raises `InputError` for a folder without frames, a frame without
    its other file, and a list that is lacking or wrong.
    """

    def __init__(self, folder: str | Path, split: str | None = None):
        if split not in (None, *_SPLITS):
            raise InputError(f"Hypersim has no split {split!r}, only {', '.join(_SPLITS)}")
        if importlib.util.find_spec("h5py") is None:
            raise InputError("Hypersim's depth needs h5py: ./launch/install.sh depth")
        self._folder = _folder(folder)
        pictures = _found(self._folder, ["*/images/scene_*_final_preview/frame.*.tonemap.jpg"])
        depths = _found(self._folder, ["*/images/scene_*_geometry_hdf5/frame.*.depth_meters.hdf5"])
        splits = _read_splits(self._folder / _LIST)
        pictures, depths = (_released(frames, splits, split) for frames in (pictures, depths))
        self._frames = _pairs(self._folder, pictures, depths, f"frames of Hypersim{f' in {split}' if split else ''}")

    def __len__(self) -> int:
        return len(self._frames)

    def __getitem__(self, index: int) -> Example:
        picture, depth = (self._folder / name for name in self._frames[index])
        image_HxWx3 = read_image(picture)
        distance_HxW = _read_hdf5(depth, image_HxWx3.shape[:2])
        valid_HxW = (distance_HxW >= 1e-4) & (distance_HxW <= _FAR)  # false for what is not a number
        depth_HxW = distance_to_depth(distance_HxW, _FOCAL * image_HxWx3.shape[1])
        return {"text": "", "image": image_HxWx3, "depth": np.where(valid_HxW, depth_HxW, np.float32(0))}


class VirtualKitti2:
    """Frames of Virtual KITTI 2, in the order of their scenes, variations, cameras and numbers.

    A frame is `SceneXX/VARIATION/frames/rgb/Camera_N/rgb_NNNNN.jpg` and, with `depth` in place of `rgb`, a PNG of
    16 bits in centimetres, whose largest number is the sky. Both archives are unpacked into `folder`, or each into a
    folder of its own in there: `vkitti_2.0.3_rgb` and `vkitti_2.0.3_depth`, or `rgb` and `depth`. Frames are cut to the
    size of KITTI's benchmark, as Marigold trains (https://github.com/prs-eth/Marigold).

    Raises `InputError` for a folder without frames, and a frame without its other file.
    """

    def __init__(self, folder: str | Path):
        self._folder = _folder(folder)
        pictures, depths = (
            _found(self._folder, [f"{place}Scene*/*/frames/{files}" for place in ("", f"vkitti_2.0.3_{of}/", f"{of}/")])
            for of, files in (("rgb", "rgb/Camera_*/rgb_*.jpg"), ("depth", "depth/Camera_*/depth_*.png"))
        )
        self._frames = _pairs(self._folder, pictures, depths, "frames of Virtual KITTI 2")

    def __len__(self) -> int:
        return len(self._frames)

    def __getitem__(self, index: int) -> Example:
        picture, depth = (self._folder / name for name in self._frames[index])
        image_HxWx3 = read_image(picture)
        depth_HxW = read_png(depth, image_HxWx3.shape[:2]) / 100
        depth_HxW[depth_HxW > _FAR] = 0
        try:
            return {"text": "", "image": cut(image_HxWx3, KITTI_SIZE), "depth": cut(depth_HxW, KITTI_SIZE)}
        except ValueError as error:
            raise InputError(f"{picture}: {error}; take the data set's own files") from error


_FAR = 120.0  # metres; farther away nothing is learned
# Focal length in widths: 886.81 pixels of 1024, 60 degrees across, and with the same share of pictures of another size.
# So the published code converts. By the scenes' own cameras (contrib/mikeroberts3000 of ml-hypersim), some of whose
# lenses are shifted or wider, depth is more than 1% off at some pixel in 143 of 482 scenes.
_FOCAL = 886.81 / 1024
_LIST = "metadata_images_split_scene_v1.csv"
_SPLITS = ("train", "val", "test")
_EXCLUDED = "excluded"
_COLUMNS = ("scene_name", "camera_name", "frame_id", "included_in_public_release", "split_partition_name")
_Frames = dict[tuple[str, ...], str]


def _folder(folder: str | Path) -> Path:
    if not Path(folder).is_dir():
        raise InputError(f"{folder} is not a folder; give the one that the data set is unpacked in")
    return Path(folder)


def _found(folder: Path, patterns: Sequence[str]) -> _Frames:
    """Names in `folder` by what the stars stand for, of the first pattern that any file has."""
    for pattern in patterns:
        frame = re.compile(re.escape(pattern).replace(r"\*", "([^/]+)"))
        names = [path.relative_to(folder).as_posix() for path in folder.glob(pattern)]
        if names:
            return {match.groups(): name for name in names if (match := frame.fullmatch(name))}
    return {}


def _pairs(folder: Path, pictures: _Frames, depths: _Frames, wanted: str) -> list[tuple[str, str]]:
    """The names of each frame's picture and depth."""
    alone = [f"{pictures[frame]} has no depth" for frame in sorted(pictures.keys() - depths.keys())]
    alone += [f"{depths[frame]} has no picture" for frame in sorted(depths.keys() - pictures.keys())]
    if alone:
        more = f" and {len(alone) - 5} more" if len(alone) > 5 else ""
        raise InputError(f"{folder}: {', '.join(alone[:5])}{more}; unpack the data set anew, or remove these")
    if not pictures:
        raise InputError(f"{folder} holds no {wanted}; unpack them there, with the folders that they come in")
    return [(pictures[frame], depths[frame]) for frame in sorted(pictures)]


def _read_splits(file: Path) -> _Frames:
    """The split of every frame in the list, `_EXCLUDED` for those that are not in the public release."""
    if not file.is_file():
        raise InputError(
            f"{file} is not there, which tells the splits and what is excluded; take it from "
            "https://github.com/apple/ml-hypersim, evermotion_dataset/analysis"
        )
    try:
        with file.open(newline="", encoding="utf-8-sig") as lines:
            rows = [[row[column] for column in _COLUMNS] for row in csv.DictReader(lines)]
        return {
            (scene, camera, f"{int(number):04d}"): split if included == "True" else _EXCLUDED
            for scene, camera, number, included, split in rows
        }
    except KeyError as error:
        raise InputError(f"{file} has no column {error}; it must have {', '.join(_COLUMNS)}") from error
    except (OSError, ValueError, TypeError, csv.Error) as error:
        raise InputError(f"{file} cannot be read ({error}); copy it again") from error


def _released(frames: _Frames, splits: _Frames, wanted: str | None) -> _Frames:
    """The frames of the split `wanted`, or all but the excluded ones; those that the list does not know are of none."""
    if wanted is None:
        return {frame: name for frame, name in frames.items() if splits.get(frame) != _EXCLUDED}
    return {frame: name for frame, name in frames.items() if splits.get(frame) == wanted}


def _read_hdf5(file: Path, size: tuple[int, ...]) -> np.ndarray:
    """float32 [H, W]; anything else, and another `size`, is refused before it is read, as a header can claim it."""
    import h5py  # pyright: ignore[reportMissingImports]

    try:
        with h5py.File(file, locking=False) as opened:  # no one writes, and some network drives cannot lock
            found: Any = opened["dataset"]
            _check(found.dtype.kind == "f", found.shape, size)
            return found[()].astype(np.float32)
    except Exception as error:  # foreign bytes may break in any way
        raise _damaged(file, error) from error


def read_png(file: Path, size: tuple[int, ...]) -> np.ndarray:
    """float32 [H, W] of 16 bits, with the same care."""
    try:
        with Image.open(file, formats=("PNG",)) as opened:
            _check(opened.mode.startswith("I"), opened.size[::-1], size)
            return np.asarray(opened, np.float32)
    except Exception as error:
        raise _damaged(file, error) from error


def _check(is_depth: bool, shape: tuple[int, ...], size: tuple[int, ...]) -> None:
    if not is_depth:
        raise ValueError("its numbers are of another type than those of depth")
    if shape != size:
        raise ValueError(f"its shape is {shape}, its picture's {size}")


def _damaged(file: Path, error: Exception) -> InputError:
    reason = " ".join(str(error).split()) or type(error).__name__
    return InputError(f"{file} cannot be read ({reason}); replace or remove it")
