"""Decides which node gets which ranks. Nodes under one switch get neighboring ranks, so groups of near ranks stay near."""

from collections.abc import Mapping, Sequence

from launchers.counted import counted


def order_nodes(nodes: Sequence[str], switches: Mapping[str, str]) -> list[str]:
    """``nodes`` in rank order: nodes of one switch are adjacent, the first node's switch comes first, and the given order
    is kept otherwise.

    The first node stays first, because it is the rendezvous address.
    """
    seen = list(dict.fromkeys(switches.get(node, "") for node in nodes))
    return sorted(nodes, key=lambda node: (seen.index(switches.get(node, "")), nodes.index(node)))


def group_spans(size: int, processes_per_node: int, nodes: Sequence[str], switches: Mapping[str, str]) -> str:
    """Where groups of ``size`` consecutive ranks lie, in words."""
    world = processes_per_node * len(nodes)
    hosts = [
        [nodes[rank // processes_per_node] for rank in range(first, min(first + size, world))]
        for first in range(0, world, size)
    ]
    if all(len(set(group)) == 1 for group in hosts):
        return "inside a node"
    if switches and all(len({switches.get(node, "") for node in group}) == 1 for group in hosts):
        return "under one switch"
    return "across switches" if switches else "across nodes"


def describe(
    nodes: Sequence[str], processes_per_node: int, switches: Mapping[str, str], groups: Mapping[str, int]
) -> str:
    """A human-readable table of node, switch and ranks, and where each kind of group lies. ``groups``: name -> ranks."""
    lines = ["placement (node, switch, ranks):"]
    for index, node in enumerate(nodes):
        first = index * processes_per_node
        last = first + processes_per_node - 1
        ranks = f"{first}" if first == last else f"{first}-{last}"
        lines.append(f"  {node}  {switches.get(node, '-')}  {ranks}")
    for name, size in groups.items():
        if size > 1:
            lines.append(
                f"  {name} groups of {counted(size, 'rank')}: {group_spans(size, processes_per_node, nodes, switches)}"
            )
    return "\n".join(lines)
