"""Compares experiments: tables of their figures, differences with intervals, and pictures.

    python -m exps.compare exps/*/score.txt exps/*/results.json

Each path stands for its folder. The script reads score.txt (training) and results.json (--eval) in
it, and shows the published run too. `--markdown` prints the tables for a paper or a README.

Experiments that scored the same trials are compared in pairs: a table shows how their figures
differ from those of the first experiment, or of --baseline, with a 95 % interval. For both
experiments the same speakers are drawn (scoring.replicate_figures). If an interval contains 0,
these trials cannot tell the two experiments apart.

    python -m exps.compare --seeds small=exps/small-1,exps/small-2,exps/small-3 exps/phone

takes three folders as one experiment, `small`, that was run with three seeds. Its interval contains
both sources of chance: each replicate draws a seed, and speakers. So it is the interval of a single
run with any seed, and is wider than the interval of the mean over the seeds. A few seeds show only
a part of the spread between seeds: three of them show two thirds of its variance.
"""

import argparse
import os
import re
from collections import Counter
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
    scores_path,
    table,
)
from tools import (
    FIGURES,
    HARMLESS,
    BadInput,
    exit_on_bad_input,
    note,
    operating_points,
    read_bytes,
    read_scores,
    sha256,
)

PUBLISHED_NAME = 'published'
PUBLISHED = os.path.join(os.path.dirname(os.path.abspath(__file__)), 'pretrain_score.txt')
# Figures that the published README gives for its checkpoint; 0.96 is the best of 80 epochs.
PUBLISHED_LISTS = {
    'Vox1_O': {
        'figures': {'raw': {'EER': {'value': 0.96}}, 'asnorm': {'EER': {'value': 0.86}}},
        'trials': 37611,
        'speakers': 40,
        'checkpoint': {'path': 'pretrain.model'},
    }
}


class Experiment(NamedTuple):
    """The folder of one run, the lines of its score.txt, and its results.json: {list: entry}."""

    folder: str
    epochs: list
    lists: dict


class Run(NamedTuple):
    """The scores of one run on one list.

    path, entry: the list's in results.json; labels: (N,); scores: {kind: (N,)}; names: [(enrolment,
    test)].
    """

    path: str
    entry: dict
    labels: np.ndarray
    scores: dict
    names: list


class ListKey(NamedTuple):
    """Identifies a list of trials in all experiments.

    trials: what trials_of returns; path: '' unless one experiment scored these trials as several
    lists, for example on other audio.
    """

    trials: str
    path: str


class Sample(NamedTuple):
    """The scores of an experiment, with one or several seeds, of one list and kind.

    figures: for each seed {figure: {'value'}}; replicates: (replicates, 3) values of FIGURES, each
    from one of the seeds, None if the speakers are not known; speakers: how many; scores, labels:
    (N,) of the first seed.
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
    """Runs the script. Exits with status 2 and a message if the input cannot be used."""
    parser = argparse.ArgumentParser(
        prog='python -m exps.compare', description='Compare experiments.'
    )
    add = parser.add_argument
    add('scores', nargs='*', help='folders of experiments, or their score.txt or results.json')
    add(
        '--seeds',
        action='append',
        default=[],
        metavar='NAME=FOLDER,FOLDER...',
        help='folders of one experiment that was run with several seeds; can be repeated',
    )
    add(
        '--baseline',
        help='experiment to compare the others with (default: the first that has scores)',
    )
    add('--out', default='exps', help='folder for the pictures')
    add('--markdown', action='store_true', help='print the tables as Markdown')
    add_speaker_option(add)
    args = parser.parse_args(argv)
    if not args.scores and not args.seeds:
        parser.error('give folders of experiments, or --seeds')
    with exit_on_bad_input():
        compare(args)


def compare(args):
    """Reads the experiments, prints the tables and draws the pictures."""
    # Read the experiments, and the scores of their lists.
    seeds = read_seeds(args.seeds)
    folders = [folder for members in seeds.values() for folder in members]
    experiments = read_experiments([*args.scores, *folders])
    groups = group_seeds(experiments, seeds)
    note_other_options(seeds)
    lists = sort_by_list({name: read_runs(each) for name, each in experiments.items()})
    names = name_lists(lists.values())
    baseline = find_baseline(args.baseline, experiments, groups, lists)
    samples = make_samples(lists, names, groups, args.speaker)

    # Print the tables; the last two only if they have rows.
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
    """Reads experiments by their paths: {name: Experiment}, the published one last."""
    files = {}
    for path in paths:
        if not os.path.exists(path):
            raise BadInput(f'{path}: no such file or folder')
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

    A score.txt with another name stands for itself, without its ending.
    """
    place = os.path.abspath(path)
    if os.path.isdir(place):
        return place
    folder, name = os.path.split(place)
    return folder if name in ('score.txt', 'results.json') else os.path.splitext(place)[0]


def name_places(places):
    """Names places by their paths after the folders that all of them share: {name: place}."""
    parts = [place.split(os.sep) for place in places]
    shared = len(os.path.commonprefix([folders[:-1] for folders in parts]))
    names = {}
    for place, folders in zip(places, parts):
        name = os.sep.join(folders[shared:])
        names[place if name == PUBLISHED_NAME else name] = place
    return names


def read_lists(folder):
    """Reads a folder's results.json; prints a note if it cannot be read, and returns {}."""
    try:
        return read_results(folder)
    except BadInput as error:
        note(error)
        return {}


def group_seeds(experiments, seeds):
    """Groups runs into experiments, {name: names of its runs}; without --seeds each is one run."""
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

    single = {name: [name] for name in experiments if name not in several}
    published = single.pop(PUBLISHED_NAME)
    return {**single, **groups, PUBLISHED_NAME: published}


def note_other_options(seeds):
    """Prints a note if the runs of --seeds differ in more than --seed and harmless options."""
    for name, folders in seeds.items():
        options = [read_options(place_of(folder)) for folder in folders]
        known = [own for own in options if own]  # an evaluation has no options.txt
        names = sorted(set().union(*known))
        differing = [option for option in names if len({own.get(option) for own in known}) > 1]
        if differing:
            note(f'--seeds {name}: the runs differ in other options too: {", ".join(differing)}')


def read_options(folder):
    """Reads options.txt without harmless options and --seed: {option: its line}."""
    options = {}
    text = read_bytes(os.path.join(folder, 'options.txt'), missing=b'').decode(errors='replace')
    for line in text.splitlines():
        match = re.match(r'--(\w+)', line)
        if match and match[1] not in {'seed', *HARMLESS}:
            options[match[0]] = line
    return options


def find_baseline(wanted, experiments, groups, lists):
    """Finds the group that --baseline means, by a name or a folder; returns its name.

    Without --baseline it is the first that has scores. Raises BadInput if there is no such group.
    """
    if wanted is None:
        scored = [name for name, members in groups.items() if lists[members[0]]]
        return [*scored, *groups][0]
    for name, members in groups.items():
        folders = [experiments[member].folder for member in members]
        if wanted in (name, *members) or place_of(wanted) in folders:
            return name
    raise BadInput(f'--baseline {wanted}: not one of the experiments ({", ".join(groups)})')


def read_runs(experiment):
    """Reads the scores that --eval wrote for each list of an experiment: [Run].

    Prints a note about lists without scores, as in exps/open: their figures are known, but cannot
    be compared.
    """
    runs = []
    without_scores = []
    for path, entry in experiment.lists.items():
        if 'sha256' not in entry:
            continue  # of the published experiment there are only figures
        if not os.path.exists(scores_path(experiment.folder, entry['scores'])):
            without_scores.append(path)
            continue
        run = Run(path, entry, *read_list_scores(experiment.folder, path, entry))
        for kind, scores in run.scores.items():
            if scores.min() == scores.max():
                note(f'{experiment.folder}: {path}: all {kind} scores are equal and mean nothing')
        runs.append(run)
    if without_scores:
        lists = ', '.join(without_scores)
        note(f'{experiment.folder}: not compared, as there are no scores: {lists}')
    return runs


def sort_by_list(runs):
    """Sorts {experiment: [Run]} by trials: {experiment: {ListKey: Run}}."""
    lists = {}
    several = set()
    for name, each in runs.items():
        lists[name] = {}
        for run in each:
            key = ListKey(trials_of(run), os.path.abspath(run.path))
            if key in lists[name]:
                note(f'{name}: {run.path} has two entries in results.json; the last one counts')
            lists[name][key] = run
        counts = Counter(key.trials for key in lists[name])
        several.update(trials for trials, count in counts.items() if count > 1)

    # Other experiments may have the same trials in another file, so a path tells lists apart only
    # if one experiment scored the same trials as several lists.
    return {
        name: {
            key if key.trials in several else key._replace(path=''): run
            for key, run in found.items()
        }
        for name, found in lists.items()
    }


def trials_of(run):
    """Returns a string that identifies the trials of a run by files and labels, in any order."""
    if run.entry.get('options', {}).get('enrol_list'):
        return run.entry['sha256']  # a trial has the model's name, not its utterances
    targets = trial_set([name for name, label in zip(run.names, run.labels) if label])
    others = trial_set([name for name, label in zip(run.names, run.labels) if not label])
    text = repr([sorted(targets), sorted(others)])
    return sha256(text.encode('utf-8', 'surrogateescape'))


def name_lists(lists):
    """Names the lists of experiments ({ListKey: Run} of each): {ListKey: a different name}."""
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
    """Collects the scores of the groups: {(name of a list, kind): {experiment: Sample}}.

    An experiment with several seeds has the lists and kinds that all of them scored.
    """
    samples = {}
    for number, (name, members) in enumerate(groups.items()):
        for key in dict.fromkeys(key for member in members for key in lists[member]):
            runs = [lists[member].get(key) for member in members]
            if None in runs:
                note(f'{name}: {names[key]} is left out: not all seeds were scored on it')
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
    """Numbers the speakers of the trials of runs: ([int (N, 2)], ''), or (None, why not)."""
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
    """Makes the Sample of a kind of scores from the runs of a group, one for each seed.

    speakers: [int (N, 2)] of the runs, None if not known; group: the group's number.
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
    # Replicate r takes its figures from seed chosen[r]. All groups have the same draws of speakers,
    # but not of seeds: the first seeds of two recipes have nothing in common.
    chosen = np.random.default_rng([1, group]).integers(len(runs), size=len(draws))
    replicates = np.array([of_seeds[seed][r] for r, seed in enumerate(chosen)])
    return Sample(figures, replicates, count, scores, labels)


def training_rows(experiments):
    """Returns rows of cells: epochs, last EER, best EER and mean of the last ten EERs."""
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
    """Returns rows of cells: the figures of each experiment, list and kind of scores."""
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
    """Computes {kind: {'Cllr', 'minCllr'}} of a list with the calibration.json of its folder.

    runs: {path: Run} of the experiment. Empty if there is no calibration for these scores, or if it
    was fitted on these trials.
    """
    # Find the calibration, and whether it is for these scores.
    run = runs.get(path)
    calibration = read_calibration(experiment.folder) if run else None
    if not calibration:
        return {}
    options = argparse.Namespace(**run.entry.get('options', {}))
    if why_not_for(calibration, run.entry['checkpoint'], run.scores, options):
        return {}

    # Look at the trials that it was fitted on.
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
    """Removes columns that have only '-' below the header from rows of cells."""
    columns = [column for column in zip(*rows) if set(column[1:]) != {'-'}]
    return [list(row) for row in zip(*columns)]


def seed_rows(groups, samples):
    """Returns rows of cells for experiments with several seeds: mean, range and interval."""
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
    """Returns rows of cells: how others that scored the same trials differ from the baseline."""
    rows = [['experiment', 'minus', 'list', 'kind', *FIGURES]]
    for (path, kind), by_name in samples.items():
        for name, sample in by_name.items():
            if name != baseline and baseline in by_name:
                cells = differences(sample, by_name[baseline])
                rows.append([name, baseline, path, kind, *cells])
    return rows


def differences(sample, baseline):
    """Returns cells: the differences of FIGURES from a baseline, with 95 % intervals."""
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
    """Prints a note for each list of other experiments whose trials the baseline did not score."""
    known = lists[groups[baseline][0]]
    for name, members in groups.items():
        for key, run in lists[members[0]].items():
            if key not in known:
                note(
                    f'{name}, {names[key]}: not compared: {baseline} did not score these '
                    f'{len(run.labels):,} trials ({run.path})'
                )


def figure_text(value, figure, sign=''):
    """Formats the value of a figure or, with sign '+', a difference."""
    return f'{value:{sign}.2f}' if figure == 'EER' else f'{value:{sign}.4f}'


def interval_text(interval, figure, sign=''):
    """Formats [low, high]; '-' for None."""
    if interval is None:
        return '-'
    low, high = interval
    return f'{figure_text(low, figure, sign)} to {figure_text(high, figure, sign)}'


def stem(path):
    """Returns the last part of a path, without its ending."""
    return os.path.splitext(os.path.basename(path))[0]


def print_table(rows, markdown):
    """Prints rows of cells, header first, as aligned text or as Markdown."""
    if not markdown:
        print(table(rows))
        return
    for row in [rows[0], ['---'] * len(rows[0]), *rows[1:]]:
        print(f'| {" | ".join(row)} |')


def draw_all(experiments, samples, folder):
    """Draws the pictures if matplotlib is installed."""
    try:
        from exps import draw
    except ModuleNotFoundError as error:
        print(f'not drawn: {error.name} is not installed')
        return
    draw.draw_all(experiments, samples, folder)


if __name__ == '__main__':
    main()
