# shellcheck shell=bash
# Sourced by the scripts beside it: one virtual environment in the repository, installed once and remembered by a stamp.

# The CPU wheel of torch that these scripts are tested with; pip would otherwise fetch gigabytes of CUDA libraries.
readonly CPU_TORCH='torch==2.13.0'
# The version that torch 2.13 pins on GPU machines; its interpreter runs the kernels on the CPU in tests.
readonly INTERPRETER_TRITON='triton==3.7.1'

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
venv=$root/.venv
readonly root venv

say() { if [[ -t 2 ]]; then printf '\033[1m%s\033[0m\n' "$*" >&2; else printf '%s\n' "$*" >&2; fi; }
die() {
  printf '%s\n' "$*" >&2
  exit 2
}

# The help text of a script is its leading comment, so that it stands in one place.
print_help() { sed -n '2,/^$/{ s/^# \{0,1\}//p; }' "$1"; }

has_nvidia_gpu() { command -v nvidia-smi >/dev/null 2>&1 && nvidia-smi -L 2>/dev/null | grep -q GPU; }

# What an installation depends on: change any of it and the next call installs again.
_fingerprint() {
  {
    "$venv/bin/python" -VV
    printf '%s\n' "$1" "$root" "${SAEKIT_TORCH:-default}" "$CPU_TORCH" "$INTERPRETER_TRITON"
    cat "$root/pyproject.toml"
  } | sha256sum | cut -d' ' -f1
}

_is_installed() {
  local stamp=$venv/.saekit-installed-$1
  [[ -x $venv/bin/python && -f $stamp && $(<"$stamp") == "$(_fingerprint "$1")" ]]
}

_make_venv() {
  local python=${PYTHON:-python3}
  if [[ ! -x $venv/bin/python ]]; then
    command -v "$python" >/dev/null || die "scripts: no $python, needs Python >= 3.11; or name one: PYTHON=/path/to/python3"
    "$python" -c 'import sys; raise SystemExit(sys.version_info < (3, 11))' ||
      die "scripts: $("$python" -V) found, needs Python >= 3.11; name one: PYTHON=/path/to/python3"
    "$python" -m venv "$venv" ||
      die "scripts: $python cannot make a virtual environment, needs its venv module; on Debian: apt-get install python3-venv"
  fi
  # An interrupted `python -m venv`, or an environment made by another tool, may lack pip.
  "$venv/bin/python" -m pip --version >/dev/null 2>&1 || "$venv/bin/python" -m ensurepip --upgrade >/dev/null
}

# A person sees pip's bars; a log file only gets what went wrong.
_pip_install() {
  if [[ -t 1 ]]; then
    "$venv/bin/python" -m pip install --disable-pip-version-check "$@"
    return
  fi
  local log=$venv/saekit-install.log
  if ! "$venv/bin/python" -m pip install --disable-pip-version-check "$@" >"$log" 2>&1; then
    tail -n 30 "$log" >&2
    die "scripts: pip install $* failed, the log is $log"
  fi
}

_install_torch() {
  "$venv/bin/python" -c 'import torch' 2>/dev/null && return
  local requirement=${SAEKIT_TORCH:-}
  if [[ -z $requirement ]]; then
    if has_nvidia_gpu; then requirement='torch>=2.6'; else requirement=$CPU_TORCH; fi
  fi
  say "installing $requirement"
  _pip_install "$requirement"
}

# ensure_installed run|dev: leaves a .venv with the package and the extras of that purpose; seconds when it is there already.
ensure_installed() {
  local purpose=$1 extras
  # Everything that `run` needs is in `dev`, so scripts/quickstart after scripts/test installs nothing.
  if _is_installed dev || _is_installed "$purpose"; then return; fi
  case $purpose in
    run) extras='gguf,zarrs' ;;
    dev) extras='dev' ;;
    *) die "scripts: unknown purpose $purpose" ;;
  esac
  mkdir -p "$venv"
  exec {lock}>"$venv/.saekit-install.lock"
  if command -v flock >/dev/null; then flock "$lock"; fi
  if ! _is_installed "$purpose"; then
    _make_venv
    _install_torch
    say "installing saekit[$extras]"
    _pip_install --editable "${root}[$extras]"
    if [[ $purpose == dev && $(uname -s) == Linux ]] && ! "$venv/bin/python" -c 'import triton' 2>/dev/null; then
      say "installing $INTERPRETER_TRITON"
      _pip_install "$INTERPRETER_TRITON"
    fi
    _fingerprint "$purpose" >"$venv/.saekit-installed-$purpose"
  fi
  exec {lock}>&-
}
