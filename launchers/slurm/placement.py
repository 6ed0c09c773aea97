"""Which node gets which ranks: nodes under one switch next to each other, so that groups of near ranks stay near."""

from collections.abc import Mapping, Sequence


def order_nodes(nodes: Sequence[str], switches: Mapping[str, str]) -> list[str]:
    """``nodes`` in rank order: those of one switch in a row, the switch of the first node first, otherwise as given.

    The first node stays first: it is the address at which all others meet.
    """
    seen = list(dict.fromkeys(switches.get(node, "") for node in nodes))
    return sorted(nodes, key=lambda node: (seen.index(switches.get(node, "")), nodes.index(node)))


def group_spans(size: int, processes_per_node: int, nodes: Sequence[str], switches: Mapping[str, str]) -> str:
    """Where groups of ``size`` consecutive ranks lie: in words."""
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
    """A table for people: node, switch, ranks; then where each kind of group lies. ``groups``: name -> size in ranks."""
    lines = ["placement (node, switch, ranks):"]
    for index, node in enumerate(nodes):
        first = index * processes_per_node
        last = first + processes_per_node - 1
        ranks = f"{first}" if first == last else f"{first}-{last}"
        lines.append(f"  {node}  {switches.get(node, '-')}  {ranks}")
    for name, size in groups.items():
        if size > 1:
            lines.append(f"  {name} groups of {size} ranks: {group_spans(size, processes_per_node, nodes, switches)}")
    return "\n".join(lines)
