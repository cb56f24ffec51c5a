"""Walks the stages of an experiment: train, checkpoint, score, show; what is done is skipped.

A stage is finished once its `evaluations/NN-stage.json` is written, which happens after its last checkpoint.
Started again after a kill at any moment, a run goes on from the newest whole checkpoint and ends the same.
"""

import dataclasses
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from mdrl_jax import records, runtime
from mdrl_jax.analysis import interference
from mdrl_jax.analysis.sequence import BASE, Checkpoints, Trained
from mdrl_jax.analysis.statistics import clustered_mean
from mdrl_jax.checkpoints import StageCheckpoints, abstract
from mdrl_jax.config import Config
from mdrl_jax.domains.registry import DOMAINS
from mdrl_jax.evaluate import Evaluation, evaluate
from mdrl_jax.parallel.programs import compilations
from mdrl_jax.report import findings, heatmap, matrix, terminal
from mdrl_jax.report.console import Screen
from mdrl_jax.report.tensorboard import TensorBoard
from mdrl_jax.rl import loop, pretraining
from mdrl_jax.rl.trainer import TrainState, Transforms, init_state
from mdrl_jax.runtime import Runtime
from mdrl_jax.stages import Stage, plan
from mdrl_jax.workfolder import WorkFolder

SHOWN = ("reward", "length", "kl", "loss")


def run(config: Config, workdir: str | Path) -> None:
    """Runs, or goes on with, the experiment in `workdir`.

    Raises:
      UserError: for anything the user can put right; what was written before stays.
    """
    stages = plan(config, tuple(DOMAINS))
    folder = WorkFolder(Path(workdir))
    with runtime.make_pool(config.rewards) as pool:
        built = runtime.build(config, pool)
        for stage in stages:
            if stage.trains:
                loop.check_divides(built, stage)
            else:
                interference.check(built, sequence(stages[: stages.index(stage)], lambda name: None))
        folder.open(config)
        with Screen(folder.root / "log.txt") as screen, jax.set_mesh(built.mesh):
            Walk(built, folder, stages, screen).run()


@dataclasses.dataclass(frozen=True, eq=False)
class Walk:
    """One pass over the stages of a run."""

    runtime: Runtime
    folder: WorkFolder
    stages: tuple[Stage, ...]
    screen: Screen

    def run(self) -> None:
        """Every stage that is not finished, then the summary."""
        started = time.monotonic()
        n = sum(x.size for x in jax.tree.leaves(self.runtime.shapes))
        mesh = " x ".join(f"{axis} {size}" for axis, size in self.runtime.mesh.shape.items())
        device = self.runtime.mesh.devices.flat[0].device_kind
        self.screen.print(f"{n / 1e6:.2f}M parameters on {device}, mesh {mesh}; work folder {self.folder.root}")
        self._score("base", 0, "00-base", 0, self.runtime.base_params)
        programs: dict[Any, Any] = {}
        for stage in self.stages:
            if not stage.trains:
                self._analyze(stage)
                continue
            if self.folder.evaluation(stage.folder).exists():
                self.screen.print(f"{stage.name}: finished before, skipped")
                continue
            params = self._train(stage, programs)
            steps = self._steps(stage)
            self._score(stage.name, stage.index, stage.folder, steps, lambda p=params: p)
        self._finish(time.monotonic() - started)

    def _analyze(self, stage: Stage) -> None:
        """The interference analysis of the stages before this one."""
        started = time.monotonic()
        earlier = self.stages[: self.stages.index(stage)]
        found = interference.run(
            self.runtime,
            sequence(earlier, self._params_after),
            self.folder.root,
            self.runtime.config.train.grpo,
            self.screen.steps,
        )
        self.screen.print(findings.summary(found))
        self.screen.print(f"{stage.name}: {time.monotonic() - started:.0f} s")

    def _steps(self, stage: Stage) -> int:
        return self.runtime.config.sft.steps if stage.kind == "sft" else stage.train.steps

    def _params_after(self, name: str) -> Any:
        """Parameters at the end of an earlier stage, or the base's."""
        if name == "base":
            return self.runtime.base_params()
        stage = next(s for s in self.stages if s.name == name)
        with StageCheckpoints(self.folder.checkpoints(stage)) as checkpoints:
            return checkpoints.restore_params(abstract(self.runtime.shapes, self.runtime.shardings))

    def _train(self, stage: Stage, programs: dict[Any, Any]) -> Any:
        """Trains one stage from its newest checkpoint, or from its start; returns the parameters."""
        sft = stage.kind == "sft"
        shared = "sft" if sft else (stage.train.grpo, stage.train.optimizer)
        if shared not in programs:
            runtime = self.runtime
            programs[shared] = (
                pretraining.make_programs(runtime) if sft else loop.make_programs(runtime, stage, Transforms())
            )
        made = programs[shared]
        optimizer, shardings = (made[0], made[1]) if sft else (made.optimizer, made.shardings)
        total = self._steps(stage)
        every = self.runtime.config.sft.checkpoint_every if sft else stage.train.checkpoint_every
        before = time.monotonic()
        with StageCheckpoints(self.folder.checkpoints(stage)) as checkpoints:
            first = checkpoints.latest() or 0
            keep_start = first == 0 or (not sft and loop.needs_reference(stage))
            start = self._params_after(stage.start) if keep_start else None
            if first:
                shapes = jax.eval_shape(optimizer.init, self.runtime.shapes)
                like = TrainState(
                    step=jax.ShapeDtypeStruct((), np.int32, sharding=shardings.step),
                    params=abstract(self.runtime.shapes, shardings.params),
                    opt_state=abstract(shapes, shardings.opt_state),
                )
                state, _ = checkpoints.restore(like)
                self.screen.print(f"{stage.name}: goes on after step {first} of {total}")
            else:
                state = init_state(optimizer, start, shardings)
            if sft:
                steps = pretraining.sft_steps(self.runtime, stage, made[2], state, first)
            else:
                reference = start if loop.needs_reference(stage) else None
                steps = loop.grpo_steps(self.runtime, stage, made, state, reference, first, lambda step, params: {})
            totals: dict[str, float] = {}
            board_folder = self.folder.root / "tensorboard" / stage.folder
            with TensorBoard(board_folder, resumed_at=first + 1 if first else None) as board:
                for done, state, metrics in self.screen.track(stage.name, total, first, self._watched(steps)):
                    board.scalars(done, {f"train/{k}": v for k, v in metrics.items()})
                    for name in ("seconds_sampling", "seconds_training", "dropped_groups", "reward_errors"):
                        totals[name] = totals.get(name, 0.0) + metrics.get(name, 0.0)
                    if done == total or (every and done % every == 0):
                        meta = {"seed": self.runtime.config.seed, "stage": stage.name}
                        position = {} if sft else {"prompts_visited": done * stage.train.prompts}
                        checkpoints.save(done, state, meta | position)
        self.screen.print(self._stage_line(stage, total - first, time.monotonic() - before, totals))
        return state.params

    def _stage_line(self, stage: Stage, steps: int, seconds: float, totals: dict[str, float]) -> str:
        line = f"{stage.name}: {steps} steps in {seconds:.0f} s"
        if stage.kind == "grpo":
            line += (
                f" (sampling and rewards {totals.get('seconds_sampling', 0):.0f} s, updates "
                f"{totals.get('seconds_training', 0):.0f} s); {totals.get('dropped_groups', 0):.0f} groups without "
                f"reward variance left out, {totals.get('reward_errors', 0):.0f} reward errors"
            )
        return f"{line}; {sum(compilations.values())} compilations so far"

    def _watched(self, steps: Iterator[Any]) -> Iterator[tuple[int, str, Any]]:
        shown: dict[str, float] = {}
        for done, state, metrics in steps:
            shown |= {k: v for k, v in metrics.items() if k in SHOWN}
            text = "  ".join(f"{k} {shown[k]:.3g}" for k in SHOWN if k in shown)
            yield done, text, (done, state, metrics)

    def _score(self, name: str, index: int, folder: str, step: int, params: Any) -> None:
        """Evaluates, unless that was done, and writes evaluation, samples and scores."""
        if not self.folder.evaluation(folder).exists():
            result = evaluate(self.runtime, params())
            head = {
                "stage": name,
                "index": index,
                "seed": self.runtime.config.seed,
                "k": self.runtime.config.evaluate.samples,
                "step": step,
            }
            records.write_jsonl(self.folder.samples(folder), result.samples)
            records.write_json(self.folder.evaluation(folder), head | result.record())
            self._board(name, index, result)
        rows = scores(self.folder)
        records.write_jsonl(self.folder.root / "scores.jsonl", rows)
        self.screen.print(terminal.score_table(matrix.load(self.folder.root)))

    def _board(self, name: str, index: int, result: Evaluation) -> None:
        with TensorBoard(self.folder.root / "tensorboard" / "scores") as board:
            scalars = {f"score/{d}": 100 * float(x.mean()) for d, x in result.rewards.items()}
            board.scalars(index, scalars)
            for domain, rewards in result.rewards.items():
                board.histogram(f"reward/{domain}", rewards.ravel(), index)
                shown = [s for s in result.samples if s["domain"] == domain]
                lines = [f"{s['prompt']} **{s['completion']}** ({s['reward']:.2g})" for s in shown]
                board.text(f"samples/{domain}", "\n\n".join(lines), index)

    def _finish(self, seconds: float) -> None:
        result = matrix.load(self.folder.root)
        picture = self.folder.root / "report" / "scores.png"
        heatmap.save_matrix(picture, result)
        self.screen.print(terminal.summary(result))
        self.screen.print(f"done in {seconds:.0f} s; heat map {picture}; everything in {self.folder.root}")


def sequence(stages: Sequence[Stage], params: Callable[[str], Any]) -> Checkpoints:
    """What is analysed of a run: the stages that bear a domain's name, up to the first refresh, and the solo stages."""
    trained: list[Trained] = []
    solos: list[Trained] = []
    refreshed = False
    for stage in stages:
        refreshed = refreshed or stage.name.startswith("refresh-")
        if stage.name in DOMAINS and not refreshed:
            known = {BASE, *(t.name for t in trained)}
            before = trained[-1].name if trained else BASE
            trained.append(Trained(stage.name, stage.name, stage.start if stage.start in known else before))
        elif stage.name.startswith("solo-"):
            solos.append(Trained(stage.name, stage.domains[0], stage.start))
    return Checkpoints(tuple(trained), tuple(solos), params)


def scores(folder: WorkFolder) -> list[dict[str, Any]]:
    """Rows of `scores.jsonl` from the evaluations on disk, in order of index."""
    rows = []
    for file in sorted((folder.root / "evaluations").glob("*.json")):
        record = records.read_json(file)
        for domain, rewards in record["rewards"].items():
            mean, stderr = clustered_mean(np.asarray(rewards))
            accuracy, accuracy_stderr = clustered_mean(np.asarray(record["accuracy"][domain]))
            rows.append(
                {
                    "stage": record["stage"],
                    "index": record["index"],
                    "domain": domain,
                    "score": 100 * mean,
                    "stderr": 100 * stderr,
                    "n_prompts": len(rewards),
                    "k": record["k"],
                    "step": record["step"],
                    "seed": record["seed"],
                    "accuracy": 100 * accuracy,
                    "accuracy_stderr": 100 * accuracy_stderr,
                }
            )
    return sorted(rows, key=lambda row: row["index"])
