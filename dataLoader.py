"""Audio on disk: augmented crops for training, utterances for evaluation.

Below: loading processes, audio files, folders, lists, checks. All audio is 16 kHz and mono, as
float32 in [-1, 1].
"""

import codecs
import contextlib
import errno
import filecmp
import functools
import io
import itertools
import math
import mmap
import multiprocessing
import multiprocessing.util
import os
import posixpath
import random
import re
import signal
import stat
import struct
import sys
import tempfile
import wave
from array import array
from fractions import Fraction
from typing import NamedTuple

import numpy as np
import soundfile
import torch
import torchaudio
from scipy.signal import butter, fftconvolve, resample_poly, sosfilt
from torch.utils.data import DataLoader, Dataset, Sampler, default_collate, get_worker_info
from tqdm import tqdm

import tools
from tools import (
    MORE_SHARED_MEMORY,
    BadInput,
    available_cpus,
    first_line,
    message_for,
    note,
    process_count,
    process_rank,
    read_bytes,
    refuse_unknown,
    say,
    sha256,
    write_text,
)

RATE = 16000
LOWEST_RATE = 1000  # Hz; a damaged header may say anything
SPEEDS = (100, 90, 110)  # percent
NOISE_SNR = {'noise': (0, 15), 'speech': (13, 20), 'music': (5, 15)}  # dB, of each clip
NOISE_CLIPS = {'noise': (1, 1), 'speech': (3, 8), 'music': (1, 1)}  # fewest and most clips mixed in
TELEPHONE_RATE = 8000
TELEPHONE_BAND = (300, 3400)  # Hz
PIECE = 5 * RATE  # a noise recording counts by its pieces of 5 s,
PIECE_STEP = 3 * RATE  # which begin every 3 s
LATEST_DIRECT = 0.2  # s; in the rooms of OpenSLR 28 the direct sound comes after 0.07 s at most
ATTEMPTS = 100  # files that are tried in place of one that cannot be used
EVAL_CROP = 300 * 160 + 240
SHORTEST = 257  # samples that a spectrogram needs: each end is extended by 256 of them, reflected
FEWEST_SPEAKERS = 5  # for an interval
SPEAKER_RULE = (
    'the speaker of a file is its first folder, after those that all files of the list share; '
    '--speaker PATTERN takes another part of its path'
)

# How many batches each loading process makes ahead. If the processes are just fast enough on
# average, 2 are enough for a batch that takes twice the mean time. No batch takes so long, because
# it has many utterances: of 20,000 batches the slowest takes 1.25 times the mean time with 50
# utterances, and 1.1 times with 400. More would only fill memory: 16 processes hold 1.7 GB of
# batches of the published size.
PREFETCH = 2

LABELS = {b'1': 1, b'0': 0, b'target': 1, b'nontarget': 0}  # 1: the same speaker
TRAINING_AUDIO = ('.wav', '.flac')  # endings of the files of lists, noises and rooms
# Endings of audio files, and of videos with audio, even if soundfile cannot read them.
AUDIO = {f'.{name.lower()}' for name in soundfile.available_formats()} | {
    '.aac', '.aif', '.amr', '.ape', '.avi', '.m4a', '.m4b', '.mka', '.mkv', '.mov', '.mp4', '.oga',
    '.opus', '.sph', '.webm', '.wma', '.3gp',
}  # fmt: skip
AUDIO -= {'.raw'}
CONVERT = 'ffmpeg -i IN -ar 16000 -ac 1 OUT.wav converts it'
# Folders that operating systems add to people's own; their other additions begin with a dot.
LEFT_BEHIND = ('__MACOSX', '@eaDir', '$RECYCLE.BIN', 'System Volume Information', 'lost+found')
FLAC_BEGIN = re.compile(rb'fLaC[\x00\x80]\x00\x00\x22')  # the mark, the header of STREAMINFO
# Lines of libsndfile's log about a file that ends too early: the bytes of audio that are announced
# and that are there (for W64 and RF64, of the whole file).
CUT_SHORT = re.compile(
    r'^ *(?:data|SSND|BODY|riff|Riff size|Data Size|Data length) *:? *(\d+) \(?should be (\d+)',
    re.MULTILINE,
)


class Codec(NamedTuple):
    """A codec of libsndfile: the sample rate of its audio, its container and its coding.

    levels: the range of its compression levels (0 to 1), None if it has none.
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
# These levels give about 20 to 40 kbit/s for MP3 and 40 to 50 for Vorbis. Opus is not here: it
# takes 20 ms for a crop of 2 s, ten times as long as a telephone codec.
INTERNET = {
    'mp3': Codec(RATE, 'MP3', 'MPEG_LAYER_III', (0.5, 0.99)),
    'vorbis': Codec(RATE, 'OGG', 'VORBIS', (0.7, 1.0)),
}


class train_loader(Dataset):
    """Random augmented crops of the training utterances.

    An item is (FloatTensor (num_frames * 160 + 240,), int label); a label is the speaker's index in
    the sorted `speakers`. dataset[index] draws from torch's generator, as any dataset;
    dataset[epoch, index] depends only on seed, epoch and index.

    train_list: lines `speaker path`, with paths below train_path. musan_path: MUSAN, whole or cut
    into pieces. rir_path: room impulse responses. speed_perturb: play each crop at one of three
    speeds, equally likely. The pitch changes too, so crops at 0.9 and 1.1 count as other speakers.
    Their labels are S to 2 S - 1 and 2 S to 3 S - 1 if the list has S speakers. augment: share of
    the crops that are augmented. codec: share of the crops that then go through a codec. Options of
    the published command that are not used here are accepted; others raise TypeError. Raises
    BadInput if a list or folder cannot be used.

    If the attribute bad_audio is a BadAudio, utterances, noises and rooms that cannot be used are
    added to it, and others replace them. If it is None, such a file raises BadInput.
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
        self.augment_share = augment
        self.codec_share = codec
        self.codecs = usable_codecs() if codec else {}
        self.noises = {}
        self.rir_path = rir_path
        self.rirs = Strings([])
        if augment:
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

        speed_index = rng.randrange(len(self.speeds)) if len(self.speeds) > 1 else 0
        speed = self.speeds[speed_index]
        audio, index = self.read_or_replace(index, math.ceil(self.length * speed / 100), rng)
        audio = change_rate(audio, speed, 100)[: self.length]

        audio = self.augment(audio, rng)
        if self.codec_share and rng.random() < self.codec_share:
            audio = self.through_random_codec(audio, rng)
        label = speed_index * len(self.speakers) + int(self.labels[index])
        return torch.from_numpy(audio), label

    def augment(self, audio, rng):
        """Augments a share of the crops (samples,), in one of five equally likely ways.

        These are reverberation, babble, music, noise, and television (babble and music).
        """
        if rng.random() >= self.augment_share:
            return audio
        way = rng.choice(('reverberation', 'babble', 'music', 'noise', 'television'))
        if way == 'reverberation':
            return self.add_rev(audio, rng)
        if way in ('babble', 'television'):
            audio = self.add_noise(audio, 'speech', rng)
        if way in ('music', 'television'):
            audio = self.add_noise(audio, 'music', rng)
        if way == 'noise':
            audio = self.add_noise(audio, 'noise', rng)
        return audio

    def add_rev(self, audio, rng=None):
        """Puts audio (..., samples) in a random room."""
        rng = rng or random.Random()
        rooms = iter(lambda: self.rirs[rng.randrange(len(self.rirs))], None)
        rir = first_usable(rooms, read_room, self.list_fault)
        return reverberate(audio, rir)

    def add_noise(self, audio, noisecat, rng=None):
        """Adds clips of 'noise', 'speech' or 'music', each at its own SNR, to (..., samples)."""
        rng = rng or random.Random()
        level_db = decibels(audio)
        mixed = np.array(audio, np.float32)
        count = rng.randint(*NOISE_CLIPS[noisecat])
        for clip in self.noises[noisecat].draw(rng, audio.shape[-1], count, self.list_fault):
            snr = rng.uniform(*NOISE_SNR[noisecat])
            clip *= np.float32(10 ** ((level_db - decibels(clip) - snr) / 20))
            mixed += clip
        return mixed

    def through_random_codec(self, audio, rng):
        """Sends audio (samples,) through a random codec: a telephone codec two times in three.

        In half of the cases, a telephone codec also gets audio that is cut to the telephone band.
        """
        group = TELEPHONE if rng.random() < 2 / 3 else INTERNET
        codec = group[rng.choice(list(group))]
        telephone_band = codec.rate == TELEPHONE_RATE and rng.random() < 0.5
        compression = rng.uniform(*codec.levels) if codec.levels else None
        return through_codec(audio, codec, compression, telephone_band)

    def path(self, index):
        """Returns the path of an utterance's file."""
        return os.path.join(self.train_path, self.names[index])

    def read_or_replace(self, index, length, rng):
        """Reads `length` samples of an utterance; returns (samples, index).

        If its file cannot be used, another utterance replaces it, and its index is returned. The
        choice depends only on seed, epoch and index, not on which files are known to be bad.
        """

        def read(candidate):
            return read_crop(self.path(candidate), length, rng), candidate

        return first_usable(self.draw_replacements(index, rng), read, self.list_fault)

    def draw_replacements(self, index, rng):
        """Yields the index of an utterance, then of others of its speaker, then of any speaker."""
        yield index
        same = np.flatnonzero(self.labels == self.labels[index]).tolist()
        yield from rng.sample(same, min(len(same), ATTEMPTS // 2))
        while True:
            yield rng.randrange(len(self))

    def count_folders(self):
        """Returns {folder of noises or rooms: its number of files}."""
        folders = {noises.folder: len(noises.paths) for noises in self.noises.values()}
        if self.rirs:
            folders[self.rir_path] = len(self.rirs)
        return folders

    def list_fault(self, error):
        """Adds the error of an unusable file to bad_audio; raises it if bad_audio is None."""
        if self.bad_audio is None:
            raise error
        self.bad_audio.add(str(error))


def first_usable(candidates, read, on_fault=None):
    """Returns read(candidate) of the first candidate whose file can be used.

    candidates: an iterator that never ends. on_fault: called with the BadInput of each file that
    cannot be used; without it the first BadInput is raised. Raises the last BadInput if none of
    ATTEMPTS candidates can be used.
    """
    for _ in range(ATTEMPTS - 1):
        try:
            return read(next(candidates))
        except BadInput as error:
            if on_fault is None:
                raise
            on_fault(error)
    return read(next(candidates))


class NoiseFiles:
    """The recordings below a folder of MUSAN, drawn by their pieces of 5 s.

    Long recordings are therefore drawn more often, and plain MUSAN and MUSAN cut into pieces give
    the same clips. `pieces` are cumulative numbers of pieces, int64.
    """

    def __init__(self, folder):
        paths = find_audio(folder, '--musan_path')
        self.folder = folder
        self.paths = Strings(paths)
        # disable=None shows the bar on a terminal only.
        shown = tqdm(paths, folder, disable=None, leave=False)
        self.pieces = np.cumsum([self.count_pieces(path) for path in shown])

    @staticmethod
    def count_pieces(path):
        """Counts the pieces of 5 s in a file: at least one, even if the file cannot be used."""
        # A 16-bit wav of this size is one piece: MUSAN cut into pieces has 150,000 files, too many
        # to open.
        small = os.path.exists(path) and os.path.getsize(path) <= 2 * PIECE + 1000
        if small and path.lower().endswith('.wav'):
            return 1
        try:
            with open_audio(path) as file:
                frames = file.announced
                if frames is None:
                    frames = sum(len(block) for block in file.blocks())
        except BadInput:
            return 1
        return 1 + max(0, frames - PIECE) // PIECE_STEP

    def draw(self, rng, length, count, on_fault=None):
        """Yields `count` clips, float32 (length,), of different pieces if there are enough.

        on_fault: as in first_usable; if a file cannot be used, another piece is drawn.
        """
        total = int(self.pieces[-1])
        if count > total:
            pieces = rng.choices(range(total), k=count)
        else:
            pieces = rng.sample(range(total), k=count)
        read = functools.partial(self.read_piece, rng, length)
        for piece in pieces:
            others = iter(lambda: rng.randrange(total), None)
            yield first_usable(itertools.chain([piece], others), read, on_fault)

    def read_piece(self, rng, length, piece):
        """Reads a clip of a piece, float32 (length,)."""
        index = np.searchsorted(self.pieces, piece, side='right')
        before = int(self.pieces[index - 1]) if index else 0
        start = (piece - before) * PIECE_STEP
        return read_crop(self.paths[index], length, rng, piece_start=start)


def read_room(path):
    """Reads a room impulse response, float32 (taps,).

    Raises BadInput as read_audio does, and if the direct sound comes so late that crops would begin
    with silence. The file then begins with silence, or is not a room impulse response.
    """
    rir = read_audio(path)
    direct = int(np.abs(rir).argmax()) / RATE
    if direct > LATEST_DIRECT:
        raise BadInput(
            f'{path}: its strongest sample comes after {direct:.2f} s, but the direct sound of a '
            f'room must come within {LATEST_DIRECT} s; cut off the silence before it'
        )
    return rir


def through_codec(audio, codec, compression=None, telephone_band=False):
    """Writes audio (samples,) with a codec and reads it back; returns float32 (samples,).

    compression: level, if the codec has levels; telephone_band: whether to keep only the telephone
    band (300 to 3,400 Hz). Audio that would clip is turned down. The codecs have no delay (a test
    checks this); some add samples at the end, which are cut.
    """
    samples = len(audio)
    if codec.rate != RATE:
        audio = resample_poly(audio, 1, RATE // codec.rate)
        if telephone_band:
            audio = sosfilt(telephone_filter(), audio)
    audio = audio / max(1.0, np.abs(audio).max() / 0.99)

    file = io.BytesIO()
    options = {} if compression is None else {'compression_level': compression}
    with soundfile.SoundFile(
        file, 'w', codec.rate, 1, codec.coding, format=codec.container, **options
    ) as encoder:
        # A minute at a time: libsndfile crashes if it gets more than two minutes of Vorbis at once.
        for start in range(0, len(audio), 2**20):
            encoder.write(audio[start : start + 2**20])
    file.seek(0)
    audio, _ = soundfile.read(file, dtype='float32')
    if codec.rate != RATE:
        audio = resample_poly(audio, RATE // codec.rate, 1)
    audio = audio[:samples].astype(np.float32)
    return np.pad(audio, (0, samples - len(audio)))


@functools.cache
def telephone_filter():
    """Returns the filter of TELEPHONE_BAND at TELEPHONE_RATE, as second-order sections."""
    return butter(4, TELEPHONE_BAND, 'bandpass', fs=TELEPHONE_RATE, output='sos')


@functools.cache
def usable_codecs():
    """Returns {name: Codec} of TELEPHONE and INTERNET.

    Raises BadInput if this libsndfile lacks one: runs on two machines would then differ.
    """
    codecs = {**TELEPHONE, **INTERNET}
    lacking = [name for name, codec in codecs.items() if not is_usable(codec)]
    if lacking:
        raise BadInput(
            f'--codec: this libsndfile ({soundfile.__libsndfile_version__}) lacks '
            f'{", ".join(lacking)}; pip install --upgrade soundfile'
        )
    return codecs


def is_usable(codec):
    """Returns whether this libsndfile has a Codec."""
    try:
        through_codec(np.zeros(RATE, np.float32), codec, codec.levels and codec.levels[0])
    except (soundfile.SoundFileError, ValueError, TypeError):
        return False
    return True


def reverberate(audio, rir):
    """Convolves audio (..., samples) with rir (taps,), which it first scales to unit energy.

    Returns float32 (..., samples), cut to the length of the audio.
    """
    rir = (rir / np.sqrt(np.sum(rir**2))).reshape((1,) * (audio.ndim - 1) + (-1,))
    return fftconvolve(audio, rir, axes=-1)[..., : audio.shape[-1]].astype(np.float32)


def decibels(audio):
    """Returns the level of audio in dB. The 1e-4 limits how much quiet audio is amplified."""
    return 10 * np.log10(np.vdot(audio, audio) / audio.size + 1e-4)


def change_rate(audio, rate, new_rate):
    """Resamples audio (samples,) from `rate` to `new_rate`.

    Played at the old rate, the result is slower or faster.
    """
    if rate == new_rate:
        return audio
    return torchaudio.functional.resample(torch.from_numpy(audio), rate, new_rate).numpy()


class EpochSampler(Sampler):
    """Yields the full batches of the epoch `epoch`, as lists of (epoch, index).

    Their order depends only on seed and epoch. If processes train together, each gets its part of
    every batch. The last, incomplete batch is dropped.
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
    """Returns a DataLoader of this process's part of full batches.

    Set loader.batch_sampler.epoch before each epoch. batch_size: of all processes together. kwargs:
    those of DataLoader. Raises BadInput if the batch size is too large or cannot be divided.
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
    sampler = EpochSampler(len(dataset), batch_size, dataset.seed)
    n_cpu = usable_processes(n_cpu, len(sampler))
    return Loader(
        dataset,
        n_cpu,
        batch_sampler=sampler,
        collate_fn=stack,
        persistent_workers=n_cpu > 0,
        prefetch_factor=PREFETCH if n_cpu else None,
        **kwargs,
    )


def audio_or_fault(read, path):
    """Reads an utterance for evaluation; returns (tensor (samples,), '') or (None, its fault).

    read: read_audio or read_any.
    """
    try:
        return torch.from_numpy(read(path, shortest=SHORTEST)), ''
    except BadInput as error:
        return None, str(error)


def eval_crops(audio):
    """Cuts (samples,) into five crops of 3 s with evenly spaced starts, (5, 48240).

    An utterance shorter than a crop is repeated.
    """
    if len(audio) < EVAL_CROP:
        audio = audio.repeat(math.ceil(EVAL_CROP / len(audio)))[:EVAL_CROP]
    starts = np.linspace(0, len(audio) - EVAL_CROP, num=5).astype(int)
    return torch.stack([audio[start : start + EVAL_CROP] for start in starts])


# Machinery: loading processes, audio files, folders, lists, checks.


# Loading processes.


class Loader(DataLoader):
    """A DataLoader with n_cpu loading processes, whose errors end the command that uses it.

    With n_cpu = 0 this process reads. kwargs: those of DataLoader.
    """

    def __init__(self, items, n_cpu, **kwargs):
        super().__init__(
            items,
            num_workers=n_cpu,
            worker_init_fn=prepare_worker,
            # A separate generator: starting workers draws from it, and must not advance the global
            # one, from which training draws.
            generator=torch.Generator(),
            **kwargs,
        )

    def __iter__(self):
        if self.num_workers:
            prepare_sockets()
        try:
            with tools.hold_signals():
                batches = super().__iter__()
                tools.helpers[:] = multiprocessing.active_children()
        except OSError as error:
            raise BadInput(
                f'{self.num_workers} loading processes cannot be started ({error.strerror}): use a '
                'smaller --n_cpu'
            ) from error
        return batches


def parallel_map(function, items, n_cpu, **kwargs):
    """Returns an iterable of function(item) for each item, in order, by up to n_cpu processes."""
    n_cpu = usable_processes(n_cpu, len(items))
    if len(items) <= 2:
        n_cpu = 0  # starting a process would take longer than the work
    if n_cpu:
        function = functools.partial(share_result, function)
    # Send the items one by one: a process that is spawned would get a copy of a whole list.
    return Loader(Itself(), n_cpu, sampler=items, batch_size=None, collate_fn=function, **kwargs)


class Itself(Dataset):
    """A dataset in which the index of an item is the item itself."""

    def __getitem__(self, item):
        return item


def usable_processes(n_cpu, tasks):
    """Returns how many of n_cpu loading processes to start for a number of files or batches."""
    most = max(64, available_cpus())
    return min(n_cpu, tasks, most) if n_cpu and can_start_processes() else 0


@functools.cache
def can_start_processes():
    """Returns whether this machine can start loading processes; notes it once if it cannot."""
    try:
        multiprocessing.Lock()
    except (OSError, ImportError) as error:
        note(f'no loading processes: this machine has no semaphores ({error})')
        return False
    return True


def prepare_sockets():
    """Makes a folder for the sockets of loading processes, in /tmp if the path of TMPDIR is long.

    The path of a socket may have 107 bytes, and multiprocessing adds 32 to TMPDIR.
    """
    chosen = tempfile.gettempdir()
    if len(os.fsencode(chosen)) > 75:
        tempfile.tempdir = '/tmp'
    try:
        # Made once; the processes started later use the same folder.
        tools.socket_folder = multiprocessing.util.get_temp_dir()
    finally:
        tempfile.tempdir = chosen


def prepare_worker(worker):
    """Makes a worker ignore Ctrl-C, which the main process handles.

    The worker will also end if its result cannot be sent. It ends at once if the main process has
    died in the meantime.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # PyTorch's workers notice if their parent dies later, but not if it is already dead. With
    # forkserver the parent is the server, which ends after the main process.
    by_server = multiprocessing.get_start_method() == 'forkserver'
    if not by_server and os.getppid() != multiprocessing.parent_process().pid:
        os._exit(1)
    # The thread that sends results would print an error and go on, and the main process would wait
    # for the result for ever.
    multiprocessing.queues.Queue._on_queue_feeder_error = end_worker


def end_worker(queue, error, item):
    """Ends a loading process whose result cannot be sent."""
    print(f'a loading process cannot send its result: {first_line(error)}', file=sys.stderr)
    os._exit(1)


def share_result(function, item):
    """Returns function(item) with its tensors in shared memory: a worker sends only their handles.

    Raises BadInput if there is no room for them, and for errors that message_for knows.
    """
    try:
        result = function(item)
    except OSError as error:
        # Make the message here: the main process would not get the error's number and file.
        message = message_for(error)
        if message is None:
            raise
        raise BadInput(message) from error
    parts = result if isinstance(result, tuple) else (result,)
    with shared_memory_errors():
        for part in parts:
            if isinstance(part, torch.Tensor):
                part.share_memory_()
    return result


def stack(samples):
    """Returns a batch of the samples (waveform, label), in shared memory if a worker makes it."""
    with shared_memory_errors():
        return default_collate(samples)


@contextlib.contextmanager
def shared_memory_errors():
    """Turns PyTorch's error in a block that allocates shared memory into BadInput."""
    try:
        yield
    except RuntimeError as error:
        if get_worker_info() is None:
            raise
        raise BadInput(
            f'a loading process has no shared memory for its result ({first_line(error)}): '
            f'{MORE_SHARED_MEMORY}'
        ) from error


# Audio files.
#
# The length in a header may be wrong. It may be missing (a file that came from a pipe), never
# filled in (a program that was stopped), guessed (an MP3 without a Xing header) or too large (a
# file that was cut). Of several recordings in one file it may count only the first. So one rule
# holds for all files: read blocks until nothing comes, and compare what came with what was
# announced. AudioFile does this. If a file is not whole, training and evaluation refuse it
# (read_audio), and scripts that use a model note it (read_any). Only crops have faster ways
# (read_crop): a 16-bit wav whose header agrees with the size of the file is not read whole, nor is
# any other file whose last announced frame is there.


class AudioFile(soundfile.SoundFile):
    """An open audio file of any rate and number of channels; open_audio makes it.

    source, cut: what prepare_source returns for a path.

    announced: frames that the header announces, None if it does not say. After blocks(), `count` is
    the number of frames that were read, and missing() says why these are not all.
    """

    def __init__(self, path, source, cut):
        self.path = path
        self.source = source
        super().__init__(source)
        self.announced = self.frames if self.frames < 2**62 else None
        self.cut = cut or cut_by_header(self.extra_info)
        self.count = 0
        self.error = None

    def seekable(self):
        """Returns False: soundfile then reads on beyond the announced length."""
        return False

    def close(self):
        """Closes the file, also one that libsndfile reads through Python."""
        super().close()
        if isinstance(self.source, io.FileIO):
            self.source.close()

    def blocks(self, size=2**20):
        """Yields float32 (frames, channels) with at most `size` frames, until nothing comes.

        A file that cannot be decoded to its end ends early: missing() says so.
        """
        # libsndfile converts 16 bits to float more slowly than NumPy does.
        dtype = 'int16' if self.subtype == 'PCM_16' else 'float32'
        if self.format == 'FLAC':
            # libsndfile loses the part of a block that it decoded before an error, so read blocks
            # as short as those of FLAC.
            size = min(size, 4096)
        while self.error is None:
            count = size
            if self.announced and self.announced > self.count:
                count = min(size, self.announced - self.count)
            try:
                block = self.read(count, dtype=dtype, always_2d=True)
            except soundfile.SoundFileError as error:
                self.error = error
                break
            if len(block) == 0:
                break
            self.count += len(block)
            yield to_float(block)
        if self.format == 'FLAC':
            # Not in open_audio: this reads the whole file, and a crop needs a part of it only.
            refuse_streams(self.path, count_flac_streams(self.path))

    def missing(self):
        """Returns why the frames that blocks() yielded are not the whole recording, or ''."""
        if self.cut:
            return f'is cut short: {self.cut}'
        there = f'{self.count / self.samplerate:.2f} s'
        if self.announced and self.count < self.announced:
            announced = f'{self.announced / self.samplerate:.2f} s'
            return f'is cut short: the header announces {announced} of audio, the file has {there}'
        if self.error:
            return f'is damaged: it cannot be decoded after {there}'
        return ''

    def other_format(self):
        """Returns why training and evaluation cannot use the file's rate or channels, or ''."""
        if (self.samplerate, self.channels) == (RATE, 1):
            return ''
        channels = '1 channel' if self.channels == 1 else f'{self.channels} channels'
        return (
            f'is {self.samplerate} Hz with {channels}; it must be {RATE} Hz with 1 channel: '
            f'{CONVERT}'
        )

    def read_at(self, start, count):
        """Reads float32 (count,) of a single channel from frame `start` on, fewer at the end.

        Returns no samples at all if they cannot be decoded.
        """
        with contextlib.suppress(soundfile.SoundFileError):
            self.seek(start)
            return self.read(count, dtype='float32')
        return np.zeros(0, np.float32)

    def is_whole(self):
        """Returns whether the last of the announced frames is there, without reading the others."""
        if self.cut or not self.announced:
            return False
        return len(self.read_at(self.announced - 1, 1)) == 1


def open_audio(path):
    """Opens an audio file of any rate and number of channels; returns an AudioFile.

    Raises BadInput for a file that soundfile cannot read, with the line that converts it, and for a
    path that is not a regular file: a pipe cannot be read twice, and might never end.
    """
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise BadInput(
                f'{path}: is a folder, a pipe or a device; audio must be in a file, where a reader '
                'can seek'
            )
        with open(path, 'rb') as file:
            source, cut = prepare_source(path, file)
        return AudioFile(path, source, cut)
    except FileNotFoundError as error:
        raise BadInput(f'{path}: no such file') from error
    except OSError as error:
        raise BadInput(f'{path}: cannot be read as audio: {error.strerror}') from error
    except (soundfile.SoundFileError, TypeError) as error:  # TypeError for a name that ends in .raw
        reason = getattr(error, 'error_string', str(error)).rstrip('.')
        raise BadInput(f'{path}: cannot be read as audio: {reason}; {CONVERT}') from error


def prepare_source(path, file):
    """Looks into an open file for the wrong lengths that libsndfile does not notice.

    Returns (the path or a CorrectedFile, which libsndfile should open; what is missing, or '').
    Raises BadInput for several streams, one after another, of Ogg or of MP3 with a known length;
    those of FLAC are found when the file is read.
    """
    cut = ''
    header = b''
    has_length = True
    streams = 1
    begin = file.read(12)
    if begin.startswith(b'OggS'):
        streams, is_cut = scan_ogg(file)
        if is_cut:
            cut = 'its last page is incomplete'
    elif begin.startswith((b'RIFF', b'RF64', b'caff', b'.snd')):
        header = completed_header(file, begin)
    else:
        has_length, streams = scan_mp3(file, begin)

    refuse_streams(path, streams)
    if header or not has_length:
        return CorrectedFile(path, header, endless=not has_length), ''
    return os.fsencode(path), cut


def refuse_streams(path, streams):
    """Raises BadInput if a file holds several streams, of which libsndfile reads the first."""
    if streams > 1:
        raise BadInput(
            f'{path}: holds several recordings one after another, of which only the first would be '
            f'read; {CONVERT}'
        )


class CorrectedFile(io.FileIO):
    """A file for libsndfile that shows another beginning or length than it has.

    header: bytes to show in place of its first ones. endless: hide the size of an MP3, so that
    libsndfile counts its frames instead of guessing their number from the size.
    """

    def __init__(self, path, header, endless):
        super().__init__(path)
        self.header = header
        self.endless = endless
        self.at_end = False

    def seek(self, offset, whence=os.SEEK_SET):
        """Moves to a place; the end of an endless file is beyond all numbers."""
        self.at_end = self.endless and whence == os.SEEK_END
        if self.at_end:
            return 2**63 - 1
        return super().seek(offset, whence)

    def tell(self):
        """Returns the place in the file."""
        return 2**63 - 1 if self.at_end else super().tell()

    def readinto(self, buffer):
        """Reads bytes into a buffer; returns how many."""
        start = super().tell()
        count = super().readinto(buffer)
        shown = self.header[start : start + count]
        buffer[: len(shown)] = shown
        return count


def completed_header(file, begin):
    """Returns the header of a wav, RF64, CAF or AU, with a missing length filled in.

    The program wrote to a pipe, in which it cannot go back, or was stopped too early. Returns b''
    if nothing has to be changed.
    """
    if begin.startswith(b'.snd'):
        return begin[:8] + b'\xff' * 4 if begin[8:12] == bytes(4) else b''
    if begin.startswith(b'RF64'):
        file.seek(28)  # the length of the data, in the chunk ds64
        # As a wav it is read to its end: its chunk `data` announces 2**32 - 1 bytes.
        return b'RIFF' if file.read(8) == bytes(8) else b''

    # Go from chunk to chunk up to the one with the samples.
    size = os.fstat(file.fileno()).st_size
    is_caf = begin.startswith(b'caff')
    chunk = struct.Struct('>4sq' if is_caf else '<4sI')
    place = 8 if is_caf else 12
    while place + chunk.size <= size:
        file.seek(place)
        name, length = chunk.unpack(file.read(chunk.size))
        left = size - place - chunk.size
        if name == b'data':
            is_unknown = length == -1 if is_caf else length == 0 and not is_chunk(file, left)
            if not is_unknown:
                return b''
            file.seek(0)
            return file.read(place) + chunk.pack(name, min(left, 2**32 - 1))
        if length < 0:
            return b''
        padding = 0 if is_caf else length % 2
        place += chunk.size + length + padding
    return b''


def is_chunk(file, left):
    """Returns whether the `left` bytes that follow in a wav are a chunk, and not samples."""
    if left < 8:
        return True
    name, length = struct.unpack('<4sI', file.read(8))
    return name.isascii() and name.decode().isprintable() and length <= left - 8


def scan_mp3(file, begin):
    """Looks at the first frame of an MP3, which may announce the length of its stream.

    Returns (whether the length may be trusted, number of streams: 1, or 2 for several). For a file
    that is not an MP3 this is (True, 1).
    """
    place = 0
    if begin.startswith(b'ID3') and len(begin) >= 10:
        # The size of an ID3 tag has seven bits in a byte.
        place = 10
        for number, byte in enumerate(reversed(begin[6:10])):
            place += byte << 7 * number
    file.seek(place)
    frame = file.read(200)
    if not is_mp3_frame(frame):
        return True, 1

    header = max(frame.find(b'Xing'), frame.find(b'Info'))
    if header < 0:
        return False, 1
    flags, _, length = struct.unpack('>III', frame[header + 4 : header + 16])
    if flags & 3 != 3:
        return True, 1  # it has the length in frames, but not that in bytes
    file.seek(place + length)
    after = file.read(4)
    return True, 2 if after.startswith(b'ID3') or is_mp3_frame(after) else 1


def is_mp3_frame(content):
    """Returns whether bytes begin like a frame of an MP3."""
    return len(content) >= 4 and content[0] == 0xFF and content[1] & 0xE6 == 0xE2


def scan_ogg(file):
    """Goes through the pages of an Ogg file; returns (streams in a row, whether it is cut).

    Streams that begin together, as those of a video, count once.
    """
    size = os.fstat(file.fileno()).st_size
    streams = 0
    is_first = False
    place = 0
    while place < size:
        file.seek(place)
        header = file.read(27)
        if not header.startswith(b'OggS'):
            return streams, False  # libsndfile skips bytes that are not a page
        table = file.read(header[26]) if len(header) == 27 else b''
        if len(header) < 27 or len(table) < header[26]:
            return streams, True
        was_first = is_first
        is_first = bool(header[5] & 2)
        streams += is_first and not was_first
        place += 27 + len(table) + sum(table)
    return streams, place > size


def count_flac_streams(path):
    """Returns how many FLAC streams are in a file, by the bytes with which each begins."""
    with open(path, 'rb') as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        return len(FLAC_BEGIN.findall(content))


def cut_by_header(log):
    """Returns what libsndfile's log of opening a file says about missing data, or ''."""
    for announced, there in CUT_SHORT.findall(log):
        if int(there) < int(announced) and not is_placeholder(int(announced)):
            return f'the header announces {announced} bytes of audio, the file has {there}'
    return ''


def is_placeholder(length):
    """Returns whether programs that write to a pipe announce this length in bytes."""
    return length >= 2**62 or any(abs(length - limit) <= 2**16 for limit in (2**31, 2**32))


def read_audio(path, shortest=1, silent_ok=False):
    """Reads a whole file of 16 kHz and one channel, as training and evaluation do.

    Returns float32 (samples,). Raises BadInput for another rate or several channels, a file that is
    cut short or damaged, samples that are not finite, fewer than `shortest` of them, and for
    silence unless silent_ok is true.
    """
    with open_audio(path) as file:
        refuse_file(path, file.other_format())
        blocks = [block[:, 0] for block in file.blocks()]
        refuse_file(path, file.missing())
    audio = np.concatenate(blocks) if blocks else np.zeros(0, np.float32)
    refuse_file(path, sound_fault(audio, shortest, silent_ok))
    return audio


def check_header(path):
    """Raises BadInput if the beginning of a file shows that read_audio would refuse it."""
    with open_audio(path) as file:
        refuse_file(path, file.other_format())
        if file.cut:
            refuse_file(path, file.missing())
        if file.announced == 0:
            refuse_file(path, 'has no samples')


def sound_fault(audio, shortest=1, silent_ok=False):
    """Returns why samples cannot be used, or ''."""
    if len(audio) == 0:
        return 'has no samples'
    energy = np.vdot(audio, audio)
    if not np.isfinite(energy):
        return 'holds samples that are not finite, or huge'
    if len(audio) < shortest:
        return (
            f'has {len(audio)} samples; at least {shortest} ({1000 * shortest // RATE} ms) are '
            'needed for an embedding'
        )
    if energy == 0 and not silent_ok:
        return 'is silent from beginning to end'
    return ''


def refuse_file(path, fault):
    """Raises BadInput about a file if `fault` says what is wrong with it."""
    if fault:
        raise BadInput(f'{path}: {fault}')


def to_float(samples):
    """Converts 16-bit or float samples to float32 in [-1, 1]."""
    audio = samples.astype(np.float32, copy=False)
    if samples.dtype == np.int16:
        audio *= np.float32(1 / 32768)
    return audio


def read_any(path, shortest=1, channel=None):
    """Reads a whole file of any format, as float32 (samples,) of 16 kHz and one channel.

    channel: the number, from 1, of the channel to use in files with several; without it they are
    averaged, unless they cancel each other. A line on standard error says what was converted and
    what is missing. Raises BadInput if nothing is left that can be embedded.
    """
    channel, notes = choose_channel(path, channel)

    # Read, convert to one channel and resample, block by block.
    with open_audio(path) as file:
        rate = file.samplerate
        if rate < LOWEST_RATE:
            raise BadInput(f'{path}: its header says {rate} Hz, which cannot be speech')
        ratio = resampling_ratio(rate)
        mono = (one_channel(block, channel) for block in file.blocks(2**16))
        # An array grows in place; a list of blocks would need the memory twice.
        samples = array('f')
        for block in resample_blocks(mono, ratio):
            samples.frombytes(block.tobytes())
        audio = np.frombuffer(samples, np.float32)
        missing = file.missing()
    fault = sound_fault(audio, shortest)
    if fault and missing:
        fault = f'{missing}, and {fault}'
    refuse_file(path, fault)

    # Say what happened to the recording, and what this means for its scores.
    if missing:
        notes.append(f'{missing}; the {len(audio) / RATE:.2f} s that it has are used')
    if rate != RATE:
        notes.append(f'resampled from {rate} Hz')
    error = abs(float(ratio) * RATE / rate - 1)
    if error > 0:
        notes[-1] += f' by {ratio.numerator}/{ratio.denominator}, {100 * error:.3f} % off'
    if rate < 12000 or is_narrow(audio):
        notes.append(
            'no sound in the upper half of the band, as on a telephone: scores with wideband '
            'recordings are lower, so compare it with recordings of the same kind'
        )
    if notes:
        print(f'{path}: {"; ".join(notes)}', file=sys.stderr)
    return audio


def choose_channel(path, channel):
    """Returns (which channel of a file to use, from 0, or None for the mean of all; notes).

    channel: the number that somebody asked for, from 1, or None. Raises BadInput if the file has
    several channels, but not this one.
    """
    with open_audio(path) as file:
        count = file.channels
        if count == 1:
            return 0, []
        if channel and channel > count:
            raise BadInput(f'{path}: --channel {channel}: it has {count} channels')
        if channel:
            return channel - 1, [f'channel {channel} of {count}']

        mean_energy = 0.0
        energies = np.zeros(count)
        for block in file.blocks(2**16):
            mean = block.mean(axis=1)
            mean_energy += float(np.vdot(mean, mean))
            energies += np.sum(np.square(block, dtype=np.float64), axis=0)
    strongest = int(energies.argmax())
    if mean_energy < energies[strongest] / 10:
        return strongest, [
            f'{count} channels, of which channel {strongest + 1} is used: their mean is much weaker'
        ]
    return None, [f'{count} channels averaged']


def one_channel(block, channel):
    """Returns float32 (frames,) of (frames, channels): a channel, or the mean if it is None."""
    return block.mean(axis=1) if channel is None else np.ascontiguousarray(block[:, channel])


def resampling_ratio(rate):
    """Returns how many samples at `rate` Hz make one at 16 kHz, a Fraction.

    The filter needs memory for the product of numerator and denominator, so both are at most 640.
    For all usual rates the ratio is exact; for others it is less than 0.1 % off.
    """
    return Fraction(rate, RATE).limit_denominator(640 * RATE // max(rate, RATE))


def resample_blocks(blocks, ratio):
    """Resamples blocks (samples,), and yields blocks.

    Joined, they are what change_rate returns for all samples at once. ratio: as resampling_ratio
    returns it.
    """
    if ratio == 1:
        yield from blocks
        return
    step = ratio.numerator  # input samples after which torchaudio's filter repeats
    width = 6 * step / min(step, ratio.denominator) / 0.99  # half of this filter
    margin = step * (1 + math.ceil(width / step))

    # `held` has samples that wait for their right neighbours, after `context` left neighbours.
    held = np.zeros(0, np.float32)
    context = 0
    for block in blocks:
        held = np.concatenate([held, block])
        end = (len(held) - margin) // step * step
        if end < context + margin:
            continue
        output = change_rate(held[: end + margin], step, ratio.denominator)
        yield output[int(context / ratio) : int(end / ratio)]
        held = held[end - margin :]
        context = margin
    if len(held) > context:
        yield change_rate(held, step, ratio.denominator)[int(context / ratio) :]


def is_narrow(audio):
    """Returns whether 16 kHz audio holds nothing above 5.5 kHz, as a telephone's does.

    Just above 4 kHz a recording of 8 kHz has images that resampling left. Measured in minivox, the
    power above 5.5 kHz is at least -53 dB of the whole in each of 810 utterances of LibriSpeech. In
    the 100 test utterances it is at most -60 dB after resampling to 8 kHz and back, and -66 dB
    after any telephone codec of this file.
    """
    frames = audio[: len(audio) // 1024 * 1024].reshape(-1, 1024)
    power = np.zeros(513)
    for start in range(0, len(frames), 1000):
        spectrum = np.fft.rfft(frames[start : start + 1000] * np.hanning(1024).astype(np.float32))
        power += np.sum(np.abs(spectrum) ** 2, axis=0)
    above = power[np.fft.rfftfreq(1024, 1 / RATE) > 5500].sum()
    return bool(above < 10**-5.7 * power.sum())


def read_crop(path, length, rng, piece_start=None):
    """Reads a crop of `length` samples at a random place, float32 (length,).

    An utterance shorter than the crop is repeated. piece_start: None for an utterance; for noise,
    the sample at which the 5 s begin that the crop is drawn from. Noise may be silent, and the
    layout of its files is remembered, as they are read again and again. Raises BadInput as
    read_audio does.
    """
    layout = wav_layout(path) if piece_start is None else known_wav_layout(path)
    if layout:
        offset, frames = layout
        start = draw_start(frames, length, rng, piece_start)
        audio = read_layout(path, offset + 2 * start, min(frames - start, length))
    else:
        audio = decode_crop(path, length, rng, piece_start)

    if piece_start is None and np.vdot(audio, audio) == 0:
        # A silent crop is fine if the file is not silent as a whole.
        read_audio(path)
    return audio if len(audio) == length else np.resize(audio, length)


def decode_crop(path, length, rng, piece_start):
    """Reads a crop of a file that has to be decoded, float32 (at most length,)."""
    with open_audio(path) as file:
        refuse_file(path, file.other_format())
        if file.is_whole():
            start = draw_start(file.announced, length, rng, piece_start)
            count = min(file.announced - start, length)
            audio = file.read_at(start, count)
            if len(audio) == count:
                refuse_file(path, sound_fault(audio, silent_ok=True))
                return audio
    # The length is unknown, or the file has a fault, which read_audio names.
    audio = read_audio(path, silent_ok=True)
    start = draw_start(len(audio), length, rng, piece_start)
    return audio[start : start + length]


def draw_start(frames, length, rng, piece_start):
    """Draws where a crop of `length` samples begins in a file of `frames`, as in read_crop."""
    begin = 0
    end = frames
    if piece_start is not None and piece_start < frames:
        begin = piece_start
        end = min(frames, piece_start + PIECE)
    if end - begin <= length:
        return begin
    return rng.randint(begin, end - length)


def wav_layout(path):
    """Returns (offset in bytes, samples) of a whole 16-bit wav of 16 kHz, or None for others."""
    if not path.lower().endswith('.wav') or not os.path.isfile(path):
        return None
    try:
        # This is faster than soundfile.
        with open(path, 'rb', buffering=0) as file:
            header = wave.open(file)
            offset = file.tell()
            size = os.fstat(file.fileno()).st_size
    except Exception:
        # wave raises many types of errors for damaged files; libsndfile decides what these are.
        return None
    frames = header.getnframes()
    if (header.getframerate(), header.getnchannels(), header.getsampwidth()) != (RATE, 1, 2):
        return None
    return (offset, frames) if 0 < frames <= (size - offset) // 2 else None


# Only the layout is kept: a mapped file holds a file descriptor, and MUSAN has more files than a
# process may have open.
known_wav_layout = functools.lru_cache(maxsize=8192)(wav_layout)


def read_layout(path, offset, samples):
    """Reads 16-bit samples from a place in a file, in bytes; returns float32 (samples,)."""
    try:
        with open(path, 'rb', buffering=0) as file:
            file.seek(offset)
            content = file.read(2 * samples)
    except OSError as error:
        raise BadInput(f'{path}: cannot be read ({error.strerror})') from error
    if len(content) < 2 * samples:
        raise BadInput(f'{path}: is cut short: it was longer when training first read it')
    return to_float(np.frombuffer(content, '<i2'))


class BadAudio:
    """A text file that lists the audio that training cannot use, as lines `path: reason`.

    limit: percent of the utterances, and of the files of each folder, that may be listed in an
    epoch. folders: {folder of noises or rooms: its number of files}.
    """

    def __init__(self, path, limit, folders=()):
        self.path = path
        self.limit = limit
        self.folders = dict(folders)
        self.known = None  # lines after the last call of sort

    def add(self, line):
        """Appends a line; the loading processes call this while they read."""
        try:
            with open(self.path, 'a', encoding='utf-8', errors='surrogateescape') as file:
                file.write(f'{line}\n')
        except OSError as error:
            raise BadInput(f'{self.path}: cannot be written ({error.strerror})') from error

    def sort(self, utterances):
        """Sorts the lines; returns how many utterances were listed since the last call.

        Raises BadInput if more than `limit` percent of the utterances of an epoch were listed, or
        of the files of a folder.
        """
        lines = []
        if os.path.exists(self.path):
            with open(self.path, encoding='utf-8', errors='surrogateescape') as file:
                lines = file.read().split('\n')[:-1]
        distinct = sorted(set(lines))
        if lines != distinct:
            write_text(self.path, ''.join(f'{line}\n' for line in distinct))

        added = set() if self.known is None else set(lines[self.known :])
        self.known = len(distinct)
        for folder, files in self.folders.items():
            inside = {line for line in added if line.startswith(os.path.join(folder, ''))}
            added -= inside
            self.check_limit(inside, files, folder)
        self.check_limit(added, utterances, 'the training files')
        return len(added)

    def check_limit(self, lines, files, role):
        """Raises BadInput if `lines` name more than `limit` percent of so many files."""
        if len(lines) > files * self.limit / 100:
            raise BadInput(
                f'more than --max_bad {self.limit:g}% of {role} cannot be used, {len(lines)} of '
                f'{files} in this epoch; they are in {self.path}, the first:\n{min(lines)}'
            )


# Folders.


def find_audio(folder, role, any_format=False):
    """Returns the sorted paths of all wav and flac files below a folder.

    A note names the other audio files. any_format: return these too, because the caller will check
    each file. Raises BadInput if there is none.
    """
    if any_format:
        paths = [path for path in walk(folder, role) if ending_of(path) in AUDIO]
        if not paths:
            raise BadInput(f'{role}: no audio file ({", ".join(sorted(AUDIO))}) below {folder}')
        return sorted(paths)

    paths, left_out = find_usable(folder, role)
    if left_out:
        note('\n'.join([f'{len(left_out)} files are left out:', *reasons(left_out)]))
    return paths


def find_usable(folder, role):
    """Returns (sorted paths of all wav and flac files, {other audio file: why it is left out})."""
    paths = []
    left_out = {}
    for path in sorted(walk(folder, role)):
        ending = ending_of(path)
        if ending not in AUDIO:
            continue
        if not os.path.isfile(path):
            left_out[path] = 'is not a file, or a link to a file that is not there'
        elif ending not in TRAINING_AUDIO:
            left_out[path] = f'{ending} files are not read; {CONVERT}'
        else:
            paths.append(path)
    if not paths:
        message = f'{role}: no {" or ".join(TRAINING_AUDIO)} file below {folder}'
        raise BadInput('\n'.join([message, *reasons(left_out)]))
    return paths, left_out


def reasons(left_out):
    """Returns the first lines of {path: why it is left out}."""
    return first_lines([f'{path}: {reason}' for path, reason in left_out.items()])


def ending_of(path):
    """Returns the ending of a file's name, in lower case."""
    _, ending = os.path.splitext(path.lower())
    return ending


def walk(folder, role):
    """Returns the paths of all files below a folder; follows links to folders.

    Hidden names and those in LEFT_BEHIND are skipped, and counted in a note. Raises BadInput that
    names a folder if it cannot be read: part of the data would be missing.
    """
    require_folder(folder, role)
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
                        files.append(entry.path)
    if skipped:
        note(
            f'{folder}: {skipped} files and folders are skipped, whose names begin with a dot or '
            f'are one of {", ".join(sorted(LEFT_BEHIND))}'
        )
    return files


def subfolders(folder, role):
    """Returns the sorted names of the folders in a folder, without those that walk skips."""
    with reading_folder(folder, role), os.scandir(folder) as entries:
        return sorted(e.name for e in entries if not is_skipped(e.name) and is_folder(e))


@contextlib.contextmanager
def reading_folder(folder, role):
    """Turns errors of the operating system in the block into BadInput that names the folder."""
    try:
        yield
    except OSError as error:
        at = error.filename or folder
        raise BadInput(f'{role}: {at}: cannot be read ({error.strerror or error})') from error


def is_skipped(name):
    """Returns whether a file or folder is hidden, or is one that operating systems add."""
    return name.startswith('.') or name in LEFT_BEHIND


def is_folder(entry):
    """Returns whether an os.DirEntry is a folder or a link to one."""
    try:
        return entry.is_dir()
    except OSError as error:
        if error.errno == errno.ELOOP:
            return False  # a link to itself
        raise


def first_lines(lines, count=20):
    """Returns the first of some lines, and a line that says how many more there are."""
    if len(lines) <= count:
        return lines
    return [*lines[:count], f'and {len(lines) - count:,} more']


def require_file(path, role):
    """Raises BadInput if there is no such file; role: the option that named the path."""
    if not os.path.isfile(path):
        raise_missing(path, role, 'file')


def require_folder(path, role):
    """Raises BadInput if there is no such folder; role: the option that named the path."""
    if not os.path.isdir(path):
        raise_missing(path, role, 'folder')


def raise_missing(path, role, wanted):
    """Raises BadInput that says why there is no such file or folder (`wanted`)."""
    try:
        os.stat(path)
    except (FileNotFoundError, NotADirectoryError):
        pass
    except OSError as error:
        raise BadInput(f'{role}: {path}: cannot be read ({error.strerror})') from error
    message = f'{role}: {path}: no such {wanted}'
    if str(path).startswith('data/') and not os.path.exists('data'):
        message += (
            "\nThere is no folder data/ here. README.md, 'Data', says where VoxCeleb, MUSAN and "
            'the RIRs come from and how to lay them out. With --augment 0, training needs neither '
            'MUSAN nor the RIRs. `bash exps/demo/run.sh` trains on synthetic voices, and needs '
            'none of them.'
        )
    raise BadInput(message)


# Lists.


class Strings:
    """A list of strings in two objects.

    Forked workers would copy a plain list: reading a string changes its count of references.
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
    """A trial list with N trials. A side of a trial is an enrolment model or a file."""

    path: str
    sha256: str
    labels: np.ndarray  # int8 (N,), 1 for the same speaker
    pairs: np.ndarray  # int32 (N, 2), the sides of each trial: enrolment and test
    names: list  # of the sides, as in the list
    files_of_side: list  # for each side, the numbers of its files among the files of all lists
    speakers: np.ndarray | None  # int (N, 2), the numbers of the two speakers of each trial
    why_no_speakers: str  # if they are not known

    def speaker_count(self):
        """Returns how many speakers there are, None if they are not known."""
        return None if self.speakers is None else int(self.speakers.max()) + 1

    def mean(self, values):
        """Returns the mean of values (files, ...) over the files of each side."""
        if max(map(len, self.files_of_side)) == 1:
            return values[[files[0] for files in self.files_of_side]]
        return np.stack([values[files].mean(axis=0) for files in self.files_of_side])


def read_train_list(path):
    """Reads lines `speaker path`.

    Returns (sorted speakers, labels int32 (N,), paths Strings, SHA-256 of the list).
    """
    content = read_list(path, '--train_list')
    numbers = {}  # {speaker: its number in the order of the list}
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
    more for each model; if it is given, the enrolments of the trials are names of models. speaker:
    the pattern of --speaker. Returns (paths of all files, [TrialList]); a file in several lists
    appears once. Raises BadInput that shows the lines that cannot be used.
    """
    if len(set(map(str, lists))) < len(lists):
        raise BadInput('--eval_list: the same list is given twice')
    if len(folders) == 1:
        folders = folders * len(lists)
    if len(folders) != len(lists):
        raise BadInput(
            f'--eval_path: {len(folders)} folders for {len(lists)} lists; give one, or one for each'
        )
    models, enrolments = read_models(enrol_list)
    numbers_of_files = {}
    trial_lists = []
    for path, folder in zip(lists, folders):
        trial_lists.append(read_trials(path, folder, models, enrolments, numbers_of_files, speaker))
    return list(numbers_of_files), trial_lists


def read_models(path):
    """Reads lines `model utterance...`; returns ({model: its utterances}, bytes of the file).

    Both are empty if there is no path.
    """
    models = {}
    content = b''
    if path:
        content = read_list(path, '--enrol_list')
        for model, *utterances in split_lines(content, path, '--enrol_list', model_fault):
            models.setdefault(model, []).extend(utterances)
    return models, content


def read_trials(path, folder, models, enrolments, numbers_of_files, speaker=''):
    """Reads a trial list; returns a TrialList.

    models, enrolments: as read_models returns them. Adds the files that are new to
    numbers_of_files, {file: its number}.
    """
    require_folder(folder, '--eval_path')
    content = read_list(path, '--eval_list')
    label_at = find_label(content, models, path)
    fault = functools.partial(trial_fault, label_at=label_at, models=models)

    # Read the trials, and number their sides.
    labels = array('b')
    pairs = array('i')
    sides = {}  # {(whether it is a model, name): its number}; a model and a file may share a name
    for fields in split_lines(content, path, '--eval_list', fault):
        labels.append(LABELS[fields.pop(label_at)])
        enrolment, test = fields
        pairs.append(sides.setdefault((bool(models), enrolment), len(sides)))
        pairs.append(sides.setdefault((False, test), len(sides)))
    if min(labels) == max(labels):
        raise BadInput(
            f'--eval_list: {path}: an error rate needs both target trials (1) and non-target '
            'trials (0)'
        )
    labels = np.array(labels)
    pairs = np.array(pairs).reshape(-1, 2)
    names = [os.fsdecode(name) for _, name in sides]
    warn_of_odd_trials(path, labels, pairs, names)

    # Look up the utterances of each side; number their files and their speakers.
    utterances = []
    for is_model, name in sides:
        listed = models[name] if is_model else [name]
        utterances.append([os.fsdecode(utterance) for utterance in listed])
    files_of_side = [number_files(own, folder, numbers_of_files) for own in utterances]
    speakers = number_speakers(labels, pairs, speakers_of_sides(utterances, speaker))
    return TrialList(
        path=path,
        sha256=sha256(content + enrolments),
        labels=labels,
        pairs=pairs,
        names=names,
        files_of_side=files_of_side,
        speakers=speakers[0],
        why_no_speakers=speakers[1],
    )


def number_files(utterances, folder, numbers_of_files):
    """Returns the numbers of utterances below a folder; adds new files to {file: number}."""
    files = [os.path.join(folder, utterance) for utterance in utterances]
    return [numbers_of_files.setdefault(file, len(numbers_of_files)) for file in files]


def speakers_of_sides(utterances, speaker):
    """Returns the speaker of each list of utterances, None if it has several."""
    flat = speakers_of([utterance for own in utterances for utterance in own], speaker)
    ends = np.cumsum([len(own) for own in utterances]).tolist()
    several = [set(flat[begin:end]) for begin, end in zip([0, *ends], ends)]
    return [names.pop() if len(names) == 1 else None for names in several]


def number_speakers(labels, pairs, speakers):
    """Numbers the two speakers of each trial, for intervals.

    labels: (N,); pairs: int (N, 2), indices into `speakers`, a list of names, or None for a model
    of several speakers. Returns (int (N, 2), ''), or (None, why there can be no interval).
    """
    if None in speakers:
        return None, f'a model has utterances of several speakers ({SPEAKER_RULE})'
    number_of = {name: number for number, name in enumerate(sorted(set(speakers)))}
    if len(number_of) < FEWEST_SPEAKERS:
        return None, (
            f'it has {len(number_of)} speakers, and at least {FEWEST_SPEAKERS} are needed '
            f'({SPEAKER_RULE})'
        )
    numbers = np.array([number_of[name] for name in speakers])[pairs]
    wrong = np.flatnonzero((numbers[:, 0] == numbers[:, 1]) != (np.asarray(labels) == 1))
    if len(wrong):
        enrolment, test = (speakers[name] for name in pairs[wrong[0]])
        kind = 'the same speaker' if labels[wrong[0]] else 'different speakers'
        return None, (
            f'{len(wrong)} labels contradict the speakers of the files: for example, a trial of '
            f'{kind} is of {enrolment} and {test} ({SPEAKER_RULE})'
        )
    return numbers, ''


def speakers_of(paths, pattern=''):
    """Returns the speaker of each path of a list.

    pattern: the regular expression of --speaker, whose first group is the speaker. Without it, the
    speaker is the first folder after those that all paths share. Raises BadInput that names a path
    in which the pattern finds no speaker.
    """
    if pattern:
        matches = [re.search(pattern, path) for path in paths]
        for path, match in zip(paths, matches):
            if not match or not match[1]:
                raise BadInput(f'--speaker {pattern}: finds no speaker in {path}')
        return [match[1] for match in matches]
    parts = [split_path(path) for path in paths]
    # The last folder stays: files that are all in one folder are of one speaker.
    shared = os.path.commonprefix([folders[:-2] for folders in parts])
    return [folders[len(shared)] for folders in parts]


def split_path(path):
    """Returns the folders and the file of a path, without '.' and with '/' or '\\' between them."""
    path = posixpath.normpath(path.replace('\\', '/'))
    return path.lstrip('/').split('/')


def warn_of_odd_trials(path, labels, pairs, names):
    """Warns of pairs in a list that have both labels, occur more than once, or are of one file.

    Two spellings of a path are one file, and the order of the two sides does not matter.
    """
    numbers = {}
    same_name = [numbers.setdefault(posixpath.normpath(name), len(numbers)) for name in names]
    low, high = np.sort(np.array(same_name)[pairs], axis=1).T
    _, first, pair, counts = np.unique(
        low * len(names) + high, return_index=True, return_inverse=True, return_counts=True
    )
    targets = np.bincount(pair, labels)
    both = (targets > 0) & (targets < counts)
    faults = {
        'have both labels, so one is wrong': both,
        'occur more than once': (counts > 1) & ~both,
        'compare a file with itself': (low == high)[first],
    }
    for fault, chosen in faults.items():
        if chosen.any():
            enrolment, test = pairs[first[chosen].min()]
            say(
                f'WARNING       --eval_list {path}: {chosen.sum():,} pairs {fault}, for example '
                f'{names[enrolment]} {names[test]}'
            )


def find_label(content, models, path):
    """Returns which field of a trial list is the label, 0 or 2, by the first line.

    models: the names of enrolment models, if there are any. Raises BadInput if it may be both.
    """
    lines = (line.split() for line in io.BytesIO(content))
    fields = next(filter(None, lines), [])
    if len(fields) != 3:
        return 0  # split_lines names the line
    is_first = fields[0] in LABELS and (not models or fields[1] in models)
    is_last = fields[2] in LABELS and (not models or fields[0] in models)
    if is_first and is_last:
        raise BadInput(
            f'--eval_list: {path}: its first line begins and ends with a label; move another line '
            'to the top, or rename the files that are called like labels'
        )
    return 2 if is_last else 0


def trial_fault(fields, label_at, models):
    """Returns why the fields of a line are not a trial, or None."""
    if len(fields) != 3:
        return field_fault(fields, 3)
    if fields[label_at] not in LABELS:
        return (
            'the label must be 1 or target (same speaker), or 0 or nontarget (different speakers), '
            'at the same end of every line'
        )
    enrolment = fields[1 if label_at == 0 else 0]
    if models and enrolment not in models:
        return f'--enrol_list has no model {os.fsdecode(enrolment)}'
    return None


def model_fault(fields):
    """Returns why the fields of a line of --enrol_list are not a model's, or None."""
    return None if len(fields) > 2 else field_fault(fields)


def field_fault(fields, count=2):
    """Returns why a line has the wrong number of fields, or None."""
    if len(fields) == count:
        return None
    return f'{count} fields expected, {len(fields)} found'


def read_list(path, role):
    """Returns the bytes of a list.

    Raises BadInput if it is missing, begins with a byte order mark, or is not text.
    """
    require_file(path, role)
    content = read_bytes(path)
    if content.startswith((codecs.BOM_UTF8, codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        raise BadInput(
            f'{role}: {path}: begins with a byte order mark; save it as UTF-8 without one'
        )
    if b'\0' in content:
        raise BadInput(f'{role}: {path}: is not a text file')
    return content


def split_lines(content, path, role, fault):
    """Yields the fields, bytes, of each line that is not blank.

    fault(fields): returns what is wrong with a line, or None. Raises BadInput that shows the first
    20 wrong lines, or if there is no line at all.
    """
    wrong_lines = []
    empty = True
    for number, line in enumerate(io.BytesIO(content), 1):
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


# Checks.


def check_data(dataset, eval_files, every_file, n_cpu, max_bad):
    """Checks the audio of a train_loader, and the files of the trials.

    Reads every file if every_file is true; otherwise a sample of the training files, and of many
    files of trials only the headers. Prints which training files will be replaced. Raises BadInput
    that names the bad files if a file of the trials is bad, or more than max_bad percent of the
    training files or of a folder of noises or rooms.
    """
    require_folder(dataset.train_path, '--train_path')
    if every_file:
        check_every_file(dataset, eval_files, n_cpu, max_bad)
    else:
        check_a_sample(dataset, eval_files, n_cpu, max_bad)


def check_every_file(dataset, eval_files, n_cpu, max_bad):
    """Reads every file that training and its tests need."""
    paths = [dataset.path(index) for index in range(len(dataset))]
    check_audio(paths, '--train_list', read_audio, n_cpu, max_bad)
    for noises in dataset.noises.values():
        check_audio(list(noises.paths), '--musan_path', read_noise, n_cpu, max_bad)
    check_audio(list(dataset.rirs), '--rir_path', read_room, n_cpu, max_bad)
    check_audio(eval_files, '--eval_list', read_for_trial, n_cpu)


def check_a_sample(dataset, eval_files, n_cpu, max_bad):
    """Reads a sample of the training files, and all files of the trials.

    Reading all of VoxCeleb2 would take an hour, and a sample shows a wrong folder or rate. But the
    first test, perhaps hours later, would stop at a single bad file of the trials. Of more than
    10,000 files, as in Vox1_E, only the headers are read.
    """
    drawn = np.random.default_rng(dataset.seed).permutation(len(dataset))
    paths = [dataset.path(index) for index in np.sort(drawn[:200])]
    check_audio(paths, '--train_list', read_audio, n_cpu, max_bad)
    for noises in dataset.noises.values():
        check_audio(some_of(noises.paths), '--musan_path', read_noise, 0, max_bad)
    check_audio(some_of(dataset.rirs), '--rir_path', read_room, 0, max_bad)
    read = read_for_trial if len(eval_files) <= 10000 else check_header
    check_audio(eval_files, '--eval_list', read, n_cpu)


def some_of(paths, count=100):
    """Returns about `count` of Strings, spread evenly."""
    return [paths[index] for index in range(0, len(paths), len(paths) // count + 1)]


read_noise = functools.partial(read_audio, silent_ok=True)
read_for_trial = functools.partial(read_audio, shortest=SHORTEST)


def check_audio(paths, role, read=check_header, n_cpu=0, max_bad=0):
    """Calls read(path) for each path, in n_cpu processes.

    Prints which files cannot be used. Raises BadInput that names the first 20 of them if more
    than max_bad percent are bad, or all of them.
    """
    checks = parallel_map(functools.partial(fault_of, read), paths, n_cpu)
    shown = tqdm(checks, f'checking {role}', len(paths), unit='file', disable=None, leave=False)
    faults = [fault for fault in shown if fault]
    lines = '\n'.join(first_lines(faults))
    if len(faults) > len(paths) * max_bad / 100 or len(faults) == len(paths) > 0:
        raise BadInput(
            f'{role}: {len(faults)} of {len(paths)} files checked cannot be used, the first:\n'
            f'{lines}'
        )
    if faults:
        say(
            f'note          {role}: {len(faults)} of {len(paths)} files checked cannot be used and '
            f'will be replaced:\n{lines}'
        )


def fault_of(read, path):
    """Returns the message of the BadInput that read(path) raises, or ''."""
    try:
        read(path)
    except BadInput as error:
        return str(error)
    return ''


def check_lists(dataset, eval_files, eval_path, speaker=''):
    """Prints warnings about the list of a train_loader, and about data that the trials share.

    eval_files: paths of the trials' files below the folders eval_path. speaker: the pattern of
    --speaker.
    """
    names = {file: file for file in eval_files}  # {file of the trials: its path in a list}
    for folder in eval_path:
        for file in eval_files:
            if file.startswith(os.path.join(folder, '')):
                names[file] = os.path.relpath(file, folder)
    warnings = [
        *odd_training_lines(dataset),
        *shared_files(dataset, names),
        *shared_speakers(dataset, names.values(), speaker),
    ]
    for warning in warnings:
        say(f'WARNING       {warning}')


def odd_training_lines(dataset):
    """Returns warnings about a list of a single speaker, and about files that are listed twice."""
    warnings = []
    if len(dataset.speakers) == 1:
        warnings.append(
            f'--train_list has a single speaker, {dataset.speakers[0]}: the loss will be 0, and '
            'nothing will be learned'
        )

    # Two spellings of a path are one file. Hashes take less memory than a million paths.
    paths = array('q', (hash(posixpath.normpath(name)) for name in dataset.names))
    order = np.argsort(paths, kind='stable')
    again = np.flatnonzero(np.diff(np.array(paths)[order]) == 0)
    first = order[again]
    second = order[again + 1]
    same_speaker = dataset.labels[first] == dataset.labels[second]
    faults = {
        'files are listed under two speakers, so one of the two is wrong': ~same_speaker,
        'files are listed more than once': same_speaker,
    }
    for fault, chosen in faults.items():
        if chosen.any():
            index = first[chosen].min()
            warnings.append(
                f'--train_list: {chosen.sum():,} {fault}, for example {dataset.names[index]} of '
                f'{dataset.speakers[dataset.labels[index]]}'
            )
    return warnings


def shared_files(dataset, eval_names):
    """Returns a warning if files of the trials, {path: name in the list}, are also trained on.

    These are the same files, or have the same names below --train_path and the same content.
    """
    root = os.path.realpath(dataset.train_path)
    candidates = {}
    for file, name in eval_names.items():
        candidates[os.path.join(root, posixpath.normpath(name))] = file
        candidates[os.path.realpath(file)] = file

    both = set()
    for name in dataset.names:
        path = os.path.join(root, posixpath.normpath(name))
        if path in candidates and is_same_file(path, candidates[path]):
            both.add(candidates[path])
    if not both:
        return []
    return [
        f'{len(both):,} files are in --train_list and in --eval_list, for example {min(both)}: '
        'the EER will be too good'
    ]


def is_same_file(a, b):
    """Returns whether two paths lead to one file, or to files with equal content."""
    with contextlib.suppress(OSError):
        return os.path.samefile(a, b) or filecmp.cmp(a, b, shallow=False)
    return False


def shared_speakers(dataset, eval_names, speaker):
    """Returns a warning if speakers of the trials are also trained on.

    Speakers of the training list are those that it names and those of its paths, because a list may
    number its speakers.
    """
    trained = set(dataset.speakers) | speakers_of_many(dataset.names, speaker)
    both = sorted(trained & speakers_of_many(eval_names, speaker))
    if not both:
        return []
    return [
        f'{len(both):,} speakers are in --train_list and in --eval_list '
        f'({", ".join(first_lines(both, 5))}): the EER will be too good'
    ]


def speakers_of_many(names, speaker):
    """Returns the set of the speakers of many paths; paths without a speaker are left out."""
    if not speaker:
        # One file of each folder is enough. The name of a file in no folder is not a speaker.
        one_of_folder = {os.path.dirname(name): name for name in names}
        one_of_folder.pop('', None)
        return set(speakers_of(list(one_of_folder.values())))
    found = set()
    for name in names:
        with contextlib.suppress(BadInput):
            found.update(speakers_of([name], speaker))
    return found
