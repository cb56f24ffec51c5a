"""Stages with a target: looks by hand, when the stage ends, what is kept, and runs that were killed or stopped."""

import collections
import functools
import json
import operator
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mdrl_jax.checkpoints import load_params, steps
from mdrl_jax.config import default, parse
from mdrl_jax.errors import UserError
from mdrl_jax.parallel import preemption
from mdrl_jax.parallel.sharding import MeshConfig, make_mesh, named
from mdrl_jax.report.screen.console import Screen
from mdrl_jax.rl.trainer import OptimizerConfig, TrainState, make_optimizer, state_shardings
from mdrl_jax.stage import Stage, resolve_stages
from mdrl_jax.stages import target, train
from mdrl_jax.stages.train import Recipe, Trainer, steps_taken
from mdrl_jax.stats.estimate import paired_difference
from mdrl_jax.workfolder import WorkFolder
from tests.kills import timeless

pytestmark = pytest.mark.usefixtures("fast_compile")

P, K = 20, 2
GOAL = 0.64
# Mean reward after a step; the parameters are the number of the step, and those of the target are −1.
CURVE = {-1: GOAL, 2: 0.5, 4: 0.63, 5: 0.55, 6: 0.64, 7: 0.9, 8: 0.7}


def rewards(mean: float, noise: int) -> np.ndarray:
    """Rewards [P, K] with exactly this mean, different for every prompt."""
    wave_P = np.random.default_rng(noise).permutation(np.linspace(-0.1, 0.1, P))
    return np.repeat((mean + wave_P)[:, None], K, 1)


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Scores by `CURVE` in place of sampling; the parameters that were scored."""
    found: list[int] = []

    def score(runtime: Any, params: Any, domains: Any) -> dict[str, np.ndarray]:
        which = int(params["embedding"][0])
        found.append(which)
        runtime.rollouts.spent["sampled"] += 100 + which
        assert list(domains) == ["math"]
        return {"math": rewards(CURVE[which], which + 1)}

    monkeypatch.setattr(target, "validation_rewards", score)
    return found


def configured(kind: str = "sft", **changes: Any) -> tuple[Any, tuple[Stage, ...]]:
    """A runtime without a model, and the stages `solo-math` and one with it as target."""
    name = {"sft": "sft-math", "grpo": "again-math"}[kind]
    c = default()
    c.stages, c.scored_domains = ("solo-math", name), ("math",)
    own = {"target": "solo-math", "target_every": 2, "steps": 10, "start": "base", "checkpoint_every": 4}
    c.stage_overrides = {name: own | changes}
    config = parse(c)
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    shapes = {"embedding": jax.ShapeDtypeStruct((2,), jnp.float32)}
    runtime = SimpleNamespace(
        config=config,
        mesh=mesh,
        shapes=shapes,
        shardings={"embedding": named(mesh)},
        prompts={("math", "validation"): SimpleNamespace(groups=None)},
        rollouts=SimpleNamespace(spent=collections.Counter()),
    )
    return runtime, resolve_stages(config, ("math",))


def params(which: int) -> Any:
    return {"embedding": jnp.asarray([which, 0], jnp.float32)}


LOOKS = {"tokens_trained": 60, "tokens_sampled": 99 + 102 + 104 + 106}  # of a run that looks at -1, 2, 4 and 6


def looked(file: Path, *which: int, **changes: Any) -> Any:
    """The looks after these steps."""
    runtime, stages = configured(**changes)
    found = target.looks(runtime, stages[1], file, lambda name: params({"solo-math": -1}[name]))
    assert [found.look(step, params(step)) for step in which][:-1] == [""] * (len(which) - 1)
    return found


# --- looks ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["sft", "grpo"])
def test_looks_are_paired_with_the_target(tmp_path: Path, asked: list[int], kind: str):
    found = looked(tmp_path / "a.json", 2, 4, kind=kind)
    record = json.loads((tmp_path / "a.json").read_text())
    assert record == found.record and asked == [-1, 2, 4]
    assert (record["stage"], record["domain"], record["target"]) == (found.record["stage"], "math", "solo-math")
    np.testing.assert_array_equal(record["rewards"], rewards(GOAL, 0))
    assert record["score"]["estimate"] == pytest.approx(64) and record["score"]["ci95"][0] < 64
    row = record["steps"][1]
    assert row["step"] == 4 and row["score"]["estimate"] == pytest.approx(63)
    by_hand = paired_difference(rewards(0.63, 5), rewards(GOAL, 0))
    assert row["difference"]["estimate"] == pytest.approx(-1) and row["difference"]["null"] == 0
    assert row["difference"]["ci95"] == pytest.approx([100 * by_hand.low, 100 * by_hand.high])
    assert record["reached"] is False and record["stopped"] == ""


def test_the_stage_ends_at_the_first_look_that_scores_as_well(tmp_path: Path, asked: list[int]):
    record = looked(tmp_path / "a.json", 2, 4, 6).record
    assert record["reached"] is True and record["stopped"] == "reached: 64.0 of 64.0 points after 6 steps"
    record = looked(tmp_path / "b.json", 2, 4, 8).record
    assert record["stopped"] == "reached: 70.0 of 64.0 points after 8 steps"
    short = looked(tmp_path / "c.json", 2, 4, steps=4).record
    assert short["reached"] is False and short["stopped"] == "not reached: 63.0 of 64.0 points after 4 steps"


def test_equal_means_are_equal_in_any_order():
    """A naive sum of these rewards depends on their order."""
    values = [0.1, 0.2, 0.3, 0.7, 0.6, 0.9]
    assert functools.reduce(operator.add, values) != functools.reduce(operator.add, values[::-1])
    row = {"step": 1, "rewards": [values], "score": {"estimate": 0.0}}
    for order in (values, values[::-1]):
        record = {"steps": [row], "rewards": [order], "score": {"estimate": 0.0}, "settings": {"steps": 9}}
        target.judge(record)
        assert record["reached"]
    less = {**row, "rewards": [[*values[:-1], 0.9 - 1e-9]]}
    record = {"steps": [less], "rewards": [values], "score": {"estimate": 0.0}, "settings": {"steps": 9}}
    target.judge(record)
    assert not record["reached"]


def test_a_group_of_prompts_is_one_unit(tmp_path: Path, asked: list[int]):
    groups = np.arange(P + 5) // 4
    runtime, stages = configured()
    runtime.prompts["math", "validation"].groups = groups
    runtime.config = parse({"recover": {"prompts": P}})
    found = target.looks(runtime, stages[1], tmp_path / "a.json", lambda name: params(-1))
    found.look(2, params(2))
    by_hand = paired_difference(rewards(0.5, 3), rewards(GOAL, 0), groups[:P])
    figure = found.record["steps"][0]["difference"]
    assert figure["n"] == 5 and figure["ci95"] == pytest.approx([100 * by_hand.low, 100 * by_hand.high])


def test_a_continued_record_scores_nothing_twice_and_needs_the_same_settings(tmp_path: Path, asked: list[int]):
    whole = looked(tmp_path / "a.json", 2, 4, 6).record
    looked(tmp_path / "b.json", 2, 4)
    asked.clear()
    again = looked(tmp_path / "b.json", 4, 6)
    assert asked == [6] and timeless(again.record) == timeless(whole)
    with pytest.raises(UserError, match=r"b.json holds looks with another every: delete the file to start over"):
        looked(tmp_path / "b.json", 2, target_every=1)


# --- training -------------------------------------------------------------------------------------------------------


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Steps that add 1 to the parameter, in place of training; their numbers."""
    done: list[int] = []

    def recipe(self: Trainer, stage: Stage) -> Recipe:
        optimizer = make_optimizer(OptimizerConfig())
        shardings = state_shardings(optimizer, self.runtime.shapes, self.runtime.shardings, self.runtime.mesh)

        def run(state: TrainState, first: int) -> Iterator[Any]:
            for step in range(first, stage.settings.steps):
                done.append(step + 1)
                self.runtime.rollouts.spent["trained"] += 10
                state = state.replace(params=jax.tree.map(lambda x: x + 1, state.params))  # pyright: ignore
                yield step + 1, state, {"loss": 0.0}

        return Recipe(optimizer, shardings, stage.settings.steps, stage.settings.checkpoint_every, run, 0)

    monkeypatch.setattr(Trainer, "_sft", recipe)
    return done


def trained(workdir: Path, **changes: Any) -> tuple[float, dict[str, Any], WorkFolder, Stage]:
    """Trains the stage with the target; the parameter at its end, and what it cost."""
    runtime, stages = configured(**changes)
    folder = WorkFolder(workdir)
    made = {"base": 0, "solo-math": -1}
    with Screen(workdir / "log.txt", "quiet") as screen:
        trainer = Trainer(runtime, folder, stages, screen, lambda name: params(made[name]), lambda domain: [])
        end, spent = trainer.train(stages[1])
    return float(end["embedding"][0]), spent, folder, stages[1]


def told(workdir: Path) -> str:
    return " ".join((workdir / "log.txt").read_text().split())


def kept(folder: WorkFolder, stage: Stage) -> float:
    """The parameter that a later stage reads."""
    runtime, _ = configured()
    like = {"embedding": jax.ShapeDtypeStruct((2,), jnp.float32, sharding=runtime.shardings["embedding"])}
    return float(load_params(folder.checkpoints(stage), like)["embedding"][0])


def test_training_ends_where_the_target_is_reached(tmp_path: Path, asked: list[int], counted: list[int]):
    end, spent, folder, stage = trained(tmp_path)
    assert end == kept(folder, stage) == 6 and counted == [1, 2, 3, 4, 5, 6] and asked == [-1, 2, 4, 6]
    assert steps_taken(folder, stage) == 6 and LOOKS.items() <= spent.items()
    assert "sft-math: score of solo-math reached: 64.0 of 64.0 points after 6 steps" in told(tmp_path)
    end, spent, *_ = trained(tmp_path)  # it is finished: nothing is trained or scored again
    assert (end, spent["tokens_trained"]) == (6, 60)
    assert counted == [1, 2, 3, 4, 5, 6] and asked == [-1, 2, 4, 6]


def test_training_that_does_not_reach_it_takes_all_steps_and_says_so(
    tmp_path: Path, asked: list[int], counted: list[int]
):
    end, _, folder, stage = trained(tmp_path, steps=5, target_every=4)
    assert end == kept(folder, stage) == 5 == steps_taken(folder, stage) and asked == [-1, 4, 5]
    assert "sft-math: score of solo-math not reached: 55.0 of 64.0 points after 5 steps" in told(tmp_path)
    assert trained(tmp_path, steps=5, target_every=4)[0] == 5 and asked == [-1, 4, 5]


def test_training_without_a_target_looks_at_nothing(tmp_path: Path, asked: list[int], counted: list[int]):
    end, _, folder, stage = trained(tmp_path, target="", steps=5)
    assert end == kept(folder, stage) == 5 == steps_taken(folder, stage) and asked == []
    assert not folder.target(stage).exists()


@pytest.mark.parametrize("killed_at", [3, 4, 5, 6])
def test_killed_training_ends_as_if_it_had_not_been(
    tmp_path: Path, asked: list[int], counted: list[int], monkeypatch: pytest.MonkeyPatch, killed_at: int
):
    """Killed after a step: before its look, or, at step 6, after the last look and before the checkpoint."""
    trained(tmp_path / "whole")
    whole = json.loads((tmp_path / "whole/targets/02-sft-math.json").read_text())

    class Killed(BaseException):
        pass

    def kill(*_: Any) -> None:
        raise Killed

    with monkeypatch.context() as patched, pytest.raises(Killed):
        if killed_at == 6:
            patched.setattr(train.StageCheckpoints, "save_params", kill)
        else:
            real = train.TensorBoard.scalars
            patched.setattr(
                train.TensorBoard, "scalars", lambda self, n, x: kill() if n == killed_at else real(self, n, x)
            )
        trained(tmp_path / "killed")
    asked.clear()
    end, spent, folder, stage = trained(tmp_path / "killed")
    assert end == kept(folder, stage) == 6 and LOOKS.items() <= spent.items()  # every look is paid once
    assert timeless(json.loads(folder.target(stage).read_text())) == timeless(whole)
    seen = {3: [4, 6], 4: [4, 6], 5: [6], 6: []}[killed_at]
    assert asked == seen  # looks before the kill are in the record


@pytest.mark.parametrize("when", ["before a look", "during a look"])
def test_stopped_training_saves_its_step_and_looks_at_it_when_it_goes_on(
    tmp_path: Path, asked: list[int], counted: list[int], monkeypatch: pytest.MonkeyPatch, when: str
):
    trained(tmp_path / "whole")
    whole = json.loads((tmp_path / "whole/targets/02-sft-math.json").read_text())
    counted.clear()
    for step in (2, 6):
        with (
            monkeypatch.context() as patched,
            pytest.raises(preemption.Stopped, match=f"after step {step} of sft-math"),
        ):
            if when == "before a look":
                patched.setattr(preemption, "noticed", lambda step=step: counted[-1] == step)
            else:
                real = target.validation_rewards

                def score(runtime: Any, now: Any, domains: Any, step: int = step, real: Any = real) -> Any:
                    if int(now["embedding"][0]) == step:
                        runtime.rollouts.spent["sampled"] += 50
                        raise preemption.Stopped("during scores", "saved")
                    return real(runtime, now, domains)

                patched.setattr(target, "validation_rewards", score)
            trained(tmp_path / "stopped")
    end, spent, folder, stage = trained(tmp_path / "stopped")
    assert counted == [1, 2, 3, 4, 5, 6] and LOOKS.items() <= spent.items()
    assert end == kept(folder, stage) == 6 and steps(folder.checkpoints(stage))[-1] == 6
    assert timeless(json.loads(folder.target(stage).read_text())) == timeless(whole)
    assert trained(tmp_path / "stopped")[0] == 6 and counted == [1, 2, 3, 4, 5, 6]
