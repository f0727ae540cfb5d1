"""How is a score made a decision: calibration, its figures, and exps.verify?"""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from cli import command_line, evaluate, refusal
from conftest import portable_system

import tools
import trainECAPAModel
from exps import calibrate, compare, scoring, verify
from tools import BadInput

pytestmark = pytest.mark.usefixtures('quick')
ROOT = Path(__file__).parents[1]


@pytest.fixture
def model(tmp_path):
    """A checkpoint whose every weight follows from its name."""
    path = tmp_path / 'exp/model/model_0001.model'
    path.parent.mkdir(parents=True)
    portable_system(8).save_parameters(path)
    return str(path)


def run(*flags, **options):
    trainECAPAModel.main(command_line(*flags, device='cpu', n_cpu=0, **options))


def name_of(speaker, number):
    return f'id{speaker}/session/{number:05d}.wav'


# Calibration.


def gaussian_trials(count, distance=4.0):
    """Scores whose log-likelihood ratio is distance * score, and labels.

    Two Gaussians of deviation 1 around +-distance / 2.
    """
    random = np.random.default_rng(0)
    labels = (np.arange(count) % 5 == 0).astype(np.int8)
    return random.standard_normal(count) + distance * (labels - 0.5), labels


def test_calibration_finds_the_likelihood_ratio():
    scores, labels = gaussian_trials(50000)
    weight, bias = calibrate.fit(3 * scores + 7, labels)
    # Standard errors of the two are about 1.5 %.
    assert 3 * weight == pytest.approx(4, rel=0.05)
    assert bias + 7 * weight == pytest.approx(0, abs=0.1)
    with pytest.raises(BadInput, match='labels'):
        calibrate.fit(scores, 1 - labels)


def slow_cllr(ratios, labels):
    """Cllr by a loop, as it is defined."""
    sides = {1: [], 0: []}
    for ratio, label in zip(ratios, labels):
        signed = -ratio if label else ratio
        sides[label].append(np.log2(1 + np.exp(signed)))
    return (np.mean(sides[1]) + np.mean(sides[0])) / 2


def slow_monotone_ratios(ratios, labels):
    """The best log-likelihood ratios that rise with `ratios`; neighbours that fall are pooled."""
    order = np.argsort(ratios)
    blocks = []  # [targets, trials] of neighbouring scores
    for label in labels[order]:
        blocks.append([int(label), 1])
        while len(blocks) > 1 and blocks[-2][0] * blocks[-1][1] >= blocks[-1][0] * blocks[-2][1]:
            targets, trials = blocks.pop()
            blocks[-1][0] += targets
            blocks[-1][1] += trials
    odds = labels.sum() / (len(labels) - labels.sum())
    pooled = []
    with np.errstate(divide='ignore'):
        for targets, trials in blocks:
            block_odds = np.inf
            if targets < trials:
                block_odds = np.float64(targets) / (trials - targets)
            pooled += [np.log(block_odds / odds)] * trials
    best = np.empty(len(labels))
    best[order] = pooled
    return best


def slow_figures(ratios, labels):
    """Cllr, minCllr and the actual costs by loops, as their definitions have them."""
    figures = {'Cllr': slow_cllr(ratios, labels)}
    figures['minCllr'] = slow_cllr(slow_monotone_ratios(ratios, labels), labels)
    targets = labels.sum()
    for prior in (0.01, 0.05):
        threshold = np.log((1 - prior) / prior)
        cost = 0
        for ratio, label in zip(ratios, labels):
            if label and ratio <= threshold:
                cost += prior / targets
            if not label and ratio > threshold:
                cost += (1 - prior) / (len(labels) - targets)
        figures[f'actDCF({prior})'] = cost / prior
    return figures


def test_calibration_figures_equal_loops():
    scores, labels = gaussian_trials(2000, distance=2.0)
    ratios = 1.5 * scores - 1
    figures = calibrate.calibration_figures(ratios, labels)
    values = {name: figure['value'] for name, figure in figures.items()}
    assert values == pytest.approx(slow_figures(ratios, labels), abs=1e-9)
    assert values['minCllr'] < values['Cllr']
    again = calibrate.calibration_figures(ratios**3 + 5, labels)['minCllr']['value']
    assert again == pytest.approx(values['minCllr'], abs=1e-9), 'that of every monotone function'
    apart = calibrate.calibration_figures(np.where(labels == 1, 9.0, -9.0), labels)
    assert apart['minCllr']['value'] == 0
    assert apart['actDCF(0.01)']['value'] == 0


@pytest.fixture
def scored(tree, model, tmp_path):
    """Options of an evaluation that wrote scores of two lists, whose labels go with the scores.

    The lists are fit.txt, 66 trials, and test.txt, 60 of these.
    """
    options = {**tree, 'initial_model': model, 'score_norm': 'asnorm'}
    run('--eval', **options)
    path = Path(tree['save_path'], 'scores/trials.txt')
    rows = [line.split() for line in path.read_text().splitlines()]
    scores = np.array([float(row[1]) for row in rows])
    random = np.random.default_rng(5)
    odds = (scores - np.median(scores)) / scores.std() + random.logistic(size=len(scores))
    labels = (odds > np.median(odds)).astype(int)
    lines = [f'{label} {row[-2]} {row[-1]}\n' for label, row in zip(labels, rows)]
    Path(tree['save_path'], 'results.json').unlink()
    (tmp_path / 'fit.txt').write_text(''.join(lines))
    (tmp_path / 'test.txt').write_text(''.join(lines[::-1][:60]))
    both = [tmp_path / 'fit.txt', tmp_path / 'test.txt']
    run('--eval', **{**options, 'eval_list': both})
    del options['eval_list']
    return options


def read_calibration(options):
    return json.loads(Path(options['save_path'], 'calibration.json').read_text())


def test_calibration_of_written_scores(scored, tmp_path, capsys):
    capsys.readouterr()
    arguments = ['--fit', 'fit', '--kind', 'raw', '--false_acceptances', '20']
    calibrate.main([scored['save_path'], *arguments])
    output = capsys.readouterr().out.splitlines()
    calibration = read_calibration(scored)
    assert calibration['list']['path'] == str(tmp_path / 'fit.txt')
    assert calibration['list']['trials'] == 66
    assert 'exps.calibrate' in calibration['command']
    assert calibration['versions']['torch']

    labels, scores, _ = scoring.read_trial_scores(Path(scored['save_path'], 'scores/test.txt'))
    ratios = calibration['weight'] * scores[:, 0] + calibration['bias']
    figures = dict(zip(output[-2].split(), output[-1].split()))
    assert (figures['list'], figures['trials']) == (str(tmp_path / 'test.txt'), '60')
    for name, value in slow_figures(ratios, labels).items():
        assert float(figures[name]) == pytest.approx(value, abs=6e-5)
    raw = tools.operating_points(scores[:, 0], labels)
    assert figures['EER'] == f'{raw["EER"]["value"]:.2f}%', 'a line keeps the order of scores'
    accepted = np.mean(ratios[labels == 0] > calibration['threshold']['ratio'] + 1e-6)
    assert accepted == pytest.approx(0.2, abs=0.1), 'nine tenths of the trials it was fitted on'


def test_compare_shows_cllr_of_the_scores_that_a_calibration_is_for(scored, tmp_path, capsys):
    calibrate.main([scored['save_path'], '--fit', 'fit'])
    calibration = read_calibration(scored)
    labels, scores, _ = scoring.read_trial_scores(Path(scored['save_path'], 'scores/test.txt'))
    expected = slow_figures(calibration['weight'] * scores[:, 1] + calibration['bias'], labels)

    def costs():
        capsys.readouterr()
        path = str(Path(scored['save_path'], 'results.json'))
        compare.main([path, '--out', str(tmp_path / 'pictures')])
        header, *rows = capsys.readouterr().out.split('\n\n')[1].splitlines()[:5]
        names = re.split('  +', header)
        if 'Cllr' not in names:
            return {}
        found = {}
        for row in rows:
            cells = dict(zip(names, re.split('  +', row)))
            if cells['Cllr'] != '-':
                found[cells['list'], cells['kind']] = float(cells['Cllr'])
        return found

    assert costs() == {('test', 'asnorm'): pytest.approx(expected['Cllr'], abs=6e-5)}
    run('--eval', '--top_n', '3', eval_list=tmp_path / 'test.txt', **scored)
    assert costs() == {}, 'it is for scores with another --top_n'


def test_the_last_kind_is_calibrated_and_a_moved_folder_is_read(scored, tmp_path, capsys):
    moved = Path(scored['save_path']).rename(tmp_path / 'moved')
    calibrate.main([str(moved), '--fit', str(tmp_path / 'test.txt')])
    calibration = json.loads((moved / 'calibration.json').read_text())
    labels, scores, _ = scoring.read_trial_scores(moved / 'scores/test.txt')
    weight, bias = calibrate.fit(scores[:, 1], labels)
    assert calibration['kind'] == 'asnorm'
    assert [calibration['weight'], calibration['bias']] == pytest.approx([weight, bias])


def test_lists_that_a_calibration_is_not_for_are_left_out(scored, tree, tmp_path, capsys):
    """The same trials in another layout, another checkpoint's, and those without the kind.

    That layout has the label last, the sides swapped, ./ before files, and a trial twice.
    """
    lines = (tmp_path / 'fit.txt').read_text().splitlines()
    turned = []
    for line in [*lines, lines[0]]:
        label, enrolment, test = line.split()
        word = {'1': 'target', '0': 'nontarget'}[label]
        turned.append(f'./{test} {enrolment} {word}')
    (tmp_path / 'again.txt').write_text('\n\n'.join(sorted(turned)))
    run('--eval', eval_list=tmp_path / 'again.txt', **scored)
    (tmp_path / 'raw.txt').write_text('\n'.join(lines[:50]))
    run('--eval', eval_list=tmp_path / 'raw.txt', **{**scored, 'score_norm': 'none'})
    other = tmp_path / 'other.model'
    torch.manual_seed(0)
    portable_system(16).save_parameters(other)
    (tmp_path / 'other.txt').write_text('\n'.join(lines[:50]))
    run('--eval', eval_list=tmp_path / 'other.txt', **{**scored, 'initial_model': other})
    capsys.readouterr()
    calibrate.main([scored['save_path'], '--fit', 'fit'])
    output = capsys.readouterr().out
    for name in ('again', 'raw', 'other'):
        assert f'not calibrated: {tmp_path}/{name}.txt' in output
    assert re.search(f'{tmp_path}/test.txt .*60 of its 60', output), 'it is too easy'
    _, table = output.split('\nlist ')
    assert [row.split()[0] for row in table.splitlines()[1:]] == [str(tmp_path / 'test.txt')]


def test_verify_decides_by_the_calibration(tree, scored, capsys):
    calibrate.main([scored['save_path'], '--fit', 'fit', '--kind', 'raw'])
    calibration = read_calibration(scored)
    pair = [f'{tree["eval_path"]}/{name_of(n, 0)}' for n in (0, 1)]
    model = scored['initial_model']
    for prior, miss, false in (
        (0.5, 1, 1),
        (0.001, 1, 1),
        (0.999, 1, 1),
        (0.5, 1000, 0.001),
        (0.5, 0.001, 1000),
    ):
        capsys.readouterr()
        options = {'p_target': prior, 'c_miss': miss, 'c_fa': false, 'device': 'cpu'}
        verify.main([*pair, *command_line(initial_model=model, n_cpu=0, **options)])
        lines = capsys.readouterr().out.splitlines()
        score = float(lines[0].split()[1])
        ratio = float(lines[1].split()[2])
        expected = score * calibration['weight'] + calibration['bias']
        assert ratio == pytest.approx(expected, abs=0.01 + 1e-4 * abs(calibration['weight']))
        odds = np.exp(ratio) * prior / (1 - prior)
        probability = float(re.search(r'probability of the same speaker (\S+),', lines[2])[1])
        assert probability == pytest.approx(odds / (1 + odds), abs=0.02)
        same = odds * miss > false
        assert lines[3].startswith('the same speaker' if same else 'different speakers')
        same = expected > calibration['threshold']['ratio']
        assert lines[4].startswith('the same speaker' if same else 'different speakers')


def test_verify_says_why_a_calibration_does_not_belong(tree, scored, capsys):
    calibrate.main([scored['save_path'], '--fit', 'fit'])
    path = Path(scored['save_path'], 'calibration.json')
    calibration = read_calibration(scored)
    pair = [f'{tree["eval_path"]}/{name_of(n, 0)}' for n in (0, 1)]
    names = ('initial_model', 'train_list', 'train_path')
    arguments = [*pair, *command_line(device='cpu', n_cpu=0, **{n: scored[n] for n in names})]
    normalised = [*arguments, '--score_norm', 'asnorm']

    capsys.readouterr()
    verify.main(normalised)
    assert 'log-likelihood ratio' in capsys.readouterr().out
    for extra, words in (
        (arguments, 'asnorm'),
        ([*normalised, '--top_n', '3'], '--top_n 400'),
        ([*normalised, '--seed', '11'], '--seed 10'),
    ):
        verify.main(extra)
        output = capsys.readouterr().out
        assert words in output
        assert 'likelihood' not in output
    path.write_text(json.dumps({**calibration, 'checkpoint': {'path': 'b.model', 'sha256': '0'}}))
    verify.main(normalised)
    assert 'b.model' in capsys.readouterr().out
    path.write_text('{}')
    assert str(path) in refusal(capsys, verify.main, normalised)


@pytest.mark.parametrize(
    'options, message',
    [
        (['--fit', 'dev'], '--fit dev'),
        (['--fit', 'trials'], 'trials.txt: '),
        (['--fit', 'trials', '--kind', 'asnorm'], '--kind asnorm'),
    ],
)
def test_a_calibration_that_cannot_be_is_refused(tree, model, capsys, options, message):
    evaluate(tree, model)
    assert message in refusal(capsys, calibrate.main, [tree['save_path'], *options])
    assert not Path(tree['save_path'], 'calibration.json').exists()


def test_a_list_with_speakers_of_the_fit_is_noted():
    fitted = [('id1/a.wav', 'id1/b.wav'), ('id1/a.wav', 'id2/c.wav')]
    others = [('./id3/a.wav', 'id4/b.wav'), ('id5/a.wav', 'id5/c.wav')]
    assert calibrate.note_overlap(others, fitted, '') == ''
    note = calibrate.note_overlap([*others, ('id2/x.wav', 'id3/y.wav')], fitted, '')
    assert '1 of its 4' in note
    assert 'id2' in note
    words = [('bed/x_nohash_0.wav', 'cat/y_nohash_0.wav')]
    other = [('cat/y_nohash_1.wav', 'dog/z_nohash_0.wav')]
    assert '1 of its 2' in calibrate.note_overlap(words, other, '([a-z]+)_nohash')


def test_equal_scores_cannot_be_calibrated():
    with pytest.raises(BadInput, match='equal'):
        calibrate.check_fit('a.txt', 'raw', np.repeat([0, 1], 50), np.ones(100))


def test_a_folder_without_scores_is_refused(tmp_path, capsys):
    message = refusal(capsys, calibrate.main, [str(tmp_path), '--fit', 'dev'])
    assert '--fit dev' in message


def test_verify_two_files(tree, model, capsys):
    pair = [f'{tree["eval_path"]}/id{n}/session/00000.wav' for n in (0, 1)]
    options = command_line(initial_model=model, device='cpu')
    verify.main([*pair, *options])
    output = capsys.readouterr().out
    assert 'the same speaker' not in output and 'different' not in output, 'no threshold yet'
    evaluate(tree, model)
    text = Path(tree['save_path'], 'scores/trials.txt').read_text()
    names = [path.removeprefix(tree['eval_path'] + '/') for path in pair]
    (score,) = [line.split()[1] for line in text.splitlines() if line.split()[2:] == names]
    assert float(re.search(r'score (\S+)', output)[1]) == pytest.approx(float(score), abs=1e-4)

    capsys.readouterr()
    verify.main([*pair, *options])
    output = capsys.readouterr().out
    figures = scoring.read_results(tree['save_path'])[tree['eval_list']]['figures']
    same = float(score) > figures['raw']['EER']['threshold']
    assert ('the same speaker' if same else 'different speakers') in output
