"""Plain implementations: the obvious way to compute what the six modules compute.

The tests use them as the truth, and the benchmark as the speed to beat. So nothing here shares code
with the modules, and nothing here is made fast. Audio is 16 kHz mono; embeddings have 192
dimensions.
"""

import glob
import math
import os
import random
from operator import itemgetter

import numpy as np
import soundfile
import torch
import torch.nn.functional as F
import torchaudio
from scipy.signal import convolve
from torch import nn

SNR = {'noise': (0, 15), 'speech': (13, 20), 'music': (5, 15)}  # dB
CLIPS = {'noise': (1, 1), 'speech': (3, 8), 'music': (1, 1)}
EVAL_CROP = 48240  # samples, 3 s
POOLED = 1536  # channels that are pooled


def plain_read_train_list(train_list, train_path):
    """Reads lines `speaker path`; returns the paths (list of str) and the labels (list of int)."""
    with open(train_list) as file:
        lines = file.read().splitlines()

    speakers = sorted({line.split()[0] for line in lines})
    index = {speaker: number for number, speaker in enumerate(speakers)}

    paths = []
    labels = []
    for line in lines:
        speaker, name = line.split()
        paths.append(os.path.join(train_path, name))
        labels.append(index[speaker])
    return paths, labels


def plain_crop(path, length):
    """Reads the whole file, and returns a random crop of it, float64 (length,).

    A shorter file is repeated.
    """
    audio, _ = soundfile.read(path)
    if len(audio) < length:
        audio = np.pad(audio, (0, length - len(audio)), 'wrap')

    start = random.randint(0, len(audio) - length)
    return audio[start : start + length]


def plain_reverberate(audio, rir):
    """Convolves audio (samples,) with a room's impulse response (taps,), scaled to unit energy."""
    rir = rir / np.sqrt(np.sum(rir**2))
    return convolve(audio, rir, mode='full')[: len(audio)]


def plain_mix(audio, noise, snr):
    """Returns noise (samples,), scaled to be `snr` dB below audio (samples,). It adds nothing."""
    audio_db = 10 * np.log10(np.mean(audio**2) + 1e-4)
    noise_db = 10 * np.log10(np.mean(noise**2) + 1e-4)
    return np.sqrt(10 ** ((audio_db - noise_db - snr) / 10)) * noise


class PlainDataset(torch.utils.data.Dataset):
    """Random augmented crops of training utterances.

    An item is (FloatTensor (num_frames * 160 + 240,), int label). musan_path holds MUSAN whole or
    in pieces; in both cases a file is read whole.
    """

    def __init__(self, train_list, train_path, musan_path, rir_path, num_frames):
        self.length = num_frames * 160 + 240
        self.paths, self.labels = plain_read_train_list(train_list, train_path)

        self.noises = {}
        for category in SNR:
            pattern = os.path.join(musan_path, category, '**', '*.wav')
            self.noises[category] = glob.glob(pattern, recursive=True)
        self.rirs = glob.glob(os.path.join(rir_path, '**', '*.wav'), recursive=True)

    def __len__(self):
        return len(self.paths)

    def __getitem__(self, index):
        audio = plain_crop(self.paths[index], self.length)

        kind = random.randint(0, 5)
        if kind == 1:
            audio = self.add_rev(audio)
        elif kind == 2:
            audio = self.add_noise(audio, 'speech')
        elif kind == 3:
            audio = self.add_noise(audio, 'music')
        elif kind == 4:
            audio = self.add_noise(audio, 'noise')
        elif kind == 5:
            audio = self.add_noise(audio, 'speech')
            audio = self.add_noise(audio, 'music')

        return torch.FloatTensor(audio), self.labels[index]

    def add_rev(self, audio):
        """Returns audio (samples,) as it sounds in a random room."""
        rir, _ = soundfile.read(random.choice(self.rirs))
        return plain_reverberate(audio, rir)

    def add_noise(self, audio, category):
        """Adds clips of a category to audio (samples,), each with its own signal-to-noise ratio."""
        count = random.randint(*CLIPS[category])
        paths = random.choices(self.noises[category], k=count)

        noises = []
        for path in paths:
            noise = plain_crop(path, len(audio))
            snr = random.uniform(*SNR[category])
            noises.append(plain_mix(audio, noise, snr))
        return np.sum([audio, *noises], axis=0)


class PlainPreEmphasis(nn.Module):
    """Computes x[t] - 0.97 x[t - 1] of (B, samples), with one reflected sample on the left."""

    def __init__(self):
        super().__init__()
        self.register_buffer('flipped_filter', torch.FloatTensor([[[-0.97, 1.0]]]))

    def forward(self, x):
        padded = F.pad(x[:, None], (1, 0), mode='reflect')
        return F.conv1d(padded, self.flipped_filter)[:, 0]


class PlainSE(nn.Module):
    """Squeeze-excitation of (B, channels, T) with a bottleneck of 128."""

    def __init__(self, channels):
        super().__init__()
        self.se = nn.Sequential(
            nn.AdaptiveAvgPool1d(1),
            nn.Conv1d(channels, 128, 1),
            nn.ReLU(),
            nn.Conv1d(128, channels, 1),
            nn.Sigmoid(),
        )

    def forward(self, x):
        return x * self.se(x)


class PlainBlock(nn.Module):
    """SE-Res2 block with 8 groups and kernel 3 on (B, C, T)."""

    def __init__(self, C, dilation):
        super().__init__()
        width = C // 8
        self.width = width

        self.conv1 = nn.Conv1d(C, C, 1)
        self.bn1 = nn.BatchNorm1d(C)
        self.convs = nn.ModuleList(
            [nn.Conv1d(width, width, 3, dilation=dilation, padding=dilation) for _ in range(7)]
        )
        self.bns = nn.ModuleList([nn.BatchNorm1d(width) for _ in range(7)])
        self.conv3 = nn.Conv1d(C, C, 1)
        self.bn3 = nn.BatchNorm1d(C)
        self.se = PlainSE(C)

    def forward(self, x):
        y = self.bn1(F.relu(self.conv1(x)))
        groups = torch.split(y, self.width, dim=1)

        group = self.bns[0](F.relu(self.convs[0](groups[0])))
        out = group
        for i in range(1, 7):
            group = self.bns[i](F.relu(self.convs[i](groups[i] + group)))
            out = torch.cat((out, group), dim=1)
        out = torch.cat((out, groups[7]), dim=1)

        out = self.bn3(F.relu(self.conv3(out)))
        return self.se(out) + x


def plain_mask(x, dim, widths):
    """Applies SpecAugment to (B, bands, frames) along dim.

    Sets one range, narrower than `widths`, to zero in each utterance.
    """
    size = x.shape[dim]
    mask_len = torch.randint(0, widths, (len(x), 1), device=x.device)
    mask_pos = torch.randint(0, max(1, size - mask_len.max()), (len(x), 1), device=x.device)

    position = torch.arange(size, device=x.device)
    mask = (position >= mask_pos) & (position < mask_pos + mask_len)
    mask = mask[:, None, :] if dim == 2 else mask[:, :, None]
    return x.masked_fill(mask, 0)


class PlainECAPA(nn.Module):
    """ECAPA-TDNN with C channels, and the tensor names of the published checkpoint."""

    def __init__(self, C):
        super().__init__()
        mel = torchaudio.transforms.MelSpectrogram(
            16000,
            n_fft=512,
            win_length=400,
            hop_length=160,
            f_min=20,
            f_max=7600,
            n_mels=80,
            window_fn=torch.hamming_window,
        )
        self.torchfbank = nn.Sequential(PlainPreEmphasis(), mel)

        self.conv1 = nn.Conv1d(80, C, 5, padding=2)
        self.bn1 = nn.BatchNorm1d(C)
        self.layer1 = PlainBlock(C, 2)
        self.layer2 = PlainBlock(C, 3)
        self.layer3 = PlainBlock(C, 4)
        self.layer4 = nn.Conv1d(3 * C, POOLED, 1)

        self.attention = nn.Sequential(
            nn.Conv1d(3 * POOLED, 256, 1),
            nn.ReLU(),
            nn.BatchNorm1d(256),
            nn.Tanh(),
            nn.Conv1d(256, POOLED, 1),
            nn.Softmax(2),
        )
        self.bn5 = nn.BatchNorm1d(2 * POOLED)
        self.fc6 = nn.Linear(2 * POOLED, 192)
        self.bn6 = nn.BatchNorm1d(192)

    def forward(self, x, aug):
        """Embeds waveforms (B, samples) as (B, 192); aug: whether to mask the spectrogram."""
        with torch.no_grad():
            x = torch.log(self.torchfbank(x) + 1e-6)
            x = x - torch.mean(x, dim=-1, keepdim=True)
            if aug:
                x = plain_mask(x, 2, 10)
                x = plain_mask(x, 1, 8)

        x = self.bn1(F.relu(self.conv1(x)))
        x1 = self.layer1(x)
        x2 = self.layer2(x + x1)
        x3 = self.layer3(x + x1 + x2)
        x = F.relu(self.layer4(torch.cat((x1, x2, x3), dim=1)))

        frames = x.shape[-1]
        mean = torch.mean(x, dim=2, keepdim=True)
        std = torch.sqrt(torch.var(x, dim=2, keepdim=True).clamp(min=1e-4))
        context = (x, mean.repeat(1, 1, frames), std.repeat(1, 1, frames))
        w = self.attention(torch.cat(context, dim=1))

        mu = torch.sum(x * w, dim=2)
        sigma = torch.sqrt((torch.sum(x**2 * w, dim=2) - mu**2).clamp(min=1e-4))
        return self.bn6(self.fc6(self.bn5(torch.cat((mu, sigma), dim=1))))


class PlainAAM(nn.Module):
    """AAM-softmax of n_class speakers, with dense one-hot targets.

    m: margin in radians; s: scale.
    """

    def __init__(self, n_class, m, s):
        super().__init__()
        self.m = m
        self.s = s
        self.weight = nn.Parameter(torch.empty(n_class, 192))
        nn.init.xavier_normal_(self.weight)

    def forward(self, x, label):
        """Returns the loss and the accuracy in percent of embeddings (B, 192) and labels (B,).

        Both are those of the logits with the margin.
        """
        cosine = F.linear(F.normalize(x), F.normalize(self.weight))
        sine = torch.sqrt((1 - cosine**2).clamp(0, 1))

        phi = cosine * math.cos(self.m) - sine * math.sin(self.m)
        line = cosine - math.sin(math.pi - self.m) * self.m
        phi = torch.where(cosine > math.cos(math.pi - self.m), phi, line)

        one_hot = torch.zeros_like(cosine)
        one_hot.scatter_(1, label.view(-1, 1), 1)
        logits = (one_hot * phi + (1 - one_hot) * cosine) * self.s

        loss = F.cross_entropy(logits, label)
        correct = torch.argmax(logits, dim=1) == label
        return loss, 100 * correct.float().mean()


def plain_train_step(encoder, classifier, optimiser, audio, labels):
    """Takes one step on waveforms (B, samples) and labels (B,).

    Returns the loss and the accuracy in percent, both read back from the device. On a GPU the
    convolutions use TF32 and the matrix products do not, which is PyTorch's default.
    """
    optimiser.zero_grad()
    loss, accuracy = classifier(encoder(audio, aug=True), labels)
    loss.backward()
    optimiser.step()
    return loss.item(), accuracy.item()


def plain_read_trials(eval_list, eval_path):
    """Reads lines `label enrolment test`; returns labels (list of int) and pairs of paths."""
    labels = []
    trials = []
    with open(eval_list) as lines:
        for line in lines:
            label, *names = line.split()
            labels.append(int(label))
            trials.append(tuple(os.path.join(eval_path, name) for name in names))
    return labels, trials


@torch.no_grad()
def plain_embed(encoder, paths):
    """Embeds the paths, file by file.

    Returns {path: unit embeddings of the whole file (1, 192) and of its five 3 s crops (5, 192)}.
    """
    encoder.eval()
    device = next(encoder.parameters()).device

    embeddings = {}
    for path in paths:
        audio, _ = soundfile.read(path)
        whole = torch.FloatTensor(audio)[None].to(device)

        if len(audio) < EVAL_CROP:
            audio = np.pad(audio, (0, EVAL_CROP - len(audio)), 'wrap')
        starts = np.linspace(0, len(audio) - EVAL_CROP, num=5)
        crops = np.stack([audio[int(start) : int(start) + EVAL_CROP] for start in starts])
        crops = torch.FloatTensor(crops).to(device)

        of_whole = F.normalize(encoder(whole, aug=False))
        of_crops = F.normalize(encoder(crops, aug=False))
        embeddings[path] = (of_whole, of_crops)
    return embeddings


def plain_scores(embeddings, trials):
    """Returns the scores of the trials, a list.

    A score is half the cosine of the whole files plus half the mean cosine of the 25 pairs of
    crops.
    """
    scores = []
    for enrolment, test in trials:
        enrolment_whole, enrolment_crops = embeddings[enrolment]
        test_whole, test_crops = embeddings[test]
        whole = torch.mean(torch.matmul(enrolment_whole, test_whole.T))
        crops = torch.mean(torch.matmul(enrolment_crops, test_crops.T))
        scores.append(((whole + crops) / 2).item())
    return scores


def plain_error_rates(scores, labels):
    """Returns lists of miss rates, false-alarm rates and thresholds, by ascending score."""
    ranked = sorted(zip(scores, labels), key=itemgetter(0))
    targets = sum(int(label) for _, label in ranked)
    nontargets = len(ranked) - targets

    missed = 0
    rejected = 0
    fnrs = []
    fprs = []
    thresholds = []
    for score, label in ranked:
        missed += int(label)
        rejected += 1 - int(label)
        fnrs.append(missed / targets)
        fprs.append(1 - rejected / nontargets)
        thresholds.append(score)
    return fnrs, fprs, thresholds


def plain_min_dcf(fnrs, fprs, thresholds, p_target, c_miss=1, c_fa=1):
    """Returns the smallest normalised detection cost, and its threshold."""
    smallest = float('inf')
    best = None
    for fnr, fpr, threshold in zip(fnrs, fprs, thresholds):
        cost = c_miss * fnr * p_target + c_fa * fpr * (1 - p_target)
        if cost < smallest:
            smallest = cost
            best = threshold

    without_scores = min(c_miss * p_target, c_fa * (1 - p_target))
    return smallest / without_scores, best


def plain_exact_rates(scores, labels):
    """(Misses, false alarms, threshold) below all scores, and at each different one, ascending."""
    targets = sum(int(label) for label in labels)
    others = len(labels) - targets
    rates = [(0.0, 1.0, -math.inf)]
    missed = 0
    rejected = 0
    ordered = sorted(zip(scores, labels))
    for place, (score, label) in enumerate(ordered):
        if label:
            missed += 1
        else:
            rejected += 1
        if place + 1 == len(ordered) or ordered[place + 1][0] > score:
            rates.append((missed / targets, 1 - rejected / others, score))
    return rates


def plain_eer(scores, labels):
    """Equal error rate in percent: where straight lines between the thresholds' rates are equal."""
    rates = plain_exact_rates(scores, labels)
    for (miss, false, _), (next_miss, next_false, _) in zip(rates, rates[1:]):
        if next_miss >= next_false:
            part = (false - miss) / (next_miss - miss + false - next_false)
            return 100 * (miss + part * (next_miss - miss))


def plain_exact_min_dcf(scores, labels, p_target):
    """Lowest normalised cost over all thresholds, equal scores being one."""
    rates = plain_exact_rates(scores, labels)
    costs = [miss * p_target + false * (1 - p_target) for miss, false, _ in rates]
    return min(costs) / p_target


def plain_replicate(scores, labels, speakers, counts):
    """Returns plain_figures of trials that are repeated as often as their speakers were drawn.

    speakers: (N, 2), of each trial; counts: how often each speaker was drawn. A target trial counts
    once for each time that its speaker was drawn. A non-target trial counts once for each pair of
    draws of its two speakers.
    """
    repeated_scores = []
    repeated_labels = []
    for score, label, (first, second) in zip(scores, labels, speakers):
        times = counts[first]
        if not label:
            times = times * counts[second]
        repeated_scores += [score] * times
        repeated_labels += [label] * times
    return plain_figures(repeated_scores, repeated_labels)


def plain_figures(scores, labels):
    """Returns (EER in percent, minDCF at p_target 0.01, minDCF at p_target 0.05)."""
    costs = [plain_exact_min_dcf(scores, labels, p_target) for p_target in (0.01, 0.05)]
    return plain_eer(scores, labels), *costs
