"""Where examples come from: anything with a length and an index.

A source hands out decoded pictures of any size with their captions; `d2f_jax.data.loader` makes batches of them.
"""

import io
import json
from pathlib import Path
from typing import Any, NotRequired, Protocol, TypedDict

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from d2f_jax.errors import InputError


class Example(TypedDict):
    """`image` uint8 [H, W, 3]; `text` its caption; `depth` float32 [H, W] where known, 0 in the sky."""

    image: np.ndarray
    text: str
    depth: NotRequired[np.ndarray]


class Source(Protocol):
    """Random access to examples; must pickle, as it travels to the loader's worker processes."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Example: ...


class ImageFolder:
    """A folder of pictures with `metadata.jsonl`, as the Hugging Face `imagefolder` has it.

    Every line of `metadata.jsonl` is `{"file_name": "path/inside/the/folder.jpg", "text": "its caption"}`; other
    keys are ignored. Everything that shows without decoding all the pictures is checked at once: raises
    `InputError` for a folder, line or file that is missing or wrong. A picture that turns out to be damaged when
    it is read raises `InputError` too: training stops rather than quietly leaving it out.
    """

    def __init__(self, folder: str | Path):
        self._folder = Path(folder)
        self._rows = _read_metadata(self._folder)
        _check_pictures(self._folder, [file_name for file_name, _ in self._rows])

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Example:
        file_name, text = self._rows[index]
        return {"image": read_image(self._folder / file_name), "text": text}


def read_image(file: str | Path | bytes) -> np.ndarray:
    """uint8 [H, W, 3], upright, of a picture of any mode: transparency is laid on white, 16 bits become 8.

    Raises `InputError`, which names the file, if it does not decode.
    """
    name = "encoded picture" if isinstance(file, bytes) else str(file)
    try:
        with Image.open(io.BytesIO(file) if isinstance(file, bytes) else file) as picture:
            picture.load()
            return np.asarray(_to_rgb(ImageOps.exif_transpose(picture)))
    except _UNREADABLE as error:
        raise InputError(f"{name} does not decode ({_reason(error)}); replace or remove it") from error


# Pillow tells of damage by any of these, according to the format and the place.
_UNREADABLE = (OSError, SyntaxError, ValueError, Image.DecompressionBombError)
_METADATA = "metadata.jsonl"
_WANTED = 'write one line per picture: {"file_name": "a.jpg", "text": "its caption"}'


def _read_metadata(folder: Path) -> list[tuple[str, str]]:
    """File name and caption of every line."""
    if not folder.is_dir():
        raise InputError(f"{folder} is not a folder; give one that holds pictures and a {_METADATA}")
    file = folder / _METADATA
    try:
        lines = file.read_text(encoding="utf-8-sig").split("\n")
    except FileNotFoundError as error:
        raise InputError(f"{folder} has no {_METADATA}; {_WANTED}") from error
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{file} cannot be read as UTF-8 text: {error}") from error
    rows = [_parse(line, f"{file}:{number}") for number, line in enumerate(lines, 1) if line.strip()]
    if not rows:
        raise InputError(f"{file} is empty; {_WANTED}")
    # By the names alone: a link may lead out, as all of them do in the cache of the Hugging Face hub.
    outside = [name for name, _ in rows if Path(name).is_absolute() or ".." in Path(name).parts]
    if outside:
        raise InputError(f"{file} names pictures outside its folder: {_listing(outside)}; move them inside")
    missing = [name for name, _ in rows if not (folder / name).is_file()]
    if missing:
        raise InputError(f"{file} names pictures that are not there: {_listing(missing)}; add or unlist them")
    return rows


def _parse(line: str, where: str) -> tuple[str, str]:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise InputError(f"{where} is not JSON, {error.msg} at column {error.colno}: {line[:60]!r}") from error
    if not isinstance(row, dict):
        raise InputError(f"{where} is not a JSON object with the keys file_name and text: {line[:60]!r}")
    return _string(row, "file_name", where), _string(row, "text", where)


def _string(row: dict[str, Any], key: str, where: str) -> str:
    if key not in row:
        raise InputError(f"{where} has no key {key!r}, only {sorted(row)}")
    if not isinstance(row[key], str):
        raise InputError(f"{where}: {key} must be a string, not {row[key]!r}")
    return row[key]


def _check_pictures(folder: Path, names: list[str]) -> None:
    """Reads all headers, which is cheap; damage further inside shows when the picture is read."""
    bad = []
    for name in dict.fromkeys(names):
        try:
            Image.open(folder / name).close()
        except _UNREADABLE as error:
            bad.append(f"{name} ({_reason(error)})")
    if bad:
        raise InputError(f"{folder}: {len(bad)} of {len(names)} pictures do not open: {_listing(bad)}")


def _reason(error: Exception) -> str:
    return "not a picture" if isinstance(error, UnidentifiedImageError) else str(error)


def _listing(names: list[str], shown: int = 5) -> str:
    more = f" and {len(names) - shown} more" if len(names) > shown else ""
    return ", ".join(names[:shown]) + more


def _to_rgb(picture: Image.Image) -> Image.Image:
    if picture.mode == "F":
        raise ValueError("floating-point pixels, whose white is not known; save it with 8 or 16 bits")
    if picture.mode.startswith("I"):
        # Pillow would clip 16 bits at 255 instead of scaling them.
        levels = np.clip(np.asarray(picture, np.float32), 0, 65535) / 257
        picture = Image.fromarray((levels + 0.5).astype(np.uint8))
    if picture.has_transparency_data:
        white = Image.new("RGBA", picture.size, "white")
        return Image.alpha_composite(white, picture.convert("RGBA")).convert("RGB")
    return picture.convert("RGB")
