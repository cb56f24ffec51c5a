"""The stages `plan`, `trials`, `recover` and `orders`: forecasts, their check, and acting on them.

`recovery/plan.json` is the plan of a run. `trials` tries its actions, on validation prompts, and `recovery/trials.json`
holds the rewards action by action, so that a run that was stopped goes on; `recovery/outcomes.json` compares.
"""

import dataclasses
import functools
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from mdrl_jax import records
from mdrl_jax.analysis.probe import build
from mdrl_jax.evaluate import validation_rewards
from mdrl_jax.recovery import decision, orders, planner
from mdrl_jax.recovery.decision import Action
from mdrl_jax.recovery.evidence import kept_sample
from mdrl_jax.recovery.outcomes import outcomes
from mdrl_jax.report.console import Screen
from mdrl_jax.runtime import Runtime
from mdrl_jax.stages import Stage, peak
from mdrl_jax.training import Trainer
from mdrl_jax.workfolder import WorkFolder


@dataclasses.dataclass(eq=False)
class Planning:
    """Plans of one run."""

    runtime: Runtime
    folder: WorkFolder
    stages: tuple[Stage, ...]
    screen: Screen
    trainer: Trainer
    params_after: Callable[[str], Any]

    def plan(self, stage: Stage) -> None:
        """Forecasts and ranks the actions at the stage's start."""
        file = self.folder.root / "recovery" / "plan.json"
        if file.exists():
            self.screen.print(f"{stage.name}: finished before, skipped")
            return
        started = time.monotonic()
        current = validation_rewards(self.runtime, self.params_after(stage.start))
        probe = build(self.runtime, self.runtime.config.train.grpo)
        made = planner.plan(
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

    def recover(self, stage: Stage) -> tuple[Any, float]:
        """Parameters after what the plan picks, and the tokens it trained on."""
        action = decision.best(self._plan())
        self.screen.print(f"{stage.name}: {action.words}")
        if action.kind == "nothing":
            return self.params_after(stage.start), 0.0
        if action.kind == "rollback":
            with self.screen.steps(stage.name, 1) as show:
                show(0, action.name)
                return self._work(stage).rolled_back(action), 0.0
        params, trained = None, 0.0
        with self.screen.steps(stage.name, action.steps) as show:
            show(0, action.name)
            for done, reached, metrics in self.trainer.walk(self._refresh(stage, action.domain, action.steps)):
                params, trained = reached, trained + metrics["tokens"]
                show(done, action.name)
        return params, trained

    def trials(self, stage: Stage) -> None:
        """Tries every action of the plan, one after the other, and compares."""
        file = self.folder.root / "recovery" / "trials.json"
        tried: dict[str, Any] = records.read_json(file) if file.exists() else {}
        made = self._plan()
        actions = [decision.action_of(row) for row in made["actions"]]
        with self.screen.steps(stage.name, len(actions)) as show:
            show(len(tried), "compiling")

            def keep(action: Action, params: Any) -> None:
                rewards = validation_rewards(self.runtime, params)
                tried[action.name] = {d: x.tolist() for d, x in rewards.items()}
                records.write_json(file, tried)
                show(len(tried), f"after {action.name}")

            left = [a for a in actions if a.name not in tried]
            for action in left:
                if action.kind == "nothing":
                    keep(action, self.params_after(stage.start))
            work = self._work(stage)
            for action in sorted(left, key=lambda a: (a.donor, a.domain, a.rule, a.fraction)):
                if action.kind == "rollback":
                    keep(action, work.rolled_back(action))
            for domain in dict.fromkeys(a.domain for a in left if a.kind == "refresh"):
                steps = {a.steps: a for a in left if a.kind == "refresh" and a.domain == domain}
                for done, params, _ in self.trainer.walk(self._refresh(stage, domain, max(steps))):
                    if done in steps:
                        keep(steps[done], params)
        rewards = {name: {d: np.asarray(x) for d, x in by.items()} for name, by in tried.items()}
        found = outcomes(made, rewards["nothing"], rewards)
        records.write_json(self.folder.root / "recovery" / "outcomes.json", found)
        self.screen.print(_summary(found))

    def orders(self, stage: Stage) -> None:
        """Forecasts what every order of the domains would lose, beside the orders that were run."""
        solo = {d: self.params_after(f"solo-{d}") for d in stage.domains}
        drawn = {
            d: kept_sample(self.runtime, self.folder.root, f"solo-{d}", d, self.params_after) for d in stage.domains
        }
        before, runs = self._before(stage), []
        for prefix in ("", "reversed"):
            run = [s for s in before if s.prefix == prefix and s.kind == "grpo" and len(s.domains) == 1]
            if len(run) == len(stage.domains):
                scored = {s.domains[0]: self._evaluated(s) for s in run}
                runs.append((tuple(scored), scored))
        probe = build(self.runtime, self.runtime.config.train.grpo)
        made = orders.run(probe, solo.__getitem__, self.runtime.base_params(), drawn, runs, self.screen.steps)
        records.write_json(self.folder.root / "recovery" / "orders.json", made)
        self.screen.print(f"{stage.name}: {len(made)} objectives, {len(runs)} orders run; recovery/orders.json")

    def _before(self, stage: Stage) -> Sequence[Stage]:
        return self.stages[: self.stages.index(stage)]

    def _plan(self) -> dict[str, Any]:
        return records.read_json(self.folder.root / "recovery" / "plan.json")

    def _evaluated(self, stage: Stage) -> dict[str, np.ndarray]:
        record = records.read_json(self.folder.evaluation(stage.folder))
        return {d: np.asarray(x) for d, x in record["rewards"].items()}

    def _refresh(self, stage: Stage, domain: str, steps: int) -> Stage:
        """The refresh that was forecast: the domain's own stage again, from the plan's point."""
        own = peak(domain, stage.start, self.stages)
        assert own is not None  # the planner considers no other
        train = dataclasses.replace(own.train, steps=steps)
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
        f"{len(found['actions'])} actions tried: Spearman of forecast and outcome {_figure(found['spearman'])}, by "
        f"domain {_figure(found['spearman_by_domain'])}; intervals of the mean that held the outcome "
        f"{_figure(held['held'])}; regret of the pick {_figure(regret)} points"
    )


def _figure(figure: dict[str, Any]) -> str:
    if figure["estimate"] is None:
        return f"– ({figure['reason']})"
    interval = f" \\[{figure['ci95'][0]:.3g}, {figure['ci95'][1]:.3g}]" if figure["ci95"] else ""
    return f"{figure['estimate']:.3g}{interval}"
