"""What one point of a sequence says of its domains: gradients, routes, later edits on them (definitions §4, §5).

At the base model all pairs of domains, at every θ*_A but the last those of A and of domains trained after it: cosines
of gradients and overlaps of routes; on the shared route ℛ of A and a later B the cosine of their edits and the
first-order effect −g_A·δ_B of B's edit (positive: it lowers A's loss), beside ℛ's complement and random sets of its
size.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mdrl_jax.analysis import gradients
from mdrl_jax.analysis.probe import Probe
from mdrl_jax.analysis.routes import SHARE, WHICH, Activity
from mdrl_jax.analysis.samples import Sample
from mdrl_jax.stats.bootstrap import jackknife
from mdrl_jax.stats.estimate import student
from mdrl_jax.stats.overlap import jaccard, overlap, top_share
from mdrl_jax.stats.tests import null_record

N_RANDOM = 1000
Floats = NDArray[np.float64]


@dataclasses.dataclass(frozen=True)
class Later:
    """A later stage B: δ_B as trained in the sequence, and the edits (solo ones if there are) that are compared."""

    domain: str
    edit: Any
    own: Any
    others: Any


def gradient_figures(
    probe: Probe, params: Any, samples: Mapping[str, Sample], own: str | None, later: Sequence[Later],
    progress: Callable[[str], None],
) -> tuple[dict[str, Any], dict[str, Floats]]:  # fmt: skip
    """Comparisons of all pairs of domains, and ⟨g_A, δ_B⟩ by block and neuron [M, L, F] for each later B."""
    names, batch = list(samples), probe.runtime.config.analyze.batch
    blocks = {name: probe.rows(sample) for name, sample in samples.items()}
    per_domain = next(iter(samples.values())).n_prompts // batch
    products: dict[str, dict[int, Any]] = {x.domain: {} for x in later}

    def block_gradient(i: int) -> Any:
        domain, block = names[i // per_domain], i % per_domain
        progress(f"gradient of {domain}, block {block + 1} of {per_domain}")
        gradient = probe.gradient(params, blocks[domain][block])
        if domain == own:
            for x in later:
                products[x.domain].setdefault(block, probe.neuron_products(gradient, x.edit))
        return gradient

    gram = gradients.gram(block_gradient, len(names) * per_domain, probe.runtime.config.analyze.held)
    rows = {name: range(i * per_domain, (i + 1) * per_domain) for i, name in enumerate(names)}
    figures = {}
    for i, a in enumerate(names):
        for b in names[i + 1 :]:
            figures[f"{a}-{b}"] = {"domains": [a, b]} | gradients.compare(gram, list(rows[a]), list(rows[b]))
    effects = {b: np.stack([np.asarray(x[m], np.float64) for m in range(per_domain)]) for b, x in products.items()}
    return figures, effects


def route_overlap(a: Activity, b: Activity, which: str, kind: str) -> dict[str, Any]:
    """Jaccard of two routes with chance and null; its interval leaves out one block of prompts at a time."""
    sets = [top_share(x.scores(which, kind), SHARE) for x in (a, b)]
    record = overlap(sets[0], sets[1])
    if record["estimate"] is None:
        return record
    n = a.tokens.shape[0]
    without = [jaccard(*(top_share(x.scores(which, kind, m), SHARE) for x in (a, b))) for m in range(n)]
    kept = {k: v for k, v in record.items() if k not in ("estimate", "ci95", "n", "unit")}
    return jackknife(record["estimate"], without, "block of prompts").record() | kept


def route_figures(activity: Mapping[str, Activity]) -> dict[str, Any]:
    """Overlaps of all pairs of domains: neurons and heads, over all completions and over correct ones."""
    names = list(activity)
    return {
        f"{a}-{b}": {"domains": [a, b]}
        | {
            kind: {which: route_overlap(activity[a], activity[b], which, kind) for which in WHICH}
            for kind in ("neurons", "heads")
        }
        for i, a in enumerate(names)
        for b in names[i + 1 :]
    }


def shared_route(a: Activity, b: Activity) -> NDArray[np.bool_]:
    """ℛ = R_A ∩ R_B over MLP neurons [L, F]."""
    return top_share(a.scores("all", "neurons"), SHARE) & top_share(b.scores("all", "neurons"), SHARE)


def on_route(probe: Probe, route_LF: NDArray[np.bool_], later: Later, effect_MLF: Floats) -> dict[str, Any]:
    """Cosine of the edits and −g_A·δ_B on ℛ, on its complement, and on random sets of ℛ's size in each layer."""
    ab, aa, bb = (
        np.asarray(probe.neuron_products(x, y), np.float64)
        for x, y in ((later.own, later.others), (later.own, later.own), (later.others, later.others))
    )
    effect_MLF = -effect_MLF
    rng = np.random.default_rng(0)
    random = [_random_like(route_LF, rng) for _ in range(N_RANDOM)]

    def cosine(chosen: NDArray[np.bool_]) -> float:
        scale = np.sqrt(aa[chosen].sum() * bb[chosen].sum())
        return float(ab[chosen].sum() / scale) if scale > 0 else 0.0

    def over_layers(chosen: NDArray[np.bool_], null: Any = None) -> dict[str, Any]:
        n = chosen.shape[0]
        without = [cosine(chosen & (np.arange(n) != layer)[:, None]) for layer in range(n)]
        return jackknife(cosine(chosen), without, "layer").record(null)

    def summed(chosen: NDArray[np.bool_], null: Any = None) -> dict[str, Any]:
        by_block = effect_MLF[:, chosen].sum(axis=1)
        n = by_block.size
        stderr = float(by_block.std(ddof=1)) / np.sqrt(n) if n > 1 else np.inf
        return student(float(by_block.mean()), stderr, n - 1, n, "reward").record(null)

    mean_LF = effect_MLF.mean(axis=0)
    return {
        "neurons": [np.flatnonzero(row).tolist() for row in route_LF],
        "edit_cosine": {
            "route": over_layers(route_LF, null_record([cosine(r) for r in random])),
            "complement": over_layers(~route_LF),
        },
        "effect": {
            "route": summed(route_LF, null_record([mean_LF[r].sum() for r in random])),
            "complement": summed(~route_LF),
        },
        "effect_by_neuron": [mean_LF[layer, row].tolist() for layer, row in enumerate(route_LF)],
    }


def _random_like(route_LF: NDArray[np.bool_], rng: np.random.Generator) -> NDArray[np.bool_]:
    return rng.permuted(route_LF, axis=1)
