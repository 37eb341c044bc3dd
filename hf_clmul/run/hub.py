"""Sharing: what goes to the Hub. Only `model/` (with its card), the resolved recipe and the results record do; data, memory,
checkpoints and the ledger stay here."""

import json
import logging
import os
from typing import Any

from huggingface_hub import HfApi

from hf_clmul.errors import RunError
from hf_clmul.models.adapters import CONFIG
from hf_clmul.recipe.load import dump_recipe
from hf_clmul.recipe.schema import Recipe
from hf_clmul.run.folder import RunFolder
from hf_clmul.run.results import shared

log = logging.getLogger(__name__)


def push(folder: RunFolder, recipe: Recipe, api: HfApi | None = None) -> str:
    """Uploads the finished model to `export.push_to_hub`; returns its address. Raises RunError if the upload fails: the run
    itself is complete.

    The record goes without its sample answers: they are data, some of it forgotten on purpose. No file names a folder of
    this machine.
    """
    api, repo_id = api or HfApi(), recipe.export.push_to_hub
    results = shared(json.loads(folder.results.read_text("utf-8")), recipe)
    for stage in results["stages"]:
        for group in stage["groups"].values():
            group["samples"] = []
    files = {"recipe.yaml": dump_recipe(recipe, shared=True).encode(), "results.json": _json(results)}
    if (folder.model / CONFIG).is_file():  # here it names the folder of its base, so that it loads by itself
        config = json.loads((folder.model / CONFIG).read_text("utf-8"))
        if os.path.isabs(config["base_model_name_or_path"]):
            config["base_model_name_or_path"] = results["model"]["path"]
        files[CONFIG] = _json(config)
    try:
        repo = api.create_repo(repo_id, private=recipe.export.private, exist_ok=True)
        api.upload_folder(
            repo_id=repo.repo_id, folder_path=folder.model, commit_message="Upload model", ignore_patterns=list(files)
        )
        for name, content in files.items():
            api.upload_file(path_or_fileobj=content, path_in_repo=name, repo_id=repo.repo_id)
    except Exception as error:  # the network, the Hub and its client fail in many ways, and all leave the run as it is
        raise RunError(
            f"the run is complete in {folder.root}, but the upload to {repo_id} failed: {error}\n"
            "Check the name and `hf auth login`, then run the same command again."
        ) from error
    log.info("uploaded to %s", repo.url)
    return str(repo.url)


def _json(content: Any) -> bytes:
    return json.dumps(content, indent=1).encode() + b"\n"
