#!/usr/bin/env bash
# All measurements of one accelerator, each part at most so many seconds (quantized programs compile
# for minutes there) and free to fail; run from the root as `benchmarks/device.sh OUT`, logs go to
# the folder OUT, the table is printed last.
# SMALL=1 rehearses everything on a CPU with models of one layer.
set -u
out=${1:?usage: benchmarks/device.sh OUT}
mkdir -p "$out"
python=${PYTHON:-python3}
parts=${PARTS:-kernels attention bert_gpu bert bert_blockwise opt_gpu opt vit torch check int8}
size=() small=() rounds=() few=()
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

# What decides whether kernels are taken by default: are they right, how fast are they alone, and
# what is left of it in a step.
lengths=(--lengths=128,512,4096 --batch_tokens=32768 --heads=12)
[ -n "${SMALL:-}" ] && lengths=(--lengths=128,256 --batch_tokens=512 --heads=2 --rounds=1)
part kernels 240 "$python" -m benchmarks.attention_check --paths=gpu,blockwise --seconds=60
part attention 150 "$python" -m benchmarks.attention "${lengths[@]}" --dtype=bfloat16
part attention_causal 100 "$python" -m benchmarks.attention "${lengths[@]}" --dtype=bfloat16 --causal
for kernel in gpu blockwise; do
  for family in bert opt vit; do
    part ${family}_$kernel 120 "$python" -m benchmarks.train_step --family=$family \
      --kernel=$kernel "${small[@]}"
  done
done
part check 300 "$python" -m benchmarks.device_check "${size[@]}"
for family in bert opt vit; do
  part $family 120 "$python" -m benchmarks.train_step --family=$family "${small[@]}"
done
part torch 100 "$python" -m benchmarks.torch_step --family=bert "${small[@]}"
part torch_opt 100 "$python" -m benchmarks.torch_step --family=opt "${small[@]}"
part torch_vit 100 "$python" -m benchmarks.torch_step --family=vit "${small[@]}"
# Methods at the size where INT8 feels outliers: needs WIKI=FOLDER with train and validation.
[ -n "${SMALL:-}" ] && few=(--calibration_seeds=1 --quant=w8a8 --config.train.steps=4
  --config.model.num_layers=1 --config.eval.batches=1)
part results 420 env XLA_FLAGS=--xla_gpu_autotune_level=0 "$python" -m benchmarks.results \
  --family=bert_wiki --methods="${METHODS:-vanilla,gated_mlp}" --quant=w8a8,w6a6 --jobs="${JOBS:-1}" \
  --config.data.files="${WIKI:-.device/wiki}/train*.jsonl.xz" --out="$out" --workdirs="${TMPDIR:-/tmp}/results" \
  --config.data.validation_files="${WIKI:-.device/wiki}/validation*.jsonl.xz" "${few[@]}"
part int8 240 "$python" -m benchmarks.int8 --batch_size=32 "${rounds[@]}"
part int8_128 240 "$python" -m benchmarks.int8 --batch_size=128 "${rounds[@]}"

cat "$out/parts.log"
for name in $parts; do
  grep -E "^(one tile|plain|four|BERT,|OPT,|ViT|segments|more|wide|few|long|product|a float32|logits|bert|opt|vit|vanilla|clipped|gated|all pos|jax.nn|PyTorch|f32|bf16|simulated|int8|largest|.*jax )" \
    "$out/$name.log" || tail -n 3 "$out/$name.log"
done
