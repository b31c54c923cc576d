"""Real pictures with captions: Google's Noto Emoji and their Unicode names, from the npm package that carries them.

    python -m demo.emoji runs/emoji/corpus

    runs/emoji/corpus/00a9.png ...      3,786 of 64 px with alpha, skin tones among them
    runs/emoji/corpus/metadata.jsonl    their captions, as Hugging Face's imagefolder has them
    runs/emoji/corpus/LICENSE           of the package (MIT); the pictures are Google's, under Apache-2.0

The folder appears whole or not at all; where it is there, nothing is fetched.
"""

from __future__ import annotations

import argparse
import base64
import hashlib
import io
import json
import shutil
import sys
import tarfile
import urllib.request
from pathlib import Path

from tqdm import tqdm

from shards.local import temporary_folder

VERSION = "16.0.0"
URL = f"https://registry.npmjs.org/emoji-datasource-google/-/emoji-datasource-google-{VERSION}.tgz"
SHA512 = "ZRexfzs7MVoLnmzZmNsO4TKhnAJp5D++Vm6PpUpH/jEQQlemp3l88CjZ+DoZ2faM9R4QxZkOPJCoT8DlPhfQ3A=="  # the registry's
LARGEST = 200_000_000  # bytes of the package; it has 74 million
SKIN_TONES = {
    "1F3FB": "light skin tone",
    "1F3FC": "medium light skin tone",
    "1F3FD": "medium skin tone",
    "1F3FE": "medium dark skin tone",
    "1F3FF": "dark skin tone",
}


def fetch(url: str = URL, sha512: str = SHA512) -> bytes:
    """The package's bytes; raises ValueError where they are others than the registry's, OSError where none come."""
    data = bytearray()
    with urllib.request.urlopen(url, timeout=60) as answer:
        length = int(answer.headers.get("Content-Length") or 0)
        with tqdm(total=length, unit="B", unit_scale=True, desc="emoji") as bar:
            while piece := answer.read(1 << 20):
                data += piece
                bar.update(len(piece))
                if len(data) > LARGEST:
                    raise ValueError(f"{url}: more than {LARGEST:,} bytes")
    if base64.b64encode(hashlib.sha512(data).digest()).decode() != sha512:
        raise ValueError(f"{url}: not the bytes that the registry names")
    return bytes(data)


def captions(emoji: list[dict[str, object]]) -> dict[str, str]:
    """By file name, a caption: the Unicode name in small letters, and the skin tones where it has any.

    emoji: the entries of the package's emoji.json.
    """
    found = {}
    for entry in emoji:
        name = " ".join(str(entry["name"] or entry["short_name"]).lower().split())
        found[str(entry["image"])] = name
        variations = entry.get("skin_variations")
        for tones, variation in (variations if isinstance(variations, dict) else {}).items():
            said = " and ".join(dict.fromkeys(SKIN_TONES[t] for t in tones.split("-")))
            found[str(variation["image"])] = f"{name}, {said}"
    return found


def unpack(data: bytes, folder: Path) -> int:
    """Write the pictures that have a caption, the captions and the licence; returns how many pictures there are."""
    members: dict[str, bytes] = {}
    with tarfile.open(fileobj=io.BytesIO(data), mode="r:gz") as tar:
        for member in tar:
            path = member.name.removeprefix("package/")
            if member.isreg() and (path in ("emoji.json", "LICENSE") or path.startswith("img/google/64/")):
                stream = tar.extractfile(member)
                assert stream is not None
                members[Path(path).name] = stream.read()
    captioned = {n: c for n, c in captions(json.loads(members["emoji.json"])).items() if n in members}
    for name in ("LICENSE", *captioned):
        (folder / name).write_bytes(members[name])
    lines = (json.dumps({"file_name": name, "text": caption}) + "\n" for name, caption in captioned.items())
    (folder / "metadata.jsonl").write_text("".join(lines))
    return len(captioned)


def main() -> int:
    """Make the folder; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    if folder.exists():
        print(f"{folder} is there")
        return 0
    try:
        data = fetch()
        scratch = temporary_folder(folder)
        try:
            count = unpack(data, scratch)
            scratch.rename(folder)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
    except (OSError, ValueError) as e:
        print(f"emoji: {e}", file=sys.stderr)
        return 1
    print(f"{count:,} images and their captions in {folder}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
