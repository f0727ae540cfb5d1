"""Fits the calibration that turns scores into log-likelihood ratios, on scores of --eval.

    python trainECAPAModel.py --eval --eval_list dev.txt test.txt --save_path exps/exp1 ...
    python -m exps.calibrate exps/exp1 --fit dev

fits two numbers to exps/exp1/scores/dev.txt, and writes exps/exp1/calibration.json, which
exps.verify and exps.identify use. It prints how good the ratios of the folder's other lists are.
Fit on trials of recordings like those that you will decide on, by speakers who are not in training.
"""

import argparse
import json
import os
import posixpath

import numpy as np
from scipy.special import logit
from sklearn.isotonic import IsotonicRegression
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler

import tools
from dataLoader import speakers_of
from exps import scoring
from tools import BadInput

FEWEST = 30  # with fewer target or non-target trials, a fit says nothing
CALIBRATED = ('Cllr', 'minCllr')  # of natural log-likelihood ratios
FIGURES = (*tools.FIGURES, *CALIBRATED, 'actDCF(0.01)', 'actDCF(0.05)')


def main(argv=None):
    """Runs the script. Exits with status 2 and a message if the input cannot be used."""
    parser = argparse.ArgumentParser(
        prog='python -m exps.calibrate',
        description='Fit log-likelihood ratios to scores of --eval.',
    )
    add = parser.add_argument
    add('folder', help='folder of results.json and scores/, which --eval wrote')
    add('--fit', required=True, metavar='LIST', help='the list to fit on, by its path or its name')
    add('--kind', help='raw, asnorm, centred or centred asnorm (default: the last that was scored)')
    add(
        '--false_acceptances',
        type=tools.in_range(float, 1e-3, 99),
        default=1.0,
        help='percentage of false acceptances that the threshold allows (default: 1)',
    )
    scoring.add_speaker_option(add)
    args = parser.parse_args(argv)
    args.command = tools.command_of('-m exps.calibrate', argv)
    with tools.exit_on_bad_input():
        calibrate(args)


def calibrate(args):
    """Writes FOLDER/calibration.json, and prints the figures of the other lists."""
    # Read the scores of the list, and fit.
    lists = scoring.read_results(args.folder)
    fit_list = find_list(lists, args.fit, args.folder)
    entry = lists[fit_list]
    kind = args.kind or list(entry['figures'])[-1]
    labels, scores, names = read_kind(args.folder, fit_list, entry, kind)
    check_fit(fit_list, kind, labels, scores)
    weight, bias = fit(scores, labels)
    ratio, allowed = threshold(weight * scores + bias, labels, args.false_acceptances)

    # Write the calibration.
    calibration = {
        'kind': kind,
        'weight': weight,
        'bias': bias,
        'threshold': {'false_acceptances': args.false_acceptances, 'ratio': ratio},
        'list': {'path': fit_list, 'sha256': entry['sha256'], 'trials': len(labels)},
        'checkpoint': entry['checkpoint'],
        'options': entry['options'],
        **tools.provenance(args.command),
    }
    path = os.path.join(args.folder, 'calibration.json')
    tools.write_text(path, json.dumps(calibration, indent=2) + '\n')
    print(
        f'{path}: fitted on {len(labels):,} {kind} scores of {fit_list}, '
        f'{int(labels.sum()):,} of targets'
    )
    if scores[labels == 1].min() > scores[labels == 0].max():
        print(
            'note: a threshold separates these scores without an error, so the likelihood ratios '
            'will be too sure; fit on more, or harder, trials'
        )
    if allowed < FEWEST:
        print(
            f'note: at {args.false_acceptances:g}% the threshold depends on only {allowed} false '
            'acceptances'
        )

    # Try it on the other lists.
    del lists[fit_list]
    print_others(lists, calibration, names, args)


def check_fit(path, kind, labels, scores):
    """Raises BadInput if nothing can be fitted to the scores (N,) of a list."""
    targets = int(labels.sum())
    others = len(labels) - targets
    if min(targets, others) < FEWEST:
        raise BadInput(
            f'--fit: {path}: has {targets} target and {others} non-target trials; a fit needs '
            f'{FEWEST} of each'
        )
    if scores.min() == scores.max():
        raise BadInput(f'--fit: {path}: all {kind} scores are equal and mean nothing')


def find_list(lists, name, folder):
    """Finds a list in results.json by its path, or by its last part without the ending."""
    if name in lists:
        return name
    named = [path for path in lists if os.path.splitext(os.path.basename(path))[0] == name]
    if len(named) == 1:
        return named[0]
    known = ', '.join(lists) or 'none; --eval writes it'
    raise BadInput(f'--fit {name}: not one of the lists in {folder}/results.json ({known})')


def read_kind(folder, path, entry, kind):
    """Returns (labels (N,), scores (N,) of a kind, names of each trial) of a list's entry."""
    labels, scores, names = scoring.read_list_scores(folder, path, entry)
    if kind not in scores:
        raise BadInput(f'--kind {kind}: {path} was scored as {", ".join(scores)}')
    return labels, scores[kind], names


def fit(scores, labels):
    """Fits logistic regression to scores (N,) with labels (N,); returns (weight, bias).

    Target and non-target trials have the same total weight, so the log-odds are log-likelihood
    ratios. Raises BadInput if higher scores mean the same speaker less often.
    """
    scaler = StandardScaler().fit(scores[:, None])
    # With almost no regularisation; without any, trials without errors have no finite solution.
    regression = LogisticRegression(C=1000.0, class_weight='balanced', max_iter=1000)
    regression.fit(scaler.transform(scores[:, None]), labels)
    weight = float(regression.coef_[0, 0] / scaler.scale_[0])
    # Written so that NaN is refused too.
    if not weight > 0:
        raise BadInput(
            'a higher score means the same speaker less often in these trials: are the labels '
            'right?'
        )
    return weight, float(regression.intercept_[0] - weight * scaler.mean_[0])


def threshold(ratios, labels, percent):
    """Returns (the ratio that `percent` of the non-target trials exceed, their number)."""
    others = np.sort(ratios[labels == 0])
    allowed = int(len(others) * percent / 100)
    return float(others[len(others) - 1 - allowed]), allowed


def print_others(lists, calibration, fitted, args):
    """Prints the figures of lists for a calibration that was fitted on other trials.

    fitted: the names of the trials of the fit.
    """
    rows = [['list', 'trials', *FIGURES]]
    for path, entry in lists.items():
        if entry['checkpoint']['sha256'] != calibration['checkpoint']['sha256']:
            print(f'note: not calibrated: {path}, which another checkpoint scored')
            continue
        if calibration['kind'] not in entry['figures']:
            print(f'note: not calibrated: {path}, which has no {calibration["kind"]} scores')
            continue
        labels, scores, names = read_kind(args.folder, path, entry, calibration['kind'])
        if trial_set(names) == trial_set(fitted):
            print(f'note: not calibrated: {path}, the trials that the calibration was fitted on')
            continue
        note = note_overlap(names, fitted, args.speaker or entry['options'].get('speaker', ''))
        if note:
            print(f'note: the figures of {path} are too good: {note}')
        ratios = calibration['weight'] * scores + calibration['bias']
        figures = tools.operating_points(ratios, labels)
        figures |= calibration_figures(ratios, labels)
        cells = [scoring.format_figure(name, figures) for name in FIGURES]
        rows.append([path, f'{len(labels):,}', *cells])
    if len(rows) > 1:
        print(scoring.table(rows))
    else:
        print('note: there is no other list to try the calibration on')


def trial_set(names):
    """Returns the set of trials [(enrolment, test)] without the order of sides and without ./"""
    files = {name for pair in names for name in pair}
    plain = {name: posixpath.normpath(name.replace('\\', '/')) for name in files}
    return {tuple(sorted((plain[one], plain[other]))) for one, other in names}


def note_overlap(names, fitted, speaker):
    """Describes the trials, or else the speakers, that a list shares with the list of the fit.

    names, fitted: the trials of the two lists [(enrolment, test)]; speaker: the pattern of
    --speaker. Returns '' if they have nothing in common.
    """
    shared = len(trial_set(names) & trial_set(fitted))
    if shared:
        return f'it shares {shared:,} of its {len(names):,} trials with the list of the fit'
    speakers = []
    for trials in (names, fitted):
        files = list(dict.fromkeys(name for trial in trials for name in trial))
        speakers.append(set(speakers_of(files, speaker)))
    both = sorted(speakers[0] & speakers[1])
    if both:
        return (
            f'it shares {len(both):,} of its {len(speakers[0]):,} speakers with the list of the '
            f'fit, for example {both[0]}'
        )
    return ''


# Used by other scripts too: figures of ratios, and the calibration of a folder.


def calibration_figures(ratios, labels):
    """Computes {figure: {'value'}} of natural log-likelihood ratios (N,) with labels (N,), 1 or 0.

    The figures are Cllr in bits (Brümmer and du Preez, 2006), the lowest Cllr of any monotone
    function of the ratios, and the costs at Bayes thresholds, to compare with minDCF.
    """
    # The isotonic fit gives the share of targets at each ratio, so subtract the prior log-odds.
    shares = IsotonicRegression().fit_transform(ratios, labels)
    best = logit(shares) - logit(labels.mean())
    figures = {'Cllr': log_cost(ratios, labels), 'minCllr': log_cost(best, labels)}
    for name, prior in tools.PRIORS.items():
        accepted = ratios > -logit(prior)
        misses = np.mean(~accepted[labels == 1])
        false_alarms = np.mean(accepted[labels == 0])
        cost = misses + false_alarms * (1 / prior - 1)
        figures[name.replace('min', 'act')] = cost
    return {name: {'value': float(value)} for name, value in figures.items()}


def log_cost(ratios, labels):
    """Computes Cllr in bits of natural log-likelihood ratios (N,) with labels (N,), 1 or 0."""
    targets = np.logaddexp(0, -ratios[labels == 1]).mean()
    others = np.logaddexp(0, ratios[labels == 0]).mean()
    return (targets + others) / 2 / np.log(2)


def read_calibration(folder):
    """Reads the calibration.json of a folder; returns None if there is none.

    Raises BadInput if exps.calibrate did not write it.
    """
    path = os.path.join(folder, 'calibration.json')
    if not os.path.exists(path):
        return None
    try:
        with open(path, encoding='utf-8') as file:
            calibration = json.load(file)
        for name in ('kind', 'weight', 'bias', 'threshold', 'list', 'checkpoint', 'options'):
            calibration[name]
    except (ValueError, KeyError, TypeError) as error:
        raise BadInput(f'{path}: not written by exps.calibrate; move it') from error
    return calibration


def cohort_options(kind, options):
    """Returns the options of --eval through which a kind of scores depends on the cohort."""
    if kind == 'raw':
        return {}
    names = ['train_list', 'cohort_utterances', 'seed']
    if 'asnorm' in kind:
        names.append('top_n')
    return {name: options[name] for name in names}


def why_not_for(calibration, checkpoint, scores, args):
    """Returns why a calibration is not for these scores; None if it is."""
    if calibration['checkpoint']['sha256'] != checkpoint['sha256']:
        return f'it was fitted on scores of {calibration["checkpoint"]["path"]}'
    kind = calibration['kind']
    if kind not in scores:
        return f'it is for {kind} scores; give the options of --eval that made them'
    for name, value in cohort_options(kind, calibration['options']).items():
        if getattr(args, name, None) != value:
            return f'it is for scores with --{name} {value}'
    return None


if __name__ == '__main__':
    main()
