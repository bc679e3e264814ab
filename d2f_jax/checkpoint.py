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
        options = ocp.CheckpointManagerOptions(max_to_keep=keep, enable_async_checkpointing=True)
        self._every = every
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

    def due(self, step: int) -> bool:
        return step % self._every == 0

    def save(self, step: int, state: Any, batches: grain.DatasetIterator) -> None:
        """Starts a save; a step that is already there is left alone."""
        if step == self._manager.latest_step():
            return
        args = ocp.args.Composite(state=ocp.args.StandardSave(state), batches=grain.checkpoint.CheckpointSave(batches))
        self._manager.save(step, args=args, force=True)

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *_: object) -> None:
        """Waits for the save under way, also when an error ends the run."""
        self._manager.wait_until_finished()
        self._manager.close()
