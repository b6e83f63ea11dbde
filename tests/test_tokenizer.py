# ruff: noqa: RUF001 (text in many scripts)
import json
import os
import subprocess
import sys
from itertools import pairwise

import pytest
import tiktoken
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from leangpt.data import tokenizer as module
from leangpt.data.huggingface_tokenizer import HuggingFaceTokenizer
from leangpt.data.text import encode_utf8
from leangpt.data.tokenizer import (
    END_OF_TEXT,
    BPETokenizer,
    ByteTokenizer,
    CharTokenizer,
    GPT2Tokenizer,
    Tokenizer,
    load_tokenizer,
    train_tokenizer,
)

SNIPPETS = [
    *(END_OF_TEXT, "<|endof", "text|>", "<|im_end|>", "don't", "I'LL", "'ſ"),
    *("中文分词测试", "你好，世界！", "日本語テキスト", "한국어", "שלום", "नमस्ते"),
    *("😀", "👩‍👩‍👧‍👦", "🇩🇪", "é", "e\u0301", "\u200b", "\ufeff", "\ufffd"),
    *(
        "1234567",
        "٣٤٥",
        "½",
        "x = 10_000\n",
        "    return None\n\n\n",
        "\t\t",
        " ",
        "      ",
        "\u3000 \xa0",
    ),
    *("\r\n", "\r", "\n \n", "!!!\n\n", "---------", "\x00", "\x1c\x1d", "\U0010ffff", "a" * 300),
]
TEXTS = st.lists(st.sampled_from(SNIPPETS) | st.text(max_size=8), max_size=12).map("".join)
CORPUS = [
    "def add(first, second):\n    return first + second\n\n\n" * 3,
    "the theory of the thing is there, 1234 times 1234; don't!" * 3,
    "中文测试中文测试，世界你好 😀😀 née  naïve\r\n\r\n",
]
MANY = settings(max_examples=200, deadline=None)


@pytest.fixture(scope="module")
def gpt2() -> GPT2Tokenizer:
    try:
        return GPT2Tokenizer.download()
    except RuntimeError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def huggingface(tmp_path_factory) -> HuggingFaceTokenizer:
    """Byte-level, as Llama 3 and Qwen are."""
    folder = tmp_path_factory.mktemp("huggingface")
    BPETokenizer.train(CORPUS, 400).save(folder)
    (folder / "tokenizer_leangpt.json").unlink()
    return HuggingFaceTokenizer.load(folder)


@pytest.fixture(scope="module")
def sentencepiece(tmp_path_factory) -> HuggingFaceTokenizer:
    """Spaces as ▁ and unknown characters as byte tokens, as Llama 2 and Mistral are."""
    folder = tmp_path_factory.mktemp("sentencepiece")
    (folder / "tokenizer.json").write_text(json.dumps(sentencepiece_json()))
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"bos_token": "<s>", "eos_token": {"content": "</s>"}})
    )
    return HuggingFaceTokenizer.load(folder)


def sentencepiece_json() -> dict:
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁"]
    pieces += [chr(c) for c in range(33, 127)] + ["é", "中", "th", "the", "▁the", "re", ""]
    merges = [["t", "h"], ["th", "e"], ["▁", "the"], ["r", "e"]]
    added = [
        {
            **dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False),
            **{"id": i, "content": content, "special": True},
        }
        for i, content in enumerate(pieces[:3])
    ]
    bos = {"SpecialToken": {"id": "<s>", "type_id": 0}}
    text = {"Sequence": {"id": "A", "type_id": 0}}
    return {
        "version": "1.0",
        "truncation": {
            "max_length": 4,
            "stride": 0,
            "strategy": "LongestFirst",
            "direction": "Right",
        },
        "padding": None,
        "added_tokens": added,
        "normalizer": {
            "type": "Sequence",
            "normalizers": [
                {"type": "Prepend", "prepend": "▁"},
                {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
            ],
        },
        "pre_tokenizer": None,
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [bos, text],
            "pair": [bos, text, text],
            "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}},
        },
        "decoder": {
            "type": "Sequence",
            "decoders": [
                {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
                {"type": "ByteFallback"},
                {"type": "Fuse"},
                {"type": "Strip", "content": " ", "start": 1, "stop": 0},
            ],
        },
        "model": {
            "type": "BPE",
            "unk_token": "<unk>",
            "fuse_unk": True,
            "byte_fallback": True,
            "vocab": {piece: i for i, piece in enumerate(pieces)},
            "merges": merges,
        },
    }


OWN = {
    "byte": lambda: ByteTokenizer(),
    "char": lambda: CharTokenizer.train(CORPUS, 270),
    "bpe": lambda: BPETokenizer.train(CORPUS, 400),
    "gpt2": lambda: None,
}


@pytest.fixture(scope="module", params=OWN)
def own(request) -> Tokenizer:
    """Each of this project's tokenizers."""
    if request.param == "gpt2":
        return request.getfixturevalue("gpt2")
    return OWN[request.param]()


@pytest.fixture(params=["byte", "char", "bpe", "gpt2", "huggingface", "sentencepiece"])
def any_tokenizer(request) -> Tokenizer:
    if request.param in ("gpt2", "huggingface", "sentencepiece"):
        return request.getfixturevalue(request.param)
    return OWN[request.param]()


def test_round_trip_is_exact(own):
    @MANY
    @given(TEXTS)
    def check(text):
        assert own.decode(own.encode(text)) == text
        assert own.decode(own.encode(text, allow_special=True)) == text
        assert not set(own.encode(text)) & set(own.special_tokens.values())

    check()


def test_special_tokens_only_where_allowed(any_tokenizer):
    name, special = next(reversed(any_tokenizer.special_tokens.items()))
    assert special not in any_tokenizer.encode(f"a{name}b{name}")
    allowed = any_tokenizer.encode(f"a{name}b{name}", allow_special=True)
    assert allowed.count(special) == 2 and allowed[-1] == special
    assert name in any_tokenizer.decode([special])


def test_streaming_makes_the_same_text(any_tokenizer):
    """Any tokens at all, not only those of valid text."""
    tokens = st.integers(0, any_tokenizer.vocab_size - 1) | st.sampled_from(
        sorted(set(any_tokenizer.encode("".join(SNIPPETS))))
    )

    @MANY
    @given(st.lists(tokens, max_size=60) | TEXTS.map(any_tokenizer.encode))
    def check(tokens):
        whole = any_tokenizer.decode(tokens)
        detokenizer = any_tokenizer.detokenizer()
        shown = ""
        for token in tokens:
            shown += detokenizer.push(token)
            assert whole.startswith(shown)
        assert shown + detokenizer.flush() == whole

    check()


def test_streaming_shows_no_half_characters():
    tokenizer = ByteTokenizer()
    detokenizer = tokenizer.detokenizer()
    assert [detokenizer.push(token) for token in tokenizer.encode("é😀a")] == [
        *("", "é"),
        *("", "", "", "😀"),
        "a",
    ]
    assert [detokenizer.push(0xF0), detokenizer.push(0x9F), detokenizer.push(ord("x"))] == [
        "",
        "",
        "\ufffdx",
    ]
    assert detokenizer.push(0xC3) == "" and detokenizer.flush() == "\ufffd"


def test_streaming_is_prompt(huggingface, sentencepiece):
    """Nothing is held back without a reason."""
    for tokenizer in (huggingface, sentencepiece):
        tokens = tokenizer.encode("the other there, the end" * 20)
        detokenizer = tokenizer.detokenizer()
        shown = ""
        for count, token in enumerate(tokens, 1):
            shown += detokenizer.push(token)
            assert shown == tokenizer.decode(tokens[:count])


def test_streaming_after_tokens_without_text(sentencepiece):
    empty, the = sentencepiece.vocab_size - 1, sentencepiece.encode("the")[0]
    assert sentencepiece.decode([empty, the]) == "the"
    tokens = [empty] * 20 + [the] + [empty] * 20 + [the]
    detokenizer = sentencepiece.detokenizer()
    assert "".join(map(detokenizer.push, tokens)) + detokenizer.flush() == "the the"


def test_lone_surrogates_are_refused(any_tokenizer):
    for special in (False, True):
        with pytest.raises(ValueError, match=r"lone surrogate U\+D83D at character 2"):
            any_tokenizer.encode("ab\ud83d", allow_special=special)


def test_unknown_tokens_are_refused(any_tokenizer):
    for token in (-1, any_tokenizer.vocab_size):
        with pytest.raises(ValueError, match="token must be in"):
            any_tokenizer.decode([token])
        with pytest.raises(ValueError, match="token must be in"):
            any_tokenizer.detokenizer().push(token)


def test_save_and_load(any_tokenizer, tmp_path):
    any_tokenizer.save(tmp_path)
    loaded = load_tokenizer(tmp_path)
    assert type(loaded) is type(any_tokenizer)
    for name in (
        "kind",
        "vocab_size",
        "eos_id",
        "eos_ids",
        "bos_id",
        "special_tokens",
        "fingerprint",
    ):
        assert getattr(loaded, name) == getattr(any_tokenizer, name), name
    text = "".join(SNIPPETS)
    assert loaded.encode(text) == any_tokenizer.encode(text)


def test_fingerprints_differ(huggingface, sentencepiece):
    tokenizers = [
        ByteTokenizer(),
        CharTokenizer.train(CORPUS, 262),
        CharTokenizer.train(CORPUS, 263),
        BPETokenizer.train(CORPUS, 400),
        BPETokenizer(ByteTokenizer().tokens),
        BPETokenizer(ByteTokenizer().tokens, pattern=r"\s+|\S+"),
        huggingface,
        sentencepiece,
    ]
    assert len({tokenizer.fingerprint for tokenizer in tokenizers}) == len(tokenizers)


def test_damaged_files(tmp_path):
    with pytest.raises(FileNotFoundError, match="no tokenizer here"):
        load_tokenizer(tmp_path)
    path = tmp_path / "tokenizer_leangpt.json"
    BPETokenizer.train(CORPUS, 300).save(tmp_path)
    good = path.read_text()
    for bad, message in (
        (good[:-100], "not a valid JSON file"),
        (good.replace('"kind": "bpe"', '"kind": "char"'), "damaged"),
        (good.replace('"format_version": 1', '"format_version": 2'), "format version 1, got 2"),
        ("[]", "format version 1, got None"),
    ):
        path.write_text(bad)
        with pytest.raises(ValueError, match=message) as caught:
            load_tokenizer(tmp_path)
        assert str(path) in str(caught.value)
    path.unlink()
    (tmp_path / "tokenizer.json").write_text('{"model": {}}')
    with pytest.raises(ValueError, match=r"tokenizer\.json cannot be read"):
        load_tokenizer(tmp_path)


def test_byte_ids_are_bytes():
    tokenizer = train_tokenizer("byte", [], 0)
    assert tokenizer.encode("é\n") == [0xC3, 0xA9, 0x0A]
    assert (tokenizer.eos_id, tokenizer.vocab_size, tokenizer.bos_id) == (256, 257, None)


def test_char_takes_the_most_frequent_characters():
    tokenizer = train_tokenizer("char", ["ééé aaa 中中 😀😀😀😀", "ü"], 259)
    assert tokenizer.vocab_size == 259 and tokenizer.eos_id == 258
    assert tokenizer.encode("a😀é中") == [97, 256, 257, *"中".encode()]


def test_bpe_merges_what_recurs():
    tokenizer = train_tokenizer("bpe", ["abab abab abab"], 1000)
    assert tokenizer.tokens[:256] == [bytes([i]) for i in range(256)]
    assert set(tokenizer.tokens[256:]) == {b"ab", b"abab", b" abab"}
    assert tokenizer.encode(" abab" * 2) == [tokenizer.tokens.index(b" abab")] * 2
    assert tokenizer.eos_id == 259 == tokenizer.vocab_size - 1
    # signs together with the line end after them, line ends with the indentation before them
    code = train_tokenizer("bpe", ["if (a):\n\t\n" * 3], 1000)
    assert {b"):\n", b"\t\n"} <= set(code.tokens)


def test_training_is_deterministic():
    script = (
        "from leangpt.data.tokenizer import train_tokenizer; import sys\n"
        "print(train_tokenizer('bpe', sys.argv[1:], 400).fingerprint)"
    )
    out = subprocess.run(
        [sys.executable, "-c", script, *CORPUS],
        env={**os.environ, "RAYON_NUM_THREADS": "3", "PYTHONSAFEPATH": "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert out.stdout.strip() == BPETokenizer.train(CORPUS, 400).fingerprint


def test_training_checks_its_arguments():
    with pytest.raises(ValueError, match="tokenizer must be one of byte, char, bpe, gpt2, got 'x'"):
        train_tokenizer("x", [], 300)
    with pytest.raises(ValueError, match="vocab_size must be at least 257"):
        train_tokenizer("bpe", [], 256)
    with pytest.raises(ValueError, match="lone surrogate"):
        train_tokenizer("bpe", ["\udc00"], 300)


@pytest.mark.parametrize("name", ["bpe", "gpt2"])
def test_tokenizer_json_encodes_the_same(name, tmp_path, request):
    own = OWN[name]() or request.getfixturevalue(name)
    own.save(tmp_path)
    other = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    assert other.token_to_id(END_OF_TEXT) == own.eos_id

    @MANY
    @given(TEXTS)
    def check(text):
        # without being asked, `tokenizers` finds special tokens in text
        tokens = other.encode(text).ids
        assert tokens == own.encode(text, allow_special=True)
        assert other.decode(tokens, skip_special_tokens=False) == text

    check()


@pytest.mark.parametrize("name", [r"\p{L}", r"\p{N}", r"\s"])
def test_both_engines_know_the_same_characters(name):
    """Two libraries run the pattern, each with its own tables of Unicode."""
    characters = "".join(chr(c) for c in range(0x34000) if not 0xD800 <= c < 0xE000)
    ranks = {bytes([byte]): byte for byte in range(256)}
    # tiktoken encodes what the pattern matches and drops the rest, a `Split` removes it
    only = tiktoken.Encoding("", pat_str=name, mergeable_ranks=ranks, special_tokens={})
    matched = set(bytes(only.encode_ordinary(characters)).decode())
    split = tokenizers.pre_tokenizers.Split(tokenizers.Regex(name), "removed")
    rest = {c for part, _ in split.pre_tokenize_str(characters) for c in part}
    assert matched and matched == set(characters) - rest


def test_transformers_loads_tokenizer_json(tmp_path):
    from transformers import AutoTokenizer

    own = BPETokenizer.train(CORPUS, 400)
    own.save(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
    other = AutoTokenizer.from_pretrained(tmp_path)
    text = "".join(SNIPPETS)
    assert other(text)["input_ids"] == own.encode(text, allow_special=True)
    assert other.decode(own.encode(text)) == text
    assert (other.eos_token_id, len(other)) == (own.eos_id, own.vocab_size)


def test_gpt2_is_gpt2(gpt2):
    reference = tiktoken.get_encoding("gpt2")
    assert (
        (gpt2.vocab_size, gpt2.eos_id) == (50257, 50256) == (reference.n_vocab, reference.eot_token)
    )

    @MANY
    @given(TEXTS)
    def check(text):
        assert gpt2.encode(text) == reference.encode_ordinary(text)

    check()


def test_gpt2_without_network(monkeypatch):
    def no_network(name):
        raise ConnectionError("no route to host")

    monkeypatch.setattr(module.tiktoken, "get_encoding", no_network)
    with pytest.raises(RuntimeError, match=r"TIKTOKEN_CACHE_DIR.*no route to host"):
        train_tokenizer("gpt2", [], 0)


def test_gpt2_cuts_long_texts_where_its_pattern_does(gpt2):
    @MANY
    @given(TEXTS)
    def check(text):
        parts = list(module._cut_in_spaces(text, limit=3))
        assert "".join(parts) == text
        assert [t for part in parts for t in gpt2._encoding.encode_ordinary(part)] == gpt2.encode(
            text
        )

    check()


@pytest.mark.parametrize("name", ["bpe", "gpt2"])
@pytest.mark.parametrize(
    ("unit", "count"),
    [
        (" ", 1_000_000),
        ("\n", 1_000_000),
        ("a", 200_000),
        ("中文", 50_000),
        (" \n-", 50_000),
        ("é7", 50_000),
    ],
    ids=ascii,
)
def test_long_runs(name, unit, count, request):
    """Where there is no place to cut at: neither quadratic nor out of stack."""
    tokenizer = OWN[name]() or request.getfixturevalue(name)
    text = unit * count
    for whole in (text, text + "x", "x" + text + "x"):
        assert tokenizer.decode(tokenizer.encode(whole)) == whole


def test_huggingface_files_tell_the_special_tokens(tmp_path, sentencepiece):
    assert (sentencepiece.bos_id, sentencepiece.eos_id, sentencepiece.eos_ids) == (1, 2, (2,))
    assert sentencepiece.special_tokens == {"<unk>": 0, "<s>": 1, "</s>": 2}
    (tmp_path / "tokenizer.json").write_text(json.dumps(sentencepiece_json()))
    # the template of tokenizer.json puts <s> before each text; nothing says which token ends one
    assert load_tokenizer(tmp_path).bos_id == 1 and load_tokenizer(tmp_path).eos_id is None
    (tmp_path / "config.json").write_text(json.dumps({"eos_token_id": 50256}))
    assert load_tokenizer(tmp_path).eos_id is None
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 260]}))
    assert load_tokenizer(tmp_path).eos_ids == (2, 260)
    (tmp_path / "special_tokens_map.json").write_text(json.dumps({"eos_token": "e"}))
    assert load_tokenizer(tmp_path).eos_id == load_tokenizer(tmp_path).encode("e")[-1]
    config = {"add_bos_token": False, "bos_token": "<s>", "eos_token": "</s>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    assert load_tokenizer(tmp_path).bos_id is None and load_tokenizer(tmp_path).eos_id == 2
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<nowhere>"}))
    with pytest.raises(ValueError, match="names the token '<nowhere>'"):
        load_tokenizer(tmp_path)


def test_huggingface_files_survive_saving(tmp_path, sentencepiece):
    source, copy = tmp_path / "source", tmp_path / "copy"
    source.mkdir()
    sentencepiece.save(source)
    (source / "tokenizer_leangpt.json").unlink()
    (source / "chat_template.jinja").write_text("{{ messages }}")
    (source / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 260]}))
    loaded = load_tokenizer(source)
    loaded.save(copy)
    assert load_tokenizer(copy).eos_ids == (2, 260)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        assert (copy / name).read_bytes() == (source / name).read_bytes()
    (copy / "tokenizer.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"tokenizer\.json"):
        load_tokenizer(copy)


def test_huggingface_does_not_truncate(sentencepiece):
    """The file asks for four tokens at most, which is a matter of other people's batches."""
    assert len(sentencepiece.encode("the " * 50)) > 50
    assert sentencepiece.decode(sentencepiece.encode("the é中😀 there")) == "the é中😀 there"


@given(st.text(alphabet=st.characters(categories=("Cs", "Lu")), max_size=20))
def test_encode_utf8_names_the_first_surrogate(text):
    surrogates = [i for i, c in enumerate(text) if "\ud800" <= c <= "\udfff"]
    if surrogates:
        with pytest.raises(ValueError, match=f"at character {surrogates[0]}$"):
            encode_utf8(text)
    else:
        assert encode_utf8(text).decode() == text


def test_halves_of_a_merge_are_earlier_tokens(gpt2):
    """Every token that tokenizer.json spells as a merge is made of two tokens with lower ids."""
    merges = json.loads(gpt2._tokenizer_json)["model"]["merges"]
    vocabulary = json.loads(gpt2._tokenizer_json)["model"]["vocab"]
    made = [vocabulary[left + right] for left, right in merges]
    assert made == list(range(256, 50256))
    assert all(
        max(vocabulary[a], vocabulary[b]) < m for (a, b), m in zip(merges, made, strict=True)
    )
    assert all(a < b for a, b in pairwise(made))
