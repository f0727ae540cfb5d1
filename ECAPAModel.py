"""The system: encoder, classifier and optimiser; a step, an epoch, evaluation; below, saving and loading."""

import contextlib
import functools
import glob
import io
import json
import math
import os
import re
import sys
import time
import warnings
import zipfile

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader
from tqdm import tqdm

import tools
from dataLoader import EVAL_CROP, RATE, eval_crops, read_any, read_audio, read_trial_lists, read_utterance
from loss import AAMsoftmax
from model import ECAPA_TDNN, HOP
from tools import BadInput, process_count, process_rank, say

LOOK_EVERY = 10  # steps of a GPU between two looks at their losses, for each of which the host waits
BATCH_FRAMES = 16384  # frames in a batch of evaluation on a GPU: about 1.5 GB of activations with 1,024 channels
CPU_BATCH_FRAMES = 4096  # larger ones do not stay in the cache
WINDOW_FRAMES = 8 * BATCH_FRAMES  # frames read before they are sorted by length into batches
SHAPE_STEP = 64  # lengths of batches on a GPU are multiples of this: cuDNN plans again for each shape that it meets
LONGEST = 300 * RATE  # samples of a recording that is embedded in one piece


class ECAPAModel(nn.Module):
    """Speaker encoder and AAM-softmax classifier, with the optimiser that trains them.

    lr: learning rate, multiplied by lr_decay every test_step epochs; C: channels of the encoder; n_class: speakers; m,
    s: margin and scale of AAM-softmax; device: as in choose_device; precision: 'bf16' (the encoder's convolutions;
    features, pooling statistics and loss stay float32), 'fp32' (as PyTorch has it: on a GPU convolutions round to
    TF32), 'exact' (float32 without TF32) or 'auto', bf16 on a GPU that has it, else fp32; n_cpu: processes that read
    files in evaluation; options: the command's, with its defaults: optimizer, weight_decay, clip, schedule, min_lr,
    warmup, max_epoch, margin_from, margin_epochs, no_specaug, compile, accumulate, freeze_epochs.

    Where processes train together, gradients are averaged over them, and batch norms use the statistics of all.
    """

    def __init__(self, lr, lr_decay, C, n_class, m, s, test_step, device='auto', precision='auto', n_cpu=0, **options):
        super().__init__()
        self.device = choose_device(device)
        self.on_gpu = self.device.type == 'cuda'
        if precision == 'auto':
            precision = 'bf16' if self.on_gpu and torch.cuda.is_bf16_supported(including_emulation=False) else 'fp32'
        if precision == 'exact':
            torch.backends.cudnn.allow_tf32 = False
        self.precision = precision
        self.n_cpu, self.accumulate = n_cpu, options.get('accumulate', 1)
        self.freeze_epochs, self.max_epoch = options.get('freeze_epochs', 0), options.get('max_epoch', 80)
        self.warned_of_waiting, self.checkpoint = False, None
        self.speaker_encoder = ECAPA_TDNN(C=C).to(self.device)
        self.speaker_loss = AAMsoftmax(n_class=n_class, m=m, s=s).to(self.device)
        self.train_encode = self.speaker_encoder.encode
        if options.get('compile'):
            self.train_encode = torch.compile(self.train_encode)
        if options.get('no_specaug'):
            self.speaker_encoder.specaug = nn.Identity()
        settings = {'lr': lr, 'weight_decay': options.get('weight_decay', 2e-5)}
        if options.get('optimizer') == 'sgd':
            # Not fused, which cannot begin with the classifier alone.
            self.optim = torch.optim.SGD(self.parameters(), momentum=0.9, nesterov=True, **settings)
        else:
            self.optim = torch.optim.Adam(self.parameters(), fused=True, **settings)
        self.clip, self.warmup = options.get('clip', 0), options.get('warmup', 0)
        self.schedule, self.lr, self.min_lr = options.get('schedule', 'step'), lr, options.get('min_lr', 0)
        first = options.get('margin_from')
        self.margins, self.margin_epochs = (m if first is None else first, m), options.get('margin_epochs', (0, 1))
        self.scheduler = torch.optim.lr_scheduler.StepLR(self.optim, step_size=test_step, gamma=lr_decay)

    def set_learning_rate(self, epoch, share=0.0):
        """Sets the learning rate and the margin where a share (0 to 1) of an epoch (from 1) is done; returns the rate.

        Both are functions of these two alone, so the same after a resume and for any number of processes. A warm-up
        begins with a rate of 0, so its first step changes nothing but batch norms.
        """
        done = epoch - 1 + share
        with warnings.catch_warnings():
            # PyTorch deprecates the argument, which is what makes the schedule independent of the epochs run before.
            warnings.simplefilter('ignore', UserWarning)
            self.scheduler.step(epoch - 1)
        group = self.optim.param_groups[0]
        if self.schedule == 'cosine':
            fallen = min(1, max(0, done - self.warmup) / max(1e-9, self.max_epoch - self.warmup))
            group['lr'] = self.min_lr + (self.lr - self.min_lr) * (1 + math.cos(math.pi * fallen)) / 2
        if done < self.warmup:
            group['lr'] *= done / self.warmup
        (first, last), (begin, end) = self.margins, self.margin_epochs
        grown = min(1, max(0, done - begin) / max(1e-9, end - begin))
        self.speaker_loss.m = first + (last - first) * grown
        return group['lr']

    def forward(self, audio, labels):
        """Loss and accuracy in percent of waveforms (B, samples), masked at random, with labels (B,)."""
        features = self.speaker_encoder.features(audio, aug=True)  # (B, 80, T)
        # Frozen epochs are few: not worth the minutes that compiling for them takes.
        encode = self.train_encode if self.speaker_encoder.training else self.speaker_encoder.encode
        with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.precision == 'bf16'):
            embedding = encode(features)  # (B, 192)
        return self.speaker_loss(embedding, labels)

    def train_step(self, audio, labels):
        """One optimiser step on waveforms (B, samples) and labels (B,).

        Returns [loss, accuracy in percent, norm of the gradient] (3,), without waiting for a GPU.
        """
        self.optim.zero_grad()
        totals = 0
        for part, part_labels in zip(audio.tensor_split(self.accumulate), labels.tensor_split(self.accumulate)):
            loss, accuracy = self(part, part_labels)
            share = len(part) / len(audio)
            (loss * share).backward()
            totals += share * torch.stack([loss.detach(), accuracy[0]])
        parameters = [p for p in self.parameters() if p.grad is not None]
        if process_count() > 1:
            mean = tools.sum_over_processes(torch.cat([p.grad.flatten() for p in parameters])) / process_count()
            for parameter, part in zip(parameters, mean.split([p.numel() for p in parameters])):
                parameter.grad = part.view_as(parameter)
        norm = torch.nn.utils.get_total_norm([p.grad for p in parameters])
        if self.clip:
            torch.nn.utils.clip_grads_with_norm_(parameters, self.clip, norm)
        self.optim.step()
        return torch.cat([totals, norm.view(1)])

    def train_network(self, epoch, loader):
        """One epoch over a loader of (waveforms (B, samples), labels (B,)).

        Returns (mean loss, learning rate, mean accuracy in percent) of all processes, which the progress bar shows too.
        Raises Diverged at most LOOK_EVERY steps after a loss or gradient that is not finite.
        """
        self.train()
        self.checkpoint = None
        self.speaker_encoder.train(epoch > self.freeze_epochs).requires_grad_(epoch > self.freeze_epochs)
        steps, not_seen, totals = 0, [], torch.zeros(3, dtype=torch.float64)
        begin = asked = time.perf_counter()
        seconds_waited = 0.0
        with tqdm(desc=f'epoch {epoch}', total=len(loader), unit='step', disable=process_rank() > 0 or None) as bar:
            for steps, batch in enumerate(tools.fetch(loader), 1):
                lr = self.set_learning_rate(epoch, (steps - 1) / len(loader))
                # The first batch takes as long as the workers take to start.
                seconds_waited += time.perf_counter() - asked if steps > 1 else 0
                audio, labels = (tensor.to(self.device, non_blocking=True) for tensor in batch)
                not_seen.append((batch, self.train_step(audio, labels)))
                if len(not_seen) == (LOOK_EVERY if self.on_gpu else 1) or steps == len(loader):
                    # The one place where the host waits for the GPU.
                    results = torch.stack([result for _, result in not_seen]).cpu().double()
                    finite = results.isfinite().all(dim=1).tolist()
                    if not all(finite):
                        first = finite.index(False)
                        raise Diverged(epoch, steps - len(not_seen) + 1 + first, not_seen[first][0])
                    not_seen, totals = [], totals + results.sum(dim=0)
                    (loss, accuracy, _), elapsed = (totals / steps).tolist(), time.perf_counter() - begin
                    rate, share = steps * len(labels) * process_count() / elapsed, seconds_waited / elapsed
                    figures = f'loss {loss:.3f}, acc {accuracy:.2f}%, lr {lr:.6f}, {rate:.0f} utt/s'
                    bar.set_postfix_str(f'{figures}, {100 * share:.0f}% waiting for data', refresh=False)
                bar.update()
                asked = time.perf_counter()
        if steps == 0:
            raise BadInput('an epoch has no full batch: the training list is shorter than --batch_size')
        if share > 0.3 and steps > 20 and not self.warned_of_waiting and process_rank() == 0:
            self.warned_of_waiting = True
            waited = f'Training waited for data {100 * share:.0f}% of the time: the loader is the bottleneck.'
            counts = f'now {self.n_cpu}; this machine has {tools.available_cpus()} processors'
            print(f'{waited} Try another --n_cpu ({counts}), or a faster disk.', file=sys.stderr)
        loss, accuracy, _ = (tools.sum_over_processes(totals.to(self.device)) / (steps * process_count())).tolist()
        return loss, lr, accuracy

    def eval_network(self, eval_list, eval_path):
        """EER in percent and minDCF (p_target 0.05) of a trial list whose files lie below eval_path."""
        _, figures = self.score_lists(*read_trial_lists([eval_list], [eval_path]))[0]['raw']
        return figures['EER']['value'], figures['minDCF(0.05)']['value']

    def score_lists(self, paths, trial_lists, cohort_files=None, top_n=None, subtract_mean=False):
        """Scores and figures of what read_trial_lists returns: for each list {'raw': (scores (N,), operating_points)}.

        cohort_files: what choose_cohort returns. The other kinds are those of score_pairs and, where the checkpoint has
        a calibration that was fitted on other trials, 'calibrated': log-likelihood ratios, with calibration_figures.
        """
        calibration, results = self.calibration(cohort_files, top_n, subtract_mean), []
        cohort, files = cohort_files and self.cohort(cohort_files), self.embed_with_quality(paths)
        for trials in trial_lists:
            labels, options = trials.labels, (trials.pairs, cohort, top_n, subtract_mean)
            scores, measures = self.score_pairs(*map(trials.mean, files), *options)
            results.append({kind: (s, tools.operating_points(s, labels)) for kind, s in scores.items()})
            if calibration and calibration['list']['fingerprint'] == trials.fingerprint():
                say(f'note          not calibrated: {trials.path}, the trials that the calibration was fitted on')
            elif calibration:
                ratios = tools.log_likelihood_ratios(calibration, scores, measures, trials.pairs)
                figures = tools.operating_points(ratios, labels) | tools.calibration_figures(ratios, labels)
                results[-1]['calibrated'] = ratios, figures
        return results

    def score_pairs(self, embeddings, quality, pairs, cohort=None, top_n=None, subtract_mean=False):
        """({kind: scores (N,)}, {quality measure: (files,)}) of pairs (N, 2) of what embed_with_quality returns.

        With top_n there is 'asnorm' besides 'raw', by the top_n closest speakers of the cohort, and their mean score is
        a measure. With subtract_mean there are 'centred' and 'centred asnorm' too: of both vectors of a file minus the
        cohort's mean, then of unit length, so that crops count by the cosine of their means; the cohort's likewise.
        """
        scores, measures = {}, {'duration': np.log(quality[:, 0]), 'size': quality[:, 1]}
        # The mean of several utterances' whole embeddings is shorter than 1.
        whole, crops = embeddings.swapaxes(0, 1)
        spaces = {'': (np.stack([whole / np.linalg.norm(whole, axis=1, keepdims=True), crops], axis=1), cohort)}
        if subtract_mean:
            centred = (vectors - cohort.mean(axis=0) for vectors in (embeddings, cohort))
            spaces['centred '] = tuple(vectors / np.linalg.norm(vectors, axis=2, keepdims=True) for vectors in centred)
        for space, (vectors, speakers) in spaces.items():
            raw = scores[space.strip() or 'raw'] = tools.score_pairs(vectors, pairs)
            if top_n:
                moments = tools.cohort_moments(vectors, speakers, top_n)
                scores[f'{space}asnorm'] = tools.as_norm(raw, vectors, pairs, speakers, top_n, moments)
                measures.setdefault('cohort', moments[0])
        return scores, measures

    def calibration(self, cohort_files, top_n, subtract_mean):
        """What exps.calibrate wrote beside the checkpoint; None, with a note, where it is for another way to score."""
        path = f'{self.checkpoint["path"]}.calibration.json' if self.checkpoint else ''
        if not os.path.exists(path):
            return None
        made = {'raw': True, 'asnorm': top_n, 'centred': subtract_mean, 'centred asnorm': top_n and subtract_mean}
        try:
            with open(path, encoding='utf-8') as file:
                found = json.load(file)
            fits = found['cohort'] in (None, cohort_digest(cohort_files, top_n)) and made[found['kind']]
            if fits and found['checkpoint']['sha256'] == self.checkpoint['sha256']:
                return found
            say(f'note          not calibrated: {path} is for other weights or options: {found["command"]}')
        except (ValueError, KeyError, TypeError) as error:
            raise BadInput(f'{path}: not what exps.calibrate writes; move it away') from error
        return None

    def cohort(self, files):
        """Cohort of as_norm, (speakers, 2, 192): the mean of embed_files over each speaker's files, a list for each, so
        that a score against it is the mean of the scores against these. It is kept beside the checkpoint.
        """
        checkpoint, paths = self.checkpoint or {'path': '', 'sha256': ''}, [path for each in files for path in each]
        kept_in = f'{checkpoint["path"]}.cohort.npz'
        key = f'{checkpoint["sha256"]} {cohort_digest(files)}'
        cohort = None
        with contextlib.suppress(OSError, EOFError, ValueError, KeyError, zipfile.BadZipFile), np.load(kept_in) as kept:
            cohort = kept['cohort'] if str(kept['key']) == key else None
        if all(tools.gather([cohort is not None])):
            return cohort
        ends = np.cumsum([len(each) for each in files])
        cohort = np.stack([part.mean(axis=0) for part in np.split(self.embed_files(paths), ends[:-1])])
        if self.checkpoint and process_rank() == 0:
            try:
                tools.write_whole(kept_in, lambda file: np.savez(file, key=key, cohort=cohort))
            except BadInput as error:
                say(f'note          the cohort is not kept: {error}')
        return cohort

    def embed(self, paths):
        """Unit embeddings of whole files, float32 (N, 192); other rates and channels are converted, with a note."""
        return self.embed_files(paths, any_format=True)[:, 0]

    def embed_files(self, paths, any_format=False):
        """The first of what embed_with_quality returns."""
        return self.embed_with_quality(paths, any_format)[0]

    @torch.inference_mode()
    def embed_with_quality(self, paths, any_format=False):
        """Each file as two vectors, float32 (N, 2, 192): its whole utterance's unit embedding, and the mean of the unit
        embeddings of its five crops, so that the dot product of two means is the mean over 25 pairs of crops. And its
        quality, float32 (N, 2): seconds, and the length of the first before it was made a unit vector.

        A recording of more than five minutes counts as the mean of its equal parts. Where processes train together each
        reads its part of the files, and all return the same. Raises BadInput that names every file that cannot be used,
        or whose embedding is zero or not finite.
        """
        self.eval()
        mine = range(process_rank(), len(paths), process_count())
        options = {'num_workers': min(self.n_cpu, len(mine)), 'pin_memory': self.on_gpu}
        read = functools.partial(read_utterance, read_any if any_format else read_audio)
        files = DataLoader([paths[i] for i in mine], batch_size=None, collate_fn=read, **options)
        bar = {'total': len(mine), 'unit': 'file', 'disable': process_rank() > 0 or None, 'leave': False}
        files = tqdm(tools.fetch(files), 'evaluating', **bar)
        embeddings = torch.zeros(len(paths), 2, 192, device=self.device)
        quality = torch.zeros(len(paths), 2, device=self.device)
        window, frames, faults, long = [], 0, [], []
        for index, audio in zip(mine, files):
            if isinstance(audio, str):
                faults.append(audio)
            if faults:
                continue
            long += [paths[index]] * (len(audio) > LONGEST)
            quality[index, 0] = len(audio) / RATE
            window.append((index, audio.to(self.device, non_blocking=True)))
            frames += 1 + len(audio) // HOP
            if frames > WINDOW_FRAMES:
                self.embed_window(window, embeddings, quality)
                window, frames = [], 0
        self.embed_window(window, embeddings, quality)
        embeddings, quality = (tools.sum_over_processes(tensor).cpu() for tensor in (embeddings, quality))
        faults, long = tools.gather(faults), tools.gather(long)
        if not faults:
            # Numbers too large for float32 end as NaN, or as zeros where the norm alone is too large.
            broken = torch.nonzero(~(embeddings.norm(dim=2) > 0).all(dim=1)).flatten().tolist()
            faults = [f'{paths[i]}: its embedding is zero or not finite; is the model sound?' for i in broken]
        if faults:
            raise BadInput('\n'.join([f'{len(faults)} of {len(paths)} files cannot be embedded:', *faults]))
        if long:
            say(f'note          longer than five minutes, so embedded in parts: {len(long)} files, {long[0]} for one')
        embeddings[:, 0] = F.normalize(embeddings[:, 0])
        quality[:, 1] /= (quality[:, 0] * RATE / LONGEST).ceil()
        return embeddings.numpy(), quality.numpy()

    def embed_window(self, window, embeddings, quality):
        """Fills in embeddings (N, 2, 192) and quality[:, 1], zeros so far, from a list of (index, audio (samples,)).

        Whole utterances of about the same length share a batch. Nothing waits for a GPU.
        """
        encoder, batch_frames = self.speaker_encoder, BATCH_FRAMES if self.on_gpu else CPU_BATCH_FRAMES
        parts = ((index, part) for index, audio in window for part in audio.tensor_split(-(-len(audio) // LONGEST)))
        items = [(index, encoder.features(part[None])) for index, part in parts]
        items.sort(key=lambda item: item[1].shape[2], reverse=True)
        step = SHAPE_STEP if self.on_gpu else 1
        while items:
            longest = -(-items[0][1].shape[2] // step) * step
            size = max(1, batch_frames // longest)
            indices, features = zip(*items[:size])
            items = items[size:]
            frames = [x.shape[2] for x in features]
            padded = torch.cat([F.pad(x, (0, longest - x.shape[2])) for x in features])
            embedding = encoder.encode(padded, None if min(frames) == longest else self.upload(frames))
            embeddings[:, 0].index_add_(0, self.upload(indices), F.normalize(embedding))
            quality[:, 1].index_add_(0, self.upload(indices), embedding.norm(dim=1))
        size = max(1, batch_frames // (5 * (1 + EVAL_CROP // HOP)))
        for start in range(0, len(window), size):
            indices, audio = zip(*window[start : start + size])
            crops = torch.cat([eval_crops(samples) for samples in audio])
            crops = F.normalize(encoder.encode(encoder.features(crops)))
            embeddings[self.upload(indices), 1] = crops.view(len(audio), 5, -1).mean(dim=1)

    def upload(self, numbers):
        """Integers as a tensor on the device."""
        numbers = torch.tensor(numbers)
        return numbers.pin_memory().to(self.device, non_blocking=True) if self.on_gpu else numbers

    # Machinery: saving, resuming and loading; below the class, devices and what can be wrong with a checkpoint.

    def save_parameters(self, path):
        """Writes the flat state dict of the published format: speaker_encoder.* and speaker_loss.weight."""
        tools.write_whole(path, lambda file: torch.save(self.state_dict(), file))

    def save_training(self, folder, epoch, keep=0, **rest):
        """Writes model_EPOCH.model and, in model_EPOCH.state, what else a resume needs, with `rest`; then prunes."""
        broken = [name for name, tensor in self.state_dict().items() if not tensor.isfinite().all()]
        if broken:
            raise BadInput(f'epoch {epoch}: {broken[0]} is not finite any more; it is not saved. A lower --lr may help')
        path = os.path.join(folder, f'model_{epoch:04d}')
        state = {'epoch': epoch, **rest, 'optim': self.optim.state_dict()}
        tools.write_whole(f'{path}.state', lambda file: torch.save(state, file))
        self.save_parameters(f'{path}.model')
        prune(folder, keep, epoch)

    def resume(self, folder, identity, force=False):
        """Loads the newest checkpoint of a folder that can be read, with the optimiser's state beside it.

        identity: {option: value} of what changes the numbers of this run, BadInput where the checkpoint's differ unless
        force is given. Returns the state without the optimiser's, with the options that `changed`; None for no run.
        """
        path, weights, state = newest_checkpoint(folder)
        if path is None:
            return None
        then = state.pop('identity', {})
        differ = [name for name in identity if then.get(name, identity[name]) != identity[name]]
        state['changed'] = [f'--{name} {identity[name]} (was {then[name]})' for name in differ]
        if differ and not force:
            remedy = 'Give those it began with (options.txt), choose another --save_path, or add --force.'
            lines = [
                f'{folder} holds a run with other options, which would change its numbers:',
                *state['changed'],
                remedy,
            ]
            raise BadInput('\n'.join(lines))
        if self.load_parameters(path, weights):
            counts = f'it has {checkpoint_sizes(weights)[1]} speakers, this run {len(self.speaker_loss.weight)}'
            remedy = 'choose another --save_path, and --initial_model to start from it'
            raise BadInput(f'{path}: cannot be continued: {counts}; {remedy}')
        if 'optim' in state:
            group = dict(self.optim.param_groups[0])
            if ('momentum' in state['optim']['param_groups'][0]) != ('momentum' in group):
                raise BadInput(f'{path}: the optimiser beside it is another one; give the --optimizer it began with')
            self.optim.load_state_dict(state.pop('optim'))
            self.optim.param_groups[0]['weight_decay'] = group['weight_decay']
        else:
            print(f'{path}: no usable .state beside it; the optimiser starts from the beginning', file=sys.stderr)
        return state

    def load_parameters(self, path, weights=None):
        """Loads a checkpoint, or the weights that were read from it; returns the names of those left out, a classifier
        of other speakers. Raises BadInput for an encoder that does not fit.
        """
        weights, own = weights or read_checkpoint(path)[0], self.state_dict()
        shapes, own_shapes = ({name: tensor.shape for name, tensor in tensors.items()} for tensors in (weights, own))
        unfit = [name for name in own_shapes | shapes if own_shapes.get(name) != shapes.get(name)]
        encoder = [name for name in unfit if name.startswith('speaker_encoder.')]
        if encoder:
            wrong = f'{len(encoder)} tensors are missing, unknown or of another shape, {encoder[0]} for one'
            sizes = (
                f'it has {checkpoint_sizes(weights)[0]} channels, the model {self.speaker_encoder.conv1.out_channels}'
            )
            raise BadInput(f'{path}: the encoder does not fit: {wrong}; {sizes} (--C)')
        self.load_state_dict({name: tensor for name, tensor in weights.items() if name not in unfit}, strict=False)
        self.checkpoint = None
        return unfit


class Diverged(BadInput):
    """A loss or gradient that is not finite, at `step` (from 1) of `epoch`; `batch` is its (waveforms, labels)."""

    def __init__(self, epoch, step, batch):
        super().__init__(f'epoch {epoch}, step {step}: the loss or a gradient is not finite')
        self.epoch, self.step, self.batch = epoch, step, batch


def choose_device(name='auto'):
    """torch.device of 'auto' (cuda if there is one, else cpu) or of a device's name; BadInput if it is not there."""
    there = glob.glob('/dev/nvidia[0-9]*') if os.environ.get('CUDA_VISIBLE_DEVICES') not in ('', '-1') else []
    hint = ' (this machine has a GPU: update its driver, or give --device cpu)' if there and name == 'auto' else ''
    try:
        # A GPU that cannot be used is an error: two days on the CPU by accident would be a lost run.
        device = torch.device(name if name != 'auto' else 'cuda' if hint or torch.cuda.is_available() else 'cpu')
        torch.empty(0, device=device)
        if device.type == 'cuda' and device.index:
            torch.cuda.set_device(device)  # or PyTorch would put some of its own things on the first GPU
    except (RuntimeError, AssertionError) as error:
        raise BadInput(f'--device {name}: not available here: {tools.summary(error)}{hint}') from error
    return device


def load_model(path, **kwargs):
    """ECAPAModel with the sizes and the weights of a checkpoint, which its `checkpoint` names: {'path', 'sha256'}.

    kwargs: as ECAPAModel's, such as device. Raises BadInput for a C or n_class that contradicts the checkpoint.
    """
    weights, sha256 = read_checkpoint(path)
    sizes = dict(zip(('C', 'n_class'), checkpoint_sizes(weights)))
    for name, found in sizes.items():
        if kwargs.get(name) not in (None, found):
            raise BadInput(f'--{name} {kwargs[name]} contradicts {path}, where it is {found}; leave it out')
    options = {'lr': 0.001, 'lr_decay': 0.97, 'm': 0.2, 's': 30, 'test_step': 1, **kwargs, **sizes}
    system = ECAPAModel(**options)
    system.load_parameters(path, weights)
    system.checkpoint = {'path': path, 'sha256': sha256}
    return system


def prune(folder, keep, epoch):
    """Removes from a run's folder what a kill left and, up to an epoch, all but 2 states and `keep` models (0: all)."""
    states = sorted(glob.glob(glob.escape(folder) + '/model_*.state'))
    old = [path for path in states if path <= os.path.join(folder, f'model_{epoch:04d}.state')][:-2]
    models = [path for path, saved in saved_models(folder).items() if saved <= epoch]
    for path in old + (models[keep:] if keep else []) + glob.glob(glob.escape(folder) + '/*.part'):
        with contextlib.suppress(OSError):
            os.remove(path)


def saved_models(folder):
    """{path of a checkpoint: its epoch} in a run's folder of models, the newest first."""
    paths = sorted(glob.glob(glob.escape(folder) + '/model_[0-9]*.model'), reverse=True)
    epochs = [re.fullmatch(r'model_(\d+)\.model', os.path.basename(path)) for path in paths]
    return {path: int(epoch[1]) for path, epoch in zip(paths, epochs) if epoch}


def newest_checkpoint(folder):
    """(path, weights, state) of the newest of a run's checkpoints that can be read, preferring those with a state; None
    where there is none. Says on standard error which files cannot be used.
    """
    without_state = None, None, None
    for path, epoch in saved_models(folder).items():
        state_path = path.removesuffix('.model') + '.state'
        if without_state[0] and not os.path.exists(state_path):
            continue
        try:
            weights, _ = read_checkpoint(path)
            if not without_state[0]:
                without_state = path, weights, {'epoch': epoch}
            if os.path.exists(state_path):
                state, _ = read_file(state_path, 'the state of a training run')
                optim = state.get('optim') if isinstance(state, dict) else None
                if not isinstance(optim, dict) or 'param_groups' not in optim or state.get('epoch') != epoch:
                    raise BadInput(f'{state_path}: not the state of a training run after epoch {epoch}')
                return path, weights, state
        except BadInput as error:
            print(f'{error}\nlooking for a checkpoint before it', file=sys.stderr)
    return without_state


def read_checkpoint(path):
    """(State dict, SHA-256) of a checkpoint; BadInput if it is missing, damaged or no checkpoint of this model."""
    if not os.path.isfile(path):
        raise BadInput(f'--initial_model: {path}: no such checkpoint')
    state, sha256 = read_file(path, 'a checkpoint')
    if not isinstance(state, dict) or not all(
        isinstance(name, str) and isinstance(tensor, torch.Tensor) and tensor.layout == torch.strided
        for name, tensor in state.items()
    ):
        raise BadInput(f'{path}: not a checkpoint of this model: a flat dictionary of tensors was expected')
    state = {name.removeprefix('module.'): tensor for name, tensor in state.items()}
    for name, shape in (('speaker_encoder.conv1.weight', (80, 5)), ('speaker_loss.weight', (192,))):
        if name not in state or state[name].shape[1:] != shape or not len(state[name]):
            raise BadInput(f'{path}: not a checkpoint of this model: {name} is missing or has another shape')
    broken = [name for name, tensor in state.items() if not tensor.float().isfinite().all()]
    if broken:
        raise BadInput(f'{path}: holds numbers that are not finite, in {broken[0]}')
    return state, sha256


def cohort_digest(files, top_n=None):
    """SHA-256 of which files make a cohort, and how many speakers of it normalise a score."""
    return tools.digest(os.fsencode(repr((files, top_n))))


def checkpoint_sizes(state):
    """(channels C, number of speakers) of a checkpoint's state dict."""
    return len(state['speaker_encoder.conv1.weight']), len(state['speaker_loss.weight'])


def read_file(path, role):
    """(What torch.save wrote, on the CPU; SHA-256), executing nothing in the file; BadInput says what it is instead."""
    content = b''
    try:
        with open(path, 'rb') as file:
            content = file.read()
        if zipfile.is_zipfile(io.BytesIO(content)):
            with zipfile.ZipFile(io.BytesIO(content)) as archive:
                # PyTorch leaves the checksums alone, and a flipped bit would go unnoticed.
                damaged = archive.testzip()
            if damaged:
                raise zipfile.BadZipFile(f'the checksum of {damaged} is wrong')
        return torch.load(io.BytesIO(content), map_location='cpu', weights_only=True), tools.digest(content)
    except Exception as error:
        # torch.load raises a dozen types for damaged files, none of them its own.
        code = re.search(r'GLOBAL (\S+)', str(error))
        if isinstance(error, OSError) and error.strerror:
            why = error.strerror
        elif code:
            why = f'it would run code on loading ({code[1]}), where only tensors are expected; refused'
        elif not content:
            why = 'it is empty (0 bytes)'
        elif content.startswith(b'PK'):
            why = f'it is damaged or cut short, at {len(content):,} bytes ({tools.summary(error)})'
        else:
            why = f'it is no PyTorch file: {len(content):,} bytes that begin with {content[:24]!r}'
        raise BadInput(f'{path}: cannot be read as {role}: {why}') from error
