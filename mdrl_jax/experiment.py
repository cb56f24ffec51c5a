"""Runs the stages of an experiment in order: each is trained or computed, saved, scored and shown.

`stage.py` says what each stage does; `stages/` holds the code of each kind of stage. A stage counts as finished once
its `evaluations/NN-stage.json` exists, which is written after its last checkpoint. Finished stages are skipped. A run
may be killed at any moment: started again, it continues from the newest complete checkpoint and gives the same result.
"""

import dataclasses
import datetime
import functools
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

from mdrl_jax import records, runtime
from mdrl_jax.analysis import samples
from mdrl_jax.analysis.probe import build
from mdrl_jax.checkpoints import StageCheckpoints, abstract, keep_last, load_params
from mdrl_jax.claims.circuits import c8
from mdrl_jax.claims.recovery import Refreshed, c6, c7
from mdrl_jax.config import Config
from mdrl_jax.domains.registry import DOMAINS
from mdrl_jax.evaluate import Evaluation, evaluate, text_rows
from mdrl_jax.parallel import distributed, preemption
from mdrl_jax.recovery.prevention import prepare
from mdrl_jax.recovery.refresh.tracker import variant
from mdrl_jax.recovery.spent import metered
from mdrl_jax.report import tensorboard
from mdrl_jax.report.screen import analysis, terminal
from mdrl_jax.report.screen.console import Screen
from mdrl_jax.report.tables import answers, matrix, methods
from mdrl_jax.report.tables.recovered import recoveries
from mdrl_jax.report.tables.rivals import rivals
from mdrl_jax.report.tables.scores import score_rows
from mdrl_jax.report.tensorboard import TensorBoard
from mdrl_jax.report.track import Nowhere, Track, tracking
from mdrl_jax.runtime import Runtime
from mdrl_jax.stage import Stage, peak, repeated, resolve_stages
from mdrl_jax.stages import analyze, circuits, grpo, locality, merge, rollback, sft
from mdrl_jax.stages.plan import Planning
from mdrl_jax.stages.train import Trainer, costs, steps_taken
from mdrl_jax.workfolder import WorkFolder, flat, resolved


def run(config: Config, workdir: str | Path, output: str = "screen") -> None:
    """Runs the experiment in `workdir`, or continues it where an earlier run stopped.

    All stages are checked before the first one runs and before anything is written. In the work folder it writes
    checkpoints and records of the stages, `scores.jsonl`, `claims.json`, the report page and TensorBoard events.

    Args:
      config: the whole configuration, parsed.
      workdir: the work folder; created if it does not exist.
      output: form of the standard output, "screen", "quiet" or "json" (`report/screen/console.py`).

    Raises:
      UserError: if the user can put the problem right; records written so far are kept.
      HostLost: if another process of the run does not come within the time-out.
      ValueError: with a single process, if it is called outside the main thread; then `config.json` is written, but
        nothing has run. Or as in `Walk.run`.
      KeyError: if `output` is another word; then `config.json` is written, but nothing has run. Or as in `Walk.run`.
      FileNotFoundError, RuntimeError, EOFError, zipfile.BadZipFile: as in `Walk.run`.
      Stopped: after SIGTERM or Ctrl-C; progress is saved.
    """
    stages = resolve_stages(config, tuple(DOMAINS))
    folder = WorkFolder(Path(workdir))
    with runtime.make_pool(config.rewards) as pool:
        today = distributed.agree(datetime.date.today().isoformat())
        built = runtime.build(config, pool, folder.date() or today)
        data = built.data()
        for stage in stages:
            earlier = stages[: stages.index(stage)]
            if stage.kind == "grpo":
                grpo.check_divides(built, stage)
                prepare.check(built, stage)
                if stage.prefix == "alternate":
                    samples.check(built, stage.domains, f"stage {stage.name}: ")
            elif stage.kind == "sft":
                for domain, record in sft.check(built, stage).items():
                    data[domain].setdefault("demonstrations", {})[stage.name] = record
            elif stage.kind == "rollback":
                rollback.check(built)
            elif stage.kind == "analyze":
                analyze.check(built, earlier)
            elif stage.kind == "locality":
                locality.check(built, stage)
            elif stage.kind == "circuits":
                circuits.check(built, stage)
        distributed.check_shared(folder.root)
        folder.open(config)
        folder.open_data(data)
        with (
            preemption.watch(),
            Screen(folder.root / "log.txt", output) as screen,
            jax.set_mesh(built.mesh),
            tracking(config.track, folder.root, flat(resolved(config))) as track,
        ):
            Walk(built, folder, stages, screen, track).run()


@dataclasses.dataclass(frozen=True, eq=False)
class Walk:
    """One pass over the stages of a run.

    Attributes:
      runtime: model, devices, prompts and rewards of the run.
      folder: the work folder.
      stages: all stages in order.
      screen: shows and logs the output.
      track: also gets the curves of TensorBoard.
    """

    runtime: Runtime
    folder: WorkFolder
    stages: tuple[Stage, ...]
    screen: Screen
    track: Track = dataclasses.field(default_factory=Nowhere)

    def run(self) -> None:
        """Scores the base model, runs every stage that is not finished, then writes and shows the summary.

        It must be called inside `jax.set_mesh(runtime.mesh)`, with an open `screen`. If all stages are finished, only
        the summary, the report page and the records that stages rewrite in any case are made again.

        Raises:
          UserError: if the user can put the problem right; records written so far are kept.
          HostLost: if another process of the run does not come within the time-out.
          ValueError: if a second-order term of a conflict subspace is not finite.
          ValueError, FileNotFoundError, zipfile.BadZipFile: as in `stages.rollback.remade`.
          ValueError, EOFError, zipfile.BadZipFile, KeyError: if a file of completions is damaged (`samples.load`).
          KeyError: if a record of an earlier run lacks a field.
          RuntimeError: if the reward workers do not start.
          Stopped: after SIGTERM or Ctrl-C inside `preemption.watch()`; progress is saved.
        """
        started = time.monotonic()
        n = sum(x.size for x in jax.tree.leaves(self.runtime.shapes))
        mesh = " x ".join(f"{axis} {size}" for axis, size in self.runtime.mesh.shape.items())
        device = self.runtime.mesh.devices.flat[0].device_kind
        self.screen.print(f"{n / 1e6:.2f}M parameters on {device}, mesh {mesh}; work folder {self.folder.root}")
        for note in self.runtime.notes:
            self.screen.print(note)
        for text in repeated(self.stages):
            self.screen.warn(text)
        self._score("base", 0, "00-base", 0, self.runtime.base_params, None)
        trainer = Trainer(
            self.runtime,
            self.folder,
            self.stages,
            self.screen,
            self._params_after,
            functools.partial(analyze.conflict_bases, self.folder, self.runtime.mesh),
            self.track,
        )
        planning = Planning(self.runtime, self.folder, self.stages, self.screen, trainer, self._params_after)
        recorders = {
            "analyze": lambda stage: analyze.run(
                self.runtime, self.folder, stage, self.stages, self.screen, self._params_after
            ),
            "plan": planning.plan,
            "trials": planning.trials,
            "orders": planning.orders,
            "locality": lambda stage: locality.run(
                self.runtime, self.folder, stage, self.stages, self.screen, self._params_after
            ),
            "circuits": lambda stage: circuits.run(
                self.runtime, self.folder, stage, self.stages, self.screen, self._params_after
            ),
        }
        ran: list[float] = []
        for stage in self.stages:
            begun = time.monotonic()
            self.screen.stage(stage.index, len(self.stages), sum(ran) / len(ran) if ran else None)
            anew = not (stage.scored and self.folder.evaluation(stage.folder).exists())
            if not stage.scored:
                self._recorded(stage, recorders[stage.kind])
            elif self.folder.evaluation(stage.folder).exists():
                self.screen.print(f"{stage.name}: finished before, skipped")
            else:
                params, spent = trainer.train(stage) if stage.trains else self._made(stage, planning)
                steps = steps_taken(self.folder, stage)
                records.write_json(self.folder.costs(stage), costs(self.runtime, stage, steps, spent))
                self._score(stage.name, stage.index, stage.folder, steps, lambda p=params: p, stage.start)
                del params  # frees device memory before the next stage trains
            if stage.scored:
                keep_last(self.folder.checkpoints(stage))
            if anew:
                ran.append(time.monotonic() - begun)
        self._finish(time.monotonic() - started)

    def _recorded(self, stage: Stage, recorder: Callable[[Stage], None]) -> None:
        """Runs a stage that makes no parameters, and adds what it cost to its record.

        A stage that goes on after a stop adds to the cost of the run before; `orders` starts over. The cost of an
        analysis is not recorded.
        """
        meter, file = metered(self.runtime), self.folder.costs(stage)

        def record() -> None:
            spent = meter()
            if stage.kind != "analyze" and any(n for kind, n in spent.items() if kind != "seconds"):
                before = records.read_json(file) if file.exists() and stage.kind != "orders" else {}
                kinds = {k: before[k] for k in before if k in ("seconds", "operations") or k.startswith("tokens_")}
                records.write_json(file, costs(self.runtime, stage, 0, Counter(kinds) + Counter(spent)))

        try:
            recorder(stage)
        except preemption.Stopped:
            record()
            raise
        record()

    def _made(self, stage: Stage, planning: Planning) -> tuple[Any, dict[str, Any]]:
        """Makes and saves the parameters of a stage that is no training stage: a rollback, a merge or a recovery.

        Args:
          stage: the stage.
          planning: carries out `recover`.

        Returns:
          The stage's final parameters; and what making them cost, as in `stages.train.costs`.
        """
        keep = self.runtime.config.checkpoints.keep
        with StageCheckpoints(self.folder.checkpoints(stage), keep, self.screen.warn) as checkpoints:
            if checkpoints.latest():
                like = abstract(self.runtime.shapes, self.runtime.shardings)
                return checkpoints.restore_params(like), checkpoints.meta()["costs"]
            meter = metered(self.runtime)
            if stage.kind == "recover":
                params, spent = planning.recover(stage), meter()
            elif stage.kind == "rollback":
                params, spent = self._rolled_back(stage)
            else:
                params, spent = self._merged(stage), meter()
            meta = {"seed": self.runtime.config.seed, "stage": stage.name, "costs": spent}
            checkpoints.save_params(1, params, meta)
        return params, spent

    def _rolled_back(self, stage: Stage) -> tuple[Any, dict[str, Any]]:
        meter = metered(self.runtime)
        at, donor = (peak(d, stage.start, self.stages) for d in (stage.domains[0], stage.donor))
        assert at is not None and donor is not None  # `stage.resolve_stages` refuses any other rollback
        params = rollback.run(
            self.runtime,
            stage,
            at,
            donor,
            functools.lru_cache(maxsize=1)(self._params_after),
            build(self.runtime, self.runtime.config.train.grpo),
            self.folder.root,
            self.screen.steps,
        )
        record = records.read_json(self.folder.root / "recovery" / f"{stage.name}.json")
        self.screen.print(rollback.summary(record))
        return params, record.get("costs") or meter()  # the record is that of an earlier run, if this one was killed

    def _merged(self, stage: Stage) -> Any:
        base = self._params_after(stage.start)
        solos = {d: self._params_after(f"solo-{d}") for d in stage.domains}
        params, record = merge.merge(self.runtime, stage.name, base, solos, self.screen.steps)
        records.write_json(self.folder.root / "recovery" / f"{stage.name}.json", record)
        return params

    def _params_after(self, name: str) -> Any:
        """Loads the parameters at the end of an earlier stage, or those of the base model."""
        if name == "base":
            return self.runtime.base_params()
        stage = next(s for s in self.stages if s.name == name)
        return load_params(self.folder.checkpoints(stage), abstract(self.runtime.shapes, self.runtime.shardings))

    def _score(self, name: str, index: int, folder: str, step: int, params: Any, start: str | None) -> None:
        """Scores a stage's parameters and records the result; shows the score table.

        If the evaluation already exists, only `scores.jsonl` is rewritten. The summary at the end of the run has the
        table after the last stage.

        Args:
          name: name of the stage, or "base".
          index: position of the stage, 0 for the base model.
          folder: name of its record files, `NN-stage`.
          step: training steps that the stage took.
          params: makes the parameters; called only if they have to be scored.
          start: name of the stage that the stage started from, or "base"; None for the base model.
        """
        anew = not self.folder.evaluation(folder).exists()
        if anew:
            result = evaluate(self.runtime, params(), f"{name}: scores", self.screen.steps)
            head = {
                "stage": name,
                "index": index,
                "seed": self.runtime.config.seed,
                "k": self.runtime.config.evaluate.samples,
                "step": step,
                "start": start,
            }
            records.write_jsonl(self.folder.samples(folder), result.samples)
            if self.runtime.config.evaluate.keep_texts:
                records.write_zipped(self.folder.completions(folder), text_rows(self.runtime, result))
            self._board(name, index, result)
            records.write_json(self.folder.evaluation(folder), head | result.record())
        rows = scores(self.folder)
        records.write_jsonl(self.folder.root / "scores.jsonl", rows)
        if anew:
            self.screen.event("scores", rows=[row for row in rows if row["stage"] == name])
        if anew and name != self.stages[-1].name:  # the summary at the end has the table of the last stage
            self.screen.print(terminal.score_table(matrix.load(self.folder.root), accuracy=False))

    def _board(self, name: str, index: int, result: Evaluation) -> None:
        with TensorBoard(self.folder.root / "tensorboard" / "scores", resumed_at=index) as board:
            if name == "base":  # the hyperparameters are written once a run
                board.hparams(flat(resolved(self.runtime.config)))
            scalars = {f"score/{d}": 100 * float(x.mean()) for d, x in result.rewards.items()}
            board.scalars(index, scalars)
            self.track.scalars("scores", index, scalars)
            for domain, rewards in result.rewards.items():
                board.histogram(f"reward/{domain}", rewards.ravel(), index)
                shown = [s for s in result.samples if s["domain"] == domain]
                lines = [f"{s['prompt']} **{s['completion']}** ({s['reward']:.2g})" for s in shown]
                board.text(f"samples/{domain}", "\n\n".join(lines), index)

    def _finish(self, seconds: float) -> None:
        from mdrl_jax.report import page  # here, because the first step of a run need not wait for its import

        root = self.folder.root
        result = matrix.load(root)
        judged = self._claims(result)
        records.write_json(root / "transitions.json", answers.records(answers.all_changes(result), result))
        page.write(root)
        tensorboard.save_figures(root)
        self.screen.print(terminal.summary(result), final=True)
        if judged:
            self.screen.print(analysis.verdict_table(judged), final=True)
            self.screen.event("claims", claims=judged)
        self.screen.print(terminal.places(root, seconds), final=True)
        self.screen.event("done", seconds=seconds, workdir=str(root))

    def _claims(self, result: matrix.Matrix) -> list[dict[str, Any]]:
        """Judges C6, C7 and C8 by this run's refreshes, rollbacks and circuits; adds the verdicts to `claims.json`.

        The verdicts that the analysis wrote there are kept. Returns all verdicts, sorted by claim.
        """
        recovered, run = {r.stage: r for r in recoveries(result)}, methods.load(self.folder.root)
        refreshes, rollbacks, compared = [], [], []
        for stage in self.stages:
            if stage.kind == "circuits":
                compared.append(records.read_json(self.folder.root / "analysis" / f"{stage.name}.json"))
                continue
            file = self.folder.root / "recovery" / f"{stage.name}.json"
            if not file.exists():
                continue
            record = records.read_json(file)
            if stage.kind == "rollback":
                rollbacks.append(record)
            elif stage.prefix == "refresh" and stage.name in recovered:
                own = peak(stage.domains[0], stage.start, self.stages)
                found = recovered[stage.name]
                refreshes.append(
                    Refreshed(
                        stage.name,
                        stage.domains[0],
                        found.fraction.record(),
                        found.collateral.record(),
                        found.loss.record(),
                        record["steps"][-1]["step"],
                        steps_taken(self.folder, own) if own else stage.train.steps,
                        record["contraction"],
                        record["steps"][-1].get("path"),
                        variant(stage, own),
                        rivals(run, stage.name),
                    )
                )
        file = self.folder.root / "claims.json"
        known = {c["id"]: c for c in (records.read_json(file) if file.exists() else [])}
        known |= {c["id"]: c for c in ([c6(refreshes)] if refreshes else []) + ([c7(rollbacks)] if rollbacks else [])}
        known |= {"C8": c8(compared)} if compared else {}
        judged = [known[name] for name in sorted(known)]
        if refreshes or rollbacks or compared:
            records.write_json(file, judged)
        return judged


def scores(folder: WorkFolder) -> list[dict[str, Any]]:
    """Rows of `scores.jsonl`, made from all evaluations on disk.

    Args:
      folder: the work folder.

    Returns:
      The rows of `report.tables.scores.score_rows`, one for each stage and domain, sorted by the stage's index; empty
      if there is no evaluation.

    Raises:
      UserError: if a file is no valid JSON.
      KeyError, ValueError: as in `report.tables.scores.score_rows`.
    """
    evaluations = [records.read_json(file) for file in sorted((folder.root / "evaluations").glob("*.json"))]
    return sorted((row for record in evaluations for row in score_rows(record)), key=lambda row: row["index"])
