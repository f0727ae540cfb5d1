"""Audio on disk: augmented crops for training, utterances for evaluation; lists and checks below.

All audio is 16 kHz and mono, as float32 in [-1, 1].
"""

import codecs
import contextlib
import errno
import functools
import io
import math
import os
import random
import re
import signal
import sys
import wave
from array import array
from typing import NamedTuple

import numpy as np
import soundfile
import torch
import torchaudio
from scipy.signal import butter, fftconvolve, resample_poly, sosfilt
from torch.utils.data import DataLoader, Dataset, Sampler
from tqdm import tqdm

from tools import (
    BadInput,
    note,
    number_speakers,
    process_count,
    process_rank,
    refuse_unknown,
    say,
    sha256,
    speakers_of,
    write_text,
)

RATE = 16000
SPEEDS = (100, 90, 110)  # percent
NOISE_SNR = {'noise': (0, 15), 'speech': (13, 20), 'music': (5, 15)}  # dB, of each clip
NOISE_CLIPS = {'noise': (1, 1), 'speech': (3, 8), 'music': (1, 1)}  # fewest and most clips mixed in
TELEPHONE_RATE = 8000
TELEPHONE_BAND = (300, 3400)  # Hz
PIECE = 5 * RATE  # a noise recording counts as its pieces of 5 s,
PIECE_STEP = 3 * RATE  # one every 3 s
EVAL_CROP = 300 * 160 + 240
SHORTEST = 257  # samples that a spectrogram needs, half a window to either side being a reflection
LABELS = {b'1': 1, b'0': 0, b'target': 1, b'nontarget': 0}  # 1: the same speaker
# Audio and video that people have, and that soundfile does not read or training does not use.
OTHER_AUDIO = (
    '.m4a', '.mp3', '.ogg', '.oga', '.opus', '.aac', '.amr', '.wma', '.mp4', '.webm', '.3gp',
    '.aif', '.aiff', '.au', '.caf', '.sph', '.w64', '.mka', '.mkv', '.mov', '.avi', '.m4b', '.ape',
)  # fmt: skip
CONVERT = 'ffmpeg -i IN -ar 16000 -ac 1 OUT.wav converts it'
# Folders that systems make beside people's own, apart from hidden ones.
LEFT_BEHIND = ('__MACOSX', '@eaDir', '$RECYCLE.BIN', 'System Volume Information', 'lost+found')
CUT_SHORT = re.compile(r'^data : (\d+) \(should be (\d+)\)$', re.MULTILINE)  # in libsndfile's log


class Codec(NamedTuple):
    """A codec that libsndfile has: the rate of its audio, its container and its coding.

    levels: the range of compression levels (0 to 1) that soundfile may be given, None for none.
    """

    rate: int
    container: str
    coding: str
    levels: tuple | None = None


TELEPHONE = {
    'gsm': Codec(TELEPHONE_RATE, 'WAV', 'GSM610'),
    'ulaw': Codec(TELEPHONE_RATE, 'WAV', 'ULAW'),
    'alaw': Codec(TELEPHONE_RATE, 'WAV', 'ALAW'),
    'ima': Codec(TELEPHONE_RATE, 'WAV', 'IMA_ADPCM'),
    'nms16': Codec(TELEPHONE_RATE, 'WAV', 'NMS_ADPCM_16'),
    'nms24': Codec(TELEPHONE_RATE, 'WAV', 'NMS_ADPCM_24'),
    'g721': Codec(TELEPHONE_RATE, 'WAV', 'G721_32'),
}
# The levels give about 20 to 40 kbit/s of MP3 and 40 to 50 of Vorbis. Opus takes 20 ms for a crop
# of 2 s, ten times what a telephone's codec does.
INTERNET = {
    'mp3': Codec(RATE, 'MP3', 'MPEG_LAYER_III', (0.5, 0.99)),
    'vorbis': Codec(RATE, 'OGG', 'VORBIS', (0.7, 1.0)),
}


class train_loader(Dataset):
    """Random augmented crops of the training utterances.

    An item is (FloatTensor (num_frames * 160 + 240,), int label); a label is the speaker's index in
    the sorted `speakers`. dataset[index] draws from torch's generator, as any dataset;
    dataset[epoch, index] depends on seed, epoch and index alone.

    train_list: lines `speaker path`, paths below train_path; musan_path: MUSAN, cut into pieces or
    not; rir_path: room impulse responses. speed_perturb: a crop has one of three speeds, equally
    likely; those at 0.9 and 1.1 are of other speakers, as the pitch moves along: labels S to
    2 S - 1 and 2 S to 3 S - 1 of a list of S speakers. augment: share of the crops that is
    augmented; codec: share that then goes through a codec. Options of the published
    command that are not used here are accepted; others raise TypeError. Raises BadInput where a
    list or folder cannot be used.

    The attribute bad_audio may be a BadAudio: it then lists each file that cannot be used, and
    another one of the speaker replaces it. Otherwise such a file is BadInput.
    """

    def __init__(
        self, train_list, train_path, musan_path, rir_path, num_frames,
        seed=0, speed_perturb=False, augment=5 / 6, codec=0.0, **published,
    ):  # fmt: skip
        refuse_unknown(train_loader, published)
        self.train_path = train_path
        self.length = num_frames * 160 + 240
        self.seed = seed
        self.speakers, self.labels, self.names, self.list_sha256 = read_train_list(train_list)
        self.speeds = SPEEDS if speed_perturb else SPEEDS[:1]
        self.n_class = len(self.speeds) * len(self.speakers)
        self.augmented = augment
        self.coded = codec
        self.codecs = usable_codecs() if codec else {}
        self.noises = {}
        for category in NOISE_SNR:
            self.noises[category] = NoiseFiles(os.path.join(musan_path, category))
        self.rirs = Strings(find_audio(rir_path, '--rir_path'))
        self.bad_audio = None

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, index):
        if isinstance(index, tuple):
            epoch, index = index
            # Python's generator starts and draws single numbers several times faster than NumPy's.
            rng = random.Random(f'{self.seed} {epoch} {index}')
        else:
            rng = random.Random(int(torch.randint(2**63 - 1, ())))

        version = rng.randrange(len(self.speeds)) if len(self.speeds) > 1 else 0
        speed = self.speeds[version]
        audio = self.read_utterance(index, math.ceil(self.length * speed / 100), rng)
        audio = change_rate(audio, speed, 100)[: self.length]
        audio = self.augment(audio, rng)
        if self.coded and rng.random() < self.coded:
            audio = self.code(audio, rng)
        label = version * len(self.speakers) + int(self.labels[index])
        return torch.from_numpy(audio), label

    def augment(self, audio, rng):
        """audio (samples,), or a share of the time in one of five ways, equally likely.

        These are reverberation, babble, music, noise, and television (babble and music).
        """
        if rng.random() >= self.augmented:
            return audio
        kind = rng.choice(('reverberation', 'babble', 'music', 'noise', 'television'))
        if kind == 'reverberation':
            return self.add_rev(audio, rng)
        if kind in ('babble', 'television'):
            audio = self.add_noise(audio, 'speech', rng)
        if kind in ('music', 'television'):
            audio = self.add_noise(audio, 'music', rng)
        if kind == 'noise':
            audio = self.add_noise(audio, 'noise', rng)
        return audio

    def add_rev(self, audio, rng=None):
        """audio (..., samples) in a room drawn at random."""
        rng = rng or random.Random()
        path = self.rirs[rng.randrange(len(self.rirs))]
        return reverberate(audio, read_audio(path))

    def add_noise(self, audio, noisecat, rng=None):
        """audio (..., samples) plus clips of 'noise', 'speech' or 'music', each at its own SNR."""
        rng = rng or random.Random()
        level = decibels(audio)
        mixed = np.array(audio, np.float32)
        count = rng.randint(*NOISE_CLIPS[noisecat])
        for clip in self.noises[noisecat].draw(rng, audio.shape[-1], count):
            snr = rng.uniform(*NOISE_SNR[noisecat])
            clip *= np.float32(10 ** ((level - decibels(clip) - snr) / 20))
            mixed += clip
        return mixed

    def code(self, audio, rng):
        """audio (samples,) through a codec drawn at random, two of three times a telephone's.

        Half of the telephones also limit the band.
        """
        group = TELEPHONE if rng.random() < 2 / 3 else INTERNET
        codec = self.codecs[rng.choice([name for name in group if name in self.codecs])]
        limited = codec.rate == TELEPHONE_RATE and rng.random() < 0.5
        level = rng.uniform(*codec.levels) if codec.levels else None
        return through_codec(audio, codec, level, limited)

    def path(self, index):
        """Path of an utterance's file."""
        return os.path.join(self.train_path, self.names[index])

    def read_utterance(self, index, length, rng):
        """`length` samples of an utterance or, where its file cannot be used, of another one.

        That is drawn from the same speaker's.
        """
        try:
            return read_crop(self.path(index), length, rng)
        except BadInput as error:
            if not self.bad_audio:
                raise
            self.bad_audio.add(str(error))
        # The replacement, too, depends on (seed, epoch, index) alone, so not on which files are
        # known to be bad.
        same = np.flatnonzero(self.labels == self.labels[index]).tolist()
        for other in rng.sample(same, len(same)):
            with contextlib.suppress(BadInput):
                return read_crop(self.path(other), length, rng)
        speaker = self.speakers[self.labels[index]]
        raise BadInput(f'speaker {speaker} has no file that can be used: take them out')


class NoiseFiles:
    """The recordings below a folder of MUSAN, drawn by their pieces of 5 s.

    So long recordings come more often, and plain MUSAN and MUSAN cut into pieces give the same
    clips. `pieces` are cumulative numbers of pieces, int64.
    """

    def __init__(self, folder):
        paths = find_audio(folder, '--musan_path')
        self.paths = Strings(paths)
        # disable=None shows the bar on a terminal alone.
        shown = tqdm(paths, folder, disable=None, leave=False)
        self.pieces = np.cumsum([self.count_pieces(path) for path in shown])

    @staticmethod
    def count_pieces(path):
        """Pieces of 5 s in a file, one at least."""
        # A 16-bit wav of this size is one piece: MUSAN cut into pieces has 150,000 files, too many
        # to open.
        small = os.path.exists(path) and os.path.getsize(path) <= 2 * PIECE + 1000
        if small and path.lower().endswith('.wav'):
            return 1
        with open_audio(path) as file:
            return 1 + max(0, file.frames - PIECE) // PIECE_STEP

    def draw(self, rng, length, count):
        """Yields `count` clips, float32 (length,), of different pieces where there are as many."""
        total = int(self.pieces[-1])
        if count > total:
            pieces = rng.choices(range(total), k=count)
        else:
            pieces = rng.sample(range(total), k=count)
        for piece in pieces:
            index = np.searchsorted(self.pieces, piece, side='right')
            before = int(self.pieces[index - 1]) if index else 0
            first = (piece - before) * PIECE_STEP
            yield read_crop(
                self.paths[index], length, rng, first, PIECE, cached=True, silent_ok=True
            )


def through_codec(audio, codec, level=None, limited=False):
    """audio (samples,), written by a codec and read back, float32 (samples,).

    level: compression level, where the codec has levels; limited: whether to leave the telephone's
    band alone. What would clip is turned down. The codecs have no delay (a test holds that); some
    pad the end, which is cut.
    """
    samples = len(audio)
    if codec.rate != RATE:
        audio = resample_poly(audio, 1, RATE // codec.rate)
        if limited:
            audio = sosfilt(telephone_filter(), audio)
    audio = audio / max(1.0, np.abs(audio).max() / 0.99)

    file = io.BytesIO()
    options = {} if level is None else {'compression_level': level}
    soundfile.write(
        file, audio, codec.rate, format=codec.container, subtype=codec.coding, **options
    )
    file.seek(0)
    audio, _ = soundfile.read(file, dtype='float32')
    if codec.rate != RATE:
        audio = resample_poly(audio, RATE // codec.rate, 1)
    audio = audio[:samples].astype(np.float32)
    return np.pad(audio, (0, samples - len(audio)))


@functools.cache
def telephone_filter():
    """The filter of TELEPHONE_BAND at TELEPHONE_RATE, in second-order sections."""
    return butter(4, TELEPHONE_BAND, 'bandpass', fs=TELEPHONE_RATE, output='sos')


@functools.cache
def usable_codecs():
    """{name: Codec} of those of TELEPHONE and INTERNET that this libsndfile has.

    Says which it lacks. Raises BadInput where it has none of a kind.
    """
    usable = {}
    for group in (TELEPHONE, INTERNET):
        lacking = []
        for name, codec in group.items():
            if is_usable(codec):
                usable[name] = codec
            else:
                lacking.append(name)
        if len(lacking) == len(group):
            raise BadInput(
                f'--codec: this libsndfile ({soundfile.__libsndfile_version__}) has none of '
                f'{", ".join(group)}; pip install --upgrade soundfile'
            )
        if lacking:
            say(f'note          this libsndfile lacks the codecs {", ".join(lacking)}')
    return usable


def is_usable(codec):
    """Whether this libsndfile has a Codec."""
    try:
        through_codec(np.zeros(RATE, np.float32), codec, codec.levels and codec.levels[0])
    except (soundfile.SoundFileError, ValueError, TypeError):
        return False
    return True


def reverberate(audio, rir):
    """audio (..., samples) convolved with rir (taps,) scaled to unit energy, its length kept."""
    rir = (rir / np.sqrt(np.sum(rir**2))).reshape((1,) * (audio.ndim - 1) + (-1,))
    return fftconvolve(audio, rir, axes=-1)[..., : audio.shape[-1]].astype(np.float32)


def decibels(audio):
    """Level of audio; the 1e-4 keeps silence from being amplified without bound."""
    return 10 * np.log10(np.vdot(audio, audio) / audio.size + 1e-4)


def change_rate(audio, rate, new_rate):
    """audio (samples,) at `rate` resampled to `new_rate`.

    Played at an unchanged rate, it is slower or faster.
    """
    if rate == new_rate:
        return audio
    return torchaudio.functional.resample(torch.from_numpy(audio), rate, new_rate).numpy()


class EpochSampler(Sampler):
    """Full batches of the epoch `epoch`, lists of (epoch, index).

    Their order depends on seed and epoch alone. With several processes, each gets its part of every
    batch. The last, incomplete batch is dropped.
    """

    def __init__(self, size, batch_size, seed):
        self.size = size
        self.batch_size = batch_size
        self.seed = seed
        self.epoch = 1

    def __len__(self):
        return self.size // self.batch_size

    def __iter__(self):
        order = np.random.default_rng([self.seed, self.epoch]).permutation(self.size)
        for step in range(len(self)):
            batch = order[step * self.batch_size : (step + 1) * self.batch_size]
            part = np.split(batch, process_count())[process_rank()]
            yield [(self.epoch, index) for index in part.tolist()]


def make_batches(dataset, batch_size, n_cpu, **kwargs):
    """DataLoader of this process's part of full batches.

    Set loader.batch_sampler.epoch before each epoch. batch_size: of all processes together; kwargs:
    as DataLoader's. Raises BadInput for a batch size that is too large or cannot be divided.
    """
    if batch_size % process_count():
        raise BadInput(
            f'--batch_size {batch_size} cannot be divided by the {process_count()} processes'
        )
    if len(dataset) < batch_size:
        raise BadInput(
            f'the training list has {len(dataset)} utterances, fewer than one batch: --batch_size '
            f'{batch_size} must be at most {len(dataset)}'
        )
    return DataLoader(
        dataset,
        batch_sampler=EpochSampler(len(dataset), batch_size, dataset.seed),
        # Of its own, so that starting workers does not move the one that training draws from.
        generator=torch.Generator(),
        num_workers=n_cpu,
        persistent_workers=n_cpu > 0,
        prefetch_factor=4 if n_cpu else None,
        worker_init_fn=ignore_interrupts,
        **kwargs,
    )


def read_utterance(read, path):
    """An utterance for evaluation as (tensor (samples,), ''), or (None, what is wrong with it).

    read: read_audio or read_any.
    """
    try:
        return torch.from_numpy(read(path, shortest=SHORTEST)), ''
    except BadInput as error:
        return None, str(error)


def eval_crops(audio):
    """Five crops of 3 s with evenly spaced starts, (5, 48240), of (samples,).

    What is shorter is repeated.
    """
    if len(audio) < EVAL_CROP:
        audio = audio.repeat(math.ceil(EVAL_CROP / len(audio)))[:EVAL_CROP]
    starts = np.linspace(0, len(audio) - EVAL_CROP, num=5).astype(int)
    return torch.stack([audio[start : start + EVAL_CROP] for start in starts])


# Machinery: reading audio files, reading lists, checking both before anything is trained.


def parallel_map(function, items, n_cpu, **kwargs):
    """function(item) of each item, in their order, by n_cpu processes: a DataLoader as a map."""
    return DataLoader(
        items,
        batch_size=None,
        num_workers=n_cpu,
        collate_fn=function,
        worker_init_fn=ignore_interrupts,
        **kwargs,
    )


def ignore_interrupts(worker):
    """Has a worker leave Ctrl-C, which reaches all processes, to the one that started it.

    That one may end while it takes a batch from the worker, whose thread that serves batches
    (multiprocessing.resource_sharer) would then print a traceback.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    print_exception = sys.excepthook

    def unless_nobody_listens(kind, error, traceback):
        if not isinstance(error, (ConnectionError, EOFError)):
            print_exception(kind, error, traceback)

    sys.excepthook = unless_nobody_listens


def read_audio(path, shortest=1, silent_ok=False):
    """All samples of a file, float32 (samples,).

    Raises BadInput if it is shorter than `shortest`, silent unless that is ok, or no such audio.
    """
    with open_audio(path) as file:
        return require_sound(read_samples(file), path, shortest, silent_ok)


def read_any(path, shortest=1):
    """read_audio of any rate and number of channels that soundfile reads.

    It is converted to 16 kHz and mono, with a note on standard error.
    """
    try:
        audio, rate = soundfile.read(os.fsencode(path), dtype='float32', always_2d=True)
    except (soundfile.SoundFileError, TypeError, MemoryError) as error:
        reason = why_unreadable(path, error)
        raise BadInput(f'{path}: cannot be read as audio: {reason}') from error
    require_sound(audio, path)

    notes = []
    if audio.shape[1] > 1:
        notes.append(f'{audio.shape[1]} channels averaged')
    if rate != RATE:
        notes.append(f'resampled from {rate} Hz')
    if notes:
        print(f'{path}: {", ".join(notes)}', file=sys.stderr)
    return require_sound(change_rate(audio.mean(axis=1), rate, RATE), path, shortest)


def read_crop(path, length, rng, first=0, span=None, cached=False, silent_ok=False):
    """`length` samples from a position drawn uniformly, float32 (length,).

    What is too short is repeated. first, span: the part of the file, in samples, that the crop is
    drawn from if it fits there. cached: remember the layout of a file that is read again and again.
    Raises BadInput as read_audio does.
    """
    layout = known_wav_layout(path) if cached else wav_layout(path)
    if layout:
        offset, frames = layout
        start = draw_start(frames, length, rng, first, span)
        audio = read_layout(path, offset + 2 * start, min(frames - start, length))
    else:
        with open_audio(path) as file:
            start = draw_start(file.frames, length, rng, first, span)
            audio = read_samples(file, start, length)

    if not silent_ok and np.vdot(audio, audio) == 0:
        # A silent part of a file that is not silent throughout is no fault.
        read_audio(path)
    return audio if len(audio) == length else np.resize(audio, length)


def draw_start(frames, length, rng, first, span):
    """Where a crop of `length` samples begins in a file of `frames`, as read_crop has it."""
    spare = min(frames - first, span or frames) - length
    if spare <= 0:
        return first
    return first + rng.randint(0, spare)


def read_layout(path, offset, samples):
    """16-bit samples from a place in a file, in bytes, as float32 (samples,)."""
    try:
        with open(path, 'rb', buffering=0) as file:
            file.seek(offset)
            return to_float(np.frombuffer(file.read(2 * samples), '<i2'))
    except OSError as error:
        raise BadInput(f'{path}: cannot be read ({error.strerror})') from error


def wav_layout(path):
    """(Offset in bytes, samples) of the audio in a 16-bit mono wav at 16 kHz; None for others."""
    if not path.lower().endswith('.wav'):
        return None
    try:
        # The header is parsed faster than by soundfile.
        with open(path, 'rb', buffering=0) as file:
            header = wave.open(file)
            offset = file.tell()
            size = os.fstat(file.fileno()).st_size
    except Exception:
        # wave raises half a dozen types for damaged files; libsndfile decides what these are.
        return None
    frames = header.getnframes()
    if (header.getframerate(), header.getnchannels(), header.getsampwidth()) != (RATE, 1, 2):
        return None
    return (offset, frames) if 0 < frames <= (size - offset) // 2 else None


# Only the layout: a mapped file holds a file descriptor, and MUSAN has more files than a process
# may have open.
known_wav_layout = functools.lru_cache(maxsize=8192)(wav_layout)


def open_audio(path):
    """soundfile.SoundFile of a 16 kHz mono file; BadInput says what is wrong with another one."""
    try:
        file = soundfile.SoundFile(os.fsencode(path))
    except (soundfile.SoundFileError, TypeError) as error:  # TypeError for a name that ends in .raw
        reason = why_unreadable(path, error)
        raise BadInput(f'{path}: cannot be read as audio: {reason}') from error
    fault = audio_fault(file)
    if fault:
        file.close()
        raise BadInput(f'{path}: {fault}')
    return file


def audio_fault(file):
    """What is wrong with the header of an open sound file; None if it can be used."""
    if (file.samplerate, file.channels) != (RATE, 1):
        channels = '1 channel' if file.channels == 1 else f'{file.channels} channels'
        return (
            f'audio must be 16000 Hz with 1 channel, this is {file.samplerate} Hz with {channels} '
            '(ffmpeg -ar 16000 -ac 1)'
        )
    sizes = CUT_SHORT.search(file.extra_info)
    # More than that is what programs write that stream.
    if sizes and int(sizes[1]) < 2**31 - 2**16:
        return f'is cut short: {sizes[1]} bytes of audio are announced, {sizes[2]} are there'
    if file.frames == 0:
        return 'has no samples'
    return None


def why_unreadable(path, error):
    """libsndfile's reason, which for a missing file is no more than "System error"."""
    if not os.path.exists(path):
        return 'no such file'
    return getattr(error, 'error_string', str(error))


def read_samples(file, start=0, count=-1):
    """Samples of an open file from `start` on, all or `count` of them.

    Raises BadInput where the file ends before.
    """
    path = os.fsdecode(file.name)
    expected = file.frames - start
    if count >= 0:
        expected = min(count, expected)
    # libsndfile converts 16 bits to float more slowly than NumPy does.
    dtype = 'int16' if file.subtype == 'PCM_16' else 'float32'
    try:
        file.seek(start)
        audio = to_float(file.read(expected, dtype=dtype))
    except (soundfile.SoundFileError, MemoryError) as error:
        reason = 'its header announces more samples than memory holds'
        reason = getattr(error, 'error_string', reason)
        raise BadInput(f'{path}: cannot be decoded: {reason}') from error
    if len(audio) < expected:
        raise BadInput(f'{path}: ends before the {file.frames} samples that its header announces')
    return require_sound(audio, path, silent_ok=True)


def to_float(samples):
    """16-bit or float samples as float32 in [-1, 1]."""
    audio = samples.astype(np.float32)
    if samples.dtype == np.int16:
        audio *= np.float32(1 / 32768)
    return audio


def require_sound(audio, path, shortest=1, silent_ok=False):
    """The samples of a file.

    Raises BadInput if they are not finite, fewer than `shortest`, or silent unless that is ok.
    """
    if not np.isfinite(np.vdot(audio, audio)):
        raise BadInput(f'{path}: holds samples that are not finite, or huge')
    if len(audio) == 0:
        raise BadInput(f'{path}: has no samples')
    if len(audio) < shortest:
        raise BadInput(
            f'{path}: has {len(audio)} samples; {shortest} ({1000 * shortest // RATE} ms) are the '
            'fewest that can be embedded'
        )
    if not silent_ok and not audio.any():
        raise BadInput(f'{path}: is silent from beginning to end')
    return audio


class BadAudio:
    """A text file that lists training files which cannot be used, a line `path: reason` for each.

    limit: how many, in percent of the utterances of an epoch, may be listed in one.
    """

    def __init__(self, path, limit):
        self.path = path
        self.limit = limit
        self.known = None  # lines after the last call of sort

    def add(self, line):
        """Appends a line, as the loading processes do while they read."""
        try:
            with open(self.path, 'a', encoding='utf-8', errors='surrogateescape') as file:
                file.write(f'{line}\n')
        except OSError as error:
            raise BadInput(f'{self.path}: cannot be written ({error.strerror})') from error

    def sort(self, utterances):
        """Sorts the lines, each once; returns how many were added since the call before.

        Raises BadInput where these are more than `limit` percent of the utterances of an epoch.
        """
        lines = []
        if os.path.exists(self.path):
            with open(self.path, encoding='utf-8', errors='surrogateescape') as file:
                lines = file.read().split('\n')[:-1]
        distinct = sorted(set(lines))
        if lines != distinct:
            write_text(self.path, ''.join(f'{line}\n' for line in distinct))

        added = 0 if self.known is None else len(lines) - self.known
        self.known = len(distinct)
        if added > utterances * self.limit / 100:
            raise BadInput(
                f'more than --max_bad {self.limit:g}% of the training files cannot be used, '
                f'{added} of {utterances} in this epoch; they are in {self.path}, the first:\n'
                f'{distinct[0]}'
            )
        return added


def find_audio(folder, role, any_format=False):
    """Sorted paths of all wav and flac files below a folder, or of all that soundfile reads.

    Notes name other audio files, which are left out. Raises BadInput if no file can be used.
    """
    paths, left_out = find_usable(folder, role, any_format)
    if left_out:
        lines = [f'{path}: {reason}' for path, reason in left_out.items()]
        note('\n'.join([f'{len(lines)} files are left out:', *first_lines(lines)]))
    return paths


def find_usable(folder, role, any_format=False):
    """Returns (what find_audio returns, {path: reason} of the audio files that are left out)."""
    endings = ('.wav', '.flac')
    if any_format:
        known = {f'.{name.lower()}' for name in soundfile.available_formats()} - {'.raw'}
        endings = tuple(sorted(known | {'.aif', '.oga', '.opus', '.sph'}))
    paths = []
    left_out = {}
    for entry in walk(folder, role):
        _, ending = os.path.splitext(entry.name.lower())
        if ending not in endings and ending not in OTHER_AUDIO:
            continue
        if not is_file(entry):
            left_out[entry.path] = 'is not a file, or a link to a file that is not there'
        elif ending not in endings:
            left_out[entry.path] = f'{ending} files are not read; {CONVERT}'
        else:
            paths.append(entry.path)

    if not paths:
        message = f'{role}: no {" or ".join(endings)} file below {folder}'
        lines = [f'{path}: {reason}' for path, reason in left_out.items()]
        raise BadInput('\n'.join([message, *first_lines(lines)]))
    return sorted(paths), dict(sorted(left_out.items()))


def walk(folder, role):
    """Returns os.DirEntry of all files below a folder, through links to folders too.

    Hidden names and what systems leave behind are skipped, and counted in a note. Raises BadInput
    that names a folder which cannot be read: part of the data would be missing.
    """
    require(os.path.isdir, folder, role)
    files = []
    skipped = 0
    pending = [(os.fspath(folder), [])]
    while pending:
        path, above = pending.pop()
        with reading_folder(path, role):
            status = os.stat(path)
            place = (status.st_dev, status.st_ino)
            if place in above:
                continue  # a link back to a folder in which it lies
            with os.scandir(path) as entries:
                for entry in entries:
                    if is_skipped(entry.name):
                        skipped += 1
                    elif is_folder(entry):
                        pending.append((entry.path, [*above, place]))
                    else:
                        files.append(entry)
    if skipped:
        note(
            f'{folder}: {skipped} files and folders are skipped, whose names begin with a dot or '
            f'are one of {", ".join(sorted(LEFT_BEHIND))}'
        )
    return files


def subfolders(folder, role):
    """Sorted names of the folders in a folder, those that walk skips left out."""
    with reading_folder(folder, role), os.scandir(folder) as entries:
        return sorted(e.name for e in entries if not is_skipped(e.name) and is_folder(e))


@contextlib.contextmanager
def reading_folder(folder, role):
    """Turns the errors of the system into BadInput that names the folder."""
    try:
        yield
    except OSError as error:
        at = error.filename or folder
        raise BadInput(f'{role}: {at}: cannot be read ({error.strerror or error})') from error


def is_skipped(name):
    """Whether a file or folder is hidden or was left behind by a system."""
    return name.startswith('.') or name in LEFT_BEHIND


def is_folder(entry):
    """Whether an os.DirEntry is a folder or a link to one; False for a link to itself."""
    try:
        return entry.is_dir()
    except OSError as error:
        if error.errno == errno.ELOOP:
            return False
        raise


def is_file(entry):
    """Whether an os.DirEntry is a file, or a link to one, and no pipe or device."""
    try:
        return entry.is_file()
    except OSError:
        return False


def first_lines(lines, count=20):
    """The first lines, and how many more there are."""
    if len(lines) <= count:
        return lines
    return [*lines[:count], f'and {len(lines) - count:,} more']


def require(exists, path, role):
    """Raises BadInput unless exists(path), os.path.isfile or isdir.

    role: the option that named it.
    """
    if exists(path):
        return
    try:
        os.stat(path)
    except (FileNotFoundError, NotADirectoryError):
        pass
    except OSError as error:
        raise BadInput(f'{role}: {path}: cannot be read ({error.strerror})') from error
    kind = 'file' if exists is os.path.isfile else 'folder'
    message = f'{role}: {path}: no such {kind}'
    if str(path).startswith('data/') and not os.path.exists('data'):
        message += (
            "\nThere is no folder data/ here. README.md, 'Data', says where VoxCeleb, MUSAN and "
            'the RIRs come from and how to lay them out. Without any, `bash exps/demo/run.sh` '
            'shows it all at work on synthetic voices.'
        )
    raise BadInput(message)


class Strings:
    """Many strings in two objects.

    Forked workers would copy a list, as reading a string counts its references.
    """

    def __init__(self, strings):
        encoded = [os.fsencode(string) for string in strings]
        self.ends = np.cumsum([0, *map(len, encoded)])
        self.bytes = b''.join(encoded)

    def __len__(self):
        return len(self.ends) - 1

    def __getitem__(self, index):
        return os.fsdecode(self.bytes[self.ends[index] : self.ends[index + 1]])


class TrialList(NamedTuple):
    """A trial list, and which files it needs.

    labels: int8 (N,), 1 for the same speaker; pairs: int32 (N, 2), enrolment and test, indices into
    `names`, the models and files as the list names them; rows: for each name in turn, the numbers
    of its files among all files; name i begins at starts[i]; speakers: int (N, 2), numbers of the
    two speakers of each trial, None where they are not known, and then why.
    """

    path: str
    sha256: str
    labels: np.ndarray
    pairs: np.ndarray
    names: list
    rows: np.ndarray
    starts: np.ndarray
    speakers: np.ndarray | None
    why_no_speakers: str

    def speaker_count(self):
        """How many speakers there are, None where that is not known."""
        return None if self.speakers is None else int(self.speakers.max()) + 1

    def mean(self, values):
        """For each name, the mean over its files of values (files, ...)."""
        if len(self.starts) == len(self.rows):
            return values[self.rows]
        counts = np.diff(self.starts, append=len(self.rows)).astype(values.dtype)
        counts = counts.reshape(-1, *[1] * (values.ndim - 1))
        return np.add.reduceat(values[self.rows], self.starts) / counts


def read_train_list(path):
    """Reads lines `speaker path`.

    Returns (sorted speakers, labels int32 (N,), paths Strings, SHA-256 of the list).
    """
    content = read_list(path, '--train_list')
    numbers = {}  # of the speakers, in the order of the list
    labels = array('i')
    names = []
    for speaker, name in split_lines(content, path, '--train_list', field_fault):
        labels.append(numbers.setdefault(speaker, len(numbers)))
        names.append(name)

    speakers = sorted(numbers)
    rank = np.empty(len(numbers), np.int32)
    rank[[numbers[speaker] for speaker in speakers]] = np.arange(len(numbers))
    speakers = [os.fsdecode(speaker) for speaker in speakers]
    return speakers, rank[np.array(labels)], Strings(names), sha256(content)


def read_trial_lists(lists, folders, enrol_list='', speaker=''):
    """Reads lines `label enrolment test`, or with the label last, of several lists.

    folders: one for all lists, or one for each. enrol_list: lines `model utterance...`, one or
    several of a model; if given, enrolments name these models. speaker: the pattern of
    tools.speakers_of. Returns (paths of all files, [TrialList]); a file in several lists appears
    once. Raises BadInput.
    """
    if len(set(map(str, lists))) < len(lists):
        raise BadInput('--eval_list: names a list twice, whose results would be one')
    if len(folders) == 1:
        folders = folders * len(lists)
    if len(folders) != len(lists):
        raise BadInput(
            f'--eval_path: {len(folders)} folders for {len(lists)} lists; give one, or one for each'
        )
    models, enrolments = read_models(enrol_list)
    rows = {}  # {file: its number among all files}
    trial_lists = []
    for path, folder in zip(lists, folders):
        trial_lists.append(read_trials(path, folder, models, enrolments, rows, speaker))
    return list(rows), trial_lists


def read_models(path):
    """Reads lines `model utterance...`: ({model: its utterances}, bytes of the file).

    Without a path there are neither.
    """
    models = {}
    content = b''
    if path:
        content = read_list(path, '--enrol_list')
        for model, *utterances in split_lines(content, path, '--enrol_list', model_fault):
            models.setdefault(model, []).extend(utterances)
    return models, content


def read_trials(path, folder, models, enrolments, rows_of_files, speaker=''):
    """Reads one trial list; adds its files, with their numbers, to {file: number}."""
    require(os.path.isdir, folder, '--eval_path')
    content = read_list(path, '--eval_list')
    label_at = find_label(content, models, path)
    fault = functools.partial(trial_fault, label_at=label_at, models=models)

    labels = array('b')
    pairs = array('i')
    sides = {}  # {(whether it is a model, name): its number}
    for fields in split_lines(content, path, '--eval_list', fault):
        labels.append(LABELS[fields.pop(label_at)])
        enrolment, test = fields
        # A model may be called as a file is.
        pairs.append(sides.setdefault((bool(models), enrolment), len(sides)))
        pairs.append(sides.setdefault((False, test), len(sides)))
    if min(labels) == max(labels):
        raise BadInput(
            f'--eval_list: {path}: needs trials of both kinds, 1 and 0, for an error rate'
        )

    labels = np.array(labels)
    pairs = np.array(pairs).reshape(-1, 2)

    rows = array('i')
    starts = []
    utterances = []
    for is_model, name in sides:
        starts.append(len(rows))
        for utterance in models[name] if is_model else [name]:
            utterances.append(os.fsdecode(utterance))
            file = os.path.join(folder, utterances[-1])
            rows.append(rows_of_files.setdefault(file, len(rows_of_files)))

    speakers_of_files = speakers_of(utterances, speaker)
    speakers = []  # of each side, None for a model of several
    for start, end in zip(starts, [*starts[1:], len(rows)]):
        several = set(speakers_of_files[start:end])
        speakers.append(several.pop() if len(several) == 1 else None)
    return TrialList(
        path,
        sha256(content + enrolments),
        labels,
        pairs,
        [os.fsdecode(name) for _, name in sides],
        np.array(rows),
        np.array(starts),
        *number_speakers(labels, pairs, speakers),
    )


def find_label(content, models, path):
    """Number of the field that holds the labels of a trial list: 0, or 2 where most are last.

    models: what an enrolment may be, if there are any. Raises BadInput where it may be either.
    """
    lines = 0
    first = 0
    last = 0
    for line in split_text(content):
        fields = line.split()
        if fields:
            lines += 1
            # Files and models may be called 1 and 0.
            enrolment = fields[1] if len(fields) > 1 else None
            first += fields[0] in LABELS and (not models or enrolment in models)
            last += fields[-1] in LABELS and (not models or fields[0] in models)
    if first == last == lines > 0:
        raise BadInput(
            f'--eval_list: {path}: every line begins and ends with a label; rename the files '
            'called so'
        )
    return 2 if last > first else 0


def trial_fault(fields, label_at, models):
    """What is wrong with the fields of a line of a trial list; None if nothing is."""
    if len(fields) != 3:
        return field_fault(fields, 3)
    if fields[label_at] not in LABELS:
        return (
            'a label is 1 or target (same speaker), 0 or nontarget, at the same end of every line'
        )
    enrolment = fields[1 if label_at == 0 else 0]
    if models and enrolment not in models:
        return f'--enrol_list has no model {os.fsdecode(enrolment)}'
    return None


def model_fault(fields):
    """What is wrong with the fields of a line of --enrol_list; None if nothing is."""
    return None if len(fields) > 2 else field_fault(fields)


def field_fault(fields, count=2):
    """What is wrong with the number of the fields of a line; None if nothing is."""
    if len(fields) == count:
        return None
    return f'{count} fields expected, {len(fields)} found'


def choose_normalisation(args):
    """(choose_cohort or None, top_n or None, subtract_mean) of a command's options."""
    top_n = args.top_n if args.score_norm == 'asnorm' else None
    files = None
    if top_n or args.subtract_mean:
        files = choose_cohort(args.train_list, args.train_path, args.cohort_utterances, args.seed)
    return files, top_n, args.subtract_mean


def choose_cohort(train_list, train_path, per_speaker, seed):
    """For each speaker of a training list, the paths of up to per_speaker utterances.

    They are drawn at random.
    """
    require(os.path.isdir, train_path, '--train_path')
    _, labels, names, _ = read_train_list(train_list)
    by_speaker = np.argsort(labels, kind='stable')
    ends = np.cumsum(np.bincount(labels))
    rng = np.random.default_rng(seed)
    cohort = []
    for utterances in np.split(by_speaker, ends[:-1]):
        chosen = rng.permutation(utterances)[:per_speaker]
        cohort.append([os.path.join(train_path, names[i]) for i in chosen])
    return cohort


def read_list(path, role):
    """Bytes of a text list.

    Raises BadInput where there is none, or it begins with a mark that would count as text.
    """
    require(os.path.isfile, path, role)
    with open(path, 'rb') as file:
        content = file.read()
    # A name may begin with the bytes of the latter; half of a Latin letter in UTF-16 is zero.
    is_utf_16 = content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) and 0 in content[2:4]
    if is_utf_16 or content.startswith(codecs.BOM_UTF8):
        raise BadInput(f'{role}: {path}: begins with a byte order mark; save it as UTF-8 without')
    return content


def split_lines(content, path, role, fault):
    """Yields the fields, bytes, of each line that is not blank.

    fault(fields): what is wrong with them, or None. Raises BadInput that shows the first 20 lines
    with a fault; and where there is no line.
    """
    wrong_lines = []
    empty = True
    for number, line in enumerate(split_text(content), 1):
        fields = line.split()
        if not fields:
            continue
        empty = False
        wrong = fault(fields)
        if wrong is None:
            yield fields
        elif len(wrong_lines) < 20:
            text = line.decode(errors='replace').strip()[:80]
            wrong_lines.append(f'{path}, line {number}: {wrong}: {text!r}')
    if wrong_lines:
        raise BadInput('\n'.join([f'{role}: lines that cannot be read:', *wrong_lines]))
    if empty:
        raise BadInput(f'{role}: {path}: the file is empty')


def split_text(content):
    """The lines of bytes, whether they end as on Unix, Windows or an old Macintosh."""
    return io.BytesIO(content.replace(b'\r\n', b'\n').replace(b'\r', b'\n'))


def check_data(dataset, eval_files, eval_path, every_file, n_cpu, max_bad):
    """Looks at the audio of a train_loader and of the trials, paths below the folders eval_path.

    Opens all files of the trials, and reads a sample of the others; or reads every file. Prints
    what is found. Raises BadInput that names the faulty ones, of the training files where they are
    more than max_bad percent.
    """
    require(os.path.isdir, dataset.train_path, '--train_path')
    utterances = np.arange(len(dataset.labels))
    augmentation = [('--musan_path', list(files.paths)) for files in dataset.noises.values()]
    augmentation.append(('--rir_path', list(dataset.rirs)))
    if every_file:
        read_trial_file = functools.partial(read_audio, shortest=SHORTEST)
        augmentation_cpus = n_cpu
    else:
        # All of VoxCeleb2 would take an hour; a wrong folder or rate shows in a sample.
        drawn = np.random.default_rng(dataset.seed).permutation(utterances)
        utterances = np.sort(drawn[:200])
        augmentation = [(role, paths[:: len(paths) // 100 + 1]) for role, paths in augmentation]
        read_trial_file = open_audio
        augmentation_cpus = 0

    paths = [dataset.path(i) for i in utterances]
    faults = check_audio(paths, '--train_list', read_audio, n_cpu, max_bad)
    if faults:
        say(
            f'note          {len(faults)} of {len(paths)} training files cannot be used and will '
            'be replaced:\n' + '\n'.join(faults[:20])
        )
    for role, paths in augmentation:
        # Silence among the noises does no harm; a silent room would leave nothing.
        read = functools.partial(read_audio, silent_ok=role == '--musan_path')
        check_audio(paths, role, read, augmentation_cpus)
    check_audio(eval_files, '--eval_list', read_trial_file, n_cpu)

    scored = set()
    for folder in eval_path:
        scored.update(os.path.relpath(file, folder).split(os.sep)[0] for file in eval_files)
    both = sorted(scored.intersection(dataset.speakers))
    if both:
        say(
            f'WARNING       {len(both)} speakers are in --train_list and in --eval_list '
            f'({", ".join(both[:5])}, ...): the EER will be too good'
        )


def check_audio(paths, role, read=open_audio, n_cpu=0, max_bad=0):
    """What is wrong with files, as lines: what read(path) raises as BadInput, in n_cpu processes.

    Raises BadInput that names the first 20 faulty ones if they are over max_bad percent.
    """
    checks = parallel_map(functools.partial(fault_of, read), paths, n_cpu)
    shown = tqdm(checks, f'checking {role}', len(paths), unit='file', disable=None, leave=False)
    faults = [fault for fault in shown if fault]
    if len(faults) > len(paths) * max_bad / 100:
        raise BadInput(
            f'{role}: {len(faults)} of {len(paths)} files checked cannot be used, the first:\n'
            + '\n'.join(faults[:20])
        )
    return faults


def fault_of(read, path):
    """What read(path) raises as BadInput, as text; '' for nothing."""
    try:
        read(path)
    except BadInput as error:
        return str(error)
    return ''
