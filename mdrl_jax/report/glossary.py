"""Terms of the report in plain words, and the markup of texts that contain them."""

import re
from collections.abc import Callable

from markupsafe import Markup, escape

TERMS = {
    "lift": "The score of a domain after its own stage minus its score where that stage started, in points.",
    "peak": "The end of the last stage that trained a domain alone, and the domain's score there.",
    "fall": "The score of a domain after its own stage minus its score after the last training stage. Above 0 is harm.",
    "forgetting": "The highest earlier score of a domain minus its score after the last training stage. The maximum of "
    "noisy scores is biased up, so fall is the figure to quote.",
    "BWT": "Backward transfer: the mean, over the domains trained before the last stage, of their score after the last "
    "stage minus their score after their own. Below 0 is harm.",
    "FWT": "Forward transfer: the mean, over all trained domains but the first, of what a domain had gained over θ_0 "
    "before its own stage. θ_0 is the model that the sequence starts from.",
    "intransigence": "The score of a domain after joint training minus its score after its own stage.",
    "collateral": "The largest drop of any other domain through a recovery. Below 0, every other domain rose.",
    "recovery fraction": "What a recovery won back, as a share of what the domain had lost since its peak.",
    "refresh": "A short training on a domain that had been lost, from the end of the sequence.",
    "rollback": "Without training, a part of a later stage's edit is taken back on chosen coordinates.",
    "edit": "The change of the parameters through a stage, written δ.",
    "damage": "The rise of a domain's loss from its peak to the end of a later stage. Above 0 is harm.",
    "success NLL": "−log π of completions that succeeded at the domain's peak, summed over tokens, in nats.",
    "route": "The 10 % most active MLP neurons, or attention heads, of each layer on a domain's own completions. The "
    "shared route of two domains is what both have in common.",
    "S": "The conflict subspace of two domains: spanned by leading eigenvectors of the Hessian of the earlier domain's "
    "loss on the shared route. P_S projects onto it.",
    "null": "The value, or the central 95 % of values, by chance.",
}
# Longer terms come first, so that "recovery fraction" is not taken apart. A plural links to its term.
_FOUND = re.compile(
    r"`([^`]+)`|\b(" + "|".join(map(re.escape, sorted(TERMS, key=len, reverse=True))) + r")(s?)(?![\w-])(?!@)"
)


def anchor(term: str) -> str:
    """The name of a term's entry in the list of terms, for example "term-recovery-fraction"."""
    return "term-" + term.replace(" ", "-")


def marker() -> Callable[[str], Markup]:
    """A function that turns a text into HTML.

    Each term links to its entry and has its meaning as a title, at its first occurrence in all texts of one marker. A
    part between backticks becomes code. All other text is escaped.
    """
    seen: set[str] = set()

    def mark(text: str) -> Markup:
        made, at = Markup(), 0
        for found in _FOUND.finditer(text):
            made += escape(text[at : found.start()])
            at = found.end()
            code, term, plural = found.groups()
            before = text[found.start() - 1 : found.start()]
            if code:
                made += Markup("<code>{}</code>").format(code)
            elif term in seen or before in ("-", "_", "/") or (plural and term == "S"):
                made += escape(found[0])
            else:
                seen.add(term)
                made += Markup('<a class="term" href="#{}" title="{}">{}</a>').format(
                    anchor(term), TERMS[term], found[0]
                )
        return made + escape(text[at:])

    return mark
