"""At the edge: processes at once, odd recipes, options and lists, tampered files."""

from pathlib import Path

import numpy as np
import pytest
import torch
from cli import command_line
from conftest import make_system, trial_lines, wave, write_wav

import tools
import trainECAPAModel
from dataLoader import read_trial_lists
from exps import average, export
from tools import BadInput

pytestmark = pytest.mark.usefixtures('short_crops')
ROOT = Path(__file__).parents[1]
SMALL = {'C': 8, 'num_frames': 20, 'batch_size': 4, 'n_cpu': 0, 'max_epoch': 1, 'device': 'cpu'}
NAME = 'id{}/session/{:05d}.wav'.format


@pytest.fixture
def tree(tree):
    """The corpus of conftest with six trials of short utterances."""
    names = [NAME(speaker, number) for speaker in (1, 2) for number in range(2)]
    Path(tree['eval_list']).write_text(trial_lines(names))
    for number, name in enumerate(names):
        write_wav(Path(tree['eval_path'], name), wave(number, 8000), subtype='PCM_16')
    return tree


@pytest.fixture
def model(tmp_path):
    """A checkpoint of four speakers."""
    make_system().save_parameters(tmp_path / 'a.model')
    return str(tmp_path / 'a.model')


def train(tree, *flags, **options):
    trainECAPAModel.main(command_line(*flags, **{**SMALL, **tree, **options}))


def evaluate(tree, model, *flags, **options):
    options = {**tree, 'initial_model': model, 'device': 'cpu', 'n_cpu': 0, **options}
    trainECAPAModel.main(command_line('--eval', *flags, **options))


def refusal(capsys, call, *args, **kwargs):
    """What a call says on standard error; it must end with status 2."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        call(*args, **kwargs)
    message = capsys.readouterr().err
    assert stop.value.code == 2, message
    return message


# Processes that write at once.


# The command.


# Recipes and options.txt.


# Lists.


def test_models_may_be_called_as_labels_are(tree, tmp_path):
    (tmp_path / 'models.txt').write_text(f'0 {NAME(1, 0)}\n1 {NAME(2, 0)}\n')
    first = f'1 0 {NAME(1, 1)}\n0 1 {NAME(1, 0)}\n'
    (tmp_path / 'first.txt').write_text(first)
    lines = [' '.join(line.split()[1:] + line.split()[:1]) for line in first.splitlines()]
    (tmp_path / 'last.txt').write_text('\n'.join(lines) + '\n')
    lists = [str(tmp_path / f'{name}.txt') for name in ('first', 'last')]
    _, found = read_trial_lists(lists, [tree['eval_path']], str(tmp_path / 'models.txt'))
    assert [trials.labels.tolist() for trials in found] == [[1, 0], [1, 0]]
    assert found[0].names == found[1].names == ['0', NAME(1, 1), '1', NAME(1, 0)]


@pytest.mark.parametrize('encoding', ['utf-16-le', 'utf-16-be'])
@pytest.mark.parametrize('name', ['train_list', 'eval_list'])
def test_a_list_in_utf_16_is_named_as_such(tree, capsys, name, encoding):
    """As PowerShell writes it."""
    path = Path(tree[name])
    path.write_bytes(('\ufeff' + path.read_text()).encode(encoding))
    assert 'byte order mark' in refusal(capsys, train, tree)


# The results folder.


def test_score_txt_as_editors_leave_it(tree):
    train(tree)
    path = Path(tree['save_path'], 'score.txt')
    for change in (str.rstrip, lambda text: text.replace('\n', ' \n')):
        path.write_text(change(path.read_text()))
        train(tree, max_epoch=len(tools.read_scores(path)) + 1)
    assert [score[0] for score in tools.read_scores(path)] == [1, 2, 3]
    assert path.read_text().endswith('%\n')


def test_a_score_that_is_no_number_is_named_by_its_line(tmp_path):
    line = tools.SCORE_LINE % (1, 0.001, 2, 3, 4, 4)
    (tmp_path / 'score.txt').write_text(line + line.replace('LR 0.001000', 'LR fast'))
    with pytest.raises(BadInput, match='score.txt, line 2: not a line of a score.txt'):
        tools.read_scores(tmp_path / 'score.txt')
    (tmp_path / 'score.txt').write_text(tools.SCORE_LINE % (1, 1e30, np.inf, np.nan, 4, -4))
    assert np.isnan(tools.read_scores(tmp_path / 'score.txt')[0][3])


# Checkpoints.


@pytest.mark.parametrize('name', ['speaker_encoder.bn1.num_batches_tracked', 'speaker_loss.weight'])
def test_only_tensors_of_one_type_are_averaged(model, tmp_path, capsys, name):
    """An integer one and the half of another would be added."""
    state = torch.load(model)
    state[name] = state[name].to(torch.int64 if state[name].is_floating_point() else torch.float32)
    other, out = str(tmp_path / 'b.model'), str(tmp_path / 'out.model')
    torch.save(state, other)
    for models in ([model, other], [other, model]):
        message = refusal(capsys, average.main, [*models, '--out', out])
        assert 'has other tensors' in message and not Path(out).exists()


def test_a_checkpoint_is_averaged_once(model, tmp_path, capsys):
    out = str(tmp_path / 'out.model')
    arguments = [model, f'{tmp_path}/./a.model', '--out', out]
    assert 'names a checkpoint twice' in refusal(capsys, average.main, arguments)
    assert not Path(out).exists()


def test_an_export_names_its_own_argument(tmp_path, capsys):
    pytest.importorskip('onnxruntime')
    arguments = [str(tmp_path / 'none.model'), '--out', str(tmp_path / 'a.onnx')]
    message = refusal(capsys, export.main, arguments)
    assert 'none.model: no such' in message and '--initial_model' not in message
