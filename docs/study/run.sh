#!/usr/bin/env bash
# The study on real images: ten trainings and their pool, the ablations, and the document made of their numbers.
#
#   docs/study/run.sh DATA EXTERNAL [NOTE]              sized for two CPU cores: about two hours and a half
#   SIZE=paper docs/study/run.sh DATA EXTERNAL [NOTE]   the paper's configuration: for a GPU
#   LARGER=yes docs/study/run.sh DATA EXTERNAL [NOTE]   also the three larger networks: about two hours more
#
# DATA is a folder in the ISIC 2018 Task 1 layout; EXTERNAL another test set, a folder called HAM10000. NOTE is what a
# reader must know about the images; it is written on every figure. LANES trainings run at a time, each with THREADS
# threads: by default one thread each and as many as there are cores; on a GPU, one after the other.
#
# Runs lie in results/study-cpu or results/study-paper (or $RESULTS). The numbers and the document, whose text is about
# the CPU's size, go to docs; of the paper's size the numbers, tables and figures alone, beside the runs.
# Stopped at any time, the same command goes on from there; what is finished is not made again.
set -euo pipefail
data=$(realpath "${1:?usage: docs/study/run.sh DATA EXTERNAL [NOTE]}")
external=$(realpath "${2:?usage: docs/study/run.sh DATA EXTERNAL [NOTE]}")
note=${3:-}
cd "$(dirname "$0")/../.."
size_name=${SIZE:-cpu}
results=${RESULTS:-results/study-$size_name}
case $size_name in
  cpu)
    size=(--quick --image-size 80 --epochs 10) document=(--docs docs) lanes=${LANES:-$(nproc)}
    export OMP_NUM_THREADS=${THREADS:-1} ;;
  paper) size=() document=(--docs "$results" --numbers-only) lanes=${LANES:-1} ;;
  *) echo "SIZE must be cpu or paper, not $size_name" >&2; exit 2 ;;
esac
common=(python main.py --data "$data" ${note:+--data-note "$note"})
main_study=("${common[@]}" ${size[@]+"${size[@]}"} --flips --test-data "$external")
mkdir -p "$results"

several() {  # several NAME FIRST LAST COMMAND...: a run per seed, LANES at a time; each holds its own folder
  local folder=$results/$1
  mkdir -p "$folder"
  say_progress "$folder" &
  local saying=$!
  trap 'kill $saying 2>/dev/null' EXIT
  # a run's bars go to a file, of which say_progress shows the last line
  seq "$2" "$3" | xargs -P "$lanes" -I SEED bash -c '"${@:2}" 2> "$1" || { tail -n 1 "$1" >&2; exit 1; }' \
    run "$folder/seed-SEED.log" "${@:4}" --seed SEED --results "$folder/seed-SEED"
  kill $saying
  rm -f "$folder"/seed-*.log
}

say_progress() {  # every ten seconds, the last line of each run that goes on
  while sleep 10; do
    find "$1" -maxdepth 1 -name 'seed-*.log' -newermt '-10 seconds' | sort | while read -r log; do
      printf '%s  %s\n' "$(basename "$log" .log)" "$(tail -c 400 "$log" | tr '\r' '\n' | tail -n 1)"
    done
  done
}

printf '\n=== ten trainings\n'
several pooled 42 51 "${main_study[@]}"
"${main_study[@]}" --trainings 10 --ensemble --results "$results/pooled"

ablation() {  # ablation NAME FLAGS...: three of the trainings with another setting
  printf '\n=== %s\n' "$1"
  several "$1" 42 44 "${common[@]}" ${size[@]+"${size[@]}"} --weights-from "$results/pooled/seed-SEED" "${@:2}"
  "${common[@]}" ${size[@]+"${size[@]}"} --weights-from "$results/pooled" --trainings 3 --results "$results/$1" "${@:2}"
}

ablation predicted-score --cam-score predicted
ablation bottleneck --target-layer bottleneck
ablation unscaled --cam-scale none
ablation passes-10 --passes 10

if [ "${LARGER:-}" = yes ]; then
  for seed in 42 43 44; do
    "${common[@]}" --quick --width 32 --epochs 30 --study --seed "$seed" --results "$results/larger-$seed"
  done
fi

python -m docs.study.document --runs "$results" "${document[@]}"
