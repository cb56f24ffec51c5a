"""The decision rules on figures made by hand: every verdict of every part of every claim."""

import dataclasses
import json
from typing import Any

import numpy as np
import pytest
from scipy.stats import spearmanr

from mdrl_jax.claims import assignment, first_edition, interference
from mdrl_jax.claims.inputs import CurveStep, DamagePair, Edit, GradientPair, Objective, RoutePair, Sparsity
from mdrl_jax.claims.verdicts import above, all_parts, counted_above, counted_under, every, under
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
    assert set(record) == keys | {"parts", "old_rule"} and record["published"] and record["rule"]
    assert set(record["old_rule"]) == {"rule", "verdict", "reason"} and record["old_rule"]["rule"] != record["rule"]
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
    named = all_parts([("first", yes), ("second", no), ("third", open_)])
    assert named.verdict == "contradicted" and named.words == f"second: {no.words}"


def test_an_exact_count_is_never_undecided():
    assert [counted_above(x, 0.5, "x").verdict for x in (0.51, 0.5, 0.49)] == ["supported", *2 * ["contradicted"]]
    assert [counted_under(x, 0.5, "x").verdict for x in (0.49, 0.5, 0.51)] == ["supported", *2 * ["contradicted"]]
    assert counted_above(None, 0.5, "x").verdict == counted_under(None, 0.5, "x").verdict == "undecided"
    assert counted_under(0.7, 0.5, "share").words == "share 0.7 is not below 0.5"


def parts(record: dict[str, Any]) -> dict[str, str]:
    """The verdict of each part."""
    return {part["part"]: part["verdict"] for part in record["parts"]}


# --- C1, C2 ---------------------------------------------------------------------------------------------------------


def sparsity(unchanged: float | None = 0.8, small: float = 0.3, participation: float = 0.1) -> Sparsity:
    first = missing("no edit") if unchanged is None else fig(unchanged)
    return Sparsity(first, fig(small, null=0.08), fig(participation, null=1 / 3))


RL, SFT, RANDOM = sparsity(), sparsity(0.3, 0.1, 0.25), sparsity(0.4, 0.08, 0.33)


def edit(domain: str = "qa", rl: Sparsity = RL, sft: Any = SFT, random: Any = RANDOM, source: str = "solo") -> Edit:
    return Edit(domain, source, rl, sft, random, fig(0.8), fig(0.1))


C1_PARTS = ("unchanged weights", "sparser than SFT", "sparser than random signs")


def test_c1_asks_all_of_every_edit():
    record = interference.c1([edit(), edit("cw", source="sequential")])
    check(record, "supported", "qa (solo edit)", "cw (sequential edit)", "random signs: 0.4; SFT: 0.3")
    assert parts(record) == dict.fromkeys(C1_PARTS, "supported") and record["old_rule"]["verdict"] == "supported"
    dense = interference.c1([edit(), edit("cw", sparsity(unchanged=0.5))])
    check(dense, "contradicted", "cw (solo edit)", "not above 0.5")
    assert parts(dense) == dict(zip(C1_PARTS, ("contradicted", "supported", "supported"), strict=True))
    for worse in (sparsity(small=0.09), sparsity(participation=0.3)):
        record = interference.c1([edit("cw", worse)])
        check(record, "contradicted", "sparser than SFT")
        assert parts(record)["sparser than SFT"] == "contradicted"
    check(interference.c1([edit(random=sparsity(small=0.31))]), "contradicted", "sparser than random signs")
    check(interference.c1([]), "undecided", "no figures")


def test_c1_needs_both_comparisons_and_says_what_gathers_them():
    record = interference.c1([edit(sft=None, random=None)])
    check(record, "undecided", "no SFT", "see configs/claims.py")
    assert list(parts(record).values()) == ["supported", "undecided", "undecided"]
    assert "SFT: not measured" in record["parts"][0]["words"]
    assert "ratio are 0.3 and 0.1, and 0.08 and 0.333 for equal steps" in record["parts"][2]["words"]
    check(interference.c1([edit(sft=None), edit("cw", sparsity(0.2))]), "contradicted", "not above 0.5")
    shares = [edit("math", sparsity(0.9)), edit("qa", sparsity(0.7)), edit("cw", sparsity(None))]
    record = interference.c1(shares)
    check(record, "undecided", "cw (solo edit): share unchanged in bfloat16 is not measurable")
    assert record["estimate"] == 0.7
    assert [row["verdict"] for row in record["rows"]] == ["supported", "supported", "undecided"]


def jaccard(value: float, high: float = 0.06) -> dict[str, Any]:
    return fig(value, null={"mean": 0.053, "low": 0.046, "high": high, "n": 10_000})


def again(value: float, domain: str = "math") -> dict[str, Any]:
    return {"domain": domain, "stages": ["solo-math", "solo-math-2"], "by_layer": jaccard(value)}


def test_c2_compares_the_overlap_above_chance_with_that_of_one_domain_trained_twice():
    record = interference.c2(jaccard(0.103), [{"pair": ["math", "qa"]}], [again(0.353), again(0.253, "qa")])
    check(record, "supported", "0.2 is below 0.5")  # 0.05 above chance, of 0.25
    assert record["estimate"] == pytest.approx(0.2) and len(record["rows"]) == 3
    check(interference.c2(jaccard(0.18), (), [again(0.253)]), "contradicted", "0.635 is not below 0.5")
    low = interference.c2(jaccard(0.05), (), [again(0.059), again(0.3, "qa")])
    check(low, "undecided", "two solo stages of math overlap no more than random sets")
    assert low["old_rule"]["verdict"] == "supported"


def test_c2_without_a_ceiling_is_weak_and_no_noise_supports_it():
    record = interference.c2(jaccard(0.128), [{"pair": ["math", "qa"]}])
    check(record, "undecided", "weak: no ceiling measured", "0.128 is below 0.19", "see configs/claims.py")
    assert list(parts(record).values()) == ["supported", "undecided"] and record["rows"] == [{"pair": ["math", "qa"]}]
    check(interference.c2(jaccard(0.4)), "contradicted", "not below 0.19")
    check(interference.c2(missing("one domain only")), "undecided", "one domain only")
    check(interference.c2(missing("one domain only"), (), [again(0.3)]), "undecided", "one domain only")


# --- C3, C4 ---------------------------------------------------------------------------------------------------------


def gradients(**changes: Any) -> GradientPair:
    reliability = {"math": fig(0.8), "qa": fig(0.7)}
    pair = GradientPair("math", "qa", fig(0.02), reliability, fig(0.5, 0.1), fig(-0.4, 0.1), 5, 7, fig(0.09))
    return dataclasses.replace(pair, **changes)


def c3(*pairs: GradientPair) -> dict[str, Any]:
    return interference.c3(pairs, pairs)


def test_c3_needs_orthogonality_cancelling_tensors_and_harm():
    check(c3(gradients()), "supported", "math after qa", "|cos|", "near-orthogonal", "tensors cancel", "harm")
    check(c3(gradients(cosine=fig(-0.3))), "contradicted", "|cos| 0.3 [0.29, 0.31] is not below 0.1")
    check(c3(gradients(cosine=fig(-0.095))), "undecided", "|cos|")
    check(c3(gradients(damage=fig(-0.09))), "contradicted", "measured damage")
    check(c3(gradients(damage=fig(0.005))), "undecided", "measured damage")
    check(c3(gradients(positive=fig(0.05, 0.1))), "undecided", "sum of the positive products")
    check(c3(gradients(negative=fig(-0.05, 0.1))), "undecided", "sum of the negative products")
    check(c3(gradients(negative=fig(0.5, 0.1))), "undecided", "sum of the negative products")
    check(c3(), "undecided", "no pair")


def test_c3_is_not_measurable_with_unreliable_gradients():
    for figure in (fig(0.3), fig(0.5), missing("the halves do not agree")):
        pair = gradients(reliability={"math": figure, "qa": fig(0.7)}, cosine=fig(0.9))
        record = c3(pair)
        check(record, "undecided", "the cosine is not measurable: reliability of the math gradient")
        assert list(parts(record).values()) == ["undecided", "supported", "supported"]


def test_c3_is_that_of_the_pair_most_harmed():
    mild = gradients(later="cw", damage=fig(0.02), cosine=fig(0.5))
    lost = gradients(later="code", damage=missing("no samples"), cosine=fig(0.5))
    record = c3(mild, gradients(), lost)
    check(record, "supported", "math after qa")
    assert record["estimate"] == 0.02
    assert [row["verdict"] for row in record["rows"]] == ["contradicted", "supported", "contradicted"]


def test_c3_prints_the_earlier_rule_on_the_gradients_at_the_peak():
    record = interference.c3([gradients()], [gradients(reliability={"math": fig(0.1)})])
    check(record, "supported")
    assert record["old_rule"]["verdict"] == "undecided" and "reliability of the math" in record["old_rule"]["reason"]
    assert "not compared" in interference.c3([gradients()], [])["old_rule"]["reason"]
    assert first_edition.c3(gradients(conflicting=0)).verdict == "undecided"
    assert first_edition.c3(gradients()).verdict == "supported"


def routes(jaccard: float = 0.3, null_high: float = 0.08) -> RoutePair:
    return RoutePair(("math", "qa"), fig(jaccard), null_high)


def exact_test(p: float, opposite: float, n: int = 1296) -> assignment.Assignment:
    return assignment.Assignment(0.2, p, opposite, np.zeros(n))


def c4(pairs: list[RoutePair], test: assignment.Assignment | None) -> dict[str, Any]:
    return interference.c4(pairs, test, [{"domain": "math"}], fig(0.7, 0.2), fig(0.2, 0.1, 0.0))


def test_c4_needs_shared_routes_of_every_pair_and_edits_that_predict():
    record = c4([routes(), routes(0.2)], exact_test(0.049, 0.97))
    check(record, "supported", "route Jaccard", "exact p = 0.049 over 1296 assignments")
    assert record["estimate"] == 0.2 and record["rows"][-1] == {"domain": "math"}
    check(c4([routes(), routes(0.05)], exact_test(0.01, 0.99)), "contradicted", "not above 0.08")
    check(c4([routes()], exact_test(0.97, 0.049)), "contradicted", "opposite p = 0.049")
    check(c4([routes()], exact_test(0.05, 0.96)), "undecided", "the edit predicts")
    check(c4([routes(0.075)], exact_test(0.01, 0.99)), "undecided", "route Jaccard")
    check(c4([], exact_test(0.01, 0.99)), "undecided", "no figures")


def test_c4_needs_the_solo_stages_of_all_domains():
    for test in (None, exact_test(0.125, 1.0, 8)):
        record = c4([routes()], test)
        check(record, "undecided", "it needs solo stages of all four domains; see configs/claims.py")
        assert list(parts(record).values()) == ["supported", "undecided"]


def test_the_exact_test_takes_every_assignment_within_each_domain():
    """Two matrices by hand: the six sums of each are known, and their 36 sums make the null."""
    a, b = np.diag([0.3, 0.2, 0.1]), np.zeros((3, 3))
    b[0, 1] = 0.4
    test = assignment.exact([a, b])
    assert test.statistic == pytest.approx(0.1) and test.means.size == 36
    # Of a: the identity gives 0.6; each exchange of two keeps one entry; the two rotations give 0. Of b: two of six
    # orders put its first edit on the second place.
    of_a, of_b = [0.6, 0.1, 0.3, 0.2, 0.0, 0.0], [0.4, 0.4, 0.0, 0.0, 0.0, 0.0]
    want = sorted((x + y) / 6 for x in of_a for y in of_b)
    assert sorted(test.means) == pytest.approx(want)
    assert test.p == np.mean(np.array(want) >= 0.1 - 1e-9) and test.p_opposite == np.mean(np.array(want) <= 0.1 + 1e-9)
    assert assignment.exact([np.full((3, 3), np.nan)]).p == 1.0
    assert assignment.exact([np.eye(3)] * 4).p == pytest.approx(1 / 1296)
    with pytest.raises(ValueError, match="square"):
        assignment.exact([np.zeros((2, 3))])
    with pytest.raises(ValueError, match="at least one"):
        assignment.exact([])


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
    # Of five pairs only a perfect order, whose two-sided p is 2/120, excludes 0.
    assert rank_agreement(range(5), range(5))["ci95"][0] > 0 > rank_agreement(range(5), [0, 1, 2, 4, 3])["ci95"][0]
    holes = rank_agreement([None, *x, 1.0], [1.0, *(x + noise), np.nan])
    assert (holes["estimate"], holes["n"]) == (figure["estimate"], 12)
    assert "too few" in rank_agreement(range(4), range(4))["reason"]
    assert "same for all pairs" in rank_agreement(range(6), [1.0] * 6)["reason"]


# --- C5 -------------------------------------------------------------------------------------------------------------


def removed(undone: float = 0.7, **margins: Any) -> dict[str, Any]:
    """A removal record."""
    margins = {"random": 0.6, "complement": 0.5} | margins
    listed = [{"name": name, "margin": fig(m) if isinstance(m, float) else m} for name, m in margins.items()]
    return {"undone": fig(undone), "margins": listed, "k": [16, 15], "share_of_norm": 0.005}


def objective(curvature: Any = 0.8, removal: dict[str, Any] | None = None, **changes: Any) -> Objective:
    figure = fig(curvature) if isinstance(curvature, float) else curvature
    return Objective(figure, removed() if removal is None else removal, (step(),), measured(), **changes)


def step(alpha: float = 1.0, measured: float = 0.2, remainder: float = 0.01, share: float = 0.8) -> CurveStep:
    return CurveStep(alpha, fig(measured), fig(remainder), fig(share))


def measured(**margins: Any) -> dict[str, Any]:
    margins = {"random": 0.6, "top": 0.5} | margins
    baselines = [
        {"name": name, "k": 16, "margin": fig(m) if isinstance(m, float) else m} for name, m in margins.items()
    ]
    return {"captured": [{"k": 16, "share": fig(0.7, null=0.1)}], "baselines": baselines}


def pair(later: str = "qa", damage: float = 0.09, nll: Objective | None = None, **others: Objective) -> DamagePair:
    return DamagePair("math", later, fig(damage), {"success_nll": nll or objective(), **others})


C5_PARTS = ("mainly curvature", "concentrated in S", "mainly in S")


def test_c5_needs_curvature_and_a_removal_that_undoes_most_and_more_than_every_control():
    record = interference.c5([pair()])
    check(record, "supported", "math after qa", "curvature share", "minus that of complement", "k = [16, 15]", "0.005")
    assert record["estimate"] == 0.7 and parts(record) == dict.fromkeys(C5_PARTS, "supported")
    for bad, part, words in (
        (objective(0.2), 0, "curvature share"),
        (objective(removal=removed(random=-0.2)), 1, "share undone minus that of random"),
        (objective(removal=removed(complement=-0.2)), 1, "share undone minus that of complement"),
        (objective(removal=removed(0.3)), 2, "share of damage undone"),
    ):
        record = interference.c5([pair(nll=bad)])
        check(record, "contradicted", words)
        assert [v for name, v in parts(record).items() if name != C5_PARTS[part]] == ["supported"] * 2
    for unclear, words in (
        (objective(0.505), "curvature share"),
        (objective(missing("the interval of the predicted damage includes 0")), "includes 0"),
        (objective(None), "was not computed"),
        (objective(removal=removed(complement=0.005)), "complement"),
        (objective(removal=removed(0.495)), "share of damage undone"),
        (objective(removal={}), "the removal test has not run; see configs/claims.py"),
        (objective(removal={}, reason="no eigenvalue converged"), "not measurable: no eigenvalue converged"),
    ):
        check(interference.c5([pair(nll=unclear)]), "undecided", words)
    assert interference.c5([pair(nll=objective(0.8, {}))])["estimate"] == 0.8


def test_c5_is_decided_by_success_nll_and_the_reward_is_listed_beside_it():
    record = interference.c5([pair(reward=objective(0.1))])
    check(record, "supported")
    assert [p["verdict"] for p in record["rows"][0]["reward"]] == ["contradicted", "supported", "supported"]
    without = DamagePair("math", "qa", fig(0.09), {"reward": objective()})
    check(interference.c5([without]), "undecided", "was not computed")


def test_c5_is_that_of_the_pair_most_harmed_and_needs_harm():
    little = objective(0.1)
    record = interference.c5([pair("cw", 0.02, little), pair("qa", 0.09)])
    check(record, "supported", "math after qa")
    assert [row["verdict"] for row in record["rows"]] == ["contradicted", "supported"]
    check(interference.c5([pair("cw", 0.2, little), pair()]), "contradicted", "math after cw")
    for damage in (0.005, -0.2):
        record = interference.c5([pair(damage=damage)])
        check(record, "undecided", "measured damage")
        assert set(parts(record).values()) == {"undecided"}
    check(interference.c5([]), "undecided", "no pair")


def test_c5_prints_the_earlier_rule_at_the_largest_step_whose_remainder_is_small():
    near, middle = step(0.25, 0.1, 0.01, 0.1), step(0.5, 0.15, -0.02, 0.7)
    far, none = step(1.0, 0.3, 0.2, 0.1), step(0.0, 0.0, 0.0, 0.5)
    assert first_edition.local_step((near, far, middle, none)) is middle
    assert first_edition.local_step((none, far)) is None
    unmeasured = dataclasses.replace(step(2.0), measured=missing("no samples"))
    assert first_edition.local_step((unmeasured, middle)) is middle
    for changes, verdict, words in (
        ({"steps": (near, far, middle, none)}, "supported", "α = 0.5"),
        ({"steps": (none, far)}, "undecided", "at no α"),
        ({"steps": (step(share=0.2),)}, "contradicted", "second-order share"),
        ({"ladder": measured(top=-0.2)}, "contradicted", "c(16) minus that of top"),
        ({"reason": "rewards vary in 10 % of groups"}, "undecided", "rewards vary in 10 % of groups"),
    ):
        other = dataclasses.replace(objective(), **changes)
        old = interference.c5([pair(reward=other)])["old_rule"]
        assert old["verdict"] == verdict and words in old["reason"], old
