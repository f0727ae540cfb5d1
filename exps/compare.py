"""Compares experiments: tables of their figures, what the trials can tell apart, and pictures.

    python -m exps.compare exps/*/score.txt exps/*/results.json

A path stands for its folder, whose score.txt (training) and results.json (--eval) are read. The
published run is shown beside them. `--markdown` prints the tables for a paper or a README.

Experiments that scored the same trials are compared in pairs: the difference of their figures from
those of the first one named, or of --baseline, with an interval of 95 %, by the same replicates of
the speakers on both sides (scoring.replicate_figures). If it holds 0, these trials cannot tell the
two apart.

    python -m exps.compare --seeds small=exps/small-1,exps/small-2,exps/small-3 exps/phone

takes three folders for one experiment, `small`, that was run with three seeds. The mean, lowest and
highest of its seeds are shown, and an interval that holds both sources of chance: a replicate draws
one of the seeds, and speakers. So it is the interval of one run with any seed, which is wider than
that of the mean of the seeds; but few seeds show less than their whole spread, three of them two
thirds of its variance.

If matplotlib is installed, training curves are drawn and, of the scores that --eval wrote, EERs
with their intervals and DET curves, one picture a list, and the EERs of all lists in one picture.
"""

import argparse
import os
import sys
from typing import NamedTuple

import numpy as np

from dataLoader import number_speakers, speakers_of
from exps.calibrate import (
    CALIBRATED,
    calibration_figures,
    note_overlap,
    read_calibration,
    trial_set,
    why_not_for,
)
from exps.scoring import (
    add_speaker_option,
    difference_interval,
    draw_speakers,
    format_count,
    format_figure,
    intervals_of,
    read_list_scores,
    read_results,
    replicate_figures,
    table,
)
from tools import (
    FIGURES,
    BadInput,
    exit_on_bad_input,
    operating_points,
    read_scores,
    sha256,
)

PUBLISHED_NAME = 'published'
PUBLISHED = os.path.join(os.path.dirname(os.path.abspath(__file__)), 'pretrain_score.txt')
# Its README's figures of exps/pretrain.model; the first is the best of 80 epochs on this list.
PUBLISHED_LISTS = {
    'Vox1_O': {
        'figures': {'raw': {'EER': {'value': 0.96}}, 'asnorm': {'EER': {'value': 0.86}}},
        'trials': 37611,
        'speakers': 40,
        'checkpoint': {'path': 'pretrain.model'},
    }
}


class Experiment(NamedTuple):
    """A run's folder, the lines of its score.txt, and the entries of its results.json by list."""

    folder: str
    epochs: list
    lists: dict


class Run(NamedTuple):
    """What an experiment scored: a list's path and entry in results.json, and its trials.

    scores: {kind: (N,)}; names: [(enrolment, test)].
    """

    path: str
    entry: dict
    labels: np.ndarray
    scores: dict
    names: list


class ListKey(NamedTuple):
    """What tells a list of trials from others.

    path: '' unless an experiment scored these trials several times, on other audio for example.
    """

    trials: str
    path: str


class Sample(NamedTuple):
    """What an experiment, of one or several seeds, has for a list and a kind of scores.

    figures: of each seed, {figure: {'value'}}; replicates: (replicates, 3) values of FIGURES, each
    of one of the seeds, None if the speakers are not known; speakers: how many; scores, labels: of
    the first seed.
    """

    figures: list
    replicates: np.ndarray | None
    speakers: int
    scores: np.ndarray
    labels: np.ndarray

    def values(self):
        """Returns {figure: its mean over the seeds}."""
        return {
            name: np.mean([figures[name]['value'] for figures in self.figures])
            for name in self.figures[0]
        }

    def intervals(self):
        """Returns {figure: [low, high]}; without figures whose interval is not known."""
        if self.replicates is None:
            return {}
        others = int(np.sum(self.labels != 1))
        return intervals_of(self.values(), self.replicates, others, self.speakers)


def main(argv=None):
    """Prints the tables and draws the pictures; exit status 2, with a reason, for other files."""
    parser = argparse.ArgumentParser(
        prog='python -m exps.compare', description='Compare experiments.'
    )
    add = parser.add_argument
    add('scores', nargs='*', help='score.txt or results.json files of experiments, or folders')
    add(
        '--seeds',
        action='append',
        default=[],
        metavar='NAME=FOLDER,FOLDER...',
        help='runs of one experiment with several seeds; may be given several times',
    )
    add('--baseline', help='experiment that the others are compared with (default: the first)')
    add('--out', default='exps', help='folder of the pictures curves, eer, eer_LIST and det_LIST')
    add('--markdown', action='store_true', help='print the tables as Markdown')
    add_speaker_option(add)
    args = parser.parse_args(argv)
    if not args.scores and not args.seeds:
        parser.error('name experiments, or --seeds')
    with exit_on_bad_input():
        compare(args)


def compare(args):
    """Prints the tables and draws the pictures."""
    seeds = read_seeds(args.seeds)
    folders = [folder for members in seeds.values() for folder in members]
    experiments = read_experiments([*args.scores, *folders])
    groups = group_seeds(experiments, seeds)
    baseline = find_baseline(args.baseline, experiments, groups)
    lists = sort_by_list({name: read_runs(each) for name, each in experiments.items()})
    names = name_lists(lists.values())
    samples = make_samples(lists, names, groups, args.speaker)

    print_table(training_rows(experiments), args.markdown)
    print()
    print_table(score_rows(experiments, lists, names, args.speaker), args.markdown)
    for rows in (seed_rows(groups, samples), difference_rows(samples, baseline)):
        if len(rows) > 1:
            print()
            print_table(rows, args.markdown)
    note_uncompared(lists, names, groups, baseline)
    draw_all(experiments, samples, args.out)


def read_seeds(texts):
    """Reads NAME=FOLDER,FOLDER... of --seeds: {name: folders}."""
    seeds = {}
    for text in texts:
        name, _, folders = text.partition('=')
        members = [folder for folder in folders.split(',') if folder]
        if not name or len(members) < 2:
            raise BadInput(f'--seeds {text}: give a name and at least two folders, NAME=A,B')
        if name in (*seeds, PUBLISHED_NAME):
            raise BadInput(f'--seeds {text}: there is another experiment {name}')
        seeds[name] = members
    return seeds


def read_experiments(paths):
    """Reads {name: Experiment} of files, or of folders; the published one is the last."""
    files = {}
    for path in paths:
        if not os.path.exists(path):
            raise BadInput(f'{path}: no such file')
        place = place_of(path)
        files[place] = os.path.join(place, 'score.txt') if os.path.isdir(place) else path

    experiments = {}
    for name, place in name_places(list(files)).items():
        epochs = read_scores(files[place])
        lists = read_lists(place) if os.path.isdir(place) else {}
        if not epochs and not lists:
            raise BadInput(f'{place}: has neither lines in score.txt nor results in results.json')
        experiments[name] = Experiment(place, epochs, lists)
    experiments[PUBLISHED_NAME] = Experiment('', read_scores(PUBLISHED), PUBLISHED_LISTS)
    return experiments


def place_of(path):
    """Returns the folder that a path stands for.

    A score.txt of another name stands for itself, and is called as it is, without its ending.
    """
    place = os.path.abspath(path)
    if os.path.isdir(place):
        return place
    folder, name = os.path.split(place)
    return folder if name in ('score.txt', 'results.json') else os.path.splitext(place)[0]


def read_lists(folder):
    """Reads a folder's results.json; a note says why there is none if it cannot be read."""
    try:
        return read_results(folder)
    except BadInput as error:
        print(f'note: {error}', file=sys.stderr)
        return {}


def name_places(places):
    """Returns {name: place}: the last part of each path, or as many as tell it from the others."""
    names = {}
    for place in places:
        parts = place.split(os.sep)
        for count in range(1, len(parts) + 1):
            name = os.sep.join(parts[-count:])
            alike = [other for other in places if ends_with(other, name)]
            if len(alike) == 1 and name != PUBLISHED_NAME:
                break
        names[name] = place
    return names


def ends_with(path, name):
    """Whether `name` is the last part, or parts, of a path."""
    return path == name or path.endswith(os.sep + name)


def group_seeds(experiments, seeds):
    """Returns {name: names of experiments}: a group for each of --seeds, the others alone."""
    name_of = {experiment.folder: name for name, experiment in experiments.items()}
    groups = {}
    several = []
    for name, folders in seeds.items():
        groups[name] = [name_of[place_of(folder)] for folder in folders]
        several += groups[name]
        if name in experiments and name not in groups[name]:
            raise BadInput(f'--seeds {name}: there is another experiment {name}')
    twice = [name for name in several if several.count(name) > 1]
    if twice:
        raise BadInput(f'--seeds: {experiments[twice[0]].folder} is named twice')

    alone = {name: [name] for name in experiments if name not in several}
    published = alone.pop(PUBLISHED_NAME)
    return {**alone, **groups, PUBLISHED_NAME: published}


def find_baseline(wanted, experiments, groups):
    """Returns the name of the group that --baseline names, by name or folder; else the first."""
    if wanted is None:
        return next(iter(groups))
    for name, members in groups.items():
        folders = [experiments[member].folder for member in members]
        if wanted in (name, *members) or place_of(wanted) in folders:
            return name
    raise BadInput(f'--baseline {wanted}: is not one of the experiments ({", ".join(groups)})')


def read_runs(experiment):
    """Reads what --eval wrote on each list of an experiment: [Run]."""
    runs = []
    for path, entry in experiment.lists.items():
        if 'sha256' not in entry:
            continue  # the published experiment has only figures
        run = Run(path, entry, *read_list_scores(experiment.folder, path, entry))
        for kind, scores in run.scores.items():
            if scores.min() == scores.max():
                note(f'{experiment.folder}: {path}: all {kind} scores are equal; they tell nothing')
        runs.append(run)
    return runs


def sort_by_list(runs):
    """Sorts {experiment: [Run]} by trials: {experiment: {ListKey: Run}}.

    If an experiment has several scores of the same trials, the paths of the lists tell them apart.
    """
    by_trials = {name: group_by_trials(each) for name, each in runs.items()}
    several = set()
    for found in by_trials.values():
        several.update(trials for trials, alike in found.items() if len(alike) > 1)

    lists = {}
    for name, found in by_trials.items():
        lists[name] = {}
        for trials, alike in found.items():
            for run in alike:
                key = ListKey(trials, os.path.abspath(run.path) if trials in several else '')
                if key in lists[name]:
                    note(f'{name}: {run.path} has two entries in results.json; the last one counts')
                lists[name][key] = run
    return lists


def group_by_trials(runs):
    """Groups runs: {what tells their trials from others: [Run]}, equal scores only once."""
    groups = {}
    for run in runs:
        alike = groups.setdefault(trials_of(run), [])
        if not any(same_scores(run, other) for other in alike):
            alike.append(run)
    return groups


def same_scores(run, other):
    """Whether two runs on the same trials have the same scores."""
    if list(run.scores) != list(other.scores) or len(run.labels) != len(other.labels):
        return False
    pairs = zip(run.scores.values(), other.scores.values())
    return all(np.allclose(np.sort(one), np.sort(two), atol=1e-5) for one, two in pairs)


def trials_of(run):
    """Returns what tells the trials of a run from others: their files and labels, in any order."""
    if run.entry.get('options', {}).get('enrol_list'):
        return run.entry['sha256']  # the utterances of models are not among the names
    targets = trial_set([name for name, label in zip(run.names, run.labels) if label])
    others = trial_set([name for name, label in zip(run.names, run.labels) if not label])
    text = repr([sorted(targets), sorted(others)])
    return sha256(text.encode('utf-8', 'surrogateescape'))


def name_lists(lists):
    """Returns {ListKey: a name that no other has}, from {ListKey: Run} of each experiment."""
    names = {}
    for runs in lists:
        for key, run in runs.items():
            if key in names:
                continue
            name = stem(run.path)
            count = 1
            while name in names.values():
                count += 1
                name = f'{stem(run.path)}_{count}'
            names[key] = name
    return names


def make_samples(lists, names, groups, speaker):
    """Returns {(name of a list, kind): {experiment: Sample}} of what the groups scored.

    An experiment of several seeds has the lists and kinds that all of them scored.
    """
    samples = {}
    for number, (name, members) in enumerate(groups.items()):
        for key in dict.fromkeys(key for member in members for key in lists[member]):
            runs = [lists[member].get(key) for member in members]
            if None in runs:
                note(f'{name}: {names[key]} is left out, as not all of its seeds were scored on it')
                continue
            speakers, fault = number_speakers_of(runs, speaker)
            if fault:
                note(f'{name}, {names[key]}: no intervals: {fault}')
            for kind in runs[0].scores:
                if all(kind in run.scores for run in runs):
                    sample = sample_of(runs, kind, speakers, number)
                    samples.setdefault((names[key], kind), {})[name] = sample
    return samples


def number_speakers_of(runs, speaker):
    """Numbers the speakers of the trials of runs: ([int (N, 2)], ''), or (None, why it cannot)."""
    numbers = []
    for run in runs:
        rows = {file: row for row, file in enumerate({file for pair in run.names for file in pair})}
        pairs = np.array([[rows[enrolment], rows[test]] for enrolment, test in run.names])
        try:
            speakers = speakers_of(list(rows), pattern_of(run.entry, speaker))
        except BadInput as error:
            return None, str(error)
        of_run, fault = number_speakers(run.labels, pairs, speakers)
        if fault:
            return None, fault
        numbers.append(of_run)
    return numbers, ''


def pattern_of(entry, speaker):
    """Returns the --speaker of a list: the one given, or that of --eval."""
    return speaker or entry.get('options', {}).get('speaker', '')


def sample_of(runs, kind, speakers, group):
    """Returns the Sample of a kind of scores of runs, one for each seed, of the group of a number.

    speakers: [int (N, 2)] of the runs, None if not known.
    """
    labels = runs[0].labels
    scores = runs[0].scores[kind]
    figures = [operating_points(run.scores[kind], run.labels) for run in runs]
    if speakers is None:
        return Sample(figures, None, 0, scores, labels)

    count = int(speakers[0].max()) + 1
    draws = draw_speakers(count)
    of_seeds = [
        replicate_figures(run.scores[kind], run.labels, numbers, draws, f'how sure, {kind}')
        for run, numbers in zip(runs, speakers)
    ]
    # Replicate r takes its figures from seed chosen[r]. The draws of speakers are the same in all
    # groups, the draws of seeds are not: two recipes' first seeds have nothing in common.
    chosen = np.random.default_rng([1, group]).integers(len(runs), size=len(draws))
    replicates = np.array([of_seeds[seed][r] for r, seed in enumerate(chosen)])
    return Sample(figures, replicates, count, scores, labels)


def note(text):
    """Prints a note, beside the tables on standard output."""
    print(f'note: {text}', file=sys.stderr)


def training_rows(experiments):
    """Rows of cells: of each experiment its epochs, last and best EER, and mean of the last ten."""
    rows = [['experiment', 'epochs', 'last EER', 'best EER', 'at epoch', 'mean of last 10']]
    for name, experiment in experiments.items():
        if experiment.epochs:
            eers = np.array([line[4] for line in experiment.epochs])
            best = eers.argmin()
            rows.append(
                [
                    name,
                    str(experiment.epochs[-1][0]),
                    f'{eers[-1]:.2f}%',
                    f'{eers[best]:.2f}%',
                    str(experiment.epochs[best][0]),
                    f'{eers[-10:].mean():.2f}%',
                ]
            )
    return rows


def score_rows(experiments, lists, names, speaker):
    """Rows of cells: the figures of each list and kind of scores of each experiment."""
    header = ['experiment', 'checkpoint', 'list', 'kind', 'trials', 'speakers']
    rows = [header + [*FIGURES, *CALIBRATED]]
    for name, experiment in experiments.items():
        name_of = {run.path: names[key] for key, run in lists[name].items()}
        runs = {run.path: run for run in lists[name].values()}
        for path, entry in experiment.lists.items():
            checkpoint = os.path.basename(entry['checkpoint']['path'])
            counts = [f'{entry["trials"]:,}', format_count(entry.get('speakers'))]
            costs = calibrated(experiment, runs, path, speaker)
            for kind, figures in entry['figures'].items():
                figures = {**figures, **costs.get(kind, {})}
                cells = [format_figure(figure, figures) for figure in (*FIGURES, *CALIBRATED)]
                list_name = name_of.get(path, stem(path))
                rows.append([name, checkpoint, list_name, kind, *counts, *cells])
    return without_empty_columns(rows)


def calibrated(experiment, runs, path, speaker):
    """Returns {kind: {'Cllr', 'minCllr'}} of a list by its folder's calibration.json.

    runs: {path: Run} of the experiment. Empty if the calibration is for other scores, or was fitted
    on these trials.
    """
    run = runs.get(path)
    calibration = read_calibration(experiment.folder) if run else None
    if not calibration or calibration['kind'] not in run.scores:
        return {}
    options = argparse.Namespace(**run.entry.get('options', {}))
    if why_not_for(calibration, run.entry['checkpoint'], run.scores, options):
        return {}
    if calibration['list']['sha256'] == run.entry['sha256']:
        return {}
    fitted = runs.get(calibration['list']['path'])
    if fitted:
        if trial_set(run.names) == trial_set(fitted.names):
            return {}
        overlap = note_overlap(run.names, fitted.names, pattern_of(run.entry, speaker))
        if overlap:
            note(f'{experiment.folder}: the Cllr of {path} is too good: {overlap}')
    kind = calibration['kind']
    ratios = calibration['weight'] * run.scores[kind] + calibration['bias']
    figures = calibration_figures(ratios, run.labels)
    return {kind: {name: figures[name] for name in CALIBRATED}}


def without_empty_columns(rows):
    """Rows of cells without the columns in which all but the header is '-'."""
    columns = [column for column in zip(*rows) if set(column[1:]) != {'-'}]
    return [list(row) for row in zip(*columns)]


def seed_rows(groups, samples):
    """Rows of cells on experiments of several seeds: mean, lowest and highest, interval of both."""
    rows = [['experiment', 'list', 'kind', 'figure', 'mean', 'seeds', 'seeds and speakers']]
    for (path, kind), by_name in samples.items():
        for name, sample in by_name.items():
            if len(groups[name]) == 1:
                continue
            intervals = sample.intervals()
            means = sample.values()
            for figure in FIGURES:
                values = [figures[figure]['value'] for figures in sample.figures]
                lowest = figure_text(min(values), figure)
                highest = figure_text(max(values), figure)
                mean = figure_text(means[figure], figure)
                interval = interval_text(intervals.get(figure), figure)
                rows.append([name, path, kind, figure, mean, f'{lowest} to {highest}', interval])
    return rows


def difference_rows(samples, baseline):
    """Rows of cells: differences from the baseline of the others that scored the same trials."""
    rows = [['experiment', 'minus', 'list', 'kind', *FIGURES]]
    for (path, kind), by_name in samples.items():
        for name, sample in by_name.items():
            if name != baseline and baseline in by_name:
                cells = differences(sample, by_name[baseline])
                rows.append([name, baseline, path, kind, *cells])
    return rows


def differences(sample, baseline):
    """Returns cells of the differences of a sample's FIGURES from a baseline's, with intervals."""
    intervals = difference_intervals(sample, baseline)
    values = sample.values()
    baseline_values = baseline.values()
    cells = []
    for figure in FIGURES:
        interval = intervals.get(figure)
        text = figure_text(values[figure] - baseline_values[figure], figure, '+')
        text += f' ({interval_text(interval, figure, "+")})'
        if interval and interval[0] <= 0 <= interval[1]:
            text += ', cannot be told apart on these trials'
        cells.append(text)
    return cells


def difference_intervals(sample, baseline):
    """Returns {figure: [low, high]} of the figures that have an interval on both sides."""
    known = sample.intervals().keys() & baseline.intervals().keys()
    intervals = {}
    for column, figure in enumerate(FIGURES):
        if figure in known:
            difference = sample.replicates[:, column] - baseline.replicates[:, column]
            intervals[figure] = difference_interval(difference, sample.speakers)
    return intervals


def note_uncompared(lists, names, groups, baseline):
    """Says which lists of the other experiments have trials that the baseline did not score."""
    known = lists[groups[baseline][0]]
    for name, members in groups.items():
        for key, run in lists[members[0]].items():
            if key not in known:
                note(
                    f'{name}, {names[key]}: not compared, as {baseline} did not score these '
                    f'{len(run.labels):,} trials ({run.path})'
                )


def figure_text(value, figure, sign=''):
    """The text of a figure's value or, with sign '+', of a difference."""
    return f'{value:{sign}.2f}' if figure == 'EER' else f'{value:{sign}.4f}'


def interval_text(interval, figure, sign=''):
    """The text of [low, high], '-' for None."""
    if interval is None:
        return '-'
    low, high = interval
    return f'{figure_text(low, figure, sign)} to {figure_text(high, figure, sign)}'


def stem(path):
    """The last part of a path, without its ending."""
    return os.path.splitext(os.path.basename(path))[0]


def print_table(rows, markdown):
    """Prints rows of cells, the first of them the header, aligned or as Markdown."""
    if not markdown:
        print(table(rows))
        return
    for row in [rows[0], ['---'] * len(rows[0]), *rows[1:]]:
        print(f'| {" | ".join(row)} |')


def draw_all(experiments, samples, folder):
    """Draws training curves, EERs with intervals and DET curves, where matplotlib is installed."""
    try:
        from exps import draw
    except ModuleNotFoundError as error:
        print(f'not drawn: {error.name} is not installed')
        return
    curves = {name: each.epochs for name, each in experiments.items() if each.epochs}
    draw.draw_curves(os.path.join(folder, 'curves.png'), curves)
    verification = {}
    by_experiment = {}
    by_list = {}
    for (path, kind), by_name in samples.items():
        for name, sample in by_name.items():
            label = f'{name}, {kind}'
            curve = label if len(sample.figures) == 1 else f'{label}, the first'
            verification.setdefault(path, {})[curve] = sample.scores, sample.labels
            if sample.replicates is not None:
                eer = sample.values()['EER']
                # An EER of 0 has no interval.
                bar = eer, sample.intervals().get('EER', [eer, eer])
                by_experiment.setdefault(path, {})[label] = {path: bar}
                by_list.setdefault(path, {})[label] = bar
    for path, curves_of_list in verification.items():
        draw.draw_det(os.path.join(folder, f'det_{path}.png'), curves_of_list)
    for path, rows in by_experiment.items():
        draw.draw_intervals(os.path.join(folder, f'eer_{path}.png'), rows)
    if len(by_list) > 1:
        draw.draw_intervals(os.path.join(folder, 'eer.png'), by_list)


if __name__ == '__main__':
    main()
