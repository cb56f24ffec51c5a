"""The decorator `section`, for the sections of a configuration: frozen dataclasses that config files fill in."""

import dataclasses
import typing

T = typing.TypeVar("T")


@typing.dataclass_transform(frozen_default=False, eq_default=False, field_specifiers=(dataclasses.field,))
def section(cls: type[T]) -> type[T]:
    """Makes a class a frozen dataclass whose fields a type checker accepts assignments to.

    A config file assigns to the fields of a `ConfigDict`. It is annotated with these classes (`config.default`), so
    editors complete its fields and type checkers check them. The parsed configuration itself cannot be changed: an
    assignment to a field raises `dataclasses.FrozenInstanceError`.

    Args:
      cls: a class with annotated fields, declared as for `dataclasses.dataclass`. Every field needs a default, because
        `config.default` makes the sections without arguments.

    Returns:
      The same class, now a dataclass that compares and hashes by its fields. To hash an object raises TypeError if a
      field, or a field of a section in it, holds a dictionary.

    Raises:
      ValueError: if a default is not hashable, such as a list.
      TypeError: if a field without a default follows one with a default.
    """
    return dataclasses.dataclass(frozen=True)(cls)
