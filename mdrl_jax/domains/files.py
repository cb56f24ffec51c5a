"""Rows of data files, each named by where it stands, and read again from there.

Every kind of file is a table with two methods. `scan()` passes over the file once and yields (position, where, row),
where `row` is a `BadRow` if it cannot be read; `read(position)` gives a row again without reading those before it, so
that a set larger than memory needs no more of it than positions.
"""

import csv
import glob
import io
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

from mdrl_jax.errors import UserError

KINDS = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet", ".arrow")


class BadRow(Exception):
    """Why a row cannot be used, in a few words."""


Found = tuple[int, str, Any]


class Table(Protocol):
    """Rows in a fixed order."""

    def scan(self) -> Iterator[Found]:
        """(position, "file:line", row or BadRow) of every row, in order."""
        ...

    def read(self, position: int) -> Any:
        """The row at a position of `scan`."""
        ...


class JsonLines:
    """A JSON value a line; positions are bytes. Empty lines are no rows."""

    def __init__(self, path: Path):
        self.path = path

    def scan(self) -> Iterator[Found]:
        """See `Table`."""
        position = 0
        with self.path.open("rb") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    yield position, f"{self.path}:{number}", _or_bad(self._parse, line)
                position += len(line)

    def read(self, position: int) -> Any:
        """See `Table`."""
        with self.path.open("rb") as file:
            file.seek(position)
            return self._parse(file.readline())

    def _parse(self, line: bytes) -> Any:
        try:
            return json.loads(line)
        except ValueError as e:
            raise BadRow(f"invalid JSON ({e})") from e


class Document:
    """A .json file: a list of rows, or an object with one list in it. It is one value, so it is held in memory."""

    def __init__(self, path: Path, value: Any):
        lists = [v for v in value.values() if isinstance(v, list)] if isinstance(value, dict) else [value]
        if len(lists) != 1 or not isinstance(lists[0], list):
            raise UserError(f"{path} holds no list of rows; a list, or an object with one list in it, is expected")
        self.path, self.rows = path, lists[0]

    def scan(self) -> Iterator[Found]:
        """See `Table`."""
        for i, row in enumerate(self.rows):
            yield i, f"{self.path}: row {i + 1}", row

    def read(self, position: int) -> Any:
        """See `Table`."""
        return self.rows[position]


class Csv:
    """Comma- or tab-separated rows; positions are bytes. The first row names the columns unless names are given."""

    def __init__(self, path: Path, columns: tuple[str, ...]):
        self.path, self.delimiter = path, "\t" if path.suffix == ".tsv" else ","
        self.columns, self.start = columns, 0
        if not columns:
            with path.open("rb") as file:
                lines = _CountedLines(file)
                self.columns, self.start = tuple(next(self._reader(lines), ())), lines.position

    def scan(self) -> Iterator[Found]:
        """See `Table`."""
        with self.path.open("rb") as file:
            lines = _CountedLines(file)
            reader = self._reader(lines)
            if self.start:
                next(reader)
            while True:
                position, number = lines.position, reader.line_num + 1
                try:
                    values = next(reader)
                except StopIteration:
                    return
                except (csv.Error, UnicodeDecodeError) as e:
                    yield position, f"{self.path}:{number}", BadRow(str(e))
                    continue
                if values:
                    yield position, f"{self.path}:{number}", _or_bad(self._row, values)

    def read(self, position: int) -> Any:
        """See `Table`."""
        with self.path.open("rb") as file:
            file.seek(position)
            return self._row(next(self._reader(_CountedLines(file))))

    def _reader(self, lines: Iterator[str]) -> Any:
        return csv.reader(lines, delimiter=self.delimiter, strict=True)

    def _row(self, values: list[str]) -> dict[str, str]:
        if len(values) != len(self.columns):
            raise BadRow(f"{len(values)} values for the {len(self.columns)} columns {', '.join(self.columns)}")
        return dict(zip(self.columns, values, strict=True))


class _CountedLines:
    """Lines as text, and the bytes that they took."""

    def __init__(self, file: io.BufferedReader):
        self.file, self.position = file, file.tell()

    def __iter__(self) -> "_CountedLines":
        return self

    def __next__(self) -> str:
        line = self.file.readline()
        if not line:
            raise StopIteration
        bom = 3 if self.position == 0 and line.startswith(b"\xef\xbb\xbf") else 0
        self.position += len(line)
        return line[bom:].decode("utf-8")


class Arrow:
    """A `datasets` data set, memory-mapped; positions are rows."""

    def __init__(self, name: str, rows: Any):
        self.name, self.rows = name, rows

    def scan(self) -> Iterator[Found]:
        """See `Table`."""
        for i, row in enumerate(self.rows):
            yield i, f"{self.name}: row {i + 1}", row

    def read(self, position: int) -> Any:
        """See `Table`."""
        return self.rows[position]


def _or_bad(parse: Any, raw: Any) -> Any:
    try:
        return parse(raw)
    except BadRow as e:
        return e


def tables(entries: tuple[str, ...], columns: tuple[str, ...], where: str) -> list[Table]:
    """The tables of paths, globs and hub names; errors as in `matching`, `open_table` and `open_hub`."""
    found: list[Table] = []
    for entry in entries:
        if entry.startswith("hub:"):
            found.append(open_hub(entry, where))
        else:
            found += [open_table(path, columns) for path in matching(entry, where)]
    return found


def matching(pattern: str, where: str) -> list[Path]:
    """The files of a path or glob, by name.

    Raises:
      UserError: if it matches nothing, or a file is of no known kind.
    """
    found = [Path(p) for p in sorted(glob.glob(os.path.expanduser(pattern), recursive=True))]
    if not found:
        raise UserError(f"{where}: no file {pattern!r}; give a path, a glob or hub:NAME:SPLIT")
    for path in found:
        if path.suffix not in KINDS:
            raise UserError(f"{where}: {path} is of no known kind; known: {', '.join(KINDS)}")
    return found


def open_table(path: Path, columns: tuple[str, ...]) -> Table:
    """The table of a file, by its suffix.

    Raises:
      UserError: if the file as a whole cannot be read.
    """
    try:
        if path.suffix in (".csv", ".tsv"):
            return Csv(path, columns)
        if path.suffix == ".json":
            return _json(path)
        if path.suffix in (".parquet", ".arrow"):
            import datasets

            rows = datasets.load_dataset(path.suffix[1:], data_files=str(path), split="train")
            return Arrow(str(path), rows)
        return JsonLines(path)
    except (OSError, ValueError, csv.Error) as e:
        raise UserError(f"{path} cannot be read: {str(e).splitlines()[0]}") from e
    except Exception as e:
        if type(e).__module__.split(".")[0] not in ("datasets", "pyarrow"):
            raise
        raise UserError(f"{path} cannot be read: {str(e).splitlines()[0]}") from e


def _json(path: Path) -> Table:
    try:
        return Document(path, json.loads(path.read_bytes()))
    except json.JSONDecodeError as e:
        if e.msg == "Extra data":  # JSON lines by another name
            return JsonLines(path)
        raise


def open_hub(entry: str, where: str) -> Table:
    """The split of a hub data set that "hub:NAME:SPLIT" or "hub:NAME:SUBSET:SPLIT" names.

    Raises:
      UserError: if it cannot be had.
    """
    import datasets

    parts = entry.split(":")[1:]
    if len(parts) not in (2, 3) or not all(parts):
        raise UserError(f'{where}: {entry!r} names no hub data set; "hub:NAME:SPLIT" or "hub:NAME:SUBSET:SPLIT"')
    try:
        rows = datasets.load_dataset(parts[0], parts[1] if len(parts) == 3 else None, split=parts[-1])
    except Exception as e:  # the hub, the network and the set's own files can fail in any way
        reason = (str(e).splitlines() or [""])[0]
        raise UserError(f"{where}: {entry} cannot be read ({type(e).__name__}: {reason})") from e
    return Arrow(entry, rows)
