"""Writes the files of a trial list as they sound in other conditions, and lists to score them.

    python -m exps.conditions lists/trials.txt --audio recordings --out conditions
    python trainECAPAModel.py --eval --initial_model MODEL --eval_list conditions/*.txt \
        --eval_path conditions/audio --save_path exps/conditions

Conditions: codecs of telephones and of the internet (those of --codec, and opus), and a cut to the
loudest 2 s; with --musan_path noise, music and babble at --snr dB, with --rir_path a room.
clean.txt is the list itself. In NAME.txt both sides of the trials have the condition; telephones
also have NAME_cross.txt, with clean enrolments. Files that exist are kept, so the same command
continues after an interruption. Random draws depend only on the path of a file in the list.
"""

import argparse
import contextlib
import functools
import json
import os
import random
import shutil

import numpy as np
import soundfile
from tqdm import tqdm

from dataLoader import (
    ATTEMPTS,
    INTERNET,
    NOISE_CLIPS,
    RATE,
    TELEPHONE,
    Codec,
    NoiseFiles,
    Strings,
    find_audio,
    is_usable,
    parallel_map,
    read_audio,
    read_room,
    read_trial_lists,
    require_file,
    require_folder,
    reverberate,
    through_codec,
)
from exps.embed import OPEN_MODEL
from tools import (
    BadInput,
    HelpFormatter,
    default_n_cpu,
    exit_on_bad_input,
    in_range,
    say,
    sha256,
    write_text,
    write_whole,
)

CODECS = {**TELEPHONE, **INTERNET, 'opus': Codec(RATE, 'OGG', 'OPUS', (0.99, 1.0))}
SILENCE = 1e-10  # power of a clip that adds nothing, -100 dB
CUT = 2 * RATE  # samples of 'short'
SETTINGS = 'settings.json'  # in --out


def main(argv=None):
    """Runs the script. Exits with status 2 and a message if the input cannot be used."""
    parser = argparse.ArgumentParser(
        prog='python -m exps.conditions',
        description='Write the files of a trial list in other conditions.',
        formatter_class=HelpFormatter,
    )
    add = parser.add_argument
    add('list', help='trial list: lines `label enrolment test`, or with the label last')
    add('--audio', required=True, help='folder of the files in the list')
    add('--out', required=True, help='folder for audio/ and the lists')
    add(
        '--conditions',
        nargs='+',
        action='extend',
        help=f'names, of clean, {", ".join(CODECS)}, short, noise, music, babble and room; without '
        'it all that the other options make possible',
    )
    add('--musan_path', help='MUSAN, for noise, music and babble')
    add('--rir_path', help='room impulse responses, for room')
    add(
        '--snr',
        type=in_range(float, -20, 60),
        default=10.0,
        help='level of the speech above the noise, in dB',
    )
    add('--n_cpu', type=in_range(int, 0), default=default_n_cpu(), help='processes that write')
    args = parser.parse_args(argv)
    with exit_on_bad_input():
        write_conditions(args)


def write_conditions(args):
    """Writes audio/ and the lists.

    Raises BadInput for an unknown condition, a file that cannot be used, a disk that is too small,
    and a folder that was written with other options.
    """
    # Check the names, the list and the folders.
    require_file(args.list, 'LIST')
    require_folder(args.audio, '--audio')
    made = make_conditions(args)
    names = list(dict.fromkeys(args.conditions or made))
    for name in names:
        if name not in made:
            raise BadInput(f'--conditions {name}: these options make {", ".join(made)}')
    _, (trials,) = read_trial_lists([args.list], [args.audio])
    refuse_other_places(trials.names, args.list)
    settings = settings_of(args)
    refuse_other_settings(settings, args.out)

    # Write the files that do not exist yet.
    audio = os.path.join(args.out, 'audio')
    jobs = []
    for name in dict.fromkeys(['clean', *names]):
        for file in trials.names:
            if not os.path.exists(os.path.join(audio, renamed(file, name))):
                jobs.append((name, file))
    check_room(jobs, args)

    os.makedirs(audio, exist_ok=True)
    write_text(os.path.join(args.out, SETTINGS), json.dumps(settings, indent=1))
    convert = functools.partial(write_one, made, args.audio, audio)
    done = parallel_map(convert, jobs, min(args.n_cpu, len(jobs)))
    # A bad file has the same fault in each condition.
    shown = tqdm(done, 'writing', len(jobs), disable=None)
    faults = list(dict.fromkeys(fault for fault in shown if fault))
    if faults:
        raise BadInput('\n'.join([f'{len(faults)} files cannot be used, the first:', *faults[:20]]))

    # Write the lists.
    lists = {'clean': ('clean', 'clean')}
    for name in names:
        lists[name] = (name, name)
        if name in TELEPHONE:
            lists[f'{name}_cross'] = ('clean', name)
    for name, sides in lists.items():
        write_list(os.path.join(args.out, f'{name}.txt'), trials, sides)
    say(f'{args.out}: {len(lists)} lists, {", ".join(lists)}')
    say(
        f'to score them: python trainECAPAModel.py --eval --initial_model {OPEN_MODEL} '
        f'--eval_list {args.out}/*.txt --eval_path {args.out}/audio --save_path {args.out}/results'
    )


def make_conditions(args):
    """Returns the conditions: {name: function(samples, random.Random) -> samples}."""
    conditions = {'clean': unchanged}
    for name, codec in CODECS.items():
        if is_usable(codec):
            conditions[name] = functools.partial(coded, codec)
        else:
            say(f'note: this libsndfile lacks the codec {name}')
    conditions['short'] = cut
    if args.musan_path:
        for name, category in (('noise', 'noise'), ('music', 'music'), ('babble', 'speech')):
            files = NoiseFiles(os.path.join(args.musan_path, category))
            conditions[name] = functools.partial(mixed, files, category, args.snr)
    if args.rir_path:
        rirs = Strings(find_audio(args.rir_path, '--rir_path'))
        conditions['room'] = functools.partial(in_room, rirs)
    return conditions


def unchanged(samples, rng):
    """Returns the samples: the condition of clean.txt."""
    return samples


def coded(codec, samples, rng):
    """Sends samples through a telephone codec and band, or another codec at a low bit rate."""
    return through_codec(samples, codec, codec.levels and codec.levels[1], codec.rate != RATE)


def cut(samples, rng):
    """Returns the loudest 2 s of samples, because others may be silent."""
    energy = np.cumsum(np.append(0.0, samples.astype(np.float64) ** 2))
    start = int(np.argmax(energy[CUT:] - energy[:-CUT])) if len(samples) > CUT else 0
    return samples[start : start + CUT]


def mixed(files, category, snr, samples, rng):
    """Adds as many clips of noise as in training; their sum is snr dB below the samples."""
    for _ in range(ATTEMPTS):
        clips = list(files.draw(rng, len(samples), rng.randint(*NOISE_CLIPS[category])))
        noise = np.sum(clips, axis=0)
        # Not dataLoader.decibels, whose floor makes noise under quiet speech too loud.
        power = np.mean(noise**2)
        if power > SILENCE:
            gain = np.sqrt(np.mean(samples**2) / power / 10 ** (snr / 10))
            return samples + noise * np.float32(gain)
    raise BadInput(f'--musan_path: {files.folder}: {ATTEMPTS} draws in a row are silent')


def in_room(rirs, samples, rng):
    """Puts samples in a random room."""
    return reverberate(samples, read_room(rirs[rng.randrange(len(rirs))]))


def write_one(conditions, folder, audio, job):
    """Writes a file of `folder` in a condition to `audio`, in 16 bits; returns a fault or ''."""
    name, file = job
    out = os.path.join(audio, renamed(file, name))
    # Seeded with the whole path: many folders have files of the same names.
    rng = random.Random(renamed(file, name))
    try:
        samples = conditions[name](read_audio(os.path.join(folder, file)), rng)
    except BadInput as error:
        return str(error)
    # 16 bits would clip samples above 1.
    samples = samples / max(1.0, np.abs(samples).max())
    os.makedirs(os.path.dirname(out), exist_ok=True)
    write_whole(out, lambda file: soundfile.write(file, samples, RATE, 'PCM_16', format='WAV'))
    return ''


def renamed(file, name):
    """Returns the path of a file in a condition; its folders stay, as they name the speaker."""
    return f'{os.path.splitext(file)[0]}.{name}.wav'


def refuse_other_places(names, path):
    """Raises BadInput if a file would be outside of audio/, or two files would have one path."""
    sources = {}
    for name in names:
        if os.path.isabs(name) or '..' in name.split('/'):
            raise BadInput(f'{path}: {name}: give paths below --audio, without ..')
        source = sources.setdefault(renamed(os.path.normpath(name), 'clean'), name)
        if source != name:
            raise BadInput(f'{path}: {source} and {name} would be written to the same file')


def settings_of(args):
    """Returns the options that the files depend on: {option: value}."""
    with open(args.list, 'rb') as file:
        settings = {'list': sha256(file.read()), 'audio': os.path.abspath(args.audio)}
    if args.musan_path:
        settings.update({'musan_path': os.path.abspath(args.musan_path), 'snr': args.snr})
    if args.rir_path:
        settings['rir_path'] = os.path.abspath(args.rir_path)
    return settings


def refuse_other_settings(settings, out):
    """Raises BadInput if a folder was written with other settings.

    Adds the settings of earlier commands to `settings` (for example snr).
    """
    path = os.path.join(out, SETTINGS)
    if not os.path.exists(path):
        return
    try:
        with open(path, encoding='utf-8') as file:
            earlier = dict(json.load(file))
    except ValueError as error:
        raise BadInput(f'{path}: cannot be read; choose another --out') from error
    for name, value in {**earlier, **settings}.items():
        if earlier.get(name, value) != value:
            raise BadInput(f'--out {out}: was written with another {name}; choose another folder')
        settings[name] = value


def check_room(jobs, args):
    """Prints how much space the files need. Raises BadInput if the disk has less."""
    needed = 0
    for name, file in jobs:
        with contextlib.suppress(OSError, soundfile.SoundFileError):
            samples = soundfile.info(os.path.join(args.audio, file)).frames
            needed += 2 * (min(samples, CUT) if name == 'short' else samples)
    folder = os.path.abspath(args.out)
    while not os.path.exists(folder):
        folder = os.path.dirname(folder)
    free = shutil.disk_usage(folder).free
    say(f'{len(jobs):,} files to write, about {needed / 1e6:,.0f} MB; {free / 1e9:.1f} GB are free')
    if needed > free:
        raise BadInput(f'--out {args.out}: the disk has too little space')


def write_list(path, trials, sides):
    """Writes a trial list; sides: the conditions of enrolments and of tests."""
    lines = []
    for label, pair in zip(trials.labels, trials.pairs):
        files = [renamed(trials.names[row], name) for row, name in zip(pair, sides)]
        lines.append(f'{label} {files[0]} {files[1]}\n')
    write_text(path, ''.join(lines))


if __name__ == '__main__':
    main()
