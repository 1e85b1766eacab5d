"""The corpus ``python-docs``: the language reference every Python has in ``pydoc_data.topics``.

It needs no network and no download. Its topics overlap heavily (a long topic repeats the short
ones), so paragraphs are deduplicated first; what is left, about 370,000 characters or 90,000
tokens, is split by whole sections into ``evaluation`` (about a fifth) and ``calibration``.
The text differs a little between Python versions, which is why every result states its sha256.
"""

import hashlib
import re
import unicodedata
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from posttrain.errors import UserError

EVALUATION_SHARE = 0.21  # of all characters: 36 windows of 512 tokens; leaves calibration 128 more
SHINGLE_WORDS = 5
NEAR_DUPLICATE_SHARE = 0.5  # of a paragraph's shingles that occur in the other split

_PARAGRAPH_BREAK = re.compile(r"\n[ \t]*\n")
_UNDERLINED_TITLE = re.compile(r"^\S[^\n]*\n([*=\-~^])\1{2,}$")


@dataclass(frozen=True)
class Section:
    """A heading and the paragraphs below it, up to the next heading."""

    paragraphs: tuple[str, ...]

    @property
    def text(self) -> str:
        return "\n\n".join(self.paragraphs)

    @property
    def digest(self) -> str:
        return hashlib.sha256(self.text.encode()).hexdigest()


def python_docs(split: str) -> list[str]:
    """Sections of the Python language reference that belong to ``split``, in reading order.

    ``split`` is "evaluation" or "calibration". The two share no paragraph, exact or near.
    """
    sections = list(_unique_sections(_topics()))
    evaluation = _evaluation_digests(sections)
    held_out = [s for s in sections if s.digest in evaluation]
    if split == "evaluation":
        return [section.text for section in held_out]
    known = _shingles_of(p for section in held_out for p in section.paragraphs)
    rest = (_without_near_duplicates(s, known) for s in sections if s.digest not in evaluation)
    return [section.text for section in rest if _has_prose(section.paragraphs)]


def paragraph_key(paragraph: str) -> str:
    """What makes two paragraphs the same: their words, whatever the case and the line breaks."""
    return " ".join(unicodedata.normalize("NFKC", paragraph).casefold().split())


def _topics() -> dict[str, str]:
    try:
        from pydoc_data.topics import topics
    except ImportError as error:
        raise UserError(
            "the corpus python-docs is Python's own pydoc_data.topics, which this Python "
            "was installed without; name a text file instead (.txt, .md, .jsonl)"
        ) from error
    return topics


def _unique_sections(topics: dict[str, str]) -> Iterator[Section]:
    """Each paragraph once, where it stands in the longest topic that has it."""
    seen: set[str] = set()
    for name in sorted(topics, key=lambda name: (-len(topics[name]), name)):
        for section in _sections(topics[name]):
            fresh = []
            for paragraph in section.paragraphs:
                key = paragraph_key(paragraph)
                if key not in seen:
                    seen.add(key)
                    fresh.append(paragraph)
            if _has_prose(fresh):
                yield Section(tuple(fresh))


def _sections(topic: str) -> Iterator[Section]:
    current: list[str] = []
    for paragraph in _paragraphs(topic):
        if _UNDERLINED_TITLE.match(paragraph) and current:
            yield Section(tuple(current))
            current = []
        current.append(paragraph)
    if current:
        yield Section(tuple(current))


def _paragraphs(topic: str) -> Iterator[str]:
    for raw in _PARAGRAPH_BREAK.split(unicodedata.normalize("NFC", topic)):
        lines = [line.rstrip() for line in raw.splitlines()]
        paragraph = "\n".join(lines).strip("\n")
        if paragraph.strip():
            yield paragraph


def _has_prose(paragraphs: Iterable[str]) -> bool:
    """False for a section of which only its heading was new."""
    return any(not _UNDERLINED_TITLE.match(paragraph) for paragraph in paragraphs)


def _evaluation_digests(sections: list[Section]) -> set[str]:
    """Fill the evaluation split in order of content hash, so that no one chose what is in it."""
    room = EVALUATION_SHARE * sum(len(section.text) for section in sections)
    chosen = set()
    for section in sorted(sections, key=lambda section: section.digest):
        if len(section.text) <= room:
            chosen.add(section.digest)
            room -= len(section.text)
    return chosen


def _shingles(paragraph: str) -> set[tuple[str, ...]]:
    words = re.findall(r"\w+", paragraph_key(paragraph))
    return {
        tuple(words[i : i + SHINGLE_WORDS]) for i in range(max(1, len(words) - SHINGLE_WORDS + 1))
    }


def _shingles_of(paragraphs: Iterable[str]) -> set[tuple[str, ...]]:
    return set().union(*map(_shingles, paragraphs))


def _without_near_duplicates(section: Section, known: set[tuple[str, ...]]) -> Section:
    def is_new(paragraph: str) -> bool:
        shingles = _shingles(paragraph)
        return len(shingles & known) < NEAR_DUPLICATE_SHARE * len(shingles)

    return Section(tuple(filter(is_new, section.paragraphs)))
