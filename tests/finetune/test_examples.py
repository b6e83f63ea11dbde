# ruff: noqa: RUF001 (text in Chinese)
"""What the model reads of a sample: targets, padding, what is cut, and how losses add up."""

import itertools
import json
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from leangpt import GPT, GPTConfig
from leangpt.data.tokenizer import ByteTokenizer, CharTokenizer, train_tokenizer
from leangpt.decoding.choice import decoder_of
from leangpt.finetune import Tuned, methods
from leangpt.finetune.decoder import hidden_of_candidates, hidden_states
from leangpt.finetune.modules import (
    Classifier,
    HeadRanker,
    LanguageModule,
    LikelihoodRanker,
    Tagger,
)
from leangpt.finetune.padding import IGNORED, PADDING, align_left, pad
from leangpt.finetune.tasks import QA, Chat, Classify, Rank, Tag, Text, Translate
from leangpt.finetune.tasks.base import balanced_weights
from leangpt.finetune.templates import encode_prompt, fields_of, fill
from leangpt.generation.generator import Generator
from leangpt.training.distributed import Group
from leangpt.training.loop import accumulate_gradients

BYTES = ByteTokenizer()
EOS = BYTES.eos_id
CHARS = CharTokenizer.train(["北京大学在中关村，你好客服退货订单号是一二三四"], 320)


def tiny(**options):
    torch.manual_seed(3)
    shape = {"vocab_size": 257, "n_layer": 2, "n_head": 2, "n_embd": 16, "max_seq_len": 96}
    return GPT(GPTConfig(**shape | options)).double()


@pytest.fixture(params=["learned", "rotary"])
def model(request):
    return tiny(position=request.param)


def modules_of(model):
    """Every module with tokens and targets of a batch of three rows of different lengths."""
    draw = torch.Generator().manual_seed(1)
    lengths = (5, 9, 3)
    rows = [torch.randint(256, (n,), generator=draw).tolist() for n in lengths]
    tokens = pad(rows, PADDING)
    tags = torch.randint(4, tokens.shape, generator=draw).masked_fill(tokens == PADDING, IGNORED)
    tags[0, 2] = IGNORED
    labels = torch.tensor([1, 0, 2])
    choice = torch.stack([tokens, tokens.flip(0), tokens.roll(1, 0)])  # (3, 1 + 2, T)
    chosen = torch.tensor([0, 1, 1])
    weights = torch.tensor([0.5, 2.0, 1.0], dtype=torch.float64)
    return {
        "language": (LanguageModule(model), tokens, tokens.masked_fill(tokens < 0, IGNORED)),
        "classifier": (Classifier(model, 3, False, weights), tokens, labels),
        "labels": (Classifier(model, 3, True, weights), tokens, torch.eye(3, dtype=torch.long)),
        "tagger": (Tagger(model, 4, None), tokens, tags),
        "head": (HeadRanker(model), choice, chosen),
        "likelihood": (LikelihoodRanker(model), choice, chosen),
    }


KINDS = ("language", "classifier", "labels", "tagger", "head", "likelihood")


def padded(tokens, targets, left, right):
    """More padding on both sides; targets of tokens move with them."""
    sides = (left, right)
    more = torch.nn.functional.pad(tokens, sides, value=PADDING)
    if targets.shape == tokens.shape:
        targets = torch.nn.functional.pad(targets, sides, value=IGNORED)
    return more, targets


@pytest.mark.parametrize("kind", KINDS)
def test_padding_never_changes_a_result(model, kind):
    """Any side, any amount, and rows alone: the same loss and the same gradients, but for the order of sums."""
    module, tokens, targets = modules_of(model)[kind]

    def result(tokens, targets):
        module.zero_grad()
        loss = module(tokens, targets, "sum")
        loss.backward()
        grads = [p.grad.clone() for p in module.parameters() if p.grad is not None]
        return [loss.detach(), *grads]

    expected = result(tokens, targets)
    for left, right in ((0, 4), (4, 0), (3, 2), (17, 9)):
        for a, b in zip(result(*padded(tokens, targets, left, right)), expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)
    alone = [module(t[None], y[None], "sum") for t, y in zip(tokens, targets, strict=True)]
    torch.testing.assert_close(sum(alone).detach(), expected[0], rtol=1e-10, atol=1e-12)


@given(st.lists(st.lists(st.sampled_from([PADDING, 1, 2, 3]), min_size=6, max_size=6), min_size=1))
@settings(max_examples=40, deadline=None)
def test_align_left(rows):
    tokens = torch.tensor(rows)
    moved, same = align_left(tokens, tokens)
    assert torch.equal(moved, same)
    for row, after in zip(rows, moved.tolist(), strict=True):
        real = [t for t in row if t != PADDING]
        assert after == real + [PADDING] * (6 - len(real))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("micro_batch_size", [1, 2])
def test_passes_add_up_to_the_mean_over_all_targets(kind, micro_batch_size):
    """Rows with few targets weigh as little in passes of their own as in the whole batch."""
    module, tokens, targets = modules_of(tiny())[kind]
    gradients = []
    for size in (3, micro_batch_size):
        module.zero_grad()
        loss, num_targets = accumulate_gradients(
            module, tokens, targets, size, Group(torch.device("cpu")), torch.autocast("cpu", enabled=False)
        )  # fmt: skip
        gradients.append([p.grad.clone() for p in module.parameters() if p.grad is not None])
    assert num_targets == int((targets != IGNORED).sum())
    assert loss == pytest.approx(module(tokens, targets, "sum").item() / num_targets)
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


def test_a_classifier_reads_the_last_real_token(model):
    module, tokens, _ = modules_of(model)["classifier"]
    probabilities = module.probabilities(module.last_hidden(tokens))
    for row, length in enumerate((5, 9, 3)):
        hidden = model.hidden(tokens[row : row + 1, :length])[0, -1]
        expected = (hidden @ module.head.weight.T + module.head.bias).softmax(-1)
        torch.testing.assert_close(probabilities[row], expected)


def test_the_decode_engine_gives_the_same_hidden_states(model):
    """Texts of different lengths in small batches, without padding; candidates behind a context that is run once."""
    model.float()
    decoder = decoder_of(model)
    texts = [[*b"one"], [*b"twenty-two"], [*b"x"]]
    alone = [model.hidden(torch.tensor([text]))[0] for text in texts]
    everywhere = hidden_states(decoder, texts, batch_size=2)
    last = hidden_states(decoder, texts, batch_size=2, last=True)
    for a, b, expected in zip(everywhere, last, alone, strict=True):
        torch.testing.assert_close(torch.from_numpy(a), expected, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(torch.from_numpy(b), expected[-1:], rtol=1e-4, atol=1e-5)
    behind = hidden_of_candidates(decoder, [*b"context"], texts, batch_size=2)
    for a, text in zip(behind, texts, strict=True):
        expected = model.hidden(torch.tensor([[*b"context", *text]]))[0, -1:]
        torch.testing.assert_close(torch.from_numpy(a), expected, rtol=1e-4, atol=1e-5)


def test_a_likelihood_is_that_of_the_generator(model):
    module = LikelihoodRanker(model.float())
    task = Rank(prompt="{context}:")
    sample = task.parse({"context": "one", "candidates": ["two", "three four", "5"], "chosen": 2})
    tokens, targets = task.collate([task.encode(sample, BYTES, 64)])
    assert targets.tolist() == [2]
    ranked = Generator(model, BYTES).rank("one:", [[*c.encode(), EOS] for c in sample.candidates])
    expected = [r.mean_logprob for r in sorted(ranked, key=lambda r: r.index)]
    assert module.candidate_scores(tokens)[0].tolist() == pytest.approx(expected, rel=1e-4)


def test_candidates_of_different_number():
    task = Rank()
    rows = [
        {"context": "a", "candidates": ["b", "c"], "chosen": "c"},
        {"context": "long context", "candidates": ["d", "e", "ff"], "chosen": 0},
    ]
    examples = [task.encode(task.parse(row), BYTES, 64) for row in rows]
    tokens, targets = task.collate(examples)
    assert tokens.shape == (2, 4, len("long context\n")) and targets.tolist() == [1, 0]
    for module in (HeadRanker(tiny()), LikelihoodRanker(tiny())):
        scores = module.candidate_scores(tokens)
        assert scores.isinf().tolist() == [[False, False, True], [False] * 3]
        assert module(tokens, targets, "sum").isfinite()


def test_balanced_weights_are_those_of_scikit_learn():
    from sklearn.utils.class_weight import compute_class_weight

    labels = [0, 0, 0, 0, 1, 2, 2]
    expected = compute_class_weight("balanced", classes=np.arange(3), y=labels)
    weights = balanced_weights(Counter(labels), 4)
    assert weights[:3].tolist() == pytest.approx(expected.tolist()) and weights[3] == 0


class TestText:
    def test_every_token_is_predicted_once(self):
        examples = Text().encode_all("abcdefghij", BYTES, 4)
        assert [e.tokens for e in examples] == [
            [EOS, *b"abc"],
            [*b"defg"],
            [*b"hij"],
        ]
        assert [e.targets for e in examples] == [[*b"abcd"], [*b"efgh"], [*b"ij", EOS]]
        assert not any(e.is_cut for e in examples)


class TestPairs:
    task = Translate(prompt="{source}=", max_answer_tokens=4)

    def test_only_the_answer_is_learnt(self):
        example = self.task.encode(self.task.parse({"source": "ab", "target": "x"}), BYTES, 64)
        assert example.tokens == [*b"ab=x"]
        assert example.targets == [IGNORED, IGNORED, ord("x"), EOS]

    def test_no_room_for_a_prompt_is_said_before_any_row_is_read(self):
        with pytest.raises(
            ValueError, match=r"max_answer_tokens \(4\) must be less than max_len \(4"
        ):
            self.task.check_length(4)
        self.task.check_length(5)

    def test_too_long_an_answer_is_cut(self):
        example = self.task.encode(self.task.parse({"source": "ab", "target": "vwxyz"}), BYTES, 64)
        assert example.is_cut and example.targets[-4:] == [*b"vwxy"]

    def test_the_longest_field_of_a_prompt_is_cut(self):
        template = "Q: {question} T: {context} A:"
        texts = {"question": "why?", "context": "word " * 30}
        tokens, is_cut = encode_prompt(template, texts, BYTES, 40)
        assert is_cut and len(tokens) == 40
        assert BYTES.decode(tokens).startswith("Q: why? T: word word")
        assert BYTES.decode(tokens).endswith(" A:")
        assert encode_prompt(template, texts, BYTES, 400)[1] is False

    def test_a_character_is_not_cut(self):
        tokens, _ = encode_prompt("{text}。", {"text": "一二三四五"}, BYTES, 12)
        assert BYTES.decode(tokens) == "一二三。"

    def test_a_template_that_is_too_long(self):
        with pytest.raises(ValueError, match="the template alone has more than the 4 tokens"):
            encode_prompt("Question: {q}", {"q": "x"}, BYTES, 4)

    def test_braces(self):
        assert fields_of("{{a}} {b} {{{c}}}") == ["b", "c"]
        assert fill("{{a}} {b} {{{c}}}", {"b": "{c}", "c": "2"}) == "{a} {c} {2}"
        assert fill(r"{a}\n", {"a": r"\n"}) == "\\n\n"  # as a shell passes it: only the template

    @pytest.mark.parametrize(
        ("row", "message"),
        [
            ({"question": "q"}, "no field 'context', only 'question', 'answer'"),
            ({"question": 5, "context": "c"}, "'question' must be text, got int"),
            ({"question": " ", "context": "c"}, "'question' must not be empty"),
            ({"question": "q", "context": "\ud800"}, "lone surrogate U\\+D800"),
            ({"question": "q", "context": "c", "answer": []}, "must have an answer"),
        ],
    )
    def test_bad_rows(self, row, message):
        with pytest.raises(ValueError, match=message):
            QA().parse({**row, **({} if "answer" in row else {"answer": "a"})})

    def test_a_template_without_a_field(self):
        with pytest.raises(ValueError, match="prompt must name a field"):
            QA(prompt="Question:")


class TestClassify:
    task = Classify(labels=("neg", "pos"))

    def test_a_text_and_its_end(self):
        example = self.task.encode(self.task.parse({"text": "好", "label": "pos"}), BYTES, 64)
        assert example == ([*"好".encode(), EOS], 1, False)

    def test_a_long_text_keeps_its_beginning(self):
        example = self.task.encode(self.task.parse({"text": "abcdef", "label": "neg"}), BYTES, 4)
        assert example == ([*b"abc", EOS], 0, True)

    def test_labels_may_be_numbers(self):
        assert self.task.parse({"text": "x", "label": 1}).labels == ("1",)

    def test_any_number_of_labels(self):
        task = Classify(multi_label=True, labels=("a", "b", "c"))
        for label in (["c", "a"], "a|c", "c | a"):
            assert task.encode(task.parse({"text": "x", "label": label}), BYTES, 9).targets == [
                1,
                0,
                1,
            ]
        assert task.parse({"text": "x", "label": []}).labels == ()

    def test_an_unknown_label(self):
        sample = self.task.parse({"text": "x", "label": "other"})
        with pytest.raises(ValueError, match="label other is not among .* \\(neg, pos\\)"):
            self.task.encode(sample, BYTES, 64)

    @pytest.mark.parametrize("label", [None, ["a"], {"a": 1}, ""])
    def test_bad_labels(self, label):
        with pytest.raises(ValueError, match="'label' must"):
            self.task.parse({"text": "x", "label": label})

    def test_labels_are_those_of_the_data(self):
        samples = [self.task.parse({"text": "x", "label": label}) for label in ("负", "正", "负")]
        assert Classify().fit(samples, BYTES, None).labels == ("正", "负")
        with pytest.raises(ValueError, match="two labels or more, got 负"):
            Classify().fit(samples[:1], BYTES, None)


class TestTag:
    def fitted(self, *rows):
        task = Tag()
        samples = [task.parse(row) for row in rows]
        return task.fit(samples, BYTES, None), samples

    @pytest.mark.parametrize("tokenizer", [BYTES, CHARS], ids=lambda t: t.kind)
    def test_a_word_is_labelled_at_its_last_token(self, tokenizer):
        row = {"words": ["在", "北京", "ok", "!"], "tags": ["O", "B-LOC", "O", "O"]}
        task, [sample] = self.fitted(row)
        assert sample.text == "在北京 ok !"
        [example] = task.encode_all(sample, tokenizer, 64)
        ends = [
            tokenizer.decode(example.tokens[: i + 1])
            for i, t in enumerate(example.targets)
            if t != IGNORED
        ]
        assert ends == ["在", "在北京", "在北京 ok", "在北京 ok !"]
        assert [t for t in example.targets if t != IGNORED] == [1, 0, 1, 1]

    def test_a_bpe_joins_what_it_likes(self):
        text = "the cat sat on the mat) and the cat (sat)"
        tokenizer = train_tokenizer("bpe", [text] * 8, 320)
        task, [sample] = self.fitted(
            {"text": text, "spans": [{"start": 4, "end": 11, "label": "X"}]}
        )
        tokens, places = task.places(sample, tokenizer)
        for (_, end), place, following in itertools.zip_longest(sample.words, places, places[1:]):
            read = tokenizer.decode(tokens[: place + 1])
            assert len(read) >= end  # the whole word
            if following != place:
                assert len(tokenizer.decode(tokens[:place])) < end  # not later than needed

    def test_spans_are_tags(self):
        text = "王小明在 Acme Corp. 工作"
        spans = [{"start": 0, "end": 3, "label": "PER"}, {"start": 5, "end": 14, "label": "ORG"}]
        sample = Tag().parse({"text": text, "spans": spans})
        words = [text[s:e] for s, e in sample.words]
        assert words == ["王", "小", "明", "在", "Acme", "Corp", ".", "工", "作"]
        assert sample.tags == (
            "B-PER", "I-PER", "I-PER", "O", "B-ORG", "I-ORG", "O", "O", "O",
        )  # fmt: skip

    @pytest.mark.parametrize(
        ("row", "message"),
        [
            ({"words": ["a"], "tags": []}, "a tag for each of the 1 words"),
            ({"words": [], "tags": []}, "must be a list of words"),
            ({"words": ["a", " "], "tags": ["O", "O"]}, "'words' must not be empty"),
            ({"text": "a"}, "'words' and 'tags', or 'spans'"),
            ({"text": "a", "spans": [{"start": 0, "end": 9, "label": "X"}]}, "within the 1 char"),
            ({"text": "a", "spans": [{"start": 0}]}, "must have start, end and label"),
            ({"text": "a b", "spans": [{"start": 1, "end": 2, "label": "X"}]}, "a word in it"),
            ({"text": "ab", "spans": [{"start": i, "end": i + 1, "label": "X"} for i in (0, 1)]},
             "must not touch the same word"),
        ],
        ids=str,
    )  # fmt: skip
    def test_bad_rows(self, row, message):
        with pytest.raises(ValueError, match=message):
            Tag().parse(row)

    @pytest.mark.parametrize("max_len", [1, 2, 3, 7, 8, 30])
    def test_each_word_of_a_long_text_is_a_target_once(self, max_len):
        """In windows that overlap by half, with half a window to its left unless there is less of the text."""
        words = [f"{i:02}" for i in range(10)]
        row = {"words": words, "tags": ["X" if i % 3 else "Y" for i in range(10)]}
        task, [sample] = self.fitted(row)
        [whole] = task.encode_all(sample, BYTES, 64)
        examples = task.encode_all(sample, BYTES, max_len)
        stride = max_len - max_len // 2
        found = {}
        for i, example in enumerate(examples):
            assert example.tokens == whole.tokens[i * stride : i * stride + max_len]
            assert not example.is_cut
            for place, target in enumerate(example.targets):
                if target != IGNORED:
                    assert i * stride + place not in found
                    assert place >= min(max_len // 2, i * stride + place)
                    found[i * stride + place] = target
        assert found == {i: t for i, t in enumerate(whole.targets) if t != IGNORED}

    def test_long_texts_are_tagged_to_their_end(self):
        """As a model does whose context is one token, which no window hides."""
        words = [chr(ord("a") + i % 5) for i in range(40)]
        task, [sample] = self.fitted({"words": words, "tags": ["X", "Y"] * 20})
        torch.manual_seed(0)
        model = tiny(position="rotary", n_layer=1).float()
        with torch.no_grad():
            model.blocks[0].attn_out.weight.zero_()
            model.blocks[0].attn_out.bias.zero_()
        module = task.make_module(model, ())
        torch.nn.init.normal_(module.head.weight)
        adapted = methods.create("full").attach(model)
        tuned = {n: Tuned(task, module, adapted, BYTES, n) for n in (8, 64, 500)}
        [whole], [short], [middle] = (task.predict(tuned[n], [sample]) for n in (500, 8, 64))
        assert len(whole["tags"]) == 40 and len(set(whole["tags"])) == 2
        for prediction in (short, middle):
            assert prediction["tags"] == whole["tags"]
            assert prediction["probabilities"] == pytest.approx(whole["probabilities"], rel=1e-4)


class TestChat:
    def messages(self, *turns):
        roles = {"S": "system", "U": "user", "A": "assistant"}
        return [{"role": roles[turn[0]], "content": turn[1:]} for turn in turns]

    def encode(self, max_len, *turns):
        task = Chat()
        sample = task.parse({"messages": self.messages(*turns)})
        task = task.fit([sample], BYTES, None)
        return task.encode(sample, BYTES, max_len)

    def learnt(self, example):
        """The tokens that are targets, in runs."""
        groups = itertools.groupby(example.targets, lambda t: t != IGNORED)
        return [BYTES.decode(list(run)) for wanted, run in groups if wanted]

    def test_only_the_assistant_is_learnt(self):
        example = self.encode(500, "S简短。", "U你好", "A您好！", "U退货", "A好的。", "U谢谢")
        assert self.learnt(example) == ["您好！<|endoftext|>", "好的。<|endoftext|>"]
        assert not example.is_cut
        assert BYTES.decode(example.tokens).endswith(
            "assistant\n好的。"
        )  # what follows is nobody's

    def test_the_end_of_text_in_a_message_is_text(self):
        example = self.encode(500, "Usay <|endoftext|>", "A<|endoftext|>")
        assert example.targets.count(EOS) == 1
        assert example.tokens.count(EOS) == 1  # of the user's message

    def test_too_long_a_conversation_keeps_system_prompt_and_latest_turns(self):
        turns = ["S简短。", *(f"{who}{i} {'字' * 9}" for i in range(6) for who in "UA")]
        example = self.encode(180, *turns)
        text = BYTES.decode(example.tokens)
        assert example.is_cut and len(example.tokens) <= 180
        assert text.startswith("system\n简短。<|endoftext|>user\n")
        assert "\n5 " in text and "\n0 " not in text
        assert self.learnt(example)[-1].startswith("5 字")

    def test_one_turn_that_is_too_long_keeps_its_end(self):
        example = self.encode(30, "U" + "long " * 20, "Aanswer")
        assert example.is_cut and len(example.tokens) == 30
        assert self.learnt(example) == ["answer<|endoftext|>"]

    def test_a_template_that_changes_what_came_before_is_refused(self):
        template = "{{ messages | length }}{% for m in messages %}{{ m.content }}{% endfor %}"
        task = Chat(template=template)
        sample = task.parse({"messages": self.messages("Ua", "Ab", "Uc", "Ad")})
        with pytest.raises(ValueError, match="does not keep message 1 apart"):
            task.encode(sample, BYTES, 64)

    @pytest.mark.parametrize(
        ("messages", "message"),
        [
            (None, "'messages' must be a list of messages, got None"),
            ([{"role": "judge", "content": "x"}], "message 0 must have a role of system"),
            ([{"role": "user", "content": 1}], "message 0 must have a content that is text, got 1"),
            ([{"role": "user", "content": "x"}], "no message of the assistant"),
        ],
        ids=str,
    )
    def test_bad_rows(self, messages, message):
        with pytest.raises(ValueError, match=message):
            Chat().parse({"messages": messages})

    def test_a_line_of_text_is_what_the_user_says(self):
        task = Chat()
        assert task.parse_input({task.line_field(): "你好"}) == (
            {"role": "user", "content": "你好"},
        )
        with pytest.raises(ValueError, match="message 0 must have a content that is text"):
            task.parse_input({"messages": " "})


class TestTables:
    """A cell is text; what is a list elsewhere is JSON in it, or has | between its parts."""

    def test_rank(self):
        row = {"context": "x", "candidates": "os.path | 路径|b", "chosen": "路径"}
        assert Rank().parse(row).candidates == ("os.path", "路径", "b")
        assert Rank().parse(row).chosen == 1
        assert Rank().parse(row | {"chosen": "2"}).chosen == 2
        row = {"context": "x", "candidates": '["a|b", "1"]', "chosen": "1"}
        assert Rank().parse(row).candidates == ("a|b", "1")
        assert Rank().parse(row).chosen == 1  # the candidate, not its number

    def test_chat(self):
        messages = [{"role": "user", "content": "你好"}, {"role": "assistant", "content": "您好"}]
        cell = json.dumps(messages)
        assert Chat().parse({"messages": cell}) == tuple(messages)

    def test_tag(self):
        row = {"text": "in 北京", "spans": '[{"start": 3, "end": 5, "label": "LOC"}]'}
        assert Tag().parse(row).tags == ("O", "B-LOC", "I-LOC")
        row = {"words": '["in", "Rome"]', "tags": '["O", "LOC"]'}
        assert Tag().parse(row).tags == ("O", "LOC")

    def test_answers(self):
        row = {"question": "q", "context": "c", "answer": '["a", "b"]'}
        assert QA().parse(row).answers == ('["a", "b"]',)  # an answer may look like anything

    def test_what_is_no_json(self):
        with pytest.raises(ValueError, match="'messages' must be a list in JSON, got '\\[{'"):
            Chat().parse({"messages": "[{"})


class TestRank:
    def test_a_long_context_loses_its_left(self):
        task = Rank()
        sample = task.parse({"context": "0123456789", "candidates": ["a", "bc"], "chosen": 1})
        context, candidates, is_cut = task.parts(sample, BYTES, 8)
        assert (context, is_cut) == ([*b"6789\n"], True)
        assert candidates == [[*b"a", EOS], [*b"bc", EOS]]
        with pytest.raises(ValueError, match="a candidate of 3 tokens does not fit .* into 3"):
            task.parts(sample, BYTES, 3)

    @pytest.mark.parametrize(
        ("row", "message"),
        [
            ({"candidates": ["a"]}, "list of two texts or more"),
            ({"candidates": ["a", 1]}, "'candidates' must be text, got int"),
            ({"candidates": ["a", "b"]}, "'chosen' must be a candidate or its number below 2"),
            ({"candidates": ["a", "b"], "chosen": "c"}, "must be one of the candidates, got 'c'"),
            ({"candidates": ["a", "b"], "chosen": 2}, "its number below 2, got 2"),
        ],
        ids=str,
    )
    def test_bad_rows(self, row, message):
        with pytest.raises(ValueError, match=message):
            Rank().parse({"context": "x", **row})
