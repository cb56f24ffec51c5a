"""The stage `rollback-A-B`: subtracts part of B's edit from θ_T to restore domain A without training (definitions §9).

    θ' = θ_T − β · m ⊙ δ_B

A sweep on validation prompts chooses the coordinate set m and the strength β. `recovery/rollback/` holds the method:
evidence, scores of coordinates, sweep and controls.

The record `recovery/rollback-A-B.json` holds every point of the sweep, the chosen point and the controls. The edit
m ⊙ δ_B is saved beside it as `.npz`, in sparse form if that is smaller. If the record exists when the stage starts, the
parameters are made from these two files. Otherwise the sweep runs from its beginning, but reuses the saved samples.
"""

import dataclasses
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
from mdrl_jax.recovery.spent import metered
from mdrl_jax.runtime import Runtime
from mdrl_jax.stage import Stage
from mdrl_jax.stats.estimate import figure_text


def check(runtime: Runtime) -> None:
    """Refuses unknown names in `recover.rules` before anything runs.

    Args:
      runtime: its configuration is read.

    Raises:
      UserError: if a rule is not known; the message names it.
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
    """Makes the rolled-back parameters; runs the sweep and writes its record first, unless the record exists.

    The sweep writes the JSON record and the edit, and keeps sampled completions (`evidence.kept_sample`).

    Args:
      runtime: model, prompts, rewards and configuration of the run.
      stage: the rollback stage.
      peak: the stage that trained A alone last on the way to the rollback's start (`stage.peak`); θ*_A is its end.
      donor: the stage that trained B alone last on that way; δ_B is its end minus its start.
      params: (name of a stage, or "base") -> the parameters at its end. It is called several times for the same name,
        so a caller that reads from disk may want to cache the last one.
      probe: compiled gradients and derivatives, from `analysis.probe.build`.
      folder: the work folder; records go to `folder`/recovery.
      track: shows the progress of each part.

    Returns:
      A tree of parameters; θ_T itself if no point of the sweep qualifies.

    Raises:
      UserError: if the record, or the settings of kept completions, are not valid JSON, or if too many rewards fail.
      RuntimeError: if the reward workers do not start, or their pool is closed.
      KeyError: if `recover.rules` names an unknown rule, which `check` refuses; or as in `remade`.
      Stopped: after a SIGTERM; sampled completions are saved, but no point of the sweep.
      ValueError, FileNotFoundError, zipfile.BadZipFile: as in `remade`.
      The errors of `samples.load`, if a file of kept completions is damaged, and of `params`.
    """
    file = folder / "recovery" / f"{stage.name}.json"
    if file.exists():
        return remade(runtime, params(stage.start), file)
    clock, seconds = time.monotonic(), {}
    meter = metered(runtime)

    def lap(name: str) -> None:
        nonlocal clock
        seconds[name], clock = time.monotonic() - clock, time.monotonic()

    domain = stage.domains[0]
    # To save device memory, no checkpoint is kept for the edits, and A's own edit is dropped after the evidence.
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
    costs = meter()
    compared = {}
    if point:  # only controls need the gradient, so its cost is theirs
        gradient, why = evidence.gradient_now(probe, now, sample(stage.start, domain))
        found |= {"left_out": why} if why else {}
        compared = compare(dataclasses.replace(trial, gradient=gradient), before, point, held[peak.name])
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
    points = {"points": [p.record() for p in tried], "chosen": chosen}
    spent = {"seconds": seconds, "costs": costs, "costs_with_controls": meter()}
    records.write_json(file, head | found | points | compared | spent)
    return remade(runtime, now, file)


def remade(runtime: Runtime, now: Any, file: Path) -> Any:
    """Makes the rolled-back parameters from the record.

    Args:
      runtime: shapes and shardings of the parameters.
      now: θ_T, the parameters at the rollback's start.
      file: the JSON record; the edit m ⊙ δ_B lies beside it as `.npz`.

    Returns:
      θ_T minus the recorded strength times the recorded edit; θ_T itself if nothing was chosen.

    Raises:
      UserError: if the record is missing or is not valid JSON.
      KeyError: if the record lacks a field.
      FileNotFoundError: if the edit is missing although something was chosen.
      ValueError: if the edit does not have the shapes and dtypes of the parameters, or its file is of another kind.
      zipfile.BadZipFile: if the file of the edit is damaged.
    """
    chosen = records.read_json(file)["chosen"]
    if chosen is None:
        return now
    with np.load(file.with_suffix(".npz")) as stored:
        edit = sparse.expand(stored, abstract(runtime.shapes, runtime.shardings))
    return taken_back(now, edit, support(edit), np.float32(chosen["strength"]))


def summary(record: dict[str, Any]) -> str:
    """The result of a rollback in one line for the terminal; its differences are in points on test prompts.

    The line has the size, rule, place and strength of the chosen set, the change of A's score with its interval, and
    that of B's. If nothing was chosen, it says so.

    Args:
      record: the content of `recovery/rollback-A-B.json`, as `run` writes it.

    Raises:
      KeyError: if the record lacks a field.
    """
    name, chosen = f"{record['stage']}: ", record["chosen"]
    if chosen is None:
        return (
            f"{name}no coordinate set improves the domain and costs every other one at most {record['limit']:g} "
            "points; nothing was taken back"
        )
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
    """Gathers the evidence: the shared route, and each rule's scores of coordinates.

    A rule whose evidence is not measurable is left out of the sweep; the record gives the reason.

    Args:
      runtime: configuration of the run.
      stage: the rollback stage.
      probe: compiled gradients and derivatives.
      ends: θ_T, θ*_A and the edits of A and B.
      sample: (`PEAK` or `NOW`, domain) -> completions of the domain at that point.
      track: shows the progress.

    Returns:
      The inputs of the sweep; and the record of the evidence.
    """
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
        gradient=None,
        settings=settings,
        validation=functools.partial(evaluate.validation_rewards, runtime),
        held_out=functools.partial(evaluate.held_out_rewards, runtime),
        tokens=lambda: sum(runtime.rollouts.spent[kind] for kind in ("read", "sampled")),
        track=lambda part, total: track(f"{stage.name}: {part}", total),
    )
    return trial, {"evidence": found, "route": size_of_route, "changed": sizes}


def _save(file: Path, edit: Any) -> None:
    buffer = io.BytesIO()
    arrays: dict[str, Any] = sparse.compress(edit)
    np.savez_compressed(buffer, **arrays)
    records.write_bytes(file, buffer.getvalue())
