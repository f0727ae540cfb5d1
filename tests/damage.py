"""Damages files at random, and evaluates the rest, beside the plain code.

Hypothesis draws the damage, the same in every run.
"""

import hashlib
import shutil
from pathlib import Path

import numpy as np
import plain
import torch
from cli import evaluate
from conftest import make_system, wave, write_wav
from hypothesis import HealthCheck, seed, settings
from hypothesis import strategies as st

NAMES = [f'id{speaker}/session/{number:05d}.wav' for speaker in (1, 2) for number in range(2)]
PAIRS = [(a, b) for a in NAMES for b in NAMES]
EMBEDDED = {}  # {content of a file: its embeddings by the plain code}


def make_small_evaluation(folder):
    """Writes the audio of NAMES, trials and a checkpoint."""
    for number, name in enumerate(NAMES):
        write_wav(folder / 'eval' / name, wave(number, 9000), subtype='PCM_16')
    lines = [trial_line(a, b) for a, b in PAIRS if a < b]
    (folder / 'trials.txt').write_text(''.join(f'{line}\n' for line in lines))
    torch.manual_seed(0)
    make_system().save_parameters(folder / 'a.model')


def trial_line(a, b):
    """`label a b`: the label is 1 if both files are of one speaker."""
    label = int(a[:3] == b[:3])
    return f'{label} {a} {b}'


def many(examples):
    """Decorates a test of Hypothesis: so many examples, the same in every run."""
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


def digests(folder):
    """{path: digest} of all files below a folder."""
    files = [path for path in Path(folder).rglob('*') if path.is_file()]
    return {path: hashlib.sha256(path.read_bytes()).digest() for path in files}


def outcome(folder, capsys, **options):
    """Returns (lines of its score file, None) of --eval, or (None, its message).

    Nothing that it reads may change, and a refusal writes nothing.
    """
    shutil.rmtree(folder / 'out', ignore_errors=True)
    tree = {
        'eval_list': folder / 'trials.txt',
        'eval_path': folder / 'eval',
        'save_path': folder / 'out',
    }
    tree |= options
    before = digests(folder)
    capsys.readouterr()
    try:
        evaluate(tree, tree.pop('initial_model', folder / 'a.model'))
    except SystemExit as stop:
        message = capsys.readouterr().err
        assert stop.code == 2
        assert message.startswith('error: ')
        assert 'Traceback' not in message
        assert digests(folder) == before
        return None, message

    after = digests(folder)
    assert {path: after[path] for path in before} == before
    (scores,) = (folder / 'out/scores').iterdir()
    text = scores.read_bytes().decode('utf-8', 'surrogateescape')
    return text.split('\n')[:-1], None


def plain_encoder(folder):
    """The plain encoder with the weights of the checkpoint."""
    state = torch.load(folder / 'a.model', weights_only=True)
    del state['speaker_loss.weight']
    encoder = plain.PlainECAPA(8)
    encoder.load_state_dict(
        {name.removeprefix('speaker_encoder.'): tensor for name, tensor in state.items()}
    )
    return encoder


def assert_plain_scores(folder, lines):
    """The scores in the lines `label score enrolment test` are those of the plain code."""
    encoder = plain_encoder(folder)
    scores = []
    trials = []
    for line in lines:
        _, score, *names = line.split()
        scores.append(float(score))
        trials.append([str(folder / 'eval' / name) for name in names])

    embeddings = {}
    for path in {path for trial in trials for path in trial}:
        content = Path(path).read_bytes()
        if content not in EMBEDDED:
            EMBEDDED[content] = plain.plain_embed(encoder, [path])[path]
        embeddings[path] = EMBEDDED[content]
    np.testing.assert_allclose(scores, plain.plain_scores(embeddings, trials), atol=1e-5)
