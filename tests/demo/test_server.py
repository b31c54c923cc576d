"""What the server answers, byte for byte, and that it ends when it should."""

from __future__ import annotations

import http.client
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from urllib.parse import urlsplit

import pyarrow.parquet as pq
import pytest

from demo.corpus import CorpusSummary
from demo.server import ServerError, main, serve


def connect(url: str) -> http.client.HTTPConnection:
    return http.client.HTTPConnection(urlsplit(url).netloc, timeout=20)


def test_every_file_of_the_table_is_served_as_its_kind_says(corpus: CorpusSummary, server: str) -> None:
    """The whole table over one keep-alive connection: statuses, types, headers, redirects, bytes."""
    behaviours = json.loads(Path(corpus.folder, "server.json").read_text())
    connection = connect(server)
    served = 0
    for url in pq.read_table(corpus.table)["URL"].to_pylist():
        path = urlsplit(url).path
        behaviour = behaviours.get(path, {})
        if urlsplit(url).port != 8090 or behaviour.get("short"):
            continue
        connection.request("GET", path)
        socket = connection.sock
        answer = connection.getresponse()
        body = answer.read()
        file = Path(corpus.folder, path[1:])
        if "status" in behaviour:
            assert answer.status == behaviour["status"]
        elif path.startswith("/lost/"):
            assert answer.status == 404
        else:
            assert (answer.status, body) == (200, file.read_bytes())
            kinds = {b"\xff\xd8": "image/jpeg", b"\x89P": "image/png", b"RI": "image/webp", b"<!": "text/html"}
            assert answer.headers.get_content_type() == kinds[body[:2]]
            served += 1
        for name, value in behaviour.get("headers", {}).items():
            assert answer.headers[name] == value
        assert connection.sock is socket  # HTTP/1.1 keep-alive
    assert served > 300


def test_a_short_body_breaks_off(corpus: CorpusSummary, server: str) -> None:
    behaviours = json.loads(Path(corpus.folder, "server.json").read_text())
    (path,) = [path for path, behaviour in behaviours.items() if behaviour.get("short")]
    size = Path(corpus.folder, path[1:]).stat().st_size
    connection = connect(server)
    connection.request("GET", path)
    answer = connection.getresponse()
    assert int(answer.headers["Content-Length"]) == size
    with pytest.raises(http.client.IncompleteRead) as broken:
        answer.read()
    assert len(broken.value.partial) == size // 2
    connection.close()


@pytest.mark.parametrize(
    "path",
    [
        "/corpus.json",
        "/table.parquet",
        "/pictures/../corpus.json",
        "/pictures/%2e%2e/corpus.json",
        "/pictures/..%2fcorpus.json",
        "//etc/passwd",
        "/pictures/00/../../../../../../etc/passwd",
        "/pictures",
        "/",
    ],
)
def test_nothing_but_pictures_is_served(server: str, path: str) -> None:
    connection = connect(server)
    connection.request("GET", path)
    assert connection.getresponse().status == 404


def test_links_are_not_followed(tmp_path: Path) -> None:
    (tmp_path / "pictures").mkdir()
    (tmp_path / "server.json").write_text("{}")
    (tmp_path / "pictures" / "link.png").symlink_to("/etc/passwd")
    (tmp_path / "pictures" / "real.png").write_bytes(b"pixels")
    with serve(tmp_path) as server:
        url = server.url
        assert urlsplit(url).hostname == "127.0.0.1"
        for name, status in (("link", 404), ("real", 200)):
            connection = connect(url)
            connection.request("GET", f"/pictures/{name}.png")
            assert connection.getresponse().status == status
    with pytest.raises(ConnectionRefusedError):
        connect(url).connect()


def test_killed_it_is_started_again_where_it_was(tmp_path: Path) -> None:
    (tmp_path / "pictures").mkdir()
    (tmp_path / "server.json").write_text("{}")
    with serve(tmp_path) as server:
        before = server.url
        assert not server.revive()
        os.kill(server._process.pid, signal.SIGKILL)
        server._process.wait()
        with pytest.raises(ConnectionRefusedError):
            connect(before).connect()
        assert server.revive()
        assert server.url == before
        connect(before).connect()


def test_it_says_why_it_does_not_start(corpus: CorpusSummary, server: str, tmp_path: Path) -> None:
    port = urlsplit(server).port or 0
    with pytest.raises(ServerError, match=rf"cannot listen on 127\.0\.0\.1:{port} .*another port"):
        with serve(corpus.folder, port=port):
            pass
    with pytest.raises(ServerError, match="holds no corpus"):
        with serve(tmp_path):
            pass


def test_command_line_exits_2_with_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tmp_path)]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_it_ends_with_the_process_that_started_it(corpus: CorpusSummary) -> None:
    """kill -9 of the parent leaves no server behind."""
    code = (
        "import sys, time\nfrom demo.server import serve\n"
        f"with serve({corpus.folder!r}) as server:\n    print(server.url, flush=True)\n    time.sleep(60)\n"
    )
    home = Path(__file__).resolve().parents[2]
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, cwd=home)
    assert parent.stdout is not None
    url = parent.stdout.readline().strip()
    connect(url).connect()
    parent.kill()
    parent.wait()
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        try:
            connect(url).connect()
        except ConnectionRefusedError:
            break
        time.sleep(0.1)
    else:
        pytest.fail("the server outlived its parent")
    parent.stdout.close()
