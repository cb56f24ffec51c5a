"""Domains by name: the four procedural ones, or data sets in their places."""

from collections.abc import Callable

from mdrl_jax.domains import code, cw, math, qa
from mdrl_jax.domains.base import Domain, DomainsConfig

DOMAINS: dict[str, Callable[[DomainsConfig], Domain]] = {
    "code": code.make,
    "math": math.make,
    "qa": qa.make,
    "cw": cw.make,
}


def make_domains(names: tuple[str, ...], config: DomainsConfig) -> dict[str, Domain]:
    """The named domains from the config's seed and data sets; procedural rewards ignore style if it says so.

    Raises:
      UserError: if a data set cannot be read.
    """
    from mdrl_jax.domains import datasets  # it needs numpy, which the procedural domains start without

    sources = config.sources
    domains = {n: datasets.make(n, sources[n], config) if n in sources else DOMAINS[n](config) for n in names}
    if config.style_blind:
        domains = {name: domain if domain.data else domain.style_blind() for name, domain in domains.items()}
    return domains
