"""A domain: prompts in three disjoint splits, and the check that rewards a completion."""

import dataclasses
import random
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from mdrl_jax.errors import UserError
from mdrl_jax.section import section


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
    (never a held-out prompt, except where the module says so). `data` says how the prompts of a data set become
    tokens; without it they are the tokenizer's of the bare prompt, and all of them have to fit.
    """

    name: str
    reward: str
    train: Sequence[Problem]
    validation: Sequence[Problem]
    test: Sequence[Problem]
    demonstrate: Callable[[Problem, random.Random, float], str] | None = None
    pretraining: tuple[Problem, ...] = ()
    data: "Data | None" = None

    def style_blind(self) -> "Domain":
        """The same domain with rewards that ignore style: working before the answer costs nothing."""

        def blind(problems: Sequence[Problem]) -> tuple[Problem, ...]:
            return tuple(dataclasses.replace(p, check={**p.check, "terse": False}) for p in problems)

        return dataclasses.replace(
            self,
            train=blind(self.train),
            validation=blind(self.validation),
            test=blind(self.test),
        )


@dataclasses.dataclass(frozen=True)
class Data:
    """What `prompts.tokenize` has to know of a domain that was read from a data set.

    Attributes:
      sizes: prompts kept of each split, at most; longer ones than the limit are left out and counted.
      system: the chat's system prompt; "" leaves it to the template.
      thinking: see `DomainsConfig`.
      streaming: whether training prompts are read from their files whenever they are visited.
      record: what was found in the source: rows, bad ones, repeats, sizes of the splits.
    """

    sizes: Mapping[str, int]
    system: str
    thinking: str
    streaming: bool
    record: Mapping[str, Any]


@section
class SourceConfig:
    """The data set of one domain; without `preset` and `files` the domain is the procedural one.

    Attributes:
      preset: name in `presets.PRESETS`; what is not set here is taken from there.
      files: of training, or of everything: paths or globs of .jsonl, .json, .csv, .tsv, .parquet or .arrow files, or
        "hub:NAME:SPLIT" or "hub:NAME:SUBSET:SPLIT" of the Hugging Face hub.
      validation_files, test_files: held-out ones; a split without files is taken out of `files` by a hash. Where any
        of the three is set, the preset's are not read.
      validation_share, test_share: of the rows, where a split is taken by a hash.
      columns: names of the columns of a csv file that has no header.
      fields: "module:function", or a name in `presets.FIELDS`: makes of a row the fields (or a list of them, which may
        be empty) that `prompt` and `check` use; "" uses the row as it is.
      prompt: template such as "Question: {question}"; two braces make one.
      check: by key of the reward's check, the field that is its value.
      reward: name of the reward, or "module:function".
      system: system prompt of the chat; "" leaves it to the model's template.
      n_train, n_validation, n_test: prompts of each split, at most; 0: as many as of the other domains.
      streaming: training prompts stay in their files, and only an index of them in memory.
      max_bad_rows: rows that may be skipped for a missing field, a wrong type or invalid JSON.
    """

    preset: str = ""
    files: tuple[str, ...] = ()
    validation_files: tuple[str, ...] = ()
    test_files: tuple[str, ...] = ()
    validation_share: float = 0.1
    test_share: float = 0.1
    columns: tuple[str, ...] = ()
    fields: str = ""
    prompt: str = ""
    check: Mapping[str, str] = dataclasses.field(default_factory=dict)
    reward: str = ""
    system: str = ""
    n_train: int = 0
    n_validation: int = 0
    n_test: int = 0
    streaming: bool = False
    max_bad_rows: int = 10

    def __post_init__(self) -> None:
        shares = self.validation_share, self.test_share
        if not (min(shares) >= 0 and sum(shares) < 1):
            raise UserError(f"validation_share, test_share = {shares} are not valid; each >= 0, together below 1")
        for field in ("max_bad_rows", "n_train", "n_validation", "n_test"):
            if getattr(self, field) < 0:
                raise UserError(f"{field}={getattr(self, field)} is not valid; it is >= 0")

    @property
    def given(self) -> bool:
        """Whether there is a data set."""
        return bool(self.preset or self.files)


@section
class DomainsConfig:
    """Which problems: generator seed, sizes of the splits, and whether rewards ignore style.

    Attributes:
      seed: of procedural problems and of every choice of rows.
      n_train: training prompts, at most.
      n_validation, n_test: held-out prompts; of a data set at most.
      style_blind: procedural rewards that ignore style.
      code, math, qa, cw: data sets in place of the procedural problems.
      thinking: "on" or "off" tells chat templates that know `enable_thinking`; "" leaves it to them.
      separator: what ends a model's thinking, such as "</think>": replies to data sets' prompts are judged by what
        follows the last one.
    """

    seed: int = 0
    n_train: int = 2000
    n_validation: int = 100
    n_test: int = 300
    style_blind: bool = False
    code: SourceConfig = SourceConfig()
    math: SourceConfig = SourceConfig()
    qa: SourceConfig = SourceConfig()
    cw: SourceConfig = SourceConfig()
    thinking: str = ""
    separator: str = ""

    def __post_init__(self) -> None:
        for field in ("n_train", "n_validation", "n_test"):
            if getattr(self, field) < 1:
                raise UserError(f"domains.{field}={getattr(self, field)} is not valid; it is >= 1")
        if self.thinking not in ("", "on", "off"):
            raise UserError(f"domains.thinking={self.thinking!r} is not known; known: '', 'on', 'off'")

    @property
    def sources(self) -> dict[str, SourceConfig]:
        """The data sets that are given, by domain."""
        named = {"code": self.code, "math": self.math, "qa": self.qa, "cw": self.cw}
        return {name: source for name, source in named.items() if source.given}


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
