"""From stage names to what they train, and from what."""

import pytest

from mdrl_jax.config import parse
from mdrl_jax.domains.registry import DOMAINS
from mdrl_jax.errors import UserError
from mdrl_jax.stages import Stage, plan

KNOWN = tuple(DOMAINS)


def planned(*stages: str, **fields) -> dict[str, Stage]:
    """The plan of these stages by name."""
    made = plan(parse({"stages": stages, **fields}), KNOWN)
    assert [stage.name for stage in made] == list(stages)
    assert [stage.index for stage in made] == list(range(1, len(stages) + 1))
    return {stage.name: stage for stage in made}


def test_domains_and_refreshes_start_where_the_stage_before_ended():
    stages = planned("code", "math", "refresh-code")
    assert [s.start for s in stages.values()] == ["base", "code", "math"]
    assert [s.domains for s in stages.values()] == [("code",), ("math",), ("code",)]
    assert {s.kind for s in stages.values()} == {"grpo"}
    assert stages["refresh-code"].train == stages["code"].train


def test_a_solo_starts_from_the_base_and_what_follows_it_goes_on_from_it():
    stages = planned("code", "solo-math", "qa")
    assert stages["solo-math"].start == "base"
    assert stages["solo-math"].domains == ("math",)
    assert stages["qa"].start == "solo-math"


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


@pytest.mark.parametrize("name", ["math", "refresh-math", "solo-math", "placebo-math", "joint"])
def test_an_override_names_another_start(name: str):
    overrides = {name: {"start": "code"}}
    stages = planned("code", "qa", name, stage_overrides=overrides)
    assert stages[name].start == "code"


def test_a_solo_may_start_elsewhere_and_others_from_the_base():
    assert planned("code", "qa", stage_overrides={"qa": {"start": "base"}})["qa"].start == "base"


def test_folders_sort_in_order_of_the_stages():
    assert planned("code", "refresh-code")["refresh-code"].folder == "02-refresh-code"


@pytest.mark.parametrize(
    "name", ["maths", "refresh-", "refresh-maths", "solo-", "polish-math", "math-qa", "placebo", "base", "joint-math"]
)
def test_a_name_that_means_nothing_is_refused(name: str):
    with pytest.raises(UserError, match=f"{name}.*means nothing") as caught:
        planned(name)
    assert all(domain in str(caught.value) for domain in KNOWN)


def test_an_unknown_or_unscored_domain_is_refused():
    with pytest.raises(UserError, match=r"scored_domains.*'maths'.*known: .*math"):
        planned("code", scored_domains=("code", "maths"))
    with pytest.raises(UserError, match=r"stage 'refresh-math'.*scored_domains"):
        planned("code", "refresh-math", scored_domains=("code",))


def test_a_joint_step_has_to_divide_among_its_domains():
    with pytest.raises(UserError, match=r"joint.*prompts=6.*4 domains"):
        planned("joint", train={"prompts": 6})
    planned("joint", train={"prompts": 6}, scored_domains=("math", "qa", "cw"))


def test_an_analysis_trains_nothing_and_what_follows_starts_where_it_did():
    stages = planned("code", "math", "analyze", "qa")
    assert [s.trains for s in stages.values()] == [True, True, False, True]
    assert stages["qa"].start == "math"
