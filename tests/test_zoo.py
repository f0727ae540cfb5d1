"""A zoo of bad inputs: mutated lists, audio and checkpoints end in the right numbers or in a sentence, never otherwise.

The right numbers are those of what is there after the mutation, read by other means: soundfile for audio, str.split for
lists. Hypothesis draws the mutations, the same ones in every run.
"""

import hashlib
import io
import random
import shutil
import struct
from collections import Counter
from pathlib import Path

import numpy as np
import plain
import pytest
import soundfile
import torch
from conftest import command_line, wave
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st

import trainECAPAModel
from dataLoader import read_crop, train_loader
from ECAPAModel import ECAPAModel
from tools import BadInput

pytestmark = pytest.mark.usefixtures('short_crops')
NAMES = [f'id{speaker}/session/{number:05d}.wav' for speaker in (1, 2) for number in range(2)]
COUNTS = Counter()


def many(examples):
    """Decorator: as many examples, always the same."""

    def decorate(test):
        checks = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large]
        return settings(
            max_examples=examples, derandomize=True, deadline=None, database=None, suppress_health_check=checks
        )(seed(1)(test))

    return decorate


@pytest.fixture(scope='module')
def zoo(tmp_path_factory):
    """Folder of a small evaluation: audio, trials, a checkpoint; and the embeddings of its files by the plain code."""
    folder = tmp_path_factory.mktemp('zoo')
    for number, name in enumerate(NAMES):
        (folder / 'eval' / name).parent.mkdir(parents=True, exist_ok=True)
        soundfile.write(folder / 'eval' / name, wave(number, 9000), 16000, subtype='PCM_16')
    pairs = [(a, b) for a in NAMES for b in NAMES if a < b]
    (folder / 'trials.txt').write_text(''.join(f'{int(a[:3] == b[:3])} {a} {b}\n' for a, b in pairs))
    torch.manual_seed(0)
    system = ECAPAModel(0.001, 0.97, 8, 4, 0.2, 30, test_step=1, device='cpu')
    system.save_parameters(folder / 'a.model')
    yield folder
    print(f'\nzoo: {dict(COUNTS)}')


def digests(folder):
    """{path: digest} of all files below a folder."""
    return {path: hashlib.sha256(path.read_bytes()).digest() for path in Path(folder).rglob('*') if path.is_file()}


def evaluate(zoo, capsys, **options):
    """What --eval ends with: (lines of its score file, None) or (None, its sentence). Nothing it read may change."""
    out = zoo / 'out'
    shutil.rmtree(out, ignore_errors=True)
    paths = {'eval_list': zoo / 'trials.txt', 'eval_path': zoo / 'eval', 'initial_model': zoo / 'a.model'}
    before = digests(zoo)
    capsys.readouterr()
    try:
        trainECAPAModel.main(command_line('--eval', device='cpu', n_cpu=0, save_path=out, **{**paths, **options}))
    except SystemExit as stop:
        message = capsys.readouterr().err
        assert stop.code == 2 and message.startswith('error: ') and 'Traceback' not in message
        assert digests(zoo) == before
        COUNTS['refused'] += 1
        return None, message
    after = digests(zoo)
    assert {path: after[path] for path in before} == before
    COUNTS['scored'] += 1
    (scores,) = (out / 'scores').iterdir()
    return scores.read_bytes().decode('utf-8', 'surrogateescape').split('\n')[:-1], None


EMBEDDED = {}  # by the plain code, {content of a file: embeddings}


def assert_plain_scores(zoo, lines):
    """The scores in the lines `label score enrolment test` are those of the plain code."""
    encoder = plain.PlainECAPA(8)
    state = torch.load(zoo / 'a.model', weights_only=True)
    state = {name.removeprefix('speaker_encoder.'): tensor for name, tensor in state.items()}
    state.pop('speaker_loss.weight')
    encoder.load_state_dict(state)
    trials = [[str(zoo / 'eval' / name) for name in line.split()[2:]] for line in lines]
    embeddings = {}
    for path in {path for trial in trials for path in trial}:
        key = Path(path).read_bytes()
        if key not in EMBEDDED:
            EMBEDDED[key] = plain.plain_embed(encoder, [path])[path]
        embeddings[path] = EMBEDDED[key]
    expected = plain.plain_scores(embeddings, trials)
    np.testing.assert_allclose([float(line.split()[1]) for line in lines], expected, atol=1e-5)


# Bytes that go wrong, whatever they mean.


@st.composite
def damage(draw, content, header):
    """content (bytes) cut, flipped, overwritten, doubled or emptied; half of the time in its first `header` bytes."""
    content = bytearray(content)
    end = draw(st.sampled_from([min(header, len(content)), len(content)]))
    at = draw(st.integers(0, end - 1))
    kind = draw(st.sampled_from(['cut', 'flip', 'overwrite', 'remove', 'insert', 'append', 'empty']))
    if kind == 'cut':
        del content[at:]
    elif kind == 'flip':
        content[at] ^= 1 << draw(st.integers(0, 7))
    elif kind == 'overwrite':
        noise = draw(st.binary(min_size=1, max_size=8))
        content[at : at + len(noise)] = noise
    elif kind == 'remove':
        del content[at : at + draw(st.integers(1, 8))]
    elif kind == 'insert':
        content[at:at] = draw(st.binary(min_size=1, max_size=8))
    elif kind == 'append':
        content += draw(st.binary(min_size=1, max_size=40))
    else:
        content.clear()
    return bytes(content)


def audio_file(form, subtype, rate, channels, samples):
    """Bytes of an audio file of a kind."""
    file = io.BytesIO()
    audio = np.tile(wave(5, max(samples, 1))[:samples, None], channels)
    soundfile.write(file, audio, rate, format=form, subtype=subtype)
    return file.getvalue()


KINDS = [
    ('WAV', 'PCM_16'), ('WAV', 'PCM_24'), ('WAV', 'PCM_U8'), ('WAV', 'FLOAT'), ('WAV', 'DOUBLE'), ('WAV', 'ULAW'),
    ('WAVEX', 'PCM_16'), ('RF64', 'PCM_16'), ('FLAC', 'PCM_16'), ('FLAC', 'PCM_24'), ('OGG', 'VORBIS'),
]  # fmt: skip


def check_audio_file(zoo, capsys, content):
    """A file of these bytes, named wav, is scored as soundfile reads it, or refused: returns whether it is scored."""
    path = zoo / 'eval' / NAMES[1]
    good = path.read_bytes()
    path.write_bytes(content)
    try:
        lines, message = evaluate(zoo, capsys)
        if lines is None:
            assert NAMES[1] in message
        else:
            assert_plain_scores(zoo, lines)
        assert_crop(path, lines is not None)
        return lines is not None
    finally:
        path.write_bytes(good)


def is_audio(content):
    """Whether soundfile reads these bytes as finite 16 kHz mono audio, long enough for a spectrogram."""
    try:
        audio, rate = soundfile.read(io.BytesIO(content), always_2d=True)
    except soundfile.SoundFileError:
        return False
    return rate == 16000 and audio.shape[1] == 1 and len(audio) >= 257 and bool(np.isfinite(audio).all())


def assert_crop(path, usable):
    """Training reads the same samples from the file as soundfile does, or refuses it."""
    try:
        crop = read_crop(str(path), 500, random.Random(0))
    except BadInput:
        assert not usable
        return
    audio, rate = soundfile.read(path, dtype='float32')
    assert rate == 16000 and audio.ndim == 1
    start = random.Random(0).randint(0, len(audio) - 500) if len(audio) > 500 else 0
    np.testing.assert_allclose(crop, np.resize(audio[start : start + 500], 500), atol=1e-6)


@many(60)
@given(data=st.data())
def test_damaged_audio(zoo, capsys, data):
    form, subtype = data.draw(st.sampled_from(KINDS))
    content = audio_file(form, subtype, 16000, 1, 6000)
    content = data.draw(damage(content, header=120))
    scored = check_audio_file(zoo, capsys, content)
    assert is_audio(content) or not scored


@pytest.mark.parametrize('form, subtype', KINDS)
@pytest.mark.parametrize('rate, channels', [(16000, 1), (8000, 1), (44100, 1), (16000, 2)])
def test_kinds_of_audio(zoo, capsys, form, subtype, rate, channels):
    content = audio_file(form, subtype, rate, channels, 6000)
    assert check_audio_file(zoo, capsys, content) == ((rate, channels) == (16000, 1))


@pytest.mark.parametrize('form', ['WAV', 'FLAC'])
@pytest.mark.parametrize('samples', [0, 1, 256, 257])
def test_short_audio(zoo, capsys, form, samples):
    assert check_audio_file(zoo, capsys, audio_file(form, 'PCM_16', 16000, 1, samples)) == (samples >= 257)


@pytest.mark.parametrize('announced', [0, 1, 2, 11998, 11999, 12001, 12002, 2**31 - 2**16 - 2, 2**31 - 2, 2**32 - 1])
def test_headers_that_lie_about_the_length(zoo, capsys, announced):
    content = audio_file('WAV', 'PCM_16', 16000, 1, 6000)
    assert content[36:40] == b'data'
    check_audio_file(zoo, capsys, content[:40] + struct.pack('<I', announced) + content[44:])


def test_a_cut_file_is_refused_and_a_streamed_one_is_not(zoo, capsys):
    """What a program writes that cannot go back to the header announces no true length."""
    content = audio_file('WAV', 'PCM_16', 16000, 1, 6000)
    path = zoo / 'eval' / NAMES[1]
    good = path.read_bytes()
    for announced, refused in ((12002, True), (2**32 - 1, False)):
        path.write_bytes(content[:40] + struct.pack('<I', announced) + content[44:])
        lines, message = evaluate(zoo, capsys)
        assert (message is not None and 'cut short' in message) if refused else len(lines) == 6
    path.write_bytes(good)


# Lists.


LINES = st.sampled_from(
    [f'{int(a[:3] == b[:3])} {a} {b}'.encode() for a in NAMES for b in NAMES]
    + [
        b'', b'  ', b'\t', b'1', b'1 ' + NAMES[0].encode(), b'2 ' + ' '.join(NAMES[:2]).encode(),
        b'yes ' + ' '.join(NAMES[:2]).encode(), b'1.0 ' + ' '.join(NAMES[:2]).encode(),
        b'1\t' + '\t'.join(NAMES[:2]).encode(), b' 0  ' + '  '.join(NAMES[1:3]).encode() + b' ',
        b'1 ' + ' '.join(NAMES[:3]).encode(), b'1 /etc/passwd ' + NAMES[0].encode(), b'0 nowhere.wav nowhere.wav',
        b'1 \xff\xfe.wav ' + NAMES[0].encode(), '0 größe.wav été.wav'.encode(), b'\x00\x00\x00', b'# a comment',
        b'1 "id1/with space.wav" ' + NAMES[0].encode(), b'\xef\xbb\xbf1 ' + ' '.join(NAMES[:2]).encode(),
        b'1 ./' + NAMES[0].encode() + b' ../eval/' + NAMES[1].encode(), b'1 id1 id2',
    ]
)  # fmt: skip


@many(60)
@given(lines=st.lists(LINES, max_size=8), newline=st.sampled_from([b'\n', b'\r\n', b'\r']), last=st.booleans())
def test_trial_lists(zoo, capsys, lines, newline, last):
    """A list is scored if str.split finds three fields in every line that has any, labels 1 and 0, and files."""
    content = newline.join(lines) + newline * last
    assert check_trial_list(zoo, capsys, content) == is_trial_list(content)


@many(30)
@given(data=st.data())
def test_damaged_trial_lists(zoo, capsys, data):
    content = data.draw(damage((zoo / 'trials.txt').read_bytes(), header=60))
    assert check_trial_list(zoo, capsys, content) == is_trial_list(content)


def trial_rows(content):
    """Fields of each line that has any. Lines end where a text file's do; splitlines would end them at a form feed."""
    return [line.split() for line in content.split(b'\n') if line.split()]


def is_trial_list(content):
    """Whether these bytes are trials of both kinds among files that exist."""
    rows = trial_rows(content)
    existing = {f'{folder}{name}'.encode() for name in NAMES for folder in ('', './', '../eval/')}
    right = all(len(row) == 3 and row[0] in (b'0', b'1') and existing.issuperset(row[1:]) for row in rows)
    return right and {row[0] for row in rows} == {b'0', b'1'}


def check_trial_list(zoo, capsys, content):
    """--eval of a list of these bytes gives the plain scores, line by line, or a sentence: returns whether scores."""
    path = zoo / 'list.txt'
    path.write_bytes(content)
    lines, message = evaluate(zoo, capsys, eval_list=path)
    if lines is None:
        assert 'list.txt' in message or '--eval_list' in message
        return False
    assert [[line.split()[i].encode() for i in (0, 2, 3)] for line in lines] == trial_rows(content)
    assert_plain_scores(zoo, lines)
    return True


@pytest.fixture(scope='module')
def training(tmp_path_factory):
    """Options of a training set of four utterances by two speakers, and its list's lines."""
    folder = tmp_path_factory.mktemp('training')
    for name in ['musan/noise/a.wav', 'musan/speech/a.wav', 'musan/music/a.wav', 'rirs/a.wav', *NAMES]:
        path = folder / ('train/' + name if name in NAMES else name)
        path.parent.mkdir(parents=True, exist_ok=True)
        soundfile.write(path, wave(1, 9000), 16000, subtype='PCM_16')
    options = {name: str(folder / name.split('_')[0].replace('rir', 'rirs')) for name in ('musan_path', 'rir_path')}
    return {**options, 'train_path': str(folder / 'train'), 'train_list': str(folder / 'train.txt')}


TRAIN_LINES = st.sampled_from(
    [f'{name[:3]} {name}'.encode() for name in NAMES]
    + [b'', b' \t', b'id1', b'id1 a b', b'\xff\xfe x.wav', 'ötzi é.wav'.encode(), b'id1\t' + NAMES[0].encode()]
    + [b'  id2   ' + NAMES[2].encode() + b'  ', b'\x00 \x00', b'id1 "a b.wav"']
)


@many(60)
@given(lines=st.lists(TRAIN_LINES, max_size=8), newline=st.sampled_from([b'\n', b'\r\n']))
def test_training_lists(training, lines, newline):
    """Labels are the places of the speakers in their sorted set; other lines than `speaker path` are refused."""
    Path(training['train_list']).write_bytes(newline.join(lines))
    rows = [line.split() for line in lines if line.split()]
    try:
        dataset = train_loader(**training, num_frames=20)
    except BadInput as error:
        COUNTS['refused'] += 1
        assert '--train_list' in str(error)
        assert not rows or any(len(row) != 2 for row in rows)
        bad = [number for number, line in enumerate(lines, 1) if len(line.split()) not in (0, 2)]
        assert all(f'line {number}:' in str(error) for number in bad)
        return
    COUNTS['scored'] += 1
    assert all(len(row) == 2 for row in rows)
    speakers = sorted({row[0] for row in rows})
    assert dataset.labels.tolist() == [speakers.index(row[0]) for row in rows]
    assert [dataset.names[i] for i in range(len(dataset))] == [
        row[1].decode('utf-8', 'surrogateescape') for row in rows
    ]


# Checkpoints.


@many(50)
@given(data=st.data())
def test_damaged_checkpoints(zoo, capsys, data):
    """A damaged checkpoint scores as the whole one, where the damage is in a byte that nothing reads, or not at all."""
    good = (zoo / 'a.model').read_bytes()
    content = data.draw(damage(good, header=4000) | damage(good[::-1], header=9000).map(lambda content: content[::-1]))
    path = zoo / 'damaged.model'
    path.write_bytes(content)
    lines, message = evaluate(zoo, capsys, initial_model=path)
    if lines is None:
        assert 'damaged.model' in message
    else:
        assert_plain_scores(zoo, lines)


class Payload:
    """A pickle that runs code when it is loaded."""

    def __reduce__(self):
        return exec, ('raise SystemError("executed")',)


def tamper(change):
    """Makes a state dict of the whole checkpoint's, changed."""

    def make(zoo, path):
        state = torch.load(zoo / 'a.model', weights_only=True)
        torch.save(change(state) or state, path)

    return make


WEIGHT = 'speaker_encoder.layer1.conv1.weight'
FOREIGN = {
    'empty': (lambda zoo, path: path.write_bytes(b''), 'empty (0 bytes)'),
    'text': (lambda zoo, path: path.write_text('version https://git-lfs.github.com'), 'git-lfs'),
    'audio': (lambda zoo, path: shutil.copy(zoo / 'eval' / NAMES[0], path), 'RIFF'),
    'an archive': (lambda zoo, path: np.savez(open(path, 'wb'), a=1), 'damaged.model'),
    'code': (lambda zoo, path: torch.save({'a': Payload()}, path), 'would run code on loading'),
    'old code': (
        lambda zoo, path: torch.save(Payload(), path, _use_new_zipfile_serialization=False),
        'would run code on loading',
    ),
    'a tensor': (lambda zoo, path: torch.save(torch.zeros(3), path), 'flat dictionary'),
    'a list': (lambda zoo, path: torch.save([1], path), 'flat dictionary'),
    'nested': (tamper(lambda state: {'model': state}), 'flat dictionary'),
    'numbers as names': (tamper(lambda state: dict(enumerate(state.values()))), 'flat dictionary'),
    'a module': (lambda zoo, path: torch.save(torch.nn.Linear(2, 2), path), 'Linear'),
    'other channels': (
        tamper(lambda state: state.update({'speaker_encoder.conv1.weight': torch.zeros(16, 80, 5)})),
        'does not fit',
    ),
    'a tensor more': (tamper(lambda state: state.update({'speaker_encoder.extra': torch.zeros(1)})), 'extra'),
    'a tensor less': (tamper(lambda state: state.pop(WEIGHT) is None), WEIGHT),
    'a NaN': (tamper(lambda state: state[WEIGHT].view(-1)[3].fill_(float('nan')) is None), WEIGHT),
    'an infinity': (tamper(lambda state: state[WEIGHT].view(-1)[3].fill_(float('inf')) is None), WEIGHT),
}  # fmt: skip


@pytest.mark.parametrize('kind', FOREIGN)
def test_foreign_checkpoints(zoo, capsys, kind):
    make, words = FOREIGN[kind]
    path = zoo / 'damaged.model'
    path.unlink(missing_ok=True)
    make(zoo, path)
    lines, message = evaluate(zoo, capsys, initial_model=path)
    assert lines is None and words in message
