"""Sends the curves of a run to a tracking service, beside the TensorBoard files; off by default (`config.track`).

The interface is one class with two methods, `scalars` and `close`. A service is an entry of `SERVICES`.
"""

import contextlib
import importlib
import os
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

from mdrl_jax import records
from mdrl_jax.errors import UserError
from mdrl_jax.parallel import distributed

FILE = "track.json"  # of the work folder: the run's id at the service, so that a resumed run continues it


class Track(Protocol):
    """Where points of curves go."""

    def scalars(self, group: str, step: int, values: Mapping[str, float]) -> None:
        """Adds a point to several curves.

        Args:
          group: what the steps count, such as a stage; every group has steps of its own.
          step: the step that the points belong to.
          values: the value of each curve, by its name.
        """
        ...

    def close(self) -> None:
        """Waits until everything is sent."""
        ...


class Nowhere:
    """Drops everything."""

    def scalars(self, group: str, step: int, values: Mapping[str, float]) -> None:
        """See `Track`."""

    def close(self) -> None:
        """See `Track`."""


class WeightsAndBiases:
    """A run of Weights & Biases, in the project "mdrl_jax" unless WANDB_PROJECT names another one.

    Args:
      root: the work folder, whose name is the run's name.
      settings: the configuration of the run, by field.

    Raises:
      UserError: if `wandb` is not installed, or does not start a run.
    """

    def __init__(self, root: Path, settings: Mapping[str, Any]):
        try:
            wandb = importlib.import_module("wandb")
        except ImportError as e:
            raise UserError("track='wandb' needs the package wandb; pip install 'mdrl-jax[wandb]'") from e
        file = root / FILE
        known = records.read_json(file) if file.exists() else {}
        name = known.get("wandb") or uuid.uuid4().hex[:12]
        try:
            self._run = wandb.init(
                project=None if os.environ.get("WANDB_PROJECT") else "mdrl_jax",
                id=name,
                name=root.resolve().name,
                dir=str(root),
                config=dict(settings),
                resume="allow",
            )
        except Exception as e:  # no key, no network: wandb raises errors of several kinds
            raise UserError(f"track='wandb': no run was started ({' '.join(str(e).split())})") from e
        records.write_alone(file, {"wandb": name})
        self._groups: set[str] = set()

    def scalars(self, group: str, step: int, values: Mapping[str, float]) -> None:
        """See `Track`."""
        if group not in self._groups:
            self._run.define_metric(f"{group}/*", step_metric=f"{group}/step")
            self._groups.add(group)
        self._run.log({f"{group}/step": step} | {f"{group}/{name}": float(value) for name, value in values.items()})

    def close(self) -> None:
        """See `Track`."""
        self._run.finish()


SERVICES: dict[str, Callable[[Path, Mapping[str, Any]], Track]] = {"wandb": WeightsAndBiases}


@contextlib.contextmanager
def tracking(service: str, root: Path, settings: Mapping[str, Any]):
    """A `Track` for the duration of a run.

    Args:
      service: "" for none, or a key of `SERVICES`.
      root: the work folder.
      settings: the configuration of the run, by field.

    Yields:
      The track. If several processes run the program, that of all but the first drops everything.

    Raises:
      UserError: if the service is not available.
    """
    track = SERVICES[service](root, settings) if service and distributed.is_first() else Nowhere()
    try:
        yield track
    finally:
        track.close()
