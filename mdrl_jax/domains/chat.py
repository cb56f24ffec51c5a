"""Turns prompts, and their replies, into chats, by the tokenizer's chat template or by a plain one.

Every command renders prompts here: `render` applies the chat template, `chat_text` also has a plain form for tokenizers
without one.
"""

import datetime
from collections.abc import Mapping, Sequence
from typing import Any

from mdrl_jax.errors import UserError

PLAIN = "User: {prompt}\n\nAssistant:"  # for models whose tokenizer has no chat template [chosen]


def chat_text(
    tokenizer: Any, prompt: str, system: str = "", thinking: str = "", reply: str | None = None, date: str = ""
) -> str:
    """Writes a user's prompt as the text that the model continues, or as the text with the model's reply in it.

    A tokenizer with a chat template uses it: for a prompt alone it includes the marker after which the assistant speaks
    (the generation prompt), and a reply is the assistant's turn. A tokenizer without one uses `PLAIN`, preceded by the
    system prompt, if any, and an empty line; a reply follows after a space.

    Args:
      tokenizer: a `transformers` tokenizer.
      prompt: the user's message.
      system: the system prompt; "": no system message is given, but the template may write one.
      thinking: "on" or "off" is passed to the template as `enable_thinking` True or False; "" passes nothing.
      reply: the assistant's message; None for the prompt alone.
      date: as in `render`.

    Returns:
      The text.

    Raises:
      UserError: if `thinking` is set but there is no template; otherwise as in `render`, if there is a template.
      ValueError: as in `render`.
    """
    if not tokenizer.chat_template and not thinking:
        said = "" if reply is None else f" {reply}"
        return (f"{system}\n\n" if system else "") + PLAIN.format(prompt=prompt) + said
    messages = ([{"role": "system", "content": system}] if system else []) + [{"role": "user", "content": prompt}]
    messages += [] if reply is None else [{"role": "assistant", "content": reply}]
    return render(tokenizer, messages, thinking, date)


def writes_date(tokenizer: Any) -> bool:
    """Whether the tokenizer's chat template asks for the present date, as those of Llama 3 and SmolLM3 do."""
    return "strftime_now" in str(tokenizer.chat_template)


def _dated(template: str, date: str) -> str:
    """The template with a macro `strftime_now` before it that writes this day, in place of the function of that name.

    `transformers` lets no caller give the function another meaning.
    """
    day = datetime.datetime.fromisoformat(date)
    codes = [f"%{flag}{code}" for flag in ("", "-") for code in "aAbBcCdDeFgGhHIjmMnprRStTuUVwWxXyYzZ"] + ["%%"]
    text = "format" + "".join(f"|replace({code!r}, {day.strftime(code)!r})" for code in codes)
    return f"{{%- macro strftime_now(format) -%}}{{{{ {text} }}}}{{%- endmacro +%}}{template}"


def render(tokenizer: Any, messages: Sequence[Mapping[str, str]], thinking: str = "", date: str = "") -> str:
    """Writes a conversation by the tokenizer's chat template.

    Args:
      tokenizer: a `transformers` tokenizer.
      messages: the messages, each with "role" and "content". Unless the last one is the assistant's, the marker after
        which the assistant speaks (the generation prompt) follows.
      thinking: "on" or "off" is passed to the template as `enable_thinking` True or False; "" passes nothing.
      date: the day, YYYY-MM-DD, that the template gets as the present one, so that a text can be made again on another
        day; "": today.

    Returns:
      The text, with the special tokens that the template writes.

    Raises:
      UserError: if there is no template, or several with names of which none is "default"; if `thinking` is set but the
        template does not mention `enable_thinking`; or if the template fails, or leaves a system prompt out.
      ValueError: if the template asks for the present date and `date` is neither "" nor a date.
    """
    template = tokenizer.chat_template
    if thinking and "enable_thinking" not in str(template):
        raise UserError(
            f"domains.thinking={thinking!r} does nothing here: the model's chat template does not use "
            "enable_thinking; leave domains.thinking empty"
        )
    if not template:
        raise UserError("the model has no chat template, by which messages become text; give it one, or the bare text")
    if isinstance(template, Mapping) and "default" not in template:
        raise UserError(
            f"the model's chat templates are named {', '.join(template)}, and none is named 'default', the one that is "
            "used; rename one of them"
        )
    speaks = messages[-1]["role"] != "assistant"
    switched: dict[str, Any] = {"enable_thinking": thinking == "on"} if thinking else {}
    if date and writes_date(tokenizer):
        switched["chat_template"] = _dated(template["default"] if isinstance(template, Mapping) else template, date)

    def written(turns: Sequence[Mapping[str, str]]) -> str:
        return tokenizer.apply_chat_template(
            [dict(m) for m in turns], tokenize=False, add_generation_prompt=speaks, **switched
        )

    try:
        text = written(messages)
    except Exception as e:  # a template may do what any program does
        raise UserError(f"the model's chat template fails: {type(e).__name__}: {e}") from e
    if any(m["role"] == "system" and m["content"].strip() not in text for m in messages):
        try:  # a template may also edit the system prompt, or take a switch from it
            without = written([m for m in messages if m["role"] != "system"])
        except Exception:  # it cannot do without one, so it does not leave it out
            return text
        if without == text:
            raise UserError("the model's chat template leaves the system prompt out; put its text into the prompt")
    return text


def chat_ids(tokenizer: Any, prompt: str, system: str = "", thinking: str = "", date: str = "") -> list[int]:
    """Tokenizes `chat_text`. A chat template writes special tokens itself; for the plain text the tokenizer adds them.

    Args:
      tokenizer: a `transformers` tokenizer.
      prompt: the user's message.
      system: as in `chat_text`.
      thinking: as in `chat_text`.
      date: as in `render`.

    Returns:
      Token ids of the prompt, up to where the reply begins.

    Raises:
      UserError, ValueError: as in `chat_text`.
    """
    text = chat_text(tokenizer, prompt, system, thinking, date=date)
    return tokenizer(text, add_special_tokens=not tokenizer.chat_template).input_ids
