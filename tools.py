"""Measures and small helpers: error rates, EER, minDCF, accuracy, score.txt, and the error that bad input raises."""

import argparse
import contextlib
import hashlib
import os
import platform
import re
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
import torch.distributed as dist
from scipy.special import ndtri
from sklearn.metrics import roc_curve

FIGURES = ('EER', 'minDCF(0.01)', 'minDCF(0.05)')  # the prior of a target with minDCF; both costs are 1
SCORE_LINE = '%d epoch, LR %f, LOSS %f, ACC %2.2f%%, EER %2.2f%%, bestEER %2.2f%%\n'
PUBLISHED = os.path.join(os.path.dirname(os.path.abspath(__file__)), 'exps', 'pretrain_score.txt')
SCORE_PATTERN = re.compile(r'(\d+) epoch, LR (\S+), LOSS (\S+), ACC (\S+)%, EER (\S+)%, bestEER (\S+)%\n', re.ASCII)


class BadInput(Exception):
    """What the user gave cannot be used: the message says what is wrong, where, and what to do about it."""


def process_rank():
    """Number of this process among those that train together, 0 where it is alone or the one that writes."""
    return dist.get_rank() if dist.is_initialized() else 0


def process_count():
    """How many processes train together."""
    return dist.get_world_size() if dist.is_initialized() else 1


def sum_over_processes(tensor):
    """The tensor summed over the processes that train together."""
    if process_count() > 1:
        dist.all_reduce(tensor)
    return tensor


def available_cpus():
    """Processors that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count() or 1


def init_args(args):
    """Sets args.score_save_path and args.model_save_path below args.save_path, and makes the folders."""
    args.score_save_path = os.path.join(args.save_path, 'score.txt')
    args.model_save_path = os.path.join(args.save_path, 'model')
    make_folder(args.model_save_path, '--save_path')
    return args


def gather(items):
    """The items of the lists of all processes that train together, in one list."""
    if process_count() == 1:
        return items
    lists = [None] * process_count()
    dist.all_gather_object(lists, items)
    return [item for part in lists for item in part]


def write_whole(path, write):
    """Calls write(binary file) and puts what it wrote at `path` at once: nobody ever sees a part of it.

    Whatever happens before all of it is on the disk, what was at `path` stays. Raises BadInput where the disk refuses.
    """
    temporary = f'{path}.part'
    try:
        with open(temporary, 'wb') as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        sync_folder(os.path.dirname(path) or '.')
    except (OSError, RuntimeError) as error:
        # torch.save reports a full disk as a RuntimeError.
        with contextlib.suppress(OSError):
            os.remove(temporary)
        why = error.strerror if isinstance(error, OSError) and error.strerror else str(error).splitlines()[0]
        raise BadInput(f'{path}: cannot be written ({why}); what was there before is unchanged') from error


def sync_folder(folder):
    """Has a folder's entries written to the disk, so that a file that was renamed outlives a power cut."""
    if os.name == 'nt':
        return  # Windows has no such call
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_text(path, text):
    """Writes a text file whole, as write_whole does."""
    write_whole(path, lambda file: file.write(text.encode('utf-8', 'surrogateescape')))


def write_arrays(path, **arrays):
    """Writes an .npz of named arrays whole."""
    write_whole(path, lambda file: np.savez(file, **arrays))


def make_folder(path, role):
    """Makes a folder, and those it lies in; BadInput, naming the option `role`, where that cannot be done."""
    try:
        os.makedirs(path, exist_ok=True)
    except OSError as error:
        raise BadInput(f'{role} {path}: cannot make the folder ({error.strerror})') from error


@contextlib.contextmanager
def only_run_in(folder):
    """Keeps other runs out of a folder; raises BadInput, with its process and host, where one is at work there.

    The lock is the operating system's, on run.lock: it ends with the process, however that ends, and workers do not
    inherit it.
    """
    try:
        import fcntl
    except ImportError:  # Windows
        yield
        return
    with open(os.path.join(folder, 'run.lock'), 'a+', encoding='utf-8') as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError) as error:
            file.seek(0)
            raise BadInput(
                f'--save_path {folder}: another run is at work there, {file.read().strip() or "just started"}; '
                'wait for it, stop it, or choose another folder'
            ) from error
        except OSError as error:
            print(f'{file.name}: this disk has no locks ({error.strerror}): do not start a second run', file=sys.stderr)
        file.truncate(0)
        file.write(f'process {os.getpid()} on host {platform.node()}\n')
        file.flush()
        yield


@contextlib.contextmanager
def exit_on_bad_input():
    """Turns BadInput, and what the system says of a file, into a sentence on standard error and exit status 2."""
    for stream in (sys.stdout, sys.stderr):
        # Names of files need not be UTF-8, and are printed all the same.
        stream.reconfigure(errors='backslashreplace')
    try:
        yield
    except BadInput as error:
        # From a worker process the error comes wrapped in the worker's traceback.
        print('error: ' + str(error).rpartition('BadInput: ')[2].strip(), file=sys.stderr)
        sys.exit(2)
    except OSError as error:
        if error.filename is None:
            raise
        print(f'error: {error.filename}: {error.strerror}', file=sys.stderr)
        sys.exit(2)


def digest(path):
    """SHA-256 of a file, in hexadecimal."""
    with open(path, 'rb') as file:
        return hashlib.sha256(file.read()).hexdigest()


def read_scores(path):
    """The lines of a score.txt as tuples (epoch, lr, loss, accuracy %, EER %, best EER %), oldest first.

    A missing file has no lines. Raises BadInput, with the line number, on a line of another format.
    """
    scores = []
    if not os.path.exists(path):
        return scores
    with open(path, encoding='utf-8', errors='replace') as lines:
        for number, line in enumerate(lines, 1):
            match = SCORE_PATTERN.fullmatch(line)
            if not match:
                raise BadInput(f'{path}, line {number}: not a line of a score.txt: {line.strip()!r}')
            scores.append((int(match[1]), *map(float, match.groups()[1:])))
    return scores


def score_pairs(embeddings, pairs):
    """Scores (N,) of pairs (N, 2) of rows of embeddings (files, 2, 192), as ECAPAModel.embed_files makes them.

    A score is half the cosine of the whole utterances plus half the mean cosine of the 25 pairs of their crops.
    """
    vectors = embeddings.reshape(len(embeddings), -1)
    scores = np.empty(len(pairs), vectors.dtype)
    for start in range(0, len(pairs), 4096):
        first, second = pairs[start : start + 4096].T
        scores[start : start + 4096] = 0.5 * np.einsum('nd,nd->n', vectors[first], vectors[second])
    return scores


def as_norm(scores, embeddings, pairs, cohort, top_n):
    """Adaptive symmetric score normalisation (Matejka et al., Interspeech 2017, eq. 3 and 4): scores float32 (N,).

    scores: (N,) of pairs (N, 2) of rows of embeddings (files, 2, 192); cohort: (speakers, 2, 192), scored against each
    file as a trial is. Each side's mean and deviation are those of its top_n highest cohort scores, all of them if the
    cohort is smaller. Raises BadInput where a file's cohort scores do not differ.
    """
    top_n = min(top_n, len(cohort))
    cohort = torch.from_numpy(0.5 * cohort.reshape(len(cohort), -1)).T
    vectors = torch.from_numpy(embeddings.reshape(len(embeddings), -1))
    mean, std = np.empty((2, len(vectors)), np.float32)

    def moments(rows, scores):
        # NumPy selects faster than torch.topk, and in several threads.
        closest = np.partition(scores, -top_n, axis=1)[:, -top_n:]
        mean[rows], std[rows] = closest.mean(axis=1), closest.std(axis=1)

    with ThreadPoolExecutor(available_cpus()) as pool:
        for rows in np.array_split(np.arange(len(vectors)), len(vectors) // 4096 + 1):
            parts = np.array_split(rows, available_cpus())
            list(pool.map(moments, parts, np.array_split((vectors[rows] @ cohort).numpy(), len(parts))))
    if not std.min() > 0:
        raise BadInput('the cohort cannot normalise: all its speakers score the same; give more speakers or --top_n')
    return ((scores[:, None] - mean[pairs]) / std[pairs]).mean(axis=1)


def tuneThresholdfromScore(scores, labels, target_fa, target_fr=None):
    """Operating points on the ROC of verification scores.

    scores, labels: (N,) scores and 1 (same speaker) or 0; target_fa, target_fr: wanted rates, 0 to 1.
    Returns (thresholds, EER in percent, fpr, fnr): a [threshold, fpr, fnr] for each wanted rate (misses first), and
    the two rates along the ROC. The EER is the larger of the two rates where they are closest.
    """
    fpr, tpr, thresholds = roc_curve(labels, scores, pos_label=1)
    fnr = 1 - tpr
    tuned = []
    for rates, targets in ((fnr, target_fr or []), (fpr, target_fa)):
        for target in targets:
            nearest = np.nanargmin(np.abs(target - rates))
            tuned.append([thresholds[nearest], fpr[nearest], fnr[nearest]])
    nearest = np.nanargmin(np.abs(fnr - fpr))
    return tuned, max(fpr[nearest], fnr[nearest]) * 100, fpr, fnr


def ComputeErrorRates(scores, labels):
    """Miss and false-alarm rates, (N,) each, with every score in ascending order as the threshold.

    Returns (fnrs, fprs, thresholds); a trial is accepted above the threshold. Equal scores are passed one at a time in
    their given order, as the published code does.
    """
    order = np.argsort(scores, kind='stable')
    labels = np.asarray(labels)[order].astype(np.int64)
    targets = labels.sum()
    fnrs = np.cumsum(labels) / targets
    fprs = 1 - np.cumsum(1 - labels) / (len(labels) - targets)
    return fnrs, fprs, np.asarray(scores)[order]


def ComputeMinDcf(fnrs, fprs, thresholds, p_target, c_miss, c_fa):
    """Minimum of the normalised detection cost (NIST SRE 2008) over the thresholds, and the threshold it is at."""
    costs = c_miss * np.asarray(fnrs) * p_target + c_fa * np.asarray(fprs) * (1 - p_target)
    best = np.argmin(costs)
    return costs[best] / min(c_miss * p_target, c_fa * (1 - p_target)), thresholds[best]


def operating_points(scores, labels):
    """{figure: (value, threshold)} of (N,) scores for each of FIGURES; a trial is accepted above the threshold."""
    rates = ComputeErrorRates(scores, labels)
    eer = tuneThresholdfromScore(scores, labels, [1])[1]
    threshold = rates[2][np.argmin(np.abs(rates[0] - rates[1]))]
    points = [(eer, threshold), *(ComputeMinDcf(*rates, p_target, 1, 1) for p_target in (0.01, 0.05))]
    return {figure: (float(value), float(at)) for figure, (value, at) in zip(FIGURES, points)}


def verification_figures(scores, labels):
    """(EER in percent, minDCF at p_target 0.05, minDCF at p_target 0.01) of (N,) scores; both costs are 1."""
    points = operating_points(scores, labels)
    return tuple(points[name][0] for name in ('EER', 'minDCF(0.05)', 'minDCF(0.01)'))


def accuracy(output, target, topk=(1,)):
    """Percentages of rows of output (B, classes) whose target (B,) is among the k largest: a (1,) tensor for each k."""
    _, predictions = output.topk(max(topk), dim=1)
    correct = predictions == target.view(-1, 1)
    return [correct[:, :k].any(dim=1).float().mean().mul(100).view(1) for k in topk]


def plot_det(path, labels, scores):
    """Draws the DET curves of {name: scores (N,)} to a PNG, on normal-deviate axes (Martin et al., Eurospeech 1997).

    Does nothing where matplotlib is not installed.
    """
    pyplot = matplotlib_pyplot()
    if pyplot is None:
        return
    figure, axes = pyplot.subplots(figsize=(6, 6), layout='constrained')
    ticks = np.array([0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 40, 60, 80]) / 100
    for name, values in scores.items():
        fnr, fpr, _ = ComputeErrorRates(values, labels)
        eer, cost = (operating_points(values, labels)[figure][0] for figure in ('EER', 'minDCF(0.05)'))
        seen = (fnr > 0) & (fpr > 0)
        label = f'{name}: EER {eer:.2f}%, minDCF(0.05) {cost:.3f}'
        (line,) = axes.plot(ndtri(fpr[seen]), ndtri(fnr[seen]), label=label)
        axes.plot(*2 * [ndtri(eer / 100)], 'o', color=line.get_color())
    # Fewer than one error of either kind cannot be seen.
    lowest = ndtri(max(0.5 / min(labels.sum(), len(labels) - labels.sum()), 1e-4))
    limits = lowest, ndtri(0.6)
    axes.plot(limits, limits, ':', color='grey')
    for axis, side in ((axes.xaxis, 'false alarms'), (axes.yaxis, 'misses')):
        axis.set_ticks(ndtri(ticks), [f'{100 * tick:g}' for tick in ticks])
        axis.set_label_text(f'{side} (%)')
    axes.set(xlim=limits, ylim=limits, title=os.path.basename(path)[len('det_') : -len('.png')], aspect='equal')
    axes.grid(alpha=0.3)
    axes.legend(loc='upper right')
    write_whole(path, lambda file: figure.savefig(file, format='png', dpi=120))
    pyplot.close(figure)


def plot_experiments(path, experiments):
    """Draws loss, accuracy and EER over epochs of {name: read_scores()} to a PNG; False without matplotlib."""
    pyplot = matplotlib_pyplot()
    if pyplot is None:
        return False
    figure, panels = pyplot.subplots(1, 3, figsize=(15, 4.5), layout='constrained')
    for axes, column, title in zip(panels, (2, 3, 4), ('training loss', 'training accuracy (%)', 'EER (%)')):
        for name, scores in experiments.items():
            epochs, values = np.array(scores)[:, [0, column]].T
            axes.plot(epochs, values, '.-', label=name)
        axes.set(title=title, xlabel='epoch')
        axes.grid(alpha=0.3)
    panels[2].set_yscale('log')
    panels[2].yaxis.set_major_formatter(lambda value, _: f'{value:g}')
    panels[2].yaxis.set_minor_formatter(lambda value, _: f'{value:g}' if f'{value:e}'[0] in '235' else '')
    panels[2].legend()
    write_whole(path, lambda file: figure.savefig(file, format='png', dpi=120))
    pyplot.close(figure)
    return True


def matplotlib_pyplot():
    """matplotlib.pyplot drawing to files, or None where it is not installed."""
    try:
        import matplotlib
    except ImportError:
        return None
    matplotlib.use('agg')
    from matplotlib import pyplot

    return pyplot


def compare_experiments(paths, plot):
    """Prints a table of score.txt files and of the published curve, a row each, and draws them to the PNG `plot`."""
    experiments, rows = {}, [['experiment', 'epochs', 'last EER', 'best EER', 'at epoch', 'mean of last 10']]
    for path in [*paths, PUBLISHED]:
        scores = read_scores(path)
        if not scores:
            raise BadInput(f'{path}: {"is empty" if os.path.exists(path) else "no such file"}')
        name = os.path.basename(os.path.dirname(os.path.abspath(path)))
        name = 'published' if path == PUBLISHED else path if name in experiments else name
        experiments[name] = scores
        eers = np.array([score[4] for score in scores])
        best = eers.argmin()
        figures = (eers[-1], eers[best], scores[best][0], eers[-10:].mean())
        rows.append([name, str(scores[-1][0]), *(f'{x:.2f}%' if x is not figures[2] else str(x) for x in figures)])
    print(table(rows))
    if plot_experiments(plot, experiments):
        print(f'drawn: {plot}')


def table(rows):
    """Rows of cells as aligned lines of text."""
    widths = [max(map(len, column)) for column in zip(*rows)]
    return '\n'.join('  '.join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows)


def main(argv=None):
    """Compares experiments; exit status 2, with a sentence, for a file that is no score.txt."""
    parser = argparse.ArgumentParser(prog='tools.py', description='Compare experiments by their score.txt.')
    parser.add_argument('scores', nargs='+', help='score.txt files')
    parser.add_argument('--plot', default='exps/comparison.png', help='where to draw them, if matplotlib is installed')
    args = parser.parse_args(argv)
    with exit_on_bad_input():
        compare_experiments(args.scores, args.plot)


if __name__ == '__main__':
    main()
