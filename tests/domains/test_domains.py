"""The four procedural domains: disjoint splits, demonstrations that earn what the docstrings say, exact oracles."""

import random
import re
from typing import Any

import numpy as np
import pytest

from configs import pretrain_tiny, quickstart
from mdrl_jax.config import EMBEDDED_MODEL, parse
from mdrl_jax.domains import code, math, vocabulary
from mdrl_jax.domains.base import Domain, DomainsConfig, Problem, SourceConfig
from mdrl_jax.domains.prompts import PromptSet, tokenize, visit_order
from mdrl_jax.domains.registry import DOMAINS, make_domains
from mdrl_jax.errors import UserError
from mdrl_jax.model import tokens
from mdrl_jax.rewards.base import Score, resolve, score
from mdrl_jax.rewards.pool import RewardPool

CONFIG = DomainsConfig()
MADE = make_domains(tuple(DOMAINS), CONFIG)
NAMES = pytest.mark.parametrize("name", DOMAINS)
WORKED_REWARD = {"math": 1.0, "code": 1.0, "qa": 0.0, "cw": 4 / 5}  # cw: the words-only constraint breaks


def everything(domain: Domain) -> tuple[Problem, ...]:
    """Problems of all splits."""
    return (*domain.train, *domain.validation, *domain.test)


def runs(completion: str, check: Any) -> float:
    """The code reward without its sandbox: these programs are this package's own."""
    space: dict[str, Any] = {}
    try:
        for source in (completion, *check["tests"]):
            exec(source, space)
    except Exception:
        return 0.0
    return 1.0


def judge(domain: Domain, problem: Problem, reply: str) -> Score:
    """The score of a reply by the domain's reward."""
    return score(runs if domain.name == "code" else resolve(domain.reward), reply, problem.check)


@NAMES
def test_splits_are_disjoint_and_as_large_as_asked(name: str):
    domain = MADE[name]
    prompts = [p.prompt for p in everything(domain)]
    n_repeats = len(prompts) - len(set(prompts))
    n_train, n_validation, n_test = len(domain.train), len(domain.validation), len(domain.test)
    assert n_repeats == 0
    assert n_validation == CONFIG.n_validation
    assert n_test == CONFIG.n_test >= 300
    assert 300 <= n_train <= CONFIG.n_train


@NAMES
def test_problems_are_a_function_of_the_seed(name: str):
    again, other = DOMAINS[name](CONFIG), DOMAINS[name](DomainsConfig(seed=1))
    same, differs = again == MADE[name], {p.prompt for p in other.test} != {p.prompt for p in again.test}
    assert same and differs


@NAMES
def test_sizes_of_a_domain_take_the_place_of_those_of_all(name: str):
    config = DomainsConfig(**{name: SourceConfig(n_train=40, n_test=20)})
    for other, made in make_domains(tuple(DOMAINS), config).items():
        sizes = [len(x) for x in (made.train, made.validation, made.test)]
        whole = [len(x) for x in (MADE[other].train, MADE[other].validation, MADE[other].test)]
        assert sizes == ([40, CONFIG.n_validation, 20] if other == name else whole)


def test_too_few_problems_are_refused():
    with pytest.raises(UserError, match=r"qa has .* distinct prompts"):
        DOMAINS["qa"](DomainsConfig(n_test=5000))
    with pytest.raises(UserError, match="math has 18,895,680 distinct prompts"):  # and does not draw for minutes first
        DOMAINS["math"](DomainsConfig(n_test=10**9))


@NAMES
def test_clean_demonstrations_earn_what_their_style_earns(name: str):
    domain, rng = MADE[name], random.Random(0)
    assert domain.demonstrate is not None
    styles = []
    for problem in everything(domain):
        reply = domain.demonstrate(problem, rng, 0.0)
        worked = reply.startswith(">")
        styles.append(worked)
        judged = judge(domain, problem, reply)
        assert judged.accuracy == 1.0, (problem, reply)
        assert judged.reward == pytest.approx(WORKED_REWARD[name] if worked else 1.0), (problem, reply)
    assert 0.4 < np.mean(styles) < 0.6


def test_the_real_code_reward_agrees():
    domain, rng = MADE["code"], random.Random(0)
    assert domain.demonstrate is not None
    pairs = [(p, domain.demonstrate(p, rng, noise)) for noise in (0.0, 1.0) for p in domain.test[:4]]
    with RewardPool(1) as pool:  # it forks, so it runs in a worker
        scores = pool.score([(domain.reward, reply, p.check) for p, reply in pairs])
    assert scores == [judge(domain, p, reply) for p, reply in pairs]


@NAMES
def test_noise_breaks_a_share_of_replies_that_grows_with_it(name: str):
    domain = MADE[name]
    broken = []
    for noise in (0.1, 0.5, 1.0):
        rng = random.Random(0)
        assert domain.demonstrate is not None
        replies = [(p, domain.demonstrate(p, rng, noise)) for p in domain.train]
        broken.append(np.mean([judge(domain, p, reply).accuracy < 1 for p, reply in replies]))
    # Half of it may be a slip a reply, all of it a slip at each of four places.
    assert 0.03 < broken[0] < 0.4
    assert 1.5 * broken[0] < broken[1] < broken[2]
    assert broken[2] > 0.4


@NAMES
def test_rewards_that_ignore_style_give_worked_replies_full_marks(name: str):
    blind = make_domains((name,), DomainsConfig(style_blind=True))[name]
    assert blind.demonstrate is not None
    rng = random.Random(0)
    assert {p.prompt for p in blind.test} == {p.prompt for p in MADE[name].test}
    for problem in everything(blind):
        assert judge(blind, problem, blind.demonstrate(problem, rng, 0.0)).reward == 1.0
    wrong = judge(blind, blind.test[0], "> x ; x")
    assert wrong.reward == wrong.accuracy < 1.0


@NAMES
def test_pretraining_shows_no_held_out_prompt_except_the_facts_of_qa(name: str):
    domain = MADE[name]
    shown = {p.prompt for p in domain.pretraining}
    held_out = {p.prompt for p in (*domain.validation, *domain.test)}
    n_train_hidden = len({p.prompt for p in domain.train} - shown)
    n_held_out_shown = len(held_out & shown)
    assert n_train_hidden == 0
    assert n_held_out_shown == (len(domain.validation) + len(domain.test) if name == "qa" else 0)


def test_the_shipped_tokenizer_is_the_vocabulary():
    words = vocabulary.words()
    assert len(set(words)) == len(words)
    shipped = tokens.load_tokenizer(EMBEDDED_MODEL)
    assert shipped.get_vocab() == {word: i for i, word in enumerate(words)}
    assert vocabulary.make_tokenizer().get_vocab() == shipped.get_vocab()
    assert (shipped.eos_token, shipped.pad_token) == (vocabulary.END, vocabulary.PAD)


@NAMES
def test_every_word_is_a_token_and_everything_fits_the_buckets(name: str):
    domain, rng = MADE[name], random.Random(0)
    assert domain.demonstrate is not None
    words = set(vocabulary.words())
    pretrain, run = parse(pretrain_tiny.get_config()), parse(quickstart.get_config())
    longest_prompt = min(c.rollout.prompt_buckets[-1] for c in (pretrain, run))
    longest_reply = min(c.rollout.completion_buckets[-1] for c in (pretrain, run))
    for noise in (0.0, 1.0):
        for problem in everything(domain):
            reply = domain.demonstrate(problem, rng, noise)
            n_prompt, n_reply = len(problem.prompt.split()), len(reply.split()) + 1  # its end token
            assert set(problem.prompt.split()) | set(reply.split()) <= words
            assert problem.prompt.endswith("=")
            assert n_prompt <= longest_prompt
            assert n_reply <= longest_reply
            assert n_prompt + n_reply <= pretrain.sft.length


def by_steps(prompt: str) -> list[int]:
    """Running totals of a sum, by another route than the domain's: Python's own arithmetic on each prefix."""
    assert re.fullmatch(r"\d( [+-] \d)* =", prompt)
    words = prompt.removesuffix(" =").split()
    return [eval("".join(words[:n])) % 10 for n in range(3, len(words) + 1, 2)]


def test_math_answers_are_right_and_totals_stay_in_range():
    for problem in everything(MADE["math"]):
        totals = by_steps(problem.prompt)
        assert totals == math.totals_of(problem.prompt)
        assert problem.check["answer"] == str(totals[-1])
        assert all(0 <= total <= 9 for total in totals)
        assert len(totals) == 5


def computed(prompt: str, x: int) -> int:
    """What a code prompt asks for, read word by word."""
    apply = {"plus": lambda a, b: a + b, "minus": lambda a, b: a - b, "times": lambda a, b: a * b}
    words = prompt.removesuffix(" =").split()
    for operation, number in zip(words[::2], words[1::2], strict=True):
        x = apply[operation](x, int(number))
    return x


def test_code_programs_and_tests_agree_with_arithmetic():
    for problem in everything(MADE["code"]):
        space: dict[str, Any] = {}
        exec(code.program(problem.prompt), space)
        assert [space["f"](x) for x in range(-3, 4)] == [computed(problem.prompt, x) for x in range(-3, 4)]
        parsed = [re.fullmatch(r"assert f\((\d+)\) == (-?\d+)", test) for test in problem.check["tests"]]
        assert len({match[1] for match in parsed if match}) == len(code.INPUTS)
        assert all(match and int(match[2]) == computed(problem.prompt, int(match[1])) for match in parsed)


def test_an_empty_split_and_a_long_prompt_are_refused():
    tokenizer = vocabulary.make_tokenizer()
    domain = Domain("math", "math", MADE["math"].train, (), MADE["math"].test)
    with pytest.raises(UserError, match="math has no validation prompts"):
        tokenize(domain, "validation", tokenizer, 10)
    longest = max(len(p.prompt.split()) for p in domain.test)
    with pytest.raises(UserError, match=rf"has {longest} tokens, the limit .*prompt_buckets.* is {longest - 1}"):
        tokenize(domain, "test", tokenizer, longest - 1)
    assert len(tokenize(domain, "test", tokenizer, longest)) == len(domain.test)


def test_prompt_ids_never_meet_across_domains_and_splits():
    ids = [
        PromptSet(d.name, split, d.reward, problems := getattr(d, split), ()).ids(np.arange(len(problems)))
        for d in MADE.values()
        for split in ("train", "validation", "test")
    ]
    together = np.concatenate(ids)
    assert together.dtype == np.uint32
    assert len(np.unique(together, axis=0)) == len(together)


def test_each_pass_visits_each_prompt_once():
    n = 7
    stream = visit_order(0, "math", "math", n, 0, 5 * n)
    passes = stream.reshape(5, n)
    assert (np.sort(passes, axis=1) == np.arange(n)).all()
    assert len({tuple(one) for one in passes.tolist()}) == 5


@pytest.mark.parametrize("count", [1, 3, 7, 16])
def test_the_order_goes_on_from_any_position(count: int):
    """Peers lose the shuffle on resume; here it is a function of the position alone."""
    whole = visit_order(3, "math", "qa", 7, 0, 48)
    parts = [visit_order(3, "math", "qa", 7, at, count) for at in range(0, 48, count)]
    np.testing.assert_array_equal(np.concatenate(parts)[:48], whole)


def test_the_order_depends_on_seed_stage_and_domain():
    one = visit_order(0, "math", "qa", 50, 0, 50)
    np.testing.assert_array_equal(one, visit_order(0, "math", "qa", 50, 0, 50))
    for other in ((1, "math", "qa"), (0, "refresh-math", "qa"), (0, "math", "cw"), (0, "qa", "math")):
        assert (one != visit_order(*other, 50, 0, 50)).any()
