"""A stage `rollback-A-B`: takes part of B's edit back from θ_T, to win A back without training (definitions §9).

Its record, `recovery/rollback-A-B.json`, holds every point of the sweep, the chosen one and the controls; what was
taken off is kept beside it, sparse where that is smaller, so that a stage that is started again makes its parameters
from there. Without the record all is done anew, from samples that are kept.
"""

import functools
import io
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

from mdrl_jax import evaluate, records
from mdrl_jax.analysis.probe import Probe
from mdrl_jax.checkpoints import abstract
from mdrl_jax.errors import UserError
from mdrl_jax.parallel.tree_programs import difference
from mdrl_jax.progress import Track
from mdrl_jax.recovery.rollback import evidence, sparse
from mdrl_jax.recovery.rollback.comparison import compare
from mdrl_jax.recovery.rollback.evidence import NOW, Ends, kept_sample
from mdrl_jax.recovery.rollback.rules import SCORES, masked, taken_back
from mdrl_jax.recovery.rollback.selection import size, support
from mdrl_jax.recovery.rollback.sweep import ALL, ROUTE, Trial, choose, sweep
from mdrl_jax.runtime import Runtime
from mdrl_jax.stage import Stage
from mdrl_jax.stats.estimate import figure_text


def check(runtime: Runtime) -> None:
    """Refuses rules that nothing scores by, before anything runs.

    Raises:
      UserError: naming the rule.
    """
    for rule in runtime.config.recover.rules:
        if rule not in SCORES:
            raise UserError(f"recover.rules names {rule!r}; known: {', '.join(SCORES)}")


def run(
    runtime: Runtime,
    stage: Stage,
    peak: Stage,
    donor: Stage,
    params: Callable[[str], Any],
    probe: Probe,
    folder: Path,
    track: Track,
) -> Any:
    """The rolled-back parameters; sweeps first, and writes `folder`/recovery, unless that was done.

    Args:
      stage: the rollback.
      peak, donor: the stages that trained A and B last on the way to its start (`stage.peak`).
      params: stage name -> parameters at its end; "base" too.
      track: shows how far each part of it is.
    """
    file = folder / "recovery" / f"{stage.name}.json"
    if file.exists():
        return remade(runtime, params(stage.start), file)
    clock, seconds = time.monotonic(), {}

    def lap(name: str) -> None:
        nonlocal clock
        seconds[name], clock = time.monotonic() - clock, time.monotonic()

    domain = stage.domains[0]
    # Of the checkpoints that edits are between, none stays on the devices; of A's own edit nothing after the evidence.
    own_edit, edit = (difference(params(s.name), params(s.start)) for s in (peak, donor))
    held = {name: params(name) for name in (peak.name, stage.start)}
    now = held[stage.start]
    sample = functools.partial(kept_sample, runtime, folder, params=held.__getitem__)
    names = {evidence.PEAK: peak.name, NOW: stage.start}
    ends = Ends(now, held[peak.name], edit, own_edit)
    trial, found = _trial(runtime, stage, probe, ends, lambda point, d: sample(names[point], d), track)
    del ends, own_edit
    lap("evidence")
    before = trial.validation(now, (domain, stage.donor))
    tried = sweep(trial, before)
    point, others = choose(trial, tried)
    lap("sweep")
    compared = compare(trial, before, point, held[peak.name]) if point else {}
    lap("controls")
    head = {
        "stage": stage.name,
        "domain": domain,
        "donor": stage.donor,
        "start": stage.start,
        "peak": peak.name,
        "edit": donor.name,
        "limit": trial.settings.limit,
        "prompts": {d: len(x) for d, x in before.items()},
        "coordinates": trial.n,
    }
    chosen = point and point.record() | {"others": others}
    taken = trial.chosen_mask(point) if point else jax.tree.map(np.zeros_like, support(edit))
    _save(file.with_suffix(".npz"), masked(edit, taken))
    records.write_json(
        file, head | found | {"points": [p.record() for p in tried], "chosen": chosen} | compared | {"seconds": seconds}
    )
    return remade(runtime, now, file)


def remade(runtime: Runtime, now: Any, file: Path) -> Any:
    """θ_T with the recorded edit taken back at the recorded strength; θ_T itself where nothing was chosen."""
    chosen = records.read_json(file)["chosen"]
    if chosen is None:
        return now
    with np.load(file.with_suffix(".npz")) as stored:
        edit = sparse.expand(stored, abstract(runtime.shapes, runtime.shardings))
    return taken_back(now, edit, support(edit), np.float32(chosen["strength"]))


def summary(record: dict[str, Any]) -> str:
    """One line for the terminal."""
    name, chosen = f"{record['stage']}: ", record["chosen"]
    if chosen is None:
        return f"{name}no set within the limit of {record['limit']:g} points gains anything; nothing was taken back"
    gain, loss = (record["test"][k] for k in ("gain", "loss"))
    shown = figure_text(gain["estimate"], gain["ci95"], "+.1f")
    return (
        f"{name}{chosen['size']} of {record['coordinates']} coordinates ({chosen['rule']}, {chosen['place']}, strength "
        f"{chosen['strength']:g}): {record['domain']} {shown}, "
        f"{record['donor']} {-loss['estimate']:+.1f} on test prompts"
    )


def _trial(
    runtime: Runtime, stage: Stage, probe: Probe, ends: Ends, sample: Callable[[str, str], Any], track: Track
) -> tuple[Trial, dict[str, Any]]:
    """What the sweep needs, and a record of the evidence; rules whose evidence is not measurable are left out."""
    domain, settings = stage.domains[0], runtime.config.recover
    scores, found = {}, {}
    with track(f"{stage.name}: evidence", 1 + len(settings.rules)) as show:
        show(0, "shared route")
        both = [sample(evidence.PEAK, d) for d in (domain, stage.donor)]
        route, size_of_route = evidence.shared_route(probe, ends.peak, *both)
        places = {ROUTE: support(ends.edit, route), ALL: support(ends.edit)}
        sizes = {name: size(mask) for name, mask in places.items()}
        for done, rule in enumerate(settings.rules, 1):
            show(done, f"scores of {rule}")
            try:
                scores[rule], found[rule] = evidence.scores(probe, rule, ends, lambda point: sample(point, domain))
            except ValueError as e:
                found[rule] = {"left_out": str(e)}
    trial = Trial(
        domain=domain,
        donor=stage.donor,
        others=tuple(d for d in runtime.config.scored_domains if d not in (domain, stage.donor)),
        now=ends.now,
        edit=ends.edit,
        places={name: mask for name, mask in places.items() if sizes[name]},
        scores=scores,
        n=sum(x.size for x in jax.tree.leaves(ends.edit)),
        settings=settings,
        validation=functools.partial(evaluate.validation_rewards, runtime),
        held_out=functools.partial(evaluate.held_out_rewards, runtime),
        track=lambda part, total: track(f"{stage.name}: {part}", total),
    )
    return trial, {"evidence": found, "route": size_of_route, "changed": sizes}


def _save(file: Path, edit: Any) -> None:
    buffer = io.BytesIO()
    arrays: dict[str, Any] = sparse.compress(edit)
    np.savez_compressed(buffer, **arrays)
    records.write_bytes(file, buffer.getvalue())
