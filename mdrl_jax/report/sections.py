"""The sections of the report, in the order of the page. A builder is a function from the records to figures.

Evidence comes first: scores, recovery, damage, structure. The page puts the verdicts on the claims after the section
`LAST_EVIDENCE`, and the samples after the single answers.

Each section shows what answers its question, and folds the details behind one line that names them.

A builder returns one figure or table, or a list of them. It raises `folder.Absent` if a record is missing or holds
nothing to show, and UserError if a record is no valid JSON. `page` shows both, and the errors in `page.DAMAGED`, as a
line of text.
"""

import dataclasses
from collections.abc import Callable, Sequence

from mdrl_jax.report.figure import Figure, Table
from mdrl_jax.report.figures import (
    answers,
    circuits,
    damage,
    edits,
    gradients,
    locality,
    routes,
    run,
    scores,
    subspace,
    training,
)
from mdrl_jax.report.figures.recovery import methods, pairs, planned, refreshed, rolled_back
from mdrl_jax.report.folder import Records

Item = Figure | Table
Builder = Callable[[Records], Item | Sequence[Item]]


@dataclasses.dataclass(frozen=True)
class Section:
    """A section of the page.

    Attributes:
      id: anchor of the section.
      title: its heading.
      lead: one or two sentences on the question that the section answers.
      builders: functions that make the figures and tables that it shows.
      details: functions that make further ones, which the page folds until a reader opens them.
    """

    id: str
    title: str
    lead: str
    builders: tuple[Builder, ...]
    details: tuple[Builder, ...] = ()


LAST_EVIDENCE = "gradients"
SECTIONS = (
    Section(
        "scores",
        "Scores",
        "How much each stage raised the score of its own domain, and how it changed the scores of the others, on "
        "held-out prompts.",
        (scores.matrix, scores.paths, scores.transfer),
    ),
    Section(
        "recovery",
        "Recovery and prevention",
        "How much of a lost score each method recovers or keeps, how much it costs the other domains and in compute, "
        "and how well the planner forecast it.",
        (
            methods.best_average,
            methods.frontier,
            methods.comparison,
            pairs.against_delay,
            pairs.table,
            refreshed.curves,
            rolled_back.sweep,
            planned.plan,
        ),
        (
            refreshed.contraction,
            rolled_back.at_equal_loss,
            rolled_back.fractions,
            planned.outcomes,
            planned.orders,
        ),
    ),
    Section(
        "damage",
        "Damage: predicted and measured",
        "How much a later edit harms an earlier domain: predicted by a second-order expansion at that domain's peak, "
        "and measured. Never read the second order alone: the gradient need not be 0 where a stage ends, so the first "
        "order counts too.",
        (damage.waterfall, damage.agreement),
        (damage.alphas,),
    ),
    Section(
        "subspace",
        "The conflict subspace",
        "How much of the second-order damage lies in the conflict subspace S, which is spanned by the leading "
        "eigenvectors of the Hessian on the shared route.",
        (subspace.removal, subspace.captured),
        (subspace.spectrum, subspace.ladder),
    ),
    Section(
        "theorem",
        "The contraction theorem",
        "If five assumptions hold, each step of a refresh multiplies the length of θ − θ* in a conflict subspace S by "
        "at most 1 − αμ. Each table has the assumptions, measured on prompts that S was not found on, the factor that "
        "the theorem gives for this run, and the measured factor.",
        (refreshed.theorem,),
    ),
    Section(
        "locality",
        "How local the theory is",
        "The theory expands a domain's loss at its peak. Here several trainings of another domain start at one peak "
        "and move less or more far: how far does one expansion still predict the damage, and how much of it lies in "
        "the leading eigenvectors of the Hessian?",
        (locality.locality,),
    ),
    Section(
        "circuits",
        "Circuits",
        "Which attention heads the base model needs for a domain, and how many of them it still needs after supervised "
        "training and after RL to the same score.",
        (circuits.circuits,),
        (circuits.masks,),
    ),
    Section(
        "edits",
        "Edits",
        "How sparse and how large the edits of the stages are, and which neurons they share.",
        (edits.sparsity, edits.neurons),
        (edits.histogram, edits.ranks),
    ),
    Section(
        "routes",
        "Active routes",
        "Which neurons two domains both activate when they answer (their shared route), and how a later edit acts on "
        "these neurons.",
        (routes.overlap, routes.effects, routes.edit_cosines),
    ),
    Section(
        "gradients",
        "Gradients",
        "In which tensors the gradients of two domains agree and in which they oppose each other. A cosine corrected "
        "for noise is shown only if both gradients are measured reliably.",
        (gradients.cosines, gradients.cancellation),
        (gradients.modules,),
    ),
    Section(
        "training",
        "Training",
        "What the stages learned step by step: mean reward, KL, entropy and length of the completions that were "
        "sampled for each step.",
        (training.curves,),
    ),
    Section(
        "answers",
        "Single answers",
        "Which answers to held-out prompts each stage turned from right to wrong and back, beside what other sampling "
        "keys change alone; and how often one of several answers is right.",
        (answers.headline, answers.shares),
        (answers.lost, answers.pass_at),
    ),
    Section(
        "run",
        "The run",
        "The cost of each stage, the versions of packages, the devices, and the whole configuration.",
        (run.costs, run.analysed, run.versions, run.configuration),
    ),
)
