"""How every program starts and ends: flags in, exit code out."""

import os
import re
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
from absl import app, flags, logging

from d2f_jax import distributed
from d2f_jax.errors import InputError, Preempted, SaveError

Config = Any  # a locked ConfigDict: what its attributes are, only the file in configs/ knows


EXIT_INPUT, EXIT_PREEMPTED, EXIT_INTERRUPTED = 2, 75, 130


def run(main: Callable[[], None]) -> None:
    """Parses the flags, joins the run's other processes if there are any, and calls `main`.

    Exit codes: 0 done, 1 failed, 2 bad flags or input, 75 preempted after a save; 2, 75 and what is foreseen of 1 end
    with one line.
    """
    app.run(lambda _: _exit(_guarded(main)), flags_parser=_parse)


def _guarded(main: Callable[[], None]) -> int:
    try:
        distributed.initialize()
        _keep_compiled()
        main()
        return 0
    except InputError as error:
        return _told(error, EXIT_INPUT)
    except Preempted as error:
        return _told(error, EXIT_PREEMPTED)
    except (FloatingPointError, SaveError) as error:
        return _told(error, 1)
    except KeyboardInterrupt:
        return _told(InputError("interrupted; the same command goes on from the newest checkpoint"), EXIT_INTERRUPTED)
    except Exception as error:
        if str(error).startswith("RESOURCE_EXHAUSTED") and "memory" in str(error):  # XLA's words, of compiling too
            logging.info("out of memory", exc_info=error)  # with --verbosity=0: where it was
            return _told(_too_large(error), EXIT_INPUT)
        if not _several():
            raise
        traceback.print_exc()
        place = f"process {jax.process_index()} of {jax.process_count()}"
        hint = "if it is about a connection, another process is gone; start the same command again on all hosts"
        return _told(RuntimeError(f"{type(error).__name__} in {place}: {hint}"), 1)


def _too_large(error: Exception) -> InputError:
    """What to change when the devices have no memory left."""
    said = " ".join(str(error).removeprefix("RESOURCE_EXHAUSTED:").split())
    return InputError(
        f"a device has not enough memory ({said[:160]}); of a step, raise config.train.accumulate, set "
        "config.remat=elementwise or gathers, share a copy between more devices by config.mesh.fsdp, or lower "
        "config.train.batch_size; of drawing and preparing, lower config.eval.batch_size or --batch_size"
    )


def cache_folder() -> Path:
    """Where what took long to find out is kept for the next start."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "d2f_jax")


def _keep_compiled() -> None:
    """What was compiled once is found again by the next start, unless JAX_COMPILATION_CACHE_DIR names another place."""
    if not os.environ.get("JAX_COMPILATION_CACHE_DIR"):
        jax.config.update("jax_compilation_cache_dir", str(cache_folder() / "compiled"))


def _exit(code: int) -> None:
    if code and _several():
        # The others may be gone or wait for this one: no ceremony of leaving that waits for them.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


def _several() -> bool:
    return jax.distributed.is_initialized() and jax.process_count() > 1


def _parse(argv: Sequence[str]) -> list[str]:
    # A config file is the user's Python and an override is the user's typing: whatever they raise is about the input.
    try:
        _check_config_file(argv)
        rest = flags.FLAGS(argv)
        if not flags.FLAGS["verbosity"].present:
            logging.set_verbosity(logging.WARNING)  # the libraries' housekeeping is not for the user
    except (AttributeError, KeyError) as error:
        # ml_collections hands over the key and perhaps a guess, as the representation of a string.
        key, *guess = str(error).replace("\\n", " ").replace("\\", "").replace("'", "").replace('"', "").split()
        _refuse(InputError(f"the config has no key {key!r}; {' '.join(guess) or 'its file declares them all'}"))
    except Exception as error:
        _refuse(error)
    if rest[1:]:
        _refuse(InputError(f"unexpected argument {rest[1]!r}; options are written --name=value (see --help)"))
    return rest


def _check_config_file(argv: Sequence[str]) -> None:
    """Refuses what ml_collections tells of in its own terms, late, or not at all."""
    if "config" not in flags.FLAGS:
        return
    given = [argument for argument in argv[1:] if re.match(r"--?config\b", argument)]
    files = [argument for argument in given if not re.match(r"--?config\.", argument)]
    if files and given[0] != files[0]:
        raise InputError(f"{given[0]} stands before --config; put --config=FILE first, what changes it after it")
    if len(files) > 1:
        raise InputError(
            f"--config is given {len(files)} times, last as {files[-1]}; give it once, and quote what the shell would "
            'take apart, as in "--config=configs/images.py:webdataset:shards/{000..219}.tar": { } ? & *'
        )
    if files and "=" in files[0]:
        file = Path(files[0].partition("=")[2].partition(":")[0])
        if not file.is_file():
            raise InputError(f"--config: there is no file {file}; give one such as configs/quickstart.py")
        if file.resolve().parent.name == "configs":  # whose files import each other, wherever the program was started
            sys.path.append(str(file.resolve().parents[1]))


def _refuse(error: Exception) -> None:
    sys.exit(_told(error, EXIT_INPUT))


def _told(error: Exception, code: int) -> int:
    """Prints the one line."""
    expected = isinstance(error, InputError | Preempted | FloatingPointError | RuntimeError | flags.Error)
    kind = "" if expected else f"{type(error).__name__}: "
    text = str(error).strip()
    if "Traceback" in text:  # of a config file that failed, in absl's message: its last line says why
        text = text.splitlines()[-1].removeprefix(f"{InputError.__module__}.{InputError.__name__}: ")
    print(f"{'stopped' if code == EXIT_PREEMPTED else 'error'}: {kind}{' '.join(text.split())}", file=sys.stderr)
    return code
