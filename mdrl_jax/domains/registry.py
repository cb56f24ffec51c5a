"""Domains by name: a data set where the config names one, otherwise the procedural domain of that name."""

import dataclasses
from collections.abc import Callable

from mdrl_jax.domains import code, cw, math, qa
from mdrl_jax.domains.base import Domain, DomainsConfig
from mdrl_jax.errors import UserError

DOMAINS: dict[str, Callable[[DomainsConfig], Domain]] = {
    "code": code.make,
    "math": math.make,
    "qa": qa.make,
    "cw": cw.make,
}


def make_domains(names: tuple[str, ...], config: DomainsConfig) -> dict[str, Domain]:
    """Makes the named domains. With `style_blind`, the rewards of procedural domains ignore style.

    Args:
      names: keys of `DOMAINS`, or domains with a data set in `config`.
      config: seed, sizes, style and data sets.

    Returns:
      The domains by name, in the order of `names`; {} without names. A data set in `config` takes the place of the
      domain of its name in `DOMAINS`.

    Raises:
      UserError: if a name is neither a key of `DOMAINS` nor has a data set; if a data set is not valid, cannot be read
        or has too many bad rows; or if a procedural domain has too few prompts for its splits.
      Exception: as in `datasets.make`, or what a function that was added to `DOMAINS` raises.
    """
    from mdrl_jax.domains import datasets  # here, because it imports numpy, which procedural domains do not need

    sources = config.sources
    for name in names:
        if name not in DOMAINS and name not in sources:
            known = ", ".join(dict.fromkeys([*DOMAINS, *sources]))
            raise UserError(f"scored_domains names {name!r}, which is not a domain; known: {known}")
    domains = {
        name: datasets.make(name, sources[name], config) if name in sources else DOMAINS[name](_sized(name, config))
        for name in names
    }
    if config.style_blind:
        domains = {name: domain if domain.data else domain.style_blind() for name, domain in domains.items()}
    return domains


def _sized(name: str, config: DomainsConfig) -> DomainsConfig:
    """The config for a procedural domain: the sizes of its own section take the place of those of all domains."""
    own = getattr(config, name, None)
    sizes = {n: getattr(own, n, 0) or getattr(config, n) for n in ("n_train", "n_validation", "n_test")}
    return dataclasses.replace(config, **sizes)
