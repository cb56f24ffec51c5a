"""What a reward is: a pure function `f(completion, check) -> float in [0, 1]`.

`completion` is the reply of the model. `check` says which replies are right; it is JSON-serialisable. Two of its keys
concern the style of a reply and mean the same for every reward function:

- `"separator"`: a reply may be working, then this text, then the answer (`> 4 ; ANSWER`). The answer is the text after
  the last separator. If the check or the reply has no separator, the answer is the whole reply.
- `"terse"`: true if working is not accepted. The reward function then grades the whole reply instead of the answer.
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

# The smallest reward of an answer that counts as right, of rewards that give parts of it; 1 for all others.
RIGHT_FROM = {"mdrl_jax.rewards.qa:f1": 0.5}


@dataclass(frozen=True)
class Score:
    """One judged completion.

    Attributes:
      reward: the reward, in [0, 1]; training and the score table use it.
      accuracy: the reward of the answer alone, in [0, 1], regardless of style.
      error: one line that says why the completion could not be judged, such as "timeout: CPU time used up"; both
        numbers are then 0. None if it was judged.
    """

    reward: float
    accuracy: float
    error: str | None = None

    @property
    def kind(self) -> str:
        """The kind of the error: its text before the first colon, such as "timeout"; "" if there is no error."""
        return (self.error or "").partition(":")[0]


def without_working(completion: str, separator: str | None) -> str:
    """Returns the text after the last separator, or the whole reply if it has none; stripped of white space.

    A `separator` of None or "" leaves the whole reply, stripped as well.

    >>> without_working("> 2 plus 2 ; 4", ";"), without_working("4", ";")
    ('4', '4')
    """
    return (completion.rpartition(separator)[2] if separator else completion).strip()


def score(fn: RewardFunction, completion: str, check: Mapping[str, Any]) -> Score:
    """Judges one reply: the reward by style and content, the accuracy by content alone.

    The accuracy is `fn` of the answer. The reward is the same, unless the check has "terse" and the reply has working:
    then the reward is `fn` of the whole reply, and `fn` is called twice. White space at both ends is removed from what
    `fn` gets. Only where the check has a "prefix", the beginning of a program, and either "terse" or no "separator",
    does the whole reply keep it.

    Args:
      fn: the reward function.
      completion: the reply.
      check: what the reply is compared with (see the module); `fn` gets all of it.

    Returns:
      The score, without an error.

    Raises:
      ValueError: if `float` of what `fn` returns is no number in [0, 1]; NaN is none.
      TypeError: if "separator" is no text.
      Exception: whatever `fn` raises.
    """
    # A reply that goes on with a given beginning of a program keeps its indentation.
    whole = completion if check.get("prefix") else completion.strip()
    plain = without_working(completion, check["separator"]) if check.get("separator") else whole
    accuracy = _valid(fn(plain, check))
    graded = whole if check.get("terse") else plain
    return Score(accuracy if graded == plain else _valid(fn(graded, check)), accuracy)


def _valid(value: Any) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not 0.0 <= number <= 1.0:
        raise ValueError(f"the reward function returned {value!r}, not a number in [0, 1]")
    return number


def resolve(name: str) -> RewardFunction:
    """Returns the reward function that a name means. Imports its module.

    Args:
      name: math, code, qa, cw or an import path `module:function`, where `function` has no dots.

    Raises:
      UserError: if the name is unknown, cannot be imported (whatever Exception the module raises), lies in the main
        script, or means nothing that can be called.
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
