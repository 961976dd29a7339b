"""Checkpoints: bit for bit on any mesh, and never taken for good when they are not."""

import json
import logging
import os
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from moe_jax.checkpoint import CheckpointError, CheckpointStore, layout, open_checkpoint
from moe_jax.checkpoint.leaves import named_leaves

META = {"config": {"model": {"d_model": 8}}, "data": {"fingerprint": "abc"}, "note": "é", "rate": 0.1}


def _mesh(*sizes: int) -> Mesh:
    names = ("a", "b", "c")[: len(sizes)]
    return Mesh(np.array(jax.devices()[: int(np.prod(sizes))]).reshape(sizes), names)


MESHES = {"16": _mesh(16), "2x8": _mesh(2, 8), "1": _mesh(1)}


def _spec(mesh: Mesh, shape: tuple[int, ...]) -> PartitionSpec:
    """Shards as many dims as there are axes that divide them; the rest is replicated."""
    axes = list(mesh.shape.items())
    spec = [axes.pop(0)[0] if axes and size % axes[0][1] == 0 else None for size in shape]
    return PartitionSpec(*spec)


def _place(mesh: Mesh, tree):
    def place(leaf):
        leaf = np.asarray(leaf)
        return jax.device_put(leaf, NamedSharding(mesh, _spec(mesh, leaf.shape)))

    return jax.tree.map(place, tree)


def _abstract(mesh: Mesh, tree):
    def abstract(leaf):
        return jax.ShapeDtypeStruct(
            leaf.shape, leaf.dtype, sharding=NamedSharding(mesh, _spec(mesh, leaf.shape))
        )

    return jax.tree.map(abstract, tree)


def _host_params(seed: int = 0):
    """Every kind of leaf: dtypes, ranks, and values that arithmetic would lose (NaN bits, -0, subnormals)."""
    random = np.random.default_rng(seed)
    odd_bits = random.integers(0, 2**32, (32, 16), dtype=np.uint32).view(np.float32)
    return {
        "embed": {"table": odd_bits},
        "blocks": {
            "experts": {"w_up": random.normal(size=(2, 16, 8, 4))},
            "router": {"w": random.normal(size=(2, 8, 16)).astype(jnp.bfloat16)},
        },
        "special": np.array([np.nan, -0.0, np.inf, 5e-324, -np.nan, 1.0, 2.0, 3.0]),
        "scale": np.float32(-0.0),
    }


def _host_state(seed: int = 0):
    params = _host_params(seed)
    finite = jax.tree.map(lambda x: np.nan_to_num(np.asarray(x, np.float32)), params)
    opt = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3)).init(finite)
    random = np.random.default_rng(seed + 1)
    opt = jax.tree.map(lambda x: random.uniform(0, 99, x.shape).astype(x.dtype), opt)
    return {"params": params, "opt": opt, "step": np.int32(7), "halted_at": np.int32(-1)}


def _assert_same_bits(left, right):
    left, right = named_leaves(left), named_leaves(right)
    assert left.keys() == right.keys()
    for name in left:
        one, other = np.asarray(left[name]), np.asarray(right[name])
        assert one.dtype == other.dtype, name
        assert one.shape == other.shape, name
        assert one.tobytes() == other.tobytes(), name


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    """A run folder with a checkpoint of the 2x8 mesh at step 10; never written by tests."""
    run_dir = tmp_path_factory.mktemp("run")
    with CheckpointStore(run_dir / "checkpoints") as store:
        store.save(10, _place(MESHES["2x8"], _host_state()), META)
    return run_dir


@pytest.fixture
def copied(saved, tmp_path) -> Path:
    """A step folder that a test may damage."""
    return shutil.copytree(saved / "checkpoints/10", tmp_path / "checkpoints/10")


# ---- bits and shardings ------------------------------------------------------------------------------------


@pytest.mark.smoke
@pytest.mark.parametrize("target", MESHES)
@pytest.mark.parametrize("source", MESHES)
def test_every_bit_comes_back_on_any_mesh(source, target, tmp_path):
    state = _host_state()
    with CheckpointStore(tmp_path) as store:
        store.save(3, _place(MESHES[source], state), META)
        store.wait()
        wanted = _abstract(MESHES[target], state)
        restored = store.restore(3, wanted)
        assert jax.tree.structure(restored) == jax.tree.structure(state)
        _assert_same_bits(restored, state)
        params = store.restore_params(3, wanted["params"])
        _assert_same_bits(params, state["params"])
        for found, want in [(restored, wanted), (params, wanted["params"])]:
            for name, leaf in named_leaves(found).items():
                assert leaf.sharding == named_leaves(want)[name].sharding, name
        assert store.meta(3) == META


def test_the_weights_alone_are_read_without_the_optimizer_state(copied):
    checkpoint = open_checkpoint(copied)
    shutil.rmtree(copied / "training")
    wanted = _abstract(MESHES["16"], _host_state())
    _assert_same_bits(checkpoint.restore_params(wanted["params"]), _host_params())
    with pytest.raises(CheckpointError, match=r"training/.*is missing or cut"):
        checkpoint.restore(wanted)


@pytest.mark.parametrize("mesh", MESHES)
def test_the_state_may_be_donated_as_soon_as_save_returns(mesh, tmp_path):
    spoil = jax.jit(lambda tree: jax.tree.map(lambda x: x * 0 - 7, tree), donate_argnums=0)
    # Large enough to be still on its way to disk when the donation comes.
    host = {"params": {"w": np.arange(2**21, dtype=np.float32).reshape(2**8, 2**13), "b": np.ones(7)}}
    with CheckpointStore(tmp_path, keep=9) as store:
        spoil(_place(MESHES[mesh], host))
        for step in range(4):
            state = jax.block_until_ready(
                jax.jit(lambda tree: jax.tree.map(lambda x: x + 0, tree))(_place(MESHES[mesh], host))
            )
            store.save(step, state, {})
            for _ in range(3):
                state = jax.block_until_ready(spoil(state))
        store.wait()
        for step in range(4):
            _assert_same_bits(store.restore(step, _abstract(MESHES[mesh], host)), host)


# ---- what does not fit -------------------------------------------------------------------------------------


def _changed(name: str, shape=None, dtype=None, sharding=True):
    wanted = _abstract(MESHES["16"], _host_state())
    parent = wanted["params"]["blocks"][name]
    leaf = parent["w"]
    place = NamedSharding(MESHES["1"], PartitionSpec()) if sharding else None
    parent["w"] = jax.ShapeDtypeStruct(shape or leaf.shape, dtype or leaf.dtype, sharding=place)
    return wanted


def test_another_shape_or_dtype_is_refused_by_name_before_any_data_is_read(copied):
    checkpoint = open_checkpoint(copied)
    for item in ("params", "training"):
        shutil.rmtree(copied / item)
    missing, extra = _changed("router"), _changed("router")
    del missing["params"]["blocks"]["router"]
    extra["params"]["head"] = {"w": extra["step"]}
    for wanted, message in [
        (
            _changed("router", shape=(2, 8, 32)),
            r"router/w: checkpoint bfloat16\[2,8,16\], wanted bfloat16\[2,8,32\].*config in its meta",
        ),
        (
            _changed("router", dtype=jnp.float32),
            r"router/w: checkpoint bfloat16\[2,8,16\], wanted float32\[2,8,16\].*restore as bfloat16",
        ),
        (missing, r"params/blocks/router/w: in the checkpoint, not wanted"),
        (extra, r"params/head/w: not in the checkpoint"),
        (_changed("router", sharding=False), r"params/blocks/router/w: wanted without a sharding"),
    ]:
        for restore, tree in [(checkpoint.restore, wanted), (checkpoint.restore_params, wanted["params"])]:
            with pytest.raises(CheckpointError, match=message):
                restore(tree)
    other_optimizer = {**_changed("router"), "opt": optax.sgd(1e-3, momentum=0.9).init(_changed("router"))}
    with pytest.raises(CheckpointError, match=r"opt/.*and \d+ more"):
        checkpoint.restore(other_optimizer)


def test_float64_without_64_bit_mode_is_refused(saved):
    with jax.enable_x64(False), pytest.raises(CheckpointError, match="jax_enable_x64"):
        open_checkpoint(saved).restore_params(_abstract(MESHES["1"], _host_params()))


def test_what_cannot_be_saved_is_refused_by_name(tmp_path):
    with CheckpointStore(tmp_path) as store:
        for state, meta, message in [
            ({"opt": jnp.ones(2)}, {}, "no params"),
            ({"params": {"w": np.ones(2)}}, {}, "params/w: is a ndarray"),
            ({"params": {"w": jax.random.key(0)}}, {}, "params/w: has dtype key.*key_data"),
            ({"params": {"w": jnp.ones(2)}}, {"loss": float("nan")}, "meta must be JSON"),
            ({"params": {"w": jnp.ones(2)}}, {"path": Path()}, "meta must be JSON"),
        ]:
            with pytest.raises(CheckpointError, match=message):
                store.save(1, state, meta)
        assert store.steps() == []
        store.save(1, {"params": {"w": jnp.ones(2)}}, {})
    assert store.steps() == [1]


# ---- damage ------------------------------------------------------------------------------------------------


def _flip(path: Path, at: float):
    data = bytearray(path.read_bytes())
    data[min(int(len(data) * at), len(data) - 1)] ^= 0x10
    path.write_bytes(data)


def test_the_manifest_names_every_file_of_the_arrays(saved):
    folder = saved / "checkpoints/10"
    files = {
        path.relative_to(folder).as_posix()
        for item in ("params", "training")
        for path in _files(folder / item)
    }
    assert set(json.loads((folder / "moe_jax.json").read_text())["files"]) == files
    assert len(files) > 20


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


@pytest.mark.parametrize("damage", ["flip", "cut", "gone", "longer"])
@pytest.mark.parametrize("item", ["params", "training"])
def test_a_changed_file_is_found_by_name_before_it_becomes_weights(item, damage, copied):
    checkpoint = open_checkpoint(copied)
    wanted = _abstract(MESHES["16"], _host_state())
    for number, file in enumerate(_files(copied / item)):
        content = file.read_bytes()
        if damage == "flip":
            _flip(file, number % 10 / 10)
        elif damage == "gone":
            file.unlink()
        else:
            file.write_bytes(content[:-1] if damage == "cut" else content + b"x")
        name = file.relative_to(copied).as_posix()
        with pytest.raises(CheckpointError, match=f"{name} .*older step") as caught:
            checkpoint.restore(wanted)
        assert str(copied) in str(caught.value)
        if damage != "flip":
            assert layout.list_steps(copied.parent) == []
        file.write_bytes(content)
    _assert_same_bits(checkpoint.restore(wanted), _host_state())


def test_damaged_or_newer_meta_is_refused(copied):
    path = copied / "moe_jax.json"
    content = path.read_text()
    path.write_text(content.replace('"d_model": 8', '"d_model": 9'))
    with pytest.raises(CheckpointError, match="damaged"):
        open_checkpoint(copied)
    path.write_text(content[:50])
    with pytest.raises(CheckpointError, match="cannot be read"):
        open_checkpoint(copied)
    path.write_text(json.dumps({"format_version": 2, "made_by": {"moe_jax": "9.0"}}))
    with pytest.raises(CheckpointError, match=r"format 2, .* reads format 1.*9\.0"):
        open_checkpoint(copied)


# ---- which steps there are ---------------------------------------------------------------------------------


def test_a_checkpoint_is_found_by_run_folder_checkpoints_folder_or_step(saved, copied):
    for path in (saved, saved / "checkpoints", saved / "checkpoints/10", str(saved), copied.parent):
        checkpoint = open_checkpoint(path)
        assert checkpoint.step == 10
        assert checkpoint.meta == META
        assert checkpoint.made_by["num_devices"] == 16
        assert open_checkpoint(path, step=10).step == 10
    renamed = copied.rename(copied.with_name("released"))
    assert open_checkpoint(renamed).step == 10
    with pytest.raises(CheckpointError, match="is step 10, not step 11"):
        open_checkpoint(renamed, step=11)
    with pytest.raises(CheckpointError, match="no step 11; it holds 10"):
        open_checkpoint(saved, step=11)


def test_paths_without_a_checkpoint_are_refused(copied, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("")
    for path, message in [("missing", "does not exist"), ("file", "is a file"), ("empty", "no complete")]:
        with pytest.raises(CheckpointError, match=f"{path}: .*{message}"):
            open_checkpoint(tmp_path / path)
    unfinished = copied.rename(copied.with_name("10.orbax-checkpoint-tmp"))
    with pytest.raises(CheckpointError, match=r"no complete checkpoint .*10\.orbax-checkpoint-tmp"):
        open_checkpoint(copied.parent)
    with pytest.raises(CheckpointError, match="not a whole checkpoint"):
        open_checkpoint(unfinished)


def test_a_step_without_all_its_parts_is_no_checkpoint(copied, saved, caplog):
    directory = copied.parent
    parts = ["moe_jax.json", "params", "training", "params/manifest.ocdbt", "training/_METADATA"]
    for number, part in enumerate(parts, start=20):
        step_dir = shutil.copytree(copied, directory / str(number))
        (shutil.rmtree if (step_dir / part).is_dir() else os.unlink)(step_dir / part)
        assert layout.list_steps(directory) == [10]
        assert open_checkpoint(directory).step == 10
        with pytest.raises(CheckpointError, match=r"not a whole checkpoint|no complete"):
            open_checkpoint(step_dir)
    (directory / "99").write_text("not a folder")
    shutil.copytree(copied, directory / "010")
    assert layout.list_steps(directory) == [10]
    # A writer sets them aside, so that training can save these steps again.
    with caplog.at_level(logging.WARNING), CheckpointStore(directory, keep=2) as store:
        assert store.steps() == [10]
        assert sum("set aside as" in record.message for record in caplog.records) == len(parts)
        for step in (20, 21):
            store.save(step, _place(MESHES["1"], _host_state()), META)
    assert layout.list_steps(directory) == [20, 21]
    assert (directory / "20.incomplete-1").is_dir()


def test_the_newest_few_are_kept(tmp_path):
    state = {"params": {"w": jnp.arange(8)}}
    with CheckpointStore(tmp_path, keep=2) as store:
        assert store.latest_step() is None
        for step in (0, 5, 7, 100):
            store.save(step, state, {"step": step})
        store.wait()
        assert store.steps() == [7, 100]
        assert store.latest_step() == 100
        assert [store.meta(step)["step"] for step in store.steps()] == [7, 100]
        with pytest.raises(CheckpointError, match="no step 5; it holds 7, 100"):
            store.meta(5)
        for step in (100, 7, -1):
            with pytest.raises(CheckpointError, match=f"step {step}: cannot be saved.*newest step is 100"):
                store.save(step, state, {})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["100", "7"]
    with CheckpointStore(tmp_path, keep=1) as store:
        assert store.steps() == [7, 100]  # opening deletes nothing
        store.save(101, state, {})
    assert store.steps() == [101]
