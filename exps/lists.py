"""Makes a training list and a trial list for your own speakers, from a folder with a folder per speaker.

python -m exps.lists recordings --out lists --test_speakers 20
"""

import argparse
import collections
import multiprocessing
import os

import numpy as np
import soundfile
from tqdm import tqdm

from dataLoader import RATE, find_audio
from tools import BadInput, exit_on_bad_input, write_text


def main(argv=None):
    """Makes the lists; exit status 2, with a sentence, where that cannot be done."""
    parser = argparse.ArgumentParser(
        prog='python -m exps.lists',
        description='Make a training list and a trial list from a folder with a folder per speaker.',
    )
    parser.add_argument('folder', help='holds SPEAKER/.../FILE.wav (or .flac)')
    parser.add_argument('--out', required=True, help='folder for train_list.txt, trials.txt and left_out.txt')
    parser.add_argument('--test_speakers', type=int, help='speakers held out for the trials (default: a tenth)')
    parser.add_argument('--exhaustive', action='store_true', help='all trials, not as many of either kind')
    parser.add_argument('--seed', type=int, default=10, help='seed of the choice (default: 10)')
    with exit_on_bad_input():
        make_lists(**vars(parser.parse_args(argv)))


def make_lists(folder, out, test_speakers=None, exhaustive=False, seed=10):
    """Writes train_list.txt and trials.txt in `out` for a folder with a folder per speaker; prints a report.

    test_speakers: how many are held out for the trials, a tenth by default. Files that cannot be used are left out and
    named, in left_out.txt. Raises BadInput where no list can be made, or a list is there already.
    """
    lists = {name: os.path.join(out, name) for name in ('train_list.txt', 'trials.txt', 'left_out.txt')}
    for path in lists.values():
        if os.path.exists(path):
            raise BadInput(f'{path} is there already; remove it or choose another --out')
    paths = find_audio(folder, 'FOLDER')
    with multiprocessing.Pool() as pool:
        found = list(tqdm(pool.imap(inspect_file, paths, 16), 'reading', len(paths), unit='file', disable=None))
    files, left_out = {}, []
    for path, (_, _, fault, _) in zip(paths, found):
        name = os.path.relpath(path, folder)
        fault = fault or ('not in the folder of a speaker' if os.sep not in name else '')
        fault = fault or ('white space in its name, which lists cannot hold' if len(name.split()) > 1 else '')
        if fault:
            left_out.append(f'{name}: {fault}\n')
        else:
            files.setdefault(name.split(os.sep)[0], []).append(name)
    rng = np.random.default_rng(seed)
    several = [speaker for speaker in files if len(files[speaker]) > 1]
    count = max(2, len(files) // 10) if test_speakers is None else test_speakers
    if count and not 2 <= count <= min(len(several), len(files) - 2):
        raise BadInput(
            f'--test_speakers {count}: there must be 2 at least, and as many left to train on; {len(files)} speakers '
            f'have usable files, {len(several)} of them more than one (--test_speakers 0: train_list.txt alone)'
        )
    if not files:
        raise BadInput(f'{folder}: none of its {len(paths)} files can be used, the first: {left_out[0].strip()}')
    held_out = sorted(rng.choice(several, count, replace=False).tolist()) if count else []
    train = {speaker: names for speaker, names in files.items() if speaker not in held_out}
    texts = {'train_list.txt': [f'{speaker} {name}\n' for speaker in train for name in train[speaker]]}
    if held_out:
        texts['trials.txt'] = make_trials({speaker: files[speaker] for speaker in held_out}, rng, exhaustive)
    if left_out:
        texts['left_out.txt'] = left_out
    os.makedirs(out, exist_ok=True)
    for name, lines in texts.items():
        write_text(lists[name], ''.join(lines))
    report(found, files, held_out, texts, lists)


def inspect_file(path):
    """(seconds, rate in Hz, why the file cannot be used or '', whether it is clipped) of an audio file, read whole."""
    try:
        audio, rate = soundfile.read(os.fsencode(path), dtype='float32', always_2d=True)
    except soundfile.LibsndfileError as error:
        return 0.0, 0, f'unreadable ({error.error_string})', False
    seconds, peak = len(audio) / rate, np.abs(audio).max(initial=0)
    fault = ''
    if (rate, audio.shape[1]) != (RATE, 1):
        fault = f'{rate} Hz, {audio.shape[1]} channels; ffmpeg -i IN -ar 16000 -ac 1 OUT.wav converts it'
    elif len(audio) < 400:
        fault = f'{len(audio)} samples, less than a frame'
    elif not peak > 1e-4:
        fault = 'silent' if peak >= 0 else 'not a number'
    return seconds, rate, fault, bool(np.mean(np.abs(audio) > 0.999) > 0.001)


def make_trials(files, rng, exhaustive):
    """Trial lines from {speaker: files}: all pairs, or all target pairs (20,000 at most) and as many others."""
    names = [name for speaker in files for name in files[speaker]]
    speakers = np.repeat(np.arange(len(files)), [len(files[speaker]) for speaker in files])
    first, second = np.triu_indices(len(names), k=1)
    target = speakers[first] == speakers[second]
    if not exhaustive:
        targets, others = np.flatnonzero(target), np.flatnonzero(~target)
        count = min(len(targets), len(others), 20000)
        chosen = np.sort(np.concatenate([rng.choice(kind, count, replace=False) for kind in (targets, others)]))
        first, second, target = first[chosen], second[chosen], target[chosen]
    return [f'{int(t)} {names[a]} {names[b]}\n' for t, a, b in zip(target, first, second)]


def report(found, files, held_out, texts, lists):
    """Prints what make_lists found and wrote."""
    seconds = np.array([s for s, _, fault, _ in found if not fault])
    quantiles = ', '.join(f'{q:.1f}' for q in np.quantile(seconds, [0, 0.05, 0.5, 0.95, 1]))
    rates = collections.Counter(rate for _, rate, _, _ in found if rate)
    print(
        f'usable       {sum(map(len, files.values())):,} utterances of {len(files):,} speakers, '
        f'{seconds.sum() / 3600:.1f} hours\n'
        f'length       {quantiles} s (shortest, 5 %, median, 95 %, longest)\n'
        f'rates        {", ".join(f"{rate} Hz: {count:,} files" for rate, count in rates.most_common())}\n'
        f'clipped      {sum(clipped for *_, clipped in found):,} files (used all the same)\n'
        f'held out     {len(held_out):,} speakers: {" ".join(held_out[:20])}'
    )
    whys = collections.Counter(line.split(': ', 1)[1].strip() for line in texts.get('left_out.txt', []))
    for why, count in whys.most_common(20):
        print(f'left out     {count:,} files: {why}')
    for name, lines in texts.items():
        print(f'written      {lists[name]}, {len(lines):,} lines')
    if 'trials.txt' not in texts:
        print('not written  trials.txt: no speaker was held out')


if __name__ == '__main__':
    main()
