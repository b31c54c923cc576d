"""An object store for tests: moto's S3 server on loopback, with a bucket that no other test has."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from contextlib import contextmanager

import boto3
import fsspec
import pytest
from moto.server import ThreadedMotoServer


@contextmanager
def bucket() -> Iterator[str]:
    """`s3://NAME` of an empty bucket; what it needs is in the environment as long as this lasts.

    moto keeps its buckets for the whole process, whatever server they were made through, so each has a name
    of its own.
    """
    server = ThreadedMotoServer("127.0.0.1", port=0)
    server.start()
    host, port = server.get_host_and_port()
    name = f"carrara-{uuid.uuid4().hex}"
    try:
        with pytest.MonkeyPatch.context() as patch:
            for variable, value in {
                "AWS_ACCESS_KEY_ID": "test",
                "AWS_SECRET_ACCESS_KEY": "test",
                "AWS_DEFAULT_REGION": "us-east-1",
                "AWS_ENDPOINT_URL": f"http://{host}:{port}",
            }.items():
                patch.setenv(variable, value)
            fsspec.filesystem("s3").clear_instance_cache()
            boto3.client("s3").create_bucket(Bucket=name)
            yield f"s3://{name}"
    finally:
        fsspec.filesystem("s3").clear_instance_cache()
        server.stop()
