"""Compares experiments: tables of their figures, training curves, and DET curves.

    python -m exps.compare exps/*/score.txt exps/*/results.json

A path stands for its folder, whose score.txt (training) and results.json (--eval) are read. The
published run is shown beside them. `--markdown` prints the tables for a paper or a README. Where
matplotlib is installed, training curves are drawn, and DET curves of the scores that --eval wrote,
one picture a list.
"""

import argparse
import os
from typing import NamedTuple

import numpy as np

from tools import (
    FIGURES,
    BadInput,
    exit_on_bad_input,
    format_figure,
    read_results,
    read_scores,
    read_trial_scores,
    table,
)

PUBLISHED = os.path.join(os.path.dirname(os.path.abspath(__file__)), 'pretrain_score.txt')
# Its README's figures of exps/pretrain.model; the first is the best of 80 epochs on this list.
PUBLISHED_LISTS = {
    'Vox1_O': {
        'figures': {'raw': {'EER': {'value': 0.96}}, 'asnorm': {'EER': {'value': 0.86}}},
        'trials': 37611,
        'checkpoint': {'path': 'pretrain.model'},
    }
}


class Experiment(NamedTuple):
    """A run's folder, the lines of its score.txt, and the entries of its results.json by list."""

    folder: str
    epochs: list
    lists: dict


def main(argv=None):
    """Prints the tables and draws the curves; exit status 2, with a sentence, for other files."""
    parser = argparse.ArgumentParser(
        prog='python -m exps.compare', description='Compare experiments.'
    )
    parser.add_argument('scores', nargs='+', help='score.txt or results.json files of experiments')
    parser.add_argument('--out', default='exps', help='folder of curves.png and det_LIST.png')
    parser.add_argument('--markdown', action='store_true', help='print the tables as Markdown')
    args = parser.parse_args(argv)
    with exit_on_bad_input():
        experiments = read_experiments(args.scores)
        print_table(training_rows(experiments), args.markdown)
        print()
        print_table(score_rows(experiments), args.markdown)
        draw_all(experiments, args.out)


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

        name = os.path.basename(folder)
        if name in experiments and experiments[name].folder != folder:
            name = path
        experiments[name] = Experiment(folder, epochs, lists)
    experiments['published'] = Experiment('', read_scores(PUBLISHED), PUBLISHED_LISTS)
    return experiments


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
    rows = [['experiment', 'checkpoint', 'list', 'kind', 'trials', *FIGURES]]
    for name, experiment in experiments.items():
        for path, entry in experiment.lists.items():
            checkpoint = os.path.basename(entry['checkpoint']['path'])
            for kind, figures in entry['figures'].items():
                cells = [format_figure(figure, figures) for figure in FIGURES]
                trials = f'{entry["trials"]:,}'
                rows.append([name, checkpoint, stem(path), kind, trials, *cells])
    return rows


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


def draw_all(experiments, folder):
    """Draws training curves and DET curves, where matplotlib is installed."""
    verification = read_verification(experiments)
    try:
        from exps import draw
    except ModuleNotFoundError as error:
        print(f'not drawn: {error.name} is not installed')
        return
    curves = {name: each.epochs for name, each in experiments.items() if each.epochs}
    draw.draw_curves(os.path.join(folder, 'curves.png'), curves)
    for name, scores in verification.items():
        draw.draw_det(os.path.join(folder, f'det_{name}.png'), scores)


def read_verification(experiments):
    """{list: {experiment and kind: (scores (N,), labels (N,))}} of the scores that --eval wrote."""
    verification = {}
    for name, experiment in experiments.items():
        scores_folder = os.path.join(experiment.folder, 'scores')
        if not experiment.folder or not os.path.isdir(scores_folder):
            continue
        entries = {os.path.basename(one['scores']): one for one in experiment.lists.values()}
        for file in sorted(os.listdir(scores_folder)):
            path = os.path.join(scores_folder, file)
            if file not in entries:
                print(f'not drawn: {path}, which results.json beside it does not name')
                continue
            labels, scores, _ = read_trial_scores(path)
            kinds = list(entries[file]['figures'])
            if len(kinds) != scores.shape[1]:
                raise BadInput(f'{path}: other columns than results.json names; score it again')
            for kind, column in zip(kinds, scores.T):
                curve = verification.setdefault(stem(file), {})
                curve[f'{name}, {kind}'] = column, labels
    return verification


if __name__ == '__main__':
    main()
