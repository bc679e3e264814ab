"""Checkpoints of the train state and the data's position, written by Orbax while training goes on.

Orbax commits a checkpoint as a whole or not at all, but reads one back whose bytes have changed since without noticing.
So each holds a seal, the sizes and checksums of its files, which is compared before anything is restored from it.
"""

import json
import os
import re
import shutil
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import jax
import orbax.checkpoint as ocp
from absl import logging

from d2f_jax import distributed
from d2f_jax.errors import InputError, SaveError

State = TypeVar("State")
Position = Mapping[str, Any]  # JSON: what the batches from here on depend on, beside the step

_SEAL = "seal.json"
_NONE, _DAMAGED = -1, -2  # in place of a step
_CHUNK = 1 << 24  # bytes read at once


class Checkpoints:
    """Saves into `folder` every `every` steps and keeps the newest `keep`, besides every one of `keep_period` steps."""

    def __init__(self, folder: Path, *, every: int, keep: int, keep_period: int | None = None) -> None:
        self._folder, self._every, self._saving = folder.absolute(), every, 0
        self._failure: SaveError | None = None
        if distributed.is_main():  # Orbax's option does it in a thread, which fails where a refusal ends the process
            for killed in self._folder.glob(f"*{ocp.utils.TMP_DIR_SUFFIX}*"):
                shutil.rmtree(killed)
        self._manager = ocp.CheckpointManager(
            self._folder,
            options=ocp.CheckpointManagerOptions(
                max_to_keep=keep,
                keep_period=keep_period,
                enable_async_checkpointing=True,
                async_options=ocp.options.AsyncOptions(post_finalization_callback=self._seal),
            ),
        )

    def restore(self, state: State) -> tuple[State, Position | None]:
        """The newest checkpoint that is whole, each array placed as in `state`; `state` itself if there is none yet.

        Damaged ones are reported and passed over, and deleted once an older one is restored. Raises InputError if there
        are checkpoints and all of them are damaged, and SaveError if one cannot be read; then none is deleted.
        """
        chosen, faults = self._newest_whole() if distributed.is_main() else (None, {})
        # The main process's view is all that counts: network file systems may show each host another listing.
        step = distributed.from_main(chosen if chosen is not None else _DAMAGED if faults else _NONE)
        if step == _DAMAGED:
            told = "; ".join(f"{step}: {fault}" for step, fault in faults.items()) or "named by the main process"
            raise InputError(
                f"{self._folder}: no checkpoint is whole ({told}); put back a copy or give a new --workdir"
            )
        if step == _NONE:
            return state, None
        restored = self._restore(step, state)
        for damaged in faults:  # the run will come to these steps again
            shutil.rmtree(self._folder / str(damaged))
        distributed.barrier("damaged checkpoints are gone")
        self._manager.reload()
        return restored["state"], restored["position"]

    def due(self, step: int) -> bool:
        return step % self._every == 0

    def save(self, step: int, state: Any, position: Position) -> None:
        """Starts a save; a step that is already there is left alone. Raises SaveError if the one before failed."""
        if step == self._manager.latest_step():
            return
        args = ocp.args.Composite(state=ocp.args.StandardSave(state), position=ocp.args.JsonSave(dict(position)))
        try:
            self._manager.wait_until_finished()
            self._saving = step
            self._manager.save(step, args=args, force=True)
        except Exception as error:
            raise self._failed(error) from error

    def wait(self) -> None:
        """Until the save under way is committed. Raises SaveError if it failed."""
        try:
            self._manager.wait_until_finished()
        except Exception as error:
            raise self._failed(error) from error

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *_: object) -> None:
        """Waits for the save under way, also when an error ends the run.

        A save that failed is told before what followed from it, such as metrics that find the disk full as well.
        """
        self.wait()
        if self._failure is not None:
            raise self._failure
        self._manager.close()

    def _restore(self, step: int, state: Any) -> Any:
        like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)
        args = ocp.args.Composite(state=ocp.args.StandardRestore(like), position=ocp.args.JsonRestore())
        return self._manager.restore(step, args=args)

    def _newest_whole(self) -> tuple[int | None, dict[int, str]]:
        """Its step, and what is wrong with those after it."""
        faults = {}
        for step in sorted(self._manager.all_steps(), reverse=True):
            fault = damage(self._folder / str(step))
            if fault is None:
                return step, faults
            faults[step] = fault
            logging.error("checkpoint %s of %s is damaged and passed over: %s", step, self._folder, fault)
        return None, faults

    def _seal(self) -> None:
        """Called by Orbax, in its thread, when all is written and before it is committed."""
        if distributed.is_main():
            for folder in self._folder.glob(f"{self._saving}*"):
                if folder.name.partition(".")[0] == str(self._saving):
                    (folder / _SEAL).write_text(json.dumps(_files(folder), indent=0))

    def _failed(self, error: Exception) -> SaveError:
        whole = max((step for step in self._manager.all_steps() if step != self._saving), default=None)
        left = "there is none before it" if whole is None else f"that of step {whole} is whole"
        self._failure = SaveError(
            f"the checkpoint of step {self._saving} was not written to {self._folder} ({_reason(error)}); {left}; "
            "mend it and start the same command again"
        )
        return self._failure


def check_any(folder: Path) -> None:
    """Raises InputError if `folder` holds no checkpoint."""
    if not any(folder.glob("[0-9]*")):
        raise _without(folder)


def restore_average(folder: Path, like: Any) -> tuple[int, Any]:
    """Step and EMA parameters alone of the newest checkpoint in `folder`, placed as `like`.

    Of a run that kept no average it is what was trained. Raises InputError if there is no checkpoint, the newest is
    damaged, or its parameters are not those of `like`.
    """
    folder = folder.absolute()
    with ocp.CheckpointManager(
        folder,
        options=ocp.CheckpointManagerOptions(create=False, read_only=True, save_interval_steps=0),
        item_handlers={"state": ocp.PyTreeCheckpointHandler(), "position": ocp.JsonCheckpointHandler()},
    ) as manager:
        latest = manager.latest_step()
        fault = damage(folder / str(latest)) if distributed.is_main() and latest is not None else None
        step = distributed.from_main(_NONE if latest is None else _DAMAGED if fault else latest)
        if step == _NONE:
            raise _without(folder)
        if step == _DAMAGED:
            told = fault or "as the main process tells"
            raise InputError(f"{folder / str(latest)} is damaged: {told}; put back a copy")
        saved = manager.item_metadata(step)["state"]
        part = "trained" if saved["ema"] is None else "ema"
        # Orbax would leave out what is not in both of them.
        there, here = _shapes(saved[part]), _shapes(like)
        if differing := sorted(name for name in there.keys() | here.keys() if there.get(name) != here.get(name)):
            first = f"{differing[0]}: {there.get(differing[0], 'none')} there, {here.get(differing[0], 'none')} here"
            raise InputError(f"{folder}: the parameters are not this run's ({first}); use its config")
        abstract = {part: jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), like)}
        restore_args = ocp.checkpoint_utils.construct_restore_args(abstract)
        args = ocp.args.PyTreeRestore(item=abstract, restore_args=restore_args, partial_restore=True)
        return step, manager.restore(step, args=ocp.args.Composite(state=args))["state"][part]


def _without(folder: Path) -> InputError:
    return InputError(f"{folder} holds no checkpoint; give the checkpoints/ of a workdir")


def damage(checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint's files, or None.

    Raises SaveError if they cannot be read, as on a network file system for a while: that says nothing of them.
    """
    try:
        table = json.loads((checkpoint / _SEAL).read_text())
        sealed = {name: (size, checksum) for name, (size, checksum) in table.items()}
    except FileNotFoundError:
        return f"{_SEAL} is missing"
    except OSError as error:
        raise _unreadable(checkpoint, error) from error
    except (ValueError, TypeError, AttributeError) as error:
        return f"{_SEAL} cannot be read ({_reason(error)})"
    try:
        found = _files(checkpoint)
    except OSError as error:
        raise _unreadable(checkpoint, error) from error
    for name, (size, checksum) in sealed.items():
        if name not in found:
            return f"{name} is missing"
        if found[name][0] != size:
            return f"{name} has {found[name][0]} bytes instead of {size}"
        if found[name][1] != checksum:
            return f"{name} has changed since it was written"
    return None


def _unreadable(checkpoint: Path, error: OSError) -> SaveError:
    return SaveError(
        f"{error.filename or checkpoint} cannot be read ({error.strerror or error}); start the same command again, or "
        f"delete {checkpoint} to go on from the one before"
    )


def _shapes(tree: Any) -> dict[str, tuple[int, ...]]:
    return {name: tuple(x.shape) for name, x in ocp.tree.to_flat_dict(tree, sep=".").items()}


def _files(checkpoint: Path) -> dict[str, list[int]]:
    """Size and CRC-32 of the items' files; Orbax's own notes at the top change while it commits."""
    files = [file for file in checkpoint.glob("*/**/*") if file.is_file() and file.name != "commit_success.txt"]
    return {str(file.relative_to(checkpoint)): list(_size_and_checksum(file)) for file in sorted(files)}


def _size_and_checksum(file: Path) -> tuple[int, int]:
    size, checksum = 0, 0
    with file.open("rb") as stream:
        while chunk := stream.read(_CHUNK):
            size, checksum = size + len(chunk), zlib.crc32(chunk, checksum)
    return size, checksum


def _reason(error: Exception) -> str:
    code = re.search(r"os_error_code='(\d+)'", str(error))  # how TensorStore ends a long text of many paths
    return os.strerror(int(code[1])) if code else " ".join(str(error).split())[:200]
