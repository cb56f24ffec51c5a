"""The manifest of a folder: name, size and SHA-256 of every file in it, to find damage before the files are read.

Most processors have instructions for SHA-256, so hashing takes about one second per GB and core; several files are
hashed in parallel.
"""

import functools
import hashlib
import json
import os
from concurrent import futures
from pathlib import Path
from typing import Any

NAME = "manifest.json"


class Damaged(Exception):
    """A folder differs from its manifest, or has no intact one; the message says how."""


def write(folder: Path) -> None:
    """Writes `manifest.json` for the files in a folder and its subfolders; they must not change afterwards.

    `manifest.json` is written directly, so an interrupted call may leave a damaged one, which `check` finds.

    Args:
      folder: an existing folder that has no `manifest.json` yet. An old one would be listed among the files and then
        replaced, so that `check` would refuse the folder.

    Raises:
      OSError: if a file cannot be read, or `manifest.json` cannot be written.
    """
    names = sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())
    files = {name: [(folder / name).stat().st_size, found] for name, found in _hashes(folder, names).items()}
    with open(folder / NAME, "w") as f:
        json.dump({"files": files, "sha256": _of(files)}, f, indent=1)
        f.flush()
        os.fsync(f.fileno())


@functools.cache  # only undamaged folders are remembered, because an exception is not cached
def check(folder: Path, without: str = "") -> None:
    """Compares a folder with its manifest; in each process, an undamaged folder is checked only once.

    Later calls with the same arguments return at once, so they do not find damage that came after the first one.

    Args:
      folder: the folder. Files in it that the manifest does not name are ignored.
      without: path, relative to `folder`, of a folder inside it whose files are not checked; "" checks all files.

    Raises:
      Damaged: if a file, or `manifest.json` itself, is missing, cannot be read, has another size or was changed; the
        message names the file.
    """
    files = _read(folder)
    wanted = {name: known for name, known in files.items() if not without or not name.startswith(f"{without}/")}
    for name, (size, _) in wanted.items():
        if not (folder / name).is_file():
            raise Damaged(f"{name} is missing")
        found = (folder / name).stat().st_size
        if found != size:
            raise Damaged(f"{name} has {found} bytes instead of {size}")
    try:
        hashes = _hashes(folder, list(wanted))
    except OSError as e:
        raise Damaged(f"{e.filename or folder} cannot be read: {e.strerror}") from e
    for name, (_, known) in wanted.items():
        if hashes[name] != known:
            raise Damaged(f"{name} was changed")


def _read(folder: Path) -> dict[str, Any]:
    try:
        manifest = json.loads((folder / NAME).read_bytes())
        if manifest["sha256"] == _of(manifest["files"]):
            return manifest["files"]
    except FileNotFoundError:
        raise Damaged(f"{NAME} is missing") from None
    except OSError as e:
        raise Damaged(f"{NAME} cannot be read: {e.strerror}") from e
    except (ValueError, KeyError, TypeError):
        pass  # a damaged manifest may hold anything
    raise Damaged(f"{NAME} was changed")


def _hashes(folder: Path, names: list[str]) -> dict[str, str]:
    def one(name: str) -> str:
        with open(folder / name, "rb") as f:
            return hashlib.file_digest(f, "sha256").hexdigest()

    with futures.ThreadPoolExecutor() as pool:
        return dict(zip(names, pool.map(one, names), strict=True))


def _of(files: Any) -> str:
    return hashlib.sha256(json.dumps(files, sort_keys=True).encode()).hexdigest()
