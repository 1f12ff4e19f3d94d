"""`python -m tests.nn.fused_mesh` prints how far attention on meshes is from that of one device."""

import json

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh

from quantizable_flax import Mask, make_softmax
from quantizable_flax.nn.fused import fused
from quantizable_flax.nn.partition import AXES, on_mesh

MESHES = ((8, 1, 1, 1), (2, 2, 2, 1), (1, 2, 2, 2), (1, 2, 1, 4), (1, 1, 8, 1))
SOFTMAX = make_softmax("clipped", gamma=-0.02, zeta=1.01, sink="learned")
BY_ROW = make_softmax("clipped", alpha=0.4, length_normalised=True, sink="learned")


def main() -> None:
    rng = np.random.default_rng(0)
    arrays = [jnp.asarray(rng.normal(size=(4, 32, 4, 16)), jnp.float32) for _ in range(4)]
    mask = Mask(jnp.asarray(rng.random((4, 32)) < 0.7), causal=True)
    sink = jnp.asarray(rng.normal(size=4), jnp.float32)

    def loss(softmax, q, k, v, d_out, sink):
        options = {"sink_H": sink, "dropout_rate": 0.3, "dropout_key": jax.random.key(3)}
        return jnp.sum(d_out * fused("blockwise", softmax, q, k, v, mask, **options))

    def results(mesh, softmax):
        def run(*arrays):
            with on_mesh(mesh):
                return jax.value_and_grad(loss, (1, 2, 3, 5))(softmax, *arrays)

        return jax.tree.leaves(jax.device_get(jax.jit(run)(*arrays, sink)))

    whole, differences = {softmax: results(None, softmax) for softmax in (SOFTMAX, BY_ROW)}, {}
    for shape, softmax in (*((shape, SOFTMAX) for shape in MESHES), (MESHES[1], BY_ROW)):
        devices = np.array(jax.devices()).reshape(shape)
        found = results(Mesh(devices, AXES, axis_types=(AxisType.Auto,) * 4), softmax)
        differences[f"{shape}, {softmax.alpha}"] = max(
            float(np.abs(a - b).max() / np.abs(b).max())
            for a, b in zip(found, whole[softmax], strict=True)
        )
    print(json.dumps(differences))


if __name__ == "__main__":
    main()
