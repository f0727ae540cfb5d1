"""The network: waveform -> log-mel spectrogram -> ECAPA-TDNN -> embedding of 192 numbers.

Desplanques, Thienpondt and Demuynck, ECAPA-TDNN, Interspeech 2020, arXiv 2005.07143. Module names
and shapes are those of the published checkpoint. In the comments B is the batch, T the frames, C
the channels.
"""

import math

import torch
import torch.distributed as dist
import torch.nn.functional as F
import torchaudio
from torch import nn

from tools import BadInput

HOP = 160  # samples, 10 ms
HALF_WINDOW = 256  # samples of a frame on each side of its centre


class PreEmphasis(nn.Module):
    """Computes x[t] - coef * x[t - 1] of x (B, samples), where x[-1] is the reflection x[1]."""

    def __init__(self, coef=0.97):
        super().__init__()
        self.coef = coef
        self.register_buffer('flipped_filter', torch.tensor([[[-coef, 1.0]]]))

    def forward(self, input):
        # A GPU may round a convolution to the 10 bits of TF32, so this is a sum.
        before = torch.cat((input[:, 1:2], input[:, :-1]), dim=1)
        return input * self.flipped_filter[0, 0, 1] + before * self.flipped_filter[0, 0, 0]


class FbankAug(nn.Module):
    """SpecAugment (Park et al., Interspeech 2019), without time warping.

    Zeroes some neighbouring mel bands and some neighbouring frames in each utterance. How many is
    drawn from freq_mask_width (mel bands) and time_mask_width (frames), each (low, high) with high
    excluded.
    """

    def __init__(self, freq_mask_width=(0, 8), time_mask_width=(0, 10)):
        super().__init__()
        self.freq_mask_width = freq_mask_width
        self.time_mask_width = time_mask_width

    def mask_along_axis(self, x, dim):
        """Returns x (B, bands, frames) with a range of bands (dim 1) or frames (dim 2) set to 0."""
        size = x.shape[dim]
        narrowest, widest = self.freq_mask_width if dim == 1 else self.time_mask_width
        width = torch.randint(narrowest, widest, (len(x), 1), device=x.device)

        # The bound is on the device. randint would wait for it, so scale a uniform number instead.
        starts = (size - width.max()).clamp(min=1)
        start = (torch.rand(len(x), 1, device=x.device) * starts).long()

        position = torch.arange(size, device=x.device)
        mask = (start <= position) & (position < start + width)  # (B, size)
        mask = mask.unsqueeze(2) if dim == 1 else mask.unsqueeze(1)
        return x.masked_fill(mask, 0.0)

    def forward(self, x):
        x = self.mask_along_axis(x, dim=2)
        return self.mask_along_axis(x, dim=1)


class Bottle2neck(nn.Module):
    """SE-Res2 block (paper, section 3.2): (B, inplanes, T) -> (B, planes, T), added to its input.

    The channels are cut into `scale` groups. All but the last go through a chain of dilated
    convolutions, each of which gets its own group plus the output of the convolution before it.
    """

    def __init__(self, inplanes, planes, kernel_size=None, dilation=None, scale=8):
        super().__init__()
        width = planes // scale
        padding = kernel_size // 2 * dilation
        self.conv1 = nn.Conv1d(inplanes, width * scale, kernel_size=1)
        self.bn1 = BatchNorm(width * scale)
        self.convs = nn.ModuleList(
            nn.Conv1d(width, width, kernel_size, dilation=dilation, padding=padding)
            for _ in range(scale - 1)
        )
        self.bns = nn.ModuleList(BatchNorm(width) for _ in range(scale - 1))
        self.conv3 = nn.Conv1d(width * scale, planes, kernel_size=1)
        self.bn3 = BatchNorm(planes)
        self.relu = nn.ReLU()
        self.se = SEModule(planes)
        self.width = width

    def forward(self, x, mask=None):
        """Returns (B, planes, T). mask: (B, 1, T), 1 in an utterance and 0 in its padding."""
        reduced = self.bn1(self.relu(self.conv1(x)))  # (B, planes, T)
        groups = reduced.split(self.width, dim=1)  # scale x (B, planes / scale, T)

        outputs = []
        for group, conv, bn in zip(groups, self.convs, self.bns):
            # Copy the first group: autograd keeps the convolution's input, and a view would keep
            # the whole tensor alive.
            chained = group + outputs[-1] if outputs else group.contiguous()
            if mask is not None:
                chained = chained * mask
            outputs.append(bn(self.relu(conv(chained))))  # (B, planes / scale, T)

        residual = torch.cat([*outputs, groups[-1]], dim=1)  # (B, planes, T)
        residual = self.bn3(self.relu(self.conv3(residual)))  # (B, planes, T)
        return torch.addcmul(x, residual, self.se.gate(residual, mask))


class SEModule(nn.Module):
    """Squeeze-excitation: scales each channel by a gate that depends on the means of all."""

    def __init__(self, channels, bottleneck=128):
        super().__init__()
        self.se = nn.Sequential(
            nn.Identity(),  # in place of the published pooling: the layers keep their numbers
            nn.Conv1d(channels, bottleneck, kernel_size=1),
            nn.ReLU(),
            nn.Conv1d(bottleneck, channels, kernel_size=1),
            nn.Sigmoid(),
        )

    def forward(self, input, mask=None):
        """Scales (B, channels, T); mask: as in Bottle2neck."""
        return input * self.gate(input, mask)

    def gate(self, input, mask=None):
        """Returns the factors (B, channels, 1) of forward."""
        means = mean_over_time(input, mask)  # (B, channels)
        return self.se(means.unsqueeze(2))


class Encoder(nn.Module):
    """Base of all encoders: log-mel features, SpecAugment, and the size of an embedding.

    A network derives from this class, has an entry in ENCODERS and defines `encode` and
    `channels_of`, as ECAPA_TDNN does. Its only argument is the number of channels. Use BatchNorm
    for its batch norms, also in 2-D networks: it sees the whole batch if several processes train.
    """

    embedding_size = 192

    def __init__(self):
        super().__init__()
        with torch.device('cpu'):
            mel = torchaudio.transforms.MelSpectrogram(
                sample_rate=16000,
                n_fft=512,
                win_length=400,
                hop_length=HOP,
                f_min=20,
                f_max=7600,
                n_mels=80,
                window_fn=torch.hamming_window,
            )
        self.torchfbank = nn.Sequential(PreEmphasis(), mel)
        self.specaug = FbankAug()

    def forward(self, x, aug):
        """Returns embeddings (B, embedding_size), not normalised, of waveforms x (B, samples).

        x: at 16 kHz, in [-1, 1]; no gradient flows to it. aug: whether to mask (SpecAugment).
        """
        return self.encode(self.features(x, aug))

    @torch.no_grad()
    def features(self, x, aug=False, step=1):
        """Computes the log-mel spectrogram of (B, samples), masked at random if aug is true.

        step: the number of frames is rounded up to a multiple of it for the Fourier transform,
        which a GPU plans anew for each number. The additional frames are dropped.

        Returns (B, 80, 1 + samples // 160), in which each band has a mean of 0 over time.
        """
        preemphasis, mel = self.torchfbank
        x = preemphasis(x)
        frames = 1 + x.shape[1] // HOP
        if step > 1:
            x = extend(x, step)
        x = (mel(x)[:, :, :frames] + 1e-6).log()  # (B, 80, T)
        x = x - x.mean(dim=-1, keepdim=True)
        return self.specaug(x) if aug else x


class ECAPA_TDNN(Encoder):
    """Speaker encoder with C channels in the frame-level layers; C must be a multiple of 8."""

    pooled = 1536  # channels that are pooled over time

    def __init__(self, C):
        super().__init__()
        if C % 8:
            raise BadInput(f'--C {C}: it must be a multiple of 8, for 8 groups of channels')
        self.conv1 = nn.Conv1d(80, C, kernel_size=5, stride=1, padding=2)
        self.relu = nn.ReLU()
        self.bn1 = BatchNorm(C)
        self.layer1 = Bottle2neck(C, C, kernel_size=3, dilation=2, scale=8)
        self.layer2 = Bottle2neck(C, C, kernel_size=3, dilation=3, scale=8)
        self.layer3 = Bottle2neck(C, C, kernel_size=3, dilation=4, scale=8)
        self.layer4 = nn.Conv1d(3 * C, self.pooled, kernel_size=1)
        self.attention = nn.Sequential(
            nn.Conv1d(3 * self.pooled, 256, kernel_size=1),
            nn.ReLU(),
            BatchNorm(256),
            nn.Tanh(),
            nn.Conv1d(256, self.pooled, kernel_size=1),
        )
        self.bn5 = BatchNorm(2 * self.pooled)
        self.fc6 = nn.Linear(2 * self.pooled, self.embedding_size)
        self.bn6 = BatchNorm(self.embedding_size)

    @staticmethod
    def channels_of(state):
        """Returns C of a state dict of this network; None if it belongs to another network."""
        first = state.get('conv1.weight')
        if first is None or first.shape[1:] != (80, 5) or not len(first):
            return None
        return len(first)

    def encode(self, x, frames=None):
        """Returns embeddings (B, 192) of features (B, 80, T).

        frames: (B,) lengths of utterances that are padded with zeros to T frames. Padding is kept
        out of every mean and zeroed again before every convolution that looks at neighbours, so
        each embedding is that of the utterance without padding (in evaluation mode).
        """
        mask = mask_of(frames, x)
        x = self.bn1(self.relu(self.conv1(x)))  # (B, C, T)
        x1 = self.layer1(x, mask)  # (B, C, T)
        x = x + x1
        x2 = self.layer2(x, mask)  # (B, C, T)
        x = x + x2
        x3 = self.layer3(x, mask)  # (B, C, T)
        x = torch.cat((x1, x2, x3), dim=1)  # (B, 3 C, T)
        del x1, x2, x3  # a quarter of the activations, which nothing needs from here on

        x = self.relu(self.layer4(x))  # (B, 1536, T)
        x = self.pool(x, mask)  # (B, 3072)
        with torch.autocast(x.device.type, enabled=False):
            return self.bn6(self.fc6(self.bn5(x)))  # (B, 192)

    def pool(self, x, mask=None):
        """Pools x (B, 1536, T) by attentive statistics with global context (paper, section 3.1).

        Returns the weighted means and standard deviations, float32 (B, 3072).
        """
        # Statistics over time.
        values = x.float()
        mean, variance = mean_and_variance(values, mask)  # (B, 1536) each

        # Context: mean and std are the same in every frame. So the 1x1 convolution over
        # [x, mean, std] is one over x plus one vector for each utterance.
        first = self.attention[0]
        context = torch.cat((mean, variance.clamp(min=1e-4).sqrt()), dim=1)  # (B, 3072)
        context = F.linear(context, first.weight[:, self.pooled :, 0], first.bias)  # (B, 256)

        # Attention.
        logits = F.conv1d(x, first.weight[:, : self.pooled]) + context.unsqueeze(2)  # (B, 256, T)
        for layer in self.attention[1:]:
            logits = layer(logits)  # (B, 1536, T) after the last
        logits = logits.float()
        if mask is not None:
            logits = logits.masked_fill(mask == 0, -torch.inf)

        # Weighted statistics.
        weighted_mean, weighted_square = Moments.apply(values, logits)  # (B, 1536) each
        weighted_variance = weighted_square - weighted_mean * weighted_mean
        return torch.cat((weighted_mean, weighted_variance.clamp(min=1e-4).sqrt()), dim=1)


ENCODERS = {'ecapa': ECAPA_TDNN}


def encoder_of(state):
    """Finds the network that a state dict belongs to.

    Returns (name in ENCODERS, channels C), or (None, None) if it belongs to none of them.
    """
    found = None, None
    fewest = math.inf
    for name, network in ENCODERS.items():
        C = network.channels_of(state)
        if C is None:
            continue
        # Networks that were derived from one another may accept the same state dict. The right one
        # has the fewest tensor names that do not match.
        with torch.device('meta'):
            others = len(network(C).state_dict().keys() ^ state.keys())
        if others < fewest:
            found = name, C
            fewest = others
    return found


# Machinery: padding; means whose gradients are written by hand; batch norm over processes.


def mask_of(frames, x):
    """Returns the mask of x, whose last dimension is time: 1 in the first `frames` (B,), else 0.

    It has as many dimensions as x: (B, 1, T) for (B, channels, T), (B, 1, 1, T) for the maps of a
    2-D network. Returns None if frames is None: nothing is padded.
    """
    if frames is None:
        return None
    position = torch.arange(x.shape[-1], device=x.device)
    frames = frames.view(-1, *[1] * (x.ndim - 1))
    return (position < frames).to(x.dtype)


def extend(x, step):
    """Extends (B, samples) so that its spectrogram has a multiple of `step` frames.

    The frames of x do not change: they see the reflection of its end, as they would without this.
    """
    frames = 1 + x.shape[1] // HOP
    frames = step * math.ceil((frames + 3) / step)  # 3 more, for the reflection
    x = torch.cat((x, x[:, -HALF_WINDOW - 1 : -1].flip(1)), dim=1)
    return F.pad(x, (0, (frames - 1) * HOP - x.shape[1]))


def mean_over_time(x, mask=None):
    """Returns means (B, channels) of (B, channels, T), over frames in which mask (B, 1, T) is 1."""
    if mask is not None:
        return (x * mask).sum(dim=2) / mask.sum(dim=2)
    # Tensor.mean would write out a gradient of x's size whose columns are all the same.
    return x.sum(dim=2) / x.shape[2]


def mean_and_variance(x, mask=None):
    """Returns mean and unbiased variance (B, channels) of x (B, channels, T) over time.

    mask: as in mean_over_time. The variance of a single frame is 0.
    """
    centre = mean_over_time(x, mask)
    if mask is not None:
        count = mask.sum(dim=2)
        square = (x - centre.unsqueeze(2)) ** 2
        return centre, mean_over_time(square, mask) * count / (count - 1).clamp(min=1)

    # In training. Subtract a constant near the mean first: E[x²] - E[x]² loses its digits if the
    # mean is large.
    centre = centre.detach()
    offset, mean_square = Moments.apply(x - centre.unsqueeze(2))
    variance = (mean_square - offset * offset) * (x.shape[2] / max(x.shape[2] - 1, 1))
    return centre + offset, variance


class Moments(torch.autograd.Function):
    """Means (B, channels) over time of x (B, channels, T) and of its square.

    With logits (of x's shape), the means are weighted by the softmax of the logits over time. The
    backward pass keeps and reads fewer tensors of x's size than that of autograd.
    """

    @staticmethod
    def forward(ctx, x, logits=None):
        weights = x.new_ones(()) / x.shape[2] if logits is None else logits.softmax(dim=2)
        product = weights * x
        mean = product.sum(dim=2)
        mean_square = product.mul_(x).sum(dim=2)
        ctx.save_for_backward(x, weights, mean, mean_square)
        ctx.weighted = logits is not None
        return mean, mean_square

    @staticmethod
    def backward(ctx, grad_mean, grad_square):
        x, weights, mean, mean_square = ctx.saved_tensors
        weighted_sum = (grad_mean * mean + grad_square * mean_square).unsqueeze(2)
        grad_mean = grad_mean.unsqueeze(2)
        grad_square = grad_square.unsqueeze(2)

        # dL/dx = w (g1 + 2 g2 x); dL/dlogit = w (s - sum(w s)) with s = g1 x + g2 x².
        if not ctx.weighted:
            return torch.addcmul(grad_mean * weights, x, 2 * grad_square * weights)
        slope = torch.addcmul(grad_mean, x, grad_square)  # s / x
        grad_x = torch.addcmul(slope, x, grad_square).mul_(weights)
        grad_logits = slope.mul_(x).sub_(weighted_sum).mul_(weights)
        return grad_x, grad_logits


class NormOfAll(torch.autograd.Function):
    """Batch norm (Ioffe and Szegedy, ICML 2015) with the statistics of all processes that train.

    x: (B, channels, T), of the same size in each process; weight, bias: (channels,); eps: added to
    the variance. Returns (x normalised, mean, biased variance), the last two (channels,) without
    gradients. Raises RuntimeError if the sizes differ.

    Each pass has one exchange. Of the large tensors only x is kept for the backward pass, in its
    own type.
    """

    @staticmethod
    def forward(ctx, x, weight, bias, eps):
        origin, shifted = shift(x)
        variance, offset = torch.var_mean(shifted.float(), (0, 2), correction=0)  # (channels,) each

        # Average moments over the processes, in float64: E[x²] - E[x]² keeps its digits.
        mean = origin.double() + offset
        size = torch.full_like(mean, x.numel())
        moments = torch.stack([mean, torch.addcmul(variance, mean, mean), size])
        dist.all_reduce(moments)
        mean, square, size = moments / dist.get_world_size()
        torch._assert_async(size[0] == x.numel(), 'the processes have parts of different sizes')
        variance = torch.addcmul(square, mean, mean, value=-1).float()
        offset = (mean - origin).float()
        mean = mean.float()

        ctx.save_for_backward(x, weight, offset, variance)
        ctx.eps = eps
        ctx.mark_non_differentiable(mean, variance)
        normalised = F.batch_norm(shifted, offset, variance, weight, bias, eps=eps)
        return normalised, mean, variance

    @staticmethod
    def backward(ctx, grad, *_):
        x, weight, offset, variance = ctx.saved_tensors
        _, shifted = shift(x)

        # With n = (x - mean) / deviation: grad_weight = sum(grad n), grad_bias = sum(grad).
        inverse = (variance + ctx.eps).rsqrt()
        _, grad_weight, grad_bias = torch.ops.aten.native_batch_norm_backward(
            grad, shifted, weight, offset, variance, offset, inverse,
            False, ctx.eps, [False, True, True],
        )  # fmt: skip

        # grad_x = (grad - mean(grad) - n mean(grad n)) weight / deviation, with means over all.
        sums = torch.stack([grad_weight, grad_bias])
        dist.all_reduce(sums)
        count = x.numel() // x.shape[1] * dist.get_world_size()
        scale = weight * inverse
        along, mean = sums * (scale / -count)
        grad_x = F.batch_norm(shifted, offset, variance, along, mean, eps=ctx.eps)
        return grad_x.addcmul_(grad, scale.view(1, -1, 1)), grad_weight, grad_bias, None


def shift(x):
    """Returns an origin (channels,), and x (B, channels, T) minus it.

    float32 loses small deviations from a large mean, so the origin is one of the numbers of x. In
    bfloat16 they are lost already, so there the origin is 0.
    """
    if x.dtype != torch.float32:
        return torch.zeros(x.shape[1], device=x.device), x
    origin = x[:1, :, :1]
    return origin.flatten(), x - origin


def foreign_batch_norms(network):
    """Returns the names of batch norms in a network that see only the batch of their process."""
    modules = network.named_modules()
    norms = [(name, module) for name, module in modules if hasattr(module, 'running_mean')]
    return [name for name, norm in norms if not isinstance(norm, BatchNorm)]


class BatchNorm(nn.BatchNorm1d):
    """nn.BatchNorm1d with the statistics of all processes, if several train together.

    (PyTorch's SyncBatchNorm makes the host wait for the GPU in every layer, and needs a GPU.)
    """

    def forward(self, input):
        """Normalises (B, channels, ...); in training, updates the running statistics."""
        if input.ndim > 3:
            return self.forward(input.flatten(2)).view_as(input)
        together = dist.is_initialized() and dist.get_world_size() > 1
        if not self.training or not together:
            return super().forward(input)

        x = input if input.ndim == 3 else input.unsqueeze(2)
        normalised, mean, variance = NormOfAll.apply(x, self.weight, self.bias, self.eps)
        count = x.numel() // x.shape[1] * dist.get_world_size()
        self.num_batches_tracked.add_(1)
        self.running_mean.lerp_(mean, self.momentum)
        self.running_var.lerp_(variance * (count / (count - 1)), self.momentum)
        return normalised.view_as(input)
