"""What is found in a folder of recordings, what is left out, and which lists it makes."""

import errno
import os
import re
import shutil
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import soundfile
from cli import refusal
from conftest import wave, write_wav

from dataLoader import find_audio, train_loader
from exps import identify, lists
from exps.embed import list_files
from exps.lists import make_trials
from tools import BadInput

pytestmark = pytest.mark.usefixtures('quick')


@pytest.fixture
def recordings(tmp_path):
    """Five speakers with three files each, sp0/0.wav to sp4/2.wav."""
    folder = tmp_path / 'own'
    for speaker in range(5):
        for number in range(3):
            sound = wave(speaker, 8000 + number)
            write_wav(folder / f'sp{speaker}/{number}.wav', sound, subtype='PCM_16')
    return folder


def make_lists(folder, *flags):
    """(Names in the training list, trials [(label, a, b)], {name: reason} left out) of a folder."""
    out = folder.parent / 'lists'
    shutil.rmtree(out, ignore_errors=True)
    lists.main([str(folder), '--out', str(out), *flags])
    texts = {path.name: path.read_text(errors='surrogateescape') for path in out.iterdir()}
    train = [line.split()[1] for line in texts['train_list.txt'].splitlines()]
    trials = [line.split() for line in texts.get('trials.txt', '').splitlines()]
    left_out = dict(line.split(': ', 1) for line in texts.get('left_out.txt', '').splitlines())
    return train, trials, left_out


def refused(capsys, folder, *flags):
    """Returns the message of exps.lists, which must leave no lists."""
    out = folder.parent / 'none'
    message = refusal(capsys, lists.main, [str(folder), '--out', str(out), *flags])
    assert not out.exists()
    return message


# Walking.


def refuse_folder(monkeypatch, refused, number):
    """Lets os.scandir of one folder fail, as the system does."""

    def scandir(path='.'):
        if os.fspath(path) == str(refused):
            raise OSError(number, os.strerror(number), os.fspath(path))
        return original(path)

    original = os.scandir
    monkeypatch.setattr(os, 'scandir', scandir)


@pytest.mark.parametrize('number', [errno.EACCES, errno.EIO])
@pytest.mark.parametrize('below', ['', 'sp3', 'sp3/deep'])
def test_a_folder_that_cannot_be_read_is_an_error(recordings, capsys, monkeypatch, below, number):
    write_wav(recordings / 'sp3/deep/0.wav', wave(9, 8000))
    refuse_folder(monkeypatch, recordings / below if below else recordings, number)
    message = refused(capsys, recordings)
    assert str(recordings / below) in message and os.strerror(number) in message
    with pytest.raises(BadInput, match=f'--rir_path: {recordings / below}'):
        find_audio(str(recordings), '--rir_path')


def test_a_folder_of_noises_that_cannot_be_read_stops_training(tree, monkeypatch):
    refused = Path(tree['musan_path'], 'noise/source')
    refuse_folder(monkeypatch, refused, errno.EACCES)
    with pytest.raises(BadInput, match=f'--musan_path: {refused}'):
        train_loader(**tree, num_frames=20)


HIDDEN = (
    '._0.wav',
    'sp1/._0.wav',
    'sp1/.ipynb_checkpoints/0-checkpoint.wav',
    '.Trash-1000/files/0.wav',
    '.AppleDouble/0.wav',
    '__MACOSX/sp1/0.wav',
    '@eaDir/0.wav',
)


def test_what_systems_leave_behind_is_skipped_and_counted_once(recordings, capsys):
    expected = find_audio(str(recordings), 'FOLDER')
    for name in HIDDEN:
        write_wav(recordings / name, wave(1, 8000))
    for name in ('.DS_Store', 'sp1/Thumbs.db', 'desktop.ini'):
        (recordings / name).write_bytes(b'\0')
    capsys.readouterr()
    assert find_audio(str(recordings), 'FOLDER') == expected
    assert capsys.readouterr().err.count('8 files and folders are skipped') == 1
    train, trials, left_out = make_lists(recordings)
    names = {*train, *(name for trial in trials for name in trial[1:])}
    assert len(names) == 15 and not left_out


def test_a_folder_may_itself_be_hidden(recordings):
    hidden = recordings.rename(recordings.parent / '.own')
    assert len(find_audio(str(hidden), 'FOLDER')) == 15


def test_a_loop_of_links_lists_each_file_once(recordings):
    expected = find_audio(str(recordings), 'FOLDER')
    (recordings / 'sp1/up').symlink_to(recordings)
    (recordings / 'sp2/itself').symlink_to('itself')
    (recordings / 'sp3/here').symlink_to('.')
    assert find_audio(str(recordings), 'FOLDER') == expected


def test_links_to_files_and_folders_are_followed(recordings, tmp_path):
    (tmp_path / 'links').mkdir()
    (tmp_path / 'links/a').symlink_to(recordings / 'sp1')
    (tmp_path / 'links/b.wav').symlink_to(recordings / 'sp2/0.wav')
    found = find_audio(str(tmp_path / 'links'), 'FOLDER')
    assert [os.path.relpath(path, tmp_path / 'links') for path in found] == [
        'a/0.wav',
        'a/1.wav',
        'a/2.wav',
        'b.wav',
    ]


def test_pipes_and_links_to_nothing_are_left_out_and_named(recordings, capsys):
    """Opening a pipe would wait for ever."""
    os.mkfifo(recordings / 'sp1/pipe.wav')
    (recordings / 'sp2/gone.wav').symlink_to('nothing.wav')
    assert len(find_audio(str(recordings), 'FOLDER')) == 15
    message = capsys.readouterr().err
    assert 'sp1/pipe.wav' in message and 'sp2/gone.wav' in message
    _, _, left_out = make_lists(recordings)
    assert set(left_out) == {'sp1/pipe.wav', 'sp2/gone.wav'}


# Formats.


def test_other_formats_are_named_with_the_way_to_convert_them(recordings, capsys):
    for number in range(8):
        (recordings / f'sp1/{number}.m4a').write_bytes(b'\0\0\0\x18ftypM4A ')
        (recordings / f'sp2/{number}.MP3').write_bytes(b'ID3')
    (recordings / 'sp1/notes.txt').write_text('no audio')
    _, _, left_out = make_lists(recordings)
    assert len(left_out) == 16
    assert all('ffmpeg' in reason for reason in left_out.values())

    capsys.readouterr()
    assert len(find_audio(str(recordings), '--musan_path')) == 15
    message = capsys.readouterr().err
    assert all(f'sp1/{number}.m4a' in message for number in range(8)) and 'ffmpeg' in message


def test_scripts_that_use_a_model_get_all_audio_and_judge_it_themselves(recordings):
    """So one rule names an m4a, a pipe and a damaged file, and decides the exit status."""
    for name in ('a.m4a', 'b.MP3', 'c.webm', 'd.txt', 'e'):
        (recordings / 'sp1' / name).write_bytes(b'\0')
    os.mkfifo(recordings / 'sp1/pipe.wav')
    (recordings / 'sp1/gone.wav').symlink_to('nothing.wav')
    found = find_audio(str(recordings / 'sp1'), 'FILES', any_format=True)
    names = [os.path.basename(path) for path in found]
    assert names == ['0.wav', '1.wav', '2.wav', 'a.m4a', 'b.MP3', 'c.webm', 'gone.wav', 'pipe.wav']


def test_scripts_that_use_a_model_take_a_single_recording_too(recordings):
    path = str(recordings / 'sp1/0.wav')
    assert list_files(path) == [path]


def test_a_folder_of_another_format_only_is_refused_with_the_way_out(recordings, capsys):
    for path in recordings.rglob('*.wav'):
        path.rename(path.with_suffix('.m4a'))
    message = refused(capsys, recordings)
    assert 'FOLDER' in message and 'sp0/0.m4a' in message and 'ffmpeg' in message


def test_a_folder_without_a_usable_file_is_the_folders_fault(recordings, capsys):
    for path in recordings.rglob('*.wav'):
        path.write_bytes(b'')
    message = refused(capsys, recordings)
    assert 'FOLDER' in message and 'sp0/0.wav' in message and '--test_speakers' not in message


# Copies.


def test_copies_count_once_and_are_named(recordings):
    """Whether they are files, hard links, links or the same samples in another format."""
    for speaker in range(5):
        shutil.copytree(recordings / f'sp{speaker}', recordings / f'sp{speaker}/sp{speaker}')
    os.link(recordings / 'sp1/0.wav', recordings / 'sp1/hard.wav')
    (recordings / 'sp2/link.wav').symlink_to('0.wav')
    samples, _ = soundfile.read(recordings / 'sp3/0.wav', dtype='int16')
    write_wav(recordings / 'sp3/0.flac', samples, subtype='PCM_16')
    train, trials, left_out = make_lists(recordings, '--exhaustive')
    used = {*train, *(name for trial in trials for name in trial[1:])}
    assert len(used) == 15
    assert set(left_out) >= {f'sp{n}/sp{n}/{i}.wav' for n in range(5) for i in range(3)}
    assert len(left_out) == 18
    assert all(reason.split(': ')[1] in used for reason in left_out.values())


def test_the_same_audio_under_two_speakers_is_of_neither(recordings):
    """Nothing says whose it is."""
    shutil.copy(recordings / 'sp1/0.wav', recordings / 'sp2/other.wav')
    train, trials, left_out = make_lists(recordings)
    assert set(left_out) == {'sp1/0.wav', 'sp2/other.wav'}
    assert 'sp2/other.wav' in left_out['sp1/0.wav'] and 'sp1/0.wav' in left_out['sp2/other.wav']
    names = {*train, *(name for trial in trials for name in trial[1:])}
    assert names.isdisjoint(left_out)


def test_empty_files_are_faults_and_not_copies(recordings):
    for name in ('sp1/a.wav', 'sp2/b.wav'):
        write_wav(recordings / name, np.zeros(0))
    _, _, left_out = make_lists(recordings)
    assert set(left_out) == {'sp1/a.wav', 'sp2/b.wav'}
    assert not any('speaker' in reason or 'copy' in reason for reason in left_out.values())


def test_names_that_lists_cannot_hold_are_left_out(recordings):
    for name in ('two words.wav', 'two\nlines.wav', os.fsdecode(b'\xff.wav')):
        written = write_wav(recordings / 'sp1/new/a.wav', wave(len(name), 9000))
        os.rename(written, recordings / 'sp1/new' / name)
    train, trials, left_out = make_lists(recordings)
    assert set(left_out) == {'sp1/new/two words.wav', 'sp1/new/two\\nlines.wav'}
    names = {*train, *(name for trial in trials for name in trial[1:])}
    assert os.fsdecode(b'sp1/new/\xff.wav') in names


# Speakers and trials.


def test_speakers_by_the_rule_that_everything_has(recordings, capsys):
    """Below a folder that all share, and by a pattern in the names of one folder."""
    deep = recordings.parent / 'deep'
    shutil.copytree(recordings, deep / 'corpus/wav')
    train, trials, _ = make_lists(deep)
    speakers = {name.split('/')[2] for name in train}
    speakers |= {name.split('/')[2] for trial in trials for name in trial[1:]}
    assert speakers == {f'sp{n}' for n in range(5)}

    flat = recordings.parent / 'flat'
    flat.mkdir()
    for path in recordings.rglob('*.wav'):
        shutil.copy(path, flat / f'{path.parent.name}_{path.name}')
    write_wav(flat / 'hum.wav', wave(9, 9000))
    _, trials, left_out = make_lists(flat, '--speaker', r'(sp\d)_', '--exhaustive')
    assert list(left_out) == ['hum.wav']
    assert all((label == '1') == (a[:3] == b[:3]) for label, a, b in trials)


@pytest.mark.parametrize('option, value', [('--seed', '-1'), ('--test_speakers', '-1')])
def test_a_wrong_number_is_refused_before_the_work(recordings, capsys, option, value):
    message = refused(capsys, recordings, option, value)
    assert option in message and value in message and 'reading' not in message


def pairs_of(lines):
    return [tuple(line.split()) for line in lines]


def test_trials_are_those_of_a_plain_loop():
    files = {'a': ['a/0', 'a/1', 'a/2'], 'b': ['b/0'], 'c': ['c/0', 'c/1']}
    names = [name for own in files.values() for name in own]
    expected = []
    for i, first in enumerate(names):
        for second in names[i + 1 :]:
            expected.append((str(int(first[0] == second[0])), first, second))
    everything = pairs_of(make_trials(files, np.random.default_rng(0), exhaustive=True))
    assert everything == expected

    seen = set()
    for seed in range(60):
        chosen = pairs_of(make_trials(files, np.random.default_rng(seed), exhaustive=False))
        assert [label for label, _, _ in chosen].count('1') == 4 and len(set(chosen)) == 8
        assert set(chosen) <= set(expected)
        seen |= set(chosen)
    assert seen == set(expected), 'every pair can be drawn'


def test_trials_of_many_files_need_little_memory():
    """All pairs of 20,000 files would take 3.2 GB."""
    files = {f'{s}': [f'{s}/{n}' for n in range(100)] for s in range(200)}
    tracemalloc.start()
    chosen = pairs_of(make_trials(files, np.random.default_rng(0), exhaustive=False))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(set(chosen)) == 40000
    assert peak < 50e6


# People to identify.


def test_people_are_found_by_the_same_walk(recordings, capsys, monkeypatch):
    for name in HIDDEN:
        write_wav(recordings / name, wave(1, 8000))
    (recordings / 'Thumbs.db').write_bytes(b'\0')
    capsys.readouterr()
    people = identify.read_people(str(recordings))
    assert {name: len(paths) for name, paths in people.items()} == {f'sp{n}': 3 for n in range(5)}
    assert capsys.readouterr().err.count('are skipped') == 1

    refuse_folder(monkeypatch, recordings / 'sp3', errno.EACCES)
    with pytest.raises(BadInput, match=f'--people: {recordings / "sp3"}'):
        identify.read_people(str(recordings))


def test_a_person_without_a_usable_recording_is_an_error(recordings):
    for path in (recordings / 'sp3').iterdir():
        path.rename(path.with_suffix('.txt'))
    with pytest.raises(BadInput, match='--people .*sp3'):
        identify.read_people(str(recordings))


def test_people_with_a_pipe_or_a_link_to_nothing_are_read(recordings):
    """The reader of audio names these files; a pipe must not be waited for."""
    os.mkfifo(recordings / 'sp1/pipe.wav')
    (recordings / 'sp2/gone.wav').symlink_to('nothing.wav')
    people = identify.read_people(str(recordings))
    assert [len(paths) for paths in people.values()] == [3, 4, 4, 3, 3]


# A folder with faults of every kind.


@pytest.fixture
def faulty(tmp_path):
    """Six speakers, one of them with one file, and files with faults."""
    folder = tmp_path / 'own'
    for speaker in range(6):
        for number in range(4 if speaker else 1):
            audio = 0.5 * wave(speaker, 20000 + 1000 * number)
            write_wav(folder / f'sp{speaker}/{number}.wav', audio, subtype='PCM_16')
    write_wav(folder / 'sp1/silent.wav', np.zeros(16000), subtype='PCM_16')
    write_wav(folder / 'sp1/phone.wav', wave(1, 8000), rate=8000, subtype='PCM_16')
    write_wav(folder / 'sp2/two words.wav', wave(2, 16000), subtype='PCM_16')
    write_wav(folder / 'sp2/loud.wav', (20 * wave(2, 16000)).clip(-1, 1), subtype='PCM_16')
    (folder / 'sp3/broken.wav').write_text('nothing')
    write_wav(folder / 'stray.wav', wave(2, 16000), subtype='PCM_16')
    return folder


def test_lists_of_own_speakers(faulty, tmp_path, capsys):
    out = tmp_path / 'lists'
    lists.main([str(faulty), '--out', str(out), '--test_speakers', '2', '--seed', '4'])
    report = capsys.readouterr().out
    train = [line.split() for line in (out / 'train_list.txt').read_text().splitlines()]
    trials = [line.split() for line in (out / 'trials.txt').read_text().splitlines()]
    for speaker, name in train:
        assert speaker == name.split('/')[0]
        assert (faulty / name).exists()
    tested = {name for trial in trials for name in trial[1:]}
    held_out = {name.split('/')[0] for name in tested}
    assert len(held_out) == 2
    assert held_out.isdisjoint(speaker for speaker, _ in train)
    for label, a, b in trials:
        assert (label == '1') == (a.split('/')[0] == b.split('/')[0])
    assert len({tuple(sorted(trial[1:])) for trial in trials}) == len(trials)
    labels = [trial[0] for trial in trials]
    assert labels.count('1') == labels.count('0') > 0
    used = tested | {name for _, name in train}
    assert len(used) == 22 and 'sp2/loud.wav' in used

    left_out = (out / 'left_out.txt').read_text()
    faults = {
        'silent.wav': '',
        'phone.wav': '8000 Hz',
        'two words.wav': '',
        'broken.wav': '',
        'stray.wav': '',
    }
    for name, fault in faults.items():
        assert re.search(f'{name}: .*{fault}', left_out)
    for pattern in ('22 .* 6 speakers', 'clipped +1 ', '8000 Hz: 1 '):
        assert re.search(pattern, report)
    again = tmp_path / 'again'
    lists.main([str(faulty), '--out', str(again), '--test_speakers', '2', '--seed', '4'])
    assert (again / 'trials.txt').read_bytes() == (out / 'trials.txt').read_bytes()


def test_all_speakers_for_trials(recordings, tmp_path, capsys):
    """A list to calibrate or to test on needs no training list."""
    out = tmp_path / 'lists'
    lists.main([str(recordings), '--out', str(out), '--test_speakers', '5'])
    assert [path.name for path in out.iterdir()] == ['trials.txt']
    names = {name for line in (out / 'trials.txt').open() for name in line.split()[1:]}
    assert {name.split('/')[0] for name in names} == {f'sp{number}' for number in range(5)}
    assert 'train_list.txt' in capsys.readouterr().out
    assert '--test_speakers' in refused(capsys, recordings, '--test_speakers', '4')


def test_exhaustive_trials_and_no_trials(faulty, tmp_path, capsys):
    arguments = [str(faulty), '--test_speakers', '3', '--exhaustive']
    lists.main([*arguments, '--out', str(tmp_path / 'a')])
    trials = (tmp_path / 'a/trials.txt').read_text().splitlines()
    files = {name for trial in trials for name in trial.split()[1:]}
    assert len(trials) == len(files) * (len(files) - 1) // 2
    lists.main([str(faulty), '--out', str(tmp_path / 'b'), '--test_speakers', '0'])
    assert not (tmp_path / 'b/trials.txt').exists()
    assert 'trials.txt' in capsys.readouterr().out
    for count in ('5', '1'):
        assert '--test_speakers' in refused(capsys, faulty, '--test_speakers', count)
    there = [str(faulty), '--out', str(tmp_path / 'a')]
    assert str(tmp_path / 'a') in refusal(capsys, lists.main, there)
