"""Checkpoints of the whole state with Orbax: one item per role, so that one can be read without the others."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

from diffusion_distill.training.state import TrainState


class Checkpoints:
    """The checkpoints of a run, newest last, under a folder; saving is atomic and in the background."""

    def __init__(self, folder: Path, keep: int = 2):
        """Keeps the newest `keep` checkpoints."""
        options = ocp.CheckpointManagerOptions(max_to_keep=keep, create=True)
        self._manager = ocp.CheckpointManager(folder.resolve(), options=options)

    @property
    def latest(self) -> int | None:
        """The update number of the newest checkpoint, None if there is none."""
        return self._manager.latest_step()

    def save(self, step: int, state: TrainState) -> None:
        """Saves the state under its update number, if it is newer than what is there."""
        if self.latest is not None and step <= self.latest:
            return
        items = {name: ocp.args.StandardSave(tree) for name, tree in _items(state).items()}  # type: ignore[call-arg]
        if not self._manager.save(step, args=ocp.args.Composite(**items)):
            raise RuntimeError(f"Orbax did not save the checkpoint of update {step}.")

    def restore(self, like: TrainState) -> TrainState:
        """The newest checkpoint, with the shapes, types and shardings of `like`."""
        abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, _items(like))
        items = {name: ocp.args.StandardRestore(tree) for name, tree in abstract.items()}  # type: ignore[call-arg]
        restored = self._manager.restore(self.latest, args=ocp.args.Composite(**items))
        return like.replace(**{name: restored[name] for name in items if name != "counters"}, **restored["counters"])

    def close(self) -> None:
        """Waits for saves under way."""
        self._manager.wait_until_finished()
        self._manager.close()


def _items(state: TrainState) -> dict[str, Any]:
    """The state's non-empty parts by item name."""
    parts = {
        "params": state.params,
        "opt_state": state.opt_state,
        "averages": state.averages,
        "teacher": state.teacher,
    }
    parts = {name: tree for name, tree in parts.items() if jax.tree.leaves(tree)}
    return {**parts, "counters": {"step": state.step, "skipped": state.skipped}}


def save_params(folder: Path, params: Any) -> None:
    """Writes parameters alone, as an artefact's."""
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(folder.resolve(), jax.tree.map(np.asarray, params), force=True)


def load_params(folder: Path, like: Any) -> Any:
    """Reads parameters of the shapes and types of `like` (arrays or shape structs) onto the default device.

    Raises:
      ValueError: names, shapes or types differ from `like`.
    """
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    abstract = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=device), like)
    with ocp.StandardCheckpointer() as checkpointer:
        return jax.tree.map(jnp.asarray, checkpointer.restore(folder.resolve(), abstract))
