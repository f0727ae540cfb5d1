"""The system: encoder, classifier and optimiser; an epoch of training, evaluation, saving and loading."""

import collections
import contextlib
import glob
import os
import re
import sys
import time
import warnings
import zipfile

import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader
from tqdm import tqdm

from dataLoader import EVAL_CROP, EvalUtterances, eval_crops, read_train_list, read_trial_lists
from loss import AAMsoftmax
from model import ECAPA_TDNN, HOP
from tools import (
    BadInput,
    available_cpus,
    gather,
    process_count,
    process_rank,
    score_pairs,
    sum_over_processes,
    verification_figures,
    write_whole,
)

BATCH_FRAMES = 16384  # frames in a batch of evaluation on a GPU: about 1.5 GB of activations with 1,024 channels
CPU_BATCH_FRAMES = 4096  # larger ones do not stay in the cache
CHECKED_LATER = 3  # steps until a loss is looked at: by then a GPU has computed it, so nobody waits
WINDOW_FRAMES = 8 * BATCH_FRAMES  # frames read before they are sorted by length into batches
SHAPE_STEP = 64  # lengths of batches on a GPU are multiples of this: cuDNN plans anew for each shape that it meets


def choose_device(name='auto'):
    """torch.device of 'auto' (cuda if there is one, else cpu) or of a device's name; BadInput if it is not there."""
    try:
        device = torch.device(name if name != 'auto' else 'cuda' if torch.cuda.is_available() else 'cpu')
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise BadInput(f'--device {name}: not available here: {summary(error)}') from error
    return device


def summary(error):
    """The first line of a library's error, or its type where it has none."""
    return (str(error).splitlines() or [type(error).__name__])[0][:200]


class Diverged(BadInput):
    """A loss or gradient that is not finite, at `step` (from 1) of `epoch`; `batch` is its (waveforms, labels)."""

    def __init__(self, epoch, step, batch):
        super().__init__(f'epoch {epoch}, step {step}: the loss or a gradient is not finite')
        self.epoch, self.step, self.batch = epoch, step, batch


class ECAPAModel(nn.Module):
    """Speaker encoder and AAM-softmax classifier, with the optimiser that trains them.

    lr: learning rate of Adam, multiplied by lr_decay every test_step epochs; C: channels of the encoder; n_class:
    speakers; m, s: margin and scale of AAM-softmax; device: as in choose_device; precision: 'fp32', 'bf16' (the
    encoder's convolutions; features, pooling statistics and loss stay float32) or 'auto', bf16 on a GPU that has it;
    compile: whether to compile the encoder's body for training; n_cpu: processes that read files in evaluation;
    accumulate: parts that a batch goes through the network in, to save memory; freeze_epochs: first epochs that train
    the classifier alone.

    Where processes train together (torch.distributed is initialised), gradients are averaged over them, and batch norms
    use the statistics of all of them.
    """

    def __init__(
        self,
        lr,
        lr_decay,
        C,
        n_class,
        m,
        s,
        test_step,
        device='auto',
        precision='auto',
        compile=False,
        n_cpu=0,
        accumulate=1,
        freeze_epochs=0,
        **kwargs,
    ):
        super().__init__()
        self.device = choose_device(device)
        self.n_cpu = n_cpu
        self.accumulate = accumulate
        self.freeze_epochs = freeze_epochs
        self.warned = False
        self.on_gpu = self.device.type == 'cuda'
        if precision == 'auto':
            precision = 'bf16' if self.on_gpu and torch.cuda.is_bf16_supported(including_emulation=False) else 'fp32'
        self.precision = precision
        self.speaker_encoder = ECAPA_TDNN(C=C).to(self.device)
        self.speaker_loss = AAMsoftmax(n_class=n_class, m=m, s=s).to(self.device)
        self.encode = torch.compile(self.speaker_encoder.encode) if compile else self.speaker_encoder.encode
        self.optim = torch.optim.Adam(self.parameters(), lr=lr, weight_decay=2e-5, fused=True)
        self.scheduler = torch.optim.lr_scheduler.StepLR(self.optim, step_size=test_step, gamma=lr_decay)
        # In a tuple, so that the wrapper does not become a part of what it wraps.
        # The buffers are the batch norms' statistics, which are equal in all processes.
        several = process_count() > 1
        self.replicas = (nn.parallel.DistributedDataParallel(self, broadcast_buffers=False) if several else self,)

    def set_learning_rate(self, epoch):
        """Sets and returns the learning rate of an epoch, counted from 1: a function of the epoch alone."""
        with warnings.catch_warnings():
            # PyTorch deprecates the argument, which is what makes the schedule independent of the epochs run before.
            warnings.simplefilter('ignore', UserWarning)
            self.scheduler.step(epoch - 1)
        return self.optim.param_groups[0]['lr']

    def forward(self, audio, labels):
        """Loss and accuracy in percent of waveforms (B, samples), masked at random, with labels (B,)."""
        features = self.speaker_encoder.features(audio, aug=True)
        with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.precision == 'bf16'):
            embedding = self.encode(features)
        return self.speaker_loss(embedding, labels)

    def train_step(self, audio, labels):
        """One optimiser step on waveforms (B, samples) and labels (B,).

        Returns [loss, accuracy in percent, norm of the gradient] (3,), without waiting for a GPU. An encoder in
        evaluation mode is left as it is.
        """
        self.optim.zero_grad()
        totals = 0
        for part, part_labels in zip(audio.tensor_split(self.accumulate), labels.tensor_split(self.accumulate)):
            loss, accuracy = self.replicas[0](part, part_labels)
            share = len(part) / len(audio)
            (loss * share).backward()
            totals += share * torch.stack([loss.detach(), accuracy[0]])
        if not self.speaker_encoder.training:
            for parameter in self.speaker_encoder.parameters():
                parameter.grad = None
        norm = torch.nn.utils.get_total_norm([p.grad for p in self.parameters() if p.grad is not None])
        self.optim.step()
        return torch.cat([totals, norm.view(1)])

    def train_network(self, epoch, loader):
        """One epoch over a loader of (waveforms (B, samples), labels (B,)).

        Returns (mean loss, learning rate, mean accuracy in percent) of all processes. The progress bar shows, besides
        these, utterances a second and the share of the time spent waiting for data. Raises Diverged at most
        CHECKED_LATER steps after a loss or gradient that is not finite.
        """
        self.train()
        self.speaker_encoder.train(epoch > self.freeze_epochs)
        lr = self.set_learning_rate(epoch)
        totals, unchecked = torch.zeros(3, device=self.device), collections.deque()
        steps, waited, shown, begin = 0, 0.0, 0.0, time.perf_counter()
        with tqdm(desc=f'epoch {epoch}', total=len(loader), unit='step', disable=self.quiet()) as bar:
            asked = begin
            for steps, batch in enumerate(loader, 1):
                audio, labels = (tensor.to(self.device, non_blocking=True) for tensor in batch)
                now = time.perf_counter()
                # The first batch takes as long as the workers take to start.
                waited += now - asked if steps > 1 else 0
                result = self.train_step(audio, labels)
                totals += result
                unchecked.append((epoch, steps, batch, *self.start_check(result)))
                if len(unchecked) > CHECKED_LATER:
                    self.finish_check(*unchecked.popleft())
                bar.update()
                # Reading the loss makes the host wait for the GPU, so not in every step.
                if not bar.disable and now - shown > 1:
                    shown, elapsed = now, now - begin
                    loss, accuracy, _ = (totals / steps).tolist()
                    bar.set_postfix_str(
                        f'loss {loss:.3f}, acc {accuracy:.2f}%, lr {lr:.6f}, '
                        f'{steps * len(labels) * process_count() / elapsed:.0f} utt/s, '
                        f'{100 * waited / elapsed:.0f}% waiting for data'
                    )
                asked = time.perf_counter()
        for check in unchecked:
            self.finish_check(*check)
        if steps == 0:
            raise BadInput('an epoch has no full batch: the training list is shorter than --batch_size')
        self.warn_of_waiting(waited / (time.perf_counter() - begin), steps)
        loss, accuracy, _ = (sum_over_processes(totals) / (steps * process_count())).tolist()
        return loss, lr, accuracy

    def start_check(self, result):
        """Starts copying whether all of a step's result is finite to the host: (the copy, event of its end or None)."""
        finite = result.isfinite().all().to('cpu', non_blocking=True)
        if not self.on_gpu:
            return finite, None
        event = torch.cuda.Event(blocking=True)
        event.record(torch.cuda.current_stream(self.device))
        return finite, event

    @staticmethod
    def finish_check(epoch, step, batch, finite, event):
        """Waits for that copy, and for nothing that was asked of the GPU later; raises Diverged if it says so."""
        if event is not None:
            event.synchronize()
        if not finite:
            raise Diverged(epoch, step, batch)

    def warn_of_waiting(self, share, steps):
        """Says once that the loader is the bottleneck, where it is; share: of the time spent waiting for data."""
        if share > 0.3 and steps > 20 and not self.warned and process_rank() == 0:
            self.warned = True
            print(
                f'Training waited for data {100 * share:.0f}% of the time: the loader is the bottleneck. Try another '
                f'--n_cpu (now {self.n_cpu}; this machine has {available_cpus()} processors), or a faster disk.',
                file=sys.stderr,
            )

    def eval_network(self, eval_list, eval_path):
        """EER in percent and minDCF (p_target 0.05) of a trial list whose files lie below eval_path."""
        return verification_figures(*self.score_trials(eval_list, eval_path))[:2]

    def score_trials(self, eval_list, eval_path):
        """Scores of a trial list: (scores float32 (N,), labels int8 (N,)), in the list's order."""
        paths, ((labels, pairs),) = read_trial_lists([eval_list], [eval_path])
        return score_pairs(self.embed_files(paths), pairs), labels

    def embed(self, paths):
        """Unit embeddings of whole files, float32 (N, 192); other rates and channels are converted, with a note."""
        return self.embed_files(paths, any_format=True)[:, 0]

    def cohort(self, train_list, train_path, per_speaker, seed):
        """Cohort of as_norm, (speakers, 2, 192): the mean of embed_files over some utterances of each training speaker,
        so that a score against it is the mean of the scores against these utterances.
        """
        speakers, labels, names = read_train_list(train_list)
        shuffled = np.random.default_rng(seed).permutation(len(labels))
        shuffled = shuffled[np.argsort(labels[shuffled], kind='stable')]
        sizes = np.bincount(labels)
        place = np.arange(len(labels)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
        chosen = shuffled[place < per_speaker]
        embeddings = self.embed_files([os.path.join(train_path, names[i]) for i in chosen])
        sums = np.zeros((len(speakers), 2, 192), np.float32)
        np.add.at(sums, labels[chosen], embeddings)
        return sums / np.minimum(sizes, per_speaker)[:, None, None].astype(np.float32)

    @torch.inference_mode()
    def embed_files(self, paths, any_format=False):
        """Each file as two vectors, float32 (N, 2, 192): its whole utterance's unit embedding, and the mean of the unit
        embeddings of its five crops, so that the dot product of two means is the mean over 25 pairs of crops.

        Where processes train together each reads its part of the files, and all return the same. Raises BadInput that
        names every file that cannot be used, or whose embedding is zero or not finite.
        """
        self.eval()
        mine = range(process_rank(), len(paths), process_count())
        dataset = EvalUtterances([paths[i] for i in mine], any_format)
        files = DataLoader(dataset, batch_size=None, num_workers=min(self.n_cpu, len(mine)), pin_memory=self.on_gpu)
        embeddings = torch.zeros(len(paths), 2, 192, device=self.device)
        window, faults, waiting = [], [], 0
        for index, audio in zip(mine, tqdm(files, 'evaluating', unit='file', disable=self.quiet(), leave=False)):
            if isinstance(audio, str):
                faults.append(audio)
            if faults:
                continue
            window.append((index, audio.to(self.device, non_blocking=True)))
            waiting += 1 + len(audio) // HOP
            if waiting > WINDOW_FRAMES:
                self.embed_window(window, embeddings)
                window, waiting = [], 0
        self.embed_window(window, embeddings)
        embeddings = sum_over_processes(embeddings).cpu()
        faults = gather(faults)
        if not faults:
            # Numbers too large for float32 end as NaN, or as zeros where the norm alone is too large.
            whole, crops = embeddings.norm(dim=2).T
            broken = torch.nonzero(~((whole > 0.99) & (crops > 0))).flatten().tolist()
            faults = [f'{paths[i]}: its embedding is zero or not finite; is the model sound?' for i in broken]
        if faults:
            raise BadInput('\n'.join([f'{len(faults)} of {len(paths)} files cannot be embedded:', *faults]))
        return embeddings.numpy()

    def embed_window(self, window, embeddings):
        """Fills in embeddings (N, 2, 192) from a list of (index, audio (samples,)) on the device.

        Whole utterances of about the same length share a batch. Nothing waits for a GPU.
        """
        encoder, batch_frames = self.speaker_encoder, BATCH_FRAMES if self.on_gpu else CPU_BATCH_FRAMES
        items = [(index, encoder.features(audio[None])) for index, audio in window]
        items.sort(key=lambda item: item[1].shape[2], reverse=True)
        step = SHAPE_STEP if self.on_gpu else 1
        while items:
            longest = -(-items[0][1].shape[2] // step) * step
            size = max(1, batch_frames // longest)
            batch, items = items[:size], items[size:]
            indices, features = zip(*batch)
            if longest > 2 * BATCH_FRAMES:
                embedding = encoder.encode_long(features[0], BATCH_FRAMES)
            else:
                embedding = encoder.encode(*self.pad(features, longest))
            embeddings[self.upload(indices), 0] = nn.functional.normalize(embedding)
        size = max(1, batch_frames // (5 * (1 + EVAL_CROP // HOP)))
        for start in range(0, len(window), size):
            indices, audio = zip(*window[start : start + size])
            crops = torch.cat([eval_crops(samples) for samples in audio])
            crops = nn.functional.normalize(encoder.encode(encoder.features(crops)))
            embeddings[self.upload(indices), 1] = crops.view(len(audio), 5, -1).mean(dim=1)

    def pad(self, features, longest):
        """(Features (B, 80, longest), their lengths (B,) or None where all are `longest`) of a list of (1, 80, T)."""
        frames = [x.shape[2] for x in features]
        padded = torch.cat([nn.functional.pad(x, (0, longest - x.shape[2])) for x in features])
        return padded, None if min(frames) == longest else self.upload(frames)

    def upload(self, numbers):
        """Integers as a tensor on the device."""
        numbers = torch.tensor(numbers)
        return numbers.pin_memory().to(self.device, non_blocking=True) if self.on_gpu else numbers

    @staticmethod
    def quiet():
        """tqdm's `disable`: no progress bar but that of the first process, and none where output is no terminal."""
        return True if process_rank() else None

    def save_parameters(self, path):
        """Writes the flat state dict of the published format: speaker_encoder.* and speaker_loss.weight."""
        write_whole(path, lambda file: torch.save(self.state_dict(), file))

    def save_training(self, folder, epoch, keep=0, **rest):
        """Writes model_EPOCH.model and, beside it, model_EPOCH.state: what else a resume needs, `rest` included.

        A state is twice the size of the model, so only the two newest are kept; of the models, `keep` if that is not 0.
        Raises BadInput where the disk refuses, with what was saved before untouched.
        """
        path = os.path.join(folder, f'model_{epoch:04d}')
        state = {'epoch': epoch, **rest, 'optim': self.optim.state_dict()}
        write_whole(f'{path}.state', lambda file: torch.save(state, file))
        self.save_parameters(f'{path}.model')
        prune(folder, keep)

    def resume(self, folder, accept=None):
        """Loads the newest checkpoint of a folder that can be read, with the optimiser's state beside it.

        Returns the state without the optimiser's; {'epoch'} alone where no checkpoint has one, as those of the
        published code; or None where there is nothing to resume. Says on standard error what it passed over. accept:
        is called with the state before anything is loaded, and may raise BadInput.
        """
        for path, state in loadable(folder):
            if accept:
                accept(state)
            if self.load_parameters(path):
                found, own = checkpoint_sizes(read_checkpoint(path))[1], len(self.speaker_loss.weight)
                raise BadInput(
                    f'{path}: cannot be continued: it has {found} speakers, this run {own}; '
                    'choose another --save_path, and --initial_model to start from it'
                )
            if 'optim' in state:
                self.optim.load_state_dict(state.pop('optim'))
            else:
                print(f'{path}: no usable .state beside it; the optimiser starts afresh', file=sys.stderr)
            return state
        return None

    def load_parameters(self, path):
        """Loads a checkpoint; returns the names of its tensors that do not fit and were left out.

        Only the classifier may differ, for another set of speakers: raises BadInput for an encoder that does not fit.
        """
        state = read_checkpoint(path)
        own = self.state_dict()
        shapes, own_shapes = ({name: tensor.shape for name, tensor in tensors.items()} for tensors in (state, own))
        unfit = [name for name in own_shapes | shapes if own_shapes.get(name) != shapes.get(name)]
        encoder = [name for name in unfit if name.startswith('speaker_encoder.')]
        if encoder:
            raise BadInput(
                f'{path}: the encoder does not fit: {len(encoder)} tensors are missing, unknown or of another shape, '
                f'{encoder[0]} for one; the checkpoint has {checkpoint_sizes(state)[0]} channels, the model '
                f'{self.speaker_encoder.conv1.out_channels} (--C)'
            )
        self.load_state_dict({name: tensor for name, tensor in state.items() if name not in unfit}, strict=False)
        return unfit


def load_model(path, **kwargs):
    """ECAPAModel with the sizes and the weights of a checkpoint; kwargs as ECAPAModel's, such as device."""
    C, n_class = checkpoint_sizes(read_checkpoint(path))
    options = dict(lr=0.001, lr_decay=0.97, m=0.2, s=30, test_step=1)
    system = ECAPAModel(**{**options, **kwargs, 'C': C, 'n_class': n_class})
    system.load_parameters(path)
    return system


def prune(folder, keep):
    """Removes from a run's folder of models what is no longer needed, as save_training says, and what a kill left."""
    old = sorted(glob.glob(glob.escape(folder) + '/model_*.state'))[:-2] + glob.glob(glob.escape(folder) + '/*.part')
    for path in old + (list(saved_models(folder))[keep:] if keep else []):
        with contextlib.suppress(OSError):
            os.remove(path)


def saved_models(folder):
    """{path of a checkpoint: its epoch} in a run's folder of models, the newest first."""
    paths = sorted(glob.glob(glob.escape(folder) + '/model_[0-9]*.model'), reverse=True)
    epochs = [re.fullmatch(r'model_(\d+)\.model', os.path.basename(path)) for path in paths]
    return {path: int(epoch[1]) for path, epoch in zip(paths, epochs) if epoch}


def loadable(folder):
    """Yields (path, state) of a run's checkpoints that can be read, newest first; all that have a state come first.

    Says on standard error why it passes over a file.
    """
    for with_state in (True, False):
        for path, epoch in saved_models(folder).items():
            state_path, state = path.removesuffix('.model') + '.state', {'epoch': epoch}
            if with_state and not os.path.exists(state_path):
                continue
            try:
                read_checkpoint(path)
                state = read_state(state_path, epoch) if with_state else state
            except BadInput as error:
                print(f'{error}\npassed over; trying the checkpoint before it', file=sys.stderr)
                continue
            yield path, state


def read_state(path, epoch):
    """Contents of a .state file; BadInput where it cannot be read or belongs to another epoch."""
    state = read_file(path, 'the state of a training run')
    if not isinstance(state, dict) or state.get('epoch') != epoch or not isinstance(state.get('optim'), dict):
        raise BadInput(f'{path}: not the state of a training run after epoch {epoch}')
    return state


def read_checkpoint(path):
    """State dict of a checkpoint, on the CPU, without executing anything in the file.

    Raises BadInput for a file that is missing, damaged or no checkpoint of this model.
    """
    if not os.path.isfile(path):
        raise BadInput(f'--initial_model: {path}: no such checkpoint')
    state = read_file(path, 'a checkpoint')
    if not isinstance(state, dict) or not all(
        isinstance(name, str) and isinstance(tensor, torch.Tensor) and tensor.layout == torch.strided
        for name, tensor in state.items()
    ):
        raise BadInput(f'{path}: not a checkpoint of this model: a flat dictionary of tensors was expected')
    state = {name.removeprefix('module.'): tensor for name, tensor in state.items()}
    for name, dimensions in (('speaker_encoder.conv1.weight', 3), ('speaker_loss.weight', 2)):
        if name not in state or state[name].ndim != dimensions:
            raise BadInput(f'{path}: not a checkpoint of this model: {name} is missing or has another shape')
    broken = [name for name, tensor in state.items() if not tensor.float().isfinite().all()]
    if broken:
        raise BadInput(f'{path}: holds numbers that are not finite, in {broken[0]}')
    return state


def read_file(path, role):
    """What torch.save wrote, on the CPU, without executing anything in the file; BadInput says what it is instead."""
    try:
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                # PyTorch leaves the checksums alone, and a flipped bit would go unnoticed.
                damaged = archive.testzip()
            if damaged:
                raise zipfile.BadZipFile(f'the checksum of {damaged} is wrong')
        return torch.load(path, map_location='cpu', weights_only=True)
    except Exception as error:
        # torch.load raises a dozen types for damaged files, none of them its own.
        raise BadInput(f'{path}: cannot be read as {role}: {describe(path, error)}') from error


def describe(path, error):
    """What a file that torch.load refuses is, in words."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    code = re.search(r'GLOBAL (\S+)', str(error))
    if code:
        return f'it would run code on loading ({code[1]}), where only tensors are expected; refused'
    with open(path, 'rb') as file:
        begin = file.read(24)
    size = os.path.getsize(path)
    if not size:
        return 'it is empty (0 bytes)'
    if begin.startswith(b'PK'):
        return f'it is damaged or cut short, at {size:,} bytes ({summary(error)})'
    return f'it is no PyTorch file: {size:,} bytes that begin with {begin!r}'


def checkpoint_sizes(state):
    """(channels C, number of speakers) of a checkpoint's state dict."""
    return len(state['speaker_encoder.conv1.weight']), len(state['speaker_loss.weight'])
