"""Which prompts a GRPO step trains on: dynamic sampling in rounds, and the filter by success rate."""

import contextlib
import dataclasses
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from mdrl_jax.config import parse
from mdrl_jax.domains.prompts import visit_order
from mdrl_jax.errors import UserError
from mdrl_jax.rl.rollout import Completions
from mdrl_jax.rl.rollouts import ScoredRollouts
from mdrl_jax.stage import Stage, resolve_stages
from mdrl_jax.stages import dynamic_sampling, success_filter
from mdrl_jax.stages.grpo import shares

DOMAINS = ("code", "math", "qa", "cw")
N = {"code": 40, "math": 64, "qa": 12, "cw": 8}


def chance(domain: str, row: int) -> float:
    """The success rate of a prompt under the fake policy: few prompts of code teach, most of math, none of qa."""
    return {"code": float(row % 8 == 1) / 2, "qa": 1.0}.get(domain, row % 5 / 4)


class Fake:
    """Rollouts of a policy that solves row i of a domain with `chance`; a prompt has 1 + i % 7 tokens, all i."""

    pad_id = 7

    def __init__(self) -> None:
        self.calls: list[tuple[Any, ...]] = []

    def sample(self, params, sets, key_path, group_size, sampling, parts) -> ScoredRollouts:
        named = [(prompts.domain, int(row)) for prompts, rows in sets for row in rows]
        self.calls.append((params, named, key_path, group_size, parts))
        length = 4 if max(1 + row % 7 for _, row in named) <= 4 else 8
        rewards = [[float(k < chance(d, row) * group_size) for k in range(group_size)] for d, row in named]
        valid = np.array([np.arange(length) >= length - (1 + row % 7) for _, row in named])
        tokens = np.where(valid, np.array([row + 100 for _, row in named])[:, None], 0).astype(np.int32)
        shape = (len(named), group_size)
        done = Completions(
            tokens_PGT=np.full((*shape, 3), key_path[2], np.int32), logp_PGT=np.zeros((*shape, 3), np.float32),
            length_PG=np.full(shape, 3), ended_PG=np.ones(shape, bool),
        )  # fmt: skip
        found = np.asarray(rewards, np.float32)
        return ScoredRollouts(tokens, valid, done, np.ones((*shape, 3)), found, found, {"late": 1})


def made(stage: str = "math", **fields: Any) -> tuple[Any, Stage]:
    """A runtime with the fake policy, and a stage of 6 prompts a step in groups of 4."""
    own = {stage: {"prompts_per_step": 6, "group_size": 4} | fields}
    before = ("code", "math") if stage.startswith("alternate") else ("code",)
    config = parse({"stages": (*before, stage), "stage_overrides": own, "rollout": {"prompt_buckets": (4, 8)}})
    prompts = {(d, "train"): Prompts(d) for d in DOMAINS}
    runtime = SimpleNamespace(config=config, prompts=prompts, rollouts=Fake())
    return runtime, resolve_stages(config, DOMAINS)[-1]


@dataclasses.dataclass(frozen=True)
class Prompts:
    domain: str

    def __len__(self) -> int:
        return N[self.domain]


def drawn(runtime: Any, stage: Stage, step: int = 3, rows: Any = None) -> tuple[ScoredRollouts, int, list[int]]:
    """The completions of a step, the number of rounds, and the row of each of its prompts."""
    found, rounds = dynamic_sampling.draw(runtime, stage, "params", shares(stage), rows or {}, step)
    of = [int(t[v][0]) - 100 for t, v in zip(found.prompts_PT, found.valid_PT, strict=True)]
    assert [int(v.sum()) for v in found.valid_PT] == [1 + row % 7 for row in of]
    assert all((t[v] == row + 100).all() for t, v, row in zip(found.prompts_PT, found.valid_PT, of, strict=True))
    return found, len(rounds), of


def test_one_round_is_the_step_without_dynamic_sampling():
    runtime, stage = made()
    found, rounds, of = drawn(runtime, stage)
    order = visit_order(0, "math", "math", N["math"], 3 * 6, 6).tolist()
    assert (rounds, of) == (1, order)
    assert runtime.rollouts.calls == [("params", [("math", r) for r in order], (0, "math", 3), 4, 1)]
    several, stage = made(max_rounds=5)
    drawn(several, stage)
    assert several.rollouts.calls[0] == runtime.rollouts.calls[0]  # the first round is the same step


def test_an_alternating_stage_visits_the_prompts_of_each_domain_in_turn():
    runtime, stage = made("alternate-math-code", turn=2)
    visited: dict[str, list[int]] = {"math": [], "code": []}
    for step in range(8):
        (domain,) = shares(stage, step)
        dynamic_sampling.draw(runtime, stage, "params", shares(stage, step), {}, step)
        visited[domain] += [row for of, row in runtime.rollouts.calls[-1][1] if of == domain]
    for domain, rows in visited.items():  # 4 steps of 6 prompts: no row twice, and the first 24 of the order
        assert rows == visit_order(0, "alternate-math-code", domain, N[domain], 0, 24).tolist()
        assert len(set(rows)) == 24


def test_rounds_are_drawn_until_all_groups_of_the_step_can_teach():
    runtime, stage = made(max_rounds=9)
    _, rounds, of = drawn(runtime, stage)
    calls = runtime.rollouts.calls
    assert rounds == len(calls) > 1 and len({call[2] for call in calls}) == rounds  # other sampling keys in each round
    able = [row for call in calls for _, row in call[1] if 0 < chance("math", row) < 1]
    assert of == able[:6]
    before = [row for call in calls[:-1] for _, row in call[1] if 0 < chance("math", row) < 1]
    assert len(before) < 6  # no round was drawn in vain
    again, same = made(max_rounds=9)
    assert drawn(again, same)[2] == of and again.rollouts.calls == calls
    assert drawn(again, same, step=4)[2] != of


def test_at_the_limit_the_first_of_the_others_fill_the_step():
    runtime, stage = made("placebo-code", max_rounds=2)
    found, rounds, of = drawn(runtime, stage)
    rows = [row for call in runtime.rollouts.calls for _, row in call[1]]
    able = [row for row in rows if row % 8 == 1]
    assert rounds == 2 and 0 < len(able) < 6, "the test needs a step that the limit ends"
    assert of == [*able, *(row for row in rows if row % 8 != 1)][:6]
    assert dynamic_sampling.informative(found).tolist() == [True] * len(able) + [False] * (6 - len(able))
    assert found.errors == {"late": 2}


def test_each_domain_of_a_step_keeps_its_share():
    runtime, stage = made("replay-math", max_rounds=3, prevent={"replay": 0.5, "domains": ("code",)})
    found, rounds, of = drawn(runtime, stage)
    assert shares(stage) == {"math": 3, "code": 3} and rounds > 1
    for part, domain in ((of[:3], "math"), (of[3:], "code")):
        own = [row for call in runtime.rollouts.calls for d, row in call[1] if d == domain]
        able = [row for row in own if 0 < chance(domain, row) < 1]
        assert part == [*able, *(row for row in own if row not in able)][:3]
    hopeless, stage = made("qa", max_rounds=3)
    assert drawn(hopeless, stage)[1] == 3


@contextlib.contextmanager
def track(label: str, total: int) -> Iterator[Any]:
    told = []
    yield lambda done, text: told.append(done)
    assert told == list(range(total))


def test_the_filter_keeps_prompts_between_the_bounds():
    runtime, stage = made(filter={"low": 0.25, "high": 0.5, "prompts": 20})
    record = success_filter.measure(runtime, stage, "start", track)
    measured = visit_order(0, "math/filter", "math", N["math"], 0, 20)
    counted, rows = record["domains"]["math"], success_filter.kept(record)
    assert counted["rows"] == measured.tolist() and counted["rates"] == [chance("math", r) for r in measured]
    assert rows["math"].tolist() == sorted(r for r in measured.tolist() if r % 5 in (1, 2))
    below, above = (sum(r % 5 in fives for r in measured.tolist()) for fives in ((0,), (3, 4)))
    assert (counted["below"], counted["above"], counted["kept"]) == (below, above, 20 - below - above)
    assert f"{counted['kept']} of 20 training prompts of math ({below} below, {above} above)" in success_filter.note(
        record
    )
    calls = runtime.rollouts.calls
    assert len(calls) == 4 and {(call[0], call[2], len(call[1])) for call in calls} == {
        ("start", (0, "math/filter", 0), 6)
    }
    # The stage visits these rows and no others, in an order of its own.
    visited = {row for step in range(4) for row in drawn(runtime, stage, step, rows)[2]}
    assert visited <= set(rows["math"].tolist()) and len(visited) > len(rows["math"]) // 2


def test_a_filter_that_keeps_nothing_is_told_in_one_line():
    runtime, stage = made("qa", filter={"low": 0.25, "high": 0.75})
    told = "stage qa: none of 12 training prompts of qa has a success rate from 0.25 to 0.75 .0 are below, 12 above.;"
    with pytest.raises(UserError, match=told):
        success_filter.measure(runtime, stage, "start", track)


def test_a_filter_is_off_unless_a_bound_leaves_something_out():
    assert not made()[1].train.filter.on and made(filter={"high": 0.9})[1].train.filter.on
    for wrong in ({"low": 0.5, "high": 0.5}, {"low": -0.1}, {"high": 1.1}, {"prompts": -1}, {"low": float("nan")}):
        with pytest.raises(UserError, match="filter"):
            made(filter=wrong)
