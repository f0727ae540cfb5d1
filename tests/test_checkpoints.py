"""Which checkpoints load, and what a run does whose checkpoints cannot be read."""

import errno
import os
import re
from pathlib import Path

import pytest
import torch
from cli import command_line
from conftest import make_system

import tools
import trainECAPAModel
from ECAPAModel import load_model, newest_checkpoint, saved_models
from tools import BadInput, read_scores

pytestmark = pytest.mark.usefixtures('short_crops')
SMALL = {'C': 8, 'num_frames': 20, 'batch_size': 4, 'n_cpu': 0, 'max_epoch': 2, 'device': 'cpu'}


@pytest.fixture
def tree(tree):
    """The corpus of conftest with two trials, as these tests evaluate often."""
    trials = [f'{label} id1/session/00000.wav id{2 - label}/session/00001.wav' for label in (1, 0)]
    Path(tree['eval_list']).write_text('\n'.join(trials) + '\n')
    return tree


def train(tree, *flags, **options):
    trainECAPAModel.main(command_line(*flags, **{**SMALL, **tree, **options}))


def refusal(capsys, tree, *flags, **options):
    """The message that the command ends with; it must end with status 2."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        train(tree, *flags, **options)
    assert stop.value.code == 2
    return capsys.readouterr().err


@pytest.fixture
def checkpoint(tmp_path):
    path = tmp_path / 'a.model'
    make_system().save_parameters(path)
    return path


@pytest.fixture
def two_epochs(tree):
    """The corpus with a run of two epochs, and its folder of models."""
    train(tree)
    return tree, Path(tree['save_path'], 'model')


def contents(folder):
    """{path: bytes} of all files below a folder, the lock and the options of a run left out."""
    files = [path for path in Path(folder).rglob('*') if path.is_file()]
    return {path: path.read_bytes() for path in files if path.name != 'run.lock'}


# Which names and which tensors.


@pytest.mark.parametrize(
    'wrapped',
    [
        'module.speaker_encoder.',
        'speaker_encoder.module.',
        'speaker_encoder._orig_mod.',
        '_orig_mod.speaker_encoder.',
        'module._orig_mod.speaker_encoder.',
        'speaker_encoder.module._orig_mod.',
    ],
)
def test_a_checkpoint_loads_whichever_module_was_wrapped(checkpoint, wrapped):
    expected = torch.load(checkpoint)
    state = {name.replace('speaker_encoder.', wrapped): x for name, x in expected.items()}
    torch.save(state, checkpoint)
    loaded = load_model(checkpoint, device='cpu').state_dict()
    assert list(loaded) == list(expected)
    assert all(torch.equal(loaded[name], expected[name]) for name in expected)


@pytest.mark.parametrize('part', ['num_batches_tracked', 'torchfbank'])
def test_a_checkpoint_may_lack_what_is_the_same_in_every_model(checkpoint, part):
    expected = torch.load(checkpoint)
    kept = {name: x for name, x in expected.items() if part not in name}
    assert len(kept) < len(expected)
    torch.save(kept, checkpoint)
    loaded = load_model(checkpoint, device='cpu').state_dict()
    assert all(torch.equal(loaded[name], expected[name]) for name in expected)
    assert make_system().load_parameters(checkpoint) == [], 'nothing is left out'


@pytest.mark.parametrize('part', ['running_mean', 'layer2.bn3.weight'])
def test_a_checkpoint_may_not_lack_what_is_learned(checkpoint, part):
    state = {name: x for name, x in torch.load(checkpoint).items() if part not in name}
    torch.save(state, checkpoint)
    with pytest.raises(BadInput, match=f'a.model: .*{part}'):
        load_model(checkpoint, device='cpu')


@pytest.mark.parametrize(
    'content, remedy',
    [
        (b'version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n', 'git lfs pull'),
        (b'<!DOCTYPE html>\n<html></html>', 'download the file itself'),
        (b'\n <html lang="en">', 'download the file itself'),
        (b'\x20\0\0\0\0\0\0\0{"__metadata__":{}}', 'safetensors'),
    ],
)
def test_a_file_that_stands_for_a_checkpoint_is_named_with_the_remedy(tmp_path, content, remedy):
    path = tmp_path / 'a.model'
    path.write_bytes(content)
    with pytest.raises(BadInput, match=f'a.model: .*{remedy}'):
        load_model(path, device='cpu')


# The newest of a run.


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
        message = refusal(capsys, tree, *flags, max_epoch=3)
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
            message = refusal(capsys, tree, max_epoch=3)
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


# score.txt.


def test_score_txt_never_gets_shorter(tree):
    """After the loss of the newest checkpoints the lines of their epochs stay until they return."""
    train(tree, max_epoch=4)
    path = Path(tree['save_path'], 'score.txt')
    whole = path.read_bytes()
    Path(tree['save_path'], 'model/model_0004.model').write_bytes(b'damaged')
    Path(tree['save_path'], 'model/model_0003.model').write_bytes(b'damaged')
    train(tree, max_epoch=3)
    assert [score[0] for score in read_scores(path)] == [1, 2, 3, 4]
    assert path.read_bytes().splitlines()[3] == whole.splitlines()[3]
    train(tree, max_epoch=5)
    assert [score[0] for score in read_scores(path)] == [1, 2, 3, 4, 5]


def test_a_score_txt_without_any_checkpoint_is_refused(two_epochs, capsys):
    """The run would begin again, and its first test would replace the old run's scores."""
    tree, folder = two_epochs
    for path in folder.iterdir():
        path.unlink()
    before = contents(tree['save_path'])
    message = refusal(capsys, tree)
    assert 'score.txt' in message and str(folder) in message
    assert contents(tree['save_path']) == before


def test_the_best_error_rate_is_that_of_the_epochs_before(tree):
    train(tree, max_epoch=3)
    path = Path(tree['save_path'], 'score.txt')
    lines = path.read_text().splitlines(keepends=True)
    lines[2] = tools.SCORE_LINE % (3, 0.001, 1, 1, 0.5, 0.5)
    path.write_text(''.join(lines))
    Path(tree['save_path'], 'model/model_0003.model').write_bytes(b'damaged')
    train(tree, max_epoch=3)
    assert read_scores(path)[2][5] != 0.5
