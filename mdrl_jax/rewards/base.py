"""What a reward is: an ordinary, pure function `f(completion, check) -> float in [0, 1]`.

`check` is JSON-serialisable and says what is right. Two keys of it belong to the style of a reply,
not to its content, and mean the same for every reward function:

- `"separator"`: the reply may be working, then this text, then the answer (`> 4 ; ANSWER`); the
  answer is what follows the last one. Without it, or if the reply has none, it is the whole reply.
- `"terse"`: true if working is not accepted, so that the whole reply is graded.
"""

import importlib
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, cast

from mdrl_jax.errors import UserError

RewardFunction = Callable[[str, Mapping[str, Any]], float]

SHORT_NAMES = {
    "math": "mdrl_jax.rewards.math:final_answer",
    "code": "mdrl_jax.rewards.code:passes_tests",
    "qa": "mdrl_jax.rewards.qa:exact_match",
    "cw": "mdrl_jax.rewards.writing:constraints",
}


@dataclass(frozen=True)
class Score:
    """One judged completion.

    reward: in [0, 1]; what training and the score table use.
    accuracy: in [0, 1]; the same content judged regardless of style.
    error: why nothing could be judged, in one line (both numbers are then 0), else None.
    """

    reward: float
    accuracy: float
    error: str | None = None

    @property
    def kind(self) -> str:
        """What kind of error it is; "" if there is none."""
        return (self.error or "").partition(":")[0]


def without_working(completion: str, separator: str | None) -> str:
    """What follows the last `separator`, stripped; the whole reply, stripped, if there is none.

    >>> without_working("> 2 plus 2 ; 4", ";"), without_working("4", ";")
    ('4', '4')
    """
    return (completion.rpartition(separator)[2] if separator else completion).strip()


def score(fn: RewardFunction, completion: str, check: Mapping[str, Any]) -> Score:
    """Judges one reply: reward by its style and content, accuracy by its content alone.

    Raises whatever `fn` raises, and ValueError if it returns anything but a number in [0, 1].
    """
    plain = without_working(completion, check.get("separator"))
    accuracy = _valid(fn(plain, check))
    graded = completion.strip() if check.get("terse") else plain
    return Score(accuracy if graded == plain else _valid(fn(graded, check)), accuracy)


def _valid(value: Any) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not 0.0 <= number <= 1.0:
        raise ValueError(f"the reward function returned {value!r}, not a number in [0, 1]")
    return number


def resolve(name: str) -> RewardFunction:
    """The reward function called `name`: math, code, qa, cw or an import path `module:function`.

    Raises UserError, in one line, if there is no such name or it cannot be imported.
    """
    module_name, colon, attribute = SHORT_NAMES.get(name, name).partition(":")
    choices = f"give one of {', '.join(SHORT_NAMES)}, or an import path module:function"
    if not (module_name and colon and attribute):
        raise UserError(f"reward {name!r} is unknown; {choices}")
    if module_name == "__main__":
        raise UserError(
            f"reward {name!r} is in the main script or notebook, which the reward workers cannot "
            "import; put it in a file of its own"
        )
    try:
        fn: Any = getattr(importlib.import_module(module_name), attribute)
    except Exception as e:
        reason = " ".join(f"{type(e).__name__}: {e}".split())
        raise UserError(f"reward {name!r} cannot be imported ({reason}); {choices}") from e
    if not callable(fn):
        raise UserError(f"reward {name!r} is not a function; {choices}")
    return cast(RewardFunction, fn)
