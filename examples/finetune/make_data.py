"""Data for fine-tuning that every machine has: Python's standard library, Unicode, and numbers.

    python examples/finetune/make_data.py data/finetune

writes a file for each task; dialogues.jsonl and headlines.csv beside this script are written by hand.
"""

import ast
import io
import json
import keyword
import random
import sys
import sysconfig
import tokenize
import unicodedata
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

Row = dict[str, Any]
MODULES = ("argparse", "_pydecimal", "tarfile", "typing", "inspect", "turtle")
STDLIB = Path(sysconfig.get_path("stdlib"))


def source_of(module: str) -> str:
    return (STDLIB / f"{module}.py").read_text(encoding="utf-8")


def modules_of_snippets(
    modules: Sequence[str], rows_each: int, lines: int = 6, seed: int = 0
) -> list[Row]:
    """Which module a snippet is from."""
    draw = random.Random(seed)
    rows = []
    for module in modules:
        text = source_of(module).splitlines()
        snippets = ["\n".join(text[i : i + lines]) for i in range(0, len(text) - lines, lines)]
        long = [snippet for snippet in snippets if len(snippet) > 120]
        rows += [{"text": s, "label": module} for s in draw.sample(long, rows_each)]
    draw.shuffle(rows)
    return rows


def tagged_lines(module: str, count: int) -> list[Row]:
    """Lines of Python and what each of their tokens is."""
    names = {
        tokenize.STRING: "string",
        tokenize.NUMBER: "number",
        tokenize.OP: "operator",
        tokenize.COMMENT: "comment",
    }
    rows: list[Row] = [{"words": [], "tags": []}]
    for token in tokenize.generate_tokens(io.StringIO(source_of(module)).readline):
        if token.type in (tokenize.NEWLINE, tokenize.NL) and rows[-1]["words"]:
            rows.append({"words": [], "tags": []})
        is_word = token.type in names or token.type == tokenize.NAME
        if is_word and "\n" not in token.string:
            name = "keyword" if keyword.iskeyword(token.string) else "name"
            rows[-1]["words"].append(token.string)
            rows[-1]["tags"].append(names.get(token.type, name))
    return [row for row in rows if row["words"]][:count]


def documented_functions(modules: Iterable[str], num_candidates: int, seed: int = 0) -> list[Row]:
    """First lines of docstrings; among some names of functions, the one that it documents."""
    draw = random.Random(seed)
    found = {}
    for module in modules:
        for node in ast.walk(ast.parse(source_of(module))):
            if isinstance(node, ast.FunctionDef) and not node.name.startswith("_"):
                first = (ast.get_docstring(node) or "").partition("\n")[0]
                if len(first) > 20:
                    found[first] = node.name
    names = sorted(set(found.values()))
    rows = []
    for first, name in found.items():
        others = [other for other in draw.sample(names, num_candidates) if other != name]
        candidates = [name, *others[: num_candidates - 1]]
        draw.shuffle(candidates)
        rows.append({"context": first, "candidates": candidates, "chosen": name})
    draw.shuffle(rows)
    return rows


def summarized_functions(count: int, lines: int = 8, seed: int = 0) -> list[Row]:
    """How functions begin, without their docstrings; the docstring's first line sums them up."""
    found = {}
    for path in sorted(STDLIB.glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef) and len(node.body) > 1:
                first = (ast.get_docstring(node) or "").partition("\n")[0]
                if first.endswith("."):
                    node.body = node.body[1:]
                    found["\n".join(ast.unparse(node).splitlines()[:lines])] = first
    rows = [{"document": document, "summary": summary} for document, summary in found.items()]
    return random.Random(seed).sample(rows, count)


def letter_questions(count: int, seed: int = 0) -> list[Row]:
    """Is a letter, told by its Unicode name, an upper or a lower case one?"""
    answers = {"Lu": "upper case", "Ll": "lower case", "Lo": "neither"}
    rows = []
    for code in range(0x250, 0x2FFF):
        name = unicodedata.name(chr(code), "")
        answer = answers.get(unicodedata.category(chr(code)))
        if name and answer:
            rows.append({"question": name.lower().replace("capital", "big"), "answer": answer})
    return random.Random(seed).sample(rows, count)


def letter_choices(count: int, seed: int = 0) -> list[Row]:
    """`letter_questions` as multiple choice."""
    draw = random.Random(seed)
    rows = letter_questions(count, seed)
    answers = sorted({row["answer"] for row in rows})
    return [
        {
            "context": row["question"],
            "candidates": draw.sample(answers, len(answers)),
            "chosen": row["answer"],
        }
        for row in rows
    ]


def chinese_number(n: int) -> str:
    """A number below 10000 in Chinese: 3050 is 三千零五十."""
    digits, units = "零一二三四五六七八九", ("", "十", "百", "千")
    text = ""
    for power in range(3, -1, -1):
        digit = n // 10**power % 10
        if digit:
            text += digits[digit] + units[power]
        elif text and n % 10**power and not text.endswith("零"):
            text += "零"
    return text.removeprefix("一") if 10 <= n < 20 else text or "零"


def number_translations(count: int, seed: int = 0) -> list[Row]:
    numbers = random.Random(seed).sample(range(1000, 10000), count)
    return [{"source": str(n), "target": chinese_number(n)} for n in numbers]


def write_jsonl(path: Path, rows: Iterable[Row]) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), "utf-8")
    return path


def write_conll(path: Path, rows: Iterable[Row]) -> Path:
    sentences = (
        "".join(f"{word}\t{tag}\n" for word, tag in zip(row["words"], row["tags"], strict=True))
        for row in rows
    )
    path.write_text("\n".join(sentences), "utf-8")
    return path


def main(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    lines = source_of("argparse").splitlines()
    documents = [{"text": "\n".join(lines[i : i + 40])} for i in range(0, len(lines), 40)]
    write_jsonl(folder / "text.jsonl", documents)
    write_jsonl(folder / "classify.jsonl", modules_of_snippets(MODULES, 300))
    write_conll(folder / "tag.conll", tagged_lines("argparse", 1200))
    write_jsonl(folder / "rank.jsonl", documented_functions(MODULES, 4))
    write_jsonl(folder / "qa.jsonl", letter_questions(2000))
    write_jsonl(folder / "summarize.jsonl", summarized_functions(1500))
    write_jsonl(folder / "translate.jsonl", number_translations(3000))
    print(f"wrote {', '.join(sorted(path.name for path in folder.iterdir()))} to {folder}")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
