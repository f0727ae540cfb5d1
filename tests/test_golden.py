"""The numbers of the reference.

Features, embeddings, losses, gradients, Adam steps, measures, a real evaluation.
"""

import copy
import json

import numpy as np
import pytest
import torch
from conftest import make_system, portable_system, wave, weights, write_wav

import dataLoader
from ECAPAModel import describe
from loss import AAMsoftmax
from tools import ComputeErrorRates, ComputeMinDcf, operating_points, tuneThresholdfromScore


@pytest.fixture(scope='module')
def trained(golden):
    system = make_system(128, 204, test_step=2)
    assert system.load_parameters(golden / 'ecapa_c128.model') == []
    return system


# Rounding in float32, half a unit in the last place of a number near 1.
ROUNDING = 2**-24
# A logarithm (14 at most), its mean over time and their difference are each rounded by half a unit
# in the last place.
LOG_ERROR = 3 * 8 * ROUNDING


def assert_log_mels(encoder, waves, *candidates, every=1):
    """Each candidate (B, 80, T / every) is within float32's rounding of the log-mels.

    These are the log-mels, less their means over time, of waves (B, samples), computed in float64.

    A logarithm of next to nothing has no digits: an FFT spreads the rounding of its loud bins over
    all of them. So the roots of the energies are compared. Such a root is a norm of the band's
    bins, and errs by no more than these do.
    """
    exact = copy.deepcopy(encoder.torchfbank).double()
    energies = exact(waves.double()) + 1e-6
    roots = energies.sqrt()
    log_means = energies.log().mean(dim=2, keepdim=True)

    # The root mean square of a spectrum's bins is the norm of its frame, which pre-emphasis at most
    # doubles. Each of the 9 stages of an FFT of 512 points rounds once, and independent errors add
    # as their squares.
    padded = torch.nn.functional.pad(waves.double(), (256, 256), 'reflect')
    frames = padded.unfold(1, 512, 160)
    bin_errors = 9**0.5 * ROUNDING * 2 * frames.norm(dim=2)  # (B, T)

    # Five deviations: a band in a million has more.
    band_weights = exact[1].mel_scale.fb.sum(dim=0)  # (80,)
    root_errors = 5 * band_weights.sqrt().unsqueeze(1) * bin_errors.unsqueeze(1)
    mean_errors = (2 * root_errors / roots).mean(dim=2, keepdim=True)
    bounds = root_errors + roots * (mean_errors + LOG_ERROR) / 2

    for candidate in candidates:
        log_mel = torch.as_tensor(candidate).double() + log_means
        errors = (log_mel / 2).exp() - roots[:, :, ::every]
        used = (errors.abs() / bounds[:, :, ::every]).max()
        assert used < 1, f'{used:.2f} times what rounding explains'


def test_portable_log_mel(portable):
    waves = torch.from_numpy(np.stack([wave(i, 32240) for i in range(4)]))
    encoder = portable_system(64).speaker_encoder
    log_mel = encoder.features(waves)
    assert log_mel.shape == (4, 80, 202)
    assert_log_mels(encoder, waves, log_mel)
    assert_log_mels(encoder, waves, portable['log_mel_mean_normalised'], every=20)


@pytest.mark.parametrize('C', [64, 1024])
def test_portable_network(portable, C):
    system = portable_system(C)
    waves = torch.from_numpy(np.stack([wave(i, 32240) for i in range(4)]))
    long_wave = torch.from_numpy(wave(9, 77777))[None]
    system.eval()
    with torch.no_grad():
        embedding = system.speaker_encoder(waves, aug=False)
        longer = system.speaker_encoder(long_wave, aug=False)
    np.testing.assert_allclose(embedding, portable[f'embedding_eval_C{C}'], atol=1e-4)
    np.testing.assert_allclose(longer, portable[f'embedding_eval_77777_samples_C{C}'], atol=1e-4)

    system.train()
    embedding = system.speaker_encoder(waves, aug=True)
    loss, accuracy = system.speaker_loss(embedding, torch.tensor([3, 1, 19, 7]))
    loss.backward()
    np.testing.assert_allclose(embedding.detach(), portable[f'embedding_train_C{C}'], atol=1e-4)
    np.testing.assert_allclose(loss.item(), portable[f'loss_train_C{C}'], rtol=1e-4)
    assert accuracy.item() == portable[f'accuracy_train_C{C}']

    parameters = dict(system.named_parameters())
    keys = [key.split('/') for key in portable.files if key.startswith('grad_l2/')]
    names = [name for _, name, size in keys if size == f'C{C}']
    assert len(names) == 6
    for name in names:
        norm = parameters[name].grad.norm().item()
        expected = portable[f'grad_l2/{name}/C{C}']
        np.testing.assert_allclose(norm, expected, rtol=1e-3, err_msg=name)


def test_forward(golden, trained):
    expected = np.load(golden / 'forward.npz')
    waves = torch.from_numpy(expected['wav_int16'].astype(np.float32) / 32768)
    joined = waves[:2].reshape(1, -1)[:, :50001]
    encoder = trained.speaker_encoder

    encoder.eval()
    with torch.no_grad():
        log_mel = encoder.features(waves)
        assert_log_mels(encoder, waves, log_mel, expected['log_mel'])
        embedding = encoder(waves, aug=False)
        np.testing.assert_allclose(embedding, expected['embedding_eval'], atol=1e-4)
        embedding = encoder(joined, aug=False)
        expected_of_joined = expected['embedding_eval_first50001_of_wav0_wav1']
        np.testing.assert_allclose(embedding, expected_of_joined, atol=1e-4)

    before = {name: tensor.clone() for name, tensor in trained.state_dict().items()}
    encoder.train()
    with torch.no_grad():
        embedding = encoder(waves, aug=False)
    np.testing.assert_allclose(embedding, expected['embedding_train'], atol=1e-4)
    trained.load_state_dict(before)


def test_three_adam_steps(golden):
    expected = np.load(golden / 'train_steps.npz')
    system = make_system(128, 204)
    system.load_parameters(golden / 'ecapa_c128.model')
    system.speaker_encoder.specaug = torch.nn.Identity()
    system.train()
    waves = torch.from_numpy(expected['wav_int16'].astype(np.float32) / 32768)
    labels = torch.from_numpy(expected['label'])

    losses = []
    for audio, label in zip(waves, labels):
        loss, _, _ = system.train_step(audio, label)
        losses.append(loss.item())
    np.testing.assert_allclose(losses, expected['loss'], rtol=1e-4)

    state = system.state_dict()
    names = [key.removeprefix('after/') for key in expected.files if key.startswith('after/')]
    assert len(names) == 6
    for name in names:
        first = state[name].flatten()[:512]
        after = expected[f'after/{name}']
        np.testing.assert_allclose(first, after, rtol=1e-4, atol=2e-4, err_msg=name)
        size = state[name].abs().mean()
        np.testing.assert_allclose(size, expected[f'mean_abs/{name}'], rtol=1e-4)


def test_aam_softmax(golden):
    expected = np.load(golden / 'aam.npz')
    classifier = AAMsoftmax(204, m=float(expected['m']), s=int(expected['s']))
    classifier.weight.data = torch.from_numpy(expected['weight'])
    x = torch.from_numpy(expected['x']).requires_grad_()
    loss, accuracy = classifier(x, torch.from_numpy(expected['label']))
    loss.backward()
    np.testing.assert_allclose(loss.item(), expected['loss'], rtol=1e-6)
    assert accuracy.item() == expected['accuracy_percent']
    np.testing.assert_allclose(x.grad, expected['grad_x'], atol=1e-6)
    np.testing.assert_allclose(classifier.weight.grad, expected['grad_weight'], atol=1e-6)


def test_reverberation(golden, tmp_path):
    expected = np.load(golden / 'augment.npz')
    dataset = object.__new__(dataLoader.train_loader)
    dataset.rirs = [write_wav(tmp_path / 'rir.wav', expected['rir'])]
    reverberant = dataset.add_rev(expected['clean'][None])
    assert reverberant.shape == (1, 32240)
    np.testing.assert_allclose(reverberant[0], expected['reverberant'], atol=1e-6)


def test_noise_at_a_signal_to_noise_ratio(golden, tmp_path, monkeypatch):
    expected = np.load(golden / 'augment.npz')
    snr = float(expected['snr_db'])
    monkeypatch.setitem(dataLoader.NOISE_SNR, 'noise', (snr, snr))
    dataset = object.__new__(dataLoader.train_loader)
    write_wav(tmp_path / 'noise.wav', expected['noise'])
    dataset.noises = {'noise': dataLoader.NoiseFiles(tmp_path)}
    noisy = dataset.add_noise(expected['clean'], 'noise')
    np.testing.assert_allclose(noisy, expected['noisy'], atol=1e-6)


@pytest.mark.parametrize('case', range(5))
def test_measures(golden, case):
    expected = np.load(golden / 'metrics.npz')
    scores = expected[f'scores{case}']
    labels = expected[f'labels{case}']
    expected_eer = expected[f'eer_percent{case}']
    expected_costs = {
        0.05: expected[f'min_dcf_p0.05_{case}'],
        0.01: expected[f'min_dcf_p0.01_{case}'],
    }

    tuned, eer, fpr, fnr = tuneThresholdfromScore(scores, labels, [1, 0.1])
    assert eer == expected_eer
    assert len(fpr) == len(fnr)
    np.testing.assert_allclose(tuned, expected[f'tuned_threshold_fa1_fa0.1_{case}'], rtol=1e-6)

    rates = ComputeErrorRates(scores, labels)
    for p_target, expected_cost in expected_costs.items():
        cost, _ = ComputeMinDcf(*rates, p_target, 1, 1)
        assert cost == expected_cost


def test_learning_rates(golden):
    curves = json.loads((golden / 'learning_rates.json').read_text())
    assert len(curves) == 2
    for text, expected in curves.items():
        options = dict(option.split('=') for option in text.split())
        system = make_system(
            lr=float(options['lr']),
            lr_decay=float(options['lr_decay']),
            test_step=int(options['test_step']),
        )
        rates = [system.set_rate_and_margin(epochs_done) for epochs_done in range(80)]
        np.testing.assert_allclose(rates, expected, rtol=1e-12)
        again = system.set_rate_and_margin(16)
        assert again == rates[16], 'the rate must not depend on the epochs run before'


@pytest.mark.slow
def test_real_evaluation(golden, minivox, trained):
    expected = np.load(golden / 'evaluation.npz')
    eval_list = minivox / 'trials.txt'
    paths, (trials,) = dataLoader.read_trial_lists([eval_list], [minivox / 'eval'])
    scores, points = trained.score_lists(paths, [trials])[0]['raw']
    assert np.array_equal(trials.labels, expected['labels'])
    np.testing.assert_allclose(scores, expected['scores'], atol=1e-4)
    cost = points['minDCF(0.05)']['value']
    assert f'{cost:.4f}' == f'{expected["min_dcf_p005"]:.4f}'
    _, eer, _, _ = tuneThresholdfromScore(scores, trials.labels, [1])
    assert f'{eer:.2f}' == f'{expected["eer_percent"]:.2f}', 'by the published definition'
    assert f'{points["EER"]["value"]:.2f}' == '7.56', 'where the rates cross'


def test_figures_of_real_scores(golden):
    expected = np.load(golden / 'evaluation.npz')
    _, eer, _, _ = tuneThresholdfromScore(expected['scores'], expected['labels'], [1])
    np.testing.assert_allclose(eer, expected['eer_percent'], atol=1e-6)
    points = operating_points(expected['scores'], expected['labels'])
    cost = points['minDCF(0.05)']['value']
    np.testing.assert_allclose(cost, expected['min_dcf_p005'], atol=1e-6)
    assert f'{points["EER"]["value"]:.2f}' == '7.56'


def test_published_checkpoint_format(golden, tmp_path):
    expected = json.loads((golden / 'published_checkpoint_keys.json').read_text())
    system = make_system(1024, 5994)
    assert sum(p.numel() for p in system.parameters()) > 15e6
    system.save_parameters(tmp_path / 'model.model')
    state = weights(tmp_path / 'model.model')
    assert list(state) == list(expected)
    assert {name: list(tensor.shape) for name, tensor in state.items()} == expected
    assert describe(state) == {'encoder': 'ecapa', 'C': 1024, 'loss': 'aam', 'n_class': 5994}
