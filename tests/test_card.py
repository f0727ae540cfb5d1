"""Does the model in exps/open know the answers, and does its card tell the truth?"""

import itertools
import json
import re
from pathlib import Path

import numpy as np
import pytest
from conftest import wave, write_wav

from ECAPAModel import load_model
from exps import scoring
from tools import sha256

OPEN = Path(__file__).parents[1] / 'exps/open'
# Cosines by the shipped model of the sounds wave(first), wave(second).
KNOWN = {(0, 1): 0.9426, (0, 2): 0.8588, (0, 3): 0.8382, (1, 2): 0.9256, (2, 3): 0.9536}


@pytest.fixture(scope='module')
def shipped():
    return load_model(OPEN / 'open.model', device='cpu', precision='fp32')


def test_the_shipped_model_gives_the_known_scores(shipped, tmp_path):
    paths = [write_wav(tmp_path / f'{number}.wav', wave(number, 48000)) for number in range(4)]
    embeddings = shipped.embed(paths)
    for (first, second), cosine in KNOWN.items():
        # float32 sums of a thousand products in another order differ by some 1e-5. Another window,
        # mel bands that are shifted by one bin, or variances that are 10 % larger change some of
        # these cosines by 0.006 or more.
        assert embeddings[first] @ embeddings[second] == pytest.approx(cosine, abs=2e-3)


def test_it_tells_people_apart(shipped, minivox):
    """Ten people that it was not trained on: fewer than one decision in ten is wrong."""
    files = []
    for person in sorted((minivox / 'eval').iterdir()):
        files += sorted(person.rglob('*.*'))[:3]
    pairs = np.array(list(itertools.combinations(range(len(files)), 2)))
    embeddings = shipped.embed_files([str(file) for file in files])
    scores = scoring.score_kinds(embeddings, pairs)['raw']
    calibration = json.loads((OPEN / 'calibration.json').read_text())
    decided_same = calibration['weight'] * scores + calibration['bias'] > 0
    same = pairs[:, 0] // 3 == pairs[:, 1] // 3
    assert np.mean(decided_same[same] != same[same]) < 0.1
    assert np.mean(decided_same[~same] != same[~same]) < 0.1


def test_the_folder_is_whole_and_small():
    assert (OPEN / 'open.model').stat().st_size <= 15e6
    sha = sha256((OPEN / 'open.model').read_bytes())
    calibration = json.loads((OPEN / 'calibration.json').read_text())
    results = scoring.read_results(str(OPEN))
    assert calibration['checkpoint']['sha256'] == sha
    assert {entry['checkpoint']['sha256'] for entry in results.values()} == {sha}
    assert calibration['kind'] == 'raw', 'a fresh clone has no cohort'
    for name in ('options.txt', 'score.txt', 'README.md'):
        assert (OPEN / name).stat().st_size > 0


def test_the_figures_of_the_card_are_those_of_the_results():
    """Each row `| list | trials | speakers | EER | minDCF(0.05) |` of the card."""
    results = scoring.read_results(str(OPEN))
    by_name = {Path(path).stem: entry for path, entry in results.items()}
    rows = 0
    for line in (OPEN / 'README.md').read_text().splitlines():
        cells = [cell.strip().strip('`') for cell in line.strip('|').split('|')]
        if len(cells) < 5 or cells[0] not in by_name:
            continue
        entry = by_name[cells[0]]
        figures = entry['figures']['raw']
        assert cells[1] == f'{entry["trials"]:,}'
        assert cells[2] == str(entry['speakers'])
        assert cells[3] == as_shown(figures['EER'], '.2f')
        assert cells[4] == as_shown(figures['minDCF(0.05)'], '.3f')
        rows += 1
    assert rows == len(by_name)


def as_shown(figure, digits):
    """A figure with its interval, as the card has it."""
    if figure.get('interval') is None:
        return f'{figure["value"]:{digits}} (-)'
    low, high = figure['interval']
    return f'{figure["value"]:{digits}} ({low:{digits}} to {high:{digits}})'


def test_no_path_of_a_machine_is_shipped():
    for path in OPEN.iterdir():
        if path.suffix in ('.txt', '.json', '.md'):
            assert not re.search(r'(?<![\w.])/(home|work|root|tmp|Users)/', path.read_text())
