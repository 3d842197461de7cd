#!/usr/bin/env bash
# Everything that only a GPU can say, in one go of less than ten minutes and without a network:
#
#   bash tests/gpu/run.sh [FOLDER]           results into FOLDER (default: runs/gpu)
#   bash tests/gpu/run.sh --tiny [FOLDER]    the same on a CPU in small shapes, to see that all of it runs
#
# 1. every kernel against the truth, whole models against plain ones, whole runs   2. every kernel against the machine's limits
# 3. training steps, LoRA first, then full
#
# Needs python3 with what pyproject.toml asks for, and pytest. Packages that are missing can lie as wheels in the folder $WHEELS (.whl):
#   python3 -m pip download --no-deps --only-binary=:all: --python-version 3.12 --platform manylinux_2_17_x86_64 -d .whl pydantic==... (and so on)
# PARTS=kernels,lora runs some parts only.
# Parts are cut off at a time of their own, so that a slow one leaves time to the others; what is done is in FOLDER by then.
set -uo pipefail
cd "$(dirname "$0")/../.."
tiny=()
[ "${1:-}" = "--tiny" ] && tiny=(--tiny) && shift
out=${1:-runs/gpu}
python=${PYTHON:-python3}
mkdir -p "$out"
export PYTHONPATH="$PWD/src${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1

wheels=${WHEELS:-.whl}
if compgen -G "$wheels/*.whl" >/dev/null; then
  site=$(mktemp -d)
  "$python" -m pip install --quiet --no-index --no-deps --no-compile --target "$site" "$wheels"/*.whl || exit 1
  export PYTHONPATH="$PYTHONPATH:$site"
fi

bad=0
only=",${PARTS:-correctness,kernels,lora,full},"
part() { # name, seconds, command
  local name=$1 limit=$2
  [[ $only == *",$name,"* ]] || return 0
  shift 2
  echo "== $name"
  timeout "$limit" "$@" 2>&1 | tee "$out/$name.txt"
  local code=${PIPESTATUS[0]}
  [ "$code" -eq 0 ] || { bad=1 && echo "== $name: exit code $code"; }
}

{ nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv || echo "no GPU"; "$python" -m pip list; } >"$out/machine.txt" 2>/dev/null
export BURNISH_TESTS_ON=cuda TRITON_INTERPRET=0
[ ${#tiny[@]} -eq 0 ] || export BURNISH_GPU_TESTS_ON=cpu BURNISH_TESTS_ON=cpu TRITON_INTERPRET=1
workers=()
"$python" -c "import xdist" 2>/dev/null && workers=(-n "$(nproc)")
part correctness 220 "$python" -m pytest tests/gpu tests/parity ${workers[@]+"${workers[@]}"} -W default -p no:cacheprovider --durations=8
unset BURNISH_GPU_TESTS_ON BURNISH_TESTS_ON TRITON_INTERPRET
part kernels 100 "$python" -m benchmarks.kernels ${tiny[@]+"${tiny[@]}"} --budget 0.2 --json "$out/kernels.json"
part lora 170 "$python" -m benchmarks.gpu_sft ${tiny[@]+"${tiny[@]}"} --modes lora --timeout 80 --json "$out/lora.json" --profile "$out/profile"
part full 110 "$python" -m benchmarks.gpu_sft ${tiny[@]+"${tiny[@]}"} --modes full --timeout 60 --json "$out/full.json"
exit $bad
