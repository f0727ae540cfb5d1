"""Compares experiments: tables of their figures, what the trials can tell apart, and pictures.

    python -m exps.compare exps/*/score.txt exps/*/results.json

A path stands for its folder, whose score.txt (training) and results.json (--eval) are read. The
published run is shown beside them. `--markdown` prints the tables for a paper or a README.

Experiments that scored the same list (same bytes) are compared in pairs: the difference of their
figures from those of the first one named, or of --baseline, with an interval of 95 %, by the same
replicates of the speakers on both sides (tools.replicate_figures). Where it holds 0, these trials
cannot tell the two apart.

Runs that differ in --seed alone, by their options.txt, are one experiment: the mean, lowest and
highest of their seeds are shown, and an interval that holds both sources of chance, as a replicate
draws one of the seeds besides the speakers. So it is the interval of one run with any seed, which
is wider than that of the mean of the seeds; but few seeds show less than their whole spread, three
of them two thirds of its variance.

Where matplotlib is installed, training curves are drawn and, of the scores that --eval wrote, EERs
with their intervals and DET curves, one picture a list, and the EERs of all lists in one picture.
"""

import argparse
import collections
import os
import re
import sys
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from tools import (
    CALIBRATED,
    FIGURES,
    HARMLESS,
    BadInput,
    calibration_figures,
    draw_speakers,
    exit_on_bad_input,
    format_count,
    format_figure,
    interval_of,
    misfit,
    number_speakers,
    operating_points,
    read_calibration,
    read_results,
    read_scores,
    read_trial_scores,
    replicate_figures,
    speakers_of,
    table,
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


class Sample(NamedTuple):
    """What an experiment, of one or several seeds, has for a list and a kind of scores.

    figures: of each seed, {figure: {'value'}}; replicates: (replicates, 3) values of FIGURES, a
    seed drawn for each, None where speakers are not known; scores, labels: of the first seed;
    fault: why speakers are not known.
    """

    figures: list
    replicates: np.ndarray | None
    scores: np.ndarray
    labels: np.ndarray
    fault: str


def main(argv=None):
    """Prints the tables and draws the pictures; exit status 2, with a sentence, for other files."""
    parser = argparse.ArgumentParser(
        prog='python -m exps.compare', description='Compare experiments.'
    )
    add = parser.add_argument
    add('scores', nargs='+', help='score.txt or results.json files of experiments')
    add('--baseline', help='experiment that the others are compared with (default: the first)')
    add('--out', default='exps', help='folder of the pictures curves, eer, eer_LIST and det_LIST')
    add('--markdown', action='store_true', help='print the tables as Markdown')
    args = parser.parse_args(argv)
    with exit_on_bad_input():
        experiments = read_experiments(args.scores)
        baseline = args.baseline or next(iter(experiments))
        if baseline not in experiments:
            known = ', '.join(experiments)
            raise BadInput(f'--baseline {baseline}: is not one of the experiments ({known})')
        groups = group_seeds(experiments)
        samples = read_samples(experiments, groups)
        first = next(name for name, members in groups.items() if baseline in members)

        print_table(training_rows(experiments), args.markdown)
        print()
        print_table(score_rows(experiments), args.markdown)
        for rows in (seed_rows(groups, samples), difference_rows(samples, first)):
            if len(rows) > 1:
                print()
                print_table(rows, args.markdown)
        draw_all(experiments, samples, args.out)


def read_experiments(paths):
    """{name: Experiment} of the folders of paths, the published one last."""
    experiments = {}
    for path in paths:
        if not os.path.exists(path):
            raise BadInput(f'{path}: no such file')
        folder = os.path.dirname(os.path.abspath(path))
        score_path = path
        if os.path.basename(path) == 'results.json':
            score_path = os.path.join(folder, 'score.txt')
        epochs = read_scores(score_path)
        lists = {}
        try:
            lists = read_results(folder)
        except BadInput as error:
            print(f'note: {error}')
        if not epochs and not lists:
            raise BadInput(f'{path}: is empty')

        if any(folder == experiment.folder for experiment in experiments.values()):
            continue  # its score.txt and its results.json were both named
        name = os.path.basename(folder)
        if name in (*experiments, PUBLISHED_NAME):
            name = os.path.dirname(path)
        experiments[name] = Experiment(folder, epochs, lists)
    experiments[PUBLISHED_NAME] = Experiment('', read_scores(PUBLISHED), PUBLISHED_LISTS)
    return experiments


def group_seeds(experiments):
    """{name: names of experiments} that differ in --seed alone; a name of several tells how many.

    What does not change the numbers (where a run is kept, how many processes load) does not count,
    nor in which folder --initial_model is, as a second stage has the first one of its seed. Runs of
    which two have the same seed are not seeds of one experiment.
    """
    alike = {}
    for name, experiment in experiments.items():
        key, seed = options_of(experiment) or (name, '')
        alike.setdefault(key, {})[name] = seed
    groups = {}
    for seeds in alike.values():
        if len(set(seeds.values())) < len(seeds):
            groups.update({name: [name] for name in seeds})
            continue
        first = next(iter(seeds))
        name = first if len(seeds) == 1 else f'{first} ({len(seeds)} seeds)'
        groups[name] = list(seeds)
    return groups


def options_of(experiment):
    """(Options that change the numbers, the line of --seed) of options.txt, None without one."""
    path = os.path.join(experiment.folder, 'options.txt')
    if not experiment.folder or not os.path.exists(path):
        return None
    with open(path, encoding='utf-8', errors='surrogateescape') as file:
        lines = [line.rstrip('\n') for line in file if line.startswith('--')]
    options = dict(re.fullmatch('--([^ =]+)[ =]?(.*)', line).groups() for line in lines)
    seed = options.pop('seed', '')
    if 'initial_model' in options:
        options['initial_model'] = os.path.basename(options['initial_model'])
    counted = {item for item in options.items() if item[0] not in HARMLESS}
    return frozenset(counted), seed


def read_samples(experiments, groups):
    """{(name of a list, kind): {experiment: Sample}} of the scores that --eval wrote.

    Lists of the same bytes are one list, whatever their names; an experiment that scored such a
    list twice, on other audio, has two, which go by their paths. Of an experiment of several seeds,
    only lists that all of them scored count.
    """
    lists = {name: entries_by_content(experiment) for name, experiment in experiments.items()}
    names = name_lists(lists.values())
    samples = {}
    for number, (name, members) in enumerate(groups.items()):
        for content, entry in lists[members[0]].items():
            if any(content not in lists[member] for member in members):
                continue
            runs = [read_run(experiments[member], lists[member][content]) for member in members]
            for kind in entry['figures']:
                if all(kind in run for run in runs):
                    sample = sample_of([run[kind] for run in runs], number)
                    if sample.fault:
                        note = f'note: {name}, {names[content]}: no intervals: {sample.fault}'
                        print(note, file=sys.stderr)
                    samples.setdefault((names[content], kind), {})[name] = sample
    return samples


def entries_by_content(experiment):
    """{what tells a list from others: its entry} of an experiment's results.

    That is the SHA-256 of the list, and the path too where two have the same.
    """
    known = {path: entry for path, entry in experiment.lists.items() if 'sha256' in entry}
    count = collections.Counter(entry['sha256'] for entry in known.values())
    entries = {}
    for path, entry in known.items():
        entries[entry['sha256'], path if count[entry['sha256']] > 1 else ''] = entry
    return entries


def name_lists(lists):
    """{what tells a list from others: a name of its own}, after the file of its scores."""
    names = {}
    for entries in lists:
        for content, entry in entries.items():
            first = stem(entry['scores'])
            name = first
            number = 1
            while name in names.values() and content not in names:
                number += 1
                name = f'{first}_{number}'
            names.setdefault(content, name)
    return names


def read_run(experiment, entry):
    """{kind: (scores (N,), labels (N,), names of the trials)} of a list's file of scores."""
    path = os.path.join(experiment.folder, 'scores', os.path.basename(entry['scores']))
    labels, scores, names = read_trial_scores(path)
    kinds = list(entry['figures'])
    if scores.shape != (entry['trials'], len(kinds)):
        raise BadInput(f'{path}: other trials or columns than results.json names; score it again')
    return {kind: (column, labels, names) for kind, column in zip(kinds, scores.T)}


def sample_of(runs, number):
    """Sample of [(scores, labels, names)], one of each seed, of the experiment of a number."""
    scores, labels, names = runs[0]
    figures = [operating_points(seed_scores, labels) for seed_scores, _, _ in runs]
    rows = {name: row for row, name in enumerate({name: 0 for trial in names for name in trial})}
    pairs = np.array([[rows[a], rows[b]] for a, b in names])
    speakers, fault = number_speakers(labels, pairs, speakers_of(list(rows)))
    if speakers is None:
        return Sample(figures, None, scores, labels, fault)
    draws = draw_speakers(speakers.max() + 1)
    each = []
    for seed_scores, _, _ in runs:
        shown = tqdm(draws, 'how sure', disable=None, leave=False)
        each.append(replicate_figures(seed_scores, labels, speakers, shown))
    # The draws of speakers are those of every experiment, the draws of seeds its own: one recipe's
    # first seed has nothing in common with another one's.
    chosen = np.random.default_rng([1, number]).integers(len(runs), size=len(draws))
    replicates = np.stack(each)[chosen, np.arange(len(draws))]
    return Sample(figures, replicates, scores, labels, '')


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


def score_rows(experiments):
    """Rows of cells: the figures of each list and kind of scores of each experiment."""
    header = ['experiment', 'checkpoint', 'list', 'kind', 'trials', 'speakers']
    rows = [header + [*FIGURES, *CALIBRATED]]
    for name, experiment in experiments.items():
        for path, entry in experiment.lists.items():
            checkpoint = os.path.basename(entry['checkpoint']['path'])
            counts = [f'{entry["trials"]:,}', format_count(entry.get('speakers'))]
            for kind, figures in entry['figures'].items():
                figures = {**figures, **calibrated(experiment, entry, kind)}
                cells = [format_figure(figure, figures) for figure in (*FIGURES, *CALIBRATED)]
                rows.append([name, checkpoint, stem(path), kind, *counts, *cells])
    return without_empty_columns(rows)


def calibrated(experiment, entry, kind):
    """Cllr and minCllr of a list by its folder's calibration.json; {} where that is for others."""
    calibration = read_calibration(experiment.folder) if experiment.folder else None
    if not calibration or calibration['kind'] != kind:
        return {}
    options = argparse.Namespace(**entry.get('options', {}))
    if misfit(calibration, entry['checkpoint'], entry['figures'], options):
        return {}
    if calibration['list']['sha256'] == entry.get('sha256'):
        return {}
    scores, labels, _ = read_run(experiment, entry)[kind]
    figures = calibration_figures(calibration['weight'] * scores + calibration['bias'], labels)
    return {name: figures[name] for name in CALIBRATED}


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
            for column, figure in enumerate(FIGURES):
                values = [figures[figure]['value'] for figures in sample.figures]
                seeds = f'{number(min(values), figure)} to {number(max(values), figure)}'
                interval = '-'
                if sample.replicates is not None:
                    low, high = interval_of(sample.replicates[:, column])
                    interval = f'{number(low, figure)} to {number(high, figure)}'
                mean = number(np.mean(values), figure)
                rows.append([name, path, kind, figure, mean, seeds, interval])
    return rows


def difference_rows(samples, baseline):
    """Rows of cells: differences from the baseline of the others that scored the same list."""
    rows = [['experiment', 'less', 'list', 'kind', *FIGURES]]
    for (path, kind), by_name in samples.items():
        if baseline not in by_name or by_name[baseline].replicates is None:
            continue
        for name, sample in by_name.items():
            if name != baseline and sample.replicates is not None:
                cells = differences(sample, by_name[baseline])
                rows.append([name, baseline, path, kind, *cells])
    return rows


def differences(sample, baseline):
    """Cells of the differences of a sample's FIGURES from a baseline's, with intervals of 95 %."""
    cells = []
    for column, figure in enumerate(FIGURES):
        means = []
        for side in (sample, baseline):
            means.append(np.mean([figures[figure]['value'] for figures in side.figures]))
        low, high = interval_of(sample.replicates[:, column] - baseline.replicates[:, column])
        text = f'{number(means[0] - means[1], figure, "+")} '
        text += f'({number(low, figure, "+")} to {number(high, figure, "+")})'
        if low <= 0 <= high:
            text += ', cannot be told apart on these trials'
        cells.append(text)
    return cells


def number(value, figure, sign=''):
    """The text of a figure's value, or, with sign '+', of a difference."""
    return f'{value:{sign}.2f}' if figure == 'EER' else f'{value:{sign}.4f}'


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
                eers = [figures['EER']['value'] for figures in sample.figures]
                bar = np.mean(eers), interval_of(sample.replicates[:, 0])
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
