#!/usr/bin/env bash
# Fill .venv from pyproject.toml and constraints.txt with uv. Needs Python 3.11 or newer and a way to PyPI.
set -euo pipefail
cd "$(dirname "$0")"

# Python: the first one here that is new enough.
python=""
for candidate in "${PYTHON:-}" python3 python3.14 python3.13 python3.12 python3.11 /usr/bin/python3; do
    if [ -n "$candidate" ] && "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
        python=$(command -v "$candidate")
        break
    fi
done
if [ -z "$python" ]; then
    echo "setup: no Python 3.11 or newer found; install python3 or set PYTHON to one" >&2
    exit 2
fi

# uv: the one on the PATH, or one of our own in .venv/uv. Debian and Ubuntu split ensurepip from Python, so
# where pip cannot be had, their python3-venv package is installed first.
if command -v uv >/dev/null 2>&1; then
    uv=$(command -v uv)
else
    uv="$PWD/.venv/uv/bin/uv"
    if [ ! -x "$uv" ]; then
        mkdir -p .venv
        if ! "$python" -c 'import ensurepip' 2>/dev/null; then
            package="python$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')-venv"
            sudo=""
            [ "$(id -u)" = 0 ] || sudo=sudo
            echo "setup: installing $package"
            $sudo apt-get update -qq && $sudo apt-get install -y -qq "$package" >/dev/null || {
                echo "setup: pip is missing; install $package (or uv) and run this again" >&2
                exit 2
            }
        fi
        "$python" -m venv .venv/uv
        .venv/uv/bin/python -m pip install --quiet --disable-pip-version-check uv
    fi
fi

if [ ! -x .venv/bin/python ]; then
    "$uv" venv --quiet --allow-existing --python "$python" .venv
fi
echo "setup: filling .venv (6.5 GB with CUDA's libraries; a few minutes)"
"$uv" pip install --quiet --compile-bytecode --python .venv/bin/python --constraint constraints.txt --editable '.[dev]'
command -v g++ >/dev/null || command -v c++ >/dev/null || command -v "${CXX:-g++}" >/dev/null ||
    echo "setup: no C++ compiler here; all works without one but the setting 'compile' (install g++ for that)"
