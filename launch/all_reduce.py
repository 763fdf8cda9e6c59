"""All-reduce within every node, then over all tasks, with bandwidths; part of launch/preflight.sh.

A node whose tasks do not arrive, or whose own all-reduce is wrong or slow, is named. Torch only: it
runs before anything of the project does.
"""

from __future__ import annotations

import os
import socket
import statistics
import subprocess
import sys
import time
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

# Time for all tasks to arrive, and for a collective.
PATIENCE = timedelta(seconds=120)
REPEATS = 5
# A node below this share of the median bandwidth is slow.
SLOW = 0.5


def main() -> int:
    """Returns 1 on every rank when a node failed; rank 0 prints."""
    rank, world = int(os.environ["SLURM_PROCID"]), int(os.environ["SLURM_NTASKS"])
    # Where SLURM binds a GPU to each task, the task sees no other.
    bound = torch.cuda.device_count() == 1
    local = 0 if bound else int(os.environ["SLURM_LOCALID"])
    node = os.environ.get("SLURMD_NODENAME", socket.gethostname())
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    try:
        store = dist.TCPStore(  # type: ignore[attr-defined]
            address, port, world, rank == 0, timeout=PATIENCE, wait_for_workers=False
        )
        store.set(f"node{rank}", node)
    except RuntimeError as error:
        print(f"{node}: FAILED: rank {rank} cannot reach {address}:{port}: {error}", flush=True)
        return 1
    nodes = arrivals(store, rank, world)
    if nodes is None:
        return 1
    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.set_device(local)
    device = torch.device("cuda", local) if cuda else torch.device("cpu")
    dist.init_process_group(
        "nccl" if cuda else "gloo", store=store, rank=rank, world_size=world, timeout=PATIENCE
    )
    megabytes = int(os.environ.get("CASA_REDUCE_MB", 1024 if cuda else 16))
    values = torch.empty(megabytes << 18, dtype=torch.float32, device=device)
    groups = {
        name: dist.new_group([r for r in range(world) if nodes[r] == name])
        for name in dict.fromkeys(nodes)
    }
    try:
        alone = measure(values, groups[node])
    except (RuntimeError, ValueError) as error:
        print(f"{node}: FAILED: all-reduce within the node, rank {rank}: {error}", flush=True)
        return 1
    measured: list[float | None] = [None] * world
    dist.all_gather_object(measured, alone)
    slow = False
    if rank == 0:
        slow = judge(nodes, [m for m in measured if m is not None], device)
    try:
        together = measure(values, None)
    except (RuntimeError, ValueError) as error:
        print(f"{node}: FAILED: all-reduce over all tasks, rank {rank}: {error}", flush=True)
        return 1
    if rank == 0:
        print(f"all {world} tasks: ok: all-reduce of {megabytes} MiB {together:.2f} GB/s")
    dist.barrier()
    dist.destroy_process_group()
    return int(slow)


def arrivals(store: Any, rank: int, world: int) -> list[str] | None:
    """The node of every rank; None, after naming who is missing, if some do not come."""
    try:
        store.wait([f"node{r}" for r in range(world)], PATIENCE)
    except RuntimeError:
        if rank == 0:
            came = [r for r in range(world) if store.check([f"node{r}"])]
            names = hostnames(world)
            for missing in sorted({names[r] for r in range(world) if r not in came}):
                print(f"{missing}: FAILED: tasks did not reach the first node in {PATIENCE}")
        return None
    return [store.get(f"node{r}").decode() for r in range(world)]


def hostnames(world: int) -> list[str]:
    """The node of every rank as SLURM lays tasks out: block by block."""
    nodes = subprocess.run(
        ["scontrol", "show", "hostnames", os.environ["SLURM_JOB_NODELIST"]],
        capture_output=True,
        text=True,
        check=True,
    ).stdout.split()
    return [nodes[rank * len(nodes) // world] for rank in range(world)]


def measure(values: torch.Tensor, group: dist.ProcessGroup | None) -> float:
    """Bus bandwidth of an all-reduce in GB/s; infinity for a group of one.

    :raises ValueError: the sum is wrong.
    """
    size = dist.get_world_size(group)
    if size == 1:
        return float("inf")
    seconds = []
    for _ in range(REPEATS + 1):  # the first one sets up connections
        values.fill_(1.0)
        dist.barrier(group)
        _wait(values)
        began = time.perf_counter()
        dist.all_reduce(values, group=group)
        _wait(values)
        seconds.append(time.perf_counter() - began)
        low, high = values.aminmax()
        if low.item() != size or high.item() != size:
            raise ValueError(
                f"the sum of {size} ones is {low.item()} to {high.item()}; expected {size}"
            )
    sent = values.numel() * values.element_size() * 2 * (size - 1) / size
    return sent / statistics.median(seconds[1:]) / 1e9


def _wait(values: torch.Tensor) -> None:
    if values.is_cuda:
        torch.cuda.synchronize()


def judge(nodes: list[str], measured: list[float], device: torch.device) -> bool:
    """Prints the bandwidth within every node; whether one is slow beside the others."""
    by_node = {name: bandwidth for name, bandwidth in zip(nodes, measured, strict=True)}
    if all(bandwidth == float("inf") for bandwidth in by_node.values()):
        print(f"every node: one task on {device.type}, no all-reduce within")
        return False
    median = statistics.median(by_node.values())
    slow = {name for name, bandwidth in by_node.items() if bandwidth < SLOW * median}
    for name, bandwidth in by_node.items():
        verdict = f"FAILED: slow beside the median of {median:.2f} GB/s" if name in slow else "ok"
        print(f"{name}: {verdict}: all-reduce within the node {bandwidth:.2f} GB/s", flush=True)
    return bool(slow)


if __name__ == "__main__":
    sys.exit(main())
