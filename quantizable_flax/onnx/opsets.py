"""Which opsets of the ONNX standard are written; known without the library."""

from quantizable_flax.errors import UserError

LEAST = 20  # Gelu is of 20, LayerNormalization of 17
MOST = 24  # what ONNX Runtime 1.32 was tested with
WIDE = 21  # QuantizeLinear of more than 8 bits


def check_opset(opset: int) -> None:
    """Raises UserError for an opset that is not written."""
    if not LEAST <= opset <= MOST:
        raise UserError(
            f"--opset must be in {LEAST}..{MOST}, found {opset}: take {LEAST}, which most readers "
            "know."
        )
