"""On a GPU: the numbers of a CPU, steps that nobody waits for, and the command as a whole."""

import os

import numpy as np
import pytest
import torch
from cli import command_line
from conftest import portable_system, wave, write_wav
from test_batch_norm import BOUNDS, norm_errors

import trainECAPAModel
from ECAPAModel import load_model
from model import FbankAug
from tools import read_scores

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason='there is no GPU')


def batch(device):
    """Sixteen waveforms with labels."""
    waves = torch.from_numpy(np.stack([wave(i, 16240) for i in range(16)]))
    return waves.to(device), torch.arange(16, device=device)


def loss_and_gradient(system):
    """(Loss, gradient of all parameters (N,)) of the batch, on the CPU."""
    loss, _ = system.train()(*batch(system.device))
    with system.float32_as_asked():
        loss.backward()
    return loss.item(), torch.cat([p.grad.cpu().flatten() for p in system.parameters()])


def test_losses_and_gradients_are_those_of_a_cpu():
    expected, gradient = loss_and_gradient(portable_system(64))
    system = portable_system(64, device='cuda', precision='exact')
    loss, gradient_on_gpu = loss_and_gradient(system)
    assert loss == pytest.approx(expected, rel=1e-4)
    error = (gradient_on_gpu - gradient).norm()
    assert error < 0.03 * gradient.norm(), 'more than rounding that flips a few ReLUs'


def test_bfloat16_is_the_default_and_close():
    system = portable_system(64, device='cuda')
    if system.precision != 'bf16':
        pytest.skip('this GPU has no bfloat16')

    expected, gradient = loss_and_gradient(portable_system(64))
    loss, gradient_on_gpu = loss_and_gradient(system)
    assert loss == pytest.approx(expected, rel=0.02)
    assert torch.cosine_similarity(gradient_on_gpu, gradient, dim=0) > 0.9


def test_embeddings_are_those_of_a_cpu(tmp_path, monkeypatch):
    monkeypatch.setattr('ECAPAModel.BATCH_FRAMES', 800)  # two share a batch
    monkeypatch.setattr('ECAPAModel.LONGEST', 300000)  # the longest is embedded in parts
    monkeypatch.setattr('ECAPAModel.WINDOW_FRAMES', 2000)
    paths = []
    for i, samples in enumerate((700, 48240, 60000, 400000)):
        path = write_wav(tmp_path / f'{i}.wav', wave(i, samples))
        paths.append(path)
    expected = portable_system(64).embed_files(paths)

    exact = portable_system(64, device='cuda', precision='exact').embed_files(paths)
    np.testing.assert_allclose(exact, expected, atol=1e-4)

    usual = portable_system(64, device='cuda').embed_files(paths)
    cosines = (usual[:, 0] * expected[:, 0]).sum(axis=1)
    assert cosines.min() > 0.999, 'TF32 moves a cosine by less than 0.001'


@pytest.mark.parametrize('accumulate', [1, 2])
def test_nobody_waits_for_a_step(accumulate):
    system = portable_system(64, device='cuda', accumulate=accumulate).train()
    system.speaker_encoder.specaug = FbankAug()
    system.train_step(*batch('cuda'))
    waves, labels = batch('cuda')

    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode('error')
    try:
        result = system.train_step(waves, labels)
    finally:
        torch.cuda.set_sync_debug_mode('default')
    assert result.isfinite().all()


def test_the_batch_norm_of_several_processes():
    """One process that NCCL joins runs the kernels that several do."""
    store = torch.distributed.HashStore()
    device = torch.device('cuda', torch.cuda.current_device())
    torch.distributed.init_process_group(
        'nccl', store=store, rank=0, world_size=1, device_id=device
    )
    try:
        for dtype, bound in BOUNDS.items():
            assert max(norm_errors(dtype, device=device)) < bound
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_compiled_steps_have_the_same_losses():
    losses = []
    for compiled in (False, True):
        system = portable_system(64, device='cuda', precision='exact', compile=compiled).train()
        results = [system.train_step(*batch('cuda')) for _ in range(2)]
        losses.append([loss.item() for loss, _, _ in results])
    assert losses[1] == pytest.approx(losses[0], rel=0.05)


def test_the_command_trains_goes_on_and_scores(tree, capsys):
    sizes = {'C': 16, 'num_frames': 60, 'batch_size': 8, 'n_cpu': 1}
    for max_epoch in (1, 2):
        trainECAPAModel.main(command_line(max_epoch=max_epoch, **sizes, **tree))
    assert 'after epoch 1' in capsys.readouterr().out
    scores = read_scores(os.path.join(tree['save_path'], 'score.txt'))
    assert [score[0] for score in scores] == [1, 2]
    eer_in_training = scores[-1][4]

    path = os.path.join(tree['save_path'], 'model', 'model_0002.model')
    eers = {}
    for device in ('cpu', 'cuda'):
        system = load_model(path, device=device)
        eers[device], _ = system.eval_network(tree['eval_list'], tree['eval_path'])
    assert eers['cpu'] == pytest.approx(eers['cuda'], abs=0.5)
    assert eers['cuda'] == pytest.approx(eer_in_training, abs=0.5)
