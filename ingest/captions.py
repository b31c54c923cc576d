"""Declared steps that clean a caption, each a function of the text alone. The sidecar keeps the raw caption.

The default chain does what the CLIP tokenizers of open_clip do to a text before they split it (ftfy, HTML
entities twice, whitespace), so that a cleaned caption tokenizes alike wherever it is read later.
"""

from __future__ import annotations

import html
import re
import unicodedata
from collections.abc import Callable, Iterator, Sequence

import ftfy
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from ftfy.badness import is_bad

VERSION = 2  # raised whenever a step's output changes; part of a shard's fingerprint

# Letters that no step but `whitespace` changes by themselves: of ASCII what is printed, without `&`; of others those
# that are no ligature, width, quote, control or mark and are in form C. Blanks are the only whitespace among them.
_KANA_HAN_HANGUL = r"\u3041-\u3096\u30a1-\u30fa\u4e00-\u9fff\uac00-\ud7a3"
_SOUND = (
    r"[ -%'-~\u00a1-\u0131\u0134-\u0148\u014a-\u01c3\u01cd-\u01f0\u01f4-\u02bb\u0388-\u0482\u048a-\u052f"
    rf"\u2010-\u2015{_KANA_HAN_HANGUL}]*"
)
# ftfy needs 50 microseconds to find a text sound, as most are. What it takes for mojibake has two letters side by side
# that are neither ASCII nor of these scripts, or one of \u0152, \u0153, \u00c2, \u00c3.
_SUSPICIOUS = rf"[^ -~{_KANA_HAN_HANGUL}][^ -~{_KANA_HAN_HANGUL}]|[\u0152\u0153\u00c2\u00c3]"
_is_sound, _is_suspicious = re.compile(_SOUND).fullmatch, re.compile(_SUSPICIOUS).search


def html_entities(text: str) -> str:
    """`&amp;lt;` -> `<`: unescaped twice, since tables of web text are often escaped twice."""
    return html.unescape(html.unescape(text))


def mojibake(text: str) -> str:
    """Repair text decoded in the wrong encoding, odd quotes, ligatures, widths and control characters (ftfy)."""
    if _is_sound(text) and not is_bad(text):  # what ftfy would find out in four times the time
        return text
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
_CHANGE_SOUND = ("emails", "telephones")  # steps that change sound texts, beside whitespace


def clean(text: str, steps: Sequence[str]) -> str:
    """Apply the named steps in their order."""
    if _is_sound(text) and not _is_suspicious(text) and not any(step in steps for step in _CHANGE_SOUND):
        return whitespace(text) if "whitespace" in steps else text
    for step in steps:
        text = STEPS[step](text)
    return text


def clean_all(texts: pa.Array, steps: Sequence[str]) -> list[str]:
    """`clean` of every text (string array; null as an empty one). Most are clean already, as their bytes tell."""
    texts = texts.fill_null("")
    found: list[str] = texts.to_pylist()
    for i, text in _changed(texts, steps):
        found[i] = text
    return found


def fold_all(texts: pa.Array, steps: Sequence[str]) -> list[bytes]:
    """`clean` of every text, without case, in UTF-8: what tells whether two captions are one."""
    texts = texts.fill_null("")
    found: list[bytes] = pc.ascii_lower(texts).cast(pa.binary()).to_pylist()
    for i, text in _changed(texts, steps):
        found[i] = text.casefold().encode("utf-8", "surrogatepass")
    return found


def _changed(texts: pa.Array, steps: Sequence[str]) -> Iterator[tuple[int, str]]:
    """(row, `clean` of it) of all texts that are not of ASCII, or that the steps may change."""
    if any(step in steps for step in _CHANGE_SOUND):
        yield from ((i, clean(text, steps)) for i, text in enumerate(texts.to_pylist()))
        return
    plain, spaced = _looked_at(texts)
    spaced |= "whitespace" not in steps
    rest = np.flatnonzero(~(plain & spaced))
    others = texts.take(pa.array(rest))
    sound = pc.match_substring_regex(others, rf"\A{_re2(_SOUND)}\z")
    sound = pc.and_not(sound, pc.match_substring_regex(others, _re2(_SUSPICIOUS))).to_pylist()
    for i, text, is_sound, is_spaced in zip(rest.tolist(), others.to_pylist(), sound, spaced[rest], strict=True):
        if not is_sound:
            yield i, clean(text, steps)
        else:
            yield i, text if is_spaced else whitespace(text)


def _looked_at(texts: pa.Array) -> tuple[np.ndarray, np.ndarray]:
    """Of texts (string array without nulls): whether each is of sound ASCII, and whether it has no blanks side by side
    nor at its ends; bool."""
    plain, spaced = np.ones(len(texts), bool), np.ones(len(texts), bool)
    if not len(texts):
        return plain, spaced
    offsets = np.frombuffer(texts.buffers()[1], np.int32)[texts.offset : texts.offset + len(texts) + 1]
    if offsets[0] == offsets[-1]:
        return plain, spaced
    data = np.frombuffer(texts.buffers()[2], np.uint8)[offsets[0] : offsets[-1]]
    edges = offsets - offsets[0]
    # From blank to ~ are 95 of the bytes; those before the blank are beyond them once it is taken off.
    odd = (data - np.uint8(0x20) > 0x5E) | (data == ord("&"))
    blank = data == ord(" ")
    wide = np.zeros(len(data), bool)
    wide[1:] = blank[1:] & blank[:-1]
    begins, ends = edges[:-1], edges[1:]
    some = begins < ends
    wide[begins[some]] |= blank[begins[some]]
    wide[ends[some] - 1] |= blank[ends[some] - 1]
    for found, at in ((plain, odd), (spaced, wide)):
        found[np.searchsorted(edges, np.flatnonzero(at), side="right") - 1] = False
    return plain, spaced


def _re2(pattern: str) -> str:
    """A pattern in the spelling of Arrow's regular expressions."""
    return re.sub(r"\\u([0-9a-f]{4})", r"\\x{\1}", pattern)
