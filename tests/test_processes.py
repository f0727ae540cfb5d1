"""Two processes train as one does: same epoch, gradients and evaluation, files written once."""

import datetime
import os
import re
import subprocess
import sys
import time
from argparse import Namespace
from pathlib import Path

import cli
import numpy as np
import pytest
import torch
from cli import command_line
from conftest import make_system, weights

import trainECAPAModel
from dataLoader import make_batches, train_loader
from tools import BadInput, process_count, process_rank, read_scores, sum_over_processes
from trainECAPAModel import join_processes

ROOT = Path(__file__).parents[1]
COMMAND = ROOT / 'trainECAPAModel.py'
SMALL = {**cli.SMALL, 'n_cpu': 1, 'max_epoch': 2}


def torchrun(script, *arguments, restarts=0, cwd):
    """Runs a script in two processes of this machine; returns the finished launcher."""
    command = [
        sys.executable,
        '-m',
        'torch.distributed.run',
        '--nproc_per_node=2',
        f'--max-restarts={restarts}',
        '--rdzv-backend=c10d',
        '--rdzv-endpoint=localhost:0',
        str(script),
        *arguments,
    ]
    environment = dict(os.environ)
    environment['OMP_NUM_THREADS'] = '1'
    environment['GLOO_SOCKET_IFNAME'] = 'lo'
    environment['PYTHONPATH'] = str(ROOT)
    return subprocess.run(
        command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=300
    )


def in_two_processes(options, folder):
    """What each process saves in `folder`; runs under torchrun, at the end of this file."""
    torch.distributed.init_process_group('gloo')
    torch.save(part_of_training(options), f'{folder}/{process_rank()}.pt')
    torch.distributed.destroy_process_group()


def mean_over_processes(tensor):
    """A copy of the tensor, averaged over the processes."""
    return sum_over_processes(tensor.clone()) / process_count()


def part_of_training(options):
    """What a process computes in training.

    indices: of an epoch; gradients: of its first batch, with stored batch norm statistics and with
    its own; statistics: these; weights: after two steps; embeddings: of five files.
    """
    dataset = train_loader(**options, num_frames=20, seed=1)
    loader = make_batches(dataset, batch_size=6, n_cpu=0)
    indices = [[index for _, index in batch] for batch in loader.batch_sampler]

    torch.manual_seed(1)
    system = make_system()
    system.speaker_encoder.specaug = torch.nn.Identity()
    audio, labels = next(iter(loader))
    gradients = {}
    for mode in ('stored', 'own'):
        system.train(mode == 'own').zero_grad()
        system(audio, labels)[0].backward()
        gradients[mode] = {
            name: mean_over_processes(p.grad) for name, p in system.named_parameters()
        }
    statistics = {name: buffer.clone() for name, buffer in system.named_buffers()}

    for audio, labels in loader:
        system.train_step(audio, labels)
    embeddings = system.embed_files([dataset.path(i) for i in range(5)])

    return {
        'indices': indices,
        'gradients': gradients,
        'statistics': statistics,
        'weights': system.state_dict(),
        'embeddings': torch.from_numpy(embeddings),
    }


@pytest.mark.slow
def test_two_processes_share_an_epoch_and_agree(tree, tmp_path):
    launcher = torchrun(__file__, str(tmp_path), *command_line(**tree), cwd=tmp_path)
    assert launcher.returncode == 0, launcher.stderr
    first = torch.load(tmp_path / '0.pt')
    second = torch.load(tmp_path / '1.pt')
    alone = part_of_training(tree)

    assert len(alone['indices']) == 2
    joined = [a + b for a, b in zip(first['indices'], second['indices'])]
    assert joined == alone['indices']

    gradients = first['gradients']['stored']
    for name, expected in alone['gradients']['stored'].items():
        assert torch.equal(gradients[name], second['gradients']['stored'][name])
        bound = 1e-4 * expected.abs().max().item() + 1e-7
        np.testing.assert_allclose(gradients[name], expected, atol=bound, err_msg=name)

    together = torch.cat([p.flatten() for p in first['gradients']['own'].values()])
    expected = torch.cat([p.flatten() for p in alone['gradients']['own'].values()])
    assert (together - expected).norm() < 1e-4 * expected.norm()

    for name, expected in alone['statistics'].items():
        statistic = first['statistics'][name]
        assert torch.equal(statistic, second['statistics'][name]), name
        np.testing.assert_allclose(statistic, expected, rtol=1e-4, atol=1e-6, err_msg=name)
    for name, tensor in first['weights'].items():
        assert torch.equal(tensor, second['weights'][name])

    assert torch.equal(first['embeddings'], second['embeddings'])
    fresh = make_system()
    fresh.load_state_dict(first['weights'])
    names = [f'{tree["train_path"]}/id{n // 3}/session/{n % 3:05d}.wav' for n in range(5)]
    np.testing.assert_allclose(fresh.embed_files(names), first['embeddings'], atol=1e-5)


def table_of_figures(output):
    """What a command printed, from the heading EER on."""
    return output[output.index('EER') :]


@pytest.mark.slow
def test_the_command_under_torchrun(tree, tmp_path, monkeypatch, capsys):
    launcher = torchrun(COMMAND, *command_line(**SMALL, **tree), cwd=tmp_path)
    assert launcher.returncode == 0, launcher.stderr
    assert '2 processes on cpu' in launcher.stdout
    for line in ('start         from random weights', 'epoch 2, LR', 'epochs are done'):
        assert launcher.stdout.count(line) == 1

    folder = Path(tree['save_path'])
    assert [score[0] for score in read_scores(folder / 'score.txt')] == [1, 2]
    assert sorted(os.listdir(folder / 'model')) == [
        'model_0001.model',
        'model_0001.state',
        'model_0002.model',
        'model_0002.state',
    ]

    arguments = command_line(
        '--eval',
        initial_model=folder / 'model/model_0002.model',
        device='cpu',
        eval_list=tree['eval_list'],
        eval_path=tree['eval_path'],
    )
    launcher = torchrun(COMMAND, *arguments, cwd=tmp_path)
    monkeypatch.chdir(tmp_path)
    trainECAPAModel.main(arguments)
    alone = capsys.readouterr().out
    assert table_of_figures(launcher.stdout) == table_of_figures(alone)


@pytest.mark.slow
def test_a_restarted_job_goes_on_after_the_last_checkpoint(tree, tmp_path):
    """One of the two processes is killed after the first epoch; torchrun starts both again."""
    script = tmp_path / 'killed.py'
    script.write_text(
        'import os, signal, trainECAPAModel\n'
        'from pathlib import Path\n'
        'score_epoch = trainECAPAModel.score_epoch\n'
        'def killed_once(*args):\n'
        '    score_epoch(*args)\n'
        '    if os.environ["RANK"] == "1" and not Path("killed").exists():\n'
        '        Path("killed").touch()\n'
        '        os.kill(os.getpid(), signal.SIGKILL)\n'
        'trainECAPAModel.score_epoch = killed_once\n'
        'trainECAPAModel.main()\n'
    )
    launcher = torchrun(script, *command_line(**SMALL, **tree), restarts=1, cwd=tmp_path)
    assert launcher.returncode == 0, launcher.stderr
    assert 'after epoch 1' in launcher.stdout
    assert [score[0] for score in read_scores(tree['save_path'] + '/score.txt')] == [1, 2]
    weights(tree['save_path'] + '/model/model_0002.model')


@pytest.mark.slow
def test_a_check_goes_through_the_files_once(tree, tmp_path):
    """In the first of two processes: every file is opened one time."""
    script = tmp_path / 'watched.py'
    script.write_text(
        'import dataLoader, trainECAPAModel\n'
        'open_audio = dataLoader.open_audio\n'
        'def watched(path):\n'
        '    with open("read.txt", "a") as file:\n'
        '        file.write(f"{path}\\n")\n'
        '    return open_audio(path)\n'
        'dataLoader.open_audio = watched\n'
        'trainECAPAModel.main()\n'
    )
    options = dict(SMALL, n_cpu=0)
    launcher = torchrun(script, '--check', *command_line(**options, **tree), cwd=tmp_path)
    assert launcher.returncode == 0, launcher.stderr
    assert launcher.stdout.count('check passed') == 1

    paths = (tmp_path / 'read.txt').read_text().splitlines()
    for folder in ('train_path', 'eval_path', 'musan_path', 'rir_path'):
        files = sorted(str(path) for path in Path(tree[folder]).rglob('*.wav'))
        assert sorted(path for path in paths if path.startswith(tree[folder])) == files


@pytest.mark.slow
@pytest.mark.parametrize(
    'option, value, words',
    [
        ('eval_list', 'none.txt', '--eval_list'),
        ('n_class', 2, '--n_class 2'),
        ('lr', 0.5, '--lr 0.5 (was'),
    ],
)
def test_what_is_wrong_is_said_once(tree, tmp_path, option, value, words):
    options = {**SMALL, **tree, 'max_epoch': 1}
    if option == 'lr':
        trainECAPAModel.main(command_line(**options))
    options[option] = value
    launcher = torchrun(COMMAND, *command_line(**options), cwd=tmp_path)
    assert launcher.returncode != 0
    assert launcher.stderr.count(words) == 1
    assert 'trainECAPAModel.py", line' not in launcher.stderr


@pytest.mark.slow
@pytest.mark.parametrize('fault', ['--initial_model', 'results.json'])
def test_an_evaluation_that_cannot_begin_is_refused_once(tree, tmp_path, fault):
    options = {**cli.SMALL, **tree, 'initial_model': str(tmp_path / 'absent.model')}
    if fault == 'results.json':
        Path(tree['save_path']).mkdir()
        Path(tree['save_path'], 'results.json').write_text('{}')
    launcher = torchrun(COMMAND, '--eval', *command_line(**options), cwd=tmp_path)
    assert launcher.returncode != 0
    assert launcher.stderr.count(f'error: {fault}') + launcher.stderr.count(f'/{fault}: ') == 1
    assert 'trainECAPAModel.py", line' not in launcher.stderr


def test_a_batch_that_cannot_be_divided_is_refused(tree, monkeypatch):
    monkeypatch.setattr('dataLoader.process_count', lambda: 2)
    with pytest.raises(BadInput, match='--batch_size 5 .* 2 processes'):
        make_batches(train_loader(**tree, num_frames=20), batch_size=5, n_cpu=0)


def test_machines_that_do_not_share_the_folder_are_told(tree, monkeypatch, capsys):
    def two_machines(items):
        (facts,) = items
        return [facts, {**facts, '--save_path': 'epoch 7, 7 scores'}]

    monkeypatch.setattr('tools.gather', two_machines)
    message = cli.refusal(capsys, cli.train, tree)
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
    message = cli.refusal(capsys, cli.train, tree)
    assert f'{name}={value}' in message and 'torchrun' in message
    assert not Path(tree['save_path']).exists()


def test_a_process_alone_may_have_the_variables_of_a_launcher(monkeypatch):
    for name, value in {'RANK': '0', 'WORLD_SIZE': '1', 'SLURM_NTASKS': '1'}.items():
        monkeypatch.setenv(name, value)
    join_processes(Namespace(device='cpu'))
    assert process_count() == 1


# Runs the command, after the options of one process were changed.
UNLIKE = """
import os, sys, time
from pathlib import Path
import tools, trainECAPAModel

FACTS = tools.provenance('command')
arguments = sys.argv[1:]
if os.environ['RANK'] == '1':
    exec(Path('unlike.py').read_text())
trainECAPAModel.main(arguments)
"""


def run_unlike(tree, folder, change, *flags, **options):
    """The command in two processes, of which the second one executes `change` first."""
    (folder / 'two.py').write_text(UNLIKE)
    (folder / 'unlike.py').write_text(change)
    return torchrun(
        folder / 'two.py', *flags, *command_line(**{**SMALL, **tree, **options}), cwd=folder
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    'change, words',
    [
        ('arguments += ["--seed", "77"]', '--seed: 10 and 77|--seed: 77 and 10'),
        ('arguments += ["--train_list", "other.txt"]', '--train_list: SHA-256'),
        ('tools.provenance = lambda command: {**FACTS, "commit": "old"}', 'commit: '),
    ],
)
def test_processes_that_were_not_started_alike_are_refused_once(tree, tmp_path, change, words):
    lines = Path(tree['train_list']).read_text().splitlines(keepends=True)
    (tmp_path / 'other.txt').write_text(''.join(lines[:-2]))
    launcher = run_unlike(tree, tmp_path, change)
    assert launcher.returncode != 0
    assert len(re.findall(words, launcher.stderr)) == 1, launcher.stderr
    assert 'trainECAPAModel.py", line' not in launcher.stderr
    assert not Path(tree['save_path']).exists()


@pytest.mark.slow
def test_a_process_that_hangs_is_noticed(tree, tmp_path):
    """It sleeps in its first step; the other one waits no longer than the limit, here 8 s."""
    change = (
        'import ECAPAModel\n'
        'ECAPAModel.ECAPAModel.train_step = lambda self, audio, labels: time.sleep(1000)\n'
    )
    script = UNLIKE.replace('arguments =', 'tools.TIMEOUT = 8\narguments =')
    (tmp_path / 'two.py').write_text(script)
    (tmp_path / 'unlike.py').write_text(change)
    begin = time.monotonic()
    launcher = torchrun(tmp_path / 'two.py', *command_line(**SMALL, **tree), cwd=tmp_path)
    assert time.monotonic() - begin < 100
    assert launcher.returncode != 0
    assert launcher.stderr.count('error: another process') == 1, launcher.stderr
    assert 'trainECAPAModel.py", line' not in launcher.stderr


if __name__ == '__main__':
    folder, *arguments = sys.argv[1:]
    names = [argument.removeprefix('--') for argument in arguments[::2]]
    in_two_processes(dict(zip(names, arguments[1::2])), folder)
