"""The stable list of what can become of a row that gives no image.

A row's `status` is one of shards.images.STATUSES, its `error` one of these codes. Codes are part of the
data format: they may be added to, never renamed. `retryable` says that trying again later can help; the
fetcher itself tries these again within a run, and only these.
"""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class ErrorCode:
    """One code: the status of rows that carry it, and whether another attempt may succeed."""

    code: str
    status: str
    retryable: bool
    meaning: str


_DOWNLOAD, _RESIZE, _FILTERED, _OPTED_OUT = "failed_to_download", "failed_to_resize", "filtered", "opted_out"

ERRORS: dict[str, ErrorCode] = {
    e.code: e
    for e in (
        ErrorCode("url_missing", _DOWNLOAD, False, "the row has no URL"),
        ErrorCode("url_invalid", _DOWNLOAD, False, "the text is not a URL with a host"),
        ErrorCode("scheme_refused", _DOWNLOAD, False, "neither http nor https, in the table or after a redirect"),
        ErrorCode("address_refused", _DOWNLOAD, False, "the host's address is not a public one"),
        ErrorCode("dns_not_found", _DOWNLOAD, False, "the host does not exist"),
        ErrorCode("dns_failure", _DOWNLOAD, True, "the name server gave no answer"),
        ErrorCode("connect_refused", _DOWNLOAD, True, "nobody listens there, or no way leads to it"),
        ErrorCode("connect_timeout", _DOWNLOAD, True, "no connection within connect_timeout"),
        ErrorCode("tls_error", _DOWNLOAD, False, "no TLS connection, or a certificate that is not valid"),
        ErrorCode(
            "host_unavailable", _DOWNLOAD, True, "not asked for, since the host failed host_failures times in a row"
        ),
        ErrorCode("connection_lost", _DOWNLOAD, True, "the connection broke before an answer"),
        ErrorCode("timeout", _DOWNLOAD, True, "the whole answer did not come within the deadline"),
        ErrorCode("too_slow", _DOWNLOAD, True, "the body came at less than min_speed"),
        ErrorCode("http_not_found", _DOWNLOAD, False, "404 or 410"),
        ErrorCode("http_forbidden", _DOWNLOAD, False, "401, 402, 403, 407 or 451"),
        ErrorCode("http_rate_limited", _DOWNLOAD, True, "429"),
        ErrorCode("http_client_error", _DOWNLOAD, False, "another 4xx"),
        ErrorCode("http_server_error", _DOWNLOAD, True, "5xx"),
        ErrorCode("http_unexpected", _DOWNLOAD, False, "a status that brings no body, such as 204 or 304"),
        ErrorCode("http_malformed", _DOWNLOAD, False, "the answer is not HTTP"),
        ErrorCode("too_many_redirects", _DOWNLOAD, False, "more than max_redirects, or in a circle"),
        ErrorCode("redirect_invalid", _DOWNLOAD, False, "a redirect without a usable location"),
        ErrorCode("body_empty", _DOWNLOAD, False, "no bytes"),
        ErrorCode("body_too_large", _DOWNLOAD, False, "more than max_bytes, announced, sent or once decompressed"),
        ErrorCode("body_truncated", _DOWNLOAD, True, "fewer bytes than announced"),
        ErrorCode("encoding_unsupported", _DOWNLOAD, False, "a content encoding that was not asked for"),
        ErrorCode("place_refused", _DOWNLOAD, False, "a file outside the folders that ingest.source.files_below names"),
        ErrorCode("source_missing", _DOWNLOAD, False, "the file, member or value that should hold it is not there"),
        ErrorCode("source_unreadable", _DOWNLOAD, True, "the file may not be read by this user"),
        ErrorCode("source_damaged", _DOWNLOAD, False, "the file that should hold it is damaged"),
        ErrorCode("key_twice", _DOWNLOAD, False, "a sample of the same key came before it in its tar"),
        ErrorCode("unforeseen", _DOWNLOAD, False, "an error that nobody foresaw; the message has its name"),
        ErrorCode("not_an_image", _RESIZE, False, "no image in a known format (a web page, most often)"),
        ErrorCode(
            "image_too_large",
            _RESIZE,
            False,
            "more than max_pixels by its header, or more work than that; it was not decoded",
        ),
        ErrorCode("image_truncated", _RESIZE, False, "the image ends before its last row"),
        ErrorCode("image_corrupt", _RESIZE, False, "the image cannot be decoded"),
        ErrorCode("image_unsupported", _RESIZE, False, "a pixel type without a defined conversion to RGB"),
        ErrorCode("animation_refused", _RESIZE, False, "the image moves, and the configuration refuses such"),
        ErrorCode("img2dataset_download", _DOWNLOAD, True, "img2dataset could not fetch it; the message is its own"),
        ErrorCode("img2dataset_resize", _RESIZE, False, "img2dataset could not decode it; the message is its own"),
        ErrorCode("caption_empty", _FILTERED, False, "no caption, or none left after cleaning"),
        ErrorCode("filtered_out", _FILTERED, False, "a filter of the configuration; the message names it"),
        ErrorCode("x_robots_tag", _OPTED_OUT, False, "an X-Robots-Tag header forbids it"),
        ErrorCode("tdm_reservation", _OPTED_OUT, False, "the TDM reservation header is set"),
        ErrorCode("robots_txt", _OPTED_OUT, False, "the host's robots.txt forbids it"),
        ErrorCode("taken_down", _OPTED_OUT, False, "its removal was asked for; see taken_down.parquet"),
    )
}

RETRYABLE = frozenset(e.code for e in ERRORS.values() if e.retryable)

# Reasons in exclusions.parquet, and what each counts as. Such rows were stored as success; a pass over all
# sidecars excludes them.
EXCLUSION_STATUS = {
    "duplicate_url": "duplicate",
    "duplicate_bytes": "duplicate",
    "duplicate_picture": "duplicate",
    "in_other_split": "duplicate",  # the same bytes lie in the other split, perhaps under another caption
    "caption_repeated": "filtered",
}


class Rejected(Exception):
    """A row ends here, with a code of ERRORS and a message that does not change from run to run."""

    def __init__(self, code: str, message: str = "") -> None:
        super().__init__(code, message)
        self.code = code
        self.message = message or ERRORS[code].meaning
        self.attempts = 0  # how often it was asked for, where it was

    @property
    def retryable(self) -> bool:
        """Whether another attempt may succeed."""
        return ERRORS[self.code].retryable
