"""Declared steps that clean a caption, each a function of the text alone. The sidecar keeps the raw caption.

The default chain does what the CLIP tokenizers of open_clip do to a text before they split it (ftfy, HTML
entities twice, whitespace), so that a cleaned caption tokenizes alike wherever it is read later.
"""

from __future__ import annotations

import html
import re
import unicodedata
from collections.abc import Callable, Sequence

import ftfy
import pyarrow as pa
import pyarrow.compute as pc

VERSION = 2  # raised whenever a step's output changes; part of a shard's fingerprint

# Printable ASCII without `&`: no step but `whitespace` changes such a text. It is most of the English web.
_PLAIN = re.compile(r"[ -%'-~]*\Z")


def html_entities(text: str) -> str:
    """`&amp;lt;` -> `<`: unescaped twice, since tables of web text are often escaped twice."""
    return html.unescape(html.unescape(text))


def mojibake(text: str) -> str:
    """Repair text decoded in the wrong encoding, odd quotes, ligatures, widths and control characters (ftfy)."""
    return ftfy.fix_text(text)


def nfc(text: str) -> str:
    """Unicode normalisation form C: one sequence of code points for what looks alike."""
    return unicodedata.normalize("NFC", text)


def whitespace(text: str) -> str:
    """One space for every run of whitespace, none at the ends."""
    return " ".join(text.split())


# Only from where a name begins: to try each letter of a text of millions would take the square of that.
_EMAIL = re.compile(r"(?<![\w.+%-])[\w.+%-]+@(?:[\w-]+\.)+[^\W\d_]{2,}")
_DIGITS = re.compile(r"(?<![\w.,/+-])(?:\+|\()?\d(?:[ ().\-/]{0,2}\d){7,14}(?![\w/-])(?![.,]\d)")
_DATE_OR_ADDRESS = re.compile(r"\d{1,4}([./-])\d{1,2}\1\d{1,4}|\d{1,3}(\.\d{1,3}){3}")
_NORTH_AMERICAN = re.compile(r"(1[ .-])?\(?\d{3}(\) ?|[ .-])\d{3}[ .-]\d{4}")


def emails(text: str) -> str:
    """Take out e-mail addresses."""
    return _EMAIL.sub("", text) if "@" in text else text


def telephones(text: str) -> str:
    """Take out what is written like a telephone number: +49 30 1234567, (030) 123-4567, 555-123-4567.

    8 to 15 digits (E.164 allows no more) that begin with + or 00, or with 0 or a bracket and have separators,
    or have the North American form. Dates, IP addresses and bare numbers stay.
    """

    def judged(match: re.Match[str]) -> str:
        found = match.group()
        if _DATE_OR_ADDRESS.fullmatch(found):
            return found
        separated = not found.isdigit() and sum(map(str.isdigit, found)) >= 9
        is_one = found.startswith(("+", "00")) or (found[0] in "(0" and separated) or _NORTH_AMERICAN.fullmatch(found)
        return "" if is_one else found

    return _DIGITS.sub(judged, text)


STEPS: dict[str, Callable[[str], str]] = {
    "html_entities": html_entities,
    "mojibake": mojibake,
    "nfc": nfc,
    "whitespace": whitespace,
    "emails": emails,
    "telephones": telephones,
}
DEFAULT_STEPS = ("html_entities", "mojibake", "nfc", "whitespace")
_CHANGE_PLAIN = ("emails", "telephones")  # steps that also change plain ASCII, beside whitespace


def clean(text: str, steps: Sequence[str]) -> str:
    """Apply the named steps in their order."""
    if _PLAIN.match(text) and not any(step in steps for step in _CHANGE_PLAIN):
        return whitespace(text) if "whitespace" in steps else text
    for step in steps:
        text = STEPS[step](text)
    return text


def clean_all(texts: pa.Array, steps: Sequence[str]) -> list[str]:
    """`clean` of every text (string array; null as an empty one). Plain ASCII goes through Arrow, ten times as fast."""
    if any(step in steps for step in _CHANGE_PLAIN):
        return [clean(text or "", steps) for text in texts.to_pylist()]
    texts = texts.fill_null("")
    if "whitespace" in steps:  # of plain texts blanks are the only whitespace
        joined = pc.utf8_trim(pc.replace_substring_regex(texts, " {2,}", " "), " ").to_pylist()
    else:
        joined = texts.to_pylist()
    for i in pc.indices_nonzero(pc.invert(pc.match_substring_regex(texts, r"\A[ -%'-~]*\z"))).to_pylist():
        joined[i] = clean(texts[i].as_py(), steps)
    return joined
