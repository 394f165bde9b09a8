#!/usr/bin/env bash
# Builds fastbn for the GPU at hand, tests it, runs it under compute-sanitizer and measures it.
#
#   benchmarks/gpu_report.sh OUT_DIR
#
# Takes nine minutes at most and downloads nothing. A step that fails or takes too long does not
# keep the later ones from running; the exit status is 1 if there was one. OUT_DIR gets
#
#   summary.txt      one line or more for each step; read this first
#   environment.txt  GPU, driver, compiler, versions
#   build.txt        the build, in place in the source tree, with what the assembler says
#   tests_gpu.txt    the tests of what only a GPU shows
#   tests.txt        the tests of all devices, on the GPU
#   sanitizer.txt    memcheck, racecheck, synccheck and initcheck
#   benchmark.txt    kernels against stock's, as tables
#   rows.json        every number of benchmark.txt
#   algorithms.txt   fastbn's algorithms side by side, with the times that the planner predicted
#   algorithms.json  every number of algorithms.txt
#
# PYTHON is the interpreter to use (default: python3): one with torch for CUDA, ninja, pybind11 and
# fastbn's extras [test] and [bench]; with pytest-xdist tests run side by side. FASTBN_COMMIT names
# the commit where the sources have no history.
set -euo pipefail

if [ $# -ne 1 ]; then
  echo "usage: $0 OUT_DIR" >&2
  exit 2
fi
out=$(mkdir -p "$1" && cd "$1" && pwd)
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
python=$(command -v "${PYTHON:-python3}") || {
  echo "$0: there is no ${PYTHON:-python3}; PYTHON names the interpreter" >&2
  exit 2
}
python=$(cd "$(dirname "$python")" && pwd)/$(basename "$python")
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT

cuda=${CUDA_HOME:-/usr/local/cuda}
export root python scratch
PATH=$(dirname "$python"):$PATH:$cuda/bin
export PYTHONPATH="$root" PYTHONUNBUFFERED=1 TQDM_DISABLE=1
export FASTBN_COMMIT="${FASTBN_COMMIT:-$(
  git -C "$root" describe --always --dirty --abbrev=40 '--exclude=*' 2>/dev/null || true
)}"
# What the caller has forced must not decide what is reported.
unset FASTBN_CUDA_ALGORITHM TORCH_CUDA_ARCH_LIST CUDA_LAUNCH_BLOCKING

# Seconds for each step; what one leaves over the next may use.
readonly environment=15 build=130 tests_gpu=60 tests=80 sanitizer=75 benchmark=120 algorithms=50
planned=$((environment + build + tests_gpu + tests + sanitizer + benchmark + algorithms))
deadline=$((SECONDS + planned))
failed=0
: >"$out/summary.txt"

say() { printf '%s\n' "$*" | tee -a "$out/summary.txt"; }

# Lines of a file that say most, indented.
quote() { grep -E "$1" "$2" | sed 's/^/    /' | tail -n "$3" | tee -a "$out/summary.txt" || true; }

# step NAME COMMAND...: runs it with its output in NAME.txt, and says what came of it.
step() {
  local name=$1 start=$SECONDS status=0 limit verdict
  shift
  limit=$((deadline - SECONDS - planned + ${!name}))
  planned=$((planned - ${!name}))
  timeout --kill-after=5 "$limit" "$@" >"$out/$name.txt" 2>&1 || status=$?
  case $status in
    0) verdict=ok ;;
    124 | 137) verdict="FAILED: took more than $limit s" ;;
    *) verdict="FAILED with status $status" ;;
  esac
  say "$(printf '%-12s %4d s  %s' "$name" "$((SECONDS - start))" "$verdict")"
  if [ "$status" -ne 0 ]; then
    failed=1
    quote . "$out/$name.txt" 2
  fi
}

# Prints all it can; fails if a part is missing.
describe_environment() {
  local missing=0
  date --utc '+%F %R UTC'
  echo "commit ${FASTBN_COMMIT:-unknown}"
  uname -srm
  echo "$(nproc) processors, $(free -g | awk '/^Mem:/ { print $2 }') GiB of memory"
  nvidia-smi || missing=1
  nvidia-smi --query-gpu=name,driver_version,memory.total,clocks.max.sm,clocks.max.mem \
    --format=csv || missing=1
  nvcc --version || missing=1
  "$python" --version
  "$python" - <<'EOF' || missing=1
import torch

cudnn = torch.backends.cudnn.version()
print("torch", torch.__version__, "CUDA", torch.version.cuda, "cuDNN", cudnn)
gpu = torch.cuda.get_device_properties(0)
print(gpu.name, f"compute capability {gpu.major}.{gpu.minor}", gpu.multi_processor_count, "SMs")
print(gpu.L2_cache_size, "bytes of L2 cache,", gpu.total_memory, "bytes of memory")
EOF
  return "$missing"
}

build_in_place() {
  cd "$root"
  export FASTBN_CUDA=1 MAX_JOBS="${MAX_JOBS:-$(nproc)}" NVCC_APPEND_FLAGS=-Xptxas=-v
  # Objects of an earlier build are of no use: what the assembler said of them is gone.
  "$python" setup.py build_ext --inplace --build-temp "$scratch/objects"
  "$python" -m fastbn
}

# Counts the kernels that ptxas lists in a log, and names those that spill registers.
list_spills() {
  awk '/Function properties for/ { name = $NF }
       /spill stores/ {
         kernels++
         if ($0 !~ / 0 bytes spill stores, 0 bytes spill loads/) {
           spilling++
           sub(/^ +/, "")
           print "    " name ": " $0
         }
       }
       END { printf "    %d kernels, %d of them spill\n", kernels, spilling }' "$1" |
    tail -n 21 | "$(command -v c++filt || echo cat)" | tee -a "$out/summary.txt"
}

run_tests() {
  cd "$root/tests"
  rm -f "$scratch/failures"
  local side_by_side=() cores
  cores=$(nproc)
  if "$python" -c 'import xdist' 2>/dev/null; then
    side_by_side=(-n "$((cores < 24 ? (cores + 1) / 2 : 12))")
  fi
  export FASTBN_REQUIRE_CUDA=1 OMP_NUM_THREADS=2 COLUMNS=180
  export FASTBN_FAILURES_TO="$scratch/failures"
  "$python" -m pytest -q -m cuda --tb=short --show-capture=no --durations=10 --maxfail=60 \
    -p no:cacheprovider --continue-on-collection-errors "${side_by_side[@]}" "$@"
}

# Runs all tools at once: they wait for the host more than for the GPU.
run_sanitizer() {
  cd "$root"
  local tool tools=(memcheck racecheck synccheck initcheck) pids=() failed=0 i
  export PYTORCH_NO_CUDA_MEMORY_CACHING=1 OMP_NUM_THREADS=1
  for tool in "${tools[@]}"; do
    compute-sanitizer --tool "$tool" --error-exitcode 1 --target-processes all --print-limit 20 \
      "$python" -m tests.support.sanitizer_selection >"$scratch/$tool" 2>&1 &
    pids+=("$!")
  done
  for i in "${!tools[@]}"; do
    if wait "${pids[i]}"; then echo "${tools[i]}: ok"; else echo "${tools[i]}: FAILED"; failed=1; fi
  done
  return "$failed"
}

run_benchmark() {
  cd "$root"
  "$python" -m benchmarks kernels --device cuda --shapes resnet50 --dtypes bfloat16 \
    --providers fastbn stock --seconds 0.05 --json "$1"
}

run_algorithms() {
  cd "$root"
  "$python" -m benchmarks.algorithms --quick --json "$1"
}

export -f describe_environment build_in_place run_tests run_sanitizer run_benchmark run_algorithms
# Functions cannot be given to timeout; a shell with the same options can.
in_shell=(bash -euo pipefail -c '"$@"' in_shell)

say "fastbn ${FASTBN_COMMIT:-of an unknown commit}, $(date --utc '+%F %R UTC')"

step environment "${in_shell[@]}" describe_environment
quote 'compute capability|^torch |release |^NVIDIA .*MiB' "$out/environment.txt" 4

step build "${in_shell[@]}" build_in_place
list_spills "$out/build.txt"
quote ' (ok|WRONG)$|[Ee]rror' "$out/build.txt" 10

# Quotes how tests ended or, where they were cut short, the failures until then.
conclude_tests() {
  local outcome='^[0-9]+ (passed|failed|error|skipped)'
  if ! grep -qE "$outcome" "$1" && [ -e "$scratch/failures" ]; then
    cat "$scratch/failures" >>"$1"
  fi
  quote "^(FAILED|ERROR) |$outcome" "$1" 21
}

only_gpu=(gpu/test_cuda.py gpu/test_cuda_algorithms.py gpu/test_cuda_graphs.py)
step tests_gpu "${in_shell[@]}" run_tests "${only_gpu[@]}"
conclude_tests "$out/tests_gpu.txt"

step tests "${in_shell[@]}" run_tests "${only_gpu[@]/#/--ignore=}" \
  '--ignore-glob=*/test_cudasim*' --ignore=gpu/test_nvcc.py
conclude_tests "$out/tests.txt"

step sanitizer "${in_shell[@]}" run_sanitizer
for tool in memcheck racecheck synccheck initcheck; do
  if [ -e "$scratch/$tool" ]; then
    printf '\n--- %s\n' "$tool" >>"$out/sanitizer.txt"
    head -c 500000 "$scratch/$tool" >>"$out/sanitizer.txt"
  fi
done
quote '^(mem|race|sync|init)check: |SUMMARY|inputs, all' "$out/sanitizer.txt" 12

step benchmark "${in_shell[@]}" run_benchmark "$out/rows.json"
quote '^(pass|forward|backward|eval) +[a-z+]+ +[a-z]+[0-9]* +(layout|contiguous|channels_last) |not timed' \
  "$out/benchmark.txt" 40

step algorithms "${in_shell[@]}" run_algorithms "$out/algorithms.json"
quote '^The planner chose' "$out/algorithms.txt" 1

if [ "$failed" -eq 0 ]; then verdict="all steps ok"; else verdict="SOME STEPS FAILED"; fi
say "$verdict, $SECONDS s; see $out"
exit "$failed"
