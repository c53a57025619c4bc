"""The engine of one process under every ZeRO stage: averages of weights, and steps that are not finite."""

import os
import subprocess
import sys

import pytest
import torch
from torch import Tensor, nn

from megascale.errors import ConfigError
from megascale.train.engine import Engine, NonFiniteError, check_settings, convert
from megascale.train.schedule import OptimConfig
from megascale.train.zero import ZeroConfig

OPTIM = OptimConfig(lr=0.1)
STAGES = (0, 1, 2, 3)
DECAY = 0.75  # a fraction that floats hold


pytestmark = pytest.mark.usefixtures("process_group")


class Net(nn.Module):
    """Two layers, so that there are weights with decay and without, and of sizes that don't divide evenly."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(3)
        self.first, self.second = nn.Linear(3, 5), nn.Linear(5, 1)
        for parameter in self.parameters():
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator))

    def forward(self, x_BD: Tensor) -> Tensor:
        return self.second(self.first(x_BD).tanh())[:, 0]


def batches(step: int) -> list[dict[str, Tensor]]:
    x_BD = torch.randn(4, 3, generator=torch.Generator().manual_seed(step))
    return [{"x_BD": part, "targets_B": part.sum(dim=1)} for part in x_BD.chunk(2)]


def loss_fn(y_B: Tensor, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    loss = (y_B - batch["targets_B"]).pow(2).mean()
    return loss, {"loss": loss}


def engine(stage: int, ema: bool = True, **zero: object) -> Engine:
    return Engine(Net(), OPTIM, ZeroConfig(stage=stage, **zero), 2, 2, 10, ema_decay=DECAY if ema else None)


def equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("stage", STAGES)
def test_average_follows_the_weights_by_its_formula_and_leaves_them_alone(stage):
    averaged, plain = engine(stage), engine(stage, ema=False)
    expected = averaged.full_weights()
    for step in range(4):
        averaged.train_step(step, batches(step), loss_fn)
        plain.train_step(step, batches(step), loss_fn)
        weights = averaged.full_weights()
        expected = {name: expected[name].lerp(weights[name], 1 - DECAY) for name in expected}
        found = averaged.full_ema()
        assert found is not None and equal(found, expected)
    assert equal(averaged.full_weights(), plain.full_weights())
    assert not equal(averaged.full_weights(), expected)
    assert plain.full_ema() is None


@pytest.mark.parametrize("stage", STAGES)
def test_average_goes_on_from_what_was_saved(stage):
    straight, resumed = engine(stage), engine(stage)
    for step in range(2):
        straight.train_step(step, batches(step), loss_fn)
        resumed.train_step(step, batches(step), loss_fn)
    saved = straight.full_ema()
    assert saved is not None
    resumed.load_ema({name: torch.zeros_like(value) for name, value in saved.items()})
    forgotten = resumed.full_ema()
    assert forgotten is not None and not equal(forgotten, saved)
    resumed.load_ema(saved)
    for step in range(2, 4):
        straight.train_step(step, batches(step), loss_fn)
        resumed.train_step(step, batches(step), loss_fn)
    assert equal(resumed.full_weights(), straight.full_weights())
    assert equal(resumed.full_ema() or {}, straight.full_ema() or {"": torch.zeros(1)})


@pytest.mark.parametrize("offload", [False, True])
@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("kind", ["loss is nan", "loss is infinite", "gradient is infinite"])
def test_step_that_is_not_finite_updates_nothing(stage, kind, offload):
    if stage == 0 and offload:
        return
    disturbed = engine(stage, offload_optimizer=offload)
    disturbed.train_step(0, batches(0), loss_fn)
    before, average = disturbed.full_weights(), disturbed.full_ema()

    def spoilt(y_B: Tensor, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        if kind == "gradient is infinite":  # with a loss that is finite
            loss = (y_B - y_B.detach() + 1e-45).abs().pow(0.01).mean()
        else:
            loss = y_B.detach().mean() * 0 + torch.tensor(float(kind.split()[-1][:3])) + 0 * y_B.mean()
        return loss, {"loss": loss}

    with pytest.raises(NonFiniteError) as raised:
        disturbed.train_step(1, batches(1), spoilt)
    assert len(raised.value.losses) == 2
    assert equal(disturbed.full_weights(), before)
    assert equal(disturbed.full_ema() or {}, average or {"": torch.zeros(1)})


@pytest.mark.parametrize("stage", STAGES)
def test_gradient_norm_is_that_of_the_mean_gradient_before_clipping(stage):
    model = Net()
    for batch in batches(0):
        (loss_fn(model(batch["x_BD"]), batch)[0] / 2).backward()
    norm = nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
    assert norm > OPTIM.clip_norm, "else clipping would not show"
    found = engine(stage, ema=False).train_step(0, batches(0), loss_fn)
    # summed in another order
    torch.testing.assert_close(found["grad_norm"], norm, rtol=1e-6, atol=0)


def test_settings_that_deepspeed_does_not_take_are_told_in_one_line():
    good = engine(2).settings
    check_settings(good)
    bad = good | {"zero_optimization": good["zero_optimization"] | {"nonsense_key": 1}}
    with pytest.raises(ConfigError, match=r"^DeepSpeed refuses its config: .*nonsense_key.*$"):
        check_settings(bad)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_optimizer_on_the_cpu_does_what_it_does_beside_the_weights(stage):
    there, here = engine(stage, offload_optimizer=True), engine(stage)
    for step in range(3):
        there.train_step(step, batches(step), loss_fn)
        here.train_step(step, batches(step), loss_fn)
    ours, theirs = there.full_weights(), here.full_weights()
    for name in ours:
        # a fused kernel rounds otherwise
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("stage", [1, 3])
def test_universal_checkpoint_goes_on_as_if_it_were_none(tmp_path, stage):
    """With as many ranks nothing has to be rounded otherwise; norms don't decay, and each group counts its own steps."""
    straight = engine(stage, ema=False)
    for step in range(3):
        straight.train_step(step, batches(step), loss_fn)
    straight.save(tmp_path / "saved")
    convert(tmp_path / "saved", tmp_path / "converted")
    resumed = Engine(Net(), OPTIM, ZeroConfig(stage=stage), 2, 2, 10, universal=True)
    resumed.load(tmp_path / "converted")
    for step in range(3, 6):
        straight.train_step(step, batches(step), loss_fn)
        resumed.train_step(step, batches(step), loss_fn)
    assert equal(resumed.full_weights(), straight.full_weights())


@pytest.mark.parametrize("stage", STAGES)
def test_each_weight_gets_its_share_of_the_rate(stage):
    """Under AdamW's first update every weight moves by the rate, so that the moves have the ratio of the shares."""
    shares = {"first.weight": 0.25, "first.bias": 0.25, "second.weight": 1.0, "second.bias": 1.0}
    optim = OptimConfig(lr=0.1, weight_decay=0.0, warmup_share=0.5)
    shared = Engine(Net(), optim, ZeroConfig(stage=stage), 2, 2, 10, rate_share=shares.__getitem__)
    before = shared.full_weights()
    lr = float(shared.train_step(0, batches(0), loss_fn)["lr"])
    assert lr == pytest.approx(0.1 / 6), "the first of five steps of warmup"
    for name, value in shared.full_weights().items():
        move = (value - before[name]).abs()
        torch.testing.assert_close(move, torch.full_like(move, lr * shares[name]), rtol=1e-3, atol=0)  # AdamW's epsilon


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_weight_that_needs_no_gradient_stays_as_it_is(stage):
    model = Net()
    model.first.requires_grad_(False)
    frozen = Engine(model, OptimConfig(lr=0.1, weight_decay=0.5), ZeroConfig(stage=stage), 2, 2, 10)
    before = frozen.full_weights()
    for step in range(3):
        frozen.train_step(step, batches(step), loss_fn)
    after = frozen.full_weights()
    assert {name for name in after if not torch.equal(after[name], before[name])} == {"second.weight", "second.bias"}


def test_process_group_is_left_before_python_ends():
    """Handlers at exit run in the order opposite to their registration, so that this one is called after ours."""
    program = (
        "import atexit, sys, torch\n"
        "atexit.register(lambda: print('joined' if torch.distributed.is_initialized() else 'left', flush=True))\n"
        "from megascale.train.engine import init_distributed\n"
        "init_distributed()\n"
        "assert torch.distributed.is_initialized()\n"
        "sys.exit(2)\n"
    )
    alone = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE", "MASTER_PORT")}
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120, env=alone)
    assert (ended.returncode, ended.stdout) == (2, "left\n"), ended.stderr
