"""The published claims C1 to C8: the statement and the figure of each, and the rule that judges a run by it.

Definitions §0 names the papers, and §13 has the rules in full. All other modules take these texts and figures from
here: `verdicts.judge` copies them into `claims.json`, and the report shows them on its page and in its charts.
"""

import dataclasses

# C1: the lowest and the highest published percentage of parameters with |Δ| < 1e-7 and a relative change < 1e-3.
SPARSE_SHARES = (77.0, 89.0)
# C2: the published mean Jaccard of the top 10 % is below this; the rule uses the same bound.
WEAK_OVERLAP = 0.19
# C6: the published recovery fraction of Math after Re-Math, and the fraction that the rule asks a refresh to exceed.
RECOVERY_FRACTION = 0.949
LEAST_FRACTION = 0.5
# C6: a refresh is brief if it takes at most this share of the steps of the domain's own stage.
BRIEF = 0.2

NOT_MEASURED = "not measured"  # stands in place of a rule for a claim that this version does not measure


@dataclasses.dataclass(frozen=True)
class Claim:
    """A claim in words.

    Attributes:
      text: the published statement.
      published: the published figure.
      rule: the rule that judges the claim on a run, or `NOT_MEASURED`.
    """

    text: str
    published: str
    rule: str


CLAIMS = {
    "C1": Claim(
        "RL on one domain gives sparse, small edits",
        f"{SPARSE_SHARES[0]:g}–{SPARSE_SHARES[1]:g} % of parameters with |Δ| < 1e-7 and relative change < 1e-3",
        "share with relative change < 1e-3 above 0.5 and participation ratio below 0.3, for every domain: of its solo "
        "edit, or of its edit in the sequence if there was no solo stage",
    ),
    "C2": Claim(
        "the most-changed neurons of two domains overlap weakly",
        f"mean Jaccard of the top 10 % below {WEAK_OVERLAP:g}; two random sets give 0.053",
        f"mean pairwise Jaccard of the top 10 % below {WEAK_OVERLAP:g}",
    ),
    "C3": Claim(
        "full-model gradients are near-orthogonal although interference is real",
        "Math–QA cosine ≈ 0 over the full model",
        "undecided unless both gradients have a reliability above 0.5; then full-model |cos| below 0.1, at least one "
        "tensor conflicting and one synergistic, and measured damage above 0",
    ),
    "C4": Claim(
        "domains share active routes, and the update on them decides synergy or conflict",
        "no figure",
        "route Jaccard above the null's 97.5 % for every pair, and Spearman of −g_A·δ_B on the shared route with "
        "measured transfer above 0",
    ),
    "C5": Claim(
        "damage is mainly second-order, in a low-dimensional shared conflict subspace",
        "Δ ≈ ½ δᵀHδ ≈ ½ (P_S δ)ᵀ H (P_S δ)",
        "undecided unless measured damage is above 0; then, for both objectives (mean reward AND success NLL), at the "
        "largest α with |remainder| ≤ 20 % of measured: second-order share of predicted damage above ½, and c(k) at "
        "k = analyze.vectors above every baseline of equal k",
    ),
    "C6": Claim(
        "a brief refresh contracts the harmful component at little cost to the others",
        f"Math 66.49 → 57.66 → 66.04 after Re-Math, a fraction of {RECOVERY_FRACTION:g}; average 64.25 → 66.39",
        f"undecided unless the refresh took ≤ {100 * BRIEF:g} % of a stage's steps; then recovery fraction above "
        f"{LEAST_FRACTION:g} AND collateral below 3 points AND ‖P_S e‖ contracts faster than ‖P_S⊥ e‖ in every S that "
        "was found; a loss that is not measurable leaves the fraction undecided, which is one member of the AND",
    ),
    "C7": Claim(
        "training-free rollback on a sparse proxy conflict coordinate set restores Math in part",
        "no figure",
        "undecided unless A had measurably lost and a set was chosen; then A's gain at equal loss of B above each "
        "control's",
    ),
    "C8": Claim(
        "RL keeps more of the base model's circuit than SFT",
        "of 297 heads SFT keeps 153, RL keeps 200",
        NOT_MEASURED,
    ),
}
