"""A reward pool for tests that need rewards, but no processes."""

from collections.abc import Iterable
from typing import Any

from mdrl_jax.rewards.base import Score


class OddPool:
    """A reward pool without processes. Its reward is a function of the text that varies within nearly every group."""

    def check(self, names: Iterable[str]) -> None: ...

    def score(self, requests: list[tuple[str, str, Any]]) -> list[Score]:
        values = [sum(map(ord, text)) % 3 / 2 for _, text, _ in requests]
        return [Score(value, value) for value in values]

    def __enter__(self) -> "OddPool":
        return self

    def __exit__(self, *_: Any) -> None: ...
