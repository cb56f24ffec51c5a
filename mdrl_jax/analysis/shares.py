"""Turns second-order terms of single prompts into shares of DᵀHD with intervals (definitions §7, §12).

`subspace/captured.py` supplies the terms: dᵀH_p d of each prompt p, for projections d of the displacement D. The
columns have these names: "total" (DᵀHD), "route", "measured S" (S at its measured dimension), "random j", and for each
dimension k "S k", "top coordinates k" and "eigenvectors of <domain> k". The column "outside <name>" is (D − d)ᵀH_p(D −
d).

All figures use one set of draws of prompts, so that their ratios and differences are paired. An array with the axis X
is a figure of these draws (`stats.bootstrap.Draws`): it holds the mean over the sample in entry 0.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mdrl_jax.stats.bootstrap import Draws, band
from mdrl_jax.stats.estimate import Estimate, Record, magnitude, missing

OPEN = "the interval of DᵀHD includes 0"
Floats = NDArray[np.float64]


class Means:
    """Means of the named columns over prompts, and the figures made of them.

    Attributes:
      draws: of the prompts.
      n: the number of prompts.
      unit: of the loss.
      mean: the means of each column, [X], by name.
      defined: whether shares are defined: the interval of DᵀHD does not include 0.

    Args:
      columns: the terms of each prompt [P], by name; "total" must be among them.
      unit: of the loss.

    Raises:
      ValueError: if a term is not finite.
      KeyError: if there is no column "total". The methods raise it if a column that they need is missing.
    """

    def __init__(self, columns: dict[str, Floats], unit: str) -> None:
        self.n, self.unit = columns["total"].size, unit
        bad = [name for name, values_P in columns.items() if not np.isfinite(values_P).all()]
        if bad:
            raise ValueError(f"second-order terms that are not finite: {', '.join(bad)}")
        self.draws = Draws(self.n)
        count_X = self.draws.total(np.ones(self.n))
        self.mean = {
            name: np.divide(self.draws.total(values_P), count_X, out=np.full(len(count_X), np.nan), where=count_X > 0)
            for name, values_P in columns.items()
        }
        total = self.mean["total"]
        self.defined = not self.draws.interval(total).includes(0.0) and self.draws.fieller(total, total) is not None

    def figure(self, values_X: Floats) -> Record:
        """The record of a figure in the unit of the loss."""
        return self.draws.interval(values_X, self.unit).record()

    def size(self, values_X: Floats) -> Record:
        """The record of the absolute value of a figure; its interval starts at 0 if that of the figure includes 0."""
        return magnitude(self.draws.interval(values_X, self.unit)).record()

    def share(self, values_X: Floats, null: Any = None) -> Record:
        """The record of a term, or of a difference of two terms, divided by DᵀHD, with Fieller's interval.

        It is missing if shares are undefined.

        Args:
          values_X: the term, not yet divided.
          null: the share by chance, for the record.
        """
        found = self.draws.fieller(values_X, self.mean["total"], "share of DᵀHD") if self.defined else None
        return found.record(null) if found else missing(OPEN, "share of DᵀHD", self.n, null)

    def rung(self, label: str, name: str, dimension: list[int | None] | None) -> dict[str, Any]:
        """The three terms within + cross + outside = DᵀHD of one projection (a rung of the ladder).

        Args:
          label: the name of the rung in the record.
          name: the column of the projection.
          dimension: of the projection, for each half; None for the whole route.

        Returns:
          {"rung", "dimension", "within", "cross", "outside", "share": the share of "within"}.
        """
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
        """The smallest k of `ks`, which ascend, from which on c, the share of S, is at least 0.9 at every k of `ks`.

        If no k qualifies on the sample, the figure is missing. If that is so on too many draws, it has no interval.
        """
        if not self.defined:
            return missing(OPEN, "dimensions", self.n)
        shares_kX = [self.draws.values(self.mean[f"S {k}"]) / self.draws.values(self.mean["total"]) for k in ks]
        enough_kX = np.array(shares_kX) >= 0.9
        onward_kX = np.logical_and.accumulate(enough_kX[::-1])[::-1]
        first_X = np.where(onward_kX.any(axis=0), np.array(ks, float)[onward_kX.argmax(axis=0)], np.inf)
        if np.isinf(first_X[0]):
            return missing(f"c is below 0.9 at k = {ks[-1]}", "dimensions", self.n)
        low, high = band(first_X[1:], "inverted_cdf")
        return Estimate(float(first_X[0]), low, high, self.n, "dimensions").record()

    def baseline(self, name: str, ks: Sequence[int]) -> dict[str, Any]:
        """The share c of a baseline at every k, and the margin of S over it at the last k.

        The margin is the difference of the two terms divided by DᵀHD, so that its sign is right for DᵀHD < 0 too.

        Args:
          name: the column of the baseline, without its k.
          ks: the dimensions, ascending.

        Returns:
          {"name", "k": the last, "strongest": c at the last k, "shares": [{"k", "share"}], "margin"}.
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
        """The share c of each random subspace, and the margin of S over the best of them.

        The best is the one with the largest c in each draw of prompts.

        Args:
          name: the column of S at the dimension k.
          k: the dimension of the random subspaces.
          n_random: their number, at least 1.

        Returns:
          {"name", "k", "n", "strongest": the largest c, "band95": the central 95 % of c, "shares": c of each subspace,
          "margin"}. If shares are undefined, "shares" is empty, and "strongest" and "band95" are None.
        """
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
