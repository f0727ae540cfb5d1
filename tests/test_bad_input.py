"""Is every fault of a corpus named, before a folder is made?"""

import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from cli import refusal, train
from conftest import write_wav

import trainECAPAModel

pytestmark = pytest.mark.usefixtures('quick')
ROOT = Path(__file__).parents[1]


# What spoils a tree, for CASES below.


def remove(name, file=''):
    """Removes a list, a folder or a file of that folder."""

    def spoil(tree):
        path = Path(tree[name], file)
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()

    return spoil


def remove_audio(name, folder=''):
    """Removes the audio files below a folder, which stays."""

    def spoil(tree):
        for path in Path(tree[name], folder).rglob('*.wav'):
            path.unlink()

    return spoil


def replace_text(name, text, file=''):
    """Replaces a list or a file of a folder by text."""
    return lambda tree: Path(tree[name], file).write_text(text)


def replace_line(name, number, text):
    """Replaces a line of a list."""

    def spoil(tree):
        lines = Path(tree[name]).read_text().splitlines()
        lines[number - 1] = text
        Path(tree[name]).write_text('\n'.join(lines) + '\n')

    return spoil


def replace_audio(name, file, **how):
    """Replaces an audio file of a folder by what write_wav makes of `how`."""
    return lambda tree: write_wav(Path(tree[name], file), **how)


def put_byte_order_mark(tree):
    """Puts one before the training list."""
    path = Path(tree['train_list'])
    path.write_bytes(b'\xef\xbb\xbf' + path.read_bytes())


SOUND = 0.1 * np.random.default_rng(0).standard_normal(20000)
STEREO = np.stack([SOUND, SOUND], axis=1)
EIGHT_CHANNELS = np.tile(SOUND[:, None], 8)
UTTERANCE = 'id1/session/00001.wav'
NOISE = 'noise/source/recording/00001.wav'
RIR = 'smallroom/Room001/Room001-00001.wav'
CASES = {
    'training list missing': (remove('train_list'), ['--train_list']),
    'training folder missing': (remove('train_path'), ['--train_path']),
    'trial list missing': (remove('eval_list'), ['--eval_list']),
    'evaluation folder missing': (remove('eval_path'), ['--eval_path']),
    'noise missing': (remove('musan_path'), ['--musan_path']),
    'RIRs missing': (remove('rir_path'), ['--rir_path']),
    'music empty': (
        remove_audio('musan_path', 'music'),
        ['--musan_path', 'music'],
    ),
    'RIRs empty': (
        remove_audio('rir_path'),
        ['--rir_path'],
    ),
    'training list empty': (replace_text('train_list', ''), ['--train_list']),
    'trial list empty': (replace_text('eval_list', ''), ['--eval_list']),
    'training line': (
        replace_line('train_list', 5, 'id1'),
        ['train.txt, line 5', 'id1'],
    ),
    'trial line': (
        replace_line('eval_list', 7, '1 one.wav'),
        ['trials.txt, line 7', 'one.wav'],
    ),
    'trial label': (
        replace_line('eval_list', 3, 'yes a.wav b.wav'),
        ['trials.txt, line 3', 'yes'],
    ),
    'trial file missing': (
        remove('eval_path', UTTERANCE),
        ['--eval_list', UTTERANCE],
    ),
    'training list with a byte order mark': (
        put_byte_order_mark,
        ['--train_list'],
    ),
    'trials of one kind': (
        replace_text('eval_list', f'1 {UTTERANCE} {UTTERANCE}\n'),
        ['trials.txt'],
    ),
    'evaluation file in stereo': (
        replace_audio('eval_path', UTTERANCE, audio=STEREO),
        ['--eval_list', UTTERANCE, '2 channels'],
    ),
    'noise at 44.1 kHz': (
        replace_audio('musan_path', NOISE, audio=SOUND, rate=44100),
        ['--musan_path', '00001.wav', '44100 Hz'],
    ),
    'RIR of eight channels': (
        replace_audio('rir_path', RIR, audio=EIGHT_CHANNELS),
        ['--rir_path', 'Room001-00001.wav', '8 channels'],
    ),
    'no samples': (
        replace_audio('eval_path', UTTERANCE, audio=SOUND[:0]),
        [UTTERANCE],
    ),
    'no audio': (
        replace_text('eval_path', 'not audio', UTTERANCE),
        [UTTERANCE],
    ),
}


@pytest.mark.parametrize('case', CASES)
def test_training_is_refused(tree, capsys, case):
    spoil, words = CASES[case]
    spoil(tree)
    message = refusal(capsys, train, tree)
    assert all(word in message for word in words), message
    assert not os.path.exists(tree['save_path'])


def test_a_full_option_list_trains(tree):
    """Without a fault the same options work: what the other tests see is the fault they made."""
    train(tree)
    assert os.path.exists(tree['save_path'] + '/score.txt')


def test_a_newcomer_without_data(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    message = refusal(capsys, trainECAPAModel.main, [])
    assert 'README' in message and 'exps/demo/run.sh' in message
    assert list(tmp_path.iterdir()) == []
