"""The placement must say what the devices really hold: it is checked against the values in their shards."""

from dataclasses import replace

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from moe_jax.config import ModelConfig, parse_deployment
from moe_jax.deployments import Deployment, create
from moe_jax.deployments.placement import (
    Held,
    PlacementError,
    check_one_expert_per_device,
    expert_placement,
    placement_rows,
)

MODEL = ModelConfig(
    num_layers=4,
    d_model=32,
    num_heads=8,
    num_experts=16,
    expert_hidden=64,
    vocab_size=32,
    expert_type="gated",
)
MESHES = ["single", "ep16", "tp8pp2", "expert=8,tensor=2", "data=2,expert=4,tensor=2", "pipe=4,expert=4"]


def _deployment(name: str, model: ModelConfig = MODEL) -> Deployment:
    return create(model, parse_deployment(name))


def _labelled(deployment: Deployment, at_rest: bool = False) -> dict:
    """Parameters as the deployment lays them, each element of an expert matrix its flat index [N,E,D,F]."""
    cfg = deployment.model_config
    shape = (cfg.num_layers, cfg.num_experts, cfg.d_model, cfg.expert_hidden)
    labels = np.arange(np.prod(shape), dtype=np.int32).reshape(shape)
    values = {"w_up": labels, "w_gate": labels, "w_down": labels.swapaxes(2, 3)}
    specs = deployment.specs(at_rest)["blocks"]["experts"]
    placed = {name: jax.device_put(value, deployment.sharding(specs[name])) for name, value in values.items()}
    return {"blocks": {"experts": placed}}


@pytest.mark.parametrize("at_rest", [False, True])
@pytest.mark.parametrize("name", MESHES)
def test_placement_is_what_the_shards_hold(name: str, at_rest: bool) -> None:
    deployment = _deployment(name)
    params = _labelled(deployment, at_rest)
    placement = expert_placement(params, deployment.mesh)
    matrices = params["blocks"]["experts"]
    shape = matrices["w_up"].shape
    for matrix, array in matrices.items():
        shards = {shard.device: np.asarray(shard.data) for shard in array.addressable_shards}
        for held, device in zip(placement.held, deployment.mesh.devices.flat, strict=True):
            ranges = (held.layers, held.experts, held.width, held.hidden)
            block = np.ix_(*(range(*span) for span in ranges))
            expected = np.arange(np.prod(shape)).reshape(shape)[block]
            found = shards[device] if matrix != "w_down" else shards[device].swapaxes(2, 3)
            np.testing.assert_array_equal(found, expected)


def test_ep16_holds_one_expert_a_device() -> None:
    deployment = _deployment("ep16")
    params = deployment.init_params(seed=0)  # the real parameters, not laid out by this test
    placement = expert_placement(params, deployment.mesh)
    check_one_expert_per_device(placement)
    assert [held.experts for held in placement.held] == [(i, i + 1) for i in range(16)]
    assert {held.layers for held in placement.held} == {(0, 4)}
    assert [held.coordinates for held in placement.held] == [(0, 0, i, 0) for i in range(16)]


def test_replicas_and_stages_of_one_expert_a_device_pass() -> None:
    model = replace(MODEL, num_experts=4)
    deployment = _deployment("pipe=2,data=2,expert=4", model)
    placement = expert_placement(deployment.init_params(seed=0), deployment.mesh)
    check_one_expert_per_device(placement)
    assert placement.held[5] == Held(5, (0, 1, 1, 0), (0, 2), (1, 2), (0, 64), (0, 32))
    assert placement.held[9] == Held(9, (1, 0, 1, 0), (2, 4), (1, 2), (0, 64), (0, 32))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("single", "device 0 holds layers 0-3, experts 0-15, width 0-31, hidden 0-63, not one whole expert"),
        ("tp8pp2", "device 0 holds layers 0-1, experts 0-15, width 0-31, hidden 0-7, not one"),
        ("expert=8,tensor=2", "device 0 holds layers 0-3, experts 0-1, width 0-31, hidden 0-31, not one"),
    ],
)
def test_more_or_less_than_one_expert_is_refused(name: str, message: str) -> None:
    deployment = _deployment(name)
    placement = expert_placement(_labelled(deployment), deployment.mesh)
    with pytest.raises(PlacementError, match=message):
        check_one_expert_per_device(placement)


def test_half_an_expert_is_refused() -> None:
    """Each device then has one expert id per layer, and yet not one expert."""
    deployment = _deployment("expert=8,tensor=2", replace(MODEL, num_experts=8))
    placement = expert_placement(_labelled(deployment), deployment.mesh)
    with pytest.raises(PlacementError, match="hidden 0-31, not one whole expert per layer"):
        check_one_expert_per_device(placement)


def _relaid(spec: PartitionSpec) -> tuple[dict, Deployment]:
    """Parameters of ep16, all expert matrices laid out by another spec."""
    deployment = _deployment("ep16", replace(MODEL, num_layers=16))
    sharding = NamedSharding(deployment.mesh, spec)
    matrices = _labelled(deployment)["blocks"]["experts"]
    return {"blocks": {"experts": jax.device_put(matrices, sharding)}}, deployment


def test_a_wrong_sharding_is_caught() -> None:
    params, deployment = _relaid(PartitionSpec("expert"))  # the layers are split, not the experts
    placement = expert_placement(params, deployment.mesh)
    with pytest.raises(PlacementError, match=r"device 0 holds layers 0, experts 0-15, .*, not one whole"):
        check_one_expert_per_device(placement)


def test_matrices_cut_differently_are_caught() -> None:
    params, deployment = _relaid(PartitionSpec(None, "expert"))
    matrix = params["blocks"]["experts"]["w_down"]
    whole = NamedSharding(deployment.mesh, PartitionSpec())
    params["blocks"]["experts"]["w_down"] = jax.device_put(matrix, whole)
    with pytest.raises(PlacementError, match=r"device 0 holds .*experts 0, .* of w_up, but .*experts 0-15, "):
        expert_placement(params, deployment.mesh)


def test_an_expert_that_nobody_holds_is_caught() -> None:
    """Needs a placement made by hand: no single array can lack a part."""
    deployment = _deployment("ep16")
    placement = expert_placement(_labelled(deployment), deployment.mesh)
    twice = replace(placement.held[4], experts=(3, 4))
    held = (*placement.held[:4], twice, *placement.held[5:])
    with pytest.raises(
        PlacementError, match=r"expert 4 of layer 0 is held by 0 devices, and expert 3 .* by 2"
    ):
        check_one_expert_per_device(replace(placement, held=held))


def test_weights_on_other_devices_are_refused() -> None:
    deployment, other = _deployment("ep16"), _deployment("single")
    with pytest.raises(PlacementError, match="lies on 1 devices, not on the 16 of the mesh"):
        expert_placement(_labelled(other), deployment.mesh)


def _rows(name: str, at_rest: bool = False) -> list[tuple[str, ...]]:
    deployment = _deployment(name)
    placement = expert_placement(_labelled(deployment, at_rest), deployment.mesh)
    return [(row.devices, row.layers, row.experts, row.hidden) for row in placement_rows(placement)]


def test_rows_say_everything_in_few_lines() -> None:
    numbers = " | ".join(str(i) for i in range(16))
    eighths = " | ".join(f"{8 * i}-{8 * i + 7}" for i in range(8))
    assert _rows("single") == [("0", "all 4", "all 16", "all 64")]
    assert _rows("ep16") == [("0-15", "all 4", numbers, "all 64")]
    assert _rows("tp8pp2") == [("0-7", "0-1", "all 16", eighths), ("8-15", "2-3", "all 16", eighths)]
    quarters = " | ".join(f"2 devices: {4 * i}-{4 * i + 3}" for i in range(4))
    row = ("0-15", "all 4", f"2 times: {quarters}", "8 times: 0-31 | 32-63")
    assert _rows("data=2,expert=4,tensor=2") == [row]


def test_rows_show_what_is_split_at_rest() -> None:
    (row,) = _rows("data=2,expert=4,tensor=2", at_rest=True)
    first, second = (f"0-31 x width {width} | 32-63 x width {width}" for width in ("0-15", "16-31"))
    assert row[3] == " | ".join([first] * 4 + [second] * 4)


def test_placement_reads_no_values() -> None:
    """It must work on weights too large to copy: here they are only described."""
    deployment = _deployment("ep16")
    described = expert_placement(deployment.abstract_params(), deployment.mesh)
    assert described == expert_placement(_labelled(deployment), deployment.mesh)
