"""Shares of a second-order term DᵀHD by projection, with paired intervals over prompts (definitions §7, §12).

Every term has one value per prompt. All figures share one set of draws of prompts, so that their ratios and
differences are paired.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mdrl_jax.stats.bootstrap import band, percentile, prompt_weights
from mdrl_jax.stats.estimate import Estimate, Record, missing

OPEN = "the interval of DᵀHD includes 0"
Floats = NDArray[np.float64]


class Means:
    """Means of the named columns: over the sample in entry 0, over the draws of `prompt_weights` in the others."""

    def __init__(self, columns: dict[str, Floats], unit: str) -> None:
        self.n, self.unit = columns["total"].size, unit
        bad = [name for name, values_P in columns.items() if not np.isfinite(values_P).all()]
        if bad:
            raise ValueError(f"second-order terms that are not finite: {', '.join(bad)}")
        weights_XP = prompt_weights(self.n, np.random.default_rng(0)) / self.n
        self.mean = {name: weights_XP @ values_P for name, values_P in columns.items()}
        self.defined = not self._estimate(self.mean["total"], unit).includes(0.0)

    def _estimate(self, values_X: Floats, unit: str) -> Estimate:
        return percentile(float(values_X[0]), values_X[1:], self.n, unit)

    def figure(self, values_X: Floats) -> Record:
        """A figure in the loss's unit."""
        return self._estimate(values_X, self.unit).record()

    def share(self, values_X: Floats, null: Any = None) -> Record:
        """A term, or a difference of two, as a share of DᵀHD."""
        if not self.defined:
            return missing(OPEN, "share of DᵀHD", self.n, null)
        return self._estimate(values_X / self.mean["total"], "share of DᵀHD").record(null)

    def rung(self, label: str, name: str, dimension: list[int | None] | None) -> dict[str, Any]:
        """The three terms of DᵀHD for one projection; they add up to it."""
        within, outside = self.mean[name], self.mean[f"outside {name}"]
        return {
            "rung": label,
            "dimension": dimension,
            "within": self.figure(within),
            "cross": self.figure(self.mean["total"] - within - outside),
            "outside": self.figure(outside),
            "share": self.share(within),
        }

    def k90(self, ks: Sequence[int]) -> Record:
        """The smallest measured k with c ≥ 0.9 from k onward; no interval where too many draws have none."""
        if not self.defined:
            return missing(OPEN, "dimensions", self.n)
        enough_kX = np.array([self.mean[f"S {k}"] / self.mean["total"] >= 0.9 for k in ks])
        onward_kX = np.logical_and.accumulate(enough_kX[::-1])[::-1]
        first_X = np.where(onward_kX.any(axis=0), np.array(ks, float)[onward_kX.argmax(axis=0)], np.inf)
        if np.isinf(first_X[0]):
            return missing(f"c is below 0.9 at k = {ks[-1]}", "dimensions", self.n)
        low, high = band(first_X[1:], "inverted_cdf")
        return Estimate(float(first_X[0]), low, high, self.n, "dimensions").record()

    def baseline(self, name: str, ks: Sequence[int]) -> dict[str, Any]:
        """c of a baseline at every k, and the margin of S over it at the last.

        S and baseline have one denominator, so that the margin is right for DᵀHD < 0 too.
        """
        top = ks[-1]
        shares = [{"k": k, "share": self.share(self.mean[f"{name} {k}"])} for k in ks]
        margin = self.share(self.mean[f"S {top}"] - self.mean[f"{name} {top}"], 0.0)
        return {
            "name": name,
            "k": top,
            "strongest": shares[-1]["share"]["estimate"],
            "shares": shares,
            "margin": margin,
        }

    def random(self, name: str, k: int, n_random: int) -> dict[str, Any]:
        """c of each random subspace; the margin of S is over the one with the largest c in each draw of prompts."""
        terms_RX = np.array([self.mean[f"random {j}"] for j in range(n_random)])
        total_X = self.mean["total"]
        # The largest share has the smallest term where DᵀHD is negative.
        best_X = np.where(total_X > 0, terms_RX.max(axis=0), terms_RX.min(axis=0))
        shares = (terms_RX[:, 0] / total_X[0]).tolist() if self.defined else []
        return {
            "name": "random subspaces",
            "k": k,
            "n": n_random,
            "strongest": max(shares, default=None),
            "band95": band(shares) if shares else None,
            "shares": shares,
            "margin": self.share(self.mean[name] - best_X, 0.0),
        }
