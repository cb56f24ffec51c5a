"""The benchmark `bench train`: tokens a second of the gradient of log-probs, beside torch.

The loss is the mean of −log π of the completions at temperature 1. Rows have the lengths of `Work`, and all tokens are
real; a row counts with its prompt and its completion.
"""

import dataclasses
import importlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mdrl_jax.bench.measure import Task, compiled
from mdrl_jax.bench.peers import installed
from mdrl_jax.bench.speed import Entry
from mdrl_jax.bench.work import Work, loaded, torch_model
from mdrl_jax.model.transformer import Decoder
from mdrl_jax.rl.logprobs import token_log_probs

NAMES = {"none": "gradient", "dots": "gradient, remat dots"}
LEAST = 1.2  # aim, in multiples of torch's tokens a second, at 64 rows of 80 tokens


def ours(work: Work) -> tuple[dict[str, Task], list[Entry]]:
    """The gradient with all activations kept, and with those of matrix products alone.

    Args:
      work: the batch.

    Returns:
      the tasks by name, and their lines.
    """
    model, params = loaded(work.model)
    ids_BT = work.ids(work.rows, work.prompt + work.length, model.config.vocab_size)
    valid_BT = np.ones_like(ids_BT, bool)

    def task(remat: str) -> Task:
        decoder: Decoder = dataclasses.replace(model, remat=remat)

        def loss(params: Any, ids_BT: jax.Array, valid_BT: jax.Array) -> jax.Array:
            return -jnp.mean(token_log_probs(decoder, params, ids_BT, valid_BT, start=work.prompt))

        return compiled("bench train", jax.value_and_grad(loss), params, ids_BT, valid_BT)[0]

    tasks = {name: task(remat) for remat, name in NAMES.items()}
    return tasks, [Entry(name, ids_BT.size, "tokens") for name in tasks]


def torch(work: Work) -> tuple[dict[str, Task], list[Entry]]:
    """The same gradient by torch, of the transformers model, eagerly on the CPU.

    Args:
      work: the batch.

    Returns:
      the task by name, and its lines. If torch is not installed: no task, and a line that says so.
    """
    if not installed("torch"):
        return {}, [Entry("torch", reason="torch is not installed")]
    th = importlib.import_module("torch")
    model = torch_model(work.model)
    ids_BT = work.ids(work.rows, work.prompt + work.length, model.config.vocab_size)
    ids = th.from_numpy(ids_BT.astype(np.int64))
    targets = ids[:, work.prompt :].reshape(-1)

    def call() -> None:
        model.zero_grad()
        z = model(input_ids=ids, use_cache=False, logits_to_keep=work.length + 1).logits[:, :-1]
        th.nn.functional.cross_entropy(z.reshape(-1, z.shape[-1]), targets).backward()

    entry = Entry("torch", ids_BT.size, "tokens", faster=NAMES["dots"], least=LEAST, packages=("transformers", "torch"))
    return {"torch": Task(call)}, [entry]
