#!/usr/bin/env bash
# `wan-tiny` on two GPUs, in two halves that go on from the weights that ship; results go to $OUT as they come.
#   OUT=results bash training/two_gpus.sh first 9     GPU 0: the VAE.            GPU 1: the DiT at every size.
#   OUT=results bash training/two_gpus.sh second 8    GPU 0: the VAE's decoder.  GPU 1: the DiT on the latents of the encoder,
#                                                     which stays as the first half left it.
set -u
export PYTHONUNBUFFERED=1
half=$1 minutes=$2
vae=runs/vae dit=runs/dit
mkdir -p "$OUT"
train() { python3 -m training --out runs/export "$@"; }

if [ "$half" = first ]; then
  start=chitu_diffusion/assets/wan-tiny
  CUDA_VISIBLE_DEVICES=0 train --start $start --run $vae --stages vae --minutes "$minutes" >"$OUT/vae-$half.log" 2>&1 &
  mkdir -p $dit && cp chitu_diffusion/assets/judge/judge.safetensors $dit/
  CUDA_VISIBLE_DEVICES=1 train --start $start --run $dit --stages dit --minutes "$(python3 -c "print($minutes - 1)")" >"$OUT/dit-$half.log" 2>&1 &
else
  cp $vae/vae.safetensors $dit/
  rm -f $dit/dit.pt
  CUDA_VISIBLE_DEVICES=0 train --run $vae --stages decoder --minutes "$minutes" >"$OUT/vae-$half.log" 2>&1 &
  CUDA_VISIBLE_DEVICES=1 train --run $dit --stages dit --minutes "$(python3 -c "print($minutes - 0.6)")" >"$OUT/dit-$half.log" 2>&1 &
fi

copy() {
  for file in $vae/vae.safetensors $dit/average-{0,1,2}.safetensors $dit/statistics.pt; do
    [ "$file" -nt "$OUT/$(basename $file)" ] && cp "$file" "$OUT/"
  done
}
while [ -n "$(jobs -rp)" ]; do
  sleep 5
  copy
done
copy
tail -n 45 "$OUT/vae-$half.log" "$OUT/dit-$half.log"
