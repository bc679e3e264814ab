"""Checkpoints of the train state and the data iterator, written by Orbax while training goes on."""

from pathlib import Path
from typing import Any, TypeVar

import grain
import jax
import orbax.checkpoint as ocp

State = TypeVar("State")


class Checkpoints:
    """Saves every `every` steps into `folder`, keeps the newest `keep`, restores the newest."""

    def __init__(self, folder: Path, *, every: int, keep: int) -> None:
        options = ocp.CheckpointManagerOptions(
            max_to_keep=keep, save_interval_steps=every, enable_async_checkpointing=True
        )
        self._manager = ocp.CheckpointManager(folder.absolute(), options=options)

    def restore(self, state: State, batches: grain.DatasetIterator) -> State:
        """The newest checkpoint, placed as `state` is, and `batches` set to go on from it; `state` if there is none."""
        step = self._manager.latest_step()
        if step is None:
            return state
        like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)
        restored = self._manager.restore(
            step,
            args=ocp.args.Composite(
                state=ocp.args.StandardRestore(like), batches=grain.checkpoint.CheckpointRestore(batches)
            ),
        )
        return restored["state"]

    def save(self, step: int, state: Any, batches: grain.DatasetIterator, *, force: bool = False) -> None:
        """Starts a save if `step` is due, or in any case with `force`; a step that is already there is left alone."""
        if step == self._manager.latest_step():
            return
        args = ocp.args.Composite(state=ocp.args.StandardSave(state), batches=grain.checkpoint.CheckpointSave(batches))
        self._manager.save(step, args=args, force=force)

    def close(self) -> None:
        """Waits for the save under way."""
        self._manager.wait_until_finished()
        self._manager.close()
