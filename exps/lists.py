"""Makes a training list and a trial list for your own speakers.

Reads a folder with a folder per speaker:

python -m exps.lists recordings --out lists --test_speakers 20
"""

import argparse
import collections
import os
from typing import NamedTuple

import numpy as np
import soundfile
from tqdm import tqdm

from dataLoader import RATE, find_audio, parallel_map
from tools import BadInput, default_n_cpu, exit_on_bad_input, write_text


def main(argv=None):
    """Makes the lists; exit status 2, with a sentence, where that cannot be done."""
    parser = argparse.ArgumentParser(
        prog='python -m exps.lists',
        description=(
            'Make a training list and a trial list from a folder with a folder per speaker.'
        ),
    )
    parser.add_argument('folder', help='holds SPEAKER/.../FILE.wav (or .flac)')
    parser.add_argument(
        '--out', required=True, help='folder for train_list.txt, trials.txt and left_out.txt'
    )
    parser.add_argument(
        '--test_speakers', type=int, help='speakers held out for the trials (default: a tenth)'
    )
    parser.add_argument(
        '--exhaustive', action='store_true', help='all trials, not as many of either kind'
    )
    parser.add_argument('--seed', type=int, default=10, help='seed of the choice (default: 10)')
    with exit_on_bad_input():
        make_lists(**vars(parser.parse_args(argv)))


class Inspection(NamedTuple):
    """What an audio file is like."""

    seconds: float
    rate: int  # Hz, 0 if it cannot be read
    fault: str  # why it cannot be used, or ''
    clipped: bool


def make_lists(folder, out, test_speakers=None, exhaustive=False, seed=10):
    """Writes train_list.txt and trials.txt in `out` for a folder with a folder per speaker.

    Prints a report. test_speakers: how many are held out for the trials, a tenth by default. Files
    that cannot be used are left out and named, in left_out.txt. Raises BadInput where no list can
    be made, or a list is there already.
    """
    for name in ('train_list.txt', 'trials.txt', 'left_out.txt'):
        path = os.path.join(out, name)
        if os.path.exists(path):
            raise BadInput(f'{path} is there already; remove it or choose another --out')

    paths = find_audio(folder, 'FOLDER')
    reading = parallel_map(inspect_file, paths, default_n_cpu())
    inspections = list(tqdm(reading, 'reading', len(paths), unit='file', disable=None))

    files = {}
    left_out = []
    for path, inspection in zip(paths, inspections):
        name = os.path.relpath(path, folder)
        fault = inspection.fault or fault_of_name(name)
        if fault:
            left_out.append(f'{name}: {fault}\n')
        else:
            speaker = name.split(os.sep)[0]
            files.setdefault(speaker, []).append(name)

    rng = np.random.default_rng(seed)
    held_out = choose_speakers(files, test_speakers, rng)
    if not files:
        first = left_out[0].strip()
        raise BadInput(f'{folder}: none of its {len(paths)} files can be used, the first: {first}')

    train = [speaker for speaker in files if speaker not in held_out]
    texts = {
        'train_list.txt': [f'{speaker} {name}\n' for speaker in train for name in files[speaker]]
    }
    if held_out:
        test_files = {speaker: files[speaker] for speaker in held_out}
        texts['trials.txt'] = make_trials(test_files, rng, exhaustive)
    if left_out:
        texts['left_out.txt'] = left_out

    os.makedirs(out, exist_ok=True)
    for name, lines in texts.items():
        write_text(os.path.join(out, name), ''.join(lines))
    report(inspections, files, held_out, texts, out)


def inspect_file(path):
    """Reads an audio file whole; returns an Inspection of it."""
    try:
        audio, rate = soundfile.read(os.fsencode(path), dtype='float32', always_2d=True)
    except soundfile.LibsndfileError as error:
        return Inspection(0.0, 0, f'unreadable ({error.error_string})', False)

    samples, channels = audio.shape
    peak = np.abs(audio).max(initial=0)
    fault = ''
    if rate != RATE or channels != 1:
        fault = f'{rate} Hz, {channels} channels; ffmpeg -i IN -ar 16000 -ac 1 OUT.wav converts it'
    elif samples < 400:
        fault = f'{samples} samples, less than a frame'
    elif np.isnan(peak):
        fault = 'not a number'
    elif peak <= 1e-4:
        fault = 'silent'
    clipped = bool(np.mean(np.abs(audio) > 0.999) > 0.001)
    return Inspection(samples / rate, rate, fault, clipped)


def fault_of_name(name):
    """Why a file of this name, relative to the folder, cannot be in a list; or ''."""
    if os.sep not in name:
        return 'not in the folder of a speaker'
    if len(name.split()) > 1:
        return 'white space in its name, which lists cannot hold'
    return ''


def choose_speakers(files, count, rng):
    """Draws `count` speakers, a tenth by default, of those with several files in {speaker: files}.

    Returns their names, sorted. Raises BadInput if there are too few.
    """
    several = [speaker for speaker in files if len(files[speaker]) > 1]
    if count is None:
        count = max(2, len(files) // 10)
    if count == 0:
        return []

    if not 2 <= count <= min(len(several), len(files) - 2):
        raise BadInput(
            f'--test_speakers {count}: there must be 2 at least, and as many left to train on; '
            f'{len(files)} speakers have usable files, {len(several)} of them more than one '
            f'(--test_speakers 0: train_list.txt alone)'
        )
    return sorted(rng.choice(several, count, replace=False).tolist())


def make_trials(files, rng, exhaustive):
    """Trial lines from {speaker: files}: all pairs, or as many of either kind.

    As many: all target pairs (20,000 at most) and the same number of others.
    """
    names = [name for speaker in files for name in files[speaker]]
    lengths = [len(files[speaker]) for speaker in files]
    speakers = np.repeat(np.arange(len(files)), lengths)
    first, second = np.triu_indices(len(names), k=1)
    target = speakers[first] == speakers[second]

    if not exhaustive:
        targets = np.flatnonzero(target)
        others = np.flatnonzero(~target)
        count = min(len(targets), len(others), 20000)
        some_targets = rng.choice(targets, count, replace=False)
        some_others = rng.choice(others, count, replace=False)
        chosen = np.sort(np.concatenate([some_targets, some_others]))
        first = first[chosen]
        second = second[chosen]
        target = target[chosen]

    return [f'{int(t)} {names[a]} {names[b]}\n' for t, a, b in zip(target, first, second)]


def report(inspections, files, held_out, texts, out):
    """Prints what make_lists read and wrote."""
    utterances = sum(len(names) for names in files.values())
    seconds = np.array([audio.seconds for audio in inspections if not audio.fault])
    quantiles = np.quantile(seconds, [0, 0.05, 0.5, 0.95, 1])
    lengths = ', '.join(f'{quantile:.1f}' for quantile in quantiles)
    rates = collections.Counter(audio.rate for audio in inspections if audio.rate)
    of_rates = ', '.join(f'{rate} Hz: {count:,} files' for rate, count in rates.most_common())
    clipped = sum(audio.clipped for audio in inspections)
    hours = seconds.sum() / 3600
    print(f'usable       {utterances:,} utterances of {len(files):,} speakers, {hours:.1f} hours')
    print(f'length       {lengths} s (shortest, 5 %, median, 95 %, longest)')
    print(f'rates        {of_rates}')
    print(f'clipped      {clipped:,} files (used all the same)')
    print(f'held out     {len(held_out):,} speakers: {" ".join(held_out[:20])}')

    left_out = texts.get('left_out.txt', [])
    faults = collections.Counter(line.split(': ', 1)[1].strip() for line in left_out)
    for fault, count in faults.most_common(20):
        print(f'left out     {count:,} files: {fault}')

    for name, lines in texts.items():
        print(f'written      {os.path.join(out, name)}, {len(lines):,} lines')
    if 'trials.txt' not in texts:
        print('not written  trials.txt: no speaker was held out')


if __name__ == '__main__':
    main()
