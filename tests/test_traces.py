"""What a GPU would do, shown without one.

On tensors that hold no numbers, and by tracing compilation.
"""

import numpy as np
import pytest
import torch
import torch.distributed as dist
from conftest import make_system
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

import tools
from dataLoader import EVAL_CROP
from ECAPAModel import choose_device
from tools import BadInput

pytestmark = pytest.mark.usefixtures('quick')


@pytest.fixture
def four_processes(monkeypatch):
    """The first of four processes that all have the same batch."""
    monkeypatch.setattr(dist, 'is_initialized', lambda: True)
    monkeypatch.setattr(dist, 'get_rank', lambda: 0)
    monkeypatch.setattr(dist, 'get_world_size', lambda: 4)
    monkeypatch.setattr(dist, 'all_reduce', lambda tensor: tensor.mul_(4))


def test_a_step_reads_nothing_back():
    """A GPU would have to be waited for.

    Reading a fake tensor raises; test_gpu.py knows of copies, too.
    """
    system = make_system(16, 20, precision='bf16', accumulate=2).train()
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        audio = mode.from_tensor(torch.randn(4, 16240))
        labels = mode.from_tensor(torch.tensor([3, 1, 19, 7]))
        result = system.train_step(audio, labels)
        with pytest.raises(DataDependentOutputException):
            bool(result.isfinite().all())
    assert result.shape == (3,)


def move_to_fake_gpu(system, mode):
    """Replaces the system's weights by tensors without numbers on a GPU that need not be there."""
    for module in system.modules():
        for name, parameter in module._parameters.items():
            fake = mode.from_tensor(parameter.detach()).to('cuda')
            module._parameters[name] = torch.nn.Parameter(fake)
        for name, buffer in module._buffers.items():
            module._buffers[name] = mode.from_tensor(buffer.detach()).to('cuda')
    system.device = torch.device('cuda')
    system.on_gpu = True


@pytest.mark.parametrize('precision', ['fp32', 'bf16'])
def test_forward_and_evaluation_on_a_gpu_read_nothing_back(monkeypatch, precision):
    """Autocast casts otherwise on a GPU. (PyTorch's backward pass needs a real one.)"""
    monkeypatch.setattr('torch.cuda.amp.common.amp_definitely_not_available', lambda: False)
    monkeypatch.setattr('torch.cuda.is_bf16_supported', lambda: True)
    system = make_system(16, 20, precision=precision)
    seen = []
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        move_to_fake_gpu(system, mode)
        for layer in (system.speaker_encoder.layer1.conv1, system.speaker_encoder.fc6):
            layer.register_forward_hook(lambda layer, inputs, output: seen.append(output.dtype))

        audio = torch.randn(4, 16240, device='cuda')
        labels = torch.zeros(4, dtype=torch.long, device='cuda')
        loss, accuracy = system.train()(audio, labels)
        assert loss.device.type == 'cuda'
        assert loss.dtype == torch.float32
        assert accuracy.device.type == 'cuda'
        convolution = torch.bfloat16 if precision == 'bf16' else torch.float32
        assert seen == [convolution, torch.float32]

        # Copies of pinned memory do not wait; a fake tensor of known numbers cannot go to the GPU.
        def zeros(numbers):
            return torch.zeros(len(numbers), dtype=torch.long, device='cuda')

        system.numbers_to_device = zeros
        embeddings = torch.zeros(3, 2, 192, device='cuda')
        lengths = (20000, EVAL_CROP, 400 * 16000)
        with torch.inference_mode():
            waves = [torch.randn(length, device='cuda') for length in lengths]
            system.eval().embed_window(list(enumerate(waves)), embeddings)


def test_compiled_training_is_one_graph_and_stays_it():
    """Neither an evaluation nor frozen epochs in between make it compile again."""
    assert compilations(make_system(16, 20, freeze_epochs=1)) == 1


def test_compiled_training_of_several_processes_is_one_graph(four_processes):
    assert compilations(make_system(16, 20, freeze_epochs=1)) == 1


def compilations(system):
    """How many graphs are compiled over frozen epochs and others.

    An evaluation follows each.
    """
    torch.compiler.reset()
    graphs = []

    def count(graph, inputs):
        graphs.append(graph)
        return graph.forward

    encode = system.speaker_encoder.encode
    system.train_encode = torch.compile(encode, backend=count, fullgraph=True)

    audio = np.random.default_rng(0).standard_normal((4, 4240), np.float32)
    audio = torch.from_numpy(audio)
    batch = (audio, torch.tensor([3, 1, 19, 7]))
    for epoch in (1, 2, 1, 3, 4):
        system.train_network(epoch, [batch, batch])
        system.eval()
        with torch.inference_mode():
            system.embed_window([(0, audio[0])], torch.zeros(1, 2, 192))
    return len(graphs)


@pytest.mark.parametrize('accumulate', [1, 4])
def test_gradients_are_exchanged_once_a_step(four_processes, monkeypatch, accumulate):
    """In frozen epochs only the classifier has gradients."""
    sizes = []
    sum_over_processes = tools.sum_over_processes

    def watched(tensor):
        sizes.append(tensor.numel())
        return sum_over_processes(tensor)

    monkeypatch.setattr(tools, 'sum_over_processes', watched)
    system = make_system(16, 20, accumulate=accumulate, freeze_epochs=1)
    batch = (torch.randn(8, 4240), torch.arange(8))
    encoder_and_classifier = sum(parameter.numel() for parameter in system.parameters())
    classifier = 20 * 192
    loss_accuracy_and_norm = 3  # once, at the end of the epoch

    system.train_network(2, [batch])
    assert sizes == [encoder_and_classifier, loss_accuracy_and_norm]
    sizes.clear()
    system.train_network(1, [batch])
    assert sizes == [classifier, loss_accuracy_and_norm]
    assert all(parameter.grad is None for parameter in system.speaker_encoder.parameters())


def test_a_gpu_that_pytorch_cannot_use_is_said(monkeypatch):
    """Two days on the CPU by accident are a lost run."""
    monkeypatch.setattr('torch.cuda.is_available', lambda: False)
    monkeypatch.delenv('CUDA_VISIBLE_DEVICES', raising=False)
    monkeypatch.setattr('ECAPAModel.glob.glob', lambda pattern: [])
    assert choose_device().type == 'cpu'

    monkeypatch.setattr('ECAPAModel.glob.glob', lambda pattern: ['/dev/nvidia0'])
    with pytest.raises(BadInput, match='--device cpu'):
        choose_device()
    assert choose_device('cpu').type == 'cpu'

    monkeypatch.setenv('CUDA_VISIBLE_DEVICES', '')
    assert choose_device().type == 'cpu', 'it was hidden on purpose'
