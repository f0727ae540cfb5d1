"""Says whether two recordings are of the same speaker.

    python -m exps.verify one.wav other.wav --initial_model exps/exp1/model/model_0080.model

prints their score, and decides by the calibration.json of the experiment, which exps.calibrate
wrote; where there is none for this checkpoint, by the thresholds at the EER of the lists that
--eval scored it on. Give the options with which these were scored (--score_norm and so on). Any
format, rate and number of channels that soundfile reads will do; what is converted is said.
"""

import argparse
import math
import os

import numpy as np
from scipy.special import expit, logit

from ECAPAModel import load_model_of
from exps.calibrate import read_calibration, why_not_for
from exps.embed import add_channel_option
from exps.scoring import (
    add_scoring_options,
    choose_normalisation,
    load_cohort,
    read_results,
    score_kinds,
)
from tools import BadInput, exit_on_bad_input, in_range

DECISIONS = {True: 'the same speaker', False: 'different speakers'}


def main(argv=None):
    """Prints score and decision; exit status 2, with a sentence, where there can be none."""
    parser = argparse.ArgumentParser(
        prog='python -m exps.verify',
        description='Score two recordings, and decide.',
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add('recordings', nargs=2, metavar='WAV', help='two recordings')
    add('--p_target', type=in_range(float, 1e-6, 1 - 1e-6), default=0.5, help='prior: same speaker')
    add('--c_miss', type=in_range(float, 1e-6), default=1.0, help='cost of rejecting the same one')
    add('--c_fa', type=in_range(float, 1e-6), default=1.0, help='cost of accepting another one')
    add('--save_path', help='folder of results.json and calibration.json; default: the run of it')
    add_channel_option(parser)
    add_scoring_options(parser)
    args = parser.parse_args(argv)
    with exit_on_bad_input():
        verify(args)


def verify(args):
    """Prints the scores of two recordings, and the decision by a calibration or a threshold."""
    system, checkpoint = load_model_of(args)
    cohort_files, top_n, subtract_mean = choose_normalisation(args)
    embeddings = system.embed_files(args.recordings, any_format=True, channel=args.channel)
    cohort = load_cohort(system, checkpoint, cohort_files)
    scores = score_kinds(embeddings, np.array([[0, 1]]), cohort, top_n, subtract_mean)
    for kind, (score,) in scores.items():
        print(f'{kind} score {score:.4f}'.removeprefix('raw '))

    folder, calibration, fault = find_calibration(args, checkpoint, scores)
    if calibration:
        decide(calibration, scores[calibration['kind']][0], args)
        return
    print(f'note: {fault}')
    decide_by_threshold(folder, checkpoint, scores['raw'][0])


def find_calibration(args, checkpoint, scores):
    """(Folder of the run of --initial_model, its calibration, '' or why that is not for scores).

    The folder is --save_path, or else the one that holds score.txt and results.json.
    """
    folder = args.save_path
    if not folder:
        folder = os.path.dirname(os.path.abspath(args.initial_model))
        if os.path.basename(folder) == 'model':
            folder = os.path.dirname(folder)
    calibration = read_calibration(folder)
    if not calibration:
        return folder, None, f'there is no calibration.json in {folder}; exps.calibrate writes it'
    fault = why_not_for(calibration, checkpoint, scores, args)
    if fault:
        return folder, None, f'{folder}/calibration.json does not count: {fault}'
    return folder, calibration, ''


def decide(calibration, score, args):
    """Prints likelihood ratio, probability, and the decisions by costs and by false acceptances."""
    ratio = calibration['weight'] * score + calibration['bias']
    fitted_on = calibration['list']
    print(
        f'log-likelihood ratio {ratio:.2f} (natural), fitted on {fitted_on["trials"]:,} trials of '
        f'{fitted_on["path"]}'
    )
    after = expit(ratio + logit(args.p_target))
    print(f'probability of the same speaker {after:.4f}, {args.p_target} before')

    same = bool(ratio > math.log(args.c_fa / args.c_miss) - logit(args.p_target))
    print(
        f'{DECISIONS[same]}, as a miss costs {args.c_miss:g} and a false acceptance {args.c_fa:g}'
    )
    threshold = calibration['threshold']
    same = bool(ratio > threshold['ratio'])
    allowed = threshold['false_acceptances']
    print(f'{DECISIONS[same]}, if {allowed:g}% false acceptances are allowed')


def decide_by_threshold(folder, checkpoint, score):
    """Prints the decisions at the EER thresholds of the lists that the checkpoint was scored on."""
    try:
        lists = read_results(folder)
    except BadInput as error:
        print(f'note: {error}')
        lists = {}
    decided = False
    for path, entry in lists.items():
        if entry['checkpoint']['sha256'] == checkpoint['sha256']:
            threshold = entry['figures']['raw']['EER']['threshold']
            print(
                f'{DECISIONS[bool(score > threshold)]}, at the EER threshold of {path}, '
                f'{threshold:.4f}; other recordings have another one'
            )
            decided = True
    if not decided:
        print('no threshold is known: --eval on trials of recordings like these finds one')


if __name__ == '__main__':
    main()
