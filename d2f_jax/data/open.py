"""Opens the source that a line of text names, as configurations and command lines have it."""

import re
from collections.abc import Callable
from typing import Any

from d2f_jax.data.coco import Coco
from d2f_jax.data.depth_files import Hypersim, VirtualKitti2
from d2f_jax.data.depth_lists import DepthList
from d2f_jax.data.sources import ImageFolder, Source
from d2f_jax.data.tfds_source import TFDSSource
from d2f_jax.data.uniform import UniformColours
from d2f_jax.data.webdataset import WebDataset
from d2f_jax.errors import InputError


def open_source(spec: str) -> Source:
    """`kind:path`, perhaps followed by `?option=value&option=value`.

        image_folder:pictures
        array_record:prepared?split=validation
        webdataset:shards/{000..099}.tar?latent_scale=0.18215
        webdataset:laion/{00000..00099}.tar?least=AESTHETIC_SCORE:6,original_width:512&most=punsafe:0.5
        coco:annotations/captions_val2017.json?images=val2017
        hypersim:hypersim?split=train
        vkitti2:virtual_kitti_2
        depth_list:filename_list_test.txt?root=nyuv2&protocol=nyuv2
        uniform_colours:black,white,grey?each=16
        tfds:coco_captions/2014?split=train&image=image&text=captions/text&data_dir=/data

    Raises `InputError` for a kind or option that is not known, and for what the source itself refuses.
    """
    match = re.fullmatch(r"(\w+):(.+?)(?:\?(\w+=[^?]*))?", spec)
    if match is None:
        raise InputError(
            f"data source {spec!r} is not of the form kind:path?option=value; kinds are {_listing(_KINDS)}"
        )
    kind, path, options = match.groups()
    if kind not in _KINDS:
        raise InputError(f"data source {spec!r}: no kind {kind!r}; kinds are {_listing(_KINDS)}")
    opened, known = _KINDS[kind]
    values = {}
    for option in options.split("&") if options else []:
        name, equals, value = option.partition("=")
        if name not in known:
            wanted = f"options of {kind} are {_listing(known)}" if known else f"{kind} has none"
            raise InputError(f"data source {spec!r}: no option {name!r}; {wanted}")
        if name in values or not equals or not value:
            raise InputError(f"data source {spec!r}: give the option {name!r} one value, once")
        try:
            values[name] = known[name](value)
        except ValueError as error:
            raise InputError(f"data source {spec!r}: {name}={value} is not a number") from error
    return opened(path, **values)


def _open_prepared(folder: str, split: Any = "train") -> Source:
    # Imported here because it brings the networks with it, whose fingerprints it compares.
    from d2f_jax.data.prepared import PreparedSource

    return PreparedSource(folder, split)


def _listing(names: dict) -> str:
    return ", ".join(sorted(names))


_KINDS: dict[str, tuple[Callable[..., Source], dict[str, Callable]]] = {
    "array_record": (_open_prepared, {"split": str}),
    "coco": (Coco, {"images": str}),
    "depth_list": (DepthList, {"root": str, "protocol": str}),
    "hypersim": (Hypersim, {"split": str}),
    "image_folder": (ImageFolder, {}),
    "tfds": (TFDSSource, {"split": str, "image": str, "text": str, "data_dir": str}),
    "uniform_colours": (UniformColours, {"each": int}),
    "vkitti2": (VirtualKitti2, {}),
    "webdataset": (WebDataset, {"latent_scale": float, "least": str, "most": str, "latent": str}),
}
"""How each kind is opened, and its options with their types."""
