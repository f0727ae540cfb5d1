"""Makes a training list and a trial list from a folder with a folder for each speaker.

python -m exps.lists recordings --out lists --test_speakers 20
"""

import argparse
import collections
import os
import re
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from dataLoader import (
    RATE,
    SHORTEST,
    find_usable,
    open_audio,
    parallel_map,
    read_audio,
    speakers_of,
)
from exps.scoring import add_speaker_option
from tools import (
    BadInput,
    default_n_cpu,
    exit_on_bad_input,
    in_range,
    sha256,
    write_text,
)

MOST_TARGETS = 20000  # trials of the same speaker, unless the list is exhaustive


def main(argv=None):
    """Runs the script. Exits with status 2 and a message if the input cannot be used."""
    parser = argparse.ArgumentParser(
        prog='python -m exps.lists',
        description='Make a training list and a trial list from folders of speakers.',
    )
    add = parser.add_argument
    add('folder', help='folder that has SPEAKER/.../FILE.wav (or .flac)')
    add('--out', required=True, help='folder for train_list.txt, trials.txt and left_out.txt')
    add(
        '--test_speakers',
        type=in_range(int, 0),
        help='speakers held out for the trials: 0, all of them, or a part (default: a tenth)',
    )
    add(
        '--exhaustive',
        action='store_true',
        help='use all pairs as trials (default: as many non-target as target trials)',
    )
    add(
        '--seed',
        type=in_range(int, 0, 2**64 - 1),
        default=10,
        help='seed of the random choices (default: 10)',
    )
    add_speaker_option(add)
    args = parser.parse_args(argv)
    with exit_on_bad_input():
        make_lists(**vars(args))


class Inspection(NamedTuple):
    """The properties of an audio file."""

    fault: str  # why it cannot be used, or ''
    rate: int  # Hz, 0 if it cannot be read
    seconds: float = 0.0
    clipped: bool = False
    content: str = ''  # equal for equal samples


def make_lists(folder, out, test_speakers=None, exhaustive=False, seed=10, speaker=''):
    """Writes train_list.txt and trials.txt in `out` for a folder of speakers; prints a report.

    test_speakers: how many are held out for the trials, a tenth by default; speaker: the pattern of
    --speaker. left_out.txt names copies and files that cannot be used. Raises BadInput if no list
    can be made, or if a list exists.
    """
    for name in ('train_list.txt', 'trials.txt', 'left_out.txt'):
        path = os.path.join(out, name)
        if os.path.exists(path):
            raise BadInput(f'{path} already exists; remove it or choose another --out')

    # Read all files, and sort out those that cannot be used.
    inspections, unread = inspect_folder(folder)
    files, left_out = sort_files(inspections, speaker)
    left_out = {**unread, **left_out}
    if not files:
        name, reason = next(iter(left_out.items()))
        raise BadInput(
            f'FOLDER {folder}: none of its {len(left_out)} files can be used, the first: '
            f'{name}: {reason}'
        )

    # Make the lists.
    rng = np.random.default_rng(seed)
    held_out = choose_speakers(files, test_speakers, rng)
    texts = {}
    if len(held_out) < len(files):
        texts['train_list.txt'] = [
            f'{name_of_speaker} {name}\n'
            for name_of_speaker, own in files.items()
            if name_of_speaker not in held_out
            for name in own
        ]
    if held_out:
        test_files = {name: files[name] for name in held_out}
        texts['trials.txt'] = make_trials(test_files, rng, exhaustive)
    if left_out:
        texts['left_out.txt'] = [f'{one_line(name)}: {why}\n' for name, why in left_out.items()]

    # Write and report.
    os.makedirs(out, exist_ok=True)
    for name, lines in texts.items():
        write_text(os.path.join(out, name), ''.join(lines))
    report_audio(inspections, files, held_out)
    report_files(left_out, texts, out)


def inspect_folder(folder):
    """Reads the audio files below a folder, in several processes.

    Returns ({name: Inspection}, {name: why it is not read}), with names relative to the folder.
    """
    paths, unread = find_usable(folder, 'FOLDER')
    reading = parallel_map(inspect_file, paths, default_n_cpu())
    shown = tqdm(reading, 'reading', len(paths), unit='file', disable=None)
    inspections = {os.path.relpath(path, folder): seen for path, seen in zip(paths, shown)}
    return inspections, {os.path.relpath(path, folder): why for path, why in unread.items()}


def sort_files(inspections, speaker):
    """Sorts {name: Inspection}: ({speaker: names of files}, {name: why it is left out})."""
    left_out = {}
    for name, inspection in inspections.items():
        fault = inspection.fault or fault_of_name(name, speaker)
        if fault:
            left_out[name] = fault

    usable = [name for name in inspections if name not in left_out]
    speaker_of = dict(zip(usable, speakers_of(usable, speaker)))
    left_out |= find_copies(inspections, speaker_of)

    files = {}
    for name in usable:
        if name not in left_out:
            files.setdefault(speaker_of[name], []).append(name)
    return files, left_out


def inspect_file(path):
    """Reads a whole audio file, as evaluation does; returns its Inspection."""
    try:
        audio = read_audio(path, SHORTEST)
    except BadInput as error:
        return Inspection(str(error).removeprefix(f'{path}: '), rate_of(path))
    clipped = bool(np.mean(np.abs(audio) > 0.999) > 0.001)
    return Inspection('', RATE, len(audio) / RATE, clipped, sha256(audio.tobytes()))


def rate_of(path):
    """Reads the sample rate in the header of a file, 0 if that cannot be read."""
    try:
        with open_audio(path) as file:
            return file.samplerate
    except BadInput:
        return 0


def fault_of_name(name, speaker):
    """Returns why a list cannot have this name of a file, relative to the folder; or ''."""
    if len(name.split()) > 1:
        return 'white space in its name, which lists cannot hold; rename it'
    if not speaker:
        return '' if os.sep in name else 'not in the folder of a speaker'
    match = re.search(speaker, name)
    if not match or not match[1]:
        return f'--speaker {speaker} finds no speaker in its name'
    return ''


def find_copies(inspections, speaker_of):
    """Finds files with the same samples; returns {name: why it is left out}.

    inspections: {name: Inspection}; speaker_of: {name: speaker} of the usable files. Of the copies
    under one speaker, one stays. Of copies under several speakers none stays, because it is not
    known whose recording it is.
    """
    groups = {}
    for name in speaker_of:
        groups.setdefault(inspections[name].content, []).append(name)

    copies = {}
    for names in groups.values():
        # The file in the fewest folders is probably the original.
        first, *others = sorted(names, key=lambda name: (name.count(os.sep), name))
        if len({speaker_of[name] for name in names}) == 1:
            copies |= {name: f'a copy of another file: {first}' for name in others}
        else:
            copies[first] = f'the same audio is under another speaker: {others[0]}'
            copies |= {name: f'the same audio is under another speaker: {first}' for name in others}
    return copies


def one_line(name):
    """Returns the name of a file with line breaks escaped."""
    return name.replace('\n', '\\n').replace('\r', '\\r')


def choose_speakers(files, count, rng):
    """Draws `count` speakers (default: a tenth) of those with several files in {speaker: files}.

    Returns their names, sorted. Raises BadInput if there are too few.
    """
    several = [speaker for speaker in files if len(files[speaker]) > 1]
    if count is None:
        count = max(2, len(files) // 10)
    if count == 0:
        return []

    if not 2 <= count <= len(several) or count == len(files) - 1:
        raise BadInput(
            f'--test_speakers {count}: it must be at least 2, and leave at least 2 to train on, or '
            f'none; {len(files)} speakers have usable files, {len(several)} of them more than one '
            f'(--test_speakers 0 makes only train_list.txt)'
        )
    return sorted(rng.choice(several, count, replace=False).tolist())


def make_trials(files, rng, exhaustive):
    """Makes the lines of trials from {speaker: files}: all pairs, or equally many of each kind.

    These are all target pairs (at most 20,000) and the same number of others. Memory is needed only
    for files and lines: all pairs of 100,000 files would take 80 GB.
    """
    names = [name for own in files.values() for name in own]
    lengths = [len(own) for own in files.values()]

    # Pairs are numbered file by file: first those of file 0 with later files, then those of file 1.
    # The later files of the same speaker end where those of other speakers begin.
    index = np.arange(len(names))
    ends = np.repeat(np.cumsum(lengths), lengths)
    targets = (index + 1, ends)
    others = (ends, np.full(len(names), len(names)))

    count_targets = count_pairs(*targets)
    count_others = count_pairs(*others)
    if not exhaustive:
        count_targets = count_others = min(count_targets, count_others, MOST_TARGETS)
    chosen = [
        *((1, *pair) for pair in draw_pairs(*targets, count_targets, rng)),
        *((0, *pair) for pair in draw_pairs(*others, count_others, rng)),
    ]
    chosen.sort(key=lambda trial: trial[1:])
    return [f'{label} {names[a]} {names[b]}\n' for label, a, b in chosen]


def count_pairs(begins, ends):
    """Counts the pairs of each file i and the files begins[i] to ends[i] - 1."""
    return int((ends - begins).sum())


def draw_pairs(begins, ends, count, rng):
    """Draws `count` different pairs [i, j], where j is from begins[i] to ends[i] - 1."""
    totals = np.cumsum(ends - begins)
    numbers = rng.choice(int(totals[-1]), count, replace=False, shuffle=False)
    first = np.searchsorted(totals, numbers, side='right')
    second = ends[first] - (totals[first] - numbers)
    return np.stack([first, second], axis=1).tolist()


def report_audio(inspections, files, held_out):
    """Prints hours, lengths, rates and clipping; files: {speaker: names} in the lists."""
    used = [inspections[name] for own in files.values() for name in own]
    seconds = np.array([audio.seconds for audio in used])
    quantiles = np.quantile(seconds, [0, 0.05, 0.5, 0.95, 1])
    lengths = ', '.join(f'{quantile:.1f}' for quantile in quantiles)
    rates = collections.Counter(audio.rate for audio in inspections.values() if audio.rate)
    of_rates = ', '.join(f'{rate} Hz: {count:,} files' for rate, count in rates.most_common())
    clipped = sum(audio.clipped for audio in used)
    hours = seconds.sum() / 3600
    print(f'usable       {len(used):,} utterances of {len(files):,} speakers, {hours:.1f} hours')
    print(f'length       {lengths} s (shortest, 5 %, median, 95 %, longest)')
    print(f'rates        {of_rates}')
    print(f'clipped      {clipped:,} files (used nevertheless)')
    print(f'held out     {len(held_out):,} speakers: {" ".join(held_out[:20])}')


def report_files(left_out, texts, out):
    """Prints how many files were left out ({name: reason}), and which lists were written."""
    reasons = collections.Counter(reason.split(': ')[0] for reason in left_out.values())
    for reason, count in reasons.most_common(20):
        print(f'left out     {count:,} files: {reason}')

    for name, lines in texts.items():
        print(f'written      {os.path.join(out, name)}, {len(lines):,} lines')
    if 'trials.txt' not in texts:
        print('not written  trials.txt: no speaker was held out')
    if 'train_list.txt' not in texts:
        print('not written  train_list.txt: all speakers were held out')


if __name__ == '__main__':
    main()
