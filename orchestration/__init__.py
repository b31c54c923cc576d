"""Runs stages on Ray, and the command line."""

from orchestration.packages import put_first

put_first()
