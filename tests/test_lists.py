"""What is wrong in a list, or between two lists, and is it said?"""

import errno
import os
import shutil
from pathlib import Path

import pytest
from conftest import wave, write_wav

from dataLoader import check_lists, read_trial_lists, require, train_loader
from tools import BadInput

NAME = 'id{}/session/{:05d}.wav'.format


@pytest.fixture
def separate(tree):
    """The corpus of conftest, trained on id0 and id1 and tested on id2 and id3."""
    lines = Path(tree['train_list']).read_text().splitlines()
    write(tree['train_list'], lines[:6])
    lines = Path(tree['eval_list']).read_text().splitlines()
    write(tree['eval_list'], [line for line in lines if 'id0' not in line and 'id1' not in line])
    return tree


def write(path, lines):
    Path(path).write_text('\n'.join(lines) + '\n')


def edit(path, *more, change=str):
    """Changes each line of a list, and adds lines."""
    lines = Path(path).read_text().splitlines()
    write(path, [change(line) for line in lines] + list(more))


def warnings(tree, capsys, speaker=''):
    """The warnings on the lists of a corpus."""
    dataset = train_loader(
        tree['train_list'], tree['train_path'], tree['musan_path'], tree['rir_path'], 20
    )
    files, _ = read_trial_lists([tree['eval_list']], [tree['eval_path']])
    capsys.readouterr()
    check_lists(dataset, files, [tree['eval_path']], speaker)
    return [line for line in capsys.readouterr().out.splitlines() if 'WARNING' in line]


# Training lists.


def test_lists_that_share_nothing_have_no_warning(separate, capsys):
    assert warnings(separate, capsys) == []


@pytest.mark.parametrize('spelling', [NAME(0, 1), './' + NAME(0, 1), 'id1/../' + NAME(0, 1)])
def test_a_file_under_two_speakers_is_said(separate, capsys, spelling):
    edit(separate['train_list'], f'id1 {spelling}')
    (warning,) = warnings(separate, capsys)
    assert '--train_list: 1 files' in warning and 'two speakers' in warning
    assert NAME(0, 1) in warning


def test_a_line_twice_is_said(separate, capsys):
    edit(separate['train_list'], f'id0 {NAME(0, 1)}', f'id0 ./{NAME(0, 2)}')
    (warning,) = warnings(separate, capsys)
    assert '--train_list: 2 files' in warning and 'more than once' in warning


def test_a_single_speaker_is_said(separate, capsys):
    edit(separate['train_list'], change=lambda line: line.replace('id1 ', 'id0 '))
    (warning,) = warnings(separate, capsys)
    assert '--train_list has a single speaker, id0' in warning


def test_windows_line_ends_and_blank_lines_are_no_part_of_a_list(separate, tmp_path):
    def read(path):
        dataset = train_loader(
            path, separate['train_path'], separate['musan_path'], separate['rir_path'], 20
        )
        return dataset.speakers, dataset.labels.tolist(), list(dataset.names)

    content = Path(separate['train_list']).read_bytes()
    other = tmp_path / 'windows.txt'
    other.write_bytes(content.replace(b'\n', b'\r\n') + b'\r\n\n  \n')
    assert read(other) == read(separate['train_list'])


# Training lists and trials.


def number_speakers(line):
    """A line of a training list with a number in place of its speaker."""
    speaker, name = line.split()
    return f'{speaker[2:]} {name}'


def test_speakers_in_both_are_said_though_they_are_numbered(separate, capsys):
    edit(separate['train_list'], f'id2 {NAME(2, 9)}', change=str)
    edit(separate['train_list'], change=number_speakers)
    write_wav(Path(separate['train_path'], NAME(2, 9)), wave(2, 8000))
    (warning,) = warnings(separate, capsys)
    assert '1 speakers' in warning and 'id2' in warning


def test_speakers_in_both_are_found_by_the_pattern(separate, capsys):
    write(separate['train_list'], ['a x/id2-1.wav', 'b x/id7-1.wav'])
    write(separate['eval_list'], ['1 y/id2-5.wav y/id2-6.wav', '0 y/id2-5.wav y/id4-6.wav'])
    (warning,) = warnings(separate, capsys, speaker=r'(id\d)-')
    assert '1 speakers' in warning and 'id2' in warning
    assert warnings(separate, capsys) == []


@pytest.mark.parametrize('how', ['copied', 'one tree', 'linked', 'deeper'])
def test_files_in_both_are_said(separate, capsys, tmp_path, how):
    """The training list numbers its speakers, and its files are of no folder of a speaker."""
    name = NAME(2, 0)
    in_training = Path(separate['train_path'], name)
    in_trials = Path(separate['eval_path'], name)
    if how == 'copied':
        shutil.copy(in_trials, in_training)
    elif how == 'linked':
        in_training.unlink()
        in_training.symlink_to(in_trials)
    elif how == 'one tree':
        separate['train_path'] = separate['eval_path']
    else:
        separate['train_path'] = os.path.dirname(separate['eval_path'])
        edit(separate['train_list'], change=lambda line: line.replace(' ', ' train/'))
        name = f'eval/{name}'
    edit(separate['train_list'], f'7 ./{name}')
    found = warnings(separate, capsys)
    (warning,) = [line for line in found if 'files' in line]
    assert '1 files' in warning and NAME(2, 0) in warning


def test_other_files_of_the_same_name_are_not_in_both(separate, capsys):
    """Two corpora may number their files alike; here the samples differ."""
    edit(separate['train_list'], f'7 {NAME(2, 0)}')
    assert not [line for line in warnings(separate, capsys) if 'files' in line]


# Trials.


def said_of(tree, capsys, *more):
    """The warnings on reading the trial list with more lines."""
    edit(tree['eval_list'], *more)
    capsys.readouterr()
    read_trial_lists([tree['eval_list']], [tree['eval_path']])
    return [line for line in capsys.readouterr().out.splitlines() if 'WARNING' in line]


def test_a_usual_list_has_no_warning(separate, capsys):
    assert said_of(separate, capsys) == []


@pytest.mark.parametrize(
    'line, words',
    [
        (f'0 {NAME(2, 1)} {NAME(2, 0)}', 'both labels'),
        (f'0 {NAME(2, 0)} ./{NAME(2, 1)}', 'both labels'),
        (f'1 {NAME(2, 0)} {NAME(2, 1)}', 'more than once'),
        (f'1 {NAME(2, 1)} id3/../{NAME(2, 0)}', 'more than once'),
        (f'1 {NAME(2, 0)} ./{NAME(2, 0)}', 'with itself'),
    ],
)
def test_a_trial_that_distorts_the_figures_is_said(separate, capsys, line, words):
    (warning,) = said_of(separate, capsys, line)
    assert separate['eval_list'] in warning and ' 1 pairs' in warning
    assert words in warning and NAME(2, 0) in warning


def test_the_first_line_decides_where_the_label_is(separate, tmp_path):
    path = Path(separate['eval_list'])
    _, (usual,) = read_trial_lists([str(path)], [separate['eval_path']])
    last = tmp_path / 'last.txt'
    edit(path, change=lambda line: ' '.join([*line.split()[1:], line.split()[0]]))
    shutil.move(path, last)
    _, (found,) = read_trial_lists([str(last)], [separate['eval_path']])
    assert found.labels.tolist() == usual.labels.tolist() and found.names == usual.names

    edit(last, f'1 {NAME(2, 0)} {NAME(3, 0)}')
    number = len(last.read_text().splitlines())
    with pytest.raises(BadInput, match=f'last.txt, line {number}'):
        read_trial_lists([str(last)], [separate['eval_path']])


@pytest.mark.parametrize('content', ['1 0 1\n0 1 0\n', '1 a 0\n0 target 1\n'])
def test_a_first_line_with_a_label_at_each_end_is_refused(separate, tmp_path, content):
    (tmp_path / 'list.txt').write_text(content)
    with pytest.raises(BadInput, match='list.txt'):
        read_trial_lists([str(tmp_path / 'list.txt')], [separate['eval_path']])


# What an option names.


@pytest.mark.parametrize('kind', [str, Path])
def test_a_file_that_is_not_there_is_named_with_its_option(tmp_path, kind):
    for exists in (os.path.isfile, os.path.isdir):
        with pytest.raises(BadInput, match=f'--eval_list: {tmp_path}/none: no such'):
            require(exists, kind(tmp_path / 'none'), '--eval_list')


def test_a_file_that_cannot_be_reached_is_not_called_missing(tmp_path, monkeypatch):
    """os.path.isfile is False where a folder on the way cannot be read."""

    def refuse(path, *args, **kwargs):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), path)

    monkeypatch.setattr(os, 'stat', refuse)
    with pytest.raises(BadInput, match=f'--eval_list: .*{os.strerror(errno.EACCES)}'):
        require(os.path.isfile, str(tmp_path / 'none'), '--eval_list')
