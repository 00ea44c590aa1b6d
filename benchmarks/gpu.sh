#!/usr/bin/env bash
# All that only a GPU can show, on one card in under 25 minutes, from a machine that has PyTorch and this folder:
#
#     benchmarks/gpu.sh DATA                          # DATA: a folder in the ISIC 2018 Task 1 layout
#     benchmarks/gpu.sh DATA --device cpu --small     # the same steps in a few minutes, to see that they work
#
# Packages that are missing are installed into a folder of their own, from ./wheels (or $WHEELS) or else from PyPI; PyTorch
# stays as it is. $PYTHON names the interpreter [python3]. Writes gpu/report.md (--output FOLDER) and exits with 1 where
# something is wrong.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
wheels=${WHEELS:-wheels}
packages=${PACKAGES:-$PWD/.venv-gpu}

missing=$("$python" - <<'PY'
from importlib.util import find_spec
needed = {
    "torchvision": "torchvision", "numpy": "numpy", "PIL": "pillow", "albumentations": "albumentations", "sklearn": "scikit-learn",
    "matplotlib": "matplotlib", "tqdm": "tqdm", "pytest": "pytest", "xdist": "pytest-xdist", "hypothesis": "hypothesis",
    "captum": "captum", "pytorch_grad_cam": "grad-cam",
}
if find_spec("torch") is None:
    raise SystemExit("error: PyTorch is missing; install it for this machine's driver first")
print(*(name for module, name in needed.items() if find_spec(module) is None))
PY
)
if [ -n "$missing" ]; then
  echo "installing $missing into $packages"
  # beside the packages that are there: PyTorch must not be exchanged for another version
  "$python" -c 'import importlib.metadata as m; print("torch==" + m.version("torch"))' > "$packages.constraint"
  from=()
  if [ -d "$wheels" ]; then from=(--no-index --find-links "$wheels"); fi
  # shellcheck disable=SC2086
  "$python" -m pip install --quiet --target "$packages" --constraint "$packages.constraint" "${from[@]}" $missing
  # what came along and is there already is not to be found first
  rm -rf "$packages"/torch "$packages"/torch-* "$packages"/nvidia* "$packages"/triton*
  export PYTHONPATH="$packages${PYTHONPATH:+:$PYTHONPATH}"
fi
exec "$python" -m benchmarks.gpu "$@"
