"""An audit of whole runs of a tiny pipeline: its record and words, which pictures it attacks with, and what is refused."""

import json
import shutil
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from peft import LoraConfig, get_peft_model
from PIL import Image
from safetensors.torch import load_file, save_file
from small_run import events
from test_audit_record import attack, entry
from test_picture_recipes import JUDGE, RECIPE
from tiny_pipelines import stable_diffusion
from torch import nn
from typer.testing import CliRunner

from hf_clmul.cli import app
from hf_clmul.console_audit import audit_table
from hf_clmul.errors import RecipeError, RunError
from hf_clmul.evaluation.audit.attacks import PICTURE_ATTACKS, attack_parameters
from hf_clmul.evaluation.audit.record import read_audit
from hf_clmul.evaluation.audit.verdict import came_back, verdict
from hf_clmul.evaluation.images import classifiers
from hf_clmul.families import pipeline as family
from hf_clmul.models.diffusion.lora_files import save_lora
from hf_clmul.recipe.load import load_recipe
from hf_clmul.report.audit import attack_tables
from hf_clmul.run import audit as auditing
from hf_clmul.run import closing
from hf_clmul.run.audit import audit_run
from hf_clmul.run.audit_pictures import opened
from hf_clmul.run.runner import run_recipe

QUICK = ["relearn.steps=2", "relearn.points=1", "inversion.steps=1", "inversion.batch_size=2"]


class Judge(nn.Module):
    """A bright picture is of a cat, or of a dog where `reversed`: which of the two the random weights draw does not matter."""

    CLASSES = {"kind": ["cat", "dog"]}
    bright = 0.5

    def forward(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        mean = images.mean((1, 2, 3))
        return {"kind": torch.stack([mean, torch.full_like(mean, self.bright)], 1)}

    def features(self, images: torch.Tensor) -> torch.Tensor:
        return images.mean((2, 3))


def pictures_of_a_cat(folder: Path) -> str:
    (folder / "cats").mkdir()
    for i in range(3):
        Image.new("RGB", (16, 16), (200, 80 * i, 10)).save(folder / "cats" / f"{i}.png")
    lines = [f'{{"file_name": "{i}.png", "caption": "a cat", "kind": "cat"}}' for i in range(3)]
    (folder / "cats" / "metadata.jsonl").write_text("\n".join(lines) + "\n")
    return "{path: cats}"


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Finished runs by name: of real pictures, and of ones that the model draws."""
    found = tmp_path_factory.mktemp("runs")
    (found / "judge").mkdir()
    stable_diffusion().save_pretrained(found / "pipeline")
    drawn = "{path: generated, prompts: [{caption: a cat, kind: cat}], images_per_prompt: 2, steps: 2}"
    text = RECIPE.replace(", a bird]", "]").replace("{per_prompt: 1, steps: 2}", JUDGE.replace("1", "4"))
    real = text.replace(drawn, pictures_of_a_cat(found))
    texts = {"real": real, "drawn": text}
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("HF_CLMUL_CACHE", str(found / "cache"))
        patched.chdir(found)
        patched.setattr(family, "judge_of", lambda images: Judge())
        for name, one in texts.items():
            (found / f"{name}.yaml").write_text(one)
            run_recipe(load_recipe(f"{name}.yaml"), found / name)
    return found


@pytest.fixture
def runs(made, tmp_path, monkeypatch):
    """A copy of a run by its name; the judge sees a cat in every picture, and reports are not drawn."""
    monkeypatch.setenv("HF_CLMUL_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(made)
    monkeypatch.setattr(closing, "write_report", lambda root: root)
    monkeypatch.setattr(classifiers, "judge_of", lambda images: Judge())
    monkeypatch.setattr(Judge, "bright", -1.0)
    return lambda name: Path(shutil.copytree(made / name, tmp_path / name))


def test_a_run_and_its_reference_meet_all_attacks(runs, made):
    root = runs("real")
    record = audit_run(root, None, made / "drawn", QUICK)
    assert record == read_audit(root)
    assert [one["attack"] for one in record["attacks"]] == list(PICTURE_ATTACKS)
    quantized, relearned, other_words, inverted = record["attacks"]
    assert [point["label"] for point in quantized["points"]] == ["before", "int8", "int4", "nf4"]
    assert [(p["label"], p["x"]) for p in relearned["points"]] == [("before", 0.0), ("2 steps", 2.0)]
    assert [point["label"] for point in inverted["points"]] == ["before", "a new word"]
    labels = [point["label"] for point in other_words["points"]]
    assert labels == ["before", "other words", "the worst of them"] or "no other prompts" in other_words["absent"]
    assert relearned["parameters"] == {"steps": 2, "learning_rate": 1e-4, "batch_size": 16, "pictures": 16, "points": 1}
    assert relearned["summary"] == PICTURE_ATTACKS["relearn"].summary  # with pictures of its own
    before = record["before"]["still_drawn"]
    assert (before["run"]["value"], before["gap"]["value"]) == (1.0, 0.0)  # the judge sees cats
    assert record["before"]["unlearning_accuracy"]["run"]["value"] == 0.0
    assert relearned["points"][0]["metrics"] == record["before"]
    assert (record["scope"], record["held"]) == ([], True)
    assert record["reference"]["name"] == "drawn" and events(root)[-1]["event"] == "audited"
    again = (root / "audit" / "audit.json").read_bytes()
    with patch.object(auditing, "_attacked", lambda *args: pytest.fail("attacked again")):
        audit_run(root, None, made / "drawn", QUICK)
    assert (root / "audit" / "audit.json").read_bytes() == again


def test_a_run_without_pictures_is_attacked_with_what_the_unmodified_model_draws(runs, monkeypatch):
    root = runs("drawn")
    record = audit_run(root, ["relearn", "quantize"], None, QUICK[:2])
    quantized, relearned = record["attacks"]
    assert relearned["summary"].endswith(", which the unmodified model drew: the run has none of its own")
    assert "drew" not in quantized["summary"]
    monkeypatch.setattr(Judge, "bright", 2.0)  # no picture is of a cat
    shutil.rmtree(root / "audit")
    (blind,) = audit_run(root, ["relearn"], None, QUICK[:2])["attacks"]
    assert "no pictures of cat" in blind["absent"] and blind["points"] == []


def test_training_that_diverges_ends_its_attack_alone_and_keeps_what_was_measured(runs):
    root, options = runs("real"), ["relearn.learning_rate=1e30", "relearn.steps=4", "inversion.learning_rate=1e30"]
    quantized, relearned, inverted = audit_run(root, ["quantize", "relearn", "inversion"], None, options)["attacks"]
    assert quantized["stopped"] is None and len(quantized["points"]) == 4
    for one in (relearned, inverted):
        assert (
            one["absent"] is None
            and "the training diverged, " in one["stopped"]
            and "the loss is nan" in one["stopped"]
        )
        assert f"{one['attack']}: it ended early, {one['stopped'].rstrip('.')}." in read_audit(root)["verdict"]
        assert one["points"][0]["label"] == "before" and one["points"][0]["metrics"]
    assert [(point["x"], point["metrics"]) for point in relearned["points"][1:]] == [(1.0, {})]
    with patch.object(auditing, "_attacked", lambda *args: pytest.fail("attacked again")):
        audit_run(root, ["quantize", "relearn", "inversion"], None, options)


def test_an_untouched_pipeline_whose_pictures_are_no_numbers_ends_the_audit(runs):
    root = runs("real")
    vae = next((root / "model" / "vae").glob("*.safetensors"))
    save_file({name: torch.full_like(tensor, torch.nan) for name, tensor in load_file(vae).items()}, vae)
    with pytest.raises(RunError, match="some sampled images hold values that are no numbers"):
        audit_run(root, ["quantize"])


def test_a_lora_is_merged_into_its_base(runs, made, tmp_path):
    folder, base = tmp_path / "adapter", stable_diffusion()
    lora = LoraConfig(r=2, lora_alpha=4, target_modules=["to_q", "to_v"], init_lora_weights=False)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        given = torch.randn(1, 4, 8, 8), torch.tensor([10]), torch.randn(1, 24, 16)
        with torch.no_grad():
            plain = base.unet(*given).sample
            adapted = get_peft_model(base.unet, lora)
            alive = adapted(*given).sample
    save_lora(type(base), folder, adapted, "default")
    merged = opened(folder, load_recipe("real.yaml"))
    assert not any("lora" in name for name, _ in merged.unet.named_modules())
    assert merged.unet.state_dict().keys() == stable_diffusion().unet.state_dict().keys()
    with torch.no_grad():
        found = merged.unet(*given).sample
    assert torch.allclose(found, alive, atol=1e-5) and not torch.allclose(found, plain, atol=1e-3)
    with pytest.raises(RunError, match=r"cats holds neither a run .* nor a model \(.*model_index\.json, pytorch_lora"):
        audit_run(runs("real"), ["quantize"], made / "cats")


def test_what_cannot_be_audited_is_refused(runs):
    root = runs("real")
    recipe = root / "recipe.yaml"
    with pytest.raises(
        RecipeError, match="unknown attack 'relern'; there are quantize, relearn, paraphrase, inversion"
    ):
        audit_run(root, ["relern"])
    with pytest.raises(RecipeError, match=r"audit\.attacks\.inversion\.step: unknown option.*did you mean 'steps'"):
        audit_run(root, None, None, ["inversion.step=2"])
    with pytest.raises(
        RecipeError, match=r"audit\.attacks\.prefix: is no attack on models of this family; expected one of"
    ):
        audit_run(root, None, None, ["prefix={}"])
    with pytest.raises(RecipeError, match=r"audit\.attacks\.relearn\.epochs: unknown option"):  # of texts
        audit_run(root, None, None, ["relearn.epochs=2"])
    text = recipe.read_text()
    assert "axis: kind" in text
    recipe.write_text(text.replace("axis: kind", "axis: sort"))
    with pytest.raises(RunError, match="no prompt with a value in the column 'sort'"):
        audit_run(root)
    recipe.write_text(
        "\n".join(line for line in text.splitlines() if "classifier:" not in line and "axis:" not in line)
    )
    with pytest.raises(RunError, match="nothing tells what is seen in a picture"):
        audit_run(root)


def test_the_command_prints_what_came_back(runs):
    shown = CliRunner().invoke(app, ["audit", str(runs("real")), "--attacks", "quantize"])
    told = " ".join(shown.output.split())
    assert shown.exit_code == 0, shown.output
    assert "no metric rose" in told and "There is no retrained model to compare with" in told


# ---- words -----------------------------------------------------------------------------------------------------

BEFORE = {"unlearning_accuracy": entry((0.9, 0.85, 0.95)), "still_drawn": entry((0.1, 0.05, 0.15))}
BACK = {"unlearning_accuracy": entry((0.2, 0.1, 0.3)), "still_drawn": entry((0.8, 0.7, 0.9))}


def test_it_came_back_where_ua_falls_and_is_told_once():
    relearned = attack(("before", BEFORE), ("20 steps", BACK))
    found = came_back(relearned, BEFORE)
    assert {metric: point["label"] for metric, point in found.items()} == dict.fromkeys(BEFORE, "20 steps")
    _, said, summary = verdict(BEFORE, [relearned], "none")
    assert said == (
        "relearn: share of pictures in which it is still drawn rose: 0.100 [0.050, 0.150] before, 0.800 [0.700, 0.900] after "
        "(20 steps)."
    )
    assert summary.startswith("1 of 1 attacks raised something: relearn.")


def test_it_did_not_come_back_where_ua_rises():
    gone = attack(("before", BACK), ("20 steps", BEFORE))
    assert came_back(gone, BACK) == {}
    assert verdict(BACK, [gone], "none")[1] == "relearn: no metric rose."


def test_a_gap_that_only_the_reference_widens_is_no_rise():
    same, nothing = (0.0, 0.0, 0.0), {"still_drawn": entry((0.0, 0.0, 0.0), (0.0, 0.0, 0.0), (0.0, 0.0, 0.0))}
    after = {"still_drawn": entry(same, (0.1, 0.0, 0.2), (0.1, 0.0, 0.2))}
    assert verdict(nothing, [attack(("before", nothing), ("after", after))], None)[1] == (
        "relearn: no metric rose, or none more than the retrained model."
    )


def test_a_gap_that_grew_because_the_reference_fell_is_no_rise():
    half, fallen, none = (0.5, 0.4, 0.6), (0.3, 0.2, 0.4), (0.0, 0.0, 0.1)
    start = {"still_drawn": entry(half, half, none)}
    after = {"still_drawn": entry(half, fallen, (0.2, 0.05, 0.35))}
    assert verdict(start, [attack(("before", start), ("after", after))], None)[1] == (
        "relearn: no metric rose, or none more than the retrained model."
    )


def test_with_a_reference_ua_has_to_fall_below_it_and_away_from_it():
    def beside(run: float, reference: float) -> dict:
        gap = abs(run - reference)
        around = [(value, value - 0.02, value + 0.02) for value in (run, reference, gap)]
        return {"unlearning_accuracy": entry(*around)}

    start = beside(0.9, 0.95)
    for now, expected in ((beside(0.2, 0.9), True), (beside(0.2, 0.22), False), (beside(0.2, 0.1), False)):
        found = came_back(attack(("before", start), ("after", now)), start)
        assert bool(found) is expected, now


def test_tables_and_console_say_what_is_measured():
    relearned = attack(("before", BEFORE), ("20 steps", BACK))
    asked = {"question": "a red seven", "answer": "a red seven", "reference": None}
    for point, seen in zip(relearned["points"], ("4 x one red", "4 x seven red"), strict=True):
        point["samples"] = [
            {**asked, "generated": seen},
            {**asked, "question": "a seven", "generated": f"other {seen}"},
        ]
    record = {"name": "n", "reference": None, "before": BEFORE, "attacks": [relearned], "verdict": []}
    (table,) = attack_tables(record)
    assert (table.title, table.metrics) == ("Relearning what was forgotten", ("Still drawn",))
    assert table.samples[0] == (
        "a red seven",
        "a red seven",
        (("before", "4 x one red"), ("20 steps", "4 x seven red")),
    )
    assert table.samples[1][2] == (("before", "other 4 x one red"), ("20 steps", "other 4 x seven red"))
    columns = [[*column.cells] for column in audit_table(record).columns]
    assert [cells[-1] for cells in columns[1:]] == ["0.20*", "0.80*"]


def test_the_documentation_names_every_option(repo):
    text = (repo / "docs" / "audit.md").read_text()
    section = text.partition("## Attacks on pictures\n")[2].partition("\n## ")[0]
    rows = {line.split("`")[1]: line for line in section.splitlines() if line.startswith("| `")}
    assert set(rows) == set(PICTURE_ATTACKS)
    for name, row in rows.items():
        for option, (_, default) in attack_parameters(name, "diffusion").items():
            assert f"`{option}`" in row and (
                not isinstance(default, int | float) or f"`{option}` {default:g}" in row
            ), option


def test_the_schema_of_recipes_knows_attacks_of_one_name_in_both_families():
    from hf_clmul.recipe.schema_json import recipe_schema

    table = recipe_schema()["$defs"]["Audit"]["properties"]["attacks"]["anyOf"][0]["properties"]
    epochs, pictures = (set(one["properties"]) for one in table["relearn"]["anyOf"])
    assert "epochs" in epochs and "pictures" not in epochs and "pictures" in pictures
    assert set(table["inversion"]["properties"]) == {"steps", "learning_rate", "batch_size", "pictures", "initial"}
    json.dumps(table)
