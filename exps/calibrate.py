"""Fits what turns scores into log-likelihood ratios, on scores that --eval wrote.

    python trainECAPAModel.py --eval --eval_list dev.txt test.txt --save_path exps/exp1 ...
    python -m exps.calibrate exps/exp1 --fit dev

fits two numbers to exps/exp1/scores/dev.txt, writes exps/exp1/calibration.json, by which
exps.verify decides, and prints what the ratios of the folder's other lists are worth. Take trials
of recordings like those to come, of speakers that were not trained on.
"""

import argparse
import json
import os

import numpy as np
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler

import tools
from tools import BadInput

FEWEST = 30  # trials of either kind, below which a fit says nothing
FIGURES = (*tools.FIGURES, 'Cllr', 'minCllr', 'actDCF(0.01)', 'actDCF(0.05)')


def main(argv=None):
    """Writes the calibration; exit status 2, with a sentence, where that cannot be done."""
    parser = argparse.ArgumentParser(
        prog='python -m exps.calibrate',
        description='Fit log-likelihood ratios to scores of --eval.',
    )
    add = parser.add_argument
    add('folder', help='holds results.json and scores/, which --eval wrote')
    add('--fit', required=True, metavar='LIST', help='the list to fit on, by its path or its name')
    add('--kind', help='raw, asnorm, centred or centred asnorm (default: the last that is there)')
    add(
        '--false_acceptances',
        type=tools.number(float, 1e-3, 99),
        default=1.0,
        help='percent that the threshold allows (default: 1)',
    )
    args = parser.parse_args(argv)
    args.command = tools.command_of('-m exps.calibrate', argv)
    with tools.exit_on_bad_input():
        calibrate(args)


def calibrate(args):
    """Writes FOLDER/calibration.json, and prints the figures of the other lists."""
    lists = tools.read_results(args.folder)
    fit_list = find_list(lists, args.fit, args.folder)
    entry = lists[fit_list]
    kind = args.kind or list(entry['figures'])[-1]
    labels, scores, pairs = read_kind(args.folder, fit_list, entry, kind)
    targets = int(labels.sum())
    if min(targets, len(labels) - targets) < FEWEST:
        raise BadInput(
            f'--fit: {fit_list}: {FEWEST} trials of either kind are the fewest that can be fitted'
        )
    weight, bias = fit(scores, labels)
    ratio, allowed = threshold(weight * scores + bias, labels, args.false_acceptances)
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
    print(f'{path}: fitted on {len(labels):,} {kind} scores of {fit_list}, {targets:,} of targets')
    if allowed < FEWEST:
        print(
            f'note: at {args.false_acceptances:g}% only {allowed} false acceptances were there to '
            'find the threshold by'
        )
    del lists[fit_list]
    print_others(lists, calibration, set(pairs), args.folder)


def find_list(lists, name, folder):
    """The list that `name` stands for: a path in results.json, or its last part without ending."""
    if name in lists:
        return name
    named = [path for path in lists if os.path.splitext(os.path.basename(path))[0] == name]
    if len(named) == 1:
        return named[0]
    known = ', '.join(lists) or 'none; --eval writes it'
    raise BadInput(f'--fit {name}: is not one of the lists in {folder}/results.json ({known})')


def read_kind(folder, path, entry, kind):
    """(Labels (N,), scores (N,) of a kind, names of each trial) of a list's entry."""
    kinds = list(entry['figures'])
    if kind not in kinds:
        raise BadInput(f'--kind {kind}: {path} was scored as {", ".join(kinds)}')
    # The folder may have been moved since.
    file = os.path.join(folder, 'scores', os.path.basename(entry['scores']))
    labels, scores, pairs = tools.read_trial_scores(file)
    if scores.shape != (entry['trials'], len(kinds)):
        raise BadInput(f'{file}: other trials or kinds than results.json names; score it again')
    return labels, scores[:, kinds.index(kind)], pairs


def fit(scores, labels):
    """Weight and bias of logistic regression of scores (N,).

    Both kinds of trials have the same weight in all, so the logarithm of the odds is that of the
    likelihood ratio. Raises BadInput where the fit would be reversed.
    """
    scaler = StandardScaler().fit(scores[:, None])
    # Hardly any regularisation, only so that trials without any error have a finite answer.
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
    """(Ratio above which `percent` of the other speakers' trials lie, how many these are)."""
    others = np.sort(ratios[labels == 0])
    allowed = int(len(others) * percent / 100)
    return float(others[len(others) - 1 - allowed]), allowed


def print_others(lists, calibration, fitted, folder):
    """Prints the figures of lists by a calibration that was fitted on other trials.

    fitted: the trials that it was fitted on, whose figures would be too good.
    """
    rows = [['list', 'trials', *FIGURES]]
    for path, entry in lists.items():
        if entry['checkpoint']['sha256'] != calibration['checkpoint']['sha256']:
            print(f'note: not calibrated: {path}, which another checkpoint scored')
            continue
        if calibration['kind'] not in entry['figures']:
            print(f'note: not calibrated: {path}, which has no {calibration["kind"]} scores')
            continue
        labels, scores, pairs = read_kind(folder, path, entry, calibration['kind'])
        if set(pairs) == fitted:
            print(f'note: not calibrated: {path}, the trials that the calibration was fitted on')
            continue
        ratios = calibration['weight'] * scores + calibration['bias']
        figures = tools.operating_points(ratios, labels)
        figures |= tools.calibration_figures(ratios, labels)
        cells = [tools.format_figure(name, figures) for name in FIGURES]
        rows.append([path, f'{len(labels):,}', *cells])
    if len(rows) > 1:
        print(tools.table(rows))
    else:
        print('note: no other list is there to show what the ratios are worth')


if __name__ == '__main__':
    main()
