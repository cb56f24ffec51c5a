"""The mean score over domains after a refresh against that of every other method of the run (definitions §13, C6).

Two methods have an equal budget if their optimizer steps beyond the plain sequence differ by at most `TOLERANCE` of the
steps of that sequence [chosen]. A method of another budget is listed without a difference.
"""

from mdrl_jax.config import METHODS
from mdrl_jax.report.tables import matrix as matrices
from mdrl_jax.report.tables.methods import PLAIN, RECOVERY, WHOLE, Run, rows_of, spent
from mdrl_jax.stage import labelled, way
from mdrl_jax.stats.estimate import Record, missing

TOLERANCE = 0.1


def rivals(run: Run, stage: str) -> dict[str, Record]:
    """The mean score over domains after a refresh minus that of each other method, in points; positive: refresh better.

    Args:
      run: the work folder.
      stage: the refresh, a row of its scores.

    Returns:
      A record for the plain sequence (key `methods.PLAIN`) and for each method of `methods.rows_of` that is no refresh,
      no rollback, no reversed order and no recovery with a label, which is a variant or a control. The key of a
      prevention is its prefix, of another method its name. The record is the mean over domains of the differences,
      which are paired over prompts, with "steps", the steps of the method minus those of the refresh. A method of
      another budget, or without steps on record, has no estimate but a reason. So have the plain sequence and each
      method of `methods.WHOLE` if the run has no training stage (`matrix.training_rows`); other methods then have no
      record.

    Raises:
      ValueError: if the scores have no such row.
    """
    m, found = run.matrix, {}
    rows, after = rows_of(m), m.stages.index(stage)
    if not rows:
        names = (PLAIN, *(name for name in m.stages if name in WHOLE))
        return {name: missing("no plain stage was trained before a refresh", "points") for name in names}
    ours = spent(run, stage, "steps")
    length = sum(run.costs.get(s.name, {}).get("steps", 0) for s in way(m.stages[rows[PLAIN]], run.stages))
    for name, row in rows.items():
        prefix = name.partition("-")[0]
        if prefix in ("refresh", "rollback", "reversed") or (prefix in RECOVERY and labelled(name)):
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
