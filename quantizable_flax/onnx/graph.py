"""An ONNX graph while it is written; the one file that imports `onnx`."""

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from quantizable_flax.errors import UserError
from quantizable_flax.onnx.opsets import check_opset

try:
    from onnx import TensorProto, checker, helper, numpy_helper, save_model, shape_inference
except ImportError as error:
    raise UserError(
        "an ONNX export needs the library onnx, found it not installed; run: "
        "pip install 'quantizable_flax[onnx]'"
    ) from error

LARGEST_FILE = 2**31 - 2**24  # protobuf ends at 2 GiB; some of it is left for nodes and names
TYPES = {
    "float32": TensorProto.FLOAT,
    "int64": TensorProto.INT64,
    "bool": TensorProto.BOOL,
    "uint8": TensorProto.UINT8,
}
FLOAT, INT64, BOOL = (TYPES[name] for name in ("float32", "int64", "bool"))


class Graph:
    """Nodes, weights, inputs and outputs in the order in which they are added.

    Every value has a name that says where in the model it arises: names are paths below the scope
    in which they are added, and are made unique. Arrays that are equal are kept once.

    Attributes:
      opset: of the ONNX standard.
      reasons: why a node computes in floating point, by the node's name, where someone said so.
    """

    def __init__(self, opset: int):
        """Starts an empty graph.

        Args:
          opset: as `check_opset` has it.

        Raises:
          UserError: another opset.
        """
        check_opset(opset)
        self.opset = opset
        self.reasons: dict[str, str] = {}
        self._nodes: list[Any] = []
        self._inputs: list[Any] = []
        self._outputs: list[Any] = []
        self._arrays: dict[str, np.ndarray] = {}
        self._constants: dict[tuple, str] = {}
        self._taken: set[str] = set()
        self._scope: tuple[str, ...] = ()
        self._reason: str | None = None

    @contextlib.contextmanager
    def scope(self, *names: str) -> Iterator[None]:
        """Puts names before those of all that is added within."""
        before, self._scope = self._scope, (*self._scope, *names)
        yield
        self._scope = before

    @contextlib.contextmanager
    def because(self, reason: str | None) -> Iterator[None]:
        """Says why what is added within computes in floating point; None leaves it unsaid."""
        before, self._reason = self._reason, reason or self._reason
        yield
        self._reason = before

    @property
    def path(self) -> str:
        """The scope, `layer_0/attention`."""
        return "/".join(self._scope)

    def input(self, name: str, dtype: str, shape: Sequence[int | str]) -> str:
        """Adds an input; axes of no fixed size have a name. Returns the value's name."""
        self._taken.add(name)
        self._inputs.append(helper.make_tensor_value_info(name, TYPES[dtype], shape))
        return name

    def output(self, name: str, value: str, dtype: str, shape: Sequence[int | str]) -> None:
        """Makes a value an output of this name."""
        self._taken.add(name)
        self._nodes.append(helper.make_node("Identity", [value], [name], name=f"{name}/Identity"))
        self._outputs.append(helper.make_tensor_value_info(name, TYPES[dtype], shape))

    def node(self, op: str, *inputs: str, name: str | None = None, **attributes: Any) -> str:
        """Adds a node of one output, and returns the name of that.

        Args:
          op: of the standard's operators.
          inputs: names of values; "" for one that is left out.
          name: of the value, below the scope; by default the operator's.
          attributes: of the operator.
        """
        value = self._unique(name or op)
        self._nodes.append(helper.make_node(op, inputs, [value], name=value, **attributes))
        if self._reason is not None:
            self.reasons[value] = self._reason
        return value

    def array(self, name: str, value: np.ndarray) -> str:
        """Adds a weight under the scope, and returns its name."""
        name = self._unique(name)
        self._arrays[name] = np.ascontiguousarray(value).reshape(np.shape(value))
        return name

    def shared(self, name: str, value: np.ndarray) -> str:
        """A weight that two places read: the second time under the name of the first."""
        path = self._path(name)
        if path not in self._arrays:
            return self.array(name, value)
        return path

    def constant(self, value: Any, dtype: Any = np.float32) -> str:
        """A small array that need not be named; the same one for equal values."""
        array = np.asarray(value, dtype)
        key = (array.dtype.str, array.shape, array.tobytes())
        if key not in self._constants:
            shown = "_".join(map(str, array.ravel()[:4])) or "none"
            with self.at(""):
                self._constants[key] = self.array(f"constant/{array.dtype}_{shown}", array)
        return self._constants[key]

    def size(self) -> int:
        """Bytes of all weights."""
        return sum(array.nbytes for array in self._arrays.values())

    def finish(self) -> Any:
        """Returns the ModelProto, with the shapes that the standard's inference finds.

        Raises:
          onnx.checker.ValidationError, onnx.shape_inference.InferenceError: a mistake of ours.
        """
        if self.size() > LARGEST_FILE:
            return self._model()  # checked by its file: see `write`
        model = self._model()
        checker.check_model(model, full_check=True)
        return shape_inference.infer_shapes(
            model, check_type=True, strict_mode=True, data_prop=True
        )

    def _model(self) -> Any:
        graph = helper.make_graph(
            self._nodes,
            "quantizable_flax",
            self._inputs,
            self._outputs,
            [numpy_helper.from_array(array, name) for name, array in self._arrays.items()],
        )
        opset = helper.make_opsetid("", self.opset)
        version = helper.find_min_ir_version_for([opset])
        return helper.make_model(
            graph, opset_imports=[opset], ir_version=version, producer_name="quantizable_flax"
        )

    @contextlib.contextmanager
    def at(self, path: str) -> Iterator[None]:
        """Names what is added within by another path, whatever the scope."""
        before, self._scope = self._scope, tuple(filter(None, path.split("/")))
        yield
        self._scope = before

    def _path(self, name: str) -> str:
        return "/".join((*self._scope, name))

    def _unique(self, name: str) -> str:
        path = self._path(name)
        unique, number = path, 1
        while unique in self._taken:
            number += 1
            unique = f"{path}_{number}"
        self._taken.add(unique)
        return unique


def write(model: Any, path: Path) -> None:
    """Writes a model from `Graph.finish` to a file; its weights beside it where they are too large.

    Raises:
      OSError: the file cannot be written.
    """
    external = sum(len(x.raw_data) for x in model.graph.initializer) > LARGEST_FILE
    save_model(
        model,
        str(path),
        save_as_external_data=external,
        location=f"{path.name}.data" if external else None,
    )
    if external:
        checker.check_model(str(path), full_check=True)
