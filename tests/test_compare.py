"""What does exps.compare show of experiments?"""

import json
import re

import numpy as np
import pytest
from cli import refusal

from exps import compare
from tools import operating_points


@pytest.fixture
def experiment(tmp_path):
    """Folder of an experiment of five epochs, and scores of two kinds on one list."""
    folder = tmp_path / 'one'
    (folder / 'scores').mkdir(parents=True)
    line = '%d epoch, LR 0.001000, LOSS 1.000000, ACC 10.00%%, EER %.2f%%, bestEER 1.00%%\n'
    eers = [4, 3, 2, 1, 3]
    lines = [line % (epoch, eer) for epoch, eer in enumerate(eers, 1)]
    (folder / 'score.txt').write_text(''.join(lines))
    random = np.random.default_rng(4)
    labels = random.integers(2, size=200)
    scores = random.standard_normal((200, 2)) + labels[:, None]
    text = ''
    for label, (raw, normalised) in zip(labels, scores):
        text += f'{label} {raw:.6f} {normalised:.6f} x.wav y.wav\n'
    (folder / 'scores/hard.txt').write_text(text)
    eers = [operating_points(column, labels)['EER'] for column in scores.T]
    raw = {'EER': eers[0], 'minDCF(0.05)': {'value': 0.5}}
    entry = {
        'figures': {'raw': raw, 'asnorm': {'EER': eers[1]}},
        'scores': 'x/scores/hard.txt',
        'trials': 200,
        'sha256': '0',
        'checkpoint': {'path': 'x/model_0005.model', 'sha256': ''},
    }
    (folder / 'results.json').write_text(json.dumps({'lists': {'lists/hard.txt': entry}}))
    return folder


def test_comparing_experiments(experiment, tmp_path, capsys):
    pytest.importorskip('matplotlib')
    compare.main([str(experiment / 'score.txt'), '--out', str(tmp_path)])
    training, scores = capsys.readouterr().out.split('\n\n')
    rows = [re.split(r'  +', line) for line in training.splitlines()]
    assert rows[1] == ['one', '5', '3.00%', '1.00%', '4', '2.60%']
    assert rows[2] == ['published', '80', '1.03%', '0.96%', '70', '1.05%']
    rows = [re.split(r'  +', line) for line in scores.splitlines()[:5]]
    record = json.loads((experiment / 'results.json').read_text())
    figures = record['lists']['lists/hard.txt']['figures']
    raw, normalised = (f'{figures[kind]["EER"]["value"]:.2f}%' for kind in ('raw', 'asnorm'))
    assert rows == [
        ['experiment', 'checkpoint', 'list', 'kind', 'trials', 'speakers', 'EER', 'minDCF(0.05)'],
        ['one', 'model_0005.model', 'hard', 'raw', '200', '-', raw, '0.5000'],
        ['one', 'model_0005.model', 'hard', 'asnorm', '200', '-', normalised, '-'],
        ['published', 'pretrain.model', 'Vox1_O', 'raw', '37,611', '40', '0.96%', '-'],
        ['published', 'pretrain.model', 'Vox1_O', 'asnorm', '37,611', '40', '0.86%', '-'],
    ]
    for name in ('curves.png', 'det_hard.png'):
        assert (tmp_path / name).read_bytes().startswith(b'\x89PNG')

    compare.main([str(experiment / 'results.json'), '--out', str(tmp_path), '--markdown'])
    lines = capsys.readouterr().out.split('\n\n')[1].splitlines()[:6]
    cells = [[cell.strip() for cell in line.strip('|').split('|')] for line in lines]
    assert cells[:1] + cells[2:] == rows
    assert set(lines[1]) == set('|- '), 'the line that makes it a table in Markdown'


def test_comparing_other_files_is_refused(experiment, tmp_path, capsys):
    assert 'none.txt' in refusal(capsys, compare.main, [str(tmp_path / 'none.txt')])
    cases = {
        '1 high 0.2 x.wav y.wav\n': 'hard.txt',
        '1 nan 0.2 x.wav y.wav\n': 'hard.txt',
        '1 0.1 0.2 x.wav y.wav\n': 'results.json',
    }
    for text, file in cases.items():
        (experiment / 'scores/hard.txt').write_text(text)
        arguments = [str(experiment / 'score.txt'), '--out', str(tmp_path)]
        assert file in refusal(capsys, compare.main, arguments)


def test_the_first_experiment_with_scores_is_the_baseline():
    """As exps/open has none, exps/*/score.txt still compares the others."""
    groups = {'open': ['open'], 'own': ['own-1', 'own-2'], 'small': ['small']}
    lists = {'open': {}, 'own-1': {'a': 1}, 'own-2': {'a': 1}, 'small': {'a': 1}}
    assert compare.find_baseline(None, {}, groups, lists) == 'own'
    assert compare.find_baseline(None, {}, groups, dict.fromkeys(lists, {})) == 'open'


def test_lists_without_scores_are_shown_but_not_compared(experiment, tmp_path, capsys):
    """As in exps/open, where the scores are left out because of their size."""
    (experiment / 'scores/hard.txt').unlink()
    compare.main([str(experiment / 'score.txt'), '--out', str(tmp_path)])
    shown = capsys.readouterr()
    record = json.loads((experiment / 'results.json').read_text())
    eer = record['lists']['lists/hard.txt']['figures']['raw']['EER']['value']
    assert f'{eer:.2f}%' in shown.out
    assert 'lists/hard.txt' in shown.err
