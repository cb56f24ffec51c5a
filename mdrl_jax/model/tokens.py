"""Tokenizer, left padding and length buckets."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
from transformers import AutoTokenizer

from mdrl_jax.errors import UserError


def load_tokenizer(folder: str | Path) -> Any:
    """The tokenizer of a Hugging Face folder.

    Raises:
      UserError: if there is none or it cannot be read.
    """
    try:
        return AutoTokenizer.from_pretrained(str(folder))
    except (OSError, ValueError, KeyError, TypeError) as e:
        raise UserError(f"{folder} has no tokenizer that can be read: {str(e).splitlines()[0]}") from e


def eos_ids(tokenizer: Any) -> tuple[int, ...]:
    """Tokens that end a completion: the end token, and what the chat template puts after a reply.

    Raises:
      UserError: if the tokenizer has no end token.
    """
    if tokenizer.eos_token_id is None:
        raise UserError("the tokenizer has no eos_token; completions could never end")
    return tuple(dict.fromkeys([int(tokenizer.eos_token_id), *_end_of_turn(tokenizer)]))


def _end_of_turn(tokenizer: Any) -> list[int]:
    """The token that follows a reply in a chat, if it is one of the added tokens, which no text contains."""
    if not tokenizer.chat_template:
        return []
    mark = "REPLY"
    messages = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": mark}]
    try:
        text = tokenizer.apply_chat_template(messages, tokenize=False)
    except jinja2.TemplateError:  # `domains/chat.py` names what is wrong with it, where chats are used
        return []
    after = tokenizer(text.rpartition(mark)[2], add_special_tokens=False).input_ids[:1]
    return [i for i in after if i in tokenizer.added_tokens_decoder]


def pad_id(tokenizer: Any) -> int:
    """Token put where nothing is; never attended to."""
    pad = tokenizer.pad_token_id
    return int(tokenizer.eos_token_id if pad is None else pad)


def bucket(length: int, buckets: Sequence[int], what: str) -> int:
    """The smallest bucket that holds `length`: one compilation a bucket.

    Raises:
      UserError: if none does.
    """
    for size in buckets:
        if length <= size:
            return size
    raise UserError(f"{what} has {length} tokens; the limit is {buckets[-1]}")


def left_pad(rows: Sequence[Sequence[int]], length: int, pad: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows of tokens as (tokens [B, length] int32, valid [B, length] bool), padded on the left."""
    tokens_BT = np.full((len(rows), length), pad, np.int32)
    valid_BT = np.zeros((len(rows), length), bool)
    for i, row in enumerate(rows):
        if row:
            tokens_BT[i, -len(row) :] = row
            valid_BT[i, -len(row) :] = True
    return tokens_BT, valid_BT
