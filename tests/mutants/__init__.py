"""The mutation table: for each promise, the line that keeps it and the tests that fail when that line is taken out."""
