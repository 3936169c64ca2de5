#!/usr/bin/env bash
# Installs the locked packages into a virtual environment: install.sh DIRECTORY. Part of the image's build.
set -euo pipefail
venv=$1
locks=$(dirname "$0")

unset PIP_CONSTRAINT # NVIDIA's images hold pip to their own versions by it; the locks say which
# What the base brings (NVIDIA's PyTorch, Apex) stays visible and is not replaced.
python3 -m venv --system-site-packages "$venv"
pip=("$venv/bin/pip" --no-cache-dir --disable-pip-version-check)
install=("${pip[@]}" install --quiet --no-deps --require-hashes)
if ! python3 -c "import torch" 2>/dev/null; then
    "${install[@]}" -r "$locks/lock_torch.txt"
fi
"${install[@]}" -r "$locks/lock.txt"
if command -v nvcc >/dev/null; then
    # Compiled once here instead of by the first rank of every machine.
    export DS_BUILD_FUSED_ADAM=1 DS_BUILD_CPU_ADAM=1
fi
# DeepSpeed comes as source and builds itself with the torch and setuptools that are there.
"${install[@]}" --no-build-isolation --use-pep517 -r "$locks/lock_source.txt"

# The bill of materials, by a tool that is not part of the image.
python3 -m venv /tmp/sbom
/tmp/sbom/bin/pip install --quiet --no-cache-dir --no-deps --require-hashes -r "$locks/lock_sbom.txt"
/tmp/sbom/bin/cyclonedx-py environment --output-reproducible --of JSON -o "$venv/sbom.json" "$venv/bin/python"
rm -rf /tmp/sbom
