"""The mean score over domains after a refresh against that of every other method of the run (definitions §13, C6).

Two methods have an equal budget if their optimizer steps beyond the plain sequence differ by at most `TOLERANCE` of the
steps of that sequence [chosen]. A method of another budget is listed without a difference.
"""

from mdrl_jax.config import METHODS
from mdrl_jax.report.tables import matrix as matrices
from mdrl_jax.report.tables.methods import PLAIN, RECOVERY, Run, rows_of, spent
from mdrl_jax.stage import way
from mdrl_jax.stats.estimate import Record, missing

TOLERANCE = 0.1


def rivals(run: Run, stage: str) -> dict[str, Record]:
    """The difference of the mean over domains after a refresh to that of each other method, in points.

    Args:
      run: the work folder.
      stage: the refresh, a row of its scores.

    Returns:
      For the plain sequence and each method of `methods.rows_of` that is no refresh, no rollback and no other order of
      the domains, by its prefix or name: the mean over domains of the paired differences, with "steps", the steps of
      the method minus those of the refresh. A method of another budget has no estimate but a reason.

    Raises:
      ValueError: if the scores have no such row.
    """
    m, found = run.matrix, {}
    rows, after = rows_of(m), m.stages.index(stage)
    ours = spent(run, stage, "steps")
    length = sum(run.costs.get(s.name, {}).get("steps", 0) for s in way(m.stages[rows[PLAIN]], run.stages))
    for name, row in rows.items():
        prefix = name.partition("-")[0]
        if prefix in (*RECOVERY, "reversed"):
            continue
        theirs = 0.0 if name == PLAIN else spent(run, name, "steps")
        if ours is None or theirs is None:
            record = missing("its steps are not on record", "points")
        elif abs(theirs - ours) > TOLERANCE * length:
            record = missing(f"no equal budget: {theirs - ours:+g} steps against a sequence of {length:g}", "points")
        else:
            each = [matrices.difference(m, "", d, after, row) for d in m.domains]
            record = matrices.average("", each).record() | {"steps": theirs - ours}
        found[prefix if prefix in METHODS else name] = record
    return found
