"""How near each method comes to full fine-tuning."""

import pytest
from finetune_data import make_base
from make_data import source_of, tagged_lines, write_jsonl

from leangpt.finetune import FinetuneConfig, finetune, load_tuned, methods, predict
from leangpt.finetune.metrics.labels import accuracy
from leangpt.finetune.tasks import Tag, Text

# how much less accurate than full fine-tuning a method may be here
DISTANCES = {"lora": 0.04, "adalora": 0.04, "prefix": 0.04, "adapter": 0.1, "head": 0.06}


@pytest.fixture
def base(tmp_path):
    """A model that has read some Python, as much as it can in seconds."""
    lines = [line for name in ("typing", "inspect") for line in source_of(name).splitlines()]
    rows = [{"text": "\n".join(lines[i : i + 20])} for i in range(0, len(lines), 20)]
    make_base(tmp_path / "new", rows, "bpe", 512)
    config = FinetuneConfig(
        task=Text(),
        method=methods.create("full"),
        model=str(tmp_path / "new"),
        data=(write_jsonl(tmp_path / "texts.jsonl", rows),),
        out=tmp_path / "base",
        learning_rate=3e-3,
        max_steps=70,
        device="cpu",
        progress=False,
    )
    return finetune(config).out


def test_each_method_is_near_full_fine_tuning(base, tmp_path):
    """What the tokens of another module are, at the default learning rates, after as many steps each."""
    rows = tagged_lines("argparse", 700)
    train, test = rows[:500], rows[500:]
    data = write_jsonl(tmp_path / "rows.jsonl", train)

    def accuracy_of(name):
        config = FinetuneConfig(
            task=Tag(),
            method=methods.create(name),
            model=str(base),
            data=(data,),
            out=tmp_path / name,
            max_steps=100,
            device="cpu",
            progress=False,
        )
        predictions = predict(load_tuned(finetune(config).out), test)
        true = [tag for row in test for tag in row["tags"]]
        return accuracy(true, [tag for p in predictions for tag in p["tags"]])

    full = accuracy_of("full")
    behind = {name: full - accuracy_of(name) for name in DISTANCES}
    assert full > 0.95 and all(behind[name] < DISTANCES[name] for name in DISTANCES), behind
