"""What do Ctrl-C and SIGTERM do, at any moment?"""

import contextlib
import multiprocessing
import os
import random
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from cli import SMALL, command_line
from conftest import make_system

import tools
from dataLoader import make_batches, parallel_map, train_loader
from ECAPAModel import saved_models

ROOT = Path(__file__).parents[1]


@pytest.mark.slow
@pytest.mark.parametrize('whom', ['process', 'group', 'helpers first'])
@pytest.mark.parametrize('number', [signal.SIGTERM, signal.SIGINT])
def test_a_signal_at_any_moment_of_a_training_says_where_it_continues(tree, whom, number):
    """Also between epochs, while helpers start and end, and before the first step."""
    options = {**SMALL, **tree, 'max_epoch': 1000000, 'n_cpu': 2, 'keep': 2}
    command = [sys.executable, str(ROOT / 'trainECAPAModel.py'), *command_line(**options)]
    # Other moments for each signal and receiver.
    rng = random.Random(f'{number} {whom}')
    for _ in range(2):
        process = subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
            # Whatever runs the tests in the background may have Ctrl-C ignored.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
        )
        assert process.stdout.readline().startswith('command')
        time.sleep(rng.uniform(0, 6))
        if whom == 'process':
            process.send_signal(number)
        elif whom == 'group':
            os.killpg(process.pid, number)
        else:
            for helper in children_of(process.pid):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(helper, number)
            time.sleep(0.01)
            process.send_signal(number)
        _, message = process.communicate(timeout=60)

        assert process.returncode == 128 + number, message
        name = 'Ctrl-C' if number == signal.SIGINT else 'SIGTERM'
        saved = max(saved_models(tree['save_path'] + '/model').values(), default=0)
        expected = f'stopped by {name}: the same command continues after epoch {saved}, the last '
        assert message.splitlines() == ['', f'{expected}saved']


def children_of(pid):
    """The numbers of the processes that a process has started."""
    listing = subprocess.run(['ps', '-o', 'pid=', '--ppid', str(pid)], capture_output=True)
    return [int(word) for word in listing.stdout.split()]


def start_helpers(number, writing):
    """Starts two loading processes, and gets a signal while the first one is being forked."""
    os.setsid()
    os.dup2(writing, 2)
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
def test_no_helper_outlives_a_command_that_is_stopped_while_helpers_start(number):
    """A helper that did so kept the command's streams open, and their reader waited for ever."""
    reading, writing = os.pipe()
    fork = multiprocessing.get_context('fork')
    command = fork.Process(target=start_helpers, args=(number, writing))
    command.start()
    os.close(writing)
    try:
        message = b''
        while select.select([reading], [], [], 20)[0]:
            part = os.read(reading, 1000)
            if not part:
                break
            message += part
        else:
            pytest.fail('a helper is still there')
    finally:
        os.close(reading)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(command.pid, signal.SIGKILL)
    command.join()
    name = {signal.SIGINT: 'Ctrl-C', signal.SIGTERM: 'SIGTERM'}.get(number)
    assert message.decode() == (f'\nstopped by {name}\n' if name else '')


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
