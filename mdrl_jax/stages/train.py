"""Trains one stage, by GRPO or supervised, from its newest checkpoint or from its start.

`experiment.py` calls `Trainer.train` for each training stage. The steps themselves are in `stages/grpo.py` and
`stages/sft.py`; `recovery/prevention/prepare.py` adds what protects other domains to the GRPO step, and
`stages/distill.py` the teachers. This file connects them to checkpoints, costs, TensorBoard, the progress bar and what
may end a stage early: the tracker of a refresh or a distillation, or the looks at a stage with a target.

The costs of a stage so far (seconds and tokens) are saved in each checkpoint's meta, so a resumed stage continues to
count from there.
"""

import collections
import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mdrl_jax import records
from mdrl_jax.analysis import edits
from mdrl_jax.analysis.probe import build
from mdrl_jax.checkpoints import StageCheckpoints, abstract
from mdrl_jax.model import flops
from mdrl_jax.parallel import preemption
from mdrl_jax.parallel.programs import compilations, peak_bytes
from mdrl_jax.recovery.looks import Looks
from mdrl_jax.recovery.prevention import prepare
from mdrl_jax.recovery.refresh import tracker as refresh
from mdrl_jax.recovery.refresh.pareto import stationarity
from mdrl_jax.recovery.spent import metered
from mdrl_jax.report.screen.console import Screen
from mdrl_jax.report.tensorboard import TensorBoard
from mdrl_jax.report.track import Nowhere, Track
from mdrl_jax.rl import random_signs
from mdrl_jax.rl.trainer import LONG, TrainState, init_state, takes_long
from mdrl_jax.runtime import Runtime
from mdrl_jax.stage import Stage, peak, teachers
from mdrl_jax.stages import distill, grpo, sft, success_filter, target
from mdrl_jax.stages.dynamic_sampling import Rows
from mdrl_jax.stages.health import Health
from mdrl_jax.workfolder import WorkFolder

SHOWN = ("reward", "length", "kl", "kl_left_out", "loss")
SUMMED = ("seconds_sampling", "seconds_training", "dropped_groups", "reward_errors", "rounds", "groups")
OVER = "its scores are saved, and its training will start over"  # of a refresh that is stopped
ERRORS = "reward_errors/"  # prefix of the metrics that count the reward errors of one kind
Steps = Iterator[tuple[int, TrainState, grpo.Metrics]]


@dataclasses.dataclass(frozen=True)
class Recipe:
    """How one stage trains.

    Attributes:
      optimizer: the optax optimizer.
      shardings: sharding of each array of the training state.
      total: number of steps of the whole stage.
      checkpoint_every: steps between checkpoints; 0: only at the end.
      steps: (state, first) -> iterator of (steps done, state, metrics), where `first` steps were done before.
      prompts: prompts of each step; 0 for a supervised stage, which draws its prompts at random.
    """

    optimizer: Any
    shardings: TrainState
    total: int
    checkpoint_every: int
    steps: Callable[[TrainState, int], Steps]
    prompts: int


@dataclasses.dataclass(eq=False)
class Trainer:
    """Trains the stages of one run.

    Attributes:
      runtime: model, devices, prompts and rewards of the run.
      folder: the work folder.
      stages: all stages of the run in order.
      screen: shows and logs the output.
      params_after: (name of a stage, or "base") -> the parameters at its end.
      bases: (domain) -> the conflict subspaces that the analysis found for it, a list of `Basis`.
      track: also gets the curves of TensorBoard.
      programs: compiled programs; stages with the same loss, optimizer and transforms share them.
    """

    runtime: Runtime
    folder: WorkFolder
    stages: tuple[Stage, ...]
    screen: Screen
    params_after: Callable[[str], Any]
    bases: Callable[[str], Any]
    track: Track = dataclasses.field(default_factory=Nowhere)
    programs: dict[Any, Any] = dataclasses.field(default_factory=dict)

    def train(self, stage: Stage) -> tuple[Any, dict[str, Any]]:
        """Trains a stage to its end, or continues it from its newest checkpoint.

        It writes checkpoints and TensorBoard events; with `train.filter` also `filters/NN-NAME.json` before the first
        step; with `train.random_signs` also `random_signs/NN-NAME.json` at the end; of a refresh or a distillation also
        `recovery/NAME.json` after each scored step, and of a stage with a target `targets/NN-NAME.json` after each
        look. A score that such a record already holds is not measured again. A refresh or a distillation that was
        interrupted trains again from its start. If the last checkpoint is that of the stage's end, nothing is trained.

        Args:
          stage: a stage of kind "grpo" or "sft".

        Returns:
          The parameters at the stage's end (of a refresh, those of the step that it kept); and what the stage cost
          (`metered`), that of earlier runs up to the checkpoint included. A count of 0 may be absent.

        Raises:
          UserError: if too many rewards of a step fail, `train.filter` keeps no prompt, a checkpoint cannot be written,
            the parameters of an earlier stage cannot be read, a domain to be kept has no completion with a reward, or a
            refresh or a stage with a target continues a record with other settings; of a supervised stage as in
            `sft_steps`.
          RuntimeError: if the reward workers do not start, or their pool is closed.
          KeyError: if the record of `train.filter` lacks a field.
          Stopped: after SIGTERM or Ctrl-C. The state after the last complete step is saved first, or the scores so far
            if the stage is a refresh; the step that was interrupted is dropped.
        """
        keep = self.runtime.config.checkpoints.keep
        made = StageCheckpoints(self.folder.checkpoints(stage), keep, self.screen.warn)
        with contextlib.ExitStack() as held, made as checkpoints:
            first = checkpoints.latest() or 0
            saved: dict[str, Any] = checkpoints.meta() if first else {"costs": {}}
            costs = collections.Counter(saved["costs"])
            watched, total = stage.recovers, stage.settings.steps
            # A refresh or a distillation saves one checkpoint only, at its end. A stage with a target has not ended
            # before its last look.
            if first and (watched or saved.get("ended") or (first == total and not stage.settings.target)):
                like = abstract(self.runtime.shapes, self.runtime.shardings)
                return checkpoints.restore_params(like), dict(costs)
            meter = metered(self.runtime)
            if stage.kind == "sft":
                recipe = self._sft(stage)
            else:
                rows, measured = self._rows(stage, self.folder.success_rates(stage))
                costs.update({} if first else measured)  # a checkpoint's costs include those of the measurement
                recipe = self._grpo(stage, rows)
            if first:  # the checkpoint's costs include what the stage needed before its first step
                meter = metered(self.runtime)
            state = self._state(stage, recipe, checkpoints, first)
            tracker = self._tracker(stage) if watched else None
            looks = self._looks(stage) if stage.settings.target else None
            board_folder, ended = self.folder.root / "tensorboard" / stage.folder, ""
            if tracker:
                costs.update(tracker.paid)
                tracker.look(0, state.params)
            elif looks:
                # A checkpoint of an earlier version does not say how many looks its costs include; then all are known.
                costs.update(looks.paid(saved.get("looks", len(looks.record["steps"])) if first else None))
                if first and looks.due(first):  # a run that was stopped by SIGTERM saves before it looks
                    ended = looks.look(first, state.params)
            totals: collections.Counter[str] = collections.Counter()
            longest = self.runtime.config.rollout.completion_buckets[-1]
            health = Health(stage.name, longest, rewarded=stage.prefix != "distill", first=first)

            def account() -> dict[str, Any]:
                return dict(costs + collections.Counter(meter()))

            done, saved_at, spent, dropped = first, first, account(), []
            with TensorBoard(board_folder, resumed_at=first + 1) as board:
                steps = iter(()) if ended else _until_dropped(recipe.steps(state, first), dropped)
                for done, state, metrics in self.screen.track(stage.name, recipe.total, first, _watched(steps)):
                    if not tracker and done == first + 1:
                        held.enter_context(preemption.unsaved())
                    curves = {f"train/{k}": v for k, v in metrics.items() if k != "rewards"}
                    board.scalars(done, curves)
                    self.track.scalars(stage.folder, done, curves)
                    board.histogram("train/rewards", metrics.get("rewards", ()), done)
                    totals.update({k: v for k, v in metrics.items() if k in SUMMED or k.startswith(ERRORS)})
                    if "kl_left_out" in metrics:
                        totals["kl"], totals["kl_left_out"] = metrics["kl"], metrics["kl_left_out"]
                    if stage.kind == "grpo" and (told := health.step(done, metrics)):
                        self.screen.warn(told)
                    stopping, spent = preemption.noticed(), account()
                    if tracker:
                        ended = tracker.look(done, state.params)
                    elif looks and looks.due(done) and not stopping:
                        try:
                            ended = looks.look(done, state.params)
                        except preemption.Stopped:
                            stopping = True
                    last = bool(ended) if looks else done == recipe.total
                    if not tracker and (last or stopping or _due(done, recipe.checkpoint_every)):
                        board.flush()  # a run that resumes from this step does not log it again
                        spent, saved_at = spent if stopping else account(), done  # not of a look that was stopped
                        meta = self._meta(stage, spent, done * recipe.prompts, looks)
                        if last:
                            self._signs(stage, state)
                            checkpoints.save_params(done, state.params, meta | {"ended": True})
                        else:
                            checkpoints.save(done, state, meta)
                    if ended:
                        break
                    if stopping:
                        checkpoints.wait()
                        raise preemption.Stopped(f"after step {done} of {stage.name}", OVER if tracker else "saved")
                if dropped:
                    if not tracker and done > saved_at:
                        board.flush()
                        checkpoints.save(done, state, self._meta(stage, spent, done * recipe.prompts, looks))
                    checkpoints.wait()
                    kept = OVER if tracker else f"the state after step {done} is saved" if done else "nothing is lost"
                    raise preemption.Stopped(f"during step {done + 1} of {stage.name}", kept)
            params, spent, taken = state.params, account(), done - first
            if tracker:
                params, done = tracker.best, tracker.record["chosen"]
                del state, steps  # frees device memory before the repeats, which are no part of the stage's cost
                self._repeat(stage, tracker)
                if stage.prefix == "alternate" and "pareto" not in tracker.record:
                    probe = build(self.runtime, self.runtime.config.train.grpo)
                    ends = {"before": lambda: self.params_after(stage.start), "after": lambda: params}
                    found = {at: stationarity(probe, read(), stage.domains) for at, read in ends.items()}
                    tracker.add("pareto", found)
                    self.screen.print(f"{stage.name}: {_pareto(found)}")
                checkpoints.save_params(max(done, 1), params, self._meta(stage, spent, 0))
                self.screen.print(f"{stage.name}: kept step {done}; ended because {ended}")
        if looks:
            self.screen.print(f"{stage.name}: score of {stage.settings.target} {ended}")
        self.screen.print(_line(stage, taken, spent["seconds"], totals))
        for told in health.summary():
            self.screen.warn(told)
        return params, spent

    def _signs(self, stage: Stage, state: TrainState) -> None:
        if stage.kind == "grpo" and stage.train.random_signs:
            start = self.params_after(stage.start)
            figures = edits.edit_figures(start, random_signs.moved(start, state.opt_state))
            head = {"stage": stage.name, "seed": self.runtime.config.seed}
            records.write_json(self.folder.random_signs(stage), head | {"figures": figures})

    def _repeat(self, stage: Stage, tracker: refresh.Tracker) -> None:
        repeats = [r for r in tracker.repeats(stage) if not r.taught or teachers(r, self.stages)]
        with self.screen.steps(f"{stage.name}: repeats", sum(r.train.steps for r in repeats)) as show:
            for i, repeat in enumerate(repeats):
                for done, params, _ in self.walk(repeat):
                    show(i * repeat.train.steps + done, repeat.stream)
                    if done == repeat.train.steps:
                        tracker.follow(repeat, params)

    def walk(self, stage: Stage) -> Iterator[tuple[int, Any, grpo.Metrics]]:
        """Runs a GRPO stage from its start without saving anything, for trials and `recover`.

        It neither scores nor stops early, not even a refresh.

        Args:
          stage: the stage to run, of kind "grpo".

        Yields:
          After each step: the number of steps done, a copy of the parameters, and the metrics of `grpo_steps`.

        Raises:
          UserError: if too many rewards of a step fail, the parameters of an earlier stage cannot be read, or a domain
            to be kept has no completion with a reward. All errors are raised when a step is asked for.
          RuntimeError: if the reward workers do not start, or their pool is closed.
          Stopped: after SIGTERM or Ctrl-C; the step that was interrupted is dropped.
        """
        recipe = self._grpo(stage, self._rows(stage, None)[0])
        state = init_state(recipe.optimizer, self.params_after(stage.start), recipe.shardings)
        for done, reached, metrics in recipe.steps(state, 0):
            yield done, jax.tree.map(jnp.copy, reached.params), metrics

    def _meta(self, stage: Stage, costs: Mapping[str, Any], visited: int, looks: Looks | None = None) -> dict[str, Any]:
        meta = {"seed": self.runtime.config.seed, "stage": stage.name, "costs": dict(costs)}
        meta |= {"looks": len(looks.record["steps"])} if looks else {}  # whose costs are in "costs"
        return meta | ({"prompts_visited": visited} if visited else {})

    def _state(self, stage: Stage, recipe: Recipe, checkpoints: StageCheckpoints, first: int) -> TrainState:
        if not first:
            return init_state(recipe.optimizer, self.params_after(stage.start), recipe.shardings)
        shapes = jax.eval_shape(recipe.optimizer.init, self.runtime.shapes)
        like = TrainState(
            step=jax.ShapeDtypeStruct((), np.int32, sharding=recipe.shardings.step),
            params=abstract(self.runtime.shapes, recipe.shardings.params),
            opt_state=abstract(shapes, recipe.shardings.opt_state),
        )
        self.screen.print(f"{stage.name}: goes on after step {first} of {recipe.total}")
        return checkpoints.restore(like)[0]

    def _tracker(self, stage: Stage) -> refresh.Tracker:
        tops = {d: peak(d, stage.start, self.stages) for d in stage.domains}
        file = self.folder.root / "recovery" / f"{stage.name}.json"
        read = {d: functools.partial(self.params_after, at.name) for d, at in tops.items() if at}
        return refresh.Tracker(self.runtime, stage, file, read, {d: self.bases(d) for d in stage.domains})

    def _looks(self, stage: Stage) -> Looks:
        return target.looks(self.runtime, stage, self.folder.target(stage), self.params_after)

    def _split(self, stage: Stage, long: bool) -> bool:
        """Whether an update is one program for each micro-batch; says so where it should be, but has only one."""
        several = stage.settings.grad_accum_steps > 1
        if long and not several:
            self.screen.print(
                f"{stage.name}: an update may take longer than {LONG:.0f} s, and a SIGTERM waits for its end; a larger "
                "grad_accum_steps divides it"
            )
        return long and several

    def _sft(self, stage: Stage) -> Recipe:
        long = takes_long(self.runtime.model.config, stage.sft.batch_size * stage.sft.length, self.runtime.mesh)
        split = self._split(stage, long)
        key = "sft", stage.sft.optimizer, split
        if key not in self.programs:
            self.programs[key] = sft.make_programs(self.runtime, stage.sft.optimizer, split)
        optimizer, shardings, step = self.programs[key]
        for source in sft.shown(self.runtime, stage):
            if note := source.note():
                self.screen.print(f"{stage.name}: {note}")
        return Recipe(
            optimizer,
            shardings,
            stage.sft.steps,
            stage.sft.checkpoint_every,
            lambda state, first: sft.sft_steps(self.runtime, stage, step, state, first),
            0,
        )

    def _rows(self, stage: Stage, file: Path | None) -> tuple[Rows, Mapping[str, Any]]:
        """The training prompts that a stage may visit, and what measuring them cost in an earlier run.

        Args:
          stage: a GRPO stage.
          file: where the success rates are read from, or written to if it does not exist; None: they are not kept.

        Returns:
          Rows by domain, empty without a filter; and the costs that the file records (`metered`), empty if the rates
          were measured now, because then the caller's own meter has counted them.
        """
        if not stage.train.filter.on:
            return {}, {}
        earlier = file is not None and file.exists()
        if file is not None and earlier:
            record = records.read_json(file)
        else:
            meter = metered(self.runtime)
            record = success_filter.measure(self.runtime, stage, self.params_after(stage.start), self.screen.steps)
            record["costs"] = meter()
            if file is not None:
                records.write_json(file, record)
        rows = success_filter.kept(record)
        if file is not None:
            self.screen.print(success_filter.note(record))
            for domain, count in grpo.visits(stage).items():
                if domain in rows and len(rows[domain]) < count:
                    self.screen.warn(
                        f"{stage.name}: a step visits {count} prompts of {domain}, but the filter keeps "
                        f"{len(rows[domain])}, so steps repeat them"
                    )
        return rows, record["costs"] if earlier else {}

    def _grpo(self, stage: Stage, rows: Rows) -> Recipe:
        probe = build(self.runtime, self.runtime.config.train.grpo)
        kept = prepare.prepare(probe, stage, self.stages, self.params_after)
        prevent, split = stage.train.prevent, self._split(stage, grpo.takes_long(self.runtime, stage))
        distills = stage.prefix == "distill"
        key = (
            split,
            stage.train.distill if distills else None,
            grpo.shared_by(self.runtime, stage),  # a program is wrong for groups of another size
            stage.train.grad_accum_steps > 1,  # the lengths to which micro-batches are cut depend on it
            stage.train.grpo,
            stage.train.optimizer,
            stage.train.random_signs,
            prevent.ewc,
            prevent.gradients,
            prevent.module,
            prevent.protect,
        )
        if key not in self.programs:
            make = distill.make_programs if distills else grpo.make_programs
            self.programs[key] = make(self.runtime, stage, kept.transforms, split=split)
        made, more = self.programs[key], {}
        if distills:
            teach = distill.Teaching(self.runtime, stage, self.stages, made.taught, self.params_after)
            kept = dataclasses.replace(kept, extra=_with(kept.extra, teach.heads))
            more = {"teach": teach}
        reference = self.params_after(stage.reference) if grpo.needs_reference(stage) else None
        return Recipe(
            made.optimizer,
            made.shardings,
            stage.train.steps,
            stage.train.checkpoint_every,
            lambda state, first: grpo.grpo_steps(
                self.runtime, stage, made, state, reference, first, kept.extra, rows=rows, **more
            ),
            stage.train.prompts_per_step,
        )


def steps_taken(folder: WorkFolder, stage: Stage) -> int:
    """The number of steps that a finished stage took; 0 if it is no training stage.

    A refresh, a distillation or a stage with a target took as many steps as the number of the step at which it stopped.
    The first two may keep an earlier step.

    Args:
      folder: the work folder of the run.
      stage: the stage.

    Raises:
      UserError: if the record of a refresh, or of a stage with a target, is missing or not valid JSON.
      KeyError, IndexError: if it has no step.
    """
    if not stage.trains:
        return 0
    if stage.recovers:
        return records.read_json(folder.root / "recovery" / f"{stage.name}.json")["steps"][-1]["step"]
    if stage.settings.target:
        return records.read_json(folder.target(stage))["steps"][-1]["step"]
    return stage.settings.steps


def costs(runtime: Runtime, stage: Stage, steps: int, found: Mapping[str, Any]) -> dict[str, Any]:
    """The record `costs/NN-stage.json`: what a stage cost.

    "flops" counts operations with the weights of matrix products [chosen]: 2 for each weight and token that is read,
    sampled or only passed forward, 6 where a gradient is taken, 10 where jets are (`model.flops.of_tokens`). It leaves
    out attention between tokens, recomputation and padding. "operations", which "flops" includes, are those of
    prevention methods on the parameters alone (`recovery.prevention.prepare.operations`); those of an optimizer, a
    merge or a rollback, a few for each parameter, are left out. "seconds" includes all of them.

    Args:
      runtime: model of the run.
      stage: the finished stage.
      steps: training steps that it took.
      found: the cost that `Trainer.train` returned, or one of the same form for a stage that does not train: "seconds"
        (required) and numbers of tokens, e.g. "tokens_sampled" (0 where absent).

    Returns:
      The fields of the record: "stage", "kind", "steps", "seconds", "flops" and numbers of tokens: "tokens_read" in
      prompts and "tokens_sampled" in completions; "tokens_trained" in the rows with a trained token (every optimizer
      update on a batch counts them again); "tokens_forward" in log-probs and activities, "tokens_gradient" in
      gradients and Fisher diagonals, and "tokens_jets" in first and second derivatives, beside the training; and
      "operations". All are totals over the stage. "peak_bytes" is the most memory that the process has taken until now
      (`programs.peak_bytes`), earlier stages included.

    Raises:
      KeyError: if `found` has no "seconds".
    """
    tokens = {kind: found.get(f"tokens_{kind}", 0) for kind in flops.FORWARDS}
    head = {"stage": stage.name, "kind": stage.kind, "steps": steps, "seconds": found["seconds"]}
    counts = {f"tokens_{kind}": n for kind, n in tokens.items()}
    operations = found.get("operations", 0)
    counted = flops.of_tokens(runtime.model.config, tokens) + operations
    return head | counts | {"operations": operations, "flops": counted, "peak_bytes": peak_bytes()}


def _line(stage: Stage, steps: int, seconds: float, totals: Mapping[str, float]) -> str:
    line = f"{stage.name}: {steps} step{'s' * (steps != 1)} in {seconds:.0f} s"
    if stage.kind == "grpo":
        line += (
            f" (sampling and rewards {totals['seconds_sampling']:.0f} s, updates "
            f"{totals['seconds_training']:.0f} s); left out {totals['dropped_groups']:.0f} groups without "
            f"reward variance; {totals['reward_errors']:.0f} reward errors"
        )
        if stage.train.max_rounds > 1:
            line += f"; sampled {totals['groups']:.0f} groups in {totals['rounds']:.0f} rounds"
        kinds = [f"{k.removeprefix(ERRORS)} {v:.0f}" for k, v in sorted(totals.items()) if k.startswith(ERRORS)]
        line += f" ({', '.join(kinds)})" if kinds else ""
    if "kl_left_out" in totals:
        line += (
            f"; KL to the teacher at the last step: {totals['kl']:.3g} nats a token on the student's top k, and about "
            f"{totals['kl_left_out']:.3g} that these leave out"
        )
    return f"{line}; {sum(compilations.values())} compilations so far"


def _pareto(found: Mapping[str, Any]) -> str:
    """Both ends of an alternating refresh in words."""
    said = []
    for at, record in found.items():
        norm, noise = record["norm"], record["noise"]
        if norm["estimate"] is None:
            said.append(f"{at} not measurable ({norm['reason']})")
        else:
            low, high = norm["ci95"]
            said.append(f"{at} {norm['estimate']:.3g} [{low:.3g}, {high:.3g}], with noise of {noise:.3g}")
    return f"smallest norm of a convex combination of both gradients: {'; '.join(said)}"


def _with(extra: grpo.Extra, heads: Mapping[str, Any]) -> grpo.Extra:
    return lambda step, params: extra(step, params) | dict(heads)


def _due(done: int, every: int) -> bool:
    return every > 0 and done % every == 0


def _until_dropped(steps: Steps, dropped: list[bool]) -> Steps:
    """The steps up to one that is dropped because the run must end; then `dropped` gets an entry."""
    try:
        yield from steps
    except preemption.Dropped:
        dropped.append(True)


def _watched(steps: Steps) -> Iterator[tuple[int, str, Any]]:
    shown: dict[str, float] = {}
    for done, state, metrics in steps:
        shown |= {k: v for k, v in metrics.items() if k in SHOWN}
        text = "  ".join(f"{k} {shown[k]:.3g}" for k in SHOWN if k in shown)
        yield done, text, (done, state, metrics)
