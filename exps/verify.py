"""Decides whether two recordings are of the same speaker.

    python -m exps.verify one.wav other.wav --initial_model exps/exp1/model/model_0080.model

prints their score. Without --initial_model it uses the model in exps/open. It decides with the
calibration.json of the experiment, which exps.calibrate wrote. If there is none for this
checkpoint, it uses the thresholds at the EER of the lists that --eval scored. Give the options that
were used then (--score_norm and so on). The recordings may have any format, rate and number of
channels that soundfile reads; notes say what is converted.
"""

import argparse
import math
import os

import numpy as np
from scipy.special import expit, logit

from exps.calibrate import read_calibration, why_not_for
from exps.embed import add_model_options, load_chosen_model
from exps.scoring import (
    choose_normalisation,
    load_cohort,
    read_results,
    score_kinds,
)
from tools import BadInput, HelpFormatter, exit_on_bad_input, in_range

DECISIONS = {True: 'the same speaker', False: 'different speakers'}


def main(argv=None):
    """Runs the script. Exits with status 2 and a message if the input cannot be used."""
    parser = argparse.ArgumentParser(
        prog='python -m exps.verify',
        description='Score two recordings, and decide.',
        formatter_class=HelpFormatter,
    )
    add = parser.add_argument
    add('recordings', nargs=2, metavar='WAV', help='two recordings')
    add(
        '--p_target',
        type=in_range(float, 1e-6, 1 - 1e-6),
        default=0.5,
        help='prior probability that the speaker is the same',
    )
    add('--c_miss', type=in_range(float, 1e-6), default=1.0, help='cost of a miss')
    add('--c_fa', type=in_range(float, 1e-6), default=1.0, help='cost of a false acceptance')
    add('--save_path', help="folder of calibration.json and results.json (default: the model's)")
    add_model_options(parser)
    args = parser.parse_args(argv)
    with exit_on_bad_input():
        verify(args)


def verify(args):
    """Prints the scores of two recordings, and the decision by a calibration or a threshold."""
    # Compute the scores.
    system, checkpoint = load_chosen_model(args)
    cohort_files, top_n, subtract_mean = choose_normalisation(args)
    embeddings = system.embed_files(args.recordings, any_format=True, channel=args.channel)
    cohort = load_cohort(system, checkpoint, cohort_files)
    scores = score_kinds(embeddings, np.array([[0, 1]]), cohort, top_n, subtract_mean)
    for kind, (score,) in scores.items():
        print(f'{kind} score {score:.4f}'.removeprefix('raw '))

    # Decide.
    folder, calibration, fault = find_calibration(args, checkpoint, scores)
    if calibration:
        decide(calibration, scores[calibration['kind']][0], args)
        return
    print(f'note: {fault}')
    decide_by_threshold(folder, checkpoint, scores['raw'][0])


def find_calibration(args, checkpoint, scores):
    """Finds the calibration for scores of --initial_model, in --save_path or the model's run.

    Returns (folder, calibration, ''), or (folder, None, why there is none for these scores).
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
        return folder, None, f'{folder}/calibration.json cannot be used: {fault}'
    return folder, calibration, ''


def decide(calibration, score, args):
    """Prints likelihood ratio and probability, and decides by costs and by false acceptances."""
    ratio = calibration['weight'] * score + calibration['bias']
    fitted_on = calibration['list']
    print(
        f'log-likelihood ratio {ratio:.2f} (natural), fitted on {fitted_on["trials"]:,} trials of '
        f'{fitted_on["path"]}'
    )
    after = expit(ratio + logit(args.p_target))
    print(f'probability of the same speaker {after:.4f}, before the comparison {args.p_target}')

    same = bool(ratio > math.log(args.c_fa / args.c_miss) - logit(args.p_target))
    print(
        f'{DECISIONS[same]}, if a miss costs {args.c_miss:g} and a false acceptance {args.c_fa:g}'
    )
    threshold = calibration['threshold']
    same = bool(ratio > threshold['ratio'])
    allowed = threshold['false_acceptances']
    print(f'{DECISIONS[same]}, if {allowed:g}% false acceptances are allowed')


def decide_by_threshold(folder, checkpoint, score):
    """Decides by the EER threshold of each list that the checkpoint was scored on; prints it."""
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
                f'{threshold:.4f}; other recordings need another threshold'
            )
            decided = True
    if not decided:
        print('no threshold is known; find one by --eval on trials of recordings like these')


if __name__ == '__main__':
    main()
