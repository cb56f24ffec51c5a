"""Makes domains from data sets.

One pass over all rows builds an index of the prompts; afterwards a prompt is read again from its place in the file.

A prompt's key is a 64-bit hash of (seed, domain, prompt). The key serves three purposes. Prompts with equal keys are
repeats, of which one is kept. The key decides the split where the source does not. The prompts of a split are sorted by
key. None of this depends on the other rows, so rows that are added later move no row to another split.

With `stratify_by`, the prompts of a split are sorted by their place within their stratum instead: prompt i of the N_s
of a stratum, in the order of keys, has the place (i + ½) / N_s. Any first part of the split is then a stratified
sample.

With `group_by`, a group of prompts, such as all questions about one text, has a key too: the hash of (seed, domain,
group). It decides the split in place of the prompts' own keys.

A prompt or a group that falls into several splits stays in `test` first, then in `validation` (definitions §14).
"""

import hashlib
import importlib
import json
import math
import string
from array import array
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeVar, overload

import numpy as np

from mdrl_jax.domains import files
from mdrl_jax.domains.base import Data, Domain, DomainsConfig, Problem, SourceConfig
from mdrl_jax.domains.files import BadRow, Table
from mdrl_jax.domains.layouts import FIELDS
from mdrl_jax.domains.presets import completed
from mdrl_jax.errors import UserError
from mdrl_jax.rewards import writing
from mdrl_jax.rewards.base import RIGHT_FROM, SHORT_NAMES
from mdrl_jax.rewards.outputs import case_error

T = TypeVar("T")
SPLITS = ("train", "validation", "test")
NAMED_BAD_ROWS = 100  # at most so many bad rows of a source are described in its record
# By key of a check, the types that the rewards accept: VALUES for a single value, LISTS for each item of a list.
VALUES: dict[str, tuple[type, ...]] = {"answer": (str, int, float), "length": (int,), "reference": (str,)}
LISTS: dict[str, tuple[type, ...]] = {
    "answer": (str, int, float),
    "tests": (str,),
    "cases": (dict,),
    "choices": (str,),
    "constraints": (dict,),
}


CONSTRAINED = {f"{writing.__name__}:{name}" for name in ("constraints", "constraints_loose", "all_strict", "all_loose")}
ALTERNATIVES = {"tests", "cases"}  # keys of which one is enough, if a source names several of them


class Lazily(Sequence[T]):
    """A sequence of `length` items. Item i is made by `make(i)` each time it is read, with i from 0 to `length` − 1.

    A slice gives a tuple of items. An index out of range raises IndexError.
    """

    def __init__(self, length: int, make: Callable[[int], T]):
        self.length, self.make = length, make

    def __len__(self) -> int:
        return self.length

    @overload
    def __getitem__(self, at: int) -> T: ...
    @overload
    def __getitem__(self, at: slice) -> tuple[T, ...]: ...
    def __getitem__(self, at: int | slice) -> T | tuple[T, ...]:
        """Returns one item, or a tuple of items for a slice.

        Raises:
          IndexError: if an index is out of range.
        """
        if isinstance(at, slice):
            return tuple(self.make(i) for i in range(*at.indices(self.length)))
        if not -self.length <= at < self.length:
            raise IndexError(at)
        return self.make(int(at) % self.length)


class Index:
    """Where the prompts of one split are. Four columns: key, table, position in the table, number within the row.

    The key is the prompt's 64-bit hash (see the module). Table and number within the row count from 0. Two more columns
    have the keys of the prompts' groups and of their strata, and are empty if they have none.
    """

    def __init__(self) -> None:
        self.columns = array("Q"), array("i"), array("q"), array("i")
        self.groups = array("Q")
        self.strata = array("Q")

    def add(self, *entry: int, group: int | None = None, stratum: int | None = None) -> None:
        """Adds one prompt, given as four integers: one value for each column, in the order of the columns.

        Args:
          entry: the four values.
          group: key of the prompt's group; None if the source has no groups.
          stratum: key of the prompt's stratum; None if the source has no strata.

        Raises:
          ValueError: if there are not four values.
          OverflowError: if a value does not fit its column: 64 bits without a sign, then 32, 64 and 32 bits with one.
        """
        for column, value in zip(self.columns, entry, strict=True):
            column.append(value)
        if group is not None:
            self.groups.append(group)
        if stratum is not None:
            self.strata.append(stratum)

    def distinct(self, taken: np.ndarray, taken_groups: np.ndarray) -> tuple[tuple[np.ndarray, ...], np.ndarray, int]:
        """Sorts the prompts by key and drops repeats, and prompts whose key or group another split has already.

        Args:
          taken: keys of the prompts of other splits [n], uint64.
          taken_groups: keys of the groups of other splits [m], uint64.

        Returns:
          The four columns (keys, tables, positions, numbers within the row), one entry for each prompt that is left, in
          ascending order of keys, or by place within the strata if there are any (see the module). Of repeats the one
          that was added first is left. Then the keys of the groups of the prompts that are left [k], each once; and the
          number of prompts that were dropped for their group alone.
        """
        keys, *rest = (_values(column) for column in self.columns)
        kept, first = np.unique(keys.astype(np.uint64), return_index=True)
        fresh = ~np.isin(kept, taken)
        groups = _values(self.groups).astype(np.uint64)[first] if self.groups else np.zeros(0, np.uint64)
        apart = ~np.isin(groups, taken_groups) if self.groups else np.ones(len(kept), bool)
        left = fresh & apart
        here = np.unique(groups[left]) if self.groups else groups
        order = np.arange(int(left.sum()))
        if self.strata:
            order = _by_place(_values(self.strata).astype(np.uint64)[first][left])
        columns = kept[left], *(column[first[left]] for column in rest)
        return tuple(column[order] for column in columns), here, int((fresh & ~apart).sum())


def _by_place(strata: np.ndarray) -> np.ndarray:
    """The order of prompts by their place (i + ½) / N_s within their stratum; equal places keep their order."""
    _, which, sizes = np.unique(strata, return_inverse=True, return_counts=True)
    by_stratum = np.argsort(which, kind="stable")
    starts = np.cumsum(sizes) - sizes
    rank = np.empty(len(strata), np.int64)
    rank[by_stratum] = np.arange(len(strata)) - starts[which[by_stratum]]
    return np.argsort((rank + 0.5) / sizes[which], kind="stable")


def _values(column: array) -> np.ndarray:
    return np.frombuffer(column, column.typecode) if column else np.zeros(0, int)


class Reader:
    """Turns the rows of a source into problems.

    Args:
      source: the completed section of the config (`presets.completed`).
      where: the section's name for error messages, such as "domains.math".
      separator: the text that ends a model's thinking, put into every check; "" for none.

    Raises:
      UserError: if `prompt` or `reply` is no template of field names, or `group_by` or `stratify_by` neither a template
        nor a field name; or if the function that `fields` names is unknown or cannot be imported.
    """

    def __init__(self, source: SourceConfig, where: str, separator: str):
        self.check, self.separator = dict(source.check), separator
        self.pieces = _pieces(source.prompt, f"{where}.prompt")
        self.reply = _pieces(source.reply, f"{where}.reply")
        self.group, self.stratum = (
            _pieces(by if not by or "{" in by else f"{{{by}}}", f"{where}.{field}")
            for field, by in (("group_by", source.group_by), ("stratify_by", source.stratify_by))
        )
        self.convert = _converter(source.fields, f"{where}.fields")
        reward = SHORT_NAMES.get(source.reward, source.reward)
        self.constrained, self.tested = reward in CONSTRAINED, reward == SHORT_NAMES["code"]
        if (
            self.constrained
            and "constraints" not in self.check
            and not {"instruction_id_list", "kwargs"} <= set(self.check)
        ):
            raise UserError(
                f'{where}.check has neither "constraints" nor "instruction_id_list" and "kwargs", of which reward '
                f"{source.reward!r} needs one"
            )

    def problems(self, row: Any) -> list[tuple[Problem, str]]:
        """Returns (problem, split) for each problem of a row; split is "" if the row's layout names none.

        The list is empty if the function that `fields` names returns an empty list.

        Args:
          row: a mapping of fields, as a table (`files.py`) gives it. A field `split` of the raw row itself does not
            count.

        Raises:
          BadRow: if the row is no mapping, lacks a field, or has a field of the wrong type or value; if its prompt, its
            group or its stratum is empty or has a lone surrogate (half of a UTF-16 pair, which UTF-8 cannot hold); or
            if its check cannot be written as JSON in UTF-8.
          Exception: what the function that `fields` names raises, except KeyError, TypeError, ValueError, IndexError
            and AttributeError, which become a BadRow.
        """
        if not isinstance(row, Mapping):
            raise BadRow(f"{type(row).__name__}, where an object with fields is expected")
        try:
            found = self.convert(row)
        except KeyError as e:
            raise BadRow(f"no field {e.args[0]!r}") from e
        except (TypeError, ValueError, IndexError, AttributeError) as e:
            raise BadRow(f"wrong field: {e}") from e
        rows = found if isinstance(found, list) else [found]
        return [(self._problem(fields), fields.get("split", "") if found is not row else "") for fields in rows]

    def _problem(self, fields: Mapping[str, Any]) -> Problem:
        prompt = _filled(self.pieces, fields, "prompt")
        group = hash64(_filled(self.group, fields, "group")).hex() if self.group else ""
        stratum = hash64(_filled(self.stratum, fields, "stratum")).hex() if self.stratum else ""
        given = {key for key in ALTERNATIVES & self.check.keys() if fields.get(self.check[key]) is not None}
        spared = ALTERNATIVES - given if given else set[str]()
        check = {key: _checked(fields, name, key) for key, name in self.check.items() if key not in spared}
        if self.separator:
            check["separator"] = self.separator
        try:
            json.dumps(check, ensure_ascii=False).encode()
        except TypeError as e:
            raise BadRow(f"wrong type in the check: {e}") from e
        except (UnicodeEncodeError, RecursionError) as e:
            raise BadRow(f"the check is no text that can be written: {' '.join(str(e).split())[:60]}") from e
        if self.constrained:
            _check_constraints(check)
        if self.tested and (wrong := next(filter(None, map(case_error, check.get("cases", ()))), "")):
            raise BadRow(wrong)
        return Problem(prompt, check, group, _reply(self.reply, fields), stratum)


def hash64(text: str) -> bytes:
    """The BLAKE2b hash of a text in UTF-8, 8 bytes. Keys of prompts and names of groups are made of it.

    Raises:
      UnicodeEncodeError: if the text has a lone surrogate.
    """
    return hashlib.blake2b(text.encode(), digest_size=8).digest()


def _filled(pieces: list[tuple[str, str | None]], fields: Mapping[str, Any], what: str) -> str:
    text = "".join(text + (_text(fields, name) if name else "") for text, name in pieces)
    if not text.strip():
        raise BadRow(f"the {what} is empty")
    try:
        text.encode()
    except UnicodeEncodeError as e:
        raise BadRow(f"the {what} has a lone surrogate, which is no text") from e
    return text


def _reply(pieces: list[tuple[str, str | None]], fields: Mapping[str, Any]) -> str:
    """Fills the template of the reply; "" if the row lacks a field of it, so that its prompt can be used all the same.

    A field that holds a list, such as all accepted answers, stands for its first item.
    """
    if not pieces:
        return ""
    firsts = {key: value[0] if isinstance(value, list) and value else value for key, value in fields.items()}
    try:
        return _filled(pieces, firsts, "reply")
    except BadRow:
        return ""


def _pieces(template: str, where: str) -> list[tuple[str, str | None]]:
    try:
        parsed = list(string.Formatter().parse(template))
    except ValueError as e:
        raise UserError(f"{where}={template!r} is no template ({e}); write {{{{ and }}}} for literal braces") from e
    for _, name, form, conversion in parsed:
        if name is not None and (not name.isidentifier() or form or conversion):
            raise UserError(f"{where}: {{{name}}} is no field; write the name of a field, such as {{question}}")
    return [(text, name) for text, name, _, _ in parsed]


def _converter(name: str, where: str) -> Callable[[Any], Any]:
    if not name:
        return lambda row: row
    if name in FIELDS:
        return FIELDS[name]
    module, colon, function = name.partition(":")
    if not colon:
        raise UserError(f"{where}={name!r} is not known; known: {', '.join(FIELDS)}, or module:function")
    try:
        return getattr(importlib.import_module(module), function)
    except Exception as e:
        reason = " ".join(f"{type(e).__name__}: {e}".split())
        raise UserError(f"{where}={name!r} cannot be imported ({reason})") from e


def _text(fields: Mapping[str, Any], name: str) -> str:
    value = fields.get(name)
    if value is None:
        raise BadRow(f"no field {name!r}")
    if not isinstance(value, str | int | float) or isinstance(value, bool):
        raise BadRow(f"field {name!r} is of type {type(value).__name__}, not text")
    if isinstance(value, float) and not math.isfinite(value):  # an empty cell, as pandas writes it
        raise BadRow(f"field {name!r} is no finite number: {value}")
    return str(value)


def _checked(fields: Mapping[str, Any], name: str, key: str) -> Any:
    """Returns a field as the value of the check's `key`; raises BadRow if its type does not fit or it is empty."""
    value = fields.get(name)
    if value is None:
        raise BadRow(f"no field {name!r}")
    lists = isinstance(value, list) and key in LISTS
    wanted = LISTS if lists else VALUES
    if key in LISTS or key in VALUES:
        fits = key in wanted and all(type(one) in wanted[key] for one in (value if lists else [value]))
        if not fits:
            raise BadRow(f"field {name!r} is of the wrong type for {key!r}: {str(value)[:40]!r}")
        if value in ("", []):
            raise BadRow(f"field {name!r} is empty")
        numbers = [one for one in (value if lists else [value]) if isinstance(one, float)]
        if not all(map(math.isfinite, numbers)):
            raise BadRow(f"field {name!r} is no finite number: {str(value)[:40]}")
    return value


def _check_constraints(check: Mapping[str, Any]) -> None:
    """Raises BadRow if the check has no constraints, or one that cannot be judged (`writing.fault`)."""
    try:
        listed = writing.listed(check)
    except (TypeError, ValueError, AttributeError) as e:
        raise BadRow(f"wrong constraints: {e}") from e
    for constraint in listed:
        if fault := writing.fault(constraint):
            raise BadRow(fault)


def make(name: str, source: SourceConfig, config: DomainsConfig) -> Domain:
    """Makes a domain from a data set; all of its rows are read once. A data set of the hub may be downloaded.

    `DOMAINS["law"] = functools.partial(make, "law", SourceConfig(...))` adds a new domain to the registry.

    Args:
      name: the domain's name.
      source: the domain's section of the config; its preset fills what it leaves at the default.
      config: seed, sizes of the splits, and how chats are written and read.

    Returns:
      The domain. Its splits hold each distinct prompt of the usable rows once, in the order of keys. Two kinds of
      prompts are left out: those whose layout names a split that is none of the three, and those whose group is in
      another split (`group_by`). `prompts.tokenize` applies the sizes and the limit on length. A split may be empty,
      which `prompts.tokenize` refuses when the split is used. `demonstrate` is None if the source has no `reply`, and
      `pretraining` is empty. A problem is made from its row each time it is asked for, and the row is read again,
      unless the file is one JSON document. So the files must not change: UserError is raised only if the row at the old
      place can no longer be used, and otherwise another problem is returned.

    Raises:
      UserError: if the source is incomplete or not valid, cannot be read, or has more than `max_bad_rows` bad rows. The
        name of its reward is not looked up here.
      OSError: if a file of JSON lines or csv cannot be read to its end.
      Exception: as in `Reader.problems`.
    """
    where = f"domains.{name}"
    source = completed(source, where)
    reader = Reader(source, where, config.separator)
    given = {"train": source.files, "validation": source.validation_files, "test": source.test_files}
    tables = _opened(given, source.columns, where)
    opened: list[Table] = [table for split in SPLITS for table in tables[split]]
    shares = {"validation": source.validation_share, "test": source.test_share}
    shares = {split: 0.0 if given[split] else share for split, share in shares.items()}
    indexes, record = _scan(reader, tables, shares, f"{config.seed}/{name}/", (where, source.max_bad_rows))
    taken, taken_groups, parted, problems = np.zeros(0, np.uint64), np.zeros(0, np.uint64), 0, {}
    for split in SPLITS[::-1]:
        (keys, *places), groups, dropped = indexes[split].distinct(taken, taken_groups)
        taken, taken_groups = np.concatenate([taken, keys]), np.concatenate([taken_groups, groups])
        parted += dropped
        problems[split] = _rows(opened, reader, places)
        record[split] = len(keys)
    record["repeated"] = record["prompts"] - record["elsewhere"] - parted - len(taken)
    if source.group_by:
        record |= {"groups": len(taken_groups), "group_in_other_split": parted}
    sizes = {
        "train": source.n_train or config.n_train,
        "validation": source.n_validation or config.n_validation,
        "test": source.n_test or config.n_test,
    }
    data = Data(sizes, source.system, config.thinking, source.streaming, record)
    replies = (lambda problem, rng, noise: problem.reply) if source.reply else None
    right_from = source.right_from or RIGHT_FROM.get(source.reward, 1.0)
    train, validation, test = (problems[split] for split in SPLITS)
    return Domain(name, source.reward, train, validation, test, replies, data=data, right_from=right_from)


def _opened(given: Mapping[str, tuple[str, ...]], columns: tuple[str, ...], where: str) -> dict[str, list[Table]]:
    """The tables of each split; one UserError names every entry that cannot be opened."""
    found: dict[str, list[Table]] = {split: [] for split in given}
    wrong: list[str] = []
    for split, entries in given.items():
        for entry in entries:
            try:
                found[split] += files.tables((entry,), columns, where)
            except UserError as e:
                wrong.append(str(e))
    if wrong:
        raise UserError("; ".join(dict.fromkeys(wrong)))
    return found


def _scan(
    reader: Reader,
    tables: Mapping[str, list[Table]],
    shares: Mapping[str, float],
    salt: str,
    limit: tuple[str, int],
) -> tuple[dict[str, Index], dict[str, Any]]:
    """Passes once over all rows.

    Args:
      reader: turns a row into problems.
      tables: by split, the tables given for it.
      shares: by held-out split, the share of the prompts of the training tables that the hash puts into it.
      salt: what is hashed before the prompt or the group.
      limit: the section of the config, for error messages, and its `max_bad_rows`.

    Returns:
      (the index of each split, the record of what was found).

    Raises:
      UserError: at the first bad row beyond `max_bad_rows`.
    """
    indexes = {split: Index() for split in SPLITS}
    record: dict[str, Any] = {"rows": 0, "prompts": 0, "elsewhere": 0, "bad_rows": 0, "bad": []}
    for number, (split, where, position, row) in _found(tables):
        record["rows"] += 1
        try:
            problems = _problems(reader, row)
        except BadRow as e:
            record["bad_rows"] += 1
            record["bad"] += [f"{where}: {e}"][: NAMED_BAD_ROWS - len(record["bad"])]
            if record["bad_rows"] > limit[1]:
                raise UserError(
                    f"{limit[0]}: more than max_bad_rows={limit[1]} bad rows; the first is {record['bad'][0]}"
                ) from e
            continue
        for sub, (problem, named) in enumerate(problems):
            record["prompts"] += 1
            key = int.from_bytes(hash64(salt + problem.prompt), "big")
            group = int.from_bytes(hash64(salt + problem.group), "big") if problem.group else None
            falls_in = named or (split if split != "train" else _by_hash(key if group is None else group, shares))
            if falls_in in indexes:
                stratum = int(problem.stratum, 16) if problem.stratum else None
                indexes[falls_in].add(key, number, position, sub, group=group, stratum=stratum)
            else:
                record["elsewhere"] += 1
    return indexes, record


def _found(tables: Mapping[str, list[Table]]) -> Iterator[tuple[int, tuple[str, str, int, Any]]]:
    pairs = [(split, table) for split in SPLITS for table in tables[split]]
    for number, (split, table) in enumerate(pairs):
        for position, where, row in table.scan():
            yield number, (split, where, position, row)


def _problems(reader: Reader, row: Any) -> list[tuple[Problem, str]]:
    if isinstance(row, BadRow):
        raise row
    return reader.problems(row)


def _by_hash(key: int, shares: Mapping[str, float]) -> str:
    at = key / 2.0**64
    if at < shares["test"]:
        return "test"
    return "validation" if at < shares["test"] + shares["validation"] else "train"


def _rows(tables: list[Table], reader: Reader, places: Sequence[np.ndarray]) -> Lazily[Problem]:
    table_of, position_of, sub_of = places

    def read(i: int) -> Problem:
        try:
            row = tables[table_of[i]].read(int(position_of[i]))
            return reader.problems(row)[sub_of[i]][0]
        except (BadRow, IndexError, StopIteration, OSError) as e:
            raise UserError(f"a data file was changed after it was indexed ({e}); start the run again") from e

    return Lazily(len(table_of), read)
