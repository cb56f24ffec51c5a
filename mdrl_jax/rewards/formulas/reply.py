r"""Finds the final answer in a reply.

The answer is the first of these that the reply has:

1. the content of its last box: `\boxed{...}` or `\fbox{...}`, the outermost if boxes are nested;
2. the statement after its last `####` (GSM8K, arXiv 2110.14168), up to the end of the line or sentence;
3. the statement after its last "answer is", "answer:", "correct option is" or `<answer>`, up to the same ends;
4. if a number is wanted, the last number, with the calculation or formula that it stands in; else the last formula, or
   the whole reply if there is none.

What stands within `<think>...</think>` is no answer. A reply that never ends its thinking is read as an empty one.
Empty boxes do not count. Where the last box is cut off, rule 4 finds nothing. Three rules keep a reply from naming
several answers and being paid for one of them:

- Answers joined by "or" are one answer, "5 or 6": boxes with only "or", "and" or a comma between them, a box with a
  number beside it ("5 or \boxed{6}"), and numbers in a statement. Boxes in different sentences are not joined; the last
  one counts.
- What the reply denies or asks is no answer: "not \boxed{5}", "\boxed{5} is wrong", "the wrong answer is 5", "5?". A
  number that bounds the answer ("at least 5", "x > 5"), counts something in the text ("step 5") or is part of a formula
  (`\frac{1}{5}`, "(3, 5)", "half of 5") is none either.
- A statement that is taken back ("5. No, wait, 6.") is replaced by what follows.
"""

import re

from mdrl_jax.rewards.formulas.boxes import WINDOW, boxed_answer, boxes, last_span, without_denied_boxes
from mdrl_jax.rewards.formulas.prose import last_number

_MARKER = re.compile(
    r"<answer>|\b(?:answers?|(?:correct|right|best) (?:option|choice))\b[\s*_]{0,4}(?::|=|\b(?:is|are|was"
    r"|would be|will be|should be|must be|equals|comes to)\b)",
    re.IGNORECASE,
)
_RETRACTION = re.compile(
    r"(?:[.,;!?—–-]|\s-|\n)\s*(?:oh\s|oops|hmm|sorry|no\b,|no\b[.:!—-]|no wait|wait\b|actually\b|correction\b|"
    r"scratch\b|i mean\b|rather\b|or rather\b|let me correct)[\s,.:;!—–-]*",
    re.IGNORECASE,
)
_DENIED_MARKER = re.compile(
    r"\b(?:wrong|incorrect|false|[a-z]*n['’]t\s(?:think|believe|say|mean)(?:\sthat)?|(?:doubt|deny)\sthat"
    r"|unsure|unclear|whether|(?:know|say|tell)\sif|not\s(?:think|believe|say|mean)"
    r"(?:\sthat)?|false\sthat|if|unless)\s(?:the\s)?(?:final\s|correct\s)?$",
    re.IGNORECASE,
)
_STATEMENT_END = re.compile(r"[.!?](?=\s|$)|,\s|\n")
_BOX_LABEL = re.compile(
    r"(\\text(?:bf|rm|it)?\s?\{\s*)?(?:so |thus |therefore,? |hence )?(?:the |my )?(?:final |correct )?"
    r"answer\s*(?:is\b:?|:|=)\s*(\})?",
    re.IGNORECASE,
)
_SPECIAL_TOKENS = re.compile(
    r"(?:\s|</s>|<\|[a-zA-Z_]+\|>|<eos>|<end_of_turn>|\\n|:-?\)|[✓✔✅☑]|[\U0001f300-\U0001faff])+$"
)
_SENTENCE_END = re.compile(
    r"</answer>|(?:\s--|\s?—|;)\s(?=[a-z])(?!or\b|and\b|maybe|perhaps|possibly|alternatively|but\b|no\b|not\b"
    r"|also\b|else)|(?<![ap]\.m)\.(?=[\s*\"”')]|$)|[!?]+(?=\s*$|\s+[A-Z*])|\n\s*\n"
)
_REASON = re.compile(
    r",?\s\(?(?:since|because|as\s+(?:we|the|it|required|desired|shown)|which|by the|rather than|"
    r"instead of|and we are done)\b|\s\(not\b|,\s(?:and\s)?not\b"
)
_FILLERS = re.compile(
    r"(?:(?:therefore|thus|hence|so|then|now|simply|just|exactly|precisely|clearly|indeed|obviously|definitely|finally|"
    r"equal|equals|to|given|by|is|are|be|that|the|an|a total of|a|number|integer|value|it|its|we|get|gets|have|has|had|"
    r"obtain|find|there|she|he|they|you|must|option|approximately|about|around|roughly|found|equivalently|"
    r"of course|namely|i\.e\.|found to be|following|final|result)\b[\s,:*_]*)+",
    re.IGNORECASE,
)  # fmt: skip
_DENIAL = re.compile(r"\b(?:is|are|was)\s(?:wrong|incorrect|false|impossible)\b|\((?:wrong|incorrect)\b", re.IGNORECASE)
_FOLLOWS = re.compile(r"(?:given\s+|as\s+)?(?:follows?|below|following)?\s*[:.]?\s*", re.IGNORECASE)
_BEFORE_STATEMENT = " \t\r\n:*_=`"
_LETTER_UNIT = re.compile(r"(?<=[0-9]) ([mgsLJWNV])(?=[.,]?$)")


def after_thinking(completion: str) -> str:
    """Returns the reply after its last `</think>`; "" if a `<think>` follows, because it then never ends its thinking.

    A reply without these marks is returned whole. At the end, white space, end-of-text tokens such as `</s>`, check
    marks and emoji are removed.
    """
    tail = completion.rpartition("</think>")[2].rstrip()
    if "<think>" in tail:
        return ""
    cut = max(0, len(tail) - WINDOW)
    return tail[:cut] + _SPECIAL_TOKENS.sub("", tail[cut:])


def extract(completion: str, number: bool) -> list[str]:
    """Returns the final answer of a reply, by the rules in the module's docstring.

    Args:
      completion: the reply.
      number: whether the right answer is a number (rule 4).

    Returns:
      The answer, and at most two further spellings of it with more of the words around it, which may repeat it. Only
      the first is to be read as a formula; the others serve to compare texts. [] if the reply has no answer; but [""]
      for a blank reply, or one that never ends its thinking, without `number`, because rule 4 then takes the whole
      reply.
    """
    text = without_denied_boxes(after_thinking(completion))
    if (boxed := boxed_answer(text)) is not None:
        boxed = boxed.strip()
        label = _BOX_LABEL.match(boxed)
        return [boxed] if label is None else [("" if label[2] else label[1] or "") + boxed[label.end() :], boxed]
    text = _without_denied(text)
    hashes = text.rfind("####")
    markers = [match.end() for match in _MARKER.finditer(text)]
    for start in ([hashes + 4] if hashes >= 0 else []) + markers[-1:]:
        if found := _statement(text[start:], number):
            return found
    if re.search(r"\\(?:boxed|fbox)\s*\{", text[(boxes(text) or [((0, 0), (0, 0))])[-1][0][1] :]):
        return []  # a box that is cut off
    if number:
        last = last_number(text)
        return [last] if last else []
    span = last_span(text)
    return [text if span is None else span]


def _without_denied(text: str) -> str:
    """The text without statements of what is not the answer, "the wrong answer is 5"."""
    kept, start = "", 0
    for match in _MARKER.finditer(text):
        if match.start() >= start and _DENIED_MARKER.search(text[max(0, match.start() - WINDOW) : match.start()]):
            end = _STATEMENT_END.search(text, match.end())
            kept += text[start : match.start()]
            start = end.end() if end else len(text)
    return kept + text[start:]


def _after_pointers(rest: str) -> str:
    """The text without the lines at its start that only point to what follows, such as "as follows:" or "below"."""
    lines = rest.split("\n")
    for i, line in enumerate(lines):
        line = line.lstrip(_BEFORE_STATEMENT)
        if line.startswith(("\\[", "$$")) or (line and not _FOLLOWS.fullmatch(line.strip(" *_"))):
            return "\n".join([line, *lines[i + 1 :]])
    return ""


def _statement(rest: str, number: bool) -> list[str]:
    """The statement at the start of a text, or what replaces it where it is taken back."""
    rest = rest.lstrip(_BEFORE_STATEMENT)
    back = [match.end() for match in _RETRACTION.finditer(rest)]
    if back and re.search(r"[0-9\\$]", rest[back[-1] :]):
        return extract(rest[back[-1] :], number)
    rest = _after_pointers(rest)
    if rest.startswith(("\\[", "$$")):
        close = {"\\": "\\]", "$": "$$"}[rest[0]]
        end = rest.find(close, 2)
        line = rest[: end + 2] if end >= 0 else rest.partition("\n")[0]
    else:
        line = rest.partition("\n")[0]
    line = line[:2000].strip()
    if not line:
        return []
    end = _SENTENCE_END.search(line)
    sentence = line[: end.start()] if end else line
    if end and "?" in end[0]:
        return []
    if again := _MARKER.search(sentence):  # "#### The answer is 5"
        return _statement(sentence[again.end() :], number)
    reason = _REASON.search(sentence)
    denied = reason and re.match(
        r",?\s(?:which|and|since|as) (?:it )?(?:is|was) (?:wrong|incorrect|false)\b", sentence[reason.start() :]
    )
    if reason:
        sentence = sentence[: reason.start()]
    if denied or _DENIAL.search(sentence):
        return []
    sentence = sentence.strip(' *_`"“”')
    if sentence.startswith("'") and sentence.endswith("'"):
        sentence = sentence.strip("'")
    filler = _FILLERS.match(sentence)
    bare = sentence[filler.end() :] if filler else sentence
    bare = _LETTER_UNIT.sub(r" \\text{\1}", bare)
    return [bare or sentence, sentence, line]
