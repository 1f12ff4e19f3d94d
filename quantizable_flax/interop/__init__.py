"""Weights of the original implementation and of Hugging Face as our parameters."""

from collections.abc import Mapping

import ml_collections
import numpy as np

from quantizable_flax.errors import check_choice
from quantizable_flax.interop.bert import bert_params
from quantizable_flax.interop.opt import opt_params
from quantizable_flax.interop.torch_layout import Tree
from quantizable_flax.interop.vit import vit_params

READERS = {"bert": bert_params, "opt": opt_params, "vit": vit_params}


def from_state_dict(mapping: Mapping[str, np.ndarray], config: ml_collections.ConfigDict) -> Tree:
    """Returns the `params` of `build_model(config)` from tensors under their original names.

    Args:
      mapping: original tensor name -> array in PyTorch's layout (a `state_dict` as numpy); what
        torch.compile, DDP, FSDP and Lightning put before or into the names is left away.
      config: as for `build_model`.

    Raises:
      UserError: unknown model, a missing tensor or head, a wrong shape, a tensor without a place,
        or an untied head.
    """
    name = config.model.name
    check_choice("model.name", name, READERS)
    return READERS[name](mapping, config)
