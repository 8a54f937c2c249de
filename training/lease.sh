#!/usr/bin/env bash
# Training on a machine that is lent for minutes and keeps nothing: takes up what lies in .carry/ (parts of an
# earlier run), trains, and copies what there is to $OUT as it comes, so that being cut off loses little.
#   OUT=results bash training/lease.sh --minutes 24 --stages vae dit
set -u
export PYTHONUNBUFFERED=1
run=runs/wan-tiny
mkdir -p "$run" "$OUT"
[ -d .carry ] && cp -r .carry/. "$run/"
python3 -m training --run "$run" --out runs/export "$@" >"$OUT/train.log" 2>&1 &
pid=$!
while kill -0 $pid 2>/dev/null; do
  sleep 5
  for file in vae.safetensors average-0.safetensors average-1.safetensors average-2.safetensors statistics.pt judge.safetensors judge.json; do
    [ "$run/$file" -nt "$OUT/$file" ] && cp "$run/$file" "$OUT/$file"
  done
done
tail -n 60 "$OUT/train.log"
ls -la "$OUT"
