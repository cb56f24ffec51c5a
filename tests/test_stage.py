"""Tests of stage names: which domains each stage trains, and where it starts."""

import dataclasses

import pytest

from mdrl_jax.config import parse
from mdrl_jax.domains.registry import DOMAINS
from mdrl_jax.errors import UserError
from mdrl_jax.stage import (
    Stage,
    alone_from_origin,
    default_start,
    names_on_the_way,
    orders_trained,
    origin,
    peak,
    repeated,
    resolve_stages,
    teachers,
    trained_on_the_way,
    warm_up,
)
from mdrl_jax.stages.dynamic_sampling import own_steps
from mdrl_jax.stages.grpo import shares, taught_by, visits

KNOWN = tuple(DOMAINS)


def planned(*stages: str, **fields) -> dict[str, Stage]:
    """Resolves these stage names; `fields` are further fields of the configuration. Returns the stages by name."""
    made = resolve_stages(parse({"stages": stages, **fields}), KNOWN)
    assert [stage.name for stage in made] == list(stages)
    assert [stage.index for stage in made] == list(range(1, len(stages) + 1))
    return {stage.name: stage for stage in made}


def test_domains_and_refreshes_start_where_the_stage_before_ended():
    stages = planned("code", "math", "refresh-code")
    assert [s.start for s in stages.values()] == ["base", "code", "math"]
    assert [s.domains for s in stages.values()] == [("code",), ("math",), ("code",)]
    assert {s.kind for s in stages.values()} == {"grpo"}
    assert stages["refresh-code"].train == stages["code"].train


def test_a_solo_starts_from_the_base_and_is_no_part_of_the_sequence():
    stages = planned("code", "solo-math", "qa", "solo-qa")
    assert stages["solo-math"].start == stages["solo-qa"].start == "base"
    assert stages["solo-math"].domains == ("math",)
    assert stages["qa"].start == "code"


def test_a_prevention_repeats_its_stage_with_the_same_prompts_from_the_same_start():
    stages = planned("code", "math", "qa", "cw", "ewc-qa", "protect-qa", "protect-cw")
    assert [stages[n].start for n in ("ewc-qa", "protect-qa", "protect-cw")] == ["math", "math", "protect-qa"]
    for method in ("ewc", "protect"):
        repeated = stages[f"{method}-qa"]
        assert repeated.stream == stages["qa"].stream == "qa" and repeated.domains == ("qa",)
        plain = dataclasses.replace(repeated.train, prevent=stages["qa"].train.prevent)
        assert plain == stages["qa"].train != repeated.train
    assert stages["ewc-qa"].keeps == ("code", "math") and stages["protect-cw"].keeps == ("code", "math", "qa")
    assert stages["ewc-qa"].train.prevent.ewc > 0 and stages["protect-qa"].train.prevent.protect > 0
    assert stages["qa"].keeps == ()


def test_a_prevention_keeps_the_domains_that_it_is_told_to():
    overrides = {"qa": {"prevent": {"protect": 0.5, "domains": ("math",)}}}
    assert planned("code", "math", "qa", stage_overrides=overrides)["qa"].keeps == ("math",)
    with pytest.raises(UserError, match=r"stage qa is to keep cw, which no stage on the way"):
        planned("code", "qa", stage_overrides={"qa": {"prevent": {"protect": 0.5, "domains": ("cw",)}}})
    with pytest.raises(UserError, match=r"protect-code keeps nothing"):
        planned("protect-code")


@pytest.mark.parametrize("prevent", [{"ewc": 1.0}, {"gradients": "agem"}, {"protect": 0.5}])
def test_a_stage_that_is_to_keep_domains_needs_one_before_it(prevent: dict):
    told = r"stage code keeps nothing: no domain .* start 'base'; set its prevent by stage_overrides of later stages"
    with pytest.raises(UserError, match=told) as caught:
        planned("code", "math", train={"prevent": prevent})
    assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match="stage solo-code keeps nothing"):
        planned("math", "solo-code", stage_overrides={"solo-code": {"prevent": prevent}})
    # Neither supervised stages nor stages without training use `prevent`.
    solos = {
        f"solo-{domain}": {"prevent": {"ewc": 0.0, "gradients": "none", "protect": 0.0}} for domain in ("code", "qa")
    }
    domains = {"scored_domains": ("code", "qa"), "stage_overrides": solos}
    stages = planned("sft", *solos, "average", train={"prevent": prevent}, **domains)
    assert stages["average"].keeps == stages["sft"].keeps == ()
    assert planned("code", train={"prevent": {"replay": 0.5}})["code"].keeps == ()


def test_the_reference_of_the_kl_is_where_its_branch_began():
    stages = planned("code", "math", "qa", "cw", "kl-qa", "kl-cw")
    assert [stages[n].reference for n in ("qa", "kl-qa", "kl-cw")] == ["math", "math", "math"]
    assert stages["kl-cw"].start == "kl-qa"
    assert planned("code", "math", stage_overrides={"math": {"reference": "base"}})["math"].reference == "base"


def test_another_order_is_a_sequence_of_its_own():
    stages = planned("code", "math", "reversed-math", "reversed-code", "qa")
    assert [s.start for s in stages.values()] == ["base", "code", "base", "reversed-math", "math"]


def test_a_rollback_goes_back_from_the_end_of_the_plain_sequence():
    stages = planned("code", "math", "qa", "cw", "refresh-math", "joint", "rollback-math-qa")
    found = stages["rollback-math-qa"]
    assert (found.kind, found.domains, found.donor, found.start) == ("rollback", ("math",), "qa", "cw")
    assert not found.trains and found.scored
    for wrong in ("rollback-cw-qa", "rollback-math-cw"):
        with pytest.raises(UserError, match=f"stage {wrong}: no stage on the way to its start 'qa' trained cw alone"):
            planned("code", "math", "qa", wrong)


def test_a_distillation_goes_back_from_the_end_of_the_plain_sequence_to_its_teachers():
    overrides = {
        "distill-math@wrong": {"distill": {"teacher": "qa"}},
        "distill-all@base": {"distill": {"teacher": "base"}},
        "distill-all@fixed": {"distill": {"form": "fixed"}, "n_prompts": 16},
    }
    names = ("code", "math", "qa", "refresh-math", "distill-math", "distill-all", *overrides, "cw")
    train = {"prompts_per_step": 12, "kl_every": 4, "max_rounds": 2, "filter": {"low": 0.1}}
    fields = {"train": train, "stage_overrides": overrides}
    stages = planned(*names, **fields)
    earlier = tuple(stages.values())
    made = {n: stages[n] for n in names if n.startswith("distill")}
    assert {(s.kind, s.start, s.recovers) for s in made.values()} == {("grpo", "qa", True)}
    found = {n: (s.domains, teachers(s, earlier)) for n, s in made.items()}
    every = ("code", "math", "qa")
    assert found["distill-math"] == (("math",), {"math": "math"})
    assert found["distill-math@wrong"] == (("math",), {"math": "qa"})
    assert found["distill-all"] == (every, dict(zip(every, every, strict=True)))  # Creative Writing has no peak
    assert found["distill-all@base"] == (every, dict.fromkeys(every, "base"))  # a control has the same prompts
    assert found["distill-all@fixed"] == (every, {}) and not made["distill-all@fixed"].taught
    assert taught_by(made["distill-all"]).tolist() == [0] * 4 + [1] * 4 + [2] * 4
    assert taught_by(made["distill-all@base"]).tolist() == [0] * 12
    assert taught_by(made["distill-all@fixed"]) is taught_by(stages["math"]) is None
    assert stages["cw"].start == "refresh-math"  # a distillation is a side branch
    grpo = made["distill-math"].train.grpo
    assert not grpo.drop_zero_variance and made["distill-math"].train.kl_every == 0
    assert made["distill-math"].train.max_rounds == 1 and stages["math"].train.max_rounds == 2
    assert not made["distill-math"].train.filter.on and stages["math"].train.filter.on


def test_an_alternating_refresh_takes_turns():
    overrides = {"alternate-math-qa": {"turn": 2, "prompts_per_step": 5}}
    stages = planned("math", "qa", "cw", "refresh-math", "alternate-math-qa", stage_overrides=overrides)
    stage = stages["alternate-math-qa"]
    assert (stage.kind, stage.domains, stage.start, stage.recovers) == ("grpo", ("math", "qa"), "cw", True)
    assert [shares(stage, step) for step in range(5)] == [{d: 5} for d in ("math", "math", "qa", "qa", "math")]
    assert visits(stage) == {"math": 5, "qa": 5} and visits(stages["math"]) == shares(stages["math"])
    # Each domain goes through its own prompts, without the gaps of the other one's turns.
    assert [own_steps(stage, step) for step in range(9)] == [0, 1, 0, 1, 2, 3, 2, 3, 4]
    assert [own_steps(stages["math"], step) for step in range(3)] == [0, 1, 2]
    for wrong, told in (
        ("alternate-math-math", "name two different ones"),
        ("alternate-math", "is not a valid stage name"),
        ("alternate-math-code", "no stage on the way to its start 'cw' trained code alone"),
    ):
        with pytest.raises(UserError, match=told):
            planned("math", "qa", "cw", wrong)


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ({}, "no stage on the way to its start 'qa' trained math alone, so there is no teacher; name one with"),
        ({"distill": {"teacher": "math"}}, r"distill.teacher='math' is not an earlier stage or 'base'"),
        ({"distill": {"teacher": "qa", "form": "fll"}}, r"allowed: one of sampled, top_k, full, fixed"),
        ({"distill": {"teacher": "qa"}, "prevent": {"replay": 0.5}}, "remove its prevent.replay"),
        ({"distill": {"teacher": "qa"}, "grpo": {"kl_coef": 0.1}}, "set kl_coef=0, kl_every=0"),
        ({"distill": {"teacher": "qa"}, "target": "qa"}, "a distillation ends by its own rule"),
        ({"n_prompts": -1}, "n_prompts=-1 is not valid"),
    ],
)
def test_a_distillation_that_cannot_be_is_refused(override: dict, told: str):
    with pytest.raises(UserError, match=told) as caught:
        planned("qa", "distill-math", stage_overrides={"distill-math": override})
    assert "\n" not in str(caught.value)


def test_merges_need_every_solo_stage():
    solos = [f"solo-{domain}" for domain in ("code", "math", "qa", "cw")]
    for name in ("average", "arithmetic", "ties"):
        assert planned(*solos, name)[name].kind == "merge" and planned(*solos, name)[name].start == "base"
        with pytest.raises(
            UserError, match=f"{name} needs the solo edit of every scored domain; add before it: solo-cw$"
        ):
            planned(*solos[:-1], name)


def test_a_plan_is_for_the_end_of_the_plain_sequence_and_what_follows_it_needs_it():
    stages = planned("code", "math", "refresh-code", "plan", "trials", "recover", "qa")
    assert [stages[n].start for n in ("plan", "trials", "recover", "qa")] == ["math", "math", "math", "recover"]
    assert [stages[n].scored for n in ("plan", "trials", "recover")] == [False, False, True]
    for name in ("trials", "recover"):
        with pytest.raises(UserError, match=f"{name} needs a plan made at 'math'; put the stage plan before it"):
            planned("math", name)
    with pytest.raises(UserError, match="plan: no domain was trained on the way to its start 'base'"):
        planned("plan")


def test_the_prompts_of_a_step_are_shared_out_to_the_last_one():
    replay = planned("code", "replay-math")["replay-math"]
    for prompts, own in ((16, (4, 4, 4)), (18, (5, 5, 4))):
        train = dataclasses.replace(replay.train, prompts_per_step=prompts)
        joint = dataclasses.replace(replay, domains=("math", "qa", "cw"), train=train)
        found = shares(joint)
        assert found == {**dict(zip(("math", "qa", "cw"), own, strict=True)), "code": 4}
        assert sum(found.values()) == prompts


def test_replay_shares_the_prompts_of_a_step():
    stages = planned("code", "math", "replay-qa", train={"prompts_per_step": 16})
    assert shares(stages["replay-qa"]) == {"qa": 12, "code": 2, "math": 2}
    with pytest.raises(UserError, match=r"replay=0.1 of 4 prompts is 0.2 for each of 2 domains"):
        overrides = {"replay-qa": {"prevent": {"replay": 0.1}}}
        planned("code", "math", "replay-qa", train={"prompts_per_step": 4}, stage_overrides=overrides)


def test_the_peak_is_the_last_stage_that_trained_the_domain_alone():
    stages = planned("code", "math", "joint", "refresh-code", "qa", "solo-math")
    made = tuple(stages.values())
    assert [peak(d, "qa", made) and peak(d, "qa", made).name for d in ("code", "math", "qa", "cw")] == [
        "code",
        "math",
        "qa",
        None,
    ]
    assert peak("math", "solo-math", made).name == "solo-math"
    made = tuple(planned("math", "qa", "again-math", stage_overrides={"again-math": {"start": "qa"}}).values())
    assert peak("math", "again-math", made).name == "again-math"


def test_a_recovery_is_measured_against_its_domains_own_stage():
    """Also if it starts from a recovery: its own start as the teacher and the peak would leave nothing to win back."""
    overrides = {"distill-math@after": {"start": "refresh-math"}, "distill-math@2": {"start": "distill-math"}}
    names = ("math", "qa", "refresh-math", "distill-math", *overrides, "placebo-math", "refresh-math@2")
    stages = planned(*names, stage_overrides=overrides)
    made = tuple(stages.values())
    for name in ("distill-math", *overrides):
        assert teachers(stages[name], made) == {"math": "math"}
    for name in ("refresh-math", "refresh-math@2"):
        assert peak("math", stages[name].start, made).name == "math"
    with pytest.raises(UserError, match="distill-qa: no stage on the way to its start 'placebo-qa' trained qa alone"):
        planned("math", "placebo-qa", "distill-qa", stage_overrides={"distill-qa": {"start": "placebo-qa"}})


def test_preventions_and_other_orders_with_one_label_form_a_chain():
    by_layer = {name: {"prevent": {"module": "layer"}} for name in ("mgs-qa@layer", "mgs-cw@layer")}
    names = ("code", "math", "qa", "cw", "mgs-qa", "mgs-cw", *by_layer, "reversed-cw", "reversed-qa")
    stages = planned(*names, "reversed-cw@slow", "reversed-qa@slow", stage_overrides=by_layer)
    assert {n: s.start for n, s in stages.items() if s.prefix} == {
        **{"mgs-qa": "math", "mgs-cw": "mgs-qa", "mgs-qa@layer": "math", "mgs-cw@layer": "mgs-qa@layer"},
        **{"reversed-cw": "base", "reversed-qa": "reversed-cw"},
        **{"reversed-cw@slow": "base", "reversed-qa@slow": "reversed-cw@slow"},
    }
    assert stages["mgs-qa@layer"].keeps == ("code", "math") and stages["mgs-cw@layer"].keeps == ("code", "math", "qa")


def test_a_placebo_differs_from_its_domain_by_its_learning_rate_alone():
    stages = planned("code", "placebo-qa", train={"learning_rate": 0.5, "steps": 3})
    placebo = stages["placebo-qa"]
    assert (placebo.domains, placebo.start, placebo.kind) == (("qa",), "code", "grpo")
    assert (placebo.train.learning_rate, placebo.train.steps) == (0.0, 3)
    assert stages["code"].train.learning_rate == 0.5


def test_joint_and_pretrain_take_the_scored_domains():
    stages = planned("pretrain", "joint", scored_domains=("math", "qa"))
    assert (stages["pretrain"].kind, stages["joint"].kind) == ("sft", "grpo")
    assert stages["pretrain"].domains == stages["joint"].domains == ("math", "qa")
    assert stages["joint"].start == "pretrain"


def test_supervised_stages_are_in_the_sequence_and_no_peak():
    overrides = {"sft-qa": {"steps": 7}}
    stages = planned("sft", "code", "sft-qa", "qa", "plan", sft={"steps": 9}, stage_overrides=overrides)
    assert {s.start for s in stages.values()} == {"base", "sft", "code", "sft-qa", "qa"}
    assert [s.start for s in stages.values()] == ["base", "sft", "code", "sft-qa", "qa"]
    assert [s.kind for s in stages.values()] == ["sft", "grpo", "sft", "grpo", "plan"]
    assert stages["sft"].domains == ("code", "math", "qa", "cw") and stages["sft-qa"].domains == ("qa",)
    assert [stages[n].settings.steps for n in ("sft", "code", "sft-qa")] == [9, stages["code"].train.steps, 7]
    made = tuple(stages.values())
    assert peak("qa", "sft-qa", made) is None and peak("qa", "qa", made) == stages["qa"]
    assert trained_on_the_way(stages["sft-qa"], made) == ("code",) == trained_on_the_way(stages["qa"], made)


def test_a_warm_up_ends_at_the_model_that_solos_and_merges_start_from():
    solos = [f"solo-{d}" for d in KNOWN]
    stages = planned("sft-math", "sft", "code", "sft-qa", "qa", *solos, "again-qa", "reversed-qa", "ties", "orders")
    starts = {n: s.start for n, s in stages.items()}
    assert [starts[n] for n in ("sft-math", "sft", "code", "sft-qa", "qa")] == [
        "base",
        "sft-math",
        "sft",
        "code",
        "sft-qa",
    ]
    assert {starts[n] for n in (*solos, "again-qa", "reversed-qa", "ties", "orders")} == {"sft"}
    assert origin(starts, KNOWN) == "sft" and warm_up(starts, KNOWN) == ["sft-math", "sft"]
    assert origin({"code": "base", "sft": "code"}, KNOWN) == "base"
    with pytest.raises(UserError, match="stage ties takes edits from 'sft', but solo-qa starts from 'base'; let both"):
        planned("sft", "code", *solos, "ties", stage_overrides={"solo-qa": {"start": "base"}})


def test_a_supervised_stage_of_several_domains_takes_those_with_demonstrations():
    source = {"files": ("x.jsonl",), "prompt": "{q}", "reward": "qa"}
    domains = {"math": {**source, "reply": "{a}"}, "qa": source, "cw": {"preset": "ifeval"}}
    assert planned("sft", "sft@more", domains=domains)["sft"].domains == ("code", "math")
    chosen = planned("sft", "sft-qa", "sft@slow", domains=domains, sft={"domains": ("math", "qa"), "steps": 9},
                     stage_overrides={"sft@slow": {"domains": ("math",), "steps": 7}})  # fmt: skip
    assert [s.domains for s in chosen.values()] == [("math", "qa"), ("qa",), ("math",)]
    assert [s.sft.steps for s in chosen.values()] == [9, 9, 7] and chosen["sft@slow"].start == "sft-qa"
    with pytest.raises(UserError, match="stage sft: no scored domain has demonstrations; set domains.qa.reply to"):
        planned("sft", domains=domains, scored_domains=("qa", "cw"))
    for wrong, told in (
        (("maths",), "'maths', which is not in scored_domains"),
        (("qa", "qa"), "'qa', which is listed"),
    ):
        with pytest.raises(UserError, match=f"stage sft: sft.domains names {told}"):
            planned("sft", sft={"domains": wrong})
    with pytest.raises(UserError, match=r"stage sft-qa trains qa alone; remove its domains=\('math',\)"):
        planned("sft-qa", stage_overrides={"sft-qa": {"domains": ("math",)}})


def test_a_supervised_stage_that_starts_elsewhere_is_a_side_branch():
    overrides = {"sft-math": {"start": "base", "target": "math"}, "sft-qa": {"start": "math"}}
    stages = planned("math", "sft-math", "qa", "sft-qa", "cw", stage_overrides=overrides)
    assert [s.start for s in stages.values()] == ["base", "base", "math", "math", "qa"]
    # As a record tells it, without the configuration.
    assert default_start("cw", {n: s.start for n, s in stages.items() if n != "cw"}, KNOWN) == "qa"
    assert planned("sft-math", "math", stage_overrides={"sft-math": {"start": "base"}})["math"].start == "sft-math"


def test_a_supervised_stage_takes_nothing_from_the_settings_of_grpo():
    train = {"prevent": {"replay": 0.5}, "prompts_per_step": 16}
    stages = planned("math", "sft-qa", train=train)
    assert stages["sft-qa"].keeps == () and stages["sft-qa"].reference == "math"


WRONG_TARGETS = [
    (
        ("math", "qa", "plan", "sft-math"),
        "sft-math",
        "plan",
        "target='plan' makes no parameters; name a stage that does",
    ),
    (
        ("math", "qa", "refresh-math"),
        "refresh-math",
        "math",
        "a refresh ends by its own rule; remove its target='math'",
    ),
    (("math", "joint"), "joint", "math", "only a stage of one domain has a target; remove its target='math'"),
    (("math", "sft"), "sft", "math", "only a stage of one domain has a target; remove its target='math'"),
]


@pytest.mark.parametrize("stages, name, target, told", WRONG_TARGETS, ids=[w[1] for w in WRONG_TARGETS])
def test_a_target_that_cannot_be_reached_is_refused(stages: tuple[str, ...], name: str, target: str, told: str):
    with pytest.raises(UserError, match=f"stage {name}: {told}$"):
        planned(*stages, stage_overrides={name: {"target": target}})


@pytest.mark.parametrize("name", ["math", "refresh-code", "solo-math", "placebo-math", "joint"])
def test_an_override_names_another_start(name: str):
    overrides = {name: {"start": "code"}}
    stages = planned("code", "qa", name, stage_overrides=overrides)
    assert stages[name].start == "code"


@pytest.mark.parametrize("field", ["start", "reference"])
def test_a_stage_without_parameters_is_no_start(field: str):
    for record in ("plan", "trials"):
        with pytest.raises(UserError, match=f"stage qa: {field}='{record}' makes no parameters"):
            planned("code", "math", "plan", "trials", "qa", stage_overrides={"qa": {field: record}})


def test_a_stage_cannot_keep_the_domain_that_it_trains():
    overrides = {"refresh-math": {"prevent": {"replay": 0.5, "domains": ("math",)}}}
    with pytest.raises(UserError, match="stage refresh-math: prevent.domains names math, which the stage itself"):
        planned("math", "qa", "refresh-math", stage_overrides=overrides)


def test_orders_that_were_trained_begin_at_the_origin_and_have_every_domain_once():
    third = {"qa@x": {"start": "sft"}, "code@x": {"start": "qa@x"}, "math@x": {"start": "code@x"}}
    stages = planned(
        "sft", "code", "math", "qa", "reversed-qa", "reversed-math", "qa@x", "code@x", "math@x", "protect-math",
        "refresh-code", "solo-code", "solo-math", "solo-qa", "orders",
        scored_domains=("code", "math", "qa"), stage_overrides=third,
    )  # fmt: skip
    found = orders_trained(stages["orders"], list(stages.values())[:-1])
    assert [[s.name for s in run] for run in found] == [["code", "math", "qa"], ["qa@x", "code@x", "math@x"]]
    kept = planned(
        "code", "math", "solo-code", "solo-math", "orders", scored_domains=("code", "math"),
        stage_overrides={"math": {"prevent": {"protect": 1.0}}},
    )  # fmt: skip
    assert orders_trained(kept["orders"], list(kept.values())[:-1]) == []


def test_orders_of_one_domain_are_refused():
    with pytest.raises(UserError, match="stage orders compares orders of domains, but scored_domains has only math"):
        planned("solo-math", "orders", scored_domains=("math",))


def test_names_alone_say_where_stages_start():
    """As a table of old records does, which has neither the records' stages nor the config."""
    names = (
        *("pretrain", "code", "solo-math", "math", "placebo-qa", "qa", "protect-qa", "cw", "protect-cw", "ewc-math"),
        *("plan", "reversed-cw", "reversed-qa", "joint", "refresh-math", "refresh-qa", "rollback-math-qa", "recover"),
        *("solo-code", "solo-qa", "solo-cw", "average", "ties", "kl-cw"),
    )
    resolved = {n: s.start for n, s in planned(*names).items() if s.scored}
    starts: dict[str, str] = {}
    for name in resolved:
        starts[name] = default_start(name, starts, KNOWN)
    by_hand = {
        **{"pretrain": "base", "code": "pretrain", "math": "code", "placebo-qa": "math", "qa": "placebo-qa"},
        **{"cw": "qa", "protect-qa": "placebo-qa", "protect-cw": "protect-qa", "ewc-math": "code", "kl-cw": "qa"},
        **{"reversed-cw": "pretrain", "reversed-qa": "reversed-cw", "joint": "cw", "refresh-math": "joint"},
        **{"refresh-qa": "refresh-math", "rollback-math-qa": "cw", "recover": "cw"},
        **dict.fromkeys(("solo-math", "solo-code", "solo-qa", "solo-cw", "average", "ties"), "pretrain"),
    }
    assert starts == resolved == by_hand
    assert names_on_the_way("refresh-qa", starts)[-3:] == ["joint", "refresh-math", "refresh-qa"]
    assert names_on_the_way("a", {"a": "a"}) == ["a"]  # a damaged record


def test_a_solo_may_start_elsewhere_and_others_from_the_base():
    assert planned("code", "qa", stage_overrides={"qa": {"start": "base"}})["qa"].start == "base"


def test_folders_sort_in_order_of_the_stages():
    assert planned("code", "refresh-code")["refresh-code"].folder == "02-refresh-code"


@pytest.mark.parametrize(
    "name",
    [
        *(
            "maths",
            "refresh-",
            "refresh-maths",
            "sft-maths",
            "sft-",
            "pretrain-math",
            "solo-",
            "polish-math",
            "math-qa",
            "placebo",
            "base",
            "joint-math",
        ),
        *("rollback-math", "rollback-math-maths", "protect-maths", "protect"),
    ],
)
def test_a_name_that_is_no_stage_name_is_refused(name: str):
    with pytest.raises(UserError, match=f"{name}.*is not a valid stage name") as caught:
        planned(name)
    assert all(domain in str(caught.value) for domain in KNOWN)


def test_an_unknown_or_unscored_domain_is_refused():
    with pytest.raises(UserError, match=r"scored_domains.*'maths'.*known: .*math"):
        planned("code", scored_domains=("code", "maths"))
    with pytest.raises(UserError, match=r"stage 'refresh-math'.*scored_domains"):
        planned("code", "refresh-math", scored_domains=("code",))


def test_a_joint_step_has_to_divide_among_its_domains():
    with pytest.raises(UserError, match=r"joint.*prompts_per_step=6.*4 domains"):
        planned("joint", train={"prompts_per_step": 6})
    planned("joint", train={"prompts_per_step": 6}, scored_domains=("math", "qa", "cw"))


def test_an_analysis_trains_nothing_and_what_follows_starts_where_it_did():
    stages = planned("code", "math", "analyze", "qa")
    assert [s.trains for s in stages.values()] == [True, True, False, True]
    assert stages["qa"].start == "math"


def test_a_label_makes_a_side_branch_with_the_start_and_the_draws_of_its_stage():
    stages = planned(
        "math", "qa", "qa@slow", "cw", "cw@2", "refresh-math", "refresh-math@2", "sft-qa", "sft-qa@x", "protect-cw@a",
        stage_overrides={"qa@slow": {"start": "math", "learning_rate": 1e-3}},
    )  # fmt: skip
    slow = stages["qa@slow"]
    assert (slow.start, slow.domains, slow.stream, slow.prefix, slow.kind) == ("math", ("qa",), "qa", "", "grpo")
    assert slow.train.learning_rate == 1e-3 != stages["qa"].train.learning_rate
    assert stages["cw"].start == "qa" and stages["cw@2"].start == "cw"
    assert stages["refresh-math"].start == "cw" and stages["refresh-math@2"].start == "refresh-math"
    assert (stages["refresh-math@2"].prefix, stages["refresh-math@2"].stream) == ("refresh", "refresh-math")
    assert stages["sft-qa@x"].kind == "sft" and stages["sft-qa@x"].start == "sft-qa"
    assert stages["protect-cw@a"].domains == ("cw",) and stages["protect-cw@a"].start == "qa"
    back = planned("math", "qa", "cw", "rollback-math-qa@1", stage_overrides={"rollback-math-qa@1": {"start": "qa"}})
    found = back["rollback-math-qa@1"]
    assert (found.domains, found.donor, found.start, found.kind) == (("math",), "qa", "qa", "rollback")
    for name in ("qa@", "@x", "qa@a-b", "qa@a@b", "analyze@1", "average@2"):
        with pytest.raises(UserError, match="is not a valid stage name"):
            planned("math", "qa", name)


@pytest.mark.parametrize(
    ("plain", "start", "instead"),
    [
        ("qa", "math", "; again-qa with start='math' draws other ones"),
        ("protect-qa", "math", ""),
        ("sft-qa", "qa", ""),
        ("rollback-math-qa", "qa", ""),
    ],
)
def test_a_label_alone_does_not_make_another_stage(plain: str, start: str, instead: str):
    stages = dict.fromkeys(("math", "qa", plain, f"{plain}@2"))
    (told,) = repeated(list(planned(*stages, stage_overrides={f"{plain}@2": {"start": start}}).values()))
    assert told.startswith(f"stage {plain}@2 will end with the parameters of stage {plain}: ")
    assert told.endswith(f"sampling keys{instead}")
    if not plain.startswith("rollback"):
        own = {f"{plain}@2": {"start": start, "learning_rate": 7e-4}}
        assert not repeated(list(planned(*stages, stage_overrides=own).values()))


def test_locality_needs_an_edit_that_starts_at_the_peak():
    stages = planned("math", "qa", "cw", "locality-math", "solo-qa")
    assert (stages["locality-math"].kind, stages["locality-math"].domains) == ("locality", ("math",))
    assert not stages["locality-math"].scored and not stages["locality-math"].trains
    for names in (
        ("math", "locality-math"),
        ("math", "qa", "cw", "locality-cw"),
        ("math", "refresh-math", "locality-math"),
    ):
        with pytest.raises(UserError, match="no earlier stage trains another domain from the end of stage"):
            planned(*names)


def test_circuits_compare_the_stages_that_trained_the_domain_alone_from_the_start():
    own = {"start": "base"}
    changes = {"sft-qa": own, "sft-qa@low": own, "qa@x": own}
    stages = planned("code", "qa@x", "sft-qa", "sft-qa@low", "solo-math", "circuits-qa", stage_overrides=changes)
    assert (stages["circuits-qa"].kind, stages["circuits-qa"].scored) == ("circuits", False)
    found = alone_from_origin("qa", list(stages.values()), KNOWN)
    assert [s.name for s in found] == ["qa@x", "sft-qa", "sft-qa@low"]
    for names in (("circuits-qa",), ("code", "qa", "circuits-qa"), ("sft-qa", "circuits-qa")):
        with pytest.raises(UserError, match="no earlier stage trains qa alone"):
            planned(*names)
