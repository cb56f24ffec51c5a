"""Sections of a configuration: frozen dataclasses that config files fill in field by field."""

import dataclasses
import typing

T = typing.TypeVar("T")


@typing.dataclass_transform(frozen_default=False, eq_default=False, field_specifiers=(dataclasses.field,))
def section(cls: type[T]) -> type[T]:
    """A frozen dataclass whose fields a type checker sees as settable.

    A config file sets fields of a `ConfigDict`, which is annotated with these classes (`config.default`) so that
    editors complete its fields and type checkers check them. The parsed configuration cannot be changed.
    """
    return dataclasses.dataclass(frozen=True)(cls)
