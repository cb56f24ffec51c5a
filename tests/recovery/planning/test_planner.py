"""Forecasts of actions: exact where the world is what they assume, honest where it is not, and a choice by rule."""

import dataclasses
import itertools
import json
import math
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from scipy.stats import binomtest, t

from mdrl_jax import tree
from mdrl_jax.analysis.samples import Sample
from mdrl_jax.config import TrainSection, default, parse
from mdrl_jax.errors import UserError
from mdrl_jax.model.transformer import param_shapes
from mdrl_jax.parallel.sharding import param_shardings
from mdrl_jax.recovery.planning import lookahead, planner
from mdrl_jax.recovery.planning.decision import Action, Outlook, best, decide, promising
from mdrl_jax.recovery.planning.forecast import (
    Forecast,
    Known,
    Model,
    Shift,
    fit,
    forecast,
    log_odds,
    score,
    shift,
    together,
)
from mdrl_jax.recovery.planning.importance import Reweighted
from mdrl_jax.recovery.planning.outcomes import clopper_pearson, finalists, outcomes
from mdrl_jax.rl.logprobs import token_log_probs
from mdrl_jax.rl.policy import join
from mdrl_jax.rl.trainer import OptimizerConfig, make_optimizer
from mdrl_jax.stage import resolve_stages
from mdrl_jax.stages import grpo
from tests.told import Told

pytestmark = pytest.mark.usefixtures("fast_compile")

# --- the link and its errors ----------------------------------------------------------------------------------------


def test_the_shift_is_the_derivative_of_the_log_odds():
    """Of rewards of mean J whose derivative is J′: (d/dε) ln J/(1 − J) by finite differences."""
    rng = np.random.default_rng(0)
    rewards_MB, gain_M = rng.uniform(0.2, 0.9, (12, 4000)), rng.normal(0.1, 0.02, 12)
    step, mean = 1e-4, rewards_MB.mean()
    ends = [math.log(j / (1 - j)) for j in (mean + e * gain_M.mean() for e in (step, -step))]
    found = shift(gain_M, rewards_MB)
    assert found.value == pytest.approx((ends[0] - ends[1]) / (2 * step), rel=1e-3)
    assert found.scaled(-3.0) == Shift(-3 * found.value, 3 * found.stderr)
    assert shift(np.full(12, 0.1), np.full((12, 8), 0.5)).stderr == pytest.approx(0)


def test_the_error_of_a_shift_is_that_of_repeated_samples():
    rng = np.random.default_rng(1)

    def drawn() -> Shift:
        rewards_MB = rng.binomial(1, 0.6, (12, 16))
        return shift(0.1 + rng.normal(0, 0.05, 12), rewards_MB)

    some = [drawn() for _ in range(300)]
    assert np.mean([s.stderr**2 for s in some]) == pytest.approx(np.var([s.value for s in some]), rel=0.25)


def test_log_odds_are_finite_and_undone_by_the_score():
    for rewards in (np.zeros((5, 2)), np.ones((5, 2)), np.full((500, 2), 0.3)):
        assert math.isfinite(log_odds(rewards))
    assert score(log_odds(np.full((5000, 2), 0.3))) == pytest.approx(0.3, abs=1e-4)


def known(x: float, y: float, size: float = 1.0, kind: str = "refresh", own: bool = False) -> Known:
    return Known(kind, own, "math", "qa", size, x, y)


def test_a_model_of_changes_that_bend_with_size_has_their_bend_and_no_spread():
    model = fit([known(x, (1 - 0.2 * size) * x, size) for x, size in ((-1.0, 1.0), (0.5, 2.0), (2.0, 1.5))])
    assert (model.bend, model.n, model.longest) == (pytest.approx(-0.2), 3, 2.0)
    assert model.spread == pytest.approx(0, abs=1e-12)
    assert (model.slope(0.0), model.slope(1.0)) == (1.0, pytest.approx(0.8))
    assert model.slope(9.0) == model.slope(2.0)  # no further than is known


def test_a_change_of_size_0_says_nothing_about_errors():
    """As that of a placebo, whose learning rate is 0."""
    real = [known(x, y, size) for x, y, size in ((1.0, 1.5, 1.0), (2.0, 1.0, 2.0), (-1.0, -0.2, 0.5))]
    assert fit([known(0.0, 0.1, 0.0), *real]) == fit(real)
    assert fit([known(0.0, 0.1, 0.0)]) == fit([])


def test_the_spread_is_of_errors_left_out_one_by_one_in_units_of_size():
    x, y, size = np.array([1.0, 2.0, -1.0]), np.array([1.5, 1.0, -0.2]), np.array([1.0, 2.0, 0.5])
    errors = []
    for i in range(3):
        kept = np.arange(3) != i
        bend = np.linalg.lstsq(x[kept, None], (y - x)[kept] / size[kept])[0][0]
        errors.append((y[i] - x[i]) / size[i] - bend * x[i])
    model = fit([known(*row) for row in zip(x, y, size, strict=True)])
    assert model.spread == pytest.approx(np.sqrt(np.mean(np.square(errors))))


@pytest.mark.parametrize("n", [0, 1])
def test_without_a_past_a_forecast_has_no_interval(n: int):
    model = fit([known(1.0, 0.5)] * n)
    assert model.spread == math.inf and model.record()["spread"] is None
    made = forecast(0.0, Shift(1.0, 0.1), 1.0, model, 0, 10)
    record = made.estimate().record(0.0)
    assert record["ci95"] is None
    assert record["estimate"] == pytest.approx(100 * (score(0.5 if n else 1.0) - 0.5))
    assert together([made, made]).estimate().record()["ci95"] is None


def test_a_forecast_keeps_to_scores_and_its_interval_is_that_of_students_t():
    model = Model(0.0, 0.5, 1.0, 9)
    made = forecast(1.0, Shift(0.4, 0.3), 2.0, model, 3, 50)
    found = made.estimate()
    half = t.ppf(0.975, 8) * math.hypot(0.3, 1.0)
    assert found.low == pytest.approx(100 * (score(1.4 - half) - score(1.0)), abs=0.2)
    assert found.high == pytest.approx(100 * (score(1.4 + half) - score(1.0)), abs=0.2)
    far = forecast(3.0, Shift(20.0, 9.0), 1.0, model, 0, 50).estimate(100 * float(score(3.0)))
    assert 0 <= far.low <= far.high <= 100


def test_intervals_hold_what_they_say_in_simulated_runs():
    """Past and candidate from one law: log-odds move by (1 − 0.2 size) x, with errors in proportion to size."""
    rng = np.random.default_rng(2)
    held = 0
    for _ in range(400):
        size = rng.uniform(0.5, 1.5, 13)
        x = rng.normal(0, 1, 13) * size
        y = (1 - 0.2 * size) * x + 0.3 * size * rng.normal(size=13)
        model = fit([known(*row) for row in zip(x[1:], y[1:], size[1:], strict=True)])
        seen = x[0] + 0.1 * rng.normal()
        found = forecast(0.5, Shift(seen, 0.1), size[0], model, 0, 48).estimate()
        held += found.includes(100 * float(score(0.5 + y[0]) - score(0.5)))
    assert binomtest(held, 400, 0.95).pvalue > 1e-3, held


# --- the choice -----------------------------------------------------------------------------------------------------

CURRENT = {d: np.full((50, 4), j) for d, j in (("code", 0.9), ("math", 0.6), ("qa", 0.7))}
HISTORY = [
    Known(kind, own, f"s{i}", d, 1.0, x, x + e)
    for kind, own in itertools.product(("refresh", "rollback"), (True, False))
    for i, (d, x, e) in enumerate([("code", 1.0, 0.1), ("math", 2.0, -0.1), ("qa", -1.0, 0.05), ("qa", 0.5, -0.02)])
]


def outlook(action: Action, **shifts: float) -> Outlook:
    made = {d: Shift(shifts.get(d, 0.0), 0.01) for d in CURRENT}
    return Outlook(action, made, 0.5 if action.domain else 0.0, action.donor or action.domain)


OUTLOOKS = [
    outlook(Action()),
    outlook(Action("refresh", "math", 2), math=0.5, qa=-0.05),
    outlook(Action("refresh", "math", 4), math=1.0, qa=-0.3),
    outlook(Action("rollback", "math", 0, "qa", "removing", 0.01, 1.0), math=0.2, qa=-0.05),
]


def made(outlooks: list[Outlook] = OUTLOOKS, limit: float = 2.0, current: Any = CURRENT) -> dict[str, Any]:
    return decide("cw", current, outlooks, HISTORY, limit)


def test_nothing_leaves_the_scores_as_they_are():
    row = next(r for r in made()["actions"] if r["name"] == "nothing")
    for domain, rewards in CURRENT.items():
        assert row["scores"][domain]["estimate"] == pytest.approx(100 * rewards.mean())
        assert row["scores"][domain]["ci95"] == pytest.approx([100 * rewards.mean()] * 2)
        assert row["changes"][domain]["ci95"] == [0.0, 0.0]
    assert row["average_change"]["estimate"] == 0 and row["allowed"] and row["risk"] == 0


def test_the_limit_rules_out_what_gains_most():
    record = made()
    assert record["pick"] == "refresh-math-2" and best(record) == Action("refresh", "math", 2)
    by_name = {r["name"]: r for r in record["actions"]}
    assert not by_name["refresh-math-4"]["allowed"] and by_name["refresh-math-4"]["collateral"]["domain"] == "qa"
    assert by_name["refresh-math-4"]["rank"] == 4
    assert "refresh math for 4 steps" in record["reason"] and "over the limit" in record["reason"]
    for limit in (0.0, 1.0, 5.0, 50.0):
        for row in made(limit=limit)["actions"]:
            loss = max(-row["changes"][d]["estimate"] for d in CURRENT if d != row["domain"])
            assert row["allowed"] == (loss <= limit)
    assert made(limit=50.0)["pick"] == "refresh-math-4"


def test_a_donor_is_no_exception_from_the_limit():
    costly = outlook(Action("rollback", "math", 0, "qa", "removing", 0.1, 1.0), math=2.0, qa=-1.0)
    record = made([*OUTLOOKS, costly])
    assert not next(r for r in record["actions"] if r["name"] == costly.action.name)["allowed"]


def test_errors_of_the_domain_that_is_moved_are_told_by_those_of_its_like():
    """In this past what is trained, or gives its edit back, is foretold badly, and all others well."""
    past = [
        dataclasses.replace(k, measured=k.forecast * (1.5 if k.own and i % 2 else 1)) for i, k in enumerate(HISTORY)
    ]
    rows = {r["name"]: r["changes"] for r in decide("cw", CURRENT, OUTLOOKS, past, 2.0)["actions"]}

    def widest(name: str) -> str:
        return max(CURRENT, key=lambda d: np.diff(rows[name][d]["ci95"])[0])

    assert widest("refresh-math-2") == "math" and widest("rollback-math-qa-removing-0.01-1") == "qa"


def test_weights_speak_for_the_domains_of_which_they_say_enough():
    """The rollback's error is then theirs alone, a refresh's also that of its like in the past."""
    said = {"math": Reweighted(400.0, Shift(0.6, 0.02)), "qa": Reweighted(3.0, None)}
    rollback, refresh = (dataclasses.replace(OUTLOOKS[i], reweighted=said) for i in (3, 1))
    rows = {r["name"]: r for r in made([rollback, refresh, OUTLOOKS[0]])["actions"]}
    plain = {r["name"]: r for r in made([OUTLOOKS[3], OUTLOOKS[1], OUTLOOKS[0]])["actions"]}
    now = log_odds(CURRENT["math"])
    for name in (rollback.action.name, refresh.action.name):
        assert rows[name]["changes"]["math"]["estimate"] == pytest.approx(
            100 * (score(now + 0.6) - score(now)), abs=0.3
        )
        assert rows[name]["changes"]["qa"] == plain[name]["changes"]["qa"]
        assert rows[name]["changes"]["code"] == plain[name]["changes"]["code"]  # nothing was said of it
        assert rows[name]["weighed"] == {
            "math": {"effective": 400.0, "shift": {"value": 0.6, "stderr": 0.02}},
            "qa": {"effective": 3.0, "shift": None},
        }
    half = t.ppf(0.975, 49) * 0.02
    low, high = rows[rollback.action.name]["changes"]["math"]["ci95"]
    assert low == pytest.approx(100 * (score(now + 0.6 - half) - score(now)), abs=0.05)
    assert high == pytest.approx(100 * (score(now + 0.6 + half) - score(now)), abs=0.05)
    assert np.diff(rows[refresh.action.name]["changes"]["math"]["ci95"])[0] > 1.5 * (high - low)


def test_weights_on_a_single_prompt_have_no_interval():
    said = {"math": Reweighted(400.0, Shift(0.6, 0.02))}
    current = CURRENT | {"math": CURRENT["math"][:1]}
    record = decide("end", current, [dataclasses.replace(OUTLOOKS[3], reweighted=said)], [], 2.0)
    change = record["actions"][0]["changes"]["math"]
    assert change["ci95"] is None and change["estimate"] == pytest.approx(
        100 * (score(log_odds(current["math"]) + 0.6) - score(log_odds(current["math"])))
    )


def test_the_most_promising_are_those_of_the_highest_mean_whatever_the_limit():
    record = made()
    assert [a.name for a in promising(record, 2)] == ["refresh-math-4", "refresh-math-2"]
    assert not record["actions"][-1]["allowed"] and promising(record, 0) == []
    assert len(promising(record, 9)) == 3  # all but nothing


def test_where_nothing_gains_nothing_is_done():
    record = made([outlook(Action("refresh", "math", 2), math=-0.5), outlook(Action())])
    assert record["pick"] == "nothing" and record["reason"].startswith("Do nothing")


def test_the_mean_over_domains_is_that_of_the_domains_forecasts():
    for row in made()["actions"]:
        parts = [row["changes"][d] for d in CURRENT]
        assert row["average_change"]["estimate"] == pytest.approx(np.mean([p["estimate"] for p in parts]))
        assert row["average"]["null"] == pytest.approx(np.mean([100 * x.mean() for x in CURRENT.values()]))
        low, high = row["average_change"]["ci95"]
        # Errors of different domains are independent, so they partly cancel in the mean.
        assert np.mean([p["ci95"][0] for p in parts]) <= low <= high <= np.mean([p["ci95"][1] for p in parts])


def test_no_order_of_inputs_matters_and_ties_are_broken():
    record = made()
    backwards = {d: CURRENT[d] for d in reversed(CURRENT)}
    turned = [dataclasses.replace(o, shifts=dict(reversed(list(o.shifts.items())))) for o in reversed(OUTLOOKS)]
    assert json.dumps(made(turned, current=backwards)) == json.dumps(record)
    equal = [outlook(Action("refresh", d, n), math=0.0) for d, n in (("qa", 2), ("math", 2), ("math", 1))]
    still = [dataclasses.replace(o, size=0.0, shifts={d: Shift(0, 0) for d in CURRENT}) for o in equal]
    for some in itertools.permutations([*still, OUTLOOKS[0]]):
        names = [r["name"] for r in made(list(some))["actions"]]
        assert names == ["nothing", "refresh-math-1", "refresh-math-2", "refresh-qa-2"]


def test_a_plan_is_json_without_holes_in_it():
    record = decide("cw", CURRENT, OUTLOOKS, [], 2.0)
    assert json.loads(json.dumps(record, allow_nan=False)) == record
    assert all(r["risk"] is None for r in record["actions"] if r["kind"] != "nothing")
    assert "error not known" in record["reason"]


# --- the verification -----------------------------------------------------------------------------------------------


def after(rng: Any, **change: float) -> dict[str, np.ndarray]:
    return {d: x + change.get(d, 0.0) + rng.normal(0, 0.02, (len(x), 1)) for d, x in CURRENT.items()}


def test_outcomes_are_ranked_held_and_regretted_by_hand():
    rng = np.random.default_rng(0)
    actions = [outlook(Action("refresh", "math", n), math=0.1 * n) for n in range(1, 7)]
    record = made([OUTLOOKS[0], *actions])
    true = {f"refresh-math-{n}": {"math": 0.02 * n} for n in range(1, 6)} | {"nothing": {}}
    true["refresh-math-6"] = {"math": 0.05, "qa": -0.01}
    measured, judged = ({name: after(rng, **change) for name, change in true.items()} for _ in range(2))
    measured["nothing"] = CURRENT
    found = outcomes(record, measured, judged)
    assert 0.3 < found["spearman"]["estimate"] < 1  # five in order, the sixth out of it
    # Six lengths of one refresh are one independent case.
    assert found["spearman"]["n"] == found["spearman_by_domain"]["n"] == 1
    assert found["spearman"]["ci95"] is None and "1 independent groups" in found["spearman"]["reason"]
    assert found["calibration"]["domain"]["held"]["n"] == 1
    regret = found["regret"]
    assert (regret["pick"], regret["best"]) == ("refresh-math-6", "refresh-math-5")
    expected = np.mean([100 * np.mean(judged["refresh-math-5"][d] - judged["refresh-math-6"][d]) for d in CURRENT])
    assert regret["estimate"] == pytest.approx(expected)
    gained = np.mean([100 * np.mean(judged["refresh-math-3"][d] - judged["nothing"][d]) for d in CURRENT])
    assert regret["judged"]["refresh-math-3"]["gain"] == pytest.approx(gained)
    rows = {r["name"]: r for r in found["actions"]}
    held = 0
    for name in true.keys() - {"nothing"}:
        low, high = rows[name]["average_change"]["forecast"]["ci95"]
        held += low <= np.mean([100 * np.mean(measured[name][d] - CURRENT[d]) for d in CURRENT]) <= high
    assert found["calibration"]["average"]["held"]["estimate"] == pytest.approx(held / 6)
    wider = found["calibration"]["domain"]
    assert wider["held_with_error"]["estimate"] >= wider["held"]["estimate"]
    json.dumps(found, allow_nan=False)


def changed(**change: float) -> dict[str, np.ndarray]:
    return {d: x + change.get(d, 0.0) for d, x in CURRENT.items()}


def test_an_action_over_the_limit_is_not_what_a_pick_is_held_against():
    """Neither one that is over it on validation prompts, nor one that is on test prompts alone."""
    record = made([OUTLOOKS[0], outlook(Action("refresh", "math", 1), math=0.3), OUTLOOKS[1], OUTLOOKS[2]])
    assert record["pick"] == "refresh-math-2"
    measured = {
        "nothing": CURRENT,
        "refresh-math-1": changed(math=0.1),
        "refresh-math-2": changed(math=0.15),
        "refresh-math-4": changed(math=0.3, qa=-0.05),
    }
    assert finalists(record, measured) == ["nothing", "refresh-math-2", "refresh-math-1"]
    regret = outcomes(record, measured, {n: measured[n] for n in finalists(record, measured)})["regret"]
    assert (regret["estimate"], regret["best"]) == (pytest.approx(0), "refresh-math-2") and regret["pick_within_limit"]
    measured["refresh-math-4"] = changed(math=0.3, qa=-0.01)  # 1 point: within the limit of 2
    assert finalists(record, measured)[:3] == ["nothing", "refresh-math-2", "refresh-math-4"]
    judged = dict(measured)
    assert outcomes(record, measured, judged)["regret"]["best"] == "refresh-math-4"
    judged["refresh-math-4"] = changed(math=0.3, qa=-0.03)
    assert outcomes(record, measured, judged)["regret"]["best"] == "refresh-math-2"
    judged["refresh-math-2"] = changed(math=0.4, code=-0.03)  # the pick is over it, and better than what is not
    found = outcomes(record, measured, judged)["regret"]
    assert not found["pick_within_limit"] and found["best"] == "refresh-math-1" and found["estimate"] < 0
    del judged["refresh-math-2"]
    assert outcomes(record, measured, judged)["regret"] is None


def test_the_best_of_noise_is_judged_afresh():
    """Ninety actions that do nothing: the best of them seems to gain, and on other prompts does not."""
    rng, gains, regrets = np.random.default_rng(5), [], []
    actions = [outlook(Action("refresh", "math", n), math=1e-3 * n) for n in range(1, 90)]
    record = made([OUTLOOKS[0], *actions])
    for _ in range(20):
        measured = {row["name"]: after(rng) for row in record["actions"]} | {"nothing": CURRENT}
        last = finalists(record, measured)
        assert len(last) in (9, 10)  # the pick may be among the eight
        judged = {name: after(rng) for name in last}
        best = last[2]
        gains.append(np.mean([np.mean(measured[best][d] - measured[record["pick"]][d]) for d in CURRENT]))
        regrets.append(np.mean([np.mean(judged[best][d] - judged[record["pick"]][d]) for d in CURRENT]))
        assert outcomes(record, measured, judged)["regret"]["n"] == 150
    assert np.mean(gains) > 4 * np.std(gains) / math.sqrt(20) and np.mean(gains) > 4 * abs(np.mean(regrets))


@pytest.mark.parametrize(("k", "n"), [(0, 10), (10, 10), (19, 20), (3, 7)])
def test_the_interval_of_a_share_is_the_exact_one(k: int, n: int):
    found, exact = clopper_pearson(k, n), binomtest(k, n).proportion_ci(0.95, "exact")
    assert (found.low, found.high) == pytest.approx((exact.low, exact.high))


# --- the whole, in a world where log-odds are linear in the parameters ------------------------------------------------

WORDS = ("code", "math", "qa")
SLOPES = {d: np.random.default_rng(i).normal(size=6).astype(np.float32) for i, d in enumerate(WORDS)}
STEPS, RATE = 10, 0.02
THETA: dict[str, Any] = {"base": {"w": jnp.zeros(6)}}
for before, name in zip(("base", "code", "math"), WORDS, strict=True):
    THETA[name] = {"w": THETA[before]["w"] + STEPS * RATE * SLOPES[name]}


BENT = {"by": 0.0}  # of log-odds, which are linear at 0


def level(params: Any, domain: str) -> float:
    x = float(SLOPES[domain] @ np.asarray(params["w"]))
    return float(score(x - BENT["by"] * x * x))


@dataclasses.dataclass(frozen=True)
class Seen:
    """A sample of a world without noise; `bias` is what fitting its noise adds to first orders."""

    domain: str
    rewards_PG: np.ndarray
    bias: float = 0.0
    valid_BT, weight_B = np.ones((1, 7)), np.ones(1)  # 7 tokens in a micro-batch


def seen(params: Any, domain: str, bias: float = 0.0) -> Seen:
    """Completions that succeed or fail, each prompt's in exactly the share that the point has."""
    one_G = np.arange(2000) < round(2000 * level(params, domain))
    return Seen(domain, np.tile(one_G.astype(float), (8, 1)), bias)


class World:
    """Stands for the probe: the gradient of each domain's loss, exact but for a sample's bias."""

    def __init__(self, held: int, reweighted: int = 0):
        config: Any = default()
        config.stages, config.scored_domains = WORDS, WORDS
        config.train.steps, config.train.learning_rate = STEPS, RATE
        config.analyze.held = held
        config.recover.update({"fractions": (0.5, 1.0), "strengths": (0.5, 1.0), "n_reweighted": reweighted})
        self.config = parse(config)
        self.runtime = SimpleNamespace(config=self.config, rollouts=SimpleNamespace(spent=Counter()))
        self.gradients = self.passes = 0

    def rows(self, sample: Seen) -> list[Seen]:
        return [sample] * 4

    def gradient(self, params: Any, rows: Seen) -> Any:
        self.gradients += 1
        j, slope = level(params, rows.domain), SLOPES[rows.domain]
        bend = 1 - 2 * BENT["by"] * float(slope @ np.asarray(params["w"]))
        return {"w": jnp.asarray(-(j * (1 - j) * bend + rows.bias) * slope)}

    def log_probs(self, params: Any, sample: Seen) -> np.ndarray:
        self.passes += 1
        j = level(params, sample.domain)
        return np.log(np.where(sample.rewards_PG > 0, j, 1 - j))[..., None]

    def along(self, params: Any, v: Any, alpha: Any) -> Any:
        return tree.axpy(alpha, v, params)

    def difference(self, a: Any, b: Any) -> Any:
        return tree.sub(a, b)


class Refreshes:
    """Stands for the rehearsal: each step is along the domain's slope."""

    def __init__(self, probe: Any):
        pass

    def first(self, params: Any, sample: Seen, train: Any) -> Any:
        return {"w": SLOPES[sample.domain]}

    def walk(self, params: Any, sample: Seen, train: Any, steps: int) -> Iterator[Any]:
        for done in range(1, steps + 1):
            yield {"w": params["w"] + done * RATE * SLOPES[sample.domain]}


def planned(monkeypatch: pytest.MonkeyPatch, held: int = 8, **options: Any) -> tuple[dict[str, Any], World]:
    """The plan of the world; `stored` and `bias` are those of samples at hand and of unseen ones."""
    world = World(held, options.get("reweighted", 0))
    monkeypatch.setattr(planner, "at_hand", lambda runtime, stored: stored)

    def kept(runtime: Any, folder: Path, point: str, domain: str, params: Any) -> Seen:
        return seen(THETA[point], domain, options.get("stored", 0.0))

    monkeypatch.setattr(planner, "kept_sample", kept)
    monkeypatch.setattr(planner, "unseen", lambda runtime, params, d: seen(params, d, options.get("bias", 0.0)))
    monkeypatch.setattr(planner, "OffPolicyLookahead", Refreshes)
    monkeypatch.setattr(planner.evidence, "scores", lambda probe, rule, ends, sample: (options["scores"](ends), {}))
    options.setdefault("scores", lambda ends: tree.scale(1.0, jax.tree.map(jnp.abs, ends.edit)))
    runtime: Any = world.runtime
    stages = resolve_stages(world.config, WORDS)
    current = {d: np.full((8, 2000), level(THETA["qa"], d)) for d in WORDS}
    probe: Any = world
    record = planner.make_plan(
        runtime, probe, Path("."), stages, "qa", THETA.__getitem__, current, options.get("told", Told()),
        options.get("actions"),
    )  # fmt: skip
    return record, world


def outcome(action: Action) -> dict[str, float]:
    """What an action does in this world, in points."""
    w = np.asarray(THETA["qa"]["w"])
    if action.kind == "refresh":
        w = w + action.steps * RATE * SLOPES[action.domain]
    elif action.kind == "rollback":
        edit = np.asarray(THETA[action.donor]["w"] - THETA[{"qa": "math", "math": "code"}[action.donor]]["w"])
        kept = np.argsort(-np.abs(edit))[: round(action.fraction * 6)]
        w = w - action.strength * np.where(np.isin(np.arange(6), kept), edit, 0)
    return {d: 100 * level({"w": w}, d) for d in WORDS}


@pytest.mark.parametrize("reweighted", [0, 5, 18])
def test_where_log_odds_are_linear_forecasts_are_outcomes(reweighted: int, monkeypatch):
    record, _ = planned(monkeypatch, reweighted=reweighted)
    assert sum(bool(row["weighed"]) for row in record["actions"]) == reweighted
    assert len(record["actions"]) == 1 + 3 * 2 + 3 * 4 and record["left_out"] == {}
    for row in record["actions"]:
        action = Action(**{f.name: row[f.name] for f in dataclasses.fields(Action)})
        for domain, expected in outcome(action).items():
            assert row["scores"][domain]["estimate"] == pytest.approx(expected, abs=0.1), (action, domain)
            low, high = row["scores"][domain]["ci95"]
            assert low - 0.1 <= expected <= high + 0.1 and high - low < 1
    tried = [r for r in record["actions"] if r["allowed"]]
    assert record["pick"] == max(tried, key=lambda r: r["average_change"]["estimate"])["name"]
    assert {(m["kind"], m["own"]): m["n"] for m in record["models"]} == {
        ("refresh", True): 3, ("refresh", False): 6, ("rollback", True): 3, ("rollback", False): 6
    }  # fmt: skip


def test_where_log_odds_bend_weights_know_and_slopes_do_not(monkeypatch):
    monkeypatch.setitem(BENT, "by", 0.3)
    off: dict[int, list[float]] = {}
    for reweighted in (0, 18):
        record, _ = planned(monkeypatch, reweighted=reweighted)
        off[reweighted] = []
        for row in record["actions"]:
            action = Action(**{f.name: row[f.name] for f in dataclasses.fields(Action)})
            off[reweighted] += [abs(row["scores"][d]["estimate"] - y) for d, y in outcome(action).items()]
            if reweighted and row["kind"] == "rollback":  # with no noise of prompts there is nothing to be unsure of
                for domain, expected in outcome(action).items():
                    assert row["scores"][domain]["estimate"] == pytest.approx(expected, abs=0.1), (action, domain)
                    assert np.diff(row["scores"][domain]["ci95"])[0] < 0.1
    assert np.mean(off[18]) < 0.5 * np.mean(off[0])
    told = Told()
    planned(monkeypatch, reweighted=4, told=told)
    assert told.totals["plan: weights"] == 4 and told.reports["plan: weights"] == list(range(4))


def test_forecasts_rest_on_prompts_that_no_direction_has_seen(monkeypatch):
    """Samples are biased here, so that forecasts tell which of them they used."""
    plain, _ = planned(monkeypatch)
    assert planned(monkeypatch, stored=0.05)[0] == plain
    biased, _ = planned(monkeypatch, bias=0.05)
    for k, other in zip(plain["history"], biased["history"], strict=True):
        assert other["forecast"] != pytest.approx(k["forecast"], rel=1e-3)


def test_few_directions_at_a_time_give_the_same(monkeypatch):
    record, world = planned(monkeypatch)
    told = Told()
    again, more = planned(monkeypatch, held=2, told=told)
    assert more.gradients > world.gradients
    assert again == record
    # Of the past one direction at base and qa, two at code and math; and those of 3 refreshes and 6 rollbacks at qa.
    assert told.totals == {"plan: samples": 12, "plan: forecasts": 1 + 1 + 1 + 5}
    assert sorted(set(told.reports["plan: forecasts"])) == list(range(8))


def test_each_domain_is_sampled_once_at_each_point(monkeypatch):
    told = Told()
    planned(monkeypatch, told=told)
    assert told.reports["plan: samples"] == list(range(12))


def test_a_rule_without_evidence_is_left_out_and_says_why(monkeypatch):
    def refuse(ends: Any) -> Any:
        raise ValueError("A's gradient is not measurable")

    record, _ = planned(monkeypatch, scores=refuse)
    assert len(record["actions"]) == 7
    assert record["left_out"]["rollback-math-qa-removing-0.5-1"] == "A's gradient is not measurable"


def test_what_a_plan_computes_is_counted(monkeypatch):
    _, world = planned(monkeypatch, reweighted=2)
    spent = world.runtime.rollouts.spent
    assert world.gradients > 0 and spent["gradient"] == 7 * world.gradients
    assert world.passes == len(WORDS) * (1 + 2) and spent["forward"] == 7 * 4 * world.passes


def test_a_plan_needs_a_past_and_domains_of_it(monkeypatch):
    with pytest.raises(UserError, match="trained 'cw' alone"):
        planned(monkeypatch, actions=[Action("refresh", "cw", 1)])
    world = World(8)
    runtime, probe, stages = world.runtime, world, resolve_stages(world.config, WORDS)
    with pytest.raises(UserError, match="nothing can be won back"):
        planner.make_plan(*(runtime, probe, Path("."), stages, "base", THETA.__getitem__, {}, Told()))  # type: ignore


def test_the_trail_is_of_stages_on_the_way_that_trained_one_domain():
    config: Any = default()
    config.stages = ("math", "solo-qa", "joint", "qa", "refresh-math", "cw")
    stages = resolve_stages(parse(config), ("code", "math", "qa", "cw"))
    assert [s.name for s in planner.trail(stages, "cw")] == ["math", "qa", "cw"]  # a recovery keeps its best step
    actions = planner.candidates(parse(config).recover, planner.trail(stages, "cw"))
    donors = {(a.domain, a.donor) for a in actions if a.kind == "rollback"}
    assert donors == {("math", "qa"), ("qa", "cw"), ("math", "cw")}
    assert max(a.steps for a in actions) == 8


# --- the direction of a refresh -------------------------------------------------------------------------------------


def test_the_first_step_is_the_optimizers_on_the_mean_gradient(tiny_models):
    tiny = tiny_models["llama"]
    config: Any = default()
    config.rollout.prompt_buckets, config.rollout.completion_buckets = (4,), (5,)
    config.analyze.update({"prompts": 8, "batch": 2, "path_prompts": 2, "group_size": 3})
    parsed = parse(config)
    boxed = param_shapes(tiny.model)
    runtime: Any = SimpleNamespace(
        config=parsed, model=tiny.model, mesh=tiny.mesh, shapes=nn.unbox(boxed),
        shardings=param_shardings(tiny.mesh, boxed), rollouts=SimpleNamespace(spent=Counter()),
    )  # fmt: skip
    rng = np.random.default_rng(0)
    mask_PGT = (np.arange(5) < rng.integers(1, 6, (8, 3, 1))).astype(np.float32)
    rewards_PG = rng.integers(0, 2, (8, 3)).astype(np.float32)
    rewards_PG[0] = 1.0  # no variance: left out
    sample = Sample(
        rng.integers(0, 96, (8, 4)).astype(np.int32), np.ones((8, 4), bool),
        rng.integers(0, 96, (8, 3, 5)).astype(np.int32), mask_PGT, rewards_PG, np.ones((8, 3), bool),
    )  # fmt: skip
    tokens_BT, valid_BT = join(sample.prompts_PT, sample.valid_PT, sample.tokens_PGT, sample.mask_PGT)

    @jax.jit
    def log_probs(params: Any) -> jax.Array:
        return token_log_probs(tiny.model, params, tokens_BT, valid_BT, start=4, temperature=1.0, chunk=0)

    probe: Any = SimpleNamespace(
        runtime=runtime, difference=tree.sub, rows=lambda s: s.rows(2),
        log_probs=lambda params, s: np.asarray(log_probs(params)).reshape(8, 3, 5),
    )  # fmt: skip
    # Adam undoes any factor of a gradient that is large against ε: here none is.
    train = TrainSection(optimizer=OptimizerConfig(eps=1e-2, clip_norm=0.0), learning_rate=0.02)
    spread = rewards_PG.std(axis=1, ddof=1, keepdims=True) + 1e-4
    adv_PG = np.where(
        np.ptp(rewards_PG, axis=1, keepdims=True) > 0, (rewards_PG - rewards_PG.mean(1, keepdims=True)) / spread, 0
    )
    trained_PGT = mask_PGT * (np.ptp(rewards_PG, axis=1) > 0)[:, None, None]
    weight_BT = (adv_PG[:, :, None] * trained_PGT).reshape(24, 5) / trained_PGT.sum()
    weight_BT = jnp.asarray(weight_BT, jnp.float32)
    optimizer = make_optimizer(train.optimizer)
    updated = jax.jit(optimizer.update)
    first = jax.jit(jax.grad(lambda p: -jnp.sum(weight_BT * log_probs(p))))
    later = jax.jit(jax.grad(lambda p, drawn: -jnp.sum(weight_BT * jnp.exp(log_probs(p) - drawn))))
    with jax.set_mesh(tiny.mesh):
        rehearsal = lookahead.OffPolicyLookahead(probe)
        found = rehearsal.first(tiny.params, sample, train)
        update, _ = updated(first(tiny.params), optimizer.init(tiny.params), tiny.params)
        # A walk: each step by the gradient where it is, tokens weighted by their ratio however large.
        walked = [jax.tree.map(np.asarray, p) for p in rehearsal.walk(tiny.params, sample, train, 3)]
        at, state, drawn = tiny.params, optimizer.init(tiny.params), log_probs(tiny.params)
        ratios = []
        for _ in range(3):
            turned, state = updated(later(at, drawn), state, at)
            at = jax.tree.map(lambda p, u: p - train.learning_rate * u, at, turned)
            ratios.append(float(jnp.max(jnp.exp(log_probs(at) - drawn) * mask_PGT.reshape(24, 5))))
    tokens = int(valid_BT.sum())
    assert runtime.rollouts.spent == {"forward": 2 * tokens, "trained": (1 + 3) * tokens}
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(update), strict=True):
        np.testing.assert_allclose(a, -b, rtol=2e-3, atol=1e-4)
    assert float(optax.global_norm(found)) > 1
    assert ratios[1] > 1 + 2 * train.grpo.clip_high  # where the trainer's own loss would have stopped
    for a, b, c in zip(*(jax.tree.leaves(x) for x in (walked[-1], at, tiny.params)), strict=True):
        np.testing.assert_allclose(a - np.asarray(c), b - np.asarray(c), rtol=1e-2, atol=2e-3 * train.learning_rate)


@pytest.mark.parametrize("warmup", [0, 1, 4])
def test_the_length_of_a_path_is_the_sum_of_its_learning_rates(warmup: int):
    config: Any = default()
    config.train.warmup_steps, config.stages = warmup, ("math",)
    stage = resolve_stages(parse(config), ("code", "math", "qa", "cw"))[0]
    for steps in (0, 1, 3, 9):
        expected = sum(grpo.learning_rate(stage, s) for s in range(steps))
        assert lookahead.path_length(stage.train, steps) == pytest.approx(expected)


def test_forecasts_of_one_domain_are_compared_on_the_same_draws():
    """So that of two actions that differ by a certain amount, one is better in every draw."""
    model = Model(0.0, 0.3, 1.0, 9)
    less, more = (forecast(0.0, Shift(x, 0.1), 1.0, model, 2, 9) for x in (0.2, 0.4))
    assert np.all(more.change_R > less.change_R)
    other = forecast(0.0, Shift(0.2, 0.1), 1.0, model, 3, 9)
    assert abs(np.corrcoef(less.change_R, other.change_R)[0, 1]) < 0.1
    assert isinstance(other, Forecast)
