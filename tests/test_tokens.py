"""Tokenizers, their cache, and the BPE of llama2.c against a greedy merge written here."""

import itertools
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from clplat.data import tokens
from clplat.data.tokens import Bytes, encode_cached, load_tokenizer, padded
from clplat.errors import MissingError, UserError

TEXTS = ["", "a", "naïve café\nTask: x", "日本"]


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("CLPLAT_CACHE", str(tmp_path / "cache"))


def test_bytes_round_trip():
    tokenizer = load_tokenizer(None)
    for text, ids in zip(TEXTS, tokenizer.encode(TEXTS), strict=True):
        assert len(ids) == len(text.encode())
        assert all(3 <= i < tokenizer.size for i in ids)
        assert tokenizer.decode([*tokenizer.before, *ids, tokenizer.end, -1]) == text


class _Counting(Bytes):
    calls = 0

    def encode(self, texts):
        type(self).calls += 1
        return super().encode(texts)


def test_text_is_tokenised_once_and_a_damaged_cache_is_made_anew(tmp_path):
    _Counting.calls = 0
    first = encode_cached(_Counting(), TEXTS)
    again = encode_cached(_Counting(), TEXTS)
    assert _Counting.calls == 1
    assert [a.tolist() for a in first] == [a.tolist() for a in again] == Bytes().encode(TEXTS)
    assert all(a.dtype == np.int32 for a in again)
    (file,) = (tmp_path / "cache").iterdir()  # no part of a file is left behind
    whole = file.read_bytes()
    for damage in (whole[: len(whole) // 2], b"", b"junk"):
        file.write_bytes(damage)
        assert [a.tolist() for a in encode_cached(_Counting(), TEXTS)] == Bytes().encode(TEXTS)
        assert file.read_bytes() == whole
    encode_cached(_Counting(), [*TEXTS, "more"])
    other = _Counting()
    other.fingerprint = "other"
    encode_cached(other, TEXTS)
    assert len(list((tmp_path / "cache").iterdir())) == 3  # other texts, another tokenizer
    assert encode_cached(Bytes(), []) == []


def test_texts_are_not_confused_by_where_they_are_cut():
    assert tokens._key(Bytes(), ["ab", "c"]) != tokens._key(Bytes(), ["a", "bc"])


def test_without_a_writable_cache_the_text_is_tokenised_anyway(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("not a folder")
    monkeypatch.setenv("CLPLAT_CACHE", str(tmp_path / "file"))
    assert [a.tolist() for a in encode_cached(Bytes(), TEXTS)] == Bytes().encode(TEXTS)


def test_padded():
    table = padded([np.array([1, 2]), np.array([], int), np.array([3])])
    assert table.tolist() == [[1, 2], [-1, -1], [3, -1]]
    assert table.dtype == torch.int32
    assert padded([np.array([1])], 3).tolist() == [[1, -1, -1]]


def _transformers_tokenizer(folder: Path, **more: str) -> None:
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace

    inner = Tokenizer(WordLevel({"<unk>": 0, "<s>": 1, "</s>": 2, "red": 3, "ball": 4}, unk_token="<unk>"))
    inner.pre_tokenizer = Whitespace()
    folder.mkdir(exist_ok=True)
    inner.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", "unk_token": "<unk>", **more})
    )
    (folder / "config.json").write_text('{"model_type": "llama"}')


def test_a_tokenizer_of_transformers(tmp_path):
    _transformers_tokenizer(tmp_path / "one", bos_token="<s>", eos_token="</s>")
    tokenizer = load_tokenizer(str(tmp_path / "one"))
    assert (tokenizer.before, tokenizer.behind, tokenizer.end, tokenizer.size) == ((), (), 2, 5)
    assert tokenizer.encode(["red ball", "ball blue"]) == [[3, 4], [4, 0]]
    assert tokenizer.decode([1, 3, 4, 2]) == "red ball"
    _transformers_tokenizer(tmp_path / "two", bos_token="<s>")
    with pytest.raises(UserError, match="has no end-of-text token"):
        load_tokenizer(str(tmp_path / "two"))


@pytest.mark.parametrize("template", ["$A", "$A </s>", "<s> $A", "<s> $A </s> </s>"])
def test_the_tokenizers_own_template_is_known_and_its_truncation_is_not_used(tmp_path, template):
    from tokenizers import Tokenizer, processors
    from transformers import AutoTokenizer

    _transformers_tokenizer(tmp_path, bos_token="<s>", eos_token="</s>")
    inner = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    inner.post_processor = processors.TemplateProcessing(single=template, special_tokens=[("<s>", 1), ("</s>", 2)])
    inner.enable_truncation(2)
    inner.enable_padding(length=9)
    inner.save(str(tmp_path / "tokenizer.json"))
    tokenizer = load_tokenizer(str(tmp_path))
    (ids,) = tokenizer.encode(["red ball red"])
    assert ids == [3, 4, 3]
    whole = AutoTokenizer.from_pretrained(tmp_path)("red ball red")["input_ids"]
    assert [*tokenizer.before, *ids, *tokenizer.behind] == whole
    assert tokenizer.decode(whole) == "red ball red"


def test_a_file_that_a_tokenizer_lacks_is_named(tmp_path):
    _transformers_tokenizer(tmp_path, bos_token="<s>", eos_token="</s>")
    (tmp_path / "tokenizer_config.json").rename(tmp_path / "elsewhere")
    with pytest.raises(
        MissingError, match=r"tokenizer_config\.json is missing, which names the token that ends a text"
    ):
        load_tokenizer(str(tmp_path))
    (tmp_path / "elsewhere").rename(tmp_path / "tokenizer_config.json")
    (tmp_path / "tokenizer.json").unlink()
    for family in ("qwen2", "gpt_neox", "llama", "t5", "bert"):  # transformers makes an empty tokenizer of some
        (tmp_path / "tokenizer_config.json").unlink(missing_ok=True)
        (tmp_path / "config.json").write_text(json.dumps({"model_type": family}))
        with pytest.raises(MissingError, match=r"stream\.tokenizer: .*tokenizer\.json"):
            load_tokenizer(str(tmp_path))


def test_a_chat_template_is_the_tokenizers_own(tmp_path):
    _transformers_tokenizer(tmp_path, bos_token="<s>", eos_token="</s>")
    with pytest.raises(UserError, match="brings no chat template"):
        load_tokenizer(str(tmp_path)).chat("red")
    (tmp_path / "chat_template.jinja").write_text("{% for m in messages %}<s>{{ m.content }}</s>{% endfor %}ball")
    assert load_tokenizer(str(tmp_path)).chat("red") == "<s>red</s>ball"


def test_classes_of_equal_ids_are_both_named():
    same = [np.array([3, 2]), np.array([4, 2]), np.array([3, 2])]
    with pytest.raises(UserError, match="the classes 'a' and 'c' have the same token ids"):
        tokens.check_different(same, ["a", "b", "c"])
    tokens.check_different(same[:2], ["a", "b"])


def test_a_name_that_is_nowhere(monkeypatch):
    import huggingface_hub

    def fail(*args, **kwargs):
        raise OSError("no network")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", _not_cached)
    monkeypatch.setattr(huggingface_hub, "get_hf_file_metadata", fail)
    monkeypatch.setenv("CLPLAT_DATA", "/data")
    with pytest.raises(MissingError, match=r"not in the hub's cache.*https://huggingface\.co/no/such.*weights"):
        load_tokenizer("no/such")


def _not_cached(*args, **kwargs):
    from huggingface_hub.errors import LocalEntryNotFoundError

    raise LocalEntryNotFoundError("not there")


PIECES = [" t", "he", " a", "nd", " the", " and", " ", "t", "h", "e", "a", "n", "d", "é"]


def _folder(folder: Path, scored: dict[str, float]) -> None:
    """A model's folder whose tokenizer has single bytes and, from id 259 on, these pieces."""
    words = ["<unk>", "\n<s>\n", "\n</s>\n", *(f"<0x{b:02X}>" for b in range(256)), *scored]
    pieces = [[w.encode().hex(), scored.get(w, 0.0)] for w in words]
    keys = ("dim", "hidden_dim", "n_layers", "n_heads", "n_kv_heads", "max_seq_len")
    (folder / "config.json").write_text(json.dumps({**dict.fromkeys(keys, 1), "vocab_size": len(words)}))
    (folder / "tok9.json").write_text(json.dumps({"pieces": pieces}))


def _greedy(text: str, pieces: list[str]) -> list[int]:
    """Byte-pair encoding as llama2.c does it: characters or bytes, then the best-scored adjacent pair until none is."""
    number = {p: 259 + i for i, p in enumerate(pieces)}
    parts = [c if c in number else None for c in " " + text]
    ids: list[int] = []
    for char, part in zip(" " + text, parts, strict=True):
        ids += [number[part]] if part is not None else [b + 3 for b in char.encode()]
    while True:
        pairs = [pieces[a - 259] + pieces[b - 259] if min(a, b) >= 259 else "" for a, b in itertools.pairwise(ids)]
        found = [number[p] for p in pairs if p in number]
        if not found:
            return ids
        at = next(i for i, p in enumerate(pairs) if number.get(p) == min(found))  # a lower id is a better score
        ids[at : at + 2] = [min(found)]


@pytest.mark.parametrize(("te", "ea", "expected"), [(-1, -2, [" ", "te", "a"]), (-2, -1, [" ", "t", "ea"])])
def test_the_better_scored_of_two_pairs_that_exclude_each_other_is_merged(tmp_path, te, ea, expected):
    scored = {" ": -9.0, "t": -9.0, "e": -9.0, "a": -9.0, "te": float(te), "ea": float(ea)}
    _folder(tmp_path, scored)
    (ids,) = load_tokenizer(str(tmp_path)).encode(["tea"])
    assert [list(scored)[i - 259] for i in ids] == expected


def test_the_bpe_of_llama2c(tmp_path):
    _folder(tmp_path, {piece: float(-i) for i, piece in enumerate(PIECES)})
    tokenizer = load_tokenizer(str(tmp_path))
    for text in ["the and", "then a the", "tea\nand é", "日 the", ""]:
        (ids,) = tokenizer.encode([text])
        assert ids == (_greedy(text, PIECES) if text else [])
        assert tokenizer.decode([1, *ids, 2]) == text
    (tmp_path / "tok9.json").unlink()
    with pytest.raises(MissingError, match=r"no tok\*\.json in"):
        load_tokenizer(str(tmp_path))


ROOT = os.environ.get("CLPLAT_DATA")


@pytest.mark.skipif(not ROOT or not Path(ROOT, "weights/stories260k").is_dir(), reason="no stories260k at hand")
def test_the_tokenizer_of_the_small_llama(tmp_path):
    shutil.copytree(Path(ROOT, "weights/stories260k"), tmp_path / "copy")
    tokenizer = load_tokenizer(str(tmp_path / "copy"))
    text = "Title: Spaniards to run Luton airport\nText: Once upon a time, 30 % of é."
    pieces = json.loads((tmp_path / "copy" / "tok512.json").read_text())["pieces"][259:]
    (ids,) = tokenizer.encode([text])
    assert ids == _greedy(text, [bytes.fromhex(p).decode() for p, _ in pieces])
    assert tokenizer.decode(ids) == text
    assert (tokenizer.size, tokenizer.before, tokenizer.behind, tokenizer.end) == (512, (1,), (), 2)
