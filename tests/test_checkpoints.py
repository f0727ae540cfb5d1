"""Which checkpoints load, which are refused, and which can be averaged?"""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from cli import refusal
from conftest import make_system
from damage import NAMES, assert_plain_scores, damage, many, outcome
from hypothesis import given
from hypothesis import strategies as st

from ECAPAModel import load_model
from exps import average
from tools import BadInput

pytestmark = pytest.mark.usefixtures('quick')


@pytest.fixture
def checkpoint(tmp_path):
    path = tmp_path / 'a.model'
    make_system().save_parameters(path)
    return path


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


# score.txt.


# Averages.


@pytest.mark.parametrize('name', ['speaker_encoder.bn1.num_batches_tracked', 'speaker_loss.weight'])
def test_only_tensors_of_one_type_are_averaged(model, tmp_path, capsys, name):
    """An integer one and the half of another would be added."""
    state = torch.load(model)
    other_type = torch.float32
    if state[name].is_floating_point():
        other_type = torch.int64
    state[name] = state[name].to(other_type)
    other = str(tmp_path / 'other.model')
    torch.save(state, other)
    out = str(tmp_path / 'out.model')
    for models in ([model, other], [other, model]):
        assert models[1] in refusal(capsys, average.main, [*models, '--out', out])
        assert not Path(out).exists()


def test_a_checkpoint_is_averaged_once(model, tmp_path, capsys):
    out = str(tmp_path / 'out.model')
    again = model.replace('/model/', '/./model/')
    assert 'MODELS' in refusal(capsys, average.main, [model, again, '--out', out])
    assert not Path(out).exists()


def test_an_encoder_of_another_size_is_refused(checkpoint):
    system = make_system(C=16)
    before = {name: tensor.clone() for name, tensor in system.state_dict().items()}
    with pytest.raises(BadInput, match='a.model.*8.*16'):
        system.load_parameters(checkpoint)
    for name, tensor in system.state_dict().items():
        assert torch.equal(tensor, before[name])


# Damaged and foreign files.


@many(50)
@given(data=st.data())
def test_damaged_checkpoints(small_evaluation, capsys, data):
    """A damaged checkpoint scores as the whole one or not at all.

    It scores where the damage is in a byte that nothing reads.
    """
    good = (small_evaluation / 'a.model').read_bytes()
    at_the_head = damage(good, header=4000)
    at_the_tail = damage(good[::-1], header=9000).map(lambda content: content[::-1])
    path = small_evaluation / 'damaged.model'
    path.write_bytes(data.draw(at_the_head | at_the_tail))

    lines, message = outcome(small_evaluation, capsys, initial_model=path)
    if lines is None:
        assert 'damaged.model' in message
    else:
        assert_plain_scores(small_evaluation, lines)


class Payload:
    """A pickle that runs code when it is loaded."""

    def __reduce__(self):
        return exec, ('raise SystemError("executed")',)


WEIGHT = 'speaker_encoder.layer1.conv1.weight'


def tamper(change):
    """Writes a checkpoint with the state dict of the whole one, after change(state).

    What `change` returns, if anything, takes the place of the state dict.
    """

    def make(folder, path):
        state = torch.load(folder / 'a.model', weights_only=True)
        changed = change(state)
        if changed is not None:
            state = changed
        torch.save(state, path)

    return make


def other_channels(state):
    state['speaker_encoder.conv1.weight'] = torch.zeros(16, 80, 5)


def a_tensor_more(state):
    state['speaker_encoder.extra'] = torch.zeros(1)


def a_tensor_less(state):
    del state[WEIGHT]


def a_nan(state):
    state[WEIGHT].view(-1)[3] = float('nan')


def an_infinity(state):
    state[WEIGHT].view(-1)[3] = float('inf')


def old_code(folder, path):
    torch.save(Payload(), path, _use_new_zipfile_serialization=False)


FOREIGN = {
    'empty': lambda folder, path: path.write_bytes(b''),
    'audio': lambda folder, path: shutil.copy(folder / 'eval' / NAMES[0], path),
    'an archive': lambda folder, path: np.savez(open(path, 'wb'), a=1),
    'code': lambda folder, path: torch.save({'a': Payload()}, path),
    'old code': old_code,
    'a list': lambda folder, path: torch.save([1], path),
    'a module': lambda folder, path: torch.save(torch.nn.Linear(2, 2), path),
    'nested': tamper(lambda state: {'model': state}),
    'other channels': tamper(other_channels),
    'a tensor more': tamper(a_tensor_more),
    'a tensor less': tamper(a_tensor_less),
    'a NaN': tamper(a_nan),
    'an infinity': tamper(an_infinity),
}
NAMED = {'a tensor more': 'extra', 'a tensor less': WEIGHT, 'a NaN': WEIGHT, 'an infinity': WEIGHT}


@pytest.mark.parametrize('kind', FOREIGN)
def test_a_foreign_checkpoint_is_refused(small_evaluation, capsys, kind):
    path = small_evaluation / 'damaged.model'
    path.unlink(missing_ok=True)
    FOREIGN[kind](small_evaluation, path)
    lines, message = outcome(small_evaluation, capsys, initial_model=path)
    assert lines is None
    assert path.name in message and NAMED.get(kind, '') in message
