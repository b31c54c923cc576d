"""An object store for tests: moto's S3 server on loopback, with a bucket that no other test has.

moto looks for an object and writes it in two steps, which a store does in one: here one PUT or POST runs at a time.
The server can also be told to ignore If-None-Match, to carry a request out and lose the answer, or to say "busy".
"""

from __future__ import annotations

import io
import logging
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import boto3
import fsspec
import pytest
from moto.server import DomainDispatcherApplication, create_backend_app
from werkzeug.serving import make_server

Asked = Callable[[str, str], bool]  # of the method and the path, with the query


def never(method: str, path: str) -> bool:
    return False


@contextmanager
def server(
    ignores: bool = False, lose: Asked = never, busy: Asked = never, throttled: Asked = never, delay_s: float = 0.0
) -> Iterator[str]:
    """A URL. ignores: If-None-Match and If-Match are dropped. lose: the request is carried out, and a 500 answered.
    busy: a conditional request is answered by 409 ConditionalRequestConflict, and not carried out. throttled: a request
    is answered by 503 SlowDown. delay_s: how long each answer takes."""
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    app, lock = DomainDispatcherApplication(create_backend_app), threading.Lock()

    def one_at_a_time(environ: dict[str, Any], start: Any) -> Any:
        method = environ["REQUEST_METHOD"]
        time.sleep(delay_s)
        if throttled(method, environ["PATH_INFO"]):
            start("503 Slow Down", [("Content-Type", "application/xml")])
            return [b"<Error><Code>SlowDown</Code><Message>Please reduce your request rate.</Message></Error>"]
        if method not in ("PUT", "POST"):
            return app(environ, start)
        path = environ["PATH_INFO"] + "?" + environ.get("QUERY_STRING", "")
        body = environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
        environ["wsgi.input"] = io.BytesIO(body)
        conditional = environ.get("HTTP_IF_NONE_MATCH") or environ.get("HTTP_IF_MATCH")
        if conditional and busy(method, path):
            start("409 Conflict", [("Content-Type", "application/xml")])
            return [b"<Error><Code>ConditionalRequestConflict</Code><Message>busy</Message></Error>"]
        if ignores:
            environ.pop("HTTP_IF_NONE_MATCH", None)
            environ.pop("HTTP_IF_MATCH", None)
        lost = lose(method, path)
        with lock:
            answer = list(app(environ, (lambda *a, **k: None) if lost else start))
        if lost:
            start("500 Internal Server Error", [("Content-Type", "application/xml")])
            return [b"<Error><Code>InternalError</Code><Message>lost</Message></Error>"]
        return answer

    made = make_server("127.0.0.1", 0, one_at_a_time, threaded=True)
    thread = threading.Thread(target=made.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{made.server_port}"
    finally:
        made.shutdown()
        made.server_close()


@contextmanager
def bucket(
    ignores: bool = False, lose: Asked = never, busy: Asked = never, throttled: Asked = never, delay_s: float = 0.0
) -> Iterator[str]:
    """`s3://NAME` of an empty bucket; what it needs is in the environment as long as this lasts.

    moto keeps its buckets for the whole process, whatever server they were made through, so each has a name
    of its own.
    """
    name = f"carrara-{uuid.uuid4().hex}"
    with server(ignores, lose, busy, throttled, delay_s) as url, pytest.MonkeyPatch.context() as patch:
        for variable, value in {
            "AWS_ACCESS_KEY_ID": "test",
            "AWS_SECRET_ACCESS_KEY": "test",
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_ENDPOINT_URL": url,
        }.items():
            patch.setenv(variable, value)
        fsspec.filesystem("s3").clear_instance_cache()
        try:
            boto3.client("s3").create_bucket(Bucket=name)
            yield f"s3://{name}"
        finally:
            fsspec.filesystem("s3").clear_instance_cache()
