"""Writes the embeddings of recordings, for your programs.

    python -m exps.embed recordings/ --out embeddings.npz --initial_model MODEL

writes `names` (N,) and unit vectors `embeddings` (N, 192) of all files below a folder, or of those
in a text file with one path per line. Without --initial_model it uses the model in exps/open. The
recordings may have any format, rate and number of channels that soundfile reads; notes say what is
converted. `load_model(MODEL).embed(paths)` does the same in Python.
"""

import argparse
import os

import numpy as np

from dataLoader import AUDIO, ending_of, find_audio, read_list
from ECAPAModel import load_model_of, raise_if_any
from exps.calibrate import read_calibration
from exps.scoring import add_scoring_options
from tools import (
    BadInput,
    HelpFormatter,
    exit_on_bad_input,
    in_range,
    note,
    prepare_new_file,
    read_bytes,
    sha256,
    write_whole,
)

# The model that comes with this repository: scripts use it unless they are given another one.
OPEN = os.path.relpath(os.path.join(os.path.dirname(os.path.abspath(__file__)), 'open'))
OPEN_MODEL = os.path.join(OPEN, 'open.model')


def main(argv=None):
    """Runs the script. Exits with status 2 and a message if the input cannot be used."""
    parser = argparse.ArgumentParser(
        prog='python -m exps.embed',
        description='Write embeddings of recordings.',
        formatter_class=HelpFormatter,
    )
    parser.add_argument(
        'files', help='folder of recordings, a recording, or a list with one path per line'
    )
    parser.add_argument('--out', required=True, help='file to write, .npz')
    add_model_options(parser)
    args = parser.parse_args(argv)
    with exit_on_bad_input():
        embed(args)


def embed(args):
    """Writes args.out with the files that can be used.

    Raises BadInput if it exists, and afterwards if files cannot be used.
    """
    prepare_new_file(args.out, '--out')
    paths = list_files(args.files)
    system, _ = load_chosen_model(args)
    faults = {}
    embeddings = system.embed_files(paths, any_format=True, channel=args.channel, faults=faults)
    usable = [row for row in range(len(paths)) if row not in faults]
    if not usable:
        raise_if_any(list(faults.values()), len(paths))

    names = np.array([paths[row] for row in usable])
    vectors = embeddings[usable, 0]
    write_whole(args.out, lambda file: np.savez(file, names=names, embeddings=vectors))
    print(f'{args.out}: {len(names):,} embeddings of {vectors.shape[1]} numbers')
    # The embeddings of usable files are written; the exit status shows that some are missing.
    raise_if_any(list(faults.values()), len(paths))


def add_model_options(parser):
    """Adds the options of scripts that use a model: those of scoring, and --channel.

    The default of --initial_model is OPEN_MODEL.
    """
    add_scoring_options(parser)
    parser.set_defaults(initial_model=OPEN_MODEL)
    parser.add_argument(
        '--channel',
        type=in_range(int, 1),
        help='channel to use of recordings with several, from 1; without it their mean, or the '
        'strongest channel if they cancel each other',
    )


def load_chosen_model(args):
    """Loads --initial_model as load_model_of does; says so if it is OPEN_MODEL."""
    if args.initial_model == OPEN_MODEL:
        introduce_open_model()
    return load_model_of(args)


def introduce_open_model():
    """Says on standard error that OPEN_MODEL is used, and where its card is.

    Raises BadInput if the file is missing, or is not the one that its calibration.json names.
    """
    remedy = f'it comes with this repository: restore it (git checkout {OPEN}), or name a model'
    calibration = read_calibration(OPEN)
    if calibration is None or not os.path.isfile(OPEN_MODEL):
        raise BadInput(f'{OPEN_MODEL} or its calibration.json is missing; {remedy}')
    if sha256(read_bytes(OPEN_MODEL)) != calibration['checkpoint']['sha256']:
        raise BadInput(f'{OPEN_MODEL} is damaged, or belongs to another calibration.json; {remedy}')
    card = os.path.join(OPEN, 'README.md')
    note(f'the model is {OPEN_MODEL}; {card} says what it can do, and what it cannot do')


def list_files(files):
    """Returns the paths of the recordings below a folder, or in the lines of a text file.

    `files` may also be a single recording.
    """
    if os.path.isdir(files):
        return find_audio(files, 'FILES', any_format=True)
    if not os.path.exists(files):
        raise BadInput(f'FILES: {files}: no such file or folder')
    if ending_of(files) in AUDIO:
        return [files]
    lines = read_list(files, 'FILES').splitlines()
    paths = [os.fsdecode(line.strip()) for line in lines if line.strip()]
    if not paths:
        raise BadInput(f'FILES: {files}: has no line with a path')
    return paths


if __name__ == '__main__':
    main()
