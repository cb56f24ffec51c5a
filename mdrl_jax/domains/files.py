"""Reads rows of data files, and reads a single row again from its position.

Every kind of file is a table with two methods. `scan()` passes over the file once and yields (position, where, row).
The row is a `BadRow` if it cannot be read. `read(position)` returns one row again without reading the rows before it. A
data set that is larger than memory therefore needs memory only for the positions of its rows.
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
from mdrl_jax.model import hub
from mdrl_jax.records import regular

KINDS = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet", ".arrow")


class BadRow(Exception):
    """A row cannot be used; the message says why in a few words."""


Found = tuple[int, str, Any]


class Table(Protocol):
    """Rows in a fixed order. A row is usually a dict of fields, but may be any JSON value."""

    def scan(self) -> Iterator[Found]:
        """Yields (position, place, row) for every row, in order. The row is a `BadRow` if it cannot be read.

        The place is a text for messages, "file:line" or "file: row N" with N from 1.

        Raises:
          UserError: if the file cannot be opened.
          OSError: if the file cannot be read to its end.
        """
        ...

    def read(self, position: int) -> Any:
        """Returns the row at a position that `scan` gave.

        Raises:
          BadRow: if the row cannot be read. If the file was changed after the scan, the row may also be another one, or
            the error another exception of the library that reads parquet and arrow files.
          OSError: if the file cannot be opened or read.
        """
        ...


class JsonLines:
    """A file with one JSON value on each line. Positions are byte offsets. Empty lines are skipped."""

    def __init__(self, path: Path):
        self.path = path

    def scan(self) -> Iterator[Found]:
        """See `Table`."""
        position = 0
        with _opened(self.path) as file:
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
        except RecursionError as e:
            raise BadRow("JSON that is nested too deeply") from e


class Document:
    """A .json file: a list of rows, or an object with exactly one list in it. The whole file is held in memory.

    Positions are indices of the list.

    Args:
      path: the file, for error messages.
      value: the parsed content of the file.

    Raises:
      UserError: if `value` has another form.
    """

    def __init__(self, path: Path, value: Any):
        lists = [v for v in value.values() if isinstance(v, list)] if isinstance(value, dict) else [value]
        if len(lists) != 1 or not isinstance(lists[0], list):
            raise UserError(f"{path} holds no list of rows; it must be a list, or an object with one list in it")
        self.path, self.rows = path, lists[0]

    def scan(self) -> Iterator[Found]:
        """See `Table`."""
        for i, row in enumerate(self.rows):
            yield i, f"{self.path}: row {i + 1}", row

    def read(self, position: int) -> Any:
        """See `Table`."""
        return self.rows[position]


csv.field_size_limit(2**31 - 1)  # of the process; its default of 131,072 characters refuses long texts


class Csv:
    """Comma- or tab-separated rows. Positions are byte offsets. A row is a dict of texts by column.

    A quote that is never closed would make one field of all lines up to the next quote. So if a row of several lines
    cannot be read, only its first line counts as bad, and the scan goes on with the second.

    Args:
      path: the file. Tabs separate the values if its suffix is .tsv, otherwise commas.
      columns: the names of the columns; (): the first row of the file names them.

    Raises:
      OSError, UnicodeDecodeError, csv.Error: if `columns` is () and the first row cannot be read.
      ValueError: if two columns have one name.
    """

    def __init__(self, path: Path, columns: tuple[str, ...]):
        self.path, self.delimiter = path, "\t" if path.suffix.lower() == ".tsv" else ","
        self.columns, self.start = columns, 0
        if not columns:
            with path.open("rb") as file:
                lines = _CountedLines(file)
                self.columns, self.start = tuple(next(self._reader(lines), ())), lines.position
        if twice := [name for i, name in enumerate(self.columns) if name and name in self.columns[:i]]:
            raise ValueError(f"two columns are named {twice[0]!r}")

    def scan(self) -> Iterator[Found]:
        """See `Table`."""
        with _opened(self.path) as file:
            lines = _CountedLines(file)
            reader = self._reader(lines)
            if self.start:
                next(reader)
            number = lines.count
            while True:
                position, before = lines.position, lines.count
                row: Any = None
                try:
                    values = next(reader)
                    row = _or_bad(self._row, values) if values else None
                except StopIteration:
                    return
                except (csv.Error, UnicodeDecodeError) as e:
                    row = BadRow(str(e))
                if row is not None:
                    yield position, f"{self.path}:{number + 1}", row
                spans = lines.count - before
                if isinstance(row, BadRow) and spans > 1:
                    file.seek(position)
                    next(_CountedLines(file))
                    lines, spans = _CountedLines(file), 1  # `lines.count` starts anew
                    reader = self._reader(lines)
                number += spans

    def read(self, position: int) -> Any:
        """See `Table`."""
        with self.path.open("rb") as file:
            file.seek(position)
            try:
                return self._row(next(self._reader(_CountedLines(file)), []))
            except (csv.Error, UnicodeDecodeError) as e:
                raise BadRow(str(e)) from e

    def _reader(self, lines: Iterator[str]) -> Any:
        return csv.reader(lines, delimiter=self.delimiter, strict=True)

    def _row(self, values: list[str]) -> dict[str, str]:
        if len(values) != len(self.columns):
            raise BadRow(f"{len(values)} values for the {len(self.columns)} columns {', '.join(self.columns)}")
        return dict(zip(self.columns, values, strict=True))


class _CountedLines:
    """Yields the lines of a file as text; `position` counts the bytes up to here, `count` the lines read so far."""

    def __init__(self, file: io.BufferedReader):
        self.file, self.position, self.count = file, file.tell(), 0

    def __iter__(self) -> "_CountedLines":
        return self

    def __next__(self) -> str:
        line = self.file.readline()
        if not line:
            raise StopIteration
        bom = 3 if self.position == 0 and line.startswith(b"\xef\xbb\xbf") else 0
        self.position += len(line)
        self.count += 1
        return line[bom:].decode("utf-8")


class Arrow:
    """A memory-mapped data set of the library `datasets`. Positions are row numbers from 0.

    Args:
      name: the name of the data set, for the places of rows.
      rows: a `datasets.Dataset`.
    """

    def __init__(self, name: str, rows: Any):
        self.name, self.rows = name, rows

    def scan(self) -> Iterator[Found]:
        """See `Table`."""
        for i, row in enumerate(self.rows):
            yield i, f"{self.name}: row {i + 1}", row

    def read(self, position: int) -> Any:
        """See `Table`."""
        return self.rows[position]


def _opened(path: Path) -> io.BufferedReader:
    try:
        return path.open("rb")
    except OSError as e:
        raise UserError(f"{path} cannot be read: {e.strerror}") from e


def _or_bad(parse: Any, raw: Any) -> Any:
    try:
        return parse(raw)
    except BadRow as e:
        return e


def tables(entries: tuple[str, ...], columns: tuple[str, ...], where: str) -> list[Table]:
    """Opens the tables of paths, globs and hub names.

    Args:
      entries: paths, globs, or names of hub data sets "hub:NAME:SPLIT" or "hub:NAME:SUBSET:SPLIT".
      columns: names of the columns of csv and tsv files without a header; () if they have one.
      where: the section of the config, for error messages.

    Returns:
      The tables, in the order of `entries`; the files of a glob in the order of their paths. [] without entries. A file
      that two entries match has two tables.

    Raises:
      UserError: if an entry matches nothing, is of an unknown kind or no regular file, or cannot be read.
    """
    found: list[Table] = []
    for entry in entries:
        if entry.startswith("hub:"):
            found.append(open_hub(entry, where))
        else:
            found += [open_table(path, columns) for path in matching(entry, where)]
    return found


def matching(pattern: str, where: str) -> list[Path]:
    """Returns the files that a path or glob matches, at least one, sorted by path.

    Args:
      pattern: a path or glob of Python's `glob`; `~` is expanded, and `**` matches folders at any depth.
      where: the section of the config, for error messages.

    Raises:
      UserError: if it matches nothing, or if a match is no regular file (such as a folder) or has a suffix that is not
        in `KINDS`.
    """
    whole = Path(os.path.expanduser(pattern))
    there = next((part for part in (whole, *whole.parents) if part.exists()), Path())  # its names may have brackets
    found = (
        [there]
        if there == whole
        else [there / file for file in sorted(glob.glob(str(whole.relative_to(there)), root_dir=there, recursive=True))]
    )
    if not found:
        raise UserError(f"{where}: no file {pattern!r}; give an existing path, a matching glob, or hub:NAME:SPLIT")
    for path in found:
        regular(path)
        if path.suffix.lower() not in KINDS:
            raise UserError(f"{where}: {path} is of no known kind; known: {', '.join(KINDS)}")
    return found


def open_table(path: Path, columns: tuple[str, ...]) -> Table:
    """Opens a file as the kind of table that its suffix names.

    Args:
      path: the file. One with the suffix .json may also hold JSON lines, at least two. A suffix that is not in `KINDS`
        counts as JSON lines.
      columns: names of the columns of a csv or tsv file; () if its first row names them. Other kinds ignore it.

    Raises:
      UserError: if the file as a whole cannot be read. Single rows that cannot be read are found by `scan`. JSON lines,
        and csv and tsv files with given `columns`, are opened at the scan only.
    """
    kind = path.suffix.lower()
    try:
        if kind in (".csv", ".tsv"):
            return Csv(path, columns)
        if kind == ".json":
            return _json(path)
        if kind in (".parquet", ".arrow"):
            import datasets
            from datasets.utils import logging

            said = logging.get_verbosity()
            logging.set_verbosity(logging.CRITICAL)  # the error below says the same in one line
            try:
                rows = datasets.load_dataset(kind[1:], data_files=glob.escape(str(path)), split="train")
            finally:
                logging.set_verbosity(said)
            return Arrow(str(path), rows)
        return JsonLines(path)
    except (OSError, ValueError, csv.Error, RecursionError) as e:
        raise UserError(f"{path} cannot be read: {_reason(e)}") from e
    except Exception as e:
        if type(e).__module__.split(".")[0] not in ("datasets", "pyarrow"):
            raise
        raise UserError(f"{path} cannot be read: {_reason(e)}") from e


def _reason(error: Exception) -> str:
    """The first line of an error's message, or the kind of the error if it has no message."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _json(path: Path) -> Table:
    try:
        return Document(path, json.loads(path.read_bytes()))
    except json.JSONDecodeError as e:
        if e.msg == "Extra data":  # the file holds JSON lines although its suffix is .json
            return JsonLines(path)
        raise


def open_hub(entry: str, where: str) -> Table:
    """Opens a split of a data set of the Hugging Face hub; it is downloaded unless the cache of `datasets` has it.

    Args:
      entry: "hub:NAME:SPLIT" or "hub:NAME:SUBSET:SPLIT".
      where: the section of the config, for error messages.

    Raises:
      UserError: if the entry has another form, or if the split cannot be downloaded or read.
    """
    import datasets
    from datasets import config

    parts = entry.split(":")[1:]
    if len(parts) not in (2, 3) or not all(parts):
        raise UserError(f"{where}: {entry!r} names no hub data set; write hub:NAME:SPLIT or hub:NAME:SUBSET:SPLIT")
    if away := hub.away():
        config.HF_HUB_OFFLINE = True  # the cache is read, and nothing is tried six times
    try:
        rows = datasets.load_dataset(parts[0], parts[1] if len(parts) == 3 else None, split=parts[-1])
    except Exception as e:  # the hub, the network and the data files can fail in any way
        reason = hub.said(e)
        if away and isinstance(e, ConnectionError):
            reason = f"{away}; the cache of data sets has no copy"
        raise UserError(f"{where}: {entry} cannot be read: {reason}") from e
    return Arrow(entry, rows)
