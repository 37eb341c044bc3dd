"""The scripts are run by hand and seldom: what they take from the package must be there."""

import importlib
import sys
from pathlib import Path

import pytest

SCRIPTS = sorted(path.stem for path in (Path(__file__).resolve().parents[1] / "scripts").glob("*.py"))


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_script_finds_what_it_imports(repo, monkeypatch, name):
    monkeypatch.setattr(sys, "path", [str(repo / "scripts"), *sys.path])
    assert importlib.import_module(name).__doc__
