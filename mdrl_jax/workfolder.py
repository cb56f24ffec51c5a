"""The work folder of a run: the paths of its records, and the check that a folder belongs to the same experiment."""

import contextlib
import dataclasses
import datetime
import errno
import fcntl
import json
import os
import platform
import re
import subprocess
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import jax

from mdrl_jax import records
from mdrl_jax.config import CHOOSE, Config, is_supervised, parse
from mdrl_jax.errors import UserError
from mdrl_jax.parallel import distributed
from mdrl_jax.parallel.sharding import MeshConfig
from mdrl_jax.stage import Stage, unlabelled

LOCK = ".lock"  # held by the process that writes into the folder; its content names that process
LEFT = re.compile(r"\..*\.tmp")  # a half-written record of a run that was killed
# Errors of file systems without locks; a run there is not protected from a second one.
_NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS)
_held: dict[Path, int] = {}  # lock files of this process, open as long as it lives
PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "transformers", "numpy", "mdrl-jax")
# Fields that may change when a run is continued, because they change no result; another mesh changes only the rounding
# of sums over devices. Fields of `analyze` may change too, as `analysis/interference.py` checks them itself.
FREE = (
    *(f"mesh.{field.name}" for field in dataclasses.fields(MeshConfig)),
    "checkpoints.keep",
    "evaluate.keep_texts",
    "evaluate.shown",
    "rewards.workers",
    "sft.checkpoint_every",
    "track",
    "train.checkpoint_every",
)
# Names, up to their first "-", of the stages that may read section `recover`.
RECOVERS = (*CHOOSE, "average", "orders", "circuits")


def resolved(config: Config) -> dict[str, Any]:
    """The whole parsed configuration as nested dictionaries and lists that JSON can hold; tuples become lists."""
    return _plain(dataclasses.asdict(config))


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    return [_plain(v) for v in value] if isinstance(value, list | tuple) else value


def flat(value: Any, name: str = "") -> dict[str, Any]:
    """The fields of nested dictionaries by their dotted paths, e.g. {"train": {"steps": 4}} -> {"train.steps": 4}.

    Args:
      value: nested dictionaries with text keys. Lists and tuples in them are fields as a whole; empty dictionaries have
        no fields. A value that is no dictionary is one field with the path `name`.
      name: path of `value` itself, which the paths begin with; "" for none.
    """
    if not isinstance(value, dict):
        return {name: value}
    fields: dict[str, Any] = {}
    for key, inner in value.items():
        fields |= flat(inner, f"{name}.{key}" if name else key)
    return fields


@dataclasses.dataclass(frozen=True)
class WorkFolder:
    """The paths of one run's records, below the folder `root`, which need not exist until `open` is called."""

    root: Path

    def checkpoints(self, stage: Stage) -> Path:
        """Folder of a stage's checkpoints."""
        return self.root / "checkpoints" / stage.folder

    def evaluation(self, folder: str) -> Path:
        """File with the rewards of every prompt after a stage; a scored stage is finished once this file exists.

        Args:
          folder: `Stage.folder` of the stage, e.g. "02-math"; "00-base" for the base model.
        """
        return self.root / "evaluations" / f"{folder}.json"

    def costs(self, stage: Stage) -> Path:
        """File with the steps, tokens, FLOPs and seconds of a stage."""
        return self.root / "costs" / f"{stage.folder}.json"

    def target(self, stage: Stage) -> Path:
        """File with the looks at a stage that has a target, and whether it reached the target's score."""
        return self.root / "targets" / f"{stage.folder}.json"

    def success_rates(self, stage: Stage) -> Path:
        """File with the success rates by which a stage chose its training prompts (`train.filter`)."""
        return self.root / "filters" / f"{stage.folder}.json"

    def random_signs(self, stage: Stage) -> Path:
        """File with the figures of a stage's edit as if its updates had random signs (`train.random_signs`)."""
        return self.root / "random_signs" / f"{stage.folder}.json"

    def samples(self, folder: str) -> Path:
        """File with a few completions after a stage, one JSON object a line, for people to read.

        Args:
          folder: as for `evaluation`.
        """
        return self.root / "samples" / f"{folder}.jsonl"

    def completions(self, folder: str) -> Path:
        """File with all completions after a stage, gzipped JSON lines, one for each prompt (`evaluate.keep_texts`).

        Args:
          folder: as for `evaluation`.
        """
        return self.root / "completions" / f"{folder}.jsonl.gz"

    def recorded(self) -> dict[str, Any]:
        """The configuration that `config.json` of this folder holds, as nested dictionaries; fields are not checked.

        Raises:
          UserError: if the file is missing, is not valid JSON or is not the config.json of a run.
        """
        record = records.read_json(self.root / "config.json")
        if not isinstance(record, dict) or not isinstance(record.get("config"), dict):
            raise UserError(f"{self.root / 'config.json'} is not the config.json of a run; name another work folder")
        return record["config"]

    def open(self, config: Config) -> None:
        """Writes `config.json`; if there is one, checks first that it belongs to the same experiment.

        The stages that have begun, and every setting that they used, must be the same, so one folder never mixes two
        experiments. Stages that have not begun may change, and so may their overrides and the sections that only they
        use: `sft`, `train`, `recover` or `circuits`. The fields in `FREE` and those of section `analyze` may always
        change. An earlier `config.json` is replaced by one with the present configuration, package versions and
        devices. The root is created if needed, and half-written records of a killed run are removed. All processes must
        call it.

        Args:
          config: the whole configuration, parsed.

        Raises:
          UserError: if a field differs (the message names the first one), another process writes into the folder (it
            names that process), the root is a file, the folder has files other than `log.txt` but no `config.json`, its
            `config.json` is damaged, or it comes from a version of the package whose fields are no longer valid.
          OSError: if the disk does not take the lock or the file.
        """
        file = self.root / "config.json"
        now = resolved(config)
        if self.root.exists() and not self.root.is_dir():
            raise UserError(f"{self.root} is a file, not a folder; name a new work folder")
        if file.exists():
            self._compare(self.recorded(), now)
        elif self.root.exists() and not all(
            p.name in ("log.txt", LOCK) or LEFT.fullmatch(p.name) for p in self.root.iterdir()
        ):
            raise UserError(f"{self.root} is not empty and has no config.json; name a new work folder")
        if other := distributed.agree(self._locked_by() if distributed.is_first() else ""):
            raise UserError(f"{self.root} is in use by {other}; wait until it ends, or name another work folder")
        if distributed.is_first():
            for left in self.root.rglob(".*.tmp"):  # half-written records of a run that was killed
                left.unlink(missing_ok=True)
        records.write_json(
            file,
            {
                "config": now,
                "versions": {p: _version(p) for p in PACKAGES} | {"python": platform.python_version()},
                "devices": [str(d) for d in jax.devices()],
                "git": _revision(),
            },
        )

    def _locked_by(self) -> str:
        """Takes the folder's lock until this process ends; "" if it has it, otherwise a few words about who has it.

        The lock is a POSIX record lock: the system frees it when the process ends, however it ends, and processes that
        it started do not hold it.
        """
        path = self.root.resolve() / LOCK
        if path in _held:
            return ""
        path.parent.mkdir(parents=True, exist_ok=True)
        file = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)  # it stays open, because closing it would free the lock
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as e:
            if e.errno not in _NO_LOCKS:
                holder: dict[str, Any] = {}
                with contextlib.suppress(ValueError):
                    holder = json.loads(os.read(file, 4096))
                os.close(file)
                return "process {pid} on {host}, since {since}".format(
                    **{"pid": "unknown", "host": "an unknown host", "since": "an unknown time"} | holder
                )
        _held[path] = file
        since = datetime.datetime.now().astimezone().isoformat(timespec="seconds")
        try:
            os.ftruncate(file, 0)
            os.write(file, json.dumps({"pid": os.getpid(), "host": platform.node(), "since": since}).encode())
        except OSError as e:  # of a full disk; it does not name the file
            raise OSError(e.errno, e.strerror, str(path)) from e
        return ""

    def date(self) -> str:
        """The day, YYYY-MM-DD, that the run's chat template gets as the present one; "" if no record says.

        Only runs on data sets whose chat template writes the date have it: their prompts are those of the first day.

        Raises:
          UserError: if `data.json` is not valid JSON.
        """
        file = self.root / "data.json"
        found = records.read_json(file) if file.exists() else {}
        return next((domain["date"] for domain in found.values() if "date" in domain), "")

    def open_data(self, data: Mapping[str, Any]) -> None:
        """Writes `data.json`; if there is one, checks first that the prompts are those that the run started with.

        A domain, or a supervised stage, that the file does not have yet is accepted. Nothing is written if `data` is
        empty, as in a run without data sets. All processes must call it.

        Args:
          data: name of a domain -> its record, with the fingerprint of each split (`Runtime.data`) and of the
            "demonstrations" of each supervised stage, if there are any.

        Raises:
          UserError: if prompts or demonstrations differ, because a data file or the tokenizer was changed; or if
            `data.json` is not valid JSON.
          KeyError: if a record, in the file or in `data`, lacks a split or its fingerprint.
        """
        file = self.root / "data.json"
        before = records.read_json(file) if file.exists() else {}
        for domain, found in data.items():
            known = before.get(domain, found)
            shown = known.get("demonstrations", {})
            pairs = [(f"{s} prompts", known["splits"][s], record) for s, record in found["splits"].items()]
            pairs += [
                (f"demonstrations ({stage})", shown.get(stage, record), record)
                for stage, record in found.get("demonstrations", {}).items()
            ]
            for what, old, new in pairs:
                if old["fingerprint"] != new["fingerprint"]:
                    raise UserError(
                        f"{self.root} holds a run with different {what} of {domain}: a data file was changed, or the "
                        "tokenizer; name a new work folder or undo the change"
                    )
        if data:
            records.write_json(file, dict(data))

    def _compare(self, before: dict[str, Any], now: dict[str, Any]) -> None:
        # Parsing gives fields that the folder's version did not have their defaults.
        try:
            old, new = (flat(resolved(parse(config))) for config in (before, now))
        except UserError as e:
            raise UserError(
                f"{self.root / 'config.json'} comes from another version of the package ({e}); name a new work folder"
            ) from e
        begun, stages_now = self._begun(old.pop("stages")), new.pop("stages")
        if stages_now[: len(begun)] != begun:
            raise UserError(
                f"{self.root} holds a run that has begun the stages {begun}, now {stages_now}: a run may only be "
                "continued with other stages after these; name a new work folder or undo the change"
            )
        compared = any(self.root.glob("analysis/circuits-*.json"))
        unused = _unused(begun, any(_target(name, old) for name in begun), compared)
        for name in sorted(old.keys() | new.keys()):
            of_new_stage = name.startswith("stage_overrides.") and name.split(".")[1] not in begun
            if name in FREE or name.partition(".")[0] in unused or of_new_stage:
                continue
            if old.get(name) != new.get(name):
                raise UserError(
                    f"{self.root} holds a run with {name}={old.get(name)!r}, now {new.get(name)!r}; "
                    "name a new work folder or undo the change"
                )

    def _begun(self, stages: list[str]) -> list[str]:
        """The stages up to the last one of which the folder holds a file or a folder."""

        def left(index: int, name: str) -> bool:
            folder = f"{index:02d}-{name}"
            patterns = (
                f"*/{folder}",
                f"*/{folder}.*",
                f"*/{name}.*",
                *(("analysis/settings.json",) if name == "analyze" else ()),
            )
            return any(next(self.root.glob(pattern), None) for pattern in patterns)

        return stages[: max((i for i, name in enumerate(stages, 1) if left(i, name)), default=0)]


def _target(stage: str, fields: dict[str, Any]) -> str:
    """The target of a stage, from the fields of a configuration by their dotted paths; "" without one."""
    section = "sft" if is_supervised(stage) else "train"
    return fields.get(f"stage_overrides.{stage}.target", fields.get(f"{section}.target", ""))


def _unused(begun: list[str], targets: bool, compared: bool) -> set[str]:
    """The sections of a configuration that no stage of a run has used yet; `analyze` checks its records itself.

    Args:
      begun: names of the stages that have begun.
      targets: whether any of them has a target, whose looks are scored as section `recover` says.
      compared: whether there is a record of circuits; the parts that are made before it have their own check.
    """
    unused = {"analyze"}
    if not any(map(is_supervised, begun)):
        unused.add("sft")
    if all(map(is_supervised, begun)):
        unused.add("train")
    kinds = {unlabelled(name).partition("-")[0] for name in begun}
    if not targets and not kinds & set(RECOVERS):
        unused.add("recover")
    if not compared:
        unused.add("circuits")
    return unused


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _revision() -> str | None:
    """Git revision of the source, with "+changes" appended if files were edited; None outside a git checkout."""
    folder = Path(__file__).parent
    try:
        command = ["git", "-C", str(folder), "describe", "--always", "--dirty=+changes", "--abbrev=40"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
