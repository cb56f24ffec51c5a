"""The 25 instruction kinds of IFEval (arXiv 2311.07911) under their published ids and parameters.

A check takes the reply and the parameters of the instruction, and returns whether the reply follows it. Called
directly, a check raises TypeError for a parameter that is missing or unknown; `writing.satisfied` makes it a
ValueError. The types of values are not checked. A wrong one raises TypeError or AttributeError, or gives a wrong
result: a text in place of a list of texts is read as a list of its characters.

Deviations from the published checker (google-research, instruction_following_eval):

- Sentences: here, a sentence ends at `.`, `!` or `?` before white space, but not after an abbreviation, an initial or
  the number of a list item. The published checker uses NLTK's trained splitter, whose data would have to be downloaded.
- Capital words: here, a word is a run of letters and digits, with `-`, `.`, `&` and apostrophes inside it. The
  published checker uses NLTK's tokens, which split "DON'T" in two.
- Keywords, markers and splitters: here, they are plain texts. The published checker reads them as regular expressions.
- Language: here, a text whose language cannot be detected (no letters) is in no language. The published checker accepts
  it for every language.
- Missing parameters: here, they are an error (TypeError). The published checker draws them at random.
- Bullets: here, a `*` alone on its line is one bullet. The published checker joins it with the next line.
- Letters: here, a capital letter in the parameter `letter` counts like its small form, and more than one character is
  an error (ValueError).

The time of every check is linear in the length of the text. langdetect, with a fixed seed, detects languages.
"""

import functools
import json
import re
from collections.abc import Callable, Sequence

_OPTIONS = ("My answer is yes.", "My answer is no.", "My answer is maybe.")
_CAPITAL_WORD = re.compile(r"[^\W_]+(?:['’.&-][^\W_]+)*")
_ENDS, _CLOSERS = ".!?…。！？।", "\"'”’)]*"
_LIST_NUMBER = re.compile(r"^[ \t]*\(?\d{1,3}[.)]\s", re.MULTILINE)
_ABBREVIATIONS = frozenset(
    "mr mrs ms dr prof sr jr st vs etc e.g i.e inc ltd co fig vol dept approx u.s u.k a.m p.m p.s p.p.s ph.d".split()
)


def _compare(count: int, relation: str, wanted: int) -> bool:
    if relation not in ("less than", "at least"):
        raise ValueError(f"relation {relation!r} is unknown; give 'less than' or 'at least'")
    return count < wanted if relation == "less than" else count >= wanted


@functools.cache
def _detector() -> Callable[[str], str | None]:
    import langdetect

    langdetect.DetectorFactory.seed = 0

    def detect(text: str) -> str | None:
        try:
            return langdetect.detect(text)
        except langdetect.LangDetectException:
            return None

    return detect


def language_is(text: str, language: str) -> bool:
    """Whether langdetect says that a text is in a language.

    Args:
      text: the text. One without letters is in no language.
      language: langdetect's code: an ISO 639-1 code in lower case, but zh-cn or zh-tw for Chinese. With another text,
        the result is always False.
    """
    return _detector()(text) == language


def n_sentences(text: str) -> int:
    """Counts sentences by the rule in the module's docstring. Words after the last sentence's end count as one more.

    Closing quotation marks, brackets and asterisks may follow the sign that ends a sentence, and `…` ends one too. A
    Chinese or Japanese sentence also ends without white space after it. "I." is no initial. What has no letter or digit
    is no sentence.

    >>> n_sentences("1. Mr. Doe came at 3.30 p.m. today. Why? Nobody knows")
    3
    """
    count, begun = 0, False
    for token in _LIST_NUMBER.sub("", text).split():
        inner = token.rstrip(_CLOSERS)
        word = inner.rstrip(_ENDS)
        begun = begun or any(c.isalnum() for c in token)
        count += sum(c in "。！？" for c in word)  # Chinese and Japanese have no space after a sentence
        if word != inner and begun and not (inner == f"{word}." and _is_abbreviation(word)):
            count, begun = count + 1, False
    return count + begun


def _is_abbreviation(word: str) -> bool:
    word = word.lstrip("([\"'“‘*").lower()
    return word in _ABBREVIATIONS or (len(word) == 1 and word.isalpha() and word != "i")


def existence(text: str, *, keywords: Sequence[str]) -> bool:
    """Whether each keyword occurs, ignoring case. An occurrence inside a word counts too. True for no keywords."""
    return all(keyword.lower() in text.lower() for keyword in keywords)


def frequency(text: str, *, keyword: str, frequency: int, relation: str) -> bool:
    """Whether the keyword occurs less than, or at least, `frequency` times, ignoring case.

    Args:
      text: the reply.
      keyword: the keyword, without the white space at its ends. Occurrences inside words count too; they do not
        overlap.
      frequency: the number of occurrences to compare with.
      relation: "less than" or "at least".

    Raises:
      ValueError: if the relation is unknown.
    """
    return _compare(text.lower().count(keyword.strip().lower()), relation, frequency)


def forbidden_words(text: str, *, forbidden_words: Sequence[str]) -> bool:
    """Whether none of the words occurs, ignoring case. An occurrence inside a longer word is allowed.

    Digits and `_` are parts of words. True for no words.
    """
    return not any(re.search(rf"(?<!\w){re.escape(w)}(?!\w)", text, re.IGNORECASE) for w in forbidden_words)


def letter_frequency(text: str, *, letter: str, let_frequency: int, let_relation: str) -> bool:
    """Whether the character occurs less than, or at least, `let_frequency` times, ignoring case.

    Args:
      text: the reply.
      letter: one character, white space at its ends aside.
      let_frequency: the number of occurrences to compare with.
      let_relation: "less than" or "at least".

    Raises:
      ValueError: if `letter` is not one character, or the relation is unknown.
    """
    if len(letter.strip()) != 1:
        raise ValueError(f"letter {letter!r} is not valid; give one character")
    return _compare(text.lower().count(letter.strip().lower()), let_relation, let_frequency)


def response_language(text: str, *, language: str) -> bool:
    """Whether langdetect says that the text is in a language. One without letters is in no language.

    Args:
      text: the reply.
      language: langdetect's code: an ISO 639-1 code in lower case, but zh-cn or zh-tw for Chinese.
    """
    return language_is(text, language)


def number_sentences(text: str, *, num_sentences: int, relation: str) -> bool:
    """Whether there are less than, or at least, `num_sentences` sentences, as `n_sentences` counts them.

    Args:
      text: the reply.
      num_sentences: the number to compare with.
      relation: "less than" or "at least".

    Raises:
      ValueError: if the relation is unknown.
    """
    return _compare(n_sentences(text), relation, num_sentences)


def number_paragraphs(text: str, *, num_paragraphs: int) -> bool:
    """Whether `***` divides the text into exactly `num_paragraphs` paragraphs.

    None may be empty, except that the text may begin or end with `***`; the empty part there is not counted.
    """
    parts = [part.strip() for part in text.split("***")]
    return all(parts[1:-1]) and sum(map(bool, parts)) == num_paragraphs


def number_words(text: str, *, num_words: int, relation: str) -> bool:
    r"""Whether there are less than, or at least, `num_words` runs of `\w`: letters, digits and `_`.

    Args:
      text: the reply.
      num_words: the number to compare with.
      relation: "less than" or "at least".

    Raises:
      ValueError: if the relation is unknown.
    """
    return _compare(len(re.findall(r"\w+", text)), relation, num_words)


def nth_paragraph_first_word(text: str, *, num_paragraphs: int, nth_paragraph: int, first_word: str) -> bool:
    """Whether there are exactly `num_paragraphs` paragraphs and the n-th begins with the word, ignoring case.

    Args:
      text: the reply. Two line breaks in a row separate its paragraphs.
      num_paragraphs: the wanted number of paragraphs that are not blank.
      nth_paragraph: the number n of the paragraph to look at, from 1. Blank paragraphs are counted here. The result is
        False if the n-th is blank, or if n is below 1 or above the number of paragraphs that are not blank.
      first_word: the word, in any case. The paragraph's first word ends at white space, `.`, `,`, `?`, `!`, `'` or `"`;
        quotation marks before it do not count.
    """
    parts = text.split("\n\n")
    count = sum(1 for part in parts if part.strip())
    if not 1 <= nth_paragraph <= count or not (words := parts[nth_paragraph - 1].split()):
        return False
    word = re.split(r"[.,?!'\"]", words[0].lstrip("'").lstrip('"'))[0]
    return count == num_paragraphs and word.lower() == first_word.lower()


def number_placeholders(text: str, *, num_placeholders: int) -> bool:
    """Whether there are at least `num_placeholders` placeholders: texts in square brackets, each within one line.

    An empty pair `[]` counts too.
    """
    count = 0
    for line in text.split("\n"):
        end = 0
        while (start := line.find("[", end)) >= 0 and (end := line.find("]", start) + 1) > 0:
            count += 1
    return count >= num_placeholders


def postscript(text: str, *, postscript_marker: str) -> bool:
    """Whether the marker of a postscript occurs anywhere, ignoring case.

    Args:
      text: the reply.
      postscript_marker: "P.S." or "P.P.S", which may have a space after each inner period in the text, or any other
        text; white space at its ends does not count.
    """
    known = {"P.P.S": r"p\.\s?p\.\s?s", "P.S.": r"p\.\s?s\."}
    marker = postscript_marker.strip()
    return re.search(known.get(marker, re.escape(marker.lower())), text.lower()) is not None


def number_bullet_lists(text: str, *, num_bullets: int) -> bool:
    """Whether exactly `num_bullets` lines begin with `-` or with a single `*`, after white space if any."""
    lines = [line.lstrip() for line in text.split("\n")]
    return sum(line[:1] == "-" or (line[:1] == "*" and line[1:2] != "*") for line in lines) == num_bullets


def constrained_response(text: str) -> bool:
    """Whether "My answer is yes.", "My answer is no." or "My answer is maybe." occurs, in this very spelling."""
    return any(option in text for option in _OPTIONS)


def number_highlighted_sections(text: str, *, num_highlights: int) -> bool:
    """Whether there are at least `num_highlights` `*highlights*`, each within one line. `**bold**` counts once.

    Blank ones do not count.
    """
    single = [h for h in re.findall(r"\*[^\n*]*\*", text) if h.strip("*").strip()]
    double = [h for h in re.findall(r"\*\*[^\n*]*\*\*", text) if h[2:-2].strip()]
    return len(single) + len(double) >= num_highlights


def multiple_sections(text: str, *, section_spliter: str, num_sections: int) -> bool:
    """Whether there are at least `num_sections` section heads: the splitter and a number, as in "Section 1".

    They count wherever they stand in the text. One white-space character or none stands between the splitter and the
    number.

    Args:
      text: the reply.
      section_spliter: the word before the number, such as "Section" (spelled as in IFEval); upper and lower case
        differ.
      num_sections: the smallest number of heads.
    """
    return len(re.findall(rf"{re.escape(section_spliter.strip())}\s?\d+", text)) >= num_sections


def json_format(text: str) -> bool:
    """Whether the whole text is JSON of any type; a fence of three backticks is allowed around it.

    "json", "Json" or "JSON" may follow the first backticks, and one end of the fence may be missing. White space
    outside and inside the fence is ignored. NaN and Infinity count as JSON; JSON that is nested too deeply for Python
    to read does not.
    """
    inner = re.sub(r"^```(?:json|Json|JSON)?", "", text.strip()).removesuffix("```")
    try:
        json.loads(inner.strip())
    except (ValueError, RecursionError):
        return False
    return True


def title(text: str) -> bool:
    """Whether some line has a title `<<...>>` that is not blank."""
    for line in text.split("\n"):
        start, end = line.find("<<"), line.rfind(">>")
        if start >= 0 and line[start : max(end, 0)].strip("<> "):
            return True
    return False


def two_responses(text: str) -> bool:
    """Whether `******` separates exactly two texts, which differ. The text may also begin or end with `******`."""
    parts = [part.strip() for part in text.split("******")]
    full = [part for part in parts if part]
    return all(parts[1:-1]) and len(full) == 2 and full[0] != full[1]


def repeat_prompt(text: str, *, prompt_to_repeat: str) -> bool:
    """Whether the text begins with the prompt, ignoring case and white space at the ends of both."""
    return text.strip().lower().startswith(prompt_to_repeat.strip().lower())


def end_checker(text: str, *, end_phrase: str) -> bool:
    """Whether the text ends with the phrase, ignoring case and double quotation marks `"` at the end.

    White space at the ends of the text and of the phrase does not count.
    """
    return text.strip().strip('"').lower().endswith(end_phrase.strip().lower())


def quotation(text: str) -> bool:
    """Whether the whole text is between double quotation marks `"`; white space around them does not count."""
    text = text.strip()
    return len(text) > 1 and text[0] == text[-1] == '"'


def capital_word_frequency(text: str, *, capital_frequency: int, capital_relation: str) -> bool:
    """Whether less than, or at least, `capital_frequency` words are in capital letters throughout.

    A word may have digits, but needs a letter. The module's docstring says what a word is.

    Args:
      text: the reply.
      capital_frequency: the number of words to compare with.
      capital_relation: "less than" or "at least".

    Raises:
      ValueError: if the relation is unknown.
    """
    count = sum(word.isupper() for word in _CAPITAL_WORD.findall(text))
    return _compare(count, capital_relation, capital_frequency)


def english_capital(text: str) -> bool:
    """Whether langdetect takes the text for English, and it has letters, all of them capital."""
    return text.isupper() and language_is(text, "en")


def english_lowercase(text: str) -> bool:
    """Whether langdetect takes the text for English, and it has letters, none of them capital."""
    return text.islower() and language_is(text, "en")


def no_comma(text: str) -> bool:
    """Whether the text has no comma `,`; commas of other scripts are allowed."""
    return "," not in text


KINDS: dict[str, Callable[..., bool]] = {
    "keywords:existence": existence,
    "keywords:frequency": frequency,
    "keywords:forbidden_words": forbidden_words,
    "keywords:letter_frequency": letter_frequency,
    "language:response_language": response_language,
    "length_constraints:number_sentences": number_sentences,
    "length_constraints:number_paragraphs": number_paragraphs,
    "length_constraints:number_words": number_words,
    "length_constraints:nth_paragraph_first_word": nth_paragraph_first_word,
    "detectable_content:number_placeholders": number_placeholders,
    "detectable_content:postscript": postscript,
    "detectable_format:number_bullet_lists": number_bullet_lists,
    "detectable_format:constrained_response": constrained_response,
    "detectable_format:number_highlighted_sections": number_highlighted_sections,
    "detectable_format:multiple_sections": multiple_sections,
    "detectable_format:json_format": json_format,
    "detectable_format:title": title,
    "combination:two_responses": two_responses,
    "combination:repeat_prompt": repeat_prompt,
    "startend:end_checker": end_checker,
    "startend:quotation": quotation,
    "change_case:capital_word_frequency": capital_word_frequency,
    "change_case:english_capital": english_capital,
    "change_case:english_lowercase": english_lowercase,
    "punctuation:no_comma": no_comma,
}
