"""The texts that the demo models learn: general, medical and arithmetic questions and answers.

A record is a prompt (``Q: ...\\nA:``) and an answer that starts with a space. Records are split by
a hash of their term (WordNet), three-character category (ICD-10-CM) or sum (arithmetic), so a term
that is held out was never the subject of a question in training. Sources are public files found by
name anywhere under one folder; see the README for where they come from.
"""

import hashlib
import random
import re
import struct
import xml.etree.ElementTree as ElementTree
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Literal, NamedTuple

Split = Literal["train", "control", "heldout"]

QUESTIONS = (
    'Q: What does the word "{term}" mean?\nA:',
    'Q: Define "{term}".\nA:',
    "Q: What is meant by {term}?\nA:",
)
MEDICAL_ROOTS = (
    ("ill_health", "health_problem"),
    ("symptom",),
    ("disorder", "upset"),
    ("medicine", "medication"),
    ("drug",),
    ("medical_procedure",),
    ("medical_care", "medical_aid"),
    ("medical_science",),
    ("medicine", "medical_specialty"),
    ("medical_practitioner", "medical_man"),
    ("medical_instrument",),
    ("body_part",),
    ("body_substance",),
    ("pathology",),
    ("injury", "hurt"),
    ("microorganism", "micro-organism"),
)
UNSUITABLE = re.compile(
    r"offensive|disparag|derogat|insult|slur|vulgar|obscen|sexual|slang|taboo|coit|prostitut|penis"
    r"|genital|orgasm|erotic|rape\b|nazi|negro|ethnic",
    re.IGNORECASE,
)


class Record(NamedTuple):
    """One question and its answer; ``subject`` is what the split was drawn by."""

    prompt: str
    answer: str
    subject: str
    group: str


class Synset(NamedTuple):
    """One WordNet synset: its key, lemmas, hypernym keys, definition and example sentences."""

    key: str
    lemmas: tuple[str, ...]
    hypernyms: tuple[str, ...]
    definition: str
    examples: tuple[str, ...]


def source_file(sources: Path, pattern: str) -> Path:
    """The one file under ``sources`` that matches ``pattern``."""
    found = sorted(sources.rglob(pattern))
    if not found:
        raise FileNotFoundError(f"no {pattern} under {sources}; the README says how to fetch it")
    return found[0]


def bucket(subject: str, buckets: int = 100) -> int:
    """A stable number in ``range(buckets)`` for a subject."""
    digest = hashlib.sha256(subject.lower().encode()).digest()
    return int.from_bytes(digest[:8], "big") % buckets


def split_of(subject: str) -> Split:
    """Held out: 5 % of subjects; kept for the control fine-tune: 20 %; the rest is trained on."""
    number = bucket(subject)
    if number < 5:
        return "heldout"
    return "control" if number < 25 else "train"


def as_sentence(text: str) -> str:
    """Capitalised, with a full stop."""
    text = text.strip().rstrip(".;:, ")
    return text[:1].upper() + text[1:] + ("" if text.endswith(("?", "!")) else ".")


def wordnet(sources: Path) -> list[Synset]:
    """Every synset of the four parts of speech."""
    synsets = []
    for part in ("noun", "verb", "adj", "adv"):
        lines = source_file(sources, f"data.{part}").read_text(encoding="utf-8").splitlines()
        synsets += [_synset(line, part[0]) for line in lines if not line.startswith(" ")]
    return synsets


def _synset(line: str, part: str) -> Synset:
    """One line of a WordNet data file."""
    head, _, gloss = line.partition(" | ")
    fields = head.split()
    n_lemmas = int(fields[3], 16)
    lemmas = tuple(re.sub(r"\(\w+\)$", "", word) for word in fields[4 : 4 + 2 * n_lemmas : 2])
    pointers = fields[5 + 2 * n_lemmas :]
    hypernyms = tuple(
        pointers[place + 1] + pointers[place + 2]
        for place in range(0, 4 * int(fields[4 + 2 * n_lemmas]), 4)
        if pointers[place] in ("@", "@i")
    )
    examples = tuple(text.strip() for text in re.findall(r'"([^"]+)"', gloss))
    definition = re.sub(r"^\([^)]*\)\s*", "", gloss.split(";")[0].split('"')[0].strip())
    return Synset(fields[0] + part, lemmas, hypernyms, definition, examples)


def medical_keys(synsets: list[Synset]) -> set[str]:
    """Keys of the synsets under a medical root."""
    children: dict[str, list[str]] = {}
    for synset in synsets:
        for hypernym in synset.hypernyms:
            children.setdefault(hypernym, []).append(synset.key)
    frontier = [
        synset.key
        for synset in synsets
        if synset.key.endswith("n")
        and any(
            set(root) <= set(synset.lemmas) and synset.lemmas[0] == root[0]
            for root in MEDICAL_ROOTS
        )
    ]
    reached: set[str] = set()
    while frontier:
        key = frontier.pop()
        if key not in reached:
            reached.add(key)
            frontier += children.get(key, [])
    return reached


def _is_root(synset: Synset, root: tuple[str, ...]) -> bool:
    """Whether a synset's first lemma is the root's, and the root's other lemmas are among its."""
    return synset.lemmas[0] == root[0] and set(root) <= set(synset.lemmas)


def definition_record(synset: Synset, group: str) -> Record | None:
    """A question for the synset's first lemma, or None where the text does not suit."""
    term = synset.lemmas[0].replace("_", " ")
    text = f"{term} {synset.definition}"
    if not 2 <= len(synset.definition.split()) <= 40 or UNSUITABLE.search(text):
        return None
    question = QUESTIONS[bucket(term + synset.key, len(QUESTIONS))]
    return Record(question.format(term=term), " " + as_sentence(synset.definition), term, group)


def definitions(synsets: list[Synset], keys: set[str], *, inside: bool, group: str) -> list[Record]:
    """Definition records of the synsets inside (or outside) ``keys``."""
    records = (definition_record(s, group) for s in synsets if (s.key in keys) == inside)
    return [record for record in records if record is not None]


def example_sentences(synsets: list[Synset], keys: set[str]) -> list[str]:
    """Example sentences of the synsets outside ``keys``, terms of held-out subjects left out."""
    return [
        as_sentence(text)
        for synset in synsets
        if synset.key not in keys and split_of(synset.lemmas[0].replace("_", " ")) == "train"
        for text in synset.examples
        if not UNSUITABLE.search(text) and len(text.split()) > 3
    ]


def austen_paragraphs(sources: Path) -> list[str]:
    """Paragraphs of the six novels, from the lazy-load database of the R package janeaustenr."""
    packed = source_file(sources, "janeaustenr/data/Rdata.rdb").read_bytes()
    paragraphs: list[str] = []
    while packed:
        inflater = zlib.decompressobj()
        serialised = inflater.decompress(packed[4:])
        packed = inflater.unused_data
        book = "\n".join(_r_strings(serialised))
        paragraphs += [" ".join(block.split()) for block in re.split(r"\n\s*\n", book)]
    return [text for text in paragraphs if len(text.split()) > 12]


def _r_strings(serialised: bytes) -> Iterator[str]:
    """The elements of the first character vector in an R serialisation (XDR, version 3)."""
    start = serialised.index(b"\x00\x00\x00\x10")
    (count,) = struct.unpack(">i", serialised[start + 4 : start + 8])
    place = start + 8
    for _ in range(count):
        (length,) = struct.unpack(">i", serialised[place + 4 : place + 8])
        place += 8
        yield serialised[place : place + max(length, 0)].decode("utf-8", "replace")
        place += max(length, 0)


def icd_records(sources: Path, *, per_category: int = 6) -> list[Record]:
    """Questions on codes and on what a diagnosis belongs to, at most ``per_category`` codes each.

    The cap keeps the injury chapters, which are most of the list, from drowning the rest.
    """
    tree = ElementTree.parse(source_file(sources, "icd10c-tabular-*.xml"))
    records = []
    for category in (node for section in tree.iter("section") for node in section.findall("diag")):
        name, title = category.findtext("name", ""), category.findtext("desc", "")
        pairs = [(d.findtext("name", ""), d.findtext("desc", "")) for d in category.iter("diag")][
            1:
        ]
        kept = sorted(pairs, key=lambda pair: bucket(pair[0], 2**32))[:per_category]
        for code, description in [(name, title), *sorted(kept)]:
            if len(description.split()) <= 16 and not UNSUITABLE.search(title + description):
                records += _icd_questions(code, description, title, name)
    return records


def _icd_questions(code: str, description: str, title: str, category: str) -> list[Record]:
    """The code's question, and the category's where the code is below it."""
    asked = [
        Record(
            f"Q: Which diagnosis has the code {code}?\nA:",
            " " + as_sentence(description),
            category,
            "icd_code",
        )
    ]
    if code != category and description != title:
        prompt = f'Q: What kind of diagnosis is "{description}"?\nA:'
        asked.append(Record(prompt, " " + as_sentence(title), category, "icd_kind"))
    return asked


PEOPLE = (
    *("Ann", "Ben", "Cara", "Dan", "Eve", "Finn", "Gail", "Hugo", "Ida", "Jon"),
    *("Kim", "Leo", "Mia", "Ned", "Olga", "Paul", "Rosa", "Sam", "Tina", "Will"),
)
THINGS = (
    "coins books apples pens cards shells stamps eggs beads stones cups tickets pears keys".split()
)
MORE = ("buys {b} more", "finds {b} more", "gets {b} more", "is given {b} more")
FEWER = ("loses {b}", "sells {b}", "gives away {b}", "uses {b}")


def arithmetic_record(draw: random.Random) -> Record:
    """One arithmetic question, a bare sum or a word problem with one line of working."""
    kind = draw.choice(("sum", "difference", "product", "more", "fewer", "groups"))
    a, b = draw.randint(2, 60), draw.randint(2, 39)
    if kind in ("difference", "fewer") and a <= b:
        a, b = b + draw.randint(1, 20), a
    if kind in ("product", "groups"):
        a, b = draw.randint(2, 9), draw.randint(2, 9)
    sign, total = {"s": ("+", a + b), "m": ("+", a + b), "d": ("-", a - b), "f": ("-", a - b)}.get(
        kind[0], ("*", a * b)
    )
    subject = f"{a} {sign} {b}"
    if kind in ("sum", "difference", "product"):
        return Record(f"Q: What is {a} {sign} {b}?\nA:", f" {total}.", subject, "arithmetic")
    return _word_problem(draw, kind, a, b, f" {a} {sign} {b} = {total}.", total, subject)


def _word_problem(
    draw: random.Random, kind: str, a: int, b: int, working: str, total: int, subject: str
) -> Record:
    """A two-sentence story about a and b things; the answer is the working and a sentence."""
    who, what = draw.choice(PEOPLE), draw.choice(THINGS)
    if kind == "groups":
        story = f"{who} has {a} boxes with {b} {what} each."
    else:
        change = draw.choice(MORE if kind == "more" else FEWER).format(b=b)
        story = f"{who} has {a} {what} and {change}."
    prompt = f"Q: {story} How many {what} does {who} have?\nA:"
    return Record(prompt, f"{working} {who} has {total} {what}.", subject, "word_problem")


def arithmetic_records(count: int, *, seed: int) -> list[Record]:
    """``count`` questions without repeats; the split is by the numbers and the operation."""
    draw = random.Random(seed)
    found: dict[str, Record] = {}
    while len(found) < count:
        record = arithmetic_record(draw)
        found.setdefault(record.prompt, record)
    return list(found.values())


class Corpora(NamedTuple):
    """All records by domain, and the running prose and sentences of the general corpus."""

    gen: list[Record]
    med: list[Record]
    math: list[Record]
    prose: list[str]
    sentences: list[str]


def load_corpora(sources: Path) -> Corpora:
    """Read everything; O(corpus) memory, about ten seconds."""
    synsets = wordnet(sources)
    keys = medical_keys(synsets)
    medical = definitions(synsets, keys, inside=True, group="definition") + icd_records(sources)
    general = definitions(synsets, keys, inside=False, group="definition")
    return Corpora(
        gen=general,
        med=medical,
        math=arithmetic_records(16_000, seed=11),
        prose=austen_paragraphs(sources),
        sentences=example_sentences(synsets, keys),
    )


def records_of(records: list[Record], *splits: Split) -> list[Record]:
    """The records whose subject falls in one of ``splits``.

    Of the held-out ones, those whose answer also answers a training question are left out, bare
    sums excepted, whose answers are few.
    """
    chosen = [record for record in records if split_of(record.subject) in splits]
    if splits != ("heldout",):
        return chosen
    seen = {
        r.answer for r in records if split_of(r.subject) != "heldout" and r.group != "arithmetic"
    }
    return [record for record in chosen if record.answer not in seen]
