"""A stage `analyze`: the interference analysis of the stages before it, and the conflict subspaces that it leaves.

The stage makes no parameters. `analysis/interference.py` does the work; this file selects the checkpoints of a run that
it compares, and reads its subspaces again for a later refresh (`recovery/refresh/`).
"""

import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from jax.sharding import Mesh

from mdrl_jax import records
from mdrl_jax.analysis import interference
from mdrl_jax.analysis.sequence import BASE, Checkpoints, Supervised, Trained
from mdrl_jax.checkpoints import load_tree
from mdrl_jax.domains.registry import DOMAINS
from mdrl_jax.errors import UserError
from mdrl_jax.parallel.sharding import named
from mdrl_jax.recovery.refresh.contraction import Basis
from mdrl_jax.report.screen import analysis
from mdrl_jax.report.screen.console import Screen
from mdrl_jax.runtime import Runtime
from mdrl_jax.stage import Stage, labelled, origin, warm_up
from mdrl_jax.workfolder import WorkFolder


def check(runtime: Runtime, earlier: Sequence[Stage]) -> None:
    """Refuses an analysis that cannot run, before any stage runs.

    Args:
      runtime: prompts, devices and configuration of the run.
      earlier: the stages before the analysis, in order.

    Raises:
      UserError: if `sequence` selects no stage named after a domain or refuses a solo stage, a domain has too few
        prompts, or the mesh does not divide the micro-batches (`interference.check`).
    """
    interference.check(runtime, sequence(earlier, lambda name: None))


def run(
    runtime: Runtime,
    folder: WorkFolder,
    stage: Stage,
    stages: Sequence[Stage],
    screen: Screen,
    params_after: Callable[[str], Any],
) -> None:
    """Analyses the stages before `stage` that `sequence` selects, writes records and claims, and shows a summary.

    `check` has to be called first; it refuses what cannot be analysed. Parts that an earlier run finished are read from
    the work folder.

    Args:
      runtime: model, devices, prompts and rewards of the run.
      folder: the work folder.
      stage: the analysis.
      stages: all stages of the run, in order.
      screen: shows progress and the summary.
      params_after: (name of a stage, or "base") -> the parameters at its end.

    Raises:
      UserError: if the folder holds an analysis with other settings or of other stages, a JSON record of it is not
        valid, sampling fails (`samples.draw`), or a Lanczos search fails.
      RuntimeError: if the reward workers do not start, or their pool is closed.
      ValueError: if a second-order term of a conflict subspace is not finite.
      Stopped: after a SIGTERM; finished parts are saved.
      The errors of `samples.load`, if the file of a sample is damaged, and of `params_after`.
    """
    started = time.monotonic()
    earlier = stages[: stages.index(stage)]
    by_name = {s.name: s for s in earlier}

    def signed(name: str) -> Any:
        file = folder.random_signs(by_name[name])
        return records.read_json(file)["figures"] if file.exists() else None

    checkpoints = sequence(earlier, params_after, lambda name: records.read_json(folder.target(by_name[name])), signed)
    found = interference.run(runtime, checkpoints, folder.root, runtime.config.train.grpo, screen.steps)
    screen.print(analysis.summary(found))
    screen.event("claims", claims=found["claims"])
    screen.print(f"{stage.name}: {time.monotonic() - started:.0f} s")


def sequence(
    stages: Sequence[Stage],
    params: Callable[[str], Any],
    looks: Callable[[str], Any] = lambda name: {},
    random_signs: Callable[[str], Any] = lambda name: None,
) -> Checkpoints:
    """Selects the stages of a run that the interference analysis compares.

    These are the stages named after a domain that precede the first refresh; all stages that trained one domain from
    θ_0 (`solo-*`, `again-*`); and the supervised stages of one domain (`sft-*`), except those of the warm-up, which
    lead to θ_0. Stages with a label (`@`) are left out, and so is an `again-*` that starts from a selected domain
    stage. A selected domain stage that starts from a supervised stage keeps this start, so that its edit is that of RL
    alone. If it starts from any other stage that is not selected, its start is taken to be the selected stage before
    it, or θ_0.

    Args:
      stages: the stages before the analysis, in order.
      params: (name of a stage, or "base") -> the parameters at its end.
      looks: (name of a stage with a target) -> the record of its looks.
      random_signs: (name of a stage) -> the figures of its edit with random signs; None if it did not record them.

    Returns:
      The selected stages, with `params` to read their parameters; nothing is read here.

    Raises:
      UserError: if a selected solo stage does not start from θ_0.
    """
    starts = {s.name: s.start for s in stages if s.scored}
    warm, base = warm_up(starts, DOMAINS), origin(starts, DOMAINS)
    known = {BASE, base, *(s.name for s in stages if s.kind == "sft")}
    trained: list[Trained] = []
    solos: list[Trained] = []
    supervised: list[Supervised] = []
    refreshed = False
    for stage in (s for s in stages if not labelled(s.name)):
        refreshed = refreshed or stage.name.startswith("refresh-")
        if stage.name in DOMAINS and not refreshed:
            before = trained[-1].name if trained else base
            trained.append(Trained(stage.name, stage.name, stage.start if stage.start in known else before))
            known.add(stage.name)
        elif stage.prefix == "again" and stage.start in {s.name for s in trained}:
            continue  # a later stage of the sequence, trained once more
        elif stage.prefix in ("solo", "again"):
            if warm and stage.start != base:
                raise UserError(
                    f"stage {stage.name} starts from {stage.start!r}, but the sequence from {base!r}; the analysis "
                    f"compares edits from one model: remove its start, and put it after {base!r}"
                )
            solos.append(Trained(stage.name, stage.domains[0], stage.start))
        elif stage.prefix == "sft" and stage.name not in warm:
            supervised.append(Supervised(stage.name, stage.domains[0], stage.start, stage.sft.target))
    return Checkpoints(tuple(trained), tuple(solos), params, tuple(supervised), looks, random_signs, base)


def conflict_bases(folder: WorkFolder, mesh: Mesh, domain: str) -> list[Basis]:
    """Reads the conflict subspaces that the analysis found for a domain.

    Args:
      folder: the work folder.
      mesh: mesh on whose devices the vectors are placed, split along d_model.
      domain: name of the domain that was damaged.

    Returns:
      One `Basis` for each objective, later stage and half of the prompts for which the analysis found a subspace, in
      the order of the names of the records; empty if it found none, or if no analysis has run.

    Raises:
      UserError: if a record of the analysis is not valid JSON, or the vectors of a subspace are missing.
      KeyError: if a record lacks a field.
    """
    into, out_of = named(mesh, None, None, "embed", None), named(mesh, None, None, None, "embed")  # the MLP's neurons
    found = []
    for file in sorted((folder.root / "analysis" / "parts").glob(f"conflict-{domain}-*.json")):
        record = records.read_json(file)
        if "reason" in record:
            continue
        stage, objective = record["stage"], record["objective"]
        kept = load_tree(
            interference.subspace_folder(folder.root, domain, stage, objective),
            {"gate": into, "up": into, "down": out_of},
        )
        for half, vectors in enumerate(kept["vectors"]):
            values = np.asarray(record["halves"][half]["eigenvalues"])
            index, mask = np.asarray(kept["index_LR"]), np.asarray(kept["mask_LR"])
            found.append(Basis(objective, half, stage, vectors, values, index, mask))
    return found
