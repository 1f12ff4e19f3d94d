#!/usr/bin/env bash
# All measurements of one accelerator, each part at most so many seconds (quantized programs compile
# for minutes there) and free to fail; run from the root as `benchmarks/device.sh OUT`, logs go to
# the folder OUT, the table is printed last.
# SMALL=1 rehearses everything on a CPU with models of one layer.
set -u
out=${1:?usage: benchmarks/device.sh OUT}
mkdir -p "$out"
python=${PYTHON:-python3}
parts=${PARTS:-check bert opt vit torch int8 int8_128}
size=() small=() rounds=()
if [ -n "${SMALL:-}" ]; then
  size=(--size=512 --layers=1) small=(--layers=1 --batch_size=2 --steps=1 --rounds=1)
  rounds=(--layers=1 --rounds=1)
fi

part() { # NAME SECONDS COMMAND...
  local name=$1 seconds=$2
  shift 2
  case " $parts " in *" $name "*) ;; *) return ;; esac
  local began=$SECONDS
  timeout -k 5 "$seconds" "$@" > "$out/$name.log" 2>&1
  echo "$name: status $? after $((SECONDS - began)) s" >> "$out/parts.log"
}

part check 300 "$python" -m benchmarks.device_check "${size[@]}"
for family in bert opt vit; do
  part $family 120 "$python" -m benchmarks.train_step --family=$family "${small[@]}"
done
part torch 100 "$python" -m benchmarks.torch_step --family=bert "${small[@]}"
part torch_opt 100 "$python" -m benchmarks.torch_step --family=opt "${small[@]}"
part torch_vit 100 "$python" -m benchmarks.torch_step --family=vit "${small[@]}"
part int8 240 "$python" -m benchmarks.int8 --batch_size=32 "${rounds[@]}"
part int8_128 240 "$python" -m benchmarks.int8 --batch_size=128 "${rounds[@]}"

cat "$out/parts.log"
for name in $parts; do
  grep -E "^(product|a float32|logits|bert|opt|vit|vanilla|clipped|gated|all pos|PyTorch|f32|bf16|simulated|int8|largest|.*jax )" \
    "$out/$name.log" || tail -n 3 "$out/$name.log"
done
