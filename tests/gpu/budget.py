"""What compiled kernels take, against what they may."""

from __future__ import annotations

# What ptxas does with the same source differs a little between versions of a patch level.
REGISTERS_SLACK, SPILL_SLACK = 8, 16


def over(found: dict[str, dict[str, int]], allowed: dict[str, dict[str, int]]) -> list[str]:
    """Complaints: figures by kernel, above their budget."""
    complaints = []
    for name, figures in found.items():
        budget = allowed[name]
        if figures["shared"] > budget["shared"]:
            complaints.append(
                f"{name}: {figures['shared']} bytes of shared memory, allowed {budget['shared']}"
            )
        if figures["registers"] > budget["registers"] + REGISTERS_SLACK:
            complaints.append(f"{name}: {figures['registers']} registers, allowed {budget['registers']}")
        if figures["spilled"] > budget["spilled"] + SPILL_SLACK:
            complaints.append(f"{name}: {figures['spilled']} bytes spilled, allowed {budget['spilled']}")
        if figures["products"] < budget["products"]:
            complaints.append(
                f"{name}: {figures['products']} tensor-core instructions, expected {budget['products']}"
            )
    return complaints
