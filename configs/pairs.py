"""Does recovery hold elsewhere? Every domain is won back after every later one, in three orders of the domains.

  for s in 0 1 2; do
    python -m mdrl_jax.main --config=configs/pairs.py --config.seed=$s --workdir=runs/pairs-$s
  done
  python -m mdrl_jax.main seeds --workdir=runs/pairs-0 --workdir=runs/pairs-1 --workdir=runs/pairs-2

The orders are the quickstart's, its reverse, and one that begins with Math, so that Math's loss by QA is repaired at
once, after one more stage, and after two. From the end of every stage of an order each domain that was trained before
is won back three times: by a refresh, by a distillation from its own peak, and by a rollback of the edit of the stage
that just ended. These are 18 pairs of a domain and a later stage, and 54 recoveries. The stage `orders` forecasts all
24 orders from the solo stages and compares the forecasts with the three that were run.

A refresh is plain: it has the settings of the domain's own stage, and so has a distillation. Both may take 8 steps and
end within 4 points of the peak (the interval of 100 validation prompts is about as wide) or by the refresh's other
rules. The rollback tries one rule and few controls, because 18 of them run. The command `seeds` prints recovery,
collateral and cost of each pair, and cost against delay, the number of stages between peak and repair; the report of a
run has both as well.

It has not been run at full length yet.
"""

from pathlib import Path

from mdrl_jax import config

ORDERS = {  # name of an order -> its domains
    "plain": ("code", "math", "qa", "cw"),
    "reversed": ("cw", "qa", "math", "code"),
    "third": ("math", "qa", "code", "cw"),
}


def get_config() -> config.Config:
    """The configuration."""
    c = config.from_file(Path(__file__).with_name("quickstart.py"))
    changes = {
        "refresh": {"steps": 8},
        "distill": {"steps": 8},
        "rollback": {},
    }
    stages, overrides = [], {}
    for order, domains in ORDERS.items():
        names = [_stage(order, domain) for domain in domains]
        stages += names
        if order not in ("plain", "reversed"):  # side branches: the start of each is named
            overrides |= {name: {"start": start} for name, start in zip(names, ("base", *names), strict=False)}
    for order, domains in ORDERS.items():
        for i, later in enumerate(domains):
            for lost in domains[:i]:
                for method, settings in changes.items():
                    given = f"-{later}" if method == "rollback" else ""
                    name = f"{method}-{lost}{given}@{order}_{later}"
                    stages.append(name)
                    overrides[name] = settings | {"start": _stage(order, later)}
    c.stages = (*stages, *(f"solo-{domain}" for domain in ORDERS["plain"]), "orders")
    c.stage_overrides = overrides
    c.recover.margin = 4.0
    c.recover.rules = ("removing",)
    c.recover.random_sets = 8
    c.recover.control_draws = 1
    return c


def _stage(order: str, domain: str) -> str:
    """The name of the stage that trains a domain in an order."""
    return {"plain": domain, "reversed": f"reversed-{domain}"}.get(order, f"{domain}@{order}")
