"""The image's lock files against requirements.txt, and what the Dockerfile promises."""

import re

from packaging.requirements import Requirement
from tiny import ROOT

LOCKS = ("lock_torch.txt", "lock.txt", "lock_source.txt")
PIN = re.compile(r"^([a-z0-9.-]+)==([^ ;]+)", re.MULTILINE)


def locked(name: str) -> dict[str, str]:
    return dict(PIN.findall((ROOT / "docker" / name).read_text(encoding="utf-8")))


def test_the_lock_has_what_is_required_at_a_version_that_is_allowed() -> None:
    pins = {key: version for name in LOCKS for key, version in locked(name).items()}
    lines = (ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines()
    required = [Requirement(line) for line in lines if line and not line.startswith("#")]
    assert len(required) > 20
    for requirement in required:
        name = re.sub(r"[-_.]+", "-", requirement.name).lower()
        assert name in pins, f"{name}: run make lock"
        assert requirement.specifier.contains(pins[name]), f"{name} {pins[name]} is not {requirement}: run make lock"


def test_every_pin_has_hashes_and_no_package_is_in_two_files() -> None:
    seen: set[str] = set()
    for name in (*LOCKS, "lock_sbom.txt"):
        blocks = re.split(r"(?m)^(?=[a-z])", (ROOT / "docker" / name).read_text(encoding="utf-8"))
        blocks = [block for block in blocks if block.strip()]
        assert blocks and all("--hash=sha256:" in block and PIN.match(block) for block in blocks), name
        if name in LOCKS:
            assert not seen & set(locked(name))
            seen |= set(locked(name))
    assert {"torch", "torchvision", "triton"} <= set(locked("lock_torch.txt"))  # what a base may bring instead
    assert set(locked("lock_source.txt")) == {"deepspeed"}


def test_the_image_ends_as_its_user_and_holds_what_is_tracked() -> None:
    text = (ROOT / "docker/Dockerfile").read_text(encoding="utf-8")
    assert re.findall(r"(?m)^USER (.*)$", text) == ["1000:1000"]
    assert "ARG BASE=" in text and re.search(r"(?m)^HEALTHCHECK ", text)
    ignored = (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines()
    kept = {line[1:] for line in ignored if line.startswith("!")}
    assert ignored[1] == "**" and {"m3i_large", "kernels", "launchers", "ds_configs", "docker", "setup.py"} <= kept
    assert not kept & {".git", "data", "runs", "wandb", ".env"} and all((ROOT / name).exists() for name in kept)
