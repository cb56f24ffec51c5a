"""Worlds in which claims C6 and C7 are true, false, or pure noise, as records of the form that a run writes.

A refresh walks on a quadratic loss with a known Hessian H and a known S. Only inner products of the displacements
matter: S has coordinates of its own, and all other directions of a walk (its start, the pull of a loss outside S, the
noise of each step) are orthogonal to each other, as they are in many dimensions. A random subspace of k dimensions sees
a displacement through k Gaussian vectors.
"""

from typing import Any

import numpy as np

from mdrl_jax.recovery.refresh.contraction import Basis, contraction
from mdrl_jax.recovery.rollback.tradeoff import Outcome, at_equal_loss
from mdrl_jax.stats.estimate import POINTS, Record, independent_mean, paired_difference, ratio_of_means

N, K, STEPS, N_RANDOM = 100_000, 8, 4, 100  # coordinates of the route, dimensions of S, steps, random subspaces
IN_S = 0.05  # ‖P_S e‖ / ‖e‖ at the start, which is six times that of a random subspace
NOISE = 0.15  # length of a step's noise in units of ‖e‖: the distance outside S grows by 1 % a step
BASIS = Basis("reward", 0, "qa", {}, np.geomspace(10, 1, K), np.zeros((1, 1)), np.ones((1, 1)))

# name -> what the steps of the refresh do, and those of a refresh of another domain.
WALKS = {
    "true": ("descends", "wanders"),
    "random signs": ("wanders", "wanders"),
    "one random drift": ("drifts", "drifts"),
    "wrong domain": ("elsewhere", "elsewhere"),
    "wrong domain, moves in S": ("strays", "strays"),
    "every domain contracts S": ("descends", "descends"),
    "S grows": ("climbs", "wanders"),
}


def walks(rng: np.random.Generator, kind: str, start_K: np.ndarray, streams: int) -> list[np.ndarray]:
    """Displacements e_t of each stream, [STEPS + 1, K + 3 + streams · STEPS]; the streams share all but their noise."""
    rate = 0.09 / BASIS.values.mean()
    target_K = IN_S * (u := rng.normal(size=K)) / np.linalg.norm(u)
    drift_K = 0.1 * NOISE * rng.normal(size=K) * IN_S / np.sqrt(K)
    found = []
    for i in range(streams):
        path = [np.concatenate([start_K, [np.sqrt(1 - IN_S**2), 0, 0], np.zeros(streams * STEPS)])]
        for t in range(STEPS):
            e = path[-1].copy()
            if kind == "descends":
                e[:K] -= rate * BASIS.values * e[:K]
            elif kind == "climbs":
                e[:K] += rate * BASIS.values * e[:K]
            elif kind == "strays":  # towards an optimum of its own in S, at the start's distance
                e[:K] -= rate * BASIS.values * (e[:K] - start_K - target_K)
            elif kind == "drifts":  # the same random direction in every step of every stream
                e[:K] += 10 * drift_K
                e[K + 1] += 0.3 * NOISE
            elif kind == "elsewhere":
                e[K + 2] -= 0.05
            e[:K] += NOISE * rng.normal(size=K) / np.sqrt(N)
            e[K + 3 + i * STEPS + t] += NOISE
            path.append(e)
        found.append(np.array(path))
    return found


def rows(path: np.ndarray, random: np.ndarray) -> list[Record]:
    """The scored steps of a walk, as `contraction.lengths` makes them."""
    found = []
    for t, e in enumerate(path):
        within = float(np.linalg.norm(e[:K]))
        outside = float(np.linalg.norm(e[K:]))
        drawn = np.linalg.norm(random[..., : e.size] @ e, axis=1) / np.sqrt(N)
        row = {
            "within": within,
            "coordinates": e[:K].tolist(),
            "route": outside,
            "outside": outside,
            "random": drawn.tolist(),
        }
        found.append({"step": t, "subspaces": [row]})
    return found


def refresh(rng: np.random.Generator, world: str, streams: int) -> Record:
    """The contraction of a refresh with some streams, with the same refresh of another domain if there are several."""
    start_K = IN_S * (u := rng.normal(size=K)) / np.linalg.norm(u)
    random = rng.normal(size=(N_RANDOM, K, K + 3 + streams * STEPS))
    ours, other = WALKS[world]
    first, *more = (rows(path, random) for path in walks(rng, ours, start_K, streams))
    others = {} if streams == 1 else {"cw": rows(walks(rng, other, start_K, 1)[0], random)}
    (found,) = contraction(first, [BASIS], 1e-3, more, others)
    return found


# --- scores ---------------------------------------------------------------------------------------------------------

P, G = 300, 4


def rewards(rng: np.random.Generator, mean: float, like: tuple[np.ndarray, np.ndarray]) -> np.ndarray:
    """Rewards [P, G], 0 or 1, at about a mean; `like` are the prompts' difficulties [P] and the draws [P, G] of a run.

    Of the samples 72 % keep their draw from one stage to the next, because prompts and sampling keys are the same. QA's
    drop then has a half-width of about 1.7 points, as in the runs.
    """
    hard_P, draw_PG = like
    fresh = rng.random(draw_PG.shape) < 0.15
    x_PG = np.where(fresh, rng.random(draw_PG.shape), draw_PG)
    p_P = np.clip(mean + (hard_P - hard_P.mean()) * min(1.0, 4 * mean * (1 - mean)), 0, 1)
    return (x_PG < p_P[:, None]).astype(float)


def prompts(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Difficulty of each prompt and the draw of each sample."""
    return 0.25 * rng.normal(size=P), rng.random((P, G))


SCORES = {  # Math's score at its peak, before and after; drop of every other domain; the rivals' lag in the average
    "true": (0.94, 0.5, 0.88, 0.0, 0.035),
    "limit: others lose 0.5 points": (0.94, 0.5, 0.88, 0.005, 0.035),
    "little comes back": (0.94, 0.5, 0.6, 0.0, 0.035),
    "others pay": (0.94, 0.5, 0.88, 0.06, 0.035),
    "a rival is better": (0.94, 0.5, 0.88, 0.0, -0.035),
    "noise": (0.94, 0.5, 0.5, 0.0, 0.0),
}
OTHERS = {"code": 0.95, "qa": 0.76, "cw": 0.97}


def scores(rng: np.random.Generator, world: str) -> Record:
    """Recovery fraction, collateral, loss and differences to the rivals of one refresh, at 300 prompts × 4."""
    peak, before, after, drop, lag = SCORES[world]
    like = {d: prompts(rng) for d in ("math", *OTHERS)}
    top, start, end = (rewards(rng, x, like["math"]) for x in (peak, before, after))
    top_P, start_P, end_P = (x.mean(axis=1) for x in (top, start, end))
    fraction = ratio_of_means(end_P - start_P, top_P - start_P)
    ends = {"math": end} | {d: rewards(rng, x - drop, like[d]) for d, x in OTHERS.items()}
    drops = [paired_difference(rewards(rng, x, like[d]), ends[d]).in_points() for d, x in OTHERS.items()]
    rivals = {}
    for name in ("joint", "replay", "protect", "pcgrad"):
        means = {"math": after - lag} | {d: min(x - drop - lag, 0.999) for d, x in OTHERS.items()}
        each = [paired_difference(ends[d], rewards(rng, x, like[d])).in_points() for d, x in means.items()]
        rivals[name] = independent_mean(each).record(0.0)
    assert fraction is not None
    return {
        "fraction": fraction.record(),
        "collateral": max(drops, key=lambda e: e.value).record(),
        "loss": paired_difference(top, start).in_points().record(),
        "rivals": rivals,
    }


# Gain of A by the chosen set and by the blind and the informed controls, in points, at a loss of B of 2 points.
GAINS = {
    "true": (20.0, 8.0, 12.0),
    "A's gradient does it": (20.0, 8.0, 20.0),
    "only blind controls are worse off": (20.0, 8.0, 26.0),
    "any set does it": (12.0, 12.0, 12.0),
    "noise": (0.0, 0.0, 0.0),
}


def rollback(rng: np.random.Generator, world: str) -> Any:
    """The record of a rollback with its controls; each control has settings at half, all, and 1.6 of the loss."""
    like = {d: prompts(rng) for d in ("math", "qa")}
    start = {"math": rewards(rng, 0.5, like["math"]), "qa": rewards(rng, 0.76, like["qa"])}

    def tried(gain: float, loss: float) -> Outcome:
        now = {
            "math": rewards(rng, 0.5 + gain / POINTS, like["math"]),
            "qa": rewards(rng, 0.76 - loss / POINTS, like["qa"]),
        }
        return Outcome((now["math"] - start["math"]).mean(axis=1), (start["qa"] - now["qa"]).mean(axis=1))

    ours, blind, informed = GAINS[world]
    set_ = tried(ours, 2.0)
    at = {}
    for names, gain in ((("random", "matched", "largest", "whole"), blind), (INFORMED, informed)):
        for name in names:
            settings = [tried(gain * min(x, 1.15), 2.0 * x) for x in (0.5, 1.0, 1.6)]
            at[name] = at_equal_loss(set_, [settings])[0].record(0.0)
    lost = paired_difference(rewards(rng, 0.9, like["math"]), start["math"]).in_points().record(0.0)
    test = {"lost": lost, **set_.record(), "at_equal_loss": at}
    return {"stage": "rollback-math-qa", "domain": "math", "donor": "qa", "limit": 2.0, "chosen": {}, "test": test}


INFORMED = ("matched_in_tensor", "permuted", "sign_step")
