"""The quickstart with rewards that ignore style: working before the answer costs nothing in any domain.

python -m mdrl_jax.main --config=configs/style_blind.py --config.seed=0 --workdir=runs/style_blind-0

Without the designed conflict nothing is lost. Over seeds 0, 1 and 2 Math falls by -1.9 [-2.8, -1.0] points, which means
that it rises, and the recovery fraction is undefined because there is no loss. configs/README.md has the score table.
"""

from pathlib import Path

from mdrl_jax import config


def get_config() -> config.Config:
    """The configuration."""
    c = config.from_file(Path(__file__).with_name("quickstart.py"))
    c.domains.style_blind = True
    return c
