"""One thread, no network, and the folders that tests may read. It must not import torch itself."""

import json
import os
import sys
from contextlib import suppress
from pathlib import Path

# torch and OpenMP read these when they are first imported. One thread makes sums repeatable and lets
# several test workers share a small machine.
os.environ.update(
    OMP_NUM_THREADS="1",
    MKL_NUM_THREADS="1",
    OMP_WAIT_POLICY="PASSIVE",
    TOKENIZERS_PARALLELISM="false",
    HF_HUB_OFFLINE="1",
    HF_DATASETS_OFFLINE="1",
    MPLBACKEND="Agg",
)

import pytest

_REPO = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    """A plugin may have imported torch before the environment above was set."""
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    """What the user's cache holds, such as trained references, must not decide a test. Workers share one; the small pipelines,
    which are named by the hash of all that makes them, are the user's."""
    from hf_clmul.paths import cache_folder

    known = cache_folder() / "digits"
    folder = tmp_path_factory.getbasetemp()
    folder = (folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder) / "cache"
    for each in (known, folder):
        each.mkdir(parents=True, exist_ok=True)
    with suppress(FileExistsError):  # another worker was first
        (folder / "digits").symlink_to(known, target_is_directory=True)
    os.environ["HF_CLMUL_CACHE"] = str(folder)


@pytest.fixture(scope="session")
def repo() -> Path:
    """The root of the repository."""
    return _REPO


@pytest.fixture(scope="session")
def shared() -> Path:
    """Large reference data that is no part of the repository: $HF_CLMUL_SHARED, else ../shared."""
    folder = Path(os.environ.get("HF_CLMUL_SHARED", _REPO.parent / "shared"))
    if not folder.is_dir():
        pytest.skip(f"no shared data at {folder}; set HF_CLMUL_SHARED to its folder")
    return folder


@pytest.fixture(scope="session")
def tofu_golden(shared):
    """Published statistics of TOFU's examples, and what they give."""
    file = shared / "golden" / "tofu_metrics.json"
    if not file.is_file():
        pytest.skip(f"no published TOFU values at {file}")
    return json.loads(file.read_text())
