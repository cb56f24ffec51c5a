"""What the report shows, in order: sections of builders, each a function of the records."""

import dataclasses
from collections.abc import Callable, Sequence

from mdrl_jax.report.figure import Figure, Table
from mdrl_jax.report.figures import (
    damage,
    edits,
    gradients,
    methods,
    planned,
    refreshed,
    rolled_back,
    routes,
    run,
    scores,
    subspace,
)
from mdrl_jax.report.folder import Records

Item = Figure | Table
Builder = Callable[[Records], Item | Sequence[Item]]


@dataclasses.dataclass(frozen=True)
class Section:
    """A part of the page. `lead` says in a sentence or two what the section answers."""

    id: str
    title: str
    lead: str
    builders: tuple[Builder, ...]


SECTIONS = (
    Section(
        "scores",
        "Scores",
        "What each stage gave its own domain and cost the others, on held-out prompts.",
        (scores.matrix, scores.paths, scores.transfer),
    ),
    Section(
        "recovery",
        "Winning it back, and not losing it",
        "What recovery and prevention gained, what they cost the other domains and in time, and what was forecast.",
        (
            methods.frontier,
            methods.comparison,
            refreshed.curves,
            refreshed.contraction,
            rolled_back.sweep,
            rolled_back.at_equal_loss,
            rolled_back.fractions,
            planned.plan,
            planned.outcomes,
            planned.orders,
        ),
    ),
    Section(
        "damage",
        "Damage: predicted and measured",
        "A later edit's harm to an earlier domain, expanded at that domain's peak and measured with fresh samples. "
        "Never read the second order alone: a stage need not end where the gradient is 0.",
        (damage.waterfall, damage.agreement, damage.alphas),
    ),
    Section(
        "subspace",
        "The conflict subspace",
        "How much of the second-order damage the leading eigenvectors of the Hessian on the shared route hold.",
        (subspace.captured, subspace.spectrum, subspace.ladder),
    ),
    Section(
        "edits",
        "Edits",
        "How sparse and how large the edits of the stages are, and which neurons they share.",
        (edits.histogram, edits.sparsity, edits.ranks, edits.neurons),
    ),
    Section(
        "routes",
        "Active routes",
        "Which neurons domains share when they answer, and what a later edit does there.",
        (routes.overlap, routes.effects, routes.edit_cosines),
    ),
    Section(
        "gradients",
        "Gradients",
        "Where domains pull together and where apart; a cosine is shown only where its noise allows one.",
        (gradients.cosines, gradients.modules, gradients.cancellation),
    ),
    Section(
        "run",
        "The run",
        "What it took, with what it was made, and the whole configuration.",
        (run.costs, run.versions, run.configuration),
    ),
)
