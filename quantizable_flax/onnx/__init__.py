"""Models as ONNX graphs with explicit quantization: what ONNX Runtime and TensorRT read."""
