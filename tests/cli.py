"""Runs the commands as a user does: training, --eval, and input that they refuse."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

import trainECAPAModel

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
