"""Every way to win a lost domain back, or not to lose it, side by side: the quickstart's sequence with all of them.

  for s in 0 1 2; do
    python -m mdrl_jax.main --config=configs/compare.py --config.seed=$s --workdir=runs/compare-$s
  done
  python -m mdrl_jax.main seeds --workdir=runs/compare-0 --workdir=runs/compare-1 --workdir=runs/compare-2

Same budget, seeds, prompts and scores for all: a prevention trains QA and Creative Writing again from Math's peak, with
the very prompts and keys of the plain stages; a merge has the four solo stages, `joint` as many steps as the whole
sequence. Then the sequence in reversed order, and a placebo (learning rate 0 after Math), which must lose nothing.
`--config=configs/compare.py:style_blind` is the same under rewards that ignore style. A second base model:

  python -m mdrl_jax.main --config=configs/pretrain_tiny.py --config.seed=2 --workdir=runs/base-2
  python -m mdrl_jax.main export --workdir=runs/base-2 --stage=pretrain --out=runs/second-base
  python -m mdrl_jax.main --config=configs/compare.py --config.model.path=runs/second-base --workdir=runs/compare-second
"""

from pathlib import Path

from mdrl_jax import config

PREVENTIONS = ("protect", "ewc", "agem", "pcgrad", "replay", "kl")
SOLOS = ("solo-code", "solo-math", "solo-qa", "solo-cw")


def get_config(variant: str = "paid") -> config.Config:
    """The configuration; `variant` "style_blind" has rewards that ignore style."""
    c = config.from_file(Path(__file__).with_name("quickstart.py"))
    if variant not in ("paid", "style_blind"):
        raise ValueError(f"variant {variant!r} is not known; known: paid, style_blind")
    c.domains.style_blind = variant == "style_blind"
    c.stages = (
        *("code", "math", "qa", "cw"),
        *SOLOS,
        *("analyze", "refresh-math"),
        *(f"{method}-{domain}" for method in PREVENTIONS for domain in ("qa", "cw")),
        "average",
        "arithmetic",
        "ties",
        "joint",
        *(f"reversed-{domain}" for domain in ("cw", "qa", "math", "code")),
        "placebo-qa",
        "placebo-cw",
        "rollback-math-qa",
        "rollback-math-cw",
        *("plan", "recover", "trials", "orders"),
    )
    c.stage_overrides = {
        **c.stage_overrides,
        "joint": {"start": "base", "steps": 4 * c.train.steps},
        "placebo-qa": {"start": "math"},
    }
    return c
