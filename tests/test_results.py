"""Where results lie: in copied and moved folders, and where nothing can be written."""

import json
import os
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from cli import command_line
from conftest import make_system

import trainECAPAModel
from ECAPAModel import ECAPAModel
from exps import scoring

pytestmark = pytest.mark.usefixtures('short_crops')


@pytest.fixture
def model(tmp_path):
    """A checkpoint of random weights."""
    torch.manual_seed(1)
    make_system().save_parameters(tmp_path / 'one.model')
    return str(tmp_path / 'one.model')


def run(*flags, **options):
    trainECAPAModel.main(command_line(*flags, device='cpu', n_cpu=0, **options))


def eval_options(tree, model):
    names = ('eval_list', 'eval_path', 'save_path')
    return {'initial_model': model, **{name: tree[name] for name in names}}


def results_of(folder):
    """The lists in the results.json of a folder."""
    return json.loads(Path(folder, 'results.json').read_text())['lists']


def test_a_copied_folder_never_writes_into_the_first(tree, model, tmp_path):
    """As after `cp -r exp1 exp2` and an evaluation of another model in exp2; or after `mv`."""
    options = eval_options(tree, model)
    run('--eval', **options)
    first = Path(tree['save_path'])
    second = shutil.copytree(first, tmp_path / 'second')
    before = (first / 'scores/trials.txt').read_bytes()

    other = str(tmp_path / 'other.model')
    torch.manual_seed(2)
    make_system().save_parameters(other)
    run('--eval', **{**options, 'initial_model': other, 'save_path': second})
    assert (first / 'scores/trials.txt').read_bytes() == before
    assert (second / 'scores/trials.txt').read_bytes() != before
    ((path, entry),) = results_of(second).items()
    _, scores, _ = scoring.read_list_scores(second, path, entry)
    assert list(scores) == ['raw']

    moved = first.rename(tmp_path / 'moved')
    run('--eval', **{**options, 'save_path': moved})
    assert not first.exists()
    assert (moved / 'scores/trials.txt').read_bytes() == before


@pytest.mark.parametrize(
    'place', ['../../../stranger.txt', '/{here}/stranger.txt', 'c:\\stranger.txt']
)
def test_results_of_a_stranger_write_only_below_the_folder(tree, model, tmp_path, place):
    options = eval_options(tree, model)
    run('--eval', **options)
    path = Path(tree['save_path'], 'results.json')
    record = json.loads(path.read_text())
    record['lists'][tree['eval_list']]['scores'] = place.format(here=tmp_path)
    path.write_text(json.dumps(record))
    (tmp_path / 'stranger.txt').write_text('mine')
    run('--eval', **options)
    assert (tmp_path / 'stranger.txt').read_text() == 'mine'
    assert Path(tree['save_path'], 'scores/stranger.txt').is_file()


def test_a_list_has_one_entry_by_a_relative_and_an_absolute_path(tree, model, monkeypatch):
    monkeypatch.chdir(Path(tree['eval_list']).parent)
    options = eval_options(tree, model)
    for path in (tree['eval_list'], 'trials.txt', './trials.txt'):
        run('--eval', **{**options, 'eval_list': path})
        assert list(results_of(tree['save_path'])) == [path]
    assert os.listdir(Path(tree['save_path'], 'scores')) == ['trials.txt']


def test_a_model_whose_scores_are_all_equal_is_said(tree, model, capsys, monkeypatch):
    def same(self, paths, any_format=False):
        return np.full((len(paths), 2, 192), 192**-0.5, np.float32)

    monkeypatch.setattr(ECAPAModel, 'embed_files', same)
    run('--eval', **eval_options(tree, model))
    *_, warning, header, row = capsys.readouterr().out.splitlines()
    assert tree['eval_list'] in warning
    assert re.split('  +', row)[4:] == ['50.00%', '1.0000', '1.0000']
