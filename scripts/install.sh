#!/bin/sh
# Makes a virtual environment and installs a lock into it: install.sh PYTHON VENV REQUIREMENTS
# Says what failed, and which package of the system brings what is missing.
set -u
python=$1 venv=$2 requirements=$3

fail() {
    echo "install failed: $*" >&2
    exit 1
}

if ! "$venv/bin/python" -m pip --version >/dev/null 2>&1; then
    rm -rf "$venv"
    command -v "$python" >/dev/null || fail "there is no $python; install Python 3.10, 3.11 or 3.12, or name one: make PYTHON=python3.11"
    "$python" -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 12))' ||
        fail "$python is $("$python" -V 2>&1); the lock is for Python 3.10 to 3.12, name one: make PYTHON=python3.11"
    "$python" -m venv "$venv" ||
        fail "$python cannot make a virtual environment (Debian, Ubuntu: apt-get install python3-venv)"
fi
command -v cc >/dev/null || command -v gcc >/dev/null ||
    fail "a C compiler is missing; one package has no wheel (Debian, Ubuntu: apt-get install gcc python3-dev)"

pip() { "$venv/bin/python" -m pip --disable-pip-version-check "$@"; }

log=$venv/install.log
echo "installing $requirements into $venv; this takes about two minutes the first time (log: $log)"
# The pip that comes with Python 3.10 cannot build one of the packages.
pip install --quiet --upgrade "pip>=23.1" >"$log" 2>&1 || { tail -n 20 "$log" >&2; fail "upgrading pip"; }
pip install --requirement "$requirements" >>"$log" 2>&1 || {
    grep -iE '^ *(error|.*error:)' "$log" | tail -n 10 >&2
    grep -q 'Python.h' "$log" && echo "the Python headers are missing (Debian, Ubuntu: apt-get install python3-dev)" >&2
    fail "pip could not install $requirements; the whole log is in $log"
}
"$venv/bin/python" scripts/check_install.py || fail "a package does not import"
"$venv/bin/python" -m latent_diffusion.native
