"""Where weights are at each memory level, on a pretended device; and the block stream's order and bits."""

import pytest
import torch
from torch import nn

from chitu_diffusion.memory.offload import (
    BlockPrefetcher,
    OffloadManager,
    OffloadPart,
    PinnedMemory,
    bytes_of,
    tensors_of,
)

CPU = torch.device("cpu")


class Network(nn.Module):
    def __init__(self, blocks: int = 3) -> None:
        super().__init__()
        self.trunk = nn.Linear(4, 4)
        self.blocks = nn.ModuleList(Block(index) for index in range(blocks))

    def forward(self, x: torch.Tensor, blocks=None) -> torch.Tensor:
        x = self.trunk(x)
        for block in self.blocks if blocks is None else blocks:
            x = block(x)
        return x


class Block(nn.Module):
    def __init__(self, index: int) -> None:
        super().__init__()
        # sizes that differ, a buffer, and two dtypes
        self.first = nn.Linear(4, 4 + index)
        self.second = nn.Linear(4 + index, 4, dtype=torch.bfloat16)
        self.register_buffer("scale", torch.tensor(0.5 + index))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.scale * self.second(torch.tanh(self.first(x)).bfloat16()).float()


def parts_of(encoder: nn.Module, experts: list, decoder: nn.Module) -> dict[str, OffloadPart]:
    denoisers = [OffloadPart(network, "denoiser", list(network.blocks)) for network in experts]
    return {
        "text_encoder": OffloadPart(encoder, "encoder"),
        **dict(zip(("transformer", "transformer_2"), denoisers, strict=False)),
        "vae": OffloadPart(decoder, "decoder"),
    }


def offload_at(level: int, experts: int = 2) -> tuple[OffloadManager, list[Network]]:
    """On a CPU whose memory is pretended to be two: weights begin on the 'device'."""
    networks = [Network() for _ in range(experts)]
    offload = OffloadManager(
        CPU, parts=parts_of(nn.Linear(2, 2), networks, nn.Linear(3, 3)), level=level, apart=True
    )
    return offload, networks


ALL = {"text_encoder", "vae", "transformer", "transformer_2"}
# level -> what is there after settling, then while encoding, in expert 0, in expert 1, decoding
EXPECTED = {
    0: (ALL, ALL, ALL, ALL, ALL),
    1: (ALL, ALL, ALL, ALL, ALL),
    2: (ALL - {"text_encoder"}, ALL, *[ALL - {"text_encoder"}] * 3),
    3: ({"vae"}, {"text_encoder"}, {"transformer"}, {"transformer_2"}, {"vae"}),
    4: ({"vae"}, {"text_encoder"}, set(), set(), {"vae"}),
}


@pytest.mark.parametrize("level", EXPECTED)
def test_who_is_on_the_device(level):
    offload, _ = offload_at(level)
    offload.place()
    seen = [offload.on_device()]
    for name in ("text_encoder", "transformer", "transformer_2", "vae"):
        offload.use(name)
        seen.append(offload.on_device())
    assert tuple(seen) == EXPECTED[level]


def test_the_vae_may_stay_beside_an_expert_at_level_3():
    offload, _ = offload_at(3)
    offload.use("vae")
    offload.use("transformer_2")
    assert offload.on_device() == {"vae", "transformer_2"}
    offload.use("text_encoder")
    assert offload.on_device() == {"text_encoder"}


def test_level_4_keeps_the_trunk_on_the_device_and_the_blocks_home():
    offload, (network, _) = offload_at(4)
    home = network.trunk.weight.data_ptr()
    offload.use("transformer")
    assert network.trunk.weight.data_ptr() != home
    blocks = [block.first.weight.data_ptr() for block in network.blocks]
    offload.use("text_encoder")
    offload.use("transformer")
    assert [block.first.weight.data_ptr() for block in network.blocks] == blocks
    x = torch.randn(2, 4)
    expected = network(x)
    assert torch.equal(network(x, blocks=offload.prefetched_blocks("transformer")), expected)


def test_raising_the_level_sends_away_and_values_stay_whole():
    offload, (network, _) = offload_at(0)
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    for level in (2, 3, 4):
        offload.use("transformer")
        offload.set_level(level)
    offload.offload_all()
    assert offload.on_device() == set()
    after = network.state_dict()
    assert all(torch.equal(after[name], before[name]) for name in before)
    with pytest.raises(ValueError, match="0 to 4"):
        offload.set_level(5)


def test_sizes():
    offload, (network, _) = offload_at(0)
    assert offload.part_bytes()["transformer"][1] == bytes_of(network)
    assert offload.largest_block_bytes() == bytes_of(network.blocks[2])


@pytest.mark.parametrize("blocks", [1, 2, 3, 4, 5])
def test_streamed_blocks_compute_the_same_bits(blocks):
    network = Network(blocks)
    x = torch.randn(5, 4)
    expected = network(x)
    state = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    stream = BlockPrefetcher(list(network.blocks), CPU, PinnedMemory(CPU), {})
    for _ in range(3):
        assert torch.equal(network(x, blocks=stream), expected)
    assert len(stream) == blocks
    stream.release()
    assert torch.equal(network(x, blocks=stream), expected)
    assert torch.equal(network(x), expected)
    assert all(torch.equal(tensor, state[name]) for name, tensor in network.state_dict().items())


def test_only_two_slots_and_the_next_block_is_there_early():
    network = Network(4)
    stream = BlockPrefetcher(list(network.blocks), CPU, PinnedMemory(CPU), {})
    homes = [block.first.weight.data_ptr() for block in network.blocks]
    used = []
    for index, block in enumerate(stream):
        used.append(block.first.weight.data_ptr())
        assert used[-1] != homes[index]
        # every other block is at home meanwhile
        away = [i for i, other in enumerate(network.blocks) if other.first.weight.data_ptr() != homes[i]]
        assert away == [index]
    assert used[0] == used[2] and used[1] == used[3] and len(set(used)) == 2
    assert [block.first.weight.data_ptr() for block in network.blocks] == homes


def test_a_stream_that_is_left_early_puts_its_block_back():
    network = Network(4)
    x = torch.randn(2, 4)
    expected = network(x)
    stream = BlockPrefetcher(list(network.blocks), CPU, PinnedMemory(CPU), {})
    homes = [block.first.weight.data_ptr() for block in network.blocks]
    with pytest.raises(RuntimeError, match="shape"):
        for block in stream:
            block(torch.randn(2, 9))
    for _ in stream:
        break
    assert [block.first.weight.data_ptr() for block in network.blocks] == homes
    assert torch.equal(network(x, blocks=stream), expected)


def test_tied_weights_move_once():
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one = nn.Embedding(4, 4)
            self.two = nn.Embedding(4, 4)
            self.two.weight = self.one.weight

    tied = Tied()
    offload = OffloadManager(CPU, parts=parts_of(tied, [], nn.Linear(1, 1)), apart=True)
    places = [tied.two.weight.data_ptr()]
    for move in (offload.offload_all, lambda: offload.use("text_encoder"), offload.offload_all):
        move()
        assert tied.one.weight is tied.two.weight
        places.append(tied.two.weight.data_ptr())
    assert places[0] != places[1] != places[2] and places[1] == places[3]
    assert offload.part_bytes()["text_encoder"][1] == 64


def test_on_a_cpu_nothing_moves():
    network = Network()
    offload = OffloadManager(CPU, parts=parts_of(nn.Linear(1, 1), [network], nn.Linear(1, 1)), level=3)
    place = network.trunk.weight.data_ptr()
    for name in ("text_encoder", "transformer", "vae"):
        offload.use(name)
    assert network.trunk.weight.data_ptr() == place and len(offload.on_device()) == 3


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu_streamed_blocks_compute_the_same_bits_as_resident_ones():
    device = torch.device("cuda", 0)
    results = {}
    x = torch.randn(4096, 1024, device=device)
    torch.manual_seed(0)
    layers = [nn.Linear(1024, 1024) for _ in range(7)]
    for level in (0, 3, 4):
        network = nn.Module()
        network.blocks = nn.ModuleList(layers)
        offload = OffloadManager(
            device, parts=parts_of(nn.Linear(1, 1), [network], nn.Linear(1, 1)), level=level
        )
        offload.place()
        offload.use("transformer")
        for _ in range(3):
            y = x
            for block in offload.prefetched_blocks("transformer") or network.blocks:
                y = torch.tanh(block(y))
        results[level] = y.cpu()
        offload.offload_all()
        assert all(tensor.device == CPU for tensor in tensors_of(network))
        offload.close()
    assert torch.equal(results[0], results[3]) and torch.equal(results[0], results[4])
