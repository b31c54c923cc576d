"""The run folder of the training tests, for the fits on Ray."""

from tests.train.conftest import run

__all__ = ["run"]
