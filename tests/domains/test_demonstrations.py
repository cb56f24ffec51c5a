"""Replies of supervised stages: the chat template's own text and tokens, rows that are left out, refusals."""

import json
import random
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from mdrl_jax.domains import datasets, math
from mdrl_jax.domains.base import Data, Domain, DomainsConfig, Problem, SourceConfig
from mdrl_jax.domains.chat import chat_ids
from mdrl_jax.domains.demonstrations import demonstrations, pair_ids
from mdrl_jax.domains.prompts import tokenize
from mdrl_jax.domains.vocabulary import make_tokenizer
from mdrl_jax.errors import UserError
from mdrl_jax.model import tokens

END, TURN = "<end>", "<turn>"
# As in Qwen3: the template writes an empty thinking block before a reply, and before it only if thinking is off.
THINKS = (
    "{% for m in messages %}<{{ m.role }}>{% if m.role == 'assistant' %}<think>\n\n</think>\n\n{% endif %}"
    "{{ m.content }}<turn>\n{% endfor %}{% if add_generation_prompt %}<assistant>"
    "{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)
# The generation prompt opens a block that the template does not write before a reply.
OPENS = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}<turn>\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant><think>{% endif %}"
)
# Before a reply the template writes one more line break than its generation prompt has.
ADDS_A_LINE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}{{ '\n' }}{% endif %}"
    "{{ m.content }}<|im_end|>{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
REPLIES = ("42", "Six times seven.\nThe answer is 42.", " 6 * 7 = 42", "```python\ndef f():\n    return 42\n```")


def of_bytes(template: str) -> Any:
    """A tokenizer with one token for each byte, two special ones and this chat template."""
    letters = {letter: i for i, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    inner = Tokenizer(models.BPE(letters, []))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, eos_token=END)
    tokenizer.add_tokens([AddedToken(TURN, special=True)])
    tokenizer.chat_template = template
    return tokenizer


@pytest.fixture(scope="module")
def qwen(shared: Path) -> Any:
    """The real Qwen2.5 tokenizer, with the end token of a base model."""
    tokenizer = tokens.load_tokenizer(shared / "models" / "qwen2.5-tokenizer")
    tokenizer.eos_token = "<|endoftext|>"
    return tokenizer


def chats(thinking: str = "", system: str = "") -> Domain:
    """A domain of chats without rows."""
    data = Data({}, system, thinking, False, {})
    return Domain("math", "math", (), (), (), lambda problem, rng, noise: problem.reply, data=data)


def pair(tokenizer: Any, domain: Domain, prompt: str, reply: str) -> tuple[list[int], list[int]]:
    return pair_ids(tokenizer, domain, Problem(prompt, {}), reply, tokens.eos_ids(tokenizer))


def the_templates_own(tokenizer: Any, domain: Domain, reply: str, **options: Any) -> list[int]:
    """Tokens of the chat with the reply as the assistant's turn, by `transformers` alone."""
    system = [{"role": "system", "content": domain.data.system}] if domain.data and domain.data.system else []
    messages = [*system, {"role": "user", "content": "6 * 7?"}, {"role": "assistant", "content": reply}]
    return tokenizer.apply_chat_template(messages, tokenize=True, return_dict=True, **options)["input_ids"]


@pytest.mark.parametrize("reply", REPLIES)
@pytest.mark.parametrize("system", ["", "Be brief."])
def test_a_pair_is_the_chat_templates_own(qwen: Any, system: str, reply: str):
    domain = chats(system=system)
    prompt, answer = pair(qwen, domain, "6 * 7?", reply)
    assert prompt == chat_ids(qwen, "6 * 7?", system)
    assert qwen.decode(answer) == reply + "<|im_end|>" and answer.count(151645) == 1
    whole = the_templates_own(qwen, domain, reply)
    assert whole[: len(prompt) + len(answer)] == prompt + answer
    assert qwen.decode(whole[len(prompt) + len(answer) :]) == "\n"  # the template's, which the model never writes


def test_where_tokens_would_span_prompt_and_reply_both_are_tokenized_on_their_own(qwen: Any):
    prompt, answer = pair(qwen, chats(), "6 * 7?", "\n\n42")
    assert prompt == chat_ids(qwen, "6 * 7?") and qwen.decode(answer) == "\n\n42<|im_end|>"
    assert answer[:-1] == qwen("\n\n42").input_ids
    assert the_templates_own(qwen, chats(), "\n\n42")[: len(prompt)] != prompt  # three line breaks are one token


def test_what_a_template_adds_before_a_reply_is_kept_where_tokens_would_span(
    qwen: Any, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(qwen, "chat_template", ADDS_A_LINE)
    prompt, answer = pair(qwen, chats(), "6 * 7?", "42")
    assert qwen.decode(prompt).endswith("assistant\n") and qwen.decode(answer) == "\n42<|im_end|>"


@pytest.mark.parametrize("thinking, between", [("", "<think>\n\n</think>\n\n"), ("off", "")])
def test_the_reply_closes_the_thinking_that_the_prompt_leaves_open(thinking: str, between: str):
    tokenizer, domain = of_bytes(THINKS), chats(thinking)
    options = {"enable_thinking": False} if thinking else {}
    for reply in REPLIES:
        prompt, answer = pair(tokenizer, domain, "6 * 7?", reply)
        assert prompt == chat_ids(tokenizer, "6 * 7?", "", thinking)
        assert tokenizer.decode(answer) == f"{between}{reply}{TURN}"
        whole = the_templates_own(tokenizer, domain, reply, **options)
        assert whole[: len(prompt) + len(answer)] == prompt + answer


def test_a_template_that_does_not_continue_its_prompt_gives_the_bare_reply():
    tokenizer = of_bytes(OPENS)
    prompt, answer = pair(tokenizer, chats(), "6 * 7?", "42")
    assert tokenizer.decode(prompt) == "<user>6 * 7?<turn>\n<assistant><think>"
    assert tokenizer.decode(answer) == "42" + TURN


def test_without_a_template_the_reply_follows_after_a_space_and_ends_with_eos():
    tokenizer = of_bytes("")
    prompt, answer = pair(tokenizer, chats(system="Be brief."), "6 * 7?", "forty two")
    assert prompt == chat_ids(tokenizer, "6 * 7?", "Be brief.")
    whole = tokenizer("Be brief.\n\nUser: 6 * 7?\n\nAssistant: forty two").input_ids
    assert prompt + answer == [*whole, tokenizer.eos_token_id] and tokenizer.decode(answer) == f" forty two{END}"


def test_a_real_tokenizer_without_a_template_writes_the_same_text(shared: Path):
    """Its tokens of the whole text span the prompt's end, so that both parts are tokenized on their own."""
    tokenizer = tokens.load_tokenizer(shared / "models" / "tinystories-656k")
    prompt, answer = pair(tokenizer, chats(), "who was she?", "a little girl")
    assert prompt == chat_ids(tokenizer, "who was she?") and answer[-1] == tokenizer.eos_token_id
    text = "User: who was she?\n\nAssistant: a little girl"
    assert tokenizer.decode([*prompt, *answer], skip_special_tokens=True).strip() == text


def test_a_procedural_domain_has_no_chat_and_ends_with_eos(qwen: Any):
    problem = Problem("3 + 8 =", {})
    domain = Domain("math", "math", (problem,), (), (), math.demonstrate)
    for tokenizer, end in ((qwen, 151643), (make_tokenizer(), make_tokenizer().eos_token_id)):
        prompt, answer = pair_ids(tokenizer, domain, problem, "11", tokens.eos_ids(tokenizer))
        assert prompt == tokenizer("3 + 8 =").input_ids
        assert prompt + answer == [*tokenizer("3 + 8 = 11").input_ids, end]


def source(path: Path, rows: list[dict[str, Any]], reply: str = "{a} and {b}.") -> Domain:
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    made = SourceConfig(
        files=(str(path),), prompt="{q}", check={"answer": "a"}, reply=reply, reward="qa",
        validation_share=0.0, test_share=0.0,
    )  # fmt: skip
    return datasets.make("math", made, DomainsConfig())


def test_long_rows_and_rows_without_a_reply_are_left_out_and_counted(tmp_path: Path):
    tokenizer = make_tokenizer()
    rows = [{"q": f"number {i}", "a": "1", "b": " ".join(["x"] * i)} for i in range(1, 21)]
    rows += [{"q": "no field", "a": "1"}, {"q": "a list", "a": ["1", "2"], "b": "y"}, {"q": "none", "a": "1", "b": []}]
    domain = source(tmp_path / "a.jsonl", rows)
    prompts = tokenize(domain, "train", tokenizer, 100)
    eos_ids = tokens.eos_ids(tokenizer)
    # "User: number 3", "Assistant:", "1 and x x x." and the end token: 4 + 2 + i + 1.
    made = demonstrations(domain, prompts.problems, tokenizer, eos_ids, 17)
    kept = {prompts.problems[i].prompt: prompts.problems[i].reply for i in made.rows}
    assert kept == {f"number {i}": f"1 and {' '.join(['x'] * i)}." for i in range(1, 11)} | {"a list": "1 and y."}
    counts = {k: v for k, v in made.record.items() if k != "fingerprint"}
    assert counts == {"prompts": 23, "without_reply": 2, "too_long": 10, "length": 17}
    assert made.note() == (
        "math: 11 of 23 training prompts have a demonstration of at most 17 tokens; left out 10 too long, "
        "2 without a reply"
    )
    drawn = [made.draw(random.Random(i), 0.5, tokenizer, eos_ids) for i in range(200)]
    assert max(len(p) + len(r) for p, r in drawn) == 17
    assert {tuple(p) for p, _ in drawn} == {tuple(prompts.tokens[i]) for i in made.rows}
    more = demonstrations(domain, prompts.problems, tokenizer, eos_ids, 18)
    assert len(more.rows) == 12 and more.record["fingerprint"] != made.record["fingerprint"]


def test_what_cannot_be_shown_is_refused_in_one_line(tmp_path: Path):
    tokenizer = make_tokenizer()
    rows = [{"q": f"number {i}", "a": "1", "b": "x"} for i in range(20)]

    def made(reply: str, longest: int) -> Any:
        domain = source(tmp_path / "a.jsonl", rows, reply)
        return demonstrations(domain, domain.train, tokenizer, tokens.eos_ids(tokenizer), longest)

    with pytest.raises(
        UserError, match=r"^all of 20 demonstrations of math are longer than sft.length=5 tokens; raise"
    ):
        made("{a}", 5)
    with pytest.raises(UserError, match=r"^domains.math.reply: none of the 20 training rows has all of its fields$"):
        made("{a} {solution}", 50)
    with pytest.raises(UserError, match=r"^domain math has no replies to train on; set domains.math.reply to a templ"):
        made("", 50)
    with pytest.raises(UserError, match=r"^domains.math.reply: \{a b\} is no field"):
        made("{a b}", 50)
    bare = Domain("own", "qa", (Problem("a", {}),), (), ())
    with pytest.raises(UserError, match=r"^domain own has no replies to train on; give it `demonstrate`$"):
        demonstrations(bare, bare.train, tokenizer, (1,), 50)


def test_a_field_with_braces_is_text_and_not_a_template(tmp_path: Path):
    domain = source(tmp_path / "a.jsonl", [{"q": "q", "a": "{b}", "b": "x"}], "{{{a}}}")
    assert domain.train[0].reply == "{{b}}"
