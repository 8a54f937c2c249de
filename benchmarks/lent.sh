#!/usr/bin/env bash
# Measurements on two GPUs that are lent for minutes, a lane of work for each; what there is goes to $OUT every 5 seconds.
#   OUT=results bash benchmarks/lent.sh "vae latency:ceilings,small-exact" "fidelity kernels"
#   OUT=results bash benchmarks/lent.sh "scaling"                    (takes both)
# A word is a benchmark; `latency:` is followed by its sections. The word `train` teaches wan-tiny's transformer for minutes.
set -u
export PYTHONUNBUFFERED=1 TOKENIZERS_PARALLELISM=false
results=$PWD/runs/results
mkdir -p "$OUT" "$results"

say() { # seconds, log, command
  local limit=$1 log=$results/$2.log start=$SECONDS
  shift 2
  timeout -k 5 "$limit" "$@" >"$log" 2>&1
  echo "== $(basename "$log" .log): rc $? after $((SECONDS - start)) s" | tee -a "$results/summary.txt"
}
lane() { # GPUs, then words
  export CUDA_VISIBLE_DEVICES=$1
  shift
  for word in "$@"; do
    case $word in
      kernels) say 60 kernels python3 -m benchmarks.kernels --out "$results" ;;
      block) say 90 block python3 -m benchmarks.block --seconds 60 --out "$results" ;;
      vae) say 45 vae python3 -m benchmarks.vae --seconds 22 --out "$results" ;;
      fidelity) say 75 fidelity python3 -m benchmarks.fidelity --prompts 4 --budget 60 --out "$results" ;;
      latency:*) say 240 "${word//[:,]/-}" python3 -m benchmarks.latency --budget 230 --sections $(tr , ' ' <<<"${word#latency:}") \
        --out "$results/${word//[:,]/-}" ;;
      scaling) say 200 scaling python3 -m benchmarks.scaling --ranks 2 --budget 190 --out "$results/scaling.json" ;;
      train) say 425 train python3 -m training --start chitu_diffusion/assets/wan-tiny --run runs/more --stages dit --minutes 5.2 ;;
      *) echo "unknown word $word" ;;
    esac
  done
}
if [ "$1" = scaling ]; then
  lane 0,1 scaling &
else
  lane 0 $1 &
  lane 1 ${2:-} &
fi

copy() {
  for file in runs/more/average-{0,1,2}.safetensors runs/more/statistics.pt; do
    [ "$file" -nt "$OUT/$(basename "$file")" ] && cp "$file" "$OUT/"
  done
  tar czf "$OUT/results.part" -C "$results" . && mv "$OUT/results.part" "$OUT/results.tgz"
}
while [ -n "$(jobs -rp)" ]; do
  sleep 5
  copy 2>/dev/null
done
copy 2>/dev/null
for log in "$results"/*.log; do
  echo "---- $log"
  tail -n 25 "$log" | cut -c1-300
done
cat "$results/summary.txt"
