"""The metrics as classes for the `evaluate` library. They work without the Hub and know nothing of runs.

`evaluate.load(NAME)` downloads code; these are imported instead and then used in the same way: `add_batch`
and `compute`, also from several processes.
"""

from collections.abc import Iterable, Iterator

import evaluate
from datasets import Features, List, Value

from hf_clmul.evaluation import membership, metrics
from hf_clmul.evaluation.estimates import auc

_LOGPS = List(Value("float64"))
_IDS = List(Value("int64"))
_TEXTS = Features({"predictions": Value("string"), "references": Value("string")})


class _OfflineMetric(evaluate.Metric):
    """The mean of one metric over examples. `features` names the columns that `compute` takes."""

    key: str
    columns: Features
    citation = ""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=self.__doc__ or "",
            citation=self.citation,
            features=self.columns,
            module_name=self.key,
        )


class AnswerProbability(_OfflineMetric):
    """Probability per token of the answers.

    `predictions`: for each example the log-probabilities (nats) of its answer's tokens.
    """

    key = "answer_probability"
    columns = Features({"predictions": _LOGPS})

    def _compute(self, predictions: list[list[float]]) -> dict[str, float | None]:
        return {self.key: metrics.mean_of(metrics.answer_probability({"logps": p}) for p in predictions)}


class TruthRatio(_OfflineMetric):
    """Truth ratio: min(r, 1/r) for `group="forget"`, else max(0, 1 - r).

    `paraphrase_logps`: for each example the log-probabilities (nats) of its paraphrased answer's tokens;
    `perturbed_logps`: the same for each of its wrong answers.
    """

    key = "truth_ratio"
    citation = "Maini et al., TOFU, arXiv 2401.06121"
    columns = Features({"paraphrase_logps": _LOGPS, "perturbed_logps": List(_LOGPS)})

    def _compute(
        self,
        paraphrase_logps: list[list[float]],
        perturbed_logps: list[list[list[float]]],
        group: str = "retain",
    ) -> dict[str, float | None]:
        ratio = metrics.forget_truth_ratio if group == "forget" else metrics.kept_truth_ratio
        rows = (
            {"paraphrase_logps": paraphrase, "perturbed_logps": wrong}
            for paraphrase, wrong in zip(paraphrase_logps, perturbed_logps, strict=True)
        )
        return {self.key: metrics.mean_of(map(ratio, rows))}


class ExtractionStrength(_OfflineMetric):
    """Extraction strength.

    `predictions`: for each example the teacher-forced argmax token ids at its answer's positions;
    `references`: the label ids there. The last one, the end of sequence, is dropped.
    """

    key = "extraction_strength"
    citation = "Carlini et al., arXiv 2012.07805"
    columns = Features({"predictions": _IDS, "references": _IDS})

    def _compute(self, predictions: list[list[int]], references: list[list[int]]) -> dict[str, float | None]:
        return {self.key: metrics.mean_of(map(metrics.extraction_strength, _hits(predictions, references)))}


class ExactMemorization(_OfflineMetric):
    """Exact memorization. `predictions` and `references` as for ExtractionStrength."""

    key = "exact_memorization"
    citation = "Tirumala et al., arXiv 2205.10770"
    columns = Features({"predictions": _IDS, "references": _IDS})

    def _compute(self, predictions: list[list[int]], references: list[list[int]]) -> dict[str, float | None]:
        return {self.key: metrics.mean_of(map(metrics.exact_memorization, _hits(predictions, references)))}


class RougeLRecall(_OfflineMetric):
    """ROUGE-L recall with stemming. `predictions`: the generated texts; `references`: the answers."""

    key = "rouge_l_recall"
    citation = "Lin, ROUGE: a package for automatic evaluation of summaries, 2004"
    columns = _TEXTS

    def _compute(self, predictions: list[str], references: list[str]) -> dict[str, float | None]:
        return {self.key: metrics.mean_of(map(metrics.rouge_l_recall, _answers(predictions, references)))}


class RougeLF1(_OfflineMetric):
    """ROUGE-L F1 with stemming. `predictions`: the generated texts; `references`: the answers."""

    key = "rouge_l_f1"
    citation = RougeLRecall.citation
    columns = _TEXTS

    def _compute(self, predictions: list[str], references: list[str]) -> dict[str, float | None]:
        return {self.key: metrics.mean_of(map(metrics.rouge_l_f1, _answers(predictions, references)))}


class MinK(_OfflineMetric):
    """Mean over examples of the min-k score: of the lowest share `k` of an answer's token log-probabilities, the mean
    (nats).

    `predictions`: for each example the log-probabilities of its answer's tokens; the last one, the end of sequence, is
    dropped. For membership inference see MembershipAuc.
    """

    key = "min_k"
    citation = "Shi et al., arXiv 2310.16789"
    columns = Features({"predictions": _LOGPS})

    def _compute(self, predictions: list[list[float]], k: float = membership.K) -> dict[str, float | None]:
        return {self.key: metrics.mean_of(membership.min_k_score({"logps": p}, k) for p in predictions)}


class MinKPlusPlus(_OfflineMetric):
    """As MinK, each token's log-probability first standardised over the vocabulary.

    `means` and `deviations`: mean and standard deviation of log p under p, at the same positions as `predictions`.
    """

    key = "min_k_plus_plus"
    citation = "Zhang et al., arXiv 2404.02936"
    columns = Features({"predictions": _LOGPS, "means": _LOGPS, "deviations": _LOGPS})

    def _compute(
        self,
        predictions: list[list[float]],
        means: list[list[float]],
        deviations: list[list[float]],
        k: float = membership.K,
    ) -> dict[str, float | None]:
        rows = (
            {"logps": logps, "token_means": mean, "token_deviations": deviation}
            for logps, mean, deviation in zip(predictions, means, deviations, strict=True)
        )
        return {self.key: metrics.mean_of(membership.min_k_plus_plus_score(row, k) for row in rows)}


class ZlibScore(_OfflineMetric):
    """Mean over examples of the mean log-probability over the bytes of the zlib-compressed answer (nats a byte).

    `predictions`: for each example the log-probabilities of its answer's tokens; `references`: the answers.
    """

    key = "zlib"
    citation = "Carlini et al., arXiv 2012.07805"
    columns = Features({"predictions": _LOGPS, "references": Value("string")})

    def _compute(self, predictions: list[list[float]], references: list[str]) -> dict[str, float | None]:
        rows = ({"logps": p, "answer": answer} for p, answer in zip(predictions, references, strict=True))
        return {self.key: metrics.mean_of(map(membership.zlib_score, rows))}


class MembershipAuc(_OfflineMetric):
    """AUC of a membership attack, ties counted half. Compare it with the same AUC of a retrained model, not with 0.5.

    `predictions`: a score for each example, larger for what looks like training data; `references`: 1 for members (the
    forgotten examples), 0 for examples that were never trained on. Raises ValueError without either.
    """

    key = "membership_auc"
    columns = Features({"predictions": Value("float64"), "references": Value("int64")})

    def _compute(self, predictions: list[float], references: list[int]) -> dict[str, float | None]:
        sides = ([s for s, label in zip(predictions, references, strict=True) if bool(label) is member]
                 for member in (True, False))  # fmt: skip
        return {self.key: auc(*sides)}


def _hits(predictions: Iterable[list[int]], references: Iterable[list[int]]) -> Iterator[metrics.Row]:
    for tokens, labels in zip(predictions, references, strict=True):
        yield {"hits": [token == label for token, label in zip(tokens, labels, strict=True)]}


def _answers(predictions: Iterable[str], references: Iterable[str]) -> Iterator[metrics.Row]:
    for answer, generated in zip(references, predictions, strict=True):
        yield {"answer": answer, "generated": generated}
