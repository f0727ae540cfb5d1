"""Does everything run if processes are spawned (macOS, Windows) or forked by a server (3.14)?"""

import multiprocessing
import pickle
from pathlib import Path

import numpy as np
import pytest
from cli import command_line, evaluate, train

from dataLoader import parallel_map
from exps import conditions, embed, lists

pytestmark = pytest.mark.usefixtures('quick')


@pytest.fixture(params=['spawn', 'forkserver'])
def method(request):
    """Makes one of the two the way in which this process starts others."""
    before = multiprocessing.get_start_method()
    multiprocessing.set_start_method(request.param, force=True)
    yield request.param
    multiprocessing.set_start_method(before, force=True)


@pytest.mark.slow
def test_training(tree, few_trials, tmp_path, method):
    """With the numbers of a run that starts no processes."""
    train(tree, max_epoch=2, test_step=2, n_cpu=1)
    alone = {**tree, 'save_path': str(tmp_path / 'alone')}
    train(alone, max_epoch=2, test_step=2)
    scores = Path(tree['save_path'], 'score.txt').read_text()
    assert scores == (tmp_path / 'alone/score.txt').read_text()


@pytest.mark.slow
@pytest.mark.parametrize('method', ['forkserver'], indirect=True)
def test_evaluation_and_scripts(tree, model, tmp_path, method, monkeypatch, capsys):
    """By one of the two, as both hand over the same: what can be pickled."""
    evaluate(tree, model, n_cpu=1)
    assert 'EER' in capsys.readouterr().out

    files = sorted(Path(tree['eval_path']).rglob('*.wav'))
    options = {'initial_model': model, 'device': 'cpu', 'n_cpu': 1, 'out': tmp_path / 'e.npz'}
    embed.main([tree['eval_path'], *command_line(**options)])
    assert len(np.load(tmp_path / 'e.npz')['embeddings']) == len(files)

    monkeypatch.setattr(lists, 'default_n_cpu', lambda: 1)
    options = {'out': tmp_path / 'lists', 'test_speakers': 2}
    lists.main([tree['train_path'], *command_line(**options)])
    assert (tmp_path / 'lists/train_list.txt').read_text()

    options = {'audio': tree['eval_path'], 'out': tmp_path / 'conditions', 'n_cpu': 1}
    conditions.main([tree['eval_list'], *command_line(**options)])
    assert any((tmp_path / 'conditions').iterdir())


def test_a_reading_process_does_not_get_a_copy_of_the_whole_list():
    loader = parallel_map(str.upper, [f'{number} {"a" * 100}' for number in range(1000)], 1)
    assert len(pickle.dumps(loader.dataset)) < 1000
    assert len(loader) == 1000
    assert list(loader)[999].startswith('999 AA')
