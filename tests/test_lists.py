"""What is wrong in a list, or between two lists, and is it said?"""

import errno
import os
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import soundfile
from cli import refusal, train
from conftest import wave, write_wav
from damage import NAMES, PAIRS, assert_plain_scores, damage, many, outcome, trial_line
from hypothesis import given
from hypothesis import strategies as st

from dataLoader import check_lists, read_trial_lists, require_file, require_folder, train_loader
from tools import BadInput

pytestmark = pytest.mark.usefixtures('quick')
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
    assert '--train_list' in warning and 'id0' in warning


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
    for require in (require_file, require_folder):
        with pytest.raises(BadInput, match=f'--eval_list: {tmp_path}/none: no such'):
            require(kind(tmp_path / 'none'), '--eval_list')


def test_a_file_that_cannot_be_reached_is_not_called_missing(tmp_path, monkeypatch):
    """os.path.isfile is False if a folder above the file cannot be read."""

    def refuse(path, *args, **kwargs):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), path)

    monkeypatch.setattr(os, 'stat', refuse)
    with pytest.raises(BadInput, match=f'--eval_list: .*{os.strerror(errno.EACCES)}'):
        require_file(str(tmp_path / 'none'), '--eval_list')


def test_up_to_twenty_bad_lines_are_shown(tree, capsys):
    lines = 10 * Path(tree['eval_list']).read_text().splitlines()
    lines[1::2] = [f'x{line}' for line in lines[1::2]]
    write(tree['eval_list'], lines)
    message = refusal(capsys, train, tree)
    shown = [int(number) for number in re.findall(r'trials.txt, line (\d+)', message)]
    assert shown == list(range(2, 42, 2))


def test_models_may_be_called_as_labels_are(tree, tmp_path):
    write(tmp_path / 'models.txt', [f'0 {NAME(1, 0)}', f'1 {NAME(2, 0)}'])
    write(tmp_path / 'first.txt', [f'1 0 {NAME(1, 1)}', f'0 1 {NAME(1, 0)}'])
    write(tmp_path / 'last.txt', [f'0 {NAME(1, 1)} 1', f'1 {NAME(1, 0)} 0'])
    lists = [str(tmp_path / f'{name}.txt') for name in ('first', 'last')]
    _, found = read_trial_lists(lists, [tree['eval_path']], str(tmp_path / 'models.txt'))
    assert [trials.labels.tolist() for trials in found] == [[1, 0], [1, 0]]
    assert found[0].names == found[1].names == ['0', NAME(1, 1), '1', NAME(1, 0)]


@pytest.mark.parametrize('encoding', ['utf-16-le', 'utf-16-be'])
@pytest.mark.parametrize('name', ['train_list', 'eval_list'])
def test_a_list_in_utf_16_is_named_as_such(tree, capsys, name, encoding):
    """As PowerShell writes it."""
    path = Path(tree[name])
    path.write_bytes(('\ufeff' + path.read_text()).encode(encoding))
    message = refusal(capsys, train, tree)
    assert f'--{name}' in message and str(path) in message


# Lists drawn at random.


FIRST = NAMES[0].encode()


SECOND = NAMES[1].encode()


THIRD = NAMES[2].encode()


LINES = st.sampled_from(
    [trial_line(a, b).encode() for a, b in PAIRS]
    + [
        b'',
        b'  ',
        b'\t',
        b'1',
        b'1 %b' % FIRST,
        b'2 %b %b' % (FIRST, SECOND),
        b'yes %b %b' % (FIRST, SECOND),
        b'1.0 %b %b' % (FIRST, SECOND),
        b'1\t%b\t%b' % (FIRST, SECOND),
        b' 0  %b  %b ' % (SECOND, THIRD),
        b'1 %b %b %b' % (FIRST, SECOND, THIRD),
        b'1 /etc/passwd %b' % FIRST,
        b'0 nowhere.wav nowhere.wav',
        b'1 \xff\xfe.wav %b' % FIRST,
        '0 größe.wav été.wav'.encode(),
        b'\x00\x00\x00',
        b'# a comment',
        b'1 "id1/with space.wav" %b' % FIRST,
        b'\xef\xbb\xbf1 %b %b' % (FIRST, SECOND),
        b'1 ./%b ../eval/%b' % (FIRST, SECOND),
        b'1 id1 id2',
    ]
)


@many(60)
@given(
    lines=st.lists(LINES, max_size=8),
    newline=st.sampled_from([b'\n', b'\r\n']),
    last=st.booleans(),
)
def test_trial_lists(small_evaluation, capsys, lines, newline, last):
    """A list is scored if str.split finds trials in it.

    These are three fields in every line that has any: labels 1 and 0, and files. last: whether the
    last line is ended, too.
    """
    content = newline.join(lines)
    if last:
        content += newline
    assert check_trial_list(small_evaluation, capsys, content) == is_trial_list(content)


@many(30)
@given(data=st.data())
def test_damaged_trial_lists(small_evaluation, capsys, data):
    good = (small_evaluation / 'trials.txt').read_bytes()
    content = data.draw(damage(good, header=60))
    assert check_trial_list(small_evaluation, capsys, content) == is_trial_list(content)


def trial_rows(content):
    """Fields of each line that has any."""
    return [line.split() for line in content.split(b'\n') if line.split()]


def is_trial_list(content):
    """Whether these bytes are trials of both kinds among files that exist."""
    existing = {f'{folder}{name}'.encode() for name in NAMES for folder in ('', './', '../eval/')}
    labels = set()
    for row in trial_rows(content):
        label, *names = row
        if len(names) != 2 or not existing.issuperset(names):
            return False
        labels.add(label)
    return labels == {b'0', b'1'}


def check_trial_list(small_evaluation, capsys, content):
    """--eval of a list of these bytes gives the plain scores, line by line, or a sentence.

    Returns whether it gives scores.
    """
    path = small_evaluation / 'list.txt'
    path.write_bytes(content)
    lines, message = outcome(small_evaluation, capsys, eval_list=path)
    if lines is None:
        assert 'list.txt' in message or '--eval_list' in message
        return False

    trials = []
    for line in lines:
        label, _, enrolment, test = line.split()
        trials.append([label.encode(), enrolment.encode(), test.encode()])
    assert trials == trial_rows(content)
    assert_plain_scores(small_evaluation, lines)
    return True


@pytest.fixture(scope='module')
def training(tmp_path_factory):
    """Options of a training set of four utterances by two speakers, and its list's lines."""
    folder = tmp_path_factory.mktemp('training')
    augmentation = ['musan/noise/a.wav', 'musan/speech/a.wav', 'musan/music/a.wav', 'rirs/a.wav']
    utterances = [f'train/{name}' for name in NAMES]
    for name in [*augmentation, *utterances]:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        soundfile.write(path, wave(1, 9000), 16000, subtype='PCM_16')

    return {
        'train_list': str(folder / 'train.txt'),
        'train_path': str(folder / 'train'),
        'musan_path': str(folder / 'musan'),
        'rir_path': str(folder / 'rirs'),
    }


TRAIN_LINES = st.sampled_from(
    [f'{name[:3]} {name}'.encode() for name in NAMES]
    + [
        b'',
        b' \t',
        b'id1',
        b'id1 a b',
        b'id\xff\xfe x.wav',
        'ötzi é.wav'.encode(),
        b'id1\t%b' % FIRST,
        b'  id2   %b  ' % THIRD,
        b'\x00 \x00',
        b'id1 "a b.wav"',
    ]
)


@many(60)
@given(lines=st.lists(TRAIN_LINES, max_size=8), newline=st.sampled_from([b'\n', b'\r\n']))
def test_training_lists(training, lines, newline):
    """Labels are the places of the speakers in their sorted set.

    Other lines than `speaker path` are refused, and files that are not text.
    """
    content = newline.join(lines)
    Path(training['train_list']).write_bytes(content)
    rows = [line.split() for line in lines if line.split()]

    try:
        dataset = train_loader(**training, num_frames=20)
    except BadInput as error:
        assert '--train_list' in str(error)
        if b'\0' in content:
            return
        assert not rows or any(len(row) != 2 for row in rows)
        bad = [number for number, line in enumerate(lines, 1) if len(line.split()) not in (0, 2)]
        assert all(f'line {number}:' in str(error) for number in bad)
        return

    assert all(len(row) == 2 for row in rows)
    speakers = sorted({speaker for speaker, _ in rows})
    assert dataset.labels.tolist() == [speakers.index(speaker) for speaker, _ in rows]
    names = [name.decode('utf-8', 'surrogateescape') for _, name in rows]
    assert [dataset.names[i] for i in range(len(dataset))] == names


# Layouts of a trial list.


def in_words(label):
    return 'target' if label == '1' else 'nontarget'


LAYOUTS = {
    'label first, in words': lambda label, a, b: f'{in_words(label)} {a} {b}',
    'label last, a digit': lambda label, a, b: f'{a} {b} {label}',
    'label last, in words': lambda label, a, b: f'{a}\t{b}   {in_words(label)}',
    'Windows line ends': lambda label, a, b: f'{label} {a} {b}\r',
}


@pytest.mark.parametrize('layout', LAYOUTS)
def test_a_list_of_any_layout_is_the_same_list(tree, tmp_path, layout):
    _, (usual,) = read_trial_lists([tree['eval_list']], [tree['eval_path']])
    lines = Path(tree['eval_list']).read_text().splitlines()
    text = ''.join(LAYOUTS[layout](*line.split()) + '\n' for line in lines)
    (tmp_path / 'other.txt').write_bytes(text.encode())
    _, (other,) = read_trial_lists([str(tmp_path / 'other.txt')], [tree['eval_path']])
    for name in ('labels', 'pairs', 'files_of_side'):
        np.testing.assert_array_equal(getattr(other, name), getattr(usual, name))
    assert other.names == usual.names


def test_a_label_elsewhere_is_named_by_its_line(tree, tmp_path):
    path = tmp_path / 'mixed.txt'
    pair = 'a.wav b.wav'
    write(path, [f'{pair} target', f'{pair} nontarget', f'1 {pair}', f'{pair} impostor'])
    with pytest.raises(BadInput) as error:
        read_trial_lists([str(path)], [tree['eval_path']])
    for number in (3, 4):
        assert f'{path}, line {number}:' in str(error.value)
    assert 'line 1' not in str(error.value)


def test_a_model_that_is_not_enrolled_is_named_by_its_line(tree, tmp_path):
    models = tmp_path / 'models.txt'
    models.write_text('anna id0/session/00000.wav\n')
    trials = tmp_path / 'cn.txt'
    trials.write_text('anna id1/session/00000.wav 0\nberta id1/session/00000.wav 1\n')
    with pytest.raises(BadInput, match='cn.txt, line 2: .*berta'):
        read_trial_lists([str(trials)], [tree['eval_path']], str(models))
    models.write_text('anna id0/session/00000.wav\nberta\n')
    with pytest.raises(BadInput, match='models.txt, line 2'):
        read_trial_lists([str(trials)], [tree['eval_path']], str(models))
