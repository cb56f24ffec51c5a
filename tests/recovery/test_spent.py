"""Tokens whose derivatives are counted for the costs, against counts by hand."""

import collections
import dataclasses
from types import SimpleNamespace
from typing import Any

import numpy as np

from mdrl_jax.config import PreventSection, SFTSection
from mdrl_jax.recovery.planning import planner
from mdrl_jax.recovery.prevention import prepare
from mdrl_jax.recovery.spent import spend
from mdrl_jax.rl.sft import SFTBatch
from mdrl_jax.second_order.objectives import CompletionBatch
from mdrl_jax.stages import sft


def runtime(**more: Any) -> Any:
    return SimpleNamespace(rollouts=SimpleNamespace(spent=collections.Counter()), **more)


def rows(lengths: list[int], weights: list[int], width: int = 6) -> CompletionBatch:
    """Rows with these numbers of tokens, of which the last two are those of the completion."""
    valid_BT = np.arange(width)[None, ::-1] < np.array(lengths)[:, None]
    ones_B = np.ones(len(lengths), np.float32)
    return CompletionBatch(valid_BT.astype(int), valid_BT, valid_BT[:, -2:], ones_B, ones_B, np.array(weights))


def test_padding_and_rows_that_fill_up_do_not_count() -> None:
    run = runtime()
    spend(run, "gradient", [rows([3, 6], [1, 1]), rows([2, 5], [1, 0])])
    spend(run, "jets", [rows([4], [1])])
    spend(run, "gradient", [])
    assert run.rollouts.spent == {"gradient": 3 + 6 + 2, "jets": 4}


def test_a_protected_step_counts_the_completions_that_it_takes() -> None:
    """Two rows of three a step, in turn; of one rewarded row the second has no weight."""
    run = runtime()
    for step, taken in ((0, 3 + 6), (1, 2 + 3), (2, 6 + 2)):
        before = run.rollouts.spent["gradient"]
        spend(run, "gradient", [prepare._next(rows([3, 6, 2], [1, 1, 1]), step, 2)])
        assert run.rollouts.spent["gradient"] - before == taken
    before = run.rollouts.spent["gradient"]
    spend(run, "gradient", [prepare._next(rows([5], [1]), 0, 2)])
    assert run.rollouts.spent["gradient"] - before == 5


def test_operations_on_parameters_are_those_of_the_formulas() -> None:
    """With 2 kept domains and 3 vectors each."""
    for prevent, expected in (
        ({}, 0),
        ({"ewc": 1.0}, 2 * 4),
        ({"gradients": "agem"}, 2 + 6),
        ({"gradients": "mgs", "ewc": 1.0}, 2 * 6 + 2 * 4),
        ({"protect": 0.5}, 8 * 36 + 8 * 6),
    ):
        assert prepare.operations(PreventSection(**{"vectors": 3} | prevent), 2) == expected


def test_a_supervised_step_counts_all_tokens_of_its_rows(monkeypatch: Any) -> None:
    valid_BT = rows([3, 6, 2, 5], [1] * 4).valid_BT
    batch = SFTBatch(tokens_BT=valid_BT.astype(int), valid_BT=valid_BT, mask_BT=valid_BT.astype(np.float32))
    monkeypatch.setattr(sft, "batch", lambda *_: batch)
    monkeypatch.setattr(sft, "put", lambda tree, *_: tree)
    stage: Any = SimpleNamespace(sft=dataclasses.replace(SFTSection(), steps=3, batch_size=4, grad_accum_steps=2))
    run = runtime(mesh=None)
    steps: Any = sft.sft_steps(run, stage, lambda state, *_: (state, {"loss": 1.0}), None, 1)  # pyright: ignore
    assert [done for done, *_ in steps] == [2, 3]
    assert run.rollouts.spent == {"trained": 2 * (3 + 6 + 2 + 5)}


def test_an_edit_of_zeros_has_nothing_to_take_back() -> None:
    """A placebo as the donor: the rollback has size 0, not 0/0."""
    work = planner.Work.__new__(planner.Work)
    action = planner.Action("rollback", "math", 0, "qa", "magnitude", 0.1, 1.0)
    work.domains = ("math", "qa")
    zeros = {"w": np.zeros(3, np.float32)}
    work.back, work._own = lambda stage: zeros, lambda domain: None  # pyright: ignore
    found = planner.Found({d: planner.Shift(0.0, 0.0) for d in work.domains}, 0.0)
    outlook = work._outlook(action, {planner._key(action): found})
    assert outlook.size == 0.0 and all(s.value == 0.0 for s in outlook.shifts.values())
