"""Counterfactual prompts: one thing differs, the reply is right and another one."""

import random

import pytest

from mdrl_jax.domains.base import Domain, DomainsConfig, Problem
from mdrl_jax.domains.counterfactuals import counterfactuals, swapped_options
from mdrl_jax.domains.registry import DOMAINS
from mdrl_jax.errors import UserError


@pytest.mark.parametrize("name", DOMAINS)
def test_replies_are_right_and_the_prompts_differ_in_one_word(name: str):
    domain = DOMAINS[name](DomainsConfig())
    checks = {p.prompt: p.check for p in (*domain.train, *domain.validation, *domain.test, *domain.pretraining)}
    pairs = counterfactuals(domain, domain.train[:60], seed=0)
    assert len(pairs) == 60 and pairs == counterfactuals(domain, domain.train[:60], seed=0)
    assert {p.kind for p in pairs} == {"entity", "task", "answer"} - ({"answer"} if name == "qa" else set())
    for pair in pairs:
        base, source = pair.base.split(), pair.source.split()
        assert len(base) == len(source) and sum(a != b for a, b in zip(base, source, strict=True)) == 1
        assert pair.base_reply != pair.source_reply
        assert len(pair.base_reply.split()) == len(pair.source_reply.split())
        if name == "qa":
            assert (checks[pair.base]["answer"], checks[pair.source]["answer"]) == (pair.base_reply, pair.source_reply)
        if name == "math":
            for prompt, reply in ((pair.base, pair.base_reply), (pair.source, pair.source_reply)):
                assert eval(prompt.removesuffix("=")) % 10 == int(reply.split()[-1])


def test_a_multiple_choice_question_swaps_the_right_and_a_wrong_option():
    prompt = "Which is a metal?\nA. salt\nB. iron\nC. wax\nAnswer:"
    check = {"answer": "B", "choices": ["salt", "iron", "wax"]}
    pair = swapped_options(Problem(prompt, check), random.Random(0))
    assert pair is not None and pair.base_reply == "B" and pair.source_reply in "AC"
    wrong = {"A": "salt", "C": "wax"}[pair.source_reply]
    assert f"B. {wrong}" in pair.source and f"{pair.source_reply}. iron" in pair.source
    assert sorted(pair.source) == sorted(prompt)
    open_question = Domain("facts", "qa", (Problem("Who?", {"answer": ["Ada"]}),), (), ())
    with pytest.raises(UserError, match="facts has no counterfactual prompts"):
        counterfactuals(open_question, open_question.train, 0)
