"""Compares experiments: a table and the training curves of score.txt files, and DET curves of the scores of --eval.

    python -m exps.compare exps/*/score.txt

The published run is shown beside them. A DET curve is drawn of each SAVE_PATH/scores/LIST.txt, one picture a list.
"""

import argparse
import os

import numpy as np
from scipy.special import ndtri

from tools import BadInput, ComputeErrorRates, exit_on_bad_input, operating_points, read_scores, table, write_whole
from trainECAPAModel import read_results

PUBLISHED = os.path.join(os.path.dirname(os.path.abspath(__file__)), 'pretrain_score.txt')


def main(argv=None):
    """Prints the table and draws the curves; exit status 2, with a sentence, for a file that is no score.txt."""
    parser = argparse.ArgumentParser(prog='python -m exps.compare', description='Compare experiments.')
    parser.add_argument('scores', nargs='+', help='score.txt files of experiments')
    parser.add_argument('--out', default='exps', help='folder of the pictures curves.png and det_LIST.png')
    args = parser.parse_args(argv)
    with exit_on_bad_input():
        curves, verification = read_experiments(args.scores)
        print_table(curves)
        try:
            import matplotlib
        except ModuleNotFoundError:
            print('not drawn: matplotlib is not installed')
            return
        matplotlib.use('agg')
        draw_curves(os.path.join(args.out, 'curves.png'), curves)
        for name, scores in verification.items():
            draw_det(os.path.join(args.out, f'det_{name}.png'), scores)


def read_experiments(paths):
    """({experiment: lines of its score.txt}, {trial list: {experiment and kind: (scores (N,), labels (N,))}})."""
    curves, verification = {}, {}
    for path in [*paths, PUBLISHED]:
        lines = read_scores(path)
        if not lines:
            raise BadInput(f'{path}: {"is empty" if os.path.exists(path) else "no such file"}')
        folder = os.path.dirname(os.path.abspath(path))
        name = 'published' if path == PUBLISHED else os.path.basename(folder)
        name = path if name in curves else name
        curves[name] = lines
        scores = os.path.join(folder, 'scores')
        for file in sorted(os.listdir(scores)) if os.path.isdir(scores) else []:
            kinds = kinds_of(folder, file)
            if not kinds:
                print(f'not drawn: {os.path.join(scores, file)}, which results.json beside it does not name')
                continue
            labels, *columns = read_trial_scores(os.path.join(scores, file))
            if len(kinds) != len(columns):
                raise BadInput(f'{os.path.join(scores, file)}: other columns than results.json names; score it again')
            for kind, values in zip(kinds, columns):
                verification.setdefault(os.path.splitext(file)[0], {})[f'{name}, {kind}'] = values, labels
    return curves, verification


def kinds_of(folder, file):
    """Names of the columns of scores in a file of --eval, as results.json has them; none where it has no such file."""
    for entry in read_results(folder)['lists'].values():
        if os.path.basename(entry['scores']) == file:
            return [kind for kind, figures in entry.items() if isinstance(figures, dict) and 'EER' in figures]
    return []


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


def print_table(curves):
    """Prints a row an experiment: epochs, last EER, best EER and its epoch, mean of the last ten."""
    rows = [['experiment', 'epochs', 'last EER', 'best EER', 'at epoch', 'mean of last 10']]
    for name, lines in curves.items():
        eers = np.array([line[4] for line in lines])
        best = eers.argmin()
        epochs = str(lines[-1][0]), str(lines[best][0])
        mean = f'{eers[-10:].mean():.2f}%'
        rows.append([name, epochs[0], f'{eers[-1]:.2f}%', f'{eers[best]:.2f}%', epochs[1], mean])
    print(table(rows))


def draw_curves(path, curves):
    """Draws loss, accuracy and EER over epochs to a PNG."""
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, 3, figsize=(15, 4.5), layout='constrained')
    for axes, column, title in zip(panels, (2, 3, 4), ('training loss', 'training accuracy (%)', 'EER (%)')):
        for name, lines in curves.items():
            epochs, values = np.array(lines)[:, [0, column]].T
            axes.plot(epochs, values, '.-', label=name)
        axes.set(title=title, xlabel='epoch')
        axes.grid(alpha=0.3)
    panels[2].set_yscale('log')
    panels[2].yaxis.set_major_formatter(lambda value, _: f'{value:g}')
    panels[2].yaxis.set_minor_formatter(lambda value, _: f'{value:g}' if f'{value:e}'[0] in '235' else '')
    panels[2].legend()
    save(figure, path)


def draw_det(path, experiments):
    """Draws DET curves (Martin et al., Eurospeech 1997) of {name: (scores (N,), labels (N,))} to a PNG."""
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6, 6), layout='constrained')
    ticks, lowest = np.array([0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 40, 60, 80]) / 100, 0.5
    for name, (scores, labels) in experiments.items():
        fnr, fpr, _ = ComputeErrorRates(scores, labels)
        points = operating_points(scores, labels)
        eer, cost = points['EER']['value'], points['minDCF(0.05)']['value']
        seen = (fnr > 0) & (fpr > 0)
        label = f'{name}: EER {eer:.2f}%, minDCF(0.05) {cost:.3f}'
        (line,) = axes.plot(ndtri(fpr[seen]), ndtri(fnr[seen]), label=label)
        axes.plot(*2 * [ndtri(eer / 100)], 'o', color=line.get_color())
        # Fewer than one error of either kind cannot be seen.
        lowest = min(lowest, max(0.5 / min(labels.sum(), len(labels) - labels.sum()), 1e-4))
    limits = ndtri(lowest), ndtri(0.6)
    axes.plot(limits, limits, ':', color='grey')
    for axis, side in ((axes.xaxis, 'false alarms'), (axes.yaxis, 'misses')):
        axis.set_ticks(ndtri(ticks), [f'{100 * tick:g}' for tick in ticks])
        axis.set_label_text(f'{side} (%)')
    axes.set(xlim=limits, ylim=limits, title=os.path.basename(path)[len('det_') : -len('.png')], aspect='equal')
    axes.grid(alpha=0.3)
    axes.legend(loc='upper right')
    save(figure, path)


def save(figure, path):
    """Writes a figure to a PNG."""
    os.makedirs(os.path.dirname(path) or '.', exist_ok=True)
    write_whole(path, lambda file: figure.savefig(file, format='png', dpi=120))
    print(f'drawn: {path}')


if __name__ == '__main__':
    main()
