"""The quickstart with rewards that ignore style: working before the answer costs nothing in any domain.

python -m mdrl_jax.main --config=configs/style_blind.py --config.seed=0 --workdir=runs/style_blind-0

Means over seeds 0, 1, 2 ± the half-width of the 95 % interval (Student's t over seeds), in points:

  after stage           code          math            qa            cw
  base            64.2 ± 4.0    44.5 ± 3.0    74.6 ± 0.1    78.9 ± 0.4
  code            96.1 ± 1.1    47.2 ± 0.7    76.1 ± 1.0    81.6 ± 1.3
  math            96.3 ± 1.1    94.0 ± 0.2    78.7 ± 1.5    81.6 ± 2.2
  qa              96.2 ± 0.5    95.9 ± 0.7    83.2 ± 1.6    83.2 ± 1.4
  cw              96.4 ± 0.9    95.9 ± 1.1    82.5 ± 2.5    98.6 ± 0.7
  refresh-math    96.5 ± 0.5    96.9 ± 2.6    83.2 ± 2.6    98.5 ± 0.5

Without the designed conflict nothing is lost: Math falls by -1.9 [-2.8, -1.0] points (it rises), BWT is +0.5
[0.4, 0.6], and the recovery fraction is undefined because there is no loss.
"""

from pathlib import Path

from mdrl_jax import config


def get_config() -> config.Config:
    """The configuration."""
    c = config.from_file(Path(__file__).with_name("quickstart.py"))
    c.domains.style_blind = True
    return c
