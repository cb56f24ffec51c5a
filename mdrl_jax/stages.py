"""What a stage's name means.

| name | trains |
|---|---|
| `code`, `math`, ... (a domain) | GRPO on that domain, from the stage before |
| `refresh-D` | the same again: a refresh is plain training (definitions §8) |
| `solo-D` | GRPO on D from the base model |
| `placebo-D` | the same as D at learning rate 0: must lose nothing (definitions §2) |
| `joint` | GRPO on all scored domains, mixed evenly in every step |
| `pretrain` | supervised learning of the domains' demonstrations |
| `analyze` | nothing: the interference analysis of the stages before it (definitions §3 to §7) |
"""

import dataclasses

from mdrl_jax.config import Config, TrainSection, stage_config
from mdrl_jax.errors import UserError

ALL_DOMAINS = {"joint": "grpo", "pretrain": "sft", "analyze": "analyze"}  # kinds of the stages on all domains


@dataclasses.dataclass(frozen=True)
class Stage:
    """One stage of a run: `index` counts from 1 (0 is the base model)."""

    name: str
    index: int
    kind: str  # "grpo", "sft" or "analyze"
    domains: tuple[str, ...]
    start: str
    train: TrainSection

    @property
    def folder(self) -> str:
        """`NN-stage`, the name of its checkpoint and sample files."""
        return f"{self.index:02d}-{self.name}"

    @property
    def trains(self) -> bool:
        """Whether the stage makes parameters."""
        return self.kind != "analyze"


def plan(config: Config, known_domains: tuple[str, ...]) -> tuple[Stage, ...]:
    """The stages of a run in order.

    Raises:
      UserError: if a name means nothing, or a stage trains a domain that is not scored.
    """
    for domain in config.scored_domains:
        if domain not in known_domains:
            raise UserError(f"scored_domains names {domain!r}, which is no domain; known: {', '.join(known_domains)}")
    stages: list[Stage] = []
    before = "base"
    for index, name in enumerate(config.stages, 1):
        train = stage_config(config, name)
        prefix, _, rest = name.partition("-")
        start = train.start or before
        kind, domains = "grpo", (rest or name,)
        if name in ALL_DOMAINS:
            kind, domains = ALL_DOMAINS[name], config.scored_domains
        elif prefix == "solo":
            start = train.start or "base"
        elif prefix == "placebo":
            train = dataclasses.replace(train, learning_rate=0.0)
        elif rest and prefix != "refresh":
            domains = (name,)
        for domain in domains:
            if domain not in known_domains:
                raise UserError(
                    f"stage {name!r} means nothing here; stages are a domain ({', '.join(known_domains)}), "
                    "refresh-, solo- or placebo- and a domain, joint, pretrain, or analyze"
                )
            if domain not in config.scored_domains:
                raise UserError(f"stage {name!r} trains {domain}, which is not in scored_domains; add it there")
        if kind == "grpo" and train.prompts % len(domains):
            raise UserError(f"stage {name}: prompts={train.prompts} is not divisible by its {len(domains)} domains")
        stages.append(Stage(name, index, kind, domains, start, train))
        if kind != "analyze":
            before = name
    return tuple(stages)
