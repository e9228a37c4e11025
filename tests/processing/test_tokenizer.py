import base64
import json
import random
from pathlib import Path

import pytest
import tokenizers
from tokenizers_for_tests import TEXT, train_ranks, write_json, write_ranks

from llama_multimodal.errors import CheckpointError, PromptError
from llama_multimodal.processing import tokenizer as module
from llama_multimodal.processing.tokenizer import PATTERN, StreamDecoder, Tokenizer

RANKS = train_ranks(TEXT, 600)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer")
    write_ranks(RANKS, path / "tokenizer.model")
    write_json(RANKS, path / "tokenizer.json")
    return path


@pytest.fixture(scope="module")
def both(folder: Path) -> tuple[Tokenizer, Tokenizer]:
    return Tokenizer.from_ranks(folder / "tokenizer.model"), Tokenizer.from_json(folder / "tokenizer.json")


def random_texts(count: int, seed: int = 0) -> list[str]:
    """Any characters at all, and mixtures of words, spaces, digits and repetitions, which merges are sensitive to."""
    rng = random.Random(seed)
    words = TEXT.split()
    out = ["", " ", "\n", "\r\n", "<|eot_id|>", "'S 'LL", " 12345678", "\u00a0\u2003x", "e\u0301", "\0"]
    for i in range(count):
        if i % 2:
            low, high = rng.choice([(32, 126), (32, 0x500), (0x20, 0xD7FF), (0, 0x1FFFF)])
            codes = [rng.randint(low, high) for _ in range(rng.choice([3, 10, 60]))]
            out.append("".join(chr(c) for c in codes if not 0xD800 <= c < 0xE000))
        else:
            pieces = [*words, " ", "  ", "\n", "\t", "1", "aaa", "ab", "th", "é", "你"]
            out.append("".join(rng.choice(pieces) for _ in range(20)))
    return out


def test_both_files_give_the_same_ids(both: tuple[Tokenizer, Tokenizer]) -> None:
    ranks, converted = both
    assert ranks.vocab_size == converted.vocab_size == len(RANKS) + 256
    for name in ("begin_of_text", "end_of_text", "start_header_id", "end_header_id", "eom_id", "eot_id", "image"):
        assert ranks.special(f"<|{name}|>") == converted.special(f"<|{name}|>")
    assert ranks.special("<|image|>") == ranks.vocab_size
    for text in [TEXT, *random_texts(2000)]:
        assert ranks.encode(text) == converted.encode(text), text
        assert ranks.decode(ranks.encode(text)) == text == converted.decode(converted.encode(text))


def test_ids_are_tiktokens(both: tuple[Tokenizer, Tokenizer]) -> None:
    tiktoken = pytest.importorskip("tiktoken")
    reference = tiktoken.Encoding("small", pat_str=PATTERN, mergeable_ranks=RANKS, special_tokens={})
    for text in [TEXT, "x" * 70, *random_texts(1000, seed=1), "a\ud83d b", "\udc00"]:
        assert both[0].encode(text) == reference.encode(text, disallowed_special=()), text


@pytest.mark.parametrize("seed", range(5))
def test_ranks_of_no_training(seed: int, tmp_path: Path) -> None:
    """Ranks in an order no training gives: only the rule "lowest rank of the join first" gets these right."""
    tiktoken = pytest.importorskip("tiktoken")
    rng = random.Random(seed)
    joins = list({"".join(rng.choice("abc") for _ in range(rng.randint(2, 5))).encode() for _ in range(60)})
    rng.shuffle(joins)
    known = {bytes([byte]) for byte in range(256)}
    ranks = {token: i for i, token in enumerate(sorted(known))}
    for token in joins:  # tiktoken needs every token to be reachable
        if any(token[:i] in known and token[i:] in known for i in range(1, len(token))):
            known.add(token)
            ranks[token] = len(ranks)
    write_ranks(ranks, tmp_path / "tokenizer.model")
    ours = Tokenizer.from_ranks(tmp_path / "tokenizer.model")
    reference = tiktoken.Encoding("odd", pat_str=PATTERN, mergeable_ranks=ranks, special_tokens={})
    for _ in range(300):
        text = "".join(rng.choice("abc") for _ in range(rng.randint(1, 25)))
        assert ours.encode(text) == reference.encode(text), text


def test_text_never_becomes_a_special_token(both: tuple[Tokenizer, Tokenizer]) -> None:
    for tokenizer in both:
        for name in tokenizer.special_tokens:
            text = f"a{name}b {name} "
            ids = tokenizer.encode(text)
            assert not set(ids) & set(tokenizer.special_tokens.values())
            assert tokenizer.decode(ids) == text


def test_decode_special(both: tuple[Tokenizer, Tokenizer]) -> None:
    tokenizer = both[0]
    ids = [tokenizer.special("<|begin_of_text|>"), *tokenizer.encode("red"), tokenizer.special("<|eot_id|>")]
    assert tokenizer.decode(ids) == "red"
    assert tokenizer.decode(ids, skip_special=False) == "<|begin_of_text|>red<|eot_id|>"
    assert tokenizer.decode([10**6]) == "\ufffd"
    with pytest.raises(PromptError, match=r"no special token <\|eot\|>"):
        tokenizer.special("<|eot|>")


def test_stream_gives_whole_characters(both: tuple[Tokenizer, Tokenizer]) -> None:
    tokenizer = both[0]
    for text in ["🦙🏽 你好 naïve é", *random_texts(200, seed=2)]:
        ids = [byte for byte in text.encode()]  # a token a byte
        decoder = StreamDecoder(tokenizer)
        pieces = [decoder.push(i) for i in ids]
        assert "\ufffd" not in "".join(pieces) or "\ufffd" in text
        assert "".join(pieces) + decoder.flush() == text == tokenizer.decode(ids)
    decoder = StreamDecoder(tokenizer)
    assert decoder.push(0xF0) + decoder.push(0x9F) == ""
    assert decoder.flush() == "\ufffd" == tokenizer.decode([0xF0, 0x9F])
    wrong = [0xFF, 0xE4, 0xBD, 0x41, 0xC3]  # not UTF-8
    decoder = StreamDecoder(tokenizer)
    assert "".join(map(decoder.push, wrong)) + decoder.flush() == tokenizer.decode(wrong)


def test_long_runs_are_cut_as_in_the_reference() -> None:
    assert list(module._pieces("")) == []
    assert [len(piece) for piece in module._pieces("a" * 25_000)] == [25_000]
    assert [len(piece) for piece in module._pieces("a" * 60_000 + " " * 25_001 + "b")] == [25_000, 25_000, 35_000, 2]
    assert [len(piece) for piece in module._pieces("ab " * 200_000)] == [400_000, 200_000]


def test_metas_own_file() -> None:
    """Where the reference is installed: the ids of every text in the golden file, and 128256 ids."""
    reference = pytest.importorskip("llama_models")
    tokenizer = Tokenizer.from_ranks(Path(reference.__file__).parent / "llama3" / "tokenizer.model")
    assert tokenizer.vocab_size == tokenizer.special("<|image|>") == 128256
    golden = json.loads((Path(__file__).parents[1] / "golden" / "chat_format.json").read_text(encoding="utf-8"))
    for text, ids in golden["pieces"].items():
        assert tokenizer.encode(text) == ids


def test_load_finds_the_file(folder: Path, tmp_path: Path) -> None:
    assert Tokenizer.load(tmp_path) is None
    loaded = Tokenizer.load(folder)
    assert loaded is not None and "<|unused_image|>" not in loaded.special_tokens  # tokenizer.json goes first
    (tmp_path / "tokenizer.model").write_bytes((folder / "tokenizer.model").read_bytes())
    loaded = Tokenizer.load(tmp_path)
    assert loaded is not None and "<|unused_image|>" in loaded.special_tokens


@pytest.mark.parametrize(
    "content", ["", "{", "{}", "[]", "null", '{"model": {"type": "BPE"}}', "\ud800".encode("utf-8", "surrogatepass")]
)
def test_damaged_json(content: str | bytes, tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(CheckpointError, match=r"tokenizer\.json") as caught:
        Tokenizer.from_json(path)
    assert "\n" not in str(caught.value)


def test_other_kinds_of_tokenizer(tmp_path: Path) -> None:
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0, "[UNK]": 1}, unk_token="[UNK]"))
    backend.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(CheckpointError, match="not BPE over bytes"):
        Tokenizer.from_json(tmp_path / "tokenizer.json")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("no", "line 257"),
        ("!!!! 256", "line 257"),
        ("YWI= x", "line 257"),
        ("YWI= 999", "ranks"),
        ("YQ== 256", "ranks"),
    ],
)
def test_damaged_ranks(line: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.model"
    whole = [f"{base64.b64encode(bytes([byte])).decode()} {byte}" for byte in range(256)]
    path.write_text("\n".join([*whole, line]))
    with pytest.raises(CheckpointError, match=message):
        Tokenizer.from_ranks(path)
    path.write_text("\n".join(whole[:-1]))
    with pytest.raises(CheckpointError, match="missing"):
        Tokenizer.from_ranks(path)
    with pytest.raises(CheckpointError, match="cannot be read"):
        Tokenizer.from_ranks(tmp_path / "none.model")
