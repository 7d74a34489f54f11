#!/usr/bin/env bash
# Prepare a fresh rented GPU machine (Ubuntu with an NVIDIA driver) for training. It can be run again at any time:
#
#     git clone THIS_REPOSITORY && cd ddp-base-model && ./setup_lambda.sh
#
# It installs a font for the charts, creates .venv with Python 3.11 or later, installs what torch.compile needs to
# build kernels, checks that PyTorch can use the GPUs, and prints the next commands.
set -euo pipefail
cd "$(dirname "$0")"

as_root() {
    if [ "$(id -u)" -eq 0 ]; then "$@"; elif command -v sudo >/dev/null; then sudo "$@"; else return 1; fi
}

install_packages() {
    as_root env DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends "$@"
}

echo "== xkcd font"
# Not grep -q: it would leave fc-list with a broken pipe.
if fc-list 2>/dev/null | grep -iE 'xkcd|humor sans|comic neue' >/dev/null; then
    echo "already there"
else
    as_root apt-get update -qq && install_packages fontconfig fonts-humor-sans ||
        echo "no font was installed; charts will use DejaVu Sans"
fi

echo "== .venv"
is_new_enough='import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))'
if [ ! -x .venv/bin/python ]; then
    # Ubuntu's own Python comes without venv.
    python3 -c 'import venv, ensurepip' 2>/dev/null || { as_root apt-get update -qq && install_packages python3-venv; } || true
    for python in python3.13 python3.12 python3.11 python3; do
        if command -v "$python" >/dev/null && "$python" -c "$is_new_enough" 2>/dev/null; then
            "$python" -m venv .venv
            break
        fi
    done
fi
if [ -x .venv/bin/python ]; then
    .venv/bin/python -m pip install --quiet -c requirements.lock -e .
else # the system's Python is too old or has no venv; uv installs another one
    if ! command -v uv >/dev/null; then
        command -v pip3 >/dev/null || { as_root apt-get update -qq && install_packages python3-pip; }
        pip3 install --quiet --user uv || pip3 install --quiet --user --break-system-packages uv
        export PATH="$HOME/.local/bin:$PATH"
    fi
    uv venv --python 3.12 --seed .venv
    uv pip install --quiet --python .venv/bin/python -c requirements.lock -e .
fi

echo "== build tools"
has_build_tools() { # prints what is missing
    .venv/bin/python -c 'import sys; from basemodel.training.backend import missing_build_tools; sys.exit(missing_build_tools())'
}
if has_build_tools; then
    echo "already there"
else
    headers=$(.venv/bin/python -c 'import sys; print("python{}.{}-dev".format(*sys.version_info))')
    as_root apt-get update -qq && install_packages build-essential "$headers" && has_build_tools ||
        echo "none were installed; training would take twice as long, because it cannot be compiled"
fi

echo "== GPUs"
names=
if command -v nvidia-smi >/dev/null && nvidia-smi --query-gpu=name,memory.total --format=csv,noheader; then
    names=$(nvidia-smi --query-gpu=name --format=csv,noheader)
else
    echo "nvidia-smi finds no GPU; training would run on the CPU"
fi

.venv/bin/python -c '
import sys, torch
from basemodel.common.errors import InputError
from basemodel.training.processes import join_world
try:
    print(f"PyTorch {torch.__version__} trains on: {join_world().device_name}")
except InputError as error:
    sys.exit(f"Error: {error}")'

processes=$(grep -c . <<<"$names" || true)
case "$processes $names" in
    [01]\ *) run=1xrtx3090-best processes=1 ;;
    *H100*) run=8xh100m80-best ;;
    *) run=8xa100m40-best ;;
esac
cat <<EOF

Ready. Find the largest microbatch that fits, set microbatch_size in runs/$run/train.json,
look at the plan, then train:

    source .venv/bin/activate
    torchrun --nproc_per_node=$processes ddp_train.py $run -f
    torchrun --nproc_per_node=$processes ddp_train.py $run datasets --plan
    torchrun --nproc_per_node=$processes ddp_train.py $run datasets --resume
EOF
