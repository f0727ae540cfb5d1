"""Does the same command continue a run exactly, and what does it refuse to continue?"""

import errno
import os
import re
import shutil
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from cli import SMALL, command_line, refusal, start, train
from conftest import assert_same_run
from kills import PLACES, train_with_kills

import trainECAPAModel
from ECAPAModel import ECAPAModel, newest_checkpoint, saved_models
from tools import HARMLESS, SCORE_LINE, BadInput, read_scores

pytestmark = pytest.mark.usefixtures('quick', 'few_trials')
ROOT = Path(__file__).parents[1]


@pytest.fixture
def two_epochs(tree):
    """The corpus with a run of two epochs, and its folder of models."""
    train(tree, max_epoch=2)
    return tree, Path(tree['save_path'], 'model')


def epochs(tree):
    """The epochs in the score.txt of a run."""
    return [score[0] for score in read_scores(f'{tree["save_path"]}/score.txt')]


# Exact.


@pytest.mark.slow
def test_sixteen_kills_change_nothing(tree, tmp_path):
    """Two at each of eight kinds of places."""
    places, runs = train_with_kills(tree, tmp_path / 'killed', 16)
    assert sorted(places) == sorted(2 * list(PLACES))
    train_with_kills(tree, tmp_path / 'straight', 0)
    for number in range(1, runs + 1):
        assert_same_run(tmp_path / 'straight/1', tmp_path / f'killed/{number}')
        assert not list((tmp_path / f'killed/{number}').rglob('*.part'))


def stop_before(monkeypatch, last):
    """Stops training before the epoch `last`, by RuntimeError."""
    train_network = ECAPAModel.train_network

    def stopped(system, epoch, loader):
        if epoch == last:
            raise RuntimeError('stopped')
        return train_network(system, epoch, loader)

    monkeypatch.setattr(ECAPAModel, 'train_network', stopped)


def test_a_restart_in_the_middle_of_the_ramp_changes_nothing(tree, tmp_path):
    """Margin and rate move with every step; a run that stops in between ends with the same bits."""
    recipe = [f'@{ROOT}/exps/recipes/strong.txt', '--margin_epochs', '1', '3', '--warmup', '0.5']
    folders = [str(tmp_path / name) for name in ('straight', 'stopped')]
    options = {'max_epoch': 4, 'test_step': 1}
    train(tree, *recipe, **options, save_path=folders[0])
    with pytest.MonkeyPatch.context() as patch:
        stop_before(patch, 3)
        with pytest.raises(RuntimeError, match='stopped'):
            train(tree, *recipe, **options, save_path=folders[1])
    assert len(read_scores(folders[1] + '/score.txt')) == 2
    train(tree, *recipe, **options, save_path=folders[1])
    assert len(read_scores(folders[1] + '/score.txt')) == 4
    assert_same_run(*folders)


# Damaged or missing checkpoints.


@pytest.mark.parametrize('ending', ['model', 'state'])
def test_resume_falls_back_to_the_newest_whole_pair(tree, tmp_path, capsys, ending):
    """A model without its state would go on with a fresh optimiser: the pair before is exact."""
    train(tree, max_epoch=3)
    whole = shutil.copytree(tree['save_path'], tmp_path / 'whole')
    damaged = Path(tree['save_path'], f'model/model_0003.{ending}')
    content = bytearray(damaged.read_bytes())
    content[len(content) // 2] ^= 1
    damaged.write_bytes(content)
    capsys.readouterr()
    train(tree, max_epoch=3)
    output = capsys.readouterr()
    assert damaged.name in output.err
    assert 'after epoch 2' in output.out
    assert_same_run(whole, tree['save_path'])


def test_keep_leaves_the_newest_checkpoints_and_all_scores(tree):
    train(tree, max_epoch=5, keep=2)
    assert list(saved_models(tree['save_path'] + '/model').values()) == [5, 4]
    assert epochs(tree) == [1, 2, 3, 4, 5]
    assert newest_checkpoint(tree['save_path'] + '/model')[2]['epoch'] == 5


def test_a_resume_removes_nothing_that_it_needs(tree, capsys):
    """With --keep 1 the newest checkpoint that can be read is kept, even if others are newer.

    The states beside it are not pushed out by those of epochs whose models are gone.
    """
    folder = Path(tree['save_path'], 'model')
    train(tree, max_epoch=4)
    for epoch in (3, 4):
        (folder / f'model_000{epoch}.model').write_bytes(b'damaged')
    train(tree, max_epoch=3, keep=1)
    assert newest_checkpoint(str(folder))[2]['epoch'] == 3
    (folder / 'model_0004.model').unlink(missing_ok=True)
    train(tree, max_epoch=6)
    for epoch in (4, 5, 6):
        (folder / f'model_000{epoch}.model').unlink()
    train(tree, max_epoch=4)
    capsys.readouterr()
    train(tree, max_epoch=5)
    assert '.state' not in capsys.readouterr().err


def contents(folder):
    """{path: bytes} of all files below a folder, the lock and the options of a run left out."""
    files = [path for path in Path(folder).rglob('*') if path.is_file()]
    return {path: path.read_bytes() for path in files if path.name != 'run.lock'}


def test_checkpoints_are_ordered_by_their_epochs(tmp_path):
    for epoch in (9999, 10000, 998):
        (tmp_path / f'model_{epoch:04d}.model').touch()
    assert list(saved_models(tmp_path).values()) == [10000, 9999, 998]


def test_a_run_whose_checkpoints_are_all_damaged_is_refused(two_epochs, capsys):
    """It began again from random weights, and the first test erased score.txt."""
    tree, folder = two_epochs
    cut_short = folder / 'model_0001.model'
    cut_short.write_bytes(cut_short.read_bytes()[:9999])
    zeros = folder / 'model_0002.model'
    zeros.write_bytes(bytes(9999))
    before = contents(tree['save_path'])
    for flags in ([], ['--check', '--force']):
        message = refusal(capsys, train, tree, *flags, max_epoch=3)
        assert str(folder) in message and '--save_path' in message
        assert 'model_0001.model' in message and 'model_0002.model' in message
        assert contents(tree['save_path']) == before


def fail(monkeypatch, ending, number):
    """Lets open() of all files with an ending fail with an error of the system."""

    def refuse(path, *args, **kwargs):
        if str(path).endswith(ending):
            raise OSError(number, os.strerror(number), str(path))
        return original(path, *args, **kwargs)

    original = open
    monkeypatch.setattr('builtins.open', refuse)


@pytest.mark.parametrize('file', ['model_0002.model', 'model_0002.state', 'score.txt'])
def test_an_error_that_is_not_damage_ends_the_command_at_once(
    two_epochs, capsys, monkeypatch, file
):
    """The file may be whole: a checkpoint before it, or none, would be a silent loss."""
    tree, _ = two_epochs
    before = contents(tree['save_path'])
    for number in (errno.EACCES, errno.EIO, errno.ESTALE, errno.ENOMEM):
        with monkeypatch.context() as patch:
            fail(patch, file, number)
            message = refusal(capsys, train, tree, max_epoch=3)
        assert file in message and os.strerror(number) in message
        assert 'model_0001' not in message
        assert contents(tree['save_path']) == before


@pytest.mark.parametrize(
    'error', [MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory")]
)
def test_too_little_memory_is_not_damage(two_epochs, capsys, monkeypatch, error):
    tree, folder = two_epochs

    def refuse(*args, **kwargs):
        raise error

    monkeypatch.setattr(torch, 'load', refuse)
    with pytest.raises(type(error)):
        newest_checkpoint(str(folder))
    assert capsys.readouterr().err == ''


def test_a_folder_of_models_that_cannot_be_listed_is_an_error(tmp_path, monkeypatch):
    def refuse(path):
        raise PermissionError(errno.EACCES, 'Permission denied', path)

    monkeypatch.setattr(os, 'listdir', refuse)
    with pytest.raises(BadInput, match=re.escape(str(tmp_path))):
        newest_checkpoint(str(tmp_path))


def test_a_damaged_state_beside_the_only_model_costs_the_optimiser_only(two_epochs, capsys):
    tree, folder = two_epochs
    (folder / 'model_0001.model').unlink()
    (folder / 'model_0002.state').write_bytes(b'damaged')
    path, _, state = newest_checkpoint(str(folder))
    assert path.endswith('model_0002.model') and state == {'epoch': 2}
    message = capsys.readouterr().err
    assert message.count('model_0002.state') == 1


# Other options.


@pytest.mark.parametrize(
    'option, value',
    [
        ('m', 0.3),
        ('s', 20),
        ('seed', 11),
        ('batch_size', 6),
        ('lr', 0.01),
        ('num_frames', 30),
        ('C', 16),
    ],
)
def test_other_options_are_refused(tree, capsys, option, value):
    train(tree)
    files = sorted(Path(tree['save_path']).rglob('*'))
    message = refusal(capsys, train, tree, keep=1, **{'max_epoch': 2, option: value})
    assert sorted(Path(tree['save_path']).rglob('*')) == files
    assert re.search(rf'--{option} {value:g}\b.* \(was ', message)
    if option == 'm':
        train(tree, '--force', m=0.3, max_epoch=2)
        assert '--m 0.3 (was 0.2)' in capsys.readouterr().out


def test_lists_count_by_what_is_in_them(tree, capsys, tmp_path):
    train(tree, max_epoch=1)
    moved = str(tmp_path / 'elsewhere.txt')
    shutil.copy(tree['train_list'], moved)
    train(tree, train_list=moved, max_epoch=2)
    lines = Path(moved).read_text().splitlines(keepends=True)
    Path(moved).write_text(''.join(lines[:-1]))
    assert '--train_list' in refusal(capsys, train, tree, train_list=moved, max_epoch=3)


def test_every_option_counts_when_a_run_is_continued_unless_it_is_harmless(tree):
    parser = trainECAPAModel.make_parser()
    args = parser.parse_args(command_line(**SMALL, **tree, schedule='cosine'))
    args.command = ''
    identity = trainECAPAModel.prepare(args).identity
    options = set(vars(args))
    assert set(identity) == options - HARMLESS
    added_by_the_command = {'command', 'score_save_path', 'model_save_path'}
    assert HARMLESS - added_by_the_command < options


EARLIER = [
    'num_frames', 'batch_size', 'test_step', 'accumulate', 'freeze_epochs', 'lr', 'lr_decay',
    'm', 's', 'seed', 'initial_model', 'optimizer', 'weight_decay', 'clip', 'schedule',
    'min_lr', 'warmup', 'augment', 'no_specaug', 'margin_from', 'margin_epochs',
    'speed_perturb', 'C', 'n_class', 'precision', 'train_list', 'eval_list', 'codec',
    'musan_path', 'rir_path',
]  # fmt: skip


def test_a_run_of_an_earlier_version_is_continued(tree, capsys):
    """Its .state knows 30 options; the others count from the next checkpoint on."""
    train(tree, max_epoch=1)
    path = f'{tree["save_path"]}/model/model_0001.state'
    state = torch.load(path, weights_only=True)
    state['identity'] = {name: state['identity'][name] for name in EARLIER}
    torch.save(state, path)
    train(tree, max_epoch=2)
    assert epochs(tree) == [1, 2]


def test_frozen_epochs_with_sgd_and_forced_changes(tree, capsys):
    """The encoder's momentum begins later than the classifier's; --force applies what it says."""
    train(tree, freeze_epochs=1, optimizer='sgd', max_epoch=2)
    options = {'freeze_epochs': 1, 'weight_decay': 0.5}
    train(tree, '--force', **options, optimizer='sgd', max_epoch=3)
    path = f'{tree["save_path"]}/model/model_0003.state'
    state = torch.load(path, weights_only=True)['optim']
    assert state['param_groups'][0]['weight_decay'] == 0.5
    message = refusal(capsys, train, tree, '--force', **options, optimizer='adam', max_epoch=4)
    assert '--optimizer' in message


def test_a_cosine_is_not_continued_to_another_end(tree, capsys):
    train(tree, schedule='cosine', max_epoch=1)
    with pytest.raises(SystemExit) as stop:
        train(tree, schedule='cosine', max_epoch=2)
    assert stop.value.code == 2
    assert '--max_epoch 2 (was 1)' in capsys.readouterr().err


# score.txt.


def test_score_txt_never_gets_shorter(tree):
    """After the loss of the newest checkpoints the lines of their epochs stay until they return."""
    train(tree, max_epoch=4)
    path = Path(tree['save_path'], 'score.txt')
    whole = path.read_bytes()
    Path(tree['save_path'], 'model/model_0004.model').write_bytes(b'damaged')
    Path(tree['save_path'], 'model/model_0003.model').write_bytes(b'damaged')
    train(tree, max_epoch=3)
    assert epochs(tree) == [1, 2, 3, 4]
    assert path.read_bytes().splitlines()[3] == whole.splitlines()[3]
    train(tree, max_epoch=5)
    assert epochs(tree) == [1, 2, 3, 4, 5]


def test_a_score_txt_without_any_checkpoint_is_refused(two_epochs, capsys):
    """The run would begin again, and its first test would replace the old run's scores."""
    tree, folder = two_epochs
    for path in folder.iterdir():
        path.unlink()
    before = contents(tree['save_path'])
    message = refusal(capsys, train, tree)
    assert 'score.txt' in message and str(folder) in message
    assert contents(tree['save_path']) == before


def test_the_best_error_rate_is_that_of_the_epochs_before(tree):
    train(tree, max_epoch=3)
    path = Path(tree['save_path'], 'score.txt')
    lines = path.read_text().splitlines(keepends=True)
    lines[2] = SCORE_LINE % (3, 0.001, 1, 1, 0.5, 0.5)
    path.write_text(''.join(lines))
    Path(tree['save_path'], 'model/model_0003.model').write_bytes(b'damaged')
    train(tree, max_epoch=3)
    assert read_scores(path)[2][5] != 0.5


def test_score_txt_as_editors_leave_it(tree):
    train(tree)
    path = Path(tree['save_path'], 'score.txt')
    for change in (str.rstrip, lambda text: text.replace('\n', ' \n')):
        path.write_text(change(path.read_text()))
        train(tree, max_epoch=len(epochs(tree)) + 1)
    assert epochs(tree) == [1, 2, 3]
    assert path.read_text().endswith('%\n')


def test_a_score_that_is_no_number_is_named_by_its_line(tmp_path):
    line = SCORE_LINE % (1, 0.001, 2, 3, 4, 4)
    (tmp_path / 'score.txt').write_text(line + line.replace('LR 0.001000', 'LR fast'))
    with pytest.raises(BadInput, match='score.txt, line 2'):
        read_scores(tmp_path / 'score.txt')
    (tmp_path / 'score.txt').write_text(SCORE_LINE % (1, 1e30, np.inf, np.nan, 4, -4))
    assert np.isnan(read_scores(tmp_path / 'score.txt')[0][3])


# A folder in use.


def test_a_second_run_is_refused(tree, tmp_path, capsys):
    """The test of the kills shows that the lock of a dead process is taken over."""
    options = {**SMALL, **tree, 'max_epoch': 1000000}
    first = start(trainECAPAModel.main, command_line(**options), folder=tmp_path)
    try:
        while not Path(tree['save_path'], 'score.txt').exists():
            assert first.is_alive()
            time.sleep(0.01)
        message = refusal(capsys, train, tree)
        assert tree['save_path'] in message
        assert f'{first.pid}' in message and os.uname().nodename in message
    finally:
        first.kill()
        first.join()
