#!/usr/bin/env bash
# Sets up lacuna on a Mac or a Linux machine: a virtual environment with everything in it, then a check that it works.
#   scripts/setup_local.sh [PYTHON]      may be run again at any time; PYTHON is python3 unless it is given
set -euo pipefail
cd "$(dirname "$0")/.."

if [ -t 1 ] && [ -z "${NO_COLOR:-}" ]; then
    red=$'\e[31m' green=$'\e[32m' yellow=$'\e[33m' plain=$'\e[0m'
else
    red='' green='' yellow='' plain=''
fi
stop() {
    echo "${red}✗ $1${plain}" >&2
    exit 1
}

python=${1:-python3}
command -v "$python" > /dev/null ||
    stop "there is no '$python' here: install Python 3.11 or newer (a Mac: brew install python@3.12), or name one: $0 PYTHON"
version=$("$python" -c 'import sys; print("%d.%d.%d" % sys.version_info[:3])')
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
    stop "$python is Python $version, lacuna needs 3.11 or newer: name another one: $0 python3.12"
echo "${green}✓ Python $version${plain}"
[ "$(uname -s)-$("$python" -c 'import platform; print(platform.machine())')" != Darwin-x86_64 ] ||
    echo "${yellow}! this Python is built for Intel: on an Apple chip it cannot use the GPU; take an arm64 one${plain}" >&2
"$python" -c 'import venv, ensurepip' 2> /dev/null ||
    stop "$python cannot make virtual environments: apt-get install python3-venv"
command -v make > /dev/null || stop "make is missing: apt-get install make (a Mac: xcode-select --install)"

echo "installing into .venv, at the versions of constraints.txt (some minutes the first time)"
make PYTHON="$python" install || stop "the installation failed: the lines above say why; then run $0 again"
echo "${green}✓ installed${plain}"
.venv/bin/lacuna doctor || stop "something that everything needs does not work: see the lines marked ✗ above"
echo "${green}ready:${plain} . .venv/bin/activate && make quickstart"
