"""Schemas of the two torchvision operators that its CUDA wheel expects to find compiled when it is imported.

Next to a CPU build of torch that wheel cannot load its library; its import then fails at operators that SGLang never
calls. Import this before torchvision.
"""

import torch

library = torch.library.Library("torchvision", "DEF")  # type: ignore[no-untyped-call]
"""Declared for as long as this lives: as long as the process."""

for schema in (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
):
    library.define(schema)  # type: ignore[no-untyped-call]
