"""From units to records: which pairs are called harmed, how effects meet transfers, and that every claim is judged."""

import numpy as np
import pytest
from scipy.stats import spearmanr

from mdrl_jax.analysis import assembly


def figure(value, low=None, high=None, **more):
    """A record of a figure."""
    ci95 = None if low is None else [low, high]
    return {"estimate": value, "ci95": ci95, "null": 0.0, "n": 9, "unit": ""} | more


def damage(domain: str, stage: str, measured: dict) -> dict:
    """A damage unit with one measured figure."""
    return {"domain": domain, "stage": stage, "objectives": {"reward": {"measured": measured}}}


def test_harmed_pairs_are_those_whose_interval_lies_above_zero_worst_first():
    parts = {
        "damage-math-qa": damage("math", "qa", figure(0.2, 0.1, 0.3)),
        "damage-math-cw": damage("math", "cw", figure(0.4, 0.3, 0.5)),
        "damage-code-math": damage("code", "math", figure(0.5, -0.1, 1.1)),
        "damage-qa-cw": damage("qa", "cw", figure(-0.2, -0.3, -0.1)),
        "edits": {},
    }
    assert assembly.harmed(parts, 5) == [("math", "cw"), ("math", "qa")]
    assert assembly.harmed(parts, 1) == [("math", "cw")]
    assert assembly.harmed(parts, 0) == []


def test_transfer_is_the_change_through_one_stage_paired_by_prompt():
    stages = [
        {"name": "code", "domain": "code", "start": "base"},
        {"name": "math", "domain": "math", "start": "code"},
        {"name": "qa", "domain": "qa", "start": "math"},
    ]
    points = {
        "code": {"rewards": {"code": [1.0, 0.5, 0.5]}, "shared": {"qa": {"effect": "e"}}},
        "math": {"rewards": {"code": [0.5, 0.5, 0.5]}},
        "qa": {"rewards": {"code": [1.0, 1.0, 0.5]}},
    }
    found = assembly.transfer(points, "code", stages[2], stages)
    assert abs(found["measured"]["estimate"] - 1 / 3) < 1e-12
    assert found["effect"] == "e"
    assert assembly.transfer(points, "code", stages[1], stages)["effect"] is None


def test_agreement_pairs_predictions_with_what_they_predict():
    def pair(shift: float, k: float) -> dict:
        names = ("reward", "surrogate", "success_nll", "kl")
        return {"objectives": {n: {"predicted": figure(k + shift), "measured": figure(k)} for n in names}}

    exact = assembly.predicted_against_measured([pair(0.0, k) for k in (0.1, 0.2, 0.4, 0.3, 0.7)])
    assert exact["reward"]["spearman"]["estimate"] == 1.0 and exact["kl"]["r_squared"]["estimate"] == 1.0
    shifted = assembly.predicted_against_measured([pair(1.0, k) for k in (0.1, 0.2, 0.4, 0.3, 0.7)])
    assert shifted["reward"]["spearman"]["estimate"] == 1.0
    assert shifted["reward"]["r_squared"]["estimate"] < 0
    few = assembly.predicted_against_measured([pair(0.0, 0.1)])
    assert few["reward"]["spearman"]["estimate"] is None and few["reward"]["n"] == 1


def solo_pairs(own: float) -> list[dict]:
    """Every ordered pair of four domains; changes correlate by `own` with the prediction of their own edit."""
    rng, names = np.random.default_rng(0), ("code", "math", "qa", "cw")
    pairs = []
    for a in names:
        common = rng.normal(size=40)
        for b in names:
            predicted, noise = rng.normal(size=(2, 40))
            measured = common + own * predicted + 0.1 * noise
            both = {"predicted": (common + predicted).tolist(), "measured": measured.tolist()}
            pairs += [{"domain": a, "edit": b, "neurons": 3} | both] if a != b else []
    return pairs


def test_the_edits_that_predict_are_told_from_what_all_prompts_have_in_common():
    pairs = solo_pairs(0.7)
    found, test = assembly.solo_agreement(pairs)
    each = [spearmanr(p["predicted"], p["measured"]).statistic for p in pairs]
    assert [p["spearman"]["estimate"] for p in found["pairs"]] == pytest.approx(each)
    assert found["agreement"]["estimate"] == pytest.approx(np.mean(each))
    low, high = found["agreement"]["ci95"]
    assert low < np.mean(each) < high and found["agreement"]["n"] == 160
    assert test and test.means.size == 1296 and test.p == 1 / 1296
    assert found["agreement"]["null"]["mean"] == pytest.approx(test.means.mean())
    # Without an effect of its own, an edit agrees with the measurement as well as any other does.
    alike, test = assembly.solo_agreement(solo_pairs(0.0))
    assert alike["agreement"]["ci95"][0] > 0.3 and test and 0.05 < test.p < 0.95


def test_agreement_without_solo_stages_or_with_an_edit_that_changes_nothing():
    found, test = assembly.solo_agreement([])
    assert test is None and found["pairs"] == [] and found["agreement"]["reason"]
    pairs = solo_pairs(0.7)
    pairs[0] |= {"predicted": [0.0] * 40}
    found, test = assembly.solo_agreement(pairs)
    assert found["pairs"][0]["spearman"]["reason"] and found["agreement"]["ci95"]
    assert test and np.isfinite(test.means).all()
    each = [p["spearman"]["estimate"] or 0.0 for p in found["pairs"]]
    assert found["agreement"]["estimate"] == pytest.approx(np.mean(each))


def test_domains_with_few_prompts_have_no_correlation_anywhere():
    pairs = solo_pairs(0.7)
    of_code = [p for p in pairs if p["domain"] == "code"]
    rest = [p for p in pairs if p["domain"] != "code"]
    for few in (0, 2):
        cut = [p | {key: p[key][:few] for key in ("predicted", "measured")} for p in of_code]
        found, test = assembly.solo_agreement(cut + rest)
        assert [p["edit"] for p in found["pairs"]] == [p["edit"] for p in pairs]
        assert [p["spearman"]["reason"] for p in found["pairs"][:3]] == [f"{few} prompts with a success: too few"] * 3
        each = [p["spearman"]["estimate"] for p in found["pairs"][3:]]
        assert found["agreement"]["estimate"] == pytest.approx(np.mean(each)) and found["agreement"]["n"] == 120
        assert test and test.means.size == 216
        found, test = assembly.solo_agreement(cut)
        assert test is None and found["agreement"]["estimate"] is None and len(found["pairs"]) == 3
        assert found["agreement"]["reason"] == "no domain with a solo stage has 3 prompts with a success"
