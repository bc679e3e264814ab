"""How every program starts and ends: flags in, exit code out."""

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from absl import app, flags, logging
from ml_collections import config_flags

from d2f_jax.errors import InputError

Config = Any  # a locked ConfigDict: what its attributes are, only the file in configs/ knows


def run(main: Callable[[], None]) -> None:
    """Parses the flags and calls `main`. Bad flags and InputError end with one line and exit code 2, divergence 1."""
    app.run(lambda _: _guarded(main), flags_parser=_parse)


def _guarded(main: Callable[[], None]) -> None:
    try:
        main()
    except InputError as error:
        _refuse(error)
    except FloatingPointError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)


def _parse(argv: Sequence[str]) -> list[str]:
    # A config file is the user's Python and an override is the user's typing: whatever they raise is about the input.
    try:
        rest = flags.FLAGS(argv)
        if not flags.FLAGS["verbosity"].present:
            logging.set_verbosity(logging.WARNING)  # the libraries' housekeeping is not for the user
        _check_config_file()
    except AttributeError as error:
        # ml_collections hands over the key and perhaps a guess, as the representation of a string.
        key, *guess = str(error).replace("\\n", " ").replace("\\", "").replace("'", "").replace('"', "").split()
        _refuse(InputError(f"the config has no key {key!r}; {' '.join(guess) or 'its file declares them all'}"))
    except Exception as error:
        _refuse(error)
    if rest[1:]:
        _refuse(InputError(f"unexpected argument {rest[1]!r}; options are written --name=value (see --help)"))
    return rest


def _check_config_file() -> None:
    """ml_collections would tell of a missing one only when the config is first used."""
    if "config" in flags.FLAGS and flags.FLAGS["config"].present:
        file = Path(config_flags.get_config_filename(flags.FLAGS["config"]).partition(":")[0])
        if not file.is_file():
            raise InputError(f"--config: there is no file {file}; give one such as configs/quickstart.py")


def _refuse(error: Exception) -> None:
    kind = "" if isinstance(error, InputError | flags.Error) else f"{type(error).__name__}: "
    text = str(error).strip()
    if "Traceback" in text:  # of a config file that failed, in absl's message: its last line says why
        text = text.splitlines()[-1]
    print(f"error: {kind}{' '.join(text.split())}", file=sys.stderr)
    sys.exit(2)
