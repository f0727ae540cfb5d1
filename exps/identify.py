"""Names the enrolled person, or nobody, for each recording.

    python -m exps.identify recordings/ --people people --initial_model MODEL --out who.csv

Without --initial_model it uses the model in exps/open. People are folders, people/NAME/*.wav, or a
list with lines `name recording...`. With the calibration.json of the experiment (exps.calibrate),
the probability of person k is proportional to pi / K * LR_k, and the probability of nobody to
1 - pi; pi is the prior that the speaker is enrolled (--p_enrolled). Without a calibration the
script gives only scores, which decide nothing. The recordings may have any format that soundfile
reads.
"""

import argparse
import csv
import io
import os
import sys

import numpy as np
from scipy.special import softmax

from dataLoader import find_audio, model_fault, read_list, split_lines, subfolders
from ECAPAModel import raise_if_any
from exps.embed import add_model_options, list_files, load_chosen_model
from exps.scoring import choose_normalisation, load_cohort, score_kinds
from exps.verify import find_calibration
from tools import (
    BadInput,
    HelpFormatter,
    exit_on_bad_input,
    in_range,
    prepare_new_file,
    read_bytes,
    sha256,
    write_text,
)

NOBODY = 'nobody'
PAIRS = 1000000  # of a recording and a person, scored at a time


def main(argv=None):
    """Runs the script. Exits with status 2 and a message if the input cannot be used."""
    parser = argparse.ArgumentParser(
        prog='python -m exps.identify',
        description='Name the people in recordings.',
        formatter_class=HelpFormatter,
    )
    add = parser.add_argument
    add('files', help='folder of recordings, or a list with one path per line')
    add('--people', required=True, help='folder of NAME/*.wav, or lines `name recording...`')
    add('--out', help='CSV to write; without it the rows are printed')
    add(
        '--p_enrolled',
        type=in_range(float, 1e-6, 1 - 1e-6),
        default=0.5,
        help='prior probability that the speaker is one of the people',
    )
    add('--save_path', help="folder of calibration.json (default: the model's)")
    add_model_options(parser)
    args = parser.parse_args(argv)
    with exit_on_bad_input():
        identify(args)


def identify(args):
    """Prints or writes a line for each recording: file, name, probability, second, score.

    Raises BadInput afterwards if recordings cannot be used.
    """
    if args.out:
        prepare_new_file(args.out, '--out')
    people = read_people(args.people)
    files = list_files(args.files)
    system, checkpoint = load_chosen_model(args)
    normalisation = choose_normalisation(args)
    cohort = load_cohort(system, checkpoint, normalisation[0])
    models, tests, usable, faults = embed_people(system, people, files, args.channel)
    scores = score_people(models, tests, cohort, *normalisation[1:])
    _, calibration, fault = find_calibration(args, checkpoint, scores)
    if fault:
        print(f'note: only raw scores, which decide nothing: {fault}', file=sys.stderr)

    kind = calibration['kind'] if calibration else 'raw'
    write_csv(args, usable, list(people), scores[kind], calibration)
    # The results of usable recordings are written; the exit status shows that some are missing.
    raise_if_any(faults, len(files) + sum(map(len, people.values())))


def write_csv(args, files, names, scores, calibration):
    """Prints or writes the rows of files with scores (files, names)."""
    text = io.StringIO()
    rows = csv.writer(text, lineterminator='\n')
    rows.writerow(['file', 'name', 'probability', 'second', 'score'])
    for file, row in zip(files, scores):
        rows.writerow([file, *decide(names, row, calibration, args.p_enrolled)])
    if args.out:
        write_text(args.out, text.getvalue())
        print(f'{args.out}: {len(files):,} recordings, {len(names):,} people')
    else:
        print(text.getvalue(), end='', flush=True)


def embed_people(system, people, files, channel):
    """Embeds people, each as the mean of the recordings that can be used, and files.

    Returns (models (people, 2, D), tests (usable files, 2, D), usable files, messages about the
    recordings that cannot be used). Raises BadInput if a person has no recording that can be
    used, or if no file can be used.
    """
    recordings = [recording for own in people.values() for recording in own]
    faults = {}
    embeddings = system.embed_files(
        [*recordings, *files], any_format=True, channel=channel, faults=faults
    )
    models = []
    start = 0
    for name, own in people.items():
        rows = [row for row in range(start, start + len(own)) if row not in faults]
        if not rows:
            lines = [faults[row] for row in range(start, start + len(own))]
            raise BadInput(
                '\n'.join([f'--people: {name} has no recording that can be used:', *lines])
            )
        models.append(embeddings[rows].mean(axis=0))
        start += len(own)

    rows = [row for row in range(start, start + len(files)) if row not in faults]
    if not rows:
        raise_if_any(list(faults.values()), start + len(files))
    usable = [files[row - start] for row in rows]
    return np.stack(models), embeddings[rows], usable, list(faults.values())


def score_people(models, tests, cohort, top_n, subtract_mean):
    """Scores recordings, (N, 2, D), against people; returns {kind: scores (N, people)}."""
    # In blocks: all pairs of many recordings and many people would fill the memory.
    blocks = []
    for block in np.array_split(tests, 1 + len(tests) * len(models) // PAIRS):
        pairs = np.empty((len(block), len(models), 2), np.int32)
        pairs[..., 0] = np.arange(len(models))
        pairs[..., 1] = len(models) + np.arange(len(block))[:, None]
        vectors = np.concatenate([models, block])
        blocks.append(score_kinds(vectors, pairs.reshape(-1, 2), cohort, top_n, subtract_mean))
    return {
        kind: np.concatenate([scores[kind] for scores in blocks]).reshape(len(tests), -1)
        for kind in blocks[0]
    }


def decide(names, scores, calibration, p_enrolled):
    """Decides whose recording it is, by its scores (K,) against K people.

    Returns (name, probability, second best name, score). Without a calibration the probability is
    '', and the name is always that of a person.
    """
    score = f'{scores.max():.4f}'
    if not calibration:
        ranked = [names[k] for k in np.argsort(-scores)] + ['']
        return ranked[0], '', ranked[1], score
    ratios = calibration['weight'] * scores + calibration['bias']
    logits = np.append(np.log(p_enrolled / len(names)) + ratios, np.log(1 - p_enrolled))
    posterior = softmax(logits)
    labels = [*names, NOBODY]
    best, second = np.argsort(-posterior)[:2]
    return labels[best], f'{posterior[best]:.4f}', labels[second], score


def read_people(path):
    """Reads {name: recordings} from a folder of folders, or from a list.

    Raises BadInput for a recording outside of folders, a person without recordings or called
    'nobody', and a recording that two people share.
    """
    if not os.path.exists(path):
        raise BadInput(f'--people: {path}: no such file or folder')
    people = {}
    if os.path.isdir(path):
        people = {name: [] for name in subfolders(path, '--people')}
        for recording in find_audio(path, '--people', any_format=True):
            name, *rest = os.path.relpath(recording, path).split(os.sep)
            if not rest:
                raise BadInput(f'--people {path}: {name} is in no folder of a person')
            people[name].append(recording)
        for name, recordings in people.items():
            if not recordings:
                raise BadInput(f'--people {path}: no recording below {name} can be used')
    else:
        lines = split_lines(read_list(path, '--people'), path, '--people', model_fault)
        for name, *recordings in lines:
            paths = [os.fsdecode(recording) for recording in recordings]
            people.setdefault(os.fsdecode(name), []).extend(paths)
    if not people:
        raise BadInput(f'--people {path}: has no folder of a person')
    if NOBODY in people:
        raise BadInput(f'--people {path}: a person cannot be called {NOBODY}')
    refuse_shared(people)
    return people


def refuse_shared(people):
    """Raises BadInput if two people have a recording with the same bytes."""
    owners = {}
    for name, recordings in people.items():
        for recording in recordings:
            if not os.path.isfile(recording):
                continue  # the reader of audio will report it; opening a pipe would wait
            content = sha256(read_bytes(recording))
            owner, other = owners.setdefault(content, (name, recording))
            if owner != name:
                both = f'{recording}, {other}'
                raise BadInput(f'--people: {name} and {owner} share a recording: {both}')


if __name__ == '__main__':
    main()
