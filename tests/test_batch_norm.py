"""Is the batch norm of several processes that of their whole batch? And what does it cost?"""

from argparse import Namespace

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from benchmark import step_traffic
from cli import run_two
from conftest import make_system, portable_system, wave

from model import ENCODERS, BatchNorm, NormOfAll, foreign_batch_norms
from tools import BadInput, process_count, process_rank, sum_over_processes
from trainECAPAModel import check_description

# Largest relative errors: rounding to bfloat16 twice, a half of 2^-8 each.
BOUNDS = {torch.float32: 1e-5, torch.bfloat16: 2**-8}
# Means of the channels, in deviations. bfloat16 has no digits to hold 1000 +- 1.
MEANS = {torch.float32: (0, 1000), torch.bfloat16: (0, 10)}


def map_norm(maps):
    """(maps (B, channels, bands, T) normalised, running statistics) after a step of training."""
    norm = BatchNorm(maps.shape[1])
    return norm(maps).detach(), norm.state_dict()


def norm(x, weight, bias):
    """(x normalised, mean, variance) of (B, channels, T)."""
    return NormOfAll.apply(x, weight, bias, 1e-5)


def maps():
    """A batch (8, 4, 5, 6) of a 2-D network."""
    return 3 + torch.randn(8, 4, 5, 6, generator=torch.Generator().manual_seed(0))


def norm_errors(dtype, norm=norm, device='cpu'):
    """Relative errors of the norm and of its gradients, beside float64.

    It sees this process's part of a batch, float64 all of it. A part of the gradient that comes in
    lies along x, which the backward pass must take out.
    """
    errors = []
    random = torch.Generator().manual_seed(0)
    for mean in MEANS[dtype]:
        for shape in ((8, 16, 50), (8, 192, 1)):
            deviations = torch.randn(shape, generator=random)
            x = (deviations + mean).to(dtype)
            direction = torch.randn(shape, generator=random) + 0.5 * deviations
            direction = direction.to(dtype)
            weight, bias = torch.rand(2, shape[1], generator=random)

            inputs = [tensor.double().requires_grad_() for tensor in (x, weight, bias)]
            normalised = F.batch_norm(inputs[0], None, None, *inputs[1:], training=True)
            gradients = torch.autograd.grad(normalised, inputs, direction.double())
            variance = x.double().var((0, 2), correction=0)
            exact = [own_part(normalised), variance, own_part(gradients[0]), *gradients[1:]]

            inputs = [own_part(x).to(device), weight.to(device), bias.to(device)]
            inputs = [tensor.requires_grad_() for tensor in inputs]
            normalised, mean_of_all, variance = norm(*inputs)
            assert normalised.dtype == dtype
            gradients = torch.autograd.grad(normalised, inputs, own_part(direction).to(device))
            for gradient in gradients[1:]:
                dist.all_reduce(gradient)

            ours = [normalised, variance, *gradients]
            if mean:  # a mean of 0 has no relative error
                ours.append(mean_of_all)
                exact.append(x.double().mean((0, 2)))
            for tensor, expected in zip(ours, exact):
                error = (tensor.detach().cpu() - expected).norm() / expected.norm()
                errors.append(error.item())
    return errors


def own_part(tensor):
    """This process's part of a batch."""
    return tensor.detach().chunk(process_count())[process_rank()]


def one_step(precision):
    """(Gradients averaged over the processes, {name: buffer}) of one step of training."""
    system = portable_system(16, precision=precision).train()
    audio = torch.stack([torch.from_numpy(wave(i, 16240)) for i in range(8)])
    loss, _ = system(own_part(audio), own_part(torch.arange(8)))
    loss.backward()
    gradient = torch.cat([parameter.grad.flatten() for parameter in system.parameters()])
    gradient = sum_over_processes(gradient) / process_count()
    return gradient, dict(system.named_buffers())


def save_facts():
    """What each of two processes saves, as RANK.pt."""
    dist.init_process_group('gloo')
    rank = process_rank()
    compiled = torch.compile(norm, backend='aot_eager', fullgraph=True)
    facts = {}
    for dtype in BOUNDS:
        facts[f'errors {dtype}'] = norm_errors(dtype)
        facts[f'errors {dtype}, compiled'] = norm_errors(dtype, compiled)
    for precision in ('fp32', 'bf16'):
        facts[precision] = one_step(precision)
    facts['maps'] = map_norm(own_part(maps()))
    try:
        BatchNorm(4)(torch.randn(3 + rank, 4, 10))
    except RuntimeError as error:
        facts['refusal'] = str(error)
    torch.save(facts, f'{rank}.pt')
    dist.destroy_process_group()


@pytest.fixture(scope='module')
def two(tmp_path_factory):
    """What two processes saved."""
    folder = tmp_path_factory.mktemp('two')
    status, _, errors = run_two(save_facts, folder=folder)
    assert status == 0, errors
    return [torch.load(folder / f'{rank}.pt') for rank in range(2)]


@pytest.mark.slow
def test_two_processes_have_the_batch_norm_of_the_whole_batch(two):
    """In both types, compiled or not, with means of up to 1,000 deviations."""
    for facts in two:
        for dtype, bound in BOUNDS.items():
            assert max(facts[f'errors {dtype}']) < bound
            assert max(facts[f'errors {dtype}, compiled']) < bound


@pytest.mark.slow
@pytest.mark.parametrize('precision, bound', [('fp32', 1e-4), ('bf16', 0.05)])
def test_two_processes_take_the_step_of_one(two, precision, bound):
    gradient, buffers = one_step(precision)
    for facts in two:
        gradient_of_two, buffers_of_two = facts[precision]
        assert (gradient_of_two - gradient).norm() < bound * gradient.norm()
        for name, buffer in buffers.items():
            error = (buffers_of_two[name].double() - buffer.double()).norm()
            assert error <= bound * buffer.double().norm(), name
            assert torch.equal(buffers_of_two[name], two[0][precision][1][name]), name


@pytest.mark.slow
def test_two_processes_have_the_norm_of_the_whole_batch_in_a_2d_network(two):
    torch_norm = torch.nn.BatchNorm2d(4)
    normalised = torch_norm(maps()).detach()
    both = torch.cat([facts['maps'][0] for facts in two])
    torch.testing.assert_close(both, normalised, atol=1e-5, rtol=1e-5)
    for facts in two:
        torch.testing.assert_close(facts['maps'][1], torch_norm.state_dict())


def test_one_process_has_the_norm_of_pytorch_in_a_2d_network():
    torch_norm = torch.nn.BatchNorm2d(4)
    normalised = torch_norm(maps()).detach()
    ours, statistics = map_norm(maps())
    torch.testing.assert_close(ours, normalised)
    torch.testing.assert_close(statistics, torch_norm.state_dict())


@pytest.mark.parametrize('encoder', ENCODERS)
def test_the_batch_norms_of_an_encoder_see_all_processes(encoder):
    """Others would keep different statistics in each process, of which only one's are saved."""
    with torch.device('meta'):
        network = ENCODERS[encoder](64)
    assert foreign_batch_norms(network) == []


def test_an_encoder_with_other_batch_norms_is_refused_if_several_processes_train(monkeypatch):
    system = make_system()
    system.speaker_encoder.layer1.bn3 = torch.nn.BatchNorm1d(8)
    args = Namespace(encoder='ecapa', loss='aam')
    check_description(system, args)
    monkeypatch.setattr('trainECAPAModel.process_count', lambda: 2)
    with pytest.raises(BadInput, match='layer1.bn3'):
        check_description(system, args)


@pytest.mark.slow
def test_parts_of_different_sizes_are_refused(two):
    for facts in two:
        assert 'different sizes' in facts['refusal']


def test_one_process_runs_what_several_do():
    store = dist.HashStore()
    dist.init_process_group('gloo', store=store, rank=0, world_size=1)
    try:
        for dtype, bound in BOUNDS.items():
            assert max(norm_errors(dtype)) < bound
    finally:
        dist.destroy_process_group()


@pytest.mark.slow
@pytest.mark.parametrize('precision', ['fp32', 'bf16'])
def test_it_costs_less_than_a_third_more_traffic_and_twice_the_kernels(precision):
    kernels, size = step_traffic('ours', 256, 50, precision)
    kernels_of_eight, size_of_eight = step_traffic('ours', 256, 50, precision, processes=8)
    assert size_of_eight < 1.3 * size
    assert kernels_of_eight < 2 * kernels


def test_only_the_input_is_kept_for_the_backward_pass():
    """As much memory as the batch norm of one process takes."""
    kept = []

    def pack(tensor):
        kept.append(tensor)
        return tensor

    store = dist.HashStore()
    dist.init_process_group('gloo', store=store, rank=0, world_size=1)
    try:
        x = torch.randn(4, 16, 100, dtype=torch.bfloat16, requires_grad=True)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            norm(x, torch.ones(16), torch.zeros(16))
    finally:
        dist.destroy_process_group()
    large = [tensor for tensor in kept if tensor.numel() > 16]
    assert len(large) == 1
    assert large[0] is x
