"""Audio on disk: training and trial lists, crops, MUSAN and RIR augmentation, evaluation utterances, checks.

All audio is 16 kHz and mono, as float32 in [-1, 1].
"""

import contextlib
import functools
import os
import warnings
from array import array

import numpy as np
import soundfile
import torch
from scipy.io import wavfile
from scipy.signal import fftconvolve
from torch.utils.data import DataLoader, Dataset, Sampler
from tqdm import tqdm

from tools import BadInput, process_count, process_rank

RATE = 16000
EVAL_CROP = 300 * 160 + 240
PIECE, PIECE_STEP = 5 * RATE, 3 * RATE  # a noise recording counts as its pieces of 5 s, one every 3 s
NOISE_SNR = {'noise': (0, 15), 'speech': (13, 20), 'music': (5, 15)}  # dB, each clip against the utterance
NOISE_CLIPS = {'noise': (1, 1), 'speech': (3, 8), 'music': (1, 1)}  # fewest and most clips mixed in


class train_loader(Dataset):
    """Random augmented crops of the training utterances: (FloatTensor (num_frames * 160 + 240,), int label).

    train_list: lines `speaker path`, paths below train_path; musan_path: MUSAN, split in pieces or not; rir_path: room
    impulse responses. A label is the speaker's index in `speakers`, the sorted speakers of the list.

    dataset[index] draws from torch's generator, as any dataset; dataset[epoch, index] depends on seed, epoch and index
    alone. Raises BadInput for lists and folders that cannot be used, and for audio when it is read.
    """

    def __init__(self, train_list, train_path, musan_path, rir_path, num_frames, seed=0, **kwargs):
        self.train_path = train_path
        self.length = num_frames * 160 + 240
        self.seed = seed
        self.speakers, self.labels, self.names = read_train_list(train_list)
        self.noises = {category: NoiseFiles(os.path.join(musan_path, category)) for category in NOISE_SNR}
        self.rirs = Strings(find_audio(rir_path, '--rir_path'))

    def __len__(self):
        return len(self.labels)

    def path(self, index):
        """Path of an utterance's file."""
        return os.path.join(self.train_path, self.names[index])

    def __getitem__(self, index):
        if isinstance(index, tuple):
            rng = np.random.default_rng([self.seed, *index])
            index = index[1]
        else:
            rng = np.random.default_rng(torch.randint(2**31, (2,)).tolist())
        audio = read_crop(self.path(index), self.length, rng)
        return torch.from_numpy(self.augment(audio, rng)), int(self.labels[index])

    def augment(self, audio, rng):
        """One of six, equally likely: clean, reverberation, babble, music, noise, television (babble and music)."""
        kind = rng.integers(6)
        if kind == 1:
            return self.add_rev(audio, rng)
        for category in ((), (), ('speech',), ('music',), ('noise',), ('speech', 'music'))[kind]:
            audio = self.add_noise(audio, category, rng)
        return audio

    def add_rev(self, audio, rng=None):
        """audio (..., samples) in a room drawn at random."""
        rng = rng or np.random.default_rng()
        return reverberate(audio, read_audio(self.rirs[rng.integers(len(self.rirs))]))

    def add_noise(self, audio, noisecat, rng=None):
        """audio (..., samples) plus clips of 'noise', 'speech' or 'music', each at its own SNR."""
        rng = rng or np.random.default_rng()
        level = decibels(audio)
        mixed = np.array(audio, np.float32)
        count = rng.integers(*NOISE_CLIPS[noisecat], endpoint=True)
        for noise in self.noises[noisecat].draw(rng, audio.shape[-1], count):
            snr = rng.uniform(*NOISE_SNR[noisecat])
            noise *= np.float32(10 ** ((level - decibels(noise) - snr) / 20))
            mixed += noise
        return mixed


class Strings:
    """Many strings in two objects: a list of them would be copied to every forked worker, page by page, as reading a
    string changes its reference count.
    """

    def __init__(self, strings=()):
        self.bytes = bytearray()
        self.ends = array('q', [0])
        self.extend([os.fsencode(string) for string in strings])

    def extend(self, strings):
        """Appends a list of strings given as bytes."""
        lengths = np.fromiter(map(len, strings), np.int64, len(strings))
        self.ends.frombytes((self.ends[-1] + np.cumsum(lengths)).tobytes())
        self.bytes += b''.join(strings)

    def __len__(self):
        return len(self.ends) - 1

    def __getitem__(self, index):
        if index >= len(self):
            raise IndexError(index)
        return os.fsdecode(bytes(self.bytes[self.ends[index] : self.ends[index + 1]]))


class NoiseFiles:
    """The recordings below a folder of MUSAN, drawn as their pieces of 5 s are: long recordings more often.

    So plain MUSAN and MUSAN cut in pieces give the same clips. `pieces` are cumulative numbers of pieces, int64.
    """

    def __init__(self, folder):
        paths = find_audio(folder, '--musan_path')
        self.paths = Strings(paths)
        self.pieces = np.cumsum([self.count_pieces(path) for path in tqdm(paths, folder, disable=None, leave=False)])

    @staticmethod
    def count_pieces(path):
        """Pieces of 5 s in a file, one at least."""
        # A 16-bit wav of this size is one piece: MUSAN cut in pieces has 150,000 files, too many to open.
        if path.lower().endswith('.wav') and os.path.getsize(path) <= 2 * PIECE + 1000:
            return 1
        with open_audio(path) as file:
            return 1 + max(0, file.frames - PIECE) // PIECE_STEP

    def __len__(self):
        return len(self.paths)

    def draw(self, rng, length, count):
        """Yields `count` clips, float32 (length,), of different pieces where there are as many."""
        total = int(self.pieces[-1])
        for piece in rng.choice(total, count, replace=count > total):
            index = np.searchsorted(self.pieces, piece, side='right')
            piece -= self.pieces[index - 1] if index else 0
            yield read_crop(self.paths[index], length, rng, piece * PIECE_STEP, PIECE, cached=True)


class EpochSampler(Sampler):
    """Full batches of an epoch, lists of (epoch, index), in an order that depends on seed and epoch alone.

    Each of several processes gets its part of every batch. What is left over at the end of an epoch is left out.
    """

    def __init__(self, size, batch_size, seed):
        self.size = size
        self.batch_size = batch_size
        self.seed = seed
        self.epoch = 1

    def set_epoch(self, epoch):
        """Chooses the epoch that the next iteration goes through."""
        self.epoch = epoch

    def __len__(self):
        return self.size // self.batch_size

    def __iter__(self):
        order = np.random.default_rng([self.seed, self.epoch]).permutation(self.size)
        for step in range(len(self)):
            batch = order[step * self.batch_size : (step + 1) * self.batch_size]
            yield [(self.epoch, index) for index in np.split(batch, process_count())[process_rank()].tolist()]


def make_batches(dataset, batch_size, n_cpu, **kwargs):
    """DataLoader of this process's part of full batches; loader.batch_sampler.set_epoch(epoch) before each epoch.

    batch_size: of all processes together. Raises BadInput where the list has fewer utterances than a batch, or a batch
    cannot be divided.
    """
    if batch_size % process_count():
        raise BadInput(f'--batch_size {batch_size} cannot be divided by the {process_count()} processes')
    if len(dataset) < batch_size:
        raise BadInput(
            f'the training list has {len(dataset)} utterances, fewer than one batch: '
            f'--batch_size {batch_size} must be at most {len(dataset)}'
        )
    return DataLoader(
        dataset,
        batch_sampler=EpochSampler(len(dataset), batch_size, dataset.seed),
        num_workers=n_cpu,
        persistent_workers=n_cpu > 0,
        prefetch_factor=4 if n_cpu else None,
        pin_memory=torch.cuda.is_available(),
        # Its own, so that starting workers does not move the generator that training draws from.
        generator=torch.Generator(),
        **kwargs,
    )


def reverberate(audio, rir):
    """audio (..., samples) convolved with rir (taps,) scaled to unit energy, cut to the length it had."""
    rir = rir / np.sqrt(np.sum(rir**2))
    rir = rir.reshape((1,) * (audio.ndim - 1) + (-1,))
    return fftconvolve(audio, rir, axes=-1)[..., : audio.shape[-1]].astype(np.float32)


def decibels(audio):
    """Level of audio; the 1e-4 keeps silence from being amplified without bound."""
    return 10 * np.log10(np.vdot(audio, audio) / audio.size + 1e-4)


def open_audio(path):
    """soundfile.SoundFile of a 16 kHz mono file; BadInput names the file and what is wrong with it."""
    try:
        file = soundfile.SoundFile(path)
    except soundfile.LibsndfileError as error:
        why = error.error_string if os.path.exists(path) else 'no such file'
        raise BadInput(f'{path}: cannot be read as audio: {why}') from error
    if (file.samplerate, file.channels) != (RATE, 1):
        with file:
            found = f'{file.samplerate} Hz with {file.channels} channel{"s" * (file.channels > 1)}'
        raise BadInput(f'{path}: audio must be 16000 Hz with 1 channel, this is {found} (ffmpeg -ar 16000 -ac 1)')
    if file.frames == 0:
        file.close()
        raise BadInput(f'{path}: has no samples')
    return file


def read_audio(path):
    """All samples of a file, float32 (samples,)."""
    with open_audio(path) as file:
        return read_samples(file)


def read_crop(path, length, rng, first=0, span=None, cached=False):
    """`length` samples from a position drawn uniformly, float32 (length,); what is too short is wrapped round.

    first, span: the part of the file, in samples, that the crop is drawn from if it fits there. cached: remember how
    the file is laid out, for files that are read again and again.
    """
    layout = wav_layout(path) if cached else None
    with open_audio(path) if layout is None else contextlib.nullcontext() as file:
        frames = file.frames if layout is None else layout[2]
        spare = min(frames - first, span or frames) - length
        start = first + (rng.integers(spare, endpoint=True) if spare > 0 else 0)
        if layout is None:
            return np.resize(read_samples(file, start, length), length)
    offset, dtype, _ = layout
    return np.resize(to_float(np.fromfile(path, dtype, length, offset=offset + start * dtype.itemsize)), length)


@functools.lru_cache(maxsize=8192)
def wav_layout(path):
    """(offset in bytes, dtype, samples) of the audio in a 16-bit or float wav; None for any other file.

    Only the layout is kept: a file that stays mapped into memory would hold a file descriptor, and MUSAN has more files
    than a process may have open.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter('ignore', wavfile.WavFileWarning)
            rate, samples = wavfile.read(path, mmap=True)
    except (OSError, ValueError):
        return None
    fits = rate == RATE and samples.ndim == 1 and len(samples) and samples.dtype in (np.int16, np.float32)
    return (samples.offset, samples.dtype, len(samples)) if fits else None


def to_float(samples):
    """16-bit or float samples as float32 in [-1, 1]."""
    audio = samples.astype(np.float32)
    if samples.dtype == np.int16:
        audio *= np.float32(1 / 32768)
    return audio


def read_samples(file, start=0, count=-1):
    """Samples of an open file from `start` on, all or `count` of them; BadInput where it ends before."""
    try:
        file.seek(start)
        # libsndfile converts 16 bits to float more slowly than NumPy does.
        audio = to_float(file.read(count, dtype='int16' if file.subtype == 'PCM_16' else 'float32'))
    except soundfile.LibsndfileError as error:
        raise BadInput(f'{file.name}: cannot be decoded: {error.error_string}') from error
    if len(audio) == 0:
        raise BadInput(f'{file.name}: ends before the {file.frames} samples that its header announces')
    return audio


class EvalUtterances(Dataset):
    """Whole files, as tensors (samples,)."""

    def __init__(self, paths):
        self.paths = Strings(paths)

    def __len__(self):
        return len(self.paths)

    def __getitem__(self, index):
        return torch.from_numpy(read_audio(self.paths[index]))


def eval_crops(audio):
    """Five crops of 3 s with evenly spaced starts, (5, 48240), of (samples,); what is shorter is wrapped round."""
    if len(audio) < EVAL_CROP:
        audio = audio.repeat(-(-EVAL_CROP // len(audio)))[:EVAL_CROP]
    starts = np.linspace(0, len(audio) - EVAL_CROP, num=5).astype(int)
    return torch.stack([audio[start : start + EVAL_CROP] for start in starts])


def read_fields(path, count, role):
    """Yields (line numbers int64 (n,), fields, n * count bytes objects) of a text list, part by part.

    Blank lines are passed over. Raises BadInput that shows the first 20 lines with more or fewer fields.
    """
    require(os.path.isfile, path, role)
    space, done = np.isin(np.arange(256), list(b' \t\n\r\v\f')), 0
    with open(path, 'rb') as file:
        while lines := file.readlines(1 << 22):
            part = b''.join(lines)
            blank = space[np.frombuffer(part, np.uint8)]
            begins = ~blank & np.concatenate([[True], blank[:-1]])
            starts = np.cumsum([0, *map(len, lines[:-1])])
            found = np.add.reduceat(begins, starts, dtype=np.int64)
            bad = np.flatnonzero((found != count) & (found != 0))
            if len(bad):
                shown = (f'line {done + i + 1}, {found[i]}: {lines[i].decode(errors="replace").strip()[:80]!r}'
                         for i in bad[:20])  # fmt: skip
                raise BadInput('\n'.join([f'{role}: {path}: {count} fields a line are expected, but', *shown]))
            yield done + 1 + np.flatnonzero(found), part.split()
            done += len(lines)


def number_names(index, names):
    """Numbers (n,) of names in the dictionary `index`, to which new names are added."""
    for name in dict.fromkeys(names):
        index.setdefault(name, len(index))
    return np.fromiter(map(index.__getitem__, names), np.int32, len(names))


def read_train_list(path):
    """Reads lines `speaker path`: (sorted speakers, labels int32 (N,), paths Strings)."""
    index, labels, names = {}, [np.empty(0, np.int32)], Strings()
    for _, fields in read_fields(path, 2, '--train_list'):
        labels.append(number_names(index, fields[::2]))
        names.extend(fields[1::2])
    if not index:
        raise BadInput(f'--train_list: {path}: the file is empty')
    speakers = sorted(index)
    rank = np.empty(len(index), np.int32)
    rank[[index[speaker] for speaker in speakers]] = np.arange(len(index))
    return [os.fsdecode(speaker) for speaker in speakers], rank[np.concatenate(labels)], names


def read_trials(path):
    """Reads lines `label enrolment test`: (files, labels int8 (N,), pairs int32 (N, 2) of indices into files)."""
    index, labels, pairs = {}, [], []
    for numbers, fields in read_fields(path, 3, '--eval_list'):
        for number, label in zip(numbers, fields[::3]):
            if label not in (b'0', b'1'):
                label = os.fsdecode(label)
                raise BadInput(f'--eval_list: {path}, line {number}: a label is 1 (same speaker) or 0, not {label!r}')
        labels.append(np.array(fields[::3]) == b'1')
        pairs.append(np.stack([number_names(index, fields[side::3]) for side in (1, 2)], axis=1))
    if not index:
        raise BadInput(f'--eval_list: {path}: the file is empty')
    labels = np.concatenate(labels).astype(np.int8)
    if labels.min() == labels.max():
        raise BadInput(f'--eval_list: {path}: needs trials of both kinds, 1 and 0, for an error rate')
    return [os.fsdecode(name) for name in index], labels, np.concatenate(pairs)


def find_audio(folder, role):
    """Sorted paths of all wav and flac files below a folder; BadInput if there are none."""
    require(os.path.isdir, folder, role)
    paths = sorted(
        os.path.join(root, name)
        for root, _, names in os.walk(folder, followlinks=True)
        for name in names
        if name.lower().endswith(('.wav', '.flac'))
    )
    if not paths:
        raise BadInput(f'{role}: no .wav or .flac file below {folder}')
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


def check_audio(paths, role):
    """Opens files and raises one BadInput that names the first 20 which are missing or not 16 kHz mono audio."""
    complaints = []
    for path in tqdm(paths, desc=f'checking {role}', unit='file', disable=None, leave=False):
        try:
            open_audio(path).close()
        except BadInput as error:
            complaints.append(str(error))
    if complaints:
        summary = f'{role}: {len(complaints)} of {len(paths)} files checked cannot be used, the first:'
        raise BadInput('\n'.join([summary, *complaints[:20]]))
