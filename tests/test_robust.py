"""No run is lost and no number is wrong in silence: kills, signals, disks, options, bad audio."""

import io
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from cli import command_line
from conftest import make_system, wave, weights, write_wav

import dataLoader
import tools
import trainECAPAModel
from ECAPAModel import newest_checkpoint, saved_models
from tools import read_scores

pytestmark = pytest.mark.usefixtures('short_crops')
ROOT = Path(__file__).parents[1]
SMALL = {'C': 8, 'num_frames': 20, 'batch_size': 4, 'n_cpu': 0, 'max_epoch': 2, 'device': 'cpu'}
UTTERANCE = 'id1/session/00001.wav'


@pytest.fixture
def tree(tree):
    """The corpus of conftest with six trials instead of 66, as these tests evaluate often."""
    names = [f'id{speaker}/session/{number:05d}.wav' for speaker in (1, 2) for number in range(2)]
    pairs = [(a, b) for a in names for b in names if a < b]
    Path(tree['eval_list']).write_text(
        ''.join(f'{int(a[:3] == b[:3])} {a} {b}\n' for a, b in pairs)
    )
    for number, name in enumerate(names):
        write_wav(Path(tree['eval_path'], name), wave(number, 8000), subtype='PCM_16')
    return tree


def run(tree, *flags, **options):
    trainECAPAModel.main(command_line(*flags, **{**SMALL, **tree, **options}))


def refusal(capsys, tree, *flags, status=2, **options):
    """The sentence that the command ends with, and its exit status."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        run(tree, *flags, **options)
    message = capsys.readouterr().err
    assert stop.value.code == status, message
    return message


def assert_same_run(a, b):
    """Bit for bit: score.txt, all weights, and the states of the optimiser that both have."""
    assert Path(a, 'score.txt').read_bytes() == Path(b, 'score.txt').read_bytes()
    models = sorted(path.name for path in Path(a, 'model').glob('*'))
    assert models == sorted(path.name for path in Path(b, 'model').glob('*'))
    for name in models:
        first, second = (
            torch.load(Path(folder, 'model', name), weights_only=True) for folder in (a, b)
        )
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


# Kills: a process that has imported everything forks a run, which ends in SIGKILL somewhere; and
# the next one goes on.


def die(*args, **kwargs):
    """Ends this process as a power cut would."""
    os.kill(os.getpid(), signal.SIGKILL)


def die_half_written(item, file):
    """torch.save that gets half of the file to the disk."""
    torch_save(item, half := io.BytesIO())
    file.write(half.getvalue()[: len(half.getvalue()) // 2])
    file.flush()
    die()


torch_save = torch.save
PLACES = {
    'loading': ('dataLoader.train_loader.__getitem__', 40),
    'stepping': ('ECAPAModel.ECAPAModel.train_step', 8),
    'saving': ('torch.save', 4),
    'flushing': ('os.fsync', 9),
    'renaming': ('os.replace', 6),
    'renamed': ('os.close', 6),
    'evaluating': ('ECAPAModel.ECAPAModel.embed_window', 4),
    'any time': (None, None),
}


def arm(place, call):
    """Replaces the function of a place by one that dies at its call-th call."""
    owner, _, name = place.rpartition('.')
    holder = sys.modules.get(owner.split('.')[0])
    for part in owner.split('.')[1:]:
        holder = getattr(holder, part)
    original, calls = getattr(holder, name), []

    def armed(*args, **kwargs):
        calls.append(1)
        if len(calls) == call:
            die_half_written(*args) if place == 'torch.save' else die()
        return original(*args, **kwargs)

    setattr(holder, name, armed)


def killed_and_continued(options, folder, kills):
    """Runs the command into folder/1, folder/2, ... with `kills` kills; prints where as JSON."""
    torch.set_num_threads(1)
    dataLoader.EVAL_CROP = 4800
    # PyTorch imports much of itself for the first optimiser: here, for all that follow.
    make_system()
    rng, places, run_number = random.Random(0), [], 1
    while True:
        place = list(PLACES)[len(places) % len(PLACES)] if len(places) < kills else None
        call = rng.randint(1, PLACES[place][1]) if place and PLACES[place][0] else 0
        delay = rng.uniform(0.05, 2)
        child = os.fork()
        if child == 0:
            if call:
                arm(PLACES[place][0], call)
            run(
                {**options, 'save_path': f'{folder}/{run_number}'},
                max_epoch=3,
                n_cpu=int(place == 'any time'),
            )
            os._exit(0)
        if place == 'any time':
            time.sleep(delay)
            os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        if os.WIFSIGNALED(status):
            places.append(place)
            continue
        assert os.WEXITSTATUS(status) == 0
        if place is None:
            break
        run_number += 1
    print(json.dumps({'places': places, 'runs': run_number}))


@pytest.mark.slow
def test_twenty_kills_change_nothing(tree, tmp_path):
    arguments = [str(tmp_path), '20', *command_line(**tree)]
    environment = {**os.environ, 'PYTHONPATH': str(ROOT), 'OMP_NUM_THREADS': '1'}
    done = subprocess.run(
        [sys.executable, __file__, *arguments], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert len(found['places']) == 20 and set(found['places']) == set(PLACES)
    straight = subprocess.run(
        [sys.executable, __file__, str(tmp_path / 'straight'), '0', *command_line(**tree)],
        env=environment,
    )
    assert straight.returncode == 0
    for number in range(1, found['runs'] + 1):
        assert_same_run(tmp_path / 'straight/1', tmp_path / str(number))
        assert not list((tmp_path / str(number)).rglob('*.part'))


def start_run(tree, **options):
    """A run of very many epochs in a process of its own, once it has finished the first of them."""
    arguments = command_line(
        **{**SMALL, **tree, 'max_epoch': 1000000, 'test_step': 2, 'n_cpu': 1, **options}
    )
    command = [sys.executable, str(ROOT / 'trainECAPAModel.py'), *arguments]
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        # Whatever runs the tests in the background may have Ctrl-C ignored.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    for line in process.stdout:
        if 'epoch 3' in line:
            return process
    raise AssertionError(process.stderr.read())


@pytest.mark.slow
@pytest.mark.parametrize(
    'number, status, name', [(signal.SIGTERM, 143, 'SIGTERM'), (signal.SIGINT, 130, 'Ctrl-C')]
)
def test_a_second_run_is_refused_and_a_signal_ends_the_first(tree, capsys, number, status, name):
    """That a dead process's lock is taken over shows in the test of the kills."""
    process = start_run(tree)
    message = refusal(capsys, tree, test_step=2)
    assert f'process {process.pid} on host {os.uname().nodename}' in message
    # As a terminal does it, which sends Ctrl-C to the loading processes too.
    os.killpg(process.pid, number) if number == signal.SIGINT else process.send_signal(number)
    _, message = process.communicate(timeout=20)
    assert process.returncode == status
    assert 'Traceback' not in message
    saved = max(saved_models(tree['save_path'] + '/model').values())
    assert f'stopped by {name}: the same command continues after epoch {saved}' in message


def test_an_interrupt_is_obeyed_while_a_batch_is_awaited(tree):
    """The loading process would sleep for an hour."""

    class Asleep(dataLoader.train_loader):
        def __getitem__(self, index):
            time.sleep(3600)

    names = ('train_list', 'train_path', 'musan_path', 'rir_path')
    dataset = Asleep(**{name: tree[name] for name in names}, num_frames=20)
    loader = dataLoader.make_batches(dataset, 4, n_cpu=1)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    timer = threading.Timer(1, os.kill, (os.getpid(), signal.SIGINT))
    try:
        with pytest.raises(KeyboardInterrupt):
            timer.start()
            make_system().train_network(1, loader)
    finally:
        timer.join()
        signal.signal(signal.SIGINT, before)


# Disks.


# Resuming.


@pytest.mark.parametrize(
    'option, value',
    [
        ('m', 0.3),
        ('s', 20),
        ('seed', 11),
        ('batch_size', 6),
        ('lr', 0.01),
        ('num_frames', 30),
        ('C', 16),
    ],
)
def test_other_options_are_refused(tree, capsys, option, value):
    run(tree, max_epoch=2)
    files = sorted(Path(tree['save_path']).rglob('*'))
    message = refusal(capsys, tree, keep=1, **{option: value})
    assert sorted(Path(tree['save_path']).rglob('*')) == files
    assert re.search(rf'--{option} {value:g}\b.* \(was ', message)
    if option == 'm':
        run(tree, '--force', m=0.3, max_epoch=3)
        assert '--m 0.3 (was 0.2)' in capsys.readouterr().out


def test_lists_count_by_what_is_in_them(tree, capsys, tmp_path):
    run(tree, max_epoch=1)
    moved = str(tmp_path / 'elsewhere.txt')
    shutil.copy(tree['train_list'], moved)
    run({**tree, 'train_list': moved})
    lines = Path(moved).read_text().splitlines(keepends=True)
    Path(moved).write_text(''.join(lines[:-1]))
    assert '--train_list SHA-256' in refusal(capsys, {**tree, 'train_list': moved}, max_epoch=3)


def test_resume_falls_back_to_the_newest_whole_pair(tree, tmp_path, capsys):
    """A model without its state would go on with a fresh optimiser: the pair before is exact."""
    run(tree, max_epoch=3)
    whole = shutil.copytree(tree['save_path'], tmp_path / 'whole')
    damaged = Path(tree['save_path'], 'model/model_0003.state')
    content = bytearray(damaged.read_bytes())
    content[len(content) // 2] ^= 1
    damaged.write_bytes(content)
    capsys.readouterr()
    run(tree, max_epoch=3)
    output = capsys.readouterr()
    assert 'model_0003.state: cannot be read' in output.err and 'checksum' in output.err
    assert 'after epoch 2' in output.out
    assert_same_run(whole, tree['save_path'])


def test_keep(tree):
    run(tree, max_epoch=5, keep=2)
    assert list(saved_models(tree['save_path'] + '/model').values()) == [5, 4]
    assert [score[0] for score in read_scores(tree['save_path'] + '/score.txt')] == [1, 2, 3, 4, 5]
    assert newest_checkpoint(tree['save_path'] + '/model')[2]['epoch'] == 5


def test_a_resume_removes_nothing_that_it_needs(tree, capsys):
    """With --keep 1 the newest that can be read is kept, whatever is newer.

    The states beside it are not pushed out by those of epochs whose models are gone.
    """
    folder = Path(tree['save_path'], 'model')
    run(tree, max_epoch=4)
    for epoch in (3, 4):
        (folder / f'model_000{epoch}.model').write_bytes(b'damaged')
    run(tree, max_epoch=3, keep=1)
    assert newest_checkpoint(str(folder))[2]['epoch'] == 3
    (folder / 'model_0004.model').unlink(missing_ok=True)
    run(tree, max_epoch=6)
    for epoch in (4, 5, 6):
        (folder / f'model_000{epoch}.model').unlink()
    run(tree, max_epoch=4)
    capsys.readouterr()
    run(tree, max_epoch=5)
    assert 'no usable .state' not in capsys.readouterr().err


# Numbers.


# Audio in training.


SOUND = 0.1 * np.random.default_rng(0).standard_normal(20000)
FAULTS = {
    'unreadable': (lambda path: Path(path).write_text('not audio'), 'cannot be read as audio'),
    'missing': (lambda path: Path(path).unlink(), 'no such file'),
    'empty': (lambda path: write_wav(path, SOUND[:0]), 'has no samples'),
    'silent': (lambda path: write_wav(path, 0 * SOUND, subtype='PCM_16'), 'is silent'),
    'NaN': (lambda path: write_wav(path, SOUND * np.nan), 'not finite'),
    '8 kHz': (lambda path: write_wav(path, SOUND, rate=8000), '8000 Hz'),
    'stereo': (lambda path: write_wav(path, np.stack([SOUND, SOUND], axis=1)), '2 channels'),
    'cut short': (lambda path: Path(path).write_bytes(Path(path).read_bytes()[:9000]), 'cut short'),
}


@pytest.mark.parametrize('fault', FAULTS)
def test_bad_training_audio_is_replaced(tree, tmp_path, capsys, fault):
    spoil, reason = FAULTS[fault]
    path = Path(tree['train_path'], UTTERANCE)
    spoil(path)
    assert reason in refusal(capsys, tree), 'one of twelve is more than 1 %'
    workers = (0, 2) if fault == 'missing' else (0,)
    for n_cpu in workers:
        folder = tmp_path / f'exp{n_cpu}'
        run({**tree, 'save_path': folder}, max_bad=10, n_cpu=n_cpu)
        log = capsys.readouterr().out
        assert '--train_list: 1 of 12 files' in log
        assert len(re.findall(r'epoch \d, LR.*, 1 utterances replaced', log)) == 2
        (line,) = (folder / 'bad_audio.txt').read_text().splitlines()
        assert line.startswith(f'{path}: ') and reason in line
        assert not (folder / 'bad_audio.new').exists()
    assert_same_run(tmp_path / 'exp0', tmp_path / f'exp{workers[-1]}')


def test_the_replacement_is_of_the_same_speaker(tree):
    for speaker in range(4):
        for number in range(3):
            write_wav(
                f'{tree["train_path"]}/id{speaker}/session/{number:05d}.wav', wave(speaker, 20000)
            )
    Path(tree['train_path'], UTTERANCE).unlink()
    names = ('train_list', 'train_path', 'musan_path', 'rir_path')
    options = {name: tree[name] for name in names}
    dataset = dataLoader.train_loader(**options, num_frames=123)
    dataset.bad_audio = dataLoader.BadAudio(f'{tree["train_path"]}/bad.txt', 100)
    dataset.augment = lambda audio, rng: audio
    position = dataset.labels.tolist().index(1) + 1
    assert len(dataset[1, position][0]) == 19920
    whole = wave(1, 20000)
    for epoch in range(1, 5):
        audio, label = dataset[epoch, position]
        assert label == 1
        # The crop may begin at each of the 81 places that the file has for it.
        errors = [np.abs(audio.numpy() - whole[n : n + 19920]).max() for n in range(81)]
        assert min(errors) < 1e-3


def test_a_run_stops_when_too_much_is_bad(tree, capsys, monkeypatch):
    """Files that go bad after the run began."""
    run(tree, max_epoch=1)
    monkeypatch.setattr(dataLoader, 'check_data', lambda *args: None)
    for number in range(3):
        Path(tree['train_path'], f'id{number}/session/00000.wav').unlink()
    message = refusal(capsys, tree, max_bad=20, max_epoch=9)
    assert '--max_bad 20%' in message and 'no such file' in message
    assert 0 < len(Path(tree['save_path'], 'bad_audio.txt').read_text().splitlines()) <= 3


# Preflight.


def test_up_to_twenty_bad_lines_are_shown(tree, capsys):
    lines = 10 * Path(tree['eval_list']).read_text().splitlines()
    Path(tree['eval_list']).write_text(
        '\n'.join(f'x{line}' if i % 2 else line for i, line in enumerate(lines))
    )
    message = refusal(capsys, tree)
    assert [int(number) for number in re.findall(r'trials.txt, line (\d+)', message)] == list(
        range(2, 42, 2)
    )


# Lengths.


@pytest.mark.parametrize('samples', [1, 2, 256, 257, 399, 47000, 48241])
def test_utterances_of_any_length(tree, capsys, samples):
    write_wav(Path(tree['eval_path'], UTTERANCE), wave(3, samples) + 0.01, subtype='PCM_16')
    write_wav(Path(tree['train_path'], UTTERANCE), wave(3, samples) + 0.01, subtype='PCM_16')
    if samples < 257:
        assert f'{UTTERANCE}: has {samples} samples; 257' in refusal(capsys, tree)
    else:
        run(tree, max_epoch=1)
        weights(tree['save_path'] + '/model/model_0001.model')


if __name__ == '__main__':
    folder, kills, *pairs = sys.argv[1:]
    options = {name.removeprefix('--'): value for name, value in zip(pairs[::2], pairs[1::2])}
    killed_and_continued(options, folder, int(kills))


@pytest.mark.parametrize(
    'sign, remedy',
    [
        ('CUDA out of memory', '--accumulate'),
        ('CUBLAS_STATUS_ALLOC_FAILED', '--batch_size'),
        ("can't allocate memory", '--accumulate'),
    ],
)
def test_too_little_memory_gets_a_sentence(capsys, sign, remedy):
    with pytest.raises(SystemExit) as stop, tools.exit_on_bad_input():
        raise RuntimeError(f'Something about {sign}, at length')
    with pytest.raises(RuntimeError), tools.exit_on_bad_input():
        raise RuntimeError(
            'Caught RuntimeError in DataLoader worker process 0: a mistake in the code'
        )
    assert stop.value.code == 2
    message = capsys.readouterr().err
    assert sign in message and remedy in message
