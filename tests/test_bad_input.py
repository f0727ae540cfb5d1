"""Bad input gets a sentence that names it, exit status 2, no traceback, and leaves no folder."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from cli import command_line
from conftest import write_wav

import trainECAPAModel
from ECAPAModel import ECAPAModel

ROOT = Path(__file__).parents[1]
SMALL = {'C': 8, 'num_frames': 20, 'batch_size': 4, 'n_cpu': 0, 'max_epoch': 1, 'device': 'cpu'}


def make_system(C):
    return ECAPAModel(
        lr=0.001, lr_decay=0.97, C=C, n_class=4, m=0.2, s=30, test_step=1, device='cpu'
    )


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
    'training list missing': (remove('train_list'), ['--train_list', 'no such file']),
    'training folder missing': (remove('train_path'), ['--train_path', 'no such folder']),
    'trial list missing': (remove('eval_list'), ['--eval_list', 'no such file']),
    'evaluation folder missing': (remove('eval_path'), ['--eval_path', 'no such folder']),
    'noise missing': (remove('musan_path'), ['--musan_path', 'no such folder']),
    'RIRs missing': (remove('rir_path'), ['--rir_path', 'no such folder']),
    'music empty': (
        remove_audio('musan_path', 'music'),
        ['--musan_path', 'music', 'no .wav'],
    ),
    'RIRs empty': (
        remove_audio('rir_path'),
        ['--rir_path', 'no .wav'],
    ),
    'training list empty': (replace_text('train_list', ''), ['--train_list', 'empty']),
    'trial list empty': (replace_text('eval_list', ''), ['--eval_list', 'empty']),
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
        ['--eval_list', UTTERANCE, 'no such file'],
    ),
    'training list with a byte order mark': (
        put_byte_order_mark,
        ['--train_list', 'byte order mark'],
    ),
    'trials of one kind': (
        replace_text('eval_list', f'1 {UTTERANCE} {UTTERANCE}\n'),
        ['trials.txt', 'both kinds'],
    ),
    'training file missing': (
        remove('train_path', UTTERANCE),
        [UTTERANCE, 'no such file'],
    ),
    'training file at 8 kHz': (
        replace_audio('train_path', UTTERANCE, audio=SOUND, rate=8000),
        ['--train_list', UTTERANCE, '8000 Hz'],
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
        [UTTERANCE, 'no samples'],
    ),
    'no audio': (
        replace_text('eval_path', 'not audio', UTTERANCE),
        [UTTERANCE, 'cannot be read as audio'],
    ),
}


def refusal(arguments, capsys):
    """The sentence that the command ends with; it must end with status 2."""
    with pytest.raises(SystemExit) as stop:
        trainECAPAModel.main(arguments)
    assert stop.value.code == 2
    return capsys.readouterr().err


@pytest.mark.parametrize('case', CASES)
def test_training_is_refused(tree, capsys, case):
    spoil, words = CASES[case]
    spoil(tree)
    message = refusal(command_line(**SMALL, **tree), capsys)
    assert all(word in message for word in words), message
    assert not os.path.exists(tree['save_path'])


def test_a_full_option_list_trains(tree):
    """Without a fault the same options work: what the other tests see is the fault they made."""
    trainECAPAModel.main(command_line(**SMALL, **tree))
    assert os.path.exists(tree['save_path'] + '/score.txt')


@pytest.fixture
def checkpoint(tmp_path):
    path = tmp_path / 'a.model'
    make_system(C=8).save_parameters(path)
    return path


class Payload:
    """A pickle that runs code when it is loaded."""

    def __reduce__(self):
        return os.mkdir, ('executed',)


def cut(path):
    path.write_bytes(path.read_bytes()[:9999])


def drop_a_tensor(path):
    state = torch.load(path)
    del state['speaker_encoder.layer2.bn3.weight']
    torch.save(state, path)


@pytest.mark.parametrize(
    'spoil, words',
    [
        (lambda path: path.unlink(), ['--initial_model', 'no such']),
        (lambda path: path.write_bytes(b''), ['cannot be read as a checkpoint']),
        (cut, ['cannot be read as a checkpoint']),
        (lambda path: torch.save(Payload(), path), ['cannot be read as a checkpoint']),
        (lambda path: torch.save([1, 2], path), ['not a checkpoint of this model']),
        (lambda path: torch.save({'a': torch.zeros(1)}, path), ['not a checkpoint of this model']),
        (drop_a_tensor, ['does not fit', 'layer2.bn3.weight']),
    ],
)
def test_a_checkpoint_is_refused(tree, checkpoint, capsys, monkeypatch, tmp_path, spoil, words):
    monkeypatch.chdir(tmp_path)
    spoil(checkpoint)
    arguments = command_line(
        '--eval',
        initial_model=checkpoint,
        device='cpu',
        eval_list=tree['eval_list'],
        eval_path=tree['eval_path'],
    )
    message = refusal(arguments, capsys)
    assert all(word in message for word in ['a.model', *words]), message
    assert not os.path.exists('executed')


def test_an_encoder_of_another_size_is_refused(checkpoint):
    system = make_system(C=16)
    before = {name: tensor.clone() for name, tensor in system.state_dict().items()}
    with pytest.raises(Exception, match='encoder does not fit.*8.*16'):
        system.load_parameters(checkpoint)
    for name, tensor in system.state_dict().items():
        assert torch.equal(tensor, before[name])


def test_a_newcomer_without_data(tmp_path):
    command = [sys.executable, ROOT / 'trainECAPAModel.py']
    process = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert process.returncode == 2
    assert 'Traceback' not in process.stderr
    assert 'README' in process.stderr
    assert 'exps/demo/run.sh' in process.stderr
    assert list(tmp_path.iterdir()) == []


def cut_flac(path):
    """Replaces a file by a FLAC whose header is right and whose samples are not there."""
    flac = Path(path).with_suffix('.flac')
    write_wav(flac, SOUND, subtype='PCM_16')
    Path(path).write_bytes(flac.read_bytes()[:300])
    flac.unlink()


def test_every_file_that_cannot_be_evaluated_is_named(tree, capsys):
    """Whether it can be decoded shows only when a worker reads it."""
    names = [UTTERANCE, 'id2/session/00000.wav', 'id3/session/00002.wav']
    cut_flac(Path(tree['eval_path'], names[0]))
    write_wav(Path(tree['eval_path'], names[1]), 0 * SOUND)
    write_wav(Path(tree['eval_path'], names[2]), np.full(20000, np.nan))

    options = dict(SMALL, n_cpu=1)
    message = refusal(command_line(**options, **tree), capsys)
    assert '3 of 12 files cannot be embedded' in message
    assert 'Traceback' not in message
    assert all(name in message for name in names)
    assert len(message.splitlines()) == 4
