"""Operators: the function itself outside a graph, one node inside one."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from chitu_diffusion.ops.custom_op import Operator, operator

DIRECT: list[bool] = []


@operator("chitu_test::twice")
def twice(x: Tensor, times: float) -> Tensor:
    """2 x times."""
    DIRECT.append(True)
    return x * (2 * times)


@twice.register_fake
def _(x: Tensor, times: float) -> Tensor:
    return torch.empty_like(x)


@pytest.fixture
def through_torch(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Calls that torch's dispatcher saw."""
    seen: list[str] = []
    held = twice.op

    def op(*given: object) -> Tensor:
        seen.append("op")
        return held(*given)

    monkeypatch.setattr(twice, "op", op)
    return seen


def test_outside_a_graph_the_function_is_called(through_torch: list[str]) -> None:
    x = torch.randn(3)
    with torch.no_grad():
        assert torch.equal(twice(x, 2.0), 4 * x)
    with torch.inference_mode():
        assert torch.equal(twice(torch.nn.Parameter(x), 2.0), 4 * x)
    assert through_torch == []
    assert twice.__doc__ == "2 x times." and isinstance(twice, Operator)


def test_arguments_by_name_are_taken() -> None:
    x = torch.randn(3)
    with torch.no_grad():
        assert torch.equal(twice(x=x, times=2.0), 4 * x)


def test_gradients_and_stand_ins_go_through_torch(through_torch: list[str]) -> None:
    twice(torch.randn(3), 1.0)
    assert through_torch == ["op"]
    with torch.no_grad(), FakeTensorMode():
        assert twice(torch.empty(5), 1.0).shape == (5,)
    assert through_torch == ["op"] * 2


def test_a_graph_holds_it_whole() -> None:
    graphs: list[torch.fx.GraphModule] = []

    def look(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> torch.fx.GraphModule:
        graphs.append(graph)
        return graph

    with torch.no_grad():
        x = torch.randn(4)
        found = torch.compile(lambda x: twice(x + 1, 3.0) - 1, backend=look, fullgraph=True)(x)
    assert torch.equal(found, (x + 1) * 6 - 1)
    (graph,) = graphs
    assert [node.target for node in graph.graph.nodes if "twice" in str(node.target)] == [
        torch.ops.chitu_test.twice.default
    ]
