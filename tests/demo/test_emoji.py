"""Emoji as a corpus: which pictures get which captions, and that what is not the registry's is not taken."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import io
import json
import sys
import tarfile
from pathlib import Path

import pytest

from demo import emoji
from orchestration.config import load
from tests.orchestration.head import ROOT

ENTRIES = [
    {
        "name": "WAVING  HAND SIGN",
        "image": "1f44b.png",
        "skin_variations": {
            "1F3FB": {"image": "1f44b-1f3fb.png"},
            "1F3FF-1F3FB": {"image": "two.png"},
            "1F3FD-1F3FD": {"image": "same.png"},
        },
    },
    {"name": None, "short_name": "flag", "image": "flag.png"},
    {"name": "NOT DRAWN", "image": "absent.png"},
]
TOLD = {
    "1f44b.png": "waving hand sign",
    "1f44b-1f3fb.png": "waving hand sign, light skin tone",
    "two.png": "waving hand sign, dark skin tone and light skin tone",
    "same.png": "waving hand sign, medium skin tone",
    "flag.png": "flag",
}


def package() -> bytes:
    """A package as npm's registry serves them, with members that are none of ours, one beyond the folder."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w:gz") as tar:
        files = {f"img/google/64/{name}": name.encode() for name in (*TOLD, "nameless.png")}
        others = {"../../outside.png": b"x", "img/google/sheets/64.png": b"x", "LICENSE": b"MIT"}
        for path, data in {"emoji.json": json.dumps(ENTRIES).encode(), **files, **others}.items():
            member = tarfile.TarInfo(f"package/{path}")
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return out.getvalue()


def test_pictures_get_their_names_and_skin_tones(tmp_path: Path) -> None:
    folder = tmp_path / "corpus"
    folder.mkdir()
    assert emoji.unpack(package(), folder) == len(TOLD)
    lines = [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]
    assert {line["file_name"]: line["text"] for line in lines} == TOLD
    assert {p.name for p in folder.iterdir()} == {*TOLD, "metadata.jsonl", "LICENSE"}
    assert all((folder / name).read_bytes() == name.encode() for name in TOLD)
    assert [p.name for p in tmp_path.iterdir()] == ["corpus"]


def test_other_bytes_than_the_registrys_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = package()
    (tmp_path / "emoji.tgz").write_bytes(data)
    url, digest = (tmp_path / "emoji.tgz").as_uri(), base64.b64encode(hashlib.sha512(data).digest()).decode()
    assert emoji.fetch(url, digest) == data
    with pytest.raises(ValueError, match="not the bytes that the registry names"):
        emoji.fetch(url)
    monkeypatch.setattr(emoji, "LARGEST", len(data) - 1)
    with pytest.raises(ValueError, match="more than"):
        emoji.fetch(url, digest)


@pytest.mark.parametrize("end", [KeyboardInterrupt(), OSError("the disk is full")])
def test_what_is_stopped_half_way_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, end: BaseException
) -> None:
    monkeypatch.setattr(emoji, "fetch", package)
    monkeypatch.setattr(sys, "argv", ["emoji", str(tmp_path / "corpus")])
    written: list[Path] = []

    def cut(path: Path, text: str) -> None:
        written.extend(path.parent.iterdir())
        raise end

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_text", cut)
        with pytest.raises(KeyboardInterrupt) if isinstance(end, KeyboardInterrupt) else contextlib.nullcontext():
            assert emoji.main() == 1
    assert written
    assert not list(tmp_path.iterdir())
    assert emoji.main() == 0
    assert [p.name for p in tmp_path.iterdir()] == ["corpus"]


def test_the_configuration_is_whole() -> None:
    config = load(str(ROOT / "configs/emoji.yaml"), [], str(ROOT), tables=False)
    assert config.ingest.table.endswith("runs/emoji/corpus")
