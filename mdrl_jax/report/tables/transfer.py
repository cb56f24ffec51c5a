"""Transfer and forgetting: the effects of the stages on each other's domains (definitions §2).

All functions are pure functions of the score matrix. Every score and difference is in points, and every difference is
paired over prompts. A figure that the run cannot give is a `Quantity` with a reason and without an estimate. The
maximum in forgetting includes the base model **[chosen]** but never the stage T itself. The interval of forgetting is
the paired one at the stage that the maximum has selected; it does not account for this selection.
"""

import numpy as np

from mdrl_jax.report.tables.matrix import (
    BASE,
    Matrix,
    Quantity,
    average,
    difference,
    own_row,
    own_rows,
    path_rows,
    score_at,
    training_rows,
)
from mdrl_jax.report.tables.recovered import recoveries


def quantities(matrix: Matrix) -> list[Quantity]:
    """Every figure that a run with these stages should give. If the stages have unique names, so have the figures.

    Returns:
      In this order: lift and peak of each trained domain; fall and forgetting of each but the last; BWT, FWT and mean
      forgetting; intransigence of each trained domain, if there is a stage `joint`; gain, fraction and collateral of
      each refresh and rollback.
    """
    own = own_rows(matrix)
    found = [f(matrix, d) for d in own for f in (lift, peak)]
    found += [f(matrix, d) for d in list(own)[:-1] for f in (fall, forgetting)]
    found += [backward_transfer(matrix), forward_transfer(matrix), mean_forgetting(matrix)]
    if "joint" in matrix.stages:
        found += [intransigence(matrix, d) for d in own]
    for r in recoveries(matrix):
        found += [r.gain, r.fraction, r.collateral]
    return found


def peak(matrix: Matrix, domain: str) -> Quantity:
    """S[j, j]: the score of the domain right after its own stage."""
    name, row = f"peak {domain}", own_row(matrix, domain)
    if row is None:
        return Quantity(name, None, f"no stage trains {domain}")
    return score_at(matrix, name, row, domain)


def lift(matrix: Matrix, domain: str) -> Quantity:
    """S[i, i] − S[i−1, i]: the gain of the domain in its own stage over the stage before it, or over the base."""
    name, row = f"lift {domain}", own_row(matrix, domain)
    if row is None:
        return Quantity(name, None, f"no stage trains {domain}")
    earlier = [s for s in path_rows(matrix) if s < row]
    if not earlier:
        return Quantity(name, None, f"nothing was evaluated before {domain}")
    return difference(matrix, name, domain, row, earlier[-1])


def fall(matrix: Matrix, domain: str) -> Quantity:
    """S[j, j] − S[T, j]: the damage that the later stages do to a domain; positive is harm."""
    name, row = f"fall {domain}", own_row(matrix, domain)
    if row is None:
        return Quantity(name, None, f"no stage trains {domain}")
    if row == training_rows(matrix)[-1]:
        return Quantity(name, None, f"{domain} was trained last")
    return difference(matrix, name, domain, row, training_rows(matrix)[-1])


def backward_transfer(matrix: Matrix) -> Quantity:
    """BWT = mean over i < T of S[T, i] − S[i, i] (GEM, arXiv 1706.08840); negative is harm."""
    rows = training_rows(matrix)
    if len({matrix.stages[s] for s in rows}) < 2:
        return Quantity("BWT", None, "needs two training stages")
    terms = [difference(matrix, "", d, rows[-1], s) for d, s in own_rows(matrix).items() if s < rows[-1]]
    return average("BWT", terms)


def forward_transfer(matrix: Matrix) -> Quantity:
    """FWT = mean over i ≥ 2 of S[i−1, i] − S[0, i] (GEM, arXiv 1706.08840): the gain of a domain before its stage."""
    rows = training_rows(matrix)
    if len({matrix.stages[s] for s in rows}) < 2:
        return Quantity("FWT", None, "needs two training stages")
    if BASE not in matrix.stages:
        return Quantity("FWT", None, "the base model was not evaluated")
    base, names = matrix.stages.index(BASE), [matrix.stages[s] for s in rows]
    first = [i for i in range(1, len(rows)) if names[i] not in names[:i]]
    return average("FWT", [difference(matrix, "", names[i], rows[i - 1], base) for i in first])


def forgetting(matrix: Matrix, domain: str) -> Quantity:
    """f_j = max over l < T of S[l, j], minus S[T, j], for a domain j trained before T.

    It is biased up by about one standard error, because it takes the maximum of noisy scores. `fall` is the figure to
    quote.
    """
    name, row, rows = f"forgetting {domain}", own_row(matrix, domain), training_rows(matrix)
    if row is None or row == rows[-1]:
        return Quantity(name, None, f"{domain} is not trained before the last stage")
    column = matrix.domains.index(domain)
    earlier = [s for s in path_rows(matrix) if s < rows[-1] and np.isfinite(matrix.score_SD[s, column])]
    if not earlier:
        return Quantity(name, None, f"{domain} was not evaluated before {matrix.stages[rows[-1]]}")
    best = max(earlier, key=lambda s: matrix.score_SD[s, column])
    return difference(matrix, name, domain, best, rows[-1], f"highest after {matrix.stages[best]}")


def mean_forgetting(matrix: Matrix) -> Quantity:
    """Mean of f_j over the domains trained before T."""
    rows = training_rows(matrix)
    earlier = [d for d, s in own_rows(matrix).items() if s < rows[-1]]
    if not earlier:
        return Quantity("forgetting", None, "needs two training stages")
    return average("forgetting", [forgetting(matrix, d) for d in earlier])


def intransigence(matrix: Matrix, domain: str) -> Quantity:
    """I_k = S_joint[k] − S[k, k] (Chaudhry et al., arXiv 1801.10112): the lead of joint training over the own stage."""
    name, row = f"intransigence {domain}", own_row(matrix, domain)
    if row is None:
        return Quantity(name, None, f"no stage trains {domain}")
    if "joint" not in matrix.stages:
        return Quantity(name, None, "there is no joint stage")
    return difference(matrix, name, domain, matrix.stages.index("joint"), row)
