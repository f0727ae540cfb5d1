"""Runs the commands as a user does: training, --eval, and input that they refuse."""

import contextlib
import multiprocessing.connection
import multiprocessing.forkserver
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import plain
import pytest
import torch

import dataLoader
import trainECAPAModel
from model import ECAPA_TDNN

ROOT = Path(__file__).parents[1]
# A training that takes a second. Tests override what they are about.
SMALL = {'C': 8, 'num_frames': 20, 'batch_size': 4, 'max_epoch': 1, 'n_cpu': 0, 'device': 'cpu'}


def command_line(*flags, **options):
    """Returns the arguments of a command; an option may have several values."""
    arguments = list(flags)
    for name, value in options.items():
        values = value if isinstance(value, (list, tuple)) else [value]
        arguments += [f'--{name}', *map(str, values)]
    return arguments


def train(tree, *flags, **options):
    """Runs the command with SMALL and the corpus of the fixture `tree`."""
    trainECAPAModel.main(command_line(*flags, **{**SMALL, **tree, **options}))


def evaluate(tree, model, *flags, **options):
    """Runs --eval of a checkpoint on the corpus of the fixture `tree`."""
    chosen = {**tree, 'initial_model': model, 'device': 'cpu', 'n_cpu': 0, **options}
    trainECAPAModel.main(command_line('--eval', *flags, **chosen))


def refusal(capsys, call, *args, **kwargs):
    """Returns what a call says on standard error as it ends with status 2."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        call(*args, **kwargs)
    message = capsys.readouterr().err
    assert stop.value.code == 2, message
    assert 'Traceback' not in message
    return message


# Other processes.
#
# Python needs seconds to import PyTorch. So most tests that need another process fork it from a
# server that has imported everything. Only how Python itself starts or ends needs a new one.

forked = multiprocessing.get_context('forkserver')
forked.set_forkserver_preload(['cli', 'conftest', 'torch._dynamo', 'exps.compare'])
# What torchrun tells its processes, of which there are two on this machine.
LAUNCHED = {
    'TORCHELASTIC_RUN_ID': 'job',
    'TORCHELASTIC_RESTART_COUNT': '0',
    'TORCHELASTIC_USE_AGENT_STORE': 'True',
    'WORLD_SIZE': '2',
    'LOCAL_WORLD_SIZE': '2',
    'MASTER_ADDR': 'localhost',
    'GLOO_SOCKET_IFNAME': 'lo',
}


def start(function, *args, folder, environment=None):
    """Starts function(*args) in another process, the leader of a group; returns the process.

    It runs in `folder`, and adds to the files stdout and stderr there.
    """
    with pytest.MonkeyPatch.context() as patch:
        # The server imports the modules of this repository.
        patch.setenv('PYTHONPATH', os.pathsep.join([str(ROOT), str(ROOT / 'tests')]))
        multiprocessing.forkserver.ensure_running()
    method = multiprocessing.get_start_method()
    settings = environment or {}, method, get_scale()
    process = forked.Process(target=enter, args=(function, args, folder, *settings))
    process.start()
    return process


def enter(function, args, folder, environment, method, scale):
    """Runs a function as a command that the shell has started.

    method: how this process starts others; it would otherwise have a server too. scale: see
    get_scale.
    """
    multiprocessing.set_start_method(method, force=True)
    set_scale(*scale)
    os.setsid()
    os.chdir(folder)
    os.environ.update(environment)
    redirect(1, 'stdout')
    redirect(2, 'stderr')
    sys.stdout = open(1, 'w', closefd=False)
    sys.stderr = open(2, 'w', closefd=False, buffering=1)
    # Whatever runs the tests in the background may have Ctrl-C ignored.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    function(*args)


def get_scale():
    """Returns (samples of an evaluation crop, pooled channels), which the fixture quick changes."""
    return dataLoader.EVAL_CROP, ECAPA_TDNN.pooled


def set_scale(crop, pooled, change=setattr):
    """Sets what get_scale() returns, also for the plain code."""
    for module in (dataLoader, plain):
        change(module, 'EVAL_CROP', crop)
    change(ECAPA_TDNN, 'pooled', pooled)
    change(plain, 'POOLED', pooled)


def redirect(stream, path):
    """Lets a stream (1 or 2) of this process write to the end of a file."""
    file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(file, stream)
    os.close(file)


def finish(processes, folder, timeout=120):
    """Waits for processes of start(); returns (largest exit status, their output, their errors).

    As torchrun does, it ends the others if one fails.
    """
    deadline = time.monotonic() + timeout
    try:
        running = list(processes)
        while running and not any(process.exitcode for process in processes):
            left = deadline - time.monotonic()
            assert left > 0, 'the processes hang'
            sentinels = [process.sentinel for process in running]
            multiprocessing.connection.wait(sentinels, timeout=left)
            running = [process for process in running if process.exitcode is None]
        # Time to say what should not be said.
        for process in running:
            process.join(2)
    finally:
        for process in processes:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.join()
    status = max(process.exitcode for process in processes)
    return status, Path(folder, 'stdout').read_text(), Path(folder, 'stderr').read_text()


def run_two(function, *args, folder):
    """Runs function(*args) in two processes as torchrun starts them; returns as finish() does."""
    # As with torchrun, neither process holds the store.
    store = torch.distributed.TCPStore('localhost', 0, is_master=True, wait_for_workers=False)
    port = str(store.port)
    processes = []
    for rank in ('0', '1'):
        environment = {**LAUNCHED, 'RANK': rank, 'LOCAL_RANK': rank, 'MASTER_PORT': port}
        processes.append(start(function, *args, folder=folder, environment=environment))
    return finish(processes, folder)


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
