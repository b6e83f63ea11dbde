# ruff: noqa: RUF001 (text in Chinese)
"""Every task from end to end, on data that every machine has: the model that is loaded again beats a stated baseline on rows
that it was not trained on.
"""

import math
from collections import Counter
from itertools import pairwise

import pytest
import torch
from conftest import ROOT
from finetune_data import make_base
from make_data import (
    MODULES,
    STDLIB,
    documented_functions,
    letter_choices,
    letter_questions,
    modules_of_snippets,
    number_translations,
    source_of,
    tagged_lines,
    write_jsonl,
)

from leangpt.finetune import FinetuneConfig, finetune, load_tuned, methods, predict
from leangpt.finetune.metrics.answers import mean, rouge_l, sacrebleu_scores
from leangpt.finetune.metrics.labels import accuracy
from leangpt.finetune.rows import BadRows, read_rows
from leangpt.finetune.tasks import QA, Chat, Classify, Rank, Summarize, Tag, Text, Translate

EXAMPLES = ROOT / "examples" / "finetune"


@pytest.fixture
def run(tmp_path):
    """Split rows, fine-tune a new small model on the first of them, load it; the outcome, the model, and the last rows."""

    def run(task, rows, num_test, kind="bpe", vocab_size=512, model_options=None, **options):
        make_base(tmp_path / "base", rows, kind, vocab_size, **(model_options or {}))
        train, test = rows[:-num_test], rows[-num_test:]
        config = FinetuneConfig(
            task=task,
            method=options.pop("method", methods.create("full")),
            model=str(tmp_path / "base"),
            data=(write_jsonl(tmp_path / "train.jsonl", train),),
            out=tmp_path / "tuned",
            **{"learning_rate": 3e-3, "progress": False, "device": "cpu"} | options,
        )
        return finetune(config), load_tuned(config.out), test

    return run


def majority(answers):
    return Counter(answers).most_common(1)[0][0]


def test_classify(run):
    """Module of a snippet: far above the majority, one in six."""
    rows = modules_of_snippets(MODULES, 100)
    outcome, tuned, test = run(Classify(), rows, num_test=100, epochs=5)
    predictions = predict(tuned, test)
    true = [row["label"] for row in test]
    share = accuracy(true, [p["label"] for p in predictions])
    best = majority(row["label"] for row in rows[:-100])
    assert share > 0.5 > 2 * accuracy(true, [best] * len(true))
    assert all(math.isclose(sum(p["probabilities"].values()), 1, rel_tol=1e-5) for p in predictions)
    assert outcome.report.pictures["confusion_matrix.png"].startswith(b"\x89PNG")
    assert set(outcome.report.metrics["labels"]) == {
        *MODULES, "micro avg", "macro avg", "weighted avg",
    }  # fmt: skip


def test_tag(run):
    """What the tokens of Python are: above the majority, names."""
    rows = tagged_lines("argparse", 700)
    _, tuned, test = run(Tag(), rows, num_test=100, epochs=5)
    predictions = predict(tuned, test)
    true = [tag for row in test for tag in row["tags"]]
    share = accuracy(true, [tag for p in predictions for tag in p["tags"]])
    best = majority(tag for row in rows[:-100] for tag in row["tags"])
    assert share > 0.9 > accuracy(true, [best] * len(true))
    assert all(
        len(p["tags"]) == len(row["words"]) for p, row in zip(predictions, test, strict=True)
    )


@pytest.mark.parametrize("score", ["likelihood", "head"])
def test_rank(run, score):
    """Upper or lower case, as multiple choice: above the most frequent answer."""
    rows = letter_choices(900)
    _, tuned, test = run(Rank(score=score), rows, num_test=100, epochs=6)
    predictions = predict(tuned, test)
    true = [row["chosen"] for row in test]
    best = majority(row["chosen"] for row in rows[:-100])
    share = accuracy(true, [p["best"] for p in predictions])
    assert share > 0.85 > accuracy(true, [best] * len(true))
    for p in predictions:
        assert math.isclose(sum(c["probability"] for c in p["ranking"]), 1)


@pytest.mark.full
def test_rank_names_of_functions(run):
    """By their documentation: above character trigrams of names, which are about as good as chance, one in four.

    Counting which words of a name are in the documentation gives 0.59, which so small a model that has read nothing before does
    not come to in a minute.
    """
    modules = sorted(path.stem for path in STDLIB.glob("*.py") if path.stem[:2] != "__")
    rows = documented_functions(modules, 4)
    options = {"epochs": 4, "dtype": "float32", "model_options": {"max_seq_len": 160}}
    _, tuned, test = run(Rank(), rows, num_test=300, **options)
    names = [row["chosen"] for row in rows[:-300]]
    true = [row["chosen"] for row in test]
    share = accuracy(true, [p["best"] for p in predict(tuned, test)])
    assert share > 0.38 > 0.33 > accuracy(true, likeliest_by_trigrams(names, test))


def likeliest_by_trigrams(names, rows):
    """The candidate whose characters follow each other most as those of `names`, with one added to each count."""
    texts = [f"^^{name}$" for name in names]
    threes = Counter(text[i : i + 3] for text in texts for i in range(len(text) - 2))
    twos = Counter(text[i : i + 2] for text in texts for i in range(len(text) - 2))
    num_kinds = len(set("".join(texts)))

    def score(name):
        text = f"^^{name}$"
        parts = [text[i : i + 3] for i in range(len(text) - 2)]
        probabilities = [(threes[part] + 1) / (twos[part[:2]] + num_kinds) for part in parts]
        return sum(map(math.log, probabilities)) / len(parts)

    return [max(row["candidates"], key=score) for row in rows]


def test_translate(run):
    """Numbers into Chinese: chrF above that of always giving the most frequent translation."""
    rows = number_translations(1500)
    _, tuned, test = run(
        Translate(max_answer_tokens=16),
        rows,
        60,
        "char",
        300,
        {"max_seq_len": 32},
        epochs=6,
        batch_size=32,
    )
    wanted = [row["target"] for row in test]
    answers = [p["answer"] for p in predict(tuned, test)]
    best = majority(row["target"] for row in rows[:-60])
    assert sacrebleu_scores(answers, wanted)["chrF"] > 50
    assert sacrebleu_scores([best] * len(wanted), wanted)["chrF"] < 40


def test_question_answering(run):
    """Upper or lower case: above the most frequent answer."""
    rows = letter_questions(900)
    task = QA(prompt="{question}\n", max_answer_tokens=8)
    outcome, tuned, test = run(task, rows, num_test=100, epochs=5)
    true = [row["answer"] for row in test]
    predictions = predict(tuned, test)
    share = accuracy(true, [p["answer"] for p in predictions])
    best = majority(row["answer"] for row in rows[:-100])
    assert share > 0.85 > accuracy(true, [best] * len(true))
    assert outcome.report.metrics["exact_match"] > 0.85
    assert all(0 < p["probability"] <= 1 for p in predictions)


def test_summarize(run):
    """What a document ends with: ROUGE above that of always saying the most frequent summary."""
    rows = [
        {"document": f"{row['question']}. {row['answer']}.", "summary": row["answer"]}
        for row in letter_questions(900)
    ]
    outcome, tuned, test = run(Summarize(max_answer_tokens=8), rows, num_test=100, epochs=4)
    wanted = [row["summary"] for row in test]
    best = majority(row["summary"] for row in rows[:-100])

    def rouge(answers):
        return mean([rouge_l(answer, each) for answer, each in zip(answers, wanted, strict=True)])

    assert rouge(p["answer"] for p in predict(tuned, test)) > 0.85 > rouge([best] * 100)
    assert outcome.report.metrics["rougeL"] > 0.85


def test_text(run):
    """Sources of Python: perplexity below that of bigrams of the same tokens."""
    lines = source_of("argparse").splitlines()
    rows = [{"text": "\n".join(lines[i : i + 40])} for i in range(0, len(lines), 40)]
    outcome, tuned, test = run(Text(), rows, num_test=6, epochs=12)
    encoded = [[256, *tuned.tokenizer.encode(row["text"])] for row in rows]
    perplexity = bigram_perplexity(encoded[:-6], encoded[-6:], tuned.tokenizer.vocab_size)
    nats = -sum(p["logprob"] for p in predict(tuned, test))
    num_tokens = sum(p["tokens"] for p in predict(tuned, test))
    assert math.exp(nats / num_tokens) < perplexity
    assert outcome.report.metrics["bits_per_byte"] < 4


def bigram_perplexity(train, test, vocab_size):
    """Of bigrams, with one added to each count of a pair."""
    pairs = Counter(pair for text in train for pair in pairwise(text))
    firsts = Counter(token for text in train for token in text[:-1])
    tested = [pair for text in test for pair in pairwise(text)]
    nats = [-math.log((pairs[a, b] + 1) / (firsts[a] + vocab_size)) for a, b in tested]
    return math.exp(sum(nats) / len(nats))


def test_chat_in_chinese(run):
    """Customer service: perplexity of answers far below that of characters by their frequency; it answers in a conversation."""
    rows = [row.values for row in read_rows(EXAMPLES / "dialogues.jsonl", BadRows())]
    _, tuned, test = run(
        Chat(), rows, 4, "char", 800, {"max_seq_len": 160}, epochs=25, batch_size=4
    )
    answers = [[m["content"] for m in row["messages"] if m["role"] == "assistant"] for row in rows]
    counts = Counter("".join(a for each in answers[:-4] for a in each))
    total, kinds = counts.total(), len(counts) + 1
    text = "".join(a for each in answers[-4:] for a in each)
    unigram = math.exp(-sum(math.log((counts[c] + 1) / (total + kinds)) for c in text) / len(text))
    report = tuned.report([tuned.task.parse(row) for row in test])
    assert report.metrics["perplexity"] < unigram / 4
    [answer] = predict(tuned, [{"messages": [{"role": "user", "content": "请问怎么申请退货？"}]}])
    assert answer["answer"].startswith("您好，请在订单页面") and 0 < answer["probability"] <= 1
    assert tuned.generator.chat([{"role": "user", "content": "你好"}]).text


def test_sentiment_in_chinese(run):
    """Headlines of finance: above the majority, one in three."""
    rows = [row.values for row in read_rows(EXAMPLES / "headlines.csv", BadRows())]
    _, tuned, test = run(
        Classify(), rows, 15, "char", 700, {"max_seq_len": 64}, epochs=20, batch_size=8
    )
    share = accuracy([row["label"] for row in test], [p["label"] for p in predict(tuned, test)])
    assert share > 0.7


def test_classify_any_number_of_labels(run):
    """Letters in a word: above the most frequent set of labels."""
    draw = torch.Generator().manual_seed(0)
    rows = []
    for _ in range(600):
        text = "".join("abcxyz"[i] for i in torch.randint(6, (5,), generator=draw).tolist())
        rows.append({"text": text, "label": sorted(set(text) & set("abc"))})
    _, tuned, test = run(Classify(multi_label=True), rows, 100, "byte", 257, epochs=8)
    predictions = predict(tuned, test)
    exact = accuracy([row["label"] for row in test], [p["labels"] for p in predictions])
    best = list(majority(tuple(row["label"]) for row in rows))
    assert exact > 0.9 > accuracy([row["label"] for row in test], [best] * 100)
