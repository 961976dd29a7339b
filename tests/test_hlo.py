"""The collective counter against programs whose collectives are known by hand."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hlo_samples import ADD, ASYNC, KNOWN_TRIPS, SIXTEEN
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from moe_jax.plan.hlo import Collective, collectives, summary
from moe_jax.plan.hlo_text import HloError

LINE = Mesh(np.array(jax.devices()), ("x",))
GRID = Mesh(np.array(jax.devices()).reshape(2, 8), ("a", "b"))
ALL = (tuple(range(16)),)
ROWS = (tuple(range(8)), tuple(range(8, 16)))
COLUMNS = tuple((i, i + 8) for i in range(8))

pytestmark = pytest.mark.smoke


def compiled(
    function: Callable[..., object], *shapes: tuple[int, ...], mesh: Mesh = LINE, outputs: object = None
) -> list[Collective]:
    """Collectives of a float32 function of shards; dim 0 of every input is cut over all devices."""
    cut = PartitionSpec(mesh.axis_names)
    mapped = jax.shard_map(
        function,
        mesh=mesh,
        in_specs=cut,
        out_specs=cut if outputs is None else outputs,
        check_vma=False,
    )
    arguments = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    return collectives(jax.jit(mapped).lower(*arguments).compile().as_text())


def only(found: list[Collective]) -> Collective:
    assert len(found) == 1, found
    return found[0]


def test_nested_scans_multiply() -> None:
    def inner(x: jax.Array, _: None) -> tuple[jax.Array, None]:
        return jnp.sin(lax.psum(x, "x")), None

    def outer(x: jax.Array, _: None) -> tuple[jax.Array, None]:
        return jnp.cos(lax.scan(inner, x, None, length=3)[0]), None

    one = only(compiled(lambda x: lax.scan(outer, x, None, length=4)[0], (16, 64)))
    assert (one.kind, one.count, one.trips_known, one.conditional) == ("all-reduce", 12, True, False)
    assert (one.dtype, one.operand_bytes, one.result_bytes) == ("f32", 256, 256)
    assert one.sent_bytes == 2 * 15 / 16 * 256
    assert (one.group_size, one.groups, one.source_target_pairs) == (16, ALL, ())
    assert one.op_name.endswith("/psum")


def test_loop_test_runs_once_more_than_the_body() -> None:
    def keep_on(state: tuple[jax.Array, jax.Array]) -> jax.Array:
        step, x = state
        return (step < 7) & (lax.pmax(x, "x")[0, 0] < 1e30)

    def loop(x: jax.Array) -> jax.Array:
        return lax.while_loop(
            keep_on, lambda state: (state[0] + 1, lax.psum(state[1], "x")), (jnp.int32(0), x)
        )[1]

    tests, rounds = compiled(loop, (16, 64))
    assert [(one.count, one.trips_known) for one in (tests, rounds)] == [(1, False), (1, False)]
    assert [(one.op_name, one.count) for one in collectives(KNOWN_TRIPS)] == [("test", 7), ("body", 6)]


def test_all_to_all_in_groups() -> None:
    one = only(compiled(lambda x: lax.all_to_all(x, "b", 0, 0, tiled=True), (256, 64), mesh=GRID))
    assert (one.kind, one.count, one.group_size, one.groups) == ("all-to-all", 1, 8, ROWS)
    assert (one.operand_bytes, one.result_bytes, one.sent_bytes) == (4096, 4096, 7 / 8 * 4096)
    one = only(compiled(lambda x: lax.all_to_all(x, "a", 0, 0, tiled=True), (256, 64), mesh=GRID))
    assert (one.group_size, one.groups, one.sent_bytes) == (2, COLUMNS, 2048)


def test_ppermute_ring_and_chain() -> None:
    ring = [(i, (i + 1) % 16) for i in range(16)]
    one = only(compiled(lambda x: lax.ppermute(x, "x", ring), (16, 64)))
    assert (one.kind, one.count, one.group_size) == ("collective-permute", 1, 16)
    assert (one.source_target_pairs, one.groups) == (tuple(ring), ())
    assert (one.operand_bytes, one.result_bytes, one.sent_bytes) == (256, 256, 256)
    one = only(compiled(lambda x: lax.ppermute(x, "a", [(0, 1)]), (16, 64), mesh=GRID))
    assert one.source_target_pairs == COLUMNS


def test_all_gather_and_psum_scatter() -> None:
    one = only(
        compiled(
            lambda x: lax.all_gather(x, "a", tiled=True), (16, 64), mesh=GRID, outputs=PartitionSpec("b")
        )
    )
    assert (one.kind, one.groups) == ("all-gather", COLUMNS)
    assert (one.operand_bytes, one.result_bytes, one.sent_bytes) == (256, 512, 256)
    one = only(compiled(lambda x: lax.psum_scatter(x, "x", tiled=True), (256, 64)))
    assert (one.kind, one.group_size) == ("reduce-scatter", 16)
    assert (one.operand_bytes, one.result_bytes, one.sent_bytes) == (4096, 256, 15 / 16 * 4096)


def test_psum_of_a_tuple_counts_every_array() -> None:
    found = compiled(lambda x, y: lax.psum((x, y, x * y), "x"), (16, 64), (16, 64), outputs=PartitionSpec())
    assert sum(one.num_operands for one in found) == 3
    assert sum(one.operand_bytes * one.count for one in found) == 3 * 256
    assert sum(one.sent_bytes * one.count for one in found) == 2 * 15 / 16 * 3 * 256


def test_branches_are_conditional_and_loops_around_them_count() -> None:
    def body(x: jax.Array, step: jax.Array) -> tuple[jax.Array, None]:
        go_on = lax.pmax(jnp.sum(x), "x") > step
        return lax.cond(go_on, lambda x: lax.psum(jnp.sin(x), "x"), lambda x: x * 2, x), None

    always, sometimes = compiled(lambda x: lax.scan(body, x, jnp.arange(5, dtype=jnp.float32))[0], (16, 64))
    assert (always.count, always.conditional, always.operand_bytes) == (5, False, 4)
    assert (sometimes.count, sometimes.conditional, sometimes.operand_bytes) == (5, True, 256)


def test_backward_pass_counts_recomputation() -> None:
    @jax.checkpoint
    def exchange(x: jax.Array) -> jax.Array:
        return lax.psum(jnp.sin(lax.all_to_all(x, "x", 0, 0, tiled=True)), "x")

    def loss(x: jax.Array) -> jax.Array:
        return lax.scan(lambda x, _: (exchange(x), None), x, None, length=6)[0].sum()

    totals = summary(compiled(jax.grad(loss), (256, 64)))
    assert {kind: total.count for kind, total in totals.items()} == {"all-reduce": 12, "all-to-all": 18}
    assert totals["all-to-all"].sent_bytes == 18 * 15 / 16 * 4096


def test_collectives_of_the_partitioner_are_seen() -> None:
    def sharding(*axes: str | None) -> NamedSharding:
        return NamedSharding(GRID, PartitionSpec(*axes))

    product = jax.jit(
        lambda x, w, v: jnp.sin(x @ w) @ v,
        in_shardings=(sharding("a", None), sharding("a", "b"), sharding("b", "a")),
        out_shardings=sharding("a", None),
    )
    shapes = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((16, 32), (32, 64), (64, 32))]
    totals = summary(collectives(product.lower(*shapes).compile().as_text()))
    assert totals["all-reduce"].sent_bytes == 2 * 7 / 8 * (8 * 32 * 4)
    assert totals["all-gather"].operand_bytes == 16 * 8 * 4 + 8 * 16 * 4


def test_groups_over_two_axes_and_over_part_of_one() -> None:
    cube = Mesh(np.array(jax.devices()).reshape(2, 2, 2, 2), ("p", "d", "e", "t"))
    one = only(compiled(lambda x: lax.psum(x, ("e", "p")), (16, 64), mesh=cube))
    assert one.groups == ((0, 8, 2, 10), (1, 9, 3, 11), (4, 12, 6, 14), (5, 13, 7, 15))
    blocks = [list(range(start, start + 4)) for start in range(0, 16, 4)]
    one = only(compiled(lambda x: lax.psum(x, "x", axis_index_groups=blocks), (16, 64)))
    assert one.groups == tuple(map(tuple, blocks))
    reshape = jax.jit(
        lambda x: x.reshape(4, 2048).sum(1),
        in_shardings=NamedSharding(LINE, PartitionSpec("x")),
        out_shardings=NamedSharding(LINE, PartitionSpec()),
    )
    found = collectives(reshape.lower(jax.ShapeDtypeStruct((8192,), jnp.float32)).compile().as_text())
    assert {(one.kind, one.groups) for one in found} == {
        ("all-reduce", tuple(map(tuple, blocks))),
        ("all-gather", tuple((i, i + 4, i + 8, i + 12) for i in range(4))),
    }


def test_summary_keeps_conditional_apart() -> None:
    def branch(x: jax.Array) -> jax.Array:
        return lax.all_to_all(x, "x", 0, 0, tiled=True)

    def run(x: jax.Array) -> jax.Array:
        return lax.cond(lax.pmax(x[0, 0], "x") > 0, lambda x: branch(jnp.sin(x)), lambda x: x, branch(x))

    total = summary(compiled(run, (256, 64)))["all-to-all"]
    assert (total.count, total.operand_bytes, total.sent_bytes) == (1, 4096, 3840)
    assert (total.conditional_count, total.conditional_operand_bytes) == (1, 4096)
    assert (total.conditional_sent_bytes, total.trips_known) == (3840, True)


# What follows is text in the forms that other backends and versions print.


def one_line(instruction: str, operand: str = "f32[16,64]{1,0}") -> list[Collective]:
    """Collectives of a program of one parameter and one instruction."""
    result = instruction.split(" = ")[1].split(" all-")[0]
    return collectives(
        f"{SIXTEEN}{ADD}ENTRY %main (x: f32[16,64]) -> {result} {{\n"
        f"  %x = {operand} parameter(0)\n  ROOT {instruction}\n}}\n"
    )


def test_start_done_pairs_count_once() -> None:
    found = {one.kind: one for one in collectives(ASYNC)}
    assert len(found) == len(collectives(ASYNC)) == 6
    mib = 1024 * 512 * 2
    sizes = {kind: (one.operand_bytes, one.result_bytes, one.sent_bytes) for kind, one in found.items()}
    assert sizes == {
        "all-to-all": (mib, mib, mib * 15 / 16),
        "reduce-scatter": (mib, mib / 8, mib * 7 / 8),
        "collective-permute": (mib, mib, mib),
        "all-reduce": (mib, mib, mib),
        "ragged-all-to-all": (mib, mib, mib * 15 / 16),
        "all-gather": (mib, 16 * mib, 15 * mib),
    }
    assert [kind for kind, one in found.items() if one.conditional] == ["all-to-all"]
    assert found["all-to-all"].op_name == "jit(f)/all_to_all"
    assert found["reduce-scatter"].groups == ROWS
    assert found["all-reduce"].groups == COLUMNS
    assert found["collective-permute"].source_target_pairs == ((0, 8), (1, 1))


@pytest.mark.parametrize(
    ("text", "groups"),
    [
        ("{{0,1},{2,3}}", ((0, 1), (2, 3))),
        ("{}", ALL),
        ("[2,8]<=[16]", ROWS),
        ("[8,2]<=[2,8]T(1,0)", COLUMNS),
        ("[2,10]<=[4,5]T(1,0)", ((0, 5, 10, 15, 1, 6, 11, 16, 2, 7), (12, 17, 3, 8, 13, 18, 4, 9, 14, 19))),
        ("mesh['a'=2,'b'=8] {'b'}", ROWS),
        ("mesh['a'=2,'b'=8] {'a'}", COLUMNS),
        ("mesh['x'=16] {'x':(4)4}", tuple(tuple(range(i, i + 4)) for i in range(0, 16, 4))),
        ("mesh['x'=16] {'x':(1)4}", tuple((i, i + 4, i + 8, i + 12) for i in range(4))),
        ("mesh['x'=8] {'x':(2)2}", ((0, 2), (1, 3), (4, 6), (5, 7))),
        ("mesh['a'=2,'b'=2], device_ids=([2,2]T(1,0)) {'b'}", ((0, 2), (1, 3))),
        ("mesh['a'=2,'b'=2], device_ids=(3,1,0,2) {'a'}", ((3, 0), (1, 2))),
    ],
)
def test_every_way_to_write_groups(text: str, groups: tuple[tuple[int, ...], ...]) -> None:
    one = only(
        one_line(f"%r = f32[16,64]{{1,0}} all-reduce(%x), channel_id=1, replica_groups={text}, to_apply=%add")
    )
    assert one.groups == groups
    assert one.group_size == len(groups[0])


def test_dtypes_narrower_than_a_byte_and_pred() -> None:
    for dtype, num_bytes in (("pred", 1024), ("s4", 512), ("f8e4m3fn", 1024), ("bf16", 2048), ("c64", 8192)):
        shape = f"{dtype}[16,64]{{1,0}}"
        line = f"%r = {shape} all-to-all(%x), channel_id=1, replica_groups={{}}, dimensions={{0}}"
        assert only(one_line(line, operand=shape)).operand_bytes == num_bytes


def test_bf16_may_enter_a_float32_sum() -> None:
    line = "%r = f32[16,64]{1,0} all-reduce(%x), channel_id=1, replica_groups={}, to_apply=%add"
    one = only(one_line(line, operand="bf16[16,64]{1,0}"))
    assert (one.dtype, one.operand_bytes, one.sent_bytes) == ("bf16", 2048, 2 * 15 / 16 * 4096)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("not a program", "expected 'HloModule"),
        (ASYNC[:-2], "cut off"),
        (
            ASYNC.replace("%yes = pred[] parameter(1)", "%yes pred[] parameter(1)"),
            "line 28: not an instruction",
        ),
        (
            ASYNC.replace("replica_groups=[2,8]<=[16]", "replica_groups=octets"),
            "unknown form of replica_groups",
        ),
        (ASYNC.replace("replica_groups=[2,8]<=[16]", "replica_groups=mesh['a'=2] {'b'}"), "does not have"),
        (ASYNC.replace("replica_groups=[2,8]<=[16]", "replica_groups=[4,4]<=[16]"), "expected 131072"),
        (ASYNC.replace("all-reduce-start(%x)", "all-reduce-start(%y)"), "operands .'y'. that"),
        (ASYNC.replace("calls=%wrapped", "calls=%gone"), "calls computation 'gone'"),
        (ASYNC.replace("async-start(%x), calls=%wrapped", "send(%x), channel_id=3"), "point-to-point"),
        (ASYNC.replace("all-reduce-start(%x)", "collective-broadcast-start(%x)"), "collective-broadcast"),
        (
            ASYNC.replace("bf16[1024,512]{1,0} all-reduce-start", "odd[1024,512]{1,0} all-reduce-start"),
            "'odd'",
        ),
    ],
)
def test_what_cannot_be_read_is_refused(text: str, message: str) -> None:
    with pytest.raises(HloError, match=message.replace("(", r"\(")):
        collectives(text)
