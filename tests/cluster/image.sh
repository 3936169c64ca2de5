#!/usr/bin/env bash
# Builds the CPU target of docker/Dockerfile without a Docker daemon and runs it: `make image-check`, as root on Debian.
# The base is a plain Debian with Python; everything is in a temporary directory. M3I_WHEELS keeps the downloads.
set -euo pipefail
cd "$(dirname "$0")/../.."

work=$(mktemp -d -t m3i-image-XXXXXX)
trap 'buildah unmount --all >/dev/null 2>&1 || true; rm -rf "$work"' EXIT
export STORAGE_DRIVER=vfs BUILDAH_ISOLATION=chroot TMPDIR=$work
buildah() { command buildah --root "$work/storage" --runroot "$work/runroot" "$@"; }
done_with() { echo "image-check: $1, ${SECONDS} s"; }

mmdebstrap --quiet --variant=minbase --include=python3,python3-venv bookworm "$work/base.tar"
container=$(buildah from scratch)
buildah add --quiet "$container" "$work/base.tar" / >/dev/null
buildah commit --quiet --rm "$container" localhost/base >/dev/null
rm "$work/base.tar"
done_with "base"

# pip's own configuration of this machine applies here; inside the build there is a folder of files, and no network.
wheels=${M3I_WHEELS:-$work/wheels}
/usr/bin/python3 -m venv "$work/venv"
for lock in docker/lock*.txt; do
    "$work/venv/bin/pip" download -qq --no-deps --require-hashes --dest "$wheels" -r "$lock"
done
printf '[global]\nno-index = true\nfind-links = /wheels\n' >"$work/pip.conf"
done_with "packages, $(du -shL "$wheels" | cut -f 1)"

buildah build --quiet --pull-never --format docker --target cpu --tag localhost/m3i-large:cpu \
    --build-arg BASE=localhost/base --build-arg COMMIT="$(git rev-parse HEAD)" \
    --build-arg VERSION="$("$work/venv/bin/python" setup.py --version)" \
    --secret "id=pip,src=$work/pip.conf" --volume "$wheels:/wheels:ro" --file docker/Dockerfile .
done_with "build"

container=$(buildah from --pull-never localhost/m3i-large:cpu)
inside() { buildah run "$container" -- "$@"; }
[ "$(inside id -u)" = 1000 ] || { echo "the image runs as $(inside id -un), not as its user" >&2; exit 1; }
buildah inspect --type image localhost/m3i-large:cpu | grep -q "image.revision.*$(git rev-parse HEAD)"
inside bash -c '! test -s /etc/pip.conf && ! test -e .git' # no secret, no history
inside bash docker/smoke.sh
done_with "smoke test"
demo=(deepspeed --master_port 28123 launchers/pretrain.py --ds ds_configs/zero3.json train.steps=5)
inside "${demo[@]}"
inside "${demo[@]}" 2>&1 | tee "$work/again.log"
grep -q "finished" "$work/again.log"
inside bash docker/health.sh
done_with "the demo's first steps"
echo "image-check: $(inside python -c 'import json; print(len(json.load(open("/opt/venv/sbom.json"))["components"]))')" \
    "packages in the bill of materials, $(buildah images --noheading --format '{{.Size}}' localhost/m3i-large:cpu)"
echo "image-check passed"
