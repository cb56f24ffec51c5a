"""How local is the theory? One second-order expansion at Math's peak, against edits of several sizes that start there.

python -m mdrl_jax.main --config=configs/locality.py --config.seed=0 --workdir=runs/locality-0
"""

from pathlib import Path

from mdrl_jax import config

ADAM = {"qa@low": 1e-4, "qa@lowest": 2.5e-5}
SGD = {"qa@sgd_high": 1.6, "qa@sgd": 0.4, "qa@sgd_low": 0.1}


def get_config() -> config.Config:
    """The configuration."""
    c = config.from_file(Path(__file__).with_name("quickstart.py"))
    c.stages = ("math", "qa", *ADAM, *SGD, "sft-qa", "locality-math")
    to_qa = {"start": "math", "target": "qa"}
    c.stage_overrides = {
        "qa": {"start": "math"},
        "qa@low": to_qa | {"learning_rate": 1e-4, "steps": 200, "target_every": 4},
        "qa@lowest": to_qa | {"learning_rate": 2.5e-5, "steps": 800, "target_every": 10},
        **{
            name: to_qa | {"learning_rate": rate, "steps": 400, "target_every": 4, "optimizer": {"name": "sgd"}}
            for name, rate in SGD.items()
        },
        "sft-qa": to_qa | {"steps": 200, "target_every": 5},
    }
    c.sft.warmup_steps, c.sft.learning_rate, c.sft.length = 0, c.train.learning_rate, 28
    return c
