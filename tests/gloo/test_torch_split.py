"""torch's split backward under DistributedDataParallel: gradients that each rank keeps to itself."""

from copy import deepcopy

import pytest
import torch
import torch.distributed as dist
import worlds
from torch import nn


def differences(world, name):
    """By stage, how far torch's gradient is from the mean over ranks, and from this rank's own."""
    from torch.distributed import pipelining
    from torch.nn.parallel import DistributedDataParallel

    torch.manual_seed(0)
    modules = [nn.Linear(4, 4, dtype=torch.float64) for _ in range(2)]
    alone = [dist.new_group([rank]) for rank in range(2)][world.rank]  # both stages on every rank
    stages = [
        pipelining.PipelineStage(
            DistributedDataParallel(deepcopy(m)), i, 2, torch.device("cpu"), group=alone
        )
        for i, m in enumerate(modules)
    ]
    run = getattr(pipelining, name)(stages, 4, loss_fn=nn.functional.mse_loss)
    noise = torch.Generator().manual_seed(world.rank)
    x, y = (torch.randn(8, 4, generator=noise, dtype=torch.float64) for _ in range(2))
    run.step(x, target=y)
    nn.functional.mse_loss(modules[1](modules[0](x)), y).backward()
    found = []
    for module, stage in zip(modules, stages, strict=True):
        own, got = module.weight.grad, stage.submod.module.weight.grad
        assert own is not None and got is not None
        mean = own.clone()
        dist.all_reduce(mean)
        found.append(((got - mean / 2).abs().max().item(), (got - own).abs().max().item()))
    return found


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ScheduleInterleaved1F1B", "ScheduleZBVZeroBubble"])
def test_torchs_split_backward_is_not_reduced_over_data_parallel_ranks(name, tmp_path):
    """pytorch#144530, and no word of it: right with whole backwards and on the first stage, where torch does
    not split; on the second each rank keeps its own. Ours: `dp2 pp2:zb_h1` of test_schedules.py."""
    for how, found in worlds.run("gloo", 2, tmp_path, differences, name):
        assert how == "ok", found
        (first, _), (mean, own) = found
        wrong = name == "ScheduleZBVZeroBubble"
        assert first < 1e-12 and (mean < 1e-12) != wrong and (own < 1e-12) == wrong
