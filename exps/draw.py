"""The pictures of `python -m exps.compare`: curves, intervals, DET curves. Needs matplotlib."""

import os

import matplotlib
import numpy as np
from matplotlib import pyplot
from scipy.special import ndtri

from tools import error_curve, operating_points, write_whole

matplotlib.use('agg')


def draw_all(experiments, samples, folder):
    """Draws all pictures of exps.compare into a folder.

    experiments: {name: Experiment}; samples: {(name of a list, kind): {experiment: Sample}}.
    """
    curves = {name: each.epochs for name, each in experiments.items() if each.epochs}
    draw_curves(os.path.join(folder, 'curves.png'), curves)

    # Sort by list: scores for DET curves, and EERs with their intervals.
    scores_of = {}
    eers_of = {}
    for (path, kind), by_name in samples.items():
        for name, sample in by_name.items():
            label = f'{name}, {kind}'
            curve = label if len(sample.figures) == 1 else f'{label}, first seed'
            scores_of.setdefault(path, {})[curve] = sample.scores, sample.labels
            if sample.replicates is not None:
                eer = sample.values()['EER']
                # An EER of 0 has no interval.
                interval = sample.intervals().get('EER', [eer, eer])
                eers_of.setdefault(path, {})[label] = eer, interval

    for path, curves in scores_of.items():
        draw_det(os.path.join(folder, f'det_{path}.png'), curves)
    for path, bars in eers_of.items():
        rows = {label: {path: bar} for label, bar in bars.items()}
        draw_intervals(os.path.join(folder, f'eer_{path}.png'), rows)
    if len(eers_of) > 1:
        draw_intervals(os.path.join(folder, 'eer.png'), eers_of)


def draw_curves(path, curves):
    """Draws loss, accuracy and EER over epochs to a PNG.

    curves: {experiment: lines of its score.txt}.
    """
    figure, panels = pyplot.subplots(1, 3, figsize=(15, 4.5), layout='constrained')
    titles = ('training loss', 'training accuracy (%)', 'EER (%)')
    for axes, column, title in zip(panels, (2, 3, 4), titles):
        for name, lines in curves.items():
            epochs, values = np.array(lines)[:, [0, column]].T
            axes.plot(epochs, values, '.-', label=name)
        axes.set(title=title, xlabel='epoch')
        axes.grid(alpha=0.3)

    eer_panel = panels[2]
    eer_panel.set_yscale('log')
    eer_panel.yaxis.set_major_formatter(lambda value, _: f'{value:g}')
    eer_panel.yaxis.set_minor_formatter(label_of_minor_tick)
    eer_panel.legend()
    save(figure, path)


def label_of_minor_tick(value, _):
    """Returns the number at 2, 3 and 5 of each decade, and nothing elsewhere."""
    first_digit = f'{value:e}'[0]
    return f'{value:g}' if first_digit in '235' else ''


def draw_det(path, experiments):
    """Draws DET curves (Martin et al., Eurospeech 1997) to a PNG.

    experiments: {name: (scores (N,), labels (N,))}.
    """
    figure, axes = pyplot.subplots(figsize=(6, 6), layout='constrained')
    lowest = 0.5
    for name, (scores, labels) in experiments.items():
        plot_det(axes, name, scores, labels)
        # The axes end at half an error: fewer than one cannot be seen.
        targets = labels.sum()
        fewest = min(targets, len(labels) - targets)
        lowest = min(lowest, max(0.5 / fewest, 1e-4))

    limits = (ndtri(lowest), ndtri(0.6))
    axes.plot(limits, limits, ':', color='grey')
    ticks = np.array([0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 40, 60, 80]) / 100
    tick_labels = [f'{100 * tick:g}' for tick in ticks]
    for axis, errors in ((axes.xaxis, 'false alarms'), (axes.yaxis, 'misses')):
        axis.set_ticks(ndtri(ticks), tick_labels)
        axis.set_label_text(f'{errors} (%)')

    title = os.path.basename(path)[len('det_') : -len('.png')]
    axes.set(xlim=limits, ylim=limits, title=title, aspect='equal')
    axes.grid(alpha=0.3)
    axes.legend(loc='upper right')
    save(figure, path)


def plot_det(axes, name, scores, labels):
    """Plots the DET curve of scores (N,) with labels (N,), and a point at its EER."""
    misses, false_alarms, _ = error_curve(scores, labels)
    points = operating_points(scores, labels)
    eer = points['EER']['value']
    cost = points['minDCF(0.05)']['value']

    seen = (misses > 0) & (false_alarms > 0)
    label = f'{name}: EER {eer:.2f}%, minDCF(0.05) {cost:.3f}'
    (line,) = axes.plot(ndtri(false_alarms[seen]), ndtri(misses[seen]), label=label)
    equal = ndtri(eer / 100)
    axes.plot(equal, equal, 'o', color=line.get_color())


def draw_intervals(path, rows):
    """Draws EERs with bars of their intervals to a PNG.

    rows: {row: {series: (EER, (low, high))}} in percent. A series has the same colour in all rows.
    """
    every_series = list(dict.fromkeys(name for bars in rows.values() for name in bars))
    size = (7, 1 + (0.25 + 0.15 * len(every_series)) * len(rows))
    figure, axes = pyplot.subplots(figsize=size, layout='constrained')
    for number, name in enumerate(every_series):
        colour = f'C{number}'
        shift = (number - (len(every_series) - 1) / 2) * 0.7 / len(every_series)
        for row, bars in enumerate(rows.values()):
            if name in bars:
                eer, interval = bars[name]
                heights = [row + shift, row + shift]
                axes.plot(interval, heights, '-', color=colour, linewidth=3, alpha=0.5)
                axes.plot(eer, row + shift, 'o', color=colour, markersize=4)
        # An empty line of that colour, for the legend.
        axes.plot([], [], 'o-', color=colour, label=name)

    axes.set_yticks(range(len(rows)), list(rows))
    axes.set(ylim=(len(rows) - 0.4, -0.6), xlabel='EER (%) with 95 % interval')
    axes.grid(alpha=0.3)
    if len(every_series) > 1:
        axes.legend()
    save(figure, path)


def save(figure, path):
    """Writes a figure to a PNG."""
    folder = os.path.dirname(os.path.abspath(path))
    os.makedirs(folder, exist_ok=True)
    write_whole(path, lambda file: figure.savefig(file, format='png', dpi=120))
    pyplot.close(figure)
    print(f'drawn: {path}')
