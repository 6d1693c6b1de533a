"""Packaging: each top-level area installs as `onbeat.<area>`."""

from pathlib import Path

from setuptools import find_namespace_packages, setup

AREAS = ("embodiment", "kernels", "drivers", "calibration", "runtime", "training", "export")
DATA = ["*.toml", "*.md", "*.xml", "*.json", "*.html", "*.css", "*.js"]

# The robot's half. No torch, no simulator, no compiler.
ROBOT = [
    "numpy>=1.26",
    "numba>=0.60",
    "pillow>=10",
    "pyserial>=3.5",
    "onnxruntime>=1.20",
    "tokenizers>=0.20",
    "mcap>=1.6",
    "tomli>=2; python_version < '3.11'",
]
EXTRAS = {
    "sim": ["mujoco>=3.3", "scipy>=1.11"],
    "view": ["rerun-sdk>=0.24"],
    "train": ["torch>=2.6", "safetensors>=0.4", "tqdm>=4.66", "tensorboard>=2.15", "pyarrow>=15", "av>=12"],
    "export": ["torch>=2.6", "safetensors>=0.4", "onnx>=1.17"],
    "realsense": ["pyrealsense2>=2.55"],
    "jetson": ["cuda-python>=12.6", "tensorrt>=10.3"],
    "dev": [
        "pytest>=8",
        "pytest-timeout>=2.3",
        "pytest-xdist>=3.6",
        "hypothesis>=6.100",
        "ruff>=0.6",
        "basedpyright>=1.20",
        "feetech-servo-sdk>=1.0",
        "psutil>=5.9",
        "mcap-ros2-support>=0.5",
        "transformers>=5",
        "perfetto>=0.16",
        "build>=1",
        "setuptools>=68",
    ],
}


def area_packages() -> dict[str, str]:
    """Every package `onbeat.<area>[.<sub>]` and its folder."""
    folders = {"onbeat": "onbeat"}
    for area in AREAS:
        folders[f"onbeat.{area}"] = area
        for sub in find_namespace_packages(area):
            folders[f"onbeat.{area}.{sub}"] = f"{area}/{sub.replace('.', '/')}"
    return folders


PACKAGES = area_packages()

setup(
    name="onbeat",
    version="0.1.0",
    description="The on-robot runtime for flow-matching vision-language-action policies",
    long_description=(Path(__file__).parent / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.10",
    packages=list(PACKAGES),
    package_dir=PACKAGES,
    package_data={"": DATA, "onbeat": ["py.typed"]},
    install_requires=ROBOT,
    extras_require=EXTRAS,
    entry_points={"console_scripts": ["onbeat = onbeat.cli:main"]},
)
