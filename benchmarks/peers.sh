#!/usr/bin/env bash
# Makes .peers/NAME, a virtual environment for each tool that burnish is compared with, beside the project's own (they pin what we do not).
#
#   bash benchmarks/peers.sh                  all that this machine can use
#   bash benchmarks/peers.sh trl litgpt       these only
#
# A tool that will not install is reported, with the log in .peers/NAME.log, and left out of the comparison; the others go on.
set -uo pipefail
cd "$(dirname "$0")/.."
torch=$(grep '^torch==' constraints.txt)
gpu=$(command -v nvidia-smi >/dev/null && nvidia-smi -L 2>/dev/null | head -n 1)
failed=()

peer() { # name, packages
  local name=$1 home=.peers/$1
  shift
  [ -f "$home/.installed" ] && return
  mkdir -p .peers
  # torch first and by itself, and then held: a looser pin would pull gigabytes of CUDA libraries.
  if { test -x "$home/bin/python" || "${PYTHON:-python3.11}" -m venv "$home"; } >"$home.log" 2>&1 &&
    "$home/bin/python" -m pip install --quiet "$torch" >>"$home.log" 2>&1 &&
    "$home/bin/python" -m pip install --quiet "$torch" "$@" >>"$home.log" 2>&1; then
    touch "$home/.installed"
    rm -f "$home.log"
    echo "$name: installed"
  else
    failed+=("$name")
    echo "$name: NOT installed, see $home.log"
  fi
}

# burnish itself goes in beside the tool: `make peers-test` trains our models with the tool's own loop.
beside() { # name
  local home=.peers/$1
  [ -f "$home/.installed" ] || return
  [ "$home/.burnish" -nt pyproject.toml ] && return
  if "$home/bin/python" -m pip install --quiet --constraint constraints.txt --editable . pytest >"$home.log" 2>&1; then
    touch "$home/.burnish"
    rm -f "$home.log"
  else
    failed+=("$1")
    echo "$1: burnish was NOT installed beside it, see $home.log"
  fi
}

install() {
  case $1 in
    trl)
      peer trl "trl==1.16.0" "transformers==5.23.0" "peft==0.21.2" "accelerate==1.15.0" "datasets==5.2.0" ${gpu:+"liger-kernel==0.8.5"}
      beside trl
      ;;
    # It asks for torchvision and torchaudio, whose builds need CUDA's libraries to be imported at all. Text needs neither.
    llamafactory)
      peer llamafactory "llamafactory==0.9.5" "torchvision==0.28.0" "torchaudio==2.11.0"
      [ -f .peers/llamafactory/.installed ] && .peers/llamafactory/bin/python -m pip uninstall --quiet --yes torchvision torchaudio 2>/dev/null
      ;;
    litgpt) peer litgpt "litgpt==0.5.13" ;;
    # Unsloth asks for a torch of its own choosing, and for a GPU when it is imported.
    unsloth) [ -n "$gpu" ] && peer unsloth "unsloth==2026.10.9" || echo "unsloth: left out, there is no GPU" ;;
    *) echo "no peer '$1', expected trl, llamafactory, litgpt or unsloth" >&2 && exit 2 ;;
  esac
}

if [ $# -eq 0 ]; then
  set -- trl llamafactory litgpt unsloth
fi
for name in "$@"; do
  install "$name"
done
# Named by itself, a tool that is not there is an error; among all of them it is one comparison less.
[ ${#failed[@]} -lt $# ]
