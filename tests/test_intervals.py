"""How sure a figure is: intervals over speakers, paired comparison, seeds."""

import json
import re
from pathlib import Path

import cli
import numpy as np
import plain
import pytest
import scipy.optimize
import scipy.stats
import torch
from cli import refusal
from conftest import make_system, trial_lines, wave, write_wav

import tools
from exps import compare, scoring
from exps.scoring import (
    difference_interval,
    draw_speakers,
    figure_interval,
    intervals_of,
    replicate_figures,
    why_no_interval,
)
from tools import FIGURES, operating_points


def simulate(random, speakers, targets=15, others=3000, pairs=None):
    """Returns scores, labels and speakers (N, 2) of trials with effects of speakers and of pairs.

    targets: target trials of each speaker; others: non-target trials in all; pairs: speakers of
    the trials, which are otherwise drawn.
    """
    own = random.normal(0, 0.7, speakers)  # of a speaker's target trials
    alike = random.normal(0, 0.4, speakers)  # of a speaker to all others
    first = np.repeat(np.arange(speakers), targets)
    target_scores = 4 + own[first] + random.standard_normal(len(first))

    a, b = random.integers(speakers, size=(2, others))
    b = np.where(a == b, (b + 1) % speakers, b)
    if pairs is not None:
        a, b = pairs[len(first) :].T
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
                # Too few speakers were drawn.
                assert (counts > 0).sum() < 3
                continue
            expected = plain.plain_replicate(scores, labels, pairs, counts)
            assert row.tolist() == pytest.approx(expected, abs=1e-12)


def test_without_weights_the_figures_are_those_of_the_list():
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
    figures = replicate_figures([3.0, 1.0, 2.0], [1, 1, 0], pairs, np.array(draws))
    assert np.isnan(figures[0]).all()
    assert np.isfinite(figures[1]).all()
    eer = figures[1, 0]
    assert figure_interval(eer, figures[:, 0], 2, most=100) == pytest.approx([eer, eer])
    assert difference_interval(figures[:, 0], 2) == [eer, eer]


def expanded_interval(values, speakers):
    """Returns the 95 % interval of replicates, as Hesterberg (2015) expands percentiles."""
    t = scipy.stats.t.ppf(0.975, speakers - 1) * np.sqrt(speakers / (speakers - 1))
    tail = 100 * scipy.stats.norm.sf(t)
    return np.nanpercentile(values, [tail, 100 - tail])


def log_interval(value, values, speakers):
    """Returns the 95 % interval of a figure whose replicates are log-normal."""
    relative = np.nanstd(values) / np.nanmean(values)

    def miss(deviation):
        distribution = scipy.stats.lognorm(deviation)
        return distribution.std() / distribution.mean() - relative

    deviation = scipy.optimize.brentq(miss, 1e-9, 3)
    t = scipy.stats.t.ppf(0.975, speakers - 1) * np.sqrt(speakers / (speakers - 1))
    centre = np.log(value) + np.log(value / np.nanmean(values))
    return np.exp([centre - t * deviation, centre + t * deviation])


@pytest.mark.parametrize('speakers', [5, 10, 40, 1251])
def test_the_fewer_speakers_the_wider_the_intervals(speakers):
    values = np.random.default_rng(0).standard_normal(1000)
    low, high = difference_interval(values, speakers)
    assert [low, high] == pytest.approx(expanded_interval(values, speakers))
    # Student's t has wider tails than a normal distribution, and for many speakers the same.
    assert low <= np.percentile(values, 2.5) and np.percentile(values, 97.5) <= high
    assert high == pytest.approx(np.percentile(values, 97.5), abs=10 / speakers)

    values = np.exp(0.1 * values)
    low, high = figure_interval(1.02, values, speakers, most=100)
    assert [low, high] == pytest.approx(log_interval(1.02, values, speakers))
    factor = np.exp(scipy.stats.norm.ppf(0.975) * 0.1)
    assert high / low >= 0.95 * factor**2
    assert high / low == pytest.approx(factor**2, rel=5 / speakers + 0.05)


def test_an_interval_holds_its_figure_and_ends_at_the_largest_value():
    random = np.random.default_rng(0)
    for value in (0.3, 0.9, 0.99, 1):
        for spread in (0, 0.001, 0.05):
            values = np.clip(0.93 * value + spread * random.standard_normal(100), 0, 1)
            low, high = figure_interval(value, values, 40, most=1)
            assert 0 < low <= value <= high <= 1
    # An EER of a single error is 0 in many replicates.
    values = np.repeat([0.0, 2.0, 4.0, 6.0], [37, 37, 18, 8])
    low, high = figure_interval(2.0, values, 10, most=100)
    assert 0 < low < 1 and 5 < high < 100


@pytest.mark.parametrize(
    'value, others, names',
    [
        (0.5, 569, ['EER']),
        (0.5, 570, ['EER', 'minDCF(0.05)']),
        (0.5, 2969, ['EER', 'minDCF(0.05)']),
        (0.5, 2970, FIGURES),
        # A false alarm of 2,970 costs 1/30 at a prior of 0.01: more than a fifth of 0.1.
        (0.1, 2970, ['EER', 'minDCF(0.05)']),
        (0.1, 4949, ['EER', 'minDCF(0.05)']),
        (0.1, 4950, FIGURES),
        (0, 10**6, []),
    ],
)
def test_a_cost_of_few_false_alarms_has_no_interval(value, others, names):
    replicates = np.random.default_rng(0).uniform(0.1, 1, (100, 3))
    values = dict.fromkeys(FIGURES, value)
    assert list(intervals_of(values, replicates, others, 10)) == list(names)
    for name in FIGURES:
        assert bool(why_no_interval(name, value, others)) == (name not in names)


def true_figures():
    """Returns FIGURES of all speakers, from whom simulate draws: both kinds are normal."""
    targets = scipy.stats.norm(4, np.sqrt(1 + 0.7**2))
    others = scipy.stats.norm(0, np.sqrt(1 + 2 * 0.4**2))
    equal = scipy.optimize.brentq(lambda t: targets.cdf(t) - others.sf(t), 0, 4)
    thresholds = np.linspace(0, 8, 10001)
    values = [100 * targets.cdf(equal)]
    for prior in tools.PRIORS.values():
        costs = prior * targets.cdf(thresholds) + (1 - prior) * others.sf(thresholds)
        values.append(costs.min() / prior)
    return dict(zip(FIGURES, values))


def sample_two(random, speakers, replicates, better=0):
    """Returns compare.Samples of two systems' scores of the same trials of new speakers.

    Half of each effect is common to both; better: how much farther the first separates.
    """
    common, labels, pairs = simulate(random, speakers)
    centre = 4 * labels
    draws = draw_speakers(speakers, replicates, seed=int(random.integers(2**32)))
    samples = []
    for farther in (better, 0):
        scores = simulate(random, speakers, pairs=pairs)[0]
        mixed = centre + (scores - centre + common - centre) / np.sqrt(2) + farther * labels
        figures = [operating_points(mixed, labels)]
        replicated = replicate_figures(mixed, labels, pairs, draws)
        samples.append(compare.Sample(figures, replicated, speakers, mixed, labels))
    return samples


def excludes(interval, value):
    return not interval[0] <= value <= interval[1]


def test_a_better_system_is_told_apart():
    random = np.random.default_rng(0)
    for _ in range(5):
        one, other = sample_two(random, 40, replicates=100, better=2)
        for interval in compare.difference_intervals(one, other).values():
            assert interval[1] < 0


@pytest.mark.slow
def test_intervals_are_as_true_as_the_manual_says(capsys):
    """Prints the table of exps/README.md, "How sure is an EER?", which has more corpora.

    Drawing trials in place of speakers takes trials of one speaker for independent, and its
    interval holds the truth less often.
    """
    corpora = 80
    for speakers in (6, 10, 20, 40):
        held, apart = measure_coverage(speakers, corpora, replicates=100)
        with capsys.disabled():
            print(f'\n{speakers} speakers, %: truth held {held}, equal systems apart {apart}')
        assert min(held[name] for name in FIGURES) >= 90 - 3 * np.sqrt(90 * 10 / corpora)
        assert max(apart.values()) <= 5 + 3 * np.sqrt(5 * 95 / corpora)
        assert held['EER by trials'] < held['EER'] - 5


def measure_coverage(speakers, corpora, replicates):
    """Returns percentages of the intervals in a simulation, {figure: percentage} each.

    The first: how often the interval of a figure holds the truth, if it has one. The second: how
    often the interval of a difference of two equal systems excludes 0.
    """
    random = np.random.default_rng([3, speakers])
    truth = true_figures()
    held = {name: [] for name in (*FIGURES, 'EER by trials')}
    apart = {name: [] for name in FIGURES}
    for seed in range(corpora):
        one, other = sample_two(random, speakers, replicates)
        for name, interval in one.intervals().items():
            held[name].append(not excludes(interval, truth[name]))
        for name, interval in compare.difference_intervals(one, other).items():
            apart[name].append(excludes(interval, 0))
        if seed % 4 == 0:
            interval = interval_by_trials(one.scores, one.labels, seed)
            held['EER by trials'].append(not excludes(interval, truth['EER']))
    return tuple(
        {name: round(100 * float(np.mean(each)), 1) for name, each in counts.items()}
        for counts in (held, apart)
    )


def values_of(scores, labels):
    return [figure['value'] for figure in operating_points(scores, labels).values()]


def interval_by_trials(scores, labels, seed):
    """Returns the EER's interval if every trial had its own speakers."""
    random = np.random.default_rng(seed)
    eers = []
    for _ in range(60):
        drawn = random.integers(len(labels), size=len(labels))
        eers.append(values_of(scores[drawn], labels[drawn])[0])
    return np.percentile(eers, [2.5, 97.5])


@pytest.fixture
def six(tmp_path, quick_test):
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
    cli.evaluate({**six, 'save_path': save_path}, model, **options)


def trials_of(folder):
    """(Scores, labels, pairs of speakers) of a file of scores."""
    labels, scores, names = scoring.read_trial_scores(Path(folder, 'scores/trials.txt'))
    pairs = np.array([[int(name[2]) for name in trial] for trial in names])
    return scores[:, 0], labels, pairs


def test_eval_says_how_sure_it_is(six, tmp_path, capsys):
    evaluate(six, tmp_path / '0.model', tmp_path / 'one')
    output = capsys.readouterr().out
    row = output.splitlines()[-1]
    record = json.loads((tmp_path / 'one/results.json').read_text())
    entry = record['lists'][six['eval_list']]
    assert entry['speakers'] == 6
    scores, labels, pairs = trials_of(tmp_path / 'one')
    expected = replicate_figures(scores, labels, pairs, draw_speakers(6))
    figure = entry['figures']['raw']['EER']
    low, high = figure['interval']
    assert [low, high] == pytest.approx(log_interval(figure['value'], expected[:, 0], 6))
    assert '  6  ' in row
    assert f'{figure["value"]:.2f}% ({low:.2f} to {high:.2f})' in row
    # 135 trials of different speakers: too few for a cost in which one false alarm counts for much.
    for name in FIGURES[1:]:
        cost = entry['figures']['raw'][name]
        assert 'interval' not in cost
        assert f'{cost["value"]:.4f} (-)' in row
        assert re.search(f'{six["eval_list"]}: .*{re.escape(name)}', output)


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
    assert f'{six["eval_list"]}: ' in output
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
        low, high = expanded_interval(difference[:, 0], 6)
        assert f'({low:+.2f} to {high:+.2f})' in row[4]
        assert ('cannot be told apart' in row[4]) == (low <= 0 <= high)
    assert (tmp_path / 'eer_trials.png').read_bytes().startswith(b'\x89PNG')
    message = refusal(capsys, compare.main, [*paths, '--baseline', 'three'])
    assert '--baseline three' in message


def test_folders_that_are_named_as_seeds_are_one_experiment(six, tmp_path, capsys):
    pytest.importorskip('matplotlib')
    for seed in range(3):
        folder = tmp_path / f'run{seed}'
        evaluate(six, tmp_path / f'{seed}.model', folder)
    evaluate(six, tmp_path / '0.model', tmp_path / 'other')
    capsys.readouterr()
    names = ['run0', 'run1', 'run2', 'other']
    paths = [str(tmp_path / name / 'results.json') for name in names]
    seeds = ','.join(str(tmp_path / name) for name in names[:3])
    arguments = ['--seeds', f'small={seeds}', '--baseline', 'small', '--out', str(tmp_path)]
    compare.main([*paths, *arguments])
    tables = capsys.readouterr().out.split('\n\n')
    rows = [re.split('  +', line) for line in tables[2].splitlines()]
    eers = []
    for name in names[:3]:
        scores, labels, _ = trials_of(tmp_path / name)
        eers.append(operating_points(scores, labels)['EER']['value'])
    assert rows[1][:4] == ['small', 'trials', 'raw', 'EER']
    assert rows[1][4] == f'{np.mean(eers):.2f}'
    assert rows[1][5] == f'{min(eers):.2f} to {max(eers):.2f}'
    assert len(rows) == 4, 'the other experiment has one seed'

    # Both sources: every replicate is of one of the three runs.
    each = []
    for name in names[:3]:
        each.append(replicate_figures(*trials_of(tmp_path / name), draw_speakers(6))[:, 0])
    low, high = (float(text) for text in rows[1][6].split(' to '))
    pooled = log_interval(np.mean(eers), np.concatenate(each), 6)
    assert low == pytest.approx(pooled[0], abs=0.15 * np.ptp(pooled))
    assert high == pytest.approx(pooled[1], abs=0.15 * np.ptp(pooled))
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
            figures = [dict.fromkeys(FIGURES, {'value': eer})]
            by_name[name] = compare.Sample(figures, replicates, 1000, scores, labels)
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
            expected = log_interval(eer, samples[path, 'raw'][name].replicates[:, 0], 1000)
            assert interval == pytest.approx(expected)


PAIRS = [(a, b) for a in range(6) for b in range(a, 6)][:15]
TRIALS = [f'{int(a == b)} id{a}/1.wav id{b}/2.wav' for a, b in PAIRS]


@pytest.fixture
def no_pictures(monkeypatch):
    """Tests of tables need not wait for matplotlib."""
    monkeypatch.setattr(compare, 'draw_all', lambda *_: None)


def experiment_of(folder, lists):
    """Writes the results of a run: lists {path: scores of TRIALS, or (scores, other trials)}."""
    (folder / 'scores').mkdir(parents=True)
    entries = {}
    for number, (path, scores) in enumerate(lists.items()):
        trials = TRIALS
        if isinstance(scores, tuple):
            scores, trials = scores
        lines = []
        for trial, score in zip(trials, scores):
            label, enrolment, test = trial.split()
            lines.append(f'{label} {score:.6f} {enrolment} {test}\n')
        name = f'{Path(path).stem}{number or ""}.txt'
        (folder / 'scores' / name).write_text(''.join(lines))
        points = operating_points(scores, [int(trial[0]) for trial in trials])
        entries[path] = {
            'figures': {'raw': points},
            'scores': f'elsewhere/scores/{name}',
            'trials': len(trials),
            'speakers': 6,
            'sha256': tools.sha256(''.join(trials).encode()),
            'checkpoint': {'path': 'x.model', 'sha256': ''},
        }
    (folder / 'results.json').write_text(json.dumps({'lists': entries}))
    return str(folder / 'results.json')


def samples_of(paths):
    """{list: experiments that can be compared on it}, and the samples."""
    experiments = compare.read_experiments(paths)
    groups = compare.group_seeds(experiments, {})
    lists = compare.sort_by_list({n: compare.read_runs(each) for n, each in experiments.items()})
    samples = compare.make_samples(lists, compare.name_lists(lists.values()), groups, '')
    return {name: list(by_name) for (name, _), by_name in samples.items()}, samples


def test_lists_are_told_apart_by_their_trials_and_audio(tmp_path):
    scores = np.random.default_rng(0).standard_normal((6, 15))
    fewer = (scores[1][1:], TRIALS[1:])
    paths = [experiment_of(tmp_path / 'one', {'a/some.txt': fewer})]
    paths.append(experiment_of(tmp_path / 'two', {'c/copy.txt': fewer}))
    # One list on other audio, by way of two names, and in two orders.
    for number, order in enumerate((('clean', 'noisy'), ('noisy', 'clean'))):
        lists = {name: scores[3 + number + (name == 'noisy')] for name in order}
        paths.append(experiment_of(tmp_path / f'three{number}', lists))
    found, samples = samples_of([*paths, *paths])
    assert found == {
        'some': ['one', 'two'],
        'clean': ['three0', 'three1'],
        'noisy': ['three0', 'three1'],
    }
    for name, row in (('clean', 4), ('noisy', 5)):
        written = samples[name, 'raw']['three1'].scores
        np.testing.assert_allclose(written, scores[row], atol=1e-6)


def test_the_same_trials_may_be_written_in_many_ways(tmp_path):
    """Sides swapped, ./, another order, a line twice."""
    scores = np.random.default_rng(0).standard_normal(15)
    swapped = []
    for trial in TRIALS[::-1]:
        label, enrolment, test = trial.split()
        swapped.append(f'{label} ./{test} {enrolment}')
    swapped.append(swapped[0])
    again = np.append(scores[::-1], scores[-1])
    paths = [experiment_of(tmp_path / 'one', {'a.txt': scores})]
    paths.append(experiment_of(tmp_path / 'two', {'b.txt': (again, swapped)}))
    paths.append(experiment_of(tmp_path / 'three', {'a.txt': (scores[1:], TRIALS[1:])}))
    found, samples = samples_of(paths)
    assert found == {'a': ['one', 'two'], 'a_2': ['three']}
    one, two = samples['a', 'raw'].values()
    assert one.speakers == two.speakers == 6


@pytest.mark.parametrize('twice', [['a.txt', 'b.txt'], ['a.txt', '{here}/a.txt']])
def test_a_list_that_was_scored_under_two_names_is_compared(
    tmp_path, monkeypatch, twice, capsys, no_pictures
):
    monkeypatch.chdir(tmp_path)
    scores = np.random.default_rng(0).standard_normal((2, 15))
    names = [name.format(here=tmp_path) for name in twice]
    experiment_of(tmp_path / 'one', dict.fromkeys(names, scores[0]))
    experiment_of(tmp_path / 'two', {'a.txt': scores[1]})
    for baseline, other in (('one', 'two'), ('two', 'one')):
        compare.main(['one', 'two', '--baseline', baseline, '--out', str(tmp_path)])
        row = capsys.readouterr().out.split('\n\n')[-1].splitlines()[1]
        assert re.split('  +', row)[:3] == [other, baseline, 'a']


def test_one_trial_fewer_is_another_list_and_is_said(tmp_path, capsys, no_pictures):
    scores = np.random.default_rng(0).standard_normal(15)
    paths = [experiment_of(tmp_path / 'one', {'a.txt': scores})]
    paths.append(experiment_of(tmp_path / 'two', {'a.txt': (scores[1:], TRIALS[1:])}))
    compare.main([*paths, '--out', str(tmp_path)])
    message = capsys.readouterr().err
    assert 'two, a_2' in message
    assert '14 trials' in message


def test_differences_of_unknown_speakers_have_no_interval(tmp_path, capsys, no_pictures):
    random = np.random.default_rng(0)
    trials = [trial.replace('id', 'x/f') for trial in TRIALS]
    paths = []
    for name in ('one', 'two'):
        flat = [re.sub(r'x/f(\d)/(\d)', r'f\1-\2', trial) for trial in trials]
        lists = {'a.txt': (random.standard_normal(15), flat)}
        paths.append(experiment_of(tmp_path / name, lists))
    compare.main([*paths, '--out', str(tmp_path)])
    captured = capsys.readouterr()
    assert '--speaker' in captured.err
    cells = re.split('  +', captured.out.split('\n\n')[-1].splitlines()[1])
    assert cells[:3] == ['two', 'one', 'a']
    assert all(cell.endswith('(-)') for cell in cells[4:])
    compare.main([*paths, '--out', str(tmp_path), '--speaker', r'f(\d)-'])
    row = capsys.readouterr().out.split('\n\n')[-1].splitlines()[1]
    assert ' to ' in row


def test_experiments_of_one_name_are_kept_apart(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    places = ('p/x', 'q/x', 'x', 'published', 'y')
    paths = [experiment_of(Path(place), {'a.txt': np.arange(15)}) for place in places]
    experiments = compare.read_experiments(paths)
    folders = [str(tmp_path / place) for place in places]
    assert list(experiments) == ['p/x', 'q/x', 'x', folders[3], 'y', 'published']
    assert [each.folder for each in experiments.values()] == [*folders, '']


def test_seeds_with_other_options_are_noted(tmp_path, monkeypatch, capsys, no_pictures):
    """But not options that leave the numbers as they are, such as --n_cpu and --save_path."""
    monkeypatch.chdir(tmp_path)
    for number, name in enumerate(('one', 'two', 'three')):
        experiment_of(Path(name), {'a.txt': np.arange(15)})
        lines = ['# command x', f'--seed={number}', f'--n_cpu={number}', f'--save_path={name}']
        lines += ['--m=0.2', '--margin_epochs 0.0 1.0']
        Path(name, 'options.txt').write_text('\n'.join(lines) + '\n')
    compare.main(['--seeds', 'x=one,two,three'])
    assert 'options' not in capsys.readouterr().err

    with Path('two/options.txt').open('a') as file:
        file.write('--lr=0.002\n')
    text = Path('three/options.txt').read_text()
    Path('three/options.txt').write_text(text.replace('0.0 1.0', '0.0 9.0'))
    compare.main(['--seeds', 'x=one,two,three'])
    message = capsys.readouterr().err
    assert '--seeds x' in message and '--lr, --margin_epochs' in message
    assert '--n_cpu' not in message


@pytest.mark.parametrize(
    'seeds', ['x', 'x=', 'x=one', '=one,two', 'x=one,one', 'two=one,three', 'x=one,none']
)
def test_seeds_that_cannot_be_are_refused(tmp_path, monkeypatch, capsys, seeds):
    monkeypatch.chdir(tmp_path)
    for name in ('one', 'two', 'three'):
        experiment_of(Path(name), {'a.txt': np.arange(15)})
    assert refusal(capsys, compare.main, ['one', 'two', '--seeds', seeds])


def test_scores_of_another_evaluation_are_refused(tmp_path, capsys):
    """As after `cp -r one two` and an evaluation that wrote only one of the two."""
    scores = np.random.default_rng(0).standard_normal((2, 15))
    paths = [experiment_of(tmp_path / f'{n}', {'a.txt': scores[n]}) for n in range(2)]
    text = (tmp_path / '1/scores/a.txt').read_text()
    (tmp_path / '0/scores/a.txt').write_text(text)
    message = refusal(capsys, compare.main, [*paths, '--out', str(tmp_path)])
    assert str(tmp_path / '0/scores/a.txt') in message


@pytest.mark.parametrize('scale', [1e-6, 1e-3, 1, 1000])
def test_rounded_scores_still_have_the_eer_of_the_results(tmp_path, scale):
    """Where rounding to 6 digits makes scores equal, or changes their order."""
    random = np.random.default_rng(0)
    for number in range(20):
        scores = np.float32(scale) * random.standard_normal(15).astype(np.float32)
        folder = tmp_path / f'{number}'
        experiment_of(folder, {'a.txt': scores})
        ((path, entry),) = scoring.read_results(folder).items()
        _, found, _ = scoring.read_list_scores(folder, path, entry)
        np.testing.assert_allclose(found['raw'], scores, atol=1e-6)


def test_the_draws_of_seeds_do_not_depend_on_their_order_elsewhere():
    random = np.random.default_rng(0)
    labels = np.array([a == b for a, b in PAIRS], int)
    runs = []
    for _ in range(3):
        scores = {'raw': random.standard_normal(15) + 2 * labels}
        runs.append(compare.Run('a.txt', {}, labels, scores, []))
    speakers = [np.array(PAIRS)] * 3
    first = compare.sample_of(runs, 'raw', speakers, 0).replicates[:, 0]
    other = compare.sample_of(runs, 'raw', speakers, 1).replicates[:, 0]
    alike = np.mean(first == other)
    # A third by chance, and more as replicates of few speakers are often equal.
    each = [compare.sample_of([run], 'raw', speakers, 0).replicates[:, 0] for run in runs]
    by_chance = np.mean([np.mean(a == b) for a in each for b in each])
    assert alike == pytest.approx(by_chance, abs=0.1)
