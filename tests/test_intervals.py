"""How sure a figure is: intervals over speakers, paired comparison, seeds."""

import json
import re
from pathlib import Path

import numpy as np
import plain
import pytest
import torch
from conftest import command_line, make_system, trial_lines, wave, write_wav

import tools
import trainECAPAModel
from exps import compare
from tools import FIGURES, draw_speakers, interval_of, operating_points, replicate_figures


def simulate(random, speakers, targets, others):
    """Scores, labels and speakers (N, 2) of trials with effects of speakers and of pairs.

    targets: target trials of each speaker; others: non-target trials in all.
    """
    own = random.normal(0, 0.7, speakers)  # of a speaker's target trials
    alike = random.normal(0, 0.4, speakers)  # of a speaker to all others
    first = np.repeat(np.arange(speakers), targets)
    target_scores = 4 + own[first] + random.standard_normal(len(first))

    a, b = random.integers(speakers, size=(2, others))
    b = np.where(a == b, (b + 1) % speakers, b)
    other_scores = alike[a] + alike[b] + random.standard_normal(others)

    scores = np.concatenate([target_scores, other_scores])
    labels = np.repeat([1, 0], [len(first), others])
    pairs = np.concatenate([np.stack([first, first], 1), np.stack([a, b], 1)])
    return scores, labels, pairs


@pytest.mark.parametrize('decimals', [1, 8])
def test_replicates_equal_trials_that_are_really_repeated(decimals):
    """With equal scores among them, and without."""
    random = np.random.default_rng(1)
    for speakers in (5, 6, 8, 12):
        scores, labels, pairs = simulate(random, speakers, targets=4, others=60)
        scores = scores.round(decimals)
        draws = draw_speakers(speakers, replicates=25, seed=speakers)
        figures = replicate_figures(scores, labels, pairs, draws)
        for row, counts in zip(figures, draws):
            if np.isnan(row).any():
                # A draw of one speaker alone.
                assert (counts > 0).sum() < 3
                continue
            eer, cost_5, cost_1 = plain.plain_replicate(scores, labels, pairs, counts)
            assert row.tolist() == pytest.approx([eer, cost_1, cost_5], abs=1e-12)


def test_without_weights_the_figures_are_the_published_ones():
    random = np.random.default_rng(2)
    for decimals in (1, 8):
        scores, labels, pairs = simulate(random, 20, targets=10, others=500)
        scores = scores.round(decimals)
        (once,) = replicate_figures(scores, labels, pairs, [np.ones(20, int)])
        points = operating_points(scores, labels)
        assert once.tolist() == [points[name]['value'] for name in FIGURES]


def test_a_replicate_without_trials_of_both_kinds_is_left_out():
    pairs = np.array([[0, 0], [1, 1], [0, 1]])
    draws = [[2, 0], [1, 1]]
    figures = replicate_figures([3.0, 2.0, 1.0], [1, 1, 0], pairs, np.array(draws))
    assert np.isnan(figures[0]).all()
    assert np.isfinite(figures[1]).all()
    assert interval_of(figures[:, 0]) == [figures[1, 0], figures[1, 0]]


@pytest.mark.slow
def test_the_interval_holds_the_truth_as_often_as_it_says(capsys):
    """300 corpora of 40 speakers; the true EER is that of a population 100 times as large.

    Drawing trials instead of speakers takes trials of one speaker for independent, and its interval
    holds the truth less often.
    """
    random = np.random.default_rng(3)
    scores, labels, _ = simulate(random, 4000, targets=15, others=60000)
    truth = operating_points(scores, labels)['EER']['value']
    held = {'speakers': 0, 'trials': 0}
    for seed in range(300):
        scores, labels, pairs = simulate(random, 40, targets=15, others=600)
        draws = draw_speakers(40, replicates=200, seed=seed)
        figures = replicate_figures(scores, labels, pairs, draws)
        # As if every trial were of a speaker of its own, against one who is always there once.
        count = len(labels)
        alone = np.stack([np.arange(count), np.full(count, count)], axis=1)
        trial_draws = np.ones((200, count + 1), int)
        trial_draws[:, :count] = draw_speakers(count, replicates=200, seed=seed)
        trial_figures = replicate_figures(scores, labels, alone, trial_draws)
        for name, values in (('speakers', figures), ('trials', trial_figures)):
            low, high = interval_of(values[:, 0])
            held[name] += low <= truth <= high
    with capsys.disabled():
        print(f'\nintervals that hold the truth, of 300: {held}')
    assert 0.90 <= held['speakers'] / 300 <= 0.99
    assert held['trials'] < held['speakers'] - 30


@pytest.fixture
def six(tmp_path, short_crops):
    """Options of an evaluation of six speakers with three utterances each, and two checkpoints."""
    names = [f'id{speaker}/session/{number:05d}.wav' for speaker in range(6) for number in range(3)]
    for number, name in enumerate(names):
        write_wav(tmp_path / 'eval' / name, wave(number, 9000), subtype='PCM_16')
    (tmp_path / 'trials.txt').write_text(trial_lines(names))
    for seed in range(3):
        torch.manual_seed(seed)
        make_system().save_parameters(tmp_path / f'{seed}.model')
    return {'eval_list': str(tmp_path / 'trials.txt'), 'eval_path': str(tmp_path / 'eval')}


def evaluate(six, model, save_path, **options):
    options = {**six, 'initial_model': model, 'save_path': save_path, **options}
    trainECAPAModel.main(command_line('--eval', device='cpu', n_cpu=0, **options))


def trials_of(folder):
    """(Scores, labels, pairs of speakers) of a file of scores."""
    labels, scores, names = tools.read_trial_scores(Path(folder, 'scores/trials.txt'))
    pairs = np.array([[int(name[2]) for name in trial] for trial in names])
    return scores[:, 0], labels, pairs


def test_eval_says_how_sure_it_is(six, tmp_path, capsys):
    evaluate(six, tmp_path / '0.model', tmp_path / 'one')
    row = capsys.readouterr().out.splitlines()[-1]
    record = json.loads((tmp_path / 'one/results.json').read_text())
    entry = record['lists'][six['eval_list']]
    assert entry['speakers'] == 6
    scores, labels, pairs = trials_of(tmp_path / 'one')
    expected = replicate_figures(scores, labels, pairs, draw_speakers(6))
    for column, name in enumerate(FIGURES):
        interval = entry['figures']['raw'][name]['interval']
        assert interval == pytest.approx(np.nanpercentile(expected[:, column], [2.5, 97.5]))
    figure = entry['figures']['raw']['EER']
    low, high = figure['interval']
    assert '  6  ' in row
    assert f'{figure["value"]:.2f}% ({low:.2f} to {high:.2f})' in row


def test_a_list_without_folders_of_speakers_gets_intervals_by_a_pattern(six, tmp_path, capsys):
    """As in CN-Celeb: the folders are enroll/ and test/, and the speaker is in the file's name."""
    lines = []
    for speaker in range(6):
        for number in range(3):
            folder = 'enroll' if number == 0 else 'test'
            name = f'{folder}/id{speaker}-{number}.wav'
            write_wav(tmp_path / 'eval' / name, wave(3 * speaker + number, 9000), subtype='PCM_16')
    for a in range(6):
        for b in range(6):
            lines.append(f'{int(a == b)} enroll/id{a}-0.wav test/id{b}-1.wav\n')
    Path(six['eval_list']).write_text(''.join(lines))

    evaluate(six, tmp_path / '0.model', tmp_path / 'one')
    note = capsys.readouterr().out
    assert six['eval_list'] in note
    assert '--speaker' in note
    assert ' to ' not in note.splitlines()[-1]
    evaluate(six, tmp_path / '0.model', tmp_path / 'two', speaker=r'(id\d+)-')
    assert ' to ' in capsys.readouterr().out.splitlines()[-1]
    entry = json.loads((tmp_path / 'two/results.json').read_text())['lists'][six['eval_list']]
    assert entry['speakers'] == 6


@pytest.mark.parametrize(
    'change, words',
    [
        (lambda text: text.replace('id1/', 'id0/').replace('id2/', 'id0/'), '4 speakers'),
        (lambda text: re.sub('^0', '1', text, count=1, flags=re.M), 'contradict'),
    ],
)
def test_a_list_of_unknown_speakers_gets_no_interval(six, tmp_path, capsys, change, words):
    text = Path(six['eval_list']).read_text()
    lines = dict.fromkeys(change(text).splitlines())
    seen = {}
    for line in lines:
        label, a, b = line.split()
        same = a[:3] == b[:3]
        seen[a, b] = line if 'contradict' in words else f'{int(same)} {a} {b}'
    Path(six['eval_list']).write_text('\n'.join(seen.values()) + '\n')
    evaluate(six, tmp_path / '0.model', tmp_path / 'one')
    output = capsys.readouterr().out
    assert f'no intervals for {six["eval_list"]}: ' in output
    assert words in output
    record = json.loads((tmp_path / 'one/results.json').read_text())
    entry = record['lists'][six['eval_list']]
    assert 'interval' not in entry['figures']['raw']['EER']
    assert entry['speakers'] is None


def test_models_are_of_the_speaker_of_their_utterances(six, tmp_path, capsys):
    models = [f'm{n} id{n}/session/00000.wav id{n}/session/00001.wav' for n in range(6)]
    trials = [f'{int(m == t)} m{m} id{t}/session/00002.wav' for m in range(6) for t in range(6)]
    (tmp_path / 'models.txt').write_text('\n'.join(models))
    (tmp_path / 'cn.txt').write_text('\n'.join(trials))
    lists = {'eval_list': tmp_path / 'cn.txt', 'enrol_list': tmp_path / 'models.txt'}
    evaluate({**six, **lists}, tmp_path / '0.model', tmp_path / 'one')
    assert ' to ' in capsys.readouterr().out.splitlines()[-1]
    (tmp_path / 'models.txt').write_text('\n'.join([*models, 'm0 id3/session/00000.wav']))
    evaluate({**six, **lists}, tmp_path / '0.model', tmp_path / 'two')
    assert 'a model has utterances of several speakers' in capsys.readouterr().out


def test_experiments_are_compared_by_the_same_replicates(six, tmp_path, capsys):
    pytest.importorskip('matplotlib')
    for number, name in enumerate(('one', 'two')):
        evaluate(six, tmp_path / f'{number}.model', tmp_path / name)
    capsys.readouterr()
    paths = [str(tmp_path / name / 'results.json') for name in ('one', 'two')]
    for baseline, other in (('one', 'two'), ('two', 'one')):
        compare.main([*paths, '--baseline', baseline, '--out', str(tmp_path)])
        tables = capsys.readouterr().out.split('\n\n')
        (row,) = [re.split('  +', line) for line in tables[-1].splitlines()[1:2]]
        assert row[:4] == [other, baseline, 'trials', 'raw']
        replicates = {}
        for name in ('one', 'two'):
            replicates[name] = replicate_figures(*trials_of(tmp_path / name), draw_speakers(6))
        difference = replicates[other] - replicates[baseline]
        low, high = np.nanpercentile(difference[:, 0], [2.5, 97.5])
        assert f'({low:+.2f} to {high:+.2f})' in row[4]
        assert ('cannot be told apart' in row[4]) == (low <= 0 <= high)
    assert (tmp_path / 'eer_trials.png').read_bytes().startswith(b'\x89PNG')
    with pytest.raises(SystemExit) as stop:
        compare.main([*paths, '--baseline', 'three'])
    assert stop.value.code == 2
    assert '--baseline three' in capsys.readouterr().err


def test_runs_that_differ_in_the_seed_alone_are_one_experiment(six, tmp_path, capsys):
    pytest.importorskip('matplotlib')
    for seed in range(3):
        folder = tmp_path / f'run{seed}'
        evaluate(six, tmp_path / f'{seed}.model', folder)
        text = f'# command x{seed}\n--seed {seed}\n--save_path {folder}\n--lr 0.001\n'
        (folder / 'options.txt').write_text(text)
    evaluate(six, tmp_path / '0.model', tmp_path / 'other')
    (tmp_path / 'other/options.txt').write_text('--seed 1\n--lr 0.01\n')
    capsys.readouterr()
    names = ['run0', 'run1', 'run2', 'other']
    paths = [str(tmp_path / name / 'results.json') for name in names]
    compare.main([*paths, '--out', str(tmp_path)])
    tables = capsys.readouterr().out.split('\n\n')
    rows = [re.split('  +', line) for line in tables[2].splitlines()]
    eers = []
    for name in names[:3]:
        scores, labels, _ = trials_of(tmp_path / name)
        eers.append(operating_points(scores, labels)['EER']['value'])
    assert rows[1][:4] == ['run0 (3 seeds)', 'trials', 'raw', 'EER']
    assert rows[1][4] == f'{np.mean(eers):.2f}'
    assert rows[1][5] == f'{min(eers):.2f} to {max(eers):.2f}'
    assert len(rows) == 4, 'the other experiment has one seed'

    # Both sources: every replicate is of one of the three runs.
    each = []
    for name in names[:3]:
        each.append(replicate_figures(*trials_of(tmp_path / name), draw_speakers(6))[:, 0])
    low, high = (float(text) for text in rows[1][6].split(' to '))
    pooled = np.nanpercentile(np.concatenate(each), [2.5, 97.5])
    assert low == pytest.approx(pooled[0], abs=0.05 * np.ptp(pooled) + 0.01)
    assert high == pytest.approx(pooled[1], abs=0.05 * np.ptp(pooled) + 0.01)
    assert tables[3].splitlines()[1].startswith('other')


def test_the_lists_are_drawn_side_by_side(tmp_path, monkeypatch):
    pytest.importorskip('matplotlib')
    from exps import draw

    labels = np.array([1, 1, 0, 0])
    scores = np.array([4.0, 2.0, 3.0, 1.0])
    samples = {}
    for path, eer in (('clean', 2.0), ('gsm', 8.0)):
        replicates = np.tile(eer + np.linspace(-1, 1, 1001)[:, None], 3)
        by_name = {}
        for name in ('small', 'phone'):
            by_name[name] = compare.Sample(
                [{'EER': {'value': eer}}], replicates, scores, labels, ''
            )
        samples[path, 'raw'] = by_name
    experiments = {'small': compare.Experiment('', [[1, 0.001, 1.0, 50.0, 8.0, 8.0]], {})}
    compare.draw_all(experiments, samples, tmp_path)
    names = {path.name for path in tmp_path.iterdir()} - {'curves.png'}
    assert names == {'eer.png', 'eer_clean.png', 'eer_gsm.png', 'det_clean.png', 'det_gsm.png'}

    drawn = {}
    monkeypatch.setattr(draw, 'draw_intervals', lambda path, rows: drawn.update({path: rows}))
    compare.draw_all(experiments, samples, tmp_path)
    rows = drawn[str(tmp_path / 'eer.png')]
    assert list(rows) == ['clean', 'gsm']
    for path, eer in (('clean', 2.0), ('gsm', 8.0)):
        for name in ('small', 'phone'):
            value, interval = rows[path][f'{name}, raw']
            assert value == eer
            assert interval == pytest.approx((eer - 0.95, eer + 0.95))


def experiment_of(folder, lists, seed, options='--lr 0.001'):
    """Writes the results of a run: lists {path: (SHA-256, scores of 15 trials of six speakers)}."""
    (folder / 'scores').mkdir(parents=True)
    pairs = [(a, b) for a in range(6) for b in range(a, 6)][:15]
    entries = {}
    for number, (path, (content, scores)) in enumerate(lists.items()):
        text = ''
        for (a, b), score in zip(pairs, scores):
            text += f'{int(a == b)} {score} id{a}/1.wav id{b}/2.wav\n'
        name = f'{Path(path).stem}{number or ""}.txt'
        (folder / 'scores' / name).write_text(text)
        entries[path] = {
            'figures': {'raw': {'EER': {'value': 1.0, 'threshold': 0.0}}},
            'scores': f'scores/{name}',
            'trials': 15,
            'speakers': 6,
            'sha256': content,
            'checkpoint': {'path': 'x.model', 'sha256': ''},
        }
    (folder / 'results.json').write_text(json.dumps({'lists': entries}))
    (folder / 'options.txt').write_text(f'--seed {seed}\n{options}\n')
    return str(folder / 'results.json')


def test_runs_of_the_same_seed_and_second_stages(tmp_path):
    scores = np.arange(15)
    paths = []
    for name, seed in (('before', 1), ('after', 1)):
        paths.append(experiment_of(tmp_path / name, {'a.txt': ('s', scores)}, seed))
    for seed in (1, 2):
        options = f'--initial_model exps/first-{seed}/average.model'
        folder = tmp_path / f'second-{seed}'
        paths.append(experiment_of(folder, {'a.txt': ('s', scores)}, seed, options))
    other = '--initial_model exps/first-3/last.model'
    paths.append(experiment_of(tmp_path / 'other', {'a.txt': ('s', scores)}, 3, other))
    groups = compare.group_seeds(compare.read_experiments(paths))
    assert groups == {
        'before': ['before'],
        'after': ['after'],
        'second-1 (2 seeds)': ['second-1', 'second-2'],
        'other': ['other'],
        'published': ['published'],
    }


def test_lists_are_told_apart_by_their_bytes_and_audio(tmp_path):
    random = np.random.default_rng(0)
    scores = random.standard_normal((6, 15))
    lists = {'a/trials.txt': ('s', scores[0]), 'b/trials.txt': ('t', scores[1])}
    paths = [experiment_of(tmp_path / 'one', lists, 1)]
    paths.append(experiment_of(tmp_path / 'two', {'c/copy.txt': ('s', scores[2])}, 1))
    # One list on other audio, by way of two names, and in two orders.
    for number, order in enumerate((('clean', 'noisy'), ('noisy', 'clean'))):
        lists = {name: ('u', scores[3 + number + (name == 'noisy')]) for name in order}
        paths.append(experiment_of(tmp_path / f'three{number}', lists, 1))
    experiments = compare.read_experiments([*paths, *paths])
    assert list(experiments) == ['one', 'two', 'three0', 'three1', 'published']
    samples = compare.read_samples(experiments, compare.group_seeds(experiments))
    found = {}
    for (name, _), by_name in samples.items():
        found[name] = list(by_name)
    assert found == {
        'trials': ['one', 'two'],
        'trials1': ['one'],
        'clean': ['three0', 'three1'],
        'noisy1': ['three0', 'three1'],
    }
    np.testing.assert_array_equal(samples['clean', 'raw']['three1'].scores, scores[4])
    np.testing.assert_array_equal(samples['noisy1', 'raw']['three1'].scores, scores[5])


def test_experiments_of_one_name_are_kept_apart(tmp_path):
    paths = []
    for folder in ('p/x', 'q/x', 'published'):
        paths.append(experiment_of(tmp_path / folder, {'a.txt': ('s', np.arange(15))}, 1))
    names = list(compare.read_experiments(paths))
    assert names == ['x', str(tmp_path / 'q/x'), str(tmp_path / 'published'), 'published']


def test_the_draws_of_seeds_do_not_depend_on_their_order_elsewhere(tmp_path):
    random = np.random.default_rng(0)
    runs = []
    for _ in range(3):
        names = [(f'id{a}/1', f'id{b}/2') for a in range(6) for b in range(a, 6)]
        labels = np.array([a.split('/')[0] == b.split('/')[0] for a, b in names], int)
        runs.append((random.standard_normal(21) + 2 * labels, labels, names))
    first = compare.sample_of(runs, 0).replicates[:, 0]
    other = compare.sample_of(runs, 1).replicates[:, 0]
    alike = np.mean(first == other)
    # A third by chance, and more as replicates of few speakers are often equal.
    each = [compare.sample_of([run], 0).replicates[:, 0] for run in runs]
    by_chance = np.mean([np.mean(a == b) for a in each for b in each])
    assert alike == pytest.approx(by_chance, abs=0.1)
