"""Audio on disk: crops for training with MUSAN and RIR augmentation, utterances for evaluation; lists and checks below.

All audio is 16 kHz and mono, as float32 in [-1, 1].
"""

import codecs
import contextlib
import functools
import io
import os
import random
import re
import sys
import wave
from array import array
from typing import NamedTuple

import numpy as np
import soundfile
import torch
import torchaudio
from scipy.signal import fftconvolve
from torch.utils.data import DataLoader, Dataset, Sampler
from tqdm import tqdm

from tools import BadInput, digest, process_count, process_rank, say, write_text

RATE = 16000
SPEEDS = (100, 90, 110)  # percent
NOISE_SNR = {'noise': (0, 15), 'speech': (13, 20), 'music': (5, 15)}  # dB, each clip against the utterance
NOISE_CLIPS = {'noise': (1, 1), 'speech': (3, 8), 'music': (1, 1)}  # fewest and most clips mixed in
PIECE, PIECE_STEP = 5 * RATE, 3 * RATE  # a noise recording counts as its pieces of 5 s, one every 3 s
EVAL_CROP = 300 * 160 + 240
SHORTEST = 257  # samples that a spectrogram needs at least, half a window to either side being a reflection
LABELS = {b'1': 1, b'0': 0, b'target': 1, b'nontarget': 0}  # 1: the same speaker
CUT_SHORT = re.compile(r'^data : (\d+) \(should be (\d+)\)$', re.MULTILINE)  # in libsndfile's log


class train_loader(Dataset):
    """Random augmented crops of the training utterances: (FloatTensor (num_frames * 160 + 240,), int label).

    train_list: lines `speaker path`, paths below train_path; musan_path: MUSAN, split in pieces or not; rir_path: room
    impulse responses; BadInput where they cannot be used. A label is the speaker's index in the sorted `speakers`.
    dataset[index] draws from torch's generator, as any dataset; dataset[epoch, index] depends on seed, epoch and index
    alone.

    speed_perturb: adds every utterance at 0.9 and 1.1 of its speed, as of other speakers, since the pitch moves along:
    labels S to 2 S - 1 and 2 S to 3 S - 1 of a list of S speakers. 'drawn': one of the three for each crop, equally
    likely, so that there are no more utterances. augment: share of the crops that is augmented.

    The attribute bad_audio may name a text file, which then gets a line `path: reason` for each utterance whose file
    cannot be used, and which another one of the speaker replaces; otherwise such a file is BadInput.
    """

    def __init__(self, train_list, train_path, musan_path, rir_path, num_frames, seed=0, speed_perturb=False, **kwargs):
        self.train_path, self.length, self.seed = train_path, num_frames * 160 + 240, seed
        self.speakers, self.labels, self.names, self.list_digest = read_train_list(train_list)
        self.speeds, self.speed_drawn = SPEEDS if speed_perturb else SPEEDS[:1], speed_perturb == 'drawn'
        self.augmented = kwargs.get('augment', 5 / 6)
        self.n_class = len(self.speeds) * len(self.speakers)
        self.noises = {category: NoiseFiles(os.path.join(musan_path, category)) for category in NOISE_SNR}
        self.rirs = Strings(find_audio(rir_path, '--rir_path'))
        self.bad_audio, self.bad_lines, self.max_bad = None, None, kwargs.get('max_bad', 1.0)

    def __len__(self):
        return len(self.labels) * (1 if self.speed_drawn else len(self.speeds))

    def __getitem__(self, index):
        if isinstance(index, tuple):
            epoch, index = index
            # Python's generator starts and draws single numbers several times faster than NumPy's.
            rng = random.Random(f'{self.seed} {epoch} {index}')
        else:
            rng = random.Random(int(torch.randint(2**63 - 1, ())))
        version, utterance = divmod(index, len(self.labels))
        if self.speed_drawn:
            version = rng.randrange(len(self.speeds))
        speed = self.speeds[version]
        audio = self.read_utterance(utterance, -(-self.length * speed // 100), rng)
        audio = change_rate(audio, speed, 100)[: self.length]
        label = version * len(self.speakers) + int(self.labels[utterance])
        return torch.from_numpy(self.augment(audio, rng)), label

    def augment(self, audio, rng):
        """One of five, equally likely: reverberation, babble, music, noise, television (babble and music); or clean."""
        kind = rng.randrange(6) if self.augmented == 5 / 6 else (rng.random() < self.augmented) * rng.randint(1, 5)
        if kind == 1:
            return self.add_rev(audio, rng)
        for category in ((), (), ('speech',), ('music',), ('noise',), ('speech', 'music'))[kind]:
            audio = self.add_noise(audio, category, rng)
        return audio

    def add_rev(self, audio, rng=None):
        """audio (..., samples) in a room drawn at random."""
        rng = rng or random.Random()
        return reverberate(audio, read_audio(self.rirs[rng.randrange(len(self.rirs))], least=1))

    def add_noise(self, audio, noisecat, rng=None):
        """audio (..., samples) plus clips of 'noise', 'speech' or 'music', each at its own SNR."""
        rng = rng or random.Random()
        level = decibels(audio)
        mixed = np.array(audio, np.float32)
        count = rng.randint(*NOISE_CLIPS[noisecat])
        for noise in self.noises[noisecat].draw(rng, audio.shape[-1], count):
            snr = rng.uniform(*NOISE_SNR[noisecat])
            noise *= np.float32(10 ** ((level - decibels(noise) - snr) / 20))
            mixed += noise
        return mixed

    def path(self, index):
        """Path of an utterance's file."""
        return os.path.join(self.train_path, self.names[index % len(self.labels)])

    def read_utterance(self, utterance, length, rng):
        """`length` samples of an utterance or, where its file cannot be used, of another one of the speaker."""
        try:
            return read_crop(self.path(utterance), length, rng, least=1)
        except BadInput as error:
            if not self.bad_audio:
                raise
            try:
                with open(self.bad_audio, 'a', encoding='utf-8', errors='surrogateescape') as file:
                    file.write(f'{error}\n')
            except OSError as refused:
                raise BadInput(f'{self.bad_audio}: cannot be written ({refused.strerror})') from refused
        # The replacement, too, depends on (seed, epoch, index) alone, so not on which files are known to be bad.
        same = np.flatnonzero(self.labels == self.labels[utterance]).tolist()
        for other in rng.sample(same, len(same)):
            with contextlib.suppress(BadInput):
                return read_crop(self.path(other), length, rng, least=1)
        raise BadInput(f'speaker {self.speakers[self.labels[utterance]]} has no file that can be used: take them out')

    def sort_bad_audio(self):
        """Sorts the lines of the file bad_audio, each once; returns how many were added since the call before, BadInput
        where these are more than max_bad percent (an option) of the utterances of an epoch.
        """
        lines = []
        if os.path.exists(self.bad_audio):
            with open(self.bad_audio, encoding='utf-8', errors='surrogateescape') as file:
                lines = file.read().split('\n')[:-1]
        distinct = sorted(set(lines))
        if lines != distinct:
            write_text(self.bad_audio, ''.join(f'{line}\n' for line in distinct))
        added = 0 if self.bad_lines is None else len(lines) - self.bad_lines
        self.bad_lines = len(distinct)
        if added > len(self) * self.max_bad / 100:
            share = f'more than --max_bad {self.max_bad:g}% of the training files cannot be used'
            where = f'{added} of {len(self)} in this epoch; they are in {self.bad_audio}'
            raise BadInput(f'{share}, {where}, the first:\n{distinct[0]}')
        return added


class NoiseFiles:
    """The recordings below a folder of MUSAN, drawn by their pieces of 5 s: long recordings more often, so that plain
    MUSAN and MUSAN cut in pieces give the same clips. `pieces` are cumulative numbers of pieces, int64.
    """

    def __init__(self, folder):
        paths = find_audio(folder, '--musan_path')
        self.paths = Strings(paths)
        self.pieces = np.cumsum([self.count_pieces(path) for path in tqdm(paths, folder, disable=None, leave=False)])

    @staticmethod
    def count_pieces(path):
        """Pieces of 5 s in a file, one at least."""
        # A 16-bit wav of this size is one piece: MUSAN cut in pieces has 150,000 files, too many to open.
        if path.lower().endswith('.wav') and os.path.exists(path) and os.path.getsize(path) <= 2 * PIECE + 1000:
            return 1
        with open_audio(path) as file:
            return 1 + max(0, file.frames - PIECE) // PIECE_STEP

    def draw(self, rng, length, count):
        """Yields `count` clips, float32 (length,), of different pieces where there are as many."""
        total = int(self.pieces[-1])
        for piece in (rng.choices if count > total else rng.sample)(range(total), k=count):
            index = np.searchsorted(self.pieces, piece, side='right')
            piece -= int(self.pieces[index - 1]) if index else 0
            yield read_crop(self.paths[index], length, rng, piece * PIECE_STEP, PIECE, cached=True)


def reverberate(audio, rir):
    """audio (..., samples) convolved with rir (taps,) scaled to unit energy, cut to the length it had."""
    rir = (rir / np.sqrt(np.sum(rir**2))).reshape((1,) * (audio.ndim - 1) + (-1,))
    return fftconvolve(audio, rir, axes=-1)[..., : audio.shape[-1]].astype(np.float32)


def decibels(audio):
    """Level of audio; the 1e-4 keeps silence from being amplified without bound."""
    return 10 * np.log10(np.vdot(audio, audio) / audio.size + 1e-4)


def change_rate(audio, rate, new_rate):
    """audio (samples,) at `rate` resampled to `new_rate`; played at an unchanged rate, it is slower or faster."""
    if rate == new_rate:
        return audio
    return torchaudio.functional.resample(torch.from_numpy(audio), rate, new_rate).numpy()


class EpochSampler(Sampler):
    """Full batches of the epoch `epoch`, lists of (epoch, index), in an order that depends on seed and epoch alone; of
    several processes, each one's part of every batch. What is left over at the end of an epoch is left out.
    """

    def __init__(self, size, batch_size, seed):
        self.size, self.batch_size, self.seed, self.epoch = size, batch_size, seed, 1

    def __len__(self):
        return self.size // self.batch_size

    def __iter__(self):
        order = np.random.default_rng([self.seed, self.epoch]).permutation(self.size)
        for step in range(len(self)):
            batch = order[step * self.batch_size : (step + 1) * self.batch_size]
            yield [(self.epoch, index) for index in np.split(batch, process_count())[process_rank()].tolist()]


def make_batches(dataset, batch_size, n_cpu, **kwargs):
    """DataLoader of this process's part of full batches; set loader.batch_sampler.epoch before each epoch.

    batch_size: of all processes together, BadInput if it is too large or cannot be divided; kwargs: as DataLoader's.
    """
    if batch_size % process_count():
        raise BadInput(f'--batch_size {batch_size} cannot be divided by the {process_count()} processes')
    if len(dataset) < batch_size:
        found = f'the training list has {len(dataset)} utterances, fewer than one batch'
        raise BadInput(f'{found}: --batch_size {batch_size} must be at most {len(dataset)}')
    sampler = EpochSampler(len(dataset), batch_size, dataset.seed)
    workers = {'num_workers': n_cpu, 'persistent_workers': n_cpu > 0, 'prefetch_factor': 4 if n_cpu else None}
    # A generator of its own, so that starting workers does not move the one that training draws from.
    return DataLoader(dataset, batch_sampler=sampler, generator=torch.Generator(), **workers, **kwargs)


def read_utterance(read, path):
    """An utterance for evaluation, a tensor (samples,); a sentence where read(path, least) raises BadInput."""
    try:
        return torch.from_numpy(read(path, least=SHORTEST))
    except BadInput as error:
        return str(error)


def eval_crops(audio):
    """Five crops of 3 s with evenly spaced starts, (5, 48240), of (samples,); what is shorter is repeated."""
    if len(audio) < EVAL_CROP:
        audio = audio.repeat(-(-EVAL_CROP // len(audio)))[:EVAL_CROP]
    starts = np.linspace(0, len(audio) - EVAL_CROP, num=5).astype(int)
    return torch.stack([audio[start : start + EVAL_CROP] for start in starts])


# Machinery: reading audio files, reading lists, checking both before anything is trained.


def read_audio(path, least=0):
    """All samples of a file, float32 (samples,); BadInput for fewer than `least` or, if that is not 0, for silence."""
    with open_audio(path) as file:
        return require_sound(read_samples(file), path, least)


def read_any(path, least=0):
    """read_audio of any rate and number of channels that soundfile reads, converted to 16 kHz mono with a note."""
    try:
        audio, rate = soundfile.read(os.fsencode(path), dtype='float32', always_2d=True)
    except (soundfile.SoundFileError, TypeError, MemoryError) as error:
        raise BadInput(f'{path}: cannot be read as audio: {why_unreadable(path, error)}') from error
    notes = [f'{audio.shape[1]} channels averaged'] * (audio.shape[1] > 1)
    notes += [f'resampled from {rate} Hz'] * (rate != RATE)
    audio = require_sound(audio, path, 1).mean(axis=1)
    if notes:
        print(f'{path}: {", ".join(notes)}', file=sys.stderr)
    return require_sound(change_rate(audio, rate, RATE), path, least)


def read_crop(path, length, rng, first=0, span=None, cached=False, least=0):
    """`length` samples from a position drawn uniformly, float32 (length,); what is too short is repeated.

    first, span: the part of the file, in samples, that the crop is drawn from if it fits there. cached: remember the
    layout of a file that is read again and again. least: as in read_audio, for a crop of zeros.
    """
    layout, file = known_wav_layout(path) if cached else wav_layout(path), None
    if layout is None:
        file = open_audio(path)
    offset, frames = layout or (0, file.frames)
    spare = min(frames - first, span or frames) - length
    start = first + (rng.randint(0, spare) if spare > 0 else 0)
    if file:
        with file:
            audio = read_samples(file, start, length)
    else:
        try:
            with open(path, 'rb', buffering=0) as file:
                file.seek(offset + 2 * start)
                audio = to_float(np.frombuffer(file.read(2 * min(frames - start, length)), '<i2'))
        except OSError as error:
            raise BadInput(f'{path}: cannot be read ({error.strerror})') from error
    if least and np.vdot(audio, audio) == 0:
        read_audio(path, least)
    return audio if len(audio) == length else np.resize(audio, length)


def wav_layout(path):
    """(offset in bytes, samples) of the audio in a 16-bit mono wav at 16 kHz; None for any other file."""
    if not path.lower().endswith('.wav'):
        return None
    try:
        # The header is parsed faster than by soundfile.
        with open(path, 'rb', buffering=0) as file:
            header = wave.open(file)
            offset, frames = file.tell(), header.getnframes()
            size = os.fstat(file.fileno()).st_size
    except Exception:
        # wave raises half a dozen types for damaged files; libsndfile decides what these are.
        return None
    fits = (header.getframerate(), header.getnchannels(), header.getsampwidth()) == (RATE, 1, 2)
    return (offset, frames) if fits and 0 < frames <= (size - offset) // 2 else None


# Only the layout: a mapped file holds a file descriptor, and MUSAN has more files than a process may have open.
known_wav_layout = functools.lru_cache(maxsize=8192)(wav_layout)


def open_audio(path):
    """soundfile.SoundFile of a 16 kHz mono file; BadInput names the file and what is wrong with it."""
    try:
        file = soundfile.SoundFile(os.fsencode(path))
    except (soundfile.SoundFileError, TypeError) as error:  # TypeError for a name that ends in .raw
        raise BadInput(f'{path}: cannot be read as audio: {why_unreadable(path, error)}') from error
    fault, announced = '', CUT_SHORT.search(file.extra_info)
    if (file.samplerate, file.channels) != (RATE, 1):
        found = f'{file.samplerate} Hz with {file.channels} channel{"s" * (file.channels > 1)}'
        fault = f'audio must be 16000 Hz with 1 channel, this is {found} (ffmpeg -ar 16000 -ac 1)'
    elif announced and int(announced[1]) < 2**31 - 2**16:  # more than that is what programs write that stream
        fault = f'is cut short: {announced[1]} bytes of audio are announced, {announced[2]} are there'
    elif file.frames == 0:
        fault = 'has no samples'
    if fault:
        file.close()
        raise BadInput(f'{path}: {fault}')
    return file


def why_unreadable(path, error):
    """libsndfile's reason, which for a missing file is no more than "System error"."""
    return getattr(error, 'error_string', str(error)) if os.path.exists(path) else 'no such file'


def read_samples(file, start=0, count=-1):
    """Samples of an open file from `start` on, all or `count` of them; BadInput where it ends before."""
    path, expected = os.fsdecode(file.name), file.frames - start if count < 0 else min(count, file.frames - start)
    try:
        file.seek(start)
        # libsndfile converts 16 bits to float more slowly than NumPy does.
        audio = to_float(file.read(expected, dtype='int16' if file.subtype == 'PCM_16' else 'float32'))
    except (soundfile.SoundFileError, MemoryError) as error:
        why = getattr(error, 'error_string', 'its header announces more samples than memory holds')
        raise BadInput(f'{path}: cannot be decoded: {why}') from error
    if len(audio) < expected:
        raise BadInput(f'{path}: ends before the {file.frames} samples that its header announces')
    return require_sound(audio, path)


def to_float(samples):
    """16-bit or float samples as float32 in [-1, 1]."""
    audio = samples.astype(np.float32)
    if samples.dtype == np.int16:
        audio *= np.float32(1 / 32768)
    return audio


def require_sound(audio, path, least=0):
    """The samples of a file; BadInput as read_audio says, or where a number is not finite."""
    if not np.isfinite(np.vdot(audio, audio)):
        raise BadInput(f'{path}: holds samples that are not finite, or huge')
    if len(audio) < least:
        found = f'{len(audio)} samples; {least} ({1000 * least // RATE} ms) are the fewest that can be embedded'
        raise BadInput(f'{path}: has {found if len(audio) else "no samples"}')
    if least and not audio.any():
        raise BadInput(f'{path}: is silent from beginning to end')
    return audio


def find_audio(folder, role, any_format=False):
    """Sorted paths of all wav and flac files below a folder, or all that soundfile reads; BadInput for none."""
    endings = ('.wav', '.flac')
    if any_format:
        known = {f'.{name.lower()}' for name in soundfile.available_formats()} - {'.raw'}
        endings = tuple(sorted(known | {'.aif', '.oga', '.opus', '.sph'}))
    require(os.path.isdir, folder, role)
    found = (os.path.join(root, name) for root, _, names in os.walk(folder, followlinks=True) for name in names)
    paths = sorted(path for path in found if path.lower().endswith(endings))
    if not paths:
        raise BadInput(f'{role}: no {" or ".join(endings)} file below {folder}')
    return paths


def require(exists, path, role):
    """Raises BadInput unless exists(path), os.path.isfile or isdir; `role` is the option that named it."""
    if exists(path):
        return
    message = f'{role}: {path}: no such {"file" if exists is os.path.isfile else "folder"}'
    if path.startswith('data/') and not os.path.exists('data'):
        message += (
            "\nThere is no folder data/ here. README.md, 'Data', says where VoxCeleb, MUSAN and the RIRs come from "
            'and how to lay them out. Without any, `bash exps/demo/run.sh` shows it all at work on synthetic voices.'
        )
    raise BadInput(message)


class Strings:
    """Many strings in two objects: forked workers would copy a list, as reading a string counts its references."""

    def __init__(self, strings):
        encoded = [os.fsencode(string) for string in strings]
        self.ends = np.cumsum([0, *map(len, encoded)])
        self.bytes = b''.join(encoded)

    def __len__(self):
        return len(self.ends) - 1

    def __getitem__(self, index):
        return os.fsdecode(self.bytes[self.ends[index] : self.ends[index + 1]])


class TrialList(NamedTuple):
    """A trial list: labels int8 (N,), 1 for the same speaker; pairs int32 (N, 2), enrolment and test, of indices into
    `names`, the models and files as the list names them; rows int32: where the files of each are among the files of all
    lists, those of the next from `starts` (names,) on.
    """

    path: str
    digest: str
    labels: np.ndarray
    pairs: np.ndarray
    names: list
    rows: np.ndarray
    starts: np.ndarray

    def mean(self, values):
        """Of each of the names: the mean over its files of values (files, ...)."""
        if len(self.starts) == len(self.rows):
            return values[self.rows]
        counts = np.diff(self.starts, append=len(self.rows)).astype(values.dtype)
        return np.add.reduceat(values[self.rows], self.starts) / counts.reshape(-1, *[1] * (values.ndim - 1))

    def fingerprint(self):
        """SHA-256 of its trials, whatever their order, and however their labels are written."""
        return digest(
            os.fsencode('\n'.join(sorted(f'{self.names[a]} {self.names[b]}' for a, b in self.pairs.tolist())))
        )


def read_train_list(path):
    """Reads lines `speaker path`: (sorted speakers, labels int32 (N,), paths Strings, SHA-256 of the list)."""
    content, index, labels, names = read_list(path, '--train_list'), {}, array('i'), []
    for speaker, name in split_lines(content, 2, path, '--train_list'):
        labels.append(index.setdefault(speaker, len(index)))
        names.append(name)
    speakers = sorted(index)
    rank = np.empty(len(index), np.int32)
    rank[[index[speaker] for speaker in speakers]] = np.arange(len(index))
    return [os.fsdecode(speaker) for speaker in speakers], rank[np.array(labels)], Strings(names), digest(content)


def read_trial_lists(lists, folders, enrol_list=''):
    """Reads lines `label enrolment test`, or with the label last, of several lists: (paths of all files, [TrialList]).

    folders: one for all lists, or one for each. enrol_list: lines `model utterance...`, one or several of a model; if
    given, enrolments name these models. A file that several lists name is there once. Raises BadInput.
    """
    if len(set(map(str, lists))) < len(lists):
        raise BadInput('--eval_list: names a list twice, whose results would be one')
    if len(folders) not in (1, len(lists)):
        raise BadInput(f'--eval_path: {len(folders)} folders for {len(lists)} lists; give one, or one for each')
    models, places, trials, enrolments = {}, {}, [], b''
    if enrol_list:
        enrolments = read_list(enrol_list, '--enrol_list')
        for model, *names in split_lines(enrolments, 2, enrol_list, '--enrol_list', more=True):
            models.setdefault(model, []).extend(names)
    for path, folder in zip(lists, folders * (len(lists) // len(folders))):
        require(os.path.isdir, folder, '--eval_path')
        content, index, labels, pairs = read_list(path, '--eval_list'), {}, array('b'), array('i')
        ends = [
            (fields[-1] in LABELS) - (fields[0] in LABELS)
            for fields in map(bytes.split, content.splitlines())
            if fields
        ]
        at = 2 if sum(ends) > 0 else 0
        known = {at: LABELS, **({1 if at == 0 else 0: models} if models else {})}
        for fields in split_lines(content, 3, path, '--eval_list', known):
            labels.append(LABELS[fields.pop(at)])
            # A model may be called as a file is.
            names = [(fields[0],), fields[1]] if models else fields
            pairs.extend([index.setdefault(name, len(index)) for name in names])
        labels = np.array(labels)
        if labels.min() == labels.max():
            raise BadInput(f'--eval_list: {path}: needs trials of both kinds, 1 and 0, for an error rate')
        files = [models[name[0]] if isinstance(name, tuple) else [name] for name in index]
        starts = np.cumsum([0, *map(len, files)])[:-1]
        files = [os.path.join(folder, os.fsdecode(file)) for each in files for file in each]
        rows = np.array([places.setdefault(file, len(places)) for file in files], np.int32)
        names = [os.fsdecode(name[0] if isinstance(name, tuple) else name) for name in index]
        pairs = np.array(pairs).reshape(-1, 2)
        trials.append(TrialList(path, digest(content + enrolments), labels, pairs, names, rows, starts))
    return list(places), trials


def choose_normalisation(score_norm, top_n, subtract_mean, train_list, train_path, cohort_utterances, seed, **kwargs):
    """(choose_cohort or None, top_n or None, subtract_mean) of the command's options, as score_lists takes them."""
    top_n, files = top_n if score_norm == 'asnorm' else None, None
    if top_n or subtract_mean:
        files = choose_cohort(train_list, train_path, cohort_utterances, seed)
    return files, top_n, subtract_mean


def choose_cohort(train_list, train_path, per_speaker, seed):
    """For each speaker of a training list the paths of up to per_speaker utterances, drawn at random."""
    require(os.path.isdir, train_path, '--train_path')
    _, labels, names, _ = read_train_list(train_list)
    speakers = np.split(np.argsort(labels, kind='stable'), np.cumsum(np.bincount(labels))[:-1])
    rng = np.random.default_rng(seed)
    chosen = [rng.permutation(utterances)[:per_speaker] for utterances in speakers]
    return [[os.path.join(train_path, names[i]) for i in utterances] for utterances in chosen]


def read_list(path, role):
    """Bytes of a text list; BadInput where there is none, or it begins with a mark that would count as text."""
    require(os.path.isfile, path, role)
    with open(path, 'rb') as file:
        content = file.read()
    if content.startswith(codecs.BOM_UTF8):
        raise BadInput(f'{role}: {path}: begins with a byte order mark; save it as UTF-8 without')
    return content


def split_lines(content, count, path, role, known=None, more=False):
    """Yields the fields, bytes, of each line that is not blank: `count` of them, or `more`.

    known: {number of a field: what it may be}. Raises BadInput that shows the first 20 lines that are otherwise; and
    where there is no line.
    """
    faults, found = [], False
    for number, line in enumerate(io.BytesIO(content), 1):
        fields = line.split()
        fits = len(fields) == count or (more and len(fields) > count)
        if fits and (known is None or all(fields[i] in values for i, values in known.items())):
            found = True
            yield fields
        elif fields and len(faults) < 20:
            wrong = f'{count} fields expected, {len(fields)} found'
            if fits:
                at = next(i for i, values in known.items() if fields[i] not in values)
                wrong = 'a label is 1 or target (same speaker), 0 or nontarget, at the same end of every line'
                wrong = wrong if known[at] is LABELS else f'--enrol_list has no model {os.fsdecode(fields[at])}'
            faults.append(f'{path}, line {number}: {wrong}: {line.decode(errors="replace").strip()[:80]!r}')
    if faults:
        raise BadInput('\n'.join([f'{role}: lines that cannot be read:', *faults]))
    if not found:
        raise BadInput(f'{role}: {path}: the file is empty')


def check_data(dataset, eval_files, eval_path, every_file, n_cpu, max_bad):
    """Looks at the audio of a train_loader and of the trials (paths eval_files, below the folders eval_path): opens all
    files of the trials, and reads a sample of the others; or reads every file. Prints what is found; BadInput names the
    faulty ones, of the training files where they are more than max_bad percent.
    """
    require(os.path.isdir, dataset.train_path, '--train_path')
    # All of VoxCeleb2 would take an hour; a wrong folder or rate shows in a sample.
    chosen = np.random.default_rng(dataset.seed).permutation(len(dataset.labels))
    chosen = np.sort(chosen[: None if every_file else 200])
    sound = functools.partial(read_audio, least=1)
    faults = check_audio([dataset.path(i) for i in chosen], '--train_list', sound, n_cpu, max_bad)
    if faults:
        found = f'note          {len(faults)} of {len(chosen)} training files cannot be used and will be replaced:'
        say('\n'.join([found, *faults[:20]]))
    n_cpu = n_cpu if every_file else 0
    noises = [('--musan_path', list(files.paths), read_audio) for files in dataset.noises.values()]
    for role, paths, read in [*noises, ('--rir_path', list(dataset.rirs), sound)]:
        check_audio(paths if every_file else paths[:: len(paths) // 100 + 1], role, read, n_cpu)
    whole = functools.partial(read_audio, least=SHORTEST)
    check_audio(eval_files, '--eval_list', whole if every_file else open_audio, n_cpu)
    scored = {os.path.relpath(file, folder).split(os.sep)[0] for folder in eval_path for file in eval_files}
    both = sorted(scored.intersection(dataset.speakers))
    if both:
        found = f'{len(both)} speakers are in --train_list and in --eval_list ({", ".join(both[:5])}, ...)'
        say(f'WARNING       {found}: the EER will be too good')


def check_audio(paths, role, read=open_audio, n_cpu=0, max_bad=0):
    """What is wrong with files, as lines: what read(path) raises as BadInput, in n_cpu processes. Raises BadInput that
    names the first 20 faulty ones if they are over max_bad percent.
    """
    found = DataLoader(paths, batch_size=None, num_workers=n_cpu, collate_fn=functools.partial(fault_of, read))
    found = tqdm(found, f'checking {role}', len(paths), unit='file', disable=None, leave=False)
    faults = [line for line in found if line]
    if len(faults) > len(paths) * max_bad / 100:
        summary = f'{role}: {len(faults)} of {len(paths)} files checked cannot be used, the first:'
        raise BadInput('\n'.join([summary, *faults[:20]]))
    return faults


def fault_of(read, path):
    """What read(path) raises as BadInput, as text; '' for nothing."""
    try:
        read(path)
    except BadInput as error:
        return str(error)
    return ''
