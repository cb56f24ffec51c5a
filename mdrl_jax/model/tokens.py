"""Loads the tokenizer, finds the tokens that end a completion, and pads rows of tokens to a few fixed lengths."""

import json
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mdrl_jax.errors import UserError
from mdrl_jax.records import regular

FILES = ("*.json", "*.txt", "*.jinja", "*.model", "*.tiktoken", "*chat_templates/*")  # what a tokenizer may consist of
# The files of a tokenizer among those of a model folder; the first group is enough to make one.
MAKERS = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "*.tiktoken", "spiece.model", "*.bpe.model")
OWN = (
    *MAKERS,
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "merges.txt",
    "chat_template.*",
)
# Where torch is installed, transformers imports it for its models, which takes two seconds or more. If this is True,
# it does not; afterwards torch can be imported as usual, but transformers has no torch models in this process. Only the
# commands' own processes set it.
leave_torch_out = False


def copy(source: Path, folder: Path) -> None:
    """Copies the files of a tokenizer, its chat templates included, from one model folder to another.

    Raises:
      UserError: if one of them is no regular file.
      OSError: if a file cannot be read or written.
    """
    for pattern in (*OWN, "*chat_templates/*"):
        for file in source.glob(pattern):
            target = folder / file.relative_to(source)
            target.parent.mkdir(exist_ok=True)
            shutil.copyfile(regular(file), target)


def has_tokenizer(folder: str | Path) -> bool:
    """Whether a model folder has the files of a tokenizer."""
    return any(file for pattern in MAKERS for file in Path(folder).glob(pattern))


def load_tokenizer(folder: str | Path) -> Any:
    """The `transformers` tokenizer of a Hugging Face folder. Code in the folder never runs.

    The folder has to exist: `transformers` takes any other text of the form NAME or OWNER/NAME as a model on Hugging
    Face and may download its tokenizer.

    Raises:
      UserError: if the folder has no tokenizer, its tokenizer cannot be read or needs the folder's own code, or a file
        of the tokenizer is no regular file.
    """
    for pattern in FILES:
        for file in Path(folder).glob(pattern):
            regular(file)
    if not has_tokenizer(folder):
        raise UserError(f"{folder} has no tokenizer, which text needs; copy tokenizer.json and its other files into it")
    loader = _auto_tokenizer()
    try:
        return loader.from_pretrained(str(folder), trust_remote_code=False)
    except Exception as e:  # a file of the wrong structure can fail in any way; `tokenizers` raises plain Exception
        if "trust_remote_code" in str(e):
            raise UserError(
                f"the tokenizer in {folder} needs the folder's own Python code, which is never run; give a folder with "
                "a tokenizer that transformers itself has"
            ) from e
        reason = (str(e).strip().splitlines() or [type(e).__name__])[0]
        raise UserError(f"{folder} has no tokenizer that can be read: {reason}") from e


def _auto_tokenizer() -> Any:
    """`transformers.AutoTokenizer`, imported when it is first needed because the import is slow."""
    hidden = leave_torch_out and "torch" not in sys.modules
    if hidden:
        sys.modules["torch"] = None  # type: ignore  (an import of it then fails, as if it were not installed)
    try:
        from transformers import AutoTokenizer
    finally:
        if hidden:
            del sys.modules["torch"]
    return AutoTokenizer


def eos_ids(tokenizer: Any, folder: str | Path | None = None, vocab_size: int | None = None) -> tuple[int, ...]:
    """The ids of the tokens that end a completion.

    Args:
      tokenizer: the model's tokenizer; None if it has none.
      folder: the model's folder, whose `config.json` and `generation_config.json` may name end tokens, too; None: no
        folder.
      vocab_size: rows of the embedding; None: not known.

    Returns:
      the id of `eos_token`, then the ids of `eos_token_id` in the two files, each once. If the tokenizer has a chat
      template, the last id is the one that ends a turn: the token that the template puts directly after a reply, if it
      is an added token. If it is not, or if the template fails or does not print the reply as it is, the first id ends
      a turn, and comes again as the last one.

    Raises:
      UserError: if there are none, one of them is no row of the embedding, so that it could never be drawn, or one of
        the two files is no JSON object or has an `eos_token_id` that is neither an id nor a list of ids.
    """
    found: list[tuple[int, str]] = []
    if tokenizer is not None and tokenizer.eos_token_id is not None:
        found.append((int(tokenizer.eos_token_id), f"eos_token {tokenizer.eos_token!r} of the tokenizer"))
    for name in ("config.json", "generation_config.json"):
        file = Path(folder or ".") / name
        if folder is not None and file.exists():
            found += [(i, f"eos_token_id of {file}") for i in _named_ends(file)]
    turn = [] if tokenizer is None else [(i, "the end of a turn in the chat template") for i in _end_of_turn(tokenizer)]
    turn = turn or (found[:1] if tokenizer is not None and tokenizer.chat_template else [])
    found += turn
    if not found:
        raise UserError(
            f"{folder or 'the model'} names no end token: neither eos_token of its tokenizer nor eos_token_id of "
            "config.json or generation_config.json; completions could never end"
        )
    for i, where in found:
        if vocab_size is not None and not 0 <= i < vocab_size:
            raise UserError(f"{where} is id {i}, which can never be drawn: the embedding has {vocab_size} rows")
    ids = list(dict.fromkeys(i for i, _ in found))
    return (*ids, turn[0][0]) if turn and ids[-1] != turn[0][0] else tuple(ids)


def _named_ends(file: Path) -> list[int]:
    try:
        value = json.loads(regular(file).read_text(encoding="utf-8")).get("eos_token_id")
    except (ValueError, RecursionError, AttributeError) as e:
        raise UserError(f"{file} is no JSON object ({e})") from e
    ids = value if isinstance(value, list) else [] if value is None else [value]
    if not all(isinstance(i, int) and not isinstance(i, bool) for i in ids):
        raise UserError(f"{file}: eos_token_id={value!r} is not valid; it must be a token id or a list of them")
    return ids


def _end_of_turn(tokenizer: Any) -> list[int]:
    """The token that follows a reply in a chat, as a list of one; empty if there is none.

    There is none if the chat template does not print the reply as it is, or if the token is not an added token. Only
    an added token can end a completion safely: ordinary text never contains it.
    """
    if not tokenizer.chat_template:
        return []
    mark = "REPLY"
    messages = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": mark}]
    try:
        text = tokenizer.apply_chat_template(messages, tokenize=False)
    except Exception:  # not reported here: `domains/chat.py` reports it if a domain uses the template
        return []
    _, found, after = text.rpartition(mark)
    if not found:
        return []
    first = tokenizer(after, add_special_tokens=False).input_ids[:1]
    return [i for i in first if i in tokenizer.added_tokens_decoder]


def pad_id(tokenizer: Any, eos_ids: Sequence[int], vocab_size: int) -> int:
    """The id of the padding token.

    Attention never reads padding, but an id without a row of the embedding would give NaN.

    Args:
      tokenizer: the model's tokenizer; None if it has none.
      eos_ids: ids of the tokens that end a completion.
      vocab_size: rows of the embedding.

    Returns:
      the tokenizer's own padding token; the first of `eos_ids` if there is none, or if it is no row of the embedding.

    Raises:
      IndexError: if `eos_ids` is needed and empty.
    """
    pad = None if tokenizer is None else tokenizer.pad_token_id
    return int(eos_ids[0] if pad is None or pad >= vocab_size else pad)


def bucket(length: int, buckets: Sequence[int], what: str) -> int:
    """The smallest bucket that holds `length` tokens.

    Lengths are rounded up to buckets because every new length compiles the program anew.

    Args:
      length: number of tokens.
      buckets: the allowed lengths, in growing order; at least one.
      what: the thing that has this length, for the error message, e.g. "a prompt".

    Returns:
      the bucket's length in tokens; a bucket holds its own length, so it may equal `length`.

    Raises:
      UserError: if `length` is above the largest bucket.
      IndexError: if there are no buckets.
    """
    for size in buckets:
        if length <= size:
            return size
    raise UserError(f"{what} has {length} tokens; the limit is {buckets[-1]}")


def left_pad(rows: Sequence[Sequence[int]], length: int, pad: int) -> tuple[np.ndarray, np.ndarray]:
    """Pads rows of tokens on the left to one length.

    Args:
      rows: the B rows: token ids of each row, at most `length` of them, as a list or tuple; a row may be empty.
      length: tokens of a padded row, 1 or more.
      pad: id of the padding token.

    Returns:
      tokens [B, length], int32, and valid [B, length], bool: True at tokens of the row, False at padding.

    Raises:
      ValueError: if a row has more than `length` tokens, or is an array of no or of several ids.
      OverflowError: if an id, or `pad`, does not fit into int32.
    """
    tokens_BT = np.full((len(rows), length), pad, np.int32)
    valid_BT = np.zeros((len(rows), length), bool)
    for i, row in enumerate(rows):
        if row:
            tokens_BT[i, -len(row) :] = row
            valid_BT[i, -len(row) :] = True
    return tokens_BT, valid_BT
