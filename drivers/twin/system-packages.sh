#!/bin/sh
# What the simulator needs from the system: software rendering for MuJoCo, and venv for Python.
# Installs it when run as root on Debian or Ubuntu; otherwise names it and fails.
set -eu
python=${1:-python3}
missing=""

has_library() { ldconfig -p | grep -q "$1"; }
"$python" -m ensurepip --version >/dev/null 2>&1 || missing="$missing python3-venv"
has_library 'libEGL\.so\.1' || missing="$missing libegl1"
has_library 'libGL\.so\.1' || missing="$missing libgl1"
has_library 'libOpenGL\.so\.0' || missing="$missing libopengl0"
has_library 'libOSMesa\.so' || missing="$missing libosmesa6"
ls /usr/lib/*/dri/swrast_dri.so >/dev/null 2>&1 || missing="$missing libgl1-mesa-dri"
[ -z "$missing" ] && exit 0

if [ "$(id -u)" -ne 0 ] || ! command -v apt-get >/dev/null; then
    echo "onbeat: this machine lacks:$missing" >&2
    echo "onbeat: run 'sudo apt-get install$missing' and try again" >&2
    exit 1
fi
echo "onbeat: installing$missing" >&2
export DEBIAN_FRONTEND=noninteractive
apt-get update -qq
# shellcheck disable=SC2086
apt-get install -y -qq --no-install-recommends $missing >/dev/null
