"""`evaluate`: the score table of any Hugging Face folder on a config's domains."""

import dataclasses
import time

import jax

from mdrl_jax import runtime
from mdrl_jax.config import Config
from mdrl_jax.evaluate import evaluate
from mdrl_jax.report.screen import terminal
from mdrl_jax.report.screen.console import Screen
from mdrl_jax.report.tables import matrix
from mdrl_jax.report.tables.scores import score_rows


def run(model: str, config: Config, output: str = "screen") -> None:
    """Prints scores with standard errors, in points; `output` as in `report/screen/console.py`."""
    started = time.monotonic()
    section = dataclasses.replace(config.model, path=model, weights="load")
    config = dataclasses.replace(config, model=section)
    with runtime.make_pool(config.rewards) as pool, Screen(None, output) as screen:
        built = runtime.build(config, pool)
        for note in built.notes:
            screen.print(note)
        with jax.set_mesh(built.mesh):
            result = evaluate(built, built.base_params(), "scores", screen.steps)
        head = {"stage": model, "index": 0, "seed": config.seed, "k": config.evaluate.samples, "step": 0}
        record = head | result.record()
        screen.print(terminal.score_table(matrix.build([record])), final=True)
        screen.event("scores", rows=score_rows(record))
        screen.event("done", seconds=time.monotonic() - started, model=model)
