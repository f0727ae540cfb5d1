"""The system: encoder, classifier and optimiser; a step, an epoch, evaluation.

Below the class: checkpoints (saving, resuming, reading) and devices.
"""

import contextlib
import functools
import glob
import io
import math
import os
import re
import sys
import time
import zipfile
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

import tools
from dataLoader import (
    EVAL_CROP,
    RATE,
    audio_or_fault,
    eval_crops,
    parallel_map,
    read_any,
    read_audio,
    read_trial_lists,
    require_file,
)
from loss import LOSSES, loss_of
from model import ENCODERS, HOP, encoder_of
from tools import BadInput, process_count, process_rank, say

LOOK_EVERY = 10  # steps from one look at the losses to the next; a look waits for the GPU
BATCH_FRAMES = 16384  # frames in a batch of evaluation on a GPU: about 1.5 GB with 1,024 channels
CPU_BATCH_FRAMES = 4096  # the same on a CPU: larger batches do not stay in its cache
WINDOW_FRAMES = 8 * BATCH_FRAMES  # frames read before they are sorted by length into batches
SHAPE_STEP = 64  # frames are padded to multiples of it: a GPU plans anew for each new length
LONGEST = 300 * RATE  # samples of the longest recording that is embedded in one piece

# Files that people give in place of a checkpoint by mistake: {how they begin: what to do}.
OTHER_FILES = {
    rb'version https://git-lfs': (
        'it is a Git LFS pointer, which stands for the file: run `git lfs pull` in its repository, '
        'or download the file itself'
    ),
    rb'\s*<(!doctype|html|head|\?xml|!--)': (
        'it is a web page (HTML): download the file itself, by its "raw" or "download" link'
    ),
    rb'.{8}\{\s*"': (
        'it is a safetensors file: in Python, torch.save(safetensors.torch.load_file(FILE), OUT) '
        'converts it'
    ),
}


class Scored(NamedTuple):
    """Scores (N,) of a trial list, and their figures, as operating_points returns them."""

    scores: np.ndarray
    figures: dict


class ECAPAModel(nn.Module):
    """Speaker encoder and classifier, with the optimiser that trains them.

    lr: learning rate; with schedule 'step' it is multiplied by lr_decay every test_step epochs.
    C: channels of the encoder.
    n_class: number of speakers. m, s: margin and scale of AAM-softmax. device: see choose_device.
    n_cpu: processes that read files in evaluation. encoder, loss: names in model.ENCODERS and
    loss.LOSSES.

    precision: 'bf16' (convolutions of the encoder in bfloat16; features, pooling statistics and
    loss in float32), 'fp32' (PyTorch's default: a GPU rounds convolutions to TF32), 'exact'
    (float32 without TF32, in forward, train_step and all evaluation), or 'auto': bf16 on a GPU that
    supports it, otherwise fp32.

    The other options are those of the command, with its defaults. Options of the published command
    that are not used here are accepted; others raise TypeError.

    If several processes train together, gradients are averaged over them, and batch norms use the
    statistics of all. Below, D is the size of an embedding, 192 for ECAPA-TDNN.
    """

    def __init__(
        self, lr, lr_decay, C, n_class, m, s, test_step,
        device='auto', precision='auto', n_cpu=0, compile=False,
        optimizer='adam', weight_decay=2e-5, clip=0.0, accumulate=1, freeze_epochs=0,
        schedule='step', min_lr=0.0, warmup=0.0, max_epoch=80,
        margin_from=None, margin_epochs=(0.0, 1.0), no_specaug=False, encoder='ecapa', loss='aam',
        **published,
    ):  # fmt: skip
        super().__init__()
        tools.refuse_unknown(ECAPAModel, published)

        # Device and precision.
        self.device = choose_device(device)
        self.on_gpu = self.device.type == 'cuda'
        self.precision = precision
        if precision == 'auto':
            half = self.on_gpu and torch.cuda.is_bf16_supported(including_emulation=False)
            self.precision = 'bf16' if half else 'fp32'
        self.n_cpu = n_cpu
        self.share_idle = 0.0  # share of the last epoch in which the device waited for data
        self.warned_of_waiting = False

        # Encoder and classifier.
        self.encoder_name = encoder
        self.C = C
        self.n_class = n_class
        self.speaker_encoder = ENCODERS[encoder](C).to(self.device)
        if no_specaug:
            self.speaker_encoder.specaug = nn.Identity()
        self.embedding_size = self.speaker_encoder.embedding_size
        self.speaker_loss = LOSSES[loss](n_class, m, s, self.embedding_size).to(self.device)
        self.train_encode = self.speaker_encoder.encode
        if compile:
            self.train_encode = torch.compile(self.train_encode)

        # Optimiser.
        if optimizer == 'sgd':
            # Not fused: the fused SGD fails if at first only the classifier has gradients.
            self.optim = torch.optim.SGD(
                self.parameters(), lr=lr, momentum=0.9, nesterov=True, weight_decay=weight_decay
            )
        else:
            self.optim = torch.optim.Adam(
                self.parameters(), lr=lr, weight_decay=weight_decay, fused=True
            )
        # An attribute of the published code; not used here, where rate_at sets the learning rate.
        self.scheduler = torch.optim.lr_scheduler.StepLR(self.optim, test_step, gamma=lr_decay)

        # Steps and schedules.
        self.clip = clip
        self.accumulate = accumulate
        self.freeze_epochs = freeze_epochs
        self.lr = lr
        self.lr_decay = lr_decay
        self.test_step = test_step
        self.schedule = schedule
        self.min_lr = min_lr
        self.warmup = warmup
        self.max_epoch = max_epoch
        self.margin = m
        self.margin_from = m if margin_from is None else margin_from
        self.margin_epochs = margin_epochs

    def set_rate_and_margin(self, epochs_done):
        """Sets learning rate and margin after `epochs_done` epochs; returns the rate.

        2.5 is in the middle of the third epoch. Both depend on this number only, so they are the
        same after a resume and for any number of processes. A warm-up begins with a rate of 0: its
        first step changes only the statistics of batch norms.
        """
        self.speaker_loss.set_margin(self.margin_at(epochs_done))
        rate = self.rate_at(epochs_done)
        self.optim.param_groups[0]['lr'] = rate
        return rate

    def rate_at(self, epochs_done):
        """Returns the learning rate after `epochs_done` epochs, which may be a fraction."""
        if self.schedule == 'step':
            rate = self.lr * self.lr_decay ** (int(epochs_done) // self.test_step)
        elif self.schedule == 'cosine':
            fallen = ramp(epochs_done, self.warmup, self.max_epoch)
            height = (1 + math.cos(math.pi * fallen)) / 2
            rate = self.min_lr + (self.lr - self.min_lr) * height
        else:
            raise ValueError(f'schedule={self.schedule!r}: it must be step or cosine')
        if epochs_done < self.warmup:
            rate *= epochs_done / self.warmup
        return rate

    def margin_at(self, epochs_done):
        """Returns the margin after `epochs_done` epochs, which may be a fraction."""
        grown = ramp(epochs_done, *self.margin_epochs)
        return self.margin_from + (self.margin - self.margin_from) * grown

    def forward(self, audio, labels):
        """Returns (loss, accuracy (1,) in percent) for waveforms (B, samples) and labels (B,).

        The features are masked at random (SpecAugment), unless no_specaug is true.
        """
        # Compiling takes minutes: frozen epochs are too few to gain from it.
        encode = self.train_encode if self.speaker_encoder.training else self.speaker_encoder.encode
        half = self.precision == 'bf16'
        with self.float32_as_asked():
            features = self.speaker_encoder.features(audio, aug=True)  # (B, 80, T)
            with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=half):
                embedding = encode(features)  # (B, D)
            return self.speaker_loss(embedding, labels)

    def float32_as_asked(self):
        """Returns the context in which float32 is as precise as `precision` says.

        forward, train_step and embed_files use it. Code that calls backward() itself needs it too.
        """
        return without_tf32() if self.precision == 'exact' else contextlib.nullcontext()

    def train_step(self, audio, labels):
        """Takes an optimiser step on waveforms (B, samples) and labels (B,).

        Returns [loss, accuracy in percent, norm of the gradient] (3,), without waiting for a GPU.
        """
        # Sum the gradients of the parts of the batch.
        self.optim.zero_grad()
        totals = 0
        audio_parts = audio.tensor_split(self.accumulate)
        label_parts = labels.tensor_split(self.accumulate)
        for part, part_labels in zip(audio_parts, label_parts):
            loss, accuracy = self(part, part_labels)
            weight = len(part) / len(audio)
            with self.float32_as_asked():
                (loss * weight).backward()
            totals += weight * torch.stack([loss.detach(), accuracy.squeeze()])

        # Average them over processes, clip them, and change the weights.
        parameters = [p for p in self.parameters() if p.grad is not None]
        if process_count() > 1:
            average_gradients(parameters)
        norm = torch.nn.utils.get_total_norm([p.grad for p in parameters])
        if self.clip:
            torch.nn.utils.clip_grads_with_norm_(parameters, self.clip, norm)
        self.optim.step()
        return torch.cat([totals, norm.view(1)])

    def train_network(self, epoch, loader):
        """Trains one epoch over a loader of (waveforms (B, samples), labels (B,)).

        Returns (mean loss, last learning rate, mean accuracy in percent), with the means over all
        processes. The progress bar shows the running means of the first process. Raises BadInput if
        the loader has no batch, and Diverged at most LOOK_EVERY steps after a loss or gradient that
        is not finite.
        """
        steps = len(loader)
        if steps == 0:
            raise BadInput('an epoch has no full batch: the list is shorter than --batch_size')

        # Frozen epochs train only the classifier.
        self.train()
        trains_encoder = epoch > self.freeze_epochs
        self.speaker_encoder.train(trains_encoder).requires_grad_(trains_encoder)

        batches = TimedBatches(loader, self.on_gpu)
        not_seen = []  # batches and results since the last look
        totals = torch.zeros(3, dtype=torch.float64)
        # disable=None shows the bar only on a terminal.
        hide = True if process_rank() > 0 else None
        bar = tqdm(desc=f'epoch {epoch}', total=steps, unit='step', disable=hide)
        with bar, tuned_convolutions():
            for step, batch in enumerate(batches, 1):
                # Take a step.
                lr = self.set_rate_and_margin(epoch - 1 + (step - 1) / steps)
                audio = self.copy_to_device(batch[0])
                labels = self.copy_to_device(batch[1])
                not_seen.append((batch, self.train_step(audio, labels)))

                # Look at the results from time to time: only here does the loop wait for a GPU.
                if len(not_seen) == LOOK_EVERY or step == steps or not self.on_gpu:
                    totals += sum_of_finite(not_seen, epoch, step)
                    not_seen = []
                    self.share_idle = batches.share_idle()
                    loss, accuracy, _ = (totals / step).tolist()
                    speed = step * len(labels) * process_count() / batches.seconds()
                    bar.set_postfix_str(
                        f'loss {loss:.3f}, acc {accuracy:.2f}%, lr {lr:.6f}, {speed:.0f} utt/s, '
                        f'{100 * self.share_idle:.0f}% waiting for data',
                        refresh=False,
                    )
                bar.update()

        if self.share_idle > 0.3 and steps > 20:
            self.warn_of_waiting()

        # Average over the steps of all processes.
        if process_count() > 1:
            totals = tools.sum_over_processes(totals.to(self.device))
        loss, accuracy, _ = (totals / (steps * process_count())).tolist()
        return loss, lr, accuracy

    def warn_of_waiting(self):
        """Prints once, on standard error, that training often waited for data."""
        if self.warned_of_waiting or process_rank() > 0:
            return
        self.warned_of_waiting = True
        print(
            f'Training waited for data {100 * self.share_idle:.0f}% of the time: the '
            f'loader is the bottleneck. Try another --n_cpu (now {self.n_cpu}; this machine has '
            f'{tools.available_cpus()} processors), or a faster disk.',
            file=sys.stderr,
        )

    def eval_network(self, eval_list, eval_path):
        """Returns (EER in percent, minDCF for p_target 0.05) of a list with files in eval_path."""
        (kinds,) = self.score_lists(*read_trial_lists([eval_list], [eval_path]))
        figures = kinds['raw'].figures
        return figures['EER']['value'], figures['minDCF(0.05)']['value']

    def score_lists(self, paths, trial_lists):
        """Scores trial lists of read_trial_lists; returns {'raw': Scored} for each of them."""
        embeddings = self.embed_files(paths)
        results = []
        for trials in trial_lists:
            vectors = tools.unit_whole(trials.mean(embeddings))
            scores = tools.score_pairs(vectors, trials.pairs)
            figures = tools.operating_points(scores, trials.labels)
            results.append({'raw': Scored(scores, figures)})
        return results

    def embed(self, paths, channel=None):
        """Returns unit embeddings, float32 (N, D), of whole files of any rate and channel count.

        channel: as in embed_files. A note on standard error names each file that is converted.
        Raises BadInput, as embed_files does, if a file cannot be used.
        """
        return self.embed_files(paths, any_format=True, channel=channel)[:, 0]

    @torch.inference_mode()
    def embed_files(self, paths, any_format=False, channel=None, faults=None):
        """Embeds each file as two vectors; returns float32 (N, 2, D).

        The first is the unit embedding of the whole utterance. The second is the mean of the unit
        embeddings of its five crops, so the dot product of two means is the mean over 25 pairs of
        crops. A recording longer than five minutes is cut into equal parts; its first vector is the
        unit vector of the sum of their embeddings.

        any_format: also read files of other rates and numbers of channels; `channel` (from 1)
        chooses a channel. If several processes train together, each reads a part of the files,
        and all return the same.

        Raises BadInput that names every file that cannot be used, or whose embedding is zero or not
        finite. If `faults` is a dictionary, these files are added to it instead, as
        {index: what is wrong}, and their rows have no meaning.
        """
        # Read files, and embed them as soon as there are many.
        self.eval()
        read = functools.partial(read_any, channel=channel) if any_format else read_audio
        embeddings = torch.zeros(len(paths), 2, self.embedding_size, device=self.device)
        found = {}
        pending = []
        frames = 0
        for index, audio in self.read_own_part(paths, read, found, faults is None):
            pending.append((index, audio))
            frames += 1 + len(audio) // HOP
            if frames > WINDOW_FRAMES:
                self.embed_window(pending, embeddings)
                pending = []
                frames = 0
        self.embed_window(pending, embeddings)

        # Join the parts of all processes: each has zeros in the rows of the others.
        embeddings = tools.sum_over_processes(embeddings).cpu()
        found = dict(tools.gather(list(found.items())))

        # Report the files that cannot be used.
        if faults is not None or not found:
            # The rows of files that could not be read are zero, too.
            found = {**unusable(embeddings, paths), **found}
        if faults is None:
            raise_if_any([found[index] for index in sorted(found)], len(paths))
        else:
            faults.update(sorted(found.items()))

        # The sum over the parts of a long recording does not have unit length.
        embeddings[:, 0] = F.normalize(embeddings[:, 0])
        return embeddings.numpy()

    def read_own_part(self, paths, read, found, stop_at_fault):
        """Reads this process's part of the files; yields (index, audio (samples,) on the device).

        Adds {index: what is wrong} to `found` for files that cannot be used. stop_at_fault: after
        the first of them, only check the others.
        """
        own_indices = range(process_rank(), len(paths), process_count())
        utterances = parallel_map(
            functools.partial(audio_or_fault, read),
            [paths[index] for index in own_indices],
            self.n_cpu,
            pin_memory=self.on_gpu,
        )
        hide = True if process_rank() > 0 else None
        count = len(own_indices)
        shown = tqdm(utterances, 'evaluating', count, unit='file', disable=hide, leave=False)
        split_paths = []
        for index, (audio, fault) in zip(own_indices, shown):
            if fault:
                found[index] = fault
            elif not (found and stop_at_fault):
                if len(audio) > LONGEST:
                    split_paths.append(paths[index])
                # Copy it on a CPU, too: a worker's tensor holds shared memory and an open file.
                yield index, self.copy_to_device(audio, copy=True)

        split_paths = tools.gather(split_paths)
        if split_paths:
            say(
                'note          longer than five minutes, so embedded in parts: '
                f'{len(split_paths)} files, for example {split_paths[0]}'
            )

    def embed_window(self, pending, embeddings):
        """Embeds a list of (index, audio) into rows of embeddings (N, 2, D) that are still zero.

        Nothing here waits for a GPU.
        """
        batch_frames = BATCH_FRAMES if self.on_gpu else CPU_BATCH_FRAMES
        with self.float32_as_asked():
            self.embed_whole(pending, embeddings[:, 0], batch_frames)
            self.embed_crops(pending, embeddings[:, 1], batch_frames)

    def embed_whole(self, pending, embeddings, batch_frames):
        """Adds the unit embeddings of whole utterances, or of their parts, to embeddings (N, D).

        Utterances of about the same length share a batch.
        """
        # Compute features, the longest first.
        encoder = self.speaker_encoder
        step = SHAPE_STEP if self.on_gpu else 1
        items = []
        for index, audio in pending:
            for part in audio.tensor_split(math.ceil(len(audio) / LONGEST)):
                items.append((index, encoder.features(part[None], step=step)))
        items.sort(key=lambda item: item[1].shape[2], reverse=True)

        # Embed them in padded batches.
        while items:
            longest = step * math.ceil(items[0][1].shape[2] / step)
            size = max(1, batch_frames // longest)
            indices, features = zip(*items[:size])
            items = items[size:]

            frames = [x.shape[2] for x in features]
            padded = torch.cat([F.pad(x, (0, longest - x.shape[2])) for x in features])
            lengths = None if min(frames) == longest else self.numbers_to_device(frames)
            vectors = F.normalize(encoder.encode(padded, lengths))
            embeddings.index_add_(0, self.numbers_to_device(indices), vectors)

    def embed_crops(self, pending, embeddings, batch_frames):
        """Sets rows of embeddings (N, D) to the mean unit embedding of each utterance's crops."""
        encoder = self.speaker_encoder
        size = max(1, batch_frames // (5 * (1 + EVAL_CROP // HOP)))
        for start in range(0, len(pending), size):
            indices, audio = zip(*pending[start : start + size])
            crops = torch.cat([eval_crops(samples) for samples in audio])
            vectors = F.normalize(encoder.encode(encoder.features(crops)))
            means = vectors.view(len(audio), 5, -1).mean(dim=1)
            embeddings[self.numbers_to_device(indices)] = means

    def numbers_to_device(self, numbers):
        """Returns integers as a tensor on the device, without waiting for a GPU."""
        numbers = torch.tensor(numbers)
        if self.on_gpu:
            numbers = numbers.pin_memory()
        return self.copy_to_device(numbers)

    def copy_to_device(self, tensor, copy=False):
        """Returns a tensor on the device; with copy, a new one even if it is already there.

        On an NVIDIA GPU the copy may finish after this returns: CUDA keeps the memory of the
        source until then. Other devices do not, so on them this waits for the copy.
        """
        return tensor.to(self.device, non_blocking=self.on_gpu, copy=copy)

    def save_parameters(self, path):
        """Writes a checkpoint of the published format.

        It is a flat state dict whose names are speaker_encoder.* and speaker_loss.*.
        """
        state = self.state_dict()
        for name, tensor in state.items():
            # Machines without this device must be able to load it.
            state[name] = tensor.cpu()
        tools.write_whole(path, lambda file: torch.save(state, file))

    def load_parameters(self, path):
        """Loads a checkpoint; returns the names of tensors that were left out, as load_weights.

        Raises BadInput if the encoder does not fit.
        """
        weights, _ = read_checkpoint(path)
        return load_weights(self, weights, path)


def ramp(epochs_done, begin, end):
    """Returns a number that rises from 0 at `begin` to 1 at `end`, and is constant outside."""
    return min(1, max(0, epochs_done - begin) / max(1e-9, end - begin))


def average_gradients(parameters):
    """Averages the gradients of parameters over all processes, in one exchange."""
    total = tools.sum_over_processes(torch.cat([p.grad.flatten() for p in parameters]))
    parts = (total / process_count()).split([p.numel() for p in parameters])
    for parameter, part in zip(parameters, parts):
        parameter.grad = part.view_as(parameter)


class TimedBatches:
    """Iterates over a loader, and measures the share of time in which the device was idle.

    With a GPU the host runs ahead: it may wait for a batch while the GPU computes. So CUDA events
    take the times at which the GPU itself ends a step and begins the next one.
    """

    def __init__(self, loader, on_gpu=False):
        self.loader = loader
        self.on_gpu = on_gpu
        self.begin = time.perf_counter()
        self.gaps = []  # (end of a step, start of the next one), not yet added to idle
        self.idle = 0.0  # seconds

    def __iter__(self):
        # The wait for the first batch does not count: the workers are starting.
        ended = None
        for batch in self.loader:
            if ended is not None:
                self.gaps.append((ended, self.now()))
            yield batch
            ended = self.now()

    def now(self):
        """Returns the time; for a GPU, an event that takes the time when the GPU reaches it."""
        if not self.on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def share_idle(self):
        """Returns the idle share (0 to 1) of the time so far.

        A GPU must have finished all steps, as it has after sum_of_finite.
        """
        for ended, started in self.gaps:
            if self.on_gpu:
                self.idle += ended.elapsed_time(started) / 1000
            else:
                self.idle += started - ended
        self.gaps = []
        return self.idle / self.seconds()

    def seconds(self):
        """Returns the seconds since this object was made."""
        return time.perf_counter() - self.begin


def sum_of_finite(not_seen, epoch, step):
    """Returns the sum (3,) of the results of train_step in not_seen, [(batch, results)].

    step: the number of the last one. Raises Diverged if one is not finite. Only here the host waits
    for the GPU.
    """
    results = torch.stack([result for _, result in not_seen]).cpu().double()
    finite = results.isfinite().all(dim=1).tolist()
    if not all(finite):
        first = finite.index(False)
        raise Diverged(epoch, step - len(not_seen) + 1 + first, not_seen[first][0])
    return results.sum(dim=0)


class Diverged(BadInput):
    """A loss or gradient that is not finite, at `step` (from 1) of `epoch`.

    `batch` is its (waveforms, labels).
    """

    def __init__(self, epoch, step, batch):
        super().__init__(f'epoch {epoch}, step {step}: the loss or a gradient is not finite')
        self.epoch = epoch
        self.step = step
        self.batch = batch


def unusable(embeddings, paths):
    """Returns {index: sentence} of files whose embeddings (N, 2, D) are zero or not finite."""
    # Huge samples overflow. The embedding is then NaN, for which the comparison is false, or zero
    # if only its norm overflows.
    usable = (embeddings.norm(dim=2) > 0).all(dim=1)
    rows = torch.nonzero(~usable).flatten().tolist()
    return {
        i: f'{paths[i]}: its embedding is zero or not finite; is the model damaged?' for i in rows
    }


def raise_if_any(faults, count):
    """Raises BadInput that names all faults of `count` files, if there are any."""
    if faults:
        raise BadInput('\n'.join([f'{len(faults)} of {count} files cannot be embedded:', *faults]))


# Machinery: checkpoints and devices.


# Saving and resuming.


class Progress(NamedTuple):
    """The last epoch that a run has finished (0: none), and its figures (None: not known)."""

    epoch: int = 0
    loss: float | None = None
    lr: float | None = None
    accuracy: float | None = None


def save_training(system, folder, done, identity, keep=0):
    """Writes model_EPOCH.model, and model_EPOCH.state for resuming; then removes old files.

    done: Progress. identity: {option: value} of the options that change the numbers of the run.
    Raises BadInput if a weight is not finite.
    """
    for name, tensor in system.state_dict().items():
        if not tensor.isfinite().all():
            raise BadInput(
                f'epoch {done.epoch}: {name} is no longer finite, so nothing is saved. A lower '
                '--lr may help; to continue this run with it, add --force'
            )
    path = os.path.join(folder, f'model_{done.epoch:04d}')
    state = {**done._asdict(), 'identity': identity, 'optim': system.optim.state_dict()}
    tools.write_whole(f'{path}.state', lambda file: torch.save(state, file))
    system.save_parameters(f'{path}.model')
    prune(folder, keep, done.epoch)


def resume(system, folder, identity, force=False):
    """Loads the newest readable checkpoint of a folder, with the optimiser's state.

    identity: {option: value} of the options that change the numbers of this run. Returns (Progress,
    the options that changed, as text), or (None, []) if the folder holds no run. Raises BadInput if
    options changed, unless force is true, and if no checkpoint can be read or fits.
    """
    path, weights, state = newest_checkpoint(folder)
    if path is None:
        return None, []

    # Compare the options. Without a .state only those are known that follow from the weights.
    changes = changed_options({**describe(weights), **state.get('identity', {})}, identity)
    if changes and not force:
        message = [
            f'{folder} holds a run with other options, which would change its numbers:',
            *changes,
            'Give the options of that run (options.txt), choose another --save_path, or add '
            '--force.',
        ]
        raise BadInput('\n'.join(message))

    # Load the weights and the state of the optimiser.
    left_out = load_weights(system, weights, path)
    if left_out:
        raise BadInput(
            f'{path}: cannot be continued: {left_out[0]} does not fit. To start from its weights, '
            'give it as --initial_model, with another --save_path'
        )
    if 'optim' in state:
        load_optimiser(system.optim, state['optim'], path)
    else:
        print(
            f'{path}: no usable .state beside it; the optimiser starts from the beginning',
            file=sys.stderr,
        )
    figures = {name: state.get(name) for name in Progress._fields}
    return Progress(**figures), changes


def changed_options(saved, identity):
    """Returns a line of text for each option of {option: value} whose saved value differs."""
    return [
        f'--{name} {value} (was {saved[name]})'
        for name, value in identity.items()
        if name in saved and saved[name] != value
    ]


def load_optimiser(optim, saved, path):
    """Loads the saved state of an optimiser, but not the saved weight decay.

    Raises BadInput if the state is that of another optimiser.
    """
    group = optim.param_groups[0]
    if ('momentum' in saved['param_groups'][0]) != ('momentum' in group):
        raise BadInput(
            f'{path}: this run used another optimiser; give the --optimizer that it began with'
        )
    weight_decay = group['weight_decay']
    optim.load_state_dict(saved)
    optim.param_groups[0]['weight_decay'] = weight_decay


# Models with the weights of a checkpoint.


def load_weights(system, weights, path):
    """Loads a state dict that was read from `path`.

    Returns the names of tensors that were left out: those of the classifier, if it has another
    number of speakers or belongs to another loss. Raises BadInput if the encoder does not fit.
    """
    expected = system.state_dict()

    # A checkpoint may lack the filters, which are the same in every model, and the counters of
    # batch norms, which nothing uses.
    for name, tensor in system.named_buffers():
        if not name.endswith(('running_mean', 'running_var')):
            weights = {name: tensor, **weights}

    unfit = []
    for name in expected | weights:
        in_both = name in expected and name in weights
        if not in_both or expected[name].shape != weights[name].shape:
            unfit.append(name)
    encoder = [name for name in unfit if name.startswith('speaker_encoder.')]
    if encoder:
        found = describe(weights)
        raise BadInput(
            f'{path}: the encoder does not fit: {len(encoder)} tensors are missing, unknown or of '
            f'another shape, for example {encoder[0]}; the checkpoint is of --encoder '
            f'{found["encoder"]} with --C {found["C"]}, the model is {system.encoder_name} with '
            f'{system.C}'
        )
    fitting = {name: tensor for name, tensor in weights.items() if name not in unfit}
    system.load_state_dict(fitting, strict=False)
    return unfit


def load_model(path, **options):
    """Returns an ECAPAModel with the sizes and the weights of a checkpoint.

    options: those of ECAPAModel, for example device. Raises BadInput if the file cannot be read or
    is not a checkpoint of this model, or if C or n_class contradict it.
    """
    weights, _ = read_checkpoint(path)
    return model_of(weights, path, **options)


def load_model_of(args):
    """Loads --initial_model of a command; returns (ECAPAModel, {'path', 'sha256'} of the file)."""
    if not args.initial_model:
        raise BadInput('--initial_model is needed: the checkpoint to score')
    require_file(args.initial_model, '--initial_model')
    weights, sha256 = read_checkpoint(args.initial_model)
    system = model_of(weights, args.initial_model, **tools.options_for(ECAPAModel, args))
    return system, {'path': args.initial_model, 'sha256': sha256}


def model_of(weights, path, **options):
    """Returns an ECAPAModel with weights that were read from `path`; options: as in load_model."""
    found = describe(weights)
    for name in ('C', 'n_class'):
        wanted = options.get(name)
        if wanted not in (None, found[name]):
            raise BadInput(
                f'--{name} {wanted} contradicts {path}, which has {found[name]}; leave it out'
            )
    training = {'lr': 0.001, 'lr_decay': 0.97, 'm': 0.2, 's': 30, 'test_step': 1}
    system = ECAPAModel(**{**training, **options, **found})
    left_out = load_weights(system, weights, path)
    if left_out:
        raise BadInput(f'{path}: {left_out[0]} does not fit the loss {found["loss"]}')
    return system


# The checkpoints of a run's folder.


def prune(folder, keep, epoch):
    """Removes half-written files, and old checkpoints of epochs up to `epoch`.

    The newest two states stay, and the newest `keep` models (0 keeps all).
    """
    states = [path for path, saved in saved_files(folder, 'state').items() if saved <= epoch]
    removed = states[2:]
    if keep:
        models = [path for path, saved in saved_models(folder).items() if saved <= epoch]
        removed += models[keep:]
    removed += glob.glob(glob.escape(folder) + '/*.part')
    for path in removed:
        with contextlib.suppress(OSError):
            os.remove(path)


def saved_models(folder):
    """Returns {path of a checkpoint: its epoch} in a run's folder of models, the newest first."""
    return saved_files(folder, 'model')


def saved_files(folder, ending):
    """Returns {path: epoch} of the files model_EPOCH.ENDING in a folder, the newest first.

    It is empty if there is no such folder. Raises BadInput if the folder cannot be read: it may
    hold a run.
    """
    try:
        names = os.listdir(folder)
    except FileNotFoundError:
        return {}
    except OSError as error:
        raise BadInput(f'{folder}: cannot be read ({error.strerror})') from error

    epochs = {}
    for name in names:
        match = re.fullmatch(rf'model_(\d+)\.{ending}', name, re.ASCII)
        if match:
            epochs[os.path.join(folder, name)] = int(match[1])
    return dict(sorted(epochs.items(), key=lambda item: item[1], reverse=True))


def newest_checkpoint(folder):
    """Reads the newest checkpoint of a run that can be read; returns (path, weights, state).

    Checkpoints with a state come first. Returns (None, None, None) for a folder without
    checkpoints. Prints on standard error which files are damaged. Raises BadInput if all of them
    are, and at once for an error that is not damage, for example a disk that does not answer.
    """
    models = saved_models(folder)
    states = {epoch: path for path, epoch in saved_files(folder, 'state').items()}
    faults = []

    # Models with the optimiser's state beside them: the run continues exactly.
    for path, epoch in models.items():
        if epoch in states:
            with report_damage(faults):
                weights, _ = read_checkpoint(path)
                return path, weights, read_state(states[epoch], epoch)

    # Models only, as other programs write them: the optimiser begins again.
    for path, epoch in models.items():
        with report_damage(faults):
            weights, _ = read_checkpoint(path)
            return path, weights, {'epoch': epoch}

    if models:
        raise BadInput(
            f'{folder}: none of its {len(models)} checkpoints can be read, so the run cannot '
            'continue. Put back a copy of one of them, or choose another --save_path to begin again'
        )
    return None, None, None


@contextlib.contextmanager
def report_damage(faults):
    """Prints a Damaged error of the block and adds it to `faults`, unless it is already there."""
    try:
        yield
    except Damaged as error:
        if str(error) not in faults:
            faults.append(str(error))
            print(f'{error}\nlooking for another checkpoint', file=sys.stderr)


class Damaged(BadInput):
    """A file that was read, and whose content is damaged."""


def read_state(path, epoch):
    """Reads the state beside a checkpoint. Raises Damaged if save_training did not write it."""
    state, _ = read_file(path, 'the state of a training run')
    optim = state.get('optim') if isinstance(state, dict) else None
    if not isinstance(optim, dict) or 'param_groups' not in optim or state.get('epoch') != epoch:
        raise Damaged(f'{path}: not the state of a training run after epoch {epoch}')
    return state


# Reading checkpoints.


def read_checkpoint(path):
    """Reads a checkpoint; returns (state dict, SHA-256).

    Removes the prefixes of DataParallel and torch.compile from names. Raises Damaged if the file is
    damaged, and BadInput if it cannot be read or is not a checkpoint of this model.
    """
    state, sha256 = read_file(path, 'a checkpoint')
    if not is_flat_dictionary(state):
        raise BadInput(
            f'{path}: not a checkpoint of this model: a flat dictionary of tensors was expected'
        )
    state = {without_wrappers(name): tensor for name, tensor in state.items()}
    found = describe(state)
    for part, known in (('encoder', ENCODERS), ('loss', LOSSES)):
        if found[part] is None:
            raise BadInput(
                f'{path}: not a checkpoint of this model: the tensors speaker_{part}.* are missing '
                f'or belong to a {part} other than {" or ".join(known)}'
            )
    for name, tensor in state.items():
        if not tensor.float().isfinite().all():
            raise Damaged(f'{path}: holds numbers that are not finite, in {name}')
    return state, sha256


def without_wrappers(name):
    """Returns a tensor's name without 'module' and '_orig_mod', whichever module was wrapped."""
    return '.'.join(part for part in name.split('.') if part not in ('module', '_orig_mod'))


def is_flat_dictionary(state):
    """Returns whether an object is a dictionary of names and tensors."""
    if not isinstance(state, dict):
        return False
    return all(isinstance(name, str) and torch.is_tensor(state[name]) for name in state)


def describe(state):
    """Finds out which encoder and loss the state dict of a checkpoint belongs to.

    Returns {'encoder', 'C', 'loss', 'n_class'}, with None for what is unknown.
    """
    encoder, C = encoder_of(part_of(state, 'speaker_encoder.'))
    loss, n_class = loss_of(part_of(state, 'speaker_loss.'))
    return {'encoder': encoder, 'C': C, 'loss': loss, 'n_class': n_class}


def part_of(state, prefix):
    """Returns the tensors whose names begin with `prefix`, without it."""
    return {
        name.removeprefix(prefix): tensor
        for name, tensor in state.items()
        if name.startswith(prefix)
    }


def read_file(path, role):
    """Reads a file of torch.save without running code of it; returns (object, SHA-256).

    Tensors are on the CPU. Raises Damaged if PyTorch cannot load it, with a message that says what
    the file is instead, and BadInput if the disk cannot read it.
    """
    content = tools.read_bytes(path)
    try:
        if zipfile.is_zipfile(io.BytesIO(content)):
            with zipfile.ZipFile(io.BytesIO(content)) as archive:
                # PyTorch ignores the checksums, and a flipped bit would go unnoticed.
                damaged = archive.testzip()
            if damaged:
                raise zipfile.BadZipFile(f'the checksum of {damaged} is wrong')
        loaded = torch.load(io.BytesIO(content), map_location='cpu', weights_only=True)
        return loaded, tools.sha256(content)
    except Exception as error:
        # torch.load raises many types of errors for damaged files. Too little memory is not damage.
        if tools.message_for(error):
            raise
        raise Damaged(
            f'{path}: cannot be read as {role}: {explain_damage(content, error)}'
        ) from error


def explain_damage(content, error):
    """Returns what the bytes are that torch.load refused with `error`, and what to do."""
    code = re.search(r'GLOBAL (\S+)', str(error))
    if code:
        return f'it would run code on loading ({code[1]}), but only tensors are expected; refused'
    if not content:
        return 'it is empty (0 bytes)'
    if content.startswith(b'PK'):
        return f'it is damaged or cut short, at {len(content):,} bytes ({tools.first_line(error)})'
    for sign, meaning in OTHER_FILES.items():
        if re.match(sign, content, re.DOTALL | re.IGNORECASE):
            return meaning
    return f'it is not a PyTorch file: {len(content):,} bytes that begin with {content[:24]!r}'


# Devices.


@contextlib.contextmanager
def tuned_convolutions():
    """Lets cuDNN try all its algorithms on each new shape in the block.

    This pays in training, because all batches have one shape.
    """
    before = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = True
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = before


@contextlib.contextmanager
def without_tf32():
    """Makes a GPU compute convolutions and matrix products in full float32 in the block."""
    switches = (torch.backends.cudnn.conv, torch.backends.cuda.matmul)
    before = [switch.fp32_precision for switch in switches]
    for switch in switches:
        switch.fp32_precision = 'ieee'
    try:
        yield
    finally:
        for switch, precision in zip(switches, before):
            switch.fp32_precision = precision


def choose_device(name='auto'):
    """Returns the torch.device of a name: cpu, cuda, cuda:N, mps (the GPU of a Mac), or auto.

    auto is cuda if there is an NVIDIA GPU, else cpu. Raises BadInput if the device cannot be used
    or is of a kind that this code was not made for.
    """
    chosen = name
    if name == 'auto':
        # A GPU that cannot be used is an error: nobody wants to train on the CPU by accident.
        chosen = 'cuda' if torch.cuda.is_available() or has_nvidia_gpu() else 'cpu'
    try:
        device = torch.device(chosen)
        if device.type not in ('cpu', 'cuda', 'mps'):
            raise BadInput(f'--device {name}: not supported; choose cpu, cuda or mps')
        torch.empty(0, device=device).cpu()
        if device.type == 'cuda' and device.index:
            # Otherwise PyTorch would put some of its tensors on the first GPU.
            torch.cuda.set_device(device)
    except (RuntimeError, AssertionError) as error:
        message = f'--device {name}: not available here: {tools.first_line(error)}'
        if name == 'auto':
            message += ' (this machine has a GPU: update its driver, or give --device cpu)'
        raise BadInput(message) from error
    return device


def has_nvidia_gpu():
    """Returns whether this machine has an NVIDIA GPU that CUDA_VISIBLE_DEVICES does not hide."""
    if os.environ.get('CUDA_VISIBLE_DEVICES') in ('', '-1'):
        return False
    return bool(glob.glob('/dev/nvidia[0-9]*'))
