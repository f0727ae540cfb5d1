"""What a GPU would do, shown without one: on tensors that hold no numbers, and by tracing compilation."""

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch._dynamo.testing import CompileCounter
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.testing._internal.distributed.fake_pg import FakeStore

import tools
from dataLoader import EVAL_CROP
from ECAPAModel import ECAPAModel, choose_device
from tools import BadInput


def make_system(**kwargs):
    options = dict(lr=0.001, lr_decay=0.97, C=16, n_class=20, m=0.2, s=30, test_step=1, device='cpu')
    return ECAPAModel(**{**options, **kwargs})


@pytest.fixture
def four_processes():
    """The first of four processes, whose exchanges do nothing."""
    dist.init_process_group('fake', store=FakeStore(), rank=0, world_size=4)
    yield
    dist.destroy_process_group()


def test_a_step_reads_nothing_back():
    """A GPU would have to be waited for. Reading a fake tensor raises; test_gpu.py knows of copies, too."""
    system = make_system(precision='bf16', accumulate=2).train()
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        audio, labels = mode.from_tensor(torch.randn(4, 16240)), mode.from_tensor(torch.tensor([3, 1, 19, 7]))
        result = system.train_step(audio, labels)
        with pytest.raises(DataDependentOutputException):
            bool(result.isfinite().all())
    assert result.shape == (3,)


def move_to_fake_gpu(system, mode):
    """Replaces the system's weights by tensors without numbers on a GPU that need not be there."""
    for module in system.modules():
        for store in (module._parameters, module._buffers):
            for name, tensor in store.items():
                fake = mode.from_tensor(tensor.detach()).to('cuda')
                store[name] = torch.nn.Parameter(fake) if store is module._parameters else fake
    system.device, system.on_gpu = torch.device('cuda'), True


@pytest.mark.parametrize('precision', ['fp32', 'bf16'])
def test_forward_and_evaluation_on_a_gpu_read_nothing_back(monkeypatch, precision):
    """Autocast casts otherwise on a GPU. (PyTorch's backward pass needs a real one.)"""
    monkeypatch.setattr('torch.cuda.amp.common.amp_definitely_not_available', lambda: False)
    monkeypatch.setattr('torch.cuda.is_bf16_supported', lambda: True)
    system, seen = make_system(precision=precision), []
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        move_to_fake_gpu(system, mode)
        for layer in (system.speaker_encoder.layer1.conv1, system.speaker_encoder.fc6):
            layer.register_forward_hook(lambda layer, inputs, output: seen.append(output.dtype))
        audio = torch.randn(4, 16240, device='cuda')
        loss, accuracy = system.train()(audio, torch.zeros(4, dtype=torch.long, device='cuda'))
        assert (loss.device.type, loss.dtype, accuracy.device.type) == ('cuda', torch.float32, 'cuda')
        assert seen == [torch.bfloat16 if precision == 'bf16' else torch.float32, torch.float32]

        # What goes to the GPU is pinned and does not wait; a fake tensor of known numbers cannot go there.
        system.upload = lambda numbers: torch.zeros(len(numbers), dtype=torch.long, device='cuda')
        embeddings = torch.zeros(3, 2, 192, device='cuda')
        lengths = (20000, EVAL_CROP, 400 * 16000)
        with torch.inference_mode():
            window = [(index, torch.randn(length, device='cuda')) for index, length in enumerate(lengths)]
            system.eval().embed_window(window, embeddings, torch.zeros(3, 2, device='cuda'))


def test_compiled_training_is_one_graph_and_stays_it():
    """Neither an evaluation nor frozen epochs in between make it compile again."""
    assert compilations(make_system(freeze_epochs=1)) == 1


def test_compiled_training_of_several_processes_is_one_graph(four_processes):
    assert compilations(make_system(freeze_epochs=1)) == 1


def compilations(system):
    """How many graphs are compiled over frozen epochs and others, each followed by an evaluation."""
    counter, random = CompileCounter(), np.random.default_rng(0)
    torch._dynamo.reset()
    system.train_encode = torch.compile(system.speaker_encoder.encode, backend=counter, fullgraph=True)
    batch = torch.from_numpy(random.standard_normal((4, 4240), np.float32)), torch.tensor([3, 1, 19, 7])
    for epoch in (1, 2, 1, 3, 4):
        system.train_network(epoch, [batch, batch])
        system.eval()
        with torch.inference_mode():
            system.embed_window([(0, batch[0][0])], torch.zeros(1, 2, 192), torch.zeros(1, 2))
    return counter.frame_count


@pytest.mark.parametrize('accumulate', [1, 4])
def test_gradients_are_exchanged_once_a_step(four_processes, monkeypatch, accumulate):
    """In frozen epochs those of the classifier alone, and the encoder has none."""
    exchanged, add = [], tools.sum_over_processes
    monkeypatch.setattr(tools, 'sum_over_processes', lambda tensor: exchanged.append(tensor.numel()) or add(tensor))
    system = make_system(accumulate=accumulate, freeze_epochs=1)
    batch = torch.randn(8, 4240), torch.arange(8)
    everything = sum(parameter.numel() for parameter in system.parameters())
    for epoch, size in ((2, everything), (1, 20 * 192)):
        exchanged.clear()
        system.train_network(epoch, [batch])
        assert exchanged == [size, 3], 'the gradients, and at the end of the epoch loss, accuracy and norm'
    assert all(parameter.grad is None for parameter in system.speaker_encoder.parameters())


def test_a_gpu_that_pytorch_cannot_use_is_said(monkeypatch):
    """Two days on the CPU by accident are a lost run."""
    monkeypatch.setattr('torch.cuda.is_available', lambda: False)
    monkeypatch.delenv('CUDA_VISIBLE_DEVICES', raising=False)
    monkeypatch.setattr('ECAPAModel.glob.glob', lambda pattern: [])
    assert choose_device().type == 'cpu'
    monkeypatch.setattr('ECAPAModel.glob.glob', lambda pattern: ['/dev/nvidia0'])
    with pytest.raises(BadInput, match='not available here.*update its driver.*--device cpu'):
        choose_device()
    assert choose_device('cpu').type == 'cpu'
    monkeypatch.setenv('CUDA_VISIBLE_DEVICES', '')
    assert choose_device().type == 'cpu', 'it was hidden on purpose'
