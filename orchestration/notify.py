"""Tells somebody what became of a run: by a command of theirs, or by a webhook.

    notify:
      command: [notify-send, Carrara]       # called with the sentence as its last argument
      url_env: CARRARA_WEBHOOK              # the environment variable that holds the webhook's URL
      token_env: CARRARA_WEBHOOK_TOKEN      # and one for a bearer token, where it wants one
      events: [end, failure, alarm, report] # stopped is the fifth

Both get the same object (`payload`): a webhook as the JSON body of a POST, a command as JSON in CARRARA_NOTIFICATION.
What is secret is named by its environment variable, is in no file and in no line of a log. The URL is the user's own,
so any address may be called; a redirect is not followed. A notification that fails is one warning, within a bounded
time, and changes nothing of the run or of its exit code.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import json
import logging
import os
import signal
import socket
import subprocess
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from typing import Any, Literal

from pydantic import Field, model_validator

from orchestration.lease import Busy
from orchestration.stopping import EXIT_STOPPED, Stopped
from shards.settings import ConfigError, Strict

log = logging.getLogger("carrara.notify")

Event = Literal["end", "failure", "stopped", "alarm", "report"]
ATTEMPTS = 3
PAUSES_S = (1.0, 4.0)  # before the second and the third
LONGEST = 2000  # characters of a sentence: some services refuse more, and so do environments


class NotifyConfig(Strict):
    """Whom to notify of what."""

    command: tuple[str, ...] | None = Field(
        default=None, min_length=1, description="a program and its arguments; the sentence is added as the last one"
    )
    url_env: str | None = Field(default=None, description="environment variable with the URL of a webhook")
    token_env: str | None = Field(default=None, description="environment variable with a bearer token for it")
    events: tuple[Event, ...] = Field(
        default=("end", "failure", "alarm", "report"),
        description="end, failure and stopped of a stage, alarm of a worse checkpoint, report: a new one is there",
    )
    timeout_s: float = Field(default=10.0, gt=0, le=120, description="of one attempt; a webhook gets three")

    @model_validator(mode="after")  # of the whole, so that the error does not quote what may be the secret itself
    def _are_names(self) -> NotifyConfig:
        for field in ("url_env", "token_env"):
            value = getattr(self, field) or "_"
            if not (value.isascii() and value.replace("_", "a").isalnum()):
                raise ValueError(f"{field} is to be the name of an environment variable, not what it holds")
        return self

    @property
    def wanted(self) -> bool:
        """Whether anybody is to be notified of anything."""
        return bool((self.command or self.url_env) and self.events)


@dataclasses.dataclass
class Outcome:
    """What a stage's context is told: whether there was something to do, and where its report is."""

    worked: bool = True
    report: str | None = None


def check(config: NotifyConfig) -> None:
    """Raise ConfigError where a variable that it names is not there, or holds no URL."""
    url = os.environ.get(config.url_env or "")
    if config.url_env and not url:
        raise ConfigError(f"notify.url_env: the environment variable {config.url_env} is not set; set it to the URL")
    if config.url_env and url and not url.startswith(("http://", "https://")):
        raise ConfigError(f"notify.url_env: {config.url_env} holds no http:// or https:// URL")
    if config.token_env and not os.environ.get(config.token_env):
        raise ConfigError(f"notify.token_env: the environment variable {config.token_env} is not set")
    if config.token_env and not config.url_env:
        raise ConfigError("notify.token_env goes with notify.url_env")


@contextlib.contextmanager
def notified(config: NotifyConfig, run: str, stage: str) -> Iterator[Outcome]:
    """Context of one stage, whose end, failure or stop is told; nothing where there was nothing to do, where another
    job is at it already (which will tell), or on Ctrl-C (whoever pressed it knows)."""
    if not config.wanted:
        yield Outcome()
        return
    check(config)
    began, outcome = time.monotonic(), Outcome()

    def say(event: Event, sentence: str, exit_code: int, attempts: int = ATTEMPTS) -> None:
        seconds = time.monotonic() - began
        send(config, event, run, stage, sentence, exit_code, outcome.report, seconds, attempts)

    try:
        yield outcome
    except (Busy, KeyboardInterrupt):
        raise
    except Stopped as e:
        say("stopped", str(e), EXIT_STOPPED, attempts=1)  # it is to end soon
        raise
    except Exception as e:
        from orchestration.job import sentence

        say("failure", sentence(e), 2 if isinstance(e, ConfigError) else 1)
        raise
    if outcome.worked:
        say("end", f"{stage}: done", 0)


def payload(
    event: Event, run: str, stage: str, sentence: str, exit_code: int | None, report: str | None, seconds: float | None
) -> dict[str, Any]:
    """The notification, as JSON has it.

    version 1. event. run: folder or URL. stage. sentence, and the same as `text`, which is what chat services show.
    exit_code: None where nothing has ended. host: of the command. time: ISO 8601, UTC. report: path, or None. seconds:
    how long the stage took, or None. An alarm has `alarm` beside them: the fields of eval/compare.py's Alarm.
    """
    text = " ".join(sentence.split())[:LONGEST]
    return {
        "version": 1,
        "event": event,
        "run": run,
        "stage": stage,
        "sentence": text,
        "text": f"{run}: {text}",
        "exit_code": exit_code,
        "host": socket.gethostname(),
        "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "report": report,
        "seconds": None if seconds is None else round(seconds, 1),
    }


def send(
    config: NotifyConfig,
    event: Event,
    run: str,
    stage: str,
    sentence: str,
    exit_code: int | None = None,
    report: str | None = None,
    seconds: float | None = None,
    attempts: int = ATTEMPTS,
    alarm: dict[str, Any] | None = None,
) -> None:
    """Tell whom the configuration names, if this event is wanted. Raises nothing: what fails is one warning each."""
    if not config.wanted or event not in config.events:
        return
    message = payload(event, run, stage, sentence, exit_code, report, seconds) | ({"alarm": alarm} if alarm else {})
    if config.command and (why := _call(config.command, message, config.timeout_s)):
        log.warning("notify: the command for '%s' failed: %s", event, why)
    if config.url_env and (why := _post(config, message, attempts)):
        log.warning("notify: the webhook for '%s' failed: %s", event, why)


def _call(command: tuple[str, ...], message: dict[str, Any], timeout_s: float) -> str | None:
    """Run it; why it failed, or None. What it prints is not mixed into what this command prints."""
    try:
        process = subprocess.Popen(
            [*command, message["text"]],
            env={**os.environ, "CARRARA_NOTIFICATION": json.dumps(message)},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            start_new_session=True,  # so that it can be ended with what it has started
        )
    except (OSError, ValueError) as e:
        return f"{command[0]} cannot be started: {e.strerror if isinstance(e, OSError) else e}"
    try:
        code = process.wait(timeout_s)
    except subprocess.TimeoutExpired:
        return f"{command[0]} was ended after {timeout_s:g} s (notify.timeout_s)"
    finally:
        if process.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    return f"{command[0]} ended with code {code}" if code else None


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """A redirect is an answer like any other that is not 200: whoever sends it would choose the address."""

    def redirect_request(self, *_: Any, **__: Any) -> None:
        return None


def _post(config: NotifyConfig, message: dict[str, Any], attempts: int) -> str | None:
    """Post it, again after a pause where that may help; why it failed in the end, or None. In a thread: a server that
    answers a byte a minute keeps every timeout of a socket waiting."""
    why: str | None = None
    for attempt in range(attempts):
        if attempt:
            time.sleep(PAUSES_S[min(attempt, len(PAUSES_S)) - 1])
        answer: list[tuple[str | None, bool]] = []
        thread = threading.Thread(target=_post_into, args=(answer, config, message), name="notify", daemon=True)
        thread.start()
        thread.join(config.timeout_s + 1)
        why, again = answer[0] if answer else (f"no answer within {config.timeout_s:g} s", True)
        if why is None or not again:
            return why
    return f"{why} ({attempts} attempts)"


def _post_into(answer: list[tuple[str | None, bool]], config: NotifyConfig, message: dict[str, Any]) -> None:
    answer.append(_post_once(config, message))


def _post_once(config: NotifyConfig, message: dict[str, Any]) -> tuple[str | None, bool]:
    """(why it failed or None, whether another attempt may help). No text of an error is passed on but the operating
    system's: others quote the URL, which is a secret."""
    try:
        headers = {"Content-Type": "application/json", "User-Agent": "carrara"}
        if config.token_env:
            token = os.environ[config.token_env].strip()  # a secret out of a file often ends with a newline
            headers["Authorization"] = f"Bearer {token}"
        url = os.environ[config.url_env or ""]
        request = urllib.request.Request(url, json.dumps(message).encode(), headers, method="POST")
        with urllib.request.build_opener(_NoRedirect).open(request, timeout=config.timeout_s) as answer:
            return (None, False) if 200 <= answer.status < 300 else (f"it answered {answer.status}", False)
    except urllib.error.HTTPError as e:
        e.close()
        hint = "; it redirects, which is not followed" if 300 <= e.code < 400 else ""
        return f"it answered {e.code}{hint}", e.code >= 500 or e.code == 429
    except TimeoutError:
        return f"no answer within {config.timeout_s:g} s", True
    except urllib.error.URLError as e:
        reason = e.reason
        if isinstance(reason, TimeoutError):
            return f"no answer within {config.timeout_s:g} s", True
        return (reason.strerror if isinstance(reason, OSError) else None) or type(reason).__name__, True
    except Exception as e:  # whatever a URL or a server may cause
        return (e.strerror if isinstance(e, OSError) else None) or type(e).__name__, isinstance(e, OSError)
