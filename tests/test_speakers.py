"""Who speaks in a file: the speaker of a path in a list."""

import argparse

import pytest
from cli import refusal

from dataLoader import speakers_of
from exps.scoring import add_speaker_option
from tools import BadInput

IDS = ['id1', 'id1', 'id2', 'id3']


@pytest.mark.parametrize(
    'shape',
    [
        '{id}/session/{n}.wav',
        './{id}/session/{n}.wav',
        'eval/{id}/{n}.wav',
        'a/b/./c//{id}/{n}.wav',
        '/corpora/eval/{id}/session/{n}.wav',
        '../wav/{id}/{n}.wav',
        '{id}\\session\\{n}.wav',
        'D:\\corpora\\eval\\{id}\\{n}.wav',
    ],
)
def test_the_speaker_is_the_first_folder_that_not_all_paths_share(shape):
    paths = [shape.format(id=name, n=number) for number, name in enumerate(IDS)]
    assert speakers_of(paths) == IDS


def test_some_paths_may_begin_with_a_dot():
    assert speakers_of(['./id1/1.wav', 'id1/2.wav', 'id2/x/3.wav']) == ['id1', 'id1', 'id2']


def test_files_in_one_folder_are_of_one_speaker():
    assert speakers_of(['id1/1.wav', 'id1/2.wav']) == ['id1', 'id1']
    assert speakers_of(['eval/id1/1.wav', 'eval/id1/2.wav']) == ['id1', 'id1']
    assert speakers_of([]) == []


def test_a_pattern_finds_the_speaker_anywhere_in_a_path():
    celeb = ['enroll/id00800-enroll.wav', 'test/id00800-singing-01-001.wav']
    assert speakers_of(celeb, r'(id\d+)-') == ['id00800', 'id00800']
    words = ['bed/0a7c2a8d_nohash_0.wav', './cat/0a7c2a8d_nohash_1.wav']
    assert speakers_of(words, '([0-9a-f]+)_nohash') == ['0a7c2a8d', '0a7c2a8d']


@pytest.mark.parametrize('pattern', [r'(id\d+)-', r'(id\d+)?1', '()1'])
def test_a_path_without_a_speaker_is_named(pattern):
    with pytest.raises(BadInput) as error:
        speakers_of(['id7-1', 'x/one-1.wav'], pattern)
    assert pattern in str(error.value)
    assert '--speaker' in str(error.value)


@pytest.mark.parametrize('pattern', ['id[', 'id', '(?:id)-'])
def test_a_pattern_without_a_group_is_refused(pattern, capsys):
    parser = argparse.ArgumentParser()
    add_speaker_option(parser.add_argument)
    message = refusal(capsys, parser.parse_args, ['--speaker', pattern])
    assert '--speaker' in message
    assert pattern in message
