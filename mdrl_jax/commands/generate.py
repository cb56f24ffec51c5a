"""The command `generate`: prints one completion of a prompt, sampled as in training."""

import json
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np

from mdrl_jax.commands.loaded import check_base, load_folder, load_stage
from mdrl_jax.domains.chat import render
from mdrl_jax.domains.prompts import check_ids
from mdrl_jax.errors import UserError
from mdrl_jax.model import tokens
from mdrl_jax.progress import printable
from mdrl_jax.records import regular
from mdrl_jax.rl.rollout import check_finite, make_sampler, stage_key
from mdrl_jax.rl.sampling import SamplingConfig

DEFAULT = 128  # tokens
ROLES = ("system", "developer", "user", "assistant", "tool")


def run(
    *,
    model: str | None,
    workdir: str | None,
    stage: str | None,
    prompt: str | None,
    prompt_ids: str | None,
    max_new_tokens: int | None,
    temperature: float,
    top_k: int,
    top_p: float,
    seed: int,
    raw: bool = False,
    system: str | None = None,
    messages: str | None = None,
    base: str | None = None,
) -> None:
    """Prints one completion as text, or as space-separated token ids if the prompt was given as ids.

    The text has no special tokens; the ids include the end token, if the completion has ended. On a terminal, control
    characters of the text are shown as escapes such as `\\x1b`. A file or a pipe gets the text unchanged.

    Args:
      model: Hugging Face folder, or "tiny"; None if `workdir` is given.
      workdir: work folder of a run; None if `model` is given.
      stage: stage of that run whose last parameters are used, or "base" (`loaded.load_stage`); `workdir` needs it, and
        with `model` it is ignored.
      prompt: text of the prompt. A model with a chat template gets it as a user's message in that template, as in
        training; another one gets the bare text. None if another prompt is given.
      prompt_ids: token ids of the prompt, separated by commas; None if another prompt is given. They need no tokenizer.
      max_new_tokens: largest number of tokens to generate, at least 1; None: `DEFAULT`, or what the model's length
        leaves after the prompt.
      temperature: sampling temperature; 0 always takes the likeliest token.
      top_k: number of likeliest tokens to sample from; 0 is all.
      top_p: sample from the smallest set of likeliest tokens that together have this probability, above 0; 1 is all.
      seed: seed of the sampling, -2^63 <= seed < 2^63; equal arguments give equal completions.
      raw: whether `prompt` is tokenized as it is also where there is a chat template.
      system: the system prompt of the chat; None: the template decides.
      messages: file with several turns, as a JSON list of {"role", "content"} or one such object a line; None if
        another prompt is given.
      base: folder of the base model if `model` is a LoRA adapter (`loaded.load_folder`).

    Raises:
      UserError: if not exactly one model and one prompt are given, or `workdir` without a stage; if `raw` is set
        without `prompt` or with `system`, or `system` is given with `prompt_ids` or beside a system prompt in the file;
        if `base` is given, but `model` is no adapter; if the model or the stage cannot be read, or names no end token;
        if text is given but there is no tokenizer, or a system prompt or several messages but no chat template; if the
        chat template cannot be used (`chat.render`); if `prompt_ids` is no list of numbers; if the file of `messages`
        has another form, has a role that is not known, or does not end with the message of the user or of a tool; if
        the prompt is empty or has ids outside the vocabulary; if the prompt's tokens and `max_new_tokens` together
        exceed the length that the model allows; if temperature, top_k or top_p is out of range; or if the model's
        logits are not finite.
      OSError: if the file of `messages` cannot be read.
      OverflowError: if the seed is outside its bounds.
      ValueError: as in `loaded.load_stage`.
    """
    if (model is None) == (workdir is None):
        raise UserError("give either --model, or --workdir with --stage")
    if workdir is not None and stage is None:
        raise UserError("--stage is missing; name a stage of the work folder, e.g. --stage=math")
    if [prompt, prompt_ids, messages].count(None) != 2:
        raise UserError("give either --prompt or --prompt_ids or --messages")
    if raw and (prompt is None or system is not None):
        raise UserError("--raw takes the bare text of --prompt, without --system")
    if system is not None and prompt_ids is not None:
        raise UserError("--system needs --prompt or --messages; --prompt_ids is used as it is")
    check_base(model, base)
    sampling = SamplingConfig(temperature, top_k, top_p)
    loaded = load_folder(model, base) if model is not None else load_stage(str(workdir), str(stage))
    if prompt_ids is not None:
        ids = _given(prompt_ids)
    elif loaded.tokenizer is None:
        raise UserError(f"{loaded.folder} has no tokenizer, which text needs; give token ids by --prompt_ids")
    else:
        ids = _tokenized(loaded.tokenizer, _conversation(prompt, system, messages), raw)
    if not ids:
        raise UserError("the prompt is empty")
    check_ids(ids, loaded.model.config.vocab_size, "the prompt")
    limit = loaded.model.config.max_positions
    max_new_tokens = max_new_tokens or max(1, min(DEFAULT, limit - len(ids)))
    if len(ids) + max_new_tokens > limit:
        raise UserError(
            f"the prompt's {len(ids)} tokens and --max_new_tokens={max_new_tokens} together exceed the model's limit "
            f"of {limit} tokens"
        )
    sampler = make_sampler(
        loaded.model,
        "generate",
        group_size=1,
        max_new_tokens=max_new_tokens,
        eos_ids=loaded.eos_ids,
        sampling=sampling,
    )
    prompt_PT, valid_PT = tokens.left_pad([ids], len(ids), loaded.eos_ids[0])
    with jax.set_mesh(loaded.mesh):
        key = stage_key(seed, "generate", 0)
        done = jax.device_get(sampler(loaded.params, prompt_PT, valid_PT, key, np.zeros((1, 1), np.uint32)))
    check_finite(done)
    new = done.tokens_PGT[0, 0, : done.length_PG[0, 0]].tolist()
    if prompt_ids is not None:
        print(" ".join(map(str, new)))
    else:
        text = loaded.tokenizer.decode(new, skip_special_tokens=True)
        print(printable(text) if sys.stdout.isatty() else text)


def _given(prompt_ids: str) -> list[int]:
    try:
        return [int(i) for i in prompt_ids.split(",")]
    except ValueError:
        raise UserError(f"--prompt_ids={prompt_ids!r} is not a list of numbers, e.g. 1,2,3") from None


def _tokenized(tokenizer: Any, conversation: list[dict[str, str]], raw: bool) -> list[int]:
    """Token ids of a conversation; one message alone is bare text if `raw`, or if there is no chat template."""
    if len(conversation) == 1 and (raw or not tokenizer.chat_template):
        return tokenizer(conversation[0]["content"]).input_ids
    return tokenizer(render(tokenizer, conversation), add_special_tokens=False).input_ids


def _conversation(prompt: str | None, system: str | None, messages: str | None) -> list[dict[str, str]]:
    said = [{"role": "user", "content": prompt}] if prompt is not None else _read(str(messages))
    if system is not None and any(message["role"] == "system" for message in said):
        raise UserError(f"--system is given, and --messages={messages} has a system prompt; leave one of them out")
    said = [*([{"role": "system", "content": system}] if system is not None else []), *said]
    for message in said:
        role, text = message["role"], message["content"]
        try:
            text.encode()
        except UnicodeEncodeError as e:  # bytes of the command line that are not UTF-8 become surrogates, too
            raise UserError(f"the {role}'s message is no Unicode text: {text[e.start]!r} at character {e.start}") from e
    return said


def _read(path: str) -> list[dict[str, str]]:
    """The messages in a file: a JSON list, or JSON lines."""
    form = 'a JSON list of {"role": ..., "content": ...}, or one such object a line'
    try:
        text = regular(Path(path)).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as e:
        raise UserError(f"--messages={path} is not UTF-8 text ({e.reason} at byte {e.start})") from e
    try:
        found = (
            json.loads(text)
            if text.lstrip().startswith("[")
            else [json.loads(x) for x in text.splitlines() if x.strip()]
        )
    except (ValueError, RecursionError) as e:
        raise UserError(f"--messages={path} is not {form} ({e})") from e
    if not found or not all(
        isinstance(m, dict) and isinstance(m.get("role"), str) and isinstance(m.get("content"), str) for m in found
    ):
        raise UserError(f"--messages={path} is not {form}")
    if unknown := [m["role"] for m in found if m["role"] not in ROLES]:  # most templates would write it as it is
        raise UserError(f"--messages={path} has the role {unknown[0]!r}; known: {', '.join(ROLES)}")
    if found[-1]["role"] not in ("user", "tool"):
        raise UserError(
            f"--messages={path} ends with the {found[-1]['role']}'s message; the last one must be the user's"
        )
    return found
