#!/usr/bin/env bash
# Checks style and runs the whole test suite in the environment that the demo uses; arguments go to pytest.
set -euo pipefail
cd "$(dirname "$0")/.."
. exps/demo/environment.sh tests/requirements.txt

ruff check .
ruff format --check .
python -m pytest -n auto --dist worksteal "$@"
