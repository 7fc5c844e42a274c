# What to measure on a GPU, in this order, with a limit for each: bash benchmarks/on_gpu.sh FOLDER
# Logs and JSON files go into FOLDER. It needs torch for the rivals, and about 25 minutes.
out=${1:?give a folder for the results}
mkdir -p "$out"
export JAX_COMPILATION_CACHE_DIR=$out/compiled XLA_PYTHON_CLIENT_MEM_FRACTION=0.6
python=${PYTHON:-python3}

part() {  # NAME SECONDS, what Python runs
    name=$1 limit=$2
    shift 2
    started=$(date +%s)
    timeout -k 5 "$limit" "$python" -u "$@" > "$out/$name.log" 2>&1
    echo "$name: exit status $?, $(($(date +%s) - started)) s"
    tail -n 12 "$out/$name.log"
}

run="--data.path ${DATA:-task:arithmetic} --data.prompt-format text --estimator.name value_filter
     --estimator.table-samples 0 --train.microbatch-rollouts auto --train.sample-rollouts auto"
steps="--train.prompts-per-step 64 --train.minibatch-rollouts 64 --train.steps 3"
small=Qwen/Qwen3-0.6B

JAX_PLATFORMS=cuda part tests 120 -m pytest -q -W default -m gpu tests
part quickstart 120 -m benchmarks.bench_run --config quickstart --estimator.name value_filter \
    --estimator.table-samples 0 $steps
part model 60 -m benchmarks.random_model $small "$out/model"
for layers in scanned unrolled; do  # which of the two should GPUs have?
    part "run_$layers" 300 -m benchmarks.bench_run --config configs/qwen_math.py \
        --model.path "$out/model" --model.decode-layers $layers $run $steps \
        --sampling.max-new-tokens 256 --mesh.fsdp 1 --out "$out/run_$layers.json"
done
part update 200 -m benchmarks.bench_update --model $small --dtype bfloat16 --attention cudnn \
    --remat full --rows 8 --width 2048 --microbatch 2 --repeats 3 --out "$out/update.json"
part sampling 400 -m benchmarks.bench_sampling --model $small --dtype bfloat16 --equal 64 --rows 0 \
    --prompt 256 --new 256 --repeats 2 --scanned --out "$out/sampling.json"
part lora_model 120 -m benchmarks.random_model Qwen/Qwen3-4B "$out/lora_model"
part lora 400 -m benchmarks.bench_run --config configs/qwen_math_1gpu.py \
    --model.path "$out/lora_model" --model.lora-rank 16 $run $steps \
    --sampling.max-new-tokens 512 --out "$out/lora.json"
for shape in "Qwen/Qwen3-1.7B" "Qwen/Qwen3-4B --model.lora-rank 16"; do  # formulas beside XLA
    part "plan_$(echo "$shape" | tr -c 'A-Za-z0-9\n' _)" 200 scripts/train.py --dry-run --compile \
        --config configs/qwen_math_1gpu.py --model.path $shape
done
