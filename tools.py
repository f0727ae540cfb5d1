"""What all stand on: 1 measures, 2 what a run writes, 3 options, processes, log and errors."""

import argparse
import contextlib
import errno
import functools
import hashlib
import inspect
import io
import itertools
import json
import math
import multiprocessing
import multiprocessing.connection
import os
import platform
import posixpath
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from concurrent.futures import ThreadPoolExecutor
from importlib import metadata
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from scipy.special import ndtr, stdtrit
from sklearn.metrics import roc_curve
from tqdm import tqdm

PRIORS = {'minDCF(0.01)': 0.01, 'minDCF(0.05)': 0.05}  # of a target; both costs are 1
FIGURES = ('EER', *PRIORS)
REPLICATES = 1000  # of the speakers of a list, for an interval
FEWEST_SPEAKERS = 5  # below which an interval says nothing
SPEAKER_RULE = (
    'the speaker of a file is its first folder, after those that all files of the list share; '
    '--speaker PATTERN takes another part of its path'
)


# 1. Measures: scores of trials and their normalisation; EER and minDCF, and how sure these are;
# accuracy.
# In the shapes, D is the size of an embedding: 192 for ECAPA-TDNN.


class Scored(NamedTuple):
    """Scores (N,) of a trial list, and their figures: what operating_points returns."""

    scores: np.ndarray
    figures: dict


def score_kinds(embeddings, pairs, cohort=None, top_n=None, subtract_mean=False):
    """Computes all kinds of scores of pairs (N, 2) of rows of embeddings (files, 2, D).

    embeddings: what ECAPAModel.embed_files returns, or means of these; cohort: (speakers, 2, D).
    Returns {kind: (N,)}: always 'raw'; with top_n also 'asnorm', by the top_n closest speakers of
    the cohort; with subtract_mean also 'centred'; with both also 'centred asnorm'.
    """
    scores = {}
    for kind, vectors, speakers in vectors_of_kinds(embeddings, cohort, subtract_mean):
        scores[kind] = score_pairs(vectors, pairs)
        if top_n:
            normalised = 'asnorm' if kind == 'raw' else f'{kind} asnorm'
            scores[normalised] = as_norm(scores[kind], vectors, pairs, speakers, top_n)
    return scores


def vectors_of_kinds(embeddings, cohort, subtract_mean):
    """Yields (kind, embeddings, cohort) for 'raw' and, with subtract_mean, for 'centred'.

    'centred': subtract the cohort mean from both vectors of a file and normalise them; the same for
    the cohort.
    """
    # The mean of several utterances' whole embeddings is shorter than 1.
    vectors = embeddings.copy()
    vectors[:, 0] = unit_length(vectors[:, 0])
    yield 'raw', vectors, cohort
    if subtract_mean:
        mean = cohort.mean(axis=0)
        yield 'centred', unit_length(embeddings - mean), unit_length(cohort - mean)


def unit_length(vectors):
    """Scales vectors (..., D) to length 1."""
    return vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)


def score_pairs(embeddings, pairs):
    """Computes scores (N,) of pairs (N, 2) of rows of embeddings (files, 2, D).

    A score is half the cosine of the whole utterances plus half the mean cosine of the 25 pairs of
    their crops.
    """
    vectors = embeddings.reshape(len(embeddings), -1)
    scores = np.empty(len(pairs), vectors.dtype)
    # In blocks: the vectors of all pairs of a long list would fill the memory.
    for start in range(0, len(pairs), 4096):
        block = slice(start, start + 4096)
        enrolment, test = pairs[block].T
        scores[block] = 0.5 * np.einsum('nd,nd->n', vectors[enrolment], vectors[test])
    return scores


def as_norm(scores, embeddings, pairs, cohort, top_n):
    """Normalises scores by adaptive s-norm (Matejka et al., Interspeech 2017, eq. 3 and 4).

    scores: (N,) of pairs (N, 2) of rows of embeddings (files, 2, D); cohort, top_n: as in
    cohort_moments. Returns float32 (N,).
    """
    mean, std = cohort_moments(embeddings, cohort, top_n)
    return ((scores[:, None] - mean[pairs]) / std[pairs]).mean(axis=1)


def cohort_moments(embeddings, cohort, top_n):
    """Computes mean and deviation of the top_n highest scores of each file against a cohort.

    embeddings: (files, 2, D); cohort: (speakers, 2, D), scored against each file as a trial is,
    all of them if they are fewer than top_n. Returns float32 (2, files). Raises BadInput if a file
    scores the same against all of them.
    """
    top_n = min(top_n, len(cohort))
    speakers = torch.from_numpy(0.5 * cohort.reshape(len(cohort), -1)).T
    vectors = torch.from_numpy(embeddings.reshape(len(embeddings), -1))
    threads = available_cpus()

    def moments_of(scores):
        # NumPy selects faster than torch.topk, and in several threads.
        closest = np.partition(scores, -top_n, axis=1)[:, -top_n:]
        return np.stack([closest.mean(axis=1), closest.std(axis=1)])

    parts = []
    with ThreadPoolExecutor(threads) as pool:
        for files in vectors.split(4096):
            scores = (files @ speakers).numpy()
            parts += pool.map(moments_of, np.array_split(scores, threads))
    moments = np.concatenate(parts, axis=1)

    # Written so that NaN is refused too.
    if not moments[1].min() > 0:
        raise BadInput(
            'the cohort cannot normalise: all its speakers score the same; give more speakers, or '
            'more of them with --top_n'
        )
    return moments


def operating_points(scores, labels):
    """Computes FIGURES of scores (N,) with labels (N,), 1 (same speaker) or 0.

    Returns {figure: {'value', 'threshold'}}; a trial is accepted above the threshold. The EER is in
    percent.
    """
    misses, false_alarms, thresholds = error_curve(scores, labels)
    return {
        name: {'value': float(value), 'threshold': float(thresholds[index])}
        for name, (value, index) in find_figures(misses, false_alarms).items()
    }


def error_curve(scores, labels):
    """Computes the DET curve of scores (N,) with labels (N,).

    Returns (misses, false alarms, thresholds), at -inf and at each different score, ascending.
    """
    scores, is_target, ends, _ = sort_by_score(scores, labels)
    rates = error_rates(np.ones(len(scores), int), is_target, ends)
    return *rates, np.append(-np.inf, scores[ends])


def sort_by_score(scores, labels):
    """Sorts trials by their scores (N,), ascending.

    Returns (scores, whether each is a target trial, the last index of each group of equal scores,
    the order).
    """
    order = np.argsort(scores, kind='stable')
    scores = np.asarray(scores)[order]
    is_target = np.asarray(labels)[order] == 1
    ends = np.flatnonzero(np.append(scores[1:] != scores[:-1], True))
    return scores, is_target, ends, order


def error_rates(weights, is_target, ends):
    """Computes the error rates of trials sorted by score, which count `weights` (N,) times each.

    is_target, ends: what sort_by_score returns. Returns (misses, false alarms), (K + 1,) each, at
    thresholds below all scores and at each of the K different ones. Equal scores are one threshold.
    NaN if there are no target or no non-target trials.
    """
    trials = np.cumsum(weights)[ends]
    missed = np.cumsum(weights * is_target)[ends]
    rejected = trials - missed
    with np.errstate(invalid='ignore'):
        misses = np.append(0, missed / missed[-1])
        false_alarms = 1 - np.append(0, rejected / rejected[-1])
    return misses, false_alarms


def find_figures(misses, false_alarms):
    """Finds FIGURES on a curve of error_rates: {figure: (value, index of its threshold)}."""
    indices = np.arange(len(misses))
    figures = {'EER': find_eer(misses, false_alarms)}
    for name, prior in PRIORS.items():
        figures[name] = ComputeMinDcf(misses, false_alarms, indices, prior, 1, 1)
    return figures


def find_eer(misses, false_alarms):
    """Returns (EER in percent, index of the nearest threshold) of a curve of error_rates.

    The EER is where the two rates cross, on the straight line between neighbouring thresholds.
    """
    difference = misses - false_alarms  # rises from -1 to 1
    after = np.argmax(difference >= 0)
    before = after - 1
    part = difference[before] / (difference[before] - difference[after])
    eer = misses[before] + part * (misses[after] - misses[before])
    nearest = after if difference[after] <= -difference[before] else before
    return 100 * eer, nearest


def tuneThresholdfromScore(scores, labels, target_fa, target_fr=None):
    """Finds operating points on the ROC, as the published code does.

    scores, labels: (N,), 1 for the same speaker or 0; target_fa, target_fr: wanted rates of false
    alarms and of misses. Returns (thresholds, EER in percent, fpr, fnr): a [threshold, fpr, fnr]
    for each wanted rate (misses first), and the two rates along the ROC. The EER is the larger of
    the two rates where they are closest, on a ROC without the points on its straight parts;
    operating_points has the exact one.
    """
    fpr, tpr, thresholds = roc_curve(labels, scores, pos_label=1)
    fnr = 1 - tpr

    tuned = []
    for rates, wanted in ((fnr, target_fr or []), (fpr, target_fa)):
        for rate in wanted:
            nearest = np.nanargmin(np.abs(rate - rates))
            tuned.append([thresholds[nearest], fpr[nearest], fnr[nearest]])

    nearest = np.nanargmin(np.abs(fnr - fpr))
    return tuned, max(fpr[nearest], fnr[nearest]) * 100, fpr, fnr


def ComputeErrorRates(scores, labels):
    """Returns (misses, false alarms, thresholds), (N,) each, as the published code computes them.

    Every score in ascending order is a threshold, above which a trial is accepted. Equal scores are
    not grouped: each is a separate threshold, in the order given.
    """
    order = np.argsort(scores, kind='stable')
    labels = np.asarray(labels)[order].astype(np.int64)
    targets = labels.sum()
    fnrs = np.cumsum(labels) / targets
    fprs = 1 - np.cumsum(1 - labels) / (len(labels) - targets)
    return fnrs, fprs, np.asarray(scores)[order]


def ComputeMinDcf(fnrs, fprs, thresholds, p_target, c_miss, c_fa):
    """Returns the minimum of the normalised detection cost (NIST SRE 2008), and its threshold."""
    costs = c_miss * np.asarray(fnrs) * p_target + c_fa * np.asarray(fprs) * (1 - p_target)
    best = np.argmin(costs)
    return costs[best] / min(c_miss * p_target, c_fa * (1 - p_target)), thresholds[best]


def intervals_of(values, labels, speakers):
    """Returns {figure: [low, high]}, intervals of 95 % from replicates of FIGURES (replicates, 3).

    labels: (N,) of the trials; speakers: how many there are. There is none for a minDCF whose list
    has too few trials of different speakers: the cost then rests on a few false alarms, or none.
    """
    others = np.sum(np.asarray(labels) != 1)
    return {
        name: interval_of(column, speakers)
        for name, column in zip(FIGURES, values.T)
        if others >= fewest_others(name)
    }


def fewest_others(name):
    """Returns how many trials of different speakers the interval of a figure needs."""
    if name not in PRIORS:
        return 1
    prior = PRIORS[name]
    return round(30 * (1 - prior) / prior)


def interval_of(values, speakers):
    """Returns [low, high], the interval of 95 % of replicates (R,); NaN is left out.

    The percentiles are expanded, because replicates of few speakers vary too little (Hesterberg,
    The American Statistician, 2015).
    """
    quantile = stdtrit(speakers - 1, 0.025) * math.sqrt(speakers / (speakers - 1))
    tail = 100 * ndtr(quantile)
    low, high = np.nanpercentile(values, [tail, 100 - tail])
    return [float(low), float(high)]


def draw_speakers(count, replicates=REPLICATES, seed=0):
    """Draws speakers for replicates: how often each of `count` is drawn, int64 (replicates, count).

    A replicate draws `count` speakers with replacement. The draws are the same for the same count,
    so that two sets of scores of one list can be compared replicate by replicate.
    """
    rng = np.random.default_rng(seed)
    return rng.multinomial(count, np.full(count, 1 / count), size=replicates)


def replicate_figures(scores, labels, speakers, draws, title=None):
    """Computes FIGURES of replicates of a trial list, by a joint bootstrap over speakers.

    scores, labels: (N,); speakers: int (N, 2), the two of each trial; draws: what draw_speakers
    returns; title: of a progress bar. If a replicate draws a speaker c times, a target trial counts
    c times, and a non-target trial as often as the product of the c of its two speakers. So both
    sides of a trial vary, and trials that share a speaker vary together; compare the bootstrap of
    rows and columns of Owen, Annals of Applied Statistics, 2007.

    Returns (replicates, 3); NaN if a replicate has no target or no non-target trials.
    """
    _, is_target, ends, order = sort_by_score(scores, labels)
    first, second = np.asarray(speakers)[order].T
    # A target trial counts by one of its sides only: the other is a speaker who is drawn once.
    second = np.where(is_target, -1, second)

    def figures_of(counts):
        counts = np.append(counts, 1).astype(np.int32)
        rates = error_rates(counts[first] * counts[second], is_target, ends)
        return [value for value, _ in find_figures(*rates).values()]

    with ThreadPoolExecutor(available_cpus()) as pool:
        done = pool.map(figures_of, draws)
        # disable=None shows the bar only on a terminal.
        disable = None if title else True
        return np.array(list(tqdm(done, title, len(draws), disable=disable, leave=False)))


def number_speakers(labels, pairs, speakers):
    """Numbers the speakers of trials, for replicate_figures.

    labels: (N,); pairs: int (N, 2), indices into `speakers`, a list of names, None where a model
    has several. Returns (int (N, 2), ''), or (None, why there can be no interval).
    """
    if None in speakers:
        return None, f'a model has utterances of several speakers ({SPEAKER_RULE})'
    number_of = {name: number for number, name in enumerate(sorted(set(speakers)))}
    if len(number_of) < FEWEST_SPEAKERS:
        return None, (
            f'it has {len(number_of)} speakers, and at least {FEWEST_SPEAKERS} are needed '
            f'({SPEAKER_RULE})'
        )
    numbers = np.array([number_of[name] for name in speakers])[pairs]
    wrong = np.flatnonzero((numbers[:, 0] == numbers[:, 1]) != (np.asarray(labels) == 1))
    if len(wrong):
        enrolment, test = (speakers[name] for name in pairs[wrong[0]])
        kind = 'the same speaker' if labels[wrong[0]] else 'different speakers'
        return None, (
            f'{len(wrong)} labels contradict the speakers of the files: for example, a trial of '
            f'{kind} is of {enrolment} and {test} ({SPEAKER_RULE})'
        )
    return numbers, ''


def speakers_of(paths, pattern=''):
    """Returns the speaker of each path of a list.

    pattern: the regular expression of --speaker, whose first group is the speaker. Without it, the
    speaker is the first folder after those that all paths share. Raises BadInput that names a path
    in which the pattern finds no speaker.
    """
    if pattern:
        return [speaker_by_pattern(path, pattern) for path in paths]
    parts = [split_path(path) for path in paths]
    # The last folder stays: files that are all in one folder are of one speaker.
    shared = os.path.commonprefix([folders[:-2] for folders in parts])
    return [folders[len(shared)] for folders in parts]


def speaker_by_pattern(path, pattern):
    """Returns what the first group of a regular expression finds in a path."""
    match = re.search(pattern, path)
    if not match or not match[1]:
        raise BadInput(f'--speaker {pattern}: finds no speaker in {path}')
    return match[1]


def split_path(path):
    """Returns the folders and the file of a path, without '.' and with '/' or '\\' between them."""
    path = posixpath.normpath(path.replace('\\', '/'))
    return path.lstrip('/').split('/')


def add_intervals(results, trial_lists):
    """Adds to each figure of score_lists' results its 'interval' of 95 %, [low, high].

    Prints a note for a list, or a figure, that has none.
    """
    for trials, kinds in zip(trial_lists, results):
        if trials.speakers is None:
            say(f'note          no intervals for {trials.path}: {trials.why_no_speakers}')
            continue
        count = trials.speaker_count()
        draws = draw_speakers(count)
        for kind, scored in kinds.items():
            values = replicate_figures(
                scored.scores, trials.labels, trials.speakers, draws, f'how sure, {kind}'
            )
            intervals = intervals_of(values, trials.labels, count)
            for name, interval in intervals.items():
                scored.figures[name]['interval'] = interval
            left_out = int(np.isnan(values[:, 0]).sum())
            if left_out:
                say(
                    f'note          {trials.path}: {left_out} of {REPLICATES} replicates have only '
                    'target or only non-target trials, and are left out of the intervals'
                )
        for name in FIGURES:
            if name not in intervals:
                say(
                    f'note          {trials.path}: no interval for {name}, which needs at least '
                    f'{fewest_others(name):,} trials of different speakers'
                )


def accuracy(output, target, topk=(1,)):
    """Percentages of rows of output (B, classes) whose target (B,) is among the k largest.

    Returns a (1,) tensor for each k of topk.
    """
    _, predictions = output.topk(max(topk), dim=1)
    correct = predictions == target.view(-1, 1)
    return [correct[:, :k].any(dim=1).float().mean().mul(100).view(1) for k in topk]


# 2. What a run writes: score.txt, results.json and scores; files that are whole.

SCORE_LINE = '%d epoch, LR %f, LOSS %f, ACC %2.2f%%, EER %2.2f%%, bestEER %2.2f%%\n'
NUMBER = r'(-?\d+\.\d+|-?inf|nan)'
SCORE_PATTERN = re.compile(
    rf'(\d+) epoch, LR {NUMBER}, LOSS {NUMBER}, ACC {NUMBER}%, EER {NUMBER}%, bestEER {NUMBER}%',
    re.ASCII,
)
PACKAGES = ('torch', 'torchaudio', 'numpy', 'scipy', 'scikit-learn', 'soundfile')


def init_args(args):
    """Sets args.score_save_path and model_save_path below args.save_path; makes the folders."""
    args.score_save_path = os.path.join(args.save_path, 'score.txt')
    args.model_save_path = os.path.join(args.save_path, 'model')
    os.makedirs(args.model_save_path, exist_ok=True)
    return args


def read_scores(path):
    """The lines of a score.txt, oldest first; none of a missing file.

    A line is a tuple (epoch, lr, loss, accuracy %, EER %, best EER %). Raises BadInput, with the
    line number, on a line of another format.
    """
    scores = []
    text = read_bytes(path, missing=b'').decode('utf-8', errors='replace')
    for number, line in enumerate(text.splitlines(), 1):
        match = SCORE_PATTERN.fullmatch(line.rstrip())
        if not match:
            raise BadInput(f'{path}, line {number}: not a line of a score.txt: {line.strip()!r}')
        epoch, *figures = match.groups()
        scores.append((int(epoch), *map(float, figures)))
    return scores


@functools.cache  # so that what is written at the end is what ran
def provenance(command):
    """What the numbers come from: {'command', 'commit', 'versions': of Python and packages}."""
    repository = os.path.dirname(os.path.abspath(__file__))
    git = ['git', '--git-dir=.git', '--work-tree=.']
    git += ['describe', '--always', '--dirty', '--abbrev=40', '--exclude=*']
    commit = ''
    with contextlib.suppress(OSError):
        described = subprocess.run(git, cwd=repository, capture_output=True, text=True)
        commit = described.stdout.strip()
    versions = {'python': platform.python_version()}
    for name in PACKAGES:
        versions[name] = metadata.version(name)
    return {'command': command, 'commit': commit or 'unknown', 'versions': versions}


def read_results(folder):
    """Reads a folder's results.json: {trial list: its entry}, {} if there is none.

    write_results says what an entry holds. Raises BadInput if the file holds something else.
    """
    path = os.path.join(folder, 'results.json')
    if not os.path.exists(path):
        return {}
    try:
        with open(path, encoding='utf-8') as file:
            lists = json.load(file)['lists']
        for entry in lists.values():
            for name in ('figures', 'scores', 'trials', 'checkpoint'):
                entry[name]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise BadInput(f'{path}: not what this --eval writes; move it away') from error
    return lists


def write_results(results, trial_lists, checkpoint, args):
    """Writes SAVE_PATH/results.json, where other lists stay, and scores/LIST.txt for each list.

    results: what ECAPAModel.score_lists returns for trial_lists; checkpoint: {'path', 'sha256'}. A
    line of scores is `label scores... enrolment test`, a score for each kind. If two lists have one
    name, the second's file gets a number.
    """
    os.makedirs(os.path.join(args.save_path, 'scores'), exist_ok=True)
    with one_at_a_time(args.save_path):
        lists = read_results(args.save_path)
        for trials, kinds in zip(trial_lists, results):
            path = scores_path(args.save_path, choose_scores_file(trials.path, lists))
            columns = [[f'{score:.6f}' for score in scored.scores] for scored in kinds.values()]
            lines = []
            for label, scores, (enrolment, test) in zip(trials.labels, zip(*columns), trials.pairs):
                names = [trials.names[enrolment], trials.names[test]]
                lines.append(' '.join([str(label), *scores, *names]) + '\n')
            write_text(path, ''.join(lines))
            for other in other_names(trials.path, lists):
                del lists[other]
            lists[trials.path] = {
                'figures': {kind: scored.figures for kind, scored in kinds.items()},
                'scores': path,
                'trials': len(trials.labels),
                'targets': int(trials.labels.sum()),
                'speakers': trials.speaker_count(),
                'sha256': trials.sha256,
                'checkpoint': checkpoint,
                **provenance(args.command),
                'options': vars(args),
            }
        text = json.dumps({'lists': lists}, indent=2) + '\n'
        write_text(os.path.join(args.save_path, 'results.json'), text)


def scores_path(folder, scores):
    """Returns where a folder's scores are: a results.json may come from another folder."""
    return os.path.join(folder, 'scores', os.path.basename(scores.replace('\\', '/')))


def choose_scores_file(trial_list, lists):
    """Chooses the file for a trial list's scores: its file so far, or one of a new name."""
    for name in (trial_list, *other_names(trial_list, lists)):
        if name in lists:
            return lists[name]['scores']
    taken = {os.path.basename(entry['scores']) for entry in lists.values()}
    stem, _ = os.path.splitext(os.path.basename(trial_list))
    name = f'{stem}.txt'
    number = 1
    while name in taken:
        number += 1
        name = f'{stem}_{number}.txt'
    return name


def other_names(trial_list, lists):
    """Returns the other paths of a trial list among those of a results.json, such as absolute."""
    place = os.path.abspath(trial_list)
    return [path for path in lists if path != trial_list and os.path.abspath(path) == place]


def read_list_scores(folder, trial_list, entry):
    """Reads the scores of a trial list, by its entry in the folder's results.json.

    Returns (labels (N,), {kind: scores (N,)}, names [(enrolment, test)]). Raises BadInput if they
    are not the scores that the entry's figures were computed from.
    """
    path = scores_path(folder, entry['scores'])
    labels, scores, names = read_trial_scores(path)
    kinds = list(entry['figures'])
    if scores.shape != (entry['trials'], len(kinds)):
        raise BadInput(f'{path}: other trials or kinds than results.json has; score it again')
    for kind, column in zip(kinds, scores.T):
        eer = entry['figures'][kind]['EER']['value']
        # Each score was rounded to 6 digits, so a target may be 1e-6 closer to another trial than
        # it was, or farther. The EER falls as targets rise: the true one is between these two.
        rounding = 1.001e-6 * labels
        lowest = operating_points(column + rounding, labels)['EER']['value']
        highest = operating_points(column - rounding, labels)['EER']['value']
        if not lowest - 1e-6 <= eer <= highest + 1e-6:
            raise BadInput(
                f'{path}: these {kind} scores have an EER of {highest:.4f}%, but results.json says '
                f'{eer:.4f}%: they are of another evaluation, or an older version of this code '
                f'wrote them; score {trial_list} again'
            )
    return labels, dict(zip(kinds, scores.T)), names


def read_trial_scores(path):
    """Reads a file of scores: labels int (N,), scores (N, kinds), names [(enrolment, test)]."""
    with open(path, encoding='utf-8', errors='surrogateescape') as lines:
        rows = [line.split() for line in lines]
    try:
        labels = np.array([row[0] for row in rows], int)
        scores = np.array([row[1:-2] for row in rows], float)
        if scores.ndim != 2 or not scores.size:
            raise ValueError('it has no scores')
        if not np.isfinite(scores).all():
            raise ValueError('a score is not finite')
    except (ValueError, IndexError) as error:
        raise BadInput(f'{path}: not a file of scores of --eval: {error}') from error
    return labels, scores, [(row[-2], row[-1]) for row in rows]


def say_figures(results, trial_lists):
    """Prints the figures of score_lists' results: a table with a row for each list and kind."""
    for trials, kinds in zip(trial_lists, results):
        for kind, scored in kinds.items():
            if scored.scores.min() == scored.scores.max():
                say(f'WARNING       {trials.path}: all {kind} scores are equal; they tell nothing')
    say(figures_table(results, trial_lists))


def figures_table(results, trial_lists):
    """Returns the text of say_figures' table."""
    rows = [['list', 'kind', 'trials', 'speakers', *FIGURES]]
    for trials, kinds in zip(trial_lists, results):
        counts = [f'{len(trials.labels):,}', format_count(trials.speaker_count())]
        for kind, scored in kinds.items():
            cells = [format_figure(name, scored.figures) for name in FIGURES]
            rows.append([trials.path, kind, *counts, *cells])
    return table(rows)


def format_count(count):
    """The text of a number, '-' where it is not known."""
    return '-' if count is None else f'{count:,}'


def format_figure(name, figures):
    """The text of a figure in {name: {'value'}}, with its interval if it has one; '-' for none."""
    if name not in figures:
        return '-'
    digits = 2 if name == 'EER' else 4
    text = f'{figures[name]["value"]:.{digits}f}'
    if name == 'EER':
        text += '%'
    if 'interval' in figures[name]:
        low, high = figures[name]['interval']
        text += f' ({low:.{digits}f} to {high:.{digits}f})'
    elif name in PRIORS and 'interval' in figures['EER']:
        text += ' (-)'
    return text


def table(rows):
    """Rows of cells as aligned lines of text."""
    widths = [max(map(len, column)) for column in zip(*rows)]
    lines = []
    for row in rows:
        cells = [cell.ljust(width) for cell, width in zip(row, widths)]
        lines.append('  '.join(cells).rstrip())
    return '\n'.join(lines)


def read_bytes(path, missing=None):
    """The bytes of a file; `missing` for none, if that is given.

    Raises BadInput that says why the file cannot be read.
    """
    try:
        with open(path, 'rb') as file:
            return file.read()
    except FileNotFoundError as error:
        if missing is not None:
            return missing
        raise BadInput(f'{path}: no such file') from error
    except OSError as error:
        raise BadInput(f'{path}: cannot be read ({error.strerror})') from error


unfinished_files = set()  # what write_whole is writing


def write_whole(path, write):
    """Calls write(binary file), and puts what it wrote at `path`.

    The old file stays until the new one is completely on disk. Raises BadInput where the disk
    refuses.
    """
    # Into memory first: an interrupt within torch.save would come out as an error of its own.
    content = io.BytesIO()
    write(content)

    # Two processes may write the same file (for example a cohort).
    temporary = f'{path}.{os.getpid()}.part'
    unfinished_files.add(temporary)
    try:
        with open(temporary, 'wb') as file:
            file.write(content.getbuffer())
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        if os.name != 'nt':  # Windows has no such call
            # Or the renamed file might be gone after a power cut.
            folder = os.open(os.path.dirname(path) or '.', os.O_RDONLY)
            os.fsync(folder)
            os.close(folder)
    except OSError as error:
        why = error.strerror or str(error)
        raise BadInput(
            f'{path}: cannot be written ({why}); what was there before is unchanged'
        ) from error
    finally:
        with contextlib.suppress(OSError):
            os.remove(temporary)
        unfinished_files.discard(temporary)


def check_writable(folder, option):
    """Raises BadInput unless files can be written in a folder, or the folder can be made.

    option: the one that names it. Returns the folder, or the nearest one above it that exists.
    """
    existing = os.path.abspath(folder)
    while not os.path.exists(existing):
        existing = os.path.dirname(existing)
    try:
        with tempfile.TemporaryFile(dir=existing):
            return existing
    except OSError as error:
        why = f'{existing} cannot be written ({error.strerror})'
        raise BadInput(f'{option} {folder}: {why}; choose another place') from error


def write_text(path, text):
    """Writes a text file whole, as write_whole does."""
    write_whole(path, lambda file: file.write(text.encode('utf-8', 'surrogateescape')))


def sha256(content):
    """SHA-256 of bytes, in hexadecimal."""
    return hashlib.sha256(content).hexdigest()


@contextlib.contextmanager
def one_at_a_time(folder):
    """Processes that enter the block with one folder wait for each other, if its disk has locks."""
    handle = None
    with contextlib.suppress(ImportError, OSError):  # Windows has no such locks
        import fcntl

        handle = os.open(folder, os.O_RDONLY)
        fcntl.flock(handle, fcntl.LOCK_EX)
    try:
        yield
    finally:
        if handle is not None:
            os.close(handle)


# 3. Options that scripts share; processes; the log; errors for people.

PATIENCE = 3 * 3600  # seconds in which the first process may go through all files of VoxCeleb2
TIMEOUT = 600  # seconds after which a process that does not answer the others is taken for hung

common_store = None  # torchrun's store of keys, of the processes that train together
turns = itertools.count()  # of first_process_first
helpers = []  # processes that load data for this one
socket_folder = None  # of the helpers

# The options of the published command. Its scripts pass all of them to each part: f(**vars(args)).
PUBLISHED_OPTIONS = {
    'num_frames', 'max_epoch', 'batch_size', 'n_cpu', 'test_step', 'lr', 'lr_decay', 'train_list',
    'train_path', 'eval_list', 'eval_path', 'musan_path', 'rir_path', 'save_path', 'initial_model',
    'C', 'm', 's', 'n_class', 'eval', 'score_save_path', 'model_save_path',
}  # fmt: skip

# Options that do not change the numbers of a training run. Every other option counts when a run is
# continued, so a new option does too unless it is added here.
HARMLESS = {
    'check', 'eval', 'force', 'command', 'save_path', 'score_save_path', 'model_save_path', 'keep',
    'max_bad', 'device', 'n_cpu', 'compile',
    # The lists count by their contents, with --enrol_list as a part of --eval_list.
    'train_path', 'eval_path', 'enrol_list',
    # These change what is computed from scores, and only --eval has a cohort.
    'speaker', 'score_norm', 'top_n', 'cohort_utterances', 'subtract_mean',
}  # fmt: skip


def options_for(function, args):
    """Returns those of a command's options that a function or class takes, {name: value}."""
    names = inspect.signature(function).parameters
    return {name: value for name, value in vars(args).items() if name in names}


def refuse_unknown(function, names):
    """Raises TypeError for a name that is not even an option of the published command."""
    for name in names:
        if name not in PUBLISHED_OPTIONS:
            raise TypeError(f'{function.__name__} has no option {name}')


def add_scoring_options(parser):
    """Adds the options of everything that scores: checkpoint, lists, normalisation, machine."""
    add = parser.add_argument_group('checkpoint and lists').add_argument
    add('--initial_model', default='', help='checkpoint to score, or to start training from')
    add(
        '--eval_list',
        nargs='+',
        default=['data/VoxCeleb1/veri_test2.txt'],
        help='trial lists, lines `label enrolment test` or the label last',
    )
    add(
        '--eval_path',
        nargs='+',
        default=['data/VoxCeleb1/test/wav'],
        help='folder of the paths in --eval_list: one, or one for each',
    )
    add('--enrol_list', default='', help='lines `model utterance...`: trials enrol these models')
    add('--train_list', default='data/VoxCeleb2/train_list.txt', help='lines `speaker path`')
    add('--train_path', default='data/VoxCeleb2/train/wav', help='folder of the paths in it')
    add_speaker_option(add)

    add = parser.add_argument_group('kinds of scores').add_argument
    add(
        '--score_norm',
        choices=('none', 'asnorm'),
        default='none',
        help='asnorm: also scores normalised by a cohort of training speakers',
    )
    add('--top_n', type=number(int, 2), default=400, help='closest cohort speakers for a score')
    add(
        '--cohort_utterances',
        type=number(int, 1),
        default=20,
        help='of each speaker in --train_list, for the cohort',
    )
    add('--subtract_mean', action='store_true', help="also scores less the cohort's mean")

    add = parser.add_argument_group('machine').add_argument
    add(
        '--device',
        default='auto',
        help='auto (cuda if there is one, else cpu), cpu, cuda, cuda:1, or mps, the GPU of a Mac',
    )
    add(
        '--precision',
        choices=('auto', 'bf16', 'fp32', 'exact'),
        default='auto',
        help='auto: bf16 if a GPU has it, else fp32; exact: no TF32',
    )
    add('--n_cpu', type=number(int, 0), default=default_n_cpu(), help='processes that read files')
    add('--seed', type=number(int, 0, 2**64 - 1), default=10, help='seed of all random draws')


def add_speaker_option(add):
    """Adds --speaker, by the add_argument of a parser or of a group."""
    add(
        '--speaker',
        type=speaker_pattern,
        default='',
        metavar='PATTERN',
        help='regular expression whose first group is the speaker in a path, such as (id\\d+)-; '
        'without it the first folder, after those that all paths of a list share',
    )


def speaker_pattern(text):
    """argparse type: a regular expression with a group."""
    try:
        groups = re.compile(text).groups
    except re.error as error:
        raise argparse.ArgumentTypeError(f'{text} is not a regular expression: {error}') from error
    if text and not groups:
        raise argparse.ArgumentTypeError(
            f'{text} has no group; put the part that is the speaker in brackets, as in (id\\d+)-'
        )
    return text


LARGEST = {int: 2**31 - 1, float: sys.float_info.max}


def number(kind, low, high=None):
    """Returns an argparse type: a finite int or float (kind) in [low, high]."""
    if high is None:
        high = LARGEST[kind]

    def convert(text):
        value = kind(text)
        # Written so that NaN is refused too.
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f'{text} is not between {low} and {high}')
        return value

    convert.__name__ = kind.__name__
    return convert


def default_n_cpu():
    """Loading processes for each training process: its share of the processors, 16 at most."""
    return max(1, min(16, available_cpus() // int(os.environ.get('LOCAL_WORLD_SIZE', 1))))


def available_cpus():
    """Processors that this process may use."""
    if hasattr(os, 'sched_getaffinity'):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def command_of(program, argv):
    """The command line of `program` with the arguments argv, those of this process if None."""
    return shlex.join(['python', *program.split(), *(sys.argv[1:] if argv is None else argv)])


def process_rank():
    """Number of this process among those that train together, 0 where it is alone or writes."""
    return dist.get_rank() if dist.is_initialized() else 0


def process_count():
    """How many processes train together."""
    return dist.get_world_size() if dist.is_initialized() else 1


@contextlib.contextmanager
def first_process_first():
    """Lets the first process run the block before the others, which wait for it, hours if need be.

    The others wait at torchrun's store: a collective would end by its timeout of minutes. They end
    here if a process has told of an error meanwhile.
    """
    turn = f'turn {next(turns)}'
    if process_rank() > 0:
        until = time.monotonic() + PATIENCE
        while not common_store.check([turn]):
            if common_store.check(['told']):
                sys.exit(2)
            if time.monotonic() > until:
                raise BadInput(
                    f'the first process has not answered for {PATIENCE / 3600:.0f} hours'
                )
            time.sleep(0.1)
    yield
    if process_count() > 1 and process_rank() == 0:
        common_store.set(turn, 'done')


def sum_over_processes(tensor):
    """Sums a tensor in place over the processes that train together; returns it."""
    if process_count() > 1:
        dist.all_reduce(tensor)
    return tensor


def gather(items):
    """Returns the items of the lists of all processes that train together, in one list."""
    if process_count() == 1:
        return items
    lists = [None] * process_count()
    dist.all_gather_object(lists, items)
    return [item for part in lists for item in part]


def say(text):
    """Prints a line of the log, in the first process only."""
    if process_rank() == 0:
        print(text, flush=True)


def note(text):
    """Prints a note once for all processes, on standard error: standard output is for results."""
    if process_rank() == 0:
        print(f'note: {text}', file=sys.stderr, flush=True)


class Log:
    """A stream whose text is dropped if it cannot be written (a closed pipe, a full disk)."""

    def __init__(self, stream):
        self.stream = stream

    def __getattr__(self, name):
        return getattr(self.stream, name)

    def write(self, text):
        """Writes text if possible."""
        with contextlib.suppress(OSError):
            self.stream.write(text)

    def flush(self):
        """Flushes what was written if possible."""
        with contextlib.suppress(OSError):
            self.stream.flush()


@contextlib.contextmanager
def lossy_log():
    """Drops what cannot be printed in the block: no line of a log is worth a training."""
    prepare_streams()
    out = Log(sys.stdout)
    err = Log(sys.stderr)
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            yield
    finally:
        drop_unwritten()


class BadInput(Exception):
    """The user's input cannot be used: the message says what is wrong, where, and what to do."""


@contextlib.contextmanager
def exit_on_bad_input(resume_hint=None):
    """Turns expected errors into one message and an exit status; bugs keep their traceback.

    The status is 2 for what `sentence` knows and for helpers that died, and 141 (silently) if
    nobody reads the output any more. Of processes that train together, the first one to fail prints
    its message. resume_hint: see end_on_signals.
    """
    prepare_streams()
    with end_on_signals(resume_hint):
        try:
            yield
            sys.stdout.flush()
        except KeyboardInterrupt:  # in a notebook, or from somebody's own handler
            print('\nstopped by Ctrl-C', file=sys.stderr)
            sys.exit(130)
        except BrokenPipeError:
            sys.exit(141)  # as for a program that SIGPIPE ends
        except Exception as error:
            message = sentence(error) or why_helpers_died(resume_hint)
            message = message or why_not_together(error)
            if message is None:
                raise
            if is_first_to_tell():
                print(f'error: {message}', file=sys.stderr)
            sys.exit(2)
        finally:
            drop_unwritten()


def prepare_streams():
    """Makes standard output and error take any text, also if the shell has closed them (`>&-`)."""
    for name in ('stdout', 'stderr'):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, 'w', encoding='utf-8'))
        elif hasattr(stream, 'reconfigure'):  # a notebook's stream has no such method
            # File names need not be UTF-8, and are printed nevertheless.
            stream.reconfigure(errors='backslashreplace')


def drop_unwritten():
    """Gives up text that cannot be written: Python would try again at its end, and complain."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:
            devnull = os.open(os.devnull, os.O_WRONLY)
            os.dup2(devnull, stream.fileno())
            os.close(devnull)


@contextlib.contextmanager
def end_on_signals(resume_hint=None):
    """Makes Ctrl-C and SIGTERM end this process at once, with status 130 and 143.

    An exception that a handler raises is lost in a destructor or a callback, and the run would go
    on. Files are written whole, so nothing is lost by an end at any moment. resume_hint(): what to
    add to the message, or None.

    A notebook keeps its own way to interrupt, and so does a thread, which cannot have handlers.
    SIGTERM keeps its default effect under torchrun, which sends it to processes that wait for each
    other outside of Python.
    """
    before = {}
    process = os.getpid()

    def end(number, frame):
        if os.getpid() != process:
            # A helper that was forked a moment ago has nothing to say.
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
        end_by_signal(number, resume_hint)

    if owns_the_process():
        for number in (signal.SIGINT, signal.SIGTERM):
            under_torchrun = number == signal.SIGTERM and 'TORCHELASTIC_RUN_ID' in os.environ
            # In the background of a script, Ctrl-C is ignored.
            if signal.getsignal(number) != signal.SIG_IGN and not under_torchrun:
                before[number] = signal.signal(number, end)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def owns_the_process():
    """Returns whether this is the main thread of a command, neither a notebook nor a prompt."""
    is_main_thread = threading.current_thread() is threading.main_thread()
    return is_main_thread and not hasattr(sys, 'ps1')


def end_by_signal(number, resume_hint):
    """Ends this process and its helpers with a line on standard error, without any clean-up."""
    try:
        # Neither a second signal nor the end of a helper may interrupt this.
        for name in ('SIGINT', 'SIGTERM', 'SIGCHLD'):
            if hasattr(signal, name):
                signal.signal(getattr(signal, name), signal.SIG_IGN)
        # Killed before this process ends, or they would complain that nobody takes their data.
        for helper in multiprocessing.active_children():
            helper.kill()
        for path in unfinished_files:
            with contextlib.suppress(OSError):
                os.remove(path)
        if socket_folder:
            shutil.rmtree(socket_folder, ignore_errors=True)
        if process_rank() == 0:
            name = 'Ctrl-C' if number == signal.SIGINT else 'SIGTERM'
            hint = resume_hint() if resume_hint else ''
            # print may have been interrupted, and cannot be entered twice.
            os.write(2, f'\nstopped by {name}{hint}\n'.encode(errors='backslashreplace'))
    finally:
        os._exit(128 + number)


# What PyTorch's errors say if memory is too small for a step.
MEMORY = "out of memory|ALLOC_FAILED|can't allocate memory"

# What is wrong with the machine rather than with this code.
NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EMFILE, errno.ENFILE, errno.ENOMEM}


def sentence(error):
    """Returns what to tell people of an exception; None for a mistake in this code."""
    if isinstance(error, BadInput):
        # From a worker process the error comes wrapped in the worker's traceback.
        return str(error).rpartition('BadInput: ')[2].strip()
    if isinstance(error, ModuleNotFoundError):
        return f'the package {error.name} is needed for this: pip install {error.name}'
    if isinstance(error, OSError) and error.filename is not None:
        return f'{error.filename}: {error.strerror}'
    if isinstance(error, OSError) and error.errno in NO_ROOM:
        return f'{error.strerror} (standard output, a file or a pipe of this process)'
    if isinstance(error, ValueError) and 'embedded null byte' in str(error):
        return 'a path has a byte 0 in it, which no file name has'
    if isinstance(error, MemoryError):
        return f'{summary(error)}\nUse a smaller --batch_size, or shorter crops.'
    if isinstance(error, RuntimeError) and re.search(MEMORY, str(error)):
        return f'{summary(error)}\nUse a smaller --batch_size, or --accumulate.'
    return None


def summary(error):
    """Returns the first line of a library's error, or its type if it has none."""
    lines = str(error).splitlines() or [type(error).__name__]
    return lines[0][:200]


def why_helpers_died(resume_hint):
    """Returns how a process that loads data died, and what to do; None if all are well.

    This asks the processes, as PyTorch's wording changes. Ends the command if somebody stopped a
    helper: SIGTERM to a whole job may reach helpers first.
    """
    # One that has just closed its pipes may need a moment to end.
    multiprocessing.connection.wait([helper.sentinel for helper in helpers], timeout=1)
    codes = {helper.exitcode for helper in helpers} - {None, 0}
    if not codes:
        return None
    for number in (signal.SIGTERM, signal.SIGINT):
        if -number in codes and owns_the_process():
            end_by_signal(number, resume_hint)
    code = min(codes)
    if code > 0:
        return f'a loading process ended with status {code}; the lines above say why'
    name = signal.Signals(-code).name
    how = f'a loading process was ended by {name}'
    if name == 'SIGKILL':
        return f'{how}: memory is short, most likely; use a smaller --n_cpu'
    if name == 'SIGBUS':
        return f'{how}: shared memory is full, most likely; {MORE_SHARED_MEMORY}'
    return f'{how}: a library failed; --n_cpu 0 reads in this process and shows where'


MORE_SHARED_MEMORY = 'use a smaller --n_cpu, or give more (docker run --shm-size 4g)'


def why_not_together(error):
    """Returns what to say if an exchange with other processes failed; None for another error."""
    if process_count() == 1 or not isinstance(error, RuntimeError):
        return None
    files = [frame.filename for frame in traceback.extract_tb(error.__traceback__)]
    # Batch norm exchanges its gradients within the backward pass, which is PyTorch's last frame.
    exchanging = ('distributed', '_functional_collectives.py', 'graph.py')
    parts = {part for file in files for part in file.split(os.sep)}
    if not parts.intersection(exchanging):
        return None
    return (
        f'another process of this training has ended, or has not answered for {TIMEOUT / 60:.0f} '
        f'minutes ({summary(error)}); torchrun names it'
    )


def is_first_to_tell():
    """Returns whether no other process that trains with this one has told of an error."""
    if common_store is None:
        return True
    try:
        return common_store.add('told', 1) == 1
    except RuntimeError:
        return True  # the process that holds the store has ended
