"""Is README's page "To change one thing" true? Its changes, at its places, in a copy of this code.

A small encoder, a second loss, an augmentation with its own share, and a schedule.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from cli import command_line

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[1]

# (file, the text before which the change is inserted, the change)
CHANGES = [
    (
        'loss.py',
        '\n\nLOSSES = {',
        '''

class CosFace(AAMsoftmax):
    """Additive margin on the cosine (Wang et al., CosFace, CVPR 2018)."""

    def forward(self, x, label):
        cosine = F.linear(F.normalize(x), F.normalize(self.weight))
        margin = self.m * F.one_hot(label, cosine.shape[1])
        logits = self.s * (cosine - margin)
        return F.cross_entropy(logits, label), accuracy(logits.detach(), label)[0]
''',
    ),
    ('loss.py', '}\n\n\ndef loss_of', ", 'cosface': CosFace"),
    (
        'model.py',
        '\n\nENCODERS = {',
        '''

class SmallNet(Encoder):
    """A 2-D convolution with strides of 2 and the mean over time."""

    embedding_size = 64

    def __init__(self, C):
        super().__init__()
        self.body = nn.Conv2d(1, C, kernel_size=3, stride=2, padding=1)
        self.norm = BatchNorm(C)
        self.head = nn.Linear(40 * C, self.embedding_size)

    def encode(self, x, frames=None):
        x = x.unsqueeze(1)  # (B, 1, 80, T)
        x = self.norm(self.body(x).relu()).flatten(1, 2)  # (B, 40 C, T / 2)
        if frames is not None:
            frames = (frames + 1) // 2
        return self.head(mean_over_time(x, mask_of(frames, x)))

    @staticmethod
    def channels_of(state):
        return len(state['body.weight']) if 'body.weight' in state else None
''',
    ),
    ('model.py', '}\n\n\ndef encoder_of', ", 'small': SmallNet"),
    (
        'dataLoader.py',
        '\n\nclass NoiseFiles',
        '''

def drop_part(audio, rng):
    """Silences a tenth of a crop."""
    audio = audio.copy()
    length = len(audio) // 10
    start = rng.randrange(len(audio) - length)
    audio[start : start + length] = 0
    return audio
''',
    ),
    ('dataLoader.py', '**published,\n', 'drop=0.0, '),
    ('dataLoader.py', '        self.codecs = usable', '        self.drop = drop\n'),
    (
        'dataLoader.py',
        '        if rng.random() >= self.augment_share:',
        """        if self.drop and rng.random() < self.drop:
            audio = drop_part(audio, rng)
""",
    ),
    (
        'trainECAPAModel.py',
        "    add('--speed_perturb'",
        "    add('--drop', type=in_range(float, 0, 1), default=0.0, help='share with a gap')\n",
    ),
    (
        'ECAPAModel.py',
        "        elif self.schedule == 'cosine':",
        """        elif self.schedule == 'linear':
            rate = self.lr * (1 - ramp(epochs_done, 0, self.max_epoch))
""",
    ),
    ('trainECAPAModel.py', "'cosine'), default='step'", "'linear', "),
]

# Runs in the copy, in one process: the imports take longest.
DRIVER = """
import json, sys
import trainECAPAModel
from exps import average, embed, verify

mains = {'train': trainECAPAModel, 'average': average, 'embed': embed, 'verify': verify}
for command, *arguments in json.load(sys.stdin):
    status = 0
    try:
        mains[command].main(arguments)
    except SystemExit as stop:
        status = stop.code
    print('status', status, flush=True)
"""


@pytest.fixture
def copy(tmp_path):
    """A copy of this repository with the changes."""
    folder = tmp_path / 'copy'
    shutil.copytree(ROOT, folder, ignore=shutil.ignore_patterns('.*', 'tests', 'open', 'demo/data'))
    for name, anchor, change in CHANGES:
        text = (folder / name).read_text()
        assert text.count(anchor) == 1, (name, anchor)
        (folder / name).write_text(text.replace(anchor, change + anchor))
    return folder


def test_the_page_names_the_places():
    page = (ROOT / 'README.md').read_text().partition('## To change one thing')[2]
    for place in ('LOSSES', 'ENCODERS', 'train_loader.augment', 'make_parser', 'rate_at'):
        assert place in page
    for name in {name for name, _, _ in CHANGES}:
        assert f'`{name}`' in page


def test_four_changes_are_trained_killed_continued_and_used(copy, tree, tmp_path):
    options = {'C': 8, 'num_frames': 20, 'batch_size': 4, 'n_cpu': 0, 'device': 'cpu'}
    options |= {'max_epoch': 3, **tree}
    options |= {'encoder': 'small', 'loss': 'cosface', 'drop': 0.5, 'schedule': 'linear'}
    straight = options | {'save_path': tmp_path / 'straight'}
    killed = options | {'save_path': tmp_path / 'killed'}
    train_until_killed(copy, killed)

    models = [tmp_path / name / 'model/model_0003.model' for name in ('straight', 'killed')]
    scoring = {'initial_model': models[1], 'device': 'cpu', 'n_cpu': 0}
    lists = {name: tree[name] for name in ('eval_list', 'eval_path')}
    recordings = sorted(str(path) for path in Path(tree['eval_path']).rglob('*.wav'))
    mean = {'out': tmp_path / 'mean.model'}
    ran, output = run_all(
        copy,
        [
            ['train', *command_line(**killed)],
            ['train', *command_line(**straight)],
            ['average', str(models[0]), str(models[1]), *command_line(**mean)],
            ['train', '--eval', *command_line(**scoring, **lists, save_path=tmp_path / 'killed')],
            ['embed', tree['eval_path'], *command_line(**scoring, out=tmp_path / 'e.npz')],
            ['verify', *recordings[:2], *command_line(**scoring)],
            ['train', *command_line(**killed | {'max_epoch': 4, 'encoder': 'ecapa'})],
            ['train', *command_line(**killed | {'loss': 'aam'})],
            ['train', *command_line(**killed | {'drop': 0.25})],
        ],
    )
    assert ran == [0, 0, 0, 0, 0, 0, 2, 2, 2], output
    scores = [(tmp_path / name / 'score.txt').read_text() for name in ('straight', 'killed')]
    assert scores[0] == scores[1]
    assert scores[0].count('\n') == 3
    assert f'{len(recordings)} embeddings of 64 numbers' in output
    for option in ('--encoder ecapa (was small)', '--loss aam (was cosface)', '--drop 0.25'):
        assert option in output


def train_until_killed(copy, options):
    """Trains in the copy, and kills the process after its first checkpoint."""
    command = [sys.executable, 'trainECAPAModel.py', *command_line(**options)]
    process = subprocess.Popen(command, cwd=copy, stdout=subprocess.DEVNULL)
    first = Path(options['save_path'], 'model/model_0001.model')
    deadline = time.time() + 120
    while not first.exists() and process.poll() is None and time.time() < deadline:
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert first.exists()


def run_all(copy, commands):
    """Runs commands in the copy; returns their exit statuses, and all that they printed."""
    process = subprocess.run(
        [sys.executable, '-c', DRIVER],
        input=json.dumps(commands),
        cwd=copy,
        env={**os.environ, 'PYTHONPATH': str(copy)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    output = process.stdout
    statuses = [line for line in output.splitlines() if line.startswith('status ')]
    return [int(line.split()[1]) for line in statuses], output
