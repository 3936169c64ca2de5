#!/usr/bin/env bash
# Proves inside the image: packages, kernels, three training steps under the deepspeed launcher. Needs no network.
set -euo pipefail
cd "$(dirname "$0")/.."
if [ "$(id -u)" = 0 ]; then
    echo "smoke: runs as root; needed: the image's user" >&2
    exit 1
fi
python docker/smoke.py
out=$(mktemp -d)
# A free port: a container that shares its host's network may have other runs beside it.
port=$(python -c 'import socket; s = socket.socket(); s.bind(("", 0)); print(s.getsockname()[1])')
deepspeed --master_port "$port" launchers/pretrain.py --ds ds_configs/zero3.json --out "$out/run" \
    data.root="$out/data" train.steps=3 train.picture_every=0
python - "$out/run" <<'PYTHON'
import math
import sys
from pathlib import Path

from m3i_large.metrics import read_metrics
from m3i_large.run import read_exit

run = Path(sys.argv[1])
losses = [row["loss"] for row in read_metrics(run)]
assert read_exit(run)["outcome"] == "finished" and len(losses) == 3 and all(map(math.isfinite, losses)), losses
print("smoke: three steps, losses", *(f"{loss:.2f}" for loss in losses))
PYTHON
rm -rf "$out"
echo "smoke: passed"
