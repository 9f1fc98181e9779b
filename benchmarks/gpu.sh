#!/usr/bin/env bash
# Everything that needs a GPU, in one call of at most ten minutes: correctness of every fast path, single kernels, the
# large presets, ratios to the plain twins, and a real training run with samples. JSON, a picture and one log go to $OUT.
#
#   OUT=results bash benchmarks/gpu.sh
#   DATA=eurosat64.zip WEIGHTS=inception_2015_to_mixed7a.safetensors OUT=results bash benchmarks/gpu.sh
#   DEVICE=cpu SMALL=1 OUT=results bash benchmarks/gpu.sh     # the same without a GPU, tiny, to see that it runs
#
# With DATA (a set with parts train and test, 64 pixels) and WEIGHTS there is a table of quality too. Packages that are
# missing there may lie in wheels/ beside this checkout's src/; they are put before the installed ones. COMMIT names the
# commit where there is no git. A part that fails or runs out of its time is reported, keeps what it measured and does
# not stop the others; the exit code says whether any did.
set -uo pipefail
cd "$(dirname "$0")/.." || exit 1

PYTHON=${PYTHON:-python3}
DEVICE=${DEVICE:-cuda}
OUT=${OUT:-benchmarks/results/gpu}
SMALL=${SMALL:+--small}
mkdir -p "$OUT"

if compgen -G "wheels/*.whl" >/dev/null; then
  site=$(mktemp -d)
  "$PYTHON" -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --upgrade --target "$site" wheels/*.whl || exit 1
  export PYTHONPATH="$site"
fi
export PYTHONPATH="$PWD/src${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1

failed=0
part() { # name, seconds, command...
  local name=$1 limit=$2 began=$SECONDS status
  shift 2
  echo "== $name" | tee -a "$OUT/gpu.log"
  timeout -k 5 "$limit" "$@" 2>&1 | tee -a "$OUT/gpu.log" | tail -n 40
  status=${PIPESTATUS[0]}
  echo "== $name: exit $status after $((SECONDS - began)) s"
  [ "$status" -eq 0 ] || failed=1
}

run=$(mktemp -d)
data=digits
"$PYTHON" -c "import sklearn" 2>/dev/null || data=shapes:16
if [ -n "$SMALL" ]; then images=512; budget=60; work=4; size=16; else images=200000; budget=135; work=4000; size=64; fi
rm -f "$OUT/gpu.log"

part checks 120 "$PYTHON" benchmarks/gpu.py checks --device "$DEVICE" $SMALL --budget 60 --out "$OUT"
part presets 180 "$PYTHON" benchmarks/gpu.py presets --device "$DEVICE" $SMALL --budget "$budget" --out "$OUT"
part kernels 75 "$PYTHON" benchmarks/gpu.py kernels --device "$DEVICE" $SMALL --budget 45 --out "$OUT"
part twins 60 "$PYTHON" benchmarks/speed.py --device "$DEVICE" $SMALL --batch "${BATCH:-32}" --rounds 3 --out "$OUT/twins.json"
part train 60 "$PYTHON" -m mezzotint train unet-tiny --data "$data" --out "$run/digits" model.size=16 \
  model.channels=$([ "$data" = digits ] && echo 1 || echo 3) images="$images" batch=256 log_every_images="$((images / 8))" \
  samples.every_images="$images" samples.count=10 samples.steps=10 save.every_images="$images"
part sample 20 "$PYTHON" -m mezzotint sample "$run/digits" -n 20 --steps 20 --out "$run/samples.png"
cp "$run/samples.png" "$OUT/" 2>/dev/null || failed=1
cp "$run/digits/log.jsonl" "$OUT/train.jsonl" 2>/dev/null || failed=1
if [ -n "${DATA:-}" ]; then
  part quality 60 "$PYTHON" benchmarks/quality.py --data "$DATA:train" --held-out "$DATA:test" --size "$size" --budget "$work" \
    --batch 128 --samples 1000 ${WEIGHTS:+--weights "$WEIGHTS"} --runs "$run/quality" --out "$run/quality-gpu"
  cp "$run/quality-gpu.json" "$OUT/" 2>/dev/null || failed=1
fi

ls -l "$OUT"
exit $failed
