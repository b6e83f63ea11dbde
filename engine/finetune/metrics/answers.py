"""How close generated answers are to the wanted ones: exact match and token F1, ROUGE, chrF and BLEU.

Words are runs of letters and digits; each Chinese or Japanese character is a word of its own, since these scripts have no
spaces. Exact match and F1 are those of SQuAD (https://arxiv.org/abs/1606.05250), whose words are what spaces leave after case,
punctuation and English articles are gone. ROUGE (https://aclanthology.org/W04-1013) is the F1 of common n-grams, and for L of the longest common subsequence.
chrF and BLEU are sacrebleu's.
"""

import importlib.util
import re
import string
from collections import Counter
from collections.abc import Sequence
from typing import Any

# a character of a script without spaces (kana, CJK ideographs and their extensions), or a run of other letters and digits
_SPACELESS = r"\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U000323af"
_WORD = re.compile(rf"[{_SPACELESS}]|[^\W_{_SPACELESS}]+")
_PUNCTUATION = re.compile(
    rf"[{re.escape(string.punctuation)}\u3000-\u303f\uff01-\uff0f\uff1a-\uff20]"
)
_ARTICLES = frozenset(("a", "an", "the"))


def words(text: str) -> list[str]:
    return _WORD.findall(text.lower())


def _answer_words(text: str) -> list[str]:
    bare = re.sub(f"([{_SPACELESS}])", r" \1 ", _PUNCTUATION.sub("", text.lower()))
    return [word for word in bare.split() if word not in _ARTICLES]


def exact_match(answer: str, wanted: str) -> float:
    """1 where both have the same words, else 0."""
    return float(_answer_words(answer) == _answer_words(wanted))


def token_f1(answer: str, wanted: str) -> float:
    """F1 of the words that both have."""
    return _f1(Counter(_answer_words(answer)), Counter(_answer_words(wanted)))


def rouge_n(answer: str, wanted: str, n: int) -> float:
    return _f1(_ngrams(words(answer), n), _ngrams(words(wanted), n))


def rouge_l(answer: str, wanted: str) -> float:
    a, b = words(answer), words(wanted)
    common = _longest_common_subsequence(a, b)
    return 2 * common / (len(a) + len(b)) if common else 0.0


def mean(values: Sequence[float]) -> float:
    return sum(values) / max(1, len(values))


def need_sacrebleu() -> None:
    """Raise ValueError where sacrebleu is not installed."""
    if importlib.util.find_spec("sacrebleu") is None:
        raise ValueError("chrF and BLEU need sacrebleu: pip install leangpt[translate]")


def sacrebleu_scores(answers: Sequence[str], wanted: Sequence[str]) -> dict[str, Any]:
    """chrF and BLEU of a corpus, from 0 to 100, with sacrebleu's signatures; BLEU counts Chinese by character."""
    from sacrebleu.metrics import BLEU, CHRF

    is_spaceless = any(re.search(f"[{_SPACELESS}]", text) for text in wanted)
    bleu, chrf = BLEU(tokenize="zh" if is_spaceless else "13a"), CHRF()
    scores = {"chrF": chrf.corpus_score(answers, [wanted]).score}
    scores["BLEU"] = bleu.corpus_score(answers, [wanted]).score
    signatures = {"chrF": str(chrf.get_signature()), "BLEU": str(bleu.get_signature())}
    return scores | {"signatures": signatures}


def _ngrams(tokens: Sequence[str], n: int) -> Counter[Any]:
    return Counter(tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1))


def _f1(a: Counter[Any], b: Counter[Any]) -> float:
    common = (a & b).total()
    return 2 * common / (a.total() + b.total()) if common else float(not a and not b)


def _longest_common_subsequence(a: Sequence[str], b: Sequence[str]) -> int:
    lengths = [0] * (len(b) + 1)
    for word in a:
        diagonal = 0
        for j, other in enumerate(b, 1):
            above = lengths[j]
            lengths[j] = diagonal + 1 if word == other else max(above, lengths[j - 1])
            diagonal = above
    return lengths[-1]
