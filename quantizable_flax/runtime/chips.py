"""Published peaks of accelerators, for utilisation and roofline estimates.

A chip that is not here is left out of such estimates; nothing else depends on this table.
"""

import dataclasses

GIB, GB, TERA = 2**30, 1e9, 1e12


@dataclasses.dataclass(frozen=True)
class Chip:
    """Peaks of one chip, which JAX shows as one device. Dense products, no structured sparsity.

    Attributes:
      name: short name; of a TPU the one that topology names begin with, as in `v5e:4x4`.
      bf16_flops: bfloat16 FLOP/s of the matrix units (2 per multiply-add).
      int8_ops: int8 OP/s of the matrix units (2 per multiply-add).
      hbm_bytes: capacity of the device memory.
      hbm_bandwidth: of the device memory, bytes/s.
      link_bandwidth: bytes/s that a chip can send over all its links to other chips (ICI or
        NVLink) at once; one direction, so half of what is documented as bidirectional.
      device_kinds: what `jax.Device.device_kind` says.
    """

    name: str
    bf16_flops: float
    int8_ops: float
    hbm_bytes: float
    hbm_bandwidth: float
    link_bandwidth: float
    device_kinds: tuple[str, ...]


# TPUs: cloud.google.com/tpu/docs/v4, /v5e, /v5p, /v6e. Where a page gives interconnect in Gbps
# (v5e 1600, v5p 4800) that is one direction; newer versions of the same pages give twice as many
# bytes and say bidirectional (400, 1200, v6e 800 GB/s). v4 has 6 links of 50 GB/s each way
# (arXiv 2304.01433, table 4). The v5p page has lost its int8 line: the value is the one in
# jax/_src/pallas/mosaic/tpu_info.py, which agrees with the pages on the other chips. Device kinds
# are those of the same file.
# GPUs: NVIDIA's data sheets of A100, H100 and H200, dense values (those marked with sparsity are
# twice as large); NVLink there is bidirectional, here halved.
# fmt: off
CHIPS = (
    Chip("v4", 275 * TERA, 275 * TERA, 32 * GIB, 1200 * GB, 300 * GB, ("TPU v4",)),
    Chip("v5e", 197 * TERA, 393 * TERA, 16 * GIB, 819 * GB, 200 * GB, ("TPU v5 lite", "TPU v5e")),
    Chip("v5p", 459 * TERA, 918 * TERA, 95 * GIB, 2765 * GB, 600 * GB, ("TPU v5", "TPU v5p")),
    Chip("v6e", 918 * TERA, 1836 * TERA, 32 * GIB, 1640 * GB, 400 * GB, ("TPU v6 lite", "TPU v6e")),
    Chip("a100", 312 * TERA, 624 * TERA, 40 * GB, 1555 * GB, 300 * GB, ("NVIDIA A100-SXM4-40GB",)),
    Chip("a100-80gb", 312 * TERA, 624 * TERA, 80 * GB, 2039 * GB, 300 * GB,
         ("NVIDIA A100-SXM4-80GB",)),
    Chip("h100", 989 * TERA, 1979 * TERA, 80 * GB, 3350 * GB, 450 * GB, ("NVIDIA H100 80GB HBM3",)),
    Chip("h200", 989 * TERA, 1979 * TERA, 141 * GB, 4800 * GB, 450 * GB, ("NVIDIA H200",)),
)
# fmt: on


def chip_of(name: str) -> Chip | None:
    """Returns the chip of a device kind (`TPU v5 lite`) or of a short name (`v5e`), or None.

    Names are compared whole, so that a slice of a GPU (MIG) or another board is not taken for it.
    """
    for chip in CHIPS:
        if name == chip.name or name in chip.device_kinds:
            return chip
    return None
