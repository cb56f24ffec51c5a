"""Reads the arguments of a command: its flags, and its config file with the fields that are changed.

Configs that come with the package are found by name. Whatever is wrong in the arguments or in the config file becomes a
`UserError` of one line.
"""

import os
import re
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from absl import flags, logging

from mdrl_jax.errors import UserError

CONFIG_HELP = (
    "configuration file, or the name of one that comes with the package, e.g. quickstart; --config.FIELD=VALUE changes "
    "a field: --config.seed=1"
)
MAY_BE_EMPTY = ("prompt", "prompt_ids", "system", "compilation_cache")  # whose commands say what "" means


def config_flag(values: flags.FlagValues, argv: list[str]) -> None:
    """Defines --config, with a field --config.FIELD for everything that `get_config` of the file returns."""
    from ml_collections import config_flags

    config_flags.DEFINE_config_file("config", None, CONFIG_HELP, flag_values=values, sys_argv=argv)


def shipped() -> dict[str, str]:
    """Name and file of each config that comes with the package: `configs` in a wheel and beside it in a checkout."""
    package = Path(__file__).resolve().parent
    folder = package / "configs" if (package / "configs").is_dir() else package.parent / "configs"
    return {file.stem: str(file) for file in sorted(folder.glob("*.py"))}


def with_shipped(argv: list[str]) -> list[str]:
    """Replaces the name of a config that comes with the package, as in `--config=quickstart`, by its file.

    `--config=configs/quickstart.py` means the same in a folder that has no such file. A file of that very name comes
    first. What follows a colon is kept, because it is the argument of `get_config`.

    Raises:
      UserError: if there is neither such a file nor such a name; the message lists the names.
    """
    given = list(argv)
    for i, argument in enumerate(argv):
        flag, equals, value = argument.partition("=")
        at = i if equals else i + 1
        if flag not in ("--config", "-config") or at == len(argv):
            continue
        file, colon, variant = (value if equals else argv[at]).partition(":")
        if not file or (os.path.exists(file) and not os.path.isdir(file)):
            continue
        known = shipped()
        name = re.sub(r"^configs/(.+)\.py$", r"\1", file)
        if name not in known:
            raise UserError(
                f"there is no config file {file!r}; give a file, e.g. small.py, or the name of a config that comes "
                f"with the package: {', '.join(known)}"
            )
        given[at] = f"{flag}=" * bool(equals) + known[name] + colon + variant
    return given


def at_home(argument: str) -> str:
    """Replaces the `~` at the start of a flag's path, which shells leave as it is: `--out=~/a`, `--stage=math:~/a`."""
    start, home, rest = argument.partition("~/")
    names_path = re.fullmatch(r"--(?!prompt=|system=)[\w.]+=([\w@-]+:)?", start)
    return f"{start}{os.path.expanduser('~')}/{rest}" if home and names_path else argument


def _drop_overrides(config: Any, argv: Sequence[str]) -> None:
    """With `--config.stages` alone, drops the file's overrides of stages that are not run any more, and says so."""
    given = {a.partition("=")[0] for a in argv}
    overrides = getattr(config, "stage_overrides", None)
    if "--config.stages" not in given or any(a.startswith("--config.stage_overrides") for a in given) or not overrides:
        return
    dropped = [name for name in overrides if name not in config.stages]
    with overrides.unlocked():
        for name in dropped:
            del overrides[name]
    if dropped:
        names = ", ".join(map(str, dropped))
        print(
            f"mdrl: note: the config's stage_overrides of {names} are left out, which --config.stages does not name",
            file=sys.stderr,
        )


def _unknown_field(argv: list[str]) -> str:
    """An error message for the first `--config.a.b=v` whose field does not exist.

    The result is "" if all fields exist or the config file cannot be read.
    """
    from mdrl_jax.config import renamed

    alone = flags.FlagValues()
    spaced = [i for i, a in enumerate(argv) if "--config" in (a, argv[i - 1])]
    named = [argv[0], *(a for i, a in enumerate(argv) if a.startswith("--config=") or i in spaced)]
    config_flag(alone, named)
    try:
        alone(named)
        config: Any = alone["config"].value
        config.keys()  # raises if the file could not be read
    except Exception:  # the config file itself is wrong; the caller reports its error
        return ""
    for argument in (a for a in argv if a.startswith("--config.")):
        path = argument.removeprefix("--config.").partition("=")[0]
        parts, at = path.split("."), config
        for depth, name in enumerate(parts):
            if not hasattr(at, "keys") or name not in at:
                if now := renamed(path):
                    return f"--config.{path} is now called --config.{now}"
                where = "config." + ".".join(parts[:depth]) if depth else "the config"
                has = f"has {', '.join(sorted(at.keys()))}" if hasattr(at, "keys") else "has no fields"
                return f"--config.{path} is not a field: {where} {has}"
            at = at[name]
    return ""


def _config_file(argv: Sequence[str]) -> str:
    """The path of the config file in the arguments, without what follows its colon; "" if there is none."""
    for i, argument in enumerate(argv):
        name, equals, value = argument.partition("=")
        if name in ("--config", "-config"):
            return (value if equals else "".join(argv[i + 1 : i + 2])).partition(":")[0]
    return ""


def _place(error: BaseException, file: str) -> str:
    """Where in the config file an error arose, as "FILE line 3"; "" if it did not arise there."""
    at: BaseException | None = error
    while at is not None and file:
        if isinstance(at, SyntaxError) and at.filename and _same(at.filename, file):
            return f"{file} line {at.lineno}"
        for frame in reversed(traceback.extract_tb(at.__traceback__)):
            if _same(frame.filename, file):
                return f"{file} line {frame.lineno}"
        at = at.__cause__ or at.__context__
    return ""


def _same(one: str, other: str) -> bool:
    return os.path.realpath(one) == os.path.realpath(other)


def _reason(error: BaseException) -> str:
    """An error as one line, with the name of its type if its text alone would say little."""
    said = str(error).replace("Configuration is not available because of an earlier failure to load: ", "")
    lines = [line.strip() for line in said.strip().splitlines()] or [""]
    # An error inside a config file may include its traceback; the reason is the last line of it.
    if "'config_config' has no attribute 'get_config'" in str(error):
        return "there is no function get_config, which makes the config"
    line = lines[-1] if "Traceback" in str(error) or isinstance(error, OSError) else lines[0]
    plain = isinstance(error, flags.Error | OSError | SyntaxError | ImportError | UserError) or ": " in line
    return line if plain and line else f"{type(error).__name__}: {line}".rstrip(": ")


def parse(values: flags.FlagValues, argv: list[str], positional: str | None, needs_config: bool) -> None:
    """Parses the flags of a command.

    Args:
      values: the command's flags; their values are set.
      argv: name of the program and the arguments.
      positional: list flag that takes the arguments without --; None if the command takes no such arguments.
      needs_config: whether --config must be given.

    Raises:
      UserError: if a flag, the config file or one of its fields is wrong; the message is one line.
    """
    file = _config_file(argv)
    if file and os.path.isfile(file):
        sys.path.insert(0, os.path.dirname(os.path.abspath(file)))  # a config may import a module beside it
    verbosity = logging.get_verbosity()
    logging.set_verbosity(logging.FATAL)  # the errors below say the same in one line
    try:
        rest = values(argv)[1:]
        if "config" in values and values["config"].value is not None:
            getattr(values["config"].value, "keys", None)  # raises here if the file could not be read
    except (Exception, SystemExit) as e:  # absl, ml_collections and the config file may raise anything
        if place := _place(e, file):
            raise UserError(f"{place}: {_reason(e)}") from e
        if isinstance(e, OSError):
            raise UserError(f"the config file cannot be read: {_reason(e)}") from e
        if unknown := _unknown_field(argv):
            raise UserError(unknown) from e
        inside = file and "get_config" in str(e)
        raise UserError(f"{file}: {_reason(e)}" if inside else _reason(e)) from e
    finally:
        logging.set_verbosity(verbosity)
    if rest and positional:
        values[positional].value = (values[positional].value or []) + rest
    elif rest:
        raise UserError(f"argument {rest[0]!r} is not understood; flags start with --")
    for name in (n for n in values if n not in MAY_BE_EMPTY):
        if values[name].present and values[name].value == "":  # such as --workdir=$DIR without DIR
            raise UserError(f"--{name}= is empty; give a value, or leave the flag out")
    if "config" in values and values["config"].present and values["config"].value is None:
        raise UserError(f"get_config() of {file} returns None; it must return the config")
    if "config" in values and values["config"].value is not None:
        if not hasattr(values["config"].value, "keys"):
            kind = type(values["config"].value).__name__
            raise UserError(f"get_config() of {file} returns {kind}; it must return what config.default() makes")
        _drop_overrides(values["config"].value, argv)
    if needs_config and "config" in values and values["config"].value is None:
        raise UserError("--config is missing, e.g. --config=quickstart")
