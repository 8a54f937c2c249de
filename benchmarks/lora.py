"""What an adapter costs: merging it, taking it out, changing it for another, and a step with it and without.

    python -m benchmarks.lora                       # rank 64 on every linear layer of a 14B, random weights
    python -m benchmarks.lora --small --device cpu  # to see that it runs

What was changed comes from main memory, as from a model's files that the system still holds. One table; exit
code 1 if taking it out leaves other bits.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from benchmarks.measuring import synchronise, timed_ms
from benchmarks.networks import Workload, case_of, small_case
from benchmarks.report import table_of
from chitu_diffusion.adapters.merging import AdaptedNetwork
from chitu_diffusion.adapters.placing import parameter_shapes
from chitu_diffusion.config import EngineConfig
from chitu_diffusion.models.wan.checkpoint_names import official_transformer_name
from chitu_diffusion.models.wan.config import WanConfig
from chitu_diffusion.task.lora import Lora

ROUNDS = 3


class KeptInMemory:
    """Stands for a checkpoint's files: what each parameter was, in main memory.

    Args:
        values: by name.
    """

    def __init__(self, values: dict[str, Tensor]) -> None:
        self._values = values

    def read(self, name: str) -> Tensor:
        """A parameter's values."""
        return self._values[name]

    def read_float8_rows(self, name: str) -> None:
        """None is stored in 8 bits."""


def write_adapter(path: Path, config: WanConfig, rank: int, seed: int) -> Path:
    """Random factors in bfloat16 for every linear layer of the blocks, under official names."""
    generator = torch.Generator().manual_seed(seed)
    tensors: dict[str, Tensor] = {}
    for name, shape in parameter_shapes(config).items():
        if name.startswith("blocks.") and name.endswith(".weight") and len(shape) == 2:
            base = "diffusion_model." + official_transformer_name(name).removesuffix(".weight")
            for end, size in (("down", (rank, shape[1])), ("up", (shape[0], rank))):
                made = torch.randn(size, generator=generator).mul_(shape[1] ** -0.5)
                tensors[f"{base}.lora_{end}.weight"] = made.to(torch.bfloat16)
    save_file(tensors, path)
    return path


def measure(workload: Workload, folder: Path, rank: int) -> list[dict[str, Any]]:
    """Rows of the table."""
    device = workload.device
    config = workload.case.config
    backend = workload.backend(EngineConfig(infer={"device": str(device), "dtype": "auto"}))
    network = backend.model_pool[0]
    before = {name: value.cpu() for name, value in network.state_dict().items()}
    if device.type == "cpu":
        before = {name: value.clone() for name, value in before.items()}
    originals: Any = KeptInMemory(before)
    adapted = AdaptedNetwork(network, device, backend.offload, "transformer", originals, 0)
    first, second = ([Lora(str(write_adapter(folder / f"{n}.safetensors", config, rank, n)))] for n in (1, 2))
    rows: list[dict[str, Any]] = []

    def timed(what: str, loras: list[Lora]) -> None:
        synchronise(device)
        rows.append({"what": what, "ms": timed_ms(lambda: adapted.use(loras), device)})

    step = workload.step(backend)
    step()
    timed("merge the first", first)
    timed("change it for another", second)
    timed("take it out", [])
    timed("merge it again", first)
    same = {"without": [], "with": []}
    for number in range(ROUNDS):
        for name in sorted(same, reverse=bool(number % 2)):
            adapted.use(first if name == "with" else [])
            step()
            same[name].append(timed_ms(step, device))
    rows += [{"what": f"a guided step {name} it", "ms": min(found)} for name, found in same.items()]
    adapted.use([])
    state = network.state_dict()
    differ = sum(not torch.equal(state[name].cpu(), value) for name, value in before.items())
    rows.append({"what": "tensors that are other bits once it is out", "count": differ})
    return rows


@torch.no_grad()
def main(words: list[str] | None = None) -> int:
    """The command line."""
    options = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument("--device", default="cuda")
    options.add_argument("--rank", type=int, default=64)
    options.add_argument("--layers", type=int, default=40)
    options.add_argument("--small", action="store_true")
    asked = options.parse_args(words)
    device = torch.device(asked.device)
    if asked.small:
        case = small_case("small", 2, 2)
    else:
        case = case_of("Wan2.1-T2V-14B", (832, 480, 33), asked.layers)
    with tempfile.TemporaryDirectory() as folder:
        rows = measure(Workload(case, device), Path(folder), asked.rank)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    print(f"{name}, torch {torch.__version__}, {case.name}, rank {asked.rank}\n\n{table_of(rows)}")
    return int(rows[-1]["count"] > 0)


if __name__ == "__main__":
    raise SystemExit(main())
