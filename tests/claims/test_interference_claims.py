"""The decision rules on figures made by hand: every verdict of every claim."""

import dataclasses
import json
from typing import Any

import numpy as np
import pytest
from scipy.stats import spearmanr

from mdrl_jax.claims import interference
from mdrl_jax.claims.interference import CurveStep, DamagePair, Edit, GradientPair, Objective, RoutePair
from mdrl_jax.claims.verdicts import above, every, under
from mdrl_jax.stats.tests import rank_agreement


def fig(value: float, half: float | None = 0.01, null: Any = None) -> dict[str, Any]:
    """A figure value ± half; without an interval for half None."""
    ci95 = None if half is None else [value - half, value + half]
    return {"estimate": value, "ci95": ci95, "null": null, "n": 64, "unit": ""}


def missing(reason: str) -> dict[str, Any]:
    return {"estimate": None, "ci95": None, "null": None, "n": 64, "unit": "", "reason": reason}


def check(record: dict[str, Any], verdict: str, *words: str) -> None:
    assert record["verdict"] == verdict, record["reason"]
    for word in words:
        assert word in record["reason"]
    assert "\n" not in record["reason"] and record["reason"]
    keys = {"id", "claim", "verdict", "estimate", "ci95", "null", "published", "rule", "reason", "rows"}
    assert set(record) == keys and record["published"] and record["rule"]
    json.dumps(record, allow_nan=False)


def test_a_condition_is_judged_by_its_whole_interval():
    assert [above(fig(x, 0.1), 0.5, "x").verdict for x in (0.7, 0.3, 0.55)] == [
        "supported",
        "contradicted",
        "undecided",
    ]
    assert [under(fig(x, 0.1), 0.5, "x").verdict for x in (0.7, 0.3, 0.55)] == [
        "contradicted",
        "supported",
        "undecided",
    ]
    assert above(fig(0.9, None), 0.5, "share").words == "share 0.9 without an interval is undecided against 0.5"
    assert above(fig(0.9), 0.5, "share").words == "share 0.9 [0.89, 0.91] is above 0.5"
    assert above(missing("no reward varies"), 0.5, "share").words == "share is not measurable: no reward varies"


def test_an_and_is_explained_by_what_decides_it():
    yes, no, open_ = above(fig(1), 0, "a"), above(fig(-1), 0, "b"), above(fig(0), 0, "c")
    assert every(yes, open_, no).words == no.words
    assert every(yes, open_) == open_
    assert every(yes, yes) == yes
    assert every().verdict == "undecided"


# --- C1, C2 ---------------------------------------------------------------------------------------------------------


def edit(domain: str = "qa", share: float = 0.8, participation: float = 0.1, source: str = "solo") -> Edit:
    return Edit(domain, source, fig(share), fig(participation))


def test_c1_asks_it_of_every_edit():
    check(
        interference.c1([edit(), edit("cw", source="sequential")]),
        "supported",
        "qa (solo edit)",
        "cw (sequential edit)",
    )
    check(interference.c1([edit(), edit("cw", share=0.3)]), "contradicted", "cw (solo edit)", "not above 0.5")
    check(interference.c1([edit(), edit("cw", participation=0.6)]), "contradicted", "participation ratio")
    check(interference.c1([edit(), edit("cw", share=0.505)]), "undecided", "cw")
    check(interference.c1([]), "undecided", "no figures")
    record = interference.c1(
        [edit("math", 0.9), edit("qa", 0.7), Edit("cw", "solo", fig(0.75, 0.0), missing("no edit"))]
    )
    check(record, "undecided", "cw (solo edit): participation ratio is not measurable: no edit")
    assert record["estimate"] == 0.7
    assert [row["verdict"] for row in record["rows"]] == ["supported", "supported", "undecided"]


def test_c2_reads_the_mean_over_pairs():
    record = interference.c2(fig(0.1, null=0.053), [{"pair": ["math", "qa"]}])
    check(record, "supported", "mean pairwise Jaccard 0.1")
    assert record["null"] == 0.053 and record["rows"] == [{"pair": ["math", "qa"]}]
    check(interference.c2(fig(0.4)), "contradicted")
    check(interference.c2(fig(0.185)), "undecided")
    check(interference.c2(missing("one domain only")), "undecided", "one domain only")


# --- C3, C4 ---------------------------------------------------------------------------------------------------------


def gradients(**changes: Any) -> GradientPair:
    reliability = {"math": fig(0.8), "qa": fig(0.7)}
    pair = GradientPair("math", "qa", fig(0.02), reliability, 5, 7, fig(0.09))
    return dataclasses.replace(pair, **changes)


def test_c3_needs_orthogonality_mixed_tensors_and_damage():
    check(
        interference.c3([gradients()]),
        "supported",
        "math after qa",
        "|cos|",
        "5 tensors conflict and 7 are synergistic",
    )
    check(interference.c3([gradients(cosine=fig(-0.3))]), "contradicted", "|cos| 0.3 [0.29, 0.31] is not below 0.1")
    check(interference.c3([gradients(cosine=fig(-0.095))]), "undecided", "|cos|")
    check(interference.c3([gradients(damage=fig(-0.09))]), "contradicted", "measured damage")
    check(interference.c3([gradients(damage=fig(0.005))]), "undecided", "measured damage")
    check(interference.c3([gradients(conflicting=0)]), "undecided", "0 tensors conflict")
    check(interference.c3([gradients(synergistic=0)]), "undecided", "0 are synergistic")
    check(interference.c3([]), "undecided", "no pair")


def test_c3_is_not_measurable_with_unreliable_gradients():
    for figure in (fig(0.3), fig(0.5), missing("the halves do not agree")):
        pair = gradients(reliability={"math": figure, "qa": fig(0.7)}, cosine=fig(0.9))
        check(interference.c3([pair]), "undecided", "the cosine is not measurable: reliability of the math gradient")


def test_c3_is_that_of_the_pair_most_harmed():
    mild = gradients(later="cw", damage=fig(0.02), cosine=fig(0.5))
    lost = gradients(later="code", damage=missing("no samples"), cosine=fig(0.5))
    record = interference.c3([mild, gradients(), lost])
    check(record, "supported", "math after qa")
    assert record["estimate"] == 0.02
    assert [row["verdict"] for row in record["rows"]] == ["contradicted", "supported", "contradicted"]


def routes(jaccard: float = 0.3, null_high: float = 0.08) -> RoutePair:
    return RoutePair(("math", "qa"), fig(jaccard), null_high)


def test_c4_needs_shared_routes_of_every_pair_and_agreeing_signs():
    check(
        interference.c4([routes(), routes(0.2)], fig(0.7, 0.2, 0.0)), "supported", "route Jaccard", "rank correlation"
    )
    check(interference.c4([routes(), routes(0.05)], fig(0.7, 0.2)), "contradicted", "not above 0.08")
    check(interference.c4([routes()], fig(-0.7, 0.2)), "contradicted", "rank correlation")
    check(interference.c4([routes()], fig(0.7, 0.8)), "undecided", "rank correlation")
    check(interference.c4([routes(0.075)], fig(0.7, 0.2)), "undecided", "route Jaccard")
    check(interference.c4([], fig(0.7, 0.2)), "undecided", "no figures")
    check(interference.c4([routes()], missing("4 pairs are too few")), "undecided", "4 pairs are too few")


def test_rank_agreement_is_spearmans_with_an_interval_that_covers():
    rng = np.random.default_rng(0)
    x, noise = rng.normal(size=(2, 12))
    figure = rank_agreement(x, x + noise)
    assert figure["estimate"] == pytest.approx(spearmanr(x, x + noise).statistic)
    assert figure["ci95"][0] < figure["estimate"] < figure["ci95"][1]
    # Of independent pairs 5 % may exclude 0: 50 of 1,000, with a standard deviation of 7.
    for n in (6, 12):
        excluded = 0
        for a, b in rng.normal(size=(1000, 2, n)):
            low, high = rank_agreement(a, b)["ci95"]
            excluded += low > 0 or high < 0
        assert excluded < 65
    assert rank_agreement(range(12), range(12))["ci95"][0] > 0.8
    assert rank_agreement(range(5), range(5))["ci95"][0] < 0
    holes = rank_agreement([None, *x, 1.0], [1.0, *(x + noise), np.nan])
    assert (holes["estimate"], holes["n"]) == (figure["estimate"], 12)
    assert "too few" in rank_agreement(range(4), range(4))["reason"]
    assert "all pairs are equal" in rank_agreement(range(6), [1.0] * 6)["reason"]


# --- C5 -------------------------------------------------------------------------------------------------------------


def step(alpha: float = 1.0, measured: float = 0.2, remainder: float = 0.01, share: float = 0.8) -> CurveStep:
    return CurveStep(alpha, fig(measured), fig(remainder), fig(share))


def measured(**margins: Any) -> dict[str, Any]:
    margins = {"random": 0.6, "top": 0.5} | margins
    baselines = [
        {"name": name, "k": 16, "margin": fig(m) if isinstance(m, float) else m} for name, m in margins.items()
    ]
    return {"captured": [{"k": 16, "share": fig(0.7, null=0.1)}], "baselines": baselines}


def objective(*steps: CurveStep, **margins: Any) -> Objective:
    return Objective(steps or (step(),), measured(**margins))


def pair(later: str = "qa", damage: float = 0.09, **objectives: Objective) -> DamagePair:
    return DamagePair("math", later, fig(damage), objectives or {"J": objective(), "success NLL": objective()})


def test_c5_needs_both_conditions_for_both_objectives():
    record = interference.c5([pair()])
    check(record, "supported", "math after qa", "J: ", "success NLL: ", "second-order share", "c(16) minus")
    assert (record["estimate"], record["null"]) == (0.7, 0.1)
    for bad, words in (
        (objective(step(share=0.2)), "second-order share at α = 1"),
        (objective(random=-0.2), "c(16) minus that of random"),
        (objective(top=-0.2), "c(16) minus that of top"),
    ):
        check(interference.c5([pair(J=objective(), nll=bad)]), "contradicted", words, "nll")
    for unclear, words in (
        (objective(step(share=0.505)), "second-order share"),
        (objective(top=0.005), "c(16) minus that of top"),
        (objective(top=missing("the interval of DᵀHD includes 0")), "includes 0"),
        (Objective(reason="rewards vary in 10 % of groups"), "not measurable: rewards vary in 10 % of groups"),
        (objective(step(measured=0.005, remainder=0.0)), "measured damage at α = 1"),
    ):
        check(interference.c5([pair(J=unclear, nll=objective())]), "undecided", words)


def test_c5_is_judged_at_the_largest_step_whose_remainder_is_small():
    near, middle = step(0.25, 0.1, 0.01, 0.1), step(0.5, 0.15, -0.02, 0.7)
    far, none = step(1.0, 0.3, 0.2, 0.1), step(0.0, 0.0, 0.0, 0.5)
    steps = (near, far, middle, none)
    assert interference.local_step(steps) is middle
    record = interference.c5([pair(nll=objective(*steps))])
    check(record, "supported", "α = 0.5")
    assert record["rows"][0]["objectives"][0]["alpha"] == 0.5
    assert interference.local_step((none, far)) is None
    record = interference.c5([pair(nll=objective(none, far))])
    check(record, "undecided", "at no α")
    assert record["rows"][0]["objectives"][0]["alpha"] is None
    unmeasured = dataclasses.replace(step(2.0), measured=missing("no samples"))
    assert interference.local_step((unmeasured, middle)) is middle


def test_c5_is_that_of_the_pair_most_harmed_and_needs_harm():
    contradicted = {"nll": objective(top=-0.3)}
    record = interference.c5([pair("cw", 0.02, **contradicted), pair("qa", 0.09)])
    check(record, "supported", "math after qa")
    assert [row["verdict"] for row in record["rows"]] == ["contradicted", "supported"]
    check(interference.c5([pair("cw", 0.2, **contradicted), pair()]), "contradicted", "math after cw")
    for damage in (0.005, -0.2):
        check(interference.c5([pair(damage=damage)]), "undecided", "measured damage")
    check(interference.c5([]), "undecided", "no pair")
