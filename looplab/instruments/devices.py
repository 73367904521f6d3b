"""What accelerators can do at most, from the data sheets of their makers: the units that a share of the peak is of.

Peaks are dense, without structured sparsity. In bf16 they are those of the matrix units with accumulation in float32;
in fp32 those of the vector units, since this project does not switch on TF32.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Device:
    """One accelerator.

    Args:
        name: as torch reports it, or a part of that.
        memory: bytes.
        bf16, fp32: FLOP/s at most, of products in that precision.
        link: bytes/s that it sends to the others of its machine at most; to the network where it has no such link.
    """

    name: str
    memory: int
    bf16: float
    fp32: float
    link: float


# What commands call it -> what it is. The first whose name is in the reported one is meant: longer names come first.
DEVICES = {
    "h200": Device("H200", 141 * 10**9, 989e12, 67e12, 450e9),
    "h100-pcie": Device("H100 PCIe", 80 * 10**9, 756e12, 51e12, 64e9),
    "h100": Device("H100", 80 * 10**9, 989e12, 67e12, 450e9),
    "b200": Device("B200", 180 * 10**9, 2250e12, 75e12, 900e9),
    "a100-40gb": Device("A100-SXM4-40GB", 40 * 10**9, 312e12, 19.5e12, 300e9),
    "a100": Device("A100", 80 * 10**9, 312e12, 19.5e12, 300e9),
    "l40s": Device("L40S", 48 * 10**9, 362e12, 91.6e12, 32e9),
    "l4": Device("L4", 24 * 10**9, 121e12, 30.3e12, 32e9),
    "rtx-5090": Device("RTX 5090", 32 * 10**9, 209e12, 105e12, 64e9),
    "rtx-4090": Device("RTX 4090", 24 * 10**9, 165e12, 82.6e12, 32e9),
}


def known_device(reported: str) -> Device | None:
    """The device that torch reports under a name such as "NVIDIA H100 80GB HBM3"; None for one that is not listed."""
    return next((device for device in DEVICES.values() if device.name in reported), None)


def peak_of(device: "torch.device", precision: str) -> float | None:
    """FLOP/s that a device of this machine can do at most in "bf16" or "fp32"; None where it is not known."""
    if device.type != "cuda":
        return None
    import torch

    found = known_device(torch.cuda.get_device_name(device))
    return None if found is None else {"bf16": found.bf16, "fp32": found.fp32}[precision]
