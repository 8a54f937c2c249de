#!/usr/bin/env bash
# The measurements on two GPUs that are lent for minutes: results go to $OUT as they come, as one archive.
#   OUT=results bash benchmarks/lent.sh first     GPU 0: VAE and latency.   GPU 1: `wan-tiny`'s transformer goes on learning.
#   OUT=results bash benchmarks/lent.sh second    GPU 0: what is asked for in the words that follow, one command a word.
set -u
export PYTHONUNBUFFERED=1 TOKENIZERS_PARALLELISM=false
half=$1
shift
root=$PWD
results=$root/runs/results/$half
mkdir -p "$OUT" "$results"

say() { # seconds, log, command
  local limit=$1 log=$results/$2.log
  shift 2
  local start=$SECONDS
  timeout -k 5 "$limit" "$@" >"$log" 2>&1
  echo "== $(basename "$log" .log): rc $? after $((SECONDS - start)) s" | tee -a "$results/summary.txt"
}
one() { CUDA_VISIBLE_DEVICES=0 say "$@"; }

if [ "$half" = first ]; then
  (
    export CUDA_VISIBLE_DEVICES=1
    cd "${TRAINING:-.}" || exit
    say 425 dit python3 -m training --start "$root/chitu_diffusion/assets/wan-tiny" --run "$root/runs/more" --stages dit --minutes 5.2
  ) &
  (
    say 60 scaling-small python3 -m benchmarks.scaling --ranks 2 --small --device cuda --budget 45 --out "$results/scaling-small.json"
    one 80 vae python3 -m benchmarks.vae --seconds 50 --out "$results"
    one 290 latency python3 -m benchmarks.latency --budget 265 --out "$results"
  ) &
else
  (
    for word in "$@"; do
      case $word in
        kernels) one 60 kernels python3 -m benchmarks.kernels --out "$results" ;;
        block) one 90 block python3 -m benchmarks.block --seconds 60 --out "$results" ;;
        vae) one 60 vae python3 -m benchmarks.vae --seconds 40 --out "$results" ;;
        fidelity) one 70 fidelity python3 -m benchmarks.fidelity --prompts 4 --budget 55 --out "$results" ;;
        latency:*) one 200 latency python3 -m benchmarks.latency --budget 150 --sections ${word#latency:} --out "$results" ;;
        scaling) say 170 scaling python3 -m benchmarks.scaling --ranks 2 --budget 150 --out "$results/scaling.json" ;;
      esac
    done
  ) &
fi

copy() {
  for file in runs/more/average-{0,1,2}.safetensors runs/more/statistics.pt; do
    [ "$file" -nt "$OUT/$(basename "$file")" ] && cp "$file" "$OUT/"
  done
  tar czf "$OUT/results.part" -C runs/results . && mv "$OUT/results.part" "$OUT/results.tgz"
}
while [ -n "$(jobs -rp)" ]; do
  sleep 5
  copy 2>/dev/null
done
copy 2>/dev/null
cat "$results/summary.txt"
for log in "$results"/*.log; do
  echo "---- $log"
  tail -n 25 "$log" | cut -c1-300
done
