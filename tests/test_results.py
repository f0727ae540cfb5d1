"""Where results are: in copied and moved folders, and if nothing can be written."""

import json
import os
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from cli import command_line, evaluate, refusal
from conftest import make_system

from ECAPAModel import ECAPAModel
from exps import scoring, verify
from tools import sha256

pytestmark = pytest.mark.usefixtures('quick')


def test_a_copied_folder_never_writes_into_the_first(tree, model, tmp_path):
    """As after `cp -r exp1 exp2` and an evaluation of another model in exp2; or after `mv`."""
    evaluate(tree, model)
    first = Path(tree['save_path'])
    second = shutil.copytree(first, tmp_path / 'second')
    before = (first / 'scores/trials.txt').read_bytes()

    other = str(tmp_path / 'other.model')
    torch.manual_seed(2)
    make_system().save_parameters(other)
    evaluate(tree, other, save_path=second)
    assert (first / 'scores/trials.txt').read_bytes() == before
    assert (second / 'scores/trials.txt').read_bytes() != before
    ((path, entry),) = scoring.read_results(second).items()
    _, scores, _ = scoring.read_list_scores(second, path, entry)
    assert list(scores) == ['raw']

    moved = first.rename(tmp_path / 'moved')
    evaluate(tree, moved / 'model/model_0001.model', save_path=moved)
    assert not first.exists()
    assert (moved / 'scores/trials.txt').read_bytes() == before


@pytest.mark.parametrize(
    'place', ['../../../stranger.txt', '/{here}/stranger.txt', 'c:\\stranger.txt']
)
def test_results_of_a_stranger_write_only_below_the_folder(tree, model, tmp_path, place):
    evaluate(tree, model)
    path = Path(tree['save_path'], 'results.json')
    record = json.loads(path.read_text())
    record['lists'][tree['eval_list']]['scores'] = place.format(here=tmp_path)
    path.write_text(json.dumps(record))
    (tmp_path / 'stranger.txt').write_text('mine')
    evaluate(tree, model)
    assert (tmp_path / 'stranger.txt').read_text() == 'mine'
    assert Path(tree['save_path'], 'scores/stranger.txt').is_file()


def test_a_list_has_one_entry_by_a_relative_and_an_absolute_path(tree, model, monkeypatch):
    monkeypatch.chdir(Path(tree['eval_list']).parent)
    for path in (tree['eval_list'], 'trials.txt', './trials.txt'):
        evaluate(tree, model, eval_list=path)
        assert list(scoring.read_results(tree['save_path'])) == [path]
    assert os.listdir(Path(tree['save_path'], 'scores')) == ['trials.txt']


def test_a_model_whose_scores_are_all_equal_is_said(tree, model, capsys, monkeypatch):
    def same(self, paths, any_format=False):
        return np.full((len(paths), 2, 192), 192**-0.5, np.float32)

    monkeypatch.setattr(ECAPAModel, 'embed_files', same)
    evaluate(tree, model)
    *_, warning, header, row = capsys.readouterr().out.splitlines()
    assert tree['eval_list'] in warning
    assert re.split('  +', row)[4:] == ['50.00%', '1.0000', '1.0000']


# What is in them.


def test_results_say_what_they_are(tree, model):
    evaluate(tree, model)
    entry = scoring.read_results(tree['save_path'])[tree['eval_list']]
    assert list(entry) == [
        'figures', 'scores', 'trials', 'targets', 'speakers', 'sha256', 'checkpoint', 'command',
        'commit', 'versions', 'options',
    ]  # fmt: skip
    assert set(entry['figures']['raw']) == {'EER', 'minDCF(0.01)', 'minDCF(0.05)'}
    assert (entry['trials'], entry['targets']) == (66, 12)
    assert entry['sha256'] == sha256(Path(tree['eval_list']).read_bytes())
    of_model = sha256(Path(model).read_bytes())
    assert entry['checkpoint'] == {'path': model, 'sha256': of_model}
    assert entry['versions']['torch'].startswith(torch.__version__.split('+')[0])
    assert entry['options']['seed'] == 10
    assert entry['options']['eval_list'] == [tree['eval_list']]


def test_every_list_keeps_its_results(tree, model, tmp_path, capsys):
    """Two lists of one name in one command; a third of that name, of another model, in a later."""
    lines = Path(tree['eval_list']).read_text().splitlines(keepends=True)
    names = [str(tmp_path / str(number) / 'trials.txt') for number in range(3)]
    for number, name in enumerate(names):
        Path(name).parent.mkdir()
        Path(name).write_text(''.join(lines[number:60:2]))

    evaluate(tree, model, eval_list=names[:2])
    first = scoring.read_results(tree['save_path'])
    contents = {name: Path(first[name]['scores']).read_text() for name in names[:2]}
    other = str(tmp_path / 'other.model')
    torch.manual_seed(2)
    make_system().save_parameters(other)
    evaluate(tree, other, eval_list=names[2])
    entries = scoring.read_results(tree['save_path'])
    assert list(entries) == names
    assert {name: entries[name] for name in names[:2]} == first
    assert [entries[name]['checkpoint']['path'] for name in names] == [model, model, other]
    for name in names:
        text = Path(entries[name]['scores']).read_text()
        rows = [line.split() for line in text.splitlines()]
        trials = [line.split() for line in Path(name).read_text().splitlines()]
        assert [[row[0], *row[2:]] for row in rows] == trials
        assert contents.get(name, text) == text

    evaluate(tree, model, eval_list=names[1])
    again = scoring.read_results(tree['save_path'])
    assert again[names[1]]['scores'] == entries[names[1]]['scores'], 'it takes its own place'
    message = refusal(capsys, evaluate, tree, model, eval_list=[names[1], names[1]])
    assert '--eval_list' in message


def test_a_results_file_of_something_else_is_refused(tree, model, capsys):
    evaluate(tree, model)
    path = Path(tree['save_path'], 'results.json')
    path.write_text('{}')
    assert str(path) in refusal(capsys, evaluate, tree, model)
    assert path.read_text() == '{}'
    pair = [f'{tree["eval_path"]}/id{n}/session/00000.wav' for n in (0, 1)]
    verify.main([*pair, *command_line(initial_model=model, device='cpu')])
    output = capsys.readouterr().out
    assert output.startswith('score ')
    assert str(path) in output
