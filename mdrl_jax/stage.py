"""Turns the stage names of a config into stages: what each stage does and which parameters it starts from.

A config lists stage names in the order in which they run, e.g. `stages = ("code", "math", "refresh-code")`. In the
table, D, A and B are domains.

| name | what the stage does |
|---|---|
| `code`, `math`, ... (a domain) | GRPO on that domain, from the previous stage |
| `refresh-D` | GRPO on D again, until D's score is back near its peak (definitions §8) |
| `distill-D` | samples on D's prompts and pulls each token to what D's peak, the teacher, says (definitions §10) |
| `distill-all` | the same on the prompts of all scored domains with a peak (without any, of all scored domains); each
prompt has its own domain's teacher |
| `alternate-A-B` | a refresh of A and B in turns of a few steps (`train.turn`), until both are near their peaks (§8) |
| `rollback-A-B` | no training: subtracts part of B's edit on the conflict set of A, to restore A (definitions §9) |
| `placebo-D` | GRPO on D at learning rate 0: a control, which must not change any score (definitions §2) |
| `joint` | GRPO on all scored domains, with equally many prompts of each in every step |
| `sft-D` | supervised training on D's demonstrations, from the previous stage |
| `sft` | supervised training on several domains, with evenly many demonstrations of each in every step: those of
`sft.domains`, by default all scored domains except data sets without a `reply` |
| `pretrain` | as `sft`, but procedural domains show the problems that a base model may see (`Domain.pretraining`) |
| `solo-D` | GRPO on D from θ_0 |
| `again-D` | as `solo-D`, with other prompts and sampling keys: what do two trainings of one domain share? With the
`start` of stage D: does its effect come again? |
| `reversed-D` | GRPO on D from the previous `reversed-` stage, or from θ_0: for another order of domains |
| `protect-D`, `ewc-D`, `agem-D`, `pcgrad-D`, `mgs-D`, `replay-D`, `kl-D` | stage D again with the same prompts and
sampling keys, while this method (`config.METHODS`) protects the domains trained before; from the previous stage with
the same prefix, or else from where stage D starts |
| `average`, `arithmetic`, `ties`, `ram`, `dare` | no training: merges the solo edits of all scored domains (§10) |
| `analyze` | makes no parameters: runs the interference analysis of the stages before it (definitions §3 to §7) |
| `plan` | makes no parameters: forecasts and ranks refreshes and rollbacks (definitions §10) |
| `recover` | carries out the action that the plan picks: a refresh, a rollback or nothing |
| `trials` | makes no parameters: tries every action of the plan on validation prompts, to check the forecasts |
| `orders` | makes no parameters: forecasts, from the solo edits, the damage in every order of the domains |
| `locality-A` | makes no parameters: how well one expansion at A's peak predicts A's damage by each edit from there |
| `circuits-D` | makes no parameters: circuits on D of θ_0 and of every stage that trained D alone from there (§11) |
| any name of a training stage or a rollback, `@` and a label, e.g. `qa@slow` | the same stage once more, with settings
of its own |

"The previous stage" is the last one before it in the sequence, which consists of the domains, `refresh-`, `placebo-`,
`joint`, `sft-`, `sft`, `pretrain` and `recover`. `distill-`, `alternate-`, `rollback-`, `plan`, `trials` and `recover`
start from the last plain domain stage instead. Stages outside the sequence are side branches: no other kind of stage
starts from one unless the config's field `start` names it. A stage with a label is always a side branch; it has the
default start of the stage without the label and draws the same prompts and sampling keys, so a run warns if nothing
else differs. Preventions and `reversed-` stages with one label form a chain of their own: `mgs-cw@layer` starts from
`mgs-qa@layer`. A supervised stage that `start` takes elsewhere than to the previous stage is a side branch too. Only
GRPO gives a domain its peak: a supervised stage does not.

θ_0 is the model that the first GRPO stage of the sequence starts from (definitions §1): the end of the last of the
supervised stages that the sequence begins with, which are its *warm-up*, or else the model that the run loads. That
loaded model is always called "base". Solo stages, the reversed order and merges start from θ_0.
"""

import dataclasses
import itertools
import re
from collections.abc import Collection, Mapping, Sequence

from mdrl_jax.config import METHODS, Config, SFTSection, TrainSection, is_supervised, sft_config, stage_config
from mdrl_jax.domains.presets import completed
from mdrl_jax.errors import UserError

ALL_DOMAINS = {  # name -> kind of the stages that concern all scored domains
    "joint": "grpo",
    "pretrain": "sft",
    "sft": "sft",
    "analyze": "analyze",
    "average": "merge",
    "arithmetic": "merge",
    "ties": "merge",
    "ram": "merge",
    "dare": "merge",
    "plan": "plan",
    "trials": "trials",
    "orders": "orders",
    "recover": "recover",
}
# Kinds of stages that write records but make no parameters.
RECORDS = ("analyze", "plan", "trials", "orders", "locality", "circuits")
PREFIXES = ("refresh", "distill", "alternate", "solo", "again", "placebo", "reversed", "sft", "locality", "circuits")
PREFIXES += tuple(METHODS)
OWN = ("reversed", "solo", "again", *METHODS)  # prefixes of stages that end at a domain's peak, like the plain one
SEQUENCE = ("", "refresh", "placebo", "sft")  # prefixes of stages that the next stage starts from; "" is no prefix


@dataclasses.dataclass(frozen=True)
class Stage:
    """One stage of a run.

    Attributes:
      name: name in the config's `stages`; unique within a run.
      index: position in the run, from 1; index 0 is the base model.
      kind: "grpo", "sft", "rollback", "merge", "recover" or one of `RECORDS`.
      domains: the domains that the stage trains, merges or records; of a rollback, the one domain that it restores.
      start: name of the stage whose final parameters this one starts from, or "base"; of a merge or `orders`, that of
        θ_0.
      train: the settings of a GRPO stage, with its overrides applied.
      stream: prompts and sampling keys are drawn under this name; stages to be compared share it.
      reference: name of the stage whose final parameters are the KL's reference policy, or "base".
      keeps: earlier domains that the stage protects from damage (`PreventSection`).
      donor: of a rollback, the domain whose edit is subtracted; "" for every other kind.
      sft: the settings of a supervised stage, with its overrides applied.
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
    sft: SFTSection = SFTSection()

    @property
    def settings(self) -> TrainSection | SFTSection:
        """The settings that the stage trains with: `sft` of a supervised stage, `train` of any other."""
        return self.sft if self.kind == "sft" else self.train

    @property
    def folder(self) -> str:
        """`NN-stage`, e.g. `02-math`: the name of the stage's checkpoint folder and of its record files."""
        return f"{self.index:02d}-{self.name}"

    @property
    def prefix(self) -> str:
        """The text of the name before its first `-`: `refresh` for `refresh-math`; "" for `math` or `qa@slow`."""
        plain = unlabelled(self.name)
        return plain.partition("-")[0] if "-" in plain else ""

    @property
    def recovers(self) -> bool:
        """Whether the stage trains until its domains are back near their peaks, and keeps its best step."""
        return self.prefix in ("refresh", "distill", "alternate")

    @property
    def taught(self) -> bool:
        """Whether the stage asks a teacher."""
        return self.prefix == "distill" and self.train.distill.form != "fixed"

    @property
    def trains(self) -> bool:
        """Whether the stage takes optimizer steps."""
        return self.kind in ("grpo", "sft")

    @property
    def scored(self) -> bool:
        """Whether the stage makes parameters; these are saved and scored."""
        return self.kind not in RECORDS


def resolve_stages(config: Config, known_domains: tuple[str, ...]) -> tuple[Stage, ...]:
    """The stages of a run in the order in which they run.

    Args:
      config: the whole configuration, parsed; its `stages`, `scored_domains` and training settings are used.
      known_domains: names of all domains that exist.

    Returns:
      One `Stage` for each name in `config.stages`.

    Raises:
      UserError: if a name is no valid stage name; if a domain is unknown or not scored; if `start`, `reference`,
        `target` or `distill.teacher` names a stage that makes no parameters; if a stage lacks a domain or an earlier
        stage that it needs (a refresh an earlier training of its domain; a kept domain, a domain of a distillation, an
        alternating refresh or a rollback a stage on the way that trained it alone); if a stage is to keep a domain that
        it trains; if a stage with EWC, A-GEM, PCGrad, MGS or `protect` has no domain to keep; if a stage with a target
        trains several domains or is a refresh or a distillation; if one of these has `random_signs`; if a distillation
        has replay or a KL of its own; if no domain of a supervised stage can have demonstrations, or `sft.domains` is
        not valid; if solo edits that are merged or compared start from several models; or if the prompts of a step
        cannot be shared out among the stage's domains and the replayed ones.
    """
    for domain in config.scored_domains:
        if domain not in known_domains:
            raise UserError(
                f"scored_domains names {domain!r}, which is not a domain; known: {', '.join(known_domains)}"
            )
    stages: list[Stage] = []
    for index, name in enumerate(config.stages, 1):
        stages.append(_stage(config, known_domains, stages, index, name))
    return tuple(stages)


def _stage(config: Config, known: tuple[str, ...], earlier: list[Stage], index: int, name: str) -> Stage:
    train, plain = stage_config(config, name), unlabelled(name)
    prefix, _, rest = plain.partition("-")
    kind, domains, donor, stream = "grpo", (rest or plain,), "", plain
    if plain in ALL_DOMAINS:
        kind, domains, prefix = ALL_DOMAINS[plain], config.scored_domains, ""
        domains = _demonstrated(config, name) if kind == "sft" else domains
    elif prefix == "rollback":
        kept, _, donor = rest.partition("-")
        kind, domains = "rollback", (kept, donor)
    elif prefix == "alternate":
        first, _, second = rest.partition("-")
        domains = (first, second)
    elif plain == "distill-all":
        domains = config.scored_domains
    elif not rest:
        prefix = ""
    elif prefix not in PREFIXES:
        domains = (plain,)
    if prefix == "placebo":
        train = dataclasses.replace(train, learning_rate=0.0)
    if prefix in ("sft", "locality", "circuits"):
        kind = prefix
    if prefix in METHODS:
        stream = rest
    for domain in domains:
        if domain not in known:
            raise UserError(
                f"stage {name!r} is not a valid stage name; valid are a domain ({', '.join(known)}), a prefix and a "
                f"domain (prefixes: {', '.join(f'{p}-' for p in PREFIXES)}), alternate-A-B or rollback-A-B with "
                f"two domains A and B, one of {', '.join(ALL_DOMAINS)}, or one of these that trains or rolls back, "
                "with @ and a label"
            )
        if domain not in config.scored_domains:
            raise UserError(f"stage {name!r} uses domain {domain}, which is not in scored_domains; add it there")
    once_more = kind in ("grpo", "sft", "rollback")
    if labelled(name) and not (once_more and re.fullmatch(r"@[\w.]+", name.removeprefix(plain))):
        raise UserError(
            f"stage {name!r} is not a valid stage name: only a stage that trains, or a rollback, has a label, which "
            "is @ and then letters, digits, underscores and dots"
        )
    if kind == "rollback":
        domains = domains[:1]
    branch = [s for s in earlier if s.prefix == prefix and _label(s.name) == _label(name)]
    sft = sft_config(config, name)
    if prefix == "sft" and sft.domains != config.sft.domains:
        raise UserError(f"stage {name} trains {domains[0]} alone; remove its domains={sft.domains!r}")
    chosen = sft.start if kind == "sft" else train.start
    start = chosen or default_start(name, {s.name: s.start for s in earlier}, known)
    reference = train.reference or (branch[0].reference if prefix == "kl" and branch else start)
    if kind == "sft":
        reference = start
    if plain == "distill-all":
        domains = tuple(d for d in domains if peak(d, start, earlier)) or domains
    if kind == "grpo" and prefix != "alternate" and train.prompts_per_step % len(domains):
        raise UserError(
            f"stage {name}: prompts_per_step={train.prompts_per_step} is not divisible by its {len(domains)} domains"
        )
    stage = Stage(name, index, kind, domains, start, train, stream, reference, (), donor, sft)
    stage = dataclasses.replace(stage, keeps=_keeps(stage, earlier))
    _check(stage, earlier)
    if kind == "circuits" and not alone_from_origin(rest, earlier, known):
        raise UserError(
            f"stage {name}: no earlier stage trains {rest} alone from the model that the sequence starts from; add "
            f"solo-{rest} or sft-{rest}, or both to compare them"
        )
    return stage


def _demonstrated(config: Config, name: str) -> tuple[str, ...]:
    """The domains of a stage `sft` or `pretrain`. A data set without a `reply` has no demonstrations."""
    chosen, scored = sft_config(config, name).domains, config.scored_domains
    for i, domain in enumerate(chosen):
        if domain not in scored or domain in chosen[:i]:
            why = "which is listed twice" if domain in scored else f"which is not in scored_domains={scored!r}"
            raise UserError(f"stage {name}: sft.domains names {domain!r}, {why}")
    if chosen:
        return chosen
    silent = {d for d, source in config.domains.sources.items() if not completed(source, f"domains.{d}").reply}
    found = tuple(d for d in scored if d not in silent)
    if not found:
        raise UserError(
            f"stage {name}: no scored domain has demonstrations; set domains.{scored[0]}.reply to a template of the "
            "reply, such as '{answer}'"
        )
    return found


def default_start(name: str, starts: Mapping[str, str], domains: Collection[str]) -> str:
    """The stage that a stage starts from if the config's field `start` names none; the module docstring has the rules.

    A stage with the prefix of a method, such as `protect-D`, starts from the previous stage if there is neither an
    earlier stage with its prefix nor an earlier stage D.

    Args:
      name: name of the stage; that it is a valid one is not checked.
      starts: name of each earlier stage -> name of the stage that it starts from, in the order in which they run.
      domains: names of the domains.

    Returns:
      The name of one of the earlier stages, or "base".
    """
    same = [s for s in starts if _label(s) == _label(name)]
    name = unlabelled(name)
    prefix, rest = _parts(name, domains)
    branch = [s for s in same if _parts(unlabelled(s), domains)[0] == prefix]
    before = _sequence(starts, domains)
    if prefix in ("solo", "again") or (prefix == "reversed" and not branch):
        return origin(starts, domains)
    if ALL_DOMAINS.get(name) in ("merge", "orders"):
        return origin(starts, domains)
    if prefix == "reversed" or (prefix in METHODS and branch):
        return branch[-1]
    if prefix in METHODS and rest in starts:
        return starts[rest]
    if prefix in ("distill", "alternate", "rollback") or name in ("plan", "trials", "recover"):
        before = [s for s in before if s in domains]
    return before[-1] if before else "base"


def origin(starts: Mapping[str, str], domains: Collection[str]) -> str:
    """The name of θ_0: of the last stage of the warm-up, or "base" if the sequence does not begin with one.

    Args:
      starts: name of each stage -> name of the stage that it starts from, in the order in which they run.
      domains: names of the domains.
    """
    return (warm_up(starts, domains) or ["base"])[-1]


def warm_up(starts: Mapping[str, str], domains: Collection[str]) -> list[str]:
    """The supervised stages that the sequence begins with, in order; the arguments are those of `origin`."""
    return list(itertools.takewhile(is_supervised, _sequence(starts, domains)))


def unlabelled(name: str) -> str:
    """The name of a stage without its label: `qa` for `qa@slow`, and `qa` for `qa`."""
    return name.partition("@")[0]


def labelled(name: str) -> bool:
    """Whether the name of a stage has a label, as `qa@slow` has."""
    return "@" in name


def _label(name: str) -> str:
    return name.partition("@")[2]


def repeated(stages: Sequence[Stage]) -> list[str]:
    """Says for each stage with a label that it will end with the parameters of an earlier stage, if it will.

    It will if the two have the same start, settings, prompts and sampling keys.

    Args:
      stages: the stages of a run, in order.

    Returns:
      One line for each such stage.
    """

    def told(stage: Stage) -> Stage:
        """The stage without its name and place, and with the start and reference that it has where none is named."""
        train = dataclasses.replace(stage.train, start=stage.start, reference=stage.reference)
        sft = dataclasses.replace(stage.sft, start=stage.start)
        return dataclasses.replace(stage, name="", index=0, train=train, sft=sft)

    lines = []
    for i, stage in enumerate(stages):
        twin = next((s.name for s in stages[:i] if labelled(stage.name) and told(s) == told(stage)), "")
        if twin:
            plain = stage.kind == "grpo" and not stage.prefix
            draws = f"; again-{stage.domains[0]} with start={stage.start!r} draws other ones" if plain else ""
            lines.append(
                f"stage {stage.name} will end with the parameters of stage {twin}: it has the same start, settings, "
                f"prompts and sampling keys{draws}"
            )
    return lines


def _parts(name: str, domains: Collection[str]) -> tuple[str, str]:
    """The prefix of a stage's name and the rest; the prefix of a domain or of a name without `-` is ""."""
    prefix, dash, rest = name.partition("-")
    return (prefix, rest) if dash and name not in domains else ("", name)


def _sequence(starts: Mapping[str, str], domains: Collection[str]) -> list[str]:
    """The stages of the sequence, in order; the arguments are those of `default_start`."""
    found: list[str] = []
    for name, start in starts.items():
        aside = is_supervised(name) and start != (found[-1] if found else "base")
        trains = ALL_DOMAINS.get(name, "grpo") in ("grpo", "sft", "recover")
        if not labelled(name) and _parts(name, domains)[0] in SEQUENCE and trains and not aside:
            found.append(name)
    return found


def _keeps(stage: Stage, earlier: list[Stage]) -> tuple[str, ...]:
    prevent = stage.train.prevent
    if stage.kind == "sft" or not (prevent.replay or prevent.transforms):
        return ()
    return prevent.domains or tuple(d for d in trained_on_the_way(stage, earlier) if d not in stage.domains)


def way(last: str, stages: Sequence[Stage]) -> list[Stage]:
    """The chain of stages from the base model to the end of a stage: each one starts from the one before it.

    Args:
      last: name of the last stage of the chain, or "base".
      stages: stages of the run, in which names are looked up.

    Returns:
      The stages, earliest first, with stage `last` at the end; empty for "base" or a name that is not in `stages`. A
      stage whose own start is not in `stages` is the first of the chain.
    """
    by_name = {s.name: s for s in stages}
    return [by_name[name] for name in names_on_the_way(last, {s.name: s.start for s in stages})]


def names_on_the_way(last: str, starts: Mapping[str, str]) -> list[str]:
    """The names of the stages of `way`.

    Args:
      last: name of the last stage of the chain, or "base".
      starts: name of each stage -> name of the stage that it starts from, or "base".

    Returns:
      The names, earliest first, with `last` at the end; empty for "base" or a name that is not in `starts`. A stage
      whose own start is not in `starts` is the first of the chain. No name is repeated, also if the starts form a
      circle.
    """
    found: list[str] = []
    while last in starts and last not in found:  # a damaged record may name itself
        found.append(last)
        last = starts[last]
    return found[::-1]


def trained_on_the_way(stage: Stage, earlier: Sequence[Stage]) -> tuple[str, ...]:
    """Names of the domains that GRPO trained on the way from the base model to a stage's start.

    Every stage of kind "grpo" counts except a placebo, which changes nothing. A `recover` stage is of another kind.

    Args:
      stage: the stage; what it trains itself does not count.
      earlier: stages of the run, at least those on the way.

    Returns:
      Each domain once, in the order in which it was first trained, alone or with others.
    """
    trained = [s for s in way(stage.start, earlier) if s.kind == "grpo" and s.prefix != "placebo"]
    return tuple(dict.fromkeys(d for s in trained for d in s.domains))


def peak(domain: str, start: str, earlier: Sequence[Stage]) -> Stage | None:
    """The stage that ends at the domain's peak θ*: the last own stage of the domain on the way to `start` (`is_own`).

    Args:
      domain: name of the domain.
      start: name of the stage at whose end the way stops, or "base". This stage is part of the way.
      earlier: stages of the run, in which `start` and the stages before it are looked up.

    Returns:
      The stage, or None if there is no own stage of the domain on the way.
    """
    own = [s for s in way(start, earlier) if is_own(s.name, domain)]
    return own[-1] if own else None


def is_own(stage: str, domain: str) -> bool:
    """Whether a stage trains this domain alone by GRPO and is neither a recovery nor a placebo.

    Args:
      stage: name of the stage: a plain one, one of another order, a solo stage, a second training (`again-`) or one
        with a prevention, each also with a label.
      domain: name of the domain.
    """
    name = unlabelled(stage)
    return name == domain or any(name == f"{prefix}-{domain}" for prefix in OWN)


def teachers(stage: Stage, earlier: Sequence[Stage]) -> dict[str, str]:
    """The stages whose final parameters teach a distillation: name of each of its domains -> name of the stage.

    Args:
      stage: a stage `distill-`.
      earlier: stages of the run, at least those on the way to its start.

    Returns:
      For each domain `distill.teacher`, or else its peak; a domain without a peak is left out. Empty for the form
      "fixed", which has no teacher.
    """
    if not stage.taught:
        return {}
    found = {d: peak(d, stage.start, earlier) for d in stage.domains}
    named = {d: stage.train.distill.teacher or (at.name if at else "") for d, at in found.items()}
    return {d: name for d, name in named.items() if name}


def orders_trained(stage: Stage, earlier: Sequence[Stage]) -> list[list[Stage]]:
    """The orders in which earlier stages trained all domains of a stage, each alone and once, from where it starts.

    Plain stages count, those of the reversed order, and both with a label. Stages with a prevention do not, nor do
    refreshes, which train a domain again.

    Args:
      stage: a stage `orders`; it starts from θ_0.
      earlier: stages of the run.

    Returns:
      For each order the stages that trained it, the first one starting from θ_0; of several stages that end the same
      order the first one counts.
    """
    found: dict[tuple[str, ...], list[Stage]] = {}
    for last in earlier:
        chain = way(last.name, earlier)
        names = [s.name for s in chain]
        chain = chain[names.index(stage.start) + 1 :] if stage.start in names else chain
        plain = all(
            s.kind == "grpo" and len(s.domains) == 1 and s.prefix in ("", "reversed") and not s.keeps for s in chain
        )
        order = tuple(s.domains[0] for s in chain) if plain else ()
        if sorted(order) == sorted(stage.domains):
            found.setdefault(order, chain)
    return list(found.values())


def from_the_peak(domain: str, stages: Sequence[Stage]) -> list[Stage]:
    """The stages that train something else from the end of the stage that is named after a domain, in order.

    Args:
      domain: name of the domain.
      stages: stages of the run.

    Returns:
      The training stages whose start is the stage `domain` and that do not train this domain alone.
    """
    return [s for s in stages if s.trains and s.start == domain and s.domains != (domain,)]


def alone_from_origin(domain: str, stages: Sequence[Stage], domains: Collection[str]) -> list[Stage]:
    """The stages that trained one domain alone from θ_0, by GRPO or supervised, in order.

    Args:
      domain: name of the domain.
      stages: stages of the run.
      domains: names of all domains.

    Returns:
      The stages, also those with a label; no placebo, no distillation, and no stage of the warm-up.
    """
    starts = {s.name: s.start for s in stages if s.scored}
    warm, base = warm_up(starts, domains), origin(starts, domains)
    own = [s for s in stages if s.trains and s.domains == (domain,) and s.start == base and s.name not in warm]
    return [s for s in own if s.prefix not in ("placebo", "distill")]


def _check_distill(stage: Stage, earlier: list[Stage]) -> None:
    """Refuses a distillation without a teacher, or with what would need another use of the reference policy."""
    name, train = stage.name, stage.train
    if train.prevent.replay:
        raise UserError(
            f"stage {name}: a distillation has no prompts without a teacher; remove its prevent.replay, and use "
            "distill-all for the prompts of all domains"
        )
    if train.grpo.kl_coef > 0 or train.kl_every > 0:
        raise UserError(
            f"stage {name}: a distillation has no other KL than that to its teacher; set kl_coef=0, kl_every=0"
        )
    if train.distill.teacher and any(s.name == train.distill.teacher and not s.scored for s in earlier):
        raise UserError(
            f"stage {name}: distill.teacher={train.distill.teacher!r} makes no parameters; name a stage that does, or "
            "'base'"
        )
    untaught = [d for d in stage.domains if d not in teachers(stage, earlier)]
    if stage.taught and untaught:
        raise UserError(
            f"stage {name}: no stage on the way to its start {stage.start!r} trained {', '.join(untaught)} alone, so "
            "there is no teacher; name one with distill.teacher"
        )


def _check(stage: Stage, earlier: list[Stage]) -> None:
    """Refuses a stage that needs domains or stages which the stages before it do not provide."""
    name, prevent = stage.name, stage.train.prevent
    without = {s.name for s in earlier if not s.scored}
    target = stage.settings.target if stage.trains else ""
    for field, value in (("start", stage.start), ("reference", stage.reference), ("target", target)):
        if value in without:
            instead = "name a stage that does" + (", or 'base'" if field != "target" else "")
            raise UserError(f"stage {name}: {field}={value!r} makes no parameters; {instead}")
    if stage.kind == "locality" and not from_the_peak(stage.domains[0], earlier):
        domain = stage.domains[0]
        raise UserError(
            f"stage {name}: no earlier stage trains another domain from the end of stage {domain}; add one, such as a "
            f"domain with the start {domain!r}"
        )
    what = "a distillation" if stage.prefix == "distill" else "a refresh"
    if stage.prefix == "refresh" and not any(stage.domains[0] in s.domains for s in way(stage.start, earlier)):
        raise UserError(f"stage {name}: no stage on the way to its start {stage.start!r} trained {stage.domains[0]}")
    if target and stage.recovers:
        raise UserError(f"stage {name}: {what} ends by its own rule; remove its target={target!r}")
    if stage.recovers and stage.train.random_signs:
        raise UserError(f"stage {name}: {what} keeps its best step; remove its random_signs=True")
    if stage.prefix == "distill":
        _check_distill(stage, earlier)
    if target and len(stage.domains) > 1:
        raise UserError(f"stage {name}: only a stage of one domain has a target; remove its target={target!r}")
    for domain in stage.keeps:
        if domain in stage.domains:
            raise UserError(f"stage {name}: prevent.domains names {domain}, which the stage itself trains; remove it")
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
                f"of {len(stage.keeps)} domains; each needs at least 1, and the stage's own domain at least 1"
            )
    if stage.prefix in METHODS and stage.prefix != "kl" and not stage.keeps:
        raise UserError(f"stage {name} keeps nothing: no domain was trained on the way to its start {stage.start!r}")
    if stage.kind == "grpo" and prevent.transforms and not stage.keeps:
        raise UserError(
            f"stage {name} keeps nothing: no domain was trained on the way to its start {stage.start!r}; set its "
            "prevent by stage_overrides of later stages only"
        )
    if stage.prefix == "alternate" and len(set(stage.domains)) < 2:
        raise UserError(f"stage {name} takes turns of one domain; name two different ones")
    needed = stage.domains if stage.prefix == "alternate" else (*stage.domains, stage.donor)
    for domain in needed if stage.kind == "rollback" or stage.prefix == "alternate" else ():
        if peak(domain, stage.start, earlier) is None:
            raise UserError(f"stage {name}: no stage on the way to its start {stage.start!r} trained {domain} alone")
    if stage.kind in ("plan", "trials", "recover") and not trained_on_the_way(stage, earlier):
        raise UserError(f"stage {name}: no domain was trained on the way to its start {stage.start!r}")
    needs = {"recover": "plan", "trials": "plan"}.get(stage.kind)
    if needs and not any(s.kind == needs and s.start == stage.start for s in earlier):
        raise UserError(f"stage {name} needs a plan made at {stage.start!r}; put the stage plan before it")
    if stage.kind == "orders" and len(stage.domains) < 2:
        only = ", ".join(stage.domains)
        raise UserError(f"stage {name} compares orders of domains, but scored_domains has only {only}")
    if stage.kind in ("merge", "orders"):
        missing = [d for d in stage.domains if not any(s.name == f"solo-{d}" for s in earlier)]
        if missing:
            raise UserError(
                f"stage {name} needs the solo edit of every scored domain; add before it: "
                f"{', '.join(f'solo-{d}' for d in missing)}"
            )
        for solo in (s for s in earlier if s.name in {f"solo-{d}" for d in stage.domains}):
            if solo.start != stage.start:
                raise UserError(
                    f"stage {name} takes edits from {stage.start!r}, but {solo.name} starts from {solo.start!r}; "
                    "let both start from one model"
                )
