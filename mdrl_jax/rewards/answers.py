r"""Finds the final answer in a reply.

The answer is the first of these that the reply has:

1. the content of its last box: `\boxed{...}` or `\fbox{...}`, the outermost if boxes are nested;
2. the rest of the line after its last `####` (GSM8K, arXiv 2110.14168);
3. the statement after its last "answer is" or "answer:", up to the end of the sentence;
4. if a number is wanted, the last number, with the calculation or formula that it stands in; else the last formula, or
   the whole reply if there is none.

What stands within `<think>...</think>` is no answer. A reply that never ends its thinking has none. Empty boxes do not
count. Two rules keep a reply from naming several answers and being paid for one of them:

- Answers joined by "or" are one answer, "5 or 6": boxes with only "or", "and" or a comma between them, a box with a
  number beside it ("5 or \boxed{6}"), and numbers in a statement. Boxes in different sentences are not joined; the last
  one counts.
- A statement that is taken back ("5. No, wait, 6.") is replaced by what follows.
"""

import re

_BOX = re.compile(r"\\(?:boxed|fbox)\s*(\{)?|\\\\|\\?[{}]")
_JOINER = re.compile(
    r"[\s$*.\\()\[\]]*(?:(?:,|;|/|&|\\quad|\\text\{|\}|\bor\b|\band\b|\beither\b|\balso\b|\belse\b|\bpossibly\b|\bmaybe\b"
    r"|\bperhaps\b|\balternatively\b|\botherwise\b|\bthe\b|\banswer\b|\bis\b|\bit\b|\bcould\b|\bbe\b|\bmight\b)"
    r"[\s$*.\\()\[\],]*)*",
    re.IGNORECASE,
)
_JOINS = re.compile(r"\bor\b|\band\b|[,;/&]|\bmaybe\b|\bperhaps\b|\bpossibly\b|\balternatively\b", re.IGNORECASE)
_OR = re.compile(r"[\s$*\\)\],]*(?:\\text\{\s*)?or\b[^.!?]*$", re.IGNORECASE)
_OR_AFTER = re.compile(
    r"[\s$*\\)\]]{0,9},?\s{0,3}(?:\bor\b|\\text\{\s*or\s*\})\s{0,3}(?:else |maybe |possibly |even )?"
    r"([$\\]{0,2}\(?\s?[-+−]?[\d.\\$][^\s]{0,80})",
    re.IGNORECASE,
)
_OR_BEFORE = re.compile(
    r"([-+−]?[\d.,]*\d|\$[^$]{1,80}\$)\s{0,3},?\s{0,3}or\s{0,3}(?:maybe |possibly )?[$*\\(\[\s]{0,6}$"
)
_MARKER = re.compile(
    r"\banswers?\b[\s*_]{0,4}(?::|=|\b(?:is|are|was|would be|will be|should be|must be|equals|comes to)\b)",
    re.IGNORECASE,
)
_RETRACTION = re.compile(
    r"(?:[.,;!?—–-]|\s-|\n)\s*(?:oh\s|oops|hmm|sorry|no\b,|no\b[.:!—-]|no wait|wait\b|actually\b|correction\b|"
    r"scratch\b|i mean\b|rather\b|or rather\b|let me correct)[\s,.:;!—–-]*",
    re.IGNORECASE,
)
_SENTENCE_END = re.compile(r"(?<![ap]\.m)\.(?=[\s*\"”')]|$)|[!?]+(?=\s*$|\s+[A-Z*])|\n\s*\n")
_REASON = re.compile(
    r",?\s(?:since|because|as\s+(?:we|the|it|required|desired|shown)|which|by the|rather than|"
    r"instead of|and we are done)\b|,\s(?:and\s)?not\b"
)
_FILLERS = re.compile(
    r"(?:(?:therefore|thus|hence|so|then|now|simply|just|exactly|precisely|clearly|indeed|obviously|definitely|finally|"
    r"equal|equals|to|given|by|is|are|be|that|the|an|a total of|a|number|integer|value|it|its|we|get|gets|have|has|had|"
    r"obtain|find|there|she|he|they|you|must|option|approximately|found|equivalently|of course|namely|i\.e\.|"
    r"found to be|following|final|result)\b[\s,:*_]*)+",
    re.IGNORECASE,
)  # fmt: skip
_FOLLOWS = re.compile(r"(?:given\s+|as\s+)?(?:follows?|below|following)?\s*[:.]?\s*", re.IGNORECASE)
_SPANS = (("$", "$"), ("\\(", "\\)"), ("\\[", "\\]"))
_LETTER_UNIT = re.compile(r"(?<=[0-9]) ([mgsLJWNV])(?=[.,]?$)")

_DIGITS = r"(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)(?:\.[0-9]+)?|\.[0-9]+"
_ONE = rf"\\?[$£€¥]?(?:{_DIGITS})(?:[eE][-+]?[0-9]+)?[%!°]?"
_SIGN = r"(?:(?<![\w.)%])[-+−](?=[$.0-9])|(?<![\w.)%])(?<![\w.)%]\s)[-+−]\s)?"  # "5 - 3" has no sign, "is -3" has
# A number and the calculation before it. GSM8K writes "5+3 = <<5+3=8>>8".
_NOTE = r"\$?(?:<<[^<>]*>>)?"
_SIGN_BETWEEN = r"[-+*/×·÷^=−–]|\*\*|\sx(?=\s)|(?<=[0-9])x(?=[0-9])"
_RUN = re.compile(
    rf"{_SIGN}{_ONE}(?:\s?{_NOTE}\s?(?:{_SIGN_BETWEEN})\s?{_NOTE}[-−]?{_ONE}"
    rf"|\s[0-9]+/[0-9]+|[¼½¾]|(?<=[0-9]),[0-9]+)*"
)
_NEXT_WORD = re.compile(r"(\s?)([^\W\d_]+|[\^_²³π√])")
_OPEN_BEFORE = re.compile(  # what stands before a number that is one of several, or no answer by itself
    r"\b(?:maybe|perhaps|possibly|not|isn't|never)\s(?:equal to\s|be\s|is\s)?(?:[a-zA-Z]\s?=\s?)?$"
    r"|(?:[0-9%]|\b(?:one|two|three|four|five|six|seven|eight|nine|ten)\b)\s*[^\W\d_]{0,12}\s?,?\s?"
    r"(?:\bor\b|\bto\b)\s(?:else\s)?(?:[a-zA-Z]\s?=\s?)?$"
    r"|[0-9],?\s?(?:and|&)\s$|\bbetween\s+\S+\s+and\s$|\b(?:sqrt|log|ln|sin|cos|tan|exp|abs|f|g)\s?\(?$"
    r"|[√\^_\\]\s?$|[0-9]\s?[–:]\s?$",
    re.IGNORECASE,
)
_OPERATION_BEFORE = re.compile(r"[\w)%]\s*[-+*/×·÷–−]\s*\$?$|\sx\s\$?$|[0-9a-z]\)$")
_NUMERALS = "one two three four five six seven eight nine ten eleven twelve twenty thirty forty fifty hundred".split()
_MULTIPLES = frozenset("hundred thousand million billion trillion dozen percent".split())
_CHANGE_AFTER = frozenset(
    "half halves thirds quarters fourths fifths sixths tenths hundredths squared cubed factorial or pi mod".split()
)
_GLUED_UNITS = frozenset("cm mm km kg mg ml mb gb kb ft am pm lb lbs oz st nd rd th mph hrs hr min sec".split())
_WINDOW = 120  # characters before and after a number or a box that are looked at


def after_thinking(completion: str) -> str:
    """Returns the reply after its last `</think>`; "" if it starts thinking and never ends."""
    tail = completion.rpartition("</think>")[2]
    return "" if "<think>" in tail else tail


def last_boxed(text: str) -> str | None:
    r"""Returns the content of the last `\boxed{...}` or `\fbox{...}` whose braces balance; None if there is none.

    Of nested boxes it is the outermost. `\boxed 5` boxes the next character.
    """
    found = boxes(text)
    return text[slice(*found[-1][1])] if found else None


def boxes(text: str) -> list[tuple[tuple[int, int], tuple[int, int]]]:
    """All outermost boxes of a text, as (start, end) of the whole box and (start, end) of its content."""
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
    """Returns the content of the formula (`$...$` or LaTeX brackets) that ends last; None if there is none."""
    best = _last_span(text)
    return None if best is None else text[slice(*best)]


def _last_span(text: str) -> tuple[int, int] | None:
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


def extract(completion: str, number: bool) -> list[str]:
    """Returns the final answer of a reply, by the rules in the module's docstring.

    Args:
      completion: the reply.
      number: whether the right answer is a number.

    Returns:
      The answer, and further spellings of it with more of the words around it. Only the first is to be read as a
      formula; the others serve to compare texts. [] if the reply has no answer.
    """
    text = after_thinking(completion)
    if (boxed := _boxed_answer(text)) is not None:
        return [boxed]
    hashes = text.rfind("####")
    markers = [match.end() for match in _MARKER.finditer(text)]
    for start in ([hashes + 4] if hashes >= 0 else []) + markers[-1:]:
        if found := _statement(text[start:], number):
            return found
    if re.search(r"\\boxed\s*\{", text[(boxes(text) or [((0, 0), (0, 0))])[-1][0][1] :]):
        return []  # a box that is cut off
    if number:
        last = _last_number(text)
        return [last] if last else []
    span = last_span(text)
    return [text if span is None else span]


def _boxed_answer(text: str) -> str | None:
    """The content of the last box, with the answers that are joined to it; None if there is no box."""
    found = [box for box in boxes(text) if text[slice(*box[1])].strip(" ~\\,;")]
    if not found:
        return None
    parts, joiners = [text[slice(*found[-1][1])]], ""
    for (earlier, content), (later, _) in zip(found[-2::-1], found[:0:-1], strict=True):
        between = text[earlier[1] : later[0]]
        if len(between) > _WINDOW or not (
            _OR.match(between) or (_JOINER.fullmatch(between) and _JOINS.search(between))
        ):
            break
        parts.insert(0, text[slice(*content)])
        joiners += between
    start, end = found[-1][0]
    if match := _OR_AFTER.match(text[end : end + _WINDOW]):
        parts, joiners = [*parts, match[1]], joiners + "or"
    elif len(parts) == 1 and (match := _OR_BEFORE.search(text[max(0, start - _WINDOW) : start])):
        parts, joiners = [match[1], *parts], "or"
    if len(parts) == 1:
        return parts[0]
    sign = " \\text{ and } " if re.search(r"\band\b|,", joiners) and "or" not in joiners else " \\text{ or } "
    return sign.join(part.replace("$", "").rstrip(".") for part in parts)


def _statement(rest: str, number: bool) -> list[str]:
    """The statement at the start of a text, or what replaces it where it is taken back."""
    rest = rest.lstrip(" \t\r\n:*_=")
    back = [match.end() for match in _RETRACTION.finditer(rest)]
    if back and re.search(r"[0-9\\$]", rest[back[-1] :]):
        return extract(rest[back[-1] :], number)
    if rest.startswith(("\\[", "$$")):
        close = {"\\": "\\]", "$": "$$"}[rest[0]]
        end = rest.find(close, 2)
        line = rest[: end + 2] if end >= 0 else rest.partition("\n")[0]
    else:
        line, _, following = rest.partition("\n")
        if line and _FOLLOWS.fullmatch(line.strip(" *_")):
            return _statement(following, number)
    line = line[:2000].strip()
    if not line:
        return []
    end = _SENTENCE_END.search(line)
    sentence = line[: end.start()] if end else line
    if again := _MARKER.search(sentence):  # "#### The answer is 5"
        return _statement(sentence[again.end() :], number)
    if reason := _REASON.search(sentence):
        sentence = sentence[: reason.start()]
    sentence = sentence.strip(' *_`"“”')
    filler = _FILLERS.match(sentence)
    bare = sentence[filler.end() :] if filler else sentence
    bare = _LETTER_UNIT.sub(r" \\text{\1}", bare)
    return [bare or sentence, sentence, line]


def _last_number(text: str) -> str:
    """The last number of a text with the calculation it stands in; "" if there is none, or it is one of several."""
    if formula := _last_formula(text):
        return formula
    end = _digits_end(text)
    runs = list(_RUN.finditer(text, max(0, text.rfind("\n", 0, end) + 1, end - 1000)))
    if not runs:
        return ""
    run = runs[-1]
    before = text[max(0, run.start() - _WINDOW) : run.start()]
    bare = before.rstrip("$£€¥\\*(")
    if _OPEN_BEFORE.search(bare if bare.endswith(" ") else before):
        return ""
    number = re.sub(r"<<[^<>]*>>|\\?[$£€¥]", "", run[0]).removesuffix("!")  # in prose "!" is an exclamation mark
    if _OPERATION_BEFORE.search(before.rpartition("\n")[2]):  # "60 g * 4/5 = 48": the calculation starts before the run
        start, sign, number = number.rpartition("=")
        if not sign and before.rstrip("$ ").endswith(tuple("*/×·÷+-−–)x")):
            return ""
        number = number or start
    return _with_next_word(number, text[run.end() : run.end() + _WINDOW])


def _last_formula(text: str) -> str:
    """The last formula, if the last number of the text stands in it and it has no words; else ""."""
    span = _last_span(text)
    if span is None or re.search("[0-9]", text[span[1] :]) or not re.search("[0-9]", text[slice(*span)]):
        return ""
    formula = text[slice(*span)]
    if re.search(r"(?<![\\a-zA-Z{])[a-zA-Z]{3,}", formula):
        return ""
    word = _NEXT_WORD.match(text[span[1] : span[1] + _WINDOW].lstrip("$\\)]"))
    return f"{formula} {word[2]}" if word and word[2].lower() in _MULTIPLES else formula


def _with_next_word(number: str, after: str) -> str:
    """A number, with the word after it if that multiplies it; "" if the word changes the number in another way."""
    match = _NEXT_WORD.match(after)
    if match is None:
        return number
    word, glued = match[2].lower(), not match[1]
    if word in _MULTIPLES:
        return f"{number} {word}"
    letter = len(word) == 1 and match[2] not in "mgsLaAJWNVhI"
    variables = glued and len(word) < 3 and word not in _GLUED_UNITS and match[2] not in "mgsLhWNVJ"
    to_another = word == "to" and after[match.end() :].split()[:1] and after[match.end() :].split()[0] in _NUMERALS
    return "" if word in _CHANGE_AFTER or word in "^_²³π√" or letter or variables or to_another else number


def _digits_end(text: str) -> int:
    """Where the last digit of a text stands."""
    return next((i for i in range(len(text) - 1, -1, -1) if text[i] in "0123456789"), 0)
