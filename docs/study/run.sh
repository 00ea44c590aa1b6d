#!/usr/bin/env bash
# The study on real images: three trainings, the ablations, and the document made of their numbers.
#
#   docs/study/run.sh DATA [NOTE]              sized for two CPU cores: about two hours and a half
#   SIZE=paper docs/study/run.sh DATA [NOTE]   the paper's configuration: for a GPU
#
# DATA is a folder in the ISIC 2018 Task 1 layout. NOTE is what a reader must know about the images; it is written on
# every figure. Runs lie in results/study-cpu or results/study-paper (or $RESULTS). The numbers and the document, whose
# text is about the CPU's size, go to docs; of the paper's size the numbers, tables and figures alone, beside the runs.
# Stopped at any time, the same command goes on from there; what is finished is not made again.
set -euo pipefail
data=$(realpath "${1:?usage: docs/study/run.sh DATA [NOTE]}")
note=${2:-}
cd "$(dirname "$0")/../.."
size_name=${SIZE:-cpu}
results=${RESULTS:-results/study-$size_name}
case $size_name in
  cpu) size=(--quick --width 32 --epochs 30) document=(--docs docs) ;;
  paper) size=() document=(--docs "$results" --numbers-only) ;;
  *) echo "SIZE must be cpu or paper, not $size_name" >&2; exit 2 ;;
esac
small=(--quick --epochs 8)

run() {  # run NAME FLAGS...
  if [ ! -e "$results/$1/metrics.json" ]; then
    printf '\n=== %s\n' "$1"
    python main.py --data "$data" ${note:+--data-note "$note"} --results "$results/$1" "${@:2}"
  fi
}

for seed in 42 43 44; do  # of the training; the split is that of --split-seed 42 in all
  run "seed-$seed" ${size[@]+"${size[@]}"} --study --seed "$seed"
done

for rate in 0.2 0.1 0.3 0.5; do
  extra=()
  if [ "$rate" = 0.2 ]; then extra=(--study); fi
  run "dropout-$rate" "${small[@]}" --dropout "$rate" ${extra[@]+"${extra[@]}"}
done
trained=$results/dropout-0.2
for passes in 5 10 100; do
  run "passes-$passes" "${small[@]}" --passes "$passes" --weights-from "$trained"
done
run heatmap-unscaled "${small[@]}" --cam-scale none --weights-from "$trained"
run heatmap-bottleneck "${small[@]}" --target-layer bottleneck --weights-from "$trained"

python -m docs.study.document --runs "$results" "${document[@]}"
