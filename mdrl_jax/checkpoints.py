"""Saves and loads the checkpoints of a stage; the only file that uses Orbax.

    01-code/40/manifest.json   size and SHA-256 of every other file
               meta.json       step, optimizer updates, data position, seed, stage, costs
               state/          Orbax: `params` and, until the stage ends, `opt_state`

A checkpoint is written in the background as `40.unfinished` and renamed to `40` once its manifest is written. So a
folder whose name is a number was complete. Before a checkpoint is read, it is compared with its manifest. A damaged one
is renamed to `40.damaged`, which nothing reads or removes, and the previous checkpoint is used.

Until a stage ends, its newest `keep` checkpoints are kept, and the disk needs room for one more. Of a finished stage
only the final parameters are kept, because later stages read nothing else. In float32 with Adam a checkpoint takes 12
bytes per parameter, and the final parameters take 4.

If a run has several processes, all of them call these functions. Process 0 checks, decides and renames; every process
writes and reads its own part of the arrays. A checkpoint may be read by another number of processes and on another mesh
than it was written. If a process does not come within the time-out, the functions that wait for it raise
`distributed.HostLost`. An OSError of listing, renaming or removing files is not caught, except in the background,
where `StageCheckpoints.wait` reports it.
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
WRITE_SECONDS = 3600  # a background write that takes longer counts as failed


class StageCheckpoints:
    """The checkpoints of one stage that is being trained.

    Use it as a context manager: on leaving, it waits until everything is written. Making one removes the checkpoints
    in `folder` that a killed run left unfinished.

    Args:
      folder: folder of the stage's checkpoints; it need not exist yet.
      keep: number of newest checkpoints that are kept, at least 1; 2 leaves an older one if the newest is damaged.
      tell: called with one line of text for each damaged checkpoint that is found, on every process.

    Raises:
      UserError: on leaving the `with` block without another error, if the last checkpoint could not be written.
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
        finally:  # after an error the current write is finished too, but the error is the one that is raised
            self._background.shutdown()
            self._writer.close()

    def latest(self) -> int | None:
        """Finds the newest undamaged checkpoint; newer, damaged ones are renamed to `STEP.damaged` and told.

        It first waits until the last checkpoint is on disk.

        Returns:
          The step of the checkpoint, i.e. the number of steps done; None if there is none.

        Raises:
          UserError: if the last checkpoint could not be written.
        """
        self.wait()
        step, lines = distributed.agree(self._look() if distributed.is_first() else None)
        for line in lines:
            self.tell(line)
        return step

    def save(self, step: int, state: TrainState, meta: dict[str, Any]) -> None:
        """Saves a training state from which the stage can continue.

        It returns once the state is copied to the host, so the next step may overwrite the state's memory. The writing
        goes on in the background; its failure is raised by the next call that waits for it (`wait`). Once the new
        checkpoint is complete, the oldest ones beyond `keep` are removed.

        Args:
          step: number of steps done, 0 or more; it names the checkpoint. If there is one of this step already, the
            writing fails.
          state: parameters and optimizer state.
          meta: fields for `meta.json`, JSON-able, beside "step" and "updates".

        Raises:
          UserError: if the previous checkpoint could not be written.
          TypeError: if `meta` is not JSON-able.
        """
        items = {"params": state.params, "opt_state": state.opt_state}
        self._write(step, items, {"updates": int(state.step), **meta})

    def save_params(self, step: int, params: Any, meta: dict[str, Any]) -> None:
        """Saves the final parameters of a stage, without optimizer state, in the background like `save`.

        Args:
          step: as in `save`.
          params: the parameters.
          meta: fields for `meta.json`, JSON-able, beside "step" and "updates", which is 0.

        Raises:
          UserError, TypeError: as in `save`.
        """
        self._write(step, {"params": params}, {"updates": 0, **meta})

    def wait(self) -> None:
        """Waits until the last checkpoint is completely on disk; returns at once if there is none to wait for.

        Raises:
          UserError: if it could not be written. A further call does not raise it again.
        """
        if self._pending is None:
            return
        pending, self._pending = self._pending, None
        try:
            pending.result()
        except Exception as e:
            raise UserError(
                f"a checkpoint in {self.folder} could not be written ({type(e).__name__}: {e}); check that the disk "
                "has room and start the run again: earlier checkpoints are kept"
            ) from e
        distributed.barrier("checkpoint")  # the rename is done by process 0 alone

    def meta(self) -> dict[str, Any]:
        """The content of `meta.json` of the newest undamaged checkpoint.

        It has "step", "updates" (optimizer updates; 0 if only parameters were saved) and the fields given to `save`.
        The newest undamaged checkpoint is found by `latest`, which renames damaged ones; so it is in `restore` and
        `restore_params`.

        Raises:
          FileNotFoundError: if there is no undamaged checkpoint.
          UserError: as in `latest`.
        """
        file = self.folder / str(self.latest()) / META
        return distributed.agree(json.loads(file.read_text()) if distributed.is_first() else None)

    def restore(self, like: TrainState) -> tuple[TrainState, dict[str, Any]]:
        """Loads the newest undamaged training state.

        Args:
          like: the same tree with shapes and shardings in place of arrays (`abstract`).

        Returns:
          The training state, placed by these shardings; and the content of the checkpoint's `meta.json`.

        Raises:
          FileNotFoundError: if there is no undamaged checkpoint.
          KeyError: if the checkpoint has no optimizer state, because `save_params` wrote it.
          ValueError: if its trees have another structure or other shapes than `like`.
          UserError: as in `latest`.
        """
        meta = self.meta()
        read = _read(self.folder / str(meta["step"]), params=like.params, opt_state=like.opt_state)
        step = jax.device_put(jnp.int32(meta["updates"]), like.step.sharding)
        return TrainState(step=step, params=read["params"], opt_state=read["opt_state"]), meta

    def restore_params(self, like: Any) -> Any:
        """Loads the parameters of the newest undamaged checkpoint, without optimizer state.

        Args:
          like: the parameter tree with shapes and shardings in place of arrays (`abstract`), not a `TrainState`.

        Returns:
          The parameters, placed by these shardings.

        Raises:
          FileNotFoundError: if there is no undamaged checkpoint.
          ValueError: if the parameters have another structure or other shapes than `like`.
          UserError: as in `latest`.
        """
        return _read(self.folder / str(self.latest()), params=like)["params"]

    def _write(self, step: int, items: dict[str, Any], meta: dict[str, Any]) -> None:
        self.wait()
        unfinished = self.folder / f"{step}{UNFINISHED}"
        records.write_json(unfinished / META, {"step": step, **meta})
        saved = {name: ocp.args.PyTreeSave(tree) for name, tree in items.items()}
        self._writer.save(unfinished / STATE, args=ocp.args.Composite(**saved))
        self._pending = self._background.submit(self._finish, step)

    def _finish(self, step: int) -> None:
        self._writer.wait_until_finished()  # Orbax waits for the other processes too
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
        instead = (
            "there is no other: the stage starts over" if found is None else f"the one of step {found} is used instead"
        )
        return found, [f"{line}; {instead}" for line in damaged]

    def _put_aside(self, step: int) -> str:
        names = (f"{step}{DAMAGED}{number}" for number in ("", *map(str, range(2, 1000))))
        name = next(name for name in names if not (self.folder / name).exists())
        (self.folder / str(step)).rename(self.folder / name)
        return f"renamed to {name}"


def steps(folder: Path) -> list[int]:
    """Steps of the complete checkpoints in a stage's folder, in ascending order; damage is not looked for.

    Args:
      folder: folder of the stage's checkpoints; if it does not exist, there are none.
    """
    return sorted(int(p.name) for p in folder.glob("*") if p.name.isdigit())


def load_params(folder: Path, like: Any) -> Any:
    """Loads the parameters of the last checkpoint of a stage: of a finished stage, its final parameters.

    Whether the stage is finished is not checked. Unlike `StageCheckpoints.restore`, it never falls back on an earlier
    step, whose parameters differ.

    Args:
      folder: folder of the stage's checkpoints.
      like: the parameter tree with shapes and shardings in place of arrays (`abstract`).

    Returns:
      The parameters, converted to the dtypes of `like` and placed by its shardings.

    Raises:
      UserError: if there is no checkpoint, or the last one is damaged. Its optimizer state, if any, is not checked.
      ValueError: if the parameters have another structure or other shapes than `like`.
    """
    step, wrong = distributed.agree(_last(folder) if distributed.is_first() else None)
    if step is None:
        raise UserError(f"{folder} has no checkpoint yet")
    if wrong:
        raise UserError(
            f"checkpoint {step} in {folder} is damaged ({wrong}); remove that folder and "
            f"evaluations/{folder.name}.json beside checkpoints/, and start the run again: it repeats the stage"
        )
    return _read(folder / str(step), params=like)["params"]


def keep_last(folder: Path) -> None:
    """Removes all checkpoints of a finished stage but that of the highest step: nothing needs the others any more.

    It checks neither that the stage is finished nor that the last checkpoint is undamaged. Process 0 removes; the other
    processes return at once.

    Args:
      folder: folder of the stage's checkpoints; it need not exist. Only complete ones are removed: `STEP.damaged` and
        `STEP.unfinished` stay.
    """
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
    # Compression makes weights 8 % smaller, but takes four times as long as writing them uncompressed.
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
    """Writes a tree of arrays to a folder of its own; it returns once all is on disk.

    Args:
      folder: the tree's folder; its parents are created. An earlier folder of this name is removed first.
      tree: dictionaries and lists of arrays, on devices or on the host. For `load_tree` every leaf has to lie in a
        dictionary.

    Raises:
      ValueError: if the tree has no leaf, or is a single array.
    """
    if distributed.is_first():
        for left in folder.parent.glob(f"{folder.name}.orbax-checkpoint-tmp*"):  # left by a run that was killed
            shutil.rmtree(left)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(folder.absolute(), tree, force=True)


def load_tree(folder: Path, shardings: Mapping[str, Any]) -> Any:
    """Reads a tree that `save_tree` wrote.

    Args:
      folder: the tree's folder.
      shardings: name of a leaf, i.e. the last dictionary key on its path -> its sharding; leaves in one list share it.

    Returns:
      The tree, with the dtypes that were written; leaves named in `shardings` lie on devices, all others are NumPy
      arrays on the host.

    Raises:
      UserError: if the folder does not exist.
      IndexError: if a leaf does not lie in a dictionary.
    """

    def like(path: Any, leaf: Any) -> Any:
        names = [key.key for key in path if isinstance(key, jax.tree_util.DictKey)]
        if names[-1] in shardings:
            return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=shardings[names[-1]])
        return np.empty(leaf.shape, leaf.dtype)

    if not folder.is_dir():
        raise UserError(f"{folder} does not exist; remove the records of the analysis that made it and run it again")
    with ocp.StandardCheckpointer() as checkpointer:
        known: Any = checkpointer.metadata(folder.absolute()).item_metadata
        return checkpointer.restore(folder.absolute(), jax.tree_util.tree_map_with_path(like, known.tree))


def abstract(shapes: Any, shardings: Any) -> Any:
    """A tree of shapes with their shardings, which tells `restore` and `load_params` what to make.

    Args:
      shapes: a tree of arrays, or of `jax.ShapeDtypeStruct`s; shapes and dtypes are read.
      shardings: a tree of the same structure with a sharding for every leaf.

    Returns:
      A tree of `jax.ShapeDtypeStruct`s with shape, dtype and sharding.

    Raises:
      ValueError: if the two trees differ in structure.
    """
    return jax.tree.map(
        lambda s, sharding: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=sharding), shapes, shardings
    )
