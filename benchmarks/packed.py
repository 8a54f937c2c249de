"""What packed weights cost: a 14B in Q4_K_M, unpacked layer by layer, beside the same numbers in bfloat16.

    python -m benchmarks.packed                       # 832x480, 33 and 81 frames; under a minute on an H200
    python -m benchmarks.packed --small --device cpu  # to see that it runs

Random blocks, in the mix that such files have: Q6_K for values and the feed-forwards' second halves, Q4_K for
the rest. Both networks hold the same numbers, so their velocities are to be the same bits. One table; exit
code 1 if they are not, or if a packed step takes more than 5 % more time.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.measuring import GIB, alternating, milliseconds
from benchmarks.networks import Case, Workload, case_of, small_case
from benchmarks.report import table_of
from chitu_diffusion.config import EngineConfig
from chitu_diffusion.memory.offload import bytes_of
from chitu_diffusion.models.wan.transformer import WanTransformer
from chitu_diffusion.ops.packed_linear import BLOCKS, PackedLinear, pack_layers, unpack

MOST = 0.05
"""Of the time of a step in bfloat16, on top."""
_SCALES = {
    "Q8_0": ((0, 1.0),),
    "Q4_K": ((0, 1.0), (2, 7.5)),
    "Q5_K": ((0, 1.0), (2, 15.5)),
    "Q6_K": ((208, 1.0),),
}
"""Where the scales of a block stand, and what they are to each other so that numbers have the mean 0."""


def random_blocks(
    numbers: int, packing: str, deviation: float, device: torch.device, seed: int = 0
) -> Tensor:
    """Random blocks, [bytes] uint8, whose numbers have about this deviation."""
    count, size = BLOCKS[packing]
    generator = torch.Generator(device).manual_seed(seed)
    blocks = torch.randint(
        0, 256, (numbers // count, size), generator=generator, dtype=torch.uint8, device=device
    )

    def scale(by: float) -> None:
        for start, each in _SCALES[packing]:
            value = torch.tensor([each * by], dtype=torch.float16).view(torch.uint8)
            blocks[:, start : start + 2] = value.to(device)

    scale(1.0)
    scale(deviation / float(unpack(blocks[:1000].flatten(), packing, torch.float32).std()))
    return blocks.flatten()


def packing_of(name: str) -> str | None:
    """In which packing a Q4_K_M file has a parameter; None where in full."""
    if not name.startswith("blocks.") or not name.endswith(".weight") or "norm" in name:
        return None
    return "Q6_K" if name.endswith(("to_v.weight", "ffn.net.2.weight")) else "Q4_K"


class PackedWorkload(Workload):
    """A case whose network holds blocks, random ones."""

    def network(self, dtype: torch.dtype | None = None) -> WanTransformer:
        """The packed network; another dtype is not for it."""
        with torch.device("meta"):
            network = WanTransformer(self.case.config)
        weights = dict(self.weights)
        names = {name: packing for name in weights if (packing := packing_of(name)) is not None}
        packed = set(pack_layers(network, names))
        for number, (name, layer) in enumerate(network.named_modules()):
            if isinstance(layer, PackedLinear) and layer in packed:
                size = layer.in_features * layer.out_features
                layer.weight_packed = random_blocks(
                    size, layer.packing, layer.in_features**-0.5, self.device, number
                )
                layer.register_parameter("weight", None)
                del weights[f"{name}.weight"]
        network.load_state_dict(weights, strict=True, assign=True)
        return network.eval().requires_grad_(False)


def layers_of(network: nn.Module) -> list[tuple[str, PackedLinear]]:
    """The packed layers by name."""
    return [(name, layer) for name, layer in network.named_modules() if isinstance(layer, PackedLinear)]


def measure(cases: list[Case], device: torch.device, rounds: int) -> list[dict[str, Any]]:
    """Rows of the table; the sizes of video are of one network."""
    first = PackedWorkload(cases[0], device)
    args = EngineConfig(infer={"device": str(device), "dtype": "auto"})
    packed = first.backend(args)
    network = packed.model_pool[0]
    # the very numbers, in full
    for name, layer in layers_of(network):
        first.weights[f"{name}.weight"] = layer.unpacked(first.dtype)
    full = Workload(cases[0], device, like=first).backend(args)
    weights = {"packed": bytes_of(network), "in full": bytes_of(full.model_pool[0])}
    rows: list[dict[str, Any]] = [
        {"what": f"weights {name}", "GiB": size / GIB} for name, size in weights.items()
    ]
    layers = layers_of(network)
    unpacking, _ = milliseconds(lambda: [layer.unpacked(first.dtype) for _, layer in layers], device)
    rows.append({"what": f"unpacking {len(layers)} layers", "ms": unpacking})
    differ = 0
    for case in cases:
        workload = Workload(case, device, like=first)
        steps = {name: workload.step(backend) for name, backend in (("packed", packed), ("in full", full))}
        differ += not torch.equal(*(step() for step in steps.values()))
        times = {name: min(found.ms) for name, found in alternating(steps, rounds, device).items()}
        for name, ms in times.items():
            rows.append({"what": f"a guided step, {name}, {case.frames} frames", "ms": ms})
        rows[-2]["more"] = times["packed"] / times["in full"] - 1
    rows.append({"what": "velocities that differ", "count": differ})
    return rows


@torch.no_grad()
def main(words: list[str] | None = None) -> int:
    """The command line."""
    options = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument("--device", default="cuda")
    options.add_argument("--layers", type=int, default=40)
    options.add_argument("--rounds", type=int, default=3)
    options.add_argument("--small", action="store_true")
    asked = options.parse_args(words)
    device = torch.device(asked.device)
    if asked.small:
        small = small_case("small", 2, 2)
        config = replace(small.config, num_attention_heads=4)
        cases = [replace(small, spec=replace(small.spec, transformers=(config,)))]
    else:
        cases = [case_of("Wan2.1-T2V-14B", (832, 480, frames), asked.layers) for frames in (33, 81)]
    rows = measure(cases, device, asked.rounds)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    print(f"{name}, torch {torch.__version__}, {cases[-1].name}\n\n{table_of(rows)}")
    return int(rows[-1]["count"] > 0 or any(row.get("more", 0) > MOST for row in rows))


if __name__ == "__main__":
    raise SystemExit(main())
