"""Writes a checkpoint as an ONNX file, from waveform to unit embedding.

    pip install onnx onnxruntime
    python -m exps.export exps/exp1/model/model_0080.model --out ecapa.onnx

Without a checkpoint it writes the model in exps/open.

Input `waveform`, float32 (batch, samples): 16 kHz, mono, in [-1, 1], at least 257 samples. All
utterances of a batch have the same length, because padding with zeros changes an embedding. Output
`embedding`, float32 (batch, 192): unit embeddings of whole utterances, as exps.embed writes them.
The opset is 17. The metadata describe the input and name the checkpoint, its SHA-256, the command,
the commit and versions.

The file is written only if onnxruntime gives the same embeddings as PyTorch, within 1e-4, at five
lengths from 0.3 to 30 s, and an error for input with fewer than 257 samples.
"""

import argparse
import io
import warnings

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from dataLoader import RATE, SHORTEST, require_file
from ECAPAModel import model_of, read_checkpoint
from exps.embed import OPEN_MODEL, introduce_open_model
from model import HOP
from tools import BadInput, command_of, exit_on_bad_input, prepare_new_file, provenance, write_whole

OPSET = 17
SECONDS = (0.3, 1, 3, 10, 30)
BOUND = 1e-4


def main(argv=None):
    """Runs the script. Exits with status 2 and a message if the input cannot be used."""
    parser = argparse.ArgumentParser(
        prog='python -m exps.export', description='Write a checkpoint as an ONNX file.'
    )
    parser.add_argument(
        'model', nargs='?', default=OPEN_MODEL, help=f'checkpoint (default: {OPEN_MODEL})'
    )
    parser.add_argument('--out', required=True, help='ONNX file to write')
    args = parser.parse_args(argv)
    args.command = command_of('-m exps.export', argv)
    with exit_on_bad_input():
        export(args)


def export(args):
    """Writes args.out, and prints the largest differences from PyTorch.

    Raises BadInput if one is larger than BOUND.
    """
    import onnx
    import onnxruntime

    # Make the ONNX file in memory.
    prepare_new_file(args.out, '--out')
    if args.model == OPEN_MODEL:
        introduce_open_model()
    require_file(args.model, 'MODEL')
    weights, sha256 = read_checkpoint(args.model)
    system = model_of(weights, args.model, device='cpu').eval()
    graph = onnx.load_from_string(to_onnx(system))
    onnx.helper.set_model_props(graph, metadata(args, sha256))
    content = graph.SerializeToString()

    # Compare it with PyTorch. With several threads, a process that is forked later would wait for
    # threads that it does not have.
    settings = onnxruntime.SessionOptions()
    settings.intra_op_num_threads = 1
    settings.log_severity_level = 4  # do not log the error that is provoked below
    providers = ['CPUExecutionProvider']
    session = onnxruntime.InferenceSession(content, settings, providers=providers)
    for seconds, difference in differences(system, session):
        print(f'{seconds:g} s: largest difference {difference:.1e}')
        # Written so that NaN is refused too.
        if not difference <= BOUND:
            raise BadInput(
                f'{args.model}: onnxruntime differs by more than {BOUND:g}, so {args.out} is not '
                'written'
            )
    if not refuses(session, SHORTEST - 1):
        raise BadInput(
            f'{args.model}: onnxruntime {onnxruntime.__version__} accepts input that is too short, '
            f'so {args.out} is not written'
        )
    write_whole(args.out, lambda file: file.write(content))
    print(f'written: {args.out}, {len(content) / 1e6:.1f} MB, opset {OPSET}')


def metadata(args, sha256):
    """Returns the metadata of the file, {name: text}."""
    facts = provenance(args.command)
    versions = ', '.join(f'{name} {version}' for name, version in facts['versions'].items())
    texts = {
        'command': args.command,
        'commit': facts['commit'],
        'versions': versions,
        'checkpoint': args.model,
        'sha256': sha256,
        'input': f'{RATE} Hz, mono, in [-1, 1]; at least {SHORTEST} samples; all utterances of a '
        'batch of one length, not padded',
    }
    # A file name need not be UTF-8.
    return {name: text.encode('utf-8', 'backslashreplace').decode() for name, text in texts.items()}


class FromWaveform(nn.Module):
    """An encoder that computes its features by a convolution; a runtime needs no spectrograms."""

    def __init__(self, encoder):
        super().__init__()
        self.encoder = encoder
        mel = encoder.torchfbank[1]
        margin = (mel.n_fft - mel.win_length) // 2
        window = F.pad(mel.spectrogram.window.double(), [margin, margin])
        time = torch.arange(mel.n_fft).double()
        frequency = torch.arange(mel.n_fft // 2 + 1).double()
        angles = 2 * torch.pi / mel.n_fft * torch.outer(frequency, time)
        spectrum = torch.cat([angles.cos() * window, angles.sin() * window])
        self.spectrum = spectrum.float().unsqueeze(1)  # (514, 1, 512)

        # Indices of the samples that are reflected at the beginning and at the end. Old runtimes do
        # not check their own padding by reflection: for short input they read other memory.
        distance = torch.arange(1, mel.n_fft // 2 + 1)
        self.first = distance.flip(0)
        self.last = -1 - distance

    def forward(self, waveform):
        """Computes unit embeddings (B, 192) of waveforms (B, samples)."""
        preemphasis, mel = self.encoder.torchfbank
        x = preemphasis(waveform)
        x = torch.cat([x[:, self.first], x, x[:, self.last]], dim=1).unsqueeze(1)
        squares = F.conv1d(x, self.spectrum, stride=HOP).square()
        cosines, sines = squares.chunk(2, dim=1)  # (B, 257, T) each
        x = (mel.mel_scale.fb.T @ (cosines + sines) + 1e-6).log()  # (B, 80, T)
        x = x - x.mean(dim=2, keepdim=True)
        return F.normalize(self.encoder.encode(x))


def to_onnx(system):
    """Returns the bytes of an ONNX file for the encoder of a system in evaluation mode."""
    file = io.BytesIO()
    with warnings.catch_warnings(), torch.no_grad():
        # PyTorch calls this exporter deprecated, but the newer one needs another package.
        warnings.simplefilter('ignore')
        torch.onnx.export(
            FromWaveform(system.speaker_encoder).eval(),
            (torch.zeros(2, RATE),),
            file,
            dynamo=False,
            opset_version=OPSET,
            input_names=['waveform'],
            output_names=['embedding'],
            dynamic_axes={'waveform': {0: 'batch', 1: 'samples'}, 'embedding': {0: 'batch'}},
        )
    return file.getvalue()


def differences(system, session):
    """Yields (seconds, largest difference of the session's embeddings from the system's)."""
    longest = speech_like_noise(2, max(SECONDS) * RATE)
    for seconds in SECONDS:
        # One of the lengths is tried in a batch of one utterance.
        count = 1 if seconds == 3 else 2
        waveform = longest[:count, : int(seconds * RATE)]
        with torch.inference_mode():
            embedding = system.speaker_encoder(torch.from_numpy(waveform), aug=False)
        expected = F.normalize(embedding).numpy()
        (exported,) = session.run(['embedding'], {'waveform': waveform})
        yield seconds, np.abs(exported - expected).max()


def refuses(session, samples):
    """Returns whether a session ends in an error for input of so many samples."""
    try:
        session.run(['embedding'], {'waveform': speech_like_noise(2, samples)})
    except Exception:
        # The types of onnxruntime's errors are in a private module.
        return True
    return False


def speech_like_noise(count, samples):
    """Returns noise (count, samples) that swells and fades four times a second, as speech does."""
    noise = np.random.default_rng(0).standard_normal((count, samples))
    syllables = np.sin(4 * np.pi * np.arange(samples) / RATE) ** 2
    return (0.1 * noise * syllables).astype(np.float32)


if __name__ == '__main__':
    main()
