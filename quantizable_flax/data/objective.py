"""What each model is trained on: the transform from packed tokens to its batch."""

from ml_collections import ConfigDict

from quantizable_flax.data.masking import MaskTokens
from quantizable_flax.data.pipeline import Transform
from quantizable_flax.data.tokenizer import Tokenizer
from quantizable_flax.errors import UserError


def make_transform(config: ConfigDict, tokenizer: Tokenizer) -> Transform:
    """Returns the transform for `config.model`: masking for BERT.

    Raises:
      UserError: the tokenizer has more tokens than the model, or a mask rate outside (0, 1].
    """
    if tokenizer.vocab_size > config.model.vocab_size:
        raise UserError(
            f"the tokenizer has {tokenizer.vocab_size} tokens but model.vocab_size is "
            f"{config.model.vocab_size}: raise model.vocab_size or take another tokenizer."
        )
    return MaskTokens(tokenizer, config.data.mask_rate, config.model.max_predictions)
