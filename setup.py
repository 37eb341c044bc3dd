"""How the package is built. The version is read as text: the package need not be importable here."""

import re
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).resolve().parent
VERSION = re.search(r'^__version__ = "(.+)"$', (HERE / "hf_clmul/__init__.py").read_text(), re.MULTILINE)[1]
README = HERE / "README.md"

# Where no other reason stands, the bound is the oldest release that the tests were run with. To lower one,
# run scripts/test with the older release and say so here. Exact versions for CI: constraints.txt.
REQUIRES = [
    "torch>=2.13",  # oldest tested
    "transformers>=5.23",  # oldest tested; overridden trainer methods change between minor releases
    "peft>=0.21",  # oldest tested; transformers 5.23 takes 0.20 and later
    "accelerate>=1.15",  # oldest tested; the gradient window follows its accumulation rules
    "datasets>=5.2",  # oldest tested
    "pyarrow>=26.0",  # oldest tested; tables of statistics
    "evaluate>=0.4.6",  # oldest tested
    "diffusers>=0.42",  # oldest tested
    "tokenizers>=0.23",  # the range that transformers 5.23 takes
    "safetensors>=0.8",  # the range that transformers 5.23 takes
    "huggingface_hub>=2.4",  # oldest tested; recipes and models by Hub id
    "filelock>=4.2",  # oldest tested; one run at a time in a run folder
    "gguf>=0.19",  # oldest tested; transformers reads GGUF files with it
    "numpy>=2.4",  # oldest tested
    "pydantic>=2.14",  # oldest tested; recipes
    "annotated-types>=0.8",  # oldest tested; Gt, Ge and the like on the parameters of terms
    "ruamel.yaml>=0.19",  # oldest tested; line numbers of keys
    "typer>=0.29",  # oldest tested; command line
    "rich>=15.0",  # oldest tested; tables
    "tqdm>=4.70",  # oldest tested; progress bars
    "scipy>=1.17",  # oldest tested; Kolmogorov-Smirnov test
    "scikit-learn>=1.9",  # oldest tested; AUC
    "rouge-score>=0.1.2",  # oldest tested, and the last one
    "matplotlib>=3.11",  # oldest tested; figures of the report
    "pillow>=13.0",  # oldest tested; grids of pictures
    "jinja2>=3.1",  # oldest tested; report and model card
]
# The suite lm_eval. Tested against a stand-in only; 0.4.8 is the release whose interface it follows.
LM_EVAL = ["lm-eval>=0.4.8"]
TEST = [
    "pytest>=9.0",  # oldest tested
    "pytest-xdist>=3.8",  # oldest tested; two workers
    "jsonschema>=4.26",  # oldest tested; checks the recipes' schema
    "torchjd[quadprog-projector,cagrad]>=0.18",  # the API of its weightings, an oracle for the conflict rules
    "setuptools>=77",  # the wheel is built without isolation; 77: license as an SPDX expression
]
DEV = [
    *TEST,
    "ruff>=0.17",  # newer rules would fail older code: CI pins it
    "build>=1.6",  # python -m build makes a release
]

setup(
    name="hf_clmul",
    version=VERSION,
    description="Generative models that keep learning and can forget, for the Hugging Face ecosystem",
    long_description=README.read_text(encoding="utf-8") if README.exists() else "",
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.11",
    packages=[*find_packages(include=["hf_clmul", "hf_clmul.*"]), "hf_clmul.recipes"],
    # Users browse recipes/ at the top of the repository; a wheel has to carry them inside the package.
    package_dir={"hf_clmul.recipes": "recipes"},
    package_data={"hf_clmul": ["py.typed", "**/*.jsonl", "**/*.j2"], "hf_clmul.recipes": ["**/*"]},
    install_requires=REQUIRES,
    extras_require={"lm-eval": LM_EVAL, "test": TEST, "dev": DEV},
    entry_points={"console_scripts": ["hf-clmul=hf_clmul.cli:main"]},
    classifiers=[
        "Development Status :: 3 - Alpha",
        "Intended Audience :: Science/Research",
        "Programming Language :: Python :: 3",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Typing :: Typed",
    ],
    zip_safe=False,
)
