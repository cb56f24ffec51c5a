"""The words and commands that have a meaning in answers: units, number words, functions, operators."""

import re
from collections.abc import Sequence


def _spread(words: str) -> frozenset[str]:
    return frozenset(words.split())


# Names of one unit. The first is the one that is compared.
_UNITS = (
    "cm centimeter centimeters centimetre centimetres cms",
    "mm millimeter millimeters millimetre millimetres",
    "m meter meters metre metres",
    "km kilometer kilometers kilometre kilometres kms",
    "in inch inches",
    "ft foot feet",
    "yd yard yards yds",
    "mi mile miles",
    "g gram grams",
    "kg kilogram kilograms kgs",
    "mg milligram milligrams",
    "lb pound pounds lbs",
    "oz ounce ounces",
    "L l liter liters litre litres",
    "mL ml milliliter milliliters millilitre millilitres",
    "s sec second seconds secs",
    "min minute minutes mins",
    "h hr hour hours hrs",
    "day days",
    "week weeks",
    "month months",
    "year years yr yrs",
    "dollar dollars usd",
    "cent cents",
    "euro euros eur",
    "yen jpy",
    "degree degrees deg",
    "mph",
    "Hz hertz",
    "unit units",
    "person people persons",
    "man men",
    "woman women",
    "child children",
    "rupee rupees rs inr",
    "yuan rmb 元",
    "am a.m.",
    "pm p.m.",
    "sq square",
    "cubic cu",
    "J joule joules",
    "W watt watts",
    "N newton newtons",
    "V volt volts",
)
UNIT_NAME = {name: names.split()[0] for names in _UNITS for name in names.split()}
UNIT_LETTERS = _spread("m g s h L l J W N V")  # a single letter that may be a unit; the others are mathematics
SHORT_UNITS = {name for name in UNIT_NAME if 1 < len(name) < 4 and name != "in"} | {"in"}
MULTIPLES = {
    "dozen": 12,
    "hundred": 100,
    "thousand": 1000,
    "million": 10**6,
    "billion": 10**9,
    "trillion": 10**12,
    "百": 100,
    "千": 1000,
    "万": 10**4,
    "亿": 10**8,
}
CURRENCIES = {"£": "lb", "€": "euro", "¥": "yen", "₹": "rupee", "$": "dollar"}  # "5 pounds" is £5 and 5 lb
NUMBER_WORDS: Sequence[str] = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen "
    "eighteen nineteen twenty"
).split()
CHINESE_UNITS = _spread(
    "个 元 米 厘米 千米 公里 克 千克 公斤 升 秒 分钟 小时 天 周 月 年 岁 人 只 本 次 种 度 块 棵 朵"
)
_NUMERALS = _spread(
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen "
    "eighteen nineteen twenty thirty forty fifty sixty seventy eighty ninety hundred hundreds thousand thousands "
    "million millions billion billions trillion trillions quadrillion quintillion myriad lakh lakhs crore crores gross "
    "grand dozen dozens score half halves third thirds quarter "
    "quarters fourth fourths fifth fifths sixth sixths seventh sevenths eighth eighths ninth ninths tenth tenths "
    "eleventh elevenths twelfth twelfths thirteenth thirteenths fourteenth fourteenths fifteenth fifteenths sixteenth "
    "sixteenths seventeenth seventeenths eighteenth eighteenths nineteenth nineteenths twentieth twentieths hundredth "
    "hundredths "
    "thousandth thousandths millionth millionths"
)
# A remark with one of these words changes the number before it, or leaves it open.
CHANGES = _NUMERALS | _spread(
    "or and nor but not to than least most more less fewer greater larger smaller higher lower over under above below "
    "about between from until up down plus minus times multiplied divided added subtracted squared cubed factorial "
    "power mod modulo percent percentage pi infinity e i k is are was were be if when unless except maybe perhaps "
    "possibly probably either neither both wrong incorrect false twice double triple thrice choose root bigger "
    "exclusive inclusive onwards upwards beyond approximately roughly nearly almost ish else instead versus vs exceeds "
    "base binary raised tens ones divides divisible negative positive reciprocal inverse opposite conjugate mille"
)
_WORDS = _spread(
    "or and to is no not in of at by if as an on we it so am pm up he be do go my us me yes all any odd men day box "
    "dog cat the for are was sum now one two six ten non has had its let get"
)
FUNCTIONS = _spread(
    "sin cos tan cot sec csc sinh cosh tanh coth arcsin arccos arctan ln log exp lg arccot arcsec arccsc"
)
# Functions of several values, and operators: no formula with one of these is read.
OPERATORS = _spread(
    "int iint iiint oint sum prod lim limsup liminf det gcd lcm max min sup inf arg deg dim ker hom mod pmod bmod "
    "nabla partial bigcup bigcap coprod forall exists implies iff Rightarrow Leftarrow Leftrightarrow rightarrow to "
    "mapsto ldots cdots dots vdots ddots mid nmid perp parallel cong sim equiv land lor lnot neg therefore because"
)
TEXT_COMMANDS = _spread("text mbox textbf textit textrm textnormal textsf texttt hbox emph textsc")
FONT_COMMANDS = _spread("mathrm mathbf mathit mathsf mathtt operatorname boldsymbol bm mathnormal underline mathop")
LETTER_COMMANDS = _spread(
    "mathbb mathcal mathfrak overline bar vec hat widehat tilde overrightarrow overleftrightarrow"
)
SAME_COMMAND = {
    "dfrac": "frac",
    "tfrac": "frac",
    "cfrac": "frac",
    "dbinom": "binom",
    "tbinom": "binom",
    "leq": "le",
    "leqslant": "le",
    "geq": "ge",
    "geqslant": "ge",
    "neq": "ne",
    "varnothing": "emptyset",
    "degree": "circ",
    "lbrace": "{",
    "rbrace": "}",
    "setminus": "backslash",
    "smallsetminus": "backslash",
    "lvert": "vert",
    "rvert": "vert",
    "ast": "times",
    "cdot": "times",
    "colon": ":",
    "lt": "<",
    "gt": ">",
    "simeq": "approx",
    "infin": "infty",
    "infinity": "infty",
    "lbrack": "[",
    "rbrack": "]",
    "arctg": "arctan",
    "tg": "tan",
    "ctg": "cot",
    "choose": "choose",
    "pounds": "£",
    "euro": "€",
    "yen": "¥",
    "phi": "phi",
    "notin": "notin",
}
RELATIONS = {
    "=": "=", "<": "<", ">": ">", "le": "<=", "ge": ">=", "ne": "!=", "approx": "~", "in": "in", "notin": "notin",
}  # fmt: skip


def is_word(run: str) -> bool:
    """Whether a run of letters is a word, and not a product of variables.

    A word has three letters or more, one before the last of them a vowel (y is one), or is a common short word. Letters
    in alphabetical order, such as "abc", are variables. Beyond ASCII, no vowel is needed, and a run that begins with a
    Japanese or Chinese character is always a word.

    Args:
      run: one letter or more.
    """
    small = run.lower()
    if small in _WORDS or "\u3040" <= run[0]:
        return True
    ascending = all(a < b for a, b in zip(small, small[1:], strict=False))
    return len(run) >= 3 and not ascending and (not run.isascii() or re.search("[aeiouy]", small[:-1]) is not None)
