"""Finds boxes and formulas in a reply."""

import re

WINDOW = 120  # characters before and after a number or a box that are looked at
_BOX = re.compile(r"\\(?:boxed|fbox(?![a-zA-Z]))\s*(\{)?|\\\\|\\?[{}]")
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
_MARK = re.compile(r"\\.|\$\$?", re.DOTALL)  # the signs that start and end formulas, and escaped characters
_OPENING = {"$": ("$", "$$"), "$$": ("$$",), "\\)": ("\\(",), "\\]": ("\\[",)}


def last_boxed(text: str) -> str | None:
    r"""Returns the content of the last `\boxed{...}` or `\fbox{...}` whose braces balance; None if there is none.

    Of nested boxes it is the outermost. `\boxed 5` boxes the next character, as `boxes` says. The content is not
    stripped, and is "" for an empty box.
    """
    found = boxes(text)
    return text[slice(*found[-1][1])] if found else None


def boxes(text: str) -> list[tuple[tuple[int, int], tuple[int, int]]]:
    r"""All outermost boxes of a text, `\boxed{...}` and `\fbox{...}`, whose braces balance, in order.

    A box without braces, `\boxed 5` or `\fbox5`, has the next character, unless that is white space, a brace, a
    backslash or a dollar sign. `\fbox` right before a letter, as in `\fboxsep`, is another command.

    Returns:
      For each box ((start, end) of the whole box, (start, end) of its content without the braces). The ends are
      exclusive, as in slices. Empty boxes are among them. [] if there are none.
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
        elif token.startswith(("\\boxed", "\\fbox")) and match.end() < len(text):
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
    it is not blank. An escaped sign is none: neither the dollar sign of `\\$5` nor the bracket after the line break
    `\\\\`. A single dollar sign before a number, "$5", may start a formula, but ends none. Other prices in dollar signs
    are taken for formulas. The end is exclusive.
    """
    marks = [match.span() for match in _MARK.finditer(text)]
    best: tuple[int, int] | None = None
    for closing in (("$", "$$"), ("\\)",), ("\\]",)):
        last = next((k for k in reversed(range(len(marks))) if _closes(text, marks[k], closing)), None)
        if last is None:
            continue
        end, opening = marks[last][0], _OPENING[text[slice(*marks[last])]]
        start = next((m[1] for m in reversed(marks[:last]) if text[slice(*m)] in opening), None)
        if start is not None and text[start:end].strip() and (best is None or end > best[1]):
            best = start, end
    return best


def _closes(text: str, mark: tuple[int, int], closing: tuple[str, ...]) -> bool:
    """Whether a mark is one of the closing ones, and no dollar sign of a price."""
    sign = text[slice(*mark)]
    return sign in closing and not (sign == "$" and re.match(r"\.?[0-9]", text[mark[1] : mark[1] + 2]))


def without_denied_boxes(text: str) -> str:
    """The text without boxes that it denies or asks: "not \\boxed{5}", "\\boxed{5} is wrong", "\\boxed{5}?".

    A space takes the place of such a box; the words that deny it stay. They stand right before or after the box.
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

    Blank boxes do not count. What is joined to the last box, within 120 characters:

    - the box before it, and so on, if between the two an "or" comes first, in the same sentence, or only signs and
      words that join: "or", "and", "maybe" and the like, a comma, a semicolon, a slash, "&" or "|";
    - a number, a capital letter up to J or a word such as "yes" or "five" that follows the last box after an "or";
    - the same, or a formula in dollar signs, before an "or" that precedes the box, if nothing else is joined.

    The result then has all of them in order, without dollar signs and periods at their ends, with `\\text{ and }`
    between all of them if "and" or a comma joins some and "or" none, else with `\\text{ or }`. A single content is
    returned as it stands.
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
