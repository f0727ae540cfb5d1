"""What do Ctrl-C and SIGTERM do, at any moment?"""

import contextlib
import os
import random
import re
import signal
import subprocess
import time

import pytest
from cli import SMALL, command_line, finish, start
from conftest import make_system

import tools
import trainECAPAModel
from dataLoader import make_batches, parallel_map, train_loader
from ECAPAModel import saved_models

pytestmark = pytest.mark.usefixtures('quick')
NOTICED = (
    r'Exception ignored in: .*\n(?:.*\n)*?'
    r'RuntimeError: DataLoader worker \(pid \d+\) is killed by signal: .*\n'
)


@pytest.mark.slow
@pytest.mark.parametrize('whom', ['process', 'group', 'helpers first'])
@pytest.mark.parametrize('number', [signal.SIGTERM, signal.SIGINT])
def test_a_signal_at_any_moment_of_a_training_says_where_it_continues(
    tree, tmp_path, few_trials, whom, number
):
    """Also between epochs, while helpers start and end, and before the first step."""
    options = {**SMALL, **tree, 'max_epoch': 1000000, 'n_cpu': 2, 'keep': 2}
    # Other moments for each signal and receiver.
    rng = random.Random(f'{number} {whom}')
    for most in (0.5, 2, 2):
        process = start(trainECAPAModel.main, command_line(**options), folder=tmp_path)
        log = tmp_path / 'stdout'
        while not (log.exists() and log.read_text().startswith('command')):
            assert process.is_alive()
            time.sleep(0.005)
        time.sleep(rng.uniform(0, most))
        if whom == 'process':
            os.kill(process.pid, number)
        elif whom == 'group':
            os.killpg(process.pid, number)
        else:
            for helper in children_of(process.pid):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(helper, number)
            time.sleep(0.01)
            os.kill(process.pid, number)
        status, _, message = finish([process], tmp_path, timeout=60)

        assert status == 128 + number, message
        name = 'Ctrl-C' if number == signal.SIGINT else 'SIGTERM'
        saved = saved_models(tree['save_path'] + '/model').values()
        where = f'after epoch {max(saved)}, the last saved' if saved else 'no epoch was saved'
        # PyTorch notices the death of a worker, and rarely reports it where errors are ignored.
        rest = re.sub(NOTICED, '', message)
        assert re.fullmatch(f'\nstopped by {name}: .*{where}.*\n', rest), message
        for stream in ('stdout', 'stderr'):
            (tmp_path / stream).unlink()


def children_of(pid):
    """The numbers of the processes that a process has started."""
    listing = subprocess.run(['ps', '-o', 'pid=', '--ppid', str(pid)], capture_output=True)
    return [int(word) for word in listing.stdout.split()]


def start_helpers(number):
    """Starts two loading processes, and gets a signal while the first one is being forked."""
    fork = os.fork

    def fork_and_signal():
        child = fork()
        if child:
            os.kill(os.getpid(), number)
        else:
            time.sleep(0.2)
        return child

    os.fork = fork_and_signal
    with tools.exit_on_bad_input():
        list(parallel_map(str, range(8), 2))


@pytest.mark.parametrize('number', [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_no_helper_outlives_a_command_that_is_stopped_while_helpers_start(tmp_path, number):
    """A helper that did so kept the command's streams open, and their reader waited for ever."""
    command = start(start_helpers, number, folder=tmp_path)
    command.join(20)
    assert command.exitcode is not None
    deadline = time.monotonic() + 4  # PyTorch's helpers look for their parent every 5 s
    while time.monotonic() < deadline and running_in_group(command.pid):
        time.sleep(0.05)
    assert running_in_group(command.pid) == []
    name = {signal.SIGINT: 'Ctrl-C', signal.SIGTERM: 'SIGTERM'}.get(number)
    message = (tmp_path / 'stderr').read_text()
    assert message == (f'\nstopped by {name}\n' if name else '')


def running_in_group(group):
    """The numbers of the processes of a group that have not ended."""
    listing = subprocess.run(['ps', '-o', 'pid=,stat=', '-g', str(group)], capture_output=True)
    rows = [line.split() for line in listing.stdout.decode().splitlines()]
    return [int(pid) for pid, state in rows if not state.startswith('Z')]


def test_an_interrupt_is_obeyed_while_a_batch_is_awaited(tree):
    """The loading process sends it, and would then sleep for an hour."""
    training = os.getpid()

    class Asleep(train_loader):
        def __getitem__(self, index):
            time.sleep(1)
            os.kill(training, signal.SIGINT)
            time.sleep(3600)

    loader = make_batches(Asleep(**tree, num_frames=20), 4, n_cpu=1)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            make_system().train_network(1, loader)
    finally:
        signal.signal(signal.SIGINT, before)
