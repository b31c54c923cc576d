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
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from ftfy.badness import is_bad

VERSION = 2  # raised whenever a step's output changes; part of a shard's fingerprint

# Letters that no step but `whitespace` changes by themselves: of ASCII what is printed, without `&`; of others those
# that are no ligature, width, quote, control or mark and are in form C. Blanks are the only whitespace among them.
_KANA_HAN_HANGUL = r"\u3041-\u3096\u30a1-\u30fa\u4e00-\u9fff\uac00-\ud7a3"
_SOUND = (
    r" -%'-~\u00a1-\u0131\u0134-\u0148\u014a-\u01c3\u01cd-\u01f0\u01f4-\u02bb\u0388-\u0482\u048a-\u052f"
    rf"\u2010-\u2015{_KANA_HAN_HANGUL}"
)
# ftfy needs 50 microseconds to find a text sound, as most are. What it takes for mojibake has two letters side by side
# that are neither ASCII nor of these scripts, or one of \u0152, \u0153, \u00c2, \u00c3.
_SUSPICIOUS = rf"[^ -~{_KANA_HAN_HANGUL}][^ -~{_KANA_HAN_HANGUL}]|[\u0152\u0153\u00c2\u00c3]"
_is_sound, _is_suspicious = re.compile(f"[{_SOUND}]*").fullmatch, re.compile(_SUSPICIOUS).search
# The same of both at once, in the spelling of Arrow's regular expressions.
_UNSURE_RE2 = re.sub(r"\\u([0-9a-f]{4})", r"\\x{\1}", f"[^{_SOUND}]|{_SUSPICIOUS}")


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


def clean_all(texts: pa.Array, steps: Sequence[str]) -> pa.Array:
    """`clean` of every text (string array; null as an empty one). Most are clean already, as their bytes tell."""
    texts = texts.fill_null("")
    unsure = _unsure(texts, steps)
    if not unsure.any():
        return texts
    made = [clean(text, steps) for text in texts.filter(pa.array(unsure)).to_pylist()]
    return pc.replace_with_mask(texts, pa.array(unsure), pa.array(made, pa.string()))


def _unsure(texts: pa.Array, steps: Sequence[str]) -> np.ndarray:
    """Which of the texts (string array without nulls) the steps may change, bool."""
    if not len(texts) or any(step in steps for step in _CHANGE_SOUND):
        return np.ones(len(texts), bool)
    edges, data = bytes_of(texts)
    blank = data == ord(" ")
    odd = (data < 0x20) | (data == 0x7F) | (data == ord("&"))
    found = np.zeros(len(texts), bool)
    if "whitespace" in steps:
        odd[1:] |= blank[1:] & blank[:-1]
        some = np.flatnonzero(edges[:-1] < edges[1:])
        found[some] = blank[edges[some]] | blank[edges[some + 1] - 1]
    found[np.searchsorted(edges, np.flatnonzero(odd), side="right") - 1] = True
    others = pc.invert(pc.string_is_ascii(texts))
    unsure = pc.match_substring_regex(texts.filter(others), _UNSURE_RE2)
    found[others.to_numpy(zero_copy_only=False)] |= unsure.to_numpy(zero_copy_only=False)
    return found


def bytes_of(texts: pa.Array) -> tuple[np.ndarray, np.ndarray]:
    """Where each text begins, and the last ends, int32 [texts + 1]; and the bytes of all, uint8.

    texts: a string array without nulls, not empty.
    """
    edges = np.frombuffer(texts.buffers()[1], np.int32)[texts.offset : texts.offset + len(texts) + 1]
    data = np.frombuffer(texts.buffers()[2] or b"", np.uint8)[edges[0] : edges[-1]]
    return edges - edges[0], data
