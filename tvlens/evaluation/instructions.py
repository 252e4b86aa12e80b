"""Instructions that a program can check, as in IFEval [1]: did the response do what was asked?

A prompt carries constraints, each a name such as ``length_constraints:number_words`` with numbers
or words of its own (the data format is IFEval's). A response is judged

    strict    as it is
    loose     in eight ways, and one is enough: as it is, without its first line, its last, both;
              and each of these without asterisks

by constraint, and by prompt (all of its constraints). An empty response follows nothing. The
checkers here are our own: 24 of IFEval's 25 constraints, ``language:response_language`` left out
since it needs a language detector. Two are coarser than the original, which calls natural-language
tools that need downloads: sentences are split at ``.``, ``!`` and ``?`` before a space or the end,
and words at what is no letter. The two on case do not ask whether the language is English. Do not
quote results on other prompts than IFEval's as IFEval.

[1] Zhou et al. 2023, https://arxiv.org/abs/2311.07911
"""

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from tvlens.errors import PromptError

from .measures import Item

Arguments = Mapping[str, Any]
OPTIONS = ("My answer is yes.", "My answer is no.", "My answer is maybe.")
AT_LEAST, LESS_THAN = "at least", "less than"


class Checker(NamedTuple):
    """How a constraint is checked.

    Attributes:
        holds: Whether a response follows it.
        needs: The arguments that it must be given.
    """

    holds: Callable[[str, Arguments], bool]
    needs: tuple[str, ...] = ()


class Constraint(NamedTuple):
    """A constraint of one prompt: its name and arguments."""

    name: str
    arguments: Arguments


def constraint(name: str, arguments: Arguments) -> Constraint:
    """A constraint whose name is known and whose arguments are complete.

    Raises:
        PromptError: There is no such constraint, or an argument is missing or of no use.
    """
    if name not in CHECKERS:
        raise PromptError(f"there is no constraint {name!r}; there are {', '.join(CHECKERS)}.")
    given = {key: value for key, value in arguments.items() if value is not None}
    if missing := [key for key in CHECKERS[name].needs if key not in given]:
        raise PromptError(f"the constraint {name!r} needs {missing[0]!r}.")
    for key, value in given.items():
        if key.endswith("relation") and value not in (AT_LEAST, LESS_THAN):
            raise PromptError(f"{key!r} is {value!r}, expected {AT_LEAST!r} or {LESS_THAN!r}.")
    return Constraint(name, given)


def follows(response: str, asked: Constraint) -> bool:
    """Whether a response, as it is, does what was asked."""
    if not response.strip():
        return False
    return CHECKERS[asked.name].holds(response, asked.arguments)


def follows_loosely(response: str, asked: Constraint) -> bool:
    """Whether it does in one of its loose readings."""
    return any(follows(text, asked) for text in loose_readings(response))


def loose_readings(response: str) -> list[str]:
    """A response whole, without first line, last line and both; and each without asterisks."""
    lines = response.split("\n")
    cut = ["\n".join(lines[start:stop]).strip() for start, stop in _LINES]
    readings = [response, *cut]
    return [*readings, *(text.replace("*", "") for text in readings)]


_LINES: tuple[tuple[int, int | None], ...] = ((1, None), (0, -1), (1, -1))


def judged(number: int, response: str, asked: Sequence[Constraint]) -> Iterator[Item]:
    """The rows of one prompt: both judgements, of every constraint and of the prompt."""
    for how, judge in (("strict", follows), ("loose", follows_loosely)):
        found = [judge(response, one) for one in asked]
        text = response if how == "strict" else None
        yield Item(number, f"prompt_{how}", float(all(found)), response=text)
        for one, held in zip(asked, found, strict=True):
            yield Item(number, f"instruction_{how}", float(held), detail=one.name)


def _compared(count: int, arguments: Arguments, number: str, relation: str) -> bool:
    """A count against an argument; at least so many where no relation is given."""
    wanted = int(arguments[number])
    less = arguments.get(relation, AT_LEAST) == LESS_THAN
    return count < wanted if less else count >= wanted


def _has_keywords(text: str, given: Arguments) -> bool:
    return all(word.lower() in text.lower() for word in given["keywords"])


def _keyword_count(text: str, given: Arguments) -> bool:
    count = text.lower().count(str(given["keyword"]).lower())
    return _compared(count, given, "frequency", "relation")


def _no_forbidden(text: str, given: Arguments) -> bool:
    words = given["forbidden_words"]
    return not any(re.search(rf"\b{re.escape(word)}\b", text, re.IGNORECASE) for word in words)


def _letter_count(text: str, given: Arguments) -> bool:
    count = text.lower().count(str(given["letter"]).lower())
    return _compared(count, given, "let_frequency", "let_relation")


def _word_count(text: str, given: Arguments) -> bool:
    return _compared(len(re.findall(r"\w+", text)), given, "num_words", "relation")


def _sentence_count(text: str, given: Arguments) -> bool:
    found = [part for part in re.split(r"(?<=[.!?])[\"')\]]*\s+", text.strip()) if part.strip()]
    return _compared(len(found), given, "num_sentences", "relation")


def _paragraph_count(text: str, given: Arguments) -> bool:
    """Paragraphs between lines of three asterisks; an empty one in between is a fault."""
    parts = [part.strip() for part in re.split(r"\s?\*\*\*\s?", text)]
    inner = parts[1:-1]
    return all(inner) and sum(map(bool, parts)) == int(given["num_paragraphs"])


def _first_word(text: str, given: Arguments) -> bool:
    parts = [part.strip() for part in text.split("\n\n") if part.strip()]
    place = int(given["nth_paragraph"])
    if len(parts) != int(given["num_paragraphs"]) or not 1 <= place <= len(parts):
        return False
    word = parts[place - 1].split()[0].lstrip("'\"")
    return re.split(r"[.,?!'\"]", word)[0].lower() == str(given["first_word"]).lower()


def _placeholder_count(text: str, given: Arguments) -> bool:
    return len(re.findall(r"\[.*?\]", text)) >= int(given["num_placeholders"])


def _postscript(text: str, given: Arguments) -> bool:
    spaced = r"\s?".join(map(re.escape, str(given["postscript_marker"]).lower().replace(" ", "")))
    return re.search(spaced.removesuffix(r"\."), text.lower()) is not None


def _bullet_count(text: str, given: Arguments) -> bool:
    bullets = re.findall(r"^\s*(?:\*[^*\n]|-)", text, re.MULTILINE)
    return len(bullets) == int(given["num_bullets"])


def _one_of_options(text: str, given: Arguments) -> bool:
    return any(option in text for option in OPTIONS)


def _highlight_count(text: str, given: Arguments) -> bool:
    """Spans between single or double asterisks with something inside."""
    single = re.findall(r"\*([^\n*]*)\*", text)  # of a double pair the outer two hold nothing
    spans = [*single, *re.findall(r"\*\*([^\n*]+)\*\*", text)]
    return sum(bool(span.strip()) for span in spans) >= int(given["num_highlights"])


def _section_count(text: str, given: Arguments) -> bool:
    heading = rf"\s?{re.escape(str(given['section_spliter']).strip())}\s?\d+\s?"
    return len(re.findall(heading, text)) >= int(given["num_sections"])


def _is_json(text: str, given: Arguments) -> bool:
    bare = re.sub(r"\A```(?:json)?|```\Z", "", text.strip(), flags=re.IGNORECASE)
    try:
        json.loads(bare)
    except ValueError:
        return False
    return True


def _has_title(text: str, given: Arguments) -> bool:
    return any(title.strip(" <>") for title in re.findall(r"<<[^\n]+>>", text))


def _two_responses(text: str, given: Arguments) -> bool:
    parts = [part.strip() for part in text.split("******")]
    said = [part for part in parts if part]
    return all(parts[1:-1]) and len(said) == 2 and said[0] != said[1]


def _repeats_prompt(text: str, given: Arguments) -> bool:
    return text.strip().lower().startswith(str(given["prompt_to_repeat"]).strip().lower())


def _ends_with(text: str, given: Arguments) -> bool:
    return text.strip().strip('"').lower().endswith(str(given["end_phrase"]).strip().lower())


def _is_quoted(text: str, given: Arguments) -> bool:
    bare = text.strip()
    return len(bare) > 1 and bare[0] == bare[-1] == '"'


def _capital_count(text: str, given: Arguments) -> bool:
    words = re.findall(r"[^\W\d_]+(?:[-'][^\W_]+)*", text)
    count = sum(word.isupper() for word in words)
    return _compared(count, given, "capital_frequency", "capital_relation")


CHECKERS: Mapping[str, Checker] = {
    "keywords:existence": Checker(_has_keywords, ("keywords",)),
    "keywords:frequency": Checker(_keyword_count, ("keyword", "frequency")),
    "keywords:forbidden_words": Checker(_no_forbidden, ("forbidden_words",)),
    "keywords:letter_frequency": Checker(_letter_count, ("letter", "let_frequency")),
    "length_constraints:number_sentences": Checker(_sentence_count, ("num_sentences",)),
    "length_constraints:number_paragraphs": Checker(_paragraph_count, ("num_paragraphs",)),
    "length_constraints:number_words": Checker(_word_count, ("num_words",)),
    "length_constraints:nth_paragraph_first_word": Checker(
        _first_word, ("num_paragraphs", "nth_paragraph", "first_word")
    ),
    "detectable_content:number_placeholders": Checker(_placeholder_count, ("num_placeholders",)),
    "detectable_content:postscript": Checker(_postscript, ("postscript_marker",)),
    "detectable_format:number_bullet_lists": Checker(_bullet_count, ("num_bullets",)),
    "detectable_format:constrained_response": Checker(_one_of_options),
    "detectable_format:number_highlighted_sections": Checker(_highlight_count, ("num_highlights",)),
    "detectable_format:multiple_sections": Checker(
        _section_count, ("section_spliter", "num_sections")
    ),
    "detectable_format:json_format": Checker(_is_json),
    "detectable_format:title": Checker(_has_title),
    "combination:two_responses": Checker(_two_responses),
    "combination:repeat_prompt": Checker(_repeats_prompt, ("prompt_to_repeat",)),
    "startend:end_checker": Checker(_ends_with, ("end_phrase",)),
    "startend:quotation": Checker(_is_quoted),
    "change_case:capital_word_frequency": Checker(_capital_count, ("capital_frequency",)),
    "change_case:english_capital": Checker(lambda text, given: text.isupper()),
    "change_case:english_lowercase": Checker(lambda text, given: text.islower()),
    "punctuation:no_comma": Checker(lambda text, given: "," not in text),
}
"""Every constraint by IFEval's name for it."""
