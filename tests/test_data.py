"""Text into tokens into batches: what is read, in which order, and what is refused."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moe_jax.config.errors import ConfigError
from moe_jax.config.schema import DataConfig
from moe_jax.train.corpus import check_same_text, load_corpus, unigram_entropy_nats
from moe_jax.train.data import TrainData, held_out_batches
from moe_jax.train.text import load_text
from moe_jax.train.tokenizer import ByteTokenizer


@pytest.fixture
def folder(tmp_path) -> Path:
    for name, text in {
        "b.txt": "bee\n",
        "a.txt": "ay\n",
        "sub/c.md": "sea\n",
        "sub/deep/d.txt": "dee\n",
        "empty.txt": "",
        ".hidden": "no\n",
        ".git/x.txt": "no\n",
    }.items():
        path = tmp_path / "text" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    (tmp_path / "text/image.bin").write_bytes(b"\x89PNG\0\1")
    return tmp_path / "text"


def _texts(*paths, **fields) -> list[str]:
    config = DataConfig(paths=tuple(map(str, paths)), **fields)
    return [document.text for document in load_text(config).documents]


def test_folders_are_read_recursively_in_sorted_order_without_hidden_and_binary_files(folder):
    assert _texts(folder) == ["ay\n", "bee\n", "sea\n", "dee\n"]
    text = load_text(DataConfig(paths=(str(folder),)))
    assert (text.num_bytes, text.num_skipped, text.num_capped) == (15, 2, 0)
    assert [Path(document.name).name for document in text.documents] == ["a.txt", "b.txt", "c.md", "d.txt"]


def test_globs_files_and_overlaps_are_read_once_in_sorted_order(folder):
    assert _texts(folder / "*.txt") == ["ay\n", "bee\n"]
    assert _texts(folder / "**/*.txt") == ["ay\n", "bee\n", "dee\n"]
    assert _texts(folder / "su?") == ["sea\n", "dee\n"]
    assert _texts(folder / "b.txt", folder / "a.txt", folder / "*.txt", folder) == _texts(folder)
    for name in ("0.txt", "z.txt"):
        (folder / name).symlink_to(folder / "b.txt")
    for paths in [[folder], [folder / "b.txt", folder], [folder / "z.txt", folder]]:
        assert _texts(*paths) == ["bee\n", "ay\n", "sea\n", "dee\n"]


def test_a_path_that_exists_is_no_glob_and_the_home_folder_is_known(folder, monkeypatch):
    (folder / "[a].txt").write_text("brackets\n")
    assert _texts(folder / "[a].txt") == ["brackets\n"]
    monkeypatch.setenv("HOME", str(folder))
    assert _texts("~/b.txt") == ["bee\n"]


def test_pipes_and_broken_links_in_folders_are_left_alone(folder):
    os.mkfifo(folder / "pipe")
    (folder / "broken").symlink_to(folder / "nowhere")
    assert len(_texts(folder)) == 4


def test_what_cannot_be_text_is_refused_with_its_name(folder):
    (folder / "sub/latin.txt").write_bytes("é".encode("latin-1"))
    (folder / "nothing").mkdir()
    for path, reason in [
        ("missing.txt", "matches no file"),
        ("*.rst", "matches no file"),
        ("nothing", "matches no file"),
        ("a\0b", "matches no file"),
        ("empty.txt", "is empty"),
        ("image.bin", "is binary"),
        ("sub/latin.txt", r"is not UTF-8 \(byte 0\)"),
        ("sub", r"is not UTF-8 \(byte 0\)"),
        ("imag*", "no text"),
    ]:
        with pytest.raises(ConfigError, match=reason) as caught:
            _texts(folder / path)
        assert "data.paths" in str(caught.value)
    with pytest.raises(ConfigError, match=r"latin\.txt"):
        _texts(folder / "sub")


def test_a_file_that_cannot_be_opened_is_refused_with_its_name(folder, monkeypatch):
    def refuse(path, mode):
        raise PermissionError(13, "Permission denied", path)

    monkeypatch.setattr("builtins.open", refuse)
    with pytest.raises(ConfigError, match=r"a\.txt.*Permission denied"):
        _texts(folder / "a.txt")


def test_the_cap_takes_files_from_everywhere_and_cuts_the_last_at_a_line(tmp_path):
    for index in range(64):
        (tmp_path / f"{index:02}.txt").write_text(f"{index:02} line one\n{index:02} line two\n")
    config = DataConfig(paths=(str(tmp_path),), max_bytes=24 * 8 + 15)
    text = load_text(config)
    assert [document.text[:2] for document in text.documents] == [
        "00", "04", "08", "16", "24", "32", "40", "48", "56",
    ]  # fmt: skip
    assert [document.text for document in text.documents if len(document.text) != 24] == ["04 line one\n"]
    assert text.num_bytes == 24 * 8 + 12 <= config.max_bytes
    assert text.num_capped == 64 - 9


@given(st.text(alphabet="aé€😀\n", min_size=8, max_size=40), st.integers(4, 60))
def test_the_cap_never_cuts_inside_a_character(tmp_path_factory, content, max_bytes):
    path = tmp_path_factory.mktemp("cap") / "one.txt"
    path.write_text(content, newline="")
    text = load_text(DataConfig(paths=(str(path),), max_bytes=max_bytes))
    assert content.startswith(text.documents[0].text)
    assert text.num_bytes <= max_bytes
    if len(content.encode()) <= max_bytes:
        assert text.documents[0].text == content


def test_no_paths_mean_the_standard_library_without_tests_and_packages():
    text = load_text(DataConfig(max_bytes=3_000_000))
    names = [Path(document.name) for document in text.documents]
    assert 1_000_000 < text.num_bytes <= 3_000_000
    assert all(name.suffix == ".py" for name in names)
    assert all(name.is_relative_to(Path(os.__file__).parent) for name in names)
    parts = {part for name in names for part in name.relative_to(Path(os.__file__).parent).parts}
    assert not parts & {"site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test"}
    assert len({name.name[0].lower() for name in names}) > 15  # from everywhere, not the first letters only


def test_a_python_without_sources_asks_for_paths(tmp_path, monkeypatch):
    monkeypatch.setattr("sysconfig.get_path", lambda name: str(tmp_path / "python.zip"))
    with pytest.raises(ConfigError, match=r"data\.paths.*name text files"):
        load_text(DataConfig())


def test_documents_end_with_the_end_token_and_the_held_out_part_starts_at_a_document(tmp_path):
    for name, size in [("a", 600), ("b", 290), ("c", 107)]:
        (tmp_path / name).write_text(name * size)
    config = DataConfig(paths=(str(tmp_path),), held_out_fraction=0.1)
    corpus = load_corpus(config, ByteTokenizer())
    assert corpus.train_tokens.tolist() == [*b"a" * 600, 257, *b"b" * 290, 257]
    assert corpus.held_out_tokens.tolist() == [*b"c" * 107, 257]
    # No boundary near: cut at the very point.
    config = DataConfig(paths=(str(tmp_path),), held_out_fraction=0.02)
    corpus = load_corpus(config, ByteTokenizer())
    assert len(corpus.held_out_tokens) == 20
    assert len(corpus.train_tokens) == 980
    corpus = load_corpus(DataConfig(paths=(str(tmp_path),), held_out_fraction=0.0), ByteTokenizer())
    assert (len(corpus.train_tokens), len(corpus.held_out_tokens)) == (1000, 0)


def test_the_fingerprint_tells_other_ids_order_and_split_apart_and_nothing_else(tmp_path):
    (tmp_path / "x").mkdir()
    (tmp_path / "x/a").write_text("first text " * 30)
    (tmp_path / "x/b").write_text("other text " * 30)
    config = DataConfig(paths=(str(tmp_path / "x"),), held_out_fraction=0.1)
    corpus = load_corpus(config, ByteTokenizer())
    (tmp_path / "x").rename(tmp_path / "y")
    same = load_corpus(DataConfig(paths=(str(tmp_path / "y/*"),), held_out_fraction=0.1), ByteTokenizer())
    assert same.fingerprint == corpus.fingerprint
    check_same_text(corpus.identity(), same)
    moved = (str(tmp_path / "y"),)
    other_split = load_corpus(DataConfig(paths=moved, held_out_fraction=0.2), ByteTokenizer())
    (tmp_path / "y/a").rename(tmp_path / "y/c")
    other_order = load_corpus(DataConfig(paths=moved, held_out_fraction=0.1), ByteTokenizer())
    assert len(other_order.train_tokens) == len(corpus.train_tokens)
    for other in (other_split, other_order):
        with pytest.raises(ConfigError, match=r"not what the checkpoint was trained on.*data\.paths"):
            check_same_text(corpus.identity(), other)


def test_unigram_entropy():
    assert unigram_entropy_nats(np.array([7, 7, 7])) == 0.0
    assert unigram_entropy_nats(np.repeat([1, 5, 6, 300], 9)) == pytest.approx(np.log(4))
    assert unigram_entropy_nats(np.array([0, 0, 0, 1])) == pytest.approx(
        -(0.75 * np.log(0.75) + 0.25 * np.log(0.25))
    )
    with pytest.raises(ValueError, match="no tokens"):
        unigram_entropy_nats(np.array([], np.uint16))


@given(
    num_tokens=st.integers(9, 400),
    seq_len=st.integers(1, 8),
    batch_size=st.integers(1, 7),
    seed=st.integers(0, 5),
)
def test_an_epoch_is_every_window_once_and_windows_do_not_overlap(num_tokens, seq_len, batch_size, seed):
    tokens = np.arange(num_tokens)
    data = TrainData(tokens, seq_len, batch_size, seed)
    assert data.windows_per_epoch >= max(1, num_tokens // seq_len - 1)
    num_steps = -(-3 * data.windows_per_epoch // batch_size)
    batches = [data.batch(step) for step in range(num_steps)]
    assert all(value.shape == (batch_size, seq_len) for batch in batches for value in batch.values())
    ids_WL = np.concatenate([batch["ids_BL"] for batch in batches])
    targets_WL = np.concatenate([batch["targets_BL"] for batch in batches])
    np.testing.assert_array_equal(targets_WL, ids_WL + 1)
    for epoch in range(3):
        part = ids_WL[epoch * data.windows_per_epoch : (epoch + 1) * data.windows_per_epoch]
        assert len(np.unique(part)) == part.size
        starts = part[:, 0]
        assert len(set(starts % seq_len)) == 1
        np.testing.assert_array_equal(np.diff(np.sort(starts)), seq_len)


def test_epochs_differ_in_order_and_offset_and_runs_differ_by_seed():
    tokens = np.arange(10_000, dtype=np.int32)
    data = TrainData(tokens, seq_len=50, batch_size=199, seed=3)
    assert data.windows_per_epoch == 199
    epochs = [data.batch(step)["ids_BL"][:, 0] for step in range(8)]
    assert len({start[0] % 50 for start in epochs}) > 4
    assert len({tuple(np.argsort(start)) for start in epochs}) == 8
    assert not np.array_equal(TrainData(tokens, 50, 199, seed=4).batch(0)["ids_BL"], data.batch(0)["ids_BL"])
    assert data.epoch(0) == 0.0
    assert data.epoch(3) == 3.0


def test_a_batch_depends_on_the_step_alone():
    tokens = np.random.default_rng(0).integers(0, 272, 5_000).astype(np.uint16)
    data = TrainData(tokens, seq_len=16, batch_size=40, seed=1)
    in_order = [data.batch(step) for step in range(60)]
    for step in np.random.default_rng(1).permutation(60):
        fresh = TrainData(tokens, seq_len=16, batch_size=40, seed=1)
        for batch in (data.batch(step), fresh.batch(step)):
            assert batch.keys() == {"ids_BL", "targets_BL"}
            for name, value in batch.items():
                assert value.dtype == np.int32
                np.testing.assert_array_equal(value, in_order[step][name])


def test_the_order_is_the_same_on_every_machine_and_numpy():
    data = TrainData(np.arange(1000), seq_len=10, batch_size=5, seed=7)
    assert [data.batch(step)["ids_BL"][:, 0].tolist() for step in (0, 20, 10**12)] == [
        [563, 263, 493, 143, 243],
        [832, 752, 712, 122, 112],
        [899, 169, 889, 919, 699],
    ]


def test_a_batch_may_span_many_epochs():
    data = TrainData(np.arange(12), seq_len=4, batch_size=7, seed=0)
    assert data.windows_per_epoch == 2
    starts = np.concatenate([data.batch(step)["ids_BL"][:, 0] for step in range(2)])
    assert all(abs(first - second) == 4 for first, second in starts.reshape(-1, 2))


@given(st.integers(9, 300), st.integers(1, 8), st.integers(1, 5), st.integers(1, 6))
def test_held_out_batches_cover_the_text_and_overlap_only_if_they_must(num_tokens, seq_len, batch_size, num):
    tokens = np.arange(num_tokens)
    batches = held_out_batches(tokens, seq_len, batch_size, num)
    assert 1 <= len(batches) <= num
    starts = np.concatenate([batch["ids_BL"][:, 0] for batch in batches])
    assert all(batch["ids_BL"].shape == (batch_size, seq_len) for batch in batches)
    np.testing.assert_array_equal(np.concatenate([b["targets_BL"] for b in batches])[:, -1], starts + seq_len)
    if len(batches) > 1 or (num_tokens - 1) // seq_len >= batch_size:
        assert np.all(np.diff(starts) >= seq_len)
    if (num_tokens - 1) // seq_len >= num * batch_size:
        assert len(batches) == num
    if starts.size > 1:
        assert starts[-1] == num_tokens - 1 - seq_len


def test_text_shorter_than_a_window_is_refused():
    assert TrainData(np.arange(9), 8, 2, 0).batch(5)["targets_BL"][0, -1] == 8
    with pytest.raises(ConfigError, match=r"data\.seq_len = 8: the training text has 8 tokens.*needs 9"):
        TrainData(np.arange(8), 8, 2, 0)
    with pytest.raises(ConfigError, match=r"held-out text has 0 tokens.*data\.held_out_fraction"):
        held_out_batches(np.arange(0), 8, 2, 1)
    with pytest.raises(ValueError, match="step = -1"):
        TrainData(np.arange(9), 8, 2, 0).batch(-1)


def test_reading_text_needs_no_jax():
    code = "import sys, moe_jax.train.data, moe_jax.train.corpus; sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
