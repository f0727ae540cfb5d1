"""From a checkpoint to a decision: lists as they come, calibration, provenance, ONNX."""

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import command_line, portable_system, wave, write_wav

import tools
import trainECAPAModel
from dataLoader import choose_cohort, read_trial_lists
from ECAPAModel import load_model
from exps import calibrate, export
from tools import BadInput

ROOT = Path(__file__).parents[1]
short = pytest.mark.usefixtures('short_crops')


@pytest.fixture
def model(tmp_path):
    """A checkpoint whose every weight follows from its name."""
    (tmp_path / 'exp/model').mkdir(parents=True)
    portable_system(8).save_parameters(tmp_path / 'exp/model/model_0001.model')
    return str(tmp_path / 'exp/model/model_0001.model')


def run(*flags, **options):
    trainECAPAModel.main(command_line(*flags, device='cpu', n_cpu=0, **options))


def record_of(folder):
    return json.loads(Path(folder, 'results.json').read_text())


# Trial lists as they come.


LAYOUTS = {
    'label first, in words': lambda label, a, b: f'{"target" if label == "1" else "nontarget"} {a} {b}',
    'label last, a digit': lambda label, a, b: f'{a} {b} {label}',
    'label last, in words': lambda label, a, b: f'{a}\t{b}   {"target" if label == "1" else "nontarget"}',
}


@pytest.mark.parametrize('layout', LAYOUTS)
def test_a_list_of_any_layout_is_the_same_list(tree, tmp_path, layout):
    _, (usual,) = read_trial_lists([tree['eval_list']], [tree['eval_path']])
    lines = [LAYOUTS[layout](*line.split()) for line in Path(tree['eval_list']).read_text().splitlines()]
    (tmp_path / 'other.txt').write_text('\n'.join(lines) + '\n')
    _, (other,) = read_trial_lists([str(tmp_path / 'other.txt')], [tree['eval_path']])
    for name in ('labels', 'pairs', 'rows', 'starts'):
        np.testing.assert_array_equal(getattr(other, name), getattr(usual, name))
    assert other.names == usual.names


def test_a_label_elsewhere_is_named_by_its_line(tree, tmp_path):
    path = tmp_path / 'mixed.txt'
    path.write_text('a.wav b.wav target\na.wav c.wav nontarget\n1 a.wav b.wav\na.wav c.wav impostor\n')
    with pytest.raises(BadInput) as error:
        read_trial_lists([str(path)], [tree['eval_path']])
    assert all(f'{path}, line {number}: a label is 1 or target' in str(error.value) for number in (3, 4))
    assert 'line 1' not in str(error.value)


@short
def test_models_are_enrolled_by_the_mean_of_their_utterances(tree, model, tmp_path):
    name = 'id{}/session/{:05d}.wav'.format
    # Of a model's two lines both count; the second model is called as one of the files that are tested.
    models = f'anna {name(0, 0)} {name(0, 1)}\n{name(2, 0)} {name(1, 0)}\n\nanna {name(0, 2)}\n'
    (tmp_path / 'models.txt').write_text(models)
    trials = f'anna {name(1, 1)} nontarget\n{name(2, 0)} {name(1, 2)} target\nanna {name(2, 0)} nontarget\n'
    (tmp_path / 'cn.txt').write_text(trials)
    options = {'initial_model': model, 'eval_path': tree['eval_path'], 'save_path': tree['save_path']}
    options |= {'train_list': tree['train_list'], 'train_path': tree['train_path']}
    run('--eval', '--subtract_mean', eval_list=tmp_path / 'cn.txt', enrol_list=tmp_path / 'models.txt', **options)
    found = [line.split() for line in Path(tree['save_path'], 'scores/cn.txt').read_text().splitlines()]
    assert [row[3:] for row in found] == [line.split()[:2] for line in trials.splitlines()]

    system = load_model(model, device='cpu')
    vectors = system.embed_files([f'{tree["eval_path"]}/{name(s, n)}' for s in range(3) for n in range(3)])
    whole, crops = vectors[:, 0], vectors[:, 1]
    centre = system.cohort(choose_cohort(tree['train_list'], tree['train_path'], 20, 10)).mean(axis=0)
    for row, enrolled, test in ((found[0], [0, 1, 2], 4), (found[1], [3], 5), (found[2], [0, 1, 2], 6)):
        mean = whole[enrolled].mean(axis=0)
        raw = 0.5 * mean @ whole[test] / np.linalg.norm(mean) + 0.5 * np.mean(crops[enrolled] @ crops[test])
        sides = [vectors[enrolled].mean(axis=0) - centre, vectors[test] - centre]
        a, b = (side / np.linalg.norm(side, axis=1, keepdims=True) for side in sides)
        assert [float(score) for score in row[1:3]] == pytest.approx([raw, 0.5 * np.sum(a * b)], abs=2e-5)


def test_a_model_that_is_not_enrolled_is_named_by_its_line(tree, tmp_path):
    (tmp_path / 'models.txt').write_text('anna id0/session/00000.wav\n')
    (tmp_path / 'cn.txt').write_text('anna id1/session/00000.wav 0\nberta id1/session/00000.wav 1\n')
    lists = [str(tmp_path / 'cn.txt')], [tree['eval_path']]
    with pytest.raises(BadInput, match=r'cn.txt, line 2: --enrol_list has no model berta'):
        read_trial_lists(*lists, str(tmp_path / 'models.txt'))
    (tmp_path / 'models.txt').write_text('anna id0/session/00000.wav\nberta\n')
    with pytest.raises(BadInput, match=r'models.txt, line 2: 2 fields expected, 1 found'):
        read_trial_lists(*lists, str(tmp_path / 'models.txt'))


# Calibration.


def gaussian_trials(count, distance=4.0):
    """Scores whose log-likelihood ratio is distance * score: two Gaussians of deviation 1 around +-distance / 2."""
    random = np.random.default_rng(0)
    labels = (np.arange(count) % 5 == 0).astype(np.int8)
    return random.standard_normal(count) + distance * (labels - 0.5), labels


def test_calibration_finds_the_likelihood_ratio():
    scores, labels = gaussian_trials(50000)
    (weight,), bias = calibrate.fit(3 * scores[:, None] + 7, labels)
    # Standard errors of the two are about 1.5 %.
    assert 3 * weight == pytest.approx(4, rel=0.05) and bias + 7 * weight == pytest.approx(0, abs=0.1)
    with pytest.raises(BadInput, match='are the labels right'):
        calibrate.fit(scores[:, None], 1 - labels)


def test_a_quality_measure_that_says_something_is_used():
    random = np.random.default_rng(1)
    seconds = random.uniform(1, 10, 400)
    pairs = random.integers(400, size=(20000, 2))
    labels = (np.arange(20000) % 2).astype(np.int8)
    shortest = seconds[pairs].min(axis=1)
    scores = random.standard_normal(20000) + (labels - 0.5) * 2 + 0.5 * shortest
    inputs = tools.calibration_inputs(scores, [seconds], pairs)
    np.testing.assert_array_equal(inputs[:, 1], shortest)
    weights, bias = calibrate.fit(inputs, labels)
    assert weights[1] / weights[0] == pytest.approx(-0.5, abs=0.05) and abs(weights[2]) < 0.05
    alone = calibrate.fit(inputs[:, :1], labels)
    costs = [tools.calibration_figures(ratios, labels)['Cllr']['value'] for ratios in (
        inputs @ weights + bias, inputs[:, 0] * alone[0][0] + alone[1]
    )]  # fmt: skip
    assert costs[0] < 0.9 * costs[1]


def slow_figures(ratios, labels):
    """Cllr, minCllr and the actual costs by loops, as their definitions have them."""

    def cllr(ratios):
        sides = {1: [], 0: []}
        for ratio, label in zip(ratios, labels):
            sides[label].append(np.log2(1 + np.exp(-ratio if label else ratio)))
        return (np.mean(sides[1]) + np.mean(sides[0])) / 2

    order = np.argsort(ratios)
    blocks = []  # [targets, trials] of neighbouring scores, pooled while their shares of targets do not rise
    for label in labels[order]:
        blocks.append([int(label), 1])
        while len(blocks) > 1 and blocks[-2][0] * blocks[-1][1] >= blocks[-1][0] * blocks[-2][1]:
            last = blocks.pop()
            blocks[-1] = [blocks[-1][0] + last[0], blocks[-1][1] + last[1]]
    odds = labels.sum() / (len(labels) - labels.sum())
    best = np.empty(len(labels))
    with np.errstate(divide='ignore'):
        pooled = [np.log(np.float64(t) / (n - t) / odds) if t < n else np.inf for t, n in blocks for _ in range(n)]
    best[order] = pooled
    figures = {'Cllr': cllr(ratios), 'minCllr': cllr(best)}
    for prior in (0.01, 0.05):
        cost = [prior * (ratio <= np.log((1 - prior) / prior)) / labels.sum() if label
                else (1 - prior) * (ratio > np.log((1 - prior) / prior)) / (len(labels) - labels.sum())
                for ratio, label in zip(ratios, labels)]  # fmt: skip
        figures[f'actDCF({prior})'] = sum(cost) / prior
    return figures


def test_calibration_figures_equal_loops():
    scores, labels = gaussian_trials(2000, distance=2.0)
    ratios = 1.5 * scores - 1
    found = {name: figure['value'] for name, figure in tools.calibration_figures(ratios, labels).items()}
    assert found == pytest.approx(slow_figures(ratios, labels), abs=1e-9)
    assert found['minCllr'] < found['Cllr']
    again = tools.calibration_figures(ratios**3 + 5, labels)['minCllr']['value']
    assert again == pytest.approx(found['minCllr'], abs=1e-9), 'the least cost is that of every monotone function'
    apart = tools.calibration_figures(np.where(labels == 1, 9.0, -9.0), labels)
    assert apart['minCllr']['value'] == 0 and apart['actDCF(0.01)']['value'] == 0


@pytest.fixture
def calibrated(tree, model, tmp_path):
    """The options of an evaluation of a model, after calibrate on trials whose labels go with the scores."""
    options = {'initial_model': model, 'eval_path': tree['eval_path'], 'save_path': tree['save_path']}
    run('--eval', eval_list=tree['eval_list'], **options)
    rows = [line.split() for line in Path(tree['save_path'], 'scores/trials.txt').read_text().splitlines()]
    scores, random = np.array([float(row[1]) for row in rows]), np.random.default_rng(5)
    odds = (scores - np.median(scores)) / scores.std() + random.logistic(size=len(scores))
    labels = (odds > np.median(odds)).astype(int)
    lines = [f'{label} {a} {b}\n' for label, (_, _, a, b) in zip(labels, rows)]
    (tmp_path / 'fit.txt').write_text(''.join(lines))
    (tmp_path / 'test.txt').write_text(''.join(lines[::-1][:60]))
    calibrate.main(command_line(device='cpu', n_cpu=0, eval_list=tmp_path / 'fit.txt', **options, false_acceptances=20))
    return options


@short
def test_calibration_by_command(tree, calibrated, tmp_path, capsys):
    stored = json.loads(Path(f'{calibrated["initial_model"]}.calibration.json').read_text())
    assert (stored['list']['path'], stored['list']['trials']) == (str(tmp_path / 'fit.txt'), 66)
    assert 'exps.calibrate' in stored['command'] and stored['versions']['torch']
    run('--eval', eval_list=tmp_path / 'test.txt', **calibrated)
    header = capsys.readouterr().out.splitlines()[-2]
    rows = [line.split() for line in Path(tree['save_path'], 'scores/test.txt').read_text().splitlines()]
    labels, scores, ratios = np.array([row[:3] for row in rows], float).T
    # The file's scores have six decimals.
    expected, rounding = scores * stored['weights'][0] + stored['bias'], 1e-6 * stored['weights'][0] + 1e-6
    np.testing.assert_allclose(ratios, expected, atol=rounding)
    figures = record_of(tree['save_path'])['lists'][str(tmp_path / 'test.txt')]['calibrated']
    for name, value in slow_figures(ratios, labels.astype(int)).items():
        assert figures[name]['value'] == pytest.approx(value, abs=1e-5)
        assert f'calibrated {name}' in header
    accepted = np.mean(ratios[labels == 0] > stored['threshold']['ratio'] + 1e-6)
    assert accepted == pytest.approx(0.2, abs=0.1), 'nine tenths of the trials that it was fitted on'


@short
def test_verify_decides_by_the_calibration(tree, calibrated, capsys):
    stored = json.loads(Path(f'{calibrated["initial_model"]}.calibration.json').read_text())
    pair = [f'{tree["eval_path"]}/id{n}/session/00000.wav' for n in (0, 1)]
    options = {'initial_model': calibrated['initial_model'], 'save_path': tree['save_path']}
    for prior, miss, false in ((0.5, 1, 1), (0.001, 1, 1), (0.999, 1, 1), (0.5, 1000, 0.001), (0.5, 0.001, 1000)):
        capsys.readouterr()
        run('--verify', *pair, **options, p_target=prior, c_miss=miss, c_fa=false)
        lines = capsys.readouterr().out.splitlines()
        score, ratio = float(lines[0].split()[1]), float(lines[1].split()[2])
        expected = score * stored['weights'][0] + stored['bias']
        assert ratio == pytest.approx(expected, abs=0.01 + 1e-4 * abs(stored['weights'][0]))
        odds = np.exp(ratio) * prior / (1 - prior)
        assert float(re.search(r'probability of the same speaker (\S+),', lines[2])[1]) == pytest.approx(
            odds / (1 + odds), abs=0.02
        )
        assert lines[3].startswith('the same speaker' if odds * miss > false else 'different speakers')
        assert lines[4].startswith('the same' if expected > stored['threshold']['ratio'] else 'different')


@short
def test_a_calibration_is_not_used_where_it_does_not_belong(tree, calibrated, tmp_path, capsys):
    path = Path(f'{calibrated["initial_model"]}.calibration.json')
    stored = json.loads(path.read_text())
    lines = (tmp_path / 'fit.txt').read_text().splitlines()
    lines = [' '.join([*line.split()[1:], 'target' if line[0] == '1' else 'nontarget']) for line in lines]
    (tmp_path / 'again.txt').write_text('\n\n'.join(sorted(lines)))
    lists = [tmp_path / name for name in ('fit.txt', 'test.txt', 'again.txt')]
    run('--eval', '--eval_list', *map(str, lists), **calibrated)
    output, entries = capsys.readouterr().out, record_of(tree['save_path'])['lists']
    assert ['calibrated' in entries[str(path)] for path in lists] == [False, True, False]
    assert [f'not calibrated: {path}' in output for path in lists] == [True, False, True]
    rows = [line.split()[2:] for line in output.splitlines()[-3:]]
    assert [row.count('-') for row in rows] == [7, 0, 7] and len({len(row) for row in rows}) == 1
    for change in ({'kind': 'asnorm'}, {'checkpoint': {'sha256': ''}}, {'cohort': 'another'}):
        path.write_text(json.dumps({**stored, **change}))
        run('--eval', eval_list=tmp_path / 'test.txt', **calibrated)
        output = capsys.readouterr().out
        assert f'not calibrated: {path} is for other weights or options: {stored["command"]}' in output
        assert 'calibrated EER' not in output
    path.write_text('{"kind": 3}')
    with pytest.raises(SystemExit) as stop:
        run('--eval', eval_list=tmp_path / 'test.txt', **calibrated)
    assert stop.value.code == 2 and 'not what exps.calibrate writes' in capsys.readouterr().err


@short
def test_calibration_with_quality_measures_and_a_cohort(tree, calibrated, tmp_path, capsys):
    options = {**calibrated, 'train_list': tree['train_list'], 'train_path': tree['train_path'], 'score_norm': 'asnorm'}
    flags = ['--quality', 'duration', 'size', 'cohort', '--subtract_mean', '--kind', 'centred asnorm']
    calibrate.main([*flags, *command_line(device='cpu', n_cpu=0, eval_list=tmp_path / 'fit.txt', **options)])
    stored = json.loads(Path(f'{calibrated["initial_model"]}.calibration.json').read_text())
    assert (len(stored['weights']), stored['kind']) == (7, 'centred asnorm')
    run('--eval', '--subtract_mean', eval_list=tmp_path / 'test.txt', **options)
    figures = record_of(tree['save_path'])['lists'][str(tmp_path / 'test.txt')]
    assert list(figures)[2:7] == ['raw', 'asnorm', 'centred', 'centred asnorm', 'calibrated']

    # One trial's ratio from the definitions.
    label, *scores, ratio, first, second = (
        Path(tree['save_path'], 'scores/test.txt').read_text().splitlines()[0].split()
    )
    system = load_model(calibrated['initial_model'], device='cpu')
    files = choose_cohort(tree['train_list'], tree['train_path'], 20, 10)
    cohort = system.cohort(files)
    vectors, quality = system.embed_with_quality([f'{tree["eval_path"]}/{name}' for name in (first, second)])
    inputs = [float(scores[3])]
    for measure in (
        np.log(50000 / 16000) * np.ones(2),
        quality[:, 1],
        np.einsum('fvd,svd->fs', vectors, cohort).mean(1) / 2,
    ):
        inputs += sorted(measure)
    assert float(ratio) == pytest.approx(
        np.dot(inputs, stored['weights']) + stored['bias'], abs=1e-3 * np.abs(stored['weights']).max()
    )

    capsys.readouterr()
    run('--eval', '--subtract_mean', eval_list=tmp_path / 'test.txt', **options, cohort_utterances=1)
    assert 'for other weights or options' in capsys.readouterr().out
    flags = ['--quality', 'cohort', '--kind', 'raw']
    calibrate.main([*flags, *command_line(device='cpu', n_cpu=0, eval_list=tmp_path / 'fit.txt', **options)])
    run('--eval', eval_list=tmp_path / 'test.txt', **calibrated)
    assert 'for other weights or options' in capsys.readouterr().out, 'raw scores, but a measure that AS-norm makes'


@short
@pytest.mark.parametrize(
    'options, message',
    [
        ({}, '--initial_model, a checkpoint, and --eval_list'),
        ({'eval_list': 'few.txt', 'initial_model': 'MODEL'}, 'few.txt: 30 trials of either kind'),
        ({'eval_list': 'fit.txt', 'initial_model': 'MODEL', 'kind': 'asnorm'}, '--kind asnorm: the options make raw'),
        ({'eval_list': 'fit.txt', 'initial_model': 'MODEL', 'quality': 'cohort'}, 'comes with --score_norm asnorm'),
    ],
)
def test_a_calibration_that_cannot_be_is_refused(tree, model, tmp_path, monkeypatch, capsys, options, message):
    monkeypatch.chdir(tmp_path)
    lines = Path(tree['eval_list']).read_text().splitlines()
    Path('few.txt').write_text('\n'.join(lines) + '\n')
    Path('fit.txt').write_text(
        '\n'.join(f'{n % 2} {" ".join(line.split()[1:])}' for n, line in enumerate(lines)) + '\n'
    )
    options = {name: model if value == 'MODEL' else value for name, value in options.items()}
    with pytest.raises(SystemExit) as stop:
        calibrate.main(command_line(device='cpu', n_cpu=0, eval_path=tree['eval_path'], **options))
    assert stop.value.code == 2 and message in capsys.readouterr().err
    assert not Path(f'{model}.calibration.json').exists()


# What a run was.


@short
def test_a_run_says_what_it_was(tree, capsys):
    git = ['git', 'rev-parse', 'HEAD']
    commit = subprocess.run(git, cwd=ROOT, capture_output=True, text=True).stdout.strip() or 'unknown'
    run(**tree, C=8, num_frames=20, batch_size=4, max_epoch=1)
    log = capsys.readouterr().out.splitlines()[:3]
    assert re.fullmatch(r'command +python trainECAPAModel.py .*--batch_size 4.*', log[0])
    assert re.fullmatch(rf'commit +{commit}(-dirty)?', log[1])
    assert re.fullmatch(r'versions +python 3\S+, torch 2\S+, torchaudio .*', log[2])
    options = Path(tree['save_path'], 'options.txt').read_text()
    assert '# command python trainECAPAModel.py' in options and f'# commit {commit}' in options
    model = f'{tree["save_path"]}/model/model_0001.model'
    run('--eval', initial_model=model, **{name: tree[name] for name in ('eval_list', 'eval_path', 'save_path')})
    record = record_of(tree['save_path'])
    assert record['commit'].startswith(commit) and '--eval' in record['command'] and record['versions']['python']


# ONNX.


def test_this_pytorch_still_exports():
    """By the exporter that exps.export uses, which PyTorch calls deprecated. Where this fails, it is gone."""
    onnx = pytest.importorskip('onnx')
    graph = onnx.load_from_string(export.to_onnx(portable_system(8).eval()))
    onnx.checker.check_model(graph, full_check=True)
    assert [opset.version for opset in graph.opset_import] == [export.OPSET]


def test_the_ten_lines_of_the_readme_verify_with_onnxruntime(tmp_path, monkeypatch, capsys):
    pytest.importorskip('onnxruntime')
    system = portable_system(16)
    system.save_parameters(tmp_path / 'x.model')
    monkeypatch.chdir(tmp_path)
    export.main(['x.model', '--out', 'ecapa.onnx'])
    assert len(re.findall('largest difference', capsys.readouterr().out)) == 5
    for number, name in enumerate(('one.wav', 'other.wav')):
        write_wav(name, 0.3 * wave(number, 40000 + 7000 * number), subtype='PCM_16')
    blocks = re.findall(r'```python\n(.*?)```', (ROOT / 'README.md').read_text(), re.DOTALL)
    (lines,) = [block for block in blocks if 'onnxruntime' in block]
    assert sum(map(bool, lines.splitlines())) == 10
    # In a process of its own, which must not import PyTorch.
    lines += "import sys\nassert 'torch' not in sys.modules\n"
    found = float(subprocess.run([sys.executable, '-c', lines], check=True, capture_output=True, text=True).stdout)
    a, b = load_model('x.model', device='cpu').embed(['one.wav', 'other.wav'])
    assert found == pytest.approx(a @ b, abs=1e-4)

    import onnx

    facts = {entry.key: entry.value for entry in onnx.load('ecapa.onnx').metadata_props}
    assert facts['sha256'] == tools.digest(Path('x.model').read_bytes()) and 'torch 2' in facts['versions']


def test_an_onnx_file_that_differs_is_not_written(tmp_path, monkeypatch, capsys):
    pytest.importorskip('onnxruntime')
    torch.manual_seed(0)
    portable_system(8).save_parameters(tmp_path / 'x.model')
    usual = export.to_onnx

    def spoilt(system):
        content = usual(system)
        with torch.no_grad():
            system.speaker_encoder.fc6.weight.mul_(1 + 0.01 * torch.randn(192, 3072))
        return content

    monkeypatch.setattr(export, 'to_onnx', spoilt)
    with pytest.raises(SystemExit) as stop:
        export.main([str(tmp_path / 'x.model'), '--out', str(tmp_path / 'x.onnx')])
    assert stop.value.code == 2 and 'differs by more than' in capsys.readouterr().err
    assert not (tmp_path / 'x.onnx').exists()
