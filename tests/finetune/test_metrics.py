# ruff: noqa: RUF001 (text in Chinese)
"""Metrics against scikit-learn, seqeval, sacrebleu and worked examples."""

import importlib.util
import math
import random

import numpy as np
import pytest
import sacrebleu
import seqeval.metrics
import sklearn.metrics
from hypothesis import given, settings
from hypothesis import strategies as st

from leangpt.data.tokenizer import ByteTokenizer
from leangpt.finetune.metrics.answers import (
    exact_match,
    rouge_l,
    rouge_n,
    sacrebleu_scores,
    token_f1,
)
from leangpt.finetune.metrics.labels import LabelTable, confusion_matrix
from leangpt.finetune.metrics.plot import confusion_png
from leangpt.finetune.metrics.ranking import mean_reciprocal_rank, ndcg, rank_of
from leangpt.finetune.metrics.spans import has_prefixes, single_spans, spans_of
from leangpt.finetune.tasks import Translate

LABELS = ["正面", "负面", "neutral"]


def assert_rows_equal(table, expected):
    """Our rows and averages are those of a report of scikit-learn's form."""
    for name, scores in table.to_dict().items():
        if name not in expected:
            continue
        wanted = [expected[name][k] for k in ("precision", "recall", "f1-score", "support")]
        assert list(scores.values()) == pytest.approx(wanted, abs=1e-12), name


def one_label(true, predicted):
    pairs = ([[(label, 0)] for label in labels] for labels in (true, predicted))
    return LabelTable.of_sets(LABELS, *pairs)


@given(st.lists(st.tuples(st.sampled_from(LABELS), st.sampled_from(LABELS)), min_size=1))
@settings(max_examples=60, deadline=None)
def test_one_label_as_scikit_learn(pairs):
    true, predicted = map(list, zip(*pairs, strict=True))
    report = sklearn.metrics.classification_report(
        true, predicted, labels=LABELS, output_dict=True, zero_division=0
    )
    precision, recall, f1, _ = sklearn.metrics.precision_recall_fscore_support(
        true, predicted, labels=LABELS, average="micro", zero_division=0
    )
    micro = {"precision": precision, "recall": recall, "f1-score": f1, "support": len(true)}
    table = one_label(true, predicted)
    assert_rows_equal(table, report | {"micro avg": micro})
    matrix = sklearn.metrics.confusion_matrix(true, predicted, labels=LABELS)
    assert confusion_matrix(LABELS, true, predicted) == matrix.tolist()


@given(st.lists(st.tuples(*[st.sets(st.sampled_from(LABELS))] * 2), min_size=1))
@settings(max_examples=60, deadline=None)
def test_any_number_of_labels_as_scikit_learn(pairs):
    def indicators(sets):
        return np.array([[label in each for label in LABELS] for each in sets]).astype(int)

    true, predicted = zip(*pairs, strict=True)
    report = sklearn.metrics.classification_report(
        indicators(true), indicators(predicted), target_names=LABELS, output_dict=True, zero_division=0
    )  # fmt: skip
    table = LabelTable.of_sets(
        LABELS, *([[(label, 0) for label in each] for each in sets] for sets in (true, predicted))
    )
    assert {"micro avg", "macro avg", "weighted avg"} <= report.keys()
    assert_rows_equal(table, report)


TAGS = ["O", "B-PER", "I-PER", "B-公司", "I-公司", "E-PER", "S-公司"]
SENTENCES = st.lists(
    st.lists(st.tuples(*[st.sampled_from(TAGS)] * 2), min_size=1, max_size=12), min_size=1
)


@given(SENTENCES)
@settings(max_examples=150, deadline=None)
@pytest.mark.filterwarnings("ignore")
def test_spans_as_seqeval(sentences):
    true = [[t for t, _ in sentence] for sentence in sentences]
    predicted = [[p for _, p in sentence] for sentence in sentences]
    for tags in true:
        ours = [(span.label, span.start, span.end - 1) for span in spans_of(tags)]
        assert ours == seqeval.metrics.sequence_labeling.get_entities(tags)
    if not any(spans_of(tags) for tags in true + predicted):
        return  # seqeval has no report of nothing
    report = seqeval.metrics.classification_report(
        true, predicted, output_dict=True, zero_division=0
    )
    labels = sorted({span.label for tags in true + predicted for span in spans_of(tags)})
    sets = (
        [[(s.label, s[1:]) for s in spans_of(tags)] for tags in each] for each in (true, predicted)
    )
    assert set(labels) <= report.keys()
    assert_rows_equal(LabelTable.of_sets(labels, *sets), report)


def test_tags_without_prefixes_are_spans_of_one_word():
    assert has_prefixes(["O", "B-PER", "I-PER"])
    assert not has_prefixes(["O", "keyword", "B-PER"])
    assert single_spans(["name", "O", "name"]) == [("name", 0, 1), ("name", 2, 3)]


def test_table_as_text():
    table = one_label(["正面", "正面", "负面"], ["正面", "负面", "负面"])
    lines = str(table).splitlines()
    assert lines[0].split() == ["precision", "recall", "F1", "support"]
    assert lines[1].split() == ["正面", "1.0000", "0.5000", "0.6667", "2"]
    assert lines[1].startswith("正面" + " " * (12 + 2 - 4))  # each character is two columns wide
    assert lines[4].split() == ["micro", "avg", "0.6667", "0.6667", "0.6667", "3"]
    assert str(LabelTable.of_sets([], [], [])).splitlines()[1].split()[:2] == ["micro", "avg"]


@pytest.mark.parametrize(
    ("answer", "wanted", "f1"),
    [
        ("The Eiffel Tower!", "eiffel tower", 1),
        ("Paris, France", "Paris", 2 / 3),
        ("London", "Paris", 0),
        ("a", "the", 1),  # articles alone: both are empty
        ("don't", "dont", 1),
        ("北京大学", "北京", 2 / 3),
        ("上海，中国。", "上海中国", 1),
        ("", "x", 0),
    ],
)
def test_answers_to_questions(answer, wanted, f1):
    assert token_f1(answer, wanted) == pytest.approx(f1)
    assert exact_match(answer, wanted) == (f1 == 1)


def test_rouge():
    """The examples of the paper: unigrams, bigrams and the longest common subsequence, as F1."""
    wanted = "police killed the gunman"
    assert rouge_n("police kill the gunman", wanted, 1) == 3 / 4
    assert rouge_n("police kill the gunman", wanted, 2) == 1 / 3
    assert rouge_l("police kill the gunman", wanted) == 3 / 4
    assert rouge_l("the gunman kill police", wanted) == 1 / 2
    assert rouge_n("三千四百", "三千五百", 1) == 3 / 4
    assert rouge_n("short", "text of more words", 2) == 0


def test_chrf_and_bleu_are_those_of_sacrebleu():
    draw = random.Random(0)
    words = ["the", "cat", "sat", "on", "a", "mat", "while", "it", "rained", "outside"]
    wanted = [" ".join(draw.choices(words, k=8)) for _ in range(20)]
    answers = [" ".join(draw.choices(words, k=3)) + " " + text[:20] for text in wanted]
    scores = sacrebleu_scores(answers, wanted)
    assert scores["BLEU"] == sacrebleu.corpus_bleu(answers, [wanted]).score > 0
    assert scores["chrF"] == sacrebleu.corpus_chrf(answers, [wanted]).score > 0
    assert "tok:13a" in scores["signatures"]["BLEU"]
    chinese = sacrebleu_scores(["三千四百五十"], ["三千四百五十六"])
    assert (
        chinese["BLEU"]
        == sacrebleu.corpus_bleu(["三千四百五十"], [["三千四百五十六"]], tokenize="zh").score
        > 50
    )


def test_without_sacrebleu_it_is_told_before_the_training(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="pip install leangpt\\[translate\\]"):
        Translate().fit([], ByteTokenizer(), None)


def test_ranking_as_scikit_learn():
    draw = np.random.default_rng(0)
    scores = draw.permuted(np.tile(np.arange(6.0), (40, 1)), axis=1)
    chosen = draw.integers(6, size=40)
    relevance = np.eye(6)[chosen]
    ranks = [rank_of(s, c) for s, c in zip(scores.tolist(), chosen.tolist(), strict=True)]
    for k in (1, 3, 6):
        assert ndcg(ranks, k) == pytest.approx(sklearn.metrics.ndcg_score(relevance, scores, k=k))
    reciprocal = sklearn.metrics.label_ranking_average_precision_score(relevance, scores)
    assert mean_reciprocal_rank(ranks) == pytest.approx(reciprocal)


def test_equal_scores_do_not_help():
    assert rank_of([0.5, 0.5, 0.1], 0) == 2
    assert rank_of([0.5, 0.5, 0.1], 2) == 3
    assert ndcg([2], 1) == 0
    assert ndcg([2], 2) == pytest.approx(1 / math.log2(3))


@pytest.mark.parametrize("labels", [["a", "b"], ["正面", "负面"], [f"label {i}" for i in range(60)]], ids=len)  # fmt: skip
def test_confusion_picture(labels):
    matrix = [[i + j for j in range(len(labels))] for i in range(len(labels))]
    png = confusion_png(labels, matrix)
    assert png.startswith(b"\x89PNG") and len(png) > 5000
