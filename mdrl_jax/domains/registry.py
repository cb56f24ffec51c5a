"""Domains by name: the four procedural ones."""

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
    """The named domains from the config's seed, with rewards that ignore style if it says so."""
    domains = {name: DOMAINS[name](config) for name in names}
    if config.style_blind:
        domains = {name: domain.style_blind() for name, domain in domains.items()}
    return domains
