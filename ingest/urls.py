"""URLs as they stand: what is legal in one goes out letter for letter, what is not is quoted as browsers do it.

Many image servers sign the exact target that they gave out, so `%2C` may not become `,`, nor `/a/../b` `/b`.
So nothing is decoded, sorted or shortened here. Quoted are controls, blanks, letters beyond ASCII and
`"<>\\^`{}`; a lone `%` and `[]|` stay, as in the address bar (url.spec.whatwg.org, percent-encode sets). Hosts are
brought to one form: small letters, IDNA, numeric addresses in four decimals.
"""

from __future__ import annotations

import functools
import re
import socket
import urllib.parse

from yarl import URL

from ingest.errors import Rejected

LONGEST = 1 << 15  # characters; servers read 8 to 16 KB of a request's first line

_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*):(.*)", re.DOTALL)
_AROUND = "".join(map(chr, range(33))) + "\x7f\x85\xa0\u2028\u2029\u3000\ufeff"
_WITHIN = str.maketrans("", "", "\t\r\n")
_LEGAL = "!$&'()*+,;=:@/%[]|"  # beside letters, digits and -._~; in a query ? too
_HALVES = re.compile("[\ud800-\udc7f\udd00-\udfff]")  # of a pair, but for what stands for a byte of a header
_IPV6 = re.compile(r"[0-9A-Fa-f.]*:[0-9A-Fa-f:.]*(?:%(?:25)?[A-Za-z0-9_.~-]+)?\Z")
_NUMERIC = re.compile(r"(?:0[xX][0-9A-Fa-f]*|[0-9]+)\Z")


def parse_url(text: str) -> URL:
    """A table's URL, ready to be asked for; raises Rejected (url_missing, url_invalid, scheme_refused)."""
    text = text.strip(_AROUND).translate(_WITHIN)
    if not text:
        raise Rejected("url_missing")
    if len(text) > LONGEST:
        raise Rejected("url_invalid", "a URL longer than servers read")
    found = _SCHEME.match(text)
    if found is None:
        raise Rejected("url_invalid")
    scheme, rest = found[1].lower(), found[2]
    if scheme not in ("http", "https"):
        raise Rejected("scheme_refused", "neither http nor https")
    if not rest.startswith("//"):
        raise Rejected("url_invalid")
    try:
        return _built(scheme, rest[2:].partition("#")[0])
    except Rejected:
        raise
    except Exception:  # whatever a parser of somebody else's makes of it
        raise Rejected("url_invalid") from None


def redirect(url: URL, location: str | None) -> URL:
    """Where a redirect from `url` leads (RFC 3986, 5.2); raises Rejected (redirect_invalid, scheme_refused).

    Dot segments go where a relative path is joined to the old one; a path of its own stays as it stands.
    """
    target = (location or "").strip(_AROUND).translate(_WITHIN)
    if not target or len(target) > LONGEST:
        raise Rejected("redirect_invalid")
    found = _SCHEME.match(target)
    if found and found[1].lower() not in ("http", "https"):
        raise Rejected("scheme_refused", "a redirect to neither http nor https")
    if not found:
        origin = f"{url.scheme}://{url.raw_authority}"
        if target.startswith("//"):
            target = f"{url.scheme}:{target}"
        elif target.startswith("/"):
            target = origin + target
        elif target.startswith(("?", "#")):
            query = "" if target.startswith("?") or not url.raw_query_string else "?" + url.raw_query_string
            target = origin + url.raw_path + query + target
        else:
            path, mark, more = re.split(r"([?#]|\Z)", target, maxsplit=1)
            target = origin + _without_dots(url.raw_path.rpartition("/")[0] + "/" + path) + mark + more
    try:
        return parse_url(target)
    except Rejected:
        raise Rejected("redirect_invalid") from None


def _built(scheme: str, rest: str) -> URL:
    authority, path, query = re.fullmatch(r"([^/?]*)([^?]*)(?:\?(.*))?", rest, re.DOTALL).groups()  # type: ignore[union-attr]
    user, at, host_port = authority.rpartition("@")
    host, port = host_port, ""
    if host.startswith("["):
        host, bracket, port = host[1:].partition("]")
        if not bracket or not _IPV6.match(host):
            raise Rejected("url_invalid")
    elif ":" in host:
        host, _, port = host.partition(":")
        port = ":" + port
    if port and not re.fullmatch(r":[0-9]{0,5}", port):
        raise Rejected("url_invalid")
    number = int(port[1:]) if len(port) > 1 else None
    if number is not None and not 0 < number < 65536:
        raise Rejected("url_invalid")
    name, _, password = user.partition(":")
    base = URL.build(
        scheme=scheme,
        user=urllib.parse.unquote(name) if at else None,
        password=urllib.parse.unquote(password) if ":" in user else None,
        host=_host(host),
        port=number,
    )
    return URL.build(
        scheme=scheme,
        authority=base.raw_authority,
        path=_quoted(path, _LEGAL) or "/",
        query_string=_quoted(query or "", _LEGAL + "?"),
        encoded=True,
    )


@functools.lru_cache(maxsize=1 << 14)
def _host(host: str) -> str:
    """A host in the form in which it is looked up; raises Rejected (url_invalid), or what IDNA raises."""
    if ":" in host:
        return host
    if not host or len(host) > 1024:
        raise Rejected("url_invalid")
    host = URL.build(scheme="http", host=urllib.parse.unquote(host, errors="strict")).raw_host or ""
    labels = host.removesuffix(".").split(".")
    if len(host) > 254 or any(not 0 < len(label) < 64 for label in labels):
        raise Rejected("url_invalid", "the host name is not valid")
    if _NUMERIC.match(labels[-1]):  # as browsers and the C library have it: 127.1, 0x7f000001 and 2130706433 are one
        return socket.inet_ntoa(socket.inet_aton(".".join(labels)))
    return host


def _quoted(text: str, legal: str) -> str:
    """What may not stand in a URL as its UTF-8 bytes; a byte of a header that is no UTF-8 as itself."""
    return urllib.parse.quote(_HALVES.sub("\ufffd", text), legal, errors="surrogateescape")


def _without_dots(path: str) -> str:
    """RFC 3986, 5.2.4, for a path that begins with a slash."""
    kept: list[str] = []
    parts = path.split("/")[1:]
    for part in parts:
        if part == "..":
            kept[-1:] = []
        elif part != ".":
            kept.append(part)
    if parts[-1] in (".", ".."):
        kept.append("")
    return "/" + "/".join(kept)
