"""Reads and writes the files of the work folder; each is written completely or not at all.

A file is written under a temporary name, synchronised to disk (fsync) and then renamed.

If a run has several processes, all of them must call the writing functions. They wait for each other, process 0 writes,
and they wait again. So no process reads the old file after another has gone on with the new one. If a process does not
come within the time-out, they raise `distributed.HostLost`. All functions raise OSError if the system refuses to read
or write a file.
"""

import gzip
import json
import math
import os
import stat
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from mdrl_jax.errors import UserError
from mdrl_jax.parallel import distributed

_KINDS = {
    stat.S_IFIFO: "a named pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFDIR: "a folder",
}


def regular(path: str | Path) -> Path:
    """Returns `path` as a `Path` if it is a regular file or a link to one, does not exist, or cannot be reached.

    Call it before a file of others is opened: opening a pipe waits for a writer, perhaps forever, and a device may have
    no end.

    Raises:
      UserError: if it is anything else, such as a folder, a pipe or a device; the message says what.
    """
    path = Path(path)
    try:
        mode = path.stat().st_mode
    except OSError:  # absent, or not to be reached: whoever opens the file says so
        return path
    if not stat.S_ISREG(mode):
        raise UserError(f"{path} is {_KINDS.get(stat.S_IFMT(mode), 'of an unknown kind')}; it must be a regular file")
    return path


def write_bytes(path: str | Path, data: bytes) -> None:
    """Writes `data` to the file `path` atomically, in place of an earlier one; creates its folders if needed."""
    path = Path(path)
    distributed.barrier(f"before {path.name}")
    if distributed.is_first():
        _write(path, data)
    distributed.barrier(f"after {path.name}")


def _write(path: Path, data: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as f:
            f.write(data)
            f.flush()
            os.fsync(f.fileno())
        os.replace(temporary, path)
    except OSError as e:
        e.filename = e.filename or str(path)  # the error of a full disk names no file
        temporary.unlink(missing_ok=True)
        raise


def write_text(path: str | Path, text: str) -> None:
    """Writes `text` in UTF-8 to the file `path`, as `write_bytes` does.

    Raises:
      UnicodeEncodeError: if the text has a lone surrogate; no file is touched.
    """
    write_bytes(path, text.encode())


def write_json(path: str | Path, value: Any) -> None:
    """Writes `value` as one indented JSON document, as `write_bytes` does.

    JSON has no NaN and no infinities. Such numbers become null. If there are any and the document is an object, it also
    gets a field "not_finite" that lists their places, e.g. ["scores[2]"]; a field of this name is replaced. `value`
    itself does not change.

    Raises:
      TypeError: if the value, e.g. a NumPy array, is not JSON-able; no file is touched.
    """
    places: list[str] = []
    document = _finite(value, "", places)
    if places and isinstance(document, dict):
        document["not_finite"] = places
    write_text(path, json.dumps(document, indent=1, allow_nan=False) + "\n")


def _finite(value: Any, at: str, places: list[str]) -> Any:
    """The value with None for every number that is not finite; adds the places of these numbers to `places`."""
    if isinstance(value, float) and not math.isfinite(value):
        places.append(at)
        return None
    if isinstance(value, dict):
        return {k: _finite(v, f"{at}.{k}" if at else str(k), places) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(v, f"{at}[{i}]", places) for i, v in enumerate(value)]
    return value


def write_alone(path: str | Path, value: Any) -> None:
    """Writes `value` as one indented JSON document, by this process alone, without waiting for others.

    Unlike `write_json`, it writes numbers that are not finite as `NaN` and `Infinity`.

    Raises:
      TypeError: if the value is not JSON-able; no file is touched.
    """
    _write(Path(path), (json.dumps(value, indent=1) + "\n").encode())


def as_read(value: Any) -> Any:
    """A JSON-able value as it is after writing and reading it, so that both can be compared.

    Tuples become lists, and the keys of dictionaries become texts. NaN and infinities stay, although `write_json`
    writes null for them.

    Raises:
      TypeError: if the value is not JSON-able.
    """
    return json.loads(json.dumps(value))


def write_jsonl(path: str | Path, rows: Iterable[dict[str, Any]]) -> None:
    """Writes one JSON object per line, the whole file at once as `write_bytes` does; earlier rows are not kept.

    Without rows the file is empty. Numbers that are not finite become null; no field lists their places.

    Raises:
      TypeError: if a row is not JSON-able; no file is touched.
    """
    write_text(path, "".join(json.dumps(_finite(row, "", []), allow_nan=False) + "\n" for row in rows))


def write_zipped(path: str | Path, rows: Iterable[dict[str, Any]]) -> None:
    """Writes one JSON object per line, gzipped; equal rows give equal bytes. Otherwise as `write_jsonl`."""
    text = "".join(json.dumps(_finite(row, "", []), allow_nan=False) + "\n" for row in rows)
    write_bytes(path, gzip.compress(text.encode(), mtime=0))


def read_zipped(path: str | Path) -> list[dict[str, Any]]:
    """The rows that `write_zipped` wrote.

    Raises:
      UserError: if the file does not exist, is no regular file, or is damaged.
    """
    try:
        text = gzip.decompress(regular(path).read_bytes()).decode()
        return [json.loads(line) for line in text.split("\n") if line]
    except FileNotFoundError:
        raise UserError(f"{path} does not exist") from None
    except (OSError, EOFError, zlib.error, ValueError) as e:
        raise UserError(f"{path} is damaged ({e}); remove it") from e


def read_json(path: str | Path) -> Any:
    """The JSON document at `path`; `NaN` and `Infinity` are read as the floats.

    Raises:
      UserError: if the file does not exist, is no regular file, or is not valid JSON.
    """
    try:
        return json.loads(regular(path).read_text())
    except FileNotFoundError:
        raise UserError(f"{path} does not exist") from None
    except ValueError as e:
        raise UserError(f"{path} is not valid JSON ({e}); remove it and run the command again to rewrite it") from e


def read_jsonl(path: str | Path) -> list[dict[str, Any]]:
    """The rows of a JSON-lines file; an empty list if the file does not exist.

    A row may be any JSON value; that it is an object is not checked. `NaN` and `Infinity` are read as the floats. Lines
    end where `str.splitlines` ends them, so a text in a row must have characters such as U+2028 as escapes.

    Raises:
      UserError: if the file is no regular file or not text, or a line is not valid JSON, e.g. an empty one; the message
        then has the number of the line.
    """
    path = regular(path)
    if not path.exists():
        return []
    rows = []
    try:
        lines = path.read_text().splitlines()
    except UnicodeDecodeError as e:
        raise UserError(f"{path} is not text ({e})") from e
    for number, line in enumerate(lines, 1):
        try:
            rows.append(json.loads(line))
        except ValueError as e:
            raise UserError(f"{path} line {number} is not valid JSON ({e})") from e
    return rows


def json_object(file: Path) -> dict[str, Any]:
    """The JSON object in a file of the user's, such as one of a model folder.

    Raises:
      UserError: if the file is no regular file or holds no JSON object.
      OSError: if the file cannot be read.
    """
    try:
        fields = json.loads(regular(file).read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as e:
        raise UserError(f"{file} is not valid JSON ({e})") from e
    if not isinstance(fields, dict):
        raise UserError(f"{file} is not a JSON object")
    return fields
