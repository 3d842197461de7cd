#!/usr/bin/env bash
# Makes .peers/NAME, a virtual environment for each tool that burnish is compared with, beside the project's own (they pin what we do not).
set -euo pipefail
cd "$(dirname "$0")/.."
torch=$(grep '^torch==' constraints.txt)

peer() { # name, packages
  local home=.peers/$1
  shift
  [ -f "$home/.installed" ] && return
  "${PYTHON:-python3.11}" -m venv "$home"
  "$home/bin/python" -m pip install --quiet "$torch" # first: a looser pin would pull gigabytes of CUDA libraries
  "$home/bin/python" -m pip install --quiet "$@"
  touch "$home/.installed"
}

peer trl "trl==1.16.0" "transformers==5.23.0" "peft==0.21.2" "accelerate==1.15.0" "datasets==5.2.0"
