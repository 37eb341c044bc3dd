"""Metrics: hand-computed values, published values of TOFU, and the rows that tend to break metrics."""

import math
import subprocess
import sys
import zlib

import numpy as np
import pytest

from hf_clmul.evaluation import metrics

LOG2 = math.log(2)
INF = math.inf


def row(**changes):
    """p(answer) = 1/4, p(paraphrase) = 1/2, p(wrong) = 1/4 and 1/16: r = 1/8 : 1/2 = 1/4."""
    return {
        "logps": [-LOG2, -3 * LOG2],
        "hits": [True, False, True, True, True],
        "paraphrase_logps": [-LOG2],
        "perturbed_logps": [[-2 * LOG2, -2 * LOG2], [-4 * LOG2]],
        "generated": "The small cats sat",
        "answer": "A small cat sat here",
    } | changes


def test_probability_is_the_geometric_mean_over_tokens():
    assert metrics.answer_probability(row()) == pytest.approx(1 / 4, rel=1e-12)
    assert metrics.paraphrase_probability(row()) == pytest.approx(1 / 2, rel=1e-12)


def test_an_impossible_token_makes_the_answer_impossible():
    assert metrics.answer_probability(row(logps=[-0.1, -INF])) == 0.0
    assert metrics.paraphrase_probability(row(paraphrase_logps=[-INF])) == 0.0


def test_normalised_probability():
    # 1/4 : (1/4 + 1/4 + 1/16) = 4/9
    assert metrics.normalised_probability(row()) == pytest.approx(4 / 9, rel=1e-12)
    assert metrics.normalised_probability(row(logps=[-INF])) == 0.0
    assert metrics.normalised_probability(row(perturbed_logps=None)) is None
    # exp(-1000) alone would be 0 / 0.
    far = row(logps=[-1000.0], perturbed_logps=[[-1000.0 - LOG2]])
    assert metrics.normalised_probability(far) == pytest.approx(2 / 3, rel=1e-12)
    assert metrics.normalised_probability(row(logps=[-INF], perturbed_logps=[[-INF], [-INF]])) == 1 / 3


def test_truth_ratio_and_its_two_aggregates():
    assert metrics.truth_ratio(row()) == pytest.approx(1 / 4, rel=1e-12)
    assert metrics.forget_truth_ratio(row()) == pytest.approx(1 / 4, rel=1e-12)
    assert metrics.kept_truth_ratio(row()) == pytest.approx(3 / 4, rel=1e-12)
    # The wrong answers are twice as probable as the truth: r = 2.
    fooled = row(paraphrase_logps=[-4 * LOG2])
    assert metrics.truth_ratio(fooled) == pytest.approx(2, rel=1e-12)
    assert metrics.forget_truth_ratio(fooled) == pytest.approx(1 / 2, rel=1e-12)
    assert metrics.kept_truth_ratio(fooled) == 0.0


@pytest.mark.parametrize(
    ("paraphrase", "wrong", "ratio", "forget", "kept"),
    [
        ([-INF], [[-1.0]], INF, 0.0, 0.0),
        ([-1.0], [[-INF], [-1.0]], 0.0, 0.0, 1.0),
        ([-INF], [[-INF]], 1.0, 1.0, 0.0),
        ([-2000.0], [[-1.0]], INF, 0.0, 0.0),
    ],
)
def test_truth_ratio_of_impossible_answers(paraphrase, wrong, ratio, forget, kept):
    extreme = row(paraphrase_logps=paraphrase, perturbed_logps=wrong)
    assert metrics.truth_ratio(extreme) == ratio
    assert metrics.forget_truth_ratio(extreme) == forget
    assert metrics.kept_truth_ratio(extreme) == kept


@pytest.mark.parametrize("missing", ["paraphrase_logps", "perturbed_logps"])
def test_truth_ratio_needs_paraphrase_and_wrong_answers(missing):
    without = row(**{missing: None})
    assert metrics.truth_ratio(without) is None
    assert metrics.forget_truth_ratio(without) is None
    assert metrics.kept_truth_ratio(without) is None


@pytest.mark.parametrize(
    ("hits", "strength", "exact"),
    [
        ([1, 0, 1, 1, 1], 1 / 2, 3 / 4),  # T = 4; right from token 2 on
        ([1, 1, 1, 1, 0], 1.0, 1.0),  # only the end of sequence is missed, and that is dropped
        ([1, 1, 1, 0, 1], 0.0, 3 / 4),
        ([0, 0, 0, 0, 0], 0.0, 0.0),
        ([1, 1], 1.0, 1.0),  # an answer of one token
        ([0, 1], 0.0, 0.0),
        ([1], None, None),  # nothing but the end of sequence
    ],
)
def test_extraction_strength_and_exact_memorization(hits, strength, exact):
    assert metrics.extraction_strength(row(hits=[bool(h) for h in hits])) == strength
    assert metrics.exact_memorization(row(hits=[bool(h) for h in hits])) == exact


def test_rouge_l_recall_counts_stemmed_words_in_order():
    # small, cat(s), sat of the answer's five words
    assert metrics.rouge_l_recall(row()) == pytest.approx(3 / 5, rel=1e-12)
    # The longest common subsequence of a reversed answer is one word.
    assert metrics.rouge_l_recall(row(answer="one two six", generated="six two one")) == pytest.approx(1 / 3)


def test_rouge_l_f1_counts_what_was_said_too_much():
    # recall 3/5, precision 3/4
    assert metrics.rouge_l_f1(row()) == pytest.approx(2 * 3 / (5 + 4), rel=1e-12)
    long = row(answer="one two", generated="one two three four five six")
    assert (metrics.rouge_l_recall(long), metrics.rouge_l_f1(long)) == (1.0, pytest.approx(2 * 2 / (2 + 6), rel=1e-12))


@pytest.mark.parametrize("rouge", [metrics.rouge_l_recall, metrics.rouge_l_f1])
def test_rouge_l_of_an_empty_generation_is_zero(rouge):
    assert rouge(row(generated="")) == 0.0


@pytest.mark.parametrize("rouge", [metrics.rouge_l_recall, metrics.rouge_l_f1])
def test_rouge_l_says_nothing_about_a_script_it_cannot_read(rouge):
    assert rouge(row(answer="東京です", generated="東京です")) is None


@pytest.mark.parametrize(
    ("generated", "expected"),
    [
        ("", 0.0),
        ("Lisbon", 1.0),
        ("a b c d", 1.0),
        ("a b a b a", 2 / 4),
        ("no " * 101, 1 / 100),
        (":" * 24, 1 / 23),
        ("a" * 101, 1 / 100),
        ("Well, well.", 1.0),  # well - comma, comma - well, well - full stop
    ],
)
def test_fluency_is_the_share_of_distinct_word_pairs(generated, expected):
    assert metrics.fluency(row(generated=generated)) == pytest.approx(expected, rel=1e-12)


def test_forget_quality_of_small_samples():
    # Two samples of three that do not overlap: 2 of the C(6, 3) = 20 orderings are as extreme.
    assert metrics.forget_quality([0.1, 0.2, 0.3], [0.7, 0.8, 0.9]) == pytest.approx(2 / 20, rel=1e-9)
    assert metrics.forget_quality([0.1, 0.2, 0.3], [0.1, 0.2, 0.3]) == 1.0


@pytest.mark.parametrize(("model", "reference"), [([], [1.0]), ([1.0], []), ([math.nan], [1.0])])
def test_forget_quality_refuses_what_is_no_sample(model, reference):
    with pytest.raises(ValueError, match="forget quality needs numbers"):
        metrics.forget_quality(model, reference)


def test_model_utility_is_the_harmonic_mean():
    assert metrics.model_utility([1.0, 0.5]) == pytest.approx(2 / 3, rel=1e-12)
    assert metrics.model_utility([1.0, 0.0, 1.0]) == 0.0


@pytest.mark.parametrize("values", [[], [0.5, -0.1], [math.nan]])
def test_model_utility_refuses_other_values(values):
    with pytest.raises(ValueError, match="non-negative"):
        metrics.model_utility(values)


def test_aggregate_is_the_mean_over_rows():
    rows = [row(), row(logps=[0.0], paraphrase_logps=[-4 * LOG2], hits=[True, True], generated="")]
    assert metrics.aggregate(rows, "retain") == pytest.approx(
        {
            "answer_probability": (1 / 4 + 1) / 2,
            "rouge_l_recall": (3 / 5 + 0) / 2,
            "paraphrase_probability": (1 / 2 + 1 / 16) / 2,
            "truth_ratio": (3 / 4 + 0) / 2,
            "extraction_strength": (1 / 2 + 1) / 2,
            "exact_memorization": (3 / 4 + 1) / 2,
            "fluency": (1 + 0) / 2,
        },
        rel=1e-12,
    )
    assert metrics.aggregate(rows, "forget")["truth_ratio"] == pytest.approx((1 / 4 + 1 / 2) / 2, rel=1e-12)


def test_aggregate_leaves_out_rows_without_data():
    bare = row(paraphrase_logps=None, perturbed_logps=None, hits=[True])
    both = metrics.aggregate([row(), bare], "forget")
    assert both["paraphrase_probability"] == pytest.approx(1 / 2, rel=1e-12)
    assert both["truth_ratio"] == pytest.approx(1 / 4, rel=1e-12)
    assert both["extraction_strength"] == pytest.approx(1 / 2, rel=1e-12)
    alone = metrics.aggregate([bare], "forget")
    missing = {name for name, value in alone.items() if value is None}
    assert missing == {"paraphrase_probability", "truth_ratio", "extraction_strength", "exact_memorization"}
    assert set(metrics.aggregate([], "retain").values()) == {None}


@pytest.mark.parametrize(
    ("function", "column"),
    [
        (metrics.answer_probability, "logps"),
        (metrics.paraphrase_probability, "paraphrase_logps"),
        (metrics.truth_ratio, "perturbed_logps"),
    ],
)
def test_an_empty_list_is_an_error_and_not_a_number(function, column):
    with pytest.raises(ValueError, match=f"'{column}' is empty"):
        function(row(**{column: []}))


# The file's aggregates were computed from the per-example values as they stand in it, so that rounding them
# to six decimals does not matter; what is left is the order of summation in double precision.
GOLDEN = {"rel": 1e-9}
GENERAL_KNOWLEDGE = ("real_authors", "world_facts")


def golden_rows(group):
    columns = zip(group["nll_answer"], group["nll_paraphrased"], group["nll_perturbed"], strict=True)
    return [
        row(logps=[-answer], paraphrase_logps=[-paraphrase], perturbed_logps=[[-w] for w in wrong])
        for answer, paraphrase, wrong in columns
    ]


@pytest.mark.parametrize("model", ["full", "retrained"])
def test_published_tofu_aggregates(tofu_golden, model):
    nine = []
    for name, group in tofu_golden[model].items():
        rows, expected = golden_rows(group), tofu_golden["expected"][model][name]
        found = metrics.aggregate(rows, name)
        if name in GENERAL_KNOWLEDGE:
            found["answer_probability"] = metrics.mean_of(map(metrics.normalised_probability, rows))
        assert found["answer_probability"] == pytest.approx(expected["probability"], **GOLDEN)
        assert found["truth_ratio"] == pytest.approx(expected["truth_ratio"], **GOLDEN)
        rouge = metrics.mean_of(group["rougeL_recall"])
        assert rouge == pytest.approx(expected["rougeL_recall"], **GOLDEN)
        if name != "forget":
            nine += [found["answer_probability"], rouge, found["truth_ratio"]]
    assert metrics.model_utility(nine) == pytest.approx(tofu_golden["expected"][model]["model_utility"], **GOLDEN)


def test_published_tofu_forget_quality(tofu_golden):
    full, retrained = (
        [metrics.truth_ratio(r) for r in golden_rows(tofu_golden[model]["forget"])] for model in ("full", "retrained")
    )
    # A p-value this small comes out of a long sum in scipy; 1e-6 leaves room for another of its releases.
    expected = tofu_golden["expected"]["forget_quality_full_vs_retrained"]
    assert metrics.forget_quality(full, retrained) == pytest.approx(expected, rel=1e-6)
    assert metrics.forget_quality(retrained, retrained) == 1.0


def test_the_module_imports_numpy_and_nothing_else_that_is_heavy():
    code = (
        "import sys, hf_clmul.evaluation.metrics;"
        "print(sorted({'numpy', 'torch', 'scipy', 'rouge_score', 'nltk', 'evaluate'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "['numpy']"


def test_metrics_accept_numpy_rows():
    found = metrics.aggregate([row(logps=np.array([-LOG2]), hits=np.array([True, True, True]))], "retain")
    assert found["answer_probability"] == pytest.approx(1 / 2, rel=1e-12)
    assert (found["extraction_strength"], found["exact_memorization"]) == (1.0, 1.0)


class TestEvaluateLibrary:
    """The same values through `evaluate.Metric`."""

    @pytest.fixture
    def hf(self, tmp_path):
        from hf_clmul.evaluation import hf_metrics

        return lambda name: vars(hf_metrics)[name](cache_dir=str(tmp_path))

    def test_answer_probability(self, hf):
        found = hf("AnswerProbability").compute(predictions=[[-LOG2, -3 * LOG2], [0.0], [-INF]])
        assert found == {"answer_probability": pytest.approx((1 / 4 + 1 + 0) / 3, rel=1e-12)}

    def test_batches_add_up(self, hf):
        metric = hf("AnswerProbability")
        metric.add_batch(predictions=[[-LOG2]])
        metric.add_batch(predictions=[[-2 * LOG2], [0.0]])
        assert metric.compute() == {"answer_probability": pytest.approx((1 / 2 + 1 / 4 + 1) / 3, rel=1e-12)}

    @pytest.mark.parametrize(("group", "expected"), [("forget", 1 / 4), ("retain", 3 / 4)])
    def test_truth_ratio(self, hf, group, expected):
        columns = {name: [row()[name]] for name in ("paraphrase_logps", "perturbed_logps")}
        found = hf("TruthRatio").compute(**columns, group=group)
        assert found == {"truth_ratio": pytest.approx(expected, rel=1e-12)}

    def test_extraction_strength(self, hf):
        found = hf("ExtractionStrength").compute(
            predictions=[[5, 6, 7, 8, 2], [5, 9]], references=[[5, 1, 7, 8, 0], [5, 0]]
        )
        assert found == {"extraction_strength": (1 / 2 + 1) / 2}

    def test_rouge_l_recall(self, hf):
        found = hf("RougeLRecall").compute(predictions=[row()["generated"], ""], references=[row()["answer"], "a"])
        assert found == {"rouge_l_recall": pytest.approx(3 / 5 / 2, rel=1e-12)}

    def test_rouge_l_f1(self, hf):
        found = hf("RougeLF1").compute(predictions=[row()["generated"], ""], references=[row()["answer"], "a"])
        assert found == {"rouge_l_f1": pytest.approx(6 / 9 / 2, rel=1e-12)}

    def test_exact_memorization(self, hf):
        found = hf("ExactMemorization").compute(
            predictions=[[5, 6, 7, 8, 2], [5, 9], [3]], references=[[5, 1, 7, 8, 0], [5, 0], [3]]
        )
        assert found == {"exact_memorization": (3 / 4 + 1) / 2}

    @pytest.mark.parametrize(("options", "expected"), [({}, (-4 - 2.5) / 2), ({"k": 0.7}, (-3.5 - 2.5) / 2)])
    def test_min_k(self, hf, options, expected):
        logps = [[-1.0, -4.0, -3.0, -9.0], [-2.5, 0.0], [-1.0]]  # the last has only its end of sequence
        assert hf("MinK").compute(predictions=logps, **options) == {"min_k": pytest.approx(expected, rel=1e-12)}

    def test_min_k_plus_plus(self, hf):
        found = hf("MinKPlusPlus").compute(
            predictions=[[-1.0, -4.0, -3.0, -9.0]], means=[[-1.0, -3.0, 1.0, 0.0]], deviations=[[1.0, 0.25, 2.0, 1.0]]
        )
        assert found == {"min_k_plus_plus": pytest.approx(-4, rel=1e-12)}  # of 0, -4 and -2

    def test_zlib(self, hf):
        found = hf("ZlibScore").compute(predictions=[[-1.0, -3.0], [0.0]], references=["Ada " * 9, "b"])
        size = len(zlib.compress(b"Ada Ada Ada Ada Ada Ada Ada Ada Ada "))
        assert found == {"zlib": pytest.approx(-2 / size / 2, rel=1e-12)} and size < 36

    def test_membership_auc(self, hf):
        metric = hf("MembershipAuc")
        metric.add_batch(predictions=[3.0, 1.0], references=[1, 0])
        metric.add_batch(predictions=[2.0, 2.0, 1.0], references=[0, 1, 1])
        assert metric.compute() == {"membership_auc": pytest.approx((2 + 1.5 + 0.5) / 6, rel=1e-12)}

    def test_importing_and_using_it_opens_no_connection(self, tmp_path):
        code = (
            "import socket\n"
            "def refuse(*a, **k): raise AssertionError('a connection was opened')\n"
            "socket.socket.connect = socket.create_connection = socket.getaddrinfo = refuse\n"
            "from hf_clmul.evaluation.hf_metrics import RougeLRecall\n"
            f"metric = RougeLRecall(cache_dir={str(tmp_path)!r})\n"
            "print(metric.compute(predictions=['a b'], references=['a c']))\n"
        )
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        assert done.stdout.strip() == "{'rouge_l_recall': 0.5}", done.stderr
