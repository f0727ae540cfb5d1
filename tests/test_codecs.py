"""Are crops coded in training as often, and as, --codec says?"""

import numpy as np
import pytest
import torch
from cli import refusal, train
from conftest import wave
from scipy.stats import chisquare

import dataLoader
from dataLoader import INTERNET, TELEPHONE, Codec, through_codec, train_loader, usable_codecs
from tools import BadInput

ALL = {**TELEPHONE, **INTERNET}


def delay(a, b):
    """How many samples b comes later than a, by the largest correlation."""
    spectrum = np.fft.rfft(b, 2 * len(a)) * np.fft.rfft(a, 2 * len(a)).conj()
    lag = int(np.argmax(np.fft.irfft(spectrum)))
    return lag if lag < len(a) else lag - 2 * len(a)


@pytest.mark.parametrize('name', ALL)
def test_a_codec_keeps_length_level_and_place(name):
    codec = usable_codecs()[name]
    level = codec.levels and codec.levels[1]
    for samples in (1, 257, 8001, 32240):
        audio = 0.5 * wave(3, samples)
        coded = through_codec(audio, codec, level)
        assert coded.shape == audio.shape
        assert coded.dtype == np.float32
    # Of the longest.
    assert np.sqrt(np.mean(coded**2) / np.mean(audio**2)) == pytest.approx(1, abs=0.2)
    assert abs(delay(audio, coded)) <= 1
    assert np.corrcoef(audio, coded)[0, 1] > 0.8
    assert not np.array_equal(audio, coded)


def test_a_long_recording_is_coded():
    """Also by Vorbis, with which libsndfile crashes if it gets more than two minutes at once."""
    audio = np.tile(0.5 * wave(3, 16000), 150)
    coded = through_codec(audio, INTERNET['vorbis'], 0.5)
    assert coded.shape == audio.shape
    second = 16000
    for start in (0, 64 * second, 130 * second, 149 * second):
        part = slice(start, start + second)
        assert np.corrcoef(audio[part], coded[part])[0, 1] > 0.9


def test_a_loud_crop_is_turned_down_and_not_clipped():
    audio = 3 * wave(3, 16000) / np.abs(wave(3, 16000)).max()
    coded = through_codec(audio, TELEPHONE['ulaw'])
    assert np.abs(coded).max() < 1.2
    quiet = through_codec(audio / 100, TELEPHONE['ulaw'])
    assert np.corrcoef(coded, quiet)[0, 1] > 0.99


def test_a_telephone_has_its_band():
    noise = 0.1 * np.random.default_rng(0).standard_normal(32000)
    spectrum = np.abs(np.fft.rfft(through_codec(noise, TELEPHONE['alaw'], telephone_band=True)))
    hertz = np.fft.rfftfreq(32000, 1 / 16000)
    inside = spectrum[(hertz > 500) & (hertz < 3000)].mean()
    assert spectrum[hertz < 100].mean() < 0.05 * inside
    assert spectrum[hertz > 4500].mean() < 0.05 * inside


def training_options(tree):
    names = ('train_list', 'train_path', 'musan_path', 'rir_path')
    return {name: tree[name] for name in names}


@pytest.mark.parametrize('share', [0, 0.3, 1])
def test_the_share_of_coded_crops(tree, monkeypatch, share):
    names = {codec: name for name, codec in ALL.items()}
    drawn = []

    def watched(audio, codec, compression, telephone_band):
        drawn.append((names[codec], telephone_band))
        return audio

    dataset = train_loader(**training_options(tree), num_frames=20, augment=0, codec=share)
    monkeypatch.setattr(dataLoader, 'through_codec', watched)
    for epoch in range(100):
        for index in range(12):
            dataset[epoch, index]
    if share in (0, 1):
        assert len(drawn) == 1200 * share
    else:
        assert chisquare([len(drawn), 1200 - len(drawn)], [360, 840]).pvalue > 0.001
    if share:
        telephone = [limited for name, limited in drawn if name in TELEPHONE]
        others = [limited for name, limited in drawn if name in INTERNET]
        expected = [len(drawn) * 2 / 3, len(drawn) / 3]
        assert chisquare([len(telephone), len(others)], expected).pvalue > 0.001
        limited = [sum(telephone), len(telephone) - sum(telephone)]
        assert chisquare(limited).pvalue > 0.001
        assert not any(others)
        assert {name for name, _ in drawn} == set(ALL)


def test_a_coded_crop_depends_on_seed_epoch_and_index_alone(tree):
    options = training_options(tree)
    first = train_loader(**options, num_frames=20, codec=0.5, seed=1)
    again = train_loader(**options, num_frames=20, codec=0.5, seed=1)
    plain = train_loader(**options, num_frames=20, seed=1)
    same = []
    for index in range(12):
        assert torch.equal(first[2, index][0], again[2, index][0])
        same.append(torch.equal(first[2, index][0], plain[2, index][0]))
    assert 0 < sum(same) < 12, 'a crop that no codec took is as without the option'


def test_the_option_is_part_of_the_run(tree, capsys, quick_test):
    train(tree, codec=0.3)
    assert 'codecs gsm, ulaw' in capsys.readouterr().out
    assert '--codec 0.0 (was 0.3 of gsm' in refusal(capsys, train, tree, max_epoch=2)
    assert '--codec' in refusal(capsys, train, tree, max_epoch=2, codec=1.5)


def test_a_libsndfile_without_one_of_the_codecs_is_refused_at_the_start(monkeypatch):
    """Or the same command would give another model on another machine."""
    unknown = Codec(8000, 'WAV', 'NO_SUCH_CODING')
    monkeypatch.setitem(dataLoader.TELEPHONE, 'gsm', unknown)
    usable_codecs.cache_clear()
    with pytest.raises(BadInput, match='--codec.*gsm'):
        usable_codecs()
    usable_codecs.cache_clear()
