"""Is anything half written, if a disk is full, a signal arrives or two processes write at once?"""

import errno
import json
import os
import random
import re
import resource
import shutil
import signal
import threading
from pathlib import Path

import pytest
import torch
from cli import command_line, evaluate, refusal, train

from ECAPAModel import ECAPAModel
from exps import embed, scoring
from tools import BadInput, prepare_new_file, read_scores, write_text, write_whole

pytestmark = pytest.mark.usefixtures('quick')


def test_a_full_disk_keeps_the_last_checkpoint(tree, capsys):
    train(tree)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    files = sorted(Path(tree['save_path']).rglob('*'))
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (200000, before[1]))
        message = refusal(capsys, train, tree, max_epoch=2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert 'model_0002.state' in message
    assert sorted(Path(tree['save_path']).rglob('*')) == files
    train(tree, max_epoch=2)
    assert [score[0] for score in read_scores(tree['save_path'] + '/score.txt')] == [1, 2]


def test_a_folder_that_vanishes_is_named(tree, capsys, monkeypatch):
    train_network = ECAPAModel.train_network

    def vanish(*args):
        shutil.rmtree(f'{tree["save_path"]}/model')
        return train_network(*args)

    monkeypatch.setattr(ECAPAModel, 'train_network', vanish)
    message = refusal(capsys, train, tree)
    assert 'model_0001.state' in message and os.strerror(errno.ENOENT) in message


def test_a_write_that_fails_at_the_end_leaves_the_old_file(tmp_path, monkeypatch):
    write_text(tmp_path / 'a.txt', 'old')

    def refuse(*args):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(os, 'fsync', refuse)
    with pytest.raises(BadInput, match=f'a.txt: .*{os.strerror(errno.EROFS)}'):
        write_text(tmp_path / 'a.txt', 'new')
    assert (tmp_path / 'a.txt').read_text() == 'old'
    assert os.listdir(tmp_path) == ['a.txt']


def test_too_little_room_is_said_at_the_start(tree, capsys, monkeypatch):
    usage = shutil.disk_usage('/')
    monkeypatch.setattr(shutil, 'disk_usage', lambda path: usage._replace(free=1000000))
    message = refusal(capsys, train, tree)
    assert '--save_path' in message and '0.00 GB' in message
    monkeypatch.setattr(shutil, 'disk_usage', lambda path: usage._replace(free=20000000))
    train(tree)
    assert '0.02 GB' not in capsys.readouterr().out
    train(tree, '--check', max_epoch=200)
    assert re.search('WARNING .*0.02 GB.*--keep', capsys.readouterr().out)


@pytest.mark.parametrize('number', [signal.SIGTERM, signal.SIGINT])
def test_a_signal_at_any_moment_leaves_whole_files(tmp_path, number):
    """Sixty of them, at random moments of writing a checkpoint again and again."""

    def stop(number, frame):
        raise KeyboardInterrupt

    def write_one(version):
        content = {'version': version, 'weights': torch.full((300000,), float(version))}
        write_whole(path, lambda file: torch.save(content, file))

    path = tmp_path / 'a.model'
    rng = random.Random(0)
    version = 0
    write_one(version)
    written = version
    before = signal.signal(number, stop)
    try:
        for _ in range(60):
            timer = threading.Timer(rng.uniform(0, 0.02), os.kill, (os.getpid(), number))
            with pytest.raises(KeyboardInterrupt):
                timer.start()
                while True:
                    version += 1
                    write_one(version)
                    written = version
            timer.join()
            content = torch.load(path, weights_only=True)
            assert content['version'] in (written, version)
            assert (content['weights'] == content['version']).all()
            written = content['version']
            assert os.listdir(tmp_path) == ['a.model']
    finally:
        signal.signal(number, before)


@pytest.mark.usefixtures('few_trials')
def test_evaluations_at_once_lose_no_results(tree, model, capfd):
    """Two processes score six lists each into one folder; lists of one name come from both."""
    folder = Path(tree['eval_list']).parent
    children = []
    lists = [folder / f'{who}/{number}.txt' for who in 'ab' for number in range(6)]
    for path in lists:
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(Path(tree['eval_list']).read_bytes())
    for who in 'ab':
        child = os.fork()
        if child == 0:
            status = 1
            try:
                torch.set_num_threads(1)
                for path in lists:
                    if path.parent.name == who:
                        evaluate(tree, model, eval_list=str(path))
                status = 0
            finally:
                os._exit(status)
        children.append(child)
    statuses = [os.waitpid(child, 0)[1] for child in children]
    assert statuses == [0, 0], capfd.readouterr().err
    found = json.loads(Path(tree['save_path'], 'results.json').read_text())['lists']
    assert set(found) == set(map(str, lists))
    assert len({entry['scores'] for entry in found.values()}) == len(lists)
    assert not list(Path(tree['save_path']).rglob('*.part'))


@pytest.mark.parametrize('option', ['--save_path', '--out'])
def test_a_place_that_cannot_be_written_is_named_at_the_start(
    tree, model, tmp_path, capsys, monkeypatch, option
):
    (tmp_path / 'file').write_text('in the way')
    monkeypatch.setattr(ECAPAModel, 'embed_files', lambda *_, **__: pytest.fail('it came too late'))
    if option == '--save_path':
        message = refusal(capsys, evaluate, tree, model, save_path=tmp_path / 'file/exp')
    else:
        arguments = command_line(out=tmp_path / 'file/x.npz', initial_model=model)
        message = refusal(capsys, embed.main, [tree['eval_path'], *arguments])
    assert option in message and str(tmp_path / 'file') in message


def test_figures_are_printed_before_they_are_written(tree, model, capsys, monkeypatch):
    """A disk that fills up during a long evaluation costs the files, not the figures."""
    monkeypatch.setattr(scoring, 'write_text', no_space)
    with pytest.raises(SystemExit) as stop:
        evaluate(tree, model)
    assert stop.value.code == 2
    captured = capsys.readouterr()
    assert re.search(r'raw .*%', captured.out.splitlines()[-1])
    assert 'trials.txt' in captured.err


def no_space(path, text):
    raise BadInput(f'{path}: cannot be written (No space left on device)')


@pytest.mark.parametrize('path', ['there.npz', 'folder/', 'there.npz/below.npz'])
def test_a_script_refuses_a_file_that_it_could_not_write_before_it_works(tmp_path, path):
    (tmp_path / 'there.npz').touch()
    with pytest.raises(BadInput, match='--out'):
        prepare_new_file(f'{tmp_path}/{path}', '--out')
    assert [path.name for path in tmp_path.iterdir()] == ['there.npz']
    prepare_new_file(f'{tmp_path}/new/new.npz', '--out')
    assert list(tmp_path.glob('new/*')) == []
