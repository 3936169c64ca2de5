#!/usr/bin/env bash
# Writes the lock files of the image from requirements.txt: exact versions with the hashes of every platform's files.
# Needs uv. Run it after a change of requirements.txt: make lock
set -euo pipefail
cd "$(dirname "$0")"
compile=(uv pip compile --quiet --universal --python-version 3.11 --generate-hashes --no-header --no-annotate)

all=$("${compile[@]}" ../requirements.txt)
# In the order of installation: what a base image may bring itself, what comes as wheels, what is built on top of these.
split() {
    awk -v wanted="$1" '
        /^[a-z]/ {
            kind = "wheels"
            if ($0 ~ /^(torch|torchvision|triton|nvidia-[a-z0-9-]+|cuda-[a-z]+)==/) kind = "torch"
            if ($0 ~ /^deepspeed==/) kind = "source"
        }
        kind == wanted' <<<"$all"
}
split torch >lock_torch.txt
split wheels >lock.txt
split source >lock_source.txt
echo cyclonedx-bom==7.5.0 | "${compile[@]}" - >lock_sbom.txt
