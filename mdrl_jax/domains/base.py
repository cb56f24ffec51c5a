"""A domain: prompts in three disjoint splits, and the check that rewards a completion."""

import dataclasses
import random
from collections.abc import Callable, Mapping
from typing import Any

from mdrl_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Problem:
    """A prompt and what its completion is checked against (JSON-serialisable; see `rewards/base.py`)."""

    prompt: str
    check: Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Domain:
    """Prompts of one domain and the reward, by name or "module:function", that judges completions.

    `demonstrate(problem, rng, noise)` writes a training reply for pretraining a base model, wrong somewhere with
    probability `noise`; domains read from data sets have none. `pretraining` are the problems such a base may see
    (never a held-out prompt, except where the module says so).
    """

    name: str
    reward: str
    train: tuple[Problem, ...]
    validation: tuple[Problem, ...]
    test: tuple[Problem, ...]
    demonstrate: Callable[[Problem, random.Random, float], str] | None = None
    pretraining: tuple[Problem, ...] = ()

    def style_blind(self) -> "Domain":
        """The same domain with rewards that ignore style: working before the answer costs nothing."""

        def blind(problems: tuple[Problem, ...]) -> tuple[Problem, ...]:
            return tuple(dataclasses.replace(p, check={**p.check, "terse": False}) for p in problems)

        return dataclasses.replace(
            self,
            train=blind(self.train),
            validation=blind(self.validation),
            test=blind(self.test),
        )


@dataclasses.dataclass(frozen=True)
class DomainsConfig:
    """Which problems: generator seed, sizes of the splits (train: at most), and whether rewards ignore style."""

    seed: int = 0
    n_train: int = 2000
    n_validation: int = 100
    n_test: int = 300
    style_blind: bool = False

    def __post_init__(self) -> None:
        for field in ("n_train", "n_validation", "n_test"):
            if getattr(self, field) < 1:
                raise UserError(f"domains.{field}={getattr(self, field)} is not valid; it is >= 1")


def split(
    name: str, problems: list[Problem], config: DomainsConfig
) -> tuple[tuple[Problem, ...], tuple[Problem, ...], tuple[Problem, ...]]:
    """Shuffles distinct problems by the config's seed into (train, validation, test), disjoint by prompt.

    Raises:
      UserError: if there are too few problems for the sizes asked for.
    """
    distinct = list({p.prompt: p for p in problems}.values())
    held_out = config.n_test + config.n_validation
    if len(distinct) <= held_out:
        raise UserError(
            f"domain {name} has {len(distinct)} distinct prompts; n_test + n_validation = {held_out} "
            "leaves none to train on"
        )
    random.Random(f"{config.seed}/{name}/split").shuffle(distinct)
    test = distinct[: config.n_test]
    validation = distinct[config.n_test : held_out]
    return tuple(distinct[held_out:][: config.n_train]), tuple(validation), tuple(test)
