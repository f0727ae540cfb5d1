"""Does an exported ONNX file give the embeddings of PyTorch, in old versions of onnxruntime too?

    ONNXRUNTIME_PYTHON=old/bin/python python -m pytest tests/test_onnx.py

runs the exported file in another Python, with another onnxruntime. That Python needs only NumPy and
onnxruntime.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from cli import refusal
from conftest import portable_system, wave, write_wav

import tools
from ECAPAModel import load_model
from exps import export

ROOT = Path(__file__).parents[1]
PYTHON = os.environ.get('ONNXRUNTIME_PYTHON', sys.executable)
# Writes the embeddings of the waveforms in a .npz, or the word 'error' for those that are refused.
RUN = """
import sys
import numpy as np
import onnxruntime
assert 'torch' not in sys.modules
settings = onnxruntime.SessionOptions()
settings.log_severity_level = 4
session = onnxruntime.InferenceSession(sys.argv[1], settings, providers=['CPUExecutionProvider'])
results = {}
for name, waveform in np.load(sys.argv[2]).items():
    try:
        (results[name],) = session.run(['embedding'], {'waveform': waveform})
    except Exception:
        results[name] = 'error'
np.savez(sys.argv[3], **results)
"""

pytest.importorskip('onnxruntime')
onnx = pytest.importorskip('onnx')


@pytest.fixture(scope='module')
def exported(tmp_path_factory):
    """A folder with x.model and what exps.export made of it, ecapa.onnx."""
    folder = tmp_path_factory.mktemp('exported')
    portable_system(16).save_parameters(folder / 'x.model')
    export.main([str(folder / 'x.model'), '--out', str(folder / 'ecapa.onnx')])
    return folder


def run_exported(folder, waveforms):
    """{name: embeddings, or 'error'} of {name: waveform} by the onnxruntime of PYTHON."""
    np.savez(folder / 'waveforms.npz', **waveforms)
    files = [folder / name for name in ('ecapa.onnx', 'waveforms.npz', 'embeddings.npz')]
    subprocess.run([PYTHON, '-c', RUN, *files], check=True)
    return dict(np.load(folder / 'embeddings.npz'))


def test_it_gives_the_embeddings_of_pytorch(exported):
    """Also of the shortest utterance, half of which is its own reflection."""
    lengths = (257, 258, 400, 16000, 77777)
    waves = {str(length): np.stack([wave(i, length) for i in (0, 1)]) for length in lengths}
    encoder = portable_system(16).eval().speaker_encoder
    for name, embeddings in run_exported(exported, waves).items():
        with torch.inference_mode():
            expected = encoder(torch.from_numpy(waves[name]), aug=False)
        expected = torch.nn.functional.normalize(expected).numpy()
        np.testing.assert_allclose(embeddings, expected, atol=1e-5, err_msg=name)


def test_input_that_is_too_short_is_an_error(exported):
    """In a batch of any size, as 200 x 200 numbers could be taken for another batch."""
    shapes = [(1, 256), (1, 200), (1, 20), (1, 1), (1, 0), (2, 128), (256, 200), (200, 256)]
    waves = {str(shape): np.full(shape, 0.1, np.float32) for shape in shapes}
    results = run_exported(exported, waves)
    assert [name for name, result in results.items() if str(result) != 'error'] == []


def test_the_file_says_what_it_wants_and_what_it_is(exported):
    graph = onnx.load(exported / 'ecapa.onnx')
    onnx.checker.check_model(graph, full_check=True)
    assert [opset.version for opset in graph.opset_import] == [export.OPSET]
    facts = {entry.key: entry.value for entry in graph.metadata_props}
    for words in ('16000 Hz', '257 samples', 'one length'):
        assert words in facts['input']
    assert facts['sha256'] == tools.sha256((exported / 'x.model').read_bytes())
    assert 'torch 2' in facts['versions']


def test_the_ten_lines_of_the_readme_verify_two_files(exported, tmp_path):
    paths = [str(tmp_path / name) for name in ('one.wav', 'other.wav')]
    for number, path in enumerate(paths):
        write_wav(path, 0.3 * wave(number, 40000 + 7000 * number), subtype='PCM_16')

    text = (ROOT / 'exps/README.md').read_text()
    blocks = re.findall(r'```python\n(.*?)```', text, re.DOTALL)
    (lines,) = [block for block in blocks if 'onnxruntime' in block]
    lines = lines.replace('ecapa.onnx', str(exported / 'ecapa.onnx'))
    done = subprocess.run(
        [PYTHON, '-c', lines], check=True, capture_output=True, text=True, cwd=tmp_path
    )
    a, b = load_model(str(exported / 'x.model'), device='cpu').embed(paths)
    assert float(done.stdout) == pytest.approx(a @ b, abs=1e-4)


def refused(folder, capsys):
    """Returns the message of exps.export, which must write nothing."""
    portable_system(8).save_parameters(folder / 'x.model')
    arguments = [str(folder / 'x.model'), '--out', str(folder / 'x.onnx')]
    message = refusal(capsys, export.main, arguments)
    assert not (folder / 'x.onnx').exists()
    return message


def test_a_file_that_differs_is_not_written(tmp_path, monkeypatch, capsys):
    to_onnx = export.to_onnx

    def spoilt(system):
        content = to_onnx(system)
        with torch.no_grad():
            system.speaker_encoder.fc6.weight.mul_(1 + 0.01 * torch.randn(192, 3072))
        return content

    torch.manual_seed(0)
    monkeypatch.setattr(export, 'to_onnx', spoilt)
    assert '0.0001' in refused(tmp_path, capsys)


def test_a_file_that_takes_what_is_too_short_is_not_written(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(export, 'SHORTEST', 300)
    assert refused(tmp_path, capsys)


def test_an_export_names_its_own_argument(tmp_path, capsys):
    arguments = [str(tmp_path / 'none.model'), '--out', str(tmp_path / 'a.onnx')]
    message = refusal(capsys, export.main, arguments)
    assert 'none.model' in message and '--initial_model' not in message
