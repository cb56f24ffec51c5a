"""The refreshes that the stages `recover` and `trials` carry out."""

from types import SimpleNamespace
from typing import Any

from mdrl_jax.config import PreventSection, default, parse
from mdrl_jax.stage import resolve_stages
from mdrl_jax.stages.plan import Planning


def test_a_planned_refresh_is_the_own_stage_without_its_prevention():
    """The refresh keeps no domain, so there is nothing that its prevention could be given."""
    c: Any = default()
    c.stages, c.scored_domains = ("math", "qa", "cw", "plan"), ("math", "qa", "cw")
    c.stage_overrides = {"qa": {"prevent": {"protect": 1.0}, "learning_rate": 0.5}}
    stages = {s.name: s for s in resolve_stages(parse(c), ("math", "qa", "cw"))}
    assert stages["qa"].train.prevent.transforms
    planning: Any = SimpleNamespace(stages=tuple(stages.values()))
    made = Planning._refresh(planning, stages["plan"], "qa", 2)
    assert made.train.prevent == PreventSection() and made.keeps == ()
    assert (made.train.learning_rate, made.train.steps, made.start, made.domains) == (0.5, 2, "cw", ("qa",))
