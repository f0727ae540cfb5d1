"""Which audio files can be read, and what is said about others, and about files that are cut."""

import io
import os
import random
import resource
import shutil
import socket
import struct
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
import torchaudio
from cli import command_line, finish, refusal, start
from conftest import wave, write_wav

from dataLoader import (
    check_header,
    read_any,
    read_audio,
    read_crop,
    resample_blocks,
    resampling_ratio,
)
from ECAPAModel import load_model
from exps import embed, identify, lists, verify
from exps.scoring import embed_speakers
from tools import BadInput

pytestmark = pytest.mark.usefixtures('quick')
AUDIO = np.clip(wave(4, 30000) + 0.01, -1, 1)
WHOLE = ['WAV PCM_16', 'WAV PCM_24', 'WAV PCM_U8', 'WAV ULAW', 'WAV FLOAT', 'WAV DOUBLE']
WHOLE += ['FLAC PCM_16', 'AIFF PCM_16', 'AU PCM_16', 'CAF PCM_16', 'W64 PCM_16', 'RF64 PCM_16']
WHOLE += ['NIST PCM_16', 'OGG VORBIS', 'OGG OPUS', 'MP3 MPEG_LAYER_III']
# A file of another format that is cut cannot be told from a whole one, or not be opened (CAF).
CUT = [kind for kind in WHOLE if kind[:4] not in ('NIST', 'CAF ')]


def encode(kind, audio=AUDIO, rate=16000):
    """Bytes of an audio file of a kind, 'CONTAINER CODING'."""
    container, coding = kind.split()
    file = io.BytesIO()
    soundfile.write(file, audio, rate, format=container, subtype=coding)
    return file.getvalue()


def write(path, content):
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_bytes(content)
    return str(path)


def assert_the_same_everywhere(path, expected, tolerance=0):
    """Evaluation, training and the use of a model read these samples."""
    for audio in (read_audio(path), read_any(path)):
        np.testing.assert_allclose(audio, expected, atol=tolerance)
    check_header(path)
    for seed in range(5):
        start = random.Random(seed).randint(0, len(expected) - 1000)
        crop = read_crop(path, 1000, random.Random(seed))
        np.testing.assert_allclose(crop, expected[start : start + 1000], atol=max(tolerance, 2e-3))


def assert_refused_everywhere(path):
    """Evaluation and training refuse a file by name; a list of files leaves it out."""
    with pytest.raises(BadInput, match=os.path.basename(path)) as refusal:
        read_audio(path)
    for seed in range(5):
        with pytest.raises(BadInput, match=os.path.basename(path)):
            read_crop(path, 1000, random.Random(seed))
    assert lists.inspect_file(path).fault in str(refusal.value)
    assert lists.inspect_file(path).fault
    return str(refusal.value)


@pytest.mark.parametrize('kind', WHOLE)
def test_a_whole_file_is_read_as_soundfile_reads_it(tmp_path, kind, capsys):
    path = write(tmp_path / 'a.wav', encode(kind))
    expected, _ = soundfile.read(path, dtype='float32')
    assert_the_same_everywhere(path, expected, 1e-6)
    assert 'cut' not in capsys.readouterr().err


@pytest.mark.parametrize('kind', CUT)
@pytest.mark.parametrize('share', [0.4, 0.9])
def test_a_cut_file_is_refused_or_noted(tmp_path, kind, share, capsys):
    content = encode(kind, np.tile(AUDIO, 4))
    path = write(tmp_path / 'cut.wav', content[: int(share * len(content))])
    assert 'cut short' in assert_refused_everywhere(path)
    audio = read_any(path)
    note = capsys.readouterr().err
    assert 'cut.wav' in note and f'{len(audio) / 16000:.2f} s' in note
    assert 0.2 * 4 * len(AUDIO) < len(audio) < 0.95 * 4 * len(AUDIO)
    # Up to the end of what is there, it is the same recording.
    expected, _ = soundfile.read(write(tmp_path / 'whole.wav', content), dtype='float32')
    sure = len(audio) - 4096
    np.testing.assert_allclose(audio[:sure], expected[:sure], atol=1e-3)


def stream_flac(content):
    """A FLAC as an encoder writes it to a pipe: no number of samples, no checksum."""
    changed = bytearray(content)
    changed[21] &= 0xF0
    changed[22:42] = bytes(20)
    return bytes(changed)


def with_data_size(content, size):
    """A wav with another size of its samples."""
    place = content.index(b'data') + 4
    return content[:place] + struct.pack('<I', size) + content[place + 4 :]


def stream_caf(content):
    """A CAF whose data is of unknown size."""
    place = content.index(b'data') + 4
    return content[:place] + b'\xff' * 8 + content[place + 8 :]


def stream_rf64(content):
    """An RF64 whose sizes were never filled in."""
    place = content.index(b'ds64') + 8
    return content[:place] + bytes(24) + content[place + 24 :]


def stream_aiff(content):
    """An AIFF whose sizes were never filled in."""
    form = content[:4] + bytes(4) + content[8:]
    frames = form.index(b'COMM') + 10
    form = form[:frames] + bytes(4) + form[frames + 4 :]
    place = form.index(b'SSND') + 4
    return form[:place] + bytes(4) + form[place + 4 :]


def stream_au(content):
    """An AU whose data is of unknown size."""
    return content[:8] + b'\xff' * 4 + content[12:]


def unfinished_au(content):
    """An AU whose size was never filled in."""
    return content[:8] + bytes(4) + content[12:]


STREAMS = {
    'FLAC PCM_16': stream_flac,
    'WAV PCM_16': lambda content: with_data_size(content, 2**32 - 1),
    'WAV FLOAT': lambda content: with_data_size(content, 0),
    'WAV PCM_24': lambda content: with_data_size(content, 0),
    'CAF PCM_16': stream_caf,
    'RF64 PCM_16': stream_rf64,
    'AIFF PCM_16': stream_aiff,
    'AU PCM_16': stream_au,
    'AU FLOAT': unfinished_au,
}


@pytest.mark.parametrize('kind', STREAMS)
def test_a_file_from_a_pipe_is_read_to_its_end(tmp_path, kind):
    """Its program could not go back to write the length."""
    content = encode(kind)
    if kind.startswith('CAF'):
        # libsndfile pads the header, not the end.
        content = content[: content.index(b'data') + 16 + 2 * len(AUDIO)]
    expected, _ = soundfile.read(io.BytesIO(encode(kind)), dtype='float32')
    path = write(tmp_path / 'piped.wav', STREAMS[kind](content))
    assert_the_same_everywhere(path, expected, 1e-6)


def test_a_wav_that_was_never_finished_is_not_an_empty_one(tmp_path):
    zero = with_data_size(encode('WAV PCM_16'), 0)
    assert len(read_audio(write(tmp_path / 'stopped.wav', zero))) == len(AUDIO)
    empty = encode('WAV PCM_16', AUDIO[:0])
    chunk = b'LIST' + struct.pack('<I', 10) + b'INFOISFT\0\0'
    for name, content in (('empty.wav', empty), ('chunk.wav', empty + chunk)):
        path = write(tmp_path / name, content)
        assert 'no samples' in assert_refused_everywhere(path)
        with pytest.raises(BadInput, match=name):
            read_any(path)


def without_xing(content):
    """An MP3 without its first frame, which holds the number of frames."""
    assert b'Xing' in content[:200] or b'Info' in content[:200]
    second = content.index(content[:2], 4)
    return content[second:]


TAG = b'ID3\3\0\0\0\0\1\0' + bytes(128)  # of an MP3


@pytest.mark.parametrize('tag', [b'', TAG])
def test_an_mp3_of_unknown_length_is_read_to_its_end(tmp_path, tag):
    """Of variable rate: silence first, so that a guess from the first frames is far too long."""
    loud = np.random.default_rng(0).uniform(-0.5, 0.5, 20000)
    audio = np.concatenate([loud, np.zeros(60000)])
    file = io.BytesIO()
    options = {'compression_level': 0.5, 'bitrate_mode': 'VARIABLE'}
    soundfile.write(file, audio, 16000, format='MP3', **options)
    content = without_xing(file.getvalue())
    path = write(tmp_path / 'x.mp3', tag + content)
    guessed = soundfile.info(path).frames
    assert abs(guessed - 80000) > 10000, 'libsndfile guesses wrongly'
    read = read_any(path)
    assert 80000 <= len(read) < 84000
    assert np.abs(read[:19000]).mean() > 0.1 > np.abs(read[24000:]).mean()
    np.testing.assert_array_equal(read_audio(path), read)


@pytest.mark.parametrize(
    'tag, kind',
    [
        (b'', 'OGG VORBIS'),
        (b'', 'OGG OPUS'),
        (b'', 'MP3 MPEG_LAYER_III'),
        (TAG, 'MP3 MPEG_LAYER_III'),
        (b'', 'FLAC PCM_16'),
    ],
)
def test_two_streams_in_one_file_are_refused_and_never_half_read(tmp_path, tag, kind):
    one = tag + encode(kind)
    assert len(read_audio(write(tmp_path / 'one.wav', one))) == len(AUDIO)
    path = write(tmp_path / 'two.wav', one + tag + encode(kind, AUDIO[:20000]))
    for read in (read_audio, read_any):
        with pytest.raises(BadInput, match='two.wav') as error:
            read(path)
        assert 'ffmpeg -i' in str(error.value)


NOT_READ = {
    'x.m4a': b'\0\0\0\x20ftypM4A ' + bytes(1000),
    'x.webm': b'\x1a\x45\xdf\xa3' + bytes(1000),
    'x.amr': b'#!AMR\n' + bytes(1000),
    'text.wav': b'not found\n' * 100,
    'nothing.wav': b'',
    'nothing.flac': b'',
    'header.wav': encode('WAV PCM_16')[:30],
    'pointer.wav': b'version https://git-lfs.github.com/spec/v1\n',
}


@pytest.mark.parametrize('name', NOT_READ)
def test_what_cannot_be_read_gets_the_line_that_converts_it(tmp_path, name):
    path = write(tmp_path / name, NOT_READ[name])
    assert 'ffmpeg -i IN -ar 16000 -ac 1 OUT.wav' in assert_refused_everywhere(path)
    with pytest.raises(BadInput, match=name):
        read_any(path)


@pytest.mark.parametrize('kind', ['fifo', 'socket', 'folder', 'link to nothing'])
def test_what_is_not_a_file_is_never_opened(tmp_path, monkeypatch, kind):
    """Opening a pipe waits for ever."""
    monkeypatch.chdir(tmp_path)
    if kind == 'fifo':
        os.mkfifo('f.wav')
    elif kind == 'socket':
        socket.socket(socket.AF_UNIX).bind('f.wav')
    elif kind == 'folder':
        os.mkdir('f.wav')
    else:
        os.symlink('nothing.wav', 'f.wav')
    assert_refused_everywhere('f.wav')
    for read in (read_any, check_header):
        with pytest.raises(BadInput, match='f.wav'):
            read('f.wav')


@pytest.mark.parametrize('subtype', ['FLOAT', 'DOUBLE'])
@pytest.mark.parametrize('value', [np.nan, np.inf, -np.inf])
def test_one_sample_that_is_not_finite_refuses_a_file(tmp_path, subtype, value):
    audio = AUDIO.copy()
    audio[20000] = value
    path = write_wav(tmp_path / 'a.wav', audio, subtype=subtype)
    for read in (read_audio, read_any):
        with pytest.raises(BadInput, match='a.wav.*not finite'):
            read(path)
    assert 'not finite' in lists.inspect_file(path).fault


@pytest.mark.parametrize('samples, usable', [(1, False), (256, False), (257, True), (399, True)])
def test_the_shortest_file_is_the_same_for_all(tmp_path, samples, usable):
    path = write_wav(tmp_path / 'a.wav', AUDIO[:samples])
    assert (not lists.inspect_file(path).fault) == usable
    for read in (read_audio, read_any):
        if usable:
            assert len(read(path, 257)) == samples
        else:
            with pytest.raises(BadInput, match='257'):
                read(path, 257)


@pytest.mark.parametrize('size', [10**6, 2_500_000_000, 3_500_000_000])
def test_a_wav_that_announces_more_than_there_is_was_cut_however_long_it_was(tmp_path, size):
    content = with_data_size(encode('WAV PCM_16'), size)
    path = write(tmp_path / 'cut.wav', content)
    assert str(size) in assert_refused_everywhere(path)


def test_a_header_that_announces_100_gigabytes_is_a_cut_file(tmp_path, capsys):
    flac = bytearray(encode('FLAC PCM_16'))
    flac[21] |= 0x0F
    flac[22:26] = b'\xff' * 4
    path = write(tmp_path / 'huge.flac', bytes(flac))
    assert_refused_everywhere(path)
    assert len(read_any(path)) > 20000
    assert 'huge.flac' in capsys.readouterr().err


# Channels.


def channels(*parts):
    return np.stack(parts, axis=1)


def test_channels_are_averaged_unless_they_cancel(tmp_path, capsys):
    other = wave(7, 30000)
    hiss = 1e-4 * np.random.default_rng(0).standard_normal(30000)
    silence = np.zeros(30000)
    cases = {
        'mono': (AUDIO[:, None], AUDIO, []),
        'stereo': (channels(AUDIO, other), (AUDIO + other) / 2, ['2 channels averaged']),
        'opposite': (channels(0.5 * AUDIO, hiss - AUDIO), hiss - AUDIO, ['channel 2']),
        'equal': (channels(AUDIO, hiss - AUDIO), AUDIO, ['channel']),
        'centre': (channels(*2 * [silence], AUDIO, *3 * [silence]), AUDIO, ['channel 3']),
    }
    for name, (audio, expected, words) in cases.items():
        path = write_wav(tmp_path / f'{name}.wav', audio)
        read = read_any(path)
        same = np.allclose(read, expected, atol=1e-3) or np.allclose(-read, expected, atol=1e-3)
        assert same, name
        note = capsys.readouterr().err
        assert all(word in note for word in words), name
    assert np.isfinite(read).all()


def test_a_channel_may_be_chosen(tmp_path, capsys):
    other = wave(7, 30000)
    path = write_wav(tmp_path / 'call.wav', channels(AUDIO, other))
    np.testing.assert_allclose(read_any(path, channel=1), AUDIO, atol=1e-6)
    np.testing.assert_allclose(read_any(path, channel=2), other, atol=1e-6)
    assert 'channel 2 of 2' in capsys.readouterr().err
    with pytest.raises(BadInput, match='call.wav.*--channel 3'):
        read_any(path, channel=3)
    mono = write_wav(tmp_path / 'mono.wav', AUDIO)
    np.testing.assert_allclose(read_any(mono, channel=2), AUDIO, atol=1e-6)


# Sample rates.


USUAL = [8000, 11025, 12000, 22050, 24000, 32000, 44100, 48000, 96000, 192000]
UNUSUAL = [1000, 7999, 8001, 11127, 15999, 16001, 44101, 47999, 96001, 191999, 384001]


@pytest.mark.parametrize('rate', USUAL)
def test_blocks_are_resampled_as_the_whole(rate):
    audio = np.random.default_rng(0).uniform(-1, 1, 3 * rate + 7).astype(np.float32)
    ratio = resampling_ratio(rate)
    assert ratio == Fraction(rate, 16000), 'usual rates are exact'
    blocks = [audio[start : start + 10007] for start in range(0, len(audio), 10007)]
    together = np.concatenate(list(resample_blocks(blocks, ratio)))
    whole = torchaudio.functional.resample(torch.from_numpy(audio), rate, 16000).numpy()
    assert together.shape == whole.shape
    np.testing.assert_allclose(together, whole, atol=1e-6)


@pytest.mark.parametrize('rate', UNUSUAL)
def test_unusual_rates_need_little_memory_and_are_said_to_be_inexact(tmp_path, rate, capsys):
    ratio = resampling_ratio(rate)
    error = abs(float(ratio) * 16000 / rate - 1)
    assert 0 <= error < 1e-3
    # The filter has about this many numbers: 1.6 MB of float32.
    assert ratio.numerator * ratio.denominator <= 410000

    hertz = 200
    tone = 0.5 * np.sin(2 * np.pi * hertz * np.arange(2 * rate) / rate)
    audio = read_any(write_wav(tmp_path / 'tone.wav', tone, rate=rate))
    assert len(audio) == pytest.approx(32000, rel=1e-3)
    note = capsys.readouterr().err
    assert f'{rate} Hz' in note
    assert ('% off' in note) == (error > 0)
    spectrum = np.abs(np.fft.rfft(audio * np.hanning(len(audio))))
    assert spectrum.argmax() * 16000 / len(audio) == pytest.approx(hertz, abs=0.6)


@pytest.mark.parametrize('rate', [1, 7, 999])
def test_a_header_with_an_impossible_rate_is_refused(tmp_path, rate):
    path = write(tmp_path / 'x.wav', encode('WAV PCM_16', rate=rate))
    with pytest.raises(BadInput, match=f'x.wav: .* {rate} Hz'):
        read_any(path)


def test_a_telephone_recording_is_said_to_score_lower(tmp_path, capsys):
    noise = np.random.default_rng(0).uniform(-0.5, 0.5, 32000)
    spectrum = np.fft.rfft(noise)
    spectrum[8000:] = 0
    files = {
        'low rate': write_wav(tmp_path / 'low.wav', noise, rate=8000),
        'empty half': write_wav(tmp_path / 'half.wav', np.fft.irfft(spectrum), subtype='PCM_16'),
        'wide': write_wav(tmp_path / 'wide.wav', noise),
    }
    for name, path in files.items():
        read_any(path)
        assert ('scores' in capsys.readouterr().err) == (name != 'wide')


def print_memory_to_read(first, second):
    """Prints how many gigabytes more than the first file the second one needs at most."""
    peaks = []
    for path in (first, second):
        read_any(path)
        peaks.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6)
    print(peaks[1] - peaks[0])


def test_ten_minutes_of_48_khz_stereo_need_a_sixth_of_what_an_hour_may_take(tmp_path):
    """An hour may take 0.4 GB more than a second, of which 0.23 GB are the result."""
    second = np.random.default_rng(0).uniform(-0.5, 0.5, (48000, 2))
    short = write_wav(tmp_path / 'short.wav', second, rate=48000, subtype='PCM_16')
    with soundfile.SoundFile(tmp_path / 'long.wav', 'w', 48000, 2, 'PCM_16') as file:
        for _ in range(600):
            file.write(second)
    long = str(tmp_path / 'long.wav')
    process = start(print_memory_to_read, short, long, folder=tmp_path)
    _, gigabytes, _ = finish([process], tmp_path)
    assert float(gigabytes) < 0.4 / 6


# Scripts that use a model.


@pytest.fixture
def recordings(tmp_path):
    """Folder of three good recordings and three bad ones."""
    folder = tmp_path / 'recordings'
    for number in range(3):
        write_wav(folder / f'{number}.wav', wave(number, 20000))
    write(folder / 'bad.wav', b'not audio')
    write_wav(folder / 'silent.wav', np.zeros(20000))
    write_wav(folder / 'x/short.wav', AUDIO[:100])
    return folder


BAD = ['bad.wav', 'silent.wav', 'short.wav']


def ended(capsys, main, arguments):
    """(Standard output, standard error) of a script that ends with status 2."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2
    return capsys.readouterr()


@pytest.mark.parametrize('n_cpu', [0, 2])
def test_embed_writes_what_works_and_names_the_rest(recordings, model, tmp_path, capsys, n_cpu):
    out = str(tmp_path / 'out.npz')
    options = command_line(initial_model=model, device='cpu', n_cpu=n_cpu)
    _, message = ended(capsys, embed.main, [str(recordings), '--out', out, *options])
    assert all(name in message for name in BAD)
    assert '3 of 6' in message
    good = [str(recordings / f'{number}.wav') for number in range(3)]
    with np.load(out) as written:
        assert written['names'].tolist() == good
        alone = load_model(model, device='cpu').embed(good)
        np.testing.assert_allclose(written['embeddings'], alone, atol=1e-5)


def test_a_recording_in_place_of_a_list_is_refused(recordings, model, tmp_path, capsys):
    """If its name says so, it is a recording (test_folders.py)."""
    recording = str(tmp_path / 'recordings.txt')
    shutil.copy(recordings / '0.wav', recording)
    options = command_line(out=tmp_path / 'out.npz', initial_model=model, device='cpu', n_cpu=0)
    _, message = ended(capsys, embed.main, [recording, *options])
    assert f'FILES: {recording}: ' in message
    assert len(message.splitlines()) == 1


def test_embed_writes_nothing_if_nothing_works(tmp_path, model, capsys):
    write(tmp_path / 'recordings/bad.wav', b'not audio')
    out = tmp_path / 'out.npz'
    options = command_line(out=out, initial_model=model, device='cpu', n_cpu=0)
    _, message = ended(capsys, embed.main, [str(tmp_path / 'recordings'), *options])
    assert 'bad.wav' in message
    assert not out.exists()


def test_identify_writes_what_works_and_names_the_rest(recordings, model, tmp_path, capsys):
    for number in range(2):
        write_wav(tmp_path / f'people/p{number}/a.wav', wave(number, 21000))
    people = str(tmp_path / 'people')
    options = command_line(people=people, initial_model=model, device='cpu', n_cpu=0)
    output, message = ended(capsys, identify.main, [str(recordings), *options])
    rows = [line.split(',')[0] for line in output.splitlines()]
    assert rows == ['file', *(str(recordings / f'{number}.wav') for number in range(3))]
    assert all(name in message for name in BAD)

    # A person keeps the recordings that can be used, and needs one.
    write(tmp_path / 'people/p0/bad.wav', b'not audio')
    again, message = ended(capsys, identify.main, [str(recordings), *options])
    assert again == output
    assert 'p0/bad.wav' in message
    (tmp_path / 'people/p0/a.wav').unlink()
    nothing, message = ended(capsys, identify.main, [str(recordings), *options])
    assert nothing == '' and 'p0' in message


def test_scripts_take_a_channel(tmp_path, model, capsys):
    call = write_wav(tmp_path / 'calls/call.wav', channels(wave(1, 20000), wave(2, 20000)))
    second = write_wav(tmp_path / 'people/second/a.wav', wave(2, 20000))
    options = command_line(initial_model=model, device='cpu', n_cpu=0)
    verify.main([second, second, *options])
    same = capsys.readouterr().out.splitlines()[0]
    verify.main([call, second, '--channel', '2', *options])
    assert capsys.readouterr().out.splitlines()[0] == same
    verify.main([call, second, '--channel', '1', *options])
    assert capsys.readouterr().out.splitlines()[0] != same
    people = ['--people', str(tmp_path / 'people')]
    identify.main([str(tmp_path / 'calls'), *people, '--channel', '2', *options])
    assert same.split()[1] in capsys.readouterr().out
    out = str(tmp_path / 'out.npz')
    embed.main([str(tmp_path / 'calls'), '--out', out, '--channel', '2', *options])
    with np.load(out) as written:
        expected = load_model(model, device='cpu').embed([second])
        np.testing.assert_allclose(written['embeddings'], expected, atol=1e-5)


def test_a_cohort_leaves_out_bad_files_and_counts_them(tmp_path, model, capsys):
    files = []
    for speaker, count in enumerate((8, 1, 14)):
        names = [tmp_path / f's{speaker}/{number}.wav' for number in range(count)]
        files.append([write_wav(name, wave(3 * speaker + 1, 5000)) for name in names])
    system = load_model(model, device='cpu')
    Path(files[1][0]).write_bytes(b'')
    Path(files[0][1]).write_bytes(b'')
    cohort = embed_speakers(system, files)
    note = capsys.readouterr().err
    assert '2 of 23' in note and '2 of 3' in note
    expected = [
        system.embed_files([files[0][0], *files[0][2:]]).mean(axis=0),
        system.embed_files(files[2]).mean(axis=0),
    ]
    np.testing.assert_allclose(cohort, expected, atol=1e-6)

    # A tenth may be bad: more is a wrong folder.
    Path(files[2][0]).write_bytes(b'')
    with pytest.raises(BadInput, match='3 of 23(.*\n)*.*s1/0.wav'):
        embed_speakers(system, files)


def test_embeddings_of_any_format(tree, model, capsys):
    folder = Path(tree['save_path']).parent / 'recordings'
    audio = wave(1, 32000)
    write_wav(folder / 'a.wav', audio)
    write_wav(folder / 'stereo/b.flac', np.stack([audio, audio], axis=1), subtype='PCM_16')
    slow = np.interp(np.arange(24000 * 2) / 24000, np.arange(32000) / 16000, audio)
    write_wav(folder / 'rate.ogg', slow, rate=24000, subtype='VORBIS')
    options = command_line(initial_model=model, device='cpu', n_cpu=0)
    out = str(folder / 'first.npz')
    embed.main([str(folder), '--out', out, *options])
    notes = capsys.readouterr().err
    assert 'b.flac' in notes and ' 2 ' in notes
    assert 'rate.ogg' in notes and '24000 Hz' in notes

    with np.load(out) as written:
        names = written['names'].tolist()
        embeddings = written['embeddings']
    assert names == [str(folder / name) for name in ('a.wav', 'rate.ogg', 'stereo/b.flac')]
    assert embeddings.shape == (3, 192)
    np.testing.assert_allclose(np.linalg.norm(embeddings, axis=1), 1, atol=1e-5)
    assert embeddings[0] @ embeddings[2] > 0.999
    alone = load_model(model, device='cpu').embed(names[:1])
    np.testing.assert_allclose(alone[0], embeddings[0], atol=1e-5)

    (folder / 'list.txt').write_bytes(f'{names[2]}\r\n\n{names[0]}\r\n'.encode())
    embed.main([str(folder / 'list.txt'), '--out', str(folder / 'second.npz'), *options])
    with np.load(folder / 'second.npz') as again:
        np.testing.assert_allclose(again['embeddings'], embeddings[[2, 0]], atol=1e-5)
    message = refusal(capsys, embed.main, [str(folder), '--out', out, *options])
    assert out in message
    nowhere = str(folder / 'none')
    message = refusal(capsys, embed.main, [nowhere, '--out', out + '2', *options])
    assert nowhere in message
