"""The command `config`: prints the fields that a config file or `--config.FIELD=VALUE` can set, with their meaning.

The texts are those of the docstrings of the sections, in which `config.py` and the modules that it names explain every
field once.
"""

import dataclasses
import inspect
import re
import textwrap
import typing
from collections.abc import Sequence

from mdrl_jax.config import Config
from mdrl_jax.errors import UserError

WIDTH = 100
_NAMES = re.compile(r"(\w+(?:, \w+)*): (.*)", re.DOTALL)


@dataclasses.dataclass(frozen=True)
class Field:
    """One field of the config.

    Attributes:
      path: dotted path below the config, such as "train.grpo.kl_coef".
      default: its default as Python would write it; "" for a section.
      meaning: its explanation, on one line.
    """

    path: str
    default: str
    meaning: str


def fields(section: type = Config, path: str = "") -> list[Field]:
    """All fields of a section and of the sections in it, in the order of their declaration.

    Args:
      section: a section of the configuration.
      path: dotted path of the section, with a dot at its end; "" for the whole config.

    Raises:
      KeyError: if a field is not explained under "Attributes:" in the docstring of its section.
    """
    found, meanings, hints = [], _meanings(section), typing.get_type_hints(section)
    for field in dataclasses.fields(section):
        inner, name = hints[field.name], f"{path}{field.name}"
        nested = dataclasses.is_dataclass(inner)
        default = "" if nested else repr(getattr(section(), field.name))
        found.append(Field(name, default, meanings[field.name]))
        if nested:
            found += fields(typing.cast(type, inner), f"{name}.")
    return found


def _meanings(section: type) -> dict[str, str]:
    text = (inspect.getdoc(section) or "").partition("Attributes:\n")[2]
    entries = re.split(r"\n  (?=\w)", "\n" + re.split(r"\n(?=\w)", text)[0])
    meanings = {}
    for entry in entries:
        if matched := _NAMES.fullmatch(" ".join(entry.split())):
            meanings |= dict.fromkeys(matched[1].split(", "), matched[2])
    return meanings


def search(words: Sequence[str]) -> list[Field]:
    """The fields that have all words in their path or explanation; of a path or section itself, it and what is in it.

    Args:
      words: texts, of which case does not count; none: all fields.
    """
    every = fields()
    if len(words) == 1:
        path = words[0].removeprefix("--").removeprefix("config.").partition("=")[0]
        if own := [f for f in every if f.path == path or f.path.startswith(f"{path}.")]:
            return own
    return [f for f in every if all(w.lower() in f"{f.path} {f.meaning}".lower() for w in words)]


def text(found: Sequence[Field] | None = None) -> str:
    """Fields as text: path and default on one line, the meaning below it; None: all fields."""
    lines = []
    for field in fields() if found is None else found:
        lines.append(f"{field.path} = {field.default}" if field.default else f"{field.path}: a section")
        lines += textwrap.wrap(field.meaning, WIDTH, initial_indent="    ", subsequent_indent="    ")
    return "\n".join([*lines, ""])


def run(words: Sequence[str]) -> None:
    """Prints fields with their default and meaning.

    Args:
      words: as in `search`.

    Raises:
      UserError: if no field has all the words.
    """
    found = search(words)
    if not found:
        raise UserError(f"no field of the config has {' and '.join(map(repr, words))}; mdrl config prints all fields")
    print(text(found), end="")
