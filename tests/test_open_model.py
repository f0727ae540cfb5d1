"""Do scripts use the model in exps/open, unless they are given another one?"""

import json
import os
import re
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
from cli import command_line, refusal
from conftest import portable_system, wave, write_wav

from ECAPAModel import load_model
from exps import average, conditions, embed, export, identify, verify
from tools import sha256

quick = pytest.mark.usefixtures('quick_test')


# Which model is used, and what is said about it.


@pytest.fixture
def stand_in(tmp_path, monkeypatch):
    """A small model with a calibration, in the place of exps/open."""
    folder = tmp_path / 'stand-in'
    folder.mkdir()
    portable_system(8).save_parameters(folder / 'open.model')
    calibration = {
        'kind': 'raw',
        'weight': 20.0,
        'bias': -10.0,
        'threshold': {'false_acceptances': 1.0, 'ratio': 1.0},
        'list': {'path': 'dev.txt', 'sha256': '0', 'trials': 100},
        'checkpoint': {
            'path': 'open.model',
            'sha256': sha256((folder / 'open.model').read_bytes()),
        },
        'options': {},
    }
    (folder / 'calibration.json').write_text(json.dumps(calibration))
    for module in (embed, export, conditions):
        monkeypatch.setattr(module, 'OPEN_MODEL', str(folder / 'open.model'))
    monkeypatch.setattr(embed, 'OPEN', str(folder))
    return folder


@pytest.fixture
def recordings(tmp_path):
    """Two recordings of two people: a folder people/NAME/0.wav."""
    for number, name in enumerate(('ann', 'bob')):
        write_wav(tmp_path / 'people' / name / '0.wav', wave(number, 20000))
    return [str(tmp_path / 'people' / name / '0.wav') for name in ('ann', 'bob')]


def scripts_that_use_a_model(recordings, tmp_path):
    """{name: (main of a script, its arguments without a model)}."""
    people = str(Path(recordings[0]).parents[1])
    machine = ['--device', 'cpu', '--n_cpu', '0']
    return {
        'verify': (verify.main, [*recordings, *machine]),
        'identify': (identify.main, [people, '--people', people, *machine]),
        'embed': (embed.main, [people, '--out', str(tmp_path / 'embeddings.npz'), *machine]),
    }


@quick
def test_without_a_model_scripts_use_the_shipped_one_and_name_its_card(
    stand_in, recordings, tmp_path, capsys
):
    for name, (main, arguments) in scripts_that_use_a_model(recordings, tmp_path).items():
        capsys.readouterr()
        main(arguments)
        shown = capsys.readouterr()
        assert str(stand_in / 'open.model') in shown.err, name
        assert str(stand_in / 'README.md') in shown.err, name
        if name == 'verify':
            score = float(re.search(r'score (\S+)', shown.out)[1])
            ratio = float(re.search(r'log-likelihood ratio (\S+)', shown.out)[1])
            assert ratio == pytest.approx(20 * score - 10, abs=0.01)
        if name == 'identify':
            rows = [line.split(',') for line in shown.out.splitlines()]
            assert rows[0][2] == 'probability'
            assert all(0 < float(row[2]) <= 1 for row in rows[1:]), 'its calibration is used'
    vectors = np.load(tmp_path / 'embeddings.npz')['embeddings']
    expected = load_model(stand_in / 'open.model', device='cpu').embed(recordings)
    np.testing.assert_allclose(vectors, expected, atol=1e-6)


@quick
def test_with_initial_model_nothing_of_the_shipped_one_is_used(
    stand_in, recordings, tmp_path, capsys
):
    own = tmp_path / 'own.model'
    portable_system(16).save_parameters(own)
    for name in ('open.model', 'calibration.json'):
        (stand_in / name).write_bytes(b'unreadable')
    for name, (main, arguments) in scripts_that_use_a_model(recordings, tmp_path).items():
        capsys.readouterr()
        main([*arguments, '--initial_model', str(own)])
        shown = capsys.readouterr()
        assert 'stand-in' not in shown.err + shown.out, name
        assert 'likelihood' not in shown.out, name


@pytest.mark.parametrize('fault', ['missing', 'cut', 'changed', 'no calibration'])
def test_a_shipped_model_that_is_not_whole_is_refused(
    stand_in, recordings, tmp_path, capsys, fault
):
    path = stand_in / 'open.model'
    content = path.read_bytes()
    if fault == 'missing':
        path.unlink()
    elif fault == 'cut':
        path.write_bytes(content[: len(content) // 2])
    elif fault == 'changed':
        portable_system(16).save_parameters(path)
    else:
        (stand_in / 'calibration.json').unlink()

    scripts = scripts_that_use_a_model(recordings, tmp_path)
    if find_spec('onnx') and find_spec('onnxruntime'):
        scripts['export'] = (export.main, ['--out', str(tmp_path / 'x.onnx')])
    for name, (main, arguments) in scripts.items():
        message = refusal(capsys, main, arguments)
        assert str(path) in message, name
        assert 'git checkout' in message, name
    assert not (tmp_path / 'embeddings.npz').exists()


def test_half_precision_halves_a_checkpoint(tmp_path, recordings):
    """The vectors stay in float32: float16 has no room for the variances of batch norms."""
    system = portable_system(64)
    whole = tmp_path / 'whole.model'
    half = tmp_path / 'half.model'
    system.save_parameters(whole)
    average.main([str(whole), '--half', '--out', str(half)])
    assert half.stat().st_size < 0.6 * whole.stat().st_size

    expected = system.state_dict()
    for name, tensor in load_model(half, device='cpu').state_dict().items():
        # float16 has 11 significant bits, and steps of 2^-24 near zero.
        is_matrix = tensor.ndim > 1 and 'torchfbank' not in name
        bound = 2**-11 if is_matrix else 0
        np.testing.assert_allclose(tensor, expected[name], rtol=bound, atol=bound * 2**-13)


def test_the_command_does_not_guess_a_model(capsys):
    """--eval writes results, so it scores no model that nobody asked for."""
    import trainECAPAModel

    message = refusal(capsys, trainECAPAModel.main, command_line('--eval', device='cpu'))
    assert '--initial_model' in message


def test_conditions_says_how_to_score_its_lists(tmp_path, capsys):
    for name in ('a/0.wav', 'a/1.wav', 'b/0.wav'):
        write_wav(tmp_path / 'audio' / name, wave(len(name), 20000))
    (tmp_path / 'trials.txt').write_text('1 a/0.wav a/1.wav\n0 a/0.wav b/0.wav\n')
    out = str(tmp_path / 'out')
    places = {'audio': tmp_path / 'audio', 'out': out, 'n_cpu': 0}
    conditions.main([str(tmp_path / 'trials.txt'), *command_line(conditions='short', **places)])
    command = capsys.readouterr().out.splitlines()[-1]
    assert os.path.join('exps', 'open', 'open.model') in command
    assert f'--eval_path {out}/audio' in command
