"""The command `generate`: prints one completion of a prompt, sampled as in training."""

import sys

import jax
import numpy as np

from mdrl_jax.commands.loaded import Loaded, load_folder, load_stage
from mdrl_jax.errors import UserError
from mdrl_jax.model import tokens
from mdrl_jax.progress import printable
from mdrl_jax.rl.rollout import make_sampler, stage_key
from mdrl_jax.rl.sampling import SamplingConfig


def run(
    *,
    model: str | None,
    workdir: str | None,
    stage: str | None,
    prompt: str | None,
    prompt_ids: str | None,
    max_new_tokens: int,
    temperature: float,
    top_k: int,
    top_p: float,
    seed: int,
) -> None:
    """Prints one completion as text, or as space-separated token ids if the prompt was given as ids.

    The text has no special tokens; the ids include the end token, if the completion has ended. On a terminal, control
    characters of the text are shown as escapes such as `\\x1b`. A file or a pipe gets the text unchanged.

    Args:
      model: Hugging Face folder, or "tiny"; None if `workdir` is given.
      workdir: work folder of a run; None if `model` is given.
      stage: stage of that run whose last parameters are used, or "base" (`loaded.load_stage`); `workdir` needs it, and
        with `model` it is ignored.
      prompt: text of the prompt, which is tokenized as it is, without a chat template; None if `prompt_ids` is given.
      prompt_ids: token ids of the prompt, separated by commas; None if `prompt` is given.
      max_new_tokens: largest number of tokens to generate, at least 1.
      temperature: sampling temperature; 0 always takes the likeliest token.
      top_k: number of likeliest tokens to sample from; 0 is all.
      top_p: sample from the smallest set of likeliest tokens that together have this probability, above 0; 1 is all.
      seed: seed of the sampling, -2^63 <= seed < 2^63; equal arguments give equal completions.

    Raises:
      UserError: if not exactly one model and one prompt are given, or `workdir` without a stage; if the model or the
        stage cannot be read, or the tokenizer has no end token; if `prompt_ids` is no list of numbers; if the prompt is
        empty or has ids outside the vocabulary; if the prompt's tokens and `max_new_tokens` together exceed the length
        that the model allows; or if temperature, top_k or top_p is out of range.
      OverflowError: if the seed is outside its bounds.
      ValueError: as in `loaded.load_stage`.
    """
    if (model is None) == (workdir is None):
        raise UserError("give either --model, or --workdir with --stage")
    if workdir is not None and stage is None:
        raise UserError("--stage is missing; name a stage of the work folder, e.g. --stage=math")
    if (prompt is None) == (prompt_ids is None):
        raise UserError("give either --prompt or --prompt_ids")
    sampling = SamplingConfig(temperature, top_k, top_p)
    loaded = load_folder(model) if model is not None else load_stage(str(workdir), str(stage))
    ids = _ids(loaded, prompt, prompt_ids)
    limit = loaded.model.config.max_positions
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
        eos_ids=tokens.eos_ids(loaded.tokenizer),
        sampling=sampling,
    )
    prompt_PT, valid_PT = tokens.left_pad([ids], len(ids), tokens.pad_id(loaded.tokenizer))
    with jax.set_mesh(loaded.mesh):
        key = stage_key(seed, "generate", 0)
        done = jax.device_get(sampler(loaded.params, prompt_PT, valid_PT, key, np.zeros((1, 1), np.uint32)))
    new = done.tokens_PGT[0, 0, : done.length_PG[0, 0]].tolist()
    if prompt_ids is not None:
        print(" ".join(map(str, new)))
    else:
        text = loaded.tokenizer.decode(new, skip_special_tokens=True)
        print(printable(text) if sys.stdout.isatty() else text)


def _ids(loaded: Loaded, prompt: str | None, prompt_ids: str | None) -> list[int]:
    if prompt is not None:
        ids = loaded.tokenizer(prompt).input_ids
    else:
        try:
            ids = [int(i) for i in str(prompt_ids).split(",")]
        except ValueError:
            raise UserError(f"--prompt_ids={prompt_ids!r} is not a list of numbers, e.g. 1,2,3") from None
    vocabulary = loaded.model.config.vocab_size
    if not ids or not all(0 <= i < vocabulary for i in ids):
        raise UserError(f"the prompt is empty or has token ids outside 0 to {vocabulary - 1}")
    return ids
