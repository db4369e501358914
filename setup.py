"""What the package is and needs. The settings of the tools (ruff, pyright, pytest) are in pyproject.toml."""

from pathlib import Path

from setuptools import find_packages, setup

README = Path(__file__).parent / "README.md"

# Every requirement names the lowest version that works: `make test-versions` runs the fast tests on exactly these.
# They are low enough for what Colab has (Python 3.13 with jax 0.7.2), so that installing leaves Colab's jax alone.
RUNTIME = [
    "absl-py>=2.0",
    "flax>=0.11.2",
    "importlib_resources>=6.0",  # tensorflow-datasets 4.9.10 imports it and forgets to declare it
    "jax>=0.7.2",
    "matplotlib>=3.9.2",
    "msgpack>=1.1",  # flax has it too
    "ml-collections>=1.0",
    "numpy>=2.1",
    "optax>=0.2.8",
    "orbax-checkpoint>=0.12.4,<1",
    "pillow>=10.4",
    "tensorflow-datasets>=4.9.10",
    "tqdm>=4.66.3",
]

DEMO = ["scikit-learn>=1.5.2"]
TENSORBOARD = ["tensorboardX>=2.6.2.2"]
EXPORT = ["safetensors>=0.5", "flatbuffers>=24.3.25"]
HUB = [*EXPORT, "huggingface_hub>=1.33"]  # 1.0 needs torch where safetensors is installed
ONNX = ["jax2onnx>=0.13", "onnxruntime>=1.32"]
OTHER_NETWORKS = ["dm-haiku>=0.0.15", "equinox>=0.13.2"]  # the package imports them only where a user has done so
TESTS = [*DEMO, *TENSORBOARD, *HUB, *OTHER_NETWORKS, "chex>=0.1.90", "pytest>=8.3", "pytest-xdist>=3.6.1"]

DOCS = ["mkdocs-material>=9.8.2,<10", "mkdocstrings-python>=2.0.11"]

# Lint and types are part of `make test`: newer checkers must not change its verdict, so they are pinned.
CHECKERS = ["ruff>=0.17.5,<0.18", "pyright[nodejs]==1.1.414"]  # the plain pyright wheel has no Node

EXTRAS = {
    "demo": DEMO,
    "tensorboard": TENSORBOARD,
    "wandb": ["wandb>=0.22"],
    "export": EXPORT,
    "hub": HUB,
    "onnx": ONNX,
    "torch": ["torch>=2.6", "diffusers>=0.42"],  # diffusers 0.42 asks for torch.accelerator, which 2.5 has not
    "prepare": ["tensorflow-cpu>=2.20"],  # only to prepare a TFDS data set, once
    "bench": ["torch>=2.5", "diffusers>=0.30", "pytorch-fid>=0.3", "torch-fidelity>=0.3"],
    "tpu-compile": ["jax[tpu]>=0.7.2"],  # the compiler of TPUs, which needs none; JAX says which of its versions
    "docs": [*DOCS, CHECKERS[0]],  # ruff breaks the lines of long signatures
    "test": TESTS,
    "dev": [*TESTS, "nbmake>=1.5", "ipykernel>=6.29", *CHECKERS],
}

setup(
    name="diffusion_distill",
    version="0.1.0",
    description="Distils diffusion models in time, in JAX and Flax: BTD, TRACT and D-ODE solvers",
    long_description=README.read_text(encoding="utf-8") if README.exists() else "",
    long_description_content_type="text/markdown",
    author="diffusion_distill contributors",
    license="Apache-2.0",
    license_files=["LICENSE"],
    keywords=["diffusion models", "distillation", "generative models", "few-step sampling", "JAX", "Flax"],
    project_urls={
        "BTD (arXiv:2202.00512)": "https://arxiv.org/abs/2202.00512",
        "TRACT (arXiv:2303.04248)": "https://arxiv.org/abs/2303.04248",
        "D-ODE (arXiv:2309.16421)": "https://arxiv.org/abs/2309.16421",
    },
    classifiers=[
        "Development Status :: 3 - Alpha",
        "Intended Audience :: Science/Research",
        "Operating System :: OS Independent",
        "Programming Language :: Python :: 3",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Programming Language :: Python :: 3.13",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
    packages=find_packages(include=["diffusion_distill", "diffusion_distill.*"]),
    package_data={"diffusion_distill.report": ["page.css", "page.js"]},
    python_requires=">=3.11",
    entry_points={"console_scripts": ["dd-fit-diffusers = diffusion_distill.torch.command:main"]},
    install_requires=RUNTIME,
    extras_require=EXTRAS,
    zip_safe=False,
)
