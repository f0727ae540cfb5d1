"""What happens to processes that are started wrongly, are not alike, or stop answering?"""

import datetime
import os
import re
import time
from argparse import Namespace
from pathlib import Path

import pytest
import torch
from cli import SMALL, command_line, refusal, run_two, train

import tools
import trainECAPAModel
from dataLoader import make_batches, train_loader
from ECAPAModel import ECAPAModel
from tools import BadInput, process_count
from trainECAPAModel import join_processes

pytestmark = pytest.mark.usefixtures('quick')


@pytest.mark.parametrize(
    'option, value, words',
    [
        ('eval_list', 'none.txt', '--eval_list'),
        ('lr', 0.5, '--lr 0.5 (was'),
    ],
)
def test_what_is_wrong_is_said_once(tree, tmp_path, option, value, words):
    options = {**SMALL, **tree}
    if option == 'lr':
        train(tree)
    options[option] = value
    status, _, errors = run_two(trainECAPAModel.main, command_line(**options), folder=tmp_path)
    assert status == 2
    assert errors.count(words) == 1
    assert 'trainECAPAModel.py", line' not in errors


@pytest.mark.parametrize('fault', ['--initial_model', 'results.json'])
def test_an_evaluation_that_cannot_begin_is_refused_once(tree, tmp_path, fault):
    options = {**SMALL, **tree, 'initial_model': str(tmp_path / 'absent.model')}
    if fault == 'results.json':
        Path(tree['save_path']).mkdir()
        Path(tree['save_path'], 'results.json').write_text('{}')
    arguments = command_line('--eval', **options)
    status, _, errors = run_two(trainECAPAModel.main, arguments, folder=tmp_path)
    assert status == 2
    assert errors.count(f'error: {fault}') + errors.count(f'/{fault}: ') == 1
    assert 'trainECAPAModel.py", line' not in errors


def test_a_batch_that_cannot_be_divided_is_refused(tree, monkeypatch):
    monkeypatch.setattr('dataLoader.process_count', lambda: 2)
    with pytest.raises(BadInput, match='--batch_size 5 .* 2 processes'):
        make_batches(train_loader(**tree, num_frames=20), batch_size=5, n_cpu=0)


def test_machines_that_do_not_share_the_folder_are_told(tree, monkeypatch, capsys):
    def two_machines(items):
        (facts,) = items
        return [facts, {**facts, '--save_path': 'epoch 7, 7 scores'}]

    monkeypatch.setattr('tools.gather', two_machines)
    message = refusal(capsys, train, tree)
    assert re.search('--save_path: .*epoch 7', message)
    assert not os.listdir(Path(tree['save_path'], 'model'))


@pytest.fixture
def launched(monkeypatch):
    """What processes are joined with, in the second of two processes of torchrun with two GPUs.

    The environment is made such, and the dict is filled when the processes are joined.
    """
    monkeypatch.setenv('TORCHELASTIC_RUN_ID', 'job')
    monkeypatch.setenv('TORCHELASTIC_RESTART_COUNT', '3')
    monkeypatch.setenv('TORCHELASTIC_USE_AGENT_STORE', 'True')
    monkeypatch.setenv('LOCAL_RANK', '1')
    monkeypatch.setenv('LOCAL_WORLD_SIZE', '2')
    monkeypatch.setattr('torch.cuda.is_available', lambda: True)
    monkeypatch.setattr('torch.cuda.device_count', lambda: 2)
    monkeypatch.setattr('torch.cuda.set_device', lambda gpu: None)
    store = torch.distributed.HashStore()
    monkeypatch.setattr('torch.distributed.rendezvous', lambda url, timeout: iter([(store, 1, 2)]))
    monkeypatch.setattr('tools.common_store', None)
    joined = {}

    def init_process_group(backend, **options):
        joined.update(options, backend=backend)

    monkeypatch.setattr('torch.distributed.init_process_group', init_process_group)
    return joined


def test_each_process_takes_its_gpu_and_each_restart_its_own_keys(launched, monkeypatch):
    join_processes(Namespace(device='auto'))
    assert launched['backend'] == 'nccl'
    assert launched['device_id'] == torch.device('cuda', 1)
    assert datetime.timedelta(minutes=2) < launched['timeout'] < datetime.timedelta(minutes=20)

    launched['store'].set('address', 'of a process that is killed')
    monkeypatch.setenv('TORCHELASTIC_RESTART_COUNT', '4')
    join_processes(Namespace(device='auto'))
    assert not launched['store'].check(['address'])


@pytest.mark.parametrize(
    'device, gpus, words', [('cuda:0', 2, '--device cuda:0'), ('auto', 1, '--nproc_per_node')]
)
def test_a_gpu_is_not_shared(launched, monkeypatch, device, gpus, words):
    monkeypatch.setattr('torch.cuda.device_count', lambda: gpus)
    with pytest.raises(BadInput, match=words):
        join_processes(Namespace(device=device))
    assert not launched


@pytest.mark.parametrize(
    'name, value', [('RANK', '1'), ('WORLD_SIZE', '2'), ('SLURM_NTASKS', '8'), ('PMI_SIZE', '4')]
)
def test_processes_that_torchrun_did_not_start_are_refused(tree, monkeypatch, capsys, name, value):
    monkeypatch.setenv(name, value)
    message = refusal(capsys, train, tree)
    assert f'{name}={value}' in message and 'torchrun' in message
    assert not Path(tree['save_path']).exists()


def test_a_process_alone_may_have_the_variables_of_a_launcher(monkeypatch):
    for name, value in {'RANK': '0', 'WORLD_SIZE': '1', 'SLURM_NTASKS': '1'}.items():
        monkeypatch.setenv(name, value)
    join_processes(Namespace(device='cpu'))
    assert process_count() == 1


def is_second():
    return os.environ['RANK'] == '1'


def train_unlike(arguments):
    """Trains; the second process has other options, another list and another commit."""
    if is_second():
        facts = tools.provenance('command')
        tools.provenance = lambda command: {**facts, 'commit': 'old'}
        arguments = [*arguments, '--seed', '77', '--train_list', 'other.txt']
    trainECAPAModel.main(arguments)


def test_processes_that_were_not_started_alike_are_refused_once(tree, tmp_path):
    lines = Path(tree['train_list']).read_text().splitlines(keepends=True)
    (tmp_path / 'other.txt').write_text(''.join(lines[:-2]))
    status, _, errors = run_two(train_unlike, command_line(**SMALL, **tree), folder=tmp_path)
    assert status == 2
    for words in ('--seed: 10 and 77|--seed: 77 and 10', '--train_list: SHA-256', 'commit: '):
        assert len(re.findall(words, errors)) == 1, errors
    assert 'trainECAPAModel.py", line' not in errors
    assert not Path(tree['save_path']).exists()


def train_and_hang(arguments):
    """Trains; the second process sleeps in its first step, and the first waits for up to 6 s."""
    tools.TIMEOUT = 6
    if is_second():
        ECAPAModel.train_step = lambda system, audio, labels: time.sleep(1000)
    trainECAPAModel.main(arguments)


@pytest.mark.slow
def test_a_process_that_hangs_is_noticed(tree, tmp_path):
    status, _, errors = run_two(train_and_hang, command_line(**SMALL, **tree), folder=tmp_path)
    assert status == 2
    assert errors.count('error: another') == 1, errors
    assert 'trainECAPAModel.py", line' not in errors
