"""The stages `plan`, `trials`, `recover` and `orders`: they forecast recovery actions, test the forecasts and act.

An action is a refresh, a rollback, or doing nothing. `recovery/planning/` makes the forecasts (definitions §10).

- `plan` writes `recovery/plan.json`: every action with its forecast, and the action it picks.
- `trials` carries out every action and scores the result on validation prompts. `recovery/trials.json` is rewritten
  after each action, so a stopped run continues with the next one. The picked action and those that did best are then
  scored on test prompts (`recovery/judged.json`). `recovery/outcomes.json` compares forecasts and results.
- `recover` carries out the action that the plan picks.
- `orders` writes `recovery/orders.json`: forecasts of the damage in every order of the domains.
"""

import dataclasses
import functools
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from rich.markup import escape

from mdrl_jax import records
from mdrl_jax.analysis.probe import build
from mdrl_jax.config import PreventSection
from mdrl_jax.evaluate import groups_of, held_out_rewards, validation_groups, validation_rewards
from mdrl_jax.recovery.planning import decision, orders, planner
from mdrl_jax.recovery.planning.decision import Action, Rewards
from mdrl_jax.recovery.planning.outcomes import finalists, outcomes
from mdrl_jax.recovery.rollback.evidence import kept_sample
from mdrl_jax.report.screen.console import Screen
from mdrl_jax.runtime import Runtime
from mdrl_jax.stage import Stage, orders_trained, peak
from mdrl_jax.stages.train import Trainer, steps_taken
from mdrl_jax.stats.estimate import figure_text
from mdrl_jax.workfolder import WorkFolder


@dataclasses.dataclass(eq=False)
class Planning:
    """Carries out the planning stages of one run.

    Attributes:
      runtime: model, devices, prompts and rewards of the run.
      folder: the work folder.
      stages: all stages of the run in order.
      screen: shows and logs the output.
      trainer: trains the refreshes.
      params_after: (name of a stage, or "base") -> the parameters at its end.
    """

    runtime: Runtime
    folder: WorkFolder
    stages: tuple[Stage, ...]
    screen: Screen
    trainer: Trainer
    params_after: Callable[[str], Any]

    def plan(self, stage: Stage) -> None:
        """Forecasts and ranks the actions at the parameters that the stage starts from; writes `recovery/plan.json`.

        If that file exists, nothing is done. Sampled completions are kept (`evidence.kept_sample`), except those that
        forecasts are made on.

        Args:
          stage: the stage `plan`.

        Raises:
          UserError: if no stage on the way trained a domain alone, if there are too few prompts to forecast on, or if
            too many rewards fail.
          Stopped: after a SIGTERM; samples of completions are saved, but no part of the plan.
        """
        file = self.folder.root / "recovery" / "plan.json"
        if file.exists():
            self.screen.print(f"{stage.name}: finished before, skipped")
            return
        started = time.monotonic()
        current = validation_rewards(self.runtime, self.params_after(stage.start))
        probe = build(self.runtime, self.runtime.config.train.grpo)
        made = planner.make_plan(
            self.runtime,
            probe,
            self.folder.root,
            self._before(stage),
            stage.start,
            self.params_after,
            current,
            self.screen.steps,
        )
        made["seconds"] = time.monotonic() - started
        records.write_json(file, made)
        self.screen.print(f"{stage.name}: {made['reason']}")
        self.screen.print(f"{stage.name}: {len(made['actions'])} actions in {made['seconds']:.0f} s")

    def recover(self, stage: Stage) -> Any:
        """Carries out the action that the plan picks.

        The parameters are not saved. Completions that a rollback has to sample are (`evidence.kept_sample`).

        Args:
          stage: the stage `recover`.

        Returns:
          The parameters after the action.

        Raises:
          UserError: if `recovery/plan.json` is missing or is not valid JSON, if too many rewards fail, or as in
            `Trainer.walk`.
          KeyError: if the plan lacks a field.
          Stopped: after a SIGTERM; the action starts over in the next run.
        """
        action = decision.best(self._plan())
        self.screen.print(f"{stage.name}: {action.words}")
        if action.kind == "nothing":
            return self.params_after(stage.start)
        if action.kind == "rollback":
            with self.screen.steps(stage.name, 1) as show:
                show(0, action.name)
                return self._work(stage).rolled_back(action)
        params = None
        with self.screen.steps(stage.name, action.steps) as show:
            show(0, action.name)
            for done, params, _ in self.trainer.walk(self._refresh(stage, action.domain, action.steps)):  # noqa: B007
                show(done, action.name)
        return params

    def trials(self, stage: Stage) -> None:
        """Tries every action of the plan and compares the results with the forecasts.

        The picked action and those that did best are scored on test prompts as well. Results that are in
        `recovery/trials.json` and `recovery/judged.json` already are not measured again. The comparison is written to
        `recovery/outcomes.json`, over an earlier one.

        Args:
          stage: the stage `trials`.

        Raises:
          UserError: if `recovery/plan.json` is missing, if it or a record of results is not valid JSON, if too many
            rewards fail, or as in `Trainer.walk`.
          KeyError: if a record lacks a field, or the plan lacks the action `nothing`.
          Stopped: after a SIGTERM; the results of finished actions are saved.
        """
        made = self._plan()
        actions = [decision.action_of(row) for row in made["actions"]]
        tried = self._measured(stage, "trials", actions, validation_rewards)
        last = finalists(made, tried)
        judged = self._measured(stage, "judged", [a for a in actions if a.name in last], held_out_rewards)
        found = outcomes(made, tried, judged)
        records.write_json(self.folder.root / "recovery" / "outcomes.json", found)
        self.screen.print(_summary(found))

    def _measured(
        self, stage: Stage, name: str, actions: Sequence[Action], measure: Callable[[Runtime, Any], Rewards]
    ) -> dict[str, Rewards]:
        """Scores the parameters after each action; the results so far are kept in `recovery/NAME.json`.

        Args:
          stage: the stage `trials`.
          name: name of the record, "trials" or "judged".
          actions: actions to carry out, except those that are in the record already.
          measure: (runtime, parameters) -> rewards by domain, [P, k].

        Returns:
          Name of the action -> rewards by domain, [P, k].
        """
        file = self.folder.root / "recovery" / f"{name}.json"
        found: dict[str, Any] = records.read_json(file) if file.exists() else {}
        with self.screen.steps(f"{stage.name}: {name}", len(actions)) as show:
            show(len(found), "compiling")
            for action, params in self._after(stage, [a for a in actions if a.name not in found]):
                found[action.name] = {d: x.tolist() for d, x in measure(self.runtime, params).items()}
                records.write_json(file, found)
                show(len(found), f"after {action.name}")
        return {name: {d: np.asarray(x) for d, x in by.items()} for name, by in found.items()}

    def _after(self, stage: Stage, actions: Sequence[Action]) -> Iterator[tuple[Action, Any]]:
        """Yields each action with the parameters after it; all refreshes of a domain come from one training run."""
        for action in actions:
            if action.kind == "nothing":
                yield action, self.params_after(stage.start)
        work = self._work(stage)
        for action in sorted(actions, key=lambda a: (a.donor, a.domain, a.rule, a.fraction)):
            if action.kind == "rollback":
                yield action, work.rolled_back(action)
        for domain in dict.fromkeys(a.domain for a in actions if a.kind == "refresh"):
            steps = {a.steps: a for a in actions if a.kind == "refresh" and a.domain == domain}
            for done, params, _ in self.trainer.walk(self._refresh(stage, domain, max(steps))):
                if done in steps:
                    yield steps[done], params

    def orders(self, stage: Stage) -> None:
        """Forecasts the damage in every order of the domains, and compares it with the orders that this run trained.

        θ_0 and the solo stages are scored on validation prompts, for the baseline by backward transfer.

        An order counts as trained if stages before this one trained each of its domains alone and once, one after the
        other from θ_0 (`stage.orders_trained`). The result is written to `recovery/orders.json`, over an earlier one.

        Args:
          stage: the stage `orders`.

        Raises:
          UserError: if the scores of an earlier stage are missing or are not valid JSON, the parameters of a solo stage
            cannot be read, or too many rewards fail.
          KeyError: if a record of scores lacks a field.
          Stopped: after a SIGTERM; sampled completions are saved, but no forecast.
        """
        solo = {d: self.params_after(f"solo-{d}") for d in stage.domains}
        drawn = {
            d: kept_sample(self.runtime, self.folder.root, f"solo-{d}", d, self.params_after) for d in stage.domains
        }
        runs = []
        for run in orders_trained(stage, self._before(stage)):
            scored = {s.domains[0]: self._evaluated(s) for s in run}
            runs.append((tuple(scored), scored))
        probe = build(self.runtime, self.runtime.config.train.grpo)
        start = self.params_after(stage.start)
        points = {orders.ORIGIN: start, **solo}
        scores = {at: validation_rewards(self.runtime, params, stage.domains) for at, params in points.items()}
        groups = validation_groups(self.runtime), groups_of(self.runtime, self.runtime.config.evaluate.split)
        made = orders.run(probe, solo.__getitem__, start, drawn, scores, runs, self.screen.steps, groups)
        records.write_json(self.folder.root / "recovery" / "orders.json", made)
        self.screen.print(f"{stage.name}: {len(made)} forecasts, {len(runs)} orders run; recovery/orders.json")

    def _before(self, stage: Stage) -> Sequence[Stage]:
        """The stages before this one; one that a target ended early has the steps that it took."""
        earlier = self.stages[: self.stages.index(stage)]
        return [
            dataclasses.replace(s, train=dataclasses.replace(s.train, steps=steps_taken(self.folder, s)))
            if s.kind == "grpo" and s.train.target
            else s
            for s in earlier
        ]

    def _plan(self) -> dict[str, Any]:
        return records.read_json(self.folder.root / "recovery" / "plan.json")

    def _evaluated(self, stage: Stage) -> dict[str, np.ndarray]:
        record = records.read_json(self.folder.evaluation(stage.folder))
        return {d: np.asarray(x) for d, x in record["rewards"].items()}

    def _refresh(self, stage: Stage, domain: str, steps: int) -> Stage:
        """The refresh that the plan forecasts: the domain's own stage without its prevention, from the plan's start."""
        own = peak(domain, stage.start, self.stages)
        assert own is not None  # the planner offers no refresh of a domain that was not trained
        train = dataclasses.replace(own.train, steps=steps, prevent=PreventSection())
        return dataclasses.replace(
            own, name=f"{stage.name}-{domain}", stream=f"refresh-{domain}", start=stage.start, train=train, keeps=()
        )

    def _work(self, stage: Stage) -> planner.Work:
        probe = build(self.runtime, self.runtime.config.train.grpo)
        past = planner.trail(self._before(stage), stage.start)
        read = functools.lru_cache(maxsize=3)(self.params_after)
        return planner.Work(self.runtime, probe, self.folder.root, past, stage.start, read)


def _summary(found: dict[str, Any]) -> str:
    held, regret = found["calibration"]["average"], found["regret"]
    return (
        f"{len(found['actions'])} actions tried: Spearman correlation of forecast and outcome "
        f"{_figure(found['spearman'])}, by domain {_figure(found['spearman_by_domain'])}; share of forecast intervals "
        f"(mean over domains) that contain the outcome {_figure(held['held'])}; regret of the pick "
        f"{_figure(regret)} points"
    )


def _figure(figure: dict[str, Any]) -> str:
    if figure["estimate"] is None:
        return f"– ({figure['reason']})"
    return escape(figure_text(figure["estimate"], figure["ci95"], ".3g"))
