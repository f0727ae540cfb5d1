"""Is my GPU starving? The share of the time in which it waits for data, by a clock in its place."""

import re
from pathlib import Path

import pytest
import torch
from conftest import make_system

import ECAPAModel
from dataLoader import make_batches, train_loader
from tools import MORE_SHARED_MEMORY
from trainECAPAModel import Progress, epoch_line, make_parser

pytestmark = pytest.mark.usefixtures('quick')
ROOT = Path(__file__).parents[1]

STEPS = 200


class Clock:
    """The time of a host, and of a GPU that works off what the host has asked of it."""

    def __init__(self):
        self.now = 0.0  # seconds
        self.gpu_is_done = 0.0

    def launch(self, seconds):
        """The host asks for work, and does not wait."""
        self.gpu_is_done = max(self.gpu_is_done, self.now) + seconds

    def synchronise(self):
        self.now = max(self.now, self.gpu_is_done)

    def event(self, enable_timing):
        assert enable_timing
        return Event(self)


class Event:
    """As torch.cuda.Event: the time at which the GPU gets to it."""

    def __init__(self, clock):
        self.clock = clock

    def record(self):
        self.time = max(self.clock.now, self.clock.gpu_is_done)

    def elapsed_time(self, other):
        assert self.time <= self.clock.now, 'the GPU has not got there yet'
        assert other.time <= self.clock.now, 'the GPU has not got there yet'
        return 1000 * (other.time - self.time)


class Loader:
    """Batches of which other processes finish one every `seconds`."""

    def __init__(self, clock, seconds):
        self.clock = clock
        self.seconds = seconds

    def __len__(self):
        return STEPS

    def __iter__(self):
        for number in range(1, STEPS + 1):
            self.clock.now = max(self.clock.now, number * self.seconds)
            yield torch.zeros(2, 400), torch.arange(2)


def train(monkeypatch, loader_ms, device_ms, on_gpu=True):
    """A system after an epoch in which batches and steps take so many milliseconds."""
    clock = Clock()
    monkeypatch.setattr(ECAPAModel.time, 'perf_counter', lambda: clock.now)
    monkeypatch.setattr(torch.cuda, 'Event', clock.event)
    sum_of_finite = ECAPAModel.sum_of_finite

    def look(*args):
        clock.synchronise()
        return sum_of_finite(*args)

    monkeypatch.setattr(ECAPAModel, 'sum_of_finite', look)
    system = make_system()
    system.on_gpu = on_gpu

    def step(audio, labels):
        clock.launch(device_ms / 1000)
        return torch.zeros(3)

    system.train_step = step
    system.train_network(1, Loader(clock, loader_ms / 1000))
    return system


@pytest.mark.parametrize('on_gpu', [True, False])
@pytest.mark.parametrize(
    'loader_ms, device_ms, percent', [(20, 19, 5), (20, 5, 75), (5, 20, 0), (20, 0.1, 99)]
)
def test_the_share_is_that_of_the_device_not_of_the_host(
    monkeypatch, capsys, loader_ms, device_ms, percent, on_gpu
):
    """The host runs ahead of a GPU, and waits for the loader while the GPU computes."""
    system = train(monkeypatch, loader_ms, device_ms, on_gpu)
    assert 100 * system.share_idle == pytest.approx(percent, abs=1.5)
    assert ('bottleneck' in capsys.readouterr().err) == (percent > 30)
    line = epoch_line(Progress(1, 1.0, 0.001, 50.0), [0], 80, system.share_idle, 0)
    assert f'{100 * system.share_idle:.0f}% waiting' in line


def test_the_progress_bar_shows_it(monkeypatch):
    shown = []
    monkeypatch.setattr(
        ECAPAModel.tqdm, 'set_postfix_str', lambda bar, text, refresh: shown.append(text)
    )
    train(monkeypatch, loader_ms=20, device_ms=5)
    assert '75% waiting' in shown[-1]
    assert len(shown) == STEPS / ECAPAModel.LOOK_EVERY


@pytest.mark.parametrize('recipe', ['voxceleb2.txt', 'strong_lm.txt'])
def test_the_batches_of_16_loading_processes_fit_the_shared_memory_that_we_advise(tree, recipe):
    """docker's --shm-size, as README and the error say."""
    args = make_parser().parse_args([f'@{ROOT}/exps/recipes/{recipe}'])
    loader = make_batches(train_loader(**tree, num_frames=20), batch_size=4, n_cpu=16)
    size = args.batch_size * (args.num_frames * 160 + 240) * 4
    needed = 16 * loader.prefetch_factor * size

    pattern = r'--shm-size (\d+)g'
    advised = re.findall(pattern, (ROOT / 'README.md').read_text())
    advised += re.findall(pattern, MORE_SHARED_MEMORY)
    assert len(advised) == 2
    assert min(map(int, advised)) * 2**30 > needed
