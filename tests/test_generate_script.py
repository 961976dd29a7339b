"""scripts/generate.py: prompts in, text out, from a checkpoint in any deployment."""

import importlib.util
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from config_tools import refusal
from run_tools import compiled_once, small_run

import moe_jax
from moe_jax.checkpoint import CheckpointStore
from moe_jax.config import to_dict
from moe_jax.config.cli import run_script
from moe_jax.infer.text import stream_one
from moe_jax.train.tokenizer import ByteTokenizer

SCRIPT = Path(__file__).parents[1] / "scripts" / "generate.py"
NUM_NEW = 8


@pytest.fixture(scope="module", autouse=True)
def _compiled_once(tmp_path_factory):
    with compiled_once(tmp_path_factory.getbasetemp() / "compiled"):
        yield


@pytest.fixture(scope="module")
def main() -> Iterator[Callable[[list[str]], int]]:
    spec = importlib.util.spec_from_file_location("generate_script", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "generate_script", script)  # where the options' help texts are looked up
        spec.loader.exec_module(script)
        yield script.main


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory) -> Path:
    """A run folder with fresh weights, large enough that the text varies."""
    folder = tmp_path_factory.mktemp("generate")
    run = small_run(folder / "text.txt", folder, "single", {"model.init_std": 0.3}).config
    model, _ = moe_jax.build(run)
    meta = {"config": to_dict(run), "tokenizer": ByteTokenizer().to_json()}
    with CheckpointStore(folder / "checkpoints") as store:
        store.save(0, {"params": model.deployment.init_params(0)}, meta)
    return folder


def continued(run_dir: Path, prompts: list[str], **sampling) -> list[str]:
    """What the Python API makes of prompts of equal length."""
    ids_BL = np.stack([ByteTokenizer().encode(prompt) for prompt in prompts])
    new_BL = moe_jax.load(run_dir).generate(ids_BL, NUM_NEW, **sampling)[:, ids_BL.shape[1] :]
    return [ByteTokenizer().decode(ids) for ids in new_BL]


@pytest.mark.parametrize("deployment", ["single", "ep16"])
def test_a_prompt_is_continued_as_generate_does(main, run_dir, capsys, deployment):
    (expected,) = continued(run_dir, ["def f"])
    options = ["--checkpoint", str(run_dir), "--deployment", deployment, "--max-new-tokens", str(NUM_NEW)]
    assert run_script(main, [*options, "--prompt", "def f"]) == 0
    assert capsys.readouterr().out == f"def f{expected}\n"


def test_sampling_follows_temperature_and_seed(main, run_dir, capsys):
    texts = {}
    for seed in (1, 2):
        options = ["--max-new-tokens", str(NUM_NEW), "--temperature", "1.5", "--seed", str(seed)]
        assert run_script(main, ["--checkpoint", str(run_dir), "--prompt", "def f", *options]) == 0
        texts[seed] = capsys.readouterr().out
        (expected,) = continued(run_dir, ["def f"], temperature=1.5, seed=seed)
        assert texts[seed] == f"def f{expected}\n"
    assert texts[1] != texts[2]


def test_a_file_of_prompts_becomes_json_lines(main, run_dir, tmp_path, capsys):
    prompts = ["def f", "x", "ä =1"]  # of 5, 1 and 5 bytes
    source, target = tmp_path / "prompts.txt", tmp_path / "answers.jsonl"
    source.write_text("\n".join(prompts) + "\n", encoding="utf-8")
    options = ["--checkpoint", str(run_dir), "--max-new-tokens", str(NUM_NEW), "--prompts", str(source)]
    assert run_script(main, [*options, "--output", str(target)]) == 0
    assert capsys.readouterr().out == ""
    lines = [json.loads(line) for line in target.read_text(encoding="utf-8").splitlines()]
    assert [line["prompt"] for line in lines] == prompts
    texts = {line["prompt"]: line["text"] for line in lines}
    for group in (["def f", "ä =1"], ["x"]):
        assert [texts[prompt] for prompt in group] == continued(run_dir, group)
    assert run_script(main, options) == 0
    assert capsys.readouterr().out == target.read_text(encoding="utf-8")


GOOD = ["--prompt", "a"]
BAD = [
    ([], "give one of them"),
    (["--prompt", "a", "--prompts", "{text}"], "give one of them"),
    (["--prompt", ""], "is empty"),
    (["--prompts", "{blank_line}"], "is empty"),
    (["--prompts", "{run}/none.txt"], "cannot be read"),
    (["--prompts", "{binary}"], "cannot be read"),
    ([*GOOD, "--output", "{run}/out"], "goes with --prompts"),
    (["--prompts", "{text}", "--output", "{run}/none/out"], "output = "),
    (["--prompts", "{text}", "--output", "{run}"], "output = "),
    ([*GOOD, "--max-new-tokens", "0"], "max_new_tokens = 0"),
    ([*GOOD, "--max-new-tokens", "many"], "--max-new-tokens"),
    ([*GOOD, "--temperature", "-1"], "temperature"),
    ([*GOOD, "--temperature", "nan"], "temperature"),
    ([*GOOD, "--seed", "-1"], "seed"),
    ([*GOOD, "--seed", "4294967296"], "seed"),
    ([*GOOD, "--temprature", "1"], "temperature"),
    ([*GOOD, "--deployment", "ep61"], "ep16"),
    ([*GOOD, "--deployment", "expert=5"], "num_experts"),
    ([*GOOD, "--deployment", "data=32"], "must be at most 16"),
    ([*GOOD, "--checkpoint", "{run}/nowhere"], "does not exist"),
    ([*GOOD, "--checkpoint", "{text}"], "is a file"),
    ([*GOOD, "--checkpoint", "{empty}"], "holds no complete checkpoint"),
]


@pytest.mark.parametrize(("options", "said"), BAD)
def test_what_cannot_be_is_refused_in_one_line(main, run_dir, tmp_path, options, said):
    places = {"run": run_dir, "text": tmp_path / "t", "blank_line": tmp_path / "b", "binary": tmp_path / "x"}
    places["empty"] = tmp_path / "empty"
    places["text"].write_text("a\n")
    places["blank_line"].write_text("a\n\nb\n")
    places["binary"].write_bytes(b"\xff\xfe")
    places["empty"].mkdir()
    argv = [option.format(**places) for option in options]
    if "--checkpoint" not in argv:
        argv += ["--checkpoint", str(run_dir)]
    assert said in refusal(main, argv)


class Spoken:
    """A model that says these ids, whatever it is asked."""

    def __init__(self, ids: bytes):
        self.ids = ids

    def stream(self, ids_BL, max_new_tokens: int, temperature: float, seed: int) -> Iterator[np.ndarray]:
        yield from (np.asarray([value], np.int32) for value in self.ids[:max_new_tokens])


def pieces(ids: bytes) -> list[str]:
    return list(stream_one(Spoken(ids), ByteTokenizer(), "p", len(ids), 0.0, 0))


def test_characters_of_many_bytes_are_streamed_whole():
    text = "a–b\N{GRINNING FACE}é"
    streamed = pieces(text.encode())
    assert [piece for piece in streamed if piece] == ["p", *text]


@pytest.mark.parametrize(
    "ids",
    [
        "é".encode()[:1],  # ends inside a character
        "\N{GRINNING FACE}".encode()[:3] + b"abc",  # a character that breaks off
        b"\xff\xffabc\xff",  # bytes that begin none
        "é".encode()[1:] + "–".encode(),
        "real \N{REPLACEMENT CHARACTER} sign".encode(),
        "\N{REPLACEMENT CHARACTER}".encode(),
        b"",
    ],
)
def test_whatever_is_streamed_adds_up_to_the_text(ids):
    assert "".join(pieces(ids)) == "p" + ids.decode("utf-8", errors="replace")
