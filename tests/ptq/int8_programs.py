"""What products a program has, by the types of their operands; run as a script, for a TPU."""

import collections
import functools
import json
import os
import re

import jax

Counts = dict[str, int]

# A layer has q, k, v, scores, context, output and two of the FFN.
PRODUCTS = {"bert": (8, 2), "opt": (8, 1), "opt projected": (8, 3), "vit": (8, 2)}
LAYERS = 1
SIZES = {"opt projected": {"pre_layer_norm": False, "embed_size": 16}}


def of_stablehlo(text: str) -> Counts:
    """`i8 x i8 -> i32` and the like -> how often, before any optimization."""
    found = re.findall(
        r"stablehlo\.(?:dot_general|convolution|dot)\b.*: \(tensor<(.*?)>, tensor<(.*?)>\)"
        r" -> tensor<(.*?)>",
        text,
    )
    types = ([shape.split("x")[-1] for shape in one] for one in found)
    return dict(collections.Counter(f"{x} x {y} -> {out}" for x, y, out in types))


def of_hlo(text: str) -> Counts:
    """The same of a compiled program: also what sits inside fusions, on a TPU as convolutions."""
    counts: collections.Counter[str] = collections.Counter()
    types: dict[str, str] = {}
    for line in text.splitlines():
        if line.endswith("{"):  # a computation begins; names are its own
            types = {}
        known = re.match(r"\s*(?:ROOT )?%?([\w.\-]+) = (\w+)\[", line)
        if known is None:
            continue
        types[known[1]] = known[2]
        operands = re.search(r" (?:dot|convolution)\(([^)]*)\)", line)
        if operands is not None:
            # Newer versions write the operand's type before its name.
            names = re.findall(r"%([\w.\-]+)", operands[1]) or re.findall(r"[\w.\-]+", operands[1])
            x, y = (types[name] for name in names[:2])
            counts[f"{x} x {y} -> {known[2]}"] += 1
    assert "custom-call" not in text or "matmul" not in text  # nothing that is not counted
    return dict(counts)


def small_int8(name: str, gate: str, setup: str):
    """(function of codes and inputs, its arguments) of a small model."""
    from quantizable_flax import QuantSpec
    from quantizable_flax.quantization.spec import parse_coverage
    from tests.ptq.int8_case import inputs_of, make_case

    family = name.split()[0]
    spec = QuantSpec(**parse_coverage(setup))
    case = make_case(family, spec, {"gate": gate}, num_layers=LAYERS, **SIZES.get(name, {}))

    def forward(codes, *inputs):
        return case.native.apply({"params": codes}, *inputs)

    return forward, (case.codes, *inputs_of(family)), case


def main() -> None:
    """Compiles for one TPU v5e, which need not be there, and prints the products as JSON."""
    from jax.experimental import topologies

    topology = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x2")
    one = jax.sharding.SingleDeviceSharding(topology.devices[0])
    shape = functools.partial(jax.ShapeDtypeStruct, sharding=one)
    found = {}
    for name in PRODUCTS:
        for gate in ("none", "linear"):
            forward, arguments, _ = small_int8(name, gate, "all")
            shapes = jax.tree.map(lambda x: shape(x.shape, x.dtype), arguments)
            found[f"{name}, {gate}"] = of_hlo(jax.jit(forward).lower(*shapes).compile().as_text())
    print(json.dumps(found))


if __name__ == "__main__":
    os.environ["JAX_PLATFORMS"] = "cpu"
    main()
