"""The record of a refresh: paired scores by hand, when it stops, which step is kept, and a run that was killed."""

import collections
import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mdrl_jax.config import default, parse
from mdrl_jax.errors import UserError
from mdrl_jax.recovery.refresh import tracker as refresh
from mdrl_jax.recovery.refresh.contraction import Basis
from mdrl_jax.recovery.refresh.tracker import Tracker, chosen, scores, stop, variant
from mdrl_jax.stage import Stage, resolve_stages
from mdrl_jax.stats.estimate import paired_difference, ratio_of_means
from tests.kills import timeless

pytestmark = pytest.mark.usefixtures("fast_compile")

P, K = 40, 2
WAVE_P = np.linspace(-0.1, 0.1, P)
PEAK = {"math": 0.9}


def rewards(level: dict[str, float], noise: int = 0) -> dict[str, np.ndarray]:
    """By prompt, with exactly these means; `noise` shuffles the prompts, so that paired differences have errors."""
    rng = np.random.default_rng(noise)
    return {d: np.repeat((mean + rng.permutation(WAVE_P))[:, None], K, 1) for d, mean in level.items()}


# What each step's parameters, told by their first number, score: Math comes back, QA pays.
CURVE = {
    0.0: {"math": 0.5, "qa": 0.8, "cw": 0.9},
    1.0: {"math": 0.6, "qa": 0.8, "cw": 0.9},
    2.0: {"math": 0.8, "qa": 0.75, "cw": 0.9},
    3.0: {"math": 0.85, "qa": 0.65, "cw": 0.9},
    4.0: {"math": 0.86, "qa": 0.6, "cw": 0.9},
    9.0: {"math": 0.9, "qa": 0.7, "cw": 0.8},
}


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Scores by `CURVE` in place of sampling; the parameters that were scored."""
    found: list[float] = []

    def score(runtime: Any, params: Any, domains: Any = None) -> dict[str, np.ndarray]:
        which = float(params["embedding"][0])
        found.append(which)
        runtime.rollouts.spent["sampled"] += 100 + int(which)
        made = rewards(CURVE[which], int(which))
        return {d: x for d, x in made.items() if domains is None or d in domains}

    monkeypatch.setattr(refresh, "validation_rewards", score)
    return found


def setting(**recover: Any) -> tuple[Any, Stage]:
    c = default()
    c.stages = ("math", "qa", "cw", "refresh-math")
    c.scored_domains = ("math", "qa", "cw")
    c.stage_overrides = {"refresh-math": {"steps": 4}}
    c.recover.update({"limit": 100.0} | recover)
    config = parse(c)
    return runtime_of(config), resolve_stages(config, ("math", "qa", "cw"))[-1]


def runtime_of(config: Any) -> Any:
    return SimpleNamespace(config=config, prompts={}, rollouts=SimpleNamespace(spent=collections.Counter()))


def params(which: float) -> Any:
    rng = np.random.default_rng(int(which) + 1)
    layers = {name: {"kernel": jnp.asarray(rng.normal(size=(1, 4, 4)), jnp.float32)} for name in ("gate", "up", "down")}
    return {"embedding": jnp.asarray([which, 1.0]), "layers": layers}


PEAKS = {"math": lambda: params(9.0)}


def basis() -> Basis:
    vectors, _ = np.linalg.qr(np.random.default_rng(0).normal(size=(24, 2)))
    blocks = vectors.T.reshape(2, 3, 1, 4, 2)
    trees = {"gate": blocks[:, 0], "up": blocks[:, 1], "down": blocks[:, 2].swapaxes(2, 3)}
    slices = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), trees)
    return Basis("reward", 0, "cw", slices, np.array([2.0, 1.0]), np.array([[0, 3]]), np.ones((1, 2), np.float32))


def walk(tracker: Tracker, last: int = 4) -> int:
    """The loop: parameters of a step are gone once the next is made."""
    for step in range(last + 1):
        now = params(float(step))
        ends = tracker.look(step, now)
        jax.tree.map(lambda x: x.delete(), now)
        if ends:
            return step
    return last


# --- scores ---------------------------------------------------------------------------------------------------------


def test_scores_are_paired_with_the_start_and_the_peak():
    now, start, peak = rewards(CURVE[2.0], 2), rewards(CURVE[0.0], 0), rewards(PEAK, 9)["math"]
    row = scores(2, "math", now, start, peak)
    assert row["scores"]["math"]["estimate"] == pytest.approx(80)
    assert row["average"]["estimate"] == pytest.approx((80 + 75 + 90) / 3)
    assert set(row["drops"]) == {"qa", "cw"}
    by_hand = paired_difference(start["qa"], now["qa"])
    assert row["drops"]["qa"]["ci95"] == pytest.approx([100 * by_hand.low, 100 * by_hand.high])
    assert row["drops"]["qa"]["estimate"] == pytest.approx(5)
    by_hand = paired_difference(now["math"], peak)
    assert row["to_peak"]["ci95"] == pytest.approx([100 * by_hand.low, 100 * by_hand.high])
    assert row["to_peak"]["estimate"] == pytest.approx(-10)
    a, b, c = (x.mean(axis=1) for x in (now["math"], start["math"], peak))
    by_hand = ratio_of_means(a - b, c - b)
    assert by_hand is not None and row["fraction"]["estimate"] == pytest.approx(0.75)
    assert row["fraction"]["ci95"] == pytest.approx([by_hand.low, by_hand.high])
    np.testing.assert_array_equal(row["rewards"]["qa"], now["qa"])


def test_a_group_of_prompts_is_one_unit():
    now, start, peak = rewards(CURVE[2.0], 2), rewards(CURVE[0.0], 0), rewards(PEAK, 9)["math"]
    groups = {d: np.arange(len(x)) // 4 for d, x in now.items() if d != "cw"}
    row, plain = scores(2, "math", now, start, peak, groups), scores(2, "math", now, start, peak)
    assert row["scores"]["cw"] == plain["scores"]["cw"] and row["drops"]["cw"] == plain["drops"]["cw"]
    by_hand = paired_difference(start["qa"], now["qa"], groups["qa"]).in_points()
    assert row["drops"]["qa"] == by_hand.record() != plain["drops"]["qa"]
    a, b, c = (x.mean(axis=1) for x in (now["math"], start["math"], peak))
    by_hand = ratio_of_means(a - b, c - b, groups=groups["math"])
    assert by_hand is not None and row["fraction"] == by_hand.record()
    assert row["to_peak"] == paired_difference(now["math"], peak, groups["math"]).in_points().record()


def test_without_a_loss_or_a_peak_the_fraction_is_undefined():
    start = rewards(CURVE[0.0])
    row = scores(1, "math", start, start, rewards({"math": 0.5}, 3)["math"])
    assert row["fraction"]["estimate"] is None and "interval of the loss includes 0" in row["fraction"]["reason"]
    row = scores(1, "math", start, start)
    assert row["to_peak"]["estimate"] is None and "trained math alone" in row["to_peak"]["reason"]


# --- the rules ------------------------------------------------------------------------------------------------------


def record(step: int, to_peak: Any = (-9.0, -7.0), qa: Any = (-1.0, 4.0), average: Any = None) -> dict[str, Any]:
    def figure(ends: Any) -> dict[str, Any]:
        return {"estimate": None if ends is None else sum(ends) / 2, "ci95": None if ends is None else list(ends)}

    row = {"step": step, "to_peak": figure(to_peak), "drops": {"qa": figure(qa), "cw": figure((-3.0, 1.0))}}
    steps = [{"step": i, "average": {"estimate": a}} for i, a in enumerate(average or [])] or [row]
    return {"domain": "math", "settings": {"margin": 1.0, "limit": 2.0, "steps": 4}, "steps": steps}


@pytest.mark.parametrize(
    ("made", "reason"),
    [
        (record(1), ""),
        (record(4), "the budget ended"),
        (record(1, to_peak=(-0.9, 3.0)), "math is within 1 points of its peak"),
        (record(1, to_peak=(-1.1, 9.0)), ""),  # its estimate is above the peak, but not surely
        (record(1, to_peak=None), ""),
        (record(1, qa=(2.1, 9.0)), "qa lost 2.10 points at least"),
        (record(1, qa=(1.9, 9.0)), ""),  # its estimate is over the limit, but not surely
        (record(0, to_peak=(0.0, 1.0)), ""),
    ],
)
def test_when_a_refresh_stops(made: dict[str, Any], reason: str):
    assert stop(made).startswith(reason) and bool(stop(made)) == bool(reason)


def test_the_best_average_is_kept_the_earliest_of_equals():
    assert chosen(record(0, average=[70.0, 72.0, 75.0, 75.0, 74.0])) == 2
    assert chosen(record(0, average=[70.0, 69.0, 68.0])) == 0  # doing nothing is a candidate


# --- the tracker ----------------------------------------------------------------------------------------------------


def test_a_whole_refresh(tmp_path: Path, asked: list[float]):
    runtime, stage = setting()
    file = tmp_path / "recovery" / "refresh-math.json"
    tracker = Tracker(runtime, stage, file, PEAKS, {"math": [basis()]})
    assert walk(tracker) == 4
    assert asked == [9.0, 0.0, 1.0, 2.0, 3.0, 4.0]
    written = json.loads(file.read_text())
    assert written == tracker.record
    assert [row["step"] for row in written["steps"]] == [0, 1, 2, 3, 4]
    # Averages 73.3, 76.7, 81.7, 80, 78.7: Math went on rising after step 2, at QA's cost.
    assert written["chosen"] == 2 and written["stopped"] == "the budget ended"
    assert float(tracker.best["embedding"][0]) == 2.0
    error = jax.tree.map(lambda a, b: np.asarray(a - b), params(3.0), params(9.0))
    norm = np.sqrt(sum(np.sum(x**2) for x in jax.tree.leaves(error)))
    row = written["steps"][3]
    assert row["distance"] == pytest.approx(norm, rel=1e-5)
    assert row["subspaces"][0]["within"] ** 2 + row["subspaces"][0]["outside"] ** 2 == pytest.approx(norm**2, rel=1e-5)
    steps = [params(float(t)) for t in range(5)]
    pairs = zip(steps, steps[1:], strict=False)
    moved = [jax.tree.map(lambda a, b: np.asarray(a - b).ravel(), y, x) for x, y in pairs]
    by_hand = [np.linalg.norm(np.concatenate(jax.tree.leaves(m))) for m in moved]
    assert [r["path"] for r in written["steps"]] == pytest.approx([0.0, *np.cumsum(by_hand)], rel=1e-5)
    (rate,) = written["contraction"]
    first, last = (written["steps"][t]["subspaces"][0]["within"] for t in (0, 4))
    assert rate["within"]["estimate"] == pytest.approx((last / first) ** 0.25)
    json.dumps(written, allow_nan=False)


def test_a_refresh_is_repeated_with_other_keys_and_on_other_domains(tmp_path: Path, asked: list[float]):
    runtime, stage = setting(streams=3)
    file = tmp_path / "r.json"
    tracker = Tracker(runtime, stage, file, PEAKS, {"math": [basis()]})
    walk(tracker)
    asked.clear()
    repeats = tracker.repeats(stage)
    assert [(r.domains, r.stream, r.train.steps) for r in repeats] == [
        (("math",), "refresh-math-2", 4),
        (("math",), "refresh-math-3", 4),
        (("qa",), "refresh-math-by-qa", 4),
        (("cw",), "refresh-math-by-cw", 4),
    ]
    for i, repeat in enumerate(repeats[:3]):
        tracker.follow(repeat, params(5.0 + i))
    assert asked == []  # they are measured, not scored
    again = Tracker(runtime, stage, file, PEAKS, {"math": [basis()]})
    assert [r.stream for r in again.repeats(stage)] == ["refresh-math-by-cw"]
    (found,) = json.loads(file.read_text())["contraction"]
    norms = [tracker._displacement(params(x))["subspaces"][0]["within"] for x in (0.0, 4.0, 5.0, 6.0, 7.0)]
    rates = np.log(np.array(norms[1:]) / norms[0]) / 4
    assert found["streams"] == 3 and found["shrinks"]["estimate"] == pytest.approx(rates[:3].mean(), rel=1e-4)
    assert found["than_other"]["qa"]["estimate"] == pytest.approx(rates[:3].mean() - rates[3], rel=1e-3)
    assert Tracker(*setting(), tmp_path / "s.json").record.get("streams") is None


def test_a_distillation_of_several_domains_ends_when_each_is_near_its_peak(tmp_path: Path, asked: list[float]):
    c = default()
    c.stages, c.scored_domains, c.train.steps = ("qa", "math", "cw", "distill-all"), ("qa", "math", "cw"), 4
    c.train.prompts_per_step, c.recover.margin, c.recover.limit, c.recover.streams = 6, 12.0, 100.0, 2
    config = parse(c)
    stage = resolve_stages(config, ("math", "qa", "cw"))[-1]
    assert stage.domains == ("qa", "math", "cw")
    peaks = {d: lambda: params(9.0) for d in stage.domains}
    tracker = Tracker(runtime_of(config), stage, tmp_path / "d.json", peaks, {"math": [basis()]})
    assert walk(tracker) == 3
    written = json.loads((tmp_path / "d.json").read_text())
    assert written["domain"] == "math" and written["stopped"].startswith("all domains are within 12 points")
    for row in written["steps"]:
        assert row["to_peaks"]["math"] == row["to_peak"] and len(row["subspaces"]) == 1
    assert written["steps"][3]["to_peaks"]["qa"]["estimate"] == pytest.approx(-5)
    assert [(r.domains, r.stream) for r in tracker.repeats(stage)] == [(stage.domains, "distill-all-2")]
    with pytest.raises(UserError, match="a distillation with another distill"):
        other = dataclasses.replace(stage.train, distill=dataclasses.replace(stage.train.distill, form="full"))
        Tracker(tracker.runtime, dataclasses.replace(stage, train=other), tmp_path / "d.json", peaks)


def test_one_stream_or_no_subspace_is_not_repeated(tmp_path: Path, asked: list[float]):
    for name, streams, bases in (("a", 1, [basis()]), ("b", 3, [])):
        runtime, stage = setting(streams=streams)
        tracker = Tracker(runtime, stage, tmp_path / name, PEAKS, {"math": bases})
        walk(tracker)
        assert tracker.repeats(stage) == []


def test_what_makes_a_refresh_a_variant():
    def told(**changes: Any) -> str:
        c = default()
        c.stages, c.scored_domains = ("math", "qa", "refresh-qa", "refresh-math"), ("math", "qa")
        c.stage_overrides = {"refresh-math": {"start": "qa", "steps": 4, "prompts_per_step": 8} | changes}
        stages = resolve_stages(parse(c), ("math", "qa"))
        return variant(stages[-1], stages[0])

    assert told() == ""
    assert told(learning_rate=1.0) == f"its learning rate is 1, not {default().train.learning_rate:g}"
    assert told(prevent={"replay": 0.5, "domains": ("qa",)}) == "it keeps qa"
    assert told(start="refresh-qa") == "it starts from refresh-qa"
    assert told(grpo={"kl_coef": 0.1}) == "its settings of grpo are not those of math"


def test_it_stops_when_another_domain_has_surely_lost_too_much(tmp_path: Path, asked: list[float]):
    runtime, stage = setting(limit=8.0)
    tracker = Tracker(runtime, stage, tmp_path / "r.json", PEAKS)
    assert walk(tracker) == 3
    assert tracker.record["stopped"].startswith("qa lost") and tracker.record["chosen"] == 2


def test_looks_may_be_apart_and_the_last_step_is_always_looked_at(tmp_path: Path, asked: list[float]):
    runtime, stage = setting(every=3)
    tracker = Tracker(runtime, stage, tmp_path / "r.json", PEAKS)
    walk(tracker)
    assert [row["step"] for row in tracker.record["steps"]] == [0, 3, 4]


@pytest.mark.parametrize("killed_after", [0, 1, 3])
def test_a_killed_refresh_ends_as_if_it_had_not_been(tmp_path: Path, asked: list[float], killed_after: int):
    runtime, stage = setting(limit=8.0)
    make: Callable[[str], Tracker] = lambda name: Tracker(runtime, stage, tmp_path / name, PEAKS, {"math": [basis()]})  # noqa: E731
    whole = make("whole.json")
    walk(whole)
    walk(make("killed.json"), killed_after)
    asked.clear()
    runtime.rollouts.spent.clear()
    again = make("killed.json")
    assert walk(again) == 3
    assert asked == [float(t) for t in range(killed_after + 1, 4)]  # nothing is scored twice
    assert timeless(again.record) == timeless(whole.record)
    # The killed run scored θ* (109 tokens) and some steps (100 tokens and more each). These are counted once.
    assert again.paid["tokens_sampled"] == 109 + sum(100 + t for t in range(killed_after + 1))
    assert runtime.rollouts.spent["sampled"] == sum(100 + t for t in range(killed_after + 1, 4))
    assert not whole.paid
    assert float(again.best["embedding"][0]) == float(whole.best["embedding"][0]) == 2.0


def test_a_record_of_other_settings_is_refused(tmp_path: Path, asked: list[float]):
    file = tmp_path / "r.json"
    walk(Tracker(*setting(), file, PEAKS), 1)
    with pytest.raises(UserError, match="a refresh with another limit"):
        Tracker(*setting(limit=3.0), file, PEAKS)
    with pytest.raises(UserError, match="a refresh with another subspaces"):
        Tracker(*setting(), file, PEAKS, {"math": [basis()]})
    record = json.loads(file.read_text())
    file.write_text(json.dumps(record | {"settings": record["settings"] | {"patience": 3}}))
    with pytest.raises(UserError, match="a refresh with another patience"):
        Tracker(*setting(), file, PEAKS)


def test_a_domain_without_a_peak_is_refreshed_to_the_end_of_its_budget(tmp_path: Path, asked: list[float]):
    tracker = Tracker(*setting(), tmp_path / "r.json")
    assert walk(tracker) == 4 and asked[0] == 0.0
    assert tracker.record["contraction"] == [] and "distance" not in tracker.record["steps"][0]
    json.dumps(tracker.record, allow_nan=False)
