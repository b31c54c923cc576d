"""Notifications: what is told, to whom, and that nothing which goes wrong with it changes a run."""

from __future__ import annotations

import http.server
import json
import logging
import os
import socket
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from orchestration import notify
from orchestration.config import RunConfig
from orchestration.lease import Busy
from orchestration.notify import NotifyConfig
from orchestration.run_stage import main
from orchestration.stopping import Stopped
from shards.settings import ConfigError, StageError, validate

SECRET = "s3cr3t-path"


class Hook:
    """A webhook on loopback: `answers` are the codes that it gives in turn, the last one again and again."""

    def __init__(self) -> None:
        self.answers: list[int] = [200]
        self.hang_s = 0.0
        self.drip_s = 0.0
        self.asked: list[dict[str, Any]] = []
        self.paths: list[str] = []
        self.headers: list[dict[str, str]] = []
        hook = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                hook.asked.append(json.loads(body))
                hook.paths.append(self.path)
                hook.headers.append(dict(self.headers))
                time.sleep(hook.hang_s)
                if hook.drip_s:
                    for byte in b"HTTP/1.1 200 OK\r\n":
                        try:
                            self.wfile.write(bytes([byte]))
                        except OSError:
                            return
                        time.sleep(hook.drip_s)
                code = hook.answers.pop(0) if len(hook.answers) > 1 else hook.answers[0]
                try:
                    self.send_response(code)
                    if code in (302, 307, 308):
                        self.send_header("Location", "/elsewhere")
                    self.send_header("Content-Length", "0")
                    self.end_headers()
                except OSError:
                    pass

            do_GET = do_POST

            def log_message(self, *_: Any) -> None:
                pass

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}/{SECRET}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()


@pytest.fixture
def hook(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hook]:
    made = Hook()
    monkeypatch.setenv("HOOK", made.url)
    monkeypatch.setattr(notify, "PAUSES_S", (0.01, 0.01))
    for name in ("http_proxy", "HTTP_PROXY"):
        monkeypatch.delenv(name, raising=False)
    yield made
    made.server.shutdown()
    made.server.server_close()


def config(**more: Any) -> NotifyConfig:
    return validate(NotifyConfig, {"url_env": "HOOK", "timeout_s": 0.5, **more}, "test")


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING]


def test_the_end_of_a_stage_is_told_as_documented(hook: Hook, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TOKEN", "bearer-of-news\n")
    with notify.notified(config(token_env="TOKEN"), "runs/mine", "eval") as outcome:
        outcome.report = "runs/mine/reports/step-1.html"
    [asked] = hook.asked
    at = asked.pop("time")
    assert at.endswith("+00:00")
    assert len(at) == 25
    assert 0 <= asked.pop("seconds") < 10
    assert asked == {
        "version": 1,
        "event": "end",
        "run": "runs/mine",
        "stage": "eval",
        "sentence": "eval: done",
        "text": "runs/mine: eval: done",
        "exit_code": 0,
        "host": socket.gethostname(),
        "report": "runs/mine/reports/step-1.html",
    }
    assert hook.headers[0]["Authorization"] == "Bearer bearer-of-news"
    assert hook.headers[0]["Content-Type"] == "application/json"
    documented = (Path(__file__).parents[2] / "docs" / "watching.md").read_text()
    assert all(f"`{name}`" in documented for name in [*asked, "time", "seconds"])


@pytest.mark.parametrize(
    ("error", "event", "code"),
    [
        (StageError("latents: 3 shards failed"), "failure", 1),
        (ConfigError("latents: there are no images"), "failure", 2),
        (ZeroDivisionError("division by zero"), "failure", 1),
        (Stopped("latents: stopped on request"), "stopped", 75),
    ],
)
def test_how_it_ended_is_told_and_goes_on_up(hook: Hook, error: BaseException, event: str, code: int) -> None:
    with pytest.raises(type(error)):
        with notify.notified(config(events=["end", "failure", "stopped"]), "runs/mine", "latents"):
            raise error
    [asked] = hook.asked
    assert (asked["event"], asked["exit_code"]) == (event, code)
    assert str(error) in asked["sentence"]


def test_what_is_not_asked_for_is_not_told(hook: Hook) -> None:
    with pytest.raises(Busy), notify.notified(config(), "r", "latents"):
        raise Busy("another job is at work")
    with pytest.raises(KeyboardInterrupt), notify.notified(config(), "r", "latents"):
        raise KeyboardInterrupt
    with pytest.raises(Stopped), notify.notified(config(), "r", "latents"):
        raise Stopped("stopped")  # is not among the events that are told by default
    with notify.notified(config(), "r", "latents") as outcome:
        outcome.worked = False
    assert not hook.asked


@pytest.mark.parametrize(
    ("answers", "asked", "warned"),
    [([500, 503, 204], 3, ""), ([429, 200], 2, ""), ([500], 3, "it answered 500 (3 attempts)"), ([403], 1, "403")],
)
def test_a_webhook_that_fails_gets_three_attempts_and_one_warning(
    hook: Hook, caplog: pytest.LogCaptureFixture, answers: list[int], asked: int, warned: str
) -> None:
    hook.answers = answers
    with notify.notified(config(), "runs/mine", "train"):
        pass
    assert len(hook.asked) == asked
    assert len(warnings(caplog)) == (1 if warned else 0)
    assert warned in "".join(warnings(caplog))
    assert SECRET not in caplog.text


def test_a_redirect_is_not_followed(hook: Hook, caplog: pytest.LogCaptureFixture) -> None:
    for code in (302, 307, 308):
        hook.answers, hook.paths = [code], []
        notify.send(config(), "end", "r", "train", "train: done")
        assert hook.paths == [f"/{SECRET}"]
    assert "redirects, which is not followed" in caplog.text
    assert SECRET not in caplog.text


@pytest.mark.parametrize("way", ["hang_s", "drip_s"])
def test_a_webhook_that_hangs_does_not_hold_a_run(hook: Hook, caplog: pytest.LogCaptureFixture, way: str) -> None:
    """A server that says nothing, and one whose every byte comes before the socket's timeout is over."""
    setattr(hook, way, 8.0 if way == "hang_s" else 0.4)
    began = time.monotonic()
    with notify.notified(config(), "runs/mine", "train"):
        pass
    assert time.monotonic() - began < 3 * 1.5 + 2
    assert warnings(caplog) == ["notify: the webhook for 'end' failed: no answer within 0.5 s (3 attempts)"]


def test_a_webhook_that_is_not_there(
    hook: Hook, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        monkeypatch.setenv("HOOK", f"http://127.0.0.1:{s.getsockname()[1]}/{SECRET}")
        notify.send(config(), "alarm", "r", "eval", "ALARM worse")
    monkeypatch.setenv("HOOK", f"http://127.0.0.1:1/{SECRET} \x01")  # Python's own error would quote the path
    notify.send(config(), "alarm", "r", "eval", "ALARM worse")
    assert len(warnings(caplog)) == 2
    assert "Connection refused" in caplog.text
    assert SECRET not in caplog.text


def test_a_command_gets_the_sentence_and_the_payload(tmp_path: Path) -> None:
    code = "import os, sys; open(sys.argv[1], 'w').write(sys.argv[2] + chr(10) + os.environ['CARRARA_NOTIFICATION'])"
    command = [sys.executable, "-c", code, str(tmp_path / "told")]
    chosen = validate(NotifyConfig, {"command": command, "timeout_s": 60}, "test")
    notify.send(chosen, "report", "runs/mine", "eval", "eval: the report is there; $(touch hacked)\n", report="x.html")
    first, second = (tmp_path / "told").read_text().split("\n", 1)
    assert first == "runs/mine: eval: the report is there; $(touch hacked)"
    assert json.loads(second)["report"] == "x.html"
    assert not list(Path().glob("hacked"))


def test_a_command_that_fails_or_hangs_is_one_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    def send(*command: str) -> None:
        notify.send(validate(NotifyConfig, {"command": command, "timeout_s": 0.5}, "t"), "end", "r", "train", "done")

    send("/nowhere/at/all")
    send("sh", "-c", "exit 3")
    began = time.monotonic()
    send("sh", "-c", f"sleep 60 & echo $! > {tmp_path}/child; wait")
    assert time.monotonic() - began < 10
    assert [w.split(" failed: ")[1] for w in warnings(caplog)] == [
        "/nowhere/at/all cannot be started: No such file or directory",
        "sh ended with code 3",
        "sh was ended after 0.5 s (notify.timeout_s)",
    ]
    child = int((tmp_path / "child").read_text())
    for _ in range(100):  # what it had started is ended with it
        try:
            os.kill(child, 0)
            if Path(f"/proc/{child}/stat").read_text().split(") ")[1][0] == "Z":
                break
        except (ProcessLookupError, FileNotFoundError):
            break
        time.sleep(0.05)
    else:
        pytest.fail("what the command had started lives on")


def test_what_cannot_be_used_is_said_before_any_work(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HOOK", raising=False)
    with pytest.raises(ConfigError, match="HOOK is not set"), notify.notified(config(), "r", "train"):
        pytest.fail("the work was begun")
    monkeypatch.setenv("HOOK", "file:///etc/passwd")
    with pytest.raises(ConfigError, match="holds no http") as e:
        notify.check(config())
    assert "passwd" not in str(e.value)
    with pytest.raises(ConfigError, match=r"url_env.*name of an environment variable") as e:
        config(url_env=f"https://hooks.example/{SECRET}")
    assert SECRET not in str(e.value)
    with pytest.raises(ConfigError, match="unknown key"):
        config(url="https://hooks.example")


def test_a_stage_tells_of_its_failure_and_the_exit_code_stays(
    hook: Hook, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("CARRARA_ROOT", raising=False)
    (tmp_path / "table.csv").write_text("url,caption\nhttp://127.0.0.1:9/x.png,a picture\n")
    settings = {"run": "runs/x", "ingest": {"table": "table.csv"}, "notify": {"url_env": "HOOK", "timeout_s": 5}}
    (tmp_path / "carrara.yaml").write_text(yaml.safe_dump(settings))
    hook.answers = [500]
    assert main(["latents", "--local"]) == 2
    assert [(a["event"], a["stage"], a["exit_code"]) for a in hook.asked] == [("failure", "latents", 2)] * 3
    assert "run the stage 'ingest' first" in hook.asked[0]["sentence"]
    hook.asked.clear()
    assert main(["clip", "clip.pretrained=ViT-B-32:laion2b_s34b_b79k"]) == 0  # nothing to do is no news
    assert not hook.asked
    assert validate(RunConfig, settings, "x").notify.wanted
    assert SECRET not in capsys.readouterr().err
