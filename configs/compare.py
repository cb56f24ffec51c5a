"""Every way to win a lost domain back, or not to lose it, side by side on the quickstart's sequence.

  for s in 0 1 2; do
    python -m mdrl_jax.main --config=configs/compare.py --config.seed=$s --workdir=runs/compare-$s
  done
  python -m mdrl_jax.main seeds --workdir=runs/compare-0 --workdir=runs/compare-1 --workdir=runs/compare-2

Code, Math and Creative Writing have 1,000 test prompts each. QA has 300: its embedded base model knows 730 facts in
all. All methods have the same training prompts to draw from, and are scored on the same test prompts. `refresh-math`
is the quickstart's, which was tuned: another learning rate, and half of its prompts are QA's. `refresh-math@plain`
has the settings of Math's own stage, as the distillations have. All of them may take 4 steps of 256 completions; the
alternating refresh may take 4 of each domain. A prevention trains QA and Creative Writing again from Math's peak,
with the very prompts and keys of the plain stages; a merge has the four solo stages; `joint` takes as many steps as
the whole sequence. The sequence also runs in reversed order, and with a placebo (learning rate 0 after Math) that
must lose nothing. `--config=configs/compare.py:style_blind` is the same under rewards that ignore style.

A seed takes 26 minutes on two idle cores. Over seeds 0, 1 and 2 the average score rises from 76.7 ± 6.1 (plain
sequence) to 87.6 ± 1.5 by the plain refresh of Math, 89.3 ± 1.4 by the tuned one, 91.1 ± 1.1 by PCGrad and 93.6 ± 1.2
by joint training. mdrl_jax/recovery/README.md has all methods' figures, and configs/README.md the commands that run
it on a second base model.
"""

from pathlib import Path

from mdrl_jax import config

PREVENTIONS = ("protect", "ewc", "agem", "pcgrad", "mgs", "replay", "kl")
# Forms and controls of the distillation of Math (mdrl_jax/recovery/README.md).
DISTILLATIONS = {
    "distill-math": {},
    "distill-math@full": {"distill": {"form": "full"}},
    "distill-math@top_k": {"distill": {"form": "top_k", "top_k": 8}},
    "distill-math@wrong": {"distill": {"teacher": "qa"}},
    "distill-math@base": {"distill": {"teacher": "base"}},
    "distill-math@solo": {"distill": {"teacher": "solo-qa"}},
    "distill-math@lowest": {"distill": {"form": "fixed"}},
    "distill-math@few": {"n_prompts": 16},
    "distill-all": {},
}
SOLOS = ("solo-code", "solo-math", "solo-qa", "solo-cw")


def get_config(variant: str = "paid") -> config.Config:
    """The configuration; `variant` "style_blind" has rewards that ignore style."""
    c = config.from_file(Path(__file__).with_name("quickstart.py"))
    if variant not in ("paid", "style_blind"):
        raise ValueError(f"variant {variant!r} is not known; known: paid, style_blind")
    c.domains.style_blind = variant == "style_blind"
    for domain in ("code", "math", "cw"):
        getattr(c.domains, domain).n_test = 1000
    c.stages = (
        *("code", "math", "qa", "cw"),
        *SOLOS,
        *("analyze", "refresh-math", "refresh-math@plain", "alternate-math-qa"),
        *DISTILLATIONS,
        *(f"{method}-{domain}" for method in PREVENTIONS for domain in ("qa", "cw")),
        "average",
        "arithmetic",
        "ties",
        "ram",
        "dare",
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
        "refresh-math@plain": {"steps": 4, "start": "cw"},
        "alternate-math-qa": {"steps": 8},
        "joint": {"start": "base", "steps": 4 * c.train.steps},
        "placebo-qa": {"start": "math"},
        **{name: {"steps": 4} | changes for name, changes in DISTILLATIONS.items()},
    }
    return c
