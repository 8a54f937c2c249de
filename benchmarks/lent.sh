#!/usr/bin/env bash
# Measurements on two GPUs that are lent for minutes, a lane of work for each; what there is goes to $OUT every 5 seconds.
#   OUT=results bash benchmarks/lent.sh "vae latency:ceilings,small-exact" "fidelity kernels"
#   OUT=results bash benchmarks/lent.sh "scaling faults"             (takes all that there are)
#   OUT=results bash benchmarks/lent.sh "latency@300:small-8bit,profile"    (300 seconds in place of what the word has by itself)
# A word is a benchmark; `latency:` is followed by its sections; LATENCY holds further options of it. The word `train`
# teaches wan-tiny's transformer for minutes, `cache` calibrates it and makes the table of step caches.
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
cache_table() { # seconds
  local model=chitu_diffusion/assets/wan-tiny
  say "$1" calibrate python3 -m chitu_diffusion calibrate --model wan-tiny --steps 50 --seeds 0..1 --dtype float32 --workers 14
  cp $model/flexcache.json "$results/"
  say "$1" cache python3 -m chitu_diffusion eval cache --model wan-tiny --prompts 16 --seeds 0..2 --steps 50 --dtype float32 \
    --workers 14 -o "$results/cache" --work runs/cachework
  tar czf "$results/rows.tgz" --exclude='*.npy' runs/cachework
  say 60 beside python3 -m chitu_diffusion eval cache --model wan-tiny --prompts 1 --seeds 0 --steps 50 --dtype float32 \
    --settings plan:fresh=25 --settings plan:fresh=16 -o "$results/alone" --work runs/alonework
}
lane() { # GPUs, then words
  export CUDA_VISIBLE_DEVICES=$1
  shift
  for word in "$@"; do
    local own=${word%%:*} sections=${word#*:} limit=
    [[ $own == *@* ]] && limit=${own#*@} own=${own%@*}
    case $own in
      check) say "${limit:-60}" check python3 -m benchmarks.gpu_check ;;
      kernels) say "${limit:-60}" kernels python3 -m benchmarks.kernels --out "$results" ;;
      block) say "${limit:-90}" block python3 -m benchmarks.block --seconds $((${limit:-90} - 30)) --out "$results" ;;
      tune) say "${limit:-45}" tune python3 -m benchmarks.block --tune --out "$results" ;;
      vae) say "${limit:-45}" vae python3 -m benchmarks.vae --seconds $((${limit:-45} - 23)) --out "$results" ;;
      fidelity) say "${limit:-75}" fidelity python3 -m benchmarks.fidelity ${FIDELITY:---prompts 4} \
        --budget $((${limit:-75} - 15)) --out "$results" ;;
      latency) say "${limit:-240}" "latency-${sections//,/-}" python3 -m benchmarks.latency --budget $((${limit:-240} - 10)) \
        --sections ${sections//,/ } ${LATENCY:-} --out "$results/latency-${sections//,/-}" ;;
      scaling) say "${limit:-200}" scaling python3 -m torch.distributed.run --standalone --nproc-per-node "$gpus" \
        -m benchmarks.scaling --budget $((${limit:-200} - 40)) ${SCALING:-} --out "$results/scaling.json" ;;
      faults) say "${limit:-200}" faults python3 -m benchmarks.faults --device cuda --out "$results/faults.json" ;;
      cache) cache_table "${limit:-400}" ;;
      train) say "${limit:-425}" train python3 -m training --start chitu_diffusion/assets/wan-tiny --run runs/more \
        --stages dit --minutes 5.2 ;;
      *) echo "unknown word $word" ;;
    esac
  done
}
gpus=$(nvidia-smi -L | wc -l)
if [[ $1 == scaling* || $1 == faults* ]]; then
  lane "$(seq -s, 0 $((gpus - 1)))" $1 &
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
