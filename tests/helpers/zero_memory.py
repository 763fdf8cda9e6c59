"""What DeepSpeed holds of a tiny model under ZeRO 1, 2 and 3 in bf16, beside what is counted.

Started by test_dry_run.py under torchrun. Prints one JSON line a stage: for each kind of state the
bytes that were found and those that were expected.
"""

from __future__ import annotations

import json
from collections.abc import Iterable

from torch import Tensor

from casa_train.config.schema import GroupConfig, OptimConfig
from casa_train.cost.memory import state_bytes
from casa_train.distributed.ranks import Ranks
from casa_train.engine.engine import init_processes, leave_processes
from casa_train.engine.starting import build_engine
from casa_train.setup.optim import build_groups
from tests.helpers.tiny import Layout, fill, packed_inputs, tiny_model
from tests.helpers.tiny_run import tiny_settings

GROUPS = {"fusion": GroupConfig([r"\.fusion\."]), "rest": GroupConfig([r"^(?!.*\.fusion\.)"])}


def size(tensors: Iterable[Tensor]) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


def held(stage: int, ranks: Ranks) -> dict[str, tuple[int, int]]:
    model = tiny_model()
    model.visual.set_trainable(1)
    groups = build_groups(model.named_parameters(), GROUPS)
    frozen = [p.numel() for p in model.parameters() if not p.requires_grad]
    sizes = [[p.numel() for p in group["params"]] for group in groups]
    config = tiny_settings(OptimConfig(groups=GROUPS), stage, "bf16", packs=ranks.world)
    engine = build_engine(config, model, ranks)
    inputs = packed_inputs(fill([Layout(12, (2,), ((8, 8),))]))
    optimizer = engine._engine.optimizer
    buckets = {0}  # bytes of the reduction bucket, which stage 2 frees after each backward pass
    if stage == 2:
        release = optimizer._release_ipg_buffers

        def measure_and_release() -> None:
            buckets.add(sum(size(bucket.buffer) for bucket in optimizer.ipg_buckets.values()))
            release()

        optimizer._release_ipg_buffers = measure_and_release
    engine.backward(engine.forward(packed=inputs).logits.float().sum())
    if stage == 1:
        gradients = optimizer.fp32_groups_gradients_flat
        assert all(p.grad is None for p in model.parameters())
        masters, parameters = optimizer.fp32_groups_flat_partition, optimizer.bf16_groups_flat
    elif stage == 2:
        gradients = [t for group in optimizer.averaged_gradients.values() for t in group]
        masters, parameters = optimizer.single_partition_of_fp32_groups, optimizer.bit16_groups_flat
    else:
        gradients = [optimizer.grad_partitions_flat_buffer]
        masters = optimizer.fp32_partitioned_groups_flat
        buckets.add(size(bucket.buffer for bucket in optimizer.ipg_buckets.values()))
        parameters = [p.ds_tensor for p in model.parameters() if p.requires_grad]
    found = {"gradients": size(gradients), "fp32 masters": size(masters)}
    found["parameters that train"] = size(parameters)
    found["reduction bucket"] = max(buckets)
    engine.step()
    state = optimizer.optimizer.state.values()
    found["Adam's moments"] = size(v for s in state for k, v in s.items() if k.startswith("exp_"))
    expected = state_bytes(sizes, frozen, stage, ranks.world, "bf16")
    engine.close()
    return {name: (bytes_held, expected[name]) for name, bytes_held in found.items()}


def main() -> None:
    ranks = init_processes()
    for stage in (1, 2, 3):
        line = json.dumps(held(stage, ranks))
        if ranks.first:
            print(line, flush=True)
    leave_processes()


if __name__ == "__main__":
    main()
