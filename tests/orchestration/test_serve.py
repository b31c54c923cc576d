"""The live page: who may see it, what of a run it shows, that hostile text stays text, and how it looks in Chromium."""

from __future__ import annotations

import base64
import contextlib
import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from orchestration import serve
from shards import storage
from shards.settings import ConfigError
from tests import objects
from tests.eval import browser
from tests.orchestration.head import ROOT
from tests.train import tiny

TOKEN = "a-token-that-is-long-enough"
HOSTILE = "<img src=x onerror=document.title='hacked'><script>document.title='hacked'</script>"


def fill(run: Path) -> Path:
    """A run half-way: images with a funnel, a training with a log and samples, a report, shards that were set aside."""
    tiny.make_images(run / "images")
    manifest = json.loads((run / "images" / "dataset.json").read_text())
    manifest["counts"] = {"rows": 40, "failed_to_download": 12}
    manifest["errors"] = {"http_404": 9, HOSTILE: 3}
    (run / "images" / "dataset.json").write_text(json.dumps(manifest))
    now = time.time()
    stages = {
        "ingest": {"state": "done", "done": 3, "total": 3, "unit": "shards", "rate": 0.5, "seconds_left": None},
        "latents": {
            "state": "failed",
            "done": 2,
            "total": 3,
            "unit": "shards",
            "rate": 1.5,
            "seconds_left": None,
            "figures": {"workers": 2, "note": HOSTILE},
        },
        "train": {
            "state": "running",
            "done": 5000,
            "total": 20000,
            "unit": "images",
            "rate": 100.0,
            "seconds_left": 150.0,
            "figures": {"loss": 0.25},
        },
    }
    for name, record in stages.items():
        storage.write_json(str(run / "status" / f"{name}.json"), {"stage": name, "updated": now, **record})
    failure = {"error": HOSTILE, "traceback": f"Traceback\n{HOSTILE}", "attempts": 3, "host": "node-7", "at": now}
    storage.write_json(str(run / "status" / "latents-failed" / "00002.json"), failure)
    lines = [
        {
            "images": 100 * i,
            "step": i,
            "loss": 1 / (1 + i / 50),
            "lr": 1e-4,
            "samples_per_s": 90 + i % 9,
            "grad_norm": 1.0,
        }
        for i in range(1, 1501)
    ]
    lines[700]["loss"] = 40.0
    (run / "train" / "samples").mkdir(parents=True)
    (run / "train" / "log.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines) + '{"images": 12')
    rng = np.random.default_rng(0)
    for images in (1000, 5000):
        pixels = rng.integers(0, 255, (96, 96, 3)).astype(np.uint8)
        Image.fromarray(pixels).save(run / "train" / "samples" / f"{images:012d}.png")
    (run / "reports").mkdir()
    (run / "reports" / "step-00000005.html").write_text(f"<!doctype html><title>report</title><p>{HOSTILE}")
    (run / "reports" / "index.html").write_text('<!doctype html><a href="step-00000005.html">the report</a>')
    return run


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return fill(tmp_path / "mine")


@contextlib.contextmanager
def served(run: str | Path) -> Iterator[int]:
    server = serve.make_server(str(run), "127.0.0.1", 0, TOKEN)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield server.server_port
    finally:
        server.shutdown()
        server.server_close()


def ask(port: int, path: str, method: str = "GET", **headers: str) -> tuple[int, dict[str, str], bytes]:
    """A request as it is written: no library tidies the path up."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
    connection.request(method, path, headers=headers)
    answer = connection.getresponse()
    found = answer.status, {k.lower(): v for k, v in answer.getheaders()}, answer.read()
    connection.close()
    return found


def allowed(port: int, path: str) -> tuple[int, dict[str, str], bytes]:
    return ask(port, path, Cookie=f"carrara-{port}={TOKEN}")


def test_nobody_sees_anything_without_the_token(run: Path) -> None:
    with served(run) as port:
        cookies = (f"carrara-{port}=wrong", f"carrara-{port}=", f"other={TOKEN}", f"carrara-{port}={TOKEN}x", "\xff=;")
        wrong: list[dict[str, str]] = [{}, {"Authorization": "Bearer wrong"}, *({"Cookie": c} for c in cookies)]
        paths = ("/", "/state.json", "/files/reports/step-00000005.html", "/nothing", "/?token=wrong", "/?token=")
        for path in paths:
            for headers in wrong:
                code, reply, body = ask(port, path, **headers)
                assert code == 403, (path, headers)
                assert "set-cookie" not in reply
                assert b"mine" not in body
        code, reply, body = ask(port, f"/?token={TOKEN}")
        assert (code, reply["location"], body) == (303, "/", b"")
        cookie, *attributes = reply["set-cookie"].split("; ")
        assert {"HttpOnly", "SameSite=Lax", "Path=/"} == set(attributes)
        assert ask(port, "/", Cookie=cookie)[0] == 200
        assert ask(port, "/state.json", Authorization=f"Bearer {TOKEN}")[0] == 200


def test_only_files_that_are_meant_to_be_seen_are_served(run: Path, tmp_path: Path) -> None:
    (tmp_path / "secret.html").write_text("secret")
    (run / "reports" / "link.html").symlink_to(tmp_path / "secret.html")
    (run / "reports" / ".hidden.html").write_text("secret")
    (run / "reports" / "trackers.txt").write_text("secret")
    (run / "reports" / "inner.html").mkdir()
    with served(run) as port:
        for path in (
            "/files/reports/../status/ingest.json",
            "/files/reports/..%2fstatus%2fingest.json",
            "/files/reports/..",
            "/files/reports/%2e%2e/status/ingest.json",
            "/files/reports/",
            "/files/reports",
            "/files/status/ingest.json",
            "/files/../reports/step-00000005.html",
            "/files//reports/step-00000005.html",
            "/files/reports/link.html",
            "/files/reports/.hidden.html",
            "/files/reports/trackers.txt",
            "/files/reports/inner.html",
            "/files/reports/step-00000005.html%00.png",
            "/files/reports/step-00000005.html\\..\\x.html",
            "/secret.html",
            f"/files/reports/{'a' * 300}.html",
            "/files/samples/step-00000005.html",
            "/../../etc/passwd",
        ):
            code, _, body = allowed(port, path)
            assert code == 404, path
            assert b"secret" not in body
        code, headers, body = allowed(port, "/files/reports/step-00000005.html")
        assert code == 200
        assert b"<title>report" in body
        assert headers["content-security-policy"].startswith("sandbox allow-scripts;")
        code, headers, body = allowed(port, "/files/samples/000000005000.png")
        assert (code, headers["content-type"], headers["x-content-type-options"]) == (200, "image/png", "nosniff")
        assert body == (run / "train/samples/000000005000.png").read_bytes()


def test_nothing_can_be_changed(run: Path) -> None:
    def files() -> dict[str, bytes]:
        return {str(p): p.read_bytes() for p in run.rglob("*") if p.is_file()}

    before = files()
    with served(run) as port:
        for method in ("POST", "PUT", "DELETE", "PATCH", "OPTIONS"):
            code, _, _ = ask(port, "/state.json", method, Cookie=f"carrara-{port}={TOKEN}")
            assert code in (405, 501)
        assert allowed(port, "/state.json")[0] == 200
    assert files() == before


def seen(run: str | Path) -> dict[str, Any]:
    with served(run) as port:
        return dict(json.loads(allowed(port, "/state.json")[2]))


def test_the_state_is_what_the_run_holds(run: Path) -> None:
    state = seen(run)
    assert state["trouble"] == []
    stages = {s["name"]: s for s in state["stages"]}
    assert list(stages)[:4] == ["ingest", "autoencoder", "clip", "latents"]
    assert (stages["train"]["state"], stages["train"]["left"], stages["train"]["share"]) == (
        "running",
        "2 min 30 s",
        0.25,
    )
    assert stages["latents"]["failed"] == "1"
    assert stages["clip"]["state"] == "not begun"
    [funnel] = state["funnels"]
    assert [s["count"] for s in funnel["steps"]] == [40, 12, 9, 3, 28]
    curves = {c["title"]: c["points"] for c in state["curves"]}
    loss = curves["UNet: loss"]
    assert 200 <= len(loss) <= serve.CURVE_POINTS + 4
    assert (loss[0][0], loss[-1][0]) == (100, 150_000)
    assert max(p[1] for p in loss) == 40.0  # one spike of 1,500 points is not lost
    assert [p[0] for p in loss] == sorted(p[0] for p in loss)
    assert state["samples"] == ["000000005000.png", "000000001000.png"]
    assert state["reports"] == ["step-00000005.html", "index.html"]
    [failure] = state["failures"]
    assert (failure["stage"], failure["shard"], failure["attempts"], failure["host"]) == (
        "latents",
        "00002",
        "3",
        "node-7",
    )
    assert failure["error"] == HOSTILE


def test_a_part_that_cannot_be_read_hides_no_other(run: Path) -> None:
    (run / "status" / "latents-failed" / "00002.json").write_text("{torn")
    (run / "status" / "ingest.json").write_text("{torn")
    state = seen(run)
    assert [s["state"] for s in state["stages"]][:3] == ["unreadable", "not begun", "not begun"]
    assert [t.split(":")[0] for t in state["trouble"]] == ["failures"]
    assert state["samples"]


def test_one_look_serves_all_who_ask(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    looks: list[int] = []
    real = serve.Look._see
    monkeypatch.setattr(serve.Look, "_see", lambda self: looks.append(1) or real(self))
    with served(run) as port:
        threads = [threading.Thread(target=allowed, args=(port, "/state.json")) for _ in range(12)]
        for t in threads:
            t.start()
        for t in threads:
            t.join()
    assert len(looks) <= 2


def test_a_run_in_a_bucket(run: Path) -> None:
    with objects.bucket() as bucket:
        import s3fs

        store = s3fs.S3FileSystem(skip_instance_cache=True)
        store.put(str(run), f"{bucket}/mine", recursive=True)
        url = f"{bucket}/mine"
        state = seen(url)
        assert state["trouble"] == []
        assert (len(state["samples"]), len(state["failures"]), len(state["curves"])) == (2, 1, 4)
        with served(url) as port:
            assert allowed(port, "/files/samples/000000005000.png")[0] == 200
            assert allowed(port, "/files/reports/nothing.html")[0] == 404


def raw(port: int, *parts: bytes) -> bytes:
    """What comes back for these bytes, up to the end of the connection."""
    with socket.create_connection(("127.0.0.1", port), timeout=20) as s:
        for part in parts:
            s.sendall(part)
        return b"".join(iter(lambda: s.recv(1 << 16), b""))


def test_a_cookie_of_another_port_does_not_shut_its_holder_out(run: Path) -> None:
    with served(run) as port:
        assert ask(port, "/", Cookie=f'theirs={{"a": 1}}; carrara-{port}={TOKEN}; more="x')[0] == 200


def test_a_connection_is_one_request_whatever_follows_it(run: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Behind a proxy that shares connections, a second answer would be somebody else's."""
    inner = b"GET /x HTTP/1.1\r\n\r\n"
    with served(run) as port:
        said = raw(port, b"GET / HTTP/1.1\r\nContent-Length: %d\r\n\r\n" % len(inner) + inner)
        assert said.count(b" 403 ") == 1
        assert b" 403 " in raw(port, b"GET http://[ HTTP/1.1\r\n\r\n")
    assert "Traceback" not in capfd.readouterr().err


def test_a_slow_line_gets_all_of_a_large_report(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    body = b"x" * 20_000_000
    (run / "reports" / "large.html").write_bytes(body)
    monkeypatch.setattr(serve._Handler, "timeout", 0.5)  # of a connection that takes nothing
    with served(run) as port, socket.socket() as s:
        s.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 16)
        s.settimeout(20)
        s.connect(("127.0.0.1", port))
        s.sendall(f"GET /files/reports/large.html HTTP/1.1\r\nCookie: carrara-{port}={TOKEN}\r\n\r\n".encode())
        got, began = 0, time.monotonic()
        while part := s.recv(1 << 17):
            got += len(part)
            time.sleep(0.01)
        assert time.monotonic() - began > 1.0
        assert got > len(body)


def test_who_asks_for_nothing_keeps_nobody_out_and_does_not_stay(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serve, "SILENT", 8)
    monkeypatch.setattr(serve, "ASK_S", 1.0)
    with served(run) as port, contextlib.ExitStack() as open_:
        before = threading.active_count()
        many = [open_.enter_context(socket.create_connection(("127.0.0.1", port), timeout=20)) for _ in range(60)]
        assert allowed(port, "/")[0] == 200
        assert threading.active_count() <= before + 8 + 4
        trickle, began = many[-1], time.monotonic()
        with contextlib.suppress(OSError):  # a byte at a time, never silent for long
            while time.monotonic() - began < 15:
                trickle.sendall(b"G")
                time.sleep(0.1)
        assert time.monotonic() - began < 10
        assert allowed(port, "/")[0] == 200


def test_what_cannot_be_served_is_one_sentence(tmp_path: Path, run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="there is no run here"):
        serve.serve(str(tmp_path / "nowhere"), "127.0.0.1", 0)
    with served(run) as port, pytest.raises(ConfigError, match="cannot be listened at"):
        serve.serve(str(run), "127.0.0.1", port)
    monkeypatch.setenv("CARRARA_SERVE_TOKEN", "short")
    with pytest.raises(ConfigError, match="fewer than 16 characters"):
        serve.serve(str(run), "127.0.0.1", 0)


def test_the_command_prints_a_link_that_works_and_ends_on_ctrl_c(run: Path) -> None:
    command = [sys.executable, "orchestration/run_stage.py", "serve", str(run), "--port", "0"]
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={k: v for k, v in os.environ.items() if k != "CARRARA_SERVE_TOKEN"},
        # A shell that runs the tests in the background ignores Ctrl-C for all of them.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    assert process.stdout is not None
    link = process.stdout.readline().strip()
    host, _, path = link.removeprefix("http://").partition("/")
    assert host.startswith("127.0.0.1:")
    assert len(path) > 32
    assert ask(int(host.rpartition(":")[2]), f"/{path}")[0] == 303
    listening = subprocess.run(["cat", "/proc/net/tcp"], capture_output=True, text=True).stdout
    at = f":{int(host.rpartition(':')[2]):04X}"
    assert {x.split()[1] for x in listening.splitlines() if f"{at} 00000000:0000" in x} == {f"0100007F{at}"}
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert path.split("=")[1] not in err


@pytest.mark.slow
def test_the_page_in_chromium(run: Path, tmp_path: Path) -> None:
    """Wide and narrow: nothing sticks out, hostile text is text, and what changes in the run changes on the page."""

    async def look(tab: browser.Tab) -> None:
        async def until(expression: str) -> Any:
            for _ in range(200):
                if value := await tab.value(expression):
                    return value
                time.sleep(0.1)
            pytest.fail(f"never: {expression}")

        await until("document.querySelectorAll('.stage').length >= 6")
        assert await tab.value("location.search") == ""  # the token is not in the address bar
        await until("document.querySelectorAll('#samples img').length == 2")
        for width in (1280, 400):
            await tab.call(
                "Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=False
            )
            assert await tab.value("document.documentElement.scrollWidth") <= width
            picture = await tab.call("Page.captureScreenshot", captureBeyondViewport=True)
            (tmp_path / f"{width}.png").write_bytes(base64.b64decode(picture["data"]))
        await tab.value("document.querySelector('.failure').open = true; window.mark = 1")
        assert await tab.value("document.querySelector('.failure pre').textContent") == f"Traceback\n{HOSTILE}"
        assert await tab.value("document.querySelectorAll('img[src=x], main script').length") == 0
        assert await tab.value("document.querySelectorAll('.plot path').length") == 4
        record = json.loads((run / "status" / "train.json").read_text())
        storage.write_json(str(run / "status" / "train.json"), {**record, "done": 15_000, "updated": time.time()})
        await until("document.body.innerText.includes('15000/20000 images (75 %)')")
        assert await tab.value("window.mark") == 1  # the page was not loaded again
        assert await tab.value("document.querySelector('.failure').open")  # nor was what is open shut
        assert "hacked" not in await tab.value("document.title")
        assert tab.said == []
        # From the index of the reports to a report, both in a sandbox: the link works, and what a report runs is alone.
        await tab.value("location.href = '/files/reports/index.html'")
        await until("document.querySelector('a[href=\"step-00000005.html\"]')?.textContent")
        await tab.value("document.querySelector('a').click()")
        await until("location.pathname.endsWith('step-00000005.html') && document.readyState === 'complete'")
        assert await tab.value("self.origin") == "null"
        await tab.value("fetch('/state.json', {credentials: 'include'}).then(() => r = 'read', () => r = 'blocked')")
        assert await until("self.r") == "blocked"

    with served(run) as port:
        browser.visit(f"http://127.0.0.1:{port}/?token={TOKEN}", look)
