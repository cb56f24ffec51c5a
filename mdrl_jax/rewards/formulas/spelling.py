"""Brings a text to one spelling of each sign."""

import re
import unicodedata

_GLYPHS = {
    "−": "-", "–": "-", "—": "-", "‐": "-", "‑": "-", "×": r"\times ", "·": r"\times ", "⋅": r"\times ",
    "∙": r"\times ",
    "÷": r"\div ", "∕": "/", "⁄": "/", "≤": r"\le ", "≥": r"\ge ", "≠": r"\ne ", "≈": r"\approx ", "∞": r"\infty ",
    "π": r"\pi ", "±": r"\pm ", "∓": r"\mp ", "√": r"\sqrt ", "°": r"^\circ ", "∪": r"\cup ", "∩": r"\cap ",
    "∈": r"\in ", "∅": r"\emptyset ", "∫": r"\int ", "∑": r"\sum ", "∏": r"\prod ", "θ": r"\theta ", "α": r"\alpha ",
    "β": r"\beta ", "ℝ": r"\mathbb{R}", "ℤ": r"\mathbb{Z}", "∖": r"\backslash ", "〈": r"\langle ", "〉": r"\rangle ",
    "⟨": r"\langle ", "⟩": r"\rangle ", "⌊": r"\lfloor ", "⌋": r"\rfloor ", "⌈": r"\lceil ", "⌉": r"\rceil ",
    "\xa0": " ", "\u2009": " ", "\u202f": " ", "’": "'", "′": "'", "…": r"\ldots ", "％": "%", "＄": "$",
    "¼": r"\frac{1}{4}", "½": r"\frac{1}{2}", "¾": r"\frac{3}{4}", "ℯ": "e",
}  # fmt: skip
_SUPERSCRIPTS = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁻ⁿ", "0123456789-n")
_SUBSCRIPTS = str.maketrans("₀₁₂₃₄₅₆₇₈₉", "0123456789")
_FULL_WIDTH = {code: code - 0xFEE0 for code in range(0xFF01, 0xFF5F)} | {ord("。"): ".", ord("、"): ","}
_SPACING = re.compile(
    r"\\(?:left|right|[bB]igg?[lrm]?|displaystyle|textstyle|large|Large|LARGE|huge|Huge|small|rm|bf|it|limits|nolimits|protect|strut|mathstrut|!)(?![a-zA-Z])\s?"
)
_COLOR = re.compile(r"\\(?:text)?color\{[a-zA-Z]*\}")
_BLANK = re.compile(r"\\(?:quad|qquad|thinspace|enspace|hspace\{[^{}]*\}|phantom\{[^{}]*\})(?![a-zA-Z])|\\[,;: >]|~")
_DOTTED_THOUSANDS = re.compile(
    r"(?<![0-9.,])([1-9][0-9]{0,2}(?:\.[0-9]{3}){2,})(?:,([0-9]+))?(?![0-9.,])"
)  # 1.234.567,8
_NEGATIVE = re.compile(r"\b(?:minus|negative)\s+(?=\\?[$£€¥₹]?[0-9.])", re.IGNORECASE)
_RUPEES = re.compile(r"\\text\s?\{\s*Rs\.?\s*\}\s*(?=[0-9])|\bRs\.?\s?(?=[0-9])")
_CHOOSE = re.compile(r"\{([^{}]*)\\choose(?![a-zA-Z])([^{}]*)\}")
_LINES = re.compile(r"\\begin\{(align(?:ed)?\*?|gathered|split|cases)\}(.*?)\\end\{\1\}", re.DOTALL)
_NO_BRACKET = re.compile(r"\\(?:left|right)\s*\.(?![0-9])")
_LINE_BREAK = re.compile(r"\\\\(?:\s*\[[0-9.]+(?:pt|em|ex|mm)\])?")
_ORDINAL = re.compile(
    r"(?<=[0-9])\s?\^?\s?(?:\{\s?)?(?:\\(?:text|mathrm|textrm)\s?\{\s?)?(st|nd|rd|th)\b(?:\s?\}){0,2}"
)


def clean(text: str) -> str:
    """Returns `text` with one spelling of each sign, as `tokens.tokens` reads it.

    - Unicode signs become LaTeX commands, fractions such as "½" become `\\frac{1}{2}`, raised and lowered digits
      become `^{...}` and `_{...}`, and full-width signs become ASCII.
    - LaTeX's spacing, sizes, colours and brackets around formulas are removed, and so are the asterisks of bold text,
      and backquotes and underscores at the ends. "2**3" stays.
    - Dollar signs are removed, those of several prices too. A single one in the text, or one with a backslash, is kept
      as `\\$`, the currency.
    - "minus 5" becomes "-5", "5 x 3" becomes `5\\times 3`, "Rs 5" becomes "₹5", "1st" becomes `1\\text{ st}`, and two
      dots or more become `\\ldots`.
    - Braces around separators are resolved: `1{,}000` becomes "1000", and `12{,}5` becomes "12.5". "1.234.567,8"
      becomes "1234567.8".
    - Lines of an environment such as `align` are joined by commas; a line that begins with "=" goes on with the line
      before. Other line breaks `\\\\` become `\\cr`.
    - White space becomes single spaces, with none at the ends.
    """
    text = "".join(_GLYPHS.get(c, c) for c in text.translate(_FULL_WIDTH))
    text = re.sub(r"\.(?:\s?\.)+", r"\\ldots ", text)
    text = re.sub(r"[⁰¹²³⁴⁵⁶⁷⁸⁹⁻ⁿ]+", lambda m: "^{" + m[0].translate(_SUPERSCRIPTS) + "}", text)
    text = re.sub(r"[₀₁₂₃₄₅₆₇₈₉]+", lambda m: "_{" + m[0].translate(_SUBSCRIPTS) + "}", text)
    if not text.isascii():
        text = "".join(_vulgar(c) for c in text)
    text = re.sub(r"(?<=[0-9])\{,\}(?=[0-9]{3}(?![0-9]))", "", text)
    text = re.sub(r"(?<=[0-9])\{,\}(?=[0-9])", ".", text)  # a decimal comma
    text = _DOTTED_THOUSANDS.sub(lambda m: m[1].replace(".", "") + (f".{m[2]}" if m[2] else ""), text)
    text = _NEGATIVE.sub("-", text)
    text = _RUPEES.sub("₹", text)
    text = _CHOOSE.sub(r"\\binom{\1}{\2}", text)
    text = _LINES.sub(_one_line, text)
    text = re.sub(r"(?<=[0-9%])\s?x\s?(?=\$?\.?[0-9])", r"\\times ", text)
    text = _LINE_BREAK.sub(r"\\cr ", _NO_BRACKET.sub("", text))
    text = _ORDINAL.sub(r"\\text{ \1}", text)
    text = _BLANK.sub(" ", _SPACING.sub("", _COLOR.sub("", text)))
    text = text.replace("\\(", " ").replace("\\)", " ").replace("\\[", " ").replace("\\]", " ")
    dollars = [m.start() for m in re.finditer(r"(?<!\\)\$", text)]
    currency = "\\$" if len(dollars) == 1 else " "
    text = re.sub(r"(?<!\\)\$", lambda _: currency, text)
    text = re.sub(r"(?<![0-9a-zA-Z)}\]])\*\*|\*\*(?![0-9a-zA-Z({\\-])", " ", text)  # bold; "2**3" is a power
    return re.sub(r"\s+", " ", text).strip().strip("`_").strip()


def _one_line(match: re.Match[str]) -> str:
    """Equations below each other as a list, or as a chain where a line starts with "="."""
    if match[1] == "cases" and "&" in match[2]:
        return match[0]
    lines = match[2].replace("&", "").strip().removesuffix("\\\\")
    return re.sub(r"\\\\\s*,?", ",", re.sub(r",?\s*\\\\\s*(?==)", " ", lines))


def _vulgar(c: str) -> str:
    if unicodedata.category(c) == "No" and "⁄" in (parts := unicodedata.normalize("NFKC", c)):
        top, _, bottom = parts.partition("⁄")
        return rf"\frac{{{top}}}{{{bottom}}}"
    return c
