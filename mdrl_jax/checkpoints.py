"""Checkpoints of a stage: the only file that knows Orbax.

Each holds three items, so that parameters can be read without the optimizer: `params`, `opt_state`, and `meta`
(JSON: step, optimizer updates, data position, seed, stage). Orbax writes under a temporary name and renames, so a
checkpoint that is listed is whole.
"""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp

from mdrl_jax.rl.trainer import TrainState


class StageCheckpoints:
    """`checkpoints/NN-stage/`: the newest checkpoint of one stage; use as a context manager."""

    def __init__(self, folder: Path, read_only: bool = False):
        options = ocp.CheckpointManagerOptions(
            max_to_keep=None if read_only else 1,
            cleanup_tmp_directories=not read_only,
            read_only=read_only,
            enable_async_checkpointing=False,
        )
        self.manager = ocp.CheckpointManager(folder.absolute(), options=options)

    def __enter__(self) -> "StageCheckpoints":
        return self

    def __exit__(self, *_: Any) -> None:
        self.manager.close()

    def latest(self) -> int | None:
        """Step of the newest checkpoint, None if there is none."""
        return self.manager.latest_step()

    def save(self, step: int, state: TrainState, meta: dict[str, Any]) -> None:
        """Saves; returns once the checkpoint is whole on disk."""
        items = ocp.args.Composite(
            params=ocp.args.StandardSave(state.params),
            opt_state=ocp.args.StandardSave(state.opt_state),
            meta=ocp.args.JsonSave({"step": step, "updates": int(state.step), **meta}),
        )
        self.manager.save(step, args=items, force=True)

    def save_params(self, step: int, params: Any, meta: dict[str, Any]) -> None:
        """Saves parameters that no optimizer goes on from."""
        items = ocp.args.Composite(
            params=ocp.args.StandardSave(params), meta=ocp.args.JsonSave({"step": step, "updates": 0, **meta})
        )
        self.manager.save(step, args=items, force=True)

    def meta(self) -> dict[str, Any]:
        """What the newest checkpoint says of itself."""
        return self.manager.restore(self.latest(), args=ocp.args.Composite(meta=ocp.args.JsonRestore()))["meta"]

    def restore(self, like: TrainState) -> tuple[TrainState, dict[str, Any]]:
        """The newest state, in the shapes and shardings of the abstract `like`, and its meta."""
        items = ocp.args.Composite(
            params=ocp.args.StandardRestore(like.params),
            opt_state=ocp.args.StandardRestore(like.opt_state),
            meta=ocp.args.JsonRestore(),
        )
        read = self.manager.restore(self.latest(), args=items)
        step = jax.device_put(jnp.int32(read["meta"]["updates"]), like.step.sharding)
        return TrainState(step=step, params=read["params"], opt_state=read["opt_state"]), read["meta"]

    def restore_params(self, like: Any) -> Any:
        """The newest parameters alone."""
        items = ocp.args.Composite(params=ocp.args.StandardRestore(like))
        return self.manager.restore(self.latest(), args=items)["params"]


def save_tree(folder: Path, tree: Any) -> None:
    """Writes a tree of arrays as a folder of its own, in place of one that is there."""
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(folder.absolute(), tree, force=True)


def load_tree(folder: Path) -> Any:
    """A tree of `save_tree`, on the devices that it was on."""
    with ocp.StandardCheckpointer() as checkpointer:
        return checkpointer.restore(folder.absolute())


def abstract(shapes: Any, shardings: Any) -> Any:
    """Shapes with their shardings: what `restore` is told to make."""
    return jax.tree.map(
        lambda s, sharding: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=sharding), shapes, shardings
    )
