#!/usr/bin/env bash
# Tries fastbn on the GPU at hand, in three calls, each of which can be read before the next.
#
#   benchmarks/gpu_report.sh smoke OUT_DIR     builds, tries each algorithm in a process of its own, and
#                                              measures: algorithms, counters, pieces, kernels
#   benchmarks/gpu_report.sh verify OUT_DIR    tests, memcheck and synccheck
#   benchmarks/gpu_report.sh measure OUT_DIR   algorithms on more layers, kernels of all dtypes,
#                                              racecheck and initcheck
#
# Each takes nine minutes at most and downloads nothing. A step that fails or takes too long does not
# keep the later ones from running; the exit status is 1 if there was one. OUT_DIR gets two files, which
# are complete up to the last step when a call is cut short:
#
#   smoke.txt      one line or more for each step; read this first
#   smoke.tar.gz   what each step printed, and rows and figures as JSON
#
# and verify or measure likewise.
#
# Where a persistent algorithm hangs or is wrong in `smoke`, the rest of that call does without:
# FASTBN_CUDA_ALGORITHM=two_pass. Set it for the later calls, which then launch no persistent
# kernels.
#
# A module that was built elsewhere (make carry), or by an earlier call, is used if it loads and is for
# this commit and GPU; otherwise one is built. PYTHON is the interpreter to use (default: python3): one
# with torch for CUDA, ninja, pybind11 and fastbn's extras [test] and [bench]; with pytest-xdist tests
# run side by side.
# FASTBN_COMMIT names the commit where the sources have no history. CASE_SECONDS is what a case of
# `smoke` may take (default: 25), and SMOKE_OPTIONS=--simulated tries the cases without a GPU.
set -euo pipefail

usage() {
  echo "usage: $0 smoke|verify|measure OUT_DIR" >&2
  exit 2
}
[ $# -eq 2 ] || usage
call=$1
# Seconds for each step of a call; what one leaves over the next may use. The first is long enough
# for a cold import of torch.
case $call in
  smoke) steps=(environment=60 build=120 smoke=140 algorithms=60 counters=80 pieces=20 kernels=60) ;;
  verify) steps=(environment=60 build=130 tests_gpu=90 tests=120 sanitizer=130) ;;
  measure) steps=(environment=60 build=130 algorithms=100 kernels=120 sanitizer=120) ;;
  *) usage ;;
esac
out=$(mkdir -p "$2" && cd "$2" && pwd)
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
python=$(command -v "${PYTHON:-python3}") || {
  echo "$0: there is no ${PYTHON:-python3}; PYTHON names the interpreter" >&2
  exit 2
}
python=$(cd "$(dirname "$python")" && pwd)/$(basename "$python")
scratch=$(mktemp -d)
report=$scratch/$call
summary=$out/$call.txt
mkdir "$report"

# One archive of what steps have left so far: nobody knows which of them will be the last.
pack() {
  tar -czf "$scratch/archive" -C "$scratch" "$call" || true # of a file that grows, say
  mv "$scratch/archive" "$out/$call.tar.gz"
}

running=
finish() {
  [ -z "$running" ] || kill "$running" || true # timeout, which stops all of its step
  pack
  rm -rf "$scratch"
}
trap finish EXIT
trap 'exit 130' INT
trap 'exit 143' TERM

cuda=$(cd "$root" && "$python" -c 'from tests.support import cuda_toolkit as c; print(c.find() or "")') ||
  cuda=""
export root python scratch report
export CUDA_HOME="${CUDA_HOME:-${cuda:-/usr/local/cuda}}"
PATH=$(dirname "$python"):$PATH:$CUDA_HOME/bin
export PYTHONPATH="$root" PYTHONUNBUFFERED=1 TQDM_DISABLE=1 CASE_SECONDS="${CASE_SECONDS:-25}"
export FASTBN_COMMIT="${FASTBN_COMMIT:-$(
  git -C "$root" describe --always --dirty --abbrev=40 '--exclude=*' 2>/dev/null || true
)}"
# What the caller has forced must not decide what the first call finds.
[ "$call" != smoke ] || unset FASTBN_CUDA_ALGORITHM
unset TORCH_CUDA_ARCH_LIST CUDA_LAUNCH_BLOCKING

planned=0
for step in "${steps[@]}"; do
  declare "${step%%=*}_seconds=${step##*=}"
  planned=$((planned + ${step##*=}))
done
deadline=$((SECONDS + planned))
failed=0
: >"$summary"

say() { printf '%s\n' "$*" | tee -a "$summary"; }

# Lines of a step's output that say most, indented.
quote() {
  grep -E "$2" "$report/$1.txt" | sed 's/^/    /' | tail -n "$3" | tee -a "$summary" || true
}

# step NAME COMMAND...: runs it with its output in NAME.txt, and says what came of it.
step() {
  local name=$1 start=$SECONDS status=0 limit seconds verdict
  shift
  seconds=${name}_seconds
  limit=$((deadline - SECONDS - planned + ${!seconds}))
  planned=$((planned - ${!seconds}))
  # Functions cannot be given to timeout; a shell with the same options can.
  timeout --kill-after=5 "$limit" bash -euo pipefail -c '"$@"' step "$@" \
    >"$report/$name.txt" 2>&1 &
  running=$!
  wait "$running" || status=$?
  running=
  case $status in
    0) verdict=ok ;;
    124 | 137) verdict="FAILED: took more than $limit s" ;;
    *) verdict="FAILED with status $status" ;;
  esac
  say "$(printf '%-12s %4d s  %s' "$name" "$((SECONDS - start))" "$verdict")"
  if [ "$status" -ne 0 ]; then
    failed=1
    quote "$name" . 2
  fi
  pack
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

# Takes the carried module, or that of an earlier call, or builds one.
provide_module() {
  cd "$root"
  if [ -d carry ]; then cp carry/* fastbn/; fi
  if is_right_module; then
    echo "module is there: ok"
  else
    export FASTBN_CUDA=1 MAX_JOBS="${MAX_JOBS:-$(nproc)}" NVCC_APPEND_FLAGS=-Xptxas=-v
    # Objects of an earlier build are of no use: what the assembler said of them is gone.
    "$python" setup.py build_ext --inplace --build-temp "$scratch/objects"
  fi
  timeout 60 "$python" -m fastbn
}

is_right_module() {
  "$python" - <<'EOF'
import os

import fastbn
import torch

build = fastbn.build_info()
gpu = "{}.{}".format(*torch.cuda.get_device_capability())
has = (build["architectures"] or "no GPU").replace("+PTX", "")
assert build["commit"] == os.environ["FASTBN_COMMIT"] != "", f"module of commit {build['commit']}"
assert gpu in has.split(";"), f"module for {has}, and the GPU is {gpu}"
EOF
}

# Counts the kernels that ptxas lists in a log, if it ran, and names those that spill registers.
list_spills() {
  grep -q 'Function properties for' "$1" || return 0
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
    tail -n 21 | "$(command -v c++filt || echo cat)" | tee -a "$summary"
}

# Each algorithm by itself, in processes that are stopped when they take too long.
run_smoke() {
  cd "$root"
  local algorithm op layout
  for algorithm in two_pass one_block persistent_block persistent_cluster persistent_grid; do
    for op in forward backward; do
      for layout in contiguous channels_last; do
        try_case "$algorithm" "$op" "$layout" &
      done
    done
    wait
    # At once, for the step may not come to its end.
    cat "$scratch/case.$algorithm."*
  done
  ! grep -qE 'HANGS|WRONG' "$scratch"/case.*
}

# Whether all cases of persistent algorithms were tried, and none failed.
persistent_algorithms_work() {
  [ "$(grep -cE '^persistent.*: (max error|does not fit)' "$report/smoke.txt")" -eq 12 ]
}

# try_case ALGORITHM PASS LAYOUT: says in a line what came of it.
try_case() {
  local status=0 said=$scratch/said.$1.$2.$3 verdict
  # In the foreground: in the group of processes that is stopped with the step.
  timeout --foreground --kill-after=2 "$CASE_SECONDS" \
    "$python" -m tests.support.smoke "$@" ${SMOKE_OPTIONS:-} >"$said" 2>&1 || status=$?
  case $status in
    0) verdict=$(tail -n 1 "$said") ;;
    124 | 137) verdict="HANGS, or takes more than $CASE_SECONDS s" ;;
    *) verdict="WRONG, $(grep '^max error' "$said" || true) $(tail -n 1 "$said")" ;;
  esac
  echo "$*: $verdict" >"$scratch/case.$1.$2.$3"
}

run_tests() {
  cd "$root/tests"
  rm -f "$scratch/failures"
  local options=() cores
  cores=$(nproc)
  # Tests that need tens of gigabytes are one group, which one worker runs one after another.
  if "$python" -c 'import xdist' 2>/dev/null; then
    options+=(-n "$((cores < 24 ? (cores + 1) / 2 : 12))" --dist loadgroup)
  fi
  if "$python" -c 'import pytest_timeout' 2>/dev/null; then
    options+=(--timeout=60 --timeout-method=thread)
  fi
  export FASTBN_REQUIRE_CUDA=1 OMP_NUM_THREADS=2 COLUMNS=180
  export FASTBN_FAILURES_TO="$scratch/failures"
  "$python" -m pytest -q -m cuda --tb=short --show-capture=no --durations=10 --maxfail=60 \
    -p no:cacheprovider --continue-on-collection-errors "${options[@]}" "$@"
}

# Runs the tools at once: they wait for the host more than for the GPU.
run_sanitizer() {
  cd "$root"
  local tool pids=() failed=0
  export PYTORCH_NO_CUDA_MEMORY_CACHING=1 OMP_NUM_THREADS=1
  for tool in "$@"; do
    compute-sanitizer --tool "$tool" --error-exitcode 1 --target-processes all --print-limit 20 \
      "$python" -m tests.support.sanitizer_selection >"$report/$tool.txt" 2>&1 &
    pids+=("$!")
  done
  for tool in "$@"; do
    if wait "${pids[0]}"; then echo "$tool: ok"; else echo "$tool: FAILED"; failed=1; fi
    pids=("${pids[@]:1}")
  done
  return "$failed"
}

# What kernels of some algorithms wait for, by the profiler's counters.
run_counters() {
  cd "$root"
  local algorithm layout failed=0
  for layout in contiguous channels_last; do
    for algorithm in "$@"; do
      timeout --kill-after=2 30 ncu --clock-control none \
        --kernel-name 'regex:persistent|two_pass' --launch-count 2 \
        --section SpeedOfLight --section WarpStateStats --section SchedulerStats \
        --section MemoryWorkloadAnalysis \
        "$python" -m tests.support.smoke "$algorithm" forward "$layout" || failed=1
    done
  done
  return "$failed"
}

run_algorithms() {
  cd "$root"
  "$python" -m benchmarks.algorithms "$@"
}

run_pieces() {
  cd "$root"
  "$python" -m benchmarks.pieces --json "$report/pieces.json"
}

# One dtype after another: rows of one are written before the next begins.
run_kernels() {
  cd "$root"
  local dtype failed=0
  for dtype in "$@"; do
    "$python" -m benchmarks kernels --device cuda --shapes resnet50 --providers fastbn stock \
      --seconds 0.05 --json "$report/rows-$dtype.json" --dtypes "$dtype" || failed=1
  done
  return "$failed"
}

export -f describe_environment provide_module is_right_module run_smoke try_case run_tests
export -f run_sanitizer run_counters run_algorithms run_pieces run_kernels

# Quotes how tests ended or, where they were cut short, the failures until then.
conclude_tests() {
  local outcome='^[0-9]+ (passed|failed|error|skipped)'
  if ! grep -qE "$outcome" "$report/$1.txt" && [ -e "$scratch/failures" ]; then
    cat "$scratch/failures" >>"$report/$1.txt"
  fi
  quote "$1" "^(FAILED|ERROR) |$outcome" 21
}

sanitize() {
  local tool
  step sanitizer run_sanitizer "$@"
  quote sanitizer . 2
  for tool in "$@"; do quote "$tool" 'SUMMARY|inputs, all' 4; done
}

# Where one is forced, there is nothing to compare.
compare_algorithms() {
  [ -z "${FASTBN_CUDA_ALGORITHM:-}" ] || return 0
  step algorithms run_algorithms --json "$report/algorithms.json" "$@"
  quote algorithms '^The planner chose' 1
}

time_kernels() {
  step kernels run_kernels "$@"
  quote kernels '^(pass|forward|backward|eval) +[a-z+]+ +[a-z]+[0-9]* +(layout|contiguous|channels_last) |not timed' 40
}

say "fastbn ${FASTBN_COMMIT:-of an unknown commit}, $call, $(date --utc '+%F %R UTC')"
step environment describe_environment
quote environment 'compute capability|^torch |release |^NVIDIA .*MiB' 4
step build provide_module
list_spills "$report/build.txt"
quote build ' (ok|WRONG)$|[Ee]rror' 10

case $call in
  smoke)
    step smoke run_smoke
    quote smoke . 20
    profiled=(two_pass persistent_cluster persistent_grid)
    if ! persistent_algorithms_work; then
      export FASTBN_CUDA_ALGORITHM=two_pass
      profiled=(two_pass)
      say "PERSISTENT KERNELS FAIL: from here on, and for later calls, FASTBN_CUDA_ALGORITHM=two_pass"
    fi
    compare_algorithms --quick
    if command -v ncu >/dev/null; then
      step counters run_counters "${profiled[@]}"
      quote counters 'fastbn::| Duration |DRAM Throughput|No Eligible|Cycles Per Issued' 45
    else
      say "counters     left out, as there is no ncu"
    fi
    step pieces run_pieces
    quote pieces . 20
    time_kernels bfloat16
    ;;
  verify)
    only_gpu=(gpu/test_cuda.py gpu/test_cuda_algorithms.py gpu/test_cuda_graphs.py)
    # Some of those force each algorithm in turn.
    step tests_gpu run_tests "${only_gpu[@]}" ${FASTBN_CUDA_ALGORITHM:+-k "not persistent"}
    conclude_tests tests_gpu
    step tests run_tests "${only_gpu[@]/#/--ignore=}" '--ignore-glob=*/test_cudasim*' \
      --ignore=gpu/test_nvcc.py --ignore=gpu/test_launch.py
    conclude_tests tests
    sanitize memcheck synccheck
    ;;
  measure)
    compare_algorithms
    time_kernels bfloat16 float16 float32
    sanitize racecheck initcheck
    ;;
esac

if [ "$failed" -eq 0 ]; then verdict="all steps ok"; else verdict="SOME STEPS FAILED"; fi
say "$verdict, $SECONDS s; see $out"
exit "$failed"
