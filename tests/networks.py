"""MDX networks that are small enough to be made in a test."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

onnx = pytest.importorskip("onnx")

BINS, FRAMES, N_FFT = 600, 16, 2048


def network(
    path: Path,
    cut: int | None = None,
    shape: tuple[int | str, ...] = (1, 4, BINS, FRAMES),
    kept: Sequence[float] = (1,),
) -> Path:
    """One that keeps all it is given, or the frequencies below a bin; `kept`: the share of each
    channel, or of all."""
    mask = np.ones((1, len(kept), int(shape[2]), 1), np.float32) * np.reshape(np.float32(kept), (1, -1, 1, 1))
    if cut is not None:
        mask[:, :, cut:] = 0
    helper = onnx.helper
    graph = helper.make_graph(
        [helper.make_node("Mul", ["x", "mask"], ["y"])],
        "mdx",
        [helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, shape)],
        [onnx.numpy_helper.from_array(mask, "mask")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    onnx.save(model, path)
    return path
