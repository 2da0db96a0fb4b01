"""How long a data-parallel step takes on many GPUs, from one GPU's step and a network's figures. Pure.

The model: DDP sums all gradients in buckets while the backward pass goes on, which fills the last bucket at its end.
An all-reduce is hierarchical, each level a ring (Patarasu and Yuan, "Bandwidth optimal all-reduce algorithms", 2009):
over the g GPUs of a node 2(g-1)/g of the bytes pass each link in 2(g-1) messages; between m nodes each GPU's link
carries 2(m-1)/m of its g-th part, in 2(m-1) messages. What the backward pass does not hide is added to the step.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

BACKWARD_SHARE = 2 / 3  # of a step: it multiplies twice for each multiplication of the forward pass


@dataclass(frozen=True)
class Network:
    """Per GPU and direction, as a plain copy reaches them."""

    gpus_per_node: int = 8
    """GPUs that the fast links join."""
    node_gigabytes_per_second: float = 450.0
    """Of a GPU's links within the node; NVLink of an H100 by its data sheet."""
    node_latency_us: float = 3.0
    """Of one message within the node."""
    gigabytes_per_second: float = 50.0
    """Of a GPU's share of its node's network; 400 Gbit/s."""
    latency_us: float = 10.0
    """Of one message between nodes."""
    bucket_megabytes: float = 25.0
    """What is summed at once; DDP's default."""
    overlap: float = 0.9
    """Share of the backward pass that summing can hide behind, 0 to 1."""

    def __post_init__(self) -> None:
        if self.gpus_per_node < 1:
            raise ValueError(f"--gpus-per-node {self.gpus_per_node}: at least 1")
        for name in ("node_gigabytes_per_second", "gigabytes_per_second", "bucket_megabytes"):
            if not getattr(self, name) > 0:
                raise ValueError(f"--{name.replace('_', '-')} {getattr(self, name)}: above 0")
        for name in ("node_latency_us", "latency_us"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"--{name.replace('_', '-')} {getattr(self, name)}: at least 0")
        if not 0 <= self.overlap <= 1:
            raise ValueError(f"--overlap {self.overlap}: a share, 0 to 1")

    @property
    def assumptions(self) -> tuple[str, ...]:
        """Everything that a projection rests on, one sentence each."""
        return (
            "the work of each GPU stays as it is (weak scaling), and all take equally long: no slow card, no waiting "
            "for data, no traffic of others",
            f"{self.gpus_per_node} GPUs a node, {self.node_gigabytes_per_second:g} GB/s and {self.node_latency_us:g} "
            "us a message within it, for each GPU and direction",
            f"{self.gigabytes_per_second:g} GB/s and {self.latency_us:g} us a message between nodes, for each GPU and "
            "direction, without congestion",
            "hierarchical all-reduce, a ring within the node and a ring between nodes, one after the other",
            f"buckets of {self.bucket_megabytes:g} MB; {self.overlap:.0%} of the backward pass ({BACKWARD_SHARE:.0%} "
            "of the step) hides summing, but never the last bucket's",
        )


class Projected(NamedTuple):
    """One number of GPUs. Seconds are of a step."""

    gpus: int
    all_reduce_seconds: float
    exposed_seconds: float  # of these, what the backward pass does not hide
    step_seconds: float
    efficiency: float  # one GPU's step over this one


def all_reduce_seconds(nbytes: float, gpus: int, network: Network) -> float:
    """Of one all-reduce. Errors: ValueError for GPUs that are no whole nodes."""
    inside = min(gpus, network.gpus_per_node)
    nodes, rest = divmod(gpus, inside)
    if rest:
        raise ValueError(f"{gpus} GPUs are no whole nodes of {inside}: give a multiple")
    within = _ring(nbytes, inside, 1e9 * network.node_gigabytes_per_second, 1e-6 * network.node_latency_us)
    between = _ring(nbytes / inside, nodes, 1e9 * network.gigabytes_per_second, 1e-6 * network.latency_us)
    return within + between


def _ring(nbytes: float, members: int, bytes_per_second: float, latency_seconds: float) -> float:
    return 2 * (members - 1) * (nbytes / members / bytes_per_second + latency_seconds)


def project(step_seconds: float, gradient_bytes: float, gpus: int, network: Network) -> Projected:
    """step_seconds: of one GPU alone. gradient_bytes: of all parameters, 4 an element in float32.

    Errors: ValueError for GPUs that are no whole nodes.
    """
    buckets = max(1, math.ceil(gradient_bytes / (1e6 * network.bucket_megabytes)))
    last = all_reduce_seconds(gradient_bytes / buckets, gpus, network)
    summing = buckets * last
    exposed = max(last, summing - network.overlap * BACKWARD_SHARE * step_seconds)
    step = step_seconds + exposed
    return Projected(gpus, summing, exposed, step, step_seconds / step)
