"""Audio on disk: training and trial lists, crops, MUSAN and RIR augmentation, evaluation utterances, checks.

All audio is 16 kHz and mono, as float32 in [-1, 1].
"""

import os
from array import array

import numpy as np
import soundfile
import torch
from scipy.signal import fftconvolve
from torch.utils.data import DataLoader, Dataset, Sampler
from tqdm import tqdm

from tools import BadInput

RATE = 16000
EVAL_CROP = 300 * 160 + 240
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
        self.speakers, self.labels, self.names, self.ends = read_train_list(train_list)
        self.noises = {
            category: find_audio(os.path.join(musan_path, category), '--musan_path') for category in NOISE_SNR
        }
        self.rirs = find_audio(rir_path, '--rir_path')

    def __len__(self):
        return len(self.labels)

    def path(self, index):
        """Path of an utterance's file."""
        name = self.names[self.ends[index] : self.ends[index + 1]]
        return os.path.join(self.train_path, os.fsdecode(name))

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
        files = self.noises[noisecat]
        count = rng.integers(*NOISE_CLIPS[noisecat], endpoint=True)
        mixed = audio
        for choice in rng.choice(len(files), count, replace=count > len(files)):
            noise = read_crop(files[choice], audio.shape[-1], rng)
            mixed = mixed + noise * gain(audio, noise, rng.uniform(*NOISE_SNR[noisecat]))
        return mixed


class EpochSampler(Sampler):
    """Every utterance once an epoch, as (epoch, index), in an order that depends on seed and epoch alone."""

    def __init__(self, size, seed):
        self.size = size
        self.seed = seed
        self.epoch = 1

    def set_epoch(self, epoch):
        """Chooses the epoch that the next iteration goes through."""
        self.epoch = epoch

    def __len__(self):
        return self.size

    def __iter__(self):
        order = np.random.default_rng([self.seed, self.epoch]).permutation(self.size)
        return ((self.epoch, index) for index in order.tolist())


def make_batches(dataset, batch_size, n_cpu):
    """DataLoader over `dataset` in full batches; loader.sampler.set_epoch(epoch) before each epoch.

    Raises BadInput where the list has fewer utterances than a batch.
    """
    if len(dataset) < batch_size:
        raise BadInput(
            f'the training list has {len(dataset)} utterances, fewer than one batch: '
            f'--batch_size {batch_size} must be at most {len(dataset)}'
        )
    return DataLoader(
        dataset,
        batch_size=batch_size,
        sampler=EpochSampler(len(dataset), dataset.seed),
        num_workers=n_cpu,
        persistent_workers=n_cpu > 0,
        drop_last=True,
        # Its own, so that starting workers does not move the generator that training draws from.
        generator=torch.Generator(),
    )


def reverberate(audio, rir):
    """audio (..., samples) convolved with rir (taps,) scaled to unit energy, cut to the length it had."""
    rir = rir / np.sqrt(np.sum(rir**2))
    rir = rir.reshape((1,) * (audio.ndim - 1) + (-1,))
    return fftconvolve(audio, rir, axes=-1)[..., : audio.shape[-1]].astype(np.float32)


def gain(audio, noise, snr):
    """Factor that puts `noise` snr dB below `audio`; the 1e-4 keeps silence from being amplified without bound."""
    level, noise_level = (10 * np.log10(np.mean(x**2) + 1e-4) for x in (audio, noise))
    return np.float32(np.sqrt(10 ** ((level - noise_level - snr) / 10)))


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


def read_crop(path, length, rng):
    """`length` samples from a position drawn uniformly; a shorter file is wrapped round. float32 (length,)."""
    with open_audio(path) as file:
        spare = file.frames - length
        start = rng.integers(spare, endpoint=True) if spare > 0 else 0
        return np.resize(read_samples(file, start, length), length)


def read_samples(file, start=0, count=-1):
    """Samples of an open file from `start` on, all or `count` of them; BadInput where it ends before."""
    try:
        file.seek(start)
        audio = file.read(count, dtype='float32')
    except soundfile.LibsndfileError as error:
        raise BadInput(f'{file.name}: cannot be decoded: {error.error_string}') from error
    if len(audio) == 0:
        raise BadInput(f'{file.name}: ends before the {file.frames} samples that its header announces')
    return audio


def read_eval_utterance(path):
    """(whole utterance (1, samples), five crops of 3 s with evenly spaced starts (5, 48240)) as tensors."""
    audio = read_audio(path)
    wrapped = np.resize(audio, max(len(audio), EVAL_CROP))
    starts = np.linspace(0, len(wrapped) - EVAL_CROP, num=5).astype(int)
    crops = np.stack([wrapped[start : start + EVAL_CROP] for start in starts])
    return torch.from_numpy(audio)[None], torch.from_numpy(crops)


def read_fields(path, count, role):
    """Yields (line number, fields) of a text list; BadInput where a line has not `count` fields."""
    require(os.path.isfile, path, role)
    if os.path.getsize(path) == 0:
        raise BadInput(f'{role}: {path}: the file is empty')
    with open(path, 'rb') as lines:
        for number, line in enumerate(lines, 1):
            fields = line.split()
            if len(fields) != count:
                line = line.decode(errors='replace').strip()
                raise BadInput(f'{path}, line {number}: {count} fields expected, {len(fields)} found: {line[:100]!r}')
            yield number, fields


def read_train_list(path):
    """Reads lines `speaker path`: (sorted speakers, labels int32 (N,), names, ends int64 (N + 1,)).

    Utterance i is of speakers[labels[i]], its path names[ends[i] : ends[i + 1]]: a million utterances stay three
    objects, which forked workers share.
    """
    index, labels, names, ends = {}, array('i'), bytearray(), array('q', [0])
    for _, (speaker, name) in read_fields(path, 2, '--train_list'):
        labels.append(index.setdefault(speaker, len(index)))
        names += name
        ends.append(len(names))
    speakers = sorted(index)
    rank = np.empty(len(index), np.int32)
    rank[[index[speaker] for speaker in speakers]] = np.arange(len(index))
    return [os.fsdecode(s) for s in speakers], rank[np.array(labels, int)], bytes(names), np.array(ends, np.int64)


def read_trials(path):
    """Reads lines `label enrolment test`: (files, labels int8 (N,), pairs int32 (N, 2) of indices into files)."""
    index, labels, pairs = {}, array('b'), array('i')
    for number, (label, *names) in read_fields(path, 3, '--eval_list'):
        if label not in (b'0', b'1'):
            raise BadInput(f'{path}, line {number}: the first field must be 1 (same speaker) or 0, not {label!r}')
        labels.append(int(label))
        pairs.extend(index.setdefault(name, len(index)) for name in names)
    labels = np.array(labels, np.int8)
    if len(set(labels.tolist())) < 2:
        raise BadInput(f'{path}: needs trials of both kinds, 1 and 0, for an error rate')
    return [os.fsdecode(name) for name in index], labels, np.array(pairs, np.int32).reshape(-1, 2)


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
