"""Crops and augmentation: what is drawn, how often, and at which level."""

import random

import numpy as np
import pytest
import torch
from conftest import write_wav
from scipy.stats import chisquare, kstest

import dataLoader
from dataLoader import (
    NoiseFiles,
    decibels,
    eval_crops,
    make_batches,
    read_audio,
    read_crop,
    train_loader,
)
from model import FbankAug

LENGTH = 200 * 160 + 240


def power(audio):
    """Level in dB."""
    return 10 * np.log10(np.mean(np.square(audio, dtype=np.float64), axis=-1))


def tone(cycles, samples=LENGTH, level=1.0):
    """A sine that completes `cycles` in LENGTH samples."""
    return level * np.sin(2 * np.pi * cycles * np.arange(samples) / LENGTH)


@pytest.fixture
def noises(tmp_path):
    """A dataset with ten clips in each category, each of a different tone."""
    dataset = object.__new__(train_loader)
    dataset.noises = {}
    for category in ('noise', 'speech', 'music'):
        for i in range(10):
            clip = tone(1000 + 100 * i, level=0.1 + 0.05 * i)
            write_wav(tmp_path / category / f'{i}.wav', clip)
        dataset.noises[category] = NoiseFiles(tmp_path / category)
    return dataset


def tones_in(audio):
    """{index of the tone: its level in dB} of what the clips of `noises` added."""
    amplitudes = 2 / LENGTH * np.abs(np.fft.rfft(audio))
    levels = {}
    for i in range(10):
        amplitude = amplitudes[1000 + 100 * i]
        if amplitude > 1e-3:
            levels[i] = 20 * np.log10(amplitude) - 10 * np.log10(2)
    return levels


def test_six_kinds_are_equally_likely():
    class Recorder(train_loader):
        def __init__(self):
            self.calls = []
            self.augment_share = 5 / 6

        def add_rev(self, audio, rng):
            self.calls.append('reverberation')
            return audio

        def add_noise(self, audio, noisecat, rng):
            self.calls.append(noisecat)
            return audio

    rng = random.Random(1)
    kinds = []
    for _ in range(6000):
        recorder = Recorder()
        recorder.augment(np.zeros(10), rng)
        kinds.append(tuple(recorder.calls))

    expected = {(), ('reverberation',), ('speech',), ('music',), ('noise',), ('speech', 'music')}
    assert set(kinds) == expected
    assert chisquare([kinds.count(kind) for kind in expected]).pvalue > 0.001


@pytest.mark.parametrize('category, low, high', [('noise', 0, 15), ('music', 5, 15)])
def test_noise_and_music_are_one_clip_at_a_uniform_ratio(noises, category, low, high):
    clean = tone(77)
    rng = random.Random(2)
    ratios = []
    for _ in range(400):
        added = noises.add_noise(clean, category, rng) - clean
        assert len(tones_in(added)) == 1
        ratios.append(power(clean) - power(added))
    assert kstest(ratios, 'uniform', (low, high - low)).pvalue > 0.001


def test_babble_is_three_to_eight_speakers_each_at_its_own_ratio(noises):
    clean = tone(77)
    rng = random.Random(3)
    counts = []
    ratios = []
    for _ in range(400):
        added = noises.add_noise(clean, 'speech', rng) - clean
        levels = tones_in(added)
        counts.append(len(levels))
        ratios += [power(clean) - level for level in levels.values()]

    assert set(counts) == set(range(3, 9))
    assert chisquare([counts.count(count) for count in range(3, 9)]).pvalue > 0.001
    assert kstest(ratios, 'uniform', (13, 7)).pvalue > 0.001


@pytest.mark.parametrize('snr', [0.0, 7.5, 20.0])
def test_the_ratio_of_the_mixture_is_the_one_drawn(noises, monkeypatch, snr):
    monkeypatch.setitem(dataLoader.NOISE_SNR, 'noise', (snr, snr))
    clean = tone(77, level=0.3)
    added = noises.add_noise(clean, 'noise', random.Random(4)) - clean
    # The 1e-4 in both levels leaves up to 0.1 dB at these amplitudes.
    assert power(clean) - power(added) == pytest.approx(snr, abs=0.1)


def test_silence_is_not_amplified_without_bound():
    loud = np.ones(100, np.float32)
    silent = np.zeros(100, np.float32)
    assert decibels(loud) == pytest.approx(10 * np.log10(1.0001), rel=1e-3)
    assert decibels(silent) == pytest.approx(-40)


def test_a_published_call_with_a_row_of_samples(noises):
    """The published add_noise takes and returns (1, samples)."""
    mixture = noises.add_noise(tone(77)[None], 'speech')
    assert mixture.shape == (1, LENGTH)


def test_reverberation_convolves_with_unit_energy():
    random = np.random.default_rng(5)
    audio = random.standard_normal(3000)
    rir = random.standard_normal(700)
    expected = np.convolve(audio, rir / np.linalg.norm(rir))[:3000]
    np.testing.assert_allclose(dataLoader.reverberate(audio, rir), expected, atol=1e-5)


def test_crops_start_uniformly(tmp_path):
    ramp = np.arange(1100) / 2000
    path = write_wav(tmp_path / 'ramp.wav', ramp)
    rng = random.Random(6)
    starts = []
    for _ in range(2020):
        crop = read_crop(path, 1000, rng)
        start = round(crop[0] * 2000)
        np.testing.assert_allclose(crop, ramp[start : start + 1000], atol=1e-6)
        starts.append(start)
    assert chisquare(np.bincount(starts, minlength=101)).pvalue > 0.001


@pytest.mark.parametrize('tail', [0, 10000, 10001])
def test_a_piece_longer_than_what_is_left_ends_with_the_audio(tmp_path, tail):
    """Bytes after the samples of a wav are not audio."""
    path = write_wav(tmp_path / 'noise.wav', np.full(1000, 0.5), subtype='PCM_16')
    with open(path, 'ab') as file:
        file.write(b'LIST')
        file.write(tail.to_bytes(4, 'little'))
        file.write(bytes(tail))

    for _ in range(2):
        crop = read_crop(path, 600, random.Random(1), piece_start=900)
        np.testing.assert_allclose(crop, 0.5, atol=1e-4)


@pytest.mark.parametrize('samples', [1, 300, 999, 1000])
def test_short_utterances_are_wrapped_round(tmp_path, samples):
    ramp = np.arange(samples) / 2000
    path = write_wav(tmp_path / 'ramp.wav', ramp)
    crop = read_crop(path, 1000, random.Random(7), piece_start=0)
    np.testing.assert_allclose(crop, np.pad(ramp, (0, 1000 - samples), 'wrap'), atol=1e-6)


@pytest.mark.parametrize('samples', [30000, 48240, 100003])
def test_evaluation_utterance(tmp_path, samples):
    audio = np.random.default_rng(8).uniform(-1, 1, samples)
    path = write_wav(tmp_path / 'a.wav', audio)
    whole = torch.from_numpy(read_audio(path))
    np.testing.assert_allclose(whole, audio, atol=1e-6)

    crops = eval_crops(whole)
    assert len(crops) == 5
    wrapped = np.pad(audio, (0, max(0, 48240 - samples)), 'wrap')
    for number, crop in enumerate(crops):
        start = int(number * (len(wrapped) - 48240) / 4)
        np.testing.assert_allclose(crop, wrapped[start : start + 48240], atol=1e-6)


@pytest.mark.parametrize('dim, size, widths', [(2, 202, 10), (1, 80, 8)])
def test_specaugment_widths_and_positions(dim, size, widths):
    torch.manual_seed(9)
    shape = (20000, 1, size) if dim == 2 else (20000, size, 1)
    masked = FbankAug().mask_along_axis(torch.ones(shape), dim) == 0
    masked = masked.reshape(20000, size).numpy()

    width = masked.sum(axis=1)
    assert chisquare(np.bincount(width, minlength=widths)).pvalue > 0.001
    assert width.max() == widths - 1

    seen = width > 0
    first = masked.argmax(axis=1)[seen]
    last = size - 1 - masked[:, ::-1].argmax(axis=1)[seen]
    assert np.array_equal(last - first + 1, width[seen]), 'a mask is one run'
    assert chisquare(np.bincount(first, minlength=size - widths + 1)).pvalue > 0.001


def test_specaugment_masks_both_axes_with_zeros():
    torch.manual_seed(10)
    x = torch.full((500, 80, 202), 3.0)
    masked = FbankAug()(x) == 0

    frames = masked.all(dim=1).sum(dim=1)
    bands = masked.all(dim=2).sum(dim=1)
    assert (frames > 0).float().mean() > 0.8
    assert (bands > 0).any()
    assert (x == 3).all(), 'the input is left as it was'


def test_a_sample_depends_on_seed_epoch_and_index_alone(tree):
    def samples(seed, epoch, n_cpu):
        dataset = train_loader(**tree, num_frames=50, seed=seed)
        loader = make_batches(dataset, batch_size=4, n_cpu=n_cpu)
        loader.batch_sampler.epoch = epoch
        return [torch.cat([audio, labels[:, None]], dim=1) for audio, labels in loader]

    first = samples(seed=1, epoch=1, n_cpu=0)
    by_workers = samples(seed=1, epoch=1, n_cpu=2)
    other_epoch = samples(seed=1, epoch=2, n_cpu=0)
    other_seed = samples(seed=2, epoch=1, n_cpu=0)
    assert len(first) == 3
    assert all(torch.equal(a, b) for a, b in zip(first, by_workers))
    assert not any(torch.equal(a, b) for a, b in zip(first, other_epoch))
    assert not any(torch.equal(a, b) for a, b in zip(first, other_seed))


def test_an_epoch_has_every_utterance_once(tree):
    dataset = train_loader(**tree, num_frames=50)
    loader = make_batches(dataset, batch_size=4, n_cpu=0)
    labels = torch.cat([labels for _, labels in loader])
    assert sorted(labels.tolist()) == sorted(3 * [0, 1, 2, 3])
    indices = [index for batch in loader.batch_sampler for _, index in batch]
    assert sorted(indices) == list(range(12))


def test_labels_are_the_sorted_speakers(tmp_path, tree):
    (tmp_path / 'train.txt').write_text(
        'zoe id0/session/00000.wav\nadam id1/session/00000.wav\nzoe id2/session/00000.wav\n'
    )
    dataset = train_loader(**tree, num_frames=50)
    assert dataset.speakers == ['adam', 'zoe']
    assert [dataset[i][1] for i in range(3)] == [1, 0, 1]
    assert dataset.path(2).endswith('train/id2/session/00000.wav')


def test_a_plain_index_draws_differently_each_time(tree):
    """A loader of somebody's own around the dataset must not give the same crop every epoch."""
    dataset = train_loader(**tree, num_frames=50)
    torch.manual_seed(11)
    first, _ = dataset[0]
    second, _ = dataset[0]
    assert first.shape == (50 * 160 + 240,)
    assert first.dtype == torch.float32
    assert not torch.equal(first, second)

    torch.manual_seed(11)
    again, _ = dataset[0]
    assert torch.equal(first, again)
