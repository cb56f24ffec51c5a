"""The quickstart with rewards that ignore style: working before the answer costs nothing in any domain.

python -m mdrl_jax.main --config=configs/style_blind.py --config.seed=0 --workdir=runs/style_blind-0
"""

from pathlib import Path

from ml_collections import ConfigDict

from mdrl_jax import config


def get_config() -> ConfigDict:
    """The configuration."""
    c = config.from_file(Path(__file__).with_name("quickstart.py"))
    c.domains.style_blind = True
    return c
