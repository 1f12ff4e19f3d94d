"""What cuDNN gets: the formula by JAX's own program for any device, and the call on a GPU."""

import jax
import jax.numpy as jnp
import pytest

from quantizable_flax import Mask, UserError, make_softmax
from quantizable_flax.kernels import cudnn
from quantizable_flax.kernels.attention import fused_attention
from quantizable_flax.kernels.scheme import Scheme
from quantizable_flax.nn.fused import choose, fused
from tests.kernels.case import Case, check_path

VANILLA = make_softmax()
LONG = jnp.zeros((1, 1024, 2, 64), jnp.bfloat16)


@pytest.mark.parametrize("case", [Case(70, 33), Case(40, 40, Scheme(0.3, causal=True))])
def test_the_formula(monkeypatch, case):
    monkeypatch.setattr(cudnn, "IMPLEMENTATION", "xla")
    check_path("cudnn", case)


class Hopper:
    platform, device_kind, compute_capability = "gpu", "a GPU", "9.0"


@pytest.fixture
def a_gpu(monkeypatch):
    monkeypatch.setattr("quantizable_flax.nn.fused.platform", lambda: "gpu")
    monkeypatch.setattr(cudnn.jax, "devices", lambda: [Hopper])


@pytest.mark.usefixtures("a_gpu")
@pytest.mark.parametrize(
    ("softmax", "mask", "operands", "reason"),
    [
        (VANILLA, None, LONG, None),
        (VANILLA, Mask(causal=True), LONG, None),
        (make_softmax("clipped", gamma=-0.1), None, LONG, "a clipped softmax"),
        (make_softmax(sink="zero"), None, LONG, "cannot compute a sink"),
        (VANILLA, Mask(jnp.ones((1, 1024))), LONG, "cannot compute padding and segments"),
        (VANILLA, None, LONG.astype(jnp.float32), r"not bfloat16 \(found float32"),
        (VANILLA, None, LONG[..., :60], r"width not in 8, 16, .* \(found 60"),
    ],
)
def test_what_it_can_do_it_gets(softmax, mask, operands, reason):
    found = choose("auto", softmax, mask, *(operands,) * 3)
    assert found == ("cudnn" if reason is None else "blockwise")
    if reason is None:
        assert choose("cudnn", softmax, mask, *(operands,) * 3) == "cudnn"
        return
    with pytest.raises(UserError, match=f"attention_kernel=cudnn: .*{reason}"):
        choose("cudnn", softmax, mask, *(operands,) * 3)


def test_an_older_gpu_and_a_cpu_are_refused(monkeypatch, a_gpu):
    monkeypatch.setattr(Hopper, "compute_capability", "7.5")
    with pytest.raises(UserError, match="no NVIDIA GPU of Ampere or later"):
        choose("cudnn", VANILLA, None, LONG, LONG, LONG)
    monkeypatch.undo()
    with pytest.raises(UserError, match="attention_kernel=cudnn: needs a GPU, found cpu"):
        choose("cudnn", VANILLA, None, LONG, LONG, LONG)


def test_dropout_stays_ours():
    """The counter of the other programs, whatever was chosen for the forward pass without it."""
    q = jax.random.normal(jax.random.key(0), (1, 8, 2, 16))
    found, expected = (
        fused(path, VANILLA, q, q, q, dropout_rate=0.5, dropout_key=jax.random.key(1))
        for path in ("cudnn", "blockwise")
    )
    assert (found == expected).all()


def test_a_gpu_gets_a_call_of_cudnn_forwards_and_backwards(monkeypatch):
    library = "jax._src.cudnn.fused_attention_stablehlo."
    monkeypatch.setattr(library + "check_cudnn_version", lambda: 91100)
    monkeypatch.setattr(library + "check_compute_capability", lambda _: True)
    monkeypatch.setattr(library + "is_cuda_compute_capability_equal", lambda _: False)

    def loss(q, k, v):
        return jnp.sum(fused_attention("cudnn", Scheme(0.125), q, k, v).astype(jnp.float32))

    gradients = jax.jit(jax.grad(loss, (0, 1, 2))).trace(LONG, LONG, LONG)
    text = gradients.lower(lowering_platforms=("cuda",)).as_text()
    assert "__cudnn$fmhaSoftmax(" in text
    assert "__cudnn$fmhaSoftmaxBackward(" in text
