"""A simple model of what torch.compile fuses, applied to the graphs of autograd ahead of time.

Dynamo traces each repeated block as in training, AOTAutograd splits it into a forward and a
backward graph with Inductor's decompositions and its choice of what to keep, and `fused_kernels`
counts the kernels of each graph. Inductor itself needs a device and does not run.

The model. Products, convolutions, fused attention and other operations without a decomposition are
kernels of their own, as in eager mode. Everything else is elementwise or a reduction. An
elementwise result is stored only if such a kernel or the graph's output needs it; otherwise it is
computed again wherever it is used. A reduction's result is always a value that later ones start
from. Stored results and reductions go into one kernel where they loop over the same elements, share
an input or follow one another, and no other kernel stands between them: reductions along the
last axes together with elementwise results, reductions along the first axes only with their like.
A kernel reads each of its inputs once and writes what others need. Not modelled: epilogues of
products, Inductor's limits on the size of a kernel, joint row and column reductions, recompilation.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.partitioners import min_cut_rematerialization_partition
from torch.utils._pytree import tree_leaves, tree_map

from kernel_counts import (
    SOURCE,
    CountingMode,
    kind_of,
    operation_kernels,
    tensor_bytes,
)

aten = torch.ops.aten
# Kinds of operations that Inductor leaves to libraries.
LIBRARY_KINDS = ("attention", "product", "convolution")


def fusing_backend(mode: CountingMode) -> Callable[..., Any]:
    """Return a backend of torch.compile that adds the kernels of each call to mode.counts."""
    from torch._inductor.decomposition import select_decomp_table

    def compiler(graph: fx.GraphModule, inputs: Sequence[Any], backward: bool) -> Any:
        kernels = fused_kernels(graph, backward)
        (output,) = (n for n in graph.graph.nodes if n.op == "output")
        results = [value(n) if isinstance(n, fx.Node) else n for n in output.args[0]]

        def call(arguments: list[Any]) -> Any:
            for kernel in kernels:
                mode.counts.add(*kernel)
            arguments.clear()
            with mode.paused():
                return [empty_like(result) for result in results]

        call._boxed_call = True  # AOTAutograd hands over a list and may empty it
        return call

    return aot_autograd(
        fw_compiler=partial(compiler, backward=False),
        bw_compiler=partial(compiler, backward=True),
        inference_compiler=partial(compiler, backward=False),
        partition_fn=partial(min_cut_rematerialization_partition, compiler="inductor"),
        decompositions=select_decomp_table(),
    )


Row = tuple[str, str, str, float, float, float]  # arguments of `Counts.add`


Inputs = dict[fx.Node, dict[fx.Node, int]]


@dataclass
class Group:
    """A fused kernel while it is put together.

    elements, outer: of its loop, and whether it reduces along the first axes.
    members: results stored or reduced in it. inputs: nodes that it reads, see `starting_points`.
    """

    elements: int
    outer: bool
    members: list[fx.Node] = field(default_factory=list)
    inputs: Inputs = field(default_factory=dict)


def empty_like(result: Any) -> Any:
    """Return a new tensor of the same layout; what is no tensor, as it is."""
    if not isinstance(result, Tensor):
        return result
    return torch.empty_strided(
        result.shape, result.stride(), dtype=result.dtype, device=result.device
    )


def value(node: fx.Node) -> Any:
    """Return the fake result of a node."""
    return node.meta.get("val")


def numel(node: fx.Node) -> int:
    """Return the elements of a node's result."""
    return int(value(node).numel()) if isinstance(value(node), Tensor) else 0


def is_part(node: fx.Node) -> bool:
    """Return whether a node picks one of the results of another."""
    return node.target is operator.getitem


def maker(node: fx.Node) -> fx.Node:
    """Return the operation whose result, or one of whose results, a node is."""
    return node.all_input_nodes[0] if is_part(node) else node


def is_view(node: fx.Node) -> bool:
    """Return whether a node only looks at another's result."""
    if is_part(node):
        return False
    if node.target is aten._unsafe_view.default or node.target is aten.alias.default:
        return True
    is_operation = isinstance(node.target, torch._ops.OpOverload)
    return node.op == "call_function" and (not is_operation or node.target.is_view)


def is_library(node: fx.Node) -> bool:
    """Return whether a node is a kernel of its own."""
    if not isinstance(node.target, torch._ops.OpOverload):
        return False
    name = node.target._schema.name
    if not name.startswith(("aten::", "prims::")):
        return True
    if name in ("aten::index_put", "aten::embedding_dense_backward", "aten::avg_pool2d_backward"):
        return True
    return kind_of(name.removeprefix("aten::")) in LIBRARY_KINDS


def root(node: fx.Node) -> fx.Node:
    """Return the node whose result a view shows."""
    while is_view(node) and node.all_input_nodes:
        node = node.all_input_nodes[0]
    return node


def reduced(node: fx.Node) -> tuple[int, bool] | None:
    """Return the elements that a reduction reads, and whether it keeps the last axis."""
    if not isinstance(node.target, torch._ops.OpOverload) or not node.all_input_nodes:
        return None
    name = node.target._schema.name.removeprefix("aten::").removeprefix("prims::")
    if kind_of(name) != "reduction" and name != "var_mean":
        return None
    source = value(node.all_input_nodes[0])
    dims = node.args[1] if len(node.args) > 1 else None
    if not isinstance(dims, (list, tuple)) or not dims:
        return int(source.numel()), False
    return int(source.numel()), (source.ndim - 1) not in [d % source.ndim for d in dims]


def source_of(node: fx.Node) -> str:
    """Return file:line of the library that a node comes from, where it is known."""
    found = SOURCE.findall(node.meta.get("stack_trace") or "")
    return f"{found[-1][0].removeprefix('mezzotint/')}:{found[-1][1]}" if found else "a block"


def fused_kernels(graph: fx.GraphModule, backward: bool) -> list[Row]:
    """Return the kernels of a graph as the module's docstring says."""
    calls = [
        n for n in graph.graph.nodes
        if n.op == "call_function" and not is_view(n) and not is_part(n)
    ]  # fmt: skip
    (output,) = (n for n in graph.graph.nodes if n.op == "output")
    needed = {maker(root(n)) for n in output.all_input_nodes}
    for node in calls:
        if is_library(node):
            needed |= {maker(root(n)) for n in node.all_input_nodes}
    stored = [n for n in calls if is_library(n) or n in needed or reduced(n)]
    rows: list[Row] = []
    owner: dict[fx.Node, Any] = {}  # the kernel that makes a stored node
    before: dict[Any, set[Any]] = {}  # the kernels that a kernel waits for
    groups: list[Group] = []
    realised = set(stored)
    for node in stored:
        sources = starting_points(node, realised)
        made = [owner[maker(s)] for s in sources if maker(s) in owner]
        waits = set().union(*({m} | before[m] for m in made))
        if is_library(node):
            owner[node], before[node] = node, waits
            rows += _library_rows(node, backward)
            continue
        group = _choose(node, sources, waits, groups, before)
        group.members.append(node)
        for source, views in sources.items():
            group.inputs.setdefault(source, {}).update(views)
        owner[node] = group_key = id(group)
        before[group_key] = (before.get(group_key, set()) | waits) - {group_key}
        for other, earlier in before.items():  # what waits for the group waits for more now
            if group_key in earlier:
                before[other] = earlier | before[group_key]
    users = _users(calls, output, realised)
    return rows + [_group_row(group, users, needed, backward) for group in groups]


def starting_points(node: fx.Node, realised: set[fx.Node]) -> Inputs:
    """Return the stored values that a node is computed from, through elementwise operations.

    Returns: for each of them the views through which it is read, and their bytes.
    """
    found: Inputs = {}
    stack, seen = list(node.all_input_nodes), set()
    while stack:
        view = stack.pop()
        if view in seen:
            continue
        seen.add(view)
        n = root(view)
        if maker(n) in realised or n.op in ("placeholder", "get_attr"):
            found.setdefault(n, {})[view] = node_bytes(view)
        else:
            stack += maker(n).all_input_nodes
    return found


def node_bytes(node: fx.Node) -> int:
    """Return the bytes of a node's results."""
    return sum(tensor_bytes(t) for t in tree_leaves(value(node)) if isinstance(t, Tensor))


def read_bytes(node: fx.Node, views: dict[fx.Node, int]) -> int:
    """Return the bytes that a kernel reads of a stored value: those of its views, each once."""
    return min(node_bytes(node), sum(views.values()))


def _choose(
    node: fx.Node,
    sources: Inputs,
    waits: set[Any],
    groups: list[Group],
    before: dict[Any, set[Any]],
) -> Group:
    """Return the group that shares most bytes with a node and may take it; else a new one."""
    reads = reduced(node)
    elements, outer = reads if reads else (numel(node), False)
    best, most = None, 0
    for group in groups:
        key = id(group)
        small = elements < group.elements and any(maker(s) in group.members for s in sources)
        same = elements == group.elements or (small and group.elements % max(elements, 1) == 0)
        # Another kernel that the node waits for and that itself waits for the group.
        between = any(key in before[w] for w in waits if w != key)
        if not same or outer != group.outer or between:
            continue
        shared = sum(
            read_bytes(s, views)
            for s, views in sources.items()
            if maker(s) in group.members or s in group.inputs
        )
        if shared > most:
            best, most = group, shared
    if best is None:
        best = Group(elements, outer)
        groups.append(best)
    return best


def _users(
    calls: list[fx.Node], output: fx.Node, realised: set[fx.Node]
) -> dict[fx.Node, set[fx.Node]]:
    """Return for each stored value the stored values computed from it."""
    users: dict[fx.Node, set[fx.Node]] = {}
    for node in realised:
        for source in starting_points(node, realised):
            users.setdefault(maker(source), set()).add(node)
    return users


def _group_row(
    group: Group, users: dict[fx.Node, set[fx.Node]], needed: set[fx.Node], backward: bool
) -> Row:
    members = set(group.members)
    written = [n for n in group.members if n in needed or users.get(n, set()) - members]
    read = [read_bytes(n, v) for n, v in group.inputs.items() if maker(n) not in members]
    name = "fused reduction" if any(map(reduced, group.members)) else "fused elementwise"
    largest = max(group.members, key=numel)
    dtypes = [t.dtype for t in tree_leaves(value(largest)) if isinstance(t, Tensor)]
    where = source_of(largest)
    dtype = str(dtypes[0]).removeprefix("torch.") if dtypes else ""
    total = float(sum(read) + sum(map(node_bytes, written)))
    return name, f"backward of {where}" if backward else where, dtype, total, 0.0, 1.0


def _library_rows(node: fx.Node, backward: bool) -> Iterable[Row]:
    def of(argument: Any) -> Any:
        return value(argument) if isinstance(argument, fx.Node) else argument

    args, kwargs = tree_map(of, node.args), tree_map(of, node.kwargs)
    where = source_of(node)
    where = f"backward of {where}" if backward else where
    for name, nbytes, flop, rate, dtype in operation_kernels(
        node.target, args, kwargs, value(node)
    ):
        yield name, where, dtype, nbytes, flop, rate
