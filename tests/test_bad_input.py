"""Bad input gets a sentence that names it, exit status 2, no traceback, and leaves no folder behind."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import command_line, write_wav

import trainECAPAModel
from ECAPAModel import ECAPAModel

ROOT = Path(__file__).parents[1]
SMALL = {'C': 8, 'num_frames': 20, 'batch_size': 4, 'n_cpu': 0, 'max_epoch': 1, 'device': 'cpu'}


def remove(name):
    return lambda tree: shutil.rmtree(tree[name]) if os.path.isdir(tree[name]) else os.remove(tree[name])


def replace_line(name, number, text):
    def change(tree):
        lines = Path(tree[name]).read_text().splitlines()
        lines[number - 1] = text
        Path(tree[name]).write_text('\n'.join(lines) + '\n')

    return change


def replace_audio(folder, file, **how):
    return lambda tree: write_wav(Path(tree[folder], file), **how)


SOUND = 0.1 * np.random.default_rng(0).standard_normal(20000)
UTTERANCE = 'id1/session/00001.wav'
CASES = {
    'training list missing': (remove('train_list'), ['--train_list', 'no such file']),
    'training folder missing': (remove('train_path'), ['--train_path', 'no such folder']),
    'trial list missing': (remove('eval_list'), ['--eval_list', 'no such file']),
    'evaluation folder missing': (remove('eval_path'), ['--eval_path', 'no such folder']),
    'noise missing': (remove('musan_path'), ['--musan_path', 'no such folder']),
    'RIRs missing': (remove('rir_path'), ['--rir_path', 'no such folder']),
    'music empty': (
        lambda tree: [path.unlink() for path in Path(tree['musan_path'], 'music').rglob('*.wav')],
        ['--musan_path', 'music', 'no .wav'],
    ),
    'RIRs empty': (
        lambda tree: [path.unlink() for path in Path(tree['rir_path']).rglob('*.wav')],
        ['--rir_path', 'no .wav'],
    ),
    'training list empty': (lambda tree: Path(tree['train_list']).write_text(''), ['--train_list', 'empty']),
    'trial list empty': (lambda tree: Path(tree['eval_list']).write_text(''), ['--eval_list', 'empty']),
    'training line': (replace_line('train_list', 5, 'id1'), ['train.txt, line 5', 'id1']),
    'trial line': (replace_line('eval_list', 7, '1 one.wav'), ['trials.txt, line 7', 'one.wav']),
    'trial label': (replace_line('eval_list', 3, 'yes a.wav b.wav'), ['trials.txt, line 3', 'yes']),
    'trial file missing': (
        lambda tree: Path(tree['eval_path'], UTTERANCE).unlink(),
        ['--eval_list', UTTERANCE, 'no such file'],
    ),
    'training list with a byte order mark': (
        lambda tree: Path(tree['train_list']).write_bytes(b'\xef\xbb\xbf' + Path(tree['train_list']).read_bytes()),
        ['--train_list', 'byte order mark'],
    ),
    'trials of one kind': (
        lambda tree: Path(tree['eval_list']).write_text(f'1 {UTTERANCE} {UTTERANCE}\n'),
        ['trials.txt', 'both kinds'],
    ),
    'training file missing': (lambda tree: Path(tree['train_path'], UTTERANCE).unlink(), [UTTERANCE, 'no such file']),
    'training file at 8 kHz': (
        replace_audio('train_path', UTTERANCE, audio=SOUND, rate=8000),
        ['--train_list', UTTERANCE, '8000 Hz'],
    ),
    'evaluation file in stereo': (
        replace_audio('eval_path', UTTERANCE, audio=np.stack([SOUND, SOUND], axis=1)),
        ['--eval_list', UTTERANCE, '2 channels'],
    ),
    'noise at 44.1 kHz': (
        replace_audio('musan_path', 'noise/source/recording/00001.wav', audio=SOUND, rate=44100),
        ['--musan_path', '00001.wav', '44100 Hz'],
    ),
    'RIR of eight channels': (
        replace_audio('rir_path', 'smallroom/Room001/Room001-00001.wav', audio=np.tile(SOUND[:, None], 8)),
        ['--rir_path', 'Room001-00001.wav', '8 channels'],
    ),
    'no samples': (replace_audio('eval_path', UTTERANCE, audio=SOUND[:0]), [UTTERANCE, 'no samples']),
    'no audio': (
        lambda tree: Path(tree['eval_path'], UTTERANCE).write_text('not audio'),
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
    message = refusal(command_line(**{**SMALL, **tree}), capsys)
    assert all(word in message for word in words), message
    assert not os.path.exists(tree['save_path'])


@pytest.mark.parametrize(
    'options, words',
    [
        ({'batch_size': 13}, ['--batch_size 13', '12 utterances']),
        ({'n_class': 3}, ['--n_class 3', '4 speakers']),
        ({'C': 12}, ['--C 12', 'multiple of 8']),
        ({'warmup': 1}, ['--warmup']),
        ({'min_lr': 1}, ['--min_lr']),
        ({'lr': 'fast'}, ['--lr', 'fast']),
        ({'lr': 'nan'}, ['--lr', 'nan']),
        ({'max_epoch': 0}, ['--max_epoch', '0']),
        ({'device': 'toaster'}, ['--device', 'toaster']),
        ({'device': 'cuda:99'}, ['--device', 'cuda:99']),
        ({'initial_model': 'nowhere.model'}, ['--initial_model', 'nowhere.model']),
        ({'save_path': __file__}, ['--save_path', os.path.basename(__file__)]),
    ],
)
def test_an_option_is_refused(tree, capsys, options, words):
    message = refusal(command_line(**{**SMALL, **tree, **options}), capsys)
    assert all(word in message for word in words), message
    assert not os.path.exists(tree['save_path'])


def test_a_full_option_list_trains(tree):
    """Without a fault the same options work: what the other tests see is the fault they made."""
    trainECAPAModel.main(command_line(**{**SMALL, **tree}))
    assert os.path.exists(tree['save_path'] + '/score.txt')


@pytest.fixture
def checkpoint(tmp_path):
    system = ECAPAModel(lr=0.001, lr_decay=0.97, C=8, n_class=4, m=0.2, s=30, test_step=1, device='cpu')
    system.save_parameters(tmp_path / 'a.model')
    return tmp_path / 'a.model'


class Payload:
    """A pickle that runs code when it is loaded."""

    def __reduce__(self):
        return os.mkdir, ('executed',)


def drop_a_tensor(path):
    state = torch.load(path)
    del state['speaker_encoder.layer2.bn3.weight']
    torch.save(state, path)


@pytest.mark.parametrize(
    'spoil, words',
    [
        (lambda path: path.unlink(), ['no such checkpoint']),
        (lambda path: path.write_bytes(b''), ['cannot be read as a checkpoint']),
        (lambda path: path.write_bytes(path.read_bytes()[:9999]), ['cannot be read as a checkpoint']),
        (lambda path: torch.save(Payload(), path), ['cannot be read as a checkpoint']),
        (lambda path: torch.save([1, 2], path), ['not a checkpoint of this model']),
        (lambda path: torch.save({'a': torch.zeros(1)}, path), ['not a checkpoint of this model']),
        (drop_a_tensor, ['does not fit', 'layer2.bn3.weight']),
    ],
)
def test_a_checkpoint_is_refused(tree, checkpoint, capsys, monkeypatch, tmp_path, spoil, words):
    monkeypatch.chdir(tmp_path)
    spoil(checkpoint)
    options = {name: tree[name] for name in ('eval_list', 'eval_path')}
    message = refusal(command_line('--eval', initial_model=checkpoint, device='cpu', **options), capsys)
    assert all(word in message for word in ['a.model', *words]), message
    assert not os.path.exists('executed')


def test_an_encoder_of_another_size_is_refused(checkpoint):
    system = ECAPAModel(lr=0.001, lr_decay=0.97, C=16, n_class=4, m=0.2, s=30, test_step=1, device='cpu')
    before = {name: tensor.clone() for name, tensor in system.state_dict().items()}
    with pytest.raises(Exception, match='encoder does not fit.*8 channels.*16'):
        system.load_parameters(checkpoint)
    assert all(torch.equal(tensor, before[name]) for name, tensor in system.state_dict().items())


def test_eval_without_a_checkpoint_is_refused(tree, capsys):
    assert '--initial_model' in refusal(command_line('--eval', **tree), capsys)


def test_a_newcomer_without_data(tmp_path):
    done = subprocess.run([sys.executable, ROOT / 'trainECAPAModel.py'], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2
    assert 'Traceback' not in done.stderr
    assert 'README' in done.stderr and 'exps/demo/run.sh' in done.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize('flags', [['--eval', '--initial_model', 'exps/pretrain.model'], ['--no_such_option']])
def test_nothing_is_made_where_the_command_is_refused(tmp_path, monkeypatch, capsys, flags):
    monkeypatch.chdir(tmp_path)
    assert refusal(flags, capsys)
    assert list(tmp_path.iterdir()) == []


def cut_flac(path):
    """Replaces a file by a FLAC whose header is right and whose samples are not there."""
    flac = Path(path).with_suffix('.flac')
    write_wav(flac, SOUND, subtype='PCM_16')
    Path(path).write_bytes(flac.read_bytes()[:300])
    flac.unlink()


def test_every_file_that_cannot_be_evaluated_is_named(tree, capsys):
    """Whether it can be decoded shows only when a worker reads it."""
    names = UTTERANCE, 'id2/session/00000.wav', 'id3/session/00002.wav'
    cut_flac(Path(tree['eval_path'], names[0]))
    write_wav(Path(tree['eval_path'], names[1]), 0 * SOUND)
    write_wav(Path(tree['eval_path'], names[2]), np.full(20000, np.nan))
    message = refusal(command_line(**{**SMALL, **tree, 'n_cpu': 1}), capsys)
    assert '3 of 12 files cannot be embedded' in message and 'Traceback' not in message
    assert all(name in message for name in names)
    assert len(message.splitlines()) == 4


def test_bad_noise_met_in_a_worker_is_named(tree, capsys):
    """Of many files only a sample is read beforehand, here every second one."""
    folder = Path(tree['musan_path'], 'speech/source/recording')
    for number in range(150):
        write_wav(folder / f'{number:05d}.wav', SOUND, subtype='PCM_16')
        if number % 2:
            cut_flac(folder / f'{number:05d}.wav')
    message = refusal(command_line(**{**SMALL, **tree, 'n_cpu': 1, 'batch_size': 12, 'max_epoch': 9}), capsys)
    assert 'speech/source/recording' in message and 'cannot be decoded' in message
    assert len(message.splitlines()) == 1
