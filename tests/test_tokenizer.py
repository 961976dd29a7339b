"""Tokenizers: round trips, specials, and what is refused."""

import json
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st

from moe_jax.config.errors import ConfigError
from moe_jax.train.tokenizer import ByteTokenizer, FileTokenizer, create_tokenizer, tokenizer_of_checkpoint


@pytest.fixture(scope="module")
def bpe_file(tmp_path_factory) -> Path:
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(["the cat sat on the mat, the hat"] * 20, trainer)
    path = tmp_path_factory.mktemp("bpe") / "tokenizer.json"
    tokenizer.save(str(path))
    return path


@given(st.text())
def test_bytes_round_trip(text):
    tokenizer = ByteTokenizer()
    ids_T = tokenizer.encode(text)
    assert ids_T.dtype == np.int32
    assert ids_T.tolist() == list(text.encode())
    assert tokenizer.decode(ids_T) == text


def test_byte_specials_are_skipped_and_broken_utf8_is_replaced():
    tokenizer = ByteTokenizer()
    assert tokenizer.vocab_size == 272
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == (256, 257, 258)
    assert tokenizer.decode([256, 104, 271, 105, 257]) == "hi"
    assert tokenizer.decode([0xC3]) == "�"
    assert tokenizer.decode([]) == ""


def test_undecoded_bytes_come_out_as_they_were():
    assert ByteTokenizer().encode(b"\xff".decode(errors="surrogateescape")).tolist() == [255]
    with pytest.raises(ValueError, match="surrogates not allowed"):
        ByteTokenizer().encode("\ud800")


@pytest.mark.parametrize(("ids", "named"), [([1, -1], "-1"), ([272], "272"), (np.zeros((2, 3)), r"\(2, 3\)")])
def test_ids_that_cannot_be_decoded_are_refused(ids, named):
    with pytest.raises(ValueError, match=named):
        ByteTokenizer().decode(ids)


@given(st.text(alphabet=st.characters(exclude_categories=["Cs"])))
def test_file_round_trip(bpe_file, text):
    tokenizer = FileTokenizer(bpe_file)
    ids_T = tokenizer.encode(text)
    assert ids_T.dtype == np.int32
    assert tokenizer.decode(ids_T) == text


def test_file_specials_and_vocabulary(bpe_file):
    tokenizer = FileTokenizer(bpe_file)
    assert (tokenizer.bos_id, tokenizer.eos_id) == (0, 1)
    assert tokenizer.vocab_size == len(tokenizers.Tokenizer.from_file(str(bpe_file)).get_vocab())
    assert tokenizer.decode([0, *tokenizer.encode("the mat"), 1]) == "the mat"
    assert len(tokenizer.encode("the cat")) < len("the cat")
    with pytest.raises(ValueError, match="outside the vocabulary"):
        tokenizer.decode([tokenizer.vocab_size])


def test_a_vocabulary_with_holes_counts_to_its_largest_id(bpe_file, tmp_path):
    content = json.loads(bpe_file.read_text())
    content["added_tokens"].append({**content["added_tokens"][1], "id": 999, "content": "<extra>"})
    path = tmp_path / "holes.json"
    path.write_text(json.dumps(content))
    last_id = max(tokenizers.Tokenizer.from_file(str(path)).get_vocab().values())
    assert FileTokenizer(path).vocab_size == last_id + 1


def test_a_vocabulary_without_end_token_has_none(tmp_path):
    path = tmp_path / "words.json"
    tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0, "?": 1}, unk_token="?")).save(str(path))
    tokenizer = FileTokenizer(path)
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.vocab_size) == (None, None, 2)


def test_unusable_files_are_refused_with_their_name(tmp_path):
    (tmp_path / "text.json").write_text("hello")
    (tmp_path / "other.json").write_text('{"a": 1}')
    (tmp_path / "list.json").write_text("[]")
    (tmp_path / "bytes.json").write_bytes(b"\xff\xfe\x00")
    tokenizers.Tokenizer(tokenizers.models.BPE()).save(str(tmp_path / "empty.json"))
    for name, reason in [
        ("missing.json", "does not exist"),
        ("", "is a folder"),
        ("text.json", "is not JSON"),
        ("bytes.json", "is not JSON"),
        ("other.json", "not a tokenizer"),
        ("list.json", "not a tokenizer"),
        ("empty.json", "empty vocabulary"),
    ]:
        with pytest.raises(ConfigError, match=reason) as caught:
            create_tokenizer(str(tmp_path / name))
        assert "data.tokenizer" in str(caught.value)
        assert name in str(caught.value)


def test_more_ids_than_the_model_has_is_refused_with_the_fix(bpe_file):
    assert create_tokenizer("bytes", 272).vocab_size == 272
    with pytest.raises(ConfigError, match=r"model\.vocab_size = 271.*at least 272.*--model\.vocab-size 272"):
        create_tokenizer("bytes", 271)
    with pytest.raises(ConfigError, match=r"model\.vocab_size"):
        create_tokenizer(str(bpe_file), FileTokenizer(bpe_file).vocab_size - 1)


def test_a_checkpoint_finds_its_tokenizer_again(bpe_file, tmp_path):
    assert isinstance(tokenizer_of_checkpoint(ByteTokenizer().to_json(), tmp_path), ByteTokenizer)
    identity = json.loads(json.dumps(FileTokenizer(bpe_file).to_json()))
    found = tokenizer_of_checkpoint(identity, tmp_path)
    assert isinstance(found, FileTokenizer)
    assert found.path == bpe_file
    moved = {**identity, "path": str(tmp_path / "gone.json")}
    with pytest.raises(ConfigError, match="put the file"):
        tokenizer_of_checkpoint(moved, tmp_path)
    # The copy in the run folder is enough, however it is spaced, and another vocabulary is not.
    (tmp_path / "tokenizer.json").write_text(json.dumps(json.loads(bpe_file.read_text()), indent=7))
    assert tokenizer_of_checkpoint(moved, tmp_path).to_json()["sha256"] == identity["sha256"]
    content = json.loads(bpe_file.read_text())
    content["added_tokens"][0]["content"] = "<other>"
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(ConfigError, match="put the file"):
        tokenizer_of_checkpoint(moved, tmp_path)
    with pytest.raises(ConfigError, match="does not know"):
        tokenizer_of_checkpoint({"type": "sentencepiece"}, tmp_path)
