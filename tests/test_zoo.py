"""A zoo of bad inputs: mutated lists, audio and checkpoints.

They end in the right numbers or in a sentence, never otherwise. The right numbers are those of what
is there after the mutation, read by other means: soundfile for audio, str.split for lists.
Hypothesis draws the mutations, the same ones in every run.
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
from cli import command_line
from conftest import wave
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st

import trainECAPAModel
from dataLoader import read_crop, train_loader
from ECAPAModel import ECAPAModel
from tools import BadInput

pytestmark = pytest.mark.usefixtures('short_crops')
NAMES = [f'id{speaker}/session/{number:05d}.wav' for speaker in (1, 2) for number in range(2)]
PAIRS = [(a, b) for a in NAMES for b in NAMES]
COUNTS = Counter()


def trial_line(a, b):
    """`label a b`: the label is 1 if both files are of one speaker."""
    label = int(a[:3] == b[:3])
    return f'{label} {a} {b}'


def many(examples):
    """Decorator: as many examples, always the same."""
    limits = settings(
        max_examples=examples,
        derandomize=True,
        deadline=None,
        database=None,
        suppress_health_check=[
            HealthCheck.function_scoped_fixture,
            HealthCheck.too_slow,
            HealthCheck.data_too_large,
        ],
    )

    def decorate(test):
        return limits(seed(1)(test))

    return decorate


@pytest.fixture(scope='module')
def zoo(tmp_path_factory):
    """Folder of a small evaluation: audio, trials and a checkpoint."""
    folder = tmp_path_factory.mktemp('zoo')
    for number, name in enumerate(NAMES):
        path = folder / 'eval' / name
        path.parent.mkdir(parents=True, exist_ok=True)
        soundfile.write(path, wave(number, 9000), 16000, subtype='PCM_16')

    lines = [trial_line(a, b) for a, b in PAIRS if a < b]
    (folder / 'trials.txt').write_text(''.join(f'{line}\n' for line in lines))

    torch.manual_seed(0)
    system = ECAPAModel(0.001, 0.97, 8, 4, 0.2, 30, test_step=1, device='cpu')
    system.save_parameters(folder / 'a.model')

    yield folder
    print(f'\nzoo: {dict(COUNTS)}')


def digests(folder):
    """{path: digest} of all files below a folder."""
    files = [path for path in Path(folder).rglob('*') if path.is_file()]
    return {path: hashlib.sha256(path.read_bytes()).digest() for path in files}


def evaluate(zoo, capsys, **options):
    """What --eval ends with: (lines of its score file, None) or (None, its sentence).

    Nothing that it read may change.
    """
    out = zoo / 'out'
    shutil.rmtree(out, ignore_errors=True)
    paths = {
        'eval_list': zoo / 'trials.txt',
        'eval_path': zoo / 'eval',
        'initial_model': zoo / 'a.model',
        'save_path': out,
    }
    paths.update(options)
    arguments = command_line('--eval', device='cpu', n_cpu=0, **paths)

    before = digests(zoo)
    capsys.readouterr()
    try:
        trainECAPAModel.main(arguments)
    except SystemExit as stop:
        message = capsys.readouterr().err
        assert stop.code == 2
        assert message.startswith('error: ')
        assert 'Traceback' not in message
        assert digests(zoo) == before
        COUNTS['refused'] += 1
        return None, message

    after = digests(zoo)
    assert {path: after[path] for path in before} == before
    COUNTS['scored'] += 1
    (scores,) = (out / 'scores').iterdir()
    text = scores.read_bytes().decode('utf-8', 'surrogateescape')
    return text.split('\n')[:-1], None


EMBEDDED = {}  # by the plain code, {content of a file: embeddings}


def plain_encoder(zoo):
    """The plain encoder with the weights of the zoo's checkpoint."""
    state = torch.load(zoo / 'a.model', weights_only=True)
    del state['speaker_loss.weight']
    encoder = plain.PlainECAPA(8)
    encoder.load_state_dict(
        {name.removeprefix('speaker_encoder.'): tensor for name, tensor in state.items()}
    )
    return encoder


def assert_plain_scores(zoo, lines):
    """The scores in the lines `label score enrolment test` are those of the plain code."""
    encoder = plain_encoder(zoo)
    scores = []
    trials = []
    for line in lines:
        _, score, *names = line.split()
        scores.append(float(score))
        trials.append([str(zoo / 'eval' / name) for name in names])

    embeddings = {}
    for path in {path for trial in trials for path in trial}:
        content = Path(path).read_bytes()
        if content not in EMBEDDED:
            EMBEDDED[content] = plain.plain_embed(encoder, [path])[path]
        embeddings[path] = EMBEDDED[content]
    np.testing.assert_allclose(scores, plain.plain_scores(embeddings, trials), atol=1e-5)


# Bytes that go wrong, whatever they mean.


@st.composite
def damage(draw, content, header):
    """content (bytes) cut, flipped, overwritten, lengthened or emptied.

    Half of the time the damage is in its first `header` bytes.
    """
    kinds = ['cut', 'flip', 'overwrite', 'remove', 'insert', 'append', 'empty']
    content = bytearray(content)
    end = draw(st.sampled_from([min(header, len(content)), len(content)]))
    at = draw(st.integers(0, end - 1))
    kind = draw(st.sampled_from(kinds))

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
    mono = wave(5, max(samples, 1))[:samples, None]
    audio = np.tile(mono, channels)
    file = io.BytesIO()
    soundfile.write(file, audio, rate, format=form, subtype=subtype)
    return file.getvalue()


KINDS = [
    ('WAV', 'PCM_16'),
    ('WAV', 'PCM_24'),
    ('WAV', 'PCM_U8'),
    ('WAV', 'FLOAT'),
    ('WAV', 'DOUBLE'),
    ('WAV', 'ULAW'),
    ('WAVEX', 'PCM_16'),
    ('RF64', 'PCM_16'),
    ('FLAC', 'PCM_16'),
    ('FLAC', 'PCM_24'),
    ('OGG', 'VORBIS'),
]


def check_audio_file(zoo, capsys, content):
    """A file of these bytes, named wav, is scored as soundfile reads it, or refused.

    Returns whether it is scored.
    """
    path = zoo / 'eval' / NAMES[1]
    good = path.read_bytes()
    path.write_bytes(content)
    try:
        lines, message = evaluate(zoo, capsys)
        scored = lines is not None
        if scored:
            assert_plain_scores(zoo, lines)
        else:
            assert NAMES[1] in message
        assert_crop(path, scored)
        return scored
    finally:
        path.write_bytes(good)


def is_audio(content):
    """Whether soundfile reads these bytes as finite 16 kHz mono audio for a spectrogram."""
    try:
        audio, rate = soundfile.read(io.BytesIO(content), always_2d=True)
    except soundfile.SoundFileError:
        return False

    samples, channels = audio.shape
    long_enough = samples >= 257
    return rate == 16000 and channels == 1 and long_enough and bool(np.isfinite(audio).all())


def assert_crop(path, usable):
    """Training reads the same samples from the file as soundfile does, or refuses it."""
    try:
        crop = read_crop(str(path), 500, random.Random(0))
    except BadInput:
        assert not usable
        return

    audio, rate = soundfile.read(path, dtype='float32')
    assert rate == 16000
    assert audio.ndim == 1
    start = random.Random(0).randint(0, len(audio) - 500) if len(audio) > 500 else 0
    expected = np.resize(audio[start : start + 500], 500)
    np.testing.assert_allclose(crop, expected, atol=1e-6)


@many(60)
@given(data=st.data())
def test_damaged_audio(zoo, capsys, data):
    form, subtype = data.draw(st.sampled_from(KINDS))
    good = audio_file(form, subtype, 16000, 1, 6000)
    content = data.draw(damage(good, header=120))
    scored = check_audio_file(zoo, capsys, content)
    assert is_audio(content) or not scored


@pytest.mark.parametrize('form, subtype', KINDS)
@pytest.mark.parametrize('rate, channels', [(16000, 1), (8000, 1), (44100, 1), (16000, 2)])
def test_kinds_of_audio(zoo, capsys, form, subtype, rate, channels):
    content = audio_file(form, subtype, rate, channels, 6000)
    usable = (rate, channels) == (16000, 1)
    assert check_audio_file(zoo, capsys, content) == usable


@pytest.mark.parametrize('form', ['WAV', 'FLAC'])
@pytest.mark.parametrize('samples', [0, 1, 256, 257])
def test_short_audio(zoo, capsys, form, samples):
    content = audio_file(form, 'PCM_16', 16000, 1, samples)
    long_enough = samples >= 257
    assert check_audio_file(zoo, capsys, content) == long_enough


def announce(content, size):
    """A wav file (bytes) whose header gives another size of the samples, in bytes."""
    return content[:40] + struct.pack('<I', size) + content[44:]


@pytest.mark.parametrize(
    'announced',
    [1, 2, 11998, 11999, 12001, 12002, 2**31 - 2**16 - 2, 2**31 - 2, 2**32 - 1],
)
def test_headers_that_lie_about_the_length(zoo, capsys, announced):
    content = audio_file('WAV', 'PCM_16', 16000, 1, 6000)
    assert content[36:40] == b'data'
    check_audio_file(zoo, capsys, announce(content, announced))


def test_a_cut_file_is_refused_and_a_streamed_one_is_not(zoo, capsys):
    """What a program writes that cannot go back to the header announces no true length."""
    content = audio_file('WAV', 'PCM_16', 16000, 1, 6000)
    path = zoo / 'eval' / NAMES[1]
    good = path.read_bytes()

    path.write_bytes(announce(content, 12002))
    _, message = evaluate(zoo, capsys)
    assert message is not None
    assert 'cut short' in message

    path.write_bytes(announce(content, 2**32 - 1))
    lines, _ = evaluate(zoo, capsys)
    assert len(lines) == 6

    path.write_bytes(good)


# Lists.


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
def test_trial_lists(zoo, capsys, lines, newline, last):
    """A list is scored if str.split finds trials in it.

    These are three fields in every line that has any: labels 1 and 0, and files. last: whether the
    last line is ended, too.
    """
    content = newline.join(lines)
    if last:
        content += newline
    assert check_trial_list(zoo, capsys, content) == is_trial_list(content)


@many(30)
@given(data=st.data())
def test_damaged_trial_lists(zoo, capsys, data):
    good = (zoo / 'trials.txt').read_bytes()
    content = data.draw(damage(good, header=60))
    assert check_trial_list(zoo, capsys, content) == is_trial_list(content)


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


def check_trial_list(zoo, capsys, content):
    """--eval of a list of these bytes gives the plain scores, line by line, or a sentence.

    Returns whether it gives scores.
    """
    path = zoo / 'list.txt'
    path.write_bytes(content)
    lines, message = evaluate(zoo, capsys, eval_list=path)
    if lines is None:
        assert 'list.txt' in message or '--eval_list' in message
        return False

    trials = []
    for line in lines:
        label, _, enrolment, test = line.split()
        trials.append([label.encode(), enrolment.encode(), test.encode()])
    assert trials == trial_rows(content)
    assert_plain_scores(zoo, lines)
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

    Other lines than `speaker path`, and bytes that are not text, are refused.
    """
    Path(training['train_list']).write_bytes(newline.join(lines))
    rows = [line.split() for line in lines if line.split()]

    try:
        dataset = train_loader(**training, num_frames=20)
    except BadInput as error:
        COUNTS['refused'] += 1
        assert '--train_list' in str(error)
        if b'\x00' in b''.join(lines):
            return
        assert not rows or any(len(row) != 2 for row in rows)
        bad = [number for number, line in enumerate(lines, 1) if len(line.split()) not in (0, 2)]
        assert all(f'line {number}:' in str(error) for number in bad)
        return

    COUNTS['scored'] += 1
    assert all(len(row) == 2 for row in rows)
    speakers = sorted({speaker for speaker, _ in rows})
    assert dataset.labels.tolist() == [speakers.index(speaker) for speaker, _ in rows]
    names = [name.decode('utf-8', 'surrogateescape') for _, name in rows]
    assert [dataset.names[i] for i in range(len(dataset))] == names


# Checkpoints.


@many(50)
@given(data=st.data())
def test_damaged_checkpoints(zoo, capsys, data):
    """A damaged checkpoint scores as the whole one or not at all.

    It scores where the damage is in a byte that nothing reads.
    """
    good = (zoo / 'a.model').read_bytes()
    at_the_head = damage(good, header=4000)
    at_the_tail = damage(good[::-1], header=9000).map(lambda content: content[::-1])
    path = zoo / 'damaged.model'
    path.write_bytes(data.draw(at_the_head | at_the_tail))

    lines, message = evaluate(zoo, capsys, initial_model=path)
    if lines is None:
        assert 'damaged.model' in message
    else:
        assert_plain_scores(zoo, lines)


class Payload:
    """A pickle that runs code when it is loaded."""

    def __reduce__(self):
        return exec, ('raise SystemError("executed")',)


WEIGHT = 'speaker_encoder.layer1.conv1.weight'


def tamper(change):
    """Writes a checkpoint with the state dict of the whole one, after change(state).

    What `change` returns, if anything, takes the place of the state dict.
    """

    def make(zoo, path):
        state = torch.load(zoo / 'a.model', weights_only=True)
        changed = change(state)
        if changed is not None:
            state = changed
        torch.save(state, path)

    return make


def other_channels(state):
    state['speaker_encoder.conv1.weight'] = torch.zeros(16, 80, 5)


def a_tensor_more(state):
    state['speaker_encoder.extra'] = torch.zeros(1)


def a_tensor_less(state):
    del state[WEIGHT]


def a_nan(state):
    state[WEIGHT].view(-1)[3] = float('nan')


def an_infinity(state):
    state[WEIGHT].view(-1)[3] = float('inf')


def old_code(zoo, path):
    torch.save(Payload(), path, _use_new_zipfile_serialization=False)


FOREIGN = {
    'empty': (lambda zoo, path: path.write_bytes(b''), 'empty (0 bytes)'),
    'text': (
        lambda zoo, path: path.write_text('version https://git-lfs.github.com'),
        'git lfs pull',
    ),
    'audio': (lambda zoo, path: shutil.copy(zoo / 'eval' / NAMES[0], path), 'RIFF'),
    'an archive': (lambda zoo, path: np.savez(open(path, 'wb'), a=1), 'damaged.model'),
    'code': (lambda zoo, path: torch.save({'a': Payload()}, path), 'would run code on loading'),
    'old code': (old_code, 'would run code on loading'),
    'a tensor': (lambda zoo, path: torch.save(torch.zeros(3), path), 'flat dictionary'),
    'a list': (lambda zoo, path: torch.save([1], path), 'flat dictionary'),
    'nested': (tamper(lambda state: {'model': state}), 'flat dictionary'),
    'numbers as names': (tamper(lambda state: dict(enumerate(state.values()))), 'flat dictionary'),
    'a module': (lambda zoo, path: torch.save(torch.nn.Linear(2, 2), path), 'Linear'),
    'other channels': (tamper(other_channels), 'does not fit'),
    'a tensor more': (tamper(a_tensor_more), 'extra'),
    'a tensor less': (tamper(a_tensor_less), WEIGHT),
    'a NaN': (tamper(a_nan), WEIGHT),
    'an infinity': (tamper(an_infinity), WEIGHT),
}


@pytest.mark.parametrize('kind', FOREIGN)
def test_foreign_checkpoints(zoo, capsys, kind):
    make, words = FOREIGN[kind]
    path = zoo / 'damaged.model'
    path.unlink(missing_ok=True)
    make(zoo, path)
    lines, message = evaluate(zoo, capsys, initial_model=path)
    assert lines is None
    assert words in message
