"""WebDataset shards as a `Source`: plain tar files, indexed once, then read at random places.

    WebDataset("shards/{00000..00219}.tar", latent_scale=0.18215)

Members belong to one example if their names agree up to the first dot of the last part: `000123.image.jpg`,
`000123.prompt.txt`, `000123.image_latent.npy` and `000123.noise.npy`. As the access is random, the loader shuffles over
all shards, and their number has nothing to do with the number of processes or workers.

Nothing is ever extracted. What is wrong with a shard as a whole is refused when it is opened: cut short, compressed,
no tar file; links, devices and names that lead out of the shard; two members that are the same part of the same
example. What is wrong with one example is told when it is read, so that the loader stops at it or skips it.
"""

import glob
import json
import math
import os
import re
import tarfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from d2f_jax.data.depth import measured
from d2f_jax.data.npy import read_mask, read_npy
from d2f_jax.data.sources import Example, read_image
from d2f_jax.errors import InputError
from d2f_jax.task import whole_patches

PARTS = ("image", "text", "depth", "depth_latent", "valid", "latent", "noise")


class WebDataset:
    """The examples of all shards that `pattern` names, in the order of the shards' names.

    `pattern` is a file, a folder of `*.tar`, a glob, or has a range of numbers as in `{00000..00219}.tar`. An example
    has a caption, `prompt.txt` or `txt`, and a picture, `image.jpg` or `jpg` (png, jpeg, webp), or a latent,
    `latent.npy` or `..._latent.npy`; perhaps `noise.npy`. With depth, `depth.npy` or `depth_latent.npy`, it needs no
    caption, and may have a `valid_mask.npy`. Arrays are floating point, of shape [4, h, w] or [h, w, 4], depth and mask
    [H, W] or [1, H, W], a mask of any numbers, 1 or more where depth is known; other members are left alone.

    Where there are latents the pictures are not read. A latent of depth counts where the mask and `depth.npy`, as far
    as they are there, know its whole patch: they have the latent's size, or a multiple of it.

    `latent_scale` is the number that latents were multiplied by: that of the VAE, as in the shards of pictures that
    Diff2Flow was trained on, or 1, as in those of depth. It can't be told from the data, so there is none that is taken
    for granted.

    `latent` names the latent to take where an example has several: "image_latent" is `image_latent.npy`; the others are
    left alone. Raises `InputError` where no example has it.

    `least` and `most` are bounds of numbers that `000123.json` tells of an example, as img2dataset writes it:
    `least="AESTHETIC_SCORE:6,original_width:512"` leaves out all pictures that are below one of these, or of which one
    is null. Raises `InputError` where a json does not know the name.
    """

    def __init__(
        self,
        pattern: str | Path,
        latent_scale: float | None = None,
        least: str = "",
        most: str = "",
        latent: str = "",
    ) -> None:
        self._shards = _find_shards(str(pattern))
        bounds = _bounds("least", least) + _bounds("most", most)
        found = [
            (number, *group) for number, shard in enumerate(self._shards) for group in _index(shard, bounds, latent)
        ]
        if not found:
            told = f", or none within least={least!r}, most={most!r}" if bounds else ""
            raise InputError(f"{pattern} holds no examples{told}; members are named as in 000123.jpg and 000123.txt")
        self._shard_of = np.array([number for number, _, _ in found], np.int32)
        self._keys = [key for _, key, _ in found]
        self._places = np.array([places for _, _, places in found], np.int64)
        if latent and not (self._places[:, PARTS.index("latent")] != _NONE).any():
            raise InputError(f"latent={latent}: {pattern} has no member {latent}.npy; give the name of one, or none")
        self._check_scale(str(pattern), latent_scale)
        self._latent_scale = latent_scale

    def __len__(self) -> int:
        return len(self._keys)

    def __getitem__(self, index: int) -> Example:
        shard = self._shards[self._shard_of[index]]
        where = f"{shard}: {self._keys[index]}"
        data = _read(shard, self._places[index])
        example: Example = {"text": _caption(data, where)}
        if "depth_latent" in data:
            example["latent_mean"] = self._latent(data, "depth_latent", f"{where}: the latent of depth")
            if "latent" not in data:
                raise InputError(f"{where} has a latent of depth, and none of its picture; add image_latent.npy")
            example["picture_mean"] = self._latent(data, "latent", f"{where}: the latent")
            size = example["latent_mean"].shape[:2]
            example["valid"] = _mask(data, size, where)
            if "depth" in data:
                example["valid"] &= _patches(_depth(data, where) > 0, size, f"{where}: the depth")
        elif "latent" in data:
            example["latent_mean"] = self._latent(data, "latent", f"{where}: the latent")
        elif "image" in data:
            example["image"] = read_image(data["image"], f"{where}: the picture")
            if "depth" in data:
                depth_HxW = _depth(data, where)
                example["depth"] = np.where(_mask(data, depth_HxW.shape, where), depth_HxW, np.float32(0))
        else:
            raise InputError(f"{where} has no picture and no latent; add a member image.jpg or jpg")
        if "noise" in data:
            name = f"{where}: the noise"
            example["noise"] = _finite(_channels_last(read_npy(data["noise"], name), name), name)
        return example

    def _latent(self, data: dict[str, bytes], part: str, name: str) -> np.ndarray:
        assert self._latent_scale is not None, "shards with latents are not opened without it"
        latent = _channels_last(read_npy(data[part], name), name) / self._latent_scale
        return _finite(latent, name).astype(np.float16)

    def _check_scale(self, pattern: str, latent_scale: float | None) -> None:
        has_latents = any((self._places[:, PARTS.index(part)] != _NONE).any() for part in ("latent", "depth_latent"))
        if has_latents and latent_scale is None:
            raise InputError(
                f"{pattern} holds latents; say what they were multiplied by: "
                "latent_scale=0.18215 as is usual for Stable Diffusion, or latent_scale=1"
            )
        if latent_scale is not None and not has_latents:
            raise InputError(f"latent_scale={latent_scale:g} is for latents, and {pattern} holds none; leave it out")
        if latent_scale is not None and not 0 < latent_scale < math.inf:
            raise InputError(f"latent_scale={latent_scale:g} must be positive, 0.18215 for instance")


def _read(shard: str, places: np.ndarray) -> dict[str, bytes]:
    """The parts that the example has. The file is opened anew: descriptors neither pickle nor are there many."""
    parts = [(part, offset, size) for part, (offset, size) in zip(PARTS, places.tolist(), strict=True) if size >= 0]
    there = {part for part, _, _ in parts}
    if "depth_latent" in there or "latent" in there:
        unread = ("image",) if "depth_latent" in there else ("image", "depth", "valid")
        parts = [(part, offset, size) for part, offset, size in parts if part not in unread]
    descriptor = os.open(shard, os.O_RDONLY)
    try:
        data = {part: os.pread(descriptor, size, offset) for part, offset, size in parts}
    finally:
        os.close(descriptor)
    for part, offset, size in parts:
        if len(data[part]) != size:
            raise InputError(
                f"{shard} ends within the {size} bytes at byte {offset}, unlike when it was opened; copy it again"
            )
    return data


_NOTES = "json"
_NONE = -1  # offset and size of a part that an example lacks
_MAX_VALUE = 65504  # of float16
_PICTURES = re.compile(r"(image\.)?(jpg|jpeg|png|webp)")
_ARRAYS = {"depth.npy": "depth", "depth_latent.npy": "depth_latent", "valid_mask.npy": "valid", "noise.npy": "noise"}
_COMPRESSED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd"}


def _find_shards(pattern: str) -> list[str]:
    if Path(pattern).is_dir():
        pattern = str(Path(glob.escape(pattern)) / "*.tar")
    shards = []
    for one in _ranges(pattern):
        matches = [one] if Path(one).is_file() else sorted(p for p in glob.glob(one) if Path(p).is_file())
        if not matches:
            raise InputError(
                f"no shard matches {one}; give a folder, a file.tar, a glob or a range like {{00..99}}.tar"
            )
        shards += matches
    return shards


def _ranges(pattern: str) -> list[str]:
    """`{08..10}` multiplied out, zeros in front kept."""
    match = re.search(r"\{(\d+)\.\.(\d+)\}", pattern)
    if match is None:
        return [pattern]
    first, last = match.groups()
    if int(first) > int(last):
        raise InputError(f"{pattern}: the range {match.group()} runs backwards; write {{{last}..{first}}}")
    numbers = [str(number).zfill(len(first)) for number in range(int(first), int(last) + 1)]
    return [one for number in numbers for one in _ranges(pattern[: match.start()] + number + pattern[match.end() :])]


Places = tuple[tuple[int, int], ...]  # offset and size of each of PARTS


def _index(shard: str, bounds: Sequence["_Bound"], latent: str) -> list[tuple[str, Places]]:
    """Key and places of every example within the bounds, in the order in which they begin."""
    found: dict[str, dict[str, _Member]] = {}
    for member in _members(shard):
        split = re.fullmatch(r"((?:.*/)?[^./]+)\.([^/]*)", member.name)
        part = _part(split[2].lower(), bool(bounds), latent.lower()) if split else None
        if split is None or part is None:
            continue
        example = found.setdefault(split[1], {})
        if part in example:
            names = f"{example[part].name} and {member.name}"
            mend = "name one, as latent=image_latent" if part == "latent" else "keep one of them"
            raise InputError(f"{shard} holds two members for {part} of {split[1]}: {names}; {mend}")
        example[part] = member
    notes = {key: example.pop(_NOTES, None) for key, example in found.items()}
    kept = {key: example for key, example in found.items() if example and _within(bounds, shard, key, notes[key])}
    place = {key: {part: (m.offset, m.size) for part, m in example.items()} for key, example in kept.items()}
    return [(key, tuple(parts.get(part, (_NONE, _NONE)) for part in PARTS)) for key, parts in place.items()]


def _part(field: str, notes: bool, latent: str) -> str | None:
    if notes and field == _NOTES:
        return _NOTES
    if latent and field == f"{latent}.npy":
        return "latent"
    if _PICTURES.fullmatch(field):
        return "image"
    if field in ("txt", "prompt.txt"):
        return "text"
    if field in _ARRAYS:
        return _ARRAYS[field]
    return "latent" if not latent and (field == "latent.npy" or field.endswith("_latent.npy")) else None


class _Member(NamedTuple):
    name: str
    offset: int
    size: int


class _Bound(NamedTuple):
    """`sign * number >= sign * value`, which is of `least` for 1, of `most` for -1."""

    option: str
    name: str
    sign: int
    value: float


def _bounds(option: str, told: str) -> list[_Bound]:
    found = []
    for one in filter(None, told.split(",")):
        name, colon, value = one.rpartition(":")
        try:
            number = float(value)
        except ValueError:
            number = math.nan
        if not (name and colon) or math.isnan(number):
            raise InputError(f"{option}={told} is not of the form name:number,name:number, as AESTHETIC_SCORE:6")
        found.append(_Bound(option, name, 1 if option == "least" else -1, number))
    return found


def _within(bounds: Sequence[_Bound], shard: str, key: str, notes: _Member | None) -> bool:
    if not bounds:
        return True
    if notes is None:
        raise InputError(f"{shard}: {key} has no member json, which {bounds[0].option} is of; leave that out")
    with open(shard, "rb") as file:
        file.seek(notes.offset)
        content = file.read(notes.size)
    try:
        told = json.loads(content)
    except ValueError as error:
        raise InputError(f"{shard}: {notes.name} is not JSON ({error}); write it anew") from error
    for bound in bounds:
        if not isinstance(told, dict) or bound.name not in told:
            names = ", ".join(sorted(told)) if isinstance(told, dict) else "no names"
            raise InputError(f"{shard}: {notes.name} tells no {bound.name}, which {bound.option} is of, only {names}")
        number = told[bound.name]
        if number is not None and (isinstance(number, bool) or not isinstance(number, int | float)):
            raise InputError(f"{shard}: {notes.name} has {bound.name}={number!r}; {bound.option} is of numbers")
        if number is None or not bound.sign * number >= bound.sign * bound.value:
            return False
    return True


def _members(shard: str) -> Iterator[_Member]:
    """The plain files in the shard, after it was found to be whole."""
    length = os.path.getsize(shard)
    with open(shard, "rb") as file:
        head = file.read(8)
        if not head:
            raise InputError(f"{shard} is empty, 0 bytes; write it anew or remove it")
        for magic, name in _COMPRESSED.items():
            if head.startswith(magic):
                raise InputError(
                    f"{shard} is compressed ({name}), which has no random access; unpack it to a plain tar"
                )
        file.seek(0)
        end = 0
        try:
            with tarfile.open(fileobj=file, mode="r:") as tar:
                while (member := tar.next()) is not None:
                    tar.members.clear()  # pyright: ignore[reportAttributeAccessIssue] (it would keep them all)
                    _check(shard, member)
                    if member.offset_data + member.size > length:
                        raise InputError(
                            f"{shard} is cut short: {member.name} ends at byte {member.offset_data + member.size}, "
                            f"the file at {length}; copy it again"
                        )
                    end = tar.offset
                    if not member.isdir():
                        yield _Member(member.name, member.offset_data, member.size)
                end = tar.offset
        except InputError:
            raise
        except Exception as error:  # tarfile lets out what a broken number or name in a header leads to
            reason = " ".join(str(error).split())
            raise InputError(f"{shard} is no whole tar file: byte {end}: {reason}; copy it again") from error
        file.seek(end)
        if file.read(512) != bytes(512):  # tarfile takes anything for the end
            what = "is cut short: it has no end mark" if end + 512 > length else "is damaged: no member begins"
            raise InputError(f"{shard} {what} at byte {end}; copy it again")


def _check(shard: str, member: tarfile.TarInfo) -> None:
    name, mend = ascii(member.name[:200]), "such shards are not trusted; write it anew from plain files"
    if member.type not in (tarfile.REGTYPE, tarfile.AREGTYPE, tarfile.DIRTYPE) or member.size < 0:
        raise InputError(f"{shard}: {name} is a link, device or other member that is no plain file; {mend}")
    if not member.name.isprintable():
        raise InputError(f"{shard}: the name {name} holds characters that do not print; {mend}")
    if member.name.startswith("/") or ".." in member.name.split("/"):
        raise InputError(f"{shard}: the name {name} leads out of the shard; {mend}")


def _caption(data: dict[str, bytes], where: str) -> str:
    if "text" not in data:
        if "depth" in data or "depth_latent" in data:
            return ""
        raise InputError(f"{where} has no caption; add a member prompt.txt or txt")
    try:
        return data["text"].decode().strip()
    except UnicodeDecodeError as error:
        raise InputError(f"{where}: the caption is not UTF-8 text ({error}); write it anew") from error


def _depth(data: dict[str, bytes], where: str) -> np.ndarray:
    name = f"{where}: the depth"
    return measured(_flat(read_npy(data["depth"], name), name))


def _mask(data: dict[str, bytes], size: tuple[int, ...], where: str) -> np.ndarray:
    """bool [*size], true everywhere if there is none."""
    name = f"{where}: the valid mask"
    return _patches(_flat(read_mask(data["valid"], name), name), size, name) if "valid" in data else np.ones(size, bool)


def _patches(valid_HxW: np.ndarray, size: tuple[int, ...], name: str) -> np.ndarray:
    if any(side % of for side, of in zip(valid_HxW.shape, size, strict=True)):
        raise InputError(f"{name} has the shape {valid_HxW.shape}, no multiple of {size}; make it of that size")
    return whole_patches(valid_HxW, size)


def _channels_last(values: np.ndarray, where: str) -> np.ndarray:
    """[h, w, 4] of [4, h, w] as PyTorch has it, or of [h, w, 4]."""
    if values.ndim == 3 and values.shape[0] == 4:
        return np.ascontiguousarray(values.transpose(1, 2, 0))
    if values.ndim == 3 and values.shape[2] == 4:
        return values
    raise InputError(f"{where} has the shape {values.shape}, wanted are (4, h, w) or (h, w, 4); write it anew")


def _flat(values: np.ndarray, where: str) -> np.ndarray:
    if values.ndim == 3 and values.shape[0] == 1:
        values = values[0]
    if values.ndim != 2:
        raise InputError(f"{where} has the shape {values.shape}, wanted are (H, W) or (1, H, W); write it anew")
    return values


def _finite(values: np.ndarray, where: str) -> np.ndarray:
    if not (np.abs(values) < _MAX_VALUE).all():
        raise InputError(f"{where} holds values that are no finite half-precision numbers; write it anew or remove it")
    return values
