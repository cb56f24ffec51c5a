"""BWT, FWT, forgetting and recovery against figures worked out by hand."""

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mdrl_jax.errors import UserError
from mdrl_jax.records import write_json
from mdrl_jax.report.tables import matrix as mx
from mdrl_jax.report.tables import recovered, transfer
from mdrl_jax.report.tables.headline import headline
from mdrl_jax.stats.estimate import ratio_of_means

DOMAINS = ("code", "math", "qa")
# Points; the diagonal below the base row is what a stage trains.
BY_HAND = {
    "base": (10.0, 20.0, 30.0),
    "code": (60.0, 24.0, 31.0),
    "math": (66.0, 80.0, 27.0),
    "qa": (50.0, 70.0, 90.0),
}
# Offsets of the prompts, adding to 0: means stay as given, errors do not vanish.
WAVE_P = np.array([-3.0, 1.0, 2.0, 0.0, 4.0, -4.0])


def record(stage: str, index: int, points: tuple[float, ...], noise: float = 0.0) -> dict[str, Any]:
    rng = np.random.default_rng(index)
    rewards = {}
    for domain, mean in zip(DOMAINS, points, strict=False):
        offset = WAVE_P + noise * (x := rng.permutation(WAVE_P)) - noise * x.mean()
        rewards[domain] = ((mean + offset)[:, None].repeat(2, 1) / 100).tolist()
    return {"stage": stage, "index": index, "seed": 0, "rewards": rewards, "accuracy": rewards}


def build(table: dict[str, tuple[float, ...]], noise: float = 0.0) -> mx.Matrix:
    rows = enumerate(table.items())
    return mx.build([record(stage, i, points, noise) for i, (stage, points) in rows])


def value(q: mx.Quantity) -> float:
    assert q.estimate is not None, q.reason
    return q.estimate.value


def test_scores_and_errors() -> None:
    m = build(BY_HAND)
    np.testing.assert_allclose(m.score_SD, list(BY_HAND.values()))
    np.testing.assert_allclose(m.stderr_SD, WAVE_P.std(ddof=1) / np.sqrt(6))


def test_rows_follow_the_index_and_may_be_chosen() -> None:
    records = [record(s, i, p) for i, (s, p) in enumerate(BY_HAND.items())]
    assert mx.build(records[::-1]).stages == tuple(BY_HAND)
    assert mx.build(records, stages=["qa", "base"]).stages == ("base", "qa")


def test_the_headline_says_what_fell_and_what_won_it_back() -> None:
    fell = BY_HAND | {"qa": (30.0, 70.0, 90.0), "refresh-code": (54.0, 68.0, 88.0)}
    said = headline(build(fell, noise=0.5), {"refresh-code": 4})
    number = r"\d+(?:\.\d)?(?: %)? \[[^]]*\]"
    text = rf"Code fell by ({number}) points after Math and QA; a refresh of 4 steps won back ({number}) of it\."
    found = re.fullmatch(text, said)
    assert found and found[1].startswith("30.0 [") and found[2].startswith("80 % [")
    assert headline(build(fell, noise=0.5), {}).count("; a refresh won back 80 %") == 1
    assert "No domain fell measurably" in headline(build(BY_HAND | {"qa": (65.0, 79.0, 90.0)}, noise=9.0), {})
    assert headline(build({"base": BY_HAND["base"]}), {}) == ""
    assert headline(build({s: BY_HAND[s] for s in ("base", "code")}), {}).startswith("Code changed by +50.0")


@pytest.mark.parametrize(
    "stage, own",
    [
        ("math", True),
        ("math@slow", True),
        ("solo-math", True),
        ("refresh-math", False),
        ("placebo-math", False),
        ("qa", False),
    ],
)
def test_a_peak_is_the_end_of_a_stage_that_trained_the_domain(stage: str, own: bool) -> None:
    assert recovered.is_own(stage, "math") == own


def test_the_headline_names_a_stage_that_cost_what_another_had_given() -> None:
    # Math's stage helped code by 14 points, and QA's takes as many away: code is not below its own peak.
    helped = {
        "base": (10.0, 20.0, 30.0),
        "code": (60.0, 24.0, 31.0),
        "math": (74.0, 80.0, 27.0),
        "qa": (60.0, 80.0, 90.0),
    }
    said = headline(build(helped | {"refresh-code": (70.0, 80.0, 90.0)}, noise=0.5), {"refresh-code": 1})
    number = r"(\d+\.\d) \[\d+\.\d, \d+\.\d\]"
    start = "No domain fell measurably below its own peak, but QA cost Code "
    found = re.fullmatch(rf"{start}{number} points; a refresh of 1 step gained {number} points\.", said)
    assert found and [float(x) for x in found.groups()] == [14.0, 10.0]
    assert "below its own peak" not in headline(build(helped, noise=20.0), {})


def test_transfer_by_hand() -> None:
    m = build(BY_HAND, noise=0.5)
    assert value(transfer.backward_transfer(m)) == pytest.approx((-10 - 10) / 2)
    assert value(transfer.forward_transfer(m)) == pytest.approx((4 - 3) / 2)
    assert value(transfer.forgetting(m, "code")) == pytest.approx(66 - 50)
    assert transfer.forgetting(m, "code").detail == "highest after math"
    assert value(transfer.forgetting(m, "math")) == pytest.approx(10)
    assert value(transfer.mean_forgetting(m)) == pytest.approx(13)
    assert value(transfer.fall(m, "code")) == pytest.approx(10)
    assert [value(transfer.lift(m, d)) for d in DOMAINS] == pytest.approx([50, 56, 63])
    assert [value(transfer.peak(m, d)) for d in DOMAINS] == pytest.approx([60, 80, 90])


def test_a_warm_up_moves_the_point_that_transfer_is_measured_from() -> None:
    warm = {"base": (90.0, 1.0, 2.0), "sft": (10.0, 20.0, 30.0)}
    m, plain = build({**warm, **{s: p for s, p in BY_HAND.items() if s != "base"}}), build(BY_HAND)
    assert m.stages[mx.start_row(m, "code") or 0] == "sft" and value(transfer.lift(m, "code")) == pytest.approx(50)
    assert [m.stages[s] for s in mx.path_rows(m)] == ["base", "sft", "code", "math", "qa"]
    for f in (transfer.forward_transfer, transfer.mean_forgetting, transfer.backward_transfer):
        assert value(f(m)) == pytest.approx(value(f(plain)))
    lacking = mx.build([record(s, i, p) for i, (s, p) in enumerate({**warm, **BY_HAND}.items())], [*BY_HAND])
    assert "θ_0" in transfer.forward_transfer(lacking).reason


def test_forgetting_of_negative_rewards_and_of_a_domain_that_still_rises() -> None:
    # A max with a zero pad gives 40 for code; one with the final stage gives 0 for math.
    m = build({"base": (-90.0, -80.0), "code": (-30.0, -70.0), "math": (-40.0, -20.0)})
    assert value(transfer.forgetting(m, "code")) == pytest.approx(10)
    assert value(transfer.backward_transfer(m)) == pytest.approx(-10)
    rising = build({"base": (1.0, 2.0), "code": (30.0, 2.0), "math": (45.0, 60.0)})
    assert value(transfer.forgetting(rising, "code")) == pytest.approx(-15)


def test_the_interval_of_the_average_is_paired() -> None:
    # The same offsets at every stage cancel. What is left are two more prompts in each domain that change by 1/G = 1/2.
    e = transfer.backward_transfer(build(BY_HAND)).estimate
    assert e is not None and e.stderr == pytest.approx(100 / 2 * np.sqrt(2 / (6 * 5)) / np.sqrt(2))
    noisy = transfer.backward_transfer(build(BY_HAND, noise=0.5)).estimate
    assert noisy is not None and noisy.high - noisy.low > 1


def test_rows_off_the_path_change_nothing() -> None:
    off = {"solo-math": (99.0, 99.0, 99.0), "placebo-qa": (98.0, 98.0, 98.0), "joint": (97.0,) * 3}
    order = ["base", "code", "solo-math", "math", "placebo-qa", "qa", "joint", "refresh-math"]
    table = {**BY_HAND, **off, "refresh-math": (52.0, 77.0, 85.0)}
    m = build({s: table[s] for s in order})
    assert [m.stages[s] for s in mx.training_rows(m)] == ["code", "math", "qa"]
    plain = build(BY_HAND)
    for f in (transfer.backward_transfer, transfer.forward_transfer, transfer.mean_forgetting):
        assert value(f(m)) == pytest.approx(value(f(plain)))
    assert value(transfer.lift(m, "math")) == pytest.approx(56)
    assert value(transfer.intransigence(m, "math")) == pytest.approx(97 - 80)


def test_another_order_has_its_own_diagonal() -> None:
    m = build({"base": (10.0, 20.0), "math": (15.0, 80.0), "code": (70.0, 65.0)})
    assert value(transfer.backward_transfer(m)) == pytest.approx(-15)
    assert value(transfer.forward_transfer(m)) == pytest.approx(5)
    names = [q.name for q in transfer.quantities(m)]
    assert len(names) == len(set(names)) and "fall math" in names and "fall code" not in names


def test_recovery_by_hand() -> None:
    m = build({**BY_HAND, "refresh-math": (47.0, 78.0, 91.0)}, noise=0.1)
    (r,) = recovered.recoveries(m)
    assert (r.stage, r.domain) == ("refresh-math", "math")
    assert value(r.gain) == pytest.approx(8)
    assert value(r.fraction) == pytest.approx(0.8)
    e = r.fraction.estimate
    assert e is not None and e.low < 0.8 < e.high
    assert value(r.collateral) == pytest.approx(3) and r.collateral.detail == "code"
    assert recovered.recovery_points(m, "refresh-math") == pytest.approx((8, 10))


def test_every_recovery_starts_from_the_last_training_stage() -> None:
    later = {"refresh-math": (50.0, 79.0, 90.0), "rollback-code-qa": (55.0, 70.0, 60.0)}
    first, second = recovered.recoveries(build({**BY_HAND, **later}, noise=0.05))
    assert value(first.fraction) == pytest.approx(0.9)
    assert value(second.fraction) == pytest.approx(0.5)
    assert second.domain == "code"
    assert value(second.collateral) == pytest.approx(30) and second.collateral.detail == "qa"


TWO = {**BY_HAND, "refresh-qa": (40.0, 55.0, 91.0), "refresh-math": (31.0, 77.0, 60.5)}


def test_a_second_refresh_is_measured_from_the_first() -> None:
    first, second = recovered.recoveries(build(TWO, noise=0.01))
    assert build(TWO).starts["refresh-math"] == "refresh-qa"
    assert value(second.gain) == pytest.approx(77 - 55) and value(second.loss) == pytest.approx(80 - 55)
    assert value(second.fraction) == pytest.approx(22 / 25)
    assert value(second.collateral) == pytest.approx(91 - 60.5) and second.collateral.detail == "qa"
    assert value(first.collateral) == pytest.approx(70 - 55) and first.collateral.detail == "math"
    assert recovered.recovery_points(build(TWO), "refresh-math") == pytest.approx((22, 25))


def test_a_recovery_is_measured_from_the_start_that_is_on_record(tmp_path: Path) -> None:
    records = [record(s, i, p, 0.01) for i, (s, p) in enumerate(TWO.items())]
    (_, second) = recovered.recoveries(mx.build([*records[:-1], records[-1] | {"start": "qa"}]))
    assert value(second.gain) == pytest.approx(77 - 70) and value(second.collateral) == pytest.approx(90 - 60.5)
    # A folder of an earlier version has no starts on record, and its configuration may name one.
    for r in records:
        write_json(tmp_path / "evaluations" / f"{r['index']:02d}-{r['stage']}.json", r)
    assert mx.load(tmp_path).starts == {**dict(zip(list(TWO)[1:], TWO, strict=False)), "code": "base"}
    write_json(tmp_path / "config.json", {"config": {"stage_overrides": {"refresh-math": {"start": "math"}}}})
    (_, second) = recovered.recoveries(mx.load(tmp_path))
    assert mx.load(tmp_path).starts["refresh-math"] == "math" and value(second.gain) == pytest.approx(77 - 80)


def test_a_recovery_whose_start_or_peak_is_unknown_says_so() -> None:
    records = [record(s, i, p) for i, (s, p) in enumerate(TWO.items())]
    (r,) = recovered.recoveries(mx.build(records, stages=["math", "refresh-math"]))
    assert r.gain.estimate is None and r.gain.reason == "refresh-math started from refresh-qa, which was not evaluated"
    (_, r) = recovered.recoveries(mx.build([*records[:-1], records[-1] | {"start": "code"}]))
    assert "no stage on the way to code, where refresh-math started, trained math alone" in r.fraction.reason
    assert transfer.lift(mx.build([records[0], records[2] | {"start": "base"}]), "math").estimate is not None


@pytest.mark.parametrize("bad", ["0.5", None, True, float("nan")])
def test_a_reward_that_is_no_number_is_named(bad: Any) -> None:
    broken = record("code", 1, (1.0, 2.0)) | {"rewards": {"code": [[1.0], [bad]]}}
    with pytest.raises(UserError, match=f"evaluation of code: rewards of code: {bad!r} is no number"):
        mx.build([broken])


def test_t_comes_before_any_refresh_and_recovery_starts_on_the_path() -> None:
    # A row off the path right before the refresh is not where it starts from.
    table = {**BY_HAND, "solo-math": (99.0,) * 3, "refresh-math": (47.0, 78.0, 91.0)}
    (r,) = recovered.recoveries(build(table, noise=0.1))
    assert value(r.fraction) == pytest.approx(0.8)
    later = {s: BY_HAND[s] for s in ("base", "code", "math")}
    extended = build({**later, "refresh-code": (70.0, 70.0, 70.0), "qa": (1.0, 2.0, 3.0)})
    assert [extended.stages[s] for s in mx.training_rows(extended)] == ["code", "math"]
    aside = build({**later, "refresh-code@early": (70.0, 70.0, 70.0), "qa": (1.0, 2.0, 3.0)})
    assert [aside.stages[s] for s in mx.training_rows(aside)] == ["code", "math", "qa"]  # it is a side branch
    assert value(transfer.backward_transfer(extended)) == pytest.approx(66 - 60)


def test_collateral_is_signed() -> None:
    (r,) = recovered.recoveries(build({**BY_HAND, "refresh-math": (53.0, 78.0, 91.0)}))
    assert value(r.collateral) == pytest.approx(-1) and r.collateral.detail == "qa"


@pytest.mark.parametrize(
    ("table", "noise", "reason"),
    [
        ({**BY_HAND, "qa": (50.0, 79.0, 90.0), "refresh-math": (50.0, 80.0, 90.0)}, 1.0, "loss in"),
        ({**BY_HAND, "qa": (50.0, 99.0, 90.0), "refresh-math": (50.0, 90.0, 90.0)}, 0.1, "rose"),
        ({**BY_HAND, "refresh-qa": (50.0, 70.0, 91.0)}, 0.1, "trained last"),
        ({"base": (10.0, 20.0), "code": (60.0, 24.0), "refresh-math": (1.0, 2.0)}, 0.1, "no stage"),
    ],
)
def test_an_undefined_fraction_says_why(table: Any, noise: float, reason: str) -> None:
    (r,) = recovered.recoveries(build(table, noise=noise))
    assert r.fraction.estimate is None
    assert reason.replace("loss in", "interval of the loss includes 0") in r.fraction.reason


@pytest.mark.parametrize("stages", [[], ["base"], ["code"], ["base", "code"], ["math", "qa"], ["base", "refresh-math"]])
def test_partial_runs_give_reasons_instead_of_errors(stages: list[str]) -> None:
    table = {**BY_HAND, "refresh-math": (52.0, 77.0, 85.0)}
    m = build({s: table[s] for s in stages})
    for q in transfer.quantities(m):
        assert (q.estimate is None) == bool(q.reason), q
    if len([s for s in stages if s in DOMAINS]) < 2:
        assert transfer.backward_transfer(m).estimate is None
    assert transfer.forward_transfer(m).estimate is None


def test_a_domain_missing_at_one_stage_is_nan_there_and_a_reason_elsewhere() -> None:
    records = [record(s, i, p) for i, (s, p) in enumerate(BY_HAND.items())]
    del records[3]["rewards"]["code"]
    m = mx.build(records)
    assert np.isnan(m.score_SD[3, 0]) and np.isfinite(m.score_SD[3, 1])
    assert transfer.backward_transfer(m).reason == "code was not evaluated after qa"


def test_names_of_stages() -> None:
    domains = ("math", "qa", "math-hard")
    names = ["math", "refresh-math", "rollback-math-qa", "solo-qa", "refresh-math-hard"]
    found = [mx.trained_domain(s, domains) for s in names]
    assert found == ["math", "math", "math", "qa", "math-hard"]
    assert [mx.trained_domain(s, domains) for s in ("base", "joint", "mathematics")] == [None] * 3
    assert mx.trained_domain("math-hard", domains) == "math-hard"


def test_resampling_is_paired_and_keeps_the_mean() -> None:
    m = build(BY_HAND)
    drawn = [mx.resample(m, np.random.default_rng(i)) for i in range(300)]
    # The offsets are those of the prompt: an unpaired draw would move the difference.
    for d in drawn[:20]:
        np.testing.assert_allclose(d.score_SD - d.score_SD[:1], m.score_SD - m.score_SD[:1])
    scores = np.array([d.score_SD[0, 0] for d in drawn])
    assert abs(scores.mean() - 10) < 0.3
    assert scores.std() == pytest.approx(WAVE_P.std() / np.sqrt(6), rel=0.15)


def test_files_are_read_and_faults_are_named(tmp_path: Any) -> None:
    with pytest.raises(UserError, match="no evaluations"):
        mx.load(tmp_path)
    for i, (stage, points) in enumerate(BY_HAND.items()):
        write_json(tmp_path / f"evaluations/{i:02d}-{stage}.json", record(stage, i, points))
    assert mx.load(tmp_path).stages == tuple(BY_HAND)
    short = record("cw", 4, BY_HAND["qa"])
    short["rewards"]["math"] = short["rewards"]["math"][:4]
    write_json(tmp_path / "evaluations/04-cw.json", short)
    with pytest.raises(UserError, match="math on different numbers of prompts: 6 at qa, 4 at cw"):
        mx.load(tmp_path)
    ragged = record("cw", 4, BY_HAND["qa"])
    ragged["rewards"]["math"][0] = [1.0]
    with pytest.raises(UserError, match="differ in their number of samples"):
        mx.build([ragged])


def grouped(groups: list[int] | None, seed: int = 0) -> mx.Matrix:
    """Three stages of one domain, with rewards that two prompts share in part; `groups` goes into the records."""
    rng = np.random.default_rng(seed)
    texts, own = rng.random((3, 6)), rng.random((3, 12, 2))
    records = []
    for index, stage in enumerate(("qa", "cw", "refresh-qa")):
        shared = texts[index][np.arange(12) // 2][:, None]
        rewards = (0.5 + 0.1 * own[index] + 0.2 * shared - 0.5 * (stage == "cw")).tolist()
        found = {"stage": stage, "index": index + 1, "rewards": {"qa": rewards}, "accuracy": {"qa": rewards}}
        records.append(found | ({} if groups is None else {"groups": {"qa": groups}}))
    return mx.build(records)


def test_groups_widen_intervals_and_move_no_score() -> None:
    plain, alone, paired = grouped(None), grouped([*range(12)]), grouped([0, 0, 5, 5, 2, 2, 3, 3, 9, 9, 7, 7])
    np.testing.assert_array_equal(plain.score_SD, paired.score_SD)
    np.testing.assert_allclose(plain.stderr_SD, alone.stderr_SD)
    # The error over groups of two is that of the six means.
    means_SK = np.array([r["qa"].mean(axis=1).reshape(6, 2).mean(axis=1) for r in paired.rewards])
    np.testing.assert_allclose(paired.stderr_SD[:, 0], 100 * means_SK.std(axis=1, ddof=1) / np.sqrt(6))
    for m, n in ((plain, 12), (alone, 12), (paired, 6)):
        figures = [mx.score_at(m, "", 0, "qa"), mx.difference(m, "", "qa", 0, 1), recovered.recoveries(m)[0].fraction]
        assert [q.estimate and q.estimate.n for q in figures] == [n, n, n]
    gain_K, loss_K = means_SK[2] - means_SK[1], means_SK[0] - means_SK[1]
    fraction, wanted = recovered.recoveries(paired)[0].fraction.estimate, ratio_of_means(gain_K, loss_K)
    assert fraction is not None and wanted is not None
    assert (fraction.low, fraction.high) == pytest.approx((wanted.low, wanted.high))


def test_draws_take_whole_groups() -> None:
    groups = np.array([0, 0, 0, 1, 2, 2, 2, 2, 3, 3, 4, 4])
    m, rng, sizes = grouped(groups.tolist()), np.random.default_rng(0), set()
    for _ in range(50):
        drawn = mx.resample(m, rng)
        rows = [int(np.flatnonzero((m.rewards[0]["qa"] == x).all(axis=1))[0]) for x in drawn.rewards[0]["qa"]]
        labels = drawn.groups["qa"]
        assert len(np.unique(labels)) == 5 and len(labels) == len(rows)
        for label in np.unique(labels):
            of = [row for row, at in zip(rows, labels, strict=True) if at == label]
            assert of == np.flatnonzero(groups == groups[of[0]]).tolist()
        sizes.add(len(rows))
    assert len(sizes) > 3
    many = [mx.resample(m, rng).score_SD[0, 0] for _ in range(4000)]
    assert np.std(many) == pytest.approx(m.stderr_SD[0, 0] * np.sqrt(2 / 3), rel=0.25)  # sums over few groups, no t


def test_groups_that_change_between_stages_are_refused() -> None:
    rewards = {"qa": [[0.0], [1.0], [1.0]]}
    first = {"stage": "qa", "index": 1, "rewards": rewards, "groups": {"qa": [0, 0, 1]}}
    for groups in ({"qa": [0, 1, 1]}, {}):
        other = {"stage": "cw", "index": 2, "rewards": rewards, "groups": groups}
        with pytest.raises(UserError, match="evaluation of cw: the groups of qa differ"):
            mx.build([first, other])
    with pytest.raises(UserError, match="not one for each prompt"):
        mx.build([first | {"groups": {"qa": [0, 1]}}])
