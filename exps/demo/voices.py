"""Makes a corpus of synthetic voices, so that training can be tried without any data.

The folders are laid out as VoxCeleb, MUSAN and RIRS_NOISES are; all audio is 16 kHz, mono, 16 bit.

A voice is a source and a filter (Fant, Acoustic Theory of Speech Production, 1960): pulses of the
glottis and breath go through three resonances of the vocal tract, the formants, which move from
vowel to vowel. Speakers differ in pitch and vocal tract. Each session has its own channel, level
and background noise, which say nothing about the speaker.
"""

import argparse
import itertools
import json
import shutil
import sys
import zlib
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import soundfile
from scipy.ndimage import convolve1d
from scipy.signal import fftconvolve, firwin2, lfilter, sosfilt

RATE = 16000
HOP = 128  # samples for which the vocal tract keeps its shape, 8 ms
CLIP = 5 * RATE  # samples of a noise
FOLDERS = ('VoxCeleb2', 'VoxCeleb1', 'musan_split', 'simulated_rirs')
TRIALS_PER_PAIR = 12  # trials of each pair of different speakers
ROOMS = {'smallroom': (0.1, 0.3), 'mediumroom': (0.3, 0.6), 'largeroom': (0.6, 1.2)}  # RT60, s
# Formants of ten vowels, men's averages, Hz: Peterson and Barney, JASA 24, 1952, table II.
F1 = (270, 390, 530, 660, 730, 570, 440, 300, 640, 490)
F2 = (2290, 1990, 1840, 1720, 1090, 840, 1020, 870, 1190, 1350)
F3 = (3010, 2550, 2480, 2410, 2440, 2410, 2240, 2240, 2390, 1690)
VOWELS = np.transpose([F1, F2, F3])


def draw_voice(rng):
    """Draws a speaker: a woman or a man, whose ranges of pitch and vocal tract overlap."""
    woman = rng.random() < 0.5
    pitches = (145, 280) if woman else (80, 165)
    tracts = (1.0, 1.25) if woman else (0.8, 1.08)
    tract = rng.uniform(*tracts) * rng.uniform(0.9, 1.1, 3)
    return SimpleNamespace(
        pitch=np.exp(rng.uniform(*np.log(pitches))),  # mean fundamental frequency, Hz
        melody=rng.uniform(0.6, 2.5),  # deviation of the pitch from vowel to vowel, semitones
        tilt=np.exp(rng.uniform(*np.log((300, 3000)))),  # Hz above which the source gets weaker
        breath=rng.uniform(0.02, 0.2),  # amplitude of the breath, relative to the pulses
        formants=VOWELS * tract * rng.normal(1, 0.05, VOWELS.shape),  # of each vowel, Hz
        bandwidths=np.array((60, 90, 140)) * rng.uniform(0.7, 1.5, 3),  # of the formants, Hz
        pace=rng.uniform(0.8, 1.25),  # length of a vowel, relative
    )


def speak(rng, voice, seconds):
    """Returns a sentence (samples,) of vowels and pauses."""
    frames = int(seconds * RATE / HOP)
    vowels = rng.integers(len(VOWELS), size=frames)
    lengths = (voice.pace * rng.uniform(8, 28, frames)).astype(int)
    pauses = rng.random(frames) < 0.15
    loudness = np.where(pauses, 0, rng.uniform(0.4, 1, frames))
    semitones = rng.normal(0, voice.melody, frames)

    # A row for each frame; smoothing lets a vowel glide into the next one.
    targets = np.column_stack([voice.formants[vowels], loudness, semitones])
    window = np.hanning(15) / np.hanning(15).sum()
    tracks = convolve1d(np.repeat(targets, lengths, axis=0)[:frames], window, axis=0)

    samples = np.arange(frames * HOP) / HOP
    loudness = np.interp(samples, np.arange(frames), tracks[:, 3])
    semitones = np.interp(samples, np.arange(frames), tracks[:, 4])
    source = glottis(rng, voice, voice.pitch * 2 ** (semitones / 12))
    return vocal_tract(source * loudness, tracks[:, :3], voice.bandwidths)


def glottis(rng, voice, pitch):
    """Returns the source (samples,): a pulse for each cycle of the pitch in Hz, and breath."""
    cycles = np.floor(np.cumsum(pitch / RATE))
    pulses = np.diff(cycles, prepend=0) / np.sqrt(voice.pitch / RATE)
    breath = voice.breath * rng.standard_normal(len(pitch))
    leak = np.exp(-2 * np.pi * voice.tilt / RATE)
    return lfilter([1 - leak], [1, -leak], pulses + breath)


def vocal_tract(source, formants, bandwidths):
    """Filters a source (frames * HOP,) by resonators with the formants (frames, 3) in Hz.

    Each resonator has unit gain at 0 Hz (Klatt, JASA 67, 1980).
    """
    radius = np.exp(-np.pi * bandwidths / RATE)
    sections = np.zeros((*formants.shape, 6))
    sections[..., 3] = 1
    sections[..., 4] = -2 * radius * np.cos(2 * np.pi * formants / RATE)
    sections[..., 5] = radius**2
    sections[..., 0] = sections[..., 3:].sum(axis=-1)

    state = np.zeros((3, 2))
    speech = []
    for frame, resonators in zip(source.reshape(-1, HOP), sections):
        filtered, state = sosfilt(resonators, frame, zi=state)
        speech.append(filtered)
    return np.concatenate(speech)


def equalise(wave, gains):
    """Filters a wave (samples,) by gains in dB at 0, 250, 500, 1000, 2000, 4000 and 8000 Hz."""
    frequencies = (0, 250, 500, 1000, 2000, 4000, 8000)
    return fftconvolve(wave, firwin2(255, frequencies, 10 ** (gains / 20), fs=RATE), mode='same')


def coloured_noise(rng, samples, spread):
    """Returns noise (samples,) of unit power; its spectrum deviates from white by `spread` dB."""
    noise = equalise(rng.standard_normal(samples), rng.normal(0, spread, 7))
    return noise / noise.std()


def draw_session(rng):
    """Draws a recording session: a function that turns dry speech (samples,) into a recording."""
    channel = rng.normal(0, 3, 7)
    level = 10 ** (rng.uniform(-35, -18) / 20)
    floor = 10 ** (rng.uniform(-50, -30) / 20)

    def record(dry):
        wave = equalise(dry, channel)
        return level * (wave / wave.std() + floor * coloured_noise(rng, len(wave), 6))

    return record


def babble(rng):
    """Returns a voice that is in neither list (CLIP,)."""
    return draw_session(rng)(speak(rng, draw_voice(rng), CLIP / RATE))


def music(rng):
    """Returns chords of a key, whose tones die away (CLIP,)."""
    key = rng.uniform(110, 220)
    time = np.arange(RATE // 2) / RATE
    decay = np.exp(-rng.uniform(2, 8) * time)
    chords = []
    for semitones in rng.choice([(0, 4, 7), (5, 9, 12), (7, 11, 14), (9, 12, 16)], 10):
        tones = key * 2 ** (semitones[:, None] / 12)
        chords.append(decay * sawtooth(tones * time).sum(axis=0))
    return equalise(np.concatenate(chords), rng.normal(0, 6, 7))


def noise(rng):
    """Returns coloured noise, steady or in bursts, with a hum of a motor or without (CLIP,)."""
    seconds = np.arange(CLIP) / RATE
    points = rng.integers(2, 40)
    loudness = np.exp(rng.choice([0, 1.5]) * rng.standard_normal(points))
    bursts = coloured_noise(rng, CLIP, 10) * np.interp(seconds, np.linspace(0, 5, points), loudness)
    hum = equalise(sawtooth(rng.uniform(50, 150) * seconds), rng.normal(0, 10, 7))
    return bursts / bursts.std() + rng.choice([0, 1]) * hum / hum.std()


def sawtooth(cycles):
    """Returns a wave with all harmonics that repeats with every cycle."""
    return cycles % 1 - 0.5


CLIPS = {'speech': (babble, 16), 'music': (music, 12), 'noise': (noise, 20)}  # maker, how many


def write_wave(path, wave):
    """Writes a wave (samples,) as 16-bit wav, turned down if it would clip."""
    path.parent.mkdir(parents=True, exist_ok=True)
    wave = wave * min(1, 0.99 / np.abs(wave).max())
    soundfile.write(path, np.round(wave * 32767).astype(np.int16), RATE)


def write_speakers(folder, first, count, utterances, seconds, seed):
    """Writes the utterances of `count` new speakers; returns {speaker: paths SPEAKER/SESSION/FILE}.

    A session has two utterances, but there are at least two sessions.
    """
    sessions = max(2, utterances // 2)
    files = {}
    for i in range(count):
        rng = np.random.default_rng([*seed, i])
        voice = draw_voice(rng)
        records = [draw_session(rng) for _ in range(sessions)]
        speaker = f'id{first + i:05d}'
        files[speaker] = []
        for k in range(utterances):
            path = f'{speaker}/session{k % sessions:02d}/{k:05d}.wav'
            speech = speak(rng, voice, seconds * rng.uniform(0.75, 1.25))
            write_wave(folder / path, records[k % sessions](speech))
            files[speaker].append(path)
    return files


def write_noises(folder, seed):
    """Writes clips of speech, music and noise, 5 s each."""
    for kind, (category, (sound, count)) in enumerate(CLIPS.items()):
        for i in range(count):
            rng = np.random.default_rng([*seed, kind, i])
            wave = sound(rng)
            level = 10 ** (rng.uniform(-35, -15) / 20)
            path = folder / category / 'synthetic' / f'{category}-synthetic-{i:04d}' / '00000.wav'
            write_wave(path, level * wave / wave.std())


def write_rooms(folder, seed):
    """Writes impulse responses of 45 rooms: the direct sound, then noise that dies away."""
    for kind, (size, reverberation_times) in enumerate(ROOMS.items()):
        for i in range(1, 16):
            rng = np.random.default_rng([*seed, kind, i])
            seconds = rng.uniform(*reverberation_times)  # after which the sound is 60 dB weaker
            time = np.arange(int(seconds * RATE)) / RATE
            response = 10 ** (-3 * time / seconds) * rng.standard_normal(len(time))
            response *= rng.uniform(0.02, 0.1)
            response[0] = 1
            write_wave(folder / size / f'Room{i:03d}' / f'Room{i:03d}-00001.wav', response)


def make_trials(files, rng):
    """Makes the lines of a trial list from {speaker: paths SPEAKER/SESSION/FILE}.

    A speaker is compared with itself only across sessions, so that the channel does not help.
    """
    lines = []
    for paths in files.values():
        for a, b in itertools.combinations(paths, 2):
            if Path(a).parent != Path(b).parent:
                lines.append(f'1 {a} {b}')

    for first, second in itertools.combinations(files.values(), 2):
        pairs = list(itertools.product(first, second))
        rng.shuffle(pairs)
        lines += [f'0 {a} {b}' for a, b in pairs[:TRIALS_PER_PAIR]]
    return lines


def claim(out, settings, last_file):
    """Takes the folder for a corpus of these settings; returns whether it already exists.

    Raises ValueError for a folder that holds something else, which is never touched.
    """
    marker = out / 'corpus.json'
    out.mkdir(parents=True, exist_ok=True)
    text = marker.read_text(encoding='utf-8') if marker.is_file() else ''
    if text == json.dumps(settings) and last_file.is_file():
        return True
    if settings['made_by'] not in text and any(out.iterdir()):
        raise ValueError(f'{out} holds something else; choose another folder')

    last_file.unlink(missing_ok=True)
    for folder in FOLDERS:
        shutil.rmtree(out / folder, ignore_errors=True)
    marker.write_text(json.dumps(settings), encoding='utf-8')
    return False


def make_corpus(out, train_speakers=64, test_speakers=20, utterances=8, seconds=3.5, seed=10):
    """Makes the corpus in the folder `out`, or leaves it if it is there.

    The same arguments make the same bytes. utterances: of each speaker; seconds: their mean length.
    Raises ValueError for arguments or a folder that cannot be used.
    """
    if min(train_speakers, test_speakers, utterances) < 2 or seconds < 0.5 or seed < 0:
        raise ValueError(
            'needs at least 2 speakers of each kind, 2 utterances, 0.5 s and a seed from 0 up'
        )
    # A corpus of another version of this file is another corpus.
    version = zlib.crc32(Path(__file__).read_bytes())
    counts = [train_speakers, test_speakers, utterances, float(seconds), seed]
    settings = {'made_by': 'exps/demo/voices.py', 'version': version, 'arguments': counts}
    out = Path(out)
    trial_list = out / 'VoxCeleb1/veri_test2.txt'  # written last
    if claim(out, settings, trial_list):
        print(f'{out}: the corpus already exists')
        return

    print(f'{out}: making {train_speakers} voices to train on and {test_speakers} to test on')
    folder = out / 'VoxCeleb2'
    train = write_speakers(folder / 'train/wav', 12, train_speakers, utterances, seconds, [seed, 0])
    lines = [f'{speaker} {path}\n' for speaker, paths in train.items() for path in paths]
    (folder / 'train_list.txt').write_text(''.join(lines))
    write_noises(out / 'musan_split', [seed, 2])
    write_rooms(out / 'simulated_rirs', [seed, 3])

    test_path = out / 'VoxCeleb1/test/wav'
    test = write_speakers(test_path, 10270, test_speakers, utterances, seconds, [seed, 1])
    trials = make_trials(test, np.random.default_rng([seed, 4]))
    trial_list.write_text('\n'.join(trials) + '\n')


def main(argv=None):
    """Runs the command. Exits with status 2 and a message if the corpus cannot be made."""
    parser = argparse.ArgumentParser(description='Make a corpus of synthetic voices to train on.')
    parser.add_argument('--out', required=True, help='folder of the corpus')
    parser.add_argument('--train_speakers', type=int, default=64, help='voices to train on (64)')
    parser.add_argument(
        '--test_speakers', type=int, default=20, help='other voices to test on (20)'
    )
    parser.add_argument('--utterances', type=int, default=8, help='utterances of each speaker (8)')
    parser.add_argument('--seconds', type=float, default=3.5, help='their mean length in s (3.5)')
    parser.add_argument('--seed', type=int, default=10, help='seed of all random draws (10)')
    try:
        make_corpus(**vars(parser.parse_args(argv)))
    except (ValueError, OSError) as error:
        print(f'error: {error}', file=sys.stderr)
        sys.exit(2)


if __name__ == '__main__':
    main()
