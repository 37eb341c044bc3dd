"""What a report and a card say of an audited run of pictures: prompts, one metric for two that mirror each other, and papers."""

import pytest
from fake_pictures import fake_pictures
from test_audit_record import attack, entry, record

from hf_clmul.evaluation.audit.verdict import asked, verdict
from hf_clmul.report import page as page_module
from hf_clmul.report.answers import answers
from hf_clmul.report.audit import referenced
from hf_clmul.report.audit_figure import attack_figure
from hf_clmul.report.card_audit import with_audit
from hf_clmul.report.figures import LIGHT, describe_bars, metric_bars
from hf_clmul.report.headlines import headline


def measured(drawn: tuple, reference: tuple) -> dict:
    gap, mirrored = (0.0, 0.0, 0.0), [(1 - value, 1 - high, 1 - low) for value, low, high in (drawn, reference)]
    return {"unlearning_accuracy": entry(*mirrored, gap), "still_drawn": entry(drawn, reference, gap)}


@pytest.fixture
def audit() -> dict:
    """The last point is of another prompt than the own one."""
    before, after = measured((0.0,) * 3, (0.0,) * 3), measured((0.5, 0.1, 0.9), (0.0,) * 3)
    found = attack(("before", before), ("2 steps", before), ("4 steps", after))
    for point, question in zip(found["points"], ("a red seven", "a red seven", "the red seven"), strict=True):
        sample = {"question": question, "answer": "a red seven", "generated": "4 x red one", "reference": None}
        point["samples"] = [sample]
    made = record(reference={"folder": "f", "name": "gold"}, reference_missing=None, before=before)
    return {**made, "attacks": [found], "verdict": verdict(before, [found], None)}


def section(audit: dict, folder) -> str:
    shown = page_module._audit(audit, folder, False)
    page = page_module.rendered("report_audit.html.j2", audit=shown, said=headline(fake_pictures()))
    return " ".join(page.split())


def test_sentences_speak_of_prompts_and_one_metric_differs(audit):
    assert asked(audit["before"]) == "prompts" and asked({"answer_probability": {}}) == "examples"
    assert audit["verdict"][0].startswith("Gap to the retrained model on the forgotten prompts before any attack")
    distance, _ = answers(fake_pictures(), audit)
    assert distance.said == "0 of 1 metric differs" and distance.told.startswith("Of the forgotten prompts, beside")


def test_the_page_shows_one_of_two_metrics_that_mirror_each_other_and_says_which(audit, tmp_path):
    text = section(audit, tmp_path)
    assert '<th scope="col">Still drawn</th>' in text and '<th scope="col">UA</th>' not in text
    assert "UA is 1 minus it." in text and "95 % intervals over the prompts (n = 8)." in text
    assert len(attack_figure(audit["attacks"][0], LIGHT).axes) == 1


def test_a_reference_that_only_the_audit_has_was_measured_on_prompts(audit):
    results = {**fake_pictures(), "reference": None}
    count = results["stages"][-1]["groups"]["forget"]["examples"]
    for one in audit["before"]["unlearning_accuracy"].values():
        one["n"] = count
    assert referenced(results, audit)["reference"]["source"] == "the audit, which measured gold on the same prompts"


def test_a_prompt_does_not_stand_in_the_place_of_itself(audit, tmp_path):
    assert "In the place of:</span> a red seven" in section(audit, tmp_path)
    audit["attacks"][0]["points"][-1]["samples"][0]["question"] = "a red seven"
    assert "In the place of" not in section(audit, tmp_path)


def test_a_card_names_the_papers_of_attacks_on_pictures(audit):
    inversion = {**audit["attacks"][0], "attack": "inversion"}
    card = with_audit("# M\n\n## Limits\n\nNone.\n", {**audit, "attacks": [*audit["attacks"], inversion]})
    assert "2506.12618" not in card  # of texts
    assert "relearn, inversion ([arXiv 2308.01508]" in card and "95 % intervals over the prompts." in card


def test_bars_have_no_place_for_a_group_of_which_the_metric_says_nothing():
    results = fake_pictures()
    [axes] = metric_bars(results, "unlearning_accuracy", LIGHT).axes
    assert [label.get_text().splitlines()[0] for label in axes.get_xticklabels()] == ["Forget"]
    assert "Retain" not in describe_bars(results, "unlearning_accuracy")
