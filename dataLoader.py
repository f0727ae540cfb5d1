"""Audio on disk: training and trial lists, crops, MUSAN and RIR augmentation, evaluation utterances, checks.

All audio is 16 kHz and mono, as float32 in [-1, 1].
"""

import argparse
import collections
import functools
import multiprocessing
import os
import random
import re
import sys
import wave
from array import array

import numpy as np
import soundfile
import torch
import torchaudio
from scipy.signal import fftconvolve
from torch.utils.data import DataLoader, Dataset, Sampler
from tqdm import tqdm

from tools import BadInput, exit_on_bad_input, process_count, process_rank, write_text

RATE = 16000
EVAL_CROP = 300 * 160 + 240
PIECE, PIECE_STEP = 5 * RATE, 3 * RATE  # a noise recording counts as its pieces of 5 s, one every 3 s
SPEEDS = (100, 90, 110)  # percent
SHORTEST = 257  # samples that a spectrogram needs at least, half a window to either side being a reflection
CUT_SHORT = re.compile(r'^data : (\d+) \(should be (\d+)\)$', re.MULTILINE)  # in libsndfile's log
NOISE_SNR = {'noise': (0, 15), 'speech': (13, 20), 'music': (5, 15)}  # dB, each clip against the utterance
NOISE_CLIPS = {'noise': (1, 1), 'speech': (3, 8), 'music': (1, 1)}  # fewest and most clips mixed in


class train_loader(Dataset):
    """Random augmented crops of the training utterances: (FloatTensor (num_frames * 160 + 240,), int label).

    train_list: lines `speaker path`, paths below train_path; musan_path: MUSAN, split in pieces or not; rir_path: room
    impulse responses. A label is the speaker's index in `speakers`, the sorted speakers of the list.

    dataset[index] draws from torch's generator, as any dataset; dataset[epoch, index] depends on seed, epoch and index
    alone. Raises BadInput for lists and folders that cannot be used, and for audio when it is read.

    speed_perturb: adds every utterance at 0.9 and 1.1 of its speed, as of other speakers, since the pitch moves along:
    labels S to 2 S - 1 and 2 S to 3 S - 1 of a list of S speakers.

    bad_audio: a text file that gets a line `epoch path: reason` for each utterance whose file cannot be used, and which
    another one of the speaker then replaces; without it, such a file is BadInput. max_bad: the percentage of all files
    beyond which it is BadInput again.
    """

    def __init__(
        self,
        train_list,
        train_path,
        musan_path,
        rir_path,
        num_frames,
        seed=0,
        speed_perturb=False,
        bad_audio=None,
        max_bad=1.0,
        **kwargs,
    ):
        self.train_path = train_path
        self.length = num_frames * 160 + 240
        self.seed = seed
        self.speakers, self.labels, self.names = read_train_list(train_list)
        self.speeds = SPEEDS if speed_perturb else SPEEDS[:1]
        self.n_class = len(self.speeds) * len(self.speakers)
        self.noises = {category: NoiseFiles(os.path.join(musan_path, category)) for category in NOISE_SNR}
        self.rirs = Strings(find_audio(rir_path, '--rir_path'))
        self.bad_audio = bad_audio
        self.max_bad = max_bad
        self.bad = set()

    def __len__(self):
        return len(self.speeds) * len(self.labels)

    def path(self, index):
        """Path of an utterance's file."""
        return os.path.join(self.train_path, self.names[index % len(self.labels)])

    def __getitem__(self, index):
        if isinstance(index, tuple):
            epoch, index = index
            # Python's generator starts and draws single numbers several times faster than NumPy's.
            rng = random.Random(f'{self.seed} {epoch} {index}')
        else:
            rng = random.Random(int(torch.randint(2**63 - 1, ())))
            epoch = 0
        version, utterance = divmod(index, len(self.labels))
        speed = self.speeds[version]
        audio = self.read_utterance(utterance, -(-self.length * speed // 100), rng, epoch)
        audio = change_rate(audio, speed, 100)[: self.length]
        label = version * len(self.speakers) + int(self.labels[utterance])
        return torch.from_numpy(self.augment(audio, rng)), label

    def read_utterance(self, utterance, length, rng, epoch):
        """`length` samples of an utterance or, where its file cannot be used, of another one of the speaker."""
        try:
            return read_speech(self.path(utterance), length, rng)
        except BadInput as error:
            if not self.bad_audio:
                raise
            self.note_bad(utterance, error, epoch)
        # The replacement, too, depends on (seed, epoch, index) alone, so not on which files are known to be bad.
        same = np.flatnonzero(self.labels == self.labels[utterance]).tolist()
        same.remove(utterance)
        for other in rng.sample(same, len(same)):
            try:
                return read_speech(self.path(other), length, rng)
            except BadInput as error:
                self.note_bad(other, error, None)
        raise BadInput(f'speaker {self.speakers[self.labels[utterance]]} has no file that can be used: take them out')

    def note_bad(self, utterance, error, epoch):
        """Adds a line to bad_audio; epoch: None where a replacement was bad, so that nothing more was replaced."""
        try:
            with open(self.bad_audio, 'a', encoding='utf-8', errors='surrogateescape') as file:
                file.write(f'{epoch} {error}\n')
        except OSError as refused:
            raise BadInput(f'{self.bad_audio}: cannot be written ({refused.strerror})') from refused
        self.bad.add(utterance)
        check_share(len(self.bad), len(self.labels), self.max_bad, str(error))

    def augment(self, audio, rng):
        """One of six, equally likely: clean, reverberation, babble, music, noise, television (babble and music)."""
        kind = rng.randrange(6)
        if kind == 1:
            return self.add_rev(audio, rng)
        for category in ((), (), ('speech',), ('music',), ('noise',), ('speech', 'music'))[kind]:
            audio = self.add_noise(audio, category, rng)
        return audio

    def add_rev(self, audio, rng=None):
        """audio (..., samples) in a room drawn at random."""
        rng = rng or random.Random()
        path = self.rirs[rng.randrange(len(self.rirs))]
        return reverberate(audio, require_sound(read_audio(path), path))

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
        if path.lower().endswith('.wav') and os.path.exists(path) and os.path.getsize(path) <= 2 * PIECE + 1000:
            return 1
        with open_audio(path) as file:
            return 1 + max(0, file.frames - PIECE) // PIECE_STEP

    def __len__(self):
        return len(self.paths)

    def draw(self, rng, length, count):
        """Yields `count` clips, float32 (length,), of different pieces where there are as many."""
        total = int(self.pieces[-1])
        for piece in (rng.choices if count > total else rng.sample)(range(total), k=count):
            index = np.searchsorted(self.pieces, piece, side='right')
            piece -= int(self.pieces[index - 1]) if index else 0
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
        file = soundfile.SoundFile(os.fsencode(path))
    except (soundfile.SoundFileError, TypeError) as error:  # TypeError for a name that ends in .raw
        raise BadInput(f'{path}: cannot be read as audio: {why_unreadable(path, error)}') from error
    if (file.samplerate, file.channels) != (RATE, 1):
        with file:
            found = f'{file.samplerate} Hz with {file.channels} channel{"s" * (file.channels > 1)}'
        raise BadInput(f'{path}: audio must be 16000 Hz with 1 channel, this is {found} (ffmpeg -ar 16000 -ac 1)')
    announced = CUT_SHORT.search(file.extra_info)
    if announced and int(announced[1]) < 2**31 - 2**16:  # more than that is what programs write that stream
        file.close()
        raise BadInput(f'{path}: is cut short: {announced[1]} bytes of audio are announced, {announced[2]} are there')
    if file.frames == 0:
        file.close()
        raise BadInput(f'{path}: has no samples')
    return file


def why_unreadable(path, error):
    """libsndfile's reason, which for a missing file is no more than "System error"."""
    return getattr(error, 'error_string', str(error)) if os.path.exists(path) else 'no such file'


def read_audio(path):
    """All samples of a file, float32 (samples,)."""
    with open_audio(path) as file:
        return read_samples(file)


def read_crop(path, length, rng, first=0, span=None, cached=False):
    """`length` samples from a position drawn uniformly, float32 (length,); what is too short is wrapped round.

    first, span: the part of the file, in samples, that the crop is drawn from if it fits there. cached: remember how
    the file is laid out, for files that are read again and again.
    """
    layout = known_wav_layout(path) if cached else wav_layout(path)
    if layout is None:
        with open_audio(path) as file:
            start = draw_start(rng, file.frames, length, first, span)
            return wrap(read_samples(file, start, length), length)
    offset, frames = layout
    offset += 2 * draw_start(rng, frames, length, first, span)
    with open(path, 'rb', buffering=0) as file:
        file.seek(offset)
        return wrap(to_float(np.frombuffer(file.read(2 * min(frames, length)), '<i2')), length)


def read_speech(path, length, rng):
    """read_crop of an utterance; BadInput also for a file that is silent throughout."""
    audio = read_crop(path, length, rng)
    if np.vdot(audio, audio) == 0:
        require_sound(read_audio(path), path)
    return audio


def require_sound(audio, path):
    """The samples of a file; BadInput where all of them are zero."""
    if not audio.any():
        raise BadInput(f'{path}: is silent from beginning to end')
    return audio


def check_share(bad, files, max_bad, example):
    """Raises BadInput where more than max_bad percent of the training files cannot be used."""
    if bad > files * max_bad / 100:
        raise BadInput(
            f'more than --max_bad {max_bad:g}% of the training files cannot be used, {bad} of {files}:\n{example}'
        )


def collect_bad_audio(new, path):
    """Moves the lines that train_loader wrote to `new` into `path`, sorted, each `path: reason` once.

    Returns (how many utterances were replaced in each epoch, a Counter of text; the lines of `path`).
    """
    found = [line.split(' ', 1) for line in read_lines(new)]
    known = read_lines(path)
    lines = sorted({*known, *(line for _, line in found)})
    if lines != known:
        write_text(path, ''.join(f'{line}\n' for line in lines))
    if found:
        os.remove(new)
    return collections.Counter(epoch for epoch, _ in found), lines


def read_lines(path):
    """Lines of a text file without their ends; none where there is no such file."""
    if not os.path.exists(path):
        return []
    with open(path, encoding='utf-8', errors='surrogateescape') as file:
        return file.read().split('\n')[:-1]


def draw_start(rng, frames, length, first, span):
    """Where in a file of `frames` samples a crop starts, as read_crop draws it."""
    spare = min(frames - first, span or frames) - length
    return first + (rng.randint(0, spare) if spare > 0 else 0)


def wrap(audio, length):
    """audio (samples,), repeated as often as it takes to fill (length,)."""
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


# Only the layout is remembered: a file that stays mapped into memory holds a file descriptor, and MUSAN has more files
# than a process may have open.
known_wav_layout = functools.lru_cache(maxsize=8192)(wav_layout)


def to_float(samples):
    """16-bit or float samples as float32 in [-1, 1]."""
    audio = samples.astype(np.float32)
    if samples.dtype == np.int16:
        audio *= np.float32(1 / 32768)
    return audio


def read_any(path):
    """All samples of a file of any rate and number of channels that soundfile reads, as 16 kHz mono.

    Returns (audio float32 (samples,), what was done to it, '' if nothing). Raises BadInput where it cannot be read.
    """
    try:
        audio, rate = soundfile.read(os.fsencode(path), dtype='float32', always_2d=True)
    except (soundfile.SoundFileError, TypeError, MemoryError) as error:
        raise BadInput(f'{path}: cannot be read as audio: {why_unreadable(path, error)}') from error
    if len(audio) == 0:
        raise BadInput(f'{path}: has no samples')
    if not np.isfinite(np.vdot(audio, audio)):
        raise BadInput(f'{path}: holds samples that are not finite, or huge')
    done = [f'{audio.shape[1]} channels averaged'] * (audio.shape[1] > 1)
    done += [f'resampled from {rate} Hz'] * (rate != RATE)
    return change_rate(audio.mean(axis=1), rate, RATE), ', '.join(done)


def change_rate(audio, rate, new_rate):
    """audio (samples,) at `rate` resampled to `new_rate`; played at an unchanged rate, it is slower or faster."""
    if rate == new_rate:
        return audio
    return torchaudio.functional.resample(torch.from_numpy(audio), rate, new_rate).numpy()


def read_samples(file, start=0, count=-1):
    """Samples of an open file from `start` on, all or `count` of them; BadInput where it ends before."""
    expected = file.frames - start if count < 0 else min(count, file.frames - start)
    try:
        file.seek(start)
        # libsndfile converts 16 bits to float more slowly than NumPy does.
        audio = to_float(file.read(expected, dtype='int16' if file.subtype == 'PCM_16' else 'float32'))
    except (soundfile.SoundFileError, MemoryError) as error:
        why = getattr(error, 'error_string', 'its header announces more samples than memory holds')
        raise BadInput(f'{os.fsdecode(file.name)}: cannot be decoded: {why}') from error
    if len(audio) < expected:
        raise BadInput(f'{os.fsdecode(file.name)}: ends before the {file.frames} samples that its header announces')
    if not np.isfinite(np.vdot(audio, audio)):
        raise BadInput(f'{os.fsdecode(file.name)}: holds samples that are not finite, or huge')
    return audio


class EvalUtterances(Dataset):
    """Whole files, as tensors (samples,), or as a sentence where they cannot be used.

    any_format: also of other rates and channels, converted with a note.
    """

    def __init__(self, paths, any_format=False):
        self.paths = Strings(paths)
        self.any_format = any_format

    def __len__(self):
        return len(self.paths)

    def __getitem__(self, index):
        try:
            return torch.from_numpy(self.read(self.paths[index]))
        except BadInput as error:
            return str(error)

    def read(self, path):
        """A file's samples; BadInput where there are too few or none but zeros."""
        if not self.any_format:
            return read_whole(path)
        audio, done = read_any(path)
        if done:
            print(f'{path}: {done}', file=sys.stderr)
        return check_whole(audio, path)


def read_whole(path):
    """All samples of a file, as read_audio; BadInput also where nothing can be embedded."""
    return check_whole(read_audio(path), path)


def check_whole(audio, path):
    """The samples of a file; BadInput where there are too few for a spectrogram, or all are zero."""
    if len(audio) < SHORTEST:
        raise BadInput(f'{path}: has {len(audio)} samples; {SHORTEST} (16 ms) are the fewest that can be embedded')
    return require_sound(audio, path)


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
                shown = [
                    f'{path}, line {done + i + 1}: {count} fields expected, {found[i]} found: '
                    f'{lines[i].decode(errors="replace").strip()[:80]!r}'
                    for i in bad[:20]
                ]
                raise BadInput('\n'.join([f'{role}: lines that cannot be read:', *shown]))
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
        bad = [i for i, label in enumerate(fields[::3]) if label not in (b'0', b'1')]
        if bad:
            shown = [f'{path}, line {numbers[i]}: {fields[3 * i].decode(errors="replace")[:80]!r}' for i in bad[:20]]
            raise BadInput('\n'.join(['--eval_list: a label is 1 (same speaker) or 0:', *shown]))
        labels.append(np.array(fields[::3]) == b'1')
        pairs.append(np.stack([number_names(index, fields[side::3]) for side in (1, 2)], axis=1))
    if not index:
        raise BadInput(f'--eval_list: {path}: the file is empty')
    labels = np.concatenate(labels).astype(np.int8)
    if labels.min() == labels.max():
        raise BadInput(f'--eval_list: {path}: needs trials of both kinds, 1 and 0, for an error rate')
    return [os.fsdecode(name) for name in index], labels, np.concatenate(pairs)


def read_trial_lists(lists, folders):
    """Several trial lists at once: (paths of all files, [(labels, pairs of indices into the paths)]).

    folders: one for all lists, or one for each. A file that several lists name is there once. Raises BadInput.
    """
    if len(folders) not in (1, len(lists)):
        raise BadInput(f'--eval_path: {len(folders)} folders for {len(lists)} lists; give one, or one for each')
    index, trials = {}, []
    for name, folder in zip(lists, folders * (len(lists) // len(folders))):
        require(os.path.isdir, folder, '--eval_path')
        files, labels, pairs = read_trials(name)
        trials.append((labels, number_names(index, [os.path.join(folder, file) for file in files])[pairs]))
    return list(index), trials


def find_audio(folder, role, any_format=False):
    """Sorted paths of all wav and flac files below a folder, or of all that soundfile reads; BadInput for none."""
    endings = tuple(f'.{name.lower()}' for name in soundfile.available_formats()) if any_format else ('.wav', '.flac')
    require(os.path.isdir, folder, role)
    paths = sorted(
        os.path.join(root, name)
        for root, _, names in os.walk(folder, followlinks=True)
        for name in names
        if name.lower().endswith(endings)
    )
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


def check_header(path):
    """Opens a file and closes it."""
    open_audio(path).close()


def check_sound(path):
    """Reads a whole file, which may be short: an utterance to train on, or an RIR."""
    require_sound(read_audio(path), path)


def fault(check, path):
    """What check(path) raises as BadInput, as text; '' where it raises nothing."""
    try:
        check(path)
        return ''
    except BadInput as error:
        return str(error)


def check_audio(paths, role, check=check_header, n_cpu=0, max_bad=0):
    """Goes through files; raises BadInput that names the first 20 faulty ones if they are over max_bad percent.

    Returns what is wrong with files otherwise, as lines. check: raises BadInput for a faulty file: check_header,
    read_audio (which may be silent), check_sound or read_whole; n_cpu: processes that share the work.
    """
    found = DataLoader(paths, batch_size=None, num_workers=n_cpu, collate_fn=functools.partial(fault, check))
    found = tqdm(found, f'checking {role}', len(paths), unit='file', disable=None, leave=False)
    faults = [line for line in found if line]
    if len(faults) > len(paths) * max_bad / 100:
        summary = f'{role}: {len(faults)} of {len(paths)} files checked cannot be used, the first:'
        raise BadInput('\n'.join([summary, *faults[:20]]))
    return faults


def inspect_file(path):
    """(seconds, rate in Hz, why the file cannot be used or '', whether it is clipped) of an audio file, read whole."""
    try:
        audio, rate = soundfile.read(os.fsencode(path), dtype='float32', always_2d=True)
    except soundfile.LibsndfileError as error:
        return 0.0, 0, f'unreadable ({error.error_string})', False
    seconds, peak = len(audio) / rate, np.abs(audio).max(initial=0)
    fault = ''
    if len(path.split()) > 1:
        fault = 'white space in its name, which lists cannot hold'
    elif (rate, audio.shape[1]) != (RATE, 1):
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


def main(argv=None):
    """Makes lists for a folder of recordings; exit status 2, with a sentence, where that cannot be done."""
    parser = argparse.ArgumentParser(
        prog='dataLoader.py',
        description='Make a training list and a trial list from a folder with a folder per speaker.',
    )
    parser.add_argument('folder', help='holds SPEAKER/.../FILE.wav (or .flac)')
    parser.add_argument('--out', required=True, help='folder for train_list.txt, trials.txt and left_out.txt')
    parser.add_argument('--test_speakers', type=int, help='speakers held out for the trials (default: a tenth)')
    parser.add_argument('--exhaustive', action='store_true', help='all trials, not as many of either kind')
    parser.add_argument('--seed', type=int, default=10, help='seed of the choice (default: 10)')
    with exit_on_bad_input():
        make_lists(**vars(parser.parse_args(argv)))


if __name__ == '__main__':
    main()
