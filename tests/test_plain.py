"""The fast code equals the plain code: network, batches, loss, lists, scores, all loaders."""

import os
import random
import time
from pathlib import Path

import benchmark
import numpy as np
import plain
import pytest
import torch
from conftest import make_system, portable_system, wave, write_wav
from torch.utils.data import DataLoader

from dataLoader import (
    NoiseFiles,
    Strings,
    make_batches,
    read_crop,
    read_train_list,
    read_trial_lists,
    train_loader,
)
from ECAPAModel import describe
from loss import LOSSES, AAMsoftmax
from model import ENCODERS, mask_of, mean_and_variance
from tools import ComputeErrorRates, ComputeMinDcf, accuracy, score_pairs

ROOT = Path(__file__).parents[1]


def test_network_and_gradients(monkeypatch):
    """With a smooth function in place of ReLU in both.

    Rounding decides whether a ReLU of next to nothing lets a gradient pass, which no bound holds.
    That ReLU is what the modules use shows in the numbers of the reference.
    """

    def smooth(x, inplace=False):
        return torch.nn.functional.softplus(x)

    monkeypatch.setattr('torch.nn.functional.relu', smooth)
    system = portable_system(64)
    encoder = plain.PlainECAPA(64)
    encoder.load_state_dict(system.speaker_encoder.state_dict())
    waves = torch.from_numpy(np.stack([wave(i, 16240) for i in range(4)]))
    direction = torch.randn(4, 192, generator=torch.Generator().manual_seed(0))

    gradients = []
    for network in (system.speaker_encoder, encoder):
        network.train()
        (network(waves, aug=False) * direction).sum().backward()
        gradients.append({name: p.grad for name, p in network.named_parameters()})
    ours, expected = gradients

    assert ours.keys() == expected.keys()
    for name, gradient in expected.items():
        largest = gradient.abs().max().item()
        # The sum for gradients that are zero, as that of a bias before a softmax.
        np.testing.assert_allclose(ours[name], gradient, atol=1e-3 * largest + 1e-4, err_msg=name)


def test_margin_on_the_target_column_alone():
    torch.manual_seed(1)
    ours = AAMsoftmax(50, m=0.2, s=30)
    dense = plain.PlainAAM(50, m=0.2, s=30)
    dense.weight.data = ours.weight.data.clone()

    # Some embeddings lie more than π − m from their speaker, where the margin is a line.
    label = torch.randint(50, (16,))
    x = torch.randn(16, 192)
    x[:4] = -ours.weight.data[label[:4]] + 0.001 * torch.randn(4, 192)

    results = []
    for classifier in (ours, dense):
        embeddings = x.clone().requires_grad_()
        loss, _ = classifier(embeddings, label)
        loss.backward()
        results.append((loss.detach(), embeddings.grad, classifier.weight.grad))

    for first, second in zip(*results):
        np.testing.assert_allclose(first, second, rtol=1e-4, atol=1e-6)


def test_margin_has_finite_gradients_where_the_cosine_is_one():
    classifier = AAMsoftmax(3, m=0.2, s=30)
    classifier.weight.data = torch.eye(3, 192)
    x = torch.cat([torch.eye(2, 192), -torch.eye(1, 192)]).requires_grad_()

    loss, _ = classifier(x, torch.tensor([0, 1, 0]))
    loss.backward()

    assert torch.isfinite(loss)
    assert torch.isfinite(x.grad).all()
    assert torch.isfinite(classifier.weight.grad).all()


@pytest.mark.parametrize('lengths', [(16240, 48000, 20000, 48000), (600, 30000)])
@pytest.mark.parametrize('encoder', ENCODERS)
def test_padded_batches_equal_single_utterances(encoder, lengths):
    encoder = portable_system(64, encoder=encoder).speaker_encoder.eval()
    waves = [torch.from_numpy(wave(i, n))[None] for i, n in enumerate(lengths)]
    with torch.no_grad():
        features = [encoder.features(x) for x in waves]
        frames = [x.shape[2] for x in features]
        longest = max(frames) + 3
        padded = [torch.nn.functional.pad(x, (0, longest - x.shape[2])) for x in features]
        batch = encoder.encode(torch.cat(padded), torch.tensor(frames))
        alone = torch.cat([encoder.encode(x) for x in features])
    np.testing.assert_allclose(batch, alone, atol=2e-5)


def test_a_mask_fits_the_maps_of_a_2d_network():
    x = torch.ones(3, 4, 5, 6)
    mask = mask_of(torch.tensor([1, 6, 4]), x)
    assert (x * mask).sum(dim=3)[:, 3, 4].tolist() == [1, 6, 4]
    assert mask[2, 0, 0].tolist() == [1, 1, 1, 1, 0, 0]


def test_statistics_of_a_single_frame_are_finite():
    """A network with strides over time leaves one frame of a short utterance."""
    x = torch.tensor([[[2.0], [-1.0]]])
    for mask in (None, torch.ones(1, 1, 1)):
        mean, variance = mean_and_variance(x, mask)
        assert mean.tolist() == [[2, -1]]
        assert variance.tolist() == [[0, 0]]


@pytest.mark.parametrize('loss', LOSSES)
@pytest.mark.parametrize('encoder', ENCODERS)
def test_a_checkpoint_tells_its_encoder_and_its_sizes(encoder, loss):
    found = describe(make_system(16, 20, encoder=encoder, loss=loss).state_dict())
    assert (found['encoder'], found['C']) == (encoder, 16)
    assert found['n_class'] == 20


def test_long_recordings_are_the_mean_of_their_parts(tmp_path, monkeypatch, capsys):
    """Three parts of 40,000 samples, beside the plain embeddings of these.

    The shorter file is in one piece.
    """
    monkeypatch.setattr('ECAPAModel.LONGEST', 48000)
    audio = wave(1, 120000)
    long = write_wav(tmp_path / 'long.wav', audio)
    short = write_wav(tmp_path / 'short.wav', wave(2, 48000))
    parts = []
    for i in range(3):
        part = audio[40000 * i : 40000 * (i + 1)]
        parts.append(write_wav(tmp_path / f'{i}.wav', part))

    system = portable_system(64)
    encoder = plain.PlainECAPA(64)
    encoder.load_state_dict(system.speaker_encoder.state_dict())
    plain_embeddings = plain.plain_embed(encoder, [*parts, short])
    sum_of_parts = sum(plain_embeddings[part][0] for part in parts)
    expected = [torch.nn.functional.normalize(sum_of_parts), plain_embeddings[short][0]]

    embeddings = system.embed_files([long, short])
    np.testing.assert_allclose(embeddings[:, 0], torch.cat(expected), atol=2e-5)
    assert '1 files' in capsys.readouterr().out


@pytest.mark.filterwarnings('ignore:.*pin_memory')
@pytest.mark.parametrize('as_on_gpu', [False, True])
def test_evaluation_equals_one_file_at_a_time(tree, monkeypatch, as_on_gpu):
    monkeypatch.setattr('ECAPAModel.BATCH_FRAMES', 1000)
    monkeypatch.setattr('ECAPAModel.CPU_BATCH_FRAMES', 1000)
    monkeypatch.setattr('ECAPAModel.WINDOW_FRAMES', 2000)
    for number, samples in enumerate((700, 16000, 400000, 48240)):
        path = f'{tree["eval_path"]}/id{number}/session/00000.wav'
        write_wav(path, 0.5 * wave(number, samples))
    paths, (trials,) = read_trial_lists([tree['eval_list']], [tree['eval_path']])

    torch.manual_seed(2)
    system = make_system(16, 20, n_cpu=2)
    shapes = set()
    encode = system.speaker_encoder.encode

    def watched(features, frames=None):
        shapes.add(features.shape)
        return encode(features, frames)

    system.speaker_encoder.encode = watched
    if as_on_gpu:
        monkeypatch.setattr(torch.Tensor, 'pin_memory', lambda tensor: tensor)
        system.on_gpu = True
    encoder = plain.PlainECAPA(16)
    encoder.load_state_dict(system.speaker_encoder.state_dict())

    scores, _ = system.score_lists(paths, [trials])[0]['raw']
    labels, pairs = plain.plain_read_trials(tree['eval_list'], tree['eval_path'])
    assert trials.labels.tolist() == labels
    expected = plain.plain_scores(plain.plain_embed(encoder.eval(), paths), pairs)
    np.testing.assert_allclose(scores, expected, atol=1e-5)

    crop_frames = 302
    whole = [(size, frames) for size, _, frames in shapes if frames != crop_frames]
    assert max(size for size, _ in whole) > 1
    assert all(size * frames <= 1000 or size == 1 for size, frames in whole)
    if as_on_gpu:
        assert all(frames % 64 == 0 for _, frames in whole)


def test_scores_of_many_pairs():
    random = np.random.default_rng(3)
    embeddings = random.standard_normal((50, 2, 192)).astype(np.float32)
    pairs = random.integers(50, size=(9000, 2))

    expected = []
    for a, b in pairs:
        whole = embeddings[a, 0] @ embeddings[b, 0]
        crops = embeddings[a, 1] @ embeddings[b, 1]
        expected.append(0.5 * (whole + crops))
    np.testing.assert_allclose(score_pairs(embeddings, pairs), expected, rtol=1e-4, atol=1e-4)


def test_error_rates_with_ties():
    random = np.random.default_rng(4)
    scores = random.integers(20, size=500) / 10
    labels = random.integers(2, size=500)

    rates = ComputeErrorRates(scores, labels)
    expected = plain.plain_error_rates(scores, labels)
    for first, second in zip(rates, expected):
        assert np.array_equal(first, second)
    assert ComputeMinDcf(*rates, 0.05, 1, 1) == plain.plain_min_dcf(*expected, 0.05, 1, 1)


def test_accuracy_counts_the_largest_outputs():
    output = torch.tensor([[0.1, 0.9, 0.5], [0.8, 0.1, 0.2], [0.1, 0.2, 0.3], [0.3, 0.2, 0.1]])
    first, second = accuracy(output, torch.tensor([1, 1, 2, 2]), topk=(1, 2))
    assert first.tolist() == [50]
    assert second.tolist() == [50]
    _, second = accuracy(output, torch.tensor([2, 2, 1, 1]), topk=(1, 2))
    assert second.tolist() == [100]


def test_lists(tmp_path):
    random = np.random.default_rng(5)
    ids = [f'id{n}' for n in random.permutation(40)]
    lines = [f'{ids[random.integers(40)]} a/ü{n}.wav' for n in range(3000)]
    rows = [line.split() for line in lines]

    # Blank lines, tabs and Windows line ends are what real lists have.
    lines[1::2] = [line.replace(' ', '\t') for line in lines[1::2]]
    text = '\r\n'.join(lines) + '\r\n\n'
    (tmp_path / 'list.txt').write_bytes(text.encode())

    speakers, labels, names, _ = read_train_list(tmp_path / 'list.txt')
    assert speakers == sorted(set(speaker for speaker, _ in rows))
    assert [speakers[label] for label in labels] == [speaker for speaker, _ in rows]
    assert list(names) == [name for _, name in rows]


def test_strings():
    strings = ['', 'a', 'Grüße', os.fsdecode(b'\xff\xfe'), '']
    compact = Strings(strings)
    assert len(compact) == 5
    assert list(compact) == strings


def test_noise_is_drawn_as_its_pieces(tmp_path):
    """60 s have 19 pieces of 5 s, one every 3 s; 5 s have one."""
    ramp = np.arange(60 * 16000) / (60 * 16000)
    write_wav(tmp_path / 'long.wav', ramp)
    write_wav(tmp_path / 'short.wav', ramp[: 5 * 16000] - 1)
    noise = NoiseFiles(tmp_path)
    rng = random.Random(6)
    assert noise.pieces.tolist() == [19, 20]

    starts = np.array([clip[0] for _ in range(4000) for clip in noise.draw(rng, 16000, 1)])
    assert np.mean(starts < 0) == pytest.approx(1 / 20, abs=0.015)

    seconds = starts[starts >= 0] * 60
    pieces = [min(3 * rng.randrange(19) + rng.uniform(0, 4), 60) for _ in range(4000)]
    quantiles = np.linspace(0.05, 0.95, 10)
    expected = np.quantile(pieces, quantiles)
    np.testing.assert_allclose(np.quantile(seconds, quantiles), expected, atol=2)
    assert seconds.max() < 59.001


@pytest.mark.parametrize(
    'subtype, tolerance', [('PCM_16', 1e-4), ('FLOAT', 1e-7), ('PCM_24', 1e-6), ('PCM_U8', 1e-2)]
)
def test_files_of_known_layout_read_the_same(tmp_path, subtype, tolerance):
    audio = np.random.default_rng(7).uniform(-0.9, 0.9, 5000)
    path = write_wav(tmp_path / 'a.wav', audio, subtype=subtype)
    for piece in (None, 0):
        crop = read_crop(path, 5000, random.Random(0), piece)
        np.testing.assert_allclose(crop, audio, atol=tolerance)

    of_noise = read_crop(path, 1000, random.Random(1), piece_start=0)
    assert np.array_equal(of_noise, read_crop(path, 1000, random.Random(1)))


@pytest.mark.skipif(not os.path.isdir('/proc/self/fd'), reason='needs /proc/self/fd')
def test_no_noise_file_stays_open(tmp_path):
    """MUSAN has more files than a process may have open."""
    for number in range(20):
        write_wav(tmp_path / f'{number}.wav', np.zeros(100), subtype='PCM_16')
    noise = NoiseFiles(tmp_path)
    before = len(os.listdir('/proc/self/fd'))
    assert len(list(noise.draw(random.Random(8), 100, 20))) == 20
    assert len(os.listdir('/proc/self/fd')) == before


def test_workers_use_one_thread(tree):
    class Threads(train_loader):
        def __getitem__(self, index):
            return torch.get_num_threads()

    dataset = Threads(**tree, num_frames=50)
    assert {int(n) for batch in make_batches(dataset, 4, 1) for n in batch} == {1}


def private_kilobytes():
    """Memory of this process that it shares with no other."""
    kilobytes = 0
    with open('/proc/self/smaps_rollup') as file:
        for line in file:
            if line.startswith(('Private_Dirty', 'Private_Clean')):
                kilobytes += int(line.split()[1])
    return kilobytes


class Touch(torch.utils.data.Dataset):
    """Reads every path and label of a training list, as an epoch does.

    An item is how much that made a worker grow.
    """

    def __init__(self, dataset):
        self.dataset = dataset

    def __len__(self):
        return 1

    def __getitem__(self, index):
        before = private_kilobytes()
        for i in range(len(self.dataset)):
            self.dataset.path(i)
            self.dataset.labels[i]
        return private_kilobytes() - before


@pytest.mark.skipif(
    not os.path.exists('/proc/self/smaps_rollup'), reason='needs /proc/self/smaps_rollup'
)
def test_a_worker_does_not_copy_the_list(tmp_path, tree):
    with open(tmp_path / 'train.txt', 'w') as file:
        for n in range(300000):
            speaker = f'id{n % 999:05d}'
            file.write(f'{speaker} {speaker}/21Uxsk56VDQ/{n:07d}.wav\n')
    dataset = train_loader(**tree, num_frames=50)
    (growth,) = DataLoader(Touch(dataset), num_workers=1)
    assert growth.item() < 30 * 1024 * 0.3


def test_the_body_of_the_encoder_is_one_graph():
    encode = make_system(16, 20).speaker_encoder.encode
    features = torch.randn(2, 80, 50)
    compiled = torch.compile(encode, backend='eager', fullgraph=True)
    np.testing.assert_allclose(compiled(features).detach(), encode(features).detach(), atol=1e-5)


def test_bfloat16_is_close_and_keeps_the_loss_in_float32():
    """Sixteen waves, as batch norms over four blow the rounding up.

    With four, one less the cosine was 0.011 to 0.032 over six seeds and four kinds of kernels; with
    sixteen it is 0.007 to 0.011.
    """
    waves = torch.from_numpy(np.stack([wave(i, 16240) for i in range(16)]))
    labels = torch.arange(16)

    losses = []
    gradients = []
    for precision in ('fp32', 'bf16'):
        torch.manual_seed(8)
        system = make_system(64, 20, precision=precision)
        loss, _ = system(waves, labels)
        loss.backward()
        assert loss.dtype == torch.float32
        assert all(p.dtype == p.grad.dtype == torch.float32 for p in system.parameters())
        losses.append(loss.item())
        gradients.append(system.speaker_encoder.layer1.conv1.weight.grad.flatten())

    assert losses[0] == pytest.approx(losses[1], rel=0.02)
    assert losses[0] != losses[1], 'bfloat16 was not used'
    assert torch.cosine_similarity(*gradients, dim=0) > 0.98


def test_the_loader_is_named_where_it_is_the_bottleneck(tree, capsys):
    class Slow:
        def __len__(self):
            return 30

        def __iter__(self):
            for _ in range(30):
                time.sleep(0.01)
                yield torch.randn(2, 1040), torch.tensor([0, 1])

    system = make_system(8, 20)
    system.train_step = lambda audio, labels: torch.zeros(3)
    system.train_network(1, Slow())
    system.train_network(2, Slow())
    assert capsys.readouterr().err.count('waited for data') == 1


def test_the_benchmark_runs(capsys, monkeypatch, quick_test):
    monkeypatch.setattr(benchmark, 'MOST_TURNS', 1)
    benchmark.main(['--quick', 'traffic', 'pipeline', 'evaluation', 'scoring', 'lists'])
    table = capsys.readouterr().out.partition('memory, ours / plain')[2]
    rows = [
        'traffic of a step, bf16',
        'pipeline',
        'evaluation',
        'scoring',
        'as-norm',
        'training list',
    ]
    for row in rows:
        assert row in table
