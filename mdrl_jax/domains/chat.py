"""A prompt of a data set as a chat: the tokenizer's own template, or a plain one."""

from typing import Any

import jinja2

from mdrl_jax.errors import UserError

PLAIN = "User: {prompt}\n\nAssistant:"  # for models whose tokenizer has no chat template [chosen]


def chat_text(tokenizer: Any, prompt: str, system: str = "", thinking: str = "") -> str:
    """A user's prompt as the text that the model goes on from.

    By the tokenizer's chat template, with its generation prompt; by `PLAIN`, after the system prompt and an empty
    line, if it has none. `thinking` "on" or "off" is the template's `enable_thinking`.

    Raises:
      UserError: if `thinking` is set and the template knows no such thing, or the template fails.
    """
    template = tokenizer.chat_template
    if thinking and "enable_thinking" not in str(template):
        raise UserError(
            f"domains.thinking={thinking!r} does nothing here: the model's chat template knows no "
            "enable_thinking; leave it empty"
        )
    if not template:
        return (f"{system}\n\n" if system else "") + PLAIN.format(prompt=prompt)
    messages = ([{"role": "system", "content": system}] if system else []) + [{"role": "user", "content": prompt}]
    switched = {"enable_thinking": thinking == "on"} if thinking else {}
    try:
        return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True, **switched)
    except jinja2.TemplateError as e:
        raise UserError(f"the model's chat template fails: {e}") from e


def chat_ids(tokenizer: Any, prompt: str, system: str = "", thinking: str = "") -> list[int]:
    """`chat_text` as tokens. A chat template writes special tokens itself; with the plain one the tokenizer does."""
    text = chat_text(tokenizer, prompt, system, thinking)
    return tokenizer(text, add_special_tokens=not tokenizer.chat_template).input_ids
