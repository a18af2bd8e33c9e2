#!/usr/bin/env bash
# Everything that a GPU is needed for, in one go.
set -u

usage() {
  cat <<'TEXT'
benchmarks/gpu/run.sh OUT [--quick] [--dry-run] [--minutes N] [--commit ID]

Runs on this machine's GPU and leaves in the folder OUT:
  log.txt            the machine, then every step's output
  steps.tsv          name, exit code and seconds of every step
  <date>-<gpu>.json  benchmarks with peers: rows and conditions
  profile.json       launches, host time, cost of iterations and tokens, what ncu and nsys say
  report.md, images/ a page with pictures of it; report.html: the same as one file
  summary.txt        one screen of it, also printed at the end

Steps: full tests, compute-sanitizer's memcheck and racecheck, benchmarks, profile, report. A step that fails or runs
out of time does not stop the others. The exit code is the number of steps that failed. Of the benchmarks those come
first that a goal is set for, then one size after another at constant work; the summary says of each goal whether it
was met, missed or not measured.

  --quick      tests of the Triton backend alone, no racecheck, what a goal is set for
  --dry-run    without a GPU: every step on tiny shapes in Triton's interpreter, to try the script itself
  --minutes N  for all of it (default 10; the last step starts early enough)
  --commit ID  what to put down as the commit, where the tree is no git checkout

The Python is $PYTHON, or python3. It needs torch, triton, pytest, pytest-benchmark, hypothesis, numpy, scipy and
matplotlib; otfuse itself need not be installed. POT, flash-sinkhorn, Liger-Kernel and pytest-xdist are used where they
are there.
TEXT
}

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
python=$(command -v "${PYTHON:-python3}")
[ -z "$python" ] || python=$(cd "$(dirname "$python")" && pwd)/$(basename "$python")
out="" quick="" dry="" minutes=10 commit=$(git -C "$root" describe --always --dirty=+changes 2>/dev/null)
while [ $# -gt 0 ]; do
  case $1 in
    -h | --help) usage; exit 0 ;;
    --quick) quick=1 ;;
    --dry-run) dry=1 ;;
    --minutes) minutes=$2; shift ;;
    --commit) commit=$2; shift ;;
    -*) echo "unknown option $1; see --help" >&2; exit 64 ;;
    *) out=$1 ;;
  esac
  shift
done
[ -n "$out" ] || { usage >&2; exit 64; }
[ -n "$python" ] || { echo "no ${PYTHON:-python3} here" >&2; exit 64; }
has_gpu=$(cd / && "$python" -c 'import torch; print(int(torch.cuda.is_available()))')
if [ -z "$dry" ] && [ "$has_gpu" != 1 ]; then
  echo "torch finds no CUDA device here; --dry-run tries this script in Triton's interpreter" >&2
  exit 2
fi

mkdir -p "$out"
out=$(cd "$out" && pwd)
log=$out/log.txt steps=$out/steps.tsv
: >"$log"
: >"$steps"
deadline=$((SECONDS + minutes * 60 - 10))
# Of this checkout, wherever tests start other processes, and ahead of what is installed.
export PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH} MPLBACKEND=Agg PYTHONUNBUFFERED=1
if [ -n "$dry" ]; then export TRITON_INTERPRET=1; else unset TRITON_INTERPRET; fi

left() { echo $((deadline - SECONDS)); }

# step NAME SECONDS COMMAND...: with its output in the log, no longer than SECONDS, nor than what is left. Interrupted
# rather than killed at first: pytest then says how far it got.
step() {
  local name=$1 seconds=$2 start=$SECONDS code
  shift 2
  [ "$seconds" -le "$(left)" ] || seconds=$(left)
  printf '\n##### %s (at most %s s): %s\n' "$name" "$seconds" "$*" >>"$log"
  if [ "$seconds" -lt 5 ]; then
    code=124
    echo "no time left" >>"$log"
  else
    timeout --signal=INT --kill-after=10 "$seconds" "$@" >>"$log" 2>&1 </dev/null
    code=$?
  fi
  printf '%s\t%s\t%s\n' "$name" "$code" $((SECONDS - start)) | tee -a "$steps"
  return $code
}

found() {
  command -v "$1" || ls -d /usr/local/cuda*/bin/"$1" /opt/nvidia/*/"$1" 2>/dev/null | tail -n 1
}

facts() {
  date -u
  uname -sr
  nproc
  nvidia-smi 2>&1
  "$python" -m otfuse info
  echo "commit ${commit:-unknown}"
}

run_tests() {
  local where=(tests) workers=()
  [ -z "$quick" ] || where=(tests -k triton)
  [ -z "$dry" ] || where=(tests/test_select.py)
  # Most of the time goes into compiling kernels, which several processes do at once.
  [ -n "$dry" ] || ! "$python" -c 'import xdist' 2>/dev/null || workers=(-n 6)
  step tests 200 "$python" -m pytest "${where[@]}" --device "$device" -q --durations=10 "${workers[@]}"
}

# sanitize TOOL SECONDS
sanitize() {
  local sanitizer
  sanitizer=$(found compute-sanitizer)
  if [ -n "$dry" ]; then
    step "$1" "$2" "$python" -m benchmarks.gpu.sanitize --device cpu
  elif [ -z "$sanitizer" ]; then
    echo "compute-sanitizer is not here: $1 did not run" | tee -a "$log" "$out/missing"
  else
    PYTORCH_NO_CUDA_MEMORY_CACHING=1 step "$1" "$2" "$sanitizer" --tool "$1" --target-processes application-only \
      --print-limit 20 --error-exitcode 99 "$python" -m benchmarks.gpu.sanitize --seconds $(($2 - 20))
  fi
}

run_benchmarks() {
  local seconds=$(($(left) - 75))
  local which=(benchmarks --seconds 0.4 --compile-seconds 40)
  [ -z "$quick" ] || which+=(--goals)
  [ -z "$dry" ] || which=(benchmarks --dry-run --seconds 0 -k "(test_attend or test_solve) and (bfloat16 or unroll)")
  step benchmarks "$seconds" "$python" -m pytest "${which[@]}" --device "$device" --benchmark-enable \
    --minutes $((seconds > 60 ? seconds / 60 : 1)) --out "$out" --commit "${commit:-unknown}" -q --durations=10
}

run_profile() {
  step profile $(($(left) - 15)) "$python" -m benchmarks.gpu.profile --out "$out" --device "$device" ${quick:+--quick}
}

report() {
  local results
  results=$(ls "$out"/*-*.json 2>/dev/null | tail -n 1)
  [ -n "$results" ] || { echo "no benchmark rows"; return 1; }
  "$python" -m benchmarks.report "$results" --summary --page "$out/report.md" --html "$out/report.html"
}

# The last lines of a step's output.
tail_of() {
  awk -v name="##### $1 (" 'index($0, "##### ") == 1 { inside = index($0, name) == 1; next } inside && NF' "$log" |
    cut -c1-150 | tail -n "$2"
}

summarise() {
  tail_of report 34
  echo
  tail_of profile 400 | grep -F ': host ' | head -n 6
  echo
  cat "$out/missing" 2>/dev/null
  grep -E '^(FAILED|ERROR) ' "$log" | cut -c1-150 | head -n 8
  while IFS=$'\t' read -r name code seconds; do
    [ "$name" = report ] || printf '%-11s exit %-3s %4s s  %s\n' "$name" "$code" "$seconds" "$(tail_of "$name" 1)"
  done <"$steps"
}

cd "$root" || exit 1
device=cuda
[ -z "$dry" ] || device=cpu
rm -f "$out/missing"
facts >>"$log" 2>&1
run_tests
sanitize memcheck 60
[ -n "$quick" ] || sanitize racecheck 60
run_benchmarks
run_profile
deadline=$((deadline + 5))
export -f report
export out python
step report 20 bash -c report >/dev/null
summarise >"$out/summary.txt" 2>&1
rm -f "$out/missing"
cat "$out/summary.txt"
exit "$(awk -F'\t' '$2 != 0' "$steps" | wc -l)"
