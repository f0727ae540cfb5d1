"""When is a kept cohort used, and when is it made again?"""

import contextlib
import os
from pathlib import Path

import numpy as np
import pytest
from cli import command_line
from conftest import write_wav

import trainECAPAModel

pytestmark = pytest.mark.usefixtures('quick')


def scores(tree, model, capsys, **options):
    """(Normalised scores as text, whether a kept cohort was used) of an evaluation."""
    names = ('train_list', 'train_path', 'eval_list', 'eval_path', 'save_path')
    chosen = {name: tree[name] for name in names}
    chosen |= {'initial_model': model, 'device': 'cpu', 'n_cpu': 0, **options}
    capsys.readouterr()
    trainECAPAModel.main(command_line('--eval', score_norm='asnorm', **chosen))
    text = Path(tree['save_path'], 'scores/trials.txt').read_text()
    return text, f'{model}.cohort.npz' in capsys.readouterr().err


def test_a_kept_cohort_is_used_and_this_is_said(tree, model, capsys):
    first, kept = scores(tree, model, capsys)
    assert not kept
    assert scores(tree, model, capsys) == (first, True)


@pytest.mark.parametrize('times', ['new', 'kept'])
def test_audio_replaced_at_its_path_makes_a_new_cohort(tree, model, capsys, times):
    """Its size is the same, and a copy that keeps times, as cp -p makes it, has the same time."""
    path = Path(tree['train_path'], 'id1/session/00001.wav')
    before = path.stat()
    first, _ = scores(tree, model, capsys)

    other = 0.1 * np.random.default_rng(9).standard_normal(20000)
    write_wav(path, other, subtype='PCM_16')
    assert path.stat().st_size == before.st_size
    if times == 'kept':
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    second, kept = scores(tree, model, capsys)
    assert not kept and second != first

    os.remove(f'{model}.cohort.npz')
    assert scores(tree, model, capsys) == (second, False)


def test_another_precision_makes_a_new_cohort(tree, model, capsys):
    scores(tree, model, capsys, precision='fp32')
    assert not scores(tree, model, capsys, precision='bf16')[1]


def test_the_kept_cohort_is_not_used_for_audio_that_is_gone(tree, model, capsys):
    scores(tree, model, capsys)
    Path(tree['train_path'], 'id2/session/00001.wav').unlink()
    kept = False
    with contextlib.suppress(SystemExit):
        _, kept = scores(tree, model, capsys)
    assert not kept


@pytest.mark.parametrize('content', [b'', b'PK', 'an array'])
def test_a_file_that_is_not_a_kept_cohort_is_replaced(tree, model, capsys, content):
    first, _ = scores(tree, model, capsys)
    path = Path(f'{model}.cohort.npz')
    if content == 'an array':
        with open(path, 'wb') as file:
            np.save(file, np.zeros(3))
    else:
        path.write_bytes(content)
    assert scores(tree, model, capsys) == (first, False)
    assert scores(tree, model, capsys) == (first, True)
