"""How long SyncBatchNorm's collectives take on 2 to 4,096 ranks, and when a hierarchy of groups pays.

``python benchmarks/collectives.py`` prints what the formulas here say, and checks each against a simulation of the
same schedule, message by message. A message costs a latency and a time per byte, inside a node and between nodes; the
messages that leave a node at once share its network cards. Latencies and bandwidths are arguments: the defaults are
assumed, of a cluster with 8 GPUs and 8 cards in a node, and measured nowhere.
"""

from __future__ import annotations

import argparse
import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Ranks = NDArray[np.int64]
# Messages that travel at the same time: sources, destinations, and the bytes of each. A rank sends and receives at most
# one.
Round = tuple[Ranks, Ranks, float]


@dataclass(frozen=True)
class Link:
    """``latency`` in seconds, ``bandwidth`` in bytes per second."""

    latency: float
    bandwidth: float

    def seconds(self, size: float, sharing: float = 1.0) -> float:
        return self.latency + size * max(1.0, sharing) / self.bandwidth


@dataclass(frozen=True)
class Cluster:
    """``ranks`` numbered node by node, ``node`` in each, which has ``cards`` of bandwidth ``between.bandwidth``."""

    ranks: int
    node: int = 8
    inside: Link = Link(3e-6, 150e9)
    between: Link = Link(10e-6, 25e9)
    cards: int = 8

    @property
    def nodes(self) -> int:
        return math.ceil(self.ranks / self.node)

    def flat(self) -> Ranks:
        return np.arange(self.ranks)[None]

    def levels(self) -> tuple[Ranks, Ranks]:
        """The groups of a hierarchy, inner and outer, one in a row."""
        grid = np.arange(self.ranks).reshape(-1, min(self.node, self.ranks))
        return grid, grid.T


def gather_bytes(channels: int) -> int:
    """What a rank sends forward: three values for each channel, and two for the count, in float32."""
    return 4 * (3 * channels + 2)


def reduce_bytes(channels: int) -> int:
    """What a rank adds up backward: two sums for each channel, in float64."""
    return 16 * channels


# --- the schedules ---


def doubling(ranks: int) -> list[int]:
    """1, 2, 4, ... below ``ranks``."""
    return [2**k for k in range((ranks - 1).bit_length())]


def ring_gather(groups: Ranks, size: float) -> Iterator[Round]:
    """Each rank hands on to the next one what it received last. Gloo and NCCL do that."""
    for _ in range(groups.shape[1] - 1):
        yield groups, np.roll(groups, -1, axis=1), size


def log_gather(groups: Ranks, size: float) -> Iterator[Round]:
    """Bruck's: a rank sends all that it has 1, 2, 4, ... ranks back. The fewest rounds, for any number of ranks."""
    ranks = groups.shape[1]
    for distance in doubling(ranks):
        yield groups, np.roll(groups, distance, axis=1), size * min(distance, ranks - distance)


def ring_reduce(groups: Ranks, size: float) -> Iterator[Round]:
    """Reduce-scatter, then all-gather, of one part for each rank."""
    for _ in range(2):
        yield from ring_gather(groups, size / groups.shape[1])


def tree_reduce(groups: Ranks, size: float) -> Iterator[Round]:
    """Up a binomial tree to the first rank, and down again."""
    ranks = groups.shape[1]
    levels = [(groups[:, d :: 2 * d], groups[:, : ranks - d : 2 * d]) for d in doubling(ranks)]
    yield from ((lower, upper, size) for lower, upper in levels)
    yield from ((upper, lower, size) for lower, upper in reversed(levels))


SCHEDULES = {
    schedule.__name__.replace("_", " "): schedule for schedule in (ring_gather, log_gather, ring_reduce, tree_reduce)
}


def simulate(cluster: Cluster, rounds: Iterator[Round]) -> float:
    """Seconds until the last rank is done. A message starts when both of its ranks are done with the round before."""
    node = np.arange(cluster.ranks) // cluster.node
    done = np.zeros(cluster.ranks)
    for sources, destinations, size in rounds:
        source, destination = sources.ravel(), destinations.ravel()
        leaves = node[source] != node[destination]
        leaving = np.bincount(node[source][leaves], minlength=cluster.nodes)[node[source]]
        transfer = size * np.maximum(1.0, leaving / cluster.cards) / cluster.between.bandwidth
        seconds = np.where(leaves, cluster.between.latency + transfer, cluster.inside.seconds(size))
        end = np.maximum(done[source], done[destination]) + seconds
        after = done.copy()
        after[source] = end
        after[destination] = np.maximum(after[destination], end)
        done = after
    return float(done.max())


# --- the formulas ---


def _gather(cluster: Cluster, name: str, ranks: int, size: float, crossing: bool, leaving: int) -> float:
    """``leaving``: how many messages leave a node in a round that goes to the next rank of the group."""
    link = cluster.between if crossing else cluster.inside
    if name == "ring":
        return (ranks - 1) * link.seconds(size, leaving / cluster.cards)
    seconds = 0.0
    for distance in doubling(ranks):
        sharing = min(distance * leaving, cluster.node) / cluster.cards if crossing else 1
        seconds += link.seconds(size * min(distance, ranks - distance), sharing)
    return seconds


def _reduce(cluster: Cluster, name: str, ranks: int, size: float, crossing: bool, leaving: int, stride: int) -> float:
    """``stride``: how many ranks lie between neighbours of the group."""
    if name == "ring":
        return 2 * _gather(cluster, "ring", ranks, size / ranks, crossing, leaving)
    seconds = 0.0
    for distance in doubling(ranks):
        outside = crossing and distance * stride >= cluster.node
        link = cluster.between if outside else cluster.inside
        seconds += 2 * link.seconds(size, leaving / cluster.cards if outside else 1)
    return seconds


def predict(cluster: Cluster, schedule: str, size: float, hierarchical: bool = False) -> float:
    """Seconds of a collective of ``size`` bytes from each rank; ranks must fill their nodes, nodes of a power of two.

    A ring is as fast as its slowest link: ``(p - 1) (latency + size / bandwidth)``. A hierarchy saves time because only
    ``nodes - 1`` of its messages are that slow. In a gather, also, one node's share crosses for each node, instead of
    one rank's share for each rank. But all ranks of a node cross at the same time, and share its cards.
    """
    name, kind = schedule.split()
    inner = min(cluster.node, cluster.ranks)
    if not hierarchical:
        crossing = cluster.ranks > cluster.node
        if kind == "gather":
            return _gather(cluster, name, cluster.ranks, size, crossing, 1)
        return _reduce(cluster, name, cluster.ranks, size, crossing, 1, 1)
    outer = cluster.ranks // inner
    if kind == "gather":
        return _gather(cluster, name, inner, size, False, 0) + _gather(cluster, name, outer, size, True, inner)
    return _reduce(cluster, name, inner, size, False, 0, 1) + _reduce(cluster, name, outer, size, True, inner, inner)


def simulated(cluster: Cluster, schedule: str, size: float, hierarchical: bool = False) -> float:
    """The same by simulation."""
    groups = cluster.levels() if hierarchical else (cluster.flat(),)
    return sum(simulate(cluster, SCHEDULES[schedule](level, size)) for level in groups)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--channels", type=int, nargs="+", default=[64, 512, 2048])
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 4, 8, 16, 64, 256, 1024, 4096])
    parser.add_argument("--node", type=int, default=8, help="ranks of a node, a power of two")
    parser.add_argument("--cards", type=int, default=8, help="network cards of a node")
    parser.add_argument("--inside", type=float, nargs=2, default=[3, 150], metavar=("US", "GB/S"))
    parser.add_argument("--between", type=float, nargs=2, default=[10, 25], metavar=("US", "GB/S"))
    args = parser.parse_args()
    inside, between = (Link(us * 1e-6, gb * 1e9) for us, gb in (args.inside, args.between))
    print(
        f"us, for a batch norm; {args.node} ranks and {args.cards} cards in a node; assumed of a message: "
        f"{args.inside[0]:g} us and {args.inside[1]:g} GB/s in a node, {args.between[0]:g} us and {args.between[1]:g} "
        "GB/s between nodes\n"
    )
    print("| channels | ranks | " + " | ".join(f"{n} | in levels" for n in SCHEDULES) + " |")
    print("|---" * (2 + 2 * len(SCHEDULES)) + "|")
    worst = 0.0
    for channels, ranks in itertools.product(args.channels, args.ranks):
        cluster = Cluster(ranks, args.node, inside, between, args.cards)
        cells = []
        for schedule, hierarchical in itertools.product(SCHEDULES, (False, True)):
            size = gather_bytes(channels) if "gather" in schedule else reduce_bytes(channels)
            seconds = predict(cluster, schedule, size, hierarchical)
            worst = max(worst, abs(simulated(cluster, schedule, size, hierarchical) / seconds - 1))
            cells.append(f"{seconds * 1e6:.0f}")
        print(f"| {channels} | {ranks} | {' | '.join(cells)} |")
    print(f"\nThe simulation differs by {worst:.1e} at most.")


if __name__ == "__main__":
    main()
