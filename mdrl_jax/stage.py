"""What a stage's name means.

| name | makes |
|---|---|
| `code`, `math`, ... (a domain) | GRPO on that domain, from the stage before |
| `refresh-D` | D again, plainly trained, until D is back (`recovery/refresh/tracker.py`, definitions §8) |
| `rollback-A-B` | no training: B's edit taken back on the conflict set of A, whose peak is kept (definitions §9) |
| `placebo-D` | the same as D at learning rate 0: must lose nothing (definitions §2) |
| `joint` | GRPO on all scored domains, mixed evenly in every step |
| `pretrain` | supervised learning of the domains' demonstrations |
| `solo-D` | GRPO on D from the base model |
| `reversed-D` | GRPO on D from the `reversed-` stage before it, the first from the base model: another order |
| `protect-D`, `ewc-D`, `agem-D`, `pcgrad-D`, `replay-D`, `kl-D` | stage D again, its prompts and keys, keeping earlier
domains by that method (`config.METHODS`); from the stage before it of the same prefix, or from D's own start |
| `average`, `arithmetic`, `ties` | no training: the solo edits of all scored domains merged (definitions §10) |
| `analyze` | nothing: the interference analysis of the stages before it (definitions §3 to §7) |
| `plan` | nothing: forecasts of refreshes and rollbacks at the sequence's end, ranked (`recovery/planning/`) |
| `recover` | what the plan picks: a refresh, a rollback or nothing |
| `trials` | nothing: tries every action of the plan on validation prompts, to check its forecasts |
| `orders` | nothing: forecasts from solo edits of what every order would lose (`recovery/planning/orders.py`) |

"The stage before" is the last one of the sequence: a domain, `refresh-`, `placebo-`, `joint` or `pretrain`. All others
are side branches, which nothing but their own kind goes on from unless `start` says so.
"""

import dataclasses
from collections.abc import Sequence

from mdrl_jax.config import METHODS, Config, TrainSection, stage_config
from mdrl_jax.errors import UserError

ALL_DOMAINS = {  # kinds of the stages on all domains
    "joint": "grpo",
    "pretrain": "sft",
    "analyze": "analyze",
    "average": "merge",
    "arithmetic": "merge",
    "ties": "merge",
    "plan": "plan",
    "trials": "trials",
    "orders": "orders",
    "recover": "recover",
}
RECORDS = ("analyze", "plan", "trials", "orders")  # kinds of the stages that make records alone
PREFIXES = ("refresh", "solo", "placebo", "reversed", *METHODS)
SEQUENCE = ("", "refresh", "placebo")  # prefixes of stages that the next one goes on from


@dataclasses.dataclass(frozen=True)
class Stage:
    """One stage of a run.

    Attributes:
      name: as in the config; names are unique.
      index: from 1 (0 is the base model).
      kind: "grpo", "sft", "rollback", "merge", "recover" or one of `RECORDS`.
      domains: trained, or won back.
      start: the stage whose parameters it starts from.
      train: its training section.
      stream: the name that prompts and keys are drawn under; stages that are compared share it.
      reference: the stage whose parameters the KL is taken to.
      keeps: earlier domains that the stage keeps from harm (`PreventSection`).
      donor: of a rollback, the domain whose edit is taken back.
    """

    name: str
    index: int
    kind: str
    domains: tuple[str, ...]
    start: str
    train: TrainSection
    stream: str = ""
    reference: str = ""
    keeps: tuple[str, ...] = ()
    donor: str = ""

    @property
    def folder(self) -> str:
        """`NN-stage`, the name of its checkpoint and sample files."""
        return f"{self.index:02d}-{self.name}"

    @property
    def prefix(self) -> str:
        """`refresh` of `refresh-math`, "" of `math` or `joint`."""
        return self.name.partition("-")[0] if "-" in self.name else ""

    @property
    def trains(self) -> bool:
        """Whether the stage takes optimizer steps."""
        return self.kind in ("grpo", "sft")

    @property
    def scored(self) -> bool:
        """Whether the stage makes parameters, which are kept and scored."""
        return self.kind not in RECORDS


def resolve_stages(config: Config, known_domains: tuple[str, ...]) -> tuple[Stage, ...]:
    """The stages of a run in order.

    Raises:
      UserError: if a name means nothing, or a stage uses a domain or stage that it cannot.
    """
    for domain in config.scored_domains:
        if domain not in known_domains:
            raise UserError(f"scored_domains names {domain!r}, which is no domain; known: {', '.join(known_domains)}")
    stages: list[Stage] = []
    for index, name in enumerate(config.stages, 1):
        stages.append(_stage(config, known_domains, stages, index, name))
    return tuple(stages)


def _stage(config: Config, known: tuple[str, ...], earlier: list[Stage], index: int, name: str) -> Stage:
    train = stage_config(config, name)
    prefix, _, rest = name.partition("-")
    kind, domains, donor, stream = "grpo", (rest or name,), "", name
    if name in ALL_DOMAINS:
        kind, domains, prefix = ALL_DOMAINS[name], config.scored_domains, ""
    elif prefix == "rollback":
        kept, _, donor = rest.partition("-")
        kind, domains = "rollback", (kept, donor)
    elif not rest:
        prefix = ""
    elif prefix not in PREFIXES:
        domains = (name,)
    if prefix == "placebo":
        train = dataclasses.replace(train, learning_rate=0.0)
    if prefix in METHODS:
        stream = rest
    for domain in domains:
        if domain not in known:
            raise UserError(
                f"stage {name!r} means nothing here; stages are a domain ({', '.join(known)}), one of "
                f"{', '.join(f'{p}-' for p in PREFIXES)} and a domain, rollback- and two domains, "
                f"or one of {', '.join(ALL_DOMAINS)}"
            )
        if domain not in config.scored_domains:
            raise UserError(f"stage {name!r} uses {domain}, which is not in scored_domains; add it there")
    if kind == "rollback":
        domains = domains[:1]
    if kind == "grpo" and train.prompts_per_step % len(domains):
        raise UserError(
            f"stage {name}: prompts_per_step={train.prompts_per_step} is not divisible by its {len(domains)} domains"
        )
    branch = [s for s in earlier if s.prefix == prefix]
    start = train.start or ("base" if kind == "merge" else _start(earlier, branch, prefix, rest, kind))
    reference = train.reference or (branch[0].reference if prefix == "kl" and branch else start)
    stage = Stage(name, index, kind, domains, start, train, stream, reference, (), donor)
    stage = dataclasses.replace(stage, keeps=_keeps(stage, earlier))
    _check(stage, earlier)
    return stage


def _start(earlier: list[Stage], branch: list[Stage], prefix: str, domain: str, kind: str) -> str:
    before = [s for s in earlier if s.kind in ("grpo", "sft", "recover") and s.prefix in SEQUENCE]
    if prefix == "solo" or (prefix == "reversed" and not branch):
        return "base"
    if prefix == "reversed" or (prefix in METHODS and branch):
        return branch[-1].name
    if prefix in METHODS:
        same = [s for s in earlier if s.name == domain]
        return same[0].start if same else (before[-1].name if before else "base")
    if kind in ("rollback", "plan", "trials", "recover"):
        before = [s for s in before if s.domains == (s.name,)]
    return before[-1].name if before else "base"


def _keeps(stage: Stage, earlier: list[Stage]) -> tuple[str, ...]:
    prevent = stage.train.prevent
    if not (prevent.replay or prevent.transforms):
        return ()
    return prevent.domains or tuple(d for d in trained_on_the_way(stage, earlier) if d not in stage.domains)


def way(last: str, stages: Sequence[Stage]) -> list[Stage]:
    """The stages that led to the end of stage `last`, this one included, first ones first."""
    by_name = {s.name: s for s in stages}
    found: list[Stage] = []
    while last in by_name:
        found.append(by_name[last])
        last = by_name[last].start
    return found[::-1]


def trained_on_the_way(stage: Stage, earlier: Sequence[Stage]) -> tuple[str, ...]:
    """Domains trained by the stages that led to a stage's start, first ones first."""
    return tuple(dict.fromkeys(d for s in way(stage.start, earlier) if s.kind == "grpo" for d in s.domains))


def peak(domain: str, start: str, earlier: Sequence[Stage]) -> Stage | None:
    """The last stage that trained a domain alone among those that led to `start` (whose end is θ*), if there is one."""
    own = [s for s in way(start, earlier) if s.kind == "grpo" and s.domains == (domain,)]
    return own[-1] if own else None


def _check(stage: Stage, earlier: list[Stage]) -> None:
    """Refuses a stage whose own needs the stages before it do not meet."""
    name, prevent = stage.name, stage.train.prevent
    for domain in stage.keeps:
        if peak(domain, stage.start, earlier) is None:
            raise UserError(
                f"stage {name} is to keep {domain}, which no stage on the way to {stage.start} trained alone"
            )
    if prevent.replay and stage.keeps:
        prompts = stage.train.prompts_per_step
        each = prompts * prevent.replay / len(stage.keeps)
        rest = prompts - round(each) * len(stage.keeps)
        if round(each) < 1 or rest < 1:
            raise UserError(
                f"stage {name}: replay={prevent.replay} of {prompts} prompts is {each:.2g} for each "
                f"of {len(stage.keeps)} domains; at least 1 each, and 1 for the stage's own"
            )
    if stage.prefix in METHODS and stage.prefix != "kl" and not stage.keeps:
        raise UserError(f"stage {name} keeps nothing: no domain was trained on the way to its start {stage.start!r}")
    for domain in (*stage.domains, stage.donor) if stage.kind == "rollback" else ():
        if peak(domain, stage.start, earlier) is None:
            raise UserError(f"stage {name}: no stage on the way to its start {stage.start!r} trained {domain} alone")
    if stage.kind in ("plan", "trials", "recover") and not trained_on_the_way(stage, earlier):
        raise UserError(f"stage {name}: no domain was trained on the way to its start {stage.start!r}")
    needs = {"recover": "plan", "trials": "plan"}.get(stage.kind)
    if needs and not any(s.kind == needs and s.start == stage.start for s in earlier):
        raise UserError(f"stage {name} follows a plan for {stage.start!r}; put the stage plan before it")
    if stage.kind in ("merge", "orders"):
        missing = [d for d in stage.domains if not any(s.name == f"solo-{d}" for s in earlier)]
        if missing:
            raise UserError(
                f"stage {name} works on solo edits; missing before it: {', '.join(f'solo-{d}' for d in missing)}"
            )
