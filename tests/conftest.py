"""What the tests share: the reference's numbers, weights and waves made from a formula, and small corpora."""

import zlib
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
import torch.distributed as dist
import torch.nn.functional as F

from ECAPAModel import ECAPAModel, read_checkpoint
from model import norm_of_all

SHARED = Path(__file__).parents[2] / 'shared'
GOLDEN = SHARED / 'golden'
MINIVOX = SHARED / 'minivox'


@pytest.fixture(scope='session')
def golden():
    """Folder of the reference's numbers."""
    if not GOLDEN.is_dir():
        pytest.skip('golden/ is not beside the project')
    return GOLDEN


@pytest.fixture(scope='session')
def minivox():
    """Folder of real speech in VoxCeleb's layout."""
    if not MINIVOX.is_dir():
        pytest.skip('minivox/ is not beside the project')
    return MINIVOX


@pytest.fixture(scope='session')
def portable():
    """The reference's numbers on portable_system() and wave()."""
    return np.load(Path(__file__).parent / 'portable.npz')


@pytest.fixture(scope='module')
def short_crops():
    """Evaluation crops of 0.3 s instead of 3 s, for tests that evaluate often and whose subject is something else."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr('dataLoader.EVAL_CROP', 4800)
        patch.setattr('plain.EVAL_CROP', 4800)
        yield


def wave(number, samples):
    """A pulse-like tone with noise, float32 (samples,): the input that portable.npz was computed on."""
    random = np.random.RandomState(number)
    t = np.arange(samples) / 16000
    pitch = 100 + 20 * number
    tone = sum(np.sin(2 * np.pi * pitch * h * t + random.uniform(0, 6.28)) / h for h in range(1, 30))
    tone = tone * (0.5 + 0.5 * np.sin(2 * np.pi * 3 * t)) + 0.1 * random.standard_normal(samples)
    return (0.1 * tone).astype(np.float32)


def portable_system(C, **kwargs):
    """ECAPAModel whose every weight follows from its name, without SpecAugment, on the CPU unless kwargs say more."""
    options = dict(lr=0.001, lr_decay=0.97, C=C, n_class=20, m=0.2, s=30, test_step=1, device='cpu')
    system = ECAPAModel(**{**options, **kwargs})
    for name, tensor in system.state_dict().items():
        if 'torchfbank' in name or 'num_batches_tracked' in name:
            continue
        noise = np.random.RandomState(zlib.crc32(name.encode())).standard_normal(tuple(tensor.shape))
        noise = noise.astype(np.float32)
        if 'running_var' in name:
            noise = 1 + 0.1 * np.abs(noise)
        elif name.endswith('weight') and noise.ndim == 1:
            noise = 1 + 0.1 * noise
        elif noise.ndim >= 2:
            noise = noise / np.sqrt(np.prod(noise.shape[1:]))
        else:
            noise = 0.1 * noise
        tensor.copy_(torch.from_numpy(noise.astype(np.float32)))
    system.speaker_encoder.specaug = torch.nn.Identity()
    return system


def norm_errors(device='cpu', norm_of_all=norm_of_all):
    """Relative errors of norm_of_all (compiled or not) and its gradients, on this process's part of a batch, beside
    float64 on all of it; the means of the channels are 0 and 1000 deviations.
    """
    errors, random = [], torch.Generator().manual_seed(0)
    for offset in (0, 1000):
        for shape in ((8, 16, 50), (8, 192)):
            x, direction = torch.randn(shape, generator=random) + offset, torch.randn(shape, generator=random)
            weight, bias = torch.rand(2, shape[1], generator=random)
            given = [tensor.double().requires_grad_() for tensor in (x, weight, bias)]
            expected = F.batch_norm(given[0], None, None, *given[1:], training=True)
            gradients = torch.autograd.grad(expected, given, direction.double())
            part = slice(*(8 * (dist.get_rank() + end) // dist.get_world_size() for end in (0, 1)))
            given = [tensor.to(device).requires_grad_() for tensor in (x[part], weight, bias)]
            found, mean, variance = norm_of_all(*given, eps=1e-5)
            found_gradients = torch.autograd.grad(found, given, direction[part].to(device))
            for gradient in found_gradients[1:]:
                dist.all_reduce(gradient)
            dims = [dim for dim in range(x.ndim) if dim != 1]
            statistics = torch.var_mean(x.double(), dims, correction=0)
            pairs = zip(
                (found, *found_gradients, mean, variance),
                (expected[part], gradients[0][part], *gradients[1:], statistics[1], statistics[0]),
            )
            errors += [((a.cpu() - b).norm() / b.norm()).item() for a, b in pairs if a is not mean or offset]
    return errors


def weights(path):
    """State dict of a checkpoint."""
    return read_checkpoint(path)[0]


def write_wav(path, audio, rate=16000, subtype='FLOAT'):
    """Writes (samples,) or (samples, channels) and makes the folders that it needs; returns the path as a string."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, audio, rate, subtype=subtype)
    return str(path)


@pytest.fixture
def tree(tmp_path):
    """A corpus of noise, for what does not depend on the sound; a dict of the options that name its parts."""
    random = np.random.default_rng(0)

    def audio(name, samples=20000):
        return write_wav(tmp_path / name, 0.1 * random.standard_normal(samples), subtype='PCM_16')

    names = [f'id{speaker}/session/{number:05d}.wav' for speaker in range(4) for number in range(3)]
    for name in names:
        audio(f'train/{name}')
        audio(f'eval/{name}', samples=50000)
    for category in ('noise', 'speech', 'music'):
        for number in range(2):
            audio(f'musan/{category}/source/recording/{number:05d}.wav')
    audio('rirs/smallroom/Room001/Room001-00001.wav', samples=2000)
    (tmp_path / 'train.txt').write_text(''.join(f'{name[:3]} {name}\n' for name in names))
    pairs = [(a, b) for a in names for b in names if a < b]
    (tmp_path / 'trials.txt').write_text(''.join(f'{int(a[:3] == b[:3])} {a} {b}\n' for a, b in pairs))
    paths = {
        'train_list': 'train.txt',
        'train_path': 'train',
        'eval_list': 'trials.txt',
        'eval_path': 'eval',
        'musan_path': 'musan',
        'rir_path': 'rirs',
        'save_path': 'exp',
    }
    return {name: str(tmp_path / path) for name, path in paths.items()}


def command_line(*flags, **options):
    """Arguments of trainECAPAModel.py from its options."""
    return [*flags, *(text for name, value in options.items() for text in (f'--{name}', str(value)))]
