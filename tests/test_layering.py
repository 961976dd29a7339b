"""The architecture's rules, read off the imports and names in the sources.

Imports go down only, so a layer can be read, tested and replaced without what is above it; the model never
learns of devices, so it stays the math as written for one.
"""

import ast
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# Lowest first. Packages of one row do not import each other, but where siblings may, one way.
LAYERS = (
    {"config"},
    {"ops", "emulate"},
    {"model", "parallel", "plan"},
    {"deployments"},
    {"checkpoint", "train", "infer"},
    {"compare", "bench", "api"},
    {"scripts"},
)
RANKS = {package: rank for rank, packages in enumerate(LAYERS) for package in packages}
SIBLINGS_MAY_IMPORT = LAYERS[4]
ROOT_PACKAGE = "moe_jax"  # its own __init__ imports nothing until used; all but its version is for scripts

MESH_AXES = {"pipe", "data", "expert", "tensor"}
DEVICE_NAMES = {
    *("Mesh", "AbstractMesh", "make_mesh", "NamedSharding", "PartitionSpec", "shard_map", "smap"),
    *("devices", "local_devices", "device_count", "local_device_count", "device_put"),
    *("psum", "pmean", "pmax", "pmin", "psum_scatter", "all_gather", "all_to_all", "ragged_all_to_all"),
    *("ppermute", "pshuffle", "pcast", "pvary", "axis_index", "axis_size"),
}
MAX_LINES = 400

Sources = dict[str, str]  # module name, such as moe_jax.model.moe or scripts.train -> its source
Check = Callable[[Sources], Iterator[str]]


def read_sources(*folders: str) -> Sources:
    sources = {}
    for folder in folders:
        for path in sorted((ROOT / folder).rglob("*.py")):
            parts = path.relative_to(ROOT).with_suffix("").parts
            sources[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path.read_text()
    return sources


def package_of(module: str) -> str:
    """The package of :data:`LAYERS` that a module belongs to; the root package's is its own name."""
    parts = module.split(".")
    return parts[0] if parts[0] == "scripts" or len(parts) == 1 else parts[1]


def imports_of(module: str, sources: Sources) -> set[str]:
    """Modules of this project that a module imports, anywhere in it, also inside functions."""
    is_package = any(name.startswith(module + ".") for name in sources)
    found = set()
    for node in ast.walk(ast.parse(sources[module])):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names} - {ROOT_PACKAGE}
        elif isinstance(node, ast.Attribute) and ast.unparse(node.value) == ROOT_PACKAGE:
            found.add(_home(ROOT_PACKAGE, node.attr, sources))
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = module.split(".")[: len(module.split(".")) - node.level + is_package]
                base = ".".join([*parents, *([base] if base else [])])
            found |= {_home(base, alias.name, sources) for alias in node.names}
    return {name for name in found if name.split(".")[0] in ("moe_jax", "scripts")} - {module}


def _home(base: str, name: str, sources: Sources) -> str:
    """The module that `name` of `base` comes from; "" for the version, which is free to all."""
    if (base, name) == (ROOT_PACKAGE, "__version__"):
        return ""
    submodule = f"{base}.{name}"
    known = any(module == submodule or module.startswith(submodule + ".") for module in sources)
    return submodule if known else base


def layer_errors(sources: Sources) -> Iterator[str]:
    """Imports that go up or across, and packages that no layer names."""
    crossings = set()
    for module in sources:
        source = package_of(module)
        if source != ROOT_PACKAGE and source not in RANKS:
            yield f"{module}: package {source!r} has no place in LAYERS"
            continue
        for imported in imports_of(module, sources):
            target = package_of(imported)
            if target == source:
                continue
            if target == ROOT_PACKAGE:
                allowed = source == "scripts"
            elif source == ROOT_PACKAGE:
                allowed = target == "api"  # for type checkers; a test below sees that nothing runs it
            else:
                siblings = {source, target} <= SIBLINGS_MAY_IMPORT
                allowed = siblings or RANKS.get(target, len(LAYERS)) < RANKS[source]
                crossings |= {(source, target)} if siblings else set()
            if not allowed:
                yield f"{module} imports {imported}: {target} is not below {source}"
    for source, target in sorted(crossings):
        if source < target and (target, source) in crossings:
            yield f"{source} and {target} import each other"


def cycle_errors(sources: Sources) -> Iterator[str]:
    """Modules that import each other, directly or through others."""
    done: set[str] = set()

    def follow(module: str, path: tuple[str, ...]) -> Iterator[str]:
        if module in path:
            yield "import cycle: " + " -> ".join([*path[path.index(module) :], module])
        elif module not in done:
            for imported in sorted(imports_of(module, sources) & sources.keys()):
                yield from follow(imported, (*path, module))
            done.add(module)

    for module in sources:
        yield from follow(module, ())


def model_errors(sources: Sources) -> Iterator[str]:
    """Places in the model that name a mesh axis, a device or a collective."""
    for module, source in sources.items():
        if package_of(module) != "model":
            continue
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value in MESH_AXES:
                yield f"{module}:{node.lineno} names the mesh axis {node.value!r}"
            names = set()
            if isinstance(node, ast.Name):
                names = {node.id}
            elif isinstance(node, ast.Attribute):
                names = {node.attr}
            elif isinstance(node, ast.ImportFrom | ast.Import):
                names = {part for alias in node.names for part in alias.name.split(".")}
            for name in sorted(names & DEVICE_NAMES):
                yield f"{module}:{getattr(node, 'lineno', 0)} uses {name}"


def jax_errors(sources: Sources) -> Iterator[str]:
    """Imports of jax, or of what is built on it, in the configuration."""
    heavy = {"jax", "jaxlib", "flax", "optax", "orbax"}
    for module, source in sources.items():
        if package_of(module) not in ("config", ROOT_PACKAGE):
            continue
        for node in ast.walk(ast.parse(source)):
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and not node.level:
                names = [node.module or ""]
            yield from (f"{module} imports {name}" for name in names if name.split(".")[0] in heavy)


def length_errors(sources: Sources) -> Iterator[str]:
    """Files too long to have one job."""
    for module, source in sources.items():
        if (num_lines := len(source.splitlines())) > MAX_LINES:
            yield f"{module} has {num_lines} lines; at most {MAX_LINES}"


@pytest.mark.parametrize("check", [layer_errors, cycle_errors, model_errors, jax_errors])
def test_sources_keep_the_rules(check: Check) -> None:
    sources = read_sources("moe_jax", "scripts")
    assert "moe_jax.model.transformer" in sources
    assert list(check(sources)) == []


@pytest.mark.parametrize(
    ("check", "sources", "error"),
    [
        (layer_errors, {"moe_jax.ops.a": "import moe_jax.model.b"}, "model is not below ops"),
        (
            layer_errors,
            {"moe_jax.model.a": "from moe_jax.parallel import mesh"},
            "parallel is not below model",
        ),
        (
            layer_errors,
            {"moe_jax.parallel.a": "from moe_jax.model.moe import x"},
            "model is not below parallel",
        ),
        (layer_errors, {"moe_jax.plan.a": "def f():\n  import moe_jax.deployments"}, "is not below plan"),
        (layer_errors, {"moe_jax.train.a": "from ..compare import report"}, "compare is not below train"),
        (layer_errors, {"moe_jax.train.a": "from moe_jax import load"}, "moe_jax is not below train"),
        (layer_errors, {"moe_jax.train.a": "import moe_jax\nmoe_jax.load"}, "moe_jax is not below train"),
        (layer_errors, {"moe_jax": "from moe_jax.config import x"}, "config is not below moe_jax"),
        (layer_errors, {"moe_jax.new.a": ""}, "'new' has no place in LAYERS"),
        (
            layer_errors,
            {"moe_jax.train.a": "import moe_jax.infer.b", "moe_jax.infer.c": "import moe_jax.train.d"},
            "infer and train import each other",
        ),
        (
            cycle_errors,
            {
                "moe_jax.ops.a": "from . import b",
                "moe_jax.ops.b": "from .c import x",
                "moe_jax.ops.c": "from .a import y",
            },
            "moe_jax.ops.a -> moe_jax.ops.b -> moe_jax.ops.c -> moe_jax.ops.a",
        ),
        (
            cycle_errors,
            {"moe_jax.ops": "from moe_jax.ops.a import x", "moe_jax.ops.a": "from moe_jax.ops import y"},
            "moe_jax.ops -> moe_jax.ops.a -> moe_jax.ops",
        ),
        (model_errors, {"moe_jax.model.a": "x = ('expert', None)"}, "names the mesh axis 'expert'"),
        (model_errors, {"moe_jax.model.a": "jax.lax.psum(x, axis)"}, "uses psum"),
        (model_errors, {"moe_jax.model.a": "from jax import shard_map as s"}, "uses shard_map"),
        (model_errors, {"moe_jax.model.a": "n = len(jax.devices())"}, "uses devices"),
        (model_errors, {"moe_jax.model.a": "from jax.sharding import Mesh"}, "uses Mesh"),
        (jax_errors, {"moe_jax.config.a": "def f():\n  import jax.numpy as jnp"}, "imports jax.numpy"),
        (jax_errors, {"moe_jax": "from flax import nnx"}, "imports flax"),
        (length_errors, {"tests.test_a": "x = 1\n" * (MAX_LINES + 1)}, "tests.test_a has 401 lines"),
    ],
)
def test_each_rule_finds_its_breach(check: Check, sources: Sources, error: str) -> None:
    errors = list(check(sources))
    assert len(errors) == 1, errors
    assert error in errors[0]


@pytest.mark.parametrize(
    ("check", "sources"),
    [
        (
            layer_errors,
            {"moe_jax.train.a": "from moe_jax.checkpoint import store\nfrom moe_jax.config import x"},
        ),
        (layer_errors, {"moe_jax": "if TYPE_CHECKING:\n  from moe_jax.api import load"}),
        (layer_errors, {"moe_jax.train.a": "import moe_jax\nx = moe_jax.__version__"}),
        (
            layer_errors,
            {"scripts.train": "import moe_jax\nmoe_jax.load\nfrom moe_jax.train.step import Trainer"},
        ),
        (cycle_errors, {"moe_jax.ops": "", "moe_jax.ops.a": "from . import b", "moe_jax.ops.b": ""}),
        (model_errors, {"moe_jax.model.a": '"""One expert."""\nx = {"experts": 1}'}),
        (model_errors, {"moe_jax.parallel.a": "jax.lax.psum(x, 'expert')"}),
        (length_errors, {"tests.test_a": "x = 1\n" * MAX_LINES}),
    ],
)
def test_what_is_allowed_passes(check: Check, sources: Sources) -> None:
    assert list(check(sources)) == []


def test_config_and_package_import_without_jax() -> None:
    code = "import sys, moe_jax, moe_jax.config; print('jax' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_public_names_resolve() -> None:
    import moe_jax

    assert dir(moe_jax) == sorted(moe_jax.__all__)
    for name in moe_jax.__all__:
        assert getattr(moe_jax, name) is not None
    with pytest.raises(AttributeError, match=r"no attribute 'absent'.*__version__"):
        _ = moe_jax.absent


def test_files_are_short() -> None:
    sources = read_sources("moe_jax", "scripts", "tests")
    assert "tests.test_layering" in sources
    assert list(length_errors(sources)) == []
