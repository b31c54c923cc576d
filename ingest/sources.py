"""Images of one's own as a table: folders, WebDataset tars, parquet and Arrow files with the bytes inside.

What `ingest.table` points at is looked through and written down as parquet files of rows,
`<run>/listing/00000.parquet`, then an ordinary table whose rows name locations (ingest/locations.py). So these
images have the fates, filters, duplicates, hashes and accounts of those from the web.

A listing is only ever added to: a part holds what was not there when the parts before it were written. So new files
make new shards and touch no old one, and a file that is gone is named in the log and nothing more.
"""

from __future__ import annotations

import functools
import hashlib
import io
import logging
import re
import tarfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import IO, Any, Literal, NamedTuple

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from tqdm import tqdm

from ingest import caption_files, locations
from ingest.config import SourceKind
from ingest.formats import kept_type, text_array
from ingest.listing import Listing, Row, Seen, Wanted, hashes_of, legal
from ingest.tables import CAPTION_NAMES, URL_NAMES
from shards import storage
from shards.plan import stamps
from shards.settings import ConfigError, StageError

log = logging.getLogger("carrara.ingest")

IMAGES = re.compile(r"\.(jpe?g|png|webp|gif|bmp|tiff?|avif|mpo)\Z", re.IGNORECASE)
BINARY = re.compile(r"\.(parquet|arrow)\Z", re.IGNORECASE)
METADATA = re.compile(r"(?:\A|/)metadata\.(jsonl|csv|parquet)\Z", re.IGNORECASE)
_TEXTS = ("txt", "caption", "json", "cls")  # a sample's members that say something of its image
_LONGEST_HEADER = 1 << 20  # bytes of a tar's header that says more of the next member, which is read into memory
_AHEAD = 32 << 10  # bytes of a tar in a store that are read at a time: headers, and the texts of a sample
_PART_ROWS = 200_000
_LOOKED_AT = 1000  # files of a folder that are looked at to recognise what it is


@functools.lru_cache(maxsize=16)  # asked again and again within a command, also of stores that are far away
def detect(table: str, kind: Literal["auto", SourceKind] = "auto") -> SourceKind:
    """What a path, folder or glob holds. Raises ConfigError where it holds nothing that is known, or several kinds."""
    if kind != "auto":
        return kind
    fs, path = _open_fs(table)
    if not _is_glob(fs, table, path) and not fs.isdir(path):
        return _kind_of_file(table)
    names = _some_files(fs, path, _is_glob(fs, table, path))
    if any(n.lower().endswith(".tar") for n in names):
        return "webdataset"
    if any(IMAGES.search(n) for n in names):
        return "folder"
    binary = [n for n in names if BINARY.search(n)]
    if binary:
        return _kind_of_file(str(fs.unstrip_protocol(binary[0])) if "://" in table else binary[0])
    return "table"


def _is_glob(fs: Any, table: str, path: str) -> bool:
    return any(c in table for c in "*?[") and not fs.exists(path)


def _kind_of_file(file: str) -> SourceKind:
    if file.lower().endswith((".tar.gz", ".tgz", ".tar.zst", ".zip")):
        raise ConfigError(
            f"ingest.table: '{file}' is a packed archive, in which no image can be read by its place; unpack it"
        )
    if file.lower().endswith(".tar"):
        return "webdataset"
    if file.lower().endswith(".arrow"):
        return "parquet"
    if file.lower().endswith(".parquet"):
        try:
            with fsspec.open(file, "rb") as stream:
                schema = pq.read_schema(stream)
        except (pa.ArrowException, OSError, UnicodeError):
            return "table"  # which says what is wrong with it
        return "parquet" if image_column(schema, None) and not _has_urls(schema) else "table"
    return "table"


def _has_urls(schema: pa.Schema) -> bool:
    return any(f.name.lower() in URL_NAMES and pa.types.is_string(f.type) for f in schema)


def _some_files(fs: Any, path: str, glob: bool) -> list[str]:
    """Some of the files below a folder, the upper ones first."""
    if glob:
        return sorted(fs.glob(path))[:_LOOKED_AT]
    found: list[str] = []
    folders = [path]
    while folders and len(found) < _LOOKED_AT:
        for info in sorted(fs.ls(folders.pop(0), detail=True), key=lambda i: i["name"])[: 4 * _LOOKED_AT]:
            name = info["name"].rstrip("/")
            if not _hidden(name):
                (folders if info["type"] == "directory" else found).append(name)
    return found


def _hidden(path: str) -> bool:
    return path.rstrip("/").rpartition("/")[2].startswith((".", "_"))


def _open_fs(table: str) -> tuple[Any, str]:
    try:
        fs, path = fsspec.core.url_to_fs(table)
        there = fs.exists(path) or any(c in table for c in "*?[")
    except Exception as e:  # each kind of store has its own
        raise ConfigError(f"ingest.table: '{table}' cannot be opened: {' '.join(str(e).split())[:300]}") from None
    if not there:
        raise ConfigError(f"ingest.table: there is no file or folder '{table}'")
    return fs, path


def folder_of(table: str) -> str:
    """The folder below which everything lies that `table` names: itself, a file's own, or what stands before a glob."""
    fs, path = _open_fs(table)
    if _is_glob(fs, table, path):
        path = re.split(r"[*?\[]", path)[0].rpartition("/")[0] or "/"
    elif not fs.isdir(path):
        path = path.rpartition("/")[0]
    return str(fs.unstrip_protocol(path)) if "://" in table else path


# ---- the listing -------------------------------------------------------------------------------------------


def refresh(root: str, table: str, kind: SourceKind, wanted: Wanted, progress: str = "") -> list[str]:
    """Bring a listing up to what lies at `table` now; returns what to log, a sentence each. Under the lease.

    progress: what the bar says before its figures; no bar without.
    """
    listing = Listing(root)
    list_new = _list_folder if kind == "folder" else _list_files(MANY[kind])
    with tqdm(desc=progress, unit=" images", disable=None if progress else True) as bar:
        said = list_new(listing, table, wanted, bar.update)
    if not listing.parts:
        raise ConfigError(f"ingest.table: there are no images in '{table}'{''.join(f'; {why}' for why in said[:3])}")
    return said


def is_listed(root: str, table: str, kind: SourceKind) -> bool:
    """Whether everything that lies at `table` is in the listing."""
    listing = Listing(root)
    if kind == "folder":
        return bool(np.isin(hashes_of([url for url, _ in _images(table)[0]]), listing.known()).all()) and bool(
            listing.parts
        )
    return not listing.unlisted(_files(table, MANY[kind].names))


OnListed = Callable[[int], Any]


# ---- files that hold many ----------------------------------------------------------------------------------


class Many(NamedTuple):
    """A kind of source whose files hold many images. names: a pattern of the files' names. rows_of: given a file, what
    is wanted, and a list to which sentences for the log are added, gives the file's rows; raises _Cut."""

    names: str
    rows_of: Callable[[str, Wanted, list[str]], Iterator[Row]]


def _list_files(source: Many) -> Callable[..., list[str]]:
    """Lists tars or tables: each is looked through once; one that was not whole gives what is new once it changes, and
    one that was written again keeps its old rows."""

    def list_new(listing: Listing, table: str, wanted: Wanted, on_listed: OnListed) -> list[str]:
        files = _files(table, source.names)
        marks = stamps(files)
        said = []
        unlisted = listing.unlisted(files)
        changed = [f for f in files if f not in unlisted and listing.files[f] != marks[f]]
        gone = [f for f in listing.files if f not in marks]
        if gone:
            said.append(f"{_names(gone)}: gone; the images that are stored stay")
        rows: list[Row] = []
        done: dict[str, str] = {}
        cut: dict[str, Seen] = {}
        for file in unlisted:
            before = listing.cut.get(file, Seen())
            try:
                seen, whole = _look(source.rows_of(file, wanted, said), before, rows, on_listed), True
            except _Cut as e:
                seen, whole = e.seen, False
                said += [str(e)] if str(e) else []
            except OSError as e:
                why = " ".join(f"{type(e).__name__} {e}".split())[:200]
                raise StageError(f"{file}: cannot be reached ({why}); run the same command again") from e
            if seen is None or (whole and seen.rows < before.rows):
                changed.append(file)
            elif not whole or not seen.rows:
                cut[file] = seen if seen.rows > before.rows else before
            if seen == Seen():
                said.append(f"{file}: no images in it")
            done[file] = marks[file]
            if len(rows) >= _PART_ROWS:
                listing.add(rows, done, False, wanted, cut)
                rows, done, cut = [], {}, {}
        listing.add(rows, done, False, wanted, cut)
        if changed:
            said.append(
                f"{_names(changed)}: written again since listed; the images that are stored stay, and nothing is "
                "read again: give new data under a new name"
            )
        return said

    return list_new


class _Cut(Exception):
    """A tar or table has no more rows, and has not come to its end: damaged, or half copied."""

    seen: Seen | None = None


def _look(found: Iterator[Row], before: Seen, rows: list[Row], on_listed: OnListed) -> Seen | None:
    """Add to `rows` what of a file's rows is new; None where those before are others now. Raises _Cut."""
    count, digest, last = 0, hashlib.blake2b(digest_size=16), b""
    try:
        for row in found:
            digest.update(last)
            count, last = count + 1, repr((row["url"], row["place"], row["caption"])).encode("utf-8", "replace")
            if count > before.rows:
                rows.append(row)
                on_listed(1)
            elif count == before.rows and digest.hexdigest() != before.digest:
                return None
    except _Cut as e:
        e.seen = Seen(count, digest.hexdigest() if count else "")
        raise
    return Seen(count, digest.hexdigest() if count else "")


def _files(table: str, pattern: str) -> list[str]:
    fs, path = _open_fs(table)
    if _is_glob(fs, table, path):
        found = fs.glob(path)
    elif fs.isdir(path):
        found = fs.find(path)
    else:
        found = [path]
    chosen = sorted(p for p in found if re.search(pattern, p, re.IGNORECASE) and not _hidden(p))
    return [str(fs.unstrip_protocol(p)) if "://" in table else str(p) for p in chosen]


def _names(files: Sequence[str]) -> str:
    more = f" and {len(files) - 3} more" if len(files) > 3 else ""
    return ", ".join(f.rpartition("/")[2] for f in files[:3]) + more


def _tar_rows(file: str, wanted: Wanted, said: list[str]) -> Iterator[Row]:
    """The samples of a WebDataset tar: members that follow each other with one name up to the first dot.

    A sample without an image, or with a key that came before, is a row with a fault. Raises _Cut at damage and where
    the tar has no end; a sample before it that has not all that others have is left out, as it may be but half there.
    """
    keys: set[str] = set()
    before: set[str] | None = None  # what the sample before was made of
    odd = {"source_missing": 0, "key_twice": 0}
    sample: dict[str, Any] = {}

    def end() -> Iterator[Row]:
        nonlocal before
        if not sample:
            return
        row = _tar_row(file, sample, wanted)
        before = set(sample)
        if sample["key"] in keys:
            row["fault"] = "key_twice"
        keys.add(sample["key"])
        if row["fault"]:
            odd[row["fault"]] += 1
        yield row
        sample.clear()

    # A store's file object would read 50 MB ahead, and an image between two headers is of no use here.
    how = {} if storage.is_local(file) else {"cache_type": "readahead", "block_size": _AHEAD}
    fs, path = fsspec.core.url_to_fs(file)
    cut: _Cut | None = None
    with fs.open(path, "rb", **how) as stream:
        try:
            for name, offset, size, read in _members(stream, file):
                folder, _, base = name.rpartition("/")
                stem, _, extension = base.partition(".")
                key = f"{folder}/{stem}" if folder else stem
                if sample and sample["key"] != key:
                    yield from end()
                sample.setdefault("key", key)
                extension = extension.lower()
                if IMAGES.search("." + extension) and "image" not in sample:
                    sample["image"] = locations.member(file, base, offset, size)
                elif extension in _TEXTS and size <= caption_files.LONGEST_TEXT:
                    sample[extension] = read()
        except _Cut as e:
            cut = e
        whole = before <= sample.keys() if before else bool(sample and _tar_row(file, sample, wanted)["caption"])
        if cut is None or ("image" in sample and whole):
            yield from end()
        elif sample and not str(cut):
            cut = _Cut(f"{file}: ends within a sample; those before it are taken")
    if odd["source_missing"]:
        said.append(f"{file}: {odd['source_missing']} samples without an image")
    if odd["key_twice"]:
        said.append(f"{file}: {odd['key_twice']} samples whose key came before")
    if cut:
        raise cut


def _members(stream: IO[bytes], file: str) -> Iterator[tuple[str, int, int, Callable[[], bytes]]]:
    """(name, offset and size of the data, a function that reads it) of each regular file in a tar. Raises _Cut at
    damage, and without a word where the file ends before the zeros that are a tar's end."""
    size = stream.seek(0, io.SEEK_END)
    stream.seek(0)
    count = 0
    try:
        with tarfile.open(fileobj=stream, mode="r:", tarinfo=_Header) as tar:
            while (info := tar.next()) is not None:
                tar.members = []  # type: ignore[attr-defined]  # or every member of a large tar is kept
                if info.issparse():
                    continue  # its bytes are not those of the file
                if info.size < 0 or info.offset_data + info.size > size:
                    raise tarfile.ReadError("unexpected end of data")
                if info.isreg():
                    count += 1

                    def read(begin: int = info.offset_data, length: int = info.size) -> bytes:
                        stream.seek(begin)
                        return stream.read(length)

                    yield info.name, info.offset_data, info.size, read
            # At what is no header tarfile stops as at the end, which is zeros or the end of the file.
            stream.seek(tar.offset)
            block = stream.read(tarfile.BLOCKSIZE)
            if block.strip(b"\0"):
                raise tarfile.ReadError("what follows is no member")
    except (tarfile.TarError, EOFError, ValueError, RecursionError) as e:
        why = " ".join(str(e).split())[:120]
        raise _Cut(f"{file}: damaged behind member {count} ({why}); those before it are taken") from None
    if len(block) < tarfile.BLOCKSIZE:
        raise _Cut


class _Header(tarfile.TarInfo):
    """A header as tarfile reads it, but for sizes that would lead backwards or fill the memory."""

    def _proc_member(self, tar: tarfile.TarFile) -> tarfile.TarInfo:  # of every header; not every Python calls frombuf
        if self.size < 0 or (self.type in b"LKxgX" and self.size > _LONGEST_HEADER):
            raise tarfile.ReadError(f"a header that claims {self.size} bytes")
        return super()._proc_member(tar)  # type: ignore[misc]


def _tar_row(file: str, sample: Mapping[str, Any], wanted: Wanted) -> Row:
    facts = caption_files.json_object(sample.get("json"))
    texts = [caption_files.text(sample[k]) for k in ("txt", "caption") if k in sample]
    stored = caption_files.captions_in(facts, wanted.given.caption)
    captions = stored or texts or ([caption_files.text(sample["cls"])] if "cls" in sample else [])
    url = facts.get(wanted.given.url or "url")
    image = sample.get("image")
    own = image or locations.member(file, sample["key"], 0, 0)
    row: Row = {
        "url": url if isinstance(url, str) and url else own,
        "place": image or "",
        "fault": None if image else "source_missing",
        "caption": [c for c in captions if c],
    }
    return row | {name: facts.get(name) for name in wanted.columns}


def _table_rows(file: str, wanted: Wanted, said: list[str]) -> Iterator[Row]:
    """The rows of a parquet or Arrow file that holds the images' bytes; these are not read here."""
    arrow = file.lower().endswith(".arrow")
    try:
        if arrow:
            table = locations.read_arrow(file)
            schema = table.schema
        else:
            stream = fsspec.open(file, "rb").open()
            reader = pq.ParquetFile(stream, pre_buffer=False)
            schema = reader.schema_arrow
    except (pa.ArrowException, OSError, UnicodeError) as e:  # names of columns may be no text
        if _is_away(e):
            raise
        raise _Cut(f"{file}: cannot be read ({' '.join(str(e).split())[:120]}); it is left out") from None
    image = image_column(schema, wanted.source.image_column)
    if image is None:
        holds = ", ".join(f"'{f.name}' ({f.type})" for f in schema)
        raise ConfigError(f"{file}: no column holds images; set ingest.source.image_column; its columns are {holds}")
    names = {n.lower(): n for n in schema.names}
    caption = wanted.given.caption or next((names[n] for n in CAPTION_NAMES if n in names), None)
    if caption is not None and caption not in schema.names:
        raise ConfigError(f"{file}: ingest.columns.caption is '{caption}', which is no column of it")
    url = wanted.given.url or next((names[n] for n in URL_NAMES if n in names and names[n] != image), None)
    others = [n for n in (caption, url, *wanted.columns) if n is not None and n in schema.names and n != image]
    columns = list(dict.fromkeys(others))
    if arrow:
        batches: Iterator[Any] = iter(table.select(columns).to_batches(4096)) if columns else iter(())
        empty = table.num_rows
    else:
        # Group by group, so that damage in one takes nothing of those before it.
        groups = range(reader.num_row_groups) if columns else ()
        batches = (b for g in groups for b in reader.iter_batches(4096, [g], columns, use_threads=False))
        empty = reader.metadata.num_rows
    if not columns:
        batches = iter([pa.RecordBatch.from_pydict({"": pa.nulls(empty)})])
    for number, facts in enumerate(_facts(batches, file)):
        location = locations.value(file, image, number)
        given_url = facts.get(url) if url else None
        row: Row = {
            "url": given_url if isinstance(given_url, str) and given_url else location,
            "place": location,
            "fault": None,
            "caption": caption_files.texts(facts.get(caption)) if caption else [],
        }
        yield row | {name: facts.get(name) for name in wanted.columns}


def _facts(batches: Iterator[Any], file: str) -> Iterator[Row]:
    """The rows of batches. Raises _Cut at damage."""
    count = 0
    try:
        for batch in batches:
            columns = {name: _readable(batch.column(name)) for name in batch.schema.names}
            for facts in pa.RecordBatch.from_pydict(columns).to_pylist():
                yield facts
                count += 1
    except (pa.ArrowException, OSError, ValueError) as e:
        if _is_away(e):
            raise
        why = " ".join(str(e).split())[:120]
        raise _Cut(f"{file}: damaged behind row {count} ({why}); those before it are taken") from None


def _is_away(error: Exception) -> bool:
    """Whether a file could not be reached, which is no fault of the file: Arrow's own errors have no number."""
    if isinstance(error, PermissionError | FileNotFoundError):
        return False
    return isinstance(error, ConnectionError | TimeoutError) or getattr(error, "errno", None) is not None


def _readable(array: pa.Array) -> pa.Array:
    """As tables have it: what is no number is text, and bytes are text as well; lists stay."""
    # An Arrow file is taken as it lies there: what points beyond its end would end the process. Texts may be damaged.
    (array.view(pa.binary()) if pa.types.is_string(array.type) else array).validate(full=True)
    if pa.types.is_dictionary(array.type):
        array = array.dictionary_decode()
    plain = pa.types.is_string(kept_type(array.type)) and not pa.types.is_nested(array.type)
    return text_array(array) if plain else array


def image_column(schema: pa.Schema, given: str | None) -> str | None:
    """The column that holds images: the one that is named, else one of {bytes, path}, else a binary one by its name."""
    if given is not None:
        return given if given in schema.names else None
    for field in schema:
        if pa.types.is_struct(field.type) and field.type.get_field_index("bytes") >= 0:
            return str(field.name)
    for field in schema:
        binary = pa.types.is_binary(field.type) or pa.types.is_large_binary(field.type)
        if binary and re.fullmatch(
            r"image|img|images|picture|photo|jpe?g|png|webp|(image_?)?bytes|content|data", field.name.lower()
        ):
            return str(field.name)
    return None


MANY: dict[SourceKind, Many] = {
    "webdataset": Many(r"\.tar\Z", _tar_rows),
    "parquet": Many(BINARY.pattern, _table_rows),
}


# ---- folders -----------------------------------------------------------------------------------------------


def _list_folder(listing: Listing, table: str, wanted: Wanted, on_listed: OnListed) -> list[str]:
    """Lists the images below a folder that are not listed yet, with their captions."""
    images, found = _images(table)
    fs, _ = _open_fs(table)
    hashes = hashes_of([url for url, _ in images])
    known = listing.known()
    new = [one for one, there in zip(images, np.isin(hashes, known), strict=True) if not there]
    said = []
    gone = int((~np.isin(known, hashes)).sum())
    if gone:
        said.append(f"{table}: {gone:,} images that were listed are gone; those that are stored stay")
    there = set(found) if new else set()
    metadata = caption_files.metadata(fs, [p for p in found if METADATA.search(p)]) if new else {}
    rows: list[Row] = []
    bare = 0
    for url, image in new:
        facts = metadata.get(image, {})
        captions = caption_files.captions_in(facts, wanted.given.caption)
        if not captions:
            captions, beside = caption_files.beside(fs, image, there, wanted)
            facts = beside | facts
        if not captions and wanted.source.captions == "folder":
            captions = [image.rpartition("/")[0].rpartition("/")[2].replace("_", " ")]
        bare += not captions
        rows.append(
            {
                "url": url,
                "place": url,
                "fault": None if legal(url) == url else "source_unreadable",
                "caption": captions,
            }
            | {name: facts.get(name) for name in wanted.columns}
        )
        on_listed(1)
        if len(rows) >= _PART_ROWS:
            listing.add(rows, {}, True, wanted)
            rows = []
    listing.add(rows, {}, True, wanted)
    if bare:
        said.append(
            f"{table}: {bare:,} of {len(new):,} images have no caption beside them (.txt, .caption, .json) nor in a "
            "metadata file; set ingest.source.captions: folder to take the folder's name, or ingest.empty_captions to "
            "keep"
        )
    return said


def _images(table: str) -> tuple[list[tuple[str, str]], list[str]]:
    """(URL, path) of every image below a folder or behind a glob, in order; and the paths of all files.

    A link to a text that lies elsewhere is none: a caption may come from outside. The row of such an image says so.
    """
    fs, path = _open_fs(table)
    infos = fs.glob(path, detail=True) if _is_glob(fs, table, path) else fs.find(path, detail=True)
    below = locations.Below([folder_of(table)])
    found = sorted(
        p
        for p, info in infos.items()  # but for pipes
        if info["type"] == "file" or (info.get("islink") and (IMAGES.search(p) or below.holds(p)))
    )
    found = [p for p in found if not any(part.startswith(".") for part in p[len(path.rstrip("/")) :].split("/"))]
    images = [p for p in found if IMAGES.search(p)]
    return [(str(fs.unstrip_protocol(p)) if "://" in table else p, p) for p in images], found
