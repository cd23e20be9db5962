"""Flat buffers step as torch.optim steps the tensors they hold."""

from dataclasses import dataclass, replace

import pytest
import torch
import verify_jobs

from partita.base.errors import UsageError
from partita.model.reference import weight_shapes
from partita.train.optimizer import optim, slots
from partita.verify.judge import vectors
from partita.verify.parity import verify


@dataclass(frozen=True)
class Train:
    """The fields of a job's [train] that the optimizer reads."""

    optimizer: str = "adamw"
    lr: float = 3e-2
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    momentum: float = 0.0
    weight_decay: float = 0.1
    warmup_steps: int = 0
    lr_schedule: str = "constant"
    min_lr: float = 0.0
    steps: int = 100


def gradients(step, shapes, dtype):
    g = torch.Generator().manual_seed(step)
    return [torch.randn(s, generator=g, dtype=torch.float64).to(dtype) for s in shapes]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    "train",
    [
        *(Train(optimizer=n) for n in optim.KINDS),
        Train(optimizer="sgd", momentum=0.9),
        Train(optimizer="rmsprop", momentum=0.9),
    ],
    ids=[*optim.KINDS, "momentum", "rmsprop momentum"],
)
def test_flat_shards_step_as_torch_steps_whole_tensors(train, dtype):
    shapes = [(6, 4), (5,), (3, 7)]
    whole = [torch.nn.Parameter(x) for x in gradients(99, shapes, dtype)]
    kind, own = optim.KINDS[train.optimizer]
    extra = {
        "betas": train.betas,
        "alpha": 0.95,
        "rho": 0.95,
        "momentum": train.momentum,
        "eps": train.eps,
    }
    extra = {name: value for name, value in extra.items() if name in own}
    oracle = kind(
        [
            {"params": [whole[0], whole[2]], "weight_decay": 0.1},
            {"params": [whole[1]], "weight_decay": 0.0},
        ],
        lr=train.lr,
        foreach=False,
        **extra,
    )
    matrices = torch.cat([whole[0].detach().flatten(), whole[2].detach().flatten()])
    shards = [matrices[:20].clone(), matrices[20:].clone(), whole[1].detach().clone()]
    mine = optim.make_optimizer(
        [
            ("a", shards[0], True),
            ("n", shards[2], False),
            ("b", shards[1], True),
            ("empty", torch.zeros(0, dtype=dtype), True),
        ],
        train,
    )
    for step in range(5):
        grads = gradients(step, shapes, dtype)
        for p, g in zip(whole, grads, strict=True):
            p.grad = g
        flat = torch.cat([grads[0].flatten(), grads[2].flatten()])
        for p, g in zip(shards, (flat[:20], flat[20:], grads[1]), strict=True):
            p.grad = g.clone()
        oracle.step()
        mine.step()
    close = {"rtol": 1e-14 if dtype == torch.float64 else 2e-6, "atol": 1e-15}
    torch.testing.assert_close(
        torch.cat(shards[:2]), torch.cat([whole[0].flatten(), whole[2].flatten()]).detach(), **close
    )
    torch.testing.assert_close(shards[2], whole[1].detach(), **close)


@pytest.mark.parametrize(
    "train",
    [*(Train(optimizer=n) for n in optim.KINDS), Train(optimizer="sgd", momentum=0.9)],
    ids=[*optim.KINDS, "momentum"],
)
def test_a_restored_optimizer_goes_on_bit_for_bit(train):
    def run(steps, p, optimizer):
        for s in steps:
            p.grad = gradients(s, [p.shape], p.dtype)[0]
            optimizer.step()

    p = torch.ones(33)
    through = optim.make_optimizer([("p", p, True)], train)
    run(range(3), p, through)
    q = p.clone()
    resumed = optim.make_optimizer([("p", q, True)], train)
    states = {n: optim.state_tensor(through, p, n).clone() for n in optim.state_names(train)}
    optim.restore_state(resumed, q, states, 3, train)
    run(range(3, 6), p, through)
    run(range(3, 6), q, resumed)
    assert torch.equal(p, q)


def test_a_rank_without_elements_steps_too():
    empty = torch.zeros(0)
    optimizer = optim.make_optimizer([("a", empty, True)], Train())
    optimizer.step()
    assert optim.state_tensor(optimizer, empty, "exp_avg") is None


def test_the_learning_rate_warms_up_and_falls():
    train = Train(lr=1.0, warmup_steps=4, lr_schedule="cosine", min_lr=0.1, steps=24)
    assert [optim.learning_rate(train, s) for s in (1, 2, 3, 4)] == [0.25, 0.5, 0.75, 1.0]
    assert optim.learning_rate(train, 14) == pytest.approx(0.55)
    assert optim.learning_rate(train, 24) == pytest.approx(0.1)
    assert optim.learning_rate(train, 30) == pytest.approx(0.1)
    constant = replace(train, lr_schedule="constant")
    assert [optim.learning_rate(constant, s) for s in (2, 4, 24)] == [0.5, 1.0, 1.0]
    assert optim.learning_rate(Train(lr=2.0), 1) == 2.0


def test_the_clip_coefficient_is_torchs():
    for scale in (0.01, 1.0, 100.0):
        p = torch.nn.Parameter(torch.zeros(50, dtype=torch.float64))
        p.grad = gradients(1, [(50,)], torch.float64)[0] * scale
        mine = p.grad * optim.clip_coefficient(float(p.grad.norm()), 1.0)
        torch.nn.utils.clip_grad_norm_([p], 1.0)
        torch.testing.assert_close(mine, p.grad, rtol=1e-15, atol=0)
    assert optim.clip_coefficient(5.0, 0) == 1


def test_what_has_one_dim_does_not_decay(tmp_path):
    """By name here, by the kind of its op in the judge."""
    for family, fields in (
        ("gpt2", {}),
        ("llama", verify_jobs.QWEN),
        ("llama", verify_jobs.MLA | verify_jobs.EXPERTS),
    ):
        model = verify_jobs.job(tmp_path, "1mb", family, **fields).model
        names = [n for n in weight_shapes(model) if not n.endswith(slots.BALANCE_BIAS)]
        assert {n for n in names if not slots.decays_weight(n)} == vectors(model)
    assert not slots.decays_weight("blocks.0.attention.q_norm")


def test_unknown_words_are_named():
    with pytest.raises(UsageError, match="adamw, sgd, adam, adamax"):
        optim.make_optimizer([("p", torch.zeros(1), True)], Train(optimizer="lion"))
    with pytest.raises(UsageError, match="constant, cosine"):
        optim.learning_rate(Train(lr_schedule="linear"), 1)


@pytest.mark.parametrize(
    ("plan", "optimizer"),
    [
        ("dp_shard2.zero3 tp2 2mb", "rmsprop"), ("pp2:1f1b/2mb dp_shard2.zero1 offload:nvme", "adagrad"),
        ("2mb bf16 precision.rounding=stochastic", "adadelta"), ("dp_shard2.zero2 tp2+sp 2mb", "nadam"),
        ("pp2:1f1b/2mb dp_shard2.zero3 offload:cpu", "rprop"),
        ("pp2:zb_h1/2mb dp_shard2.zero1 pipeline.post_validation=true", "asgd"),
    ],
)  # fmt: skip
def test_a_plan_equals_one_device_under_the_jobs_own_optimizer(plan, optimizer, tmp_path):
    job = verify_jobs.job(tmp_path, plan, layers=2)
    train = replace(job.train, optimizer=optimizer, momentum=0.9)
    found = verify(replace(job, train=train), brief=True)
    assert found.equal and found.traffic_equal, str(found)
    assert optimizer in [t.job.train.optimizer for t in found.trials]


def test_averaged_sgd_goes_on_at_the_rate_of_its_last_step():
    train, param = Train(optimizer="asgd", warmup_steps=10), torch.zeros(2)
    made = optim.make_optimizer([("p", param, True)], train)
    optim.restore_state(made, param, {"ax": torch.zeros(2)}, 6, train, step=3)  # two updates a step
    assert made.state[param]["eta"] == pytest.approx(train.lr * 0.3, rel=1e-3)
