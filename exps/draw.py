"""The pictures of `python -m exps.compare`: training curves and DET curves. Needs matplotlib."""

import os

import matplotlib
import numpy as np
from matplotlib import pyplot
from scipy.special import ndtri

from tools import ComputeErrorRates, operating_points, write_whole

matplotlib.use('agg')


def draw_curves(path, curves):
    """Draws loss, accuracy and EER over epochs to a PNG, of {experiment: lines of its score.txt}."""
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
