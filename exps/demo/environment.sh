# Sourced with a requirements file: makes and activates .venv if no environment is active, and installs the file.
if [ -z "${VIRTUAL_ENV:-${CONDA_PREFIX:-}}" ]; then
    [ -e .venv/bin/activate ] || python3 -m venv .venv
    . .venv/bin/activate
fi
echo "installing $1 into ${VIRTUAL_ENV:-$CONDA_PREFIX}; the first time this takes minutes"
python -m pip install --quiet --disable-pip-version-check --requirement "$1"
