"""Scoring beyond the EER of a test: kinds of scores, intervals, tables, results.json.

This is what `trainECAPAModel.py --eval` does, in the order in which data flows. Scripts use the
same functions.
"""

import argparse
import contextlib
import itertools
import json
import math
import os
import re
import zipfile
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from scipy.special import ndtr, stdtrit
from tqdm import tqdm

from dataLoader import check_audio, read_train_list, read_trial_lists, require_folder
from ECAPAModel import Scored, load_model_of, raise_if_any
from tools import (
    FIGURES,
    PRIORS,
    BadInput,
    available_cpus,
    check_writable,
    compare_processes,
    default_n_cpu,
    error_rates,
    find_figures,
    first_process_first,
    gather,
    in_range,
    note,
    operating_points,
    process_rank,
    provenance,
    say,
    score_pairs,
    sha256,
    sort_by_score,
    unit_length,
    unit_whole,
    write_text,
    write_whole,
)

REPLICATES = 1000  # of the speakers of a list, for an interval
MAX_BAD = 10  # percent of a cohort's files; with more, its folder is not the right one
MOST = {'EER': 100, **dict.fromkeys(PRIORS, 1)}  # the largest value of each figure


def evaluate(args):
    """Scores --initial_model on --eval_list; prints the figures, and writes them and all scores."""
    # An evaluation takes long, so first check that its results can be written.
    with first_process_first():
        read_results(args.save_path)
        check_writable(os.path.join(args.save_path, 'scores'), '--save_path')

    # Load the model, read the lists, and choose the files of the cohort.
    system, checkpoint = load_model_of(args)
    with first_process_first():
        paths, trial_lists = read_trial_lists(
            args.eval_list, args.eval_path, args.enrol_list, args.speaker
        )
        if process_rank() == 0:
            check_audio(paths, '--eval_list')
        cohort_files, top_n, subtract_mean = choose_normalisation(args)

    # Check that all processes have the same model, lists and options.
    names = ('score_norm', 'top_n', 'cohort_utterances', 'subtract_mean', 'seed')
    facts = {name: getattr(args, name) for name in names}
    facts['initial_model'] = f'SHA-256 {checkpoint["sha256"][:16]}'
    facts['precision'] = system.precision
    facts['eval_list'] = [trials.sha256[:16] for trials in trial_lists]
    compare_processes(facts, args)

    # Compute the scores; then their intervals, the table and the files.
    cohort = load_cohort(system, checkpoint, cohort_files)
    results = score_lists(system, paths, trial_lists, cohort, top_n, subtract_mean)
    if process_rank() == 0:
        add_intervals(results, trial_lists)
        say(args.initial_model)
        say_figures(results, trial_lists)
        write_results(results, trial_lists, checkpoint, args)


# Options.


def add_scoring_options(parser):
    """Adds the options of commands that score: checkpoint, lists, kinds of scores, machine."""
    # fmt: off
    add = parser.add_argument_group('checkpoint and lists').add_argument
    add('--initial_model', default='', help='checkpoint to score, or to start training from')
    add('--eval_list', nargs='+', default=['data/VoxCeleb1/veri_test2.txt'],
        help='trial lists: lines `label enrolment test`, or with the label last')
    add('--eval_path', nargs='+', default=['data/VoxCeleb1/test/wav'],
        help='folder of the files in --eval_list: one for all lists, or one for each')
    add('--enrol_list', default='',
        help='lines `model utterance...`; the enrolments of the trials are then these models')
    add('--train_list', default='data/VoxCeleb2/train_list.txt',
        help='training list: lines `speaker path`')
    add('--train_path', default='data/VoxCeleb2/train/wav',
        help='folder of the files in --train_list')
    add_speaker_option(add)

    add = parser.add_argument_group('kinds of scores').add_argument
    add('--score_norm', choices=('none', 'asnorm'), default='none',
        help='asnorm: also compute scores that are normalised by a cohort of training speakers')
    add('--top_n', type=in_range(int, 2), default=400,
        help='asnorm: how many of the closest cohort speakers are used for a score')
    add('--cohort_utterances', type=in_range(int, 1), default=20,
        help='how many utterances of each training speaker are averaged for the cohort')
    add('--subtract_mean', action='store_true',
        help="also compute scores after subtracting the cohort's mean")

    add = parser.add_argument_group('machine').add_argument
    add('--device', default='auto',
        help='auto (cuda if there is one, else cpu), cpu, cuda, cuda:1, or mps, the GPU of a Mac')
    add('--precision', choices=('auto', 'bf16', 'fp32', 'exact'), default='auto',
        help='auto: bf16 if the GPU supports it, else fp32; exact: float32 without TF32')
    add('--n_cpu', type=in_range(int, 0), default=default_n_cpu(),
        help='processes that read files')
    add('--seed', type=in_range(int, 0, 2**64 - 1), default=10, help='seed of all random draws')
    # fmt: on


def add_speaker_option(add):
    """Adds --speaker, by the add_argument of a parser or of a group."""
    add(
        '--speaker',
        type=speaker_pattern,
        default='',
        metavar='PATTERN',
        help='regular expression whose first group is the speaker in a path, such as (id\\d+)-; '
        'without it, the speaker is the first folder after those that all paths of a list share',
    )


def speaker_pattern(text):
    """Checks the value of --speaker: a regular expression with a group; an argparse type."""
    try:
        groups = re.compile(text).groups
    except re.error as error:
        raise argparse.ArgumentTypeError(f'{text} is not a regular expression: {error}') from error
    if text and not groups:
        raise argparse.ArgumentTypeError(
            f'{text} has no group; put the part that is the speaker in brackets, as in (id\\d+)-'
        )
    return text


# Cohorts: speakers of the training list that normalise scores.


def choose_normalisation(args):
    """Chooses how to normalise scores, from the options of a command.

    Returns (files of the cohort as choose_cohort returns them, or None; top_n or None;
    subtract_mean).
    """
    top_n = args.top_n if args.score_norm == 'asnorm' else None
    files = None
    if top_n or args.subtract_mean:
        files = choose_cohort(args.train_list, args.train_path, args.cohort_utterances, args.seed)
        if top_n and len(files) < top_n:
            note(
                f'--train_list {args.train_list} has {len(files):,} speakers, fewer than --top_n '
                f'{top_n}; all of them are used'
            )
    return files, top_n, args.subtract_mean


def choose_cohort(train_list, train_path, per_speaker, seed):
    """Draws up to per_speaker utterances of each speaker in a training list.

    Returns a list of paths for each speaker.
    """
    require_folder(train_path, '--train_path')
    _, labels, names, _ = read_train_list(train_list)
    by_speaker = np.argsort(labels, kind='stable')
    ends = np.cumsum(np.bincount(labels))
    rng = np.random.default_rng(seed)
    cohort = []
    for utterances in np.split(by_speaker, ends[:-1]):
        chosen = rng.permutation(utterances)[:per_speaker]
        cohort.append([os.path.join(train_path, names[i]) for i in chosen])
    return cohort


def load_cohort(system, checkpoint, files):
    """Embeds the speakers of a cohort with embed_speakers, and keeps them beside the checkpoint.

    checkpoint: {'path', 'sha256'} of the system's weights; files: from choose_cohort, None for no
    cohort. A kept cohort is used, with a note, if nothing that it was made from has changed.
    Returns (speakers, 2, D), or None for no cohort.
    """
    if files is None:
        return None
    path = f'{checkpoint["path"]}.cohort.npz'
    key = cohort_key(system, checkpoint, files)
    cohort = read_cohort(path, key)
    # All processes must agree: one may read the file just before another one writes it.
    if all(gather([cohort is not None])):
        note(f'the cohort of {len(files):,} speakers is the one kept in {path}')
        return cohort

    cohort = embed_speakers(system, files)
    if process_rank() == 0:
        try:
            write_whole(path, lambda file: np.savez(file, key=key, cohort=cohort))
        except BadInput as error:
            note(f'the cohort is not kept: {error}')
    return cohort


def embed_speakers(system, files):
    """Embeds speakers, each as the mean of embed_files over the speaker's files.

    files: a list of paths for each speaker. Files that cannot be used are left out, with a note,
    and so are speakers who have no other files. Returns (speakers, 2, D). A score against a mean
    is the mean of the scores. Raises BadInput if more than MAX_BAD percent of the files are bad.
    """
    paths = [path for own in files for path in own]
    faults = {}
    embeddings = system.embed_files(paths, faults=faults)
    if len(faults) > len(paths) * MAX_BAD / 100:
        raise_if_any(list(faults.values()), len(paths))

    means = []
    start = 0
    for own in files:
        rows = [row for row in range(start, start + len(own)) if row not in faults]
        start += len(own)
        if rows:
            means.append(embeddings[rows].mean(axis=0))
    if faults:
        note(
            f'{len(faults)} of {len(paths)} files of the cohort cannot be used and are left out; '
            f'{len(means)} of {len(files)} speakers remain. The first: {min(faults.values())}'
        )
    return np.stack(means)


def cohort_key(system, checkpoint, files):
    """Returns a string that changes if anything that the cohort is made from changes.

    It depends on the weights, the arithmetic, and the files with their sizes and times.
    """
    versions = []
    for path in itertools.chain.from_iterable(files):
        try:
            status = os.stat(path)
            # st_ctime too: a copy may keep the modification time of the original.
            versions.append((path, status.st_size, status.st_mtime_ns, status.st_ctime_ns))
        except (OSError, ValueError):
            # The reader of audio will report this file.
            versions.append((path, None))
    counts = [len(paths) for paths in files]
    inputs = (system.precision, system.device.type, counts, versions)
    return f'{checkpoint["sha256"]} {sha256(os.fsencode(repr(inputs)))}'


def read_cohort(path, key):
    """Reads the cohort that load_cohort kept; None if there is none, or it has another key."""
    broken = (OSError, EOFError, ValueError, KeyError, TypeError, zipfile.BadZipFile)
    with contextlib.suppress(*broken), np.load(path) as kept:
        if str(kept['key']) == key:
            return kept['cohort']
    return None


# Kinds of scores. In the shapes, D is the size of an embedding: 192 for ECAPA-TDNN.


def score_lists(system, paths, trial_lists, cohort=None, top_n=None, subtract_mean=False):
    """Scores trial lists with all kinds of scores of score_kinds.

    paths, trial_lists: from read_trial_lists; cohort: from embed_speakers. Returns {kind: Scored}
    for each list.
    """
    embeddings = system.embed_files(paths)
    results = []
    for trials in trial_lists:
        vectors = trials.mean(embeddings)
        kinds = score_kinds(vectors, trials.pairs, cohort, top_n, subtract_mean)
        results.append(
            {
                kind: Scored(scores, operating_points(scores, trials.labels))
                for kind, scores in kinds.items()
            }
        )
    return results


def score_kinds(embeddings, pairs, cohort=None, top_n=None, subtract_mean=False):
    """Computes all kinds of scores of pairs (N, 2) of rows of embeddings (files, 2, D).

    embeddings: from ECAPAModel.embed_files, or means of these; cohort: (speakers, 2, D).
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

    For 'centred', the mean of the cohort is subtracted from both vectors of each file and of each
    cohort speaker, and the results are scaled to length 1.
    """
    yield 'raw', unit_whole(embeddings), cohort
    if subtract_mean:
        mean = cohort.mean(axis=0)
        yield 'centred', unit_length(embeddings - mean), unit_length(cohort - mean)


def as_norm(scores, embeddings, pairs, cohort, top_n):
    """Normalises scores by adaptive s-norm (Matejka et al., Interspeech 2017, eq. 3 and 4).

    scores: (N,) of pairs (N, 2) of rows of embeddings (files, 2, D); cohort, top_n: as in
    cohort_moments. Returns float32 (N,).
    """
    mean, std = cohort_moments(embeddings, cohort, top_n)
    return ((scores[:, None] - mean[pairs]) / std[pairs]).mean(axis=1)


def cohort_moments(embeddings, cohort, top_n):
    """Computes mean and standard deviation of each file's top_n highest scores against a cohort.

    embeddings: (files, 2, D); cohort: (speakers, 2, D), scored against each file like a trial. A
    cohort with fewer than top_n speakers is used whole. Returns float32 (2, files). Raises BadInput
    if a file has the same score against all of them.
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
            'the cohort cannot normalise: the --top_n speakers closest to a file all have the same '
            'score; give a list of more speakers, or a larger --top_n'
        )
    return moments


# How sure the figures are: intervals from replicates of the speakers.


def add_intervals(results, trial_lists):
    """Adds the 95 % 'interval', [low, high], to each figure in the results of score_lists.

    Prints a note for each list or figure without an interval.
    """
    for trials, kinds in zip(trial_lists, results):
        if trials.speakers is None:
            say(f'note          no intervals for {trials.path}: {trials.why_no_speakers}')
            continue
        count = trials.speaker_count()
        draws = draw_speakers(count)
        others = int(np.sum(trials.labels != 1))
        notes = []
        for kind, scored in kinds.items():
            replicates = replicate_figures(
                scored.scores, trials.labels, trials.speakers, draws, f'how sure, {kind}'
            )
            values = {name: figure['value'] for name, figure in scored.figures.items()}
            for name, interval in intervals_of(values, replicates, others, count).items():
                scored.figures[name]['interval'] = interval
            left_out = int(np.isnan(replicates[:, 0]).sum())
            if left_out:
                notes.append(
                    f'{left_out} of {REPLICATES} replicates have only target or only non-target '
                    'trials, and are left out of the intervals'
                )
            for name, value in values.items():
                reason = why_no_interval(name, value, others)
                if reason:
                    notes.append(f'no interval for {name}: {reason}')
        # The kinds of scores often have the same notes.
        for text in dict.fromkeys(notes):
            say(f'note          {trials.path}: {text}')


def draw_speakers(count, replicates=REPLICATES, seed=0):
    """Draws speakers for replicates: how often each of `count` is drawn, int64 (replicates, count).

    A replicate draws `count` speakers with replacement. The draws are the same for the same count,
    so that two sets of scores of one list can be compared replicate by replicate.
    """
    rng = np.random.default_rng(seed)
    return rng.multinomial(count, np.full(count, 1 / count), size=replicates)


def replicate_figures(scores, labels, speakers, draws, title=None):
    """Computes FIGURES of replicates of a trial list, by a joint bootstrap over speakers.

    scores, labels: (N,); speakers: int (N, 2), the two of each trial; draws: from draw_speakers;
    title: of a progress bar. If a replicate draws a speaker a times, the speaker's target trials
    count a times. If it draws two speakers a and b times, a non-target trial of these two counts
    a * b times. So both sides of a trial vary, and trials that share a speaker vary together.
    Compare the bootstrap of rows and columns in Owen, Annals of Applied Statistics, 2007.

    Returns (replicates, 3); NaN if a replicate has no target or no non-target trials.
    """
    _, is_target, ends, order = sort_by_score(scores, labels)
    first, second = np.asarray(speakers)[order].T
    # The second side of a target trial must not count: -1 is a speaker who is always drawn once.
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


def intervals_of(values, replicates, others, speakers):
    """Returns {figure: [low, high]}, 95 % intervals of the FIGURES of a list.

    values: {figure: value}; replicates: (replicates, 3); others: how many non-target trials there
    are; speakers: how many speakers. Figures are left out if why_no_interval gives a reason.
    """
    return {
        name: figure_interval(values[name], column, speakers, MOST[name])
        for name, column in zip(FIGURES, replicates.T)
        if not why_no_interval(name, values[name], others)
    }


def why_no_interval(name, value, others):
    """Returns why a figure of a list with `others` non-target trials has no interval, or ''.

    The cost of one false alarm may be at most 1/30, and at most 1/5 of the minDCF. Otherwise the
    minDCF depends on so few false alarms that its interval would be too narrow.
    """
    if value == 0:
        return 'it is 0, and a list without errors cannot tell how far from 0 it may be'
    if name not in PRIORS:
        return ''
    prior = PRIORS[name]
    fewest = round((1 - prior) / prior * max(30, 5 / value))
    if others >= fewest:
        return ''
    return f'it needs at least {fewest:,} trials of different speakers, and there are {others:,}'


def figure_interval(value, replicates, speakers, most):
    """Returns [low, high], the 95 % interval of an EER or a minDCF; NaN is left out.

    replicates: (R,), of the figure; most: the largest value that it can have. An error rate varies
    by a factor, so the interval is that of Student's t distribution for its logarithm.

    A minimum over thresholds is too low, and in the replicates it is lower again by a similar
    factor. That factor, value / mean of the replicates, corrects the centre.
    """
    mean = np.nanmean(replicates)
    # The deviation of the logarithm of a log-normal variable, which holds for replicates of 0 too.
    deviation = math.sqrt(math.log1p(np.nanvar(replicates) / mean**2))
    factor = math.exp(expanded_quantile(speakers) * deviation)
    centre = value**2 / mean
    low = min(value, centre / factor)
    high = max(value, min(most, centre * factor))
    return [float(low), float(high)]


def difference_interval(replicates, speakers):
    """Returns [low, high], the 95 % interval of a difference of figures; NaN is left out.

    replicates: (R,), of the difference. low and high are percentiles of the replicates. They need
    no correction, because the two figures have a similar bias.
    """
    tail = 100 * ndtr(-expanded_quantile(speakers))
    low, high = np.nanpercentile(replicates, [tail, 100 - tail])
    return [float(low), float(high)]


def expanded_quantile(speakers):
    """Returns how many deviations of the replicates a 95 % interval reaches to each side.

    Few speakers need more, because their replicates vary too little (Hesterberg, The American
    Statistician, 2015).
    """
    return -stdtrit(speakers - 1, 0.025) * math.sqrt(speakers / (speakers - 1))


# Tables.


def say_figures(results, trial_lists):
    """Prints a table of the results of score_lists: a row for each list and kind of scores."""
    for trials, kinds in zip(trial_lists, results):
        for kind, scored in kinds.items():
            if scored.scores.min() == scored.scores.max():
                say(f'WARNING       {trials.path}: all {kind} scores are equal and mean nothing')
    say(figures_table(results, trial_lists))


def figures_table(results, trial_lists):
    """Formats the table of say_figures."""
    rows = [['list', 'kind', 'trials', 'speakers', *FIGURES]]
    for trials, kinds in zip(trial_lists, results):
        counts = [f'{len(trials.labels):,}', format_count(trials.speaker_count())]
        for kind, scored in kinds.items():
            cells = [format_figure(name, scored.figures) for name in FIGURES]
            rows.append([trials.path, kind, *counts, *cells])
    return table(rows)


def table(rows):
    """Formats rows of cells as aligned lines of text."""
    widths = [max(map(len, column)) for column in zip(*rows)]
    lines = []
    for row in rows:
        cells = [cell.ljust(width) for cell, width in zip(row, widths)]
        lines.append('  '.join(cells).rstrip())
    return '\n'.join(lines)


def format_count(count):
    """Formats a number, '-' if it is not known."""
    return '-' if count is None else f'{count:,}'


def format_figure(name, figures):
    """Formats a figure in {name: {'value'}} with its interval; '-' if it is not there."""
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


# Results: results.json and scores/LIST.txt of a folder.


def read_results(folder):
    """Reads a folder's results.json: {trial list: entry}, {} if there is no such file.

    write_results lists the keys of an entry. Raises BadInput if the file holds something else.
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
        raise BadInput(f'{path}: not written by this version of --eval; move it') from error
    return lists


def write_results(results, trial_lists, checkpoint, args):
    """Writes scores/LIST.txt in SAVE_PATH for each list, and adds the lists to its results.json.

    results: from score_lists, for trial_lists; checkpoint: {'path', 'sha256'}. A line of scores is
    `label scores... enrolment test`, with a score for each kind. If two lists have the same name,
    the file of the second gets a number.
    """
    os.makedirs(os.path.join(args.save_path, 'scores'), exist_ok=True)
    with one_at_a_time(args.save_path):
        lists = read_results(args.save_path)
        for trials, kinds in zip(trial_lists, results):
            # Write the scores.
            path = scores_path(args.save_path, choose_scores_file(trials.path, lists))
            columns = [[f'{score:.6f}' for score in scored.scores] for scored in kinds.values()]
            lines = []
            for label, scores, (enrolment, test) in zip(trials.labels, zip(*columns), trials.pairs):
                names = [trials.names[enrolment], trials.names[test]]
                lines.append(' '.join([str(label), *scores, *names]) + '\n')
            write_text(path, ''.join(lines))

            # Replace the entry of the list.
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


def choose_scores_file(trial_list, lists):
    """Chooses the file for the scores of a trial list: its earlier file, or a new name."""
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
    """Returns other paths in a results.json of the same trial list, for example absolute ones."""
    place = os.path.abspath(trial_list)
    return [path for path in lists if path != trial_list and os.path.abspath(path) == place]


def scores_path(folder, scores):
    """Returns the path of a file of scores; the folder may have been moved since it was written."""
    return os.path.join(folder, 'scores', os.path.basename(scores.replace('\\', '/')))


@contextlib.contextmanager
def one_at_a_time(folder):
    """Lets only one process at a time run the block for a folder, if its disk has locks."""
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


def read_list_scores(folder, trial_list, entry):
    """Reads the scores of a trial list, whose entry is in the folder's results.json.

    Returns (labels (N,), {kind: scores (N,)}, names [(enrolment, test)]). Raises BadInput if the
    figures of the entry were computed from other scores.
    """
    path = scores_path(folder, entry['scores'])
    labels, scores, names = read_trial_scores(path)
    kinds = list(entry['figures'])
    if scores.shape != (entry['trials'], len(kinds)):
        raise BadInput(
            f'{path}: its trials or kinds are not those of results.json; score the list again'
        )

    for kind, column in zip(kinds, scores.T):
        eer = entry['figures'][kind]['EER']['value']
        # Scores are rounded to 6 digits, so a target may have moved by 1e-6 relative to others. The
        # EER falls if target scores rise, so the true EER lies between these two.
        rounding = 1.001e-6 * labels
        lowest = operating_points(column + rounding, labels)['EER']['value']
        highest = operating_points(column - rounding, labels)['EER']['value']
        if not lowest - 1e-6 <= eer <= highest + 1e-6:
            raise BadInput(
                f'{path}: these {kind} scores have an EER of {highest:.4f}%, but results.json says '
                f'{eer:.4f}%: they come from another evaluation, or an older version of this code '
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
