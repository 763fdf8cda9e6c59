"""The only file that imports deepspeed: processes, the sharded model, its optimiser and its
state.
"""

from __future__ import annotations

import contextlib
import io
import logging
import os
import socket
import sys
import warnings
from collections.abc import Iterator, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from casa_train.checkpoint.frozen import FrozenFile, write_frozen
from casa_train.checkpoint.slices import STATE_DIRECTORY, SavedSlices, write_slices
from casa_train.config.schema import ParallelConfig
from casa_train.cost.memory import PERSISTENT_BELOW, bucket_elements
from casa_train.distributed.ranks import Ranks
from casa_train.engine.compiling import CompileClock
from casa_train.engine.gradient_norm import fuse_norms
from casa_train.engine.gradient_sum import fuse_sums
from casa_train.engine.zero_state import ZeroState
from casa_train.errors import RankError, UserError
from casa_train.io.quiet import deepspeed_imported_quietly

# DeepSpeed logs its start in dozens of lines; the run's own banner says what matters.
with deepspeed_imported_quietly():
    import deepspeed
    from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus
    from deepspeed.utils import (
        groups,
        safe_get_full_fp32_param,
        safe_get_full_grad,
        set_z3_leaf_modules,
    )

logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
# DeepSpeed's calls of older collectives would fill the log of a ZeRO-3 run.
warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed.*")
# Every process names its GPU before it joins (init_processes), which is what torch then guesses.
warnings.filterwarnings("ignore", message=r"barrier\(\): using the device under current context")


# What `init_processes` put into the environment of a process that runs alone.
_alone: dict[str, str] = {}


def init_processes(timeout_minutes: float = 30) -> Ranks:
    """Joins the process group that torchrun, SLURM or nobody (one process) set up.

    :param timeout_minutes: longest wait of a rank for the others.
    """
    env = os.environ
    absent = [name for name in ("MASTER_ADDR", "MASTER_PORT") if name not in env]
    if "RANK" not in env and "SLURM_PROCID" in env and int(env.get("SLURM_NTASKS", 1)) > 1:
        if absent:
            raise RankError(  # of all tasks, but they have no way yet to say so once
                f"SLURM_NTASKS is {env['SLURM_NTASKS']} and SLURM_PROCID {env['SLURM_PROCID']}, so "
                f"this process is one of {env['SLURM_NTASKS']} tasks of srun, but {absent} are not "
                "set: expected launch/slurm.sbatch, which sets them. In a shell that an allocation "
                "left these variables in, `unset SLURM_NTASKS SLURM_PROCID` first: "
                "then it runs alone."
            )
        env["RANK"], env["WORLD_SIZE"] = env["SLURM_PROCID"], env["SLURM_NTASKS"]
        env["LOCAL_RANK"] = env.get("SLURM_LOCALID", "0")
    elif "RANK" not in env:
        alone = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            alone["MASTER_PORT"] = str(probe.getsockname()[1])
        env.update(alone)
        _alone.update(alone)
    elif absent:
        raise UserError(
            f"environment variables {absent} are not set, but RANK is: start several processes "
            "with torchrun (launch/torchrun.sh), which sets them"
        )
    cuda = torch.cuda.is_available()
    if cuda and torch.cuda.device_count() == 1:
        env["LOCAL_RANK"] = "0"  # SLURM bound a GPU to each task, which sees no other
    local = int(env.get("LOCAL_RANK", 0))
    if cuda:
        torch.cuda.set_device(local)
    else:
        # A C++ extension for CPU all-reduce, compiled at first use: gloo does without.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    if not dist.is_initialized():
        deepspeed.init_distributed(
            dist_backend="nccl" if cuda else "gloo",
            auto_mpi_discovery=False,
            verbose=False,
            timeout=timedelta(minutes=timeout_minutes),
        )
        # DeepSpeed reduces and gathers in a group of its own, which would have torch's timeout.
        groups._WORLD_GROUP = dist.new_group(timeout=timedelta(minutes=timeout_minutes))
    device = torch.device("cuda", local) if cuda else torch.device("cpu")
    return Ranks(dist.get_rank(), dist.get_world_size(), device)


def leave_processes() -> None:
    """Leaves the process group after an end that all ranks share; without it some exits abort.

    Once a process, at its end: DeepSpeed keeps groups that a new process group would not know.
    A process that ran alone is no rank afterwards, neither to this program nor to other libraries.
    """
    if dist.is_initialized():
        dist.destroy_process_group()
    for name in _alone:
        os.environ.pop(name, None)
    _alone.clear()


def abandon_processes(code: int) -> None:
    """Ends this process at once if there are other ranks, which know nothing of its failure.

    NCCL would wait for collectives that never come; the launcher ends the others.
    """
    if dist.is_initialized() and dist.get_world_size() > 1:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def shard(module: nn.Module, parallel: ParallelConfig) -> None:
    """Leaves each rank its share of a module's parameters where ZeRO-3 will; collective.

    A model is sharded block by block while its values are made, so that no rank ever holds all of
    it; `Engine` shards whatever is left.
    """
    if parallel.zero_stage == 3:
        deepspeed.zero.Init(module=module, config_dict_or_path=_settings(parallel))


def _settings(parallel: ParallelConfig) -> dict[str, Any]:
    """DeepSpeed's configuration, as far as model and memory go."""
    settings: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": {"stage": parallel.zero_stage},
        # It would wait for the GPU twice in each micro-step.
        "timers": {"throughput": {"enabled": False}},
    }
    if parallel.zero_stage == 3:
        settings["zero_optimization"]["stage3_param_persistence_threshold"] = PERSISTENT_BELOW
    elif parallel.zero_stage == 2 or parallel.precision == "fp32":
        # Gradients are summed over ranks by an all-reduce of the bucket either way (DeepSpeed's
        # multi-rank buckets); this one copies none of them out of it before and back behind it.
        settings["zero_optimization"]["reduce_scatter"] = False
        # As with it: each rank divides, then they add.
        settings["prescale_gradients"] = dist.get_world_size() > 1
    if parallel.precision == "bf16":
        settings["bf16"] = {"enabled": True}
        # bf16 accumulation costs seven times the rounding error over 32 micro-steps.
        settings["data_types"] = {"grad_accum_dtype": "fp32"}
        if parallel.zero_stage == 1:
            # Each gradient is added to its fp32 sum and freed at once, and the sums of all ranks
            # are added once a step: in fp32, since bf16 would cost 0.25 % of the gradient.
            settings["bf16"]["immediate_grad_update"] = True
            settings["communication_data_type"] = "fp32"
    return settings


class Engine:
    """A model under DeepSpeed ZeRO 1, 2 or 3.

    :param accumulation: micro-steps of an optimiser step on this rank.
    :param whole: modules that use their children's weights by themselves, so that ZeRO-3 gathers
        all their weights at once.
    :param borrowed: small parameters that are used past the hooks of their modules.
    :param clock: measures the compilation of the model's blocks; None: they are not compiled.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        ranks: Ranks,
        parallel: ParallelConfig,
        accumulation: int,
        clip: float,
        whole: Sequence[type[nn.Module]] = (),
        borrowed: Sequence[nn.Parameter] = (),
        clock: CompileClock | None = None,
    ) -> None:
        self.ranks, self.zero_stage = ranks, parallel.zero_stage
        self.clock = clock
        self._borrowed: Sequence[Any] = borrowed if parallel.zero_stage == 3 else ()
        if parallel.zero_stage == 3 and whole:
            set_z3_leaf_modules(model, list(whole))
        self._frozen: FrozenFile | None = None  # what rank 0 wrote or loaded
        settings = _settings(parallel)
        # Allocated whole on every rank, whatever the size of the model.
        settings["zero_optimization"]["reduce_bucket_size"] = bucket_elements(
            sum(getattr(p, "ds_numel", p.numel()) for p in model.parameters() if p.requires_grad)
        )
        config = {
            **settings,
            "gradient_accumulation_steps": accumulation,
            "gradient_clipping": clip,
            "zero_allow_untested_optimizer": True,
            "steps_per_print": 1 << 40,
        }
        # The optimiser of stage 1 in bf16 prints the memory used in 30 lines.
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            self._engine, *_ = deepspeed.initialize(
                model=model, optimizer=optimizer, config=config, dist_init_required=False
            )
        fuse_norms(self._engine.optimizer)
        fuse_sums(self._engine.optimizer)

    @property
    def module(self) -> nn.Module:
        module: nn.Module = self._engine.module
        return module

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        groups: list[dict[str, Any]] = self._engine.optimizer.param_groups
        return groups

    def train(self) -> None:
        self._engine.train()

    @contextlib.contextmanager
    def evaluating(self) -> Iterator[None]:
        """Runs the model in eval mode and without gradients meanwhile."""
        self._engine.eval()
        try:
            with torch.no_grad():
                yield
        finally:
            self._engine.train()

    def forward(self, **inputs: Any) -> Any:
        # ZeRO-3 keeps small parameters once they are gathered, until somebody parts them.
        if parted := [p for p in self._borrowed if p.ds_status is ZeroParamStatus.NOT_AVAILABLE]:
            parted[0].all_gather(param_list=parted)
        return self._engine(**inputs)

    def backward(self, loss: Tensor) -> None:
        """Accumulates gradients of `loss`, averaged over ranks and not divided by the
        accumulation.
        """
        self._engine.backward(loss, scale_wrt_gas=False)

    def forget_gradients(self) -> None:
        """Ends a backward pass that no update follows. Sums that DeepSpeed has begun stay, so the
        gradients of that pass must have been zero.
        """
        self._engine.optimizer.zero_grad()

    def step(self) -> None:
        """Counts a micro-step; at the accumulation boundary clips and updates."""
        self._engine.step()
        if self.clock is not None and self._engine.global_steps:
            self.clock.tell(self.ranks.log)

    def make_moments(self) -> None:
        """Makes Adam's moments, all zero, which its first update would make; on a fresh engine."""
        self._state().make_moments(0)

    def step_applied(self) -> bool:
        """Whether the last update took place: steps with gradients that are not finite do not."""
        return bool(self._engine.was_step_applied())

    def gradient_norm(self) -> float:
        """The global norm before clipping, of the last update."""
        norm = self._engine.get_global_grad_norm()
        return float(norm) if norm is not None else 0.0

    def full_gradient(self, parameter: nn.Parameter) -> Tensor | None:
        """The whole accumulated gradient; collective, valid after the last backward of a step."""
        gradient: Tensor | None = safe_get_full_grad(parameter)
        return gradient

    def full_parameter(self, parameter: nn.Parameter) -> Tensor:
        """The whole fp32 value; collective. A frozen parameter has no master: its own value."""
        full = safe_get_full_fp32_param(parameter) if parameter.requires_grad else None
        if full is None:
            with deepspeed.zero.GatheredParameters(
                [parameter], enabled=hasattr(parameter, "ds_id")
            ):
                full = parameter.detach().clone()
        value: Tensor = full
        return value

    def save(self, directory: Path) -> FrozenFile | None:
        """Writes this rank's part of trained weights and optimiser state into `directory`.

        Frozen weights go beside it, the first time that a checkpoint is written there: they cannot
        change (the audit looks whether they did), so later ones name the same file. Collective.

        :param directory: lies where the run's checkpoints do.
        :return: on rank 0 the file of the frozen weights, if any are frozen; None on others.
        :raises OSError: this rank's part could not be written.
        """
        state = self._state()
        self._save_frozen(state, directory.parent)
        slices, rank = state.trained(), self.ranks.rank
        write_slices(directory / STATE_DIRECTORY, rank, slices, state.updates(), self._frozen)
        return self._frozen

    def _save_frozen(self, state: ZeroState, checkpoints: Path) -> None:
        """Rank 0 writes the whole frozen weights; under ZeRO-3 all ranks give their parts."""
        first = self.ranks.first
        written = self._frozen is not None and self._frozen.there(checkpoints)
        if self.zero_stage == 3:
            written = self.ranks.gather(written)[0]
        parameters = state.frozen_parameters()
        if written or not parameters or not (first or self.zero_stage == 3):
            return
        whole = (self.full_parameter(parameter) for parameter in parameters.values())
        try:
            if first:
                self._frozen = write_frozen(checkpoints, state.frozen_kinds(), whole)
        finally:
            for _ in whole:  # others wait for this rank in each, whatever its disk says
                pass

    def load(self, directory: Path) -> None:
        """Loads what any number of ranks saved under any ZeRO stage; on a fresh engine, collective.

        Rates, decay and betas are not saved: they stay those of this engine's optimiser.

        :raises UserError: it is the state of another model, or incomplete.
        """
        state, saved = self._state(), SavedSlices(directory / STATE_DIRECTORY)
        state.load(saved)
        # In another precision they were rounded: the next checkpoint needs a file of its own.
        if self.ranks.first and saved.frozen_kinds() == state.frozen_kinds():
            self._frozen = saved.frozen

    def _state(self) -> ZeroState:
        return ZeroState(self._engine.optimizer, self.module, self.zero_stage)

    def close(self) -> None:
        if self.clock is not None:
            self.clock.close()
        self._engine.destroy()
