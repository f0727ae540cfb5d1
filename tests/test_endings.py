"""How does a command end: signals in odd places, helpers that die, streams that go away?"""

import errno
import faulthandler
import functools
import io
import multiprocessing
import os
import resource
import signal
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from cli import SMALL, command_line, finish, start
from conftest import make_system, wave, write_wav

import tools
import trainECAPAModel
from dataLoader import (
    can_start_processes,
    make_batches,
    parallel_map,
    train_loader,
    usable_processes,
)
from exps import compare
from tools import BadInput

pytestmark = pytest.mark.usefixtures('quick')
ROOT = Path(__file__).parents[1]


# Signals.


class Interrupted:
    """Sends a signal to this process when it is destroyed."""

    def __init__(self, number):
        self.number = number

    def __del__(self):
        os.kill(os.getpid(), self.number)
        for _ in range(1000):
            pass


def write_with_a_signal(number):
    """Writes a file; the signal arrives in a destructor."""
    tools.os.fsync = lambda descriptor: Interrupted(number)
    with tools.exit_on_bad_input(lambda: ': go on like this'):
        tools.write_whole('a.txt', lambda file: file.write(b'half'))
        print('went on')


@pytest.mark.parametrize('number', [signal.SIGTERM, signal.SIGINT])
def test_a_signal_in_a_destructor_ends_the_command(tmp_path, number):
    """Python drops an exception there. A file that is being written is removed."""
    process = start(write_with_a_signal, number, folder=tmp_path)
    status, output, errors = finish([process], tmp_path)
    assert status == 128 + number
    assert output == ''
    assert errors.endswith(': go on like this\n') and errors.count('\n') == 2
    assert sorted(os.listdir(tmp_path)) == ['stderr', 'stdout']


def test_a_notebook_and_a_thread_keep_their_handlers(monkeypatch):
    """A notebook's streams cannot be reconfigured, and a thread must not set handlers."""
    before = signal.getsignal(signal.SIGINT)
    statuses = []

    def refuse():
        with pytest.raises(SystemExit) as stop, tools.exit_on_bad_input():
            assert signal.getsignal(signal.SIGINT) is before
            raise BadInput('nothing to read')
        statuses.append(stop.value.code)

    monkeypatch.setattr('sys.stdout', io.StringIO())
    monkeypatch.setattr('sys.stderr', io.StringIO())
    thread = threading.Thread(target=refuse)
    thread.start()
    thread.join()
    monkeypatch.setattr('sys.ps1', 'In : ', raising=False)
    refuse()
    assert statuses == [2, 2]


# Helpers.


def end_as(how, item):
    """Ends a loading process at its fifth item: by a signal, or by what cannot be sent."""
    if item < 5:
        return item
    if how == 'exit':
        os._exit(7)
    if how == 'unsendable':
        return lambda: item
    faulthandler.disable()  # pytest's would print a traceback of this process
    os.kill(os.getpid(), how)
    time.sleep(10)
    return item


@pytest.mark.parametrize(
    'how, words',
    [
        (signal.SIGKILL, 'SIGKILL: memory'),
        (signal.SIGSEGV, 'SIGSEGV: a library'),
        (signal.SIGABRT, 'SIGABRT: a library'),
        (signal.SIGBUS, '--shm-size'),
        ('exit', 'status 7'),
        ('unsendable', 'status 1'),
    ],
)
def test_a_helper_that_dies_ends_the_command(capfd, how, words):
    with pytest.raises(SystemExit) as stop, tools.exit_on_bad_input():
        list(parallel_map(functools.partial(end_as, how), range(8), 2))
    assert stop.value.code == 2
    message = capfd.readouterr().err
    assert words in message and 'Traceback' not in message


def test_a_helper_that_is_stopped_stops_the_command(monkeypatch):
    """A queue may send SIGTERM to helpers first."""
    ended = []
    monkeypatch.setattr('tools.end_by_signal', lambda number, hint: ended.append(number))
    with pytest.raises(SystemExit), tools.exit_on_bad_input():
        list(parallel_map(functools.partial(end_as, signal.SIGTERM), range(8), 2))
    assert ended == [signal.SIGTERM]


def test_too_little_shared_memory_is_said(tree, monkeypatch, capfd):
    """PyTorch words this error differently from one release to the next."""

    def fail(*args, **kwargs):
        raise RuntimeError('words of another release')

    monkeypatch.setattr('dataLoader.default_collate', fail)
    monkeypatch.setattr('torch.Tensor.share_memory_', fail)
    dataset = train_loader(**tree, num_frames=20)
    files = [str(path) for path in Path(tree['eval_path']).rglob('*.wav')]
    for use in (
        lambda: list(make_batches(dataset, 4, n_cpu=1)),
        lambda: make_system(n_cpu=1).embed_files(files),
    ):
        with pytest.raises(SystemExit) as stop, tools.exit_on_bad_input():
            use()
        assert stop.value.code == 2
        message = capfd.readouterr().err
        assert '--shm-size' in message and '--n_cpu' in message and 'Traceback' not in message


def test_more_files_than_a_process_may_open_are_embedded(tmp_path):
    files = [write_wav(tmp_path / f'{n}.wav', wave(n % 3, 400)) for n in range(120)]
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    system = make_system(n_cpu=1)
    system.embed_files(files[:3])
    try:
        limit = len(os.listdir('/proc/self/fd')) + 60
        resource.setrlimit(resource.RLIMIT_NOFILE, (limit, before[1]))
        embeddings = system.embed_files(files)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
    system.n_cpu = 0
    np.testing.assert_allclose(embeddings[3:4], system.embed_files(files[3:4]), atol=1e-6)


def print_sum():
    # The folder in the environment is that of this process only if nothing was kept.
    tempfile.tempdir = None
    multiprocessing.current_process()._config.pop('tempdir', None)
    print(sum(parallel_map(torch.tensor, range(8), 2)))


def test_a_long_path_of_temporary_files_works(tmp_path):
    """Sockets have short names only."""
    folder = tmp_path / ('x' * 100)
    folder.mkdir()
    process = start(print_sum, folder=tmp_path, environment={'TMPDIR': str(folder)})
    assert finish([process], tmp_path) == (0, 'tensor(28)\n', '')


def test_without_semaphores_the_command_reads_by_itself(monkeypatch, capsys):
    def fail():
        raise OSError(errno.EROFS, 'Read-only file system')

    monkeypatch.setattr('multiprocessing.Lock', fail)
    can_start_processes.cache_clear()
    try:
        assert list(parallel_map(str, range(3), 2)) == ['0', '1', '2']
        assert list(parallel_map(str, range(3), 2)) == ['0', '1', '2']
    finally:
        can_start_processes.cache_clear()
    assert capsys.readouterr().err.count('no loading processes') == 1


def test_the_number_of_helpers_is_bounded(tree):
    dataset = train_loader(**tree, num_frames=20)
    assert make_batches(dataset, 4, n_cpu=5000).num_workers == 3, 'the batches of an epoch'
    assert usable_processes(5000, 10**6) <= max(64, tools.available_cpus())
    assert usable_processes(3, 10**6) == 3


# Streams.


def compare_into(stream):
    """Runs a script with a standard output that cannot be written."""
    if stream == 'closed':
        os.close(1)
        sys.stdout = None  # as Python does if it starts without one
    else:
        if stream == 'closed pipe':
            reading, target = os.pipe()
            os.close(reading)
        else:
            target = os.open(stream, os.O_WRONLY)
        os.dup2(target, 1)
        sys.stdout = open(1, 'w', closefd=False)
    compare.main([str(ROOT / 'exps/pretrain_score.txt')])


@pytest.mark.parametrize('stream, status', [('closed pipe', 141), ('/dev/full', 2), ('closed', 0)])
def test_a_script_whose_output_goes_away_is_quiet(tmp_path, stream, status):
    process = start(compare_into, stream, folder=tmp_path)
    ended, _, errors = finish([process], tmp_path)
    assert ended == status
    if status == 2:
        assert errors.startswith('error: ') and errors.count('\n') == 1
    else:
        assert errors == ''


def train_without(streams, arguments):
    """Trains with a standard output and error that cannot be written."""
    reading, writing = os.pipe()
    os.close(reading)
    target = writing
    if streams == 'full':
        target = os.open('/dev/full', os.O_WRONLY)
    for number, name in ((1, 'stdout'), (2, 'stderr')):
        os.dup2(target, number)
        setattr(sys, name, open(number, 'w', closefd=False))
        if streams == 'closed':
            os.close(number)
            setattr(sys, name, None)  # as Python does if it starts without one
    trainECAPAModel.main(arguments)


@pytest.mark.parametrize('streams', ['full', 'closed', 'a pipe that nobody reads'])
def test_a_log_that_cannot_be_written_does_not_end_a_training(tree, tmp_path, streams):
    arguments = command_line(**{**SMALL, **tree})
    process = start(train_without, streams, arguments, folder=tmp_path)
    assert finish([process], tmp_path)[0] == 0
    assert Path(tree['save_path'], 'model/model_0001.model').exists()


@pytest.mark.parametrize(
    'sign, remedy',
    [
        ('CUDA out of memory', '--accumulate'),
        ('CUBLAS_STATUS_ALLOC_FAILED', '--batch_size'),
        ("can't allocate memory", '--accumulate'),
    ],
)
def test_too_little_memory_is_no_traceback(capsys, sign, remedy):
    with pytest.raises(SystemExit) as stop, tools.exit_on_bad_input():
        raise RuntimeError(f'Something about {sign}, at length')
    with pytest.raises(RuntimeError), tools.exit_on_bad_input():
        raise RuntimeError('Caught RuntimeError in DataLoader worker process 0: a mistake')
    assert stop.value.code == 2
    message = capsys.readouterr().err
    assert sign in message and remedy in message
