"""Checkpoints of a stage: the only file that knows Orbax.

    01-code/40/manifest.json   size and SHA-256 of each other file
               meta.json       step, optimizer updates, data position, seed, stage, costs
               state/          Orbax: `params` and, while the stage goes on, `opt_state`

One is written in the background, as `40.unfinished`, and renamed once its manifest is there: what bears a number was
whole. It is compared with its manifest before it is read; one that is whole no more is put aside as `40.damaged`, which
nothing reads or removes, and the one before it is used.

While a stage goes on its newest `keep` are kept, and there has to be room for one more; of a finished stage the
parameters of its last step, as later stages read nothing else. With float32 and Adam the first are 12 bytes a
parameter each, the last is 4.

Where several processes run, all call what is here; process 0 looks, decides and renames, and each writes and reads its
own part of the arrays. They may be others than those that wrote, on another mesh.
"""

import json
import shutil
from collections.abc import Callable, Mapping
from concurrent import futures
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

from mdrl_jax import manifest, records
from mdrl_jax.errors import UserError
from mdrl_jax.parallel import distributed
from mdrl_jax.rl.trainer import TrainState

META, STATE = "meta.json", "state"
UNFINISHED, DAMAGED = ".unfinished", ".damaged"
OPTIMIZER = f"{STATE}/opt_state"
WRITE_SECONDS = 3600  # after which a background write has failed


class StageCheckpoints:
    """The checkpoints of one stage, `folder`, while it goes on; use as a context manager, which waits at its end.

    Args:
      keep: of the newest ones; 2 leaves one where the newest is damaged.
      tell: is given a line for each checkpoint that was found damaged.
    """

    def __init__(self, folder: Path, keep: int = 2, tell: Callable[[str], None] = print):
        self.folder, self.keep, self.tell = folder.absolute(), keep, tell
        self._writer = ocp.AsyncCheckpointer(_handler(), timeout_secs=WRITE_SECONDS)
        self._background = futures.ThreadPoolExecutor(1)
        self._pending: futures.Future[None] | None = None
        if distributed.is_first():
            for left in self.folder.glob(f"*{UNFINISHED}"):
                shutil.rmtree(left)

    def __enter__(self) -> "StageCheckpoints":
        return self

    def __exit__(self, kind: Any, *_: Any) -> None:
        try:
            if kind is None:
                self.wait()
        finally:  # after an error what was begun is finished too, but the error is what is told
            self._background.shutdown()
            self._writer.close()

    def latest(self) -> int | None:
        """Step of the newest whole checkpoint, None if there is none; damaged ones are put aside."""
        self.wait()
        step, lines = distributed.agree(self._look() if distributed.is_first() else None)
        for line in lines:
            self.tell(line)
        return step

    def save(self, step: int, state: TrainState, meta: dict[str, Any]) -> None:
        """Saves a state to go on from; returns once it is copied, so that the next step may be given the state.

        Raises:
          UserError: if the one before could not be written.
        """
        items = {"params": state.params, "opt_state": state.opt_state}
        self._write(step, items, {"updates": int(state.step), **meta})

    def save_params(self, step: int, params: Any, meta: dict[str, Any]) -> None:
        """Saves parameters that no optimizer goes on from: those of a stage's end."""
        self._write(step, {"params": params}, {"updates": 0, **meta})

    def wait(self) -> None:
        """Waits until what was saved is whole on disk.

        Raises:
          UserError: if it could not be written.
        """
        if self._pending is None:
            return
        pending, self._pending = self._pending, None
        try:
            pending.result()
        except Exception as e:
            raise UserError(
                f"a checkpoint in {self.folder} could not be written ({type(e).__name__}: {e}); see that there is "
                "room, and start the run again: what was saved before is kept"
            ) from e
        distributed.barrier("checkpoint")  # only process 0 knows when it was renamed

    def meta(self) -> dict[str, Any]:
        """What the newest whole checkpoint says of itself."""
        file = self.folder / str(self.latest()) / META
        return distributed.agree(json.loads(file.read_text()) if distributed.is_first() else None)

    def restore(self, like: TrainState) -> tuple[TrainState, dict[str, Any]]:
        """The newest state, in the shapes and shardings of the abstract `like`, and its meta."""
        meta = self.meta()
        read = _read(self.folder / str(meta["step"]), params=like.params, opt_state=like.opt_state)
        step = jax.device_put(jnp.int32(meta["updates"]), like.step.sharding)
        return TrainState(step=step, params=read["params"], opt_state=read["opt_state"]), meta

    def restore_params(self, like: Any) -> Any:
        """The newest parameters alone."""
        return _read(self.folder / str(self.latest()), params=like)["params"]

    def _write(self, step: int, items: dict[str, Any], meta: dict[str, Any]) -> None:
        self.wait()
        unfinished = self.folder / f"{step}{UNFINISHED}"
        records.write_json(unfinished / META, {"step": step, **meta})
        saved = {name: ocp.args.PyTreeSave(tree) for name, tree in items.items()}
        self._writer.save(unfinished / STATE, args=ocp.args.Composite(**saved))
        self._pending = self._background.submit(self._finish, step)

    def _finish(self, step: int) -> None:
        self._writer.wait_until_finished()  # for the other processes too
        if not distributed.is_first():
            return
        unfinished = self.folder / f"{step}{UNFINISHED}"
        manifest.write(unfinished)
        unfinished.rename(self.folder / str(step))
        for old in steps(self.folder)[: -self.keep]:
            shutil.rmtree(self.folder / str(old))

    def _look(self) -> tuple[int | None, list[str]]:
        found, damaged = None, []
        for step in reversed(steps(self.folder)):
            try:
                manifest.check(self.folder / str(step))
            except manifest.Damaged as e:
                damaged.append(f"{self.folder.name}: checkpoint {step} is damaged ({e}); {self._put_aside(step)}")
            else:
                found = step
                break
        instead = "no other is there: the stage begins anew" if found is None else f"goes on from that of step {found}"
        return found, [f"{line}; {instead}" for line in damaged]

    def _put_aside(self, step: int) -> str:
        names = (f"{step}{DAMAGED}{number}" for number in ("", *map(str, range(2, 1000))))
        name = next(name for name in names if not (self.folder / name).exists())
        (self.folder / str(step)).rename(self.folder / name)
        return f"put aside as {name}"


def steps(folder: Path) -> list[int]:
    """Steps of the checkpoints in a stage's folder, the newest last."""
    return sorted(int(p.name) for p in folder.glob("*") if p.name.isdigit())


def load_params(folder: Path, like: Any) -> Any:
    """The parameters that a stage ended with, in the shapes and shardings of the abstract `like`.

    Raises:
      UserError: if there are none, or they are damaged: an earlier step's are others.
    """
    step, wrong = distributed.agree(_last(folder) if distributed.is_first() else None)
    if step is None:
        raise UserError(f"{folder} has no checkpoint yet")
    if wrong:
        raise UserError(
            f"checkpoint {step} in {folder} is damaged ({wrong}); remove that folder and "
            f"evaluations/{folder.name}.json beside checkpoints/, and start the run again: it makes the stage anew"
        )
    return _read(folder / str(step), params=like)["params"]


def keep_last(folder: Path) -> None:
    """Removes the checkpoints that a finished stage went through: nothing will go on from them."""
    if distributed.is_first():
        for old in steps(folder)[:-1]:
            shutil.rmtree(folder / str(old))


def _last(folder: Path) -> tuple[int | None, str]:
    found = steps(folder)
    if not found:
        return None, ""
    try:
        manifest.check(folder.absolute() / str(found[-1]), without=OPTIMIZER)
    except manifest.Damaged as e:
        return found[-1], str(e)
    return found[-1], ""


def _handler() -> ocp.CompositeCheckpointHandler:
    # Compression takes 8 % off weights and four times as long as writing them.
    params, opt_state = (ocp.PyTreeCheckpointHandler(use_compression=False) for _ in range(2))
    return ocp.CompositeCheckpointHandler(params=params, opt_state=opt_state)


def _read(folder: Path, **like: Any) -> Any:
    wanted = {
        name: ocp.args.PyTreeRestore(tree, restore_args=ocp.checkpoint_utils.construct_restore_args(tree))
        for name, tree in like.items()
    }
    with ocp.Checkpointer(_handler()) as reader:
        return reader.restore(folder.absolute() / STATE, args=ocp.args.Composite(**wanted))


def save_tree(folder: Path, tree: Any) -> None:
    """Writes a tree of arrays as a folder of its own, in place of one that is there."""
    if distributed.is_first():
        for left in folder.parent.glob(f"{folder.name}.orbax-checkpoint-tmp*"):  # of a kill
            shutil.rmtree(left)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(folder.absolute(), tree, force=True)


def load_tree(folder: Path, shardings: Mapping[str, Any]) -> Any:
    """A tree of `save_tree`: leaves under the keys of `shardings` lie as these say, all others on the host."""

    def like(path: Any, leaf: Any) -> Any:
        names = [key.key for key in path if isinstance(key, jax.tree_util.DictKey)]
        if names[-1] in shardings:
            return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=shardings[names[-1]])
        return np.empty(leaf.shape, leaf.dtype)

    with ocp.StandardCheckpointer() as checkpointer:
        known: Any = checkpointer.metadata(folder.absolute()).item_metadata
        return checkpointer.restore(folder.absolute(), jax.tree_util.tree_map_with_path(like, known.tree))


def abstract(shapes: Any, shardings: Any) -> Any:
    """Shapes with their shardings: what `restore` is told to make."""
    return jax.tree.map(
        lambda s, sharding: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=sharding), shapes, shardings
    )
