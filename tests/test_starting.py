"""Does everything run if processes are spawned (macOS, Windows) or forked by a server (3.14)?"""

import os
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from cli import SMALL, command_line, train
from conftest import make_system

from dataLoader import parallel_map

ROOT = Path(__file__).parents[1]
METHODS = ('spawn', 'forkserver')
COMMAND = [str(ROOT / 'trainECAPAModel.py')]


def run(folder, method, program, *arguments):
    """Runs a program whose default way to start processes is `method`; returns its output."""
    # Python imports a sitecustomize.py before it runs anything, also in the processes it starts.
    (folder / 'sitecustomize.py').write_text(
        f'import multiprocessing\nmultiprocessing.set_start_method({method!r}, force=True)\n'
    )
    environment = {**os.environ, 'OMP_NUM_THREADS': '1'}
    environment['PYTHONPATH'] = os.pathsep.join([str(folder), str(ROOT)])
    done = subprocess.run(
        [sys.executable, *program, *map(str, arguments)],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert 'Traceback' not in done.stderr
    return done.stdout


@pytest.mark.slow
@pytest.mark.parametrize('method', METHODS)
def test_training(tree, tmp_path, method):
    """With the numbers of a run that starts no processes."""
    run(tmp_path, method, COMMAND, *command_line(**{**SMALL, **tree, 'max_epoch': 2, 'n_cpu': 1}))
    alone = {**tree, 'save_path': str(tmp_path / 'alone')}
    train(alone, max_epoch=2)
    scores = Path(tree['save_path'], 'score.txt').read_text()
    assert scores == (tmp_path / 'alone/score.txt').read_text()


@pytest.mark.slow
@pytest.mark.parametrize('method', METHODS)
def test_evaluation_and_scripts(tree, tmp_path, method):
    model = tmp_path / 'a.model'
    make_system().save_parameters(model)
    options = {'initial_model': model, 'device': 'cpu', 'n_cpu': 1}
    lists = {name: tree[name] for name in ('eval_list', 'eval_path', 'save_path')}
    assert 'EER' in run(tmp_path, method, COMMAND, *command_line('--eval', **options, **lists))

    def script(name, *arguments, **options):
        return run(tmp_path, method, ['-m', f'exps.{name}'], *arguments, *command_line(**options))

    files = sorted(Path(tree['eval_path']).rglob('*.wav'))
    script('embed', tree['eval_path'], **options, out=tmp_path / 'e.npz')
    assert len(np.load(tmp_path / 'e.npz')['embeddings']) == len(files)
    script('lists', tree['train_path'], out=tmp_path / 'lists', test_speakers=2)
    assert (tmp_path / 'lists/train_list.txt').read_text()
    audio = {'audio': tree['eval_path'], 'out': tmp_path / 'conditions', 'n_cpu': 1}
    script('conditions', tree['eval_list'], **audio)
    assert any((tmp_path / 'conditions').iterdir())


def test_a_reading_process_does_not_get_a_copy_of_the_whole_list():
    loader = parallel_map(str.upper, [f'{number} {"a" * 100}' for number in range(1000)], 1)
    assert len(pickle.dumps(loader.dataset)) < 1000
    assert len(loader) == 1000
    assert list(loader)[999].startswith('999 AA')
