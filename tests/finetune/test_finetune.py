"""The whole of a fine-tuning: what is counted and reported, replay, several processes, saved models, zero-shot, the commands."""

import json
import signal
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from finetune_data import make_base
from make_data import write_jsonl
from safetensors.torch import load_file

from leangpt import Generator, SamplingParams
from leangpt.cli import main
from leangpt.finetune import FinetuneConfig, finetune, load_tuned, methods, predict, trainer
from leangpt.finetune.dataset import ExampleStream
from leangpt.finetune.tasks import QA, Chat, Classify, Rank, Tag, Text, task_from_dict
from leangpt.finetune.zero_shot import ZeroShot

ROWS = [
    {"text": f"{word} {i}", "label": label}
    for i in range(12)
    for word, label in (("涨 up", "正"), ("跌 down", "负"), ("会 meet", "中"))
]


@pytest.fixture
def base(tmp_path):
    make_base(tmp_path / "base", ROWS, "char", 300, n_layer=1, n_embd=16, n_head=2, max_seq_len=32)
    return tmp_path / "base"


@pytest.fixture
def config(tmp_path, base):
    return FinetuneConfig(
        task=Classify(),
        method=methods.create("full"),
        model=str(base),
        data=(write_jsonl(tmp_path / "rows.jsonl", ROWS),),
        out=tmp_path / "tuned",
        max_steps=3,
        batch_size=6,
        device="cpu",
        dtype="float32",
        progress=False,
    )


SAMPLES = {
    "text": (Text(), [{"text": "你好"}]),
    "chat": (Chat(), [{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}]),
    "qa": (QA(prompt="{q}\n", max_answer_tokens=4), [{"q": "a", "answer": "b"}]),
    "classify": (Classify(), [{"text": "a", "label": "正"}, {"text": "b", "label": "负"}]),
    "labels": (Classify(multi_label=True), [{"text": "a", "label": "x|y"}, {"text": "b", "label": ""}]),
    "tag": (Tag(), [{"words": ["a", "b"], "tags": ["O", "B-X"]}]),
    "rank": (Rank(prompt="{q}:"), [{"q": "a", "candidates": ["b", "c"], "chosen": "c"}]),
    "rank head": (Rank(prompt="{q}:", score="head"), [{"q": "a", "candidates": ["b", "c"], "chosen": 0}]),
}  # fmt: skip


@pytest.mark.parametrize("method", ["full", "lora", "prefix", "adapter"])
@pytest.mark.parametrize("name", SAMPLES)
def test_a_saved_model_predicts_as_the_trained_one(config, tmp_path, name, method):
    """It carries task, labels, template, tokenizer and head; an adapter finds its base."""
    task, rows = SAMPLES[name]
    data = write_jsonl(tmp_path / "few.jsonl", rows * 4)
    chosen = methods.create(method)
    outcome = finetune(replace(config, task=task, method=chosen, data=(data,), max_steps=8))
    tuned = load_tuned(outcome.out)
    assert type(tuned.task) is type(task)
    again = tuned.report([tuned.task.parse(row) for row in rows])
    stored = json.loads((outcome.out / "report.json").read_text())
    assert stored["metrics"].keys() == again.metrics.keys()
    assert predict(tuned, rows) == predict(load_tuned(outcome.out), rows)
    assert (outcome.out / "model.safetensors").exists() == (method == "full")
    assert (outcome.out / "adapter.safetensors").exists() == (method != "full")
    loaded = load_tuned(outcome.out)
    sample = loaded.task.encode_all(loaded.task.parse(rows[0]), loaded.tokenizer, loaded.max_len)
    assert loaded.mean_loss(sample * 2) == pytest.approx(tuned.mean_loss(sample))


def test_validation_of_the_saved_model_is_what_was_reported(config, tmp_path):
    val = write_jsonl(tmp_path / "val.jsonl", ROWS[:9])
    outcome = finetune(replace(config, val_data=(val,), max_steps=12))
    tuned = load_tuned(outcome.out)
    examples = [tuned.task.encode(tuned.task.parse(row), tuned.tokenizer, 32) for row in ROWS[:9]]
    assert tuned.mean_loss(examples) == pytest.approx(outcome.val_loss, rel=1e-5)


def test_every_task_is_restored_from_its_fields():
    for task, _ in SAMPLES.values():
        assert task_from_dict(json.loads(json.dumps(task.to_dict()))) == task
    with pytest.raises(ValueError, match="task must be one of text, chat, qa"):
        task_from_dict({"name": "sing"})
    with pytest.raises(ValueError, match="unknown option colour"):
        task_from_dict({"name": "tag", "colour": 1})


def test_what_is_wrong_with_the_data_is_counted(config, tmp_path):
    rows = [*ROWS, {"text": "no label"}, {"text": "长" * 99, "label": "中"}]
    data = write_jsonl(tmp_path / "mixed.jsonl", rows)
    val = write_jsonl(tmp_path / "val.jsonl", [*ROWS[:2], {"text": "new", "label": "正"}])
    config = replace(config, data=(data,), val_data=(val,))
    with pytest.raises(ValueError, match=r"mixed\.jsonl:37: no field 'label', only 'text'"):
        finetune(config)
    outcome = finetune(replace(config, skip_bad_rows=True))
    assert outcome.data == {
        "train_rows": 37,
        "val_rows": 3,
        "skipped_rows": 1,
        "cut_examples": 1,
        "split_rows": 0,
        "duplicates": 2,
    }
    assert "37 to train, 3 to validate, 1 skipped, 1 cut, 0 in several parts, 2 in both" in str(
        outcome
    )


def test_messages_name_places(config, tmp_path, capsys):
    val = write_jsonl(tmp_path / "val.jsonl", ROWS[:1])
    data = write_jsonl(tmp_path / "bad.jsonl", [*ROWS, {}])
    finetune(replace(config, data=(data,), val_data=(val,), skip_bad_rows=True, progress=True))
    text = capsys.readouterr().err
    assert f"skipped {data}:37: no field 'label'" in text
    assert f"1 of 1 validation rows are in the training data too ({val}:1 as {data}:1)" in text


def test_a_label_of_validation_alone(config, tmp_path):
    val = write_jsonl(tmp_path / "val.jsonl", [{"text": "x", "label": "新"}])
    with pytest.raises(ValueError, match=r"val\.jsonl:1: label 新 is not among those"):
        finetune(replace(config, val_data=(val,)))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data": ()}, "data must name at least one file"),
        ({"max_len": 33}, r"max_len \(33\) must not exceed the model's max_seq_len \(32\)"),
        ({"micro_batch_size": 4}, r"micro_batch_size \(4\) must divide"),
        ({"task": Text(), "method": methods.create("head")}, "head trains nothing for text"),
    ],
    ids=str,
)
def test_options_that_do_not_fit(config, changes, message):
    with pytest.raises(ValueError, match=message):
        finetune(replace(config, **changes))
    assert not config.out.exists()


@pytest.mark.parametrize(
    "changes",
    [
        {"merge": True, "method": methods.create("prefix")},
        {"replay": "x"},
        {"replay": "x:1.5"},
        {"epochs": 0},
        {"val_fraction": 1},
        {"batch_size": 0},
        {"learning_rate": 0.0},
    ],
    ids=str,
)
def test_options_that_are_wrong(config, changes):
    with pytest.raises(ValueError, match=next(iter(changes))):
        replace(config, **changes)


def test_wider_models_train_more_slowly(config, tmp_path):
    """All weights of them; what is added to a model is tuned by itself."""
    full, lora = methods.create("full"), methods.create("lora")
    assert full.default_learning_rate(16) == full.default_learning_rate(128)
    assert full.default_learning_rate(768) == pytest.approx(full.default_learning_rate(128) / 6)
    assert lora.default_learning_rate(768) == lora.default_learning_rate(128)
    for rate in (None, 0.125):
        out = tmp_path / f"rate {rate}"
        finetune(replace(config, learning_rate=rate, max_steps=1, out=out))
        stored = json.loads((out / "task.json").read_text())["training"]["learning_rate"]
        assert stored == (rate or full.default_learning_rate(16))


def test_what_is_there_is_not_lost(config, tmp_path):
    finetune(config)
    with pytest.raises(FileExistsError, match="holds a tuned model; .* --overwrite"):
        finetune(config)
    (config.out / "mine.txt").write_text("x")
    finetune(replace(config, overwrite=True, max_steps=1))
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.txt").write_text("x")
    with pytest.raises(FileExistsError, match="is not a tuned model"):
        finetune(replace(config, out=tmp_path / "other", overwrite=True))


def test_an_adapter_needs_its_base(config, tmp_path, base):
    finetune(replace(config, method=methods.create("lora", rank=2)))
    base.rename(tmp_path / "moved")
    with pytest.raises(FileNotFoundError, match="base"):
        load_tuned(config.out)
    assert predict(load_tuned(config.out, tmp_path / "moved"), ROWS[:1])
    make_base(tmp_path / "else", [*ROWS, {"text": "other"}], "char", 300, n_embd=16, max_seq_len=32)
    with pytest.raises(ValueError, match="another base model"):
        load_tuned(config.out, tmp_path / "else")


def test_an_adapter_alone_is_not_taken_for_a_model(config):
    finetune(replace(config, method=methods.create("lora", rank=2)))
    with pytest.raises(FileNotFoundError, match="beside a base model, not a model: .* --merge"):
        Generator.from_pretrained(str(config.out))


def test_a_merged_model_is_a_plain_one(config, tmp_path):
    config = replace(config, task=Text(), method=methods.create("lora"), max_steps=6)
    adapted = load_tuned(finetune(config).out)
    merged = load_tuned(finetune(replace(config, out=tmp_path / "merged", merge=True)).out)
    assert (tmp_path / "merged" / "model.safetensors").exists()
    [a], [b] = predict(adapted, [{"text": "涨 up"}]), predict(merged, [{"text": "涨 up"}])
    assert a["logprob"] == pytest.approx(b["logprob"], rel=1e-5)
    assert Generator.from_pretrained(str(tmp_path / "merged")).generate(
        "涨", SamplingParams(max_new_tokens=4)
    )


def test_damaged_models(config, tmp_path):
    with pytest.raises(FileNotFoundError, match="there is no tuned model here"):
        load_tuned(tmp_path)
    finetune(config)
    head = config.out / "head.safetensors"
    head.write_bytes(head.read_bytes()[:-40])
    with pytest.raises(ValueError, match=r"head\.safetensors: damaged"):
        load_tuned(config.out)
    (config.out / "task.json").write_text('{"format_version": 9}')
    with pytest.raises(ValueError, match="must be a tuned model of format version 1"):
        load_tuned(config.out)


def test_a_loss_that_is_not_finite_ends_it(config):
    with pytest.raises(ValueError, match="the loss of step \\d+ is (nan|inf): .* below 1e\\+30"):
        finetune(replace(config, learning_rate=1e30, warmup_fraction=0, grad_clip=0))
    assert not config.out.exists()


def test_ctrl_c_ends_it_after_the_step_and_keeps_what_was_learnt(config, monkeypatch):
    seed_step = trainer.seed_step

    def interrupt_and_seed(seed, step, group):
        if step == 1:
            signal.raise_signal(signal.SIGINT)
        seed_step(seed, step, group)

    monkeypatch.setattr(trainer, "seed_step", interrupt_and_seed)
    outcome = finetune(replace(config, max_steps=50))
    assert outcome.is_interrupted and outcome.steps == 2
    assert predict(load_tuned(config.out), ROWS[:1])


def test_replayed_rows_have_their_share():
    stream = ExampleStream(list("abc"), list("XY"), 0.25, seed=0)
    drawn = [stream[n] for n in range(48)]
    assert sum(letter.isupper() for letter in drawn) == 12
    assert all(
        drawn[i : i + 4].count("X") + drawn[i : i + 4].count("Y") == 1 for i in range(0, 48, 4)
    )
    own = [letter for letter in drawn if letter.islower()]
    assert all(sorted(own[i : i + 3]) == ["a", "b", "c"] for i in range(0, 36, 3))  # epochs
    assert stream.batch(2, 8, 1, 2) == drawn[17:24:2]


def test_replay_forgets_less(config, tmp_path):
    """Earlier data with labels of its own: its loss is reported, and is lower with replay than without."""
    earlier = [{"text": f"早 {i} {'x' * (i % 3)}", "label": "早"} for i in range(30)]
    file = write_jsonl(tmp_path / "earlier.jsonl", earlier)
    outcome = finetune(
        replace(config, replay=f"{file}:0.5", max_steps=60, batch_size=8, learning_rate=1e-2)
    )
    assert outcome.forgetting["loss_after"] < outcome.forgetting["loss_before"] / 2
    assert "earlier data     loss" in str(outcome)
    assert load_tuned(config.out).task.labels == ("中", "早", "正", "负")


def test_two_processes_train_as_one(config, tmp_path):
    """Rows of different lengths, so that the processes have different numbers of targets."""
    rows = [{"text": "ab" * (1 + i % 7)} for i in range(24)]
    data = write_jsonl(tmp_path / "texts.jsonl", rows)
    options = [
        *("finetune", "text", "--model", config.model, "--data", str(data), "--max-steps", "4"),
        *("--batch-size", "4", "--dtype", "float32", "--device", "cpu", "--no-progress"),
    ]
    assert main([*options, "--out", str(tmp_path / "one")]) == 0
    torchrun = [sys.executable, "-P", "-m", "torch.distributed.run", "--standalone"]
    subprocess.run(
        [*torchrun, "--nproc-per-node", "2", "-m", "leangpt", *options, "--out", str(tmp_path / "two")],
        check=True,
        timeout=300,
        capture_output=True,
    )  # fmt: skip
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "two"))
    for name, tensor in one.items():
        torch.testing.assert_close(two[name], tensor, rtol=1e-4, atol=1e-6)


class TestZeroShot:
    def generator(self, tmp_path):
        rows = [{"text": f"{row['text']}\n{row['label']}"} for row in ROWS]
        make_base(tmp_path / "plain", rows, "char", 300, max_seq_len=64)
        data = write_jsonl(tmp_path / "plain.jsonl", rows)
        config = FinetuneConfig(
            Text(), methods.create("full"), str(tmp_path / "plain"), (data,), tmp_path / "lm",
            epochs=40, learning_rate=3e-3, progress=False, device="cpu",
        )  # fmt: skip
        return load_tuned(finetune(config).out).generator

    def test_a_language_model_classifies_and_ranks(self, tmp_path):
        generator = self.generator(tmp_path)
        labels = ("正", "负", "中")
        shots = write_jsonl(tmp_path / "shots.jsonl", ROWS[:40])
        for file in (None, shots):
            zero_shot = ZeroShot.create("classify", generator, labels, file)
            predictions = predict(zero_shot, ROWS[:6])
            if file is None:
                assert [p["label"] for p in predictions] == [row["label"] for row in ROWS[:6]]
                assert sum(predictions[0]["probabilities"].values()) == pytest.approx(1)
            context = zero_shot._context(zero_shot.task.parse(ROWS[0]), labels)
            assert len(generator.tokenizer.encode(context)) < 64  # only the shots that fit
            assert context.count("\n\n") == (0 if file is None else 4)
        choices = [
            {"context": r["text"], "candidates": labels, "chosen": r["label"]} for r in ROWS[:6]
        ]
        choices = json.loads(json.dumps(choices))
        ranker = ZeroShot.create("rank", generator)
        assert [p["best"] for p in predict(ranker, choices)] == [r["label"] for r in ROWS[:6]]
        report = ranker.report([ranker.task.parse(row) for row in choices])
        assert report.metrics["accuracy"] == 1

    def test_wrong_options(self):
        for task, labels, prompt, message in (
            ("classify", ("a",), None, "labels must name two or more, got a"),
            ("rank", ("a", "b"), None, "leave out the labels"),
            ("classify", ("a", "b"), "x", "prompt must have the one field {text}, got 'x'"),
        ):
            with pytest.raises(ValueError, match=message):
                ZeroShot.create(task, None, labels, None, prompt)


class TestCommands:
    def test_finetune_and_predict(self, config, tmp_path, capsys, monkeypatch):
        options = [
            "--model",
            config.model,
            "--out",
            str(config.out),
            "--device",
            "cpu",
            "--no-progress",
        ]
        table = tmp_path / "rows.csv"
        table.write_text("satz,art\n" + "".join(f"{r['text']},{r['label']}\n" for r in ROWS))
        command = ["finetune", "classify", "--data", str(table), "--method", "lora", "--rank", "2"]
        fields = ["--text-field", "satz", "--label-field", "art", "--class-weights", "balanced"]
        assert main([*command, *options, *fields, "--max-steps", "2"]) == 0
        out = capsys.readouterr().out
        assert "weighted avg" in out and f"model            {config.out}" in out
        assert json.loads((config.out / "adapter.json").read_text())["options"]["rank"] == 2

        assert main(["predict", str(table), "--model", str(config.out)]) == 0
        rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
        assert [row["satz"] for row in rows] == [row["text"] for row in ROWS]
        assert all(row["label"] in row["probabilities"] for row in rows)

        lines = tmp_path / "lines.txt"
        lines.write_text("涨 up 3\n\n跌 down 3\n")
        with lines.open() as stdin:
            monkeypatch.setattr(sys, "stdin", stdin)
            assert main(["predict", "--model", str(config.out)]) == 0
        assert [json.loads(line)["satz"] for line in capsys.readouterr().out.splitlines()] == [
            "涨 up 3",
            "跌 down 3",
        ]
        assert (
            main(
                ["predict", str(table), "--model", str(config.out), "--report", "--format", "int8"]
            )
            == 0
        )
        assert "accuracy" in capsys.readouterr().out

    def test_zero_shot(self, config, capsys, tmp_path):
        labels = ["--labels", "正", "负"]
        command = ["predict", str(config.data[0]), "--model", config.model, "--task", "classify"]
        assert main([*command, *labels]) == 0
        row = json.loads(capsys.readouterr().out.splitlines()[0])
        assert set(row["probabilities"]) == {"正", "负"}

    def test_chat(self, config, tmp_path, capsys, monkeypatch):
        task, rows = SAMPLES["chat"]
        data = write_jsonl(tmp_path / "chat.jsonl", rows * 4)
        finetune(replace(config, task=task, data=(data,)))
        prompts = iter(["你好", "再说一遍", "long " * 30])
        monkeypatch.setattr("builtins.input", lambda _: next(prompts, None) or _end())
        assert (
            main(["chat", "--model", str(config.out), "--max-new-tokens", "4", "--seed", "1"]) == 0
        )
        out, err = capsys.readouterr()
        assert len(out.splitlines()) >= 3 and "do not fit" in err
        assert main(["chat", "--model", config.model]) == 1
        assert "has no chat template" in capsys.readouterr().err

    @pytest.mark.parametrize(
        ("argv", "message"),
        [
            (["finetune", "sing"], "there is no task 'sing'"),
            (["finetune", "tag", "--method", "magic"], "method must be one of full, lora"),
            (["finetune", "tag", "--model", "x"], "data must name at least one file"),
            (["predict", "--model", "nowhere"], "there is no tuned model here"),
            (["predict", "--labels", "a"], "are options of --task"),
        ],
        ids=str,
    )
    def test_mistakes(self, argv, message, capsys):
        assert main(argv) == 1
        assert message in capsys.readouterr().err

    def test_help(self, capsys):
        with pytest.raises(SystemExit, match="2"):
            main(["finetune"])
        assert "chat, qa, translate" in capsys.readouterr().out
        with pytest.raises(SystemExit, match="0"):
            main(["finetune", "rank", "--method", "lora", "--help"])
        text = capsys.readouterr().out
        assert "--candidates-field" in text and "--rank-stabilized" in text and "--replay" in text


def _end():
    raise EOFError
