"""Claim C7 judged: A's gain at equal loss of B above each control's (definitions §0, §13).

Of records of `rollback_stage.py`, on test prompts. A control's frontier (`tradeoff.py`) has removing nothing on it, so
a gain of A that is not above 0 cannot be above a control's: §13 needs no condition of its own for that, and such a
rollback is contradicted where a control does better, else undecided. What has to hold before the question can be
asked leaves it undecided: that A lost something that could be won back, and that a set was found to ask it of.
"""

from collections.abc import Sequence

from mdrl_jax.claims.verdicts import Condition, Record, above, every, judge, row_of, smallest


def c7(records: Sequence[Record]) -> Record:
    """The verdict on the rollback whose A had lost most; all of them as rows. The figure is the smallest difference."""
    judged = [(r, _condition(r)) for r in records]
    rows = [_row(r, c) for r, c in judged]
    asked = [(r, c) for r, c in judged if r["chosen"] is not None] or judged
    if not asked:
        return judge("C7", Condition("undecided", "not measurable: there is no rollback"), None, rows)
    record, condition = max(asked, key=lambda j: j[0]["test"]["lost"]["estimate"] if "test" in j[0] else 0.0)
    words = f"{record['domain']} after {record['donor']}: {condition.words}"
    figure = smallest(list(record["test"]["at_equal_loss"].values())) if "test" in record else None
    return judge("C7", Condition(condition.verdict, words), figure, rows)


def _condition(record: Record) -> Condition:
    if record["chosen"] is None:
        return Condition("undecided", f"no set within {record['limit']:g} points of loss gains anything")
    test = record["test"]
    lost = above(test["lost"], 0.0, f"loss of {record['domain']} to win back")
    if lost.verdict != "supported":
        return Condition("undecided", lost.words)
    price = f"at {test['loss']['estimate']:.3g} points of {record['donor']}"
    return every(
        *(
            above(figure, 0.0, f"gain {price} minus that of the control {name}")
            for name, figure in test["at_equal_loss"].items()
        )
    )


def _row(record: Record, condition: Condition) -> Record:
    head = {"stage": record["stage"], "pair": [record["domain"], record["donor"]], **row_of(condition)}
    if record["chosen"] is None:
        return head
    test = record["test"]
    against = {name: {k: v for k, v in f.items() if k != "settings"} for name, f in test["at_equal_loss"].items()}
    return head | {"gain": test["gain"], "loss": test["loss"], "at_equal_loss": against}
