"""Chat templates: the tokenizer's own text, end-of-turn tokens, thinking, the plain template, counts by length."""

from pathlib import Path
from typing import Any

import pytest

from mdrl_jax.domains import chat, datasets
from mdrl_jax.domains.base import DomainsConfig, SourceConfig
from mdrl_jax.domains.prompts import tokenize
from mdrl_jax.domains.registry import make_domains
from mdrl_jax.domains.vocabulary import make_tokenizer
from mdrl_jax.errors import UserError
from mdrl_jax.model import tokens
from mdrl_jax.workfolder import WorkFolder

THINKS = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% if enable_thinking is defined and not enable_thinking %}"
    "<think></think>{% endif %}{% endif %}"
)


@pytest.fixture(scope="module")
def qwen(shared: Path) -> Any:
    """The real Qwen2.5 tokenizer."""
    return tokens.load_tokenizer(shared / "models" / "qwen2.5-tokenizer")


def test_a_template_that_writes_the_date_gets_that_of_the_first_day(tmp_path: Path):
    tokenizer = make_tokenizer()
    tokenizer.chat_template = "\n{% set form = '%-d %Y' %}{{ strftime_now(form) }}{{ strftime_now(format='%B') }}"
    assert chat.chat_text(tokenizer, "add", date="2025-01-02") == "\n2 2025January"
    tokenizer.chat_template = "{{ strftime_now('%d %B %Y') }}: {{ messages[0].content }}"
    assert chat.writes_date(tokenizer) and not chat.writes_date(make_tokenizer())
    assert chat.chat_text(tokenizer, "add", date="2025-01-02") == "02 January 2025: add"
    assert chat.chat_text(tokenizer, "add") != "02 January 2025: add"
    work = WorkFolder(tmp_path)
    assert work.date() == ""
    work.open_data({"qa": {"splits": {}}, "math": {"splits": {}, "date": "2025-01-02"}})
    assert work.date() == "2025-01-02"


def test_a_system_prompt_that_the_template_leaves_out_is_refused():
    tokenizer = make_tokenizer()
    tokenizer.chat_template = "{% for m in messages if m.role != 'system' %}{{ m.content }}{% endfor %}"
    assert chat.chat_text(tokenizer, "add") == "add"
    with pytest.raises(UserError, match="leaves the system prompt out"):
        chat.chat_text(tokenizer, "add", system="be brief")
    tokenizer.chat_template = "{{ messages[0].content | trim }}"
    assert chat.chat_text(tokenizer, "add", system=" be brief ") == "be brief"
    edits = "{% if messages[0].role == 'system' %}{{ messages[0].content | replace('/quick', '') }};{% endif %}"
    tokenizer.chat_template = edits + "{{ messages[-1].content }}"  # as that of SmolLM3
    assert chat.chat_text(tokenizer, "add", system="/quick be brief") == " be brief;add"


def test_the_text_is_the_templates_own(qwen: Any):
    default = "You are Qwen, created by Alibaba Cloud. You are a helpful assistant."
    for system in ("", "Be brief."):
        messages = [{"role": "system", "content": system}] * bool(system) + [{"role": "user", "content": "2 + 2?"}]
        text = chat.chat_text(qwen, "2 + 2?", system)
        assert text == qwen.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        assert text == (
            f"<|im_start|>system\n{system or default}<|im_end|>\n<|im_start|>user\n2 + 2?<|im_end|>\n"
            "<|im_start|>assistant\n"
        )
        ids = qwen.apply_chat_template(messages, tokenize=True, add_generation_prompt=True, return_dict=True)
        assert chat.chat_ids(qwen, "2 + 2?", system) == ids["input_ids"]


def test_the_end_of_a_turn_ends_a_completion(qwen: Any, shared: Path):
    base = tokens.load_tokenizer(shared / "models" / "qwen2.5-tokenizer")
    base.eos_token = "<|endoftext|>"  # as in the base model's folder
    assert tokens.eos_ids(base) == (151643, 151645)
    assert tokens.eos_ids(qwen) == (151645,)
    base.chat_template = "{% for m in messages %}{{ m.content }} and so on{% endfor %}"  # " and" ends nothing
    assert tokens.eos_ids(base) == (151643,)
    base.chat_template = "{% for m in messages %}<|im_start|>{{ m.content | lower }}<|im_end|>{% endfor %}"
    assert tokens.eos_ids(base) == (151643,)  # the reply is not printed as it is, so its end cannot be found
    assert tokens.eos_ids(make_tokenizer()) == (make_tokenizer().eos_token_id,)


def test_thinking_is_switched_where_the_template_knows_it(qwen: Any, shared: Path):
    thinker = tokens.load_tokenizer(shared / "models" / "qwen2.5-tokenizer")
    thinker.chat_template = THINKS
    assert chat.chat_text(thinker, "Hi") == "<user>Hi<assistant>" == chat.chat_text(thinker, "Hi", thinking="on")
    assert chat.chat_text(thinker, "Hi", thinking="off") == "<user>Hi<assistant><think></think>"
    for tokenizer in (qwen, make_tokenizer()):
        with pytest.raises(UserError, match="domains.thinking='off' does nothing here"):
            chat.chat_text(tokenizer, "Hi", thinking="off")


def test_without_a_template_the_prompt_is_plain_and_the_tokenizer_adds_its_start(shared: Path):
    tokenizer = tokens.load_tokenizer(shared / "models" / "tinystories-656k")
    assert chat.chat_text(tokenizer, "A {x}?", "Brief.") == "Brief.\n\nUser: A {x}?\n\nAssistant:"
    ids = chat.chat_ids(tokenizer, "Once upon")
    assert ids == tokenizer("User: Once upon\n\nAssistant:").input_ids and ids[0] == tokenizer.bos_token_id


def test_procedural_prompts_stay_bare(qwen: Any):
    domain = make_domains(("math",), DomainsConfig())["math"]
    prompts = tokenize(domain, "test", qwen, 100)
    assert prompts.tokens == tuple(tuple(qwen(p.prompt).input_ids) for p in domain.test)


def test_too_long_is_counted_by_the_chats_tokens(qwen: Any, shared: Path):
    source = SourceConfig(preset="squad", files=(f"{shared}/data/qa/xquad_en.json",), system="Be brief.")
    domain = datasets.make("qa", source, DomainsConfig(n_test=10**6))
    prompts = tokenize(domain, "test", qwen, 200)
    lengths = []
    for problem in domain.test:
        messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": problem.prompt}]
        text = qwen.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        lengths.append(len(qwen.encode(text, add_special_tokens=False)))
    n_long = sum(n > 200 for n in lengths)
    assert 0 < n_long == prompts.record["too_long"] < len(lengths) == n_long + len(prompts)
    assert [len(row) for row in prompts.tokens] == [n for n in lengths if n <= 200]
