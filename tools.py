"""Measures: EER, minDCF, accuracy, scores of trials and their normalisation. Below them: files, processes, errors."""

import contextlib
import hashlib
import os
import platform
import re
import signal
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
import torch.distributed as dist
from scipy.special import logit
from sklearn.isotonic import IsotonicRegression
from sklearn.metrics import roc_curve

FIGURES = ('EER', 'minDCF(0.01)', 'minDCF(0.05)')  # the prior of a target with minDCF; both costs are 1
SCORE_LINE = '%d epoch, LR %f, LOSS %f, ACC %2.2f%%, EER %2.2f%%, bestEER %2.2f%%\n'
SCORE_PATTERN = re.compile(r'(\d+) epoch, LR (\S+), LOSS (\S+), ACC (\S+)%, EER (\S+)%, bestEER (\S+)%\n', re.ASCII)


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


def as_norm(scores, embeddings, pairs, cohort, top_n, moments=None):
    """Adaptive symmetric score normalisation (Matejka et al., Interspeech 2017, eq. 3 and 4), float32 (N,), of scores
    (N,) of pairs (N, 2) of rows of embeddings (files, 2, 192); cohort, top_n: as in cohort_moments, `moments` if known.
    """
    mean, std = cohort_moments(embeddings, cohort, top_n) if moments is None else moments
    return ((scores[:, None] - mean[pairs]) / std[pairs]).mean(axis=1)


def cohort_moments(embeddings, cohort, top_n):
    """Mean and deviation, float32 (2, files), of the top_n highest scores of each file against a cohort.

    embeddings: (files, 2, 192); cohort: (speakers, 2, 192), scored against each file as a trial is, all of them if they
    are fewer than top_n. Raises BadInput where a file's cohort scores do not differ.
    """
    top_n = min(top_n, len(cohort))
    cohort = torch.from_numpy(0.5 * cohort.reshape(len(cohort), -1)).T
    vectors = torch.from_numpy(embeddings.reshape(len(embeddings), -1))
    found = np.empty((2, len(vectors)), np.float32)

    def fill_in(rows, scores):
        # NumPy selects faster than torch.topk, and in several threads.
        closest = np.partition(scores, -top_n, axis=1)[:, -top_n:]
        found[:, rows] = closest.mean(axis=1), closest.std(axis=1)

    with ThreadPoolExecutor(available_cpus()) as pool:
        for rows in np.array_split(np.arange(len(vectors)), len(vectors) // 4096 + 1):
            parts = np.array_split(rows, available_cpus())
            list(pool.map(fill_in, parts, np.array_split((vectors[rows] @ cohort).numpy(), len(parts))))
    if not found[1].min() > 0:
        raise BadInput('the cohort cannot normalise: all its speakers score the same; give more speakers or --top_n')
    return found


def calibration_inputs(scores, quality, pairs):
    """What a calibration weights, (N, 1 + 2 M): scores (N,) of pairs (N, 2) of files and, of each of the quality
    measures (M of (files,)), the smaller and the larger one of a pair.
    """
    return np.column_stack([scores, *[np.sort(measure[pairs], axis=1) for measure in quality]])


def log_likelihood_ratios(calibration, scores, measures, pairs):
    """Natural logarithms of likelihood ratios (N,), by what exps.calibrate fitted, of what score_pairs returns."""
    quality = [measures[name] for name in calibration['quality']]
    return (
        calibration_inputs(scores[calibration['kind']], quality, pairs) @ calibration['weights'] + calibration['bias']
    )


def calibration_figures(ratios, labels):
    """{figure: {'value'}} of log-likelihood ratios (N,): Cllr in bits (Brümmer and du Preez, 2006), the least Cllr that
    a monotone function of them has, and the costs at Bayes thresholds beside the minDCFs of operating_points.
    """

    def cllr(ratios):
        return np.mean([np.logaddexp(0, s).mean() for s in (-ratios[labels == 1], ratios[labels == 0])]) / np.log(2)

    best = logit(IsotonicRegression().fit_transform(ratios, labels)) - logit(labels.mean())
    figures = {'Cllr': cllr(ratios), 'minCllr': cllr(best)}
    for prior in (0.01, 0.05):
        accepted = ratios > -logit(prior)
        figures[f'actDCF({prior})'] = np.mean(~accepted[labels == 1]) + np.mean(accepted[labels == 0]) * (1 / prior - 1)
    return {name: {'value': float(value)} for name, value in figures.items()}


def tuneThresholdfromScore(scores, labels, target_fa, target_fr=None):
    """Operating points on the ROC of scores (N,) with labels (N,), 1 (same speaker) or 0; target_fa, target_fr: rates.

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
    """(Misses, false alarms, thresholds), (N,) each: the rates with every score in ascending order as the threshold; a
    trial is accepted above it. Equal scores are passed one at a time in their given order, as in the published code.
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
    """{figure: {'value', 'threshold'}} of (N,) scores for each of FIGURES; a trial is accepted above the threshold."""
    rates = ComputeErrorRates(scores, labels)
    eer = tuneThresholdfromScore(scores, labels, [1])[1]
    points = [(eer, rates[2][np.argmin(np.abs(rates[0] - rates[1]))])]
    points += [ComputeMinDcf(*rates, p_target, 1, 1) for p_target in (0.01, 0.05)]
    return {name: {'value': float(value), 'threshold': float(at)} for name, (value, at) in zip(FIGURES, points)}


def accuracy(output, target, topk=(1,)):
    """Percentages of rows of output (B, classes) whose target (B,) is among the k largest: a (1,) tensor for each k."""
    _, predictions = output.topk(max(topk), dim=1)
    correct = predictions == target.view(-1, 1)
    return [correct[:, :k].any(dim=1).float().mean().mul(100).view(1) for k in topk]


# Machinery: the results folder, files that are whole or not there, processes that train together, errors for people.


def init_args(args):
    """Sets args.score_save_path and args.model_save_path below args.save_path, and makes the folders."""
    args.score_save_path = os.path.join(args.save_path, 'score.txt')
    args.model_save_path = os.path.join(args.save_path, 'model')
    os.makedirs(args.model_save_path, exist_ok=True)
    return args


def lock_folder(folder):
    """Keeps other runs out of a folder: run.lock in it, locked until closed or the process ends; else BadInput."""
    file = open(os.path.join(folder, 'run.lock'), 'a+', encoding='utf-8')
    try:
        import fcntl

        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except ImportError:
        return file  # Windows has no such locks
    except (BlockingIOError, PermissionError) as error:
        file.seek(0)
        other = f'another run is at work there, {file.read().strip() or "just started"}'
        raise BadInput(f'--save_path {folder}: {other}; wait for it, stop it, or choose another folder') from error
    except OSError as error:
        print(f'{file.name}: this disk has no locks ({error.strerror}): do not start a second run', file=sys.stderr)
    file.truncate(0)
    file.write(f'process {os.getpid()} on host {platform.node()}\n')
    file.flush()
    return file


def read_scores(path):
    """The lines of a score.txt as tuples (epoch, lr, loss, accuracy %, EER %, best EER %), oldest first; none of a
    missing file. Raises BadInput, with the line number, on a line of another format.
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


def write_whole(path, write):
    """Calls write(binary file) and replaces the file at `path` by what it wrote, atomically; what was there stays until
    all of it is on the disk. Raises BadInput where the disk refuses.
    """
    temporary = f'{path}.part'
    try:
        with uninterrupted():  # torch.save would make an error of its own of an interrupt
            with open(temporary, 'wb') as file:
                write(file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
            if os.name != 'nt':  # or the renamed file might be gone after a power cut; Windows has no such call
                folder = os.open(os.path.dirname(path) or '.', os.O_RDONLY)
                os.fsync(folder)
                os.close(folder)
    except (OSError, RuntimeError) as error:
        # torch.save reports a full disk as a RuntimeError.
        with contextlib.suppress(OSError):
            os.remove(temporary)
        why = error.strerror if isinstance(error, OSError) and error.strerror else str(error).splitlines()[0]
        raise BadInput(f'{path}: cannot be written ({why}); what was there before is unchanged') from error


@contextlib.contextmanager
def uninterrupted():
    """Ctrl-C and SIGTERM wait until the block has ended; a second one does not. (They reach the main thread alone.)"""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    found, came = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}, []
    handlers = {number: handler for number, handler in found.items() if handler not in (None, signal.SIG_IGN)}

    def wait(number, frame):
        came.append(number)
        if len(came) > 1:
            signal.signal(number, handlers[number])
            signal.raise_signal(number)

    try:
        for number in handlers:
            signal.signal(number, wait)
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        if came:
            # Also where the block failed: a worker that the same Ctrl-C ended, for one.
            signal.raise_signal(came[0])


def fetch(loader):
    """The items of a DataLoader; no interrupt cuts off what a worker hands over, which the worker would complain of."""
    iterator = iter(loader)
    while True:
        with uninterrupted():
            item = next(iterator, None)
        if item is None:
            return
        yield item


def write_text(path, text):
    """Writes a text file whole, as write_whole does."""
    write_whole(path, lambda file: file.write(text.encode('utf-8', 'surrogateescape')))


def digest(content):
    """SHA-256 of bytes, in hexadecimal."""
    return hashlib.sha256(content).hexdigest()


def table(rows):
    """Rows of cells as aligned lines of text."""
    widths = [max(map(len, column)) for column in zip(*rows)]
    return '\n'.join('  '.join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows)


def figures_table(results, trial_lists):
    """The figures of score_lists' results as the text of a table, a row a list."""
    named, rows = max(results, key=len), []
    named = [(kind, name) for kind, (_, figures) in named.items() for name in figures]
    for trials, kinds in zip(trial_lists, results):
        values = [(name, kinds[kind][1][name]['value']) for kind, name in named if kind in kinds]
        cells = [f'{value:.2f}%' if name == 'EER' else f'{value:.4f}' for name, value in values]
        rows.append([trials.path, f'{len(trials.labels):,}', *cells, *['-'] * (len(named) - len(cells))])
    return table([['list', 'trials', *(f'{kind} {name}'.removeprefix('raw ') for kind, name in named)], *rows])


def available_cpus():
    """Processors that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count() or 1


def process_rank():
    """Number of this process among those that train together, 0 where it is alone or the one that writes."""
    return dist.get_rank() if dist.is_initialized() else 0


def process_count():
    """How many processes train together."""
    return dist.get_world_size() if dist.is_initialized() else 1


def say(text):
    """Prints a line of the log, in the first process only."""
    if process_rank() == 0:
        print(text, flush=True)


def sum_over_processes(tensor):
    """The tensor, summed in place over the processes that train together."""
    if process_count() > 1:
        dist.all_reduce(tensor)
    return tensor


def gather(items):
    """The items of the lists of all processes that train together, in one list."""
    if process_count() == 1:
        return items
    lists = [None] * process_count()
    dist.all_gather_object(lists, items)
    return [item for part in lists for item in part]


class BadInput(Exception):
    """What the user gave cannot be used: the message says what is wrong, where, and what to do about it."""


def summary(error):
    """The first line of a library's error, or its type where it has none."""
    return (str(error).splitlines() or [type(error).__name__])[0][:200]


# What PyTorch's errors say where memory is too small, and what to do.
MEMORY = {
    "out of memory|ALLOC_FAILED|can't allocate memory": 'Use a smaller --batch_size, or --accumulate.',
    r'DataLoader worker \(pid': 'Memory is short: use a smaller --n_cpu, or more shared memory (docker --shm-size 8g).',
}


@contextlib.contextmanager
def exit_on_bad_input():
    """Turns BadInput, and what is said of files, memory and missing packages, into a sentence and exit status 2."""
    for stream in (sys.stdout, sys.stderr):
        # Names of files need not be UTF-8, and are printed all the same.
        stream.reconfigure(errors='backslashreplace')
    try:
        yield
        return
    except BadInput as error:
        # From a worker process the error comes wrapped in the worker's traceback.
        message = str(error).rpartition('BadInput: ')[2].strip()
    except ModuleNotFoundError as error:
        message = f'the package {error.name} is needed for this: pip install {error.name}'
    except OSError as error:
        if error.filename is None:
            raise
        message = f'{error.filename}: {error.strerror}'
    except RuntimeError as error:
        if process_rank() and re.search('Connection (closed|reset) by peer', str(error)):
            sys.exit(2)  # the first process has said why
        remedy = next((remedy for sign, remedy in MEMORY.items() if re.search(sign, str(error))), None)
        if remedy is None:
            raise
        message = f'{summary(error)}\n{remedy}'
    print(f'error: {message}', file=sys.stderr)
    sys.exit(2)
