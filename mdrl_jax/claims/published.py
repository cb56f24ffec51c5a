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

SEE = "see configs/claims.py"  # the configuration that gathers the evidence which a quick run lacks


@dataclasses.dataclass(frozen=True)
class Claim:
    """A claim in words.

    Attributes:
      text: the published statement.
      published: the published figure.
      rule: the rule that judges the claim on a run.
    """

    text: str
    published: str
    rule: str


CLAIMS = {
    "C1": Claim(
        "RL on one domain gives sparse, small edits",
        f"{SPARSE_SHARES[0]:g}–{SPARSE_SHARES[1]:g} % of parameters with |Δ| < 1e-7 and relative change < 1e-3",
        "for every domain's solo edit, or its edit in the sequence: share of weights with an unchanged bfloat16 value "
        "above 0.5; and share with |δ| < 0.1·rms(δ) of the tensor above, participation ratio within tensors below, "
        "those of SFT to the same score and of the same steps with random signs",
    ),
    "C2": Claim(
        "the most-changed neurons of two domains overlap weakly",
        f"mean Jaccard of the top 10 % below {WEAK_OVERLAP:g}; two random sets give 0.053",
        "mean pairwise Jaccard above chance less than half of that of one domain trained twice; without a second solo "
        f"stage: contradicted at {WEAK_OVERLAP:g} or above, else undecided",
    ),
    "C3": Claim(
        "full-model gradients are near-orthogonal although interference is real",
        "Math–QA cosine ≈ 0 over the full model",
        "success-NLL gradients at θ_0 of completions from each domain's peak: full-model |cos| below 0.1 "
        "(undecided unless both have a reliability above 0.5), cross-fitted sums of positive and of negative products "
        "of tensors both different from 0, and measured damage above 0",
    ),
    "C4": Claim(
        "domains share active routes, and the update on them decides synergy or conflict",
        "no figure",
        "route Jaccard above the null's 97.5 % for every pair, and, prompt by prompt, −g_A·δ_B on the shared route "
        "agrees with the measured change better than with another domain's edit in its place (exact permutation test "
        "over the ordered pairs of solo edits, p < 0.05)",
    ),
    "C5": Claim(
        "damage is mainly second-order, in a low-dimensional shared conflict subspace",
        "Δ ≈ ½ δᵀHδ ≈ ½ (P_S δ)ᵀ H (P_S δ)",
        "undecided unless measured damage is above 0; then, by success NLL: 1 − g·D / (prediction in 8 segments) above "
        "½; and removing P_S D undoes more of the damage than pieces of equal norm from random subspaces and from "
        "outside S, and more than ½",
    ),
    "C6": Claim(
        "a brief refresh contracts the harmful component at little cost to the others",
        f"Math 66.49 → 57.66 → 66.04 after Re-Math, a fraction of {RECOVERY_FRACTION:g}; average 64.25 → 66.39",
        f"for a plain refresh of ≤ {100 * BRIEF:g} % of a stage's steps: (a) recovery fraction above "
        f"{LEAST_FRACTION:g} and collateral below 3 points; (b) in every S that was found ‖P_S e‖ shrinks, by a "
        "movement towards θ*, and faster than in random subspaces and by refreshes of other domains; (c) mean over "
        "domains above that of every other method at equal budget, at least joint, replay, protect and PCGrad",
    ),
    "C7": Claim(
        "training-free rollback on a sparse proxy conflict coordinate set restores Math in part",
        "no figure",
        "undecided unless A had measurably lost and a set was chosen; then A's gain at equal loss of B above (a) that "
        "of every control that is blind to A and (b) that of a set matched within each tensor, of the same coordinates "
        "with permuted magnitudes and the gradient's sign, and of a sparse sign-gradient step of A",
    ),
    "C8": Claim(
        "RL keeps more of the base model's circuit than SFT",
        "of 297 heads SFT keeps 153, RL keeps 200",
        "undecided unless RL and SFT from one base reach a matched score on a domain, and their circuits are faithful "
        "wherever the search starts; then (a) overlap with base's circuit minus its chance value and (b) faithfulness "
        "of base's circuit inside the model, both larger for RL than for SFT",
    ),
}
