"""Where a request may start from, and in which folders a run may write."""

import shutil
from datetime import timedelta
from pathlib import Path

import pytest
from small_run import execute, write_recipe

from hf_clmul.errors import RunError
from hf_clmul.recipe.load import load_recipe
from hf_clmul.run import runner as run


def test_a_request_never_starts_from_weights_that_are_gone(tmp_path: Path) -> None:
    """The weights after the first request were cleared when the second was done: redoing the second must not begin from
    the base model instead."""
    recipe, out = write_recipe(tmp_path, "full"), tmp_path / "out"
    execute(recipe, out)
    shutil.rmtree(out / "requests" / "01-unlearn-one")
    (out / "results.json").unlink()
    with pytest.raises(RunError, match=r"00-learn-people is finished, but the weights that it left .* are gone"):
        execute(recipe, out)


def test_the_folder_of_a_users_own_recipe_is_not_a_run_folder(tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, "full")
    recipe.write_text("# my notes on this recipe\n" + recipe.read_text())
    (tmp_path / "requests" / "mine").mkdir(parents=True)
    (tmp_path / "requests" / "mine" / "notes.txt").write_text("precious")
    with pytest.raises(RunError, match="not a run folder"):
        execute(recipe, tmp_path)
    assert recipe.read_text().startswith("# my notes")
    assert (tmp_path / "requests" / "mine" / "notes.txt").read_text() == "precious"


def test_processes_wait_for_each_other_as_long_as_the_recipe_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = []

    class Stopped(Exception):
        pass

    def state(**given: object) -> None:
        told.append(given["timeout"])
        raise Stopped

    monkeypatch.setattr(run, "PartialState", state)
    recipe = write_recipe(tmp_path, "full")
    for changes in ([], ["unlearning.training.ddp_timeout=7200"]):
        with pytest.raises(Stopped):
            run.run_recipe(load_recipe(recipe, changes), tmp_path / "out")
    assert told == [timedelta(seconds=1800), timedelta(seconds=7200)]
