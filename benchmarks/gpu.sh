#!/usr/bin/env bash
# Everything that needs a GPU, in one call of at most eight minutes. Rows go to $OUT/gpu.jsonl as they are measured, the
# profile of a step to $OUT/profile.txt, all output to $OUT/gpu.log. How the call is prepared and fired: gpu-call.md.
#
#   OUT=results bash benchmarks/gpu.sh
#   DEVICE=cpu SMALL=1 OUT=results bash benchmarks/gpu.sh     # the same without a GPU, tiny, to see that it runs
#
# Packages that are missing there may lie in wheels/ beside src/; they are put before the installed ones. wheels/triton
# is a cache of Triton's kernels. COMMIT names the commit where there is no git. A part that fails or runs out of its
# time keeps what it measured and does not stop the others; the exit code says whether any did.
set -uo pipefail
cd "$(dirname "$0")/.." || exit 1

PYTHON=${PYTHON:-python3}
DEVICE=${DEVICE:-cuda}
OUT=${OUT:-benchmarks/results/gpu}
SMALL=${SMALL:+--small}
LIMIT=${LIMIT:-480} # seconds of all parts together
# The machine of a rehearsal is slow, or busy with other work: its limits are wider.
if [ -n "$SMALL" ]; then factor=4; else factor=1; fi
LIMIT=$((LIMIT * factor))
mkdir -p "$OUT"
rm -f "$OUT/gpu.log" "$OUT/gpu.jsonl"

if compgen -G "wheels/*.whl" >/dev/null; then
  site=$(mktemp -d)
  "$PYTHON" -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --upgrade --target "$site" wheels/*.whl || exit 1
  export PYTHONPATH="$site"
fi
[ -d wheels/triton ] && export TRITON_CACHE_DIR="$PWD/wheels/triton"
export PYTHONPATH="$PWD/src${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1

failed=0
part() { # name, seconds at most
  local name=$1 limit=$(($2 * factor)) began=$SECONDS status
  [ $((LIMIT - SECONDS)) -lt "$limit" ] && limit=$((LIMIT - SECONDS))
  if [ "$limit" -lt 15 ]; then
    echo "== $name: not begun, $limit s left" | tee -a "$OUT/gpu.log"
    failed=1
    return
  fi
  # The part itself stops in time to write its last row.
  timeout -k 5 "$limit" "$PYTHON" benchmarks/gpu.py "$name" --device "$DEVICE" $SMALL --seconds $((limit - 12)) --out "$OUT" \
    2>&1 | tee -a "$OUT/gpu.log" | tail -n 30 | cut -c1-300
  status=${PIPESTATUS[0]}
  echo "== $name: exit $status after $((SECONDS - began)) s" | tee -a "$OUT/gpu.log"
  [ "$status" -eq 0 ] || failed=1
}

# In the order of their worth: after the first three everything is decided.
part first 95
part compiled 100
part second 90
part loop 55
part others 70
part checks 50
part twins 45

ls -l "$OUT"
times # the processor time of a rehearsal is what it takes on a free core
exit $failed
