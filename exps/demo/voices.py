"""A corpus of synthetic voices: training without any data.

Its layouts are those of VoxCeleb, MUSAN and RIRS_NOISES. All audio is 16 kHz, mono, 16 bit.

Voices are made the way speech is (Fant, Acoustic Theory of Speech Production, 1960): a source, the
glottis or the hiss of a narrow passage, is filtered by a vocal tract whose resonances, the
formants, move from phone to phone. A speaker is a glottis and a vocal tract. Each session has a
channel, a level and a noise floor of its own, which tell nothing about the speaker.
"""

import argparse
import itertools
import json
import multiprocessing
import os
import shutil
import sys
import zlib
from functools import partial
from types import SimpleNamespace

import numpy as np
import soundfile
from scipy.fft import irfft, next_fast_len, rfft, rfftfreq
from scipy.ndimage import convolve1d
from scipy.signal import lfilter
from tqdm import tqdm

RATE = 16000
HOP = 128  # samples from one vocal tract shape to the next, 8 ms
N_FFT = 1024  # room for a frame of 2 * HOP samples and the ringing of the formants after it
MARKER = 'corpus.json'
FOLDERS = ('VoxCeleb2', 'VoxCeleb1', 'musan_split', 'simulated_rirs')
CLIP = 5 * RATE  # samples of a piece of MUSAN
# Shortest and longest side, m.
ROOMS = {'smallroom': (2, 10), 'mediumroom': (10, 30), 'largeroom': (30, 50)}
TRIALS_PER_PAIR = 12  # non-target trials of each pair of test speakers

# First three formants in Hz, men's averages: Peterson and Barney, JASA 24, 1952, table II.
VOWELS = {
    'iy': (270, 2290, 3010),
    'ih': (390, 1990, 2550),
    'eh': (530, 1840, 2480),
    'ae': (660, 1720, 2410),
    'aa': (730, 1090, 2440),
    'ao': (570, 840, 2410),
    'uh': (440, 1020, 2240),
    'uw': (300, 870, 2240),
    'ah': (640, 1190, 2390),
    'er': (490, 1350, 1690),
}
# Formants in Hz, then voicing, breath and hiss (relative amplitudes), centre and bandwidth of the
# hiss in Hz, and the zero that the nose adds, in Hz. After Klatt, JASA 67, 1980, tables II and III.
CONSONANTS = {
    'w': (290, 610, 2150, 0.7, 1, 0, 5000, 4000, 270),
    'y': (260, 2070, 3020, 0.7, 1, 0, 5000, 4000, 270),
    'r': (310, 1060, 1380, 0.7, 1, 0, 5000, 4000, 270),
    'l': (310, 1050, 2880, 0.7, 1, 0, 5000, 4000, 270),
    'm': (480, 1270, 2130, 0.5, 1, 0, 5000, 4000, 450),
    'n': (480, 1340, 2470, 0.5, 1, 0, 5000, 4000, 450),
    'ng': (480, 2000, 2900, 0.5, 1, 0, 5000, 4000, 450),
    'h': (500, 1500, 2500, 0, 6, 0, 5000, 4000, 270),
    'f': (340, 1100, 2080, 0, 1, 0.08, 6000, 6000, 270),
    's': (320, 1390, 2530, 0, 1, 0.35, 5500, 1500, 270),
    'sh': (300, 1840, 2750, 0, 1, 0.35, 3000, 1000, 270),
    'v': (220, 1100, 2080, 0.5, 1, 0.05, 6000, 6000, 270),
    'z': (240, 1390, 2530, 0.5, 1, 0.2, 5500, 1500, 270),
}
PAUSE = (500, 1500, 2500, 0, 0, 0, 5000, 4000, 270)
VOICED = (1, 1, 0, 5000, 4000, 270)
TARGETS = np.array(
    [PAUSE, *((*formants, *VOICED) for formants in VOWELS.values()), *CONSONANTS.values()]
)
FIRST_CONSONANT = 1 + len(VOWELS)
# Of a neutral tract 17.5 cm long, as F1 to F3 are 500, 1500, 2500 Hz.
HIGHER_FORMANTS = (3500, 4500, 5500, 6500, 7500)
BANDWIDTHS = np.array((60, 90, 140, 200, 250, 350, 450, 550))  # of the eight formants, Hz


def draw_between(rng, low, high):
    """A number whose logarithm is uniform."""
    return np.exp(rng.uniform(np.log(low), np.log(high)))


def draw_voice(rng):
    """A speaker: a man's or a woman's pitch and tract, which overlap, and the rest."""
    woman = rng.random() < 0.5
    pitches = (145, 280) if woman else (80, 165)
    tracts = (1.0, 1.25) if woman else (0.8, 1.08)
    return SimpleNamespace(
        # The source.
        pitch=draw_between(rng, *pitches),  # mean fundamental frequency, Hz
        melody=rng.uniform(0.6, 2.5),  # deviation of the pitch from phone to phone, semitones
        jitter=rng.uniform(0.003, 0.02),  # deviation of a cycle's length, relative
        shimmer=rng.uniform(0.02, 0.12),  # deviation of a cycle's amplitude, relative
        open_quotient=rng.uniform(0.45, 0.8),  # part of a cycle in which the glottis is open
        tilt=draw_between(rng, 1500, 8000),  # Hz above which another 6 dB per octave are lost
        breath=draw_between(rng, 0.01, 0.15),  # turbulence's amplitude, relative to the pulses
        # The vocal tract.
        tract=rng.uniform(*tracts),  # average man's length over the own length
        offsets=rng.uniform(0.92, 1.08, 8),  # of each formant, relative
        bandwidths=BANDWIDTHS * rng.uniform(0.7, 1.5, 8),  # Hz
        # Habits.
        accent=rng.normal(1, 0.03, (len(TARGETS), 3)),  # the own formants of each phone, relative
        pace=rng.uniform(0.8, 1.25),  # length of a phone, relative
    )


def draw_sentence(rng, voice, seconds):
    """Words of one to three syllables with pauses.

    Returns phones, rows of TARGETS, and how many frames each lasts.
    """
    phones = [0]
    frames = [rng.integers(6, 20)]
    while sum(frames) * HOP < seconds * RATE:
        for _ in range(rng.integers(1, 4)):
            syllable, lengths = draw_syllable(rng)
            phones += syllable
            frames += [round(voice.pace * length) for length in lengths]
        if rng.random() < 0.35:
            phones.append(0)
            frames.append(rng.integers(8, 45))

    phones.append(0)
    frames.append(rng.integers(6, 20))
    return np.array(phones), np.array(frames)


def draw_syllable(rng):
    """One or two vowels, most often after a consonant and at times before one.

    Returns the phones, rows of TARGETS, and how many frames each lasts at an average pace:
    consonants 50 to 100 ms, vowels 80 to 220 ms, and less if they are two.
    """
    onset, coda = rng.integers(FIRST_CONSONANT, len(TARGETS), 2)
    vowels = rng.integers(1, FIRST_CONSONANT, rng.integers(1, 3))
    phones = [*vowels]
    if rng.random() >= 0.2:
        phones.insert(0, onset)
    if rng.random() < 0.35:
        phones.append(coda)

    longest = 28 if len(vowels) == 1 else 16
    lengths = []
    for phone in phones:
        if phone >= FIRST_CONSONANT:
            lengths.append(rng.uniform(6, 12))
        else:
            lengths.append(rng.uniform(10, longest))
    return phones, lengths


def smooth(tracks, frames):
    """Hann-weighted moving average of tracks (T, ...) along time, over about `frames` frames."""
    window = np.hanning(frames + 2)
    return convolve1d(tracks, window / window.sum(), axis=0, mode='nearest')


def articulate(rng, voice, phones, frames):
    """Movements of a sentence: tracks (T, 9) with the columns of TARGETS, and the pitch in Hz (T,).

    Smoothing lets every phone colour its neighbours (coarticulation).
    """
    targets = TARGETS[phones].copy()
    targets[:, :3] *= voice.accent[phones]
    targets[:, 3:6] *= rng.uniform(0.5, 1, (len(phones), 1))
    tracks = smooth(np.repeat(targets, frames, axis=0), 11)

    melody = rng.normal(0, voice.melody, len(phones))
    semitones = smooth(np.repeat(melody, frames), 25)
    declination = voice.melody * np.linspace(1, -1, len(semitones))
    return tracks, voice.pitch * 2 ** ((semitones + declination) / 12)


def glottis(rng, voice, pitch):
    """Pulses and turbulence of the glottis for a pitch in Hz (samples,): two waves (samples,).

    The flow of a cycle is Rosenberg's pulse (JASA 49, 1971, type B), open twice as long while
    rising as while falling.
    """
    steps = pitch / RATE
    cycles = np.cumsum(steps)
    count = int(cycles[-1] * 1.1) + 10  # with a margin for cycles that jitter adds

    # Each cycle has its own length (jitter) and amplitude (shimmer).
    jitter = rng.normal(1, voice.jitter, count)
    cycles = np.cumsum(steps * jitter[cycles.astype(int)])
    number = cycles.astype(int)
    phase = (cycles - number) / voice.open_quotient
    rising = 3 * (phase * 1.5) ** 2 - 2 * (phase * 1.5) ** 3
    falling = 1 - (3 * phase - 2) ** 2
    falling_or_closed = np.where(phase < 1, falling, 0)
    flow = np.where(phase < 2 / 3, rising, falling_or_closed)
    shimmer = rng.normal(1, voice.shimmer, count)
    flow *= shimmer[number]

    # The lips radiate the derivative of the flow.
    pulses = np.diff(flow, prepend=0)
    leak = np.exp(-2 * np.pi * voice.tilt / RATE)
    pulses = lfilter([1 - leak], [1, -leak], pulses)

    # Turbulence is strongest while air flows, so it pulsates with the voice.
    turbulence = rng.standard_normal(len(pitch)) * (0.3 + flow)
    return pulses / pulses.std(), voice.breath * turbulence


def resonators(frequencies, bandwidths):
    """Inverse frequency response (T, N_FFT // 2 + 1) of resonators in cascade (Klatt, 1980).

    They have unit gain at 0 Hz. frequencies, bandwidths: (T, K) or what broadcasts to it, in Hz.
    The response's inverse is a polynomial in z^-1, of degree 2 K.
    """
    frequencies, bandwidths = np.broadcast_arrays(frequencies, bandwidths)
    radius = np.exp(-np.pi * bandwidths / RATE)
    first = -2 * radius * np.cos(2 * np.pi * frequencies / RATE)
    second = radius**2

    polynomial = np.ones((len(frequencies), 1))
    for a1, a2 in zip(first.T[..., None], second.T[..., None]):
        product = np.pad(polynomial, ((0, 0), (0, 2)))
        product[:, 1:-1] += a1 * polynomial
        product[:, 2:] += a2 * polynomial
        polynomial = product / (1 + a1 + a2)
    return rfft(polynomial, N_FFT)


def spectra(wave):
    """Spectra (T, N_FFT // 2 + 1) of the Hann-windowed frames of a wave (samples,).

    A frame is 2 * HOP samples long, and one begins every HOP samples.
    """
    padded = np.pad(wave, HOP)
    frames = np.lib.stride_tricks.sliding_window_view(padded, 2 * HOP)[::HOP]
    window = np.hanning(2 * HOP + 1)[:-1]
    return rfft(frames * window, N_FFT)


def overlap_add(spectra):
    """The wave whose frames' spectra (T, N_FFT // 2 + 1) are given.

    It is (T - 1) * HOP + N_FFT samples long.
    """
    frames = irfft(spectra, N_FFT).reshape(len(spectra), -1, HOP)
    count, hops, _ = frames.shape
    wave = np.zeros((count + hops - 1, HOP))
    for shift in range(hops):
        wave[shift : shift + count] += frames[:, shift]
    return wave.ravel()


def speak(rng, voice, seconds, transpose=0.0):
    """A sentence (samples,) about `seconds` long, its pitch moved by `transpose` semitones.

    Every 8 ms the sources' spectra are multiplied by the responses of the vocal tract in its shape
    of that moment.
    """
    tracks, pitch = articulate(rng, voice, *draw_sentence(rng, voice, seconds))
    moments = np.arange(len(tracks)) * HOP
    samples = np.arange((len(tracks) - 1) * HOP)
    voicing = np.interp(samples, moments, tracks[:, 3])
    breath = np.interp(samples, moments, tracks[:, 4])
    hiss = np.interp(samples, moments, tracks[:, 5])
    pitch = np.interp(samples, moments, pitch * 2 ** (transpose / 12))
    pulses, turbulence = glottis(rng, voice, pitch)

    voiced = spectra(pulses * voicing + turbulence * breath) * vocal_tract(voice, tracks)
    voiced /= np.sqrt((np.abs(voiced) ** 2).mean() / HOP)
    hissed = spectra(rng.standard_normal(len(samples)) * hiss) * passage(voice, tracks)
    return overlap_add(voiced + hissed)


def vocal_tract(voice, tracks):
    """Frequency response (T, N_FFT // 2 + 1) from the glottis to the lips, of tracks (T, 9)."""
    higher = np.tile(HIGHER_FORMANTS, (len(tracks), 1))
    formants = np.hstack([tracks[:, :3], higher]) * voice.tract * voice.offsets
    # Nearer to half the sampling rate a resonator's poles would add up.
    audible = formants[0] < 7200
    mouth = resonators(formants[:, audible], voice.bandwidths[audible])

    # The pole of the nose cancels its zero but for nasals, whose zero moves up (Klatt, 1980).
    zero = resonators(voice.tract * tracks[:, 8:9], 100)
    pole = resonators([[270 * voice.tract]], 100)
    return zero / pole / mouth


def passage(voice, tracks):
    """Frequency response (T, N_FFT // 2 + 1) from where hiss is made, of tracks (T, 9).

    It has unit power.
    """
    centres = np.minimum(voice.tract * voice.offsets[4] * tracks[:, 6:7], 7000)
    resonance = resonators(centres, tracks[:, 7:8])
    differentiator = 1 - np.exp(-2j * np.pi * np.arange(N_FFT // 2 + 1) / N_FFT)
    response = differentiator / resonance
    return response / np.sqrt((np.abs(response) ** 2).mean(axis=1, keepdims=True))


def shape_spectrum(wave, gain_db):
    """wave (samples,) filtered without delay by gain_db(frequencies in Hz) decibels."""
    length = next_fast_len(len(wave) + RATE // 10, real=True)
    frequencies = np.maximum(rfftfreq(length, 1 / RATE), 20)
    gain = 10 ** (gain_db(frequencies) / 20)
    return irfft(rfft(wave, length) * gain, length)[: len(wave)]


def coloured_noise(rng, samples, slope):
    """Gaussian noise (samples,) of unit power whose spectrum falls by `slope` dB per octave."""

    def gain_db(frequency):
        return -slope * np.log2(frequency / 1000)

    noise = shape_spectrum(rng.standard_normal(samples), gain_db)
    return noise / noise.std()


def draw_session(rng):
    """A recording session: a function record, and the voice's transposition in semitones.

    record(dry speech (samples,)) returns a recording. Channel (a tilt and four broad peaks or
    dips), level and noise floor are drawn the same way for every speaker.
    """
    tilt = rng.uniform(-3, 3)
    centres = rng.uniform(np.log2(100), np.log2(7000), 4)
    widths = rng.uniform(0.3, 1, 4)
    peaks = rng.uniform(-8, 8, 4)
    level = rng.uniform(-35, -18)
    floor = rng.uniform(-50, -30)
    slope = rng.uniform(0, 6)

    def channel_db(frequency):
        octaves = np.log2(frequency)[:, None] - centres
        return tilt * np.log2(frequency / 1000) + np.exp(-((octaves / widths) ** 2)) @ peaks

    def record(dry):
        wave = shape_spectrum(dry, channel_db)
        noise = 10 ** (floor / 20) * coloured_noise(rng, len(wave), slope)
        wave = wave / wave.std() + noise
        return 10 ** (level / 20) * wave

    return record, rng.normal(0, 0.7)


def write_wave(path, wave):
    """Writes (samples,) as 16-bit wav, turned down if it would clip; returns how many samples."""
    os.makedirs(os.path.dirname(path), exist_ok=True)
    wave = wave * min(1, 0.99 / np.abs(wave).max())
    soundfile.write(path, np.round(wave * 32767).astype(np.int16), RATE)
    return len(wave)


def write_speaker(folder, names, seconds, seed):
    """Writes the utterances `names`, SESSION/FILE, of a new speaker; returns how many samples."""
    rng = np.random.default_rng(seed)
    voice = draw_voice(rng)
    sessions = {}
    samples = 0
    for name in names:
        session = os.path.dirname(name)
        if session not in sessions:
            sessions[session] = draw_session(rng)
        record, transpose = sessions[session]

        length = seconds * rng.uniform(0.75, 1.25)
        wave = record(speak(rng, voice, length, transpose))
        samples += write_wave(os.path.join(folder, name), wave)
    return samples


def write_clip(path, sound, seed):
    """Writes 5 s of sound(rng), at a level of its own; returns how many samples."""
    rng = np.random.default_rng(seed)
    wave = sound(rng)[:CLIP]
    level = rng.uniform(-35, -15)
    return write_wave(path, 10 ** (level / 20) * wave / wave.std())


def babble(rng):
    """A voice that is in neither list, a little over 5 s (samples,)."""
    record, _ = draw_session(rng)
    voice = draw_voice(rng)
    return record(speak(rng, voice, CLIP / RATE))


def pluck(rng, frequency, samples):
    """A plucked string (samples,): noise running round a damped loop (Karplus and Strong, 1983)."""
    period = round(RATE / frequency)
    burst = np.zeros(samples)
    burst[:period] = rng.uniform(-1, 1, period)

    loop = np.zeros(period + 2)
    loop[0] = 1
    loop[period:] = -0.498
    return lfilter([1], loop, burst)


def music(rng):
    """The chords of a key over a bass and sometimes a drum (samples,).

    The chords are broken, or struck on the beat.
    """
    wave = np.zeros(CLIP + RATE)
    key = rng.uniform(110, 220)
    beat = int(RATE * rng.uniform(0.25, 0.5))
    broken, drum = rng.random(2) < 0.5
    chords = rng.permutation([(0, 4, 7), (5, 9, 12), (7, 11, 14), (9, 12, 16)])

    for step, start in enumerate(range(0, CLIP, beat)):
        chord = chords[step // 4 % 4]
        notes = [chord[step % 3] + 12] if broken else list(chord)
        if step % 2 == 0:
            notes.append(chord[0] - 12)

        for semitones in notes:
            loudness = rng.uniform(0.5, 1)
            note = pluck(rng, key * 2 ** (semitones / 12), RATE)
            wave[start : start + RATE] += loudness * note
        if drum:
            beaten = rng.standard_normal(2000) * np.geomspace(1, 1e-3, 2000)
            wave[start : start + 2000] += beaten
    return wave


def noise(rng):
    """A hiss, gusts of wind, a motor, a clatter or a ringing (samples,)."""
    kind = rng.integers(5)
    hiss = coloured_noise(rng, CLIP, rng.uniform(0, 6))
    time = np.arange(CLIP) / RATE

    if kind == 1:
        wind = coloured_noise(rng, CLIP, 8)
        gusts = np.exp(np.interp(time, np.arange(6), rng.normal(0, 1, 6)))
        return wind * gusts
    if kind == 2:
        return motor(rng, time) + 0.5 * hiss
    if kind == 3:
        return clatter(rng) + 0.002 * hiss
    if kind == 4:
        frequencies = rng.uniform(400, 3000, (2, 1))
        tones = np.sin(2 * np.pi * frequencies * time).sum(axis=0)
        rings = np.sin(2 * np.pi * rng.uniform(0.3, 3) * time) > 0
        return tones * rings + 0.03 * hiss
    return hiss


def motor(rng, time):
    """Harmonics of a turning that wavers, at times in s (samples,)."""
    speed = rng.uniform(25, 120)
    wavering = rng.uniform(0, 1)
    turns = speed * time + wavering * np.sin(2 * np.pi * time / 4)
    return sum(rng.exponential(1 / k) * np.sin(2 * np.pi * k * turns) for k in range(1, 40))


def clatter(rng):
    """Knocks at random times, each of which rings (samples,)."""
    impulses = rng.standard_normal(CLIP)
    knocks = impulses * (rng.random(CLIP) < rng.uniform(3, 30) / RATE)
    angle = 2 * np.pi * rng.uniform(300, 4000) / RATE
    radius = np.exp(-1 / (RATE * rng.uniform(0.002, 0.05)))
    return lfilter([1], [1, -2 * radius * np.cos(angle), radius**2], knocks)


def write_room(folder, size, positions, seed):
    """Writes impulse responses of one room, a source and a microphone drawn for each.

    size: sides in m, shortest and longest. Early reflections are those of a shoebox (image sources:
    Allen and Berkley, JASA 65, 1979); past the mixing time the response is noise with the room's
    decay, at the level that the critical distance gives. Returns how many samples.
    """
    rng = np.random.default_rng(seed)
    length, width = rng.uniform(*size, 2)
    height = rng.uniform(2.5, 3 + size[0] / 4)
    sides = np.array([length, width, height])
    absorption = rng.uniform(0.2, 0.6)
    name = os.path.basename(folder)
    samples = 0
    for position in range(1, positions + 1):
        response = draw_response(rng, sides, absorption)
        path = os.path.join(folder, f'{name}-{position:05d}.wav')
        samples += write_wave(path, response / np.abs(response).max())
    return samples


def draw_response(rng, sides, absorption):
    """Impulse response (samples,) between two places, drawn at random, of a room.

    sides: (3,), in m; absorption: of its walls, from 0 to 1.
    """
    volume = sides.prod()
    surface = 2 * (volume / sides).sum()
    decay = min(0.161 * volume / (surface * absorption), 1.2)  # RT60 in s, by Sabine's formula
    mixing = int(RATE * np.sqrt(volume) / 1000)  # Polack's estimate, sqrt of the volume in ms
    delay, reflections = reflect(*rng.uniform(0.1, 0.9, (2, 3)) * sides, sides, absorption)

    time = np.arange(int(decay * RATE)) / RATE
    late = np.arange(len(time)) >= mixing
    response = rng.standard_normal(len(time)) * 10 ** (-3 * time / decay) * late
    response *= np.sqrt(13.8 / (decay * RATE)) / (0.057 * np.sqrt(volume / decay))
    early = delay < min(mixing, len(time))
    np.add.at(response, delay[early], reflections[early])
    return response


def reflect(source, microphone, sides, absorption):
    """(Delays in samples, amplitudes) of the reflections in a shoebox of `sides`, in m."""
    cells = np.array(list(itertools.product(range(-3, 4), repeat=3)))[:, None]
    mirrored = np.array(list(itertools.product((0, 1), repeat=3)))
    bounces = (np.abs(cells - mirrored) + np.abs(cells)).sum(axis=2)
    images = (1 - 2 * mirrored) * source + 2 * cells * sides
    distance = np.maximum(np.linalg.norm(images - microphone, axis=2), 0.3)
    delay = ((distance - distance.min()) / 343 * RATE).astype(int)
    return delay, (1 - absorption) ** (bounces / 2) / distance


# What makes them, and how many.
CLIPS = {'speech': (babble, 16), 'music': (music, 12), 'noise': (noise, 20)}


def make_trials(files, rng):
    """Lines of a trial list from {speaker: paths SPEAKER/SESSION/FILE}.

    Targets are all pairs of a speaker's files from different sessions, so that no channel is
    shared; every pair of speakers gives the same number of non-targets, whatever their voices.
    """
    lines = []
    for paths in files.values():
        for a, b in itertools.combinations(paths, 2):
            if os.path.dirname(a) != os.path.dirname(b):
                lines.append(f'1 {a} {b}')

    for first, second in itertools.combinations(files.values(), 2):
        pairs = list(itertools.product(first, second))
        count = min(TRIALS_PER_PAIR, len(pairs))
        for chosen in rng.choice(len(pairs), count, replace=False):
            a, b = pairs[chosen]
            lines.append(f'0 {a} {b}')
    return lines


def plan(out, train_speakers, test_speakers, utterances, seconds, seed):
    """What there is to make: a list of jobs, and {speaker: paths} of either list.

    Every piece has its own seed, so that the order of the work does not matter.
    """
    sessions = max(2, utterances // 2)
    names = []
    for i in range(utterances):
        names.append(f'session{i % sessions + 1:02d}/{i // sessions + 1:05d}.wav')
    names.sort()

    jobs = []
    lists = []
    for kind, count, first, folder in (
        (0, train_speakers, 12, f'{out}/VoxCeleb2/train/wav'),
        (1, test_speakers, 10270, f'{out}/VoxCeleb1/test/wav'),
    ):
        files = {}
        for i in range(count):
            speaker = f'id{first + i:05d}'
            files[speaker] = [f'{speaker}/{name}' for name in names]
            job = partial(write_speaker, f'{folder}/{speaker}', names, seconds, [seed, kind, i])
            jobs.append(job)
        lists.append(files)

    for kind, (category, (sound, count)) in enumerate(CLIPS.items(), 2):
        for i in range(count):
            clip = f'{category}/synthetic/{category}-synthetic-{i:04d}/00000.wav'
            jobs.append(partial(write_clip, f'{out}/musan_split/{clip}', sound, [seed, kind, i]))

    for i, (room, number) in enumerate(itertools.product(ROOMS, range(1, 6))):
        folder = f'{out}/simulated_rirs/{room}/Room{number:03d}'
        jobs.append(partial(write_room, folder, ROOMS[room], 3, [seed, 5, i]))
    return jobs, lists


def claim(out, settings):
    """Takes possession of the folder; returns whether it holds the corpus of these settings.

    Raises ValueError for a folder that holds something else, which is never touched.
    """
    marker = os.path.join(out, MARKER)
    os.makedirs(out, exist_ok=True)
    there = None
    try:
        with open(marker, encoding='utf-8') as file:
            there = json.load(file)
        ours = there['made_by'] == settings['made_by']
    except FileNotFoundError:
        ours = not os.listdir(out)
    except (ValueError, KeyError, TypeError):
        ours = False

    if not ours:
        raise ValueError(
            f'{out} is not empty and not a corpus of this program ({MARKER}); choose another folder'
        )
    if there == {**settings, 'complete': True}:
        return True

    write_marker(out, settings, complete=False)
    for folder in FOLDERS:
        shutil.rmtree(os.path.join(out, folder), ignore_errors=True)
    return False


def write_marker(out, settings, complete):
    """Writes the file that says that the folder is ours, and whether the corpus is complete."""
    temporary = os.path.join(out, f'{MARKER}.part')
    with open(temporary, 'w', encoding='utf-8') as file:
        json.dump({**settings, 'complete': complete}, file, indent=1)
    os.replace(temporary, os.path.join(out, MARKER))


def make_corpus(
    out, train_speakers=64, test_speakers=20, utterances=8, seconds=3.5, seed=10, processes=2
):
    """Makes the corpus in the folder `out`, or leaves it if it is there.

    The same arguments make the same bytes. utterances: of each speaker; seconds: their mean length;
    processes: how many share the work. Raises ValueError for arguments or a folder that cannot be
    used.
    """
    fewest = min(train_speakers, test_speakers, utterances)
    if fewest < 2 or seconds < 0.5 or processes < 1 or seed < 0:
        raise ValueError(
            'needs at least 2 speakers of each kind, 2 utterances, 0.5 s, 1 process '
            'and a seed from 0 up'
        )
    settings = dict(
        made_by='exps/demo/voices.py',
        # A corpus of another version of this file is another corpus.
        version=zlib.crc32(open(__file__, 'rb').read()),
        train_speakers=train_speakers,
        test_speakers=test_speakers,
        utterances=utterances,
        seconds=float(seconds),
        seed=seed,
    )
    if claim(out, settings):
        print(f'{out}: the corpus is there already, complete')
        return

    jobs, (train, test) = plan(out, train_speakers, test_speakers, utterances, seconds, seed)
    work = tqdm(run(jobs, processes), desc='making voices', total=len(jobs), disable=None)
    samples = sum(work)

    lines = [f'{speaker} {path}' for speaker, paths in train.items() for path in paths]
    write_lines(f'{out}/VoxCeleb2/train_list.txt', lines)
    trials = make_trials(test, np.random.default_rng([seed, 6]))
    write_lines(f'{out}/VoxCeleb1/veri_test2.txt', trials)
    write_marker(out, settings, complete=True)

    train_files = train_speakers * utterances
    test_files = test_speakers * utterances
    clips = ', '.join(f'{count} {category}' for category, (_, count) in CLIPS.items())
    rooms = len(ROOMS) * 5
    minutes = samples / RATE / 60
    print(f'{out}/VoxCeleb2       {train_speakers} speakers, {train_files} utterances to train on')
    print(
        f'{out}/VoxCeleb1       {test_speakers} others, {test_files} utterances, '
        f'{len(trials)} trials'
    )
    print(f'{out}/musan_split     {clips} clips')
    print(f'{out}/simulated_rirs  {rooms * 3} impulse responses of {rooms} rooms')
    print(f'{minutes:.0f} minutes of audio in all')


def run(jobs, processes):
    """What the jobs return, in their order; `processes` processes share them."""
    if processes == 1:
        yield from map(call, jobs)
    else:
        with multiprocessing.Pool(processes) as pool:
            yield from pool.imap(call, jobs)


def call(job):
    """Calls a job, in the process that got it."""
    return job()


def write_lines(path, lines):
    """Writes a text file."""
    with open(path, 'w', encoding='utf-8') as file:
        file.writelines(f'{line}\n' for line in lines)


def main(argv=None):
    """Runs the command.

    Exit status 2, with a sentence on standard error, for what cannot be done.
    """
    parser = argparse.ArgumentParser(
        description='Make a corpus of synthetic voices to train on.',
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument(
        '--out', required=True, default=argparse.SUPPRESS, help='folder of the corpus'
    )
    parser.add_argument('--train_speakers', type=int, default=64, help='voices to train on')
    parser.add_argument('--test_speakers', type=int, default=20, help='other voices, to test on')
    parser.add_argument('--utterances', type=int, default=8, help='of each speaker')
    parser.add_argument('--seconds', type=float, default=3.5, help='mean length of an utterance')
    parser.add_argument('--seed', type=int, default=10, help='seed of everything drawn at random')
    parser.add_argument('--processes', type=int, default=2, help='processes that share the work')
    try:
        make_corpus(**vars(parser.parse_args(argv)))
    except (ValueError, OSError) as error:
        print(f'error: {error}', file=sys.stderr)
        sys.exit(2)


if __name__ == '__main__':
    main()
