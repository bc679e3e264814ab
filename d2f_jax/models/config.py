"""Reads a network's config.json: known keys make a frozen dataclass, keys that would change the network are refused."""

import dataclasses
from collections.abc import Mapping
from typing import Any, TypeVar

from d2f_jax.errors import InputError

Config = TypeVar("Config")


def read(
    cls: type[Config], config: Mapping[str, Any], *, neutral: Mapping[str, tuple[Any, ...]], ignored: str
) -> Config:
    """An instance of the dataclass `cls` from the keys of `config` that are its fields; lists become tuples.

    `neutral` are keys that are supported only at these values; `ignored` names keys, by spaces, that have no effect.
    Raises InputError naming any other key and any value out of place.
    """
    fields = {field.name for field in dataclasses.fields(cls)}  # pyright: ignore[reportArgumentType]
    known = {}
    for key, value in config.items():
        value = tuple(value) if isinstance(value, list) else value
        if key in fields:
            known[key] = value
        elif key in neutral:
            if value not in neutral[key]:
                raise InputError(f"config.json: {key}={value!r} is not supported (only {neutral[key][0]!r} is)")
        elif not key.startswith("_") and key not in ignored.split():
            raise InputError(
                f"config.json: unknown key {key}={value!r} for {cls.__name__}; remove it if it has no effect"
            )
    try:
        return cls(**known)
    except TypeError as error:
        raise InputError(f"config.json: {error}") from error
