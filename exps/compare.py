"""Compares experiments: a table of their figures, training curves, and DET curves of the scores of --eval.

    python -m exps.compare exps/*/score.txt exps/*/results.json

A path stands for its folder, whose score.txt (training) and results.json (--eval) are read. The published run is shown
beside them. `--markdown` prints the table for a paper or a README. Where matplotlib is installed, a DET curve is drawn
of each SAVE_PATH/scores/LIST.txt, one picture a list.
"""

import argparse
import os

import numpy as np

from tools import FIGURES, BadInput, exit_on_bad_input, read_scores, table
from trainECAPAModel import read_results

PUBLISHED = os.path.join(os.path.dirname(os.path.abspath(__file__)), 'pretrain_score.txt')
# Its README's figures of exps/pretrain.model; the first is the best of 80 epochs on this list.
PUBLISHED_LISTS = {'Vox1_O': {'checkpoint': 'pretrain.model', 'raw': {'EER': 0.96}, 'asnorm': {'EER': 0.86}}}


def main(argv=None):
    """Prints the table and draws the curves; exit status 2, with a sentence, for a file that is no score.txt."""
    parser = argparse.ArgumentParser(prog='python -m exps.compare', description='Compare experiments.')
    parser.add_argument('scores', nargs='+', help='score.txt or results.json files of experiments')
    parser.add_argument('--out', default='exps', help='folder of the pictures curves.png and det_LIST.png')
    parser.add_argument('--markdown', action='store_true', help='print the table as Markdown')
    args = parser.parse_args(argv)
    with exit_on_bad_input():
        experiments = read_experiments(args.scores)
        print_table(make_rows(experiments), args.markdown)
        verification = read_verification(experiments)
        try:
            from exps import draw
        except ModuleNotFoundError as error:
            print(f'not drawn: {error.name} is not installed')
            return
        curves = {name: lines for name, (_, lines, _) in experiments.items() if lines}
        draw.draw_curves(os.path.join(args.out, 'curves.png'), curves)
        for name, scores in verification.items():
            draw.draw_det(os.path.join(args.out, f'det_{name}.png'), scores)


def read_experiments(paths):
    """{experiment: (folder, lines of its score.txt, entries of its results.json by list)}, the published one last."""
    experiments = {'published': ('', read_scores(PUBLISHED), PUBLISHED_LISTS)}
    for path in paths:
        if not os.path.exists(path):
            raise BadInput(f'{path}: no such file')
        folder, results = os.path.dirname(os.path.abspath(path)), os.path.basename(path) == 'results.json'
        lines, lists = read_scores(os.path.join(folder, 'score.txt') if results else path), {}
        try:
            lists = read_results(folder)['lists']
        except BadInput as error:
            print(f'note: {error}')
        if not (lines or lists):
            raise BadInput(f'{path}: is empty')
        name = os.path.basename(folder)
        name = path if experiments.get(name, (folder,))[0] != folder else name
        experiments[name] = folder, lines, lists
    experiments['published'] = experiments.pop('published')
    return experiments


def make_rows(experiments):
    """Rows of cells: of each experiment epochs, last and best EER, mean of the last ten; of each list that it scored
    the checkpoint and the figures of every kind of scores.
    """
    entries = [entry for _, _, lists in experiments.values() for entry in lists.values()]
    figures = [(kind, name) for entry in entries for kind in kinds_of(entry) for name in entry[kind]]
    figures = [figure for figure in dict.fromkeys(figures) if figure[1] in FIGURES or figure[0] == 'calibrated']
    header = ['experiment', 'epochs', 'last EER', 'best EER', 'at epoch', 'mean of last 10', 'checkpoint', 'list']
    rows = [header + [f'{kind} {name}'.removeprefix('raw ') for kind, name in figures]]
    for experiment, (_, lines, lists) in experiments.items():
        training = ['-'] * 5
        if lines:
            eers = np.array([line[4] for line in lines])
            best = eers.argmin()
            training = [str(lines[-1][0]), *(f'{eer:.2f}%' for eer in (eers[-1], eers[best])), str(lines[best][0])]
            training.append(f'{eers[-10:].mean():.2f}%')
        for path, entry in (lists or {'-': {}}).items():
            checkpoint = entry.get('checkpoint', '-')
            checkpoint = os.path.basename(checkpoint if isinstance(checkpoint, str) else checkpoint.get('path', '-'))
            found = [entry.get(kind, {}).get(name) for kind, name in figures]
            found = [each.get('value') if isinstance(each, dict) else each for each in found]
            cells = [
                '-' if value is None else f'{value:.2f}%' if name == 'EER' else f'{value:.4f}'
                for value, (_, name) in zip(found, figures)
            ]
            rows.append([experiment, *training, checkpoint, os.path.splitext(os.path.basename(path))[0], *cells])
    return rows


def print_table(rows, markdown):
    """Prints rows of cells, the first of them the header, aligned or as Markdown."""
    if markdown:
        rows = [rows[0], ['---'] * len(rows[0]), *rows[1:]]
    print('\n'.join(f'| {" | ".join(row)} |' for row in rows) if markdown else table(rows))


def kinds_of(entry):
    """Kinds of scores in a list's entry of results.json, in the order of their columns in its file of scores."""
    return [kind for kind, figures in entry.items() if isinstance(figures, dict) and 'EER' in figures]


def read_verification(experiments):
    """{trial list: {experiment and kind: (scores (N,), labels (N,))}} of the files of scores that --eval wrote."""
    verification = {}
    for experiment, (folder, _, lists) in experiments.items():
        scores = os.path.join(folder, 'scores')
        entries = {os.path.basename(entry['scores']): entry for entry in lists.values() if 'scores' in entry}
        for file in sorted(os.listdir(scores)) if folder and os.path.isdir(scores) else []:
            path, kinds = os.path.join(scores, file), kinds_of(entries.get(file, {}))
            if not kinds:
                print(f'not drawn: {path}, which results.json beside it does not name')
                continue
            labels, *columns = read_trial_scores(path)
            if len(kinds) != len(columns):
                raise BadInput(f'{path}: other columns than results.json names; score it again')
            for kind, values in zip(kinds, columns):
                verification.setdefault(os.path.splitext(file)[0], {})[f'{experiment}, {kind}'] = values, labels
    return verification


def read_trial_scores(path):
    """Columns of a file of --eval, lines `label scores... enrolment test`: labels, and scores of each kind."""
    try:
        with open(path, encoding='utf-8', errors='surrogateescape') as lines:
            columns = np.array([line.split()[:-2] for line in lines], float).T
            if len(columns) > 1:
                return columns
        raise ValueError('it has no scores')
    except ValueError as error:
        raise BadInput(f'{path}: not a file of scores of --eval: {error}') from error


if __name__ == '__main__':
    main()
