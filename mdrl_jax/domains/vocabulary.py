"""Words of the four procedural domains and the word-level tokenizer made of them.

All domains share one vocabulary, and no token says which domain a prompt belongs to. All prompts end in `=`, all
replies are either terse or show working first (`> working ; answer`), and numbers are the same tokens everywhere. The
domains therefore have to share parts of the model, which is what interference between them needs.
"""

from typing import Any

NUMBERS = tuple(str(n) for n in range(21))
SYMBOLS = ("=", ">", ";", "+", "-", "*", "/", "%", "(", ")", "x")
PYTHON = ("def", "f(x):", "return")
OPERATIONS = ("plus", "minus", "times")

NAMES = tuple(
    "ada ben cleo dan eva finn gus hana ian jade kai lena max nora otto pia quin rosa sam tess "
    "uma vic wes xena yara zack amy bob cora dora eli fay gina hugo iris jack kate liam mia noah "
    "olga paul rita saul tina ugo vera walt xavi yves zoe abel bea carl dina emil flora glen hope "
    "igor june karl lucy mark nina omar peg rolf sara tom una vito wanda".split()
)
ATTRIBUTES: dict[str, tuple[str, ...]] = {
    "age": NUMBERS[5:15],
    "floor": NUMBERS[1:10],
    "pets": NUMBERS[0:8],
    "home": tuple("rome oslo lima cairo paris delhi quito tokyo".split()),
    "job": tuple("baker pilot nurse judge actor clerk farmer tailor".split()),
    "drink": tuple("tea milk water juice coffee cocoa cider broth".split()),
    "sport": tuple("chess golf tennis rugby judo rowing polo darts".split()),
    "car": tuple("van truck jeep coupe sedan wagon mini buggy".split()),
    "gem": tuple("ruby opal pearl garnet amber onyx topaz agate".split()),
    "fruit": tuple("apple plum pear grape mango lemon melon cherry".split()),
}
RHYMES = {
    "fox": "rocks",
    "cat": "mat",
    "dog": "log",
    "bee": "tree",
    "goat": "boat",
    "mouse": "house",
    "frog": "bog",
    "bear": "chair",
    "hen": "den",
    "snail": "trail",
    "whale": "sail",
    "duck": "muck",
    "crow": "snow",
    "sheep": "heap",
    "ant": "plant",
    "owl": "towel",
}
ADJECTIVES = tuple("red old small wild quiet brave sleepy happy grey proud clever hungry gentle lazy".split())
VERBS = tuple("sat slept sang danced hid waited jumped dreamed rested stood ran cried".split())
GLUE = ("the", "on")
END = "<end>"
PAD = "<pad>"
UNKNOWN = "<unk>"


def words() -> tuple[str, ...]:
    """Every token of the tokenizer.

    Returns:
      the tokens, each once, in a fixed order: the id of a token is its index. There are 240, so that the vocabulary
      axis can be sharded over 2, 4 or 8 devices.
    """
    values = tuple(v for vs in ATTRIBUTES.values() for v in vs)
    everything = (
        (PAD, END, UNKNOWN)
        + NUMBERS
        + SYMBOLS
        + PYTHON
        + OPERATIONS
        + NAMES
        + tuple(ATTRIBUTES)
        + values
        + tuple(RHYMES)
        + tuple(RHYMES.values())
        + ADJECTIVES
        + VERBS
        + GLUE
    )
    return tuple(dict.fromkeys(everything))


def make_tokenizer() -> Any:
    """Returns a `transformers` tokenizer that splits on white space and makes one token of each word.

    The ids are the indices of `words`; a word that is not among them becomes the unknown token. It also has an end
    token and a padding token, and no chat template. It adds no special tokens to a text.
    """
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {word: i for i, word in enumerate(words())}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END, pad_token=PAD, unk_token=UNKNOWN)
