"""The figures of one checkpoint: gradients, routes, and later edits on shared routes (definitions §4, §5).

`interference.Analysis.point` calls these functions at θ_0, for all domains, and at every θ*_A that has a later stage,
for A and the domains trained after it. For each pair of domains they give the cosine of the gradients and
the overlap of the routes. For A and each later domain B they also give, on the shared route ℛ:

- the cosine of the edits of A and B,
- the first-order effect −g_A·δ_B of B's edit. A positive effect lowers A's loss.

Both are also given on the complement of ℛ. Their null is random sets of neurons of the size of ℛ.

At θ_0 two more comparisons use completions that were sampled at each domain's own peak, where successes are
many: the gradients of their success NLL (C3), and what each solo edit does to the NLL of each prompt (C4).

A *record* of a figure is {"estimate", "ci95", "null", "n", "unit"}, with "reason" if it has no estimate
(`stats/estimate.py`).
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
from mdrl_jax.analysis.subspace.conflict import route
from mdrl_jax.stats.bootstrap import jackknife
from mdrl_jax.stats.estimate import student
from mdrl_jax.stats.overlap import half_sampled, half_sets, jaccard, overlap, top_share
from mdrl_jax.stats.tests import null_record

N_RANDOM = 1000  # random sets of neurons in a null
Floats = NDArray[np.float64]


@dataclasses.dataclass(frozen=True)
class Later:
    """A later stage B, compared with domain A.

    Attributes:
      domain: B.
      edit: δ_B as trained in the sequence.
      own: the edit of A that `edit_cosine` compares; the solo edit if there is one.
      others: the edit of B that it is compared with; the solo edit if there is one.
    """

    domain: str
    edit: Any
    own: Any
    others: Any


def gradient_figures(
    probe: Probe, params: Any, samples: Mapping[str, Sample], own: str | None, later: Sequence[Later],
    progress: Callable[[str], None], successes: bool = False,
) -> tuple[dict[str, Any], dict[str, Floats]]:  # fmt: skip
    """Compares the gradients of all pairs of domains at one point.

    Args:
      probe: the compiled device programs.
      params: the parameters at the point.
      samples: completions of one or more domains, of equally many prompts, at least one block of `analyze.batch`.
        Prompts beyond the last whole block are left out. For the reward, they are sampled at the point.
      own: the domain A that peaks at the point; None at θ_0.
      later: the later stages whose edits δ_B are multiplied with A's gradient, at most one of each domain; empty at
        θ_0.
      progress: told what is being computed.
      successes: compares gradients of the success NLL in place of the reward's. A block's gradient is then −∇log π,
        summed over its successes and divided by its number of completions, so blocks with more successes count more.

    Returns:
      the comparisons (`gradients.compare`) by pair "a-b", with "domains"; and for each later domain B the inner
      products ⟨g_A, δ_B⟩ of each of A's M blocks on each neuron, [M, L, F], with g_A the gradient of the loss. There
      are no comparisons if there is only one domain.

    Raises:
      ValueError: if there are several domains with fewer than four blocks each, or `analyze.held` is below 2.
      KeyError: if `later` is not empty and `own` is not among the domains of `samples`.
    """
    names, batch = list(samples), probe.runtime.config.analyze.batch
    # The reward's loss with the advantages 1 for successes and 0 for others has the gradient of the success NLL.
    blocks = {name: probe.rows(x, adv_PG=x.success_PG if successes else None) for name, x in samples.items()}
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
    """The overlap of two routes: the record of `stats.overlap.overlap`, with an interval over blocks of prompts.

    A route is the top 10 % of each layer by activity. The interval (`stats.overlap.half_sampled`) is for the overlap of
    routes that are found on as many prompts. Noise cuts some neurons off both routes, so that overlap is below that of
    routes without noise. "half", the mean overlap of routes from random halves of the blocks, shows by how much it
    still grows with the number of prompts.

    Args:
      a, b: activity of two domains in the same number of blocks.
      which: the completions, one of `routes.WHICH`.
      kind: "neurons" or "heads".

    Returns:
      the record, with "half", "chance", "p" and "shared". Its estimate is the Jaccard index; "n" counts blocks. It has
      no estimate and no "half" if both routes are empty. If there is only one block, or if both routes of one of the
      random halves are empty, it has no interval and "half" is None.

    Raises:
      ValueError: if `which` is not one of `routes.WHICH`, or if the routes differ in shape.
      AttributeError: if `kind` is neither of the two.
    """

    def sets(keep_M: NDArray[np.bool_] | None) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
        first, second = (top_share(x.scores(which, kind, keep_M), SHARE) for x in (a, b))
        return first, second

    record = overlap(*sets(None))
    if record["estimate"] is None:
        return record
    n = a.tokens.shape[0]
    halves = np.array([jaccard(*sets(keep_M)) for keep_M in half_sets(n)])
    kept = {k: v for k, v in record.items() if k not in ("estimate", "ci95", "n", "unit")}
    kept["half"] = float(halves.mean()) if np.isfinite(halves).all() else None
    return half_sampled(record["estimate"], halves, n, "block of prompts").record() | kept


def route_figures(activity: Mapping[str, Activity]) -> dict[str, Any]:
    """The overlaps of the routes of all pairs of domains.

    Args:
      activity: by domain.

    Returns:
      by pair "a-b": {"domains": [a, b], "neurons": {"all", "correct"}, "heads": {"all", "correct"}}, with a record of
      `route_overlap` for each kind and choice of completions. Empty with fewer than two domains.

    Raises:
      ValueError: if the activities differ in shape.
    """
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


def shared_route(a: Activity, b: Activity, kind: str = "neurons") -> NDArray[np.bool_]:
    """The shared route ℛ = R_A ∩ R_B of MLP neurons or of attention heads, over all completions.

    Args:
      a, b: activity of the two domains at the same parameters.
      kind: "neurons" or "heads".

    Returns:
      booleans [L, F] or [L, H], true for neurons or heads of ℛ; all false if the two routes have none in common.

    Raises:
      AttributeError: if `kind` is neither of the two.
      ValueError: if the two activities differ in the numbers of layers, neurons or heads.
    """
    return top_share(a.scores("all", kind), SHARE) & top_share(b.scores("all", kind), SHARE)


def solo_effects(
    probe: Probe,
    base: Any,
    at_base: Mapping[str, Activity],
    at_peak: Mapping[str, Sample],
    solo: Callable[[str], Any],
    progress: Callable[[str], None],
) -> list[dict[str, Any]]:
    """What the solo edit of each domain B does to the success NLL of each prompt of another domain A (C4).

    The prediction is −g_A·δ_B on the shared route ℛ of A and B at θ_0, with g_A of A's prompt alone. The
    measurement is the fall of the NLL from θ_0 to the end of B's solo stage, with all of δ_B.

    Args:
      probe: the compiled device programs.
      base: the parameters θ_0.
      at_base: activity of each domain at θ_0, which gives the routes.
      at_peak: completions of the same domains, each sampled at its own peak.
      solo: domain -> parameters at the end of its solo stage.
      progress: told what is being computed.

    Returns:
      for each ordered pair {"domain": A, "edit": B, "neurons": number of neurons of ℛ, "predicted", "measured"}. The
      last two list the nats by which the NLL of a success falls, averaged over the successes of each prompt that has
      one; above 0 the edit helps A. The prompts are the same for every B; without a success the lists are empty. No
      records with fewer than two domains.

    Raises:
      ValueError: if there is only one completion of each prompt.
      KeyError: if `at_base` lacks a domain.
    """
    before = {a: probe.log_probs(base, sample) for a, sample in at_peak.items()}
    found = []
    for b in at_peak:
        after = solo(b)
        edit = probe.difference(after, base)
        for a, sample in at_peak.items():
            if a == b:
                continue
            progress(f"solo edit of {b} on {a}")
            on = route(shared_route(at_base[a], at_base[b]))
            index, mask = on.index_LR, on.mask_LR
            _, u, w = probe.jets(base, probe.lift(probe.slice(edit, index, mask), index, mask, edit), sample)
            order = probe.orders(u, w, sample)["success_nll"]
            fall_PG = (probe.log_probs(after, sample) - before[a]).sum(axis=2, dtype=np.float64)
            known = order.count_P > 0
            count = order.count_P[known]
            predicted = -order.first_P[known] / count
            measured = (sample.success_PG * fall_PG).sum(axis=1)[known] / count
            both = {"predicted": predicted.tolist(), "measured": measured.tolist()}
            found.append({"domain": a, "edit": b, "neurons": on.size} | both)
    return found


def on_route(probe: Probe, route_LF: NDArray[np.bool_], later: Later, effect_MLF: Floats) -> dict[str, Any]:
    """The cosine of the edits and the effect −g_A·δ_B on ℛ and on its complement.

    Args:
      probe: the compiled device programs.
      route_LF: ℛ, booleans [L, F].
      later: the later stage B.
      effect_MLF: ⟨g_A, δ_B⟩ of each of A's M blocks on each neuron.

    Returns:
      {"neurons": indices by layer of the neurons of ℛ, "edit_cosine": {"route", "complement"}, "effect": {"route",
      "complement"}, "effect_by_neuron": −g_A·δ_B of each neuron of ℛ, by layer}. "edit_cosine" (of `later.own` and
      `later.others`) and "effect" hold records. Effects are means over A's blocks in rewards, above 0 if they raise A's
      reward. Intervals are a jackknife over layers for cosines, and Student's t over A's blocks for effects; with one
      layer, or one block, there is none. The figures on the route have a null of 1,000 random sets with as many neurons
      in each layer as ℛ, drawn from a fixed seed; those on the complement have none. On an empty set, effects are 0; a
      cosine is 0 where one of the edits is 0.
    """
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
    """A random set of neurons with as many in each layer as `route_LF`."""
    return rng.permuted(route_LF, axis=1)
