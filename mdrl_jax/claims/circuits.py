"""The rule that judges the published claim C8, on circuits (definitions §11, §13).

It is a pure function of the records that `analysis/circuits/` makes. `claims/README.md` says how often it errs. Choices
where the definitions leave room:

  * C8 is judged on the domain that both models were trained on, with the circuit that answers its prompts.
  * Of several pairs of an RL and an SFT model the first one at a matched score decides; the others are in `rows`.
  * The claim is undecided if no pair is at a matched score, if a circuit is not faithful at any λ, or if searches from
    the two starts disagree on more than a tenth of the heads: then the masks are no circuit.
"""

from collections.abc import Mapping, Sequence

from mdrl_jax.claims.verdicts import Condition, Part, above, all_parts, judge, parts_record, row_of
from mdrl_jax.stats.estimate import Record


def circuit_parts(comparison: Mapping[str, Record]) -> list[Part]:
    """The parts of C8 for one pair of models.

    Args:
      comparison: {"overlap": retention of base's circuit minus chance, RL minus SFT; "transfer": faithfulness of base's
        circuit, RL minus SFT; "doubts": reasons why the pair cannot be judged}.

    Returns:
      "overlap" and "transfer", both undecided if there are doubts.
    """
    if doubts := comparison["doubts"]:
        undecided = Condition("undecided", "; ".join(doubts))
        return [("overlap", undecided), ("transfer", undecided)]
    return [
        ("overlap", above(comparison["overlap"], 0.0, "overlap with base beyond chance, RL minus SFT,")),
        ("transfer", above(comparison["transfer"], 0.0, "faithfulness of base's circuit, RL minus SFT,")),
    ]


def c8(found: Sequence[Record]) -> Record:
    """Judges C8: RL keeps more of the base model's circuit than SFT, in structure and in function.

    Args:
      found: the record `analysis/circuits-D.json` of each domain, with "domain" and "comparisons".

    Returns:
      The record of the claim (`verdicts.judge`); with several domains, the AND over them. The printed figure is the
      difference of overlaps of the first domain. `rows` has every pair of models: {"domain", "rl", "sft", "verdict",
      "reason", "parts", "score", "overlap", "transfer"}.
    """
    rows: list[Record] = []
    decisive: list[tuple[str, Record, list[Part]]] = []
    for record in found:
        judged = [(c, circuit_parts(c)) for c in record["comparisons"]]
        for c, parts in judged:
            head = {"domain": record["domain"], "rl": c["rl"], "sft": c["sft"], **row_of(all_parts(parts))}
            rows.append(head | {"parts": parts_record(parts), **{k: c[k] for k in ("score", "overlap", "transfer")}})
        if judged:
            comparison, parts = next((x for x in judged if not x[0]["doubts"]), judged[0])
            decisive.append((record["domain"], comparison, parts))
    if not decisive:
        none = Condition("undecided", "not measurable: no model trained by RL and none trained by SFT were compared")
        return judge("C8", none, None, rows)
    _, first, parts = decisive[0]
    if len(decisive) > 1:
        parts = [(domain, all_parts(own)) for domain, _, own in decisive]
    return judge("C8", all_parts(parts), first["overlap"], rows, parts)
