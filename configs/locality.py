"""How local is the theory? One second-order expansion at Math's peak, against edits of several sizes that start there.

  python -m mdrl_jax.main --config=configs/locality.py --config.seed=0 --workdir=runs/locality-0

From Math's peak, QA is trained to the validation reward of the quickstart's stage `qa` in several ways: by Adam at its
learning rate and at a fourth and a sixteenth of it, and by clipped gradient descent at three rates of its own. SFT on
QA starts there too, but its demonstrations are half worked, which QA does not pay for, so it stops after 100 steps at
whatever it scores. The stage `locality-math` then compares Math's damage by each edit with what one expansion at the
peak predicts, and removes each edit's part in the conflict subspace. configs/README.md has the figures.
"""

from pathlib import Path

from mdrl_jax import config

ADAM = {"qa@low": (1e-4, 200, 4), "qa@lowest": (2.5e-5, 800, 10)}  # label -> learning rate, most steps, steps to a look
SGD = {"qa@sgd": (0.4, 100, 1), "qa@sgd_low": (0.1, 100, 2), "qa@sgd_lowest": (0.025, 400, 4)}


def get_config() -> config.Config:
    """The configuration."""
    c = config.from_file(Path(__file__).with_name("quickstart.py"))
    c.stages = ("math", "qa", *ADAM, *SGD, "sft-qa", "locality-math")
    c.stage_overrides = {"qa": {"start": "math"}, "sft-qa": {"start": "math", "steps": 100}}
    for name, (rate, steps, every) in (ADAM | SGD).items():
        optimizer = {"name": "sgd"} if name in SGD else {}
        own = {"learning_rate": rate, "steps": steps, "target_every": every, "optimizer": optimizer}
        c.stage_overrides[name] = {"start": "math", "target": "qa", **own}
    c.sft.warmup_steps, c.sft.learning_rate, c.sft.length = 0, c.train.learning_rate, 28
    return c
