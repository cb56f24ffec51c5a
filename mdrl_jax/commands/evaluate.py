"""`evaluate`: the score table of any Hugging Face folder on a config's domains."""

import dataclasses

import jax

from mdrl_jax import runtime
from mdrl_jax.config import Config
from mdrl_jax.evaluate import evaluate
from mdrl_jax.report import matrix, terminal
from mdrl_jax.report.console import print_plain


def run(model: str, config: Config) -> None:
    """Prints scores with standard errors, in points."""
    section = dataclasses.replace(config.model, path=model, weights="load")
    config = dataclasses.replace(config, model=section)
    with runtime.make_pool(config.rewards) as pool:
        built = runtime.build(config, pool)
        with jax.set_mesh(built.mesh):
            result = evaluate(built, built.base_params())
    record = {"stage": model, "index": 0, "seed": config.seed} | result.record()
    print_plain(terminal.score_table(matrix.build([record])))
