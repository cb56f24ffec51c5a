"""The benchmark `bench decode`: tokens a second of the sampler, beside `generate` of transformers (torch).

Every completion has its full length, because no token ends it; beside transformers this is fair. In two more tasks of
ours each 16th token id ends a completion, so lengths vary. Prompts are random ids.
"""

import importlib
from collections.abc import Callable

import jax
import numpy as np

from mdrl_jax.bench.measure import Task
from mdrl_jax.bench.peers import installed
from mdrl_jax.bench.speed import Entry
from mdrl_jax.bench.work import Work, loaded, torch_model
from mdrl_jax.rl.rollout import make_sampler, stage_key
from mdrl_jax.rl.sampling import SamplingConfig

OURS = "sampler"
LEAST = 4.0  # aim: tokens a second in multiples of those of transformers, at 64 rows of 64 tokens
MOST = 1.15  # aim: tokens a second without top-k and top-p, in multiples of those with one of them


def ours(work: Work) -> tuple[dict[str, Task], list[Entry]]:
    """The sampler without top-k and top-p, with top-k of 50, and with top-p of 0.95; at temperature 1.

    Also the sampler with completions of many lengths: as it is, and with rows that are computed until all have ended.
    Their tokens are those drawn up to the end of each completion.

    Args:
      work: what is decoded.

    Returns:
      the tasks by name, and their lines.
    """
    model, params = loaded(work.model)
    ids_PT = work.ids(work.prompts, work.prompt, model.config.vocab_size)
    given = jax.device_put((ids_PT, np.ones_like(ids_PT, bool)))
    told_apart = np.arange(work.prompts, dtype=np.uint32)[:, None]

    def task(sampling: SamplingConfig, eos_ids: tuple[int, ...] = (), compact: bool = True) -> Task:
        sampler = make_sampler(
            model,
            "bench decode",
            group_size=work.group,
            max_new_tokens=work.length,
            eos_ids=eos_ids,
            sampling=sampling,
            compact=compact,
        )
        return Task(lambda: jax.block_until_ready(sampler(params, *given, stage_key(0, "bench", 0), told_apart)))

    tokens = {"amount": work.rows * work.length, "unit": "tokens"}
    with_top_k, with_top_p = f"{OURS}, top_k 50", f"{OURS}, top_p 0.95"
    tasks = {
        OURS: task(SamplingConfig()),
        with_top_k: task(SamplingConfig(top_k=50)),
        with_top_p: task(SamplingConfig(top_p=0.95)),
    }
    lines = [Entry(OURS, **tokens)] + [Entry(n, **tokens, faster=OURS, most=MOST) for n in (with_top_k, with_top_p)]
    varied, whole = f"{OURS}, varied lengths", f"{OURS}, varied lengths, ended rows computed"
    ends = tuple(range(0, model.config.vocab_size, 16))
    tasks |= {varied: task(SamplingConfig(), ends), whole: task(SamplingConfig(), ends, compact=False)}
    tokens["amount"] = int(np.sum(tasks[varied].call().length_PG))
    return tasks, [*lines, Entry(varied, **tokens), Entry(whole, **tokens, faster=varied)]


def transformers(work: Work) -> tuple[dict[str, Task], list[Entry]]:
    """`generate` of transformers on the CPU, with its default cache and with a static one.

    Args:
      work: what is decoded.

    Returns:
      the tasks by name, and their lines. If torch is not installed: no tasks, and a line that says so.
    """
    if not installed("torch"):
        return {}, [Entry("transformers", reason="torch is not installed")]
    torch = importlib.import_module("torch")
    model = torch_model(work.model)
    ids_PT = work.ids(work.prompts, work.prompt, model.config.vocab_size)
    ids = torch.from_numpy(np.repeat(ids_PT, work.group, axis=0).astype(np.int64))
    model.generation_config.eos_token_id = None
    options = {"do_sample": True, "top_k": 0, "top_p": 1.0, "max_new_tokens": work.length, "pad_token_id": 0}

    def task(**cache: str) -> Callable[[], None]:
        def call() -> None:
            with torch.no_grad():
                out = model.generate(ids, attention_mask=torch.ones_like(ids), **options, **cache)
            assert out.shape[1] == work.prompt + work.length, "generate stopped early"

        return call

    names = {"transformers, dynamic cache": {}, "transformers, static cache": {"cache_implementation": "static"}}
    entries = [
        Entry(name, work.rows * work.length, "tokens", faster=OURS, least=LEAST, packages=("transformers", "torch"))
        for name in names
    ]
    return {name: Task(task(**cache)) for name, cache in names.items()}, entries
