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
    "gal gallon gallons",
    "cup cups",
    "ton tons",
    "mol mole moles",
    "rad radian radians",
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
COMMON_WORDS = _spread(
    "or and to is no not in of at by if as an on we it so am pm up he be do go my us me yes all any odd men day box "
    "dog cat the for are was sum now one two six ten non has had its let get"
)
# English words and names that `is_word` takes for products of variables by their letters alone: those in alphabetical
# order, then those with their only vowel at the end, with letters that follow each other, or of two letters.
_LIKE_PRODUCTS = _spread(
    "abel abet abhor abhors ably abort ace aces achy act adept adj ado adopt ads adv adz aegis aery aft aglow ago ahoy "
    "ail ails aim aims air airs airy almost alms alps alt amos amp amps amt amy ant apr apt art arty befit beg begin "
    "begins begot begs below belt ben bent bert best bet bevy bin bins biopsy bit blot blow bop bops bot bow boxy boy "
    "buy cent chi chimp chimps chin chino chinos chins chintz chip chips chit chop chops chow cis city clop clops clot "
    "cloy cop cops copy cory cost cosy cot cow cox coy crux cry deft defy deity del demo demos den dens dent deny dept "
    "dew dewy dim dims din dins dint dip dips dirt dirty dis dopy dory dos dot dry egis ego egos elm elmo elms emo "
    "emos empty ems emu envy est film films filmy fin fins fir firs first fist fit fix flop flops flow flu flux fly "
    "fop fops fort forty fox foxy fry ghost gilt gimpy gin gino gins gipsy girt gist glop glory glow gnu gory got gov "
    "guy hilt him hims hint hip hips his hit hop hops horsy hos host hot how hrs imp imps ins ivy jot joy knot know "
    "lop lops los lost lot lou low lox mop mops mos most mow nor nos nosy ops opt pry sty tux "
    "bra cab che dec fed fri fro dpi hwy mon nth ply pro pyx rust ruts schwa she shy ski sky sly spa spry spy sri stu "
    "styx tho thru thu thy try who why wry oh ok ox"
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
_VOWEL = re.compile("[aeiou]|(?<![xz])y(?![xz])")
_ROMAN = re.compile("c{0,3}(?:xc|xl|l?x{0,3})(?:ix|iv|v?i{0,3})")  # up to 399


def in_order(run: str) -> bool:
    """Whether the letters of a run stand in strictly alphabetical order, as in "abc" and "almost", whatever their case.

    True for a single letter and for "". Letters beyond ASCII are ordered by their code points.
    """
    small = run.lower()
    return all(a < b for a, b in zip(small, small[1:], strict=False))


def is_word(run: str) -> bool:
    """Whether a run of letters is a word, and not a product of variables.

    The first rule that fits decides:

    1. A common short word such as "of", or an English word that the other rules take for a product, such as "first",
       is a word, whatever its case. Both are listed in this module; the second list has all words of a usual English
       dictionary with their letters in alphabetical order.
    2. A run that begins with a Japanese, Chinese or Korean character is a word.
    3. A run of one or two letters is a product. A longer Roman numeral up to 399, such as "XIV", is a word.
    4. Any other run with a letter beyond ASCII is a word, except for Greek letters in alphabetical order.
    5. Different letters that follow each other in the alphabet, in any order, such as "abc" and "zxy", are a product.
       Capitals are one only in alphabetical order: "BADC" may say an order.
    6. Other letters in alphabetical order, such as "abx" and "kxy", are a product. A capital with small letters after
       it, a vowel among them, is a word: "Ben".
    7. Any other run is a word if one of its letters, the last aside, is a vowel. y is a vowel, but not beside x or z.

    A run such as "xab" may still be a product: `tokens.tokens` looks at what stands before it, and at the variables of
    the right answer.

    Args:
      run: one letter or more.
    """
    small = run.lower()
    if small in COMMON_WORDS or small in _LIKE_PRODUCTS or "\u3040" <= run[0]:
        return True
    if len(run) < 3:
        return False
    if _ROMAN.fullmatch(small):
        return True
    if not run.isascii():
        return not (in_order(run) and all("\u0370" <= c < "\u0400" for c in run))
    following = len(set(small)) == len(run) == ord(max(small)) - ord(min(small)) + 1
    if following and not run.isupper():
        return False
    if in_order(run):
        return run[0].isupper() and run[1:].islower() and _VOWEL.search(small, 1) is not None
    vowel = _VOWEL.search(small)
    return vowel is not None and vowel.end() < len(run)
