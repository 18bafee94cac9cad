#!/usr/bin/env bash
# Everything that only a machine with an NVIDIA GPU can tell, in one call of less than eight minutes: does the native
# code build ahead of time and at first use with the torch that is there, is it right, is it clean under the
# sanitizer, and how fast is it. Needs torch, nvcc and a C++ compiler; nothing is fetched.
#
#     benchmarks/gpu_check.sh [FOLDER]      results go to FOLDER, by default benchmarks/baselines
#
# PYTHON chooses the interpreter, KECORE_GPU_SECONDS the time there is, KECORE_COMMIT names the commit where git cannot,
# KECORE_GPU_ARGUMENTS goes to gpu_check.py ("--small --device cpu" tries this script itself). A step that fails, or finds
# no time left, is named, and the others still run; the exit status is 1 if one failed. The editing phase needs kecore's
# dependencies, the others torch, numpy and filelock; the tests pytest and pytest-benchmark.
set -uo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
out=${1:-$root/benchmarks/baselines}
python=${PYTHON:-python3}
limit=${KECORE_GPU_SECONDS:-470}
read -ra arguments <<<"${KECORE_GPU_ARGUMENTS:-}"
mkdir -p "$out"
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

gpu=$(nvidia-smi --query-gpu=name --format=csv,noheader | head -n 1 | tr ' ' '-')
if [[ -z $gpu ]]; then
    echo "no NVIDIA GPU: nvidia-smi names none" >&2
    exit 2
fi
results=$out/${gpu,,}.json
log=$out/${gpu,,}.log
rm -f "$results" "$log"
summary=()
failed=0

# step NAME SECONDS COMMAND...: runs it within its time and what is left of the whole.
step() {
    local name=$1 most=$2 left=$((limit - SECONDS)) begin=$SECONDS status=0
    shift 2
    if ((left < 5)); then
        summary+=("$name: skipped, out of time")
        return 1
    fi
    echo "### $name" >>"$log"
    timeout --kill-after=5 "$((most < left ? most : left))" "$@" >>"$log" 2>&1 || status=$?
    if ((status == 0)); then
        summary+=("$name: passed, $((SECONDS - begin)) s")
    else
        summary+=("$name: FAILED with status $status after $((SECONDS - begin)) s")
        failed=1
    fi
    return "$status"
}

phase() { # STEP SECONDS PHASE FILE [COMMAND...]: a phase of gpu_check.py, run by COMMAND
    step "$1" "$2" "${@:5}" "$python" "$root/benchmarks/gpu_check.py" "$3" --out "$4" "${arguments[@]}"
}

# --- ahead of time, into a folder of its own; then at first use from the sources --------------------------------------
export TORCH_EXTENSIONS_DIR=$work/jit
step "build ahead of time" 150 env KECORE_BUILD_NATIVE=1 "$python" -m pip install --quiet --no-build-isolation \
    --no-deps --no-index --target "$work/aot" "$root"
check() { # KIND PATH: is the library of that kind right?
    export KECORE_NATIVE=$1 PYTHONPATH=$2
    phase "$1: loads" 150 environment "$work/$1.json" && phase "$1: is right" 60 check "$work/$1.json"
}
check jit "$root:$root/plugins"
# What was compiled ahead is what users run, so that is what is timed, unless it does not work.
check aot "$work/aot" || export KECORE_NATIVE=jit PYTHONPATH=$root:$root/plugins

# --- compute-sanitizer: exact allocations, or it would not see the end of a tensor ----------------------------------
for tool in memcheck racecheck; do
    phase "$tool" 60 sanitize "$work/$tool.json" \
        env PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool "$tool" --error-exitcode 9
done

# --- figures ----------------------------------------------------------------------------------------------------------
figures() { # NAME SECONDS
    phase "$1" "$2" "$1" "$results"
}
figures environment 30
figures check 60
figures ceilings 30
figures moment 90
figures many_layers 20
figures solve 90
figures batched_solve 30
figures truncation 60
step "tests" 90 "$python" -m pytest "$root/tests" -m gpu -q -p no:cacheprovider \
    -c "$root/pyproject.toml" --rootdir "$root"
figures editing 150

echo "log: $log"
grep -A30 -E "Error|error:|ERROR SUMMARY" "$log" | tail -n 40
"$python" "$root/benchmarks/gpu_check.py" table --out "$results"
printf '\n== steps\n'
printf '%s\n' "${summary[@]}" "results: $results"
exit "$failed"
