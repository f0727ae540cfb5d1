"""Measures the modules against the plain implementations of plain.py, on this machine.

    python tests/benchmark.py                 # all speeds, in two to three minutes on two cores
    python tests/benchmark.py loader step     # some sections: loader, step, pipeline, ...
    python tests/benchmark.py precision       # bfloat16 against float32: losses on real speech

Plain and ours take turns, and a ratio is the median of the ratios of the turns: what else the
machine does then slows both. The data is generated, except that the evaluation uses real speech
where ../shared has some.
"""

import argparse
import contextlib
import itertools
import multiprocessing
import platform
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import NamedTuple
from unittest.mock import patch

import numpy as np
import soundfile
import torch
import torch.distributed as dist
from scipy.signal import resample_poly
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.data import DataLoader
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from plain import (
    PlainAAM,
    PlainDataset,
    PlainECAPA,
    plain_embed,
    plain_figures,
    plain_read_train_list,
    plain_read_trials,
    plain_scores,
    plain_train_step,
)

from dataLoader import (
    make_batches,
    read_train_list,
    read_trial_lists,
    through_codec,
    train_loader,
    usable_codecs,
)
from ECAPAModel import ECAPAModel, choose_device
from exps.export import to_onnx
from exps.scoring import as_norm
from tools import available_cpus, default_n_cpu, operating_points, score_pairs

RATE = 16000
SHARED = Path(__file__).resolve().parents[2] / 'shared'
SPEAKERS = 5994  # of VoxCeleb2


class Row(NamedTuple):
    """A line of the table. ratio: how many times faster ours is; memory: ours / plain."""

    what: str
    ours: str = ''
    plain: str = ''
    ratio: str = ''
    memory: str = ''
    note: str = ''


def timed(function, items, device=None, repeats=1):
    """Returns measure(): the seconds per item of `repeats` calls of function().

    items: how many of them a call goes through.
    """
    cuda = device is not None and device.type == 'cuda'

    def measure():
        if cuda:
            torch.cuda.synchronize(device)
        begin = time.perf_counter()
        for _ in range(repeats):
            function()
        if cuda:
            torch.cuda.synchronize(device)
        return (time.perf_counter() - begin) / items / repeats

    return measure


MOST_TURNS = 7


def compare(what, unit, slow, fast, least=3, work=None, **cells):
    """Row of two functions that return their seconds per item, plain and ours.

    They take MOST_TURNS turns, or fewer once 4 s are over. least: fewest turns; work: (operations
    per item, function that returns the seconds of one in a matrix product, which then takes its
    turn too), for a note.
    """
    if work:
        operations, product = work

    turns = []
    products = []
    begin = time.perf_counter()
    while len(turns) < least or (len(turns) < MOST_TURNS and time.perf_counter() - begin < 4):
        turns.append((slow(), fast()))
        if work:
            products.append(product())
    plain, ours = np.array(turns).T

    if work:
        share = 100 * np.median(operations * np.array(products) / ours)
        peak = quantity(1e-9 / np.median(products))
        cells['note'] = f'ours at {share:.0f}% of the matmul peak, {peak} GFLOP/s'
    our_rate = quantity(1 / np.median(ours))
    plain_rate = quantity(1 / np.median(plain))
    ratio = np.median(plain / ours)
    return Row(what, f'{our_rate} {unit}', f'{plain_rate} {unit}', f'{ratio:.2f}', **cells)


def quantity(x):
    """A number to three digits, without an exponent."""
    return f'{x:,.0f}' if x >= 100 else f'{x:.3g}'


def megabytes(ours, plain):
    """Cell of two numbers of bytes."""
    return f'{ours / 1e6:,.0f} / {plain / 1e6:,.0f} MB'


def in_process(method, function, *args):
    """function(*args) in a new process.

    method: 'spawn' for a fresh one, 'fork' for one that shares this one's memory.
    """
    context = multiprocessing.get_context(method)
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=answer, args=(sender, function, args))
    process.start()
    sender.close()
    result = receiver.recv()
    process.join()
    return result


def answer(sender, function, args):
    """What the process of in_process does."""
    sender.send(function(*args))


def process_bytes(key, file='status'):
    """An entry of /proc/self/status or smaps_rollup in bytes.

    Such as VmRSS (resident now) or VmHWM (at most so far). VmHWM and not getrusage's ru_maxrss: the
    latter starts at the size of the process that started this one.
    """
    kilobytes = 0
    for line in Path('/proc/self', file).read_text().splitlines():
        if line.startswith(f'{key}:'):
            kilobytes += int(line.split()[1])
    return 1024 * kilobytes


# loader: utterances a second of one worker.


def speech_like(rng, seconds):
    """Noise with the rhythm of syllables, float32 (samples,)."""
    t = np.arange(int(seconds * RATE), dtype=np.float32) / RATE
    noise = rng.standard_normal(len(t), dtype=np.float32)
    rhythm = 0.5 + 0.5 * np.sin(2 * np.pi * 4 * t)
    return 0.1 * noise * rhythm


def write_wav(path, audio):
    """Writes 16-bit audio and the folders it needs."""
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, audio, RATE, subtype='PCM_16')


def make_corpus(folder, utterances, minutes):
    """Generates a training list with 8 s utterances, noise and RIRs.

    The noise is MUSAN's, whole and in 5 s pieces every 3 s. minutes: length of the recordings of
    speech; music is two thirds and noise a tenth of it, about as in MUSAN.
    """
    rng = np.random.default_rng(0)
    names = [f'id{i % 10:05d}/video/{i:05d}.wav' for i in range(utterances)]
    for name in names:
        write_wav(folder / 'train' / name, speech_like(rng, 8))
    (folder / 'train.txt').write_text(''.join(f'{name[:7]} {name}\n' for name in names))

    for category, share in (('noise', 0.1), ('speech', 1), ('music', 2 / 3)):
        whole = folder / 'musan' / category / 'source'
        split = folder / 'musan_split' / category / 'source'
        for number in range(3):
            audio = speech_like(rng, 60 * minutes * share)
            write_wav(whole / f'{number}.wav', audio)
            starts = range(0, len(audio) - 5 * RATE + 1, 3 * RATE)
            for piece, start in enumerate(starts):
                path = split / str(number) / f'{piece:05d}.wav'
                write_wav(path, audio[start : start + 5 * RATE])

    decay = np.exp(-np.arange(RATE // 2) / 2000)
    for number in range(20):
        path = folder / 'rirs' / 'smallroom' / 'Room001' / f'Room001-{number:05d}.wav'
        write_wav(path, 0.3 * decay * rng.standard_normal(len(decay)))


def pace(loader):
    """Returns measure(): seconds per utterance of an epoch after its first batch.

    The first batch waits for the worker.
    """

    def measure():
        if hasattr(loader.batch_sampler, 'epoch'):
            loader.batch_sampler.epoch += 1
        batches = iter(loader)
        next(batches)
        begin = time.perf_counter()
        utterances = sum(len(labels) for _, labels in batches)
        return (time.perf_counter() - begin) / utterances

    return measure


def loader_rows(options, folder):
    """Augmented crops of 2 s from one worker process."""
    size = 8 if options.quick else 16
    minutes = 1 if options.quick else 2
    utterances = 32 if options.quick else 96
    make_corpus(folder, utterances, minutes)
    for musan in ('musan', 'musan_split'):
        paths = [str(folder / name) for name in ('train.txt', 'train', musan, 'rirs')]
        plain_data = PlainDataset(*paths, 200)
        plain = DataLoader(plain_data, size, shuffle=True, num_workers=1, drop_last=True)
        ours = make_batches(train_loader(*paths, num_frames=200, seed=10), size, n_cpu=1)
        measure = pace(ours)
        measure()  # so that the worker has seen the noise, as it has in all epochs but the first
        what = f'loader, {musan}/, one worker'
        yield compare(what, 'utt/s', pace(plain), measure, least=2)
    crop = speech_like(np.random.default_rng(0), 2.015)
    for name, codec in usable_codecs().items():
        level = codec.levels and codec.levels[0]
        seconds = timed(partial(through_codec, crop, codec, level), 1, repeats=10)()
        yield Row(f'codec {name}, a crop of 2 s', f'{1000 * seconds:.1f} ms')

    def to_telephone_rate_and_back():
        resample_poly(resample_poly(crop, 1, 2), 2, 1)

    seconds = timed(to_telephone_rate_and_back, 1, repeats=10)()
    yield Row('of which 8 kHz and back', f'{1000 * seconds:.1f} ms')


# step: an optimiser step.


def make_plain_step(C, device):
    """The plain function that takes (audio, labels) through an optimiser step."""
    encoder = PlainECAPA(C).to(device).train()
    classifier = PlainAAM(SPEAKERS, 0.2, 30).to(device)
    parameters = [*encoder.parameters(), *classifier.parameters()]
    optimiser = torch.optim.Adam(parameters, lr=0.001, weight_decay=2e-5)
    return partial(plain_train_step, encoder, classifier, optimiser)


def make_system(C, device='cpu', n_class=SPEAKERS, **options):
    """Our system with the options that all sections share."""
    return ECAPAModel(0.001, 0.97, C, n_class, 0.2, 30, test_step=1, device=str(device), **options)


def make_step(side, device, C, precision='fp32', compile=False):
    """The function that takes (audio, labels) through an optimiser step, ours or plain."""
    if side == 'plain':
        return make_plain_step(C, device)
    return make_system(C, device, precision=precision, compile=compile).train().train_step


def make_batch(device, batch_size):
    """Waveforms (batch_size, 32240), 2 s, and labels (batch_size,)."""
    generator = torch.Generator().manual_seed(0)
    audio = 0.1 * torch.randn(batch_size, 200 * 160 + 240, generator=generator)
    labels = torch.randint(SPEAKERS, (batch_size,), generator=generator)
    return audio.to(device), labels.to(device)


def step_memory(side, device, C, batch_size):
    """Peak memory of making the model and two steps, in bytes above the process before.

    To be run in a fresh process.
    """
    device = torch.device(device)
    cuda = device.type == 'cuda'
    # A step of a small model first: PyTorch loads part of itself then.
    make_step(side, device, 8)(*make_batch(device, 2))

    idle = torch.cuda.memory_allocated(device) if cuda else process_bytes('VmRSS')
    step = make_step(side, device, C)
    batch = make_batch(device, batch_size)
    for _ in range(2):
        step(*batch)
    peak = torch.cuda.max_memory_allocated(device) if cuda else process_bytes('VmHWM')
    return peak - idle


def has_bfloat16(device):
    """Whether bfloat16 is computed in hardware, rather than emulated."""
    if device.type == 'cuda':
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return any(flag in cpu_info() for flag in ('avx512_bf16', 'amx_bf16', ' bf16'))


def multiply(a, b):
    """a @ b, on a GPU in TF32, as in the convolutions, which are the bulk of a step."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = True
    torch.matmul(a, b)
    torch.backends.cuda.matmul.allow_tf32 = before


def matmul_pace(device, dtype):
    """Returns measure(): the seconds of a floating-point operation in large matrix products.

    Of some sizes, it is the fastest.
    """
    sizes = (4096, 8192, 16384) if device.type == 'cuda' else (512, 1024, 2048)
    measures = {}
    for size in sizes:
        a, b = torch.randn(2, size, size, device=device, dtype=dtype)
        product = partial(multiply, a, b)
        operations = 2 * size**3
        once = timed(product, operations, device)
        fastest = min(once() for _ in range(4))
        # Half a second at a time, long enough for a mean over what else the machine does.
        repeats = 1 + int(0.5 / fastest / operations)
        measures[fastest] = timed(product, operations, device, repeats)
    return measures[min(measures)]


def step_sizes(options):
    """(Batch size, numbers of channels) of the optimiser steps."""
    batch_size = 16
    channels = [128, 512, 1024]
    if options.quick:
        batch_size = 4
        channels = [16]
    if options.device.type == 'cuda':
        batch_size = 400

    if options.batch_size:
        batch_size = options.batch_size
    if options.c:
        channels = options.c
    return batch_size, channels


def median_memory(device, C, batch_size, times):
    """Cell of the memory of a step, ours and plain: the medians of several measurements."""
    ours = []
    plain = []
    for _ in range(times):
        ours.append(in_process('spawn', step_memory, 'ours', str(device), C, batch_size))
        plain.append(in_process('spawn', step_memory, 'plain', str(device), C, batch_size))
    return megabytes(np.median(ours), np.median(plain))


def step_rows(options, folder):
    """float32 at each size; at the last of them its memory and bfloat16, on a GPU compiled too.

    Of bfloat16, a GPU's rows compare with the plain step, a CPU's with our own float32.
    """
    device = options.device
    cuda = device.type == 'cuda'
    batch_size, sizes = step_sizes(options)
    C = sizes[-1]
    # First, while this process takes no memory of the GPU; several times, as fragmentation moves it
    # by a tenth.
    memory = median_memory(device, C, batch_size, times=1 if options.quick else 3)
    batch = make_batch(device, batch_size)
    peak = matmul_pace(device, torch.float32)

    def measure(step):
        # Several steps on a GPU, which may queue them without waiting.
        return timed(partial(step, *batch), batch_size, device, repeats=10 if cuda else 1)

    for channels in sizes:
        plain = make_step('plain', device, channels)
        ours = make_step('ours', device, channels)
        plain(*batch)
        with FlopCounterMode(display=False) as counter:
            ours(*batch)
        work = (counter.get_total_flops() / batch_size, peak)
        what = f'step float32, C={channels}, batch {batch_size}'
        row = compare(what, 'utt/s', measure(plain), measure(ours), least=2, work=work)
        if channels == C:
            row = row._replace(memory=memory)
        yield row

    if not has_bfloat16(device):
        yield Row('step bfloat16', note='this CPU has no bfloat16')
        return
    work = (work[0], matmul_pace(device, torch.bfloat16))
    slow = measure(plain if cuda else ours)
    for kind in ('', ', compiled') if cuda else (' ("plain" is our float32)',):
        step = make_step('ours', device, C, 'bf16', compile='compiled' in kind)
        step(*batch)
        what = f'step bfloat16{kind}, C={C}'
        yield compare(what, 'utt/s', slow, measure(step), least=2, work=work)


# traffic: what a step asks of a GPU, counted on tensors without numbers.


class Traffic(TorchDispatchMode):
    """Counts the kernels of the operations inside it, and the bytes that they read and write.

    Views are left out.
    """

    kernels = 0
    size = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if kwargs is None:
            kwargs = {}
        result = function(*args, **kwargs)

        view = function.is_view or function is torch.ops.aten.detach.default
        if function.namespace == 'aten' and not view:
            self.kernels += 1
            for tensor in tree_leaves((args, kwargs, result)):
                if isinstance(tensor, torch.Tensor):
                    self.size += tensor.numel() * tensor.element_size()
        return result


def first_of(processes):
    """A context in which this is the first of several processes, whose exchanges do nothing."""
    if processes == 1:
        return contextlib.nullcontext()
    return patch.multiple(
        dist,
        is_initialized=lambda: True,
        get_rank=lambda: 0,
        get_world_size=lambda: processes,
        all_reduce=lambda tensor: None,
    )


def step_traffic(side, C, batch_size, precision, processes=1):
    """(Kernels, bytes) of an optimiser step that is not compiled.

    batch_size: utterances of one of the processes.
    """
    if side == 'ours':
        step = make_system(C, precision=precision).train().train_step
    else:
        encoder = PlainECAPA(C).train()
        classifier = PlainAAM(SPEAKERS, 0.2, 30)
        parameters = [*encoder.parameters(), *classifier.parameters()]
        optimiser = torch.optim.Adam(parameters, fused=True)

        def step(audio, labels):
            # Without SpecAugment, whose plain form reads numbers, which are not there.
            classifier(encoder(audio, aug=False), labels)[0].backward()
            optimiser.step()

    fake = FakeTensorMode(allow_non_fake_inputs=True)
    with first_of(processes), fake, Traffic() as traffic:
        audio = torch.empty(batch_size, 200 * 160 + 240)
        labels = torch.zeros(batch_size, dtype=torch.long)
        step(audio, labels)
    return traffic.kernels, traffic.size


def traffic_rows(options, folder):
    """At the size of a GPU, on any machine; for one GPU, and for one of several."""
    C = 8 if options.quick else 1024
    batch_size = 8 if options.quick else 400
    # Counting takes as long at every size.
    precisions = ('bf16',) if options.quick else ('fp32', 'bf16')
    several = (2,) if options.quick else (2, 8)
    plain_kernels, plain_size = step_traffic('plain', C, batch_size, 'fp32')
    for precision in precisions:
        kernels, size = step_traffic('ours', C, batch_size, precision)
        yield Row(
            what=f'traffic of a step, {precision}, C={C}, batch {batch_size}',
            ours=f'{kernels:,} kernels, {size / 1e9:.1f} GB',
            plain=f'{plain_kernels:,} kernels, {plain_size / 1e9:.1f} GB',
            ratio=f'{plain_size / size:.2f}',
            note='counted, not timed; plain is in float32, without SpecAugment',
        )
    for precision, processes in itertools.product(precisions, several):
        part = batch_size // processes
        kernels, size = step_traffic('ours', C, part, precision, processes)
        kernels_alone, size_alone = step_traffic('ours', C, part, precision)
        yield Row(
            what=f'... {precision}, one of {processes} processes, {part} utterances',
            ours=f'{kernels:,} kernels, {size / 1e9:.1f} GB',
            ratio=f'{size_alone / size:.2f}',
            note=f'one process with as many: {kernels_alone:,} kernels, {size_alone / 1e9:.1f} GB',
        )


# precision: training in bfloat16 and in float32.


def training_losses(paths, device, C, precision, seed, steps):
    """Losses (steps,) of a training run from scratch, on batches of 16 utterances of 2 s."""
    torch.manual_seed(seed)
    dataset = train_loader(*paths, num_frames=200, seed=seed)
    loader = make_batches(dataset, 16, default_n_cpu())
    system = make_system(C, device, dataset.n_class, precision=precision).train()
    losses = []
    for epoch in itertools.count(1):
        loader.batch_sampler.epoch = epoch
        for audio, labels in loader:
            loss, _, _ = system.train_step(audio.to(device), labels.to(device))
            losses.append(loss.item())
            if len(losses) == steps:
                return np.array(losses)


def precision_rows(options, folder):
    """Loss curves of bfloat16 and of float32 on the same steps of minivox.

    Beside them, how far those of float32 are apart for other seeds.
    """
    source = SHARED / 'minivox'
    if not source.is_dir() or not has_bfloat16(options.device):
        note = 'needs ../shared/minivox, and a device that computes in bfloat16'
        yield Row('precision', note=note)
        return

    names = ('train_list.txt', 'train', 'musan_split', 'simulated_rirs')
    paths = [str(source / name) for name in names]
    seeds = range(1, 4)
    steps = 8 if options.quick else 200
    C = options.c[-1] if options.c else 64
    curves = {}
    for precision, seed in itertools.product(('fp32', 'bf16'), seeds):
        losses = training_losses(paths, options.device, C, precision, seed, steps)
        curve = losses.reshape(8, -1).mean(axis=1)
        curves[precision, seed] = curve
        means = ' '.join(f'{loss:.2f}' for loss in curve)
        note = f'mean losses of {steps // 8} steps: {means}'
        yield Row(f'{precision}, seed {seed}, C={C}', note=note)

    same_seed = [curves['bf16', seed] - curves['fp32', seed] for seed in seeds]
    two_seeds = itertools.combinations(seeds, 2)
    other_seed = [curves['fp32', a] - curves['fp32', b] for a, b in two_seeds]
    yield distance_row('bf16 against fp32, same seed', same_seed)
    yield distance_row('fp32, seed against seed', other_seed)


def distance_row(what, differences):
    """Row of how far pairs of loss curves are apart."""
    distances = np.abs(differences)
    mean = distances.mean()
    return Row(what, note=f'these differ by {mean:.3f} on average, {distances.max():.3f} at most')


# pipeline: from files to optimiser steps, as in training.


def pipeline_sizes(options):
    """Returns (channels, utterances of a batch, utterances that are written)."""
    if options.device.type == 'cuda':
        return 1024, 400, 4000
    if options.quick:
        return 8, 4, 8
    return 64, 16, 32


def pipeline_rows(options, folder):
    """Training on 8 s files, with every processor loading; on a GPU in bfloat16, compiled."""
    device = options.device
    cuda = device.type == 'cuda'
    C, size, utterances = pipeline_sizes(options)
    precision = 'bf16' if cuda and has_bfloat16(device) else 'fp32'
    make_corpus(folder, utterances=utterances, minutes=3 if cuda else 1)

    # On a GPU files are listed several times, so that every worker has many batches to make.
    lines = (folder / 'train.txt').read_text()
    (folder / 'plain.txt').write_text(lines * (3 if cuda else 1))
    (folder / 'ours.txt').write_text(lines * (20 if cuda else 1))

    paths = [str(folder / name) for name in ('train', 'musan', 'rirs')]
    plain_batches = DataLoader(
        PlainDataset(str(folder / 'plain.txt'), *paths, 200),
        size,
        shuffle=True,
        drop_last=True,
        num_workers=default_n_cpu(),
        persistent_workers=True,
        pin_memory=cuda,
    )
    dataset = train_loader(str(folder / 'ours.txt'), *paths, num_frames=200, seed=10)
    batches = make_batches(dataset, size, default_n_cpu(), pin_memory=cuda)

    def epoch(batches, step):
        for audio, labels in batches:
            audio = audio.to(device, non_blocking=True)
            labels = labels.to(device, non_blocking=True)
            step(audio, labels)

    step = make_step('ours', device, C, precision, compile=cuda)
    plain_epoch = partial(epoch, plain_batches, make_step('plain', device, C))
    plain = timed(plain_epoch, len(plain_batches) * size, device)
    ours = timed(partial(epoch, batches, step), len(batches) * size, device)
    ours()  # starts the workers and, on a GPU, compiles
    yield compare(f'pipeline, C={C}, batch {size}', 'utt/s', plain, ours, least=2)


# evaluation: from files to scores.


def trial_list(folder, count):
    """Trials among about `count` files, of minivox if it has as many.

    Returns (path of the trial list, folder of its files, how many).
    """
    source = SHARED / 'minivox'
    audio = source / 'eval'
    rows = []
    if source.is_dir():
        rows = [line.split() for line in (source / 'trials.txt').read_text().splitlines()]
    names = sorted({name for row in rows for name in row[1:]})

    if len(names) < count:
        audio = folder / 'eval'
        rng = np.random.default_rng(0)
        names = [f'id{i % (count // 5):05d}/video/{i:05d}.wav' for i in range(count)]
        for name in names:
            write_wav(audio / name, speech_like(rng, rng.uniform(2, 20)))
        pairs = itertools.combinations(names, 2)
        some = itertools.islice(pairs, 0, None, 1 + count // 100)
        rows = [(str(int(a[:7] == b[:7])), a, b) for a, b in some]

    kept = set(names[:: len(names) // count])
    lines = [' '.join(row) for row in rows if kept.issuperset(row[1:])]
    path = folder / 'trials.txt'
    path.write_text('\n'.join(lines) + '\n')
    return str(path), str(audio), len(kept)


def evaluation_rows(options, folder):
    """Scores of a trial list with the same weights, trained ones if there are some.

    On a GPU at full size.
    """
    device = options.device
    cuda = device.type == 'cuda'
    C = 128
    count = 20
    if cuda:
        C = 1024
        count = 2000
    elif options.quick:
        C = 8
        count = 12
    trials, audio, files = trial_list(folder, count)

    system = make_system(C, device, 204, n_cpu=default_n_cpu() if cuda else 0)
    checkpoint = SHARED / 'golden' / 'ecapa_c128.model'
    if checkpoint.is_file() and C == 128:
        system.load_parameters(str(checkpoint))
    encoder = PlainECAPA(C).to(device)
    encoder.load_state_dict(system.speaker_encoder.state_dict())
    scores = {}

    def plain():
        _, pairs = plain_read_trials(trials, audio)
        paths = sorted({path for pair in pairs for path in pair})
        embeddings = plain_embed(encoder, paths)
        scores['plain'] = plain_scores(embeddings, pairs)

    def ours():
        lists = read_trial_lists([trials], [audio])
        scores['ours'], _ = system.score_lists(*lists)[0]['raw']

    what = f'evaluation, C={C}, {files} files'
    row = compare(what, 'files/s', timed(plain, files), timed(ours, files), least=2)
    difference = np.abs(scores['ours'] - np.array(scores['plain'])).max()
    yield row._replace(note=f'largest difference of scores {difference:.1e}')


# onnx: the exported encoder in onnxruntime.


def onnx_rows(options, folder):
    """Whole utterances of 2 and 8 s, one at a time, on a CPU.

    Of this section "plain" is onnxruntime.
    """
    try:
        import onnxruntime
    except ModuleNotFoundError:
        yield Row('onnx', note='needs the packages onnx and onnxruntime')
        return

    settings = onnxruntime.SessionOptions()
    settings.intra_op_num_threads = torch.get_num_threads()
    repeats = 1 if options.quick else 5
    sizes = (16,) if options.quick else (128, 1024)
    for C in sizes:
        system = make_system(C, n_class=10).eval()
        session = onnxruntime.InferenceSession(
            to_onnx(system), settings, providers=['CPUExecutionProvider']
        )
        for seconds in (2, 8):
            shape = (1, seconds * RATE)
            audio = 0.1 * np.random.default_rng(0).standard_normal(shape, np.float32)
            exported = partial(session.run, None, {'waveform': audio})
            ours = partial(system.speaker_encoder, torch.from_numpy(audio), aug=False)
            ours = torch.inference_mode()(ours)
            row = compare(
                f'embedding, C={C}, {seconds} s, one at a time',
                'utt/s',
                timed(exported, 1, repeats=repeats),
                timed(ours, 1, repeats=repeats),
            )
            yield row._replace(note='not plain but onnxruntime')


# scoring: from embeddings to error rates.


def scoring_rows(options, folder):
    """Trials of Vox1_E's size; the plain loop goes through a twentieth of them, AS-norm a fifth."""
    files = 1450 if options.quick else 145000
    trials = 5800 if options.quick else 580000
    distinct = files // 10
    part = trials // 20
    rng = np.random.default_rng(0)
    units = torch.from_numpy(rng.standard_normal((distinct, 6, 192), dtype=np.float32))
    units = torch.nn.functional.normalize(units, dim=2)

    # Ten copies of each file: the plain implementation would need minutes to make 145,000 different
    # ones.
    plain_embeddings = {str(i): (unit[:1], unit[1:]) for i, unit in enumerate(units)}
    embeddings = torch.stack((units[:, 0], units[:, 1:].mean(dim=1)), dim=1)
    embeddings = np.tile(embeddings.numpy(), (10, 1, 1))
    pairs = rng.integers(files, size=(trials, 2), dtype=np.int32)
    labels = rng.integers(2, size=trials, dtype=np.int8)
    names = [(str(a), str(b)) for a, b in pairs[:part] % distinct]
    scores = {}

    def plain():
        scores['plain'] = plain_scores(plain_embeddings, names)
        plain_figures(scores['plain'], labels[:part].tolist())

    def ours():
        scores['ours'] = score_pairs(embeddings, pairs)
        operating_points(scores['ours'], labels)

    row = compare(
        f'scoring, {files:,} files, {trials:,} trials ({part:,} in plain)',
        'trials/s',
        timed(plain, part),
        timed(ours, trials),
        least=2,
    )
    difference = np.abs(scores['ours'][:part] - np.array(scores['plain'])).max()
    yield row._replace(note=f'rates per trial; largest difference of scores {difference:.1e}')

    speakers = 60 if options.quick else SPEAKERS
    yield as_norm_row(scores['ours'][: trials // 5], embeddings[: files // 5], pairs, speakers)


def as_norm_row(scores, embeddings, pairs, speakers):
    """AS-norm of scores (N,) of the first pairs of embeddings (files, 2, 192)."""
    rng = np.random.default_rng(1)
    cohort = rng.standard_normal((speakers, 2, 192), dtype=np.float32)
    pairs = pairs[: len(scores)] % len(embeddings)
    normalise = partial(as_norm, scores, embeddings, pairs, cohort, 400)
    seconds = timed(normalise, len(embeddings))()
    what = f'as-norm, {len(scores):,} trials, {speakers:,} speakers'
    return Row(what, f'{quantity(1 / seconds)} files/s')


# lists: a training list of VoxCeleb2's size.


def dataset_memory(side, *paths):
    """(bytes that a dataset takes, bytes that a worker makes its own over an epoch).

    To be run in a fresh process.
    """
    before = process_bytes('VmRSS')
    dataset = PlainDataset(*paths, 200) if side == 'plain' else train_loader(*paths, 200)
    taken = process_bytes('VmRSS') - before
    private = in_process('fork', worker_growth, side, dataset)
    return taken, private


def worker_growth(side, dataset):
    """Private memory in bytes that reading a dataset's whole list costs a forked process."""
    before = process_bytes('Private_Dirty', 'smaps_rollup')
    for i in range(len(dataset)):
        path = dataset.paths[i] if side == 'plain' else dataset.path(i)
        assert path
        assert dataset.labels[i] >= 0
    return process_bytes('Private_Dirty', 'smaps_rollup') - before


def lists_rows(options, folder):
    """Reading the list, and the memory of the dataset and of a worker that has gone through it."""
    lines = 10000 if options.quick else 1092009
    train_list = str(folder / 'list.txt')
    with open(train_list, 'w') as file:
        for i in range(lines):
            speaker = f'id{i * SPEAKERS // lines:05d}'
            file.write(f'{speaker} {speaker}/{i // 7 * 7919:011x}/{i:05d}.wav\n')
    make_corpus(folder, utterances=10, minutes=1)
    folders = [str(folder / name) for name in ('train', 'musan_split', 'rirs')]
    paths = [train_list, *folders]
    method = 'fork' if options.quick else 'spawn'
    ours, our_private = in_process(method, dataset_memory, 'ours', *paths)
    plain, plain_private = in_process(method, dataset_memory, 'plain', *paths)

    read_plainly = timed(partial(plain_read_train_list, train_list, folders[0]), lines)
    read = timed(partial(read_train_list, train_list), lines)
    what = f'training list of {lines:,}'
    memory = megabytes(ours, plain)
    yield compare(what, 'lines/s', read_plainly, read, least=2, memory=memory)
    private = megabytes(our_private, plain_private)
    yield Row('... private to a worker after an epoch', memory=private)


def cpu_info():
    """Text of /proc/cpuinfo, empty if there is none."""
    path = Path('/proc/cpuinfo')
    return path.read_text() if path.is_file() else ''


def machine(device):
    """What this runs on, in words."""
    lines = cpu_info().splitlines()
    models = [line.split(': ')[1] for line in lines if line.startswith('model name')]
    if models:
        cpu = models[0]
    elif platform.processor():
        cpu = platform.processor()
    else:
        cpu = platform.machine()

    words = [f'CPU      {cpu}, {available_cpus()} cores']
    if device.type == 'cuda':
        words.append(f'GPU      {torch.cuda.get_device_name(device)}')
    threads = torch.get_num_threads()
    words.append(f'PyTorch  {torch.__version__}, {threads} threads, on {device}')
    return '\n'.join(words)


SECTIONS = {
    'loader': loader_rows,
    'step': step_rows,
    'traffic': traffic_rows,
    'pipeline': pipeline_rows,
    'evaluation': evaluation_rows,
    'onnx': onnx_rows,
    'scoring': scoring_rows,
    'lists': lists_rows,
    'precision': precision_rows,
}


def main(argv=None):
    """Prints a line for each row as it comes, and all of them as a table."""
    parser = argparse.ArgumentParser(
        description='Measure the modules against plain implementations.'
    )
    parser.add_argument(
        'sections', nargs='*', help=f'{", ".join(SECTIONS)} (default: all but precision)'
    )
    parser.add_argument(
        '--device', type=choose_device, default='auto', help='as in trainECAPAModel.py'
    )
    parser.add_argument(
        '--quick', action='store_true', help='small sizes, to see that it runs, not to measure'
    )
    parser.add_argument(
        '--c',
        type=int,
        nargs='+',
        help='channels of the network (default: 128 512 1024 for step, 64 for precision)',
    )
    parser.add_argument(
        '--batch_size', type=int, help='utterances in a step (default: 16, on a GPU 400)'
    )
    options = parser.parse_args(argv)
    unknown = set(options.sections).difference(SECTIONS)
    if unknown:
        parser.error(f'no such section: {", ".join(unknown)}')
    sections = options.sections
    if not sections:
        sections = [name for name in SECTIONS if name != 'precision']

    print(machine(options.device), flush=True)
    rows = [Row('what', 'ours', 'plain', 'ratio', 'memory, ours / plain', '')]
    begin = time.perf_counter()
    for name in sections:
        with tempfile.TemporaryDirectory() as folder:
            for row in SECTIONS[name](options, Path(folder)):
                print('; '.join(cell for cell in row if cell), flush=True)
                rows.append(row)

    widths = [max(len(cell) for cell in column) for column in zip(*rows)]
    print(f'\nIn {time.perf_counter() - begin:.0f} s:')
    for row in rows:
        cells = [cell.ljust(width) for cell, width in zip(row, widths)]
        print('  '.join(cells).rstrip())


if __name__ == '__main__':
    main()
