"""The tables at the end of an audit, as a terminal of 80 columns shows them."""

import io

import pytest
from fake_audit import estimate, fake_audit
from rich.console import Console

from hf_clmul.console_audit import own_table, print_audit


def lines(text):
    return [line.rstrip() for line in text.splitlines() if line.strip()]


def printed(record):
    console = Console(width=80, record=True, file=io.StringIO())
    print_audit(record, console)
    return console.export_text()


def with_samples(record):
    """Its last attack draws samples, and measures nothing that others do."""
    found = {
        "leak_share": {"run": estimate(0.25), "reference": estimate(0.0029), "gap": estimate(0.2471)},
        "leak_bound": {"run": estimate(0.5), "reference": None, "gap": None},
    }
    if record["reference"] is None:
        found["leak_share"] |= {"reference": None, "gap": None}
    points = [{"label": "32 samples", "x": None, "metrics": found, "samples": []}]
    record["attacks"].append({**record["attacks"][0], "attack": "sample", "points": points})
    return record


WHOLE = """\
quickstart: does it come back?
                        answer      ROUGE-L
 attack            probability       recall
 ──────────────────────────────────────────
 before attacks      0.12/0.11    0.33/0.30
 relearn
   0 steps           0.12/0.11    0.33/0.30
   5 steps           0.41/0.11    0.55/0.30
   10 steps          0.73/0.11    0.81/0.30
   20 steps         0.91*/0.11   0.95*/0.30
 quantize
   unchanged         0.12/0.11    0.33/0.30
   int8              0.12/0.11    0.33/0.30
   nf4              0.21*/0.11    0.36/0.30
run / reference under the same attack; *
came back: the intervals are apart
measured by one attack alone
  attack   metric                               after          run   reference
 ──────────────────────────────────────────────────────────────────────────────
  sample   share of leaks                       32 samples   0.250       0.003
           upper bound on the probability of    32 samples   0.500           –
           a leak
- Relearning opens the gap to the reference from 0.009 to 0.800.
"""

ALONE = """\
quickstart: does it come back?
                        answer      ROUGE-L
 attack            probability       recall
 ──────────────────────────────────────────
 before attacks           0.12         0.33
 relearn
   0 steps                0.12         0.33
   5 steps                0.41         0.55
   10 steps               0.73         0.81
   20 steps              0.91*        0.95*
 quantize
   unchanged              0.12         0.33
   int8                   0.12         0.33
   nf4                   0.21*         0.36
* rose: the intervals are apart
measured by one attack alone
  attack   metric                                     after          run
 ────────────────────────────────────────────────────────────────────────
  sample   share of leaks                             32 samples   0.250
           upper bound on the probability of a leak   32 samples   0.500
- Relearning opens the gap to the reference from 0.009 to 0.800.
"""


@pytest.mark.parametrize(("reference", "expected"), [(True, WHOLE), (False, ALONE)])
def test_what_one_attack_measures_alone_is_no_row_of_dashes(reference, expected):
    assert lines(printed(with_samples(fake_audit(reference)))) == lines(expected)


def test_without_such_metrics_there_is_no_second_table():
    assert own_table(fake_audit()) is None


def test_of_layers_the_one_furthest_from_the_reference_is_told():
    record = fake_audit()
    layers = [
        {"label": f"layer {i}", "x": i, "samples": [],
         "metrics": {"lens_hits": {"run": estimate(run), "reference": estimate(0.1), "gap": estimate(abs(run - 0.1))}}}
        for i, run in enumerate((0.1, 0.7, 0.2))
    ]  # fmt: skip
    record["attacks"] = [{**record["attacks"][0], "attack": "logit_lens", "points": layers}]
    cells = [list(column.cells) for column in own_table(record).columns]
    assert [str(of_column[0]) for of_column in cells] == [
        "logit_lens",
        "right tokens inside",
        "layer 1",
        "0.700",
        "0.100",
    ]


def test_names_are_no_markup():
    record = fake_audit() | {"name": "[/b]x"}
    record["attacks"][0]["points"][1]["label"] = "[bold]5 steps"
    text = printed(record)
    assert "[/b]x: does it come back?" in text and "[bold]5 steps" in " ".join(text.split())
