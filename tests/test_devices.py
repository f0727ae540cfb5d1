"""Which devices are right? Shown on a CPU, of mps (the GPU of a Mac) and of exact float32."""

import pytest
import torch
from conftest import make_system, wave, weights, write_wav
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ECAPAModel import choose_device, load_model, without_tf32
from tools import BadInput

pytestmark = pytest.mark.usefixtures('quick')
DOUBLE = (torch.float64, torch.complex128)
BATCH = torch.from_numpy(wave(0, 32480)).view(2, 16240), torch.arange(2)


class Copies(TorchFunctionMode):
    """Notes every call of Tensor.to, as (tensor, non_blocking)."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function is torch.Tensor.to:
            self.seen.append((args[0], kwargs.get('non_blocking', False)))
        return function(*args, **kwargs)


def test_copies_that_do_not_wait_are_for_cuda_only(tmp_path):
    """Elsewhere the source may be freed before it is read; and mps has no float64."""
    path = write_wav(tmp_path / 'a.wav', wave(0, 48240))
    system = make_system()
    with Copies() as copies:
        system.train_network(1, [BATCH, BATCH])
        system.embed_files([path])
    assert len(copies.seen) >= 5
    for tensor, non_blocking in copies.seen:
        assert not non_blocking
        assert tensor.dtype not in DOUBLE


class Doubles(TorchDispatchMode):
    """Notes every operation with a float64 tensor that is not on the CPU."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves((args, result)):
            if isinstance(tensor, torch.Tensor) and tensor.dtype in DOUBLE:
                assert tensor.device.type == 'cpu', function
            if isinstance(tensor, torch.Tensor) and tensor.device.type != 'cpu':
                self.seen.append(function)
        return result


@pytest.mark.parametrize('precision', ['fp32', 'bf16'])
def test_a_device_other_than_cuda_gets_no_float64_and_all_it_needs(monkeypatch, precision):
    """On tensors without numbers. PyTorch has none of mps here, so cuda stands in for it."""
    monkeypatch.setattr('torch.cuda.amp.common.amp_definitely_not_available', lambda: False)
    monkeypatch.setattr('torch.cuda.is_bf16_supported', lambda: True)
    system = make_system(precision=precision)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode, Doubles() as doubles:
        for module in system.modules():
            for tensors in (module._parameters, module._buffers):
                for name, tensor in tensors.items():
                    tensors[name] = mode.from_tensor(tensor.detach()).to('cuda')
        system.device = torch.device('cuda')
        assert not system.on_gpu
        # A fake tensor of known numbers cannot be copied to a device.
        monkeypatch.setattr(system, 'copy_to_device', lambda x: torch.empty_like(x, device='cuda'))

        audio = torch.randn(4, 16240, device='cuda')
        labels = torch.zeros(4, dtype=torch.long, device='cuda')
        loss, _ = system.train()(audio, labels)
        assert loss.device.type == 'cuda'

        with torch.inference_mode():
            embeddings = torch.zeros(2, 2, 192, device='cuda')
            waves = [torch.randn(length, device='cuda') for length in (20000, 60000)]
            system.eval().embed_window(list(enumerate(waves)), embeddings)
    assert len(doubles.seen) > 100


@pytest.mark.parametrize('name', ['meta', 'xpu', 'vulkan', 'mps:x', 'gpu'])
def test_a_device_that_was_never_made_right_is_refused(name):
    with pytest.raises(BadInput, match=f'--device {name}'):
        choose_device(name)


def test_a_checkpoint_is_saved_without_its_device(tmp_path, monkeypatch):
    """Another machine need not have it."""
    system = make_system()
    moved = []
    monkeypatch.setattr(torch.Tensor, 'cpu', lambda tensor: moved.append(tensor) or tensor)
    system.save_parameters(tmp_path / 'a.model')
    assert len(moved) == len(system.state_dict()) == len(weights(str(tmp_path / 'a.model')))


def switches():
    """How a GPU would compute convolutions and matrix products in float32 now."""
    backends = torch.backends
    return backends.cudnn.conv.fp32_precision, backends.cuda.matmul.fp32_precision


@pytest.mark.filterwarnings('error')
def test_exact_is_exact_from_python_and_leaves_no_trace(tmp_path):
    """Forward, backward and evaluation, of convolutions; other code's switches are restored."""
    make_system().save_parameters(tmp_path / 'a.model')
    system = load_model(str(tmp_path / 'a.model'), device='cpu', precision='exact')
    path = write_wav(tmp_path / 'a.wav', wave(0, 48240))
    before = switches()
    seen = []
    convolution = system.speaker_encoder.layer1.conv1
    convolution.register_forward_hook(lambda *_: seen.append(switches()))
    convolution.weight.register_hook(lambda gradient: seen.append(switches()))

    system.train_step(*BATCH)
    assert seen == [('ieee', 'ieee')] * 2, 'forward and backward'
    assert switches() == before
    seen.clear()
    system.embed([path])
    assert seen == [('ieee', 'ieee')] * 2, 'the whole utterance and its crops'
    assert switches() == before

    seen.clear()
    system.precision = 'fp32'
    system.embed([path])
    assert seen == [before] * 2, 'fp32 is what PyTorch has chosen'


def test_an_error_restores_the_switches():
    before = switches()
    with pytest.raises(ZeroDivisionError), without_tf32():
        raise ZeroDivisionError
    assert switches() == before


def test_cudnn_tries_its_algorithms_in_training_only(tmp_path):
    """There all shapes are the same; files have many lengths."""
    path = write_wav(tmp_path / 'a.wav', wave(0, 48240))
    system = make_system()
    seen = []
    system.speaker_encoder.conv1.register_forward_hook(
        lambda *_: seen.append(torch.backends.cudnn.benchmark)
    )
    system.train_network(1, [BATCH])
    assert seen == [True]
    system.embed([path])
    assert seen == [True, False, False]


@pytest.mark.filterwarnings('error')
def test_a_gpu_plans_few_transforms_for_many_lengths(monkeypatch):
    """Rounding up the frames of an utterance does not change those that it has."""
    encoder = make_system().speaker_encoder
    frames = set()
    stft = torch.stft

    def watched(*args, **kwargs):
        spectrum = stft(*args, **kwargs)
        frames.add(spectrum.shape[-1])
        return spectrum

    lengths = [257, 258, 319, 320, 321, 5000, *range(9600, 9600 + 200, 13), 16000, 77777]
    for length in lengths:
        audio = torch.from_numpy(wave(length % 7, length))[None]
        expected = encoder.features(audio)
        with monkeypatch.context() as patch:
            patch.setattr(torch, 'stft', watched)
            rounded = encoder.features(audio, step=64)
        assert rounded.shape == expected.shape
        torch.testing.assert_close(rounded, expected, atol=1e-4, rtol=0)
    assert frames == {64, 128, 512}
