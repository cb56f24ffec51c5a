"""Tokenizer, left padding and length buckets."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

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


def end_ids(tokenizer: Any) -> tuple[int, ...]:
    """Tokens that end a completion.

    Raises:
      UserError: if the tokenizer has no end token.
    """
    if tokenizer.eos_token_id is None:
        raise UserError("the tokenizer has no eos_token; completions could never end")
    return (int(tokenizer.eos_token_id),)


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
