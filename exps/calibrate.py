"""Fits what turns a model's scores into log-likelihood ratios, with which `--verify` decides and `--eval` has Cllr.

    python -m exps.calibrate --initial_model MODEL --eval_list lists/trials.txt --eval_path recordings

writes MODEL.calibration.json. Take trials of recordings like those to come, of speakers that were not trained on; the
list whose figures are reported must be another one. Other options are those of trainECAPAModel.py.
"""

import argparse
import json
import shlex
import sys

import numpy as np
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler

import tools
import trainECAPAModel
from dataLoader import check_audio, choose_normalisation, read_trial_lists
from ECAPAModel import cohort_digest, load_model
from tools import BadInput

FEWEST = 30  # trials of either kind, below which a fit says nothing


def main(argv=None):
    """Writes the calibration; exit status 2, with a sentence, where that cannot be done."""
    parser = trainECAPAModel.make_parser()
    parser.prog, parser.description = 'python -m exps.calibrate', 'Fit score to log-likelihood ratio on --eval_list.'
    add = parser.add_argument_group('calibration').add_argument
    add('--kind', help='raw, asnorm, centred or centred asnorm (default: the last of these that the options make)')
    add('--quality', nargs='*', default=[], choices=('duration', 'size', 'cohort'), help='measures used besides: QMF')
    rate = trainECAPAModel.number(float, 1e-3, 99)
    add('--false_acceptances', type=rate, default=1.0, help='percent that the threshold allows')
    parser.set_defaults(eval_list=[])
    command = ['python', '-m', 'exps.calibrate', *(sys.argv[1:] if argv is None else argv)]
    args = parser.parse_args(argv, argparse.Namespace(command=shlex.join(command)))
    with tools.exit_on_bad_input():
        calibrate(args)


def calibrate(args):
    """Writes MODEL.calibration.json of the options, and prints what it is worth on the trials that it was fitted on."""
    if len(args.eval_list) != 1 or not args.initial_model:
        raise BadInput('--initial_model, a checkpoint, and --eval_list, one list of trials to fit on, are needed')
    if 'cohort' in args.quality and args.score_norm != 'asnorm':
        raise BadInput('--quality cohort: the mean score against the cohort comes with --score_norm asnorm')
    system = load_model(args.initial_model, **vars(args))
    paths, (trials,) = read_trial_lists(args.eval_list, args.eval_path, args.enrol_list)
    check_audio(paths, '--eval_list')
    targets = int(trials.labels.sum())
    if min(targets, len(trials.labels) - targets) < FEWEST:
        raise BadInput(f'--eval_list: {trials.path}: {FEWEST} trials of either kind are the fewest that can be fitted')
    files, top_n, subtract_mean = choose_normalisation(**vars(args))
    embedded = map(trials.mean, system.embed_with_quality(paths))
    scores, measures = system.score_pairs(*embedded, trials.pairs, files and system.cohort(files), top_n, subtract_mean)
    kind = args.kind or list(scores)[-1]
    if kind not in scores:
        raise BadInput(f'--kind {kind}: the options make {", ".join(scores)} (--score_norm, --subtract_mean)')

    inputs = tools.calibration_inputs(scores[kind], [measures[name] for name in args.quality], trials.pairs)
    weights, bias = fit(inputs, trials.labels)
    ratios = inputs @ weights + bias
    others = np.sort(ratios[trials.labels == 0])
    allowed = int(len(others) * args.false_acceptances / 100)
    threshold = {'false_acceptances': args.false_acceptances, 'ratio': float(others[len(others) - 1 - allowed])}
    record = {
        **{'checkpoint': system.checkpoint, 'kind': kind, 'quality': args.quality},
        **{'weights': weights.tolist(), 'bias': float(bias), 'threshold': threshold},
        'cohort': cohort_digest(files, top_n) if kind != 'raw' or 'cohort' in args.quality else None,
        'list': {'path': trials.path, 'fingerprint': trials.fingerprint(), 'trials': len(trials.labels)},
        **trainECAPAModel.provenance(args.command),
    }
    figures = tools.operating_points(ratios, trials.labels) | tools.calibration_figures(ratios, trials.labels)
    print(f'fitted on {len(trials.labels):,} trials of {trials.path}, {targets:,} of the same speaker; {kind} scores')
    print(tools.table([list(figures), [f'{figure["value"]:.4f}' for figure in figures.values()]]))
    if allowed < FEWEST:
        print(
            f'note: at {args.false_acceptances:g}% only {allowed} false acceptances were there to find the threshold by'
        )
    path = f'{args.initial_model}.calibration.json'
    tools.write_text(path, json.dumps(record, indent=2) + '\n')
    print(f'written: {path}')


def fit(inputs, labels):
    """Weights and bias of logistic regression of inputs (N, columns), with both kinds of trials of the same weight.

    The logarithm of the odds is then that of the likelihood ratio. Raises BadInput where the fit would be reversed.
    """
    scaler = StandardScaler().fit(inputs)
    # Hardly any regularisation, only so that trials without any error have a finite answer.
    found = LogisticRegression(C=1000.0, class_weight='balanced', max_iter=1000).fit(scaler.transform(inputs), labels)
    weights = found.coef_[0] / scaler.scale_
    if not weights[0] > 0:
        raise BadInput('a higher score means the same speaker less often in these trials: are the labels right?')
    return weights, found.intercept_[0] - weights @ scaler.mean_


if __name__ == '__main__':
    main()
