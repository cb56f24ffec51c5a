"""Finds boxes and formulas in a reply."""

import re

WINDOW = 120  # characters before and after a number or a box that are looked at
_BOX = re.compile(r"\\(?:boxed|fbox)\s*(\{)?|\\\\|\\?[{}]")
_JOINER = re.compile(
    r"[\s$*.\\()\[\]]*(?:(?:,|;|/|&|\||\bvs\b|\bversus\b|\\quad|\\text\{|\}|\bor\b|\band\b|\beither\b|\balso\b"
    r"|\belse\b|\bpossibly\b|\bmaybe\b|\bperhaps\b|\balternatively\b|\botherwise\b|\bthe\b|\banswer\b"
    r"|\bis\b|\bit\b|\bcould\b|\bbe\b|\bmight\b)"
    r"[\s$*.\\()\[\],]*)*",
    re.IGNORECASE,
)
_JOINS = re.compile(
    r"\bor\b|\band\b|[,;/&|]|\bvs\b|\bversus\b|\bmaybe\b|\bperhaps\b|\bpossibly\b|\balternatively\b", re.IGNORECASE
)
_OR = re.compile(r"[\s$*\\)\],—–-]*(?:\\text\{\s*)?or\b[^.!?]*$", re.IGNORECASE)
_OR_AFTER = re.compile(
    r"[\s$*\\)\]]{0,9},?\s{0,3}(?:\bor\b|\\text\{\s*or\s*\})\s{0,3}(?:else |maybe |possibly |even )?"
    r"([$\\]{0,2}\(?\s?[-+−]?[\d.\\$][^\s]{0,80}|\(?[A-J]\b"
    r"|(?:yes|no|true|false|even|odd|zero|one|two|three|four|five|six|seven|eight|nine|ten|eleven|twelve)\b)",
    re.IGNORECASE,
)
_OR_BEFORE = re.compile(
    r"([-+−]?[\d.,]*\d|\$[^$]{1,80}\$|\b(?:[A-J]|yes|no|true|false|even|odd"
    r"|zero|one|two|three|four|five|six|seven|eight|nine|ten|eleven|twelve))"
    r"\s{0,3},?\s{0,3}or\s{0,3}(?:maybe |possibly )?[$*\\(\[\s]{0,6}$"
)
_DENIED_BEFORE = re.compile(
    r"(?:\bnot|n't|n’t|\bnever|\bcannot|\bnor|\bneither)\s(?:(?:be|equal|to|equal to)\s)*[\s$*\\(\[:]*$", re.IGNORECASE
)
DENIED_AFTER = re.compile(
    r"[\s$*\\)\].,]{0,9}(?:,?\s?which\s)?(?:(?:is|are|was|would be)(?:\s+(?:the |a |an )?"
    r"(?:wrong|incorrect|false|impossible)\b"
    r"|(?:n['’]t|\s+not|\s+never)\s(?:the\s)?(?:right|correct|final|answer|solution|possible|valid|it)\b)"
    r"|cannot\sbe\b|can['’]t\sbe\b|could\snot\sbe\b|\((?:wrong|incorrect)\b|\?)",
    re.IGNORECASE,
)
_SPANS = (("$", "$"), ("\\(", "\\)"), ("\\[", "\\]"))


def last_boxed(text: str) -> str | None:
    r"""Returns the content of the last `\boxed{...}` or `\fbox{...}` whose braces balance; None if there is none.

    Of nested boxes it is the outermost. `\boxed 5` boxes the next character, unless that is white space, a brace, a
    backslash or a dollar sign. The content is not stripped, and is "" for an empty box.
    """
    found = boxes(text)
    return text[slice(*found[-1][1])] if found else None


def boxes(text: str) -> list[tuple[tuple[int, int], tuple[int, int]]]:
    """All outermost boxes of a text whose braces balance, in order.

    Returns:
      For each box ((start, end) of the whole box, (start, end) of its content without the braces). The ends are
      exclusive, as in slices. Empty boxes are among them.
    """
    closed: list[tuple[tuple[int, int], tuple[int, int]]] = []
    open_braces: list[tuple[int, int] | None] = []  # (start, start of the content) of a box; None for another brace
    for match in _BOX.finditer(text):
        token = match[0]
        if token == "{":
            open_braces.append(None)
        elif token == "}":
            start = open_braces.pop() if open_braces else None
            if start is not None:
                while closed and closed[-1][0][0] > start[0]:
                    closed.pop()
                closed.append(((start[0], match.end()), (start[1], match.start())))
        elif match[1]:
            open_braces.append((match.start(), match.end()))
        elif token.startswith(("\\boxed", "\\fbox")) and match.end() < len(text) and match.end() > match.start() + 5:
            if not text[match.end()].isspace() and text[match.end()] not in "{}\\$":
                closed.append(((match.start(), match.end() + 1), (match.end(), match.end() + 1)))
    return closed


def last_span(text: str) -> str | None:
    """Returns the content of the formula (`$...$`, `$$...$$` or LaTeX brackets) that ends last; None if there is none.

    The content is not stripped. `span_at_end` says which formulas are looked at.
    """
    best = span_at_end(text)
    return None if best is None else text[slice(*best)]


def span_at_end(text: str) -> tuple[int, int] | None:
    """Where the formula that ends last starts and ends, without its dollar signs or brackets; None if there is none.

    Of each kind of sign (dollar signs, round and square LaTeX brackets) only the last formula is looked at, and only if
    it is not blank. The end is exclusive.
    """
    best: tuple[int, int] | None = None
    for left, right in _SPANS:
        end = text.rfind(right)
        if left == "$" and text.startswith("$", end - 1) and end > 0:  # $$...$$
            left = right = "$$"
            end -= 1
        start = text.rfind(left, 0, max(end, 0))
        if start >= 0 and text[start + len(left) : end].strip() and (best is None or end > best[1]):
            best = start + len(left), end
    return best


def without_denied_boxes(text: str) -> str:
    """The text without boxes that it denies: "not \\boxed{5}", "\\boxed{5} is wrong". A space takes their place.

    The words that deny a box stand beside it, within 120 characters.
    """
    kept: list[str] = []
    done = 0
    for (start, end), _ in boxes(text):
        if _denied(text, start, end):
            kept += [text[done:start], " "]
            done = end
    return "".join([*kept, text[done:]])


def _denied(text: str, start: int, end: int) -> bool:
    """Whether the words around a part of a text say that it is not the answer."""
    before, after = text[max(0, start - WINDOW) : start], text[end : end + WINDOW]
    return _DENIED_BEFORE.search(before) is not None or DENIED_AFTER.match(after) is not None


def boxed_answer(text: str) -> str | None:
    """The content of the last box, with the answers that are joined to it; None if there is no box.

    Blank boxes do not count. Answers are joined to a box as `reply.py` says: by "or", "and" or a comma between boxes,
    or by "or" beside one box. The result then has all of them in order, without dollar signs, with a LaTeX "or" or
    "and" between them. A single content is returned as it stands.
    """
    found = [box for box in boxes(text) if text[slice(*box[1])].strip(" ~\\,;")]
    if not found:
        return None
    parts, joiners = [text[slice(*found[-1][1])]], ""
    for (earlier, content), (later, _) in zip(found[-2::-1], found[:0:-1], strict=True):
        between = text[earlier[1] : later[0]]
        if len(between) > WINDOW or not (_OR.match(between) or (_JOINER.fullmatch(between) and _JOINS.search(between))):
            break
        parts.insert(0, text[slice(*content)])
        joiners += between
    start, end = found[-1][0]
    if match := _OR_AFTER.match(text[end : end + WINDOW]):
        parts, joiners = [*parts, match[1]], joiners + "or"
    elif len(parts) == 1 and (match := _OR_BEFORE.search(text[max(0, start - WINDOW) : start])):
        parts, joiners = [match[1], *parts], "or"
    if len(parts) == 1:
        return parts[0]
    sign = " \\text{ and } " if re.search(r"\band\b|,", joiners) and "or" not in joiners else " \\text{ or } "
    return sign.join(part.replace("$", "").rstrip(".") for part in parts)
