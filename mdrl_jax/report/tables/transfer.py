"""Transfer and forgetting: the effects of the stages on each other's domains (definitions §2).

All functions are pure functions of the score matrix. Every score and difference is in points, and every difference is
paired over prompts. A figure that the run cannot give is a `Quantity` with a reason and without an estimate. The
maximum in forgetting includes θ_0 **[chosen]** but never the stage T itself. The interval of forgetting is the paired
one at the stage that the maximum has selected; it does not account for this selection.
"""

import numpy as np

from mdrl_jax.report.tables.matrix import (
    Matrix,
    Quantity,
    average,
    difference,
    origin_row,
    own_row,
    own_rows,
    score_at,
    start_row,
    training_rows,
)
from mdrl_jax.report.tables.recovered import recoveries


def quantities(matrix: Matrix) -> list[Quantity]:
    """Every figure that a run with these stages should give. If the stages have unique names, so have the figures.

    Returns:
      In this order: lift and peak of each trained domain; fall and forgetting of each but the one trained last; BWT,
      FWT and mean forgetting; intransigence of each trained domain, if there is a stage `joint`; loss, gain, fraction
      and collateral of each refresh, distillation and rollback (`recovered.recoveries`). Domains are in the order of
      their own stages.
    """
    own = own_rows(matrix)
    found = [f(matrix, d) for d in own for f in (lift, peak)]
    found += [f(matrix, d) for d in list(own)[:-1] for f in (fall, forgetting)]
    found += [backward_transfer(matrix), forward_transfer(matrix), mean_forgetting(matrix)]
    if "joint" in matrix.stages:
        found += [intransigence(matrix, d) for d in own]
    for r in recoveries(matrix):
        found += [r.loss, r.gain, r.fraction, r.collateral]
    return found


def peak(matrix: Matrix, domain: str) -> Quantity:
    """`peak DOMAIN`: the score of the domain right after its own stage (`own_row`), in points.

    The figure has no estimate if no training stage has the domain's name, or if the domain was not evaluated after it.
    """
    name, row = f"peak {domain}", own_row(matrix, domain)
    if row is None:
        return Quantity(name, None, f"no stage trains {domain}")
    return score_at(matrix, name, row, domain)


def lift(matrix: Matrix, domain: str) -> Quantity:
    """`lift DOMAIN`: the score after the domain's own stage (`own_row`) minus that where it started, in points.

    The figure is positive if the domain gained. It has no estimate if there is no such stage, or if the domain was not
    evaluated after it or where it started.
    """
    name, row = f"lift {domain}", own_row(matrix, domain)
    if row is None:
        return Quantity(name, None, f"no stage trains {domain}")
    before = start_row(matrix, domain)
    if before is None:
        return Quantity(name, None, f"{matrix.starts[domain]}, where {domain} started, was not evaluated")
    return difference(matrix, name, domain, row, before)


def fall(matrix: Matrix, domain: str) -> Quantity:
    """`fall DOMAIN`: the score after the domain's own stage minus that after T, in points; positive is harm.

    T is the last training stage. The figure has no estimate if no training stage has the domain's name, if the domain's
    own stage is T, or if the domain was not evaluated after one of the two.
    """
    name, row = f"fall {domain}", own_row(matrix, domain)
    if row is None:
        return Quantity(name, None, f"no stage trains {domain}")
    if row == training_rows(matrix)[-1]:
        return Quantity(name, None, f"{domain} was trained last")
    return difference(matrix, name, domain, row, training_rows(matrix)[-1])


def backward_transfer(matrix: Matrix) -> Quantity:
    """`BWT`: mean of S[T, i] − S[i, i] over the domains i that were trained before T, in points; negative is harm.

    S[T, i] is the score of domain i after T, the last training stage, and S[i, i] that after its own stage (GEM, arXiv
    1706.08840). The figure has no estimate if fewer than two domains were trained, or if a score is missing.
    """
    rows = training_rows(matrix)
    if len({matrix.stages[s] for s in rows}) < 2:
        return Quantity("BWT", None, "needs two training stages")
    terms = [difference(matrix, "", d, rows[-1], s) for d, s in own_rows(matrix).items() if s < rows[-1]]
    return average("BWT", terms)


def forward_transfer(matrix: Matrix) -> Quantity:
    """`FWT`: mean over all trained domains but the first of how much they gained before their own stage, in points.

    The gain is the score after the training stage before the domain's first own stage, minus that of θ_0 (GEM, arXiv
    1706.08840). The figure has no estimate if fewer than two domains were trained, if θ_0 was not evaluated, or if a
    score is missing.
    """
    rows = training_rows(matrix)
    if len({matrix.stages[s] for s in rows}) < 2:
        return Quantity("FWT", None, "needs two training stages")
    start, names = origin_row(matrix), [matrix.stages[s] for s in rows]
    if start is None:
        return Quantity("FWT", None, "θ_0, the model that the sequence starts from, was not evaluated")
    first = [i for i in range(1, len(rows)) if names[i] not in names[:i]]
    return average("FWT", [difference(matrix, "", names[i], rows[i - 1], start) for i in first])


def forgetting(matrix: Matrix, domain: str) -> Quantity:
    """`forgetting DOMAIN`: the highest earlier score of the domain minus its score after T, in points.

    T is the last training stage, and positive is harm; it is negative if the score after T is the highest of all.
    Earlier scores are those of θ_0 and of the training stages before T; `detail` names the stage of the highest,
    the first of equal ones. The figure has no estimate if the domain was not trained before T, or if the score after T
    or all earlier ones are missing. It is biased up by about one standard error, because it takes the maximum of noisy
    scores. `fall` is the figure to quote.
    """
    name, row, rows = f"forgetting {domain}", own_row(matrix, domain), training_rows(matrix)
    if row is None or row == rows[-1]:
        return Quantity(name, None, f"{domain} is not trained before the last stage")
    column = matrix.domains.index(domain)
    start = origin_row(matrix)
    path = [*([] if start is None else [start]), *rows]
    earlier = [s for s in path if s < rows[-1] and np.isfinite(matrix.score_SD[s, column])]
    if not earlier:
        return Quantity(name, None, f"{domain} was not evaluated before {matrix.stages[rows[-1]]}")
    best = max(earlier, key=lambda s: matrix.score_SD[s, column])
    return difference(matrix, name, domain, best, rows[-1], f"highest after {matrix.stages[best]}")


def mean_forgetting(matrix: Matrix) -> Quantity:
    """`forgetting`: the mean of `forgetting` over the domains trained before T, the last training stage, in points.

    The figure has no estimate if there are no such domains, or if one of them has none.
    """
    rows = training_rows(matrix)
    earlier = [d for d, s in own_rows(matrix).items() if s < rows[-1]]
    if not earlier:
        return Quantity("forgetting", None, "needs two training stages")
    return average("forgetting", [forgetting(matrix, d) for d in earlier])


def intransigence(matrix: Matrix, domain: str) -> Quantity:
    """`intransigence DOMAIN`: the score after the stage `joint` minus that after the domain's own stage, in points.

    The figure is positive if joint training did better (Chaudhry et al., arXiv 1801.10112). It has no estimate if one
    of the two stages is missing, or if the domain was not evaluated after one of them.
    """
    name, row = f"intransigence {domain}", own_row(matrix, domain)
    if row is None:
        return Quantity(name, None, f"no stage trains {domain}")
    if "joint" not in matrix.stages:
        return Quantity(name, None, "there is no joint stage")
    return difference(matrix, name, domain, matrix.stages.index("joint"), row)
