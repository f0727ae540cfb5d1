"""Which audio files are evaluated, with the right numbers, and which are refused?"""

import io
import random
from pathlib import Path

import numpy as np
import pytest
import soundfile
from cli import evaluate, refusal, train
from conftest import wave, weights, write_wav
from damage import NAMES, assert_plain_scores, damage, many, outcome
from hypothesis import given
from hypothesis import strategies as st

from dataLoader import read_crop
from tools import BadInput

pytestmark = pytest.mark.usefixtures('quick')
SOUND = 0.1 * np.random.default_rng(0).standard_normal(20000)
UTTERANCE = 'id1/session/00001.wav'


@pytest.mark.parametrize('samples', [1, 2, 256, 257, 399, 47000, 48241])
def test_utterances_of_any_length(tree, capsys, samples):
    write_wav(Path(tree['eval_path'], UTTERANCE), wave(3, samples) + 0.01, subtype='PCM_16')
    write_wav(Path(tree['train_path'], UTTERANCE), wave(3, samples) + 0.01, subtype='PCM_16')
    if samples < 257:
        assert f'{UTTERANCE}: has {samples} samples' in refusal(capsys, train, tree)
    else:
        train(tree)
        weights(tree['save_path'] + '/model/model_0001.model')


def cut_flac(path):
    """Replaces a file by a FLAC whose header is right and whose samples are not there."""
    flac = Path(path).with_suffix('.flac')
    write_wav(flac, SOUND, subtype='PCM_16')
    Path(path).write_bytes(flac.read_bytes()[:300])
    flac.unlink()


def test_every_file_that_cannot_be_evaluated_is_named(tree, model, capsys):
    """Whether it can be decoded shows only when a worker reads it."""
    names = [UTTERANCE, 'id2/session/00000.wav', 'id3/session/00002.wav']
    cut_flac(Path(tree['eval_path'], names[0]))
    write_wav(Path(tree['eval_path'], names[1]), 0 * SOUND)
    write_wav(Path(tree['eval_path'], names[2]), np.full(20000, np.nan))

    message = refusal(capsys, evaluate, tree, model, n_cpu=1)
    assert '3 of 12 files' in message
    assert all(name in message for name in names)
    assert len(message.splitlines()) == 4


# Files of every kind, and damaged ones.


def audio_file(form, subtype, rate, channels, samples):
    """Bytes of an audio file of a kind."""
    mono = wave(5, max(samples, 1))[:samples, None]
    audio = np.tile(mono, channels)
    file = io.BytesIO()
    soundfile.write(file, audio, rate, format=form, subtype=subtype)
    return file.getvalue()


KINDS = [
    ('WAV', 'PCM_16'),
    ('WAV', 'PCM_24'),
    ('WAV', 'PCM_U8'),
    ('WAV', 'FLOAT'),
    ('WAV', 'DOUBLE'),
    ('WAV', 'ULAW'),
    ('WAVEX', 'PCM_16'),
    ('RF64', 'PCM_16'),
    ('FLAC', 'PCM_16'),
    ('FLAC', 'PCM_24'),
    ('OGG', 'VORBIS'),
]


def is_audio(content):
    """Whether soundfile reads these bytes as finite 16 kHz mono audio for a spectrogram."""
    try:
        audio, rate = soundfile.read(io.BytesIO(content), always_2d=True)
    except soundfile.SoundFileError:
        return False

    samples, channels = audio.shape
    long_enough = samples >= 257
    return rate == 16000 and channels == 1 and long_enough and bool(np.isfinite(audio).all())


def check_audio_file(small_evaluation, capsys, content):
    """A file of these bytes, named wav, is scored as soundfile reads it, or refused.

    Returns whether it is scored.
    """
    path = small_evaluation / 'eval' / NAMES[1]
    good = path.read_bytes()
    path.write_bytes(content)
    try:
        lines, message = outcome(small_evaluation, capsys)
        scored = lines is not None
        if scored:
            assert_plain_scores(small_evaluation, lines)
        else:
            assert NAMES[1] in message
        assert_crop(path, scored)
        return scored
    finally:
        path.write_bytes(good)


def assert_crop(path, usable):
    """Training reads the same samples from the file as soundfile does, or refuses it."""
    try:
        crop = read_crop(str(path), 500, random.Random(0))
    except BadInput:
        assert not usable
        return

    audio, rate = soundfile.read(path, dtype='float32')
    assert rate == 16000
    assert audio.ndim == 1
    start = random.Random(0).randint(0, len(audio) - 500) if len(audio) > 500 else 0
    expected = np.resize(audio[start : start + 500], 500)
    np.testing.assert_allclose(crop, expected, atol=1e-6)


@pytest.mark.parametrize('form, subtype', KINDS)
def test_kinds_of_audio(small_evaluation, capsys, form, subtype):
    content = audio_file(form, subtype, 16000, 1, 6000)
    assert check_audio_file(small_evaluation, capsys, content)


@pytest.mark.parametrize(
    'form, subtype', [('WAV', 'PCM_16'), ('FLAC', 'PCM_16'), ('OGG', 'VORBIS')]
)
@pytest.mark.parametrize('rate, channels', [(8000, 1), (44100, 1), (16000, 2)])
def test_other_rates_and_channels_are_refused(
    small_evaluation, capsys, form, subtype, rate, channels
):
    content = audio_file(form, subtype, rate, channels, 6000)
    assert not check_audio_file(small_evaluation, capsys, content)


@many(60)
@given(data=st.data())
def test_damaged_audio(small_evaluation, capsys, data):
    form, subtype = data.draw(st.sampled_from(KINDS))
    good = audio_file(form, subtype, 16000, 1, 6000)
    content = data.draw(damage(good, header=120))
    scored = check_audio_file(small_evaluation, capsys, content)
    assert is_audio(content) or not scored
