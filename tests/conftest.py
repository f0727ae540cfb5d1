"""Shared by the tests: the reference's numbers, weights and waves by formula, small corpora."""

import os
import zlib
from pathlib import Path

# Small networks gain nothing from threads, and threads wait for each other if tests share cores.
os.environ.setdefault('OMP_NUM_THREADS', '1')

import numpy as np
import pytest
import soundfile
import torch
from cli import set_scale

from ECAPAModel import ECAPAModel, read_checkpoint

SHARED = Path(__file__).parents[2] / 'shared'
GOLDEN = SHARED / 'golden'
MINIVOX = SHARED / 'minivox'
QUICK = 4800, 32  # see quick()


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
def quick():
    """Makes evaluation crops 0.3 s long and pools 32 channels, for files about something else.

    The pooling takes most of the time of a small network, and most of the size of its checkpoint.
    """
    with pytest.MonkeyPatch.context() as patch:
        set_scale(*QUICK, patch.setattr)
        yield


@pytest.fixture
def quick_test(monkeypatch):
    """Does as quick() for a single test, in a file of others."""
    set_scale(*QUICK, monkeypatch.setattr)


def wave(number, samples):
    """Returns a pulse-like tone with noise, float32 (samples,), the input of portable.npz."""
    random = np.random.RandomState(number)
    t = np.arange(samples) / 16000
    pitch = 100 + 20 * number
    tone = 0
    for harmonic in range(1, 30):
        phase = random.uniform(0, 6.28)
        tone = tone + np.sin(2 * np.pi * pitch * harmonic * t + phase) / harmonic
    rhythm = 0.5 + 0.5 * np.sin(2 * np.pi * 3 * t)
    noisy = tone * rhythm + 0.1 * random.standard_normal(samples)
    return (0.1 * noisy).astype(np.float32)


def make_system(C=8, n_class=4, **options):
    """Makes an ECAPAModel with random weights and the published options, on the CPU."""
    published = dict(lr=0.001, lr_decay=0.97, m=0.2, s=30, test_step=1, device='cpu')
    return ECAPAModel(C=C, n_class=n_class, **{**published, **options})


def portable_system(C, **options):
    """Calls make_system() for 20 speakers; weights follow from their names, SpecAugment is off."""
    system = make_system(C, 20, **options)
    for name, tensor in system.state_dict().items():
        if 'torchfbank' in name or 'num_batches_tracked' in name:
            continue
        noise = np.random.RandomState(zlib.crc32(name.encode())).standard_normal(
            tuple(tensor.shape)
        )
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


def weights(path):
    """Returns the state dict of a checkpoint."""
    state, _ = read_checkpoint(path)
    return state


def assert_same_run(a, b):
    """Two runs are equal bit for bit: score.txt, all weights, and the states beside them."""
    assert Path(a, 'score.txt').read_bytes() == Path(b, 'score.txt').read_bytes()
    names = sorted(path.name for path in Path(a, 'model').glob('*'))
    assert names == sorted(path.name for path in Path(b, 'model').glob('*'))
    for name in names:
        first = torch.load(Path(a, 'model', name), weights_only=True)
        second = torch.load(Path(b, 'model', name), weights_only=True)
        assert_equal(first, second, name)


def assert_equal(a, b, where):
    """Nested dictionaries and lists of tensors and numbers are equal."""
    if isinstance(a, dict):
        assert list(a) == list(b), where
        for key in a:
            assert_equal(a[key], b[key], f'{where} {key}')
    elif isinstance(a, torch.Tensor):
        assert torch.equal(a, b), where
    else:
        assert a == b, where


def write_wav(path, audio, rate=16000, subtype='FLOAT'):
    """Writes (samples,) or (samples, channels), and makes the folders; returns the path (str)."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, audio, rate, subtype=subtype)
    return str(path)


@pytest.fixture
def tree(tmp_path):
    """Makes a corpus of noise, for tests in which the sound does not matter.

    Returns a dict of the options that name its parts.
    """
    random = np.random.default_rng(0)

    def audio(name, samples=20000):
        sound = 0.1 * random.standard_normal(samples)
        return write_wav(tmp_path / name, sound, subtype='PCM_16')

    names = [f'id{speaker}/session/{n:05d}.wav' for speaker in range(4) for n in range(3)]
    for name in names:
        audio(f'train/{name}')
        audio(f'eval/{name}', samples=50000)
    for category in ('noise', 'speech', 'music'):
        for number in range(2):
            audio(f'musan/{category}/source/recording/{number:05d}.wav')
    audio('rirs/smallroom/Room001/Room001-00001.wav', samples=2000)

    lines = [f'{name[:3]} {name}\n' for name in names]
    (tmp_path / 'train.txt').write_text(''.join(lines))
    (tmp_path / 'trials.txt').write_text(trial_lines(names))
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


def trial_lines(names):
    """Makes a trial list of all pairs of files; a name's first three letters are the speaker."""
    lines = []
    for a in names:
        for b in names:
            if a < b:
                lines.append(f'{int(a[:3] == b[:3])} {a} {b}\n')
    return ''.join(lines)


@pytest.fixture
def corpus(tmp_path):
    """Folder of five speakers' recordings, four of each, and a list of all their trials."""
    names = [f'id{speaker}/a/{number}.wav' for speaker in range(5) for number in range(4)]
    for number, name in enumerate(names):
        audio = wave(number // 4, 40000 + 500 * number)[100 * number :]
        write_wav(tmp_path / 'corpus/audio' / name, audio, subtype='PCM_16')
    (tmp_path / 'corpus/trials.txt').write_text(trial_lines(names))
    return tmp_path / 'corpus'


@pytest.fixture
def few_trials(tree):
    """Leaves `tree` six trials of short utterances, as evaluation takes most of the time."""
    names = [f'id{speaker}/session/{n:05d}.wav' for speaker in (1, 2) for n in range(2)]
    Path(tree['eval_list']).write_text(trial_lines(names))
    for number, name in enumerate(names):
        write_wav(Path(tree['eval_path'], name), wave(number, 8000), subtype='PCM_16')


@pytest.fixture
def model(tmp_path):
    """A checkpoint of random weights, in the folder of a run as --eval and exps.verify have it."""
    torch.manual_seed(1)
    path = tmp_path / 'exp/model/model_0001.model'
    path.parent.mkdir(parents=True)
    make_system().save_parameters(path)
    return str(path)


@pytest.fixture(scope='module')
def small_evaluation(tmp_path_factory):
    """Folder of a small evaluation for damage.py: eval/, trials.txt and a.model."""
    # Not at the top, as damage.py itself imports this file.
    from damage import make_small_evaluation

    folder = tmp_path_factory.mktemp('evaluation')
    make_small_evaluation(folder)
    return folder
